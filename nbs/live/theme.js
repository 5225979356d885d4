// Light or dark as the visitor chose on the course's other pages; otherwise as the system says.
try {
  const chosen = localStorage.getItem('quarto-color-scheme')
  if (chosen) document.documentElement.dataset.theme = chosen === 'alternate' ? 'dark' : 'light'
} catch {
  // storage is switched off: the system's choice is as good
}
