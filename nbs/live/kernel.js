// kernel.wasm with a memory of its own: arrays that JavaScript and the kernel both see.

const PAGE = 65536 // bytes
const STATICS = 4096 // bytes at the beginning that are the compiler's

export const compile = bytes => WebAssembly.compile(bytes) // fails where SIMD is missing

export class Kernel {
  constructor(module, floats) { // room for so many float32
    this.memory = new WebAssembly.Memory({ initial: Math.ceil((floats * 4 + STATICS) / PAGE) })
    const env = { memory: this.memory }
    this.wasm = new WebAssembly.Instance(module, { env }).exports
    this.used = STATICS
  }

  alloc(n) { // a Float32Array of zeros, 16 bytes aligned
    const array = new Float32Array(this.memory.buffer, this.used, n)
    this.used += Math.ceil(n / 4) * 16
    return array
  }

  place(data) { // the same numbers, in this memory
    if (data.buffer === this.memory.buffer) return data
    const array = this.alloc(data.length)
    array.set(data)
    return array
  }

  matvec(out, W, x, outs, ins) {
    this.wasm.matvec(out.byteOffset, W.byteOffset, x.byteOffset, outs, ins)
  }

  // C (+)= A B; `flip`: A is given transposed, K x M
  gemm(C, A, B, [M, N, K], { add = false, flip = false } = {}) {
    const steps = flip ? [1, M] : [K, 1]
    this.wasm.gemm(M, N, K, A.byteOffset, ...steps, B.byteOffset, C.byteOffset, add)
  }
}

// Floats that a Llama needs besides its weights.
export function roomFor(config) {
  const c = config
  return 8 * (c.hidden_size + c.intermediate_size) + c.vocab_size + 1024
}

export function roomForAll(config, tensors) {
  const weights = Object.values(tensors).reduce((sum, t) => sum + t.data.length + 4, 0)
  return weights + roomFor(config)
}
