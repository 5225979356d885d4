// A Llama in plain JavaScript: reads safetensors, merges a LoRA adapter, keeps a KV cache, and
// gives the logits of the next token. With a kernel (kernel.js) its products run as WASM SIMD.
import { attend, gated, rmsNorm, rotary, rotate } from './math.js'

// --- files

const widen = halves => { // bfloat16 is the upper half of a float32
  const bits = new Uint32Array(halves.length)
  for (let i = 0; i < halves.length; i++) bits[i] = halves[i] << 16
  return new Float32Array(bits.buffer)
}
const FORMATS = {
  BF16: bytes => widen(new Uint16Array(bytes)),
  F32: bytes => new Float32Array(bytes),
}
const BYTES = { BF16: 2, F32: 4 }

// ArrayBuffer -> { name: { shape, data: Float32Array } }
export function readSafetensors(buffer, file = 'the file') {
  const broken = why => new Error(`${file} ${why}: it was cut off or altered.`)
  if (buffer.byteLength < 8) throw broken('has no header')
  const length = Number(new DataView(buffer).getBigUint64(0, true))
  if (8 + length > buffer.byteLength) throw broken('ends within its header')
  let header
  try {
    header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)))
  } catch {
    throw broken('has a header that cannot be read')
  }
  const tensors = {}
  for (const [name, { dtype, shape, data_offsets: place }] of Object.entries(header)) {
    if (name === '__metadata__') continue
    if (!FORMATS[dtype]) throw new Error(`${file}: ${name} is ${dtype}, not BF16 or F32.`)
    const [from, to] = place.map(offset => 8 + length + offset)
    if (to > buffer.byteLength) throw broken(`ends before ${name} does`)
    const size = shape.reduce((a, b) => a * b, BYTES[dtype])
    if (to - from !== size) throw broken(`has ${to - from} bytes of ${name}, and not ${size}`)
    tensors[name] = { shape, data: FORMATS[dtype](buffer.slice(from, to)) } // a copy is aligned
  }
  return tensors
}

// The base's tensors with an adapter merged into them: W + (alpha / r) B A, and trained rows of the
// embedding in place of the base's. The names are those of PEFT.
export function mergeAdapter(base, adapter, config) {
  const merged = { ...base }
  const scale = config.lora_alpha / config.r
  const wrong = what => new Error(`The adapter ${what}: it was made for another model.`)
  for (const [name, A] of Object.entries(adapter)) {
    const key = name.replace('base_model.model.', '').replace('.lora_A.weight', '.weight')
    if (!name.endsWith('.lora_A.weight')) continue
    const B = adapter[name.replace('lora_A', 'lora_B')]
    const W = base[key]
    if (!W || !B) throw wrong(`has a pair for ${key} that does not exist`)
    if (B.shape[0] !== W.shape[0] || A.shape[1] !== W.shape[1]) throw wrong(`does not fit ${key}`)
    merged[key] = { shape: W.shape, data: addProduct(W, B, A, scale) }
  }
  const rows = Object.entries(adapter).find(([name]) => name.includes('trainable_tokens'))
  if (rows) {
    const key = 'model.embed_tokens.weight'
    const { shape, data } = base[key]
    const copy = data.slice()
    config.trainable_token_indices.forEach((id, i) => {
      copy.set(rows[1].data.subarray(i * shape[1], (i + 1) * shape[1]), id * shape[1])
    })
    merged[key] = { shape, data: copy }
  }
  return merged
}

function addProduct(W, B, A, scale) { // W + scale B A
  const sum = W.data.slice()
  const [outs, ins] = W.shape
  const r = A.shape[0]
  for (let o = 0; o < outs; o++) {
    for (let k = 0; k < r; k++) {
      const b = B.data[o * r + k] * scale
      for (let i = 0; i < ins; i++) sum[o * ins + i] += b * A.data[k * ins + i]
    }
  }
  return sum
}

// --- the model

// What a model computes with where there is no kernel. Both have these three functions.
export const plain = {
  alloc: n => new Float32Array(n),
  place: data => data, // weights may stay where they are
  matvec(out, W, x, outs, ins) { // out = W x; four rows at a time, so that x is read less often
    for (let o = 0; o < outs; o += 4) {
      let a = 0
      let b = 0
      let c = 0
      let d = 0
      const at = o * ins
      for (let i = 0; i < ins; i++) {
        const v = x[i]
        a += W[at + i] * v
        b += W[at + ins + i] * v
        c += W[at + 2 * ins + i] * v
        d += W[at + 3 * ins + i] * v
      }
      out[o] = a
      out[o + 1] = b
      out[o + 2] = c
      out[o + 3] = d
    }
  },
}

export function checkConfig(c) { // refuses a Llama with parts that are not written here
  const rope = c.rope_parameters
  const known = c.model_type === 'llama' && c.hidden_act === 'silu' && c.tie_word_embeddings
    && rope?.rope_type === 'default' && !c.attention_bias && !c.mlp_bias
    && [c.hidden_size, c.intermediate_size, c.vocab_size].every(n => n % 8 === 0)
  if (!known) throw new Error('config.json describes a model that this page cannot run.')
}

// The weights of a layer by short names; `get` makes of a full name what is wanted.
const LAYER = {
  q: 'self_attn.q_proj', k: 'self_attn.k_proj', v: 'self_attn.v_proj', o: 'self_attn.o_proj',
  gate: 'mlp.gate_proj', up: 'mlp.up_proj', down: 'mlp.down_proj',
  norm1: 'input_layernorm', norm2: 'post_attention_layernorm',
}
export function layers(config, get) {
  const one = l => Object.fromEntries(Object.entries(LAYER).map(
    ([short, name]) => [short, get(`model.layers.${l}.${name}.weight`)]))
  return Array.from({ length: config.num_hidden_layers }, (_, l) => one(l))
}

export class Llama {
  constructor(config, tensors, kernel = plain) {
    checkConfig(config)
    const c = config
    this.config = c
    this.kernel = kernel
    const get = name => {
      if (!tensors[name]) throw new Error(`model.safetensors has no ${name}.`)
      return kernel.place(tensors[name].data)
    }
    this.embed = get('model.embed_tokens.weight') // and the output layer: they are tied
    if (this.embed.length !== c.vocab_size * c.hidden_size) {
      throw new Error('model.safetensors does not fit config.json.')
    }
    this.norm = get('model.norm.weight')
    this.layers = layers(c, get)
    this.angles = rotary(c)
    const wide = c.num_attention_heads * c.head_dim
    const narrow = c.num_key_value_heads * c.head_dim
    const sizes = { x: c.hidden_size, h: c.hidden_size, add: c.hidden_size, q: wide, att: wide,
      k: narrow, v: narrow, gate: c.intermediate_size, up: c.intermediate_size,
      logits: c.vocab_size }
    this.tmp = Object.fromEntries(Object.entries(sizes).map(([k, n]) => [k, kernel.alloc(n)]))
    this.scores = new Float32Array(c.max_position_embeddings)
    this.scale = new Float32Array(1)
  }

  newCache() {
    const c = this.config
    const size = c.max_position_embeddings * c.num_key_value_heads * c.head_dim
    const one = () => ({ k: new Float32Array(size), v: new Float32Array(size) })
    return { length: 0, layers: this.layers.map(one) }
  }

  // One token in; out come the logits of the next (none if not `wanted`: it only fills the cache).
  step(id, cache, wanted = true) {
    const { hidden_size: hidden, vocab_size, max_position_embeddings } = this.config
    const { x, h, logits } = this.tmp
    if (cache.length >= max_position_embeddings) throw new Error('The context window is full.')
    x.set(this.embed.subarray(id * hidden, (id + 1) * hidden))
    this.layers.forEach((w, l) => {
      this.attention(w, cache.layers[l], cache.length)
      this.mlp(w)
    })
    cache.length++
    if (!wanted) return null
    this.normalize(h, x, this.norm)
    this.kernel.matvec(logits, this.embed, h, vocab_size, hidden)
    return logits.slice()
  }

  prefill(ids, cache) { // the logits after the last of `ids`
    let logits = null
    ids.forEach((id, i) => { logits = this.step(id, cache, i === ids.length - 1) })
    return logits
  }

  normalize(out, x, weight) {
    rmsNorm(out, x, weight, this.scale, 1, this.config.rms_norm_eps)
  }

  attention(w, cache, position) { // x += o_proj(attention(norm(x)))
    const c = this.config
    const { x, h, q, k, v, att, add } = this.tmp
    this.normalize(h, x, w.norm1)
    this.kernel.matvec(q, w.q, h, q.length, c.hidden_size)
    this.kernel.matvec(k, w.k, h, k.length, c.hidden_size)
    this.kernel.matvec(v, w.v, h, v.length, c.hidden_size)
    rotate(q, 0, q.length, position, this.angles)
    rotate(k, 0, k.length, position, this.angles)
    cache.k.set(k, position * k.length)
    cache.v.set(v, position * v.length)
    const { head_dim: dim } = c
    const group = c.num_attention_heads / c.num_key_value_heads
    for (let head = 0; head < c.num_attention_heads; head++) {
      const from = Math.floor(head / group) * dim
      const place = { at: head * dim, from, n: position + 1, dim, width: k.length }
      attend(att, this.scores, { q, k: cache.k, v: cache.v }, place)
    }
    this.kernel.matvec(add, w.o, att, c.hidden_size, att.length)
    for (let i = 0; i < x.length; i++) x[i] += add[i]
  }

  mlp(w) { // x += down_proj(silu(gate_proj(norm(x))) * up_proj(norm(x)))
    const { hidden_size: hidden, intermediate_size: inner } = this.config
    const { x, h, gate, up, add } = this.tmp
    this.normalize(h, x, w.norm2)
    this.kernel.matvec(gate, w.gate, h, inner, hidden)
    this.kernel.matvec(up, w.up, h, inner, hidden)
    gated(gate, gate, up, inner)
    this.kernel.matvec(add, w.down, gate, hidden, inner)
    for (let i = 0; i < hidden; i++) x[i] += add[i]
  }
}
