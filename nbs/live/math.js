// The pieces of a Llama that are no matrix products, forward and backward. All matrices are by rows
// in one long array: T rows of a width; `d…` is the gradient of the loss by what it names.

// RMSNorm: y = x / rms(x) * w. `scales` keeps 1 / rms of each row for the way back.
export function rmsNorm(y, x, w, scales, T, eps) {
  const width = w.length
  for (let t = 0; t < T; t++) {
    const at = t * width
    let sum = 0
    for (let i = 0; i < width; i++) sum += x[at + i] * x[at + i]
    const scale = 1 / Math.sqrt(sum / width + eps)
    for (let i = 0; i < width; i++) y[at + i] = x[at + i] * scale * w[i]
    scales[t] = scale
  }
}

export function rmsNormBack(dx, dy, x, w, dw, scales, T) { // adds to dx and dw
  const width = w.length
  for (let t = 0; t < T; t++) {
    const at = t * width
    const k = scales[t]
    let dot = 0
    for (let i = 0; i < width; i++) {
      const both = dy[at + i] * x[at + i]
      dw[i] += both * k
      dot += both * w[i]
    }
    dot *= k * k / width
    for (let i = 0; i < width; i++) dx[at + i] += k * (dy[at + i] * w[i] - x[at + i] * dot)
  }
}

// The rotary embedding's cosines and sines: positions x half a head.
export function rotary({ head_dim, max_position_embeddings: positions, rope_parameters }) {
  const half = head_dim / 2
  const cos = new Float32Array(positions * half)
  const sin = new Float32Array(positions * half)
  for (let i = 0; i < half; i++) { // rounded where torch rounds
    const frequency = Math.fround(1 / Math.fround(rope_parameters.rope_theta ** (i / half)))
    for (let p = 0; p < positions; p++) {
      cos[p * half + i] = Math.cos(Math.fround(p * frequency))
      sin[p * half + i] = Math.sin(Math.fround(p * frequency))
    }
  }
  return { cos, sin, half }
}

// Turns the heads of one row, v[from] to v[to], by the angles of its position; sign -1 turns back.
export function rotate(v, from, to, position, { cos, sin, half }, sign = 1) {
  const angle = position * half
  for (let at = from; at < to; at += 2 * half) {
    for (let i = 0; i < half; i++) {
      const c = cos[angle + i]
      const s = sign * sin[angle + i]
      const a = v[at + i]
      const b = v[at + i + half]
      v[at + i] = a * c - b * s
      v[at + i + half] = b * c + a * s
    }
  }
}

// One query over the first n keys: out = softmax(q k^T / sqrt(dim)) v. `at` is the place of the
// query and of what comes out, `from` that of the first key and value, `width` the step from
// key to key. `row` receives the probabilities.
export function attend(out, row, { q, k, v }, { at, from, n, dim, width }) {
  let max = -Infinity
  for (let u = 0; u < n; u++) {
    const other = from + u * width
    let dot = 0
    for (let i = 0; i < dim; i++) dot += q[at + i] * k[other + i]
    row[u] = dot / Math.sqrt(dim)
    if (row[u] > max) max = row[u]
  }
  let sum = 0
  for (let u = 0; u < n; u++) {
    row[u] = Math.exp(row[u] - max)
    sum += row[u]
  }
  out.fill(0, at, at + dim)
  for (let u = 0; u < n; u++) {
    row[u] /= sum
    const other = from + u * width
    for (let i = 0; i < dim; i++) out[at + i] += row[u] * v[other + i]
  }
}

// One head over a text of n tokens, each looking at itself and those before it. `at` is the head's
// first place, `width` the step from token to token. Returns the probabilities, n x n.
export function attention(out, qkv, { at, n, dim, width }) {
  const P = new Float32Array(n * n)
  for (let t = 0; t < n; t++) {
    const place = { at: at + t * width, from: at, n: t + 1, dim, width }
    attend(out, P.subarray(t * n, t * n + t + 1), qkv, place)
  }
  return P
}

export function attentionBack({ dq, dk, dv }, dout, P, { q, k, v }, { at, n, dim, width }) {
  const dP = new Float32Array(n)
  for (let t = 0; t < n; t++) { // adds to dq, dk and dv
    const mine = at + t * width
    let mean = 0 // of dP, weighted by P: the gradient of softmax takes it off
    for (let u = 0; u <= t; u++) {
      const other = at + u * width
      const p = P[t * n + u]
      let dot = 0
      for (let i = 0; i < dim; i++) {
        dot += dout[mine + i] * v[other + i]
        dv[other + i] += p * dout[mine + i]
      }
      dP[u] = dot
      mean += dot * p
    }
    for (let u = 0; u <= t; u++) {
      const other = at + u * width
      const d = P[t * n + u] * (dP[u] - mean) / Math.sqrt(dim)
      for (let i = 0; i < dim; i++) {
        dq[mine + i] += d * k[other + i]
        dk[other + i] += d * q[mine + i]
      }
    }
  }
}

export function gated(out, gate, up, n) { // silu(gate) * up
  for (let i = 0; i < n; i++) out[i] = gate[i] / (1 + Math.exp(-gate[i])) * up[i]
}

export function gatedBack(dgate, dup, dout, gate, up, n) {
  for (let i = 0; i < n; i++) {
    const s = 1 / (1 + Math.exp(-gate[i]))
    dgate[i] = dout[i] * up[i] * s * (1 + gate[i] * (1 - s))
    dup[i] = dout[i] * gate[i] * s
  }
}

// The mean over `targets` of -log softmax(logits)[wanted]; the logits become their gradients.
export function crossEntropy(logits, wanted, width, targets) {
  let loss = 0
  wanted.forEach((id, j) => {
    const row = logits.subarray(j * width, (j + 1) * width)
    let max = -Infinity
    for (let i = 0; i < width; i++) if (row[i] > max) max = row[i]
    const right = row[id] - max
    let sum = 0
    for (let i = 0; i < width; i++) {
      row[i] = Math.exp(row[i] - max)
      sum += row[i]
    }
    loss += Math.log(sum) - right
    for (let i = 0; i < width; i++) row[i] /= sum * targets
    row[id] -= 1 / targets
  })
  return loss / targets
}
