// The loss curve: each step, and a running mean; the loss on a logarithmic axis.

const SVG = 'http://www.w3.org/2000/svg'
const WIDTH = 340
const HEIGHT = 190
const LEFT = 34
const BOTTOM = 22
const LOW = 0.005
const TICKS = [10, 1, 0.1, 0.01]

function draw(tag, attributes, text = '') {
  const element = document.createElementNS(SVG, tag)
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value)
  element.textContent = text
  return element
}

export class Chart {
  constructor(svg) {
    this.svg = svg
    svg.setAttribute('viewBox', `0 0 ${WIDTH} ${HEIGHT}`)
    this.begin(1)
  }

  begin(steps) {
    // the run before stays as a grey line, where it had as many steps
    this.before = this.losses?.length === steps ? this.mean() : []
    this.steps = steps
    this.losses = []
    this.stops = null // the step from which on all four answers stopped
    this.draw()
  }

  add(loss) {
    this.losses.push(loss)
    const told = `The loss at each step: ${this.losses[0].toFixed(2)} at the first, `
      + `${loss.toFixed(2)} at step ${this.losses.length}`
    this.svg.setAttribute('aria-label', told)
    this.draw()
  }

  mean() { // of so many steps up to each
    const width = Math.min(8, Math.ceil(this.steps / 15))
    return this.losses.map((_, i) => {
      const last = this.losses.slice(Math.max(0, i + 1 - width), i + 1)
      return last.reduce((a, b) => a + b) / last.length
    })
  }

  x(step) { return LEFT + (WIDTH - LEFT - 8) * step / this.steps }

  y(loss) {
    const high = Math.max(6, ...this.losses, ...this.before) * 1.2
    const share = Math.log(high / Math.max(loss, LOW)) / Math.log(high / LOW)
    return 6 + (HEIGHT - BOTTOM - 6) * share
  }

  path(values, name) {
    const points = values.map((v, i) => `${this.x(i + 1).toFixed(1)} ${this.y(v).toFixed(1)}`)
    return draw('path', { class: name, d: points.length ? `M${points.join('L')}` : '' })
  }

  draw() {
    const { losses, steps } = this
    const parts = []
    for (const value of TICKS) {
      const y = this.y(value)
      if (y < 6) continue
      parts.push(draw('line', { x1: LEFT, x2: WIDTH - 8, y1: y, y2: y }))
      parts.push(draw('text', { x: LEFT - 5, y: y + 3.5, 'text-anchor': 'end' }, value))
    }
    parts.push(draw('text', { x: LEFT, y: HEIGHT - 6 }, 'step 0'))
    const end = { x: WIDTH - 8, y: HEIGHT - 6, 'text-anchor': 'end' }
    parts.push(draw('text', end, steps > 1 ? `step ${steps}` : ''))
    parts.push(this.path(this.before, 'before'), this.path(losses, 'each'))
    parts.push(this.path(this.mean(), 'mean'))
    if (this.stops !== null) {
      const x = this.x(this.stops)
      const right = x > WIDTH / 2
      parts.push(draw('line', { class: 'mark', x1: x, x2: x, y1: 6, y2: HEIGHT - BOTTOM }))
      parts.push(draw('text', { class: 'mark', x: x + (right ? -5 : 5), y: 16,
        'text-anchor': right ? 'end' : 'start' }, 'all four stop'))
    }
    this.svg.replaceChildren(...parts)
  }
}
