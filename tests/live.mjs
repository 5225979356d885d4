// Runs the live page's modules in node, for test_live.py: a job as JSON comes in, JSON goes out.
import { readFileSync } from 'node:fs'
import { asText, fromText } from '../nbs/live/conversations.js'
import { Llama, mergeAdapter, plain, readSafetensors } from '../nbs/live/engine.js'
import { Kernel, compile, roomForAll } from '../nbs/live/kernel.js'
import { generate, random } from '../nbs/live/sampling.js'
import { ChatTokenizer, cutAt, fewShot } from '../nbs/live/tokenizer.js'
import { Trainer, batches, rateAt } from '../nbs/live/trainer.js'
import { interval } from '../nbs/live/tune.js'

const job = JSON.parse(readFileSync(0, 'utf8'))
const bytes = path => {
  const file = readFileSync(path)
  return file.buffer.slice(file.byteOffset, file.byteOffset + file.byteLength)
}
const read = name => bytes(`${job.data}/${name}`)
const json = name => JSON.parse(new TextDecoder().decode(read(name)))
const tokenizer = new ChatTokenizer(json('tokenizer.json'), json('tokenizer_config.json'))
const config = json('config.json')
const base = () => readSafetensors(read('model.safetensors'), 'model.safetensors')
const kernel = () => compile(readFileSync(new URL('../nbs/live/kernel.wasm', import.meta.url)))

async function models(backend) { // the base and the instruct model
  const tensors = base()
  const adapter = readSafetensors(read('adapter.safetensors'), 'adapter.safetensors')
  const merged = mergeAdapter(tensors, adapter, json('adapter_config.json'))
  const module = await kernel()
  const make = all => new Llama(config, all,
    backend === 'plain' ? plain : new Kernel(module, roomForAll(config, all)))
  return { base: make(tensors), instruct: make(merged) }
}

const answers = (model, prompts) => prompts.map(ids => {
  const found = [...generate(model, ids, { limit: job.limit, stops: tokenizer.stops })]
  return found.map(({ id }) => id)
})

const distance = (a, b) => { // relative, of two arrays
  let difference = 0
  let length = 0
  for (let i = 0; i < a.length; i++) {
    difference += (a[i] - b[i]) ** 2
    length += b[i] ** 2
  }
  return Math.sqrt(difference / length)
}

async function trainer(first) { // with an adapter's first values, if there are some
  const made = new Trainer(config, base(), await kernel(), job.settings)
  made.lora?.pairs.forEach(({ param, A, B }) => {
    const name = param.name.replace('.weight', '')
    A.w.set(first[`base_model.model.${name}.lora_A.weight`].data)
    B.w.set(first[`base_model.model.${name}.lora_B.weight`].data)
  })
  made.renew()
  return made
}

function distances(made, gradients) { // name -> how far the gradient is from torch's
  const found = {}
  if (made.lora) {
    for (const { param, A, B } of made.lora.pairs) {
      const name = `base_model.model.${param.name.replace('.weight', '')}`
      found[`${name} A`] = distance(A.g, gradients[`${name}.lora_A.weight`].data)
      found[`${name} B`] = distance(B.g, gradients[`${name}.lora_B.weight`].data)
    }
    const [rows] = Object.keys(gradients).filter(name => name.includes('trainable_tokens'))
    const ours = made.lora.rows.flatMap(row => [...row.g])
    found.rows = distance(ours, gradients[rows].data)
  } else {
    for (const { name, g } of Object.values(made.params)) {
      found[name] = distance(g, gradients[name].data)
    }
  }
  return found
}

const JOBS = {
  tokens: () => ({
    ids: job.texts.map(text => tokenizer.encode(text)),
    back: job.texts.map(text => tokenizer.decode(tokenizer.encode(text))),
    rows: job.pairs.map(([q, a]) => tokenizer.row(q, a)),
    everything: job.pairs.map(([q, a]) => tokenizer.row(q, a, { prompt: true, stop: true }).labels),
    prompts: job.pairs.map(([q]) => tokenizer.prompt(q)),
    chats: job.pairs.map(([q]) => tokenizer.decode(tokenizer.prompt(q))),
    fewShot: job.pairs.map(([q]) => fewShot(job.shots, q)),
    cut: job.texts.map(text => text.slice(0, cutAt(text))),
  }),
  async answers() {
    const { base: first, instruct } = await models(job.backend)
    const began = performance.now()
    const found = { base: answers(first, job.base), instruct: answers(instruct, job.instruct) }
    const seconds = (performance.now() - began) / 1000
    const count = lists => lists.reduce((n, ids) => n + ids.length, 0)
    const tokens = [job.base, job.instruct, found.base, found.instruct].map(count)
    return { ...found, perSecond: tokens.reduce((a, b) => a + b) / seconds }
  },
  async gradients() {
    const [first, gradients] = [job.first, job.gradients].map(path => readSafetensors(bytes(path)))
    const made = await trainer(first)
    const loss = made.gradient(job.rows)
    return { loss, distances: distances(made, gradients) }
  },
  async steps() {
    const made = await trainer(readSafetensors(bytes(job.first)))
    const began = performance.now()
    const losses = job.batches.map((rows, i) => made.step(rows, job.rates[i]).loss)
    return { losses, seconds: (performance.now() - began) / 1000 }
  },
  async explode() { // a rate that no training survives
    const made = await trainer({})
    try {
      for (let i = 0; i < 9; i++) made.step(job.rows, 1e6)
      return ''
    } catch (error) {
      return error.message
    }
  },
  texts: () => ({
    intervals: job.shares.map(([right, n]) => interval(right, n)),
    kept: Object.values(json('conversations.json')).map(pairs => (
      JSON.stringify(fromText(asText(pairs))) === JSON.stringify(pairs))),
  }),
  schedule: () => ({
    rates: job.lengths.map(n => Array.from({ length: n }, (_, i) => rateAt(i, n))),
    batches: batches(job.rows, { dice: random(job.seed) }),
  }),
  read: () => job.files.map(file => { // what is said about a damaged file
    try {
      readSafetensors(bytes(file), 'model.safetensors')
      return ''
    } catch (error) {
      return error.message
    }
  }),
  async fit() { // and about a model or an adapter that does not fit
    const said = []
    const attempt = act => {
      try {
        act()
        said.push('')
      } catch (error) {
        said.push(error.message)
      }
    }
    const tensors = base()
    const adapter = readSafetensors(read('adapter.safetensors'))
    const { 'model.norm.weight': norm, ...without } = tensors
    const [name] = Object.keys(adapter).filter(key => key.endsWith('lora_A.weight'))
    const narrow = { ...adapter, [name]: { ...adapter[name], shape: [8, norm.shape[0] / 2] } }
    attempt(() => new Llama(config, without))
    attempt(() => new Llama({ ...config, vocab_size: 4104 }, tensors))
    attempt(() => new Llama({ ...config, hidden_act: 'gelu' }, tensors))
    attempt(() => mergeAdapter(tensors, narrow, json('adapter_config.json')))
    attempt(() => mergeAdapter(without, { ...adapter, 'base_model.model.x.lora_A.weight':
      adapter[name] }, json('adapter_config.json')))
    return said
  },
}

console.log(JSON.stringify(await JOBS[job.what]()))
