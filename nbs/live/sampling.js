// From logits to the next token, and from token to token.

export function argmax(values) {
  let best = 0
  for (let i = 1; i < values.length; i++) if (values[i] > values[best]) best = i
  return best
}

export function softmax(logits, temperature = 1) {
  const max = logits[argmax(logits)]
  const p = new Float32Array(logits.length)
  let total = 0
  for (let i = 0; i < p.length; i++) {
    p[i] = Math.exp((logits[i] - max) / temperature)
    total += p[i]
  }
  for (let i = 0; i < p.length; i++) p[i] /= total
  return p
}

export function likeliest(p, n) { // the n most likely, as [id, probability]
  const best = []
  for (let id = 0; id < p.length; id++) {
    if (best.length === n && p[id] <= best[n - 1][1]) continue
    const place = best.findIndex(([, other]) => other < p[id])
    best.splice(place < 0 ? best.length : place, 0, [id, p[id]])
    best.length = Math.min(best.length, n)
  }
  return best
}

export function random(seed) { // mulberry32: the same seed gives the same numbers, from 0 to 1
  let state = seed >>> 0
  return () => {
    state = (state + 0x6D2B79F5) | 0
    let t = Math.imul(state ^ (state >>> 15), 1 | state)
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32
  }
}

export function sampler(temperature, seed) { // a function from logits to an id; 0 is greedy
  if (temperature === 0) return argmax
  const dice = random(seed)
  return logits => {
    const p = softmax(logits, temperature)
    let left = dice()
    const id = p.findIndex(chance => (left -= chance) < 0)
    return id < 0 ? argmax(p) : id // rounding may leave a little
  }
}

// Yields { id, logits } for each new token, until one of `stops`, `limit` tokens or a full context.
export function* generate(model, ids, { pick = argmax, limit = 48, stops }) {
  const cache = model.newCache()
  const room = model.config.max_position_embeddings - ids.length
  let logits = model.prefill(ids, cache)
  for (let n = 1; n <= Math.min(limit, room); n++) {
    const id = pick(logits)
    yield { id, logits }
    if (stops.has(id) || n === Math.min(limit, room)) return
    logits = model.step(id, cache)
  }
}
