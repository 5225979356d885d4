// The page: what is asked goes to the worker, what comes back is shown. Fine-tuning: tune.js.
import { $, $$, announce, count, make, percent, visible } from './dom.js'
import { Tuning } from './tune.js'

const EXAMPLES = ['What is the capital of Brazil?', 'The capital of Brazil is',
  'What is a baby goat called?', 'Calculate 87 - 25.', '巴西的首都是哪里？', '巴西的首都是',
  'Translate into Chinese: I like apples.', 'I like apples.', 'What is the capital of Belgium?',
  'def solve(xs):\n    """Return the sum of the even numbers in xs."""']
const ENDS = { stop: 'stopped by itself', length: 'did not stop: we cut it off',
  cut: 'you stopped it' }

// --- the worker, started by the first task; then the page is kept for days without a network

let worker = null
function tell(type, more = {}) {
  if (!worker) {
    worker = new Worker(new URL('worker.js', import.meta.url), { type: 'module' })
    worker.onmessage = ({ data }) => hear(data)
    worker.onerror = () => hear({ type: 'error', task: type,
      message: 'The program did not start: this page needs a browser of 2024 or later.' })
    navigator.serviceWorker?.register('sw.js').catch(() => {})
  }
  worker.postMessage({ type, ...more })
}

// --- an answer

class Card {
  constructor(article) {
    this.article = article
    this.out = $('.out', article)
    this.state = $('.state', article)
    this.steps = []
    this.chosen = null
    this.out.onclick = event => this.choose(this.steps.find(s => s.element === event.target))
    this.out.onkeydown = event => this.walk(event)
  }

  begin(asked) {
    this.article.classList.remove('preview')
    this.steps = []
    this.chosen = null
    this.out.replaceChildren(make('span', { className: 'asked', textContent: asked }))
    this.state.textContent = '…'
    this.showOthers()
  }

  given(pieces) {
    const mark = piece => /^<\|.*\|>$/.test(piece)
    $('.given', this.article).replaceChildren(...pieces.map(piece => make('span',
      { textContent: visible(piece), className: mark(piece) ? 'mark' : '' })))
  }

  token({ piece, token, stop, others }) {
    const element = make('span', { className: stop ? 'token end' : 'token' })
    element.textContent = stop ? 'stops' : piece
    this.steps.push({ element, token, others, piece })
    this.out.append(element)
    this.state.textContent = `${this.steps.length} tokens`
    this.out.scrollTop = this.out.scrollHeight
  }

  done({ why, rest, cut, count: tokens, text }) {
    const model = this.model ? ` · ${this.model}` : ''
    if (rest) this.out.append(rest)
    const dots = make('span', { className: 'end never', textContent: '…' })
    if (why === 'length') this.out.append(dots)
    const told = why === 'length' && cut !== null && cut < text.length
      ? 'answered, then wrote the next question' : ENDS[why]
    this.state.replaceChildren(make('b', { textContent: told }),
      ` · ${tokens} tokens${model}`)
    if (cut !== null) this.fade(cut)
  }

  fade(cut) { // what comes after the answer to a few-shot prompt: a program would cut it off
    let at = 0
    for (const { element, piece } of this.steps) {
      if (at >= cut) element.classList.add('after')
      at += piece.length
    }
  }

  choose(step) {
    if (!step) return
    this.chosen?.element.classList.remove('on')
    this.chosen = step === this.chosen ? null : step
    this.chosen?.element.classList.add('on')
    this.showOthers()
  }

  walk(event) { // the arrow keys go from token to token
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key]
    if (!move || this.steps.length === 0) return
    event.preventDefault()
    const now = this.chosen ? this.steps.indexOf(this.chosen) : move > 0 ? -1 : this.steps.length
    const next = this.steps[Math.min(this.steps.length - 1, Math.max(0, now + move))]
    if (next === this.chosen) return
    this.choose(next)
    const told = next.others.map(o => `${o.token.trim() || visible(o.token)} ${percent(o.chance)}`)
    announce(`${next.token}. It could have been: ${told.join(', ')}`)
  }

  showOthers() {
    const panel = $('.others', this.article)
    panel.hidden = this.chosen === null
    if (!this.chosen) return
    const { token, others } = this.chosen
    $('h3', panel).replaceChildren('The likeliest in place of ',
      make('code', { textContent: visible(token) }))
    $('ol', panel).replaceChildren(...others.map(other => {
      const fill = make('i')
      fill.style.width = `${100 * other.chance}%`
      return make('li', { className: other.taken ? 'taken' : '' },
        make('code', { textContent: visible(other.token) }),
        make('span', { className: 'bar' }, fill),
        make('span', { className: 'share', textContent: percent(other.chance) }))
    }))
  }
}

const cards = Object.fromEntries($$('article').map(a => [a.dataset.who, new Card(a)]))

// --- asking

let busy = false
let waiting = [] // tokens, drawn once a frame, however fast they come

function draw() {
  for (const token of waiting) cards[token.who].token(token)
  waiting = []
}

function ask(prompt) {
  if (!prompt.trim()) return $('#prompt').focus()
  draw()
  setBusy(true)
  cards.base.begin(prompt)
  cards.instruct.begin('')
  cards.instruct.model = trained ? $('#answerer').selectedOptions[0].text : ''
  const seed = Math.floor(Math.random() * 2 ** 32)
  tell('ask', { prompt, way: $('[name=way]:checked').value, answerer: $('#answerer').value, seed,
    temperature: Number($('#temperature').value), pace: Number($('#pace').value) })
}

function setBusy(now) {
  busy = now
  $('#go').textContent = now ? 'Stop' : 'Ask both'
}

function status(text, bad = false) {
  $('#status progress').hidden = true
  $('#status span').textContent = text
  $('#status span').className = bad ? 'bad' : ''
  if (bad) announce(text)
}

let megabytes = ''
let trained = false // whether the visitor has a model too
const tuning = new Tuning(tell)
const HEARD = {
  progress({ got, all }) {
    if (megabytes) return // the conversations, later
    $('#status progress').hidden = false
    $('#status progress').value = got / all
    const [came, wanted] = [got, all].map(bytes => (bytes / 1e6).toFixed(1))
    $('#status span').textContent = `Fetching the models: ${came} of ${wanted} MB`
    $('#status span').className = ''
  },
  ready({ bytes, fast, questions }) {
    megabytes = (bytes / 1e6).toFixed(1)
    status(fast ? `Both models are here: ${megabytes} MB.`
      : 'This browser has no WASM SIMD: it can talk, more slowly, but not train.')
    tuning.ready(questions, fast)
  },
  given({ who, pieces }) { cards[who].given(pieces) },
  token(token) {
    if (waiting.push(token) === 1) requestAnimationFrame(draw)
  },
  done(end) {
    draw()
    cards[end.who].done(end)
    const name = end.who === 'base' ? 'The base' : 'The instruct model'
    announce(`${name}: ${end.text}. ${ENDS[end.why]}.`)
  },
  asked({ perSecond }) {
    setBusy(false)
    const speed = count(Math.round(perSecond / 10) * 10)
    status(`Both models are here, ${megabytes} MB. `
      + `At full speed they read and write ${speed} tokens a second.`)
  },
  error({ task, message }) {
    if (task === 'ask') {
      setBusy(false)
      for (const card of Object.values(cards)) card.state.textContent = ''
      status(message, true)
    } else {
      if (!megabytes) status(message, true)
      tuning.failed(message)
    }
  },
}

function hear(data) {
  if (data.type === 'started' && !trained) {
    trained = true // from now on an answer says by which model it is
    if (cards.instruct.steps.length) cards.instruct.state.append(' · ours: 1,000')
  }
  if (HEARD[data.type]) HEARD[data.type](data)
  else tuning.hear(data)
}

// --- controls

$('#ask').onsubmit = event => {
  event.preventDefault()
  if (busy) tell('stop')
  else ask($('#prompt').value)
}
$('#prompt').onkeydown = event => {
  if (event.key !== 'Enter' || event.shiftKey || event.isComposing) return
  event.preventDefault()
  ask($('#prompt').value)
}
$('#temperature').oninput = ({ target }) => {
  const t = Number(target.value)
  const told = t === 0 ? 'the likeliest' : t < 0.6 ? 'careful' : t <= 1 ? 'as it is' : 'wild'
  $('#temperature-says').textContent = `${t}, ${told}`
}
$('#examples').append(...EXAMPLES.map(text => make('button', { type: 'button',
  textContent: text.split('\n')[0],
  onclick() {
    $('#prompt').value = text
    ask(text)
  } })))
