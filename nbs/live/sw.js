// Keeps the page's own files, so that it opens without a network too. With one, they are always
// asked for anew. The weights are not its business: store.js keeps those.

const CACHE = 'sftlab-live-page'
const FILES = ['./', 'chart.js', 'conversations.js', 'dom.js', 'engine.js', 'kernel.js',
  'kernel.wasm', 'live.css', 'live.js', 'lora.js', 'math.js', 'sampling.js', 'store.js', 'theme.js',
  'tokenizer.js', 'trainer.js', 'tune.js', 'vendor/tokenizers.js', 'worker-talk.js',
  'worker-tune.js', 'worker.js']

self.addEventListener('install', event => {
  self.skipWaiting()
  event.waitUntil(caches.open(CACHE).then(cache => cache.addAll(FILES)))
})

self.addEventListener('activate', event => event.waitUntil(self.clients.claim()))

async function networkFirst(request) {
  const cache = await caches.open(CACHE)
  try {
    const response = await fetch(request)
    if (response.ok) await cache.put(request, response.clone())
    return response
  } catch (error) {
    const kept = await cache.match(request, { ignoreSearch: true })
    if (!kept) throw error
    return kept
  }
}

const ours = new Set(FILES.map(name => new URL(name, self.registration.scope).pathname))
self.addEventListener('fetch', event => {
  const { pathname } = new URL(event.request.url)
  const page = pathname.replace(/index\.html$/, '')
  if (event.request.method === 'GET' && ours.has(page)) {
    event.respondWith(networkFirst(page === pathname ? event.request : new Request(page)))
  }
})
