// Small helpers for the page. Texts become text nodes, never HTML.

export const $ = (selector, from = document) => from.querySelector(selector)
export const $$ = (selector, from = document) => [...from.querySelectorAll(selector)]

export function make(tag, properties = {}, ...inside) {
  const element = Object.assign(document.createElement(tag), properties)
  element.append(...inside)
  return element
}

// White space of a token, made visible.
export const visible = text => (
  text.replaceAll(' ', '␣').replaceAll('\n', '↵').replaceAll('\t', '⇥') || '∅')

export const percent = share => {
  if (share > 0 && share < 0.001) return '< 0.1 %'
  return share > 0.9995 ? '100 %' : `${(100 * share).toFixed(1)} %`
}

export const count = n => n.toLocaleString('en')

// Said by a screen reader, once it has finished its sentence.
export function announce(text) {
  $('#announcer').textContent = text
}
