// Text to token ids and back, and the chat template, as the course's Python has them.
// Around the package @huggingface/tokenizers, which `python tools/live.py build` bundles.
import { Tokenizer } from './vendor/tokenizers.js'

const BYTE_LEVEL = "'s|'t|'re|'ve|'m|'ll|'d" // the pattern of GPT-2
  + '| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+'
const split = pattern => (
  { type: 'Split', pattern: { Regex: pattern }, behavior: 'Isolated', invert: false })

// Two differences between the package and Python's library, put right in tokenizer.json: `Digits`
// means all of \p{N}, not ASCII alone, and white space is what Unicode says, not JavaScript.
function likePython(part) {
  if (part.type === 'Digits') return [split('\\p{N}')]
  if (part.type === 'ByteLevel') return [split(BYTE_LEVEL), { ...part, use_regex: false }]
  return [part]
}

export class ChatTokenizer {
  constructor(file, config) { // tokenizer.json and tokenizer_config.json, parsed
    this.special = Object.fromEntries(file.added_tokens.map(t => [t.content, t.id]))
    this.start = this.special['<|endoftext|>'] // before each new text
    this.open = this.special['<|im_start|>']
    this.close = this.special['<|im_end|>'] // the end of a turn
    this.stops = new Set([this.start, this.close])
    const { pre_tokenizer: pre } = file
    const pretokenizers = pre.pretokenizers.flatMap(likePython)
    // without added tokens: "<|im_end|>" that somebody types is text, never a control token
    const plain = { ...file, added_tokens: [], pre_tokenizer: { ...pre, pretokenizers } }
    this.tokenizer = new Tokenizer(plain, { ...config, clean_up_tokenization_spaces: false })
  }

  encode(text) {
    return text === '' ? [] : this.tokenizer.encode(text).ids
  }

  decode(ids) {
    return ids.length === 0 ? '' : this.tokenizer.decode(ids, { skip_special_tokens: false })
  }

  question(question) { // <|im_start|>user … <|im_end|>
    return [this.open, ...this.encode(`user\n${question}`), this.close, ...this.encode('\n')]
  }

  prompt(question) { // a question in the chat template, ready for the answer
    return [...this.question(question), this.open, ...this.encode('assistant\n')]
  }

  // A conversation as token ids and labels: -100 where nothing is learned.
  // `learn`: { prompt: the question too, stop: the mark that ends the answer }.
  row(question, answer, learn = { prompt: false, stop: true }) {
    const asked = this.prompt(question)
    const turn = [this.open, ...this.encode(`assistant\n${answer}`)]
    const ids = [...this.question(question), ...turn, this.close, ...this.encode('\n')]
    const end = ids.lastIndexOf(this.close)
    const learned = (id, at) => {
      if (!learn.stop && (id === this.close || at > end)) return false
      return learn.prompt || (at >= asked.length && at <= end)
    }
    return { ids, labels: ids.map((id, at) => learned(id, at) ? id : -100) }
  }
}

// --- the base's own form of question and answer

export const fewShot = (shots, question) => (
  shots.map(s => `Q: ${s.question}\nA: ${s.answer}\n`).join('') + `Q: ${question}\nA:`)

const FEW_SHOT_STOPS = ['\nQ:', '\n\n']
export function cutAt(text) { // where the answer to a few-shot prompt is over
  const ends = FEW_SHOT_STOPS.map(stop => text.indexOf(stop)).filter(at => at >= 0)
  return Math.min(text.length, ...ends)
}
