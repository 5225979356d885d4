// What takes the time, in AssemblyScript: `python tools/live.py build` makes kernel.wasm of it.
// Matrices are float32, by rows; an f32x4 holds four numbers of a row, and one instruction
// multiplies them all. Addresses are in bytes: `<< 2` makes bytes of a number of floats.

// @ts-ignore: decorator
@inline
function fma(sum: v128, a: v128, b: v128): v128 {
  return f32x4.add(sum, f32x4.mul(a, b))
}

// @ts-ignore: decorator
@inline
function put(at: usize, left: v128, right: v128, add: bool): void { // eight numbers
  if (add) {
    left = f32x4.add(left, v128.load(at))
    right = f32x4.add(right, v128.load(at, 16))
  }
  v128.store(at, left)
  v128.store(at, right, 16)
}

// C = A B, or C += A B. A is M x K with any steps between its rows and columns, so that it may be
// a transposed matrix; B is K x N and C is M x N, by rows; 8 divides N.
export function gemm(
  M: i32, N: i32, K: i32, A: usize, rowStep: i32, columnStep: i32, B: usize, C: usize, add: bool,
): void {
  const down = <usize>rowStep << 2
  const right = <usize>columnStep << 2
  const width = <usize>N << 2
  for (let n: usize = 0; n < width; n += 32) { // eight columns of B and C
    let m = 0
    for (; m + 4 <= M; m += 4) { // a tile of C, 4 x 8, in registers
      let a0 = A + <usize>m * down
      let a1 = a0 + down
      let a2 = a1 + down
      let a3 = a2 + down
      let b = B + n
      let x0 = f32x4.splat(0)
      let x1 = x0
      let x2 = x0
      let x3 = x0
      let y0 = x0
      let y1 = x0
      let y2 = x0
      let y3 = x0
      for (let k = 0; k < K; k++) {
        const left = v128.load(b)
        const right4 = v128.load(b, 16)
        const s0 = v128.load32_splat(a0)
        const s1 = v128.load32_splat(a1)
        const s2 = v128.load32_splat(a2)
        const s3 = v128.load32_splat(a3)
        x0 = fma(x0, s0, left)
        y0 = fma(y0, s0, right4)
        x1 = fma(x1, s1, left)
        y1 = fma(y1, s1, right4)
        x2 = fma(x2, s2, left)
        y2 = fma(y2, s2, right4)
        x3 = fma(x3, s3, left)
        y3 = fma(y3, s3, right4)
        b += width
        a0 += right
        a1 += right
        a2 += right
        a3 += right
      }
      const c = C + <usize>m * width + n
      put(c, x0, y0, add)
      put(c + width, x1, y1, add)
      put(c + 2 * width, x2, y2, add)
      put(c + 3 * width, x3, y3, add)
    }
    for (; m < M; m++) { // the rows that are left
      let a = A + <usize>m * down
      let b = B + n
      let x = f32x4.splat(0)
      let y = x
      for (let k = 0; k < K; k++) {
        const s = v128.load32_splat(a)
        x = fma(x, s, v128.load(b))
        y = fma(y, s, v128.load(b, 16))
        b += width
        a += right
      }
      put(C + <usize>m * width + n, x, y, add)
    }
  }
}

// @ts-ignore: decorator
@inline
function total(v: v128): f32 {
  return (f32x4.extract_lane(v, 0) + f32x4.extract_lane(v, 1))
    + (f32x4.extract_lane(v, 2) + f32x4.extract_lane(v, 3))
}

// out = W x: W has `outs` rows (4 divides them) of `ins` numbers (8 divides them).
export function matvec(out: usize, W: usize, x: usize, outs: i32, ins: i32): void {
  const width = <usize>ins << 2
  for (let o = 0; o < outs; o += 4) {
    const w = W + <usize>o * width
    let a = f32x4.splat(0)
    let b = a
    let c = a
    let d = a
    for (let i: usize = 0; i < width; i += 16) {
      const v = v128.load(x + i)
      a = fma(a, v, v128.load(w + i))
      b = fma(b, v, v128.load(w + width + i))
      c = fma(c, v, v128.load(w + 2 * width + i))
      d = fma(d, v, v128.load(w + 3 * width + i))
    }
    v128.store(out + (<usize>o << 2), f32x4(total(a), total(b), total(c), total(d)))
  }
}

// `to` (columns x rows) becomes the transpose of `from`, in bands of 8 rows, for the cache.
export function transpose(rows: i32, columns: i32, from: usize, to: usize): void {
  for (let band = 0; band < rows; band += 8) {
    const end = min(band + 8, rows)
    for (let c = 0; c < columns; c++) {
      for (let r = band; r < end; r++) {
        const value = load<f32>(from + ((<usize>r * columns + c) << 2))
        store<f32>(to + ((<usize>c * rows + r) << 2), value)
      }
    }
  }
}

export function sumOfSquares(n: i32, values: usize): f64 {
  let sum: f64 = 0
  for (let i = 0; i < n; i++) {
    const v = <f64>load<f32>(values + (<usize>i << 2))
    sum += v * v
  }
  return sum
}

// One step of AdamW without weight decay on n numbers (4 divides n): weights w, gradients g and
// their two moments. `clip` shortens the gradient; rate is divided by 1 - 0.9^t, root is the square
// root of 1 - 0.999^t.
export function adamw(
  n: i32, w: usize, g: usize, first: usize, second: usize, clip: f32, rate: f32, root: f32,
): void {
  const b1 = f32x4.splat(0.9)
  const c1 = f32x4.splat(0.1)
  const b2 = f32x4.splat(0.999)
  const c2 = f32x4.splat(0.001)
  const epsilon = f32x4.splat(1e-8)
  const shorter = f32x4.splat(clip)
  const step = f32x4.splat(rate)
  const scale = f32x4.splat(root)
  for (let i: usize = 0, end = <usize>n << 2; i < end; i += 16) {
    const gradient = f32x4.mul(v128.load(g + i), shorter)
    const square = f32x4.mul(gradient, gradient)
    const mean = fma(f32x4.mul(v128.load(first + i), b1), gradient, c1)
    const variance = fma(f32x4.mul(v128.load(second + i), b2), square, c2)
    v128.store(first + i, mean)
    v128.store(second + i, variance)
    const length = f32x4.add(f32x4.div(f32x4.sqrt(variance), scale), epsilon)
    const change = f32x4.div(f32x4.mul(step, mean), length)
    v128.store(w + i, f32x4.sub(v128.load(w + i), change))
  }
}
