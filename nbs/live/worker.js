// Holds the models and does the computing, off the page's thread. Messages in: { type, … }, see
// TASKS; messages out: { type, … }, which live.js and tune.js show. Nothing is fetched before the
// first task.
import { Llama, mergeAdapter, plain, readSafetensors } from './engine.js'
import { Kernel, compile, roomForAll } from './kernel.js'
import { Store } from './store.js'
import { ChatTokenizer } from './tokenizer.js'
import { Talk } from './worker-talk.js'
import { Tune } from './worker-tune.js'

const send = (type, more = {}) => postMessage({ type, ...more })

async function loadKernel() { // null where WASM SIMD is missing
  const response = await fetch(new URL('kernel.wasm', import.meta.url))
  try {
    return await compile(await response.arrayBuffer())
  } catch {
    return null
  }
}

async function load() {
  let over = false
  const store = new Store((got, all) => over || send('progress', { got, all }))
  try {
    return await loadFrom(store)
  } finally {
    over = true // what still comes in, after an error, is no news
  }
}

async function loadFrom(store) {
  await store.open()
  const [kernel, config, file, tokenizerConfig, weights, adapter, adapterConfig, questions]
    = await Promise.all([loadKernel(), store.json('config.json'), store.json('tokenizer.json'),
      store.json('tokenizer_config.json'), store.read('model.safetensors'),
      store.read('adapter.safetensors'), store.json('adapter_config.json'),
      store.json('questions.json')])
  const tensors = readSafetensors(weights, 'model.safetensors')
  const update = readSafetensors(adapter, 'adapter.safetensors')
  const make = all => new Llama(config, all,
    kernel ? new Kernel(kernel, roomForAll(config, all)) : plain)
  const models = {
    base: make(tensors), instruct: make(mergeAdapter(tensors, update, adapterConfig)) }
  send('ready', { bytes: store.got, fast: kernel !== null, questions })
  return { config, kernel, models, questions, store, tensors,
    tokenizer: new ChatTokenizer(file, tokenizerConfig) }
}

let loading = null
function loaded() { // once; after an error the next task tries again
  loading ??= load().catch(error => {
    loading = null
    throw error
  })
  return loading
}

const talk = new Talk(send)
const tune = new Tune(send)
const TASKS = {
  ask: task => talk.ask(loaded(), task),
  stop() { talk.stop() },
  async examples({ size }) { // the conversations themselves, to be read and edited
    const { store } = await loaded()
    send('examples', { size, pairs: (await store.json('conversations.json'))[size] })
  },
  train: task => tune.start(loaded(), task),
  pause() { tune.pause() },
  resume: () => tune.resume(),
}

onmessage = async ({ data }) => {
  try {
    await TASKS[data.type](data)
  } catch (error) {
    send('error', { task: data.type, message: error.message })
  }
}
