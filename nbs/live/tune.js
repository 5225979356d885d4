// The fine-tuning half of the page: settings, loss curve, the four questions, the score.
import { Chart } from './chart.js'
import { asText, fromText } from './conversations.js'
import { $, $$, announce, count, make } from './dom.js'

const RATES = { full: [3e-4, 6e-4, 1.2e-3], lora: [2.5e-3, 5e-3, 1e-2] }
const TOO_HIGH = 10
const SHOWN = 4 // scores, the newest first
const chosen = name => $(`[name=${name}]:checked`).value
const ticked = name => $(`[name=${name}]`).checked

// The 95 % Wilson interval of a share, as lesson 01 has it.
export function interval(successes, n) {
  const z = 1.96
  const share = successes / n
  const middle = share + z * z / (2 * n)
  const half = z * Math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
  return [middle - half, middle + half].map(end => end / (1 + z * z / n))
}

export class Tuning {
  constructor(tell) {
    this.tell = tell
    this.chart = new Chart($('#chart'))
    this.shown = null // which of our conversations the editor shows
    this.settings = null // of the run that is shown
    this.scores = [] // of the runs so far
    this.showRates()
    this.wire()
  }

  wire() {
    for (const radio of $$('[name=method]')) radio.onchange = () => this.showRates()
    for (const radio of $$('[name=size]')) radio.onchange = () => this.fillEditor()
    $('#own').ontoggle = () => this.fillEditor()
    $('#conversations').oninput = () => this.edited()
    $('#ours').onclick = () => this.putOursBack()
    $('#settings').onsubmit = event => {
      event.preventDefault()
      this.start()
    }
    $('#pause').onclick = () => {
      this.tell('pause')
      this.paused()
    }
    $('#resume').onclick = () => {
      this.tell('resume')
      this.running()
    }
  }

  ready(questions, fast) { // the models are there
    this.questions = questions
    if (fast) return
    $('#start').disabled = true
    this.status('This browser has no WASM SIMD, which the training needs.', true)
  }

  // --- the conversations

  fillEditor() { // with ours, where it is open and the visitor has not written anything
    const size = chosen('size')
    if (!$('#own').open || this.shown === size) return
    if (size === 'own') {
      $('#conversations').value = this.own
      this.edited()
    } else {
      this.tell('examples', { size })
    }
  }

  examples({ size, pairs }) {
    if (chosen('size') !== size) return
    this.shown = size
    $('#conversations').value = asText(pairs)
    $('#own-says').textContent = `${count(pairs.length)} conversations of ours. Change any of them.`
    $('#own-says').className = ''
    $('#ours').hidden = true
  }

  edited() {
    const own = $('[name=size][value=own]')
    if (chosen('size') !== 'own') this.before = chosen('size')
    this.own = $('#conversations').value // kept, where ours are looked at in between
    own.closest('label').hidden = false
    own.checked = true
    this.shown = 'own'
    $('#ours').hidden = false
    this.readOwn()
  }

  readOwn() { // the visitor's pairs; null, and a message, where they cannot be read
    const says = $('#own-says')
    try {
      const pairs = fromText($('#conversations').value)
      says.textContent = `${count(pairs.length)} conversations of yours. They stay in this page.`
      says.className = ''
      return pairs
    } catch (error) {
      says.textContent = error.message
      says.className = 'bad'
      return null
    }
  }

  putOursBack() {
    $(`[name=size][value="${this.before ?? 300}"]`).checked = true
    $('[name=size][value=own]').closest('label').hidden = true
    this.fillEditor()
  }

  // --- a run

  showRates() {
    const [low, middle, high] = RATES[chosen('method')]
    const labels = { [low]: `${low}`, [middle]: `${middle}`, [high]: `${high}` }
    if (chosen('method') === 'full') labels[low] += ' (lesson 01)'
    $('#rate').replaceChildren(...[low, middle, high].map(rate => (
      make('option', { value: rate, textContent: labels[rate] }))))
  }

  start() {
    const own = chosen('size') === 'own'
    const pairs = own ? this.readOwn() : null
    if (own && !pairs) {
      $('#own').open = true
      return $('#conversations').focus()
    }
    const [, good] = RATES[chosen('method')]
    const rate = ticked('high') ? TOO_HIGH * good : Number($('#rate').value)
    const learn = { prompt: ticked('prompt'), stop: !ticked('unstopped') }
    this.settings = { pairs, size: chosen('size'), method: chosen('method'), rate, learn, seed: 0 }
    this.at = 0
    this.steps = null
    $('#lab').hidden = false
    $('#score').hidden = true
    $('#asked tbody').replaceChildren()
    this.status('Getting ready …')
    this.tell('train', this.settings)
    this.running()
  }

  running() {
    this.going = true
    $('#start').textContent = 'Start anew'
    $('#start').className = ''
    $('#pause').hidden = false
    $('#resume').hidden = true
  }

  paused() {
    this.going = false
    $('#pause').hidden = true
    $('#resume').hidden = false
    const { at, steps } = this
    this.status(steps ? `Stopped at step ${at} of ${steps}. Ask it above, or let it go on.`
      : 'Stopped.')
  }

  over() {
    this.going = false
    $('#pause').hidden = true
    $('#resume').hidden = true
  }

  failed(message) {
    this.over()
    this.status(message, true)
  }

  status(text, bad = false) {
    $('#tune-status').textContent = text
    $('#tune-status').className = bad ? 'bad' : ''
    if (bad) announce(text)
  }

  // --- what the worker says

  hear(message) {
    this[message.type]?.(message)
  }

  started({ steps, trained }) {
    this.at = 0
    this.steps = steps
    this.chart.begin(steps)
    $('#before').hidden = this.chart.before.length === 0
    const { rate, pairs, size } = this.settings
    this.status(`${count(trained)} numbers learn, in ${steps} steps, at a rate of ${rate}.`)
    announce(`Fine-tuning has begun: ${steps} steps.`)
    $('.which').hidden = false
    $('#answerer').value = 'mine'
    $('#answerer [value=mine]').textContent
      = `yours: ${pairs ? `your own ${count(pairs.length)}` : count(Number(size))}`
  }

  step({ step, steps, loss, seconds }) {
    this.at = step
    this.chart.add(loss)
    this.seconds = seconds
    if (!this.going) return
    const left = seconds / step * (steps - step)
    const time = `${seconds.toFixed(0)} s, about ${Math.ceil(left)} more`
    this.status(`Step ${step} of ${steps} · loss ${loss.toFixed(2)} · ${time}`)
  }

  probe({ step, answers }) {
    $('#at').textContent = step
    $('#asked tbody').replaceChildren(...answers.map(({ text, stopped }, i) => {
      const end = stopped ? make('span', { className: 'end', textContent: 'stops' }) : ' …'
      return make('tr', {}, make('td', { textContent: this.questions.asked[i] }),
        make('td', {}, make('span', { className: 'said' }, text.replace(/\s+/g, ' '), end)))
    }))
    const all = answers.every(answer => answer.stopped)
    if (all) this.chart.stops ??= step
    else this.chart.stops = null
    this.chart.draw()
  }

  scoring({ done, all }) {
    const seconds = this.seconds.toFixed(0)
    if (this.going) this.status(`Trained in ${seconds} s. The test: question ${done} of ${all}`)
  }

  scored({ rows }) {
    this.over()
    const right = rows.filter(row => row.exact).length
    const stops = rows.filter(row => row.stopped).length
    const n = rows.length
    const { size } = this.settings
    const lesson = this.questions.measured[size]
    this.scores.push({ label: this.label(), right, n })
    const shown = this.scores.slice(-SHOWN).reverse().map((score, i) => {
      const [low, high] = interval(score.right, score.n).map(share => Math.round(100 * share))
      return this.bar(i === 0 ? 'now' : 'earlier', score.label, 100 * score.right / score.n,
        `(${low} to ${high})`)
    })
    if (lesson !== undefined) {
      shown.push(this.bar('lesson', `Lesson 01: ${count(Number(size))}, all weights`, lesson))
    }
    $('#score .bars').replaceChildren(...shown)
    $('#score-says').textContent = this.remark(stops, n, lesson)
    $('#score tbody').replaceChildren(...rows.map(row => {
      const said = `${row.exact ? '✓' : '✗'} ${row.said}${row.stopped ? '' : ' …'}`
      return make('tr', {}, make('td', { textContent: row.question }),
        make('td', { className: row.exact ? '' : 'no', textContent: said }),
        make('td', { textContent: row.right }))
    }))
    $('#score').hidden = false
    this.status(`Done: ${this.steps} steps in ${this.seconds.toFixed(0)} s on your machine. `
      + 'Ask it something above.')
    announce(`Done. ${right} of ${n} questions are right, it stopped ${stops} times.`)
  }

  label() { // of the run that is shown
    const { pairs, size, method, rate, learn } = this.settings
    const parts = [pairs ? `Your ${count(pairs.length)}` : count(Number(size)),
      method === 'full' ? 'all weights' : 'LoRA', `rate ${rate}`]
    if (learn.prompt) parts.push('questions too')
    if (!learn.stop) parts.push('stop masked')
    return parts.join(', ')
  }

  bar(kind, label, share, more = '') {
    const fill = make('i')
    fill.style.width = `${share}%`
    return make('div', { className: kind }, make('span', { textContent: label }),
      make('span', { className: 'bar' }, fill),
      make('span', {}, make('b', { textContent: `${share.toFixed(1)} %` }), ` ${more}`))
  }

  remark(stops, n, lesson) {
    const said = [`It stopped by itself ${stops} times of ${n}.`]
    const meant = this.settings.learn.stop && this.settings.rate <= Math.max(...RATES.lora)
    if (stops < n / 2 && meant) {
      said.push(`${this.steps} steps are few: take more conversations, or a higher rate.`)
    }
    said.push('In brackets the 95 % interval: sixty questions are few.')
    if (lesson !== undefined) {
      said.push('Lesson 01 trains at 0.0003; its figure is the mean of three runs, each tested on '
        + '570 questions.')
    }
    return said.join(' ')
  }
}
