// LoRA in the trainer. The model computes with W + (alpha / r) B A, merged before every step, so
// its forward and backward pass stay as they are; the gradients of A and B follow from that of W:
// dB = (alpha / r) dW A^T, dA = (alpha / r) B^T dW. Two rows of the embedding are trained as well,
// the template's marks: without them a model with an adapter does not learn to stop (lesson 07).
import { random } from './sampling.js'

const MARKS = [1, 2] // <|im_start|>, <|im_end|>

export class Lora {
  constructor(kernel, params, { r, alpha, seed }) {
    this.kernel = kernel
    this.r = r
    this.scale = alpha / r
    this.embed = params.find(p => p.name === 'model.embed_tokens.weight')
    const matrices = params.filter(p => p.name.includes('_proj'))
    const width = this.embed.shape[1]
    const size = matrices.reduce((sum, { shape }) => sum + r * (shape[0] + shape[1]), 0)
    this.weights = kernel.alloc(size + MARKS.length * width)
    this.gradients = kernel.alloc(this.weights.length)
    let at = 0
    const take = n => {
      const part = array => array.subarray(at - n, at)
      at += n
      return { w: part(this.weights), g: part(this.gradients) }
    }
    this.pairs = matrices.map(param => {
      const [outs, ins] = param.shape
      return { param, frozen: kernel.place(param.w.slice()), A: take(r * ins), B: take(outs * r) }
    })
    this.rows = MARKS.map(id => ({ id, ...take(width) }))
    const longest = r * Math.max(...matrices.flatMap(p => p.shape))
    this.scaled = kernel.alloc(longest)
    this.turned = kernel.alloc(longest)
    this.begin(random(seed), width)
  }

  begin(dice, width) { // A is random, as PEFT draws it; B is zero: nothing is changed yet
    for (const { A, param } of this.pairs) {
      const bound = 1 / Math.sqrt(param.shape[1])
      for (let i = 0; i < A.w.length; i++) A.w[i] = (2 * dice() - 1) * bound
    }
    for (const { id, w } of this.rows) w.set(this.embed.w.subarray(id * width, (id + 1) * width))
  }

  merge() { // W = frozen + scale B A
    for (const { param, frozen, A, B } of this.pairs) {
      const [outs, ins] = param.shape
      const scaled = this.scaled.subarray(0, B.w.length)
      B.w.forEach((value, i) => { scaled[i] = value * this.scale })
      param.w.set(frozen)
      this.kernel.gemm(param.w, scaled, A.w, [outs, ins, this.r], { add: true })
    }
    for (const { id, w } of this.rows) this.embed.w.set(w, id * w.length)
  }

  pullBack() { // from the gradients of the whole weights to those of A, B and the rows
    const { r } = this
    for (const { param, A, B } of this.pairs) {
      const [outs, ins] = param.shape
      this.kernel.wasm.transpose(r, ins, A.w.byteOffset, this.turned.byteOffset)
      this.kernel.gemm(B.g, param.g, this.turned, [outs, r, ins])
      this.kernel.gemm(A.g, B.w, param.g, [r, ins, outs], { flip: true })
    }
    for (let i = 0; i < this.gradients.length; i++) this.gradients[i] *= this.scale
    for (const { id, g } of this.rows) {
      g.set(this.embed.g.subarray(id * g.length, (id + 1) * g.length))
    }
  }
}
