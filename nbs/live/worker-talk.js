// One prompt, two models, token by token.
import { generate, likeliest, sampler, softmax } from './sampling.js'
import { cutAt, fewShot } from './tokenizer.js'

export const LIMIT = 48 // tokens of an answer, as in lesson 01
const OTHERS = 5 // how many tokens are shown in place of one

const channel = new MessageChannel() // setTimeout(0) would wait 4 ms
export const breath = () => new Promise(go => { // lets a message in, such as "stop"
  channel.port1.onmessage = go
  channel.port2.postMessage(0)
})
const pause = milliseconds => new Promise(go => setTimeout(go, milliseconds))

class Answer { // of one model, as it grows
  constructor(who, model, ids, tokenizer, { temperature, seed }) {
    if (ids.length >= model.config.max_position_embeddings) {
      const most = model.config.max_position_embeddings
      throw new Error(`That is ${ids.length} tokens, and the model can see ${most}.`)
    }
    Object.assign(this, { who, tokenizer, temperature })
    const pick = sampler(temperature, seed)
    this.tokens = generate(model, ids, { pick, limit: LIMIT, stops: tokenizer.stops })
    this.given = ids.map(id => tokenizer.decode([id]))
    this.ids = []
    this.shown = ''
    this.stopped = false
  }

  next() { // what to show of the next token; null at the end
    const { value, done } = this.tokens.next()
    if (done) return null
    const { id, logits } = value
    this.stopped = this.tokenizer.stops.has(id)
    if (!this.stopped) this.ids.push(id)
    const whole = this.text()
    // half a character is held back until the rest of it comes
    const piece = whole.endsWith('\ufffd') ? '' : whole.slice(this.shown.length)
    this.shown += piece
    const others = likeliest(softmax(logits, this.temperature || 1), OTHERS)
    return { piece, token: this.tokenizer.decode([id]), stop: this.stopped,
      others: others.map(([other, chance]) => (
        { token: this.tokenizer.decode([other]), chance, taken: other === id })) }
  }

  text() { return this.tokenizer.decode(this.ids) }
  rest() { return this.text().slice(this.shown.length) } // half a character, at the very end
}

export class Talk {
  constructor(send) {
    this.send = send
    this.newest = 0 // the number of the question that may go on
    this.stopped = 0 // and of one that may not
  }

  stop() { this.stopped = this.newest }

  // way: "plain" or "few-shot", for the base; answerer: "instruct" or "mine", in the template
  async ask(loaded, { prompt, way, answerer, pace, ...settings }) {
    const mine = ++this.newest
    const { models, tokenizer, questions } = await loaded
    const text = way === 'few-shot' ? fewShot(questions.shots, prompt) : prompt
    if (!models[answerer]) throw new Error('There is no model of yours: fine-tune one first.')
    const base = [tokenizer.start, ...tokenizer.encode(text)]
    const answers = [
      new Answer('base', models.base, base, tokenizer, settings),
      new Answer('instruct', models[answerer], tokenizer.prompt(prompt), tokenizer, settings)]
    for (const { who, given } of answers) this.send('given', { who, pieces: given })
    let milliseconds = 0
    let count = answers.reduce((sum, { given }) => sum + given.length, 0) // read or written
    let alive = answers
    while (alive.length > 0 && mine > this.stopped) {
      for (const answer of alive) {
        const began = performance.now()
        const step = answer.next()
        milliseconds += performance.now() - began
        answer.over = step === null
        if (step) this.send('token', { who: answer.who, ...step })
        else this.end(answer, answer.stopped ? 'stop' : 'length', way)
        count += step ? 1 : 0
      }
      alive = alive.filter(answer => !answer.over)
      await (pace > 0 ? pause(pace) : breath())
      if (mine !== this.newest) return // another question was asked meanwhile
    }
    for (const answer of alive) this.end(answer, 'cut', way)
    this.send('asked', { perSecond: count / milliseconds * 1000 })
  }

  end(answer, why, way) {
    const text = answer.text()
    const cut = answer.who === 'base' && way === 'few-shot' ? cutAt(text) : null
    this.send('done', { who: answer.who, why, text, rest: answer.rest(), cut,
      count: answer.ids.length })
  }
}
