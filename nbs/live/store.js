// The weights and the questions: fetched once, compared with the list of their hashes, and kept in
// the browser's cache. The list itself is asked for anew where there is a network.

const FOLDER = new URL('data/', import.meta.url)
const CACHE = 'sftlab-live-data'
const number = n => n.toLocaleString('en')

const hash = async buffer => { // in hexadecimal; pages without https have no way to compute it
  if (!globalThis.crypto?.subtle) return null
  const bytes = new Uint8Array(await crypto.subtle.digest('SHA-256', buffer))
  return Array.from(bytes, b => b.toString(16).padStart(2, '0')).join('')
}

async function fetched(url, name) { // a response, or an error that says what to do
  let response
  try {
    response = await fetch(url, { cache: 'no-cache' })
  } catch {
    throw new Error(`${name} could not be fetched: there is no network, or the server is gone.`)
  }
  if (!response.ok) throw new Error(`${name} is not on this server (${response.status}).`)
  return response
}

export class Store {
  constructor(report) { // called with the bytes that came, and all that will
    this.report = report
    this.got = 0
    this.all = 0
  }

  async open() {
    this.cache = await globalThis.caches?.open(CACHE)
    const url = new URL('manifest.json', FOLDER)
    const kept = await this.cache?.match(url)
    try {
      const text = await (await fetched(url, 'manifest.json')).text()
      this.files = JSON.parse(text)
      await this.cache?.put(url, new Response(text))
    } catch (error) {
      if (!kept) throw error
      this.files = await kept.json() // there is no network
    }
    await this.forgetOthers(url)
  }

  address(name) { // the hash is a part of it, so a new file never meets an old copy
    const url = new URL(name, FOLDER)
    url.search = this.files[name].sha256.slice(0, 16)
    return url.href
  }

  async forgetOthers(list) { // copies that this list does not name
    const named = new Set([list.href, ...Object.keys(this.files).map(n => this.address(n))])
    for (const { url } of await this.cache?.keys() ?? []) {
      if (!named.has(url)) await this.cache.delete(url)
    }
  }

  async read(name) { // ArrayBuffer
    if (!this.files[name]) throw new Error(`${name} is not in the list of this page's files.`)
    const { bytes } = this.files[name]
    this.all += bytes
    const url = this.address(name)
    const kept = await this.cache?.match(url)
    if (kept) {
      const buffer = await kept.arrayBuffer()
      if (await this.isRight(name, buffer)) {
        this.add(bytes)
        return buffer
      }
      await this.cache.delete(url)
    }
    const buffer = await this.download(await fetched(url, name), name)
    if (buffer.byteLength < bytes) {
      const [came, wanted] = [buffer.byteLength, bytes].map(number)
      throw new Error(`${name} broke off: ${came} of ${wanted} bytes came. Try again.`)
    }
    if (!await this.isRight(name, buffer)) {
      throw new Error(`${name} is not the file this page was made with: its hash differs.`)
    }
    await this.cache?.put(url, new Response(buffer))
    return buffer
  }

  async download(response, name) {
    const parts = []
    try {
      for (const reader = response.body.getReader(); ;) {
        const { done, value } = await reader.read()
        if (done) break
        parts.push(value)
        this.add(value.length)
      }
    } catch {
      throw new Error(`${name} broke off: the connection was lost. Try again.`)
    }
    return new Blob(parts).arrayBuffer()
  }

  add(bytes) {
    this.got += bytes
    this.report(this.got, this.all)
  }

  async isRight(name, buffer) {
    const { bytes, sha256 } = this.files[name]
    if (buffer.byteLength !== bytes) return false
    const found = await hash(buffer)
    return found === null || found === sha256
  }

  async json(name) {
    return JSON.parse(new TextDecoder().decode(await this.read(name)))
  }
}
