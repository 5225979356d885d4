// Fine-tuning as a task that can be stopped and continued, and the test at its end.
import { Llama } from './engine.js'
import { generate, random } from './sampling.js'
import { Trainer, batches, rateAt } from './trainer.js'
import { LIMIT, breath } from './worker-talk.js'

const PROBES = 16 // how often the four questions are asked again
const PROBE_LIMIT = 32 // tokens of an answer to them

export class Tune {
  constructor(send) {
    this.send = send
    this.run = null
  }

  pause() {
    if (this.run) this.run.going = false
  }

  // pairs: the visitor's own conversations, or null for `size` of ours; learn: see tokenizer.js
  async start(loaded, { pairs, size, method, rate, learn, seed }) {
    this.pause()
    const { config, kernel, models, store, tensors, tokenizer } = loaded
    if (!kernel) throw new Error('This browser has no WASM SIMD: it can talk, but not train.')
    const chosen = pairs ?? (await store.json('conversations.json'))[size]
    const rows = chosen.map(([question, answer]) => tokenizer.row(question, answer, learn))
    const most = config.max_position_embeddings
    const long = rows.findIndex(row => row.ids.length > most)
    if (long >= 0) {
      const tokens = rows[long].ids.length
      throw new Error(`Conversation ${long + 1} has ${tokens} tokens, the model can see ${most}.`)
    }
    this.run = null // the memory of the last run is free before the next takes its own
    models.mine = null
    const trainer = new Trainer(config, tensors, kernel, { method, seed })
    models.mine = new Llama(config, trainer.tensors(), trainer.kernel) // shares its weights
    const plan = batches(rows, { dice: random(seed) })
    this.run = { trainer, plan, rate, milliseconds: 0, going: false }
    const { length: trained } = trainer.trained.weights
    const bytes = trainer.kernel.memory.buffer.byteLength
    this.send('started', { steps: plan.length, trained, bytes })
    this.probe(loaded, 0)
    await this.goOn(loaded)
  }

  async goOn(loaded) {
    const { run } = this
    const { trainer, plan } = run
    const steps = plan.length
    const every = Math.ceil(steps / PROBES)
    run.going = true
    while (trainer.steps < steps) {
      const began = performance.now()
      const rate = run.rate * rateAt(trainer.steps, steps)
      const { loss } = trainer.step(plan[trainer.steps], rate)
      run.milliseconds += performance.now() - began
      const step = trainer.steps
      this.send('step', { step, steps, loss, seconds: run.milliseconds / 1000 })
      if (step % every === 0 || step === steps) this.probe(loaded, step)
      await breath()
      if (!run.going) return
    }
    await this.score(loaded, run)
  }

  answer({ models, tokenizer }, question, limit) {
    const ids = tokenizer.prompt(question)
    const found = [...generate(models.mine, ids, { limit, stops: tokenizer.stops })]
    const written = found.map(({ id }) => id)
    const stopped = tokenizer.stops.has(written.at(-1))
    return { text: tokenizer.decode(stopped ? written.slice(0, -1) : written), stopped }
  }

  probe(loaded, step) { // the four questions, asked again
    const { asked } = loaded.questions
    const answers = asked.map(question => this.answer(loaded, question, PROBE_LIMIT))
    this.send('probe', { step, answers })
  }

  async score(loaded, run) { // exact match on the held-out questions, as lesson 01 counts it
    const rows = []
    const { held_out: items } = loaded.questions
    for (const [question, right] of items) {
      const { text, stopped } = this.answer(loaded, question, LIMIT)
      rows.push({ question, right, said: text.trim(), stopped, exact: text.trim() === right })
      this.send('scoring', { done: rows.length, all: items.length })
      await breath()
      if (!run.going) return
    }
    this.send('scored', { rows })
  }
}
