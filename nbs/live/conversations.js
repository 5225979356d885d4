// Conversations as text that people can read and edit:
//
// Q: What is a baby goat called?
// A: A baby goat is called a kid.

export const asText = pairs => pairs.map(([q, a]) => `Q: ${q}\nA: ${a}\n`).join('\n')

// [question, answer] pairs; an Error that names the line where it is no conversation.
export function fromText(text) {
  const pairs = []
  const lines = text.split(/\r?\n/)
  let open = null // where the lines go that belong to no new "Q:" or "A:"
  lines.forEach((line, i) => {
    const wrong = why => new Error(`Line ${i + 1}: ${why}`)
    const [, letter, rest] = line.match(/^(Q|A):\s?(.*)$/) ?? []
    const last = pairs.at(-1)
    if (letter === 'Q') {
      if (last && !last.answer.length) throw wrong('a second question. First "A:".')
      pairs.push({ question: [rest], answer: [], line: i + 1 })
      open = pairs.at(-1).question
    } else if (letter === 'A') {
      if (!last || last.answer.length) throw wrong('an answer without a question.')
      last.answer.push(rest)
      open = last.answer
    } else if (open) {
      open.push(line)
    } else if (line.trim()) {
      throw wrong('a conversation begins with "Q:".')
    }
  })
  if (pairs.length === 0) throw new Error('There is no conversation: write "Q: …", then "A: …".')
  return pairs.map(({ question, answer, line }) => {
    const texts = [question, answer].map(part => part.join('\n').trim())
    if (texts.some(part => part === '')) {
      throw new Error(`Line ${line}: this question or its answer is missing.`)
    }
    return texts
  })
}
