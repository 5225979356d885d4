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
    this.wanted = 0 // the number of the run that shall be
    this.held = false // whether the visitor has stopped it
  }

  pause() {
    this.held = true
    if (this.run) this.run.going = false
  }

  async resume() { // a run that is not there yet will go on by itself
    this.held = false
    if (this.run && !this.run.going) await this.goOn()
  }

  // pairs: the visitor's own conversations, or null for `size` of ours; learn: see tokenizer.js
  async start(loading, settings) {
    this.pause()
    this.held = false
    const number = ++this.wanted
    const loaded = await loading
    const rows = await this.rows(loaded, settings)
    if (number !== this.wanted) return // another was started meanwhile
    this.begin(loaded, rows, settings)
    if (!this.held) await this.goOn()
  }

  async rows({ config, kernel, store, tokenizer }, { pairs, size, learn }) {
    if (!kernel) throw new Error('This browser has no WASM SIMD: it can talk, but not train.')
    const chosen = pairs ?? (await store.json('conversations.json'))[size]
    const rows = chosen.map(([question, answer]) => tokenizer.row(question, answer, learn))
    const most = config.max_position_embeddings
    const long = rows.findIndex(row => row.ids.length > most)
    if (long < 0) return rows
    const tokens = rows[long].ids.length
    throw new Error(`Conversation ${long + 1} has ${tokens} tokens, the model can see ${most}.`)
  }

  begin(loaded, rows, { method, rate, seed }) {
    const { config, kernel, models, tensors } = loaded
    this.run = null // the memory of the last run is free before the next takes its own
    models.mine = null
    const trainer = new Trainer(config, tensors, kernel, { method, seed })
    models.mine = new Llama(config, trainer.tensors(), trainer.kernel) // shares its weights
    const plan = batches(rows, { dice: random(seed) })
    this.run = { loaded, trainer, plan, rate, milliseconds: 0, going: false }
    this.send('started', { steps: plan.length, trained: trainer.trained.weights.length })
    this.probe(0)
  }

  async goOn() {
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
      if (step % every === 0 || step === steps) this.probe(step)
      await breath()
      if (!run.going) return
    }
    await this.score(run)
  }

  answer(question, limit) {
    const { models, tokenizer } = this.run.loaded
    const ids = tokenizer.prompt(question)
    const found = [...generate(models.mine, ids, { limit, stops: tokenizer.stops })]
    const written = found.map(({ id }) => id)
    const stopped = tokenizer.stops.has(written.at(-1))
    return { text: tokenizer.decode(stopped ? written.slice(0, -1) : written), stopped }
  }

  probe(step) { // the four questions, asked again
    const { asked } = this.run.loaded.questions
    const answers = asked.map(question => this.answer(question, PROBE_LIMIT))
    this.send('probe', { step, answers })
  }

  async score(run) { // exact match on the held-out questions, as lesson 01 counts it
    const rows = []
    const { held_out: items } = run.loaded.questions
    for (const [question, right] of items) {
      const { text, stopped } = this.answer(question, LIMIT)
      rows.push({ question, right, said: text.trim(), stopped, exact: text.trim() === right })
      this.send('scoring', { done: rows.length, all: items.length })
      await breath()
      if (!run.going) return
    }
    run.going = false
    this.send('scored', { rows })
  }
}
