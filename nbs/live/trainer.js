// Fine-tuning in the page: the forward and backward pass of a Llama by hand, and AdamW.
// The rows of a step are laid one after the other, without padding; attention looks only within
// its own row. Matrix products run in the kernel. y = x W^T, as torch has it: W is (out, in).
import { checkConfig, layers } from './engine.js'
import { Kernel, roomFor } from './kernel.js'
import { Lora } from './lora.js'
import { attention, attentionBack, crossEntropy, gated, gatedBack, rmsNorm, rmsNormBack, rotary,
  rotate } from './math.js'

const ROOM = 640 // tokens of one pass; a step with more takes several, and adds the gradients up
const SETTINGS = { method: 'full', r: 8, alpha: 16, seed: 0, maxNorm: 1 }

export class Trainer {
  // `tensors`: the base's, as readSafetensors gives them; they are copied.
  constructor(config, tensors, module, settings = {}) {
    checkConfig(config)
    const c = config
    if (c.num_key_value_heads * c.head_dim !== c.hidden_size) {
      throw new Error('config.json describes a model that this page cannot train.')
    }
    this.config = c
    this.settings = { ...SETTINGS, ...settings }
    this.size = Object.values(tensors).reduce((sum, t) => sum + t.data.length, 0)
    this.kernel = new Kernel(module, 5 * this.size + this.roomForPass() + roomFor(c))
    this.takeWeights(tensors)
    this.angles = rotary(c)
    this.allocPass()
    this.lora = this.settings.method === 'lora'
      ? new Lora(this.kernel, Object.values(this.params), this.settings) : null
    const { weights, gradients } = this.lora ?? this.all
    this.trained = { weights, gradients,
      first: this.kernel.alloc(weights.length), second: this.kernel.alloc(weights.length) }
    this.steps = 0
    this.renew()
  }

  // --- memory

  takeWeights(tensors) { // in one block, so that AdamW is one call; so are the gradients
    const block = () => this.kernel.alloc(this.size)
    this.all = { weights: block(), gradients: block() }
    const transposed = block()
    this.params = {}
    let at = 0
    for (const [name, { shape, data }] of Object.entries(tensors)) {
      const part = array => array.subarray(at, at + data.length)
      const w = part(this.all.weights)
      w.set(data)
      this.params[name] = { name, shape, w, g: part(this.all.gradients), t: part(transposed) }
      at += data.length
    }
    const get = name => {
      if (!this.params[name]) throw new Error(`model.safetensors has no ${name}.`)
      return this.params[name]
    }
    this.embed = get('model.embed_tokens.weight')
    this.norm = get('model.norm.weight')
    this.layers = layers(this.config, get)
  }

  roomForPass() { // floats
    const { hidden_size: H, intermediate_size: I, vocab_size: V } = this.config
    const L = this.config.num_hidden_layers
    return ROOM * (L * (8 * H + 3 * I + 2) + 11 * H + 3 * I + V + 1) + 2 ** 16
  }

  allocPass() { // what is kept from the forward pass for the backward pass, and what they work in
    const { hidden_size: H, intermediate_size: I, vocab_size: V } = this.config
    const make = sizes => Object.fromEntries(
      Object.entries(sizes).map(([name, n]) => [name, this.kernel.alloc(ROOM * n)]))
    this.kept = this.layers.map(() => make({ x: H, h1: H, q: H, k: H, v: H, att: H, mid: H, h2: H,
      gate: I, up: I, act: I, scale1: 1, scale2: 1 }))
    this.work = make({ x: H, d: H, dh: H, dq: H, dk: H, dv: H, datt: H, dact: I, dgate: I, dup: I,
      last: H, normed: H, dnormed: H, dlast: H, scale: 1, logits: V })
  }

  renew() { // the transposed copies follow the weights
    this.lora?.merge()
    for (const { shape, w, t } of Object.values(this.params)) {
      if (shape.length === 2) this.kernel.wasm.transpose(...shape, w.byteOffset, t.byteOffset)
    }
  }

  tensors() { // as readSafetensors gives them: views, which follow the training
    return Object.fromEntries(Object.values(this.params).map(p => [p.name, { ...p, data: p.w }]))
  }

  // --- the pieces, forward and backward

  linear(y, x, { shape: [outs, ins], t }, T) { // y = x W^T
    this.kernel.gemm(y, x, t, [T, outs, ins])
  }

  linearBack(dx, dy, x, { shape: [outs, ins], w, g }, T, add = false) { // dx = dy W, dW += dy^T x
    this.kernel.gemm(dx, dy, w, [T, ins, outs], { add })
    this.kernel.gemm(g, dy, x, [outs, ins, T], { add: true, flip: true })
  }

  normalize(y, x, { w }, scales, T) {
    rmsNorm(y, x, w, scales, T, this.config.rms_norm_eps)
  }

  normalizeBack(dx, dy, x, { w, g }, scales, T) {
    rmsNormBack(dx, dy, x, w, g, scales, T)
  }

  rotate(v, spans, sign) { // each token by its place in its own row
    const { hidden_size: H } = this.config
    for (const { from, to } of spans) {
      for (let t = from; t < to; t++) rotate(v, t * H, (t + 1) * H, t - from, this.angles, sign)
    }
  }

  *heads(spans) { // each head of each row, for math.js
    const { num_attention_heads, head_dim: dim, hidden_size: width } = this.config
    for (const { from, to } of spans) {
      for (let head = 0; head < num_attention_heads; head++) {
        yield { at: from * width + head * dim, n: to - from, dim, width }
      }
    }
  }

  attend(kept, spans) { // keeps the probabilities for the way back
    kept.probabilities = []
    for (const head of this.heads(spans)) {
      kept.probabilities.push(attention(kept.att, kept, head))
    }
  }

  attendBack(kept, spans, T) { // dq, dk and dv from datt
    const { datt, dq, dk, dv } = this.work
    for (const d of [dq, dk, dv]) d.fill(0, 0, T * this.config.hidden_size)
    let i = 0
    for (const head of this.heads(spans)) {
      attentionBack({ dq, dk, dv }, datt, kept.probabilities[i++], kept, head)
    }
  }

  // --- a layer, forward and backward

  layer(w, kept, spans, T) { // changes work.x
    const { hidden_size: H, intermediate_size: I } = this.config
    const { x, dh } = this.work // dh is free until the backward pass
    kept.x.set(x.subarray(0, T * H))
    this.normalize(kept.h1, x, w.norm1, kept.scale1, T)
    for (const name of ['q', 'k', 'v']) this.linear(kept[name], kept.h1, w[name], T)
    this.rotate(kept.q, spans, 1)
    this.rotate(kept.k, spans, 1)
    this.attend(kept, spans)
    this.linear(dh, kept.att, w.o, T)
    for (let i = 0; i < T * H; i++) x[i] += dh[i]
    kept.mid.set(x.subarray(0, T * H))
    this.normalize(kept.h2, x, w.norm2, kept.scale2, T)
    this.linear(kept.gate, kept.h2, w.gate, T)
    this.linear(kept.up, kept.h2, w.up, T)
    gated(kept.act, kept.gate, kept.up, T * I)
    this.linear(dh, kept.act, w.down, T)
    for (let i = 0; i < T * H; i++) x[i] += dh[i]
  }

  layerBack(w, kept, spans, T) { // changes work.d, the gradient of x
    const { intermediate_size: I } = this.config
    const { d, dh, dq, dk, dv, datt, dact, dgate, dup } = this.work
    this.linearBack(dact, d, kept.act, w.down, T)
    gatedBack(dgate, dup, dact, kept.gate, kept.up, T * I)
    this.linearBack(dh, dgate, kept.h2, w.gate, T)
    this.linearBack(dh, dup, kept.h2, w.up, T, true)
    this.normalizeBack(d, dh, kept.mid, w.norm2, kept.scale2, T)
    this.linearBack(datt, d, kept.att, w.o, T)
    this.attendBack(kept, spans, T)
    this.rotate(dq, spans, -1)
    this.rotate(dk, spans, -1)
    this.linearBack(dh, dq, kept.h1, w.q, T)
    this.linearBack(dh, dk, kept.h1, w.k, T, true)
    this.linearBack(dh, dv, kept.h1, w.v, T, true)
    this.normalizeBack(d, dh, kept.x, w.norm1, kept.scale1, T)
  }

  // --- a pass, a step

  // Rows of { ids, labels } (label -100: not learned). Adds to the gradients; returns the sum of
  // the losses of the learned tokens over `targets`, how many the whole step has.
  pass(rows, targets) {
    const { hidden_size: H } = this.config
    const { x, d, last, normed, dnormed, dlast, scale, logits } = this.work
    const ids = rows.flatMap(row => row.ids)
    const T = ids.length
    const { spans, places, wanted } = layOut(rows)
    const N = places.length
    const take = (to, at, from, source) => to.set(source.subarray(from * H, (from + 1) * H), at * H)
    ids.forEach((id, t) => take(x, t, id, this.embed.w))
    this.layers.forEach((w, l) => this.layer(w, this.kept[l], spans, T))
    places.forEach((t, j) => take(last, j, t, x)) // logits only where a token is learned
    this.normalize(normed, last, this.norm, scale, N)
    this.linear(logits, normed, this.embed, N)
    const loss = crossEntropy(logits, wanted, this.config.vocab_size, targets)
    this.linearBack(dnormed, logits, normed, this.embed, N)
    dlast.fill(0, 0, N * H)
    this.normalizeBack(dlast, dnormed, last, this.norm, scale, N)
    d.fill(0, 0, T * H)
    places.forEach((t, j) => take(d, t, j, dlast))
    for (let l = this.layers.length - 1; l >= 0; l--) {
      this.layerBack(this.layers[l], this.kept[l], spans, T)
    }
    ids.forEach((id, t) => {
      for (let i = 0; i < H; i++) this.embed.g[id * H + i] += d[t * H + i]
    })
    return loss
  }

  gradient(rows) { // nats a token; leaves the gradients in `trained.gradients`
    this.all.gradients.fill(0)
    const targets = rows.reduce((sum, row) => sum + learned(row), 0)
    if (targets === 0) throw new Error('Nothing is learned: every token of these rows is masked.')
    let loss = 0
    for (const part of inParts(rows)) loss += this.pass(part, targets)
    this.lora?.pullBack()
    return loss
  }

  step(rows, rate) { // one step of AdamW: { loss, norm }
    const { weights, gradients, first, second } = this.trained
    const { wasm } = this.kernel
    const loss = this.gradient(rows)
    const norm = Math.sqrt(wasm.sumOfSquares(weights.length, gradients.byteOffset))
    if (!Number.isFinite(loss + norm)) {
      throw new Error('The loss is no longer a number: the learning rate is too high.')
    }
    this.steps++
    const clip = Math.min(1, this.settings.maxNorm / (norm + 1e-6))
    const places = [weights, gradients, first, second].map(array => array.byteOffset)
    wasm.adamw(weights.length, ...places, clip,
      rate / (1 - 0.9 ** this.steps), Math.sqrt(1 - 0.999 ** this.steps))
    this.renew()
    return { loss, norm }
  }
}

const learned = row => row.labels.filter((label, t) => t > 0 && label !== -100).length

function layOut(rows) { // where each row is, from which places a token is learned, and which token
  const spans = []
  const places = []
  const wanted = []
  let from = 0
  for (const { ids, labels } of rows) {
    spans.push({ from, to: from + ids.length })
    for (let t = 1; t < ids.length; t++) {
      if (labels[t] === -100) continue
      places.push(from + t - 1)
      wanted.push(labels[t])
    }
    from += ids.length
  }
  return { spans, places, wanted }
}

function* inParts(rows) { // as many rows at a time as there is room for
  let part = []
  let tokens = 0
  for (const row of rows) {
    if (row.ids.length > ROOM) throw new Error('A conversation is too long.')
    if (tokens + row.ids.length > ROOM) {
      yield part
      part = []
      tokens = 0
    }
    part.push(row)
    tokens += row.ids.length
  }
  yield part
}

// --- the course's schedule and order

// What the rate is multiplied by at a step, from 0: up for a twentieth of the steps, then down.
export function rateAt(step, steps) {
  const warmup = Math.ceil(0.05 * steps)
  return step < warmup ? step / warmup : (steps - step) / Math.max(1, steps - warmup)
}

// The batches of a whole run: every row once an epoch, in a new order.
export function batches(rows, { epochs = 3, size = 8, dice }) {
  const all = []
  for (let epoch = 0; epoch < epochs; epoch++) {
    const order = [...rows]
    for (let i = order.length - 1; i > 0; i--) {
      const j = Math.floor(dice() * (i + 1))
      const kept = order[i]
      order[i] = order[j]
      order[j] = kept
    }
    for (let at = 0; at < order.length; at += size) all.push(order.slice(at, at + size))
  }
  return all
}
