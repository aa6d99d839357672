"""How the page looks: wide, on a phone, and on paper."""

STYLE = """
:root { color-scheme: light } * { box-sizing: border-box }
body { font: .94rem/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 } h2 { font-size: 1.2rem; margin: 2.6rem 0 .2rem }
h3 { font-size: 1rem; margin: 1.6rem 0 .1rem } h4 { font-size: .9rem; font-weight: 500; margin: .8rem 0 .2rem }
.facts, .note { color: #666; margin: .2rem 0 .7rem; max-width: 48rem } code { font-size: .88em }
code { overflow-wrap: anywhere }
nav { margin: 1.2rem 0 0 } nav a { color: #1f5f99; margin-right: 1.1rem; white-space: nowrap; text-decoration: none }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(11.6rem, 1fr)); gap: .7rem; margin: 1.3rem 0 }
.card { border: 1px solid #ddd; border-radius: 6px; padding: .6rem .8rem; line-height: 1.3 }
.card b { display: block; font-size: 1.4rem; line-height: 1.2; font-weight: 600; margin: .25rem 0 }
.card b small { font-weight: 400; white-space: nowrap }
small { color: #666; font-size: .82rem } td small { line-height: 1.3 } td:first-child small { display: block }
table { border-collapse: collapse; margin: .4rem 0 } .scroll { overflow-x: auto }
th, td { text-align: left; padding: .28rem 1.1rem .28rem 0; border-bottom: 1px solid #e3e3e3; vertical-align: top }
th { font-weight: 600; font-size: .85rem; vertical-align: bottom }
.numbers { width: 100%; max-width: 52rem; table-layout: fixed }
.numbers th { width: 22% } .numbers th:first-child { width: 44% } .numbers th:last-child { width: 12% }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap } .way { font-size: .85rem }
figure { margin: 0 } figcaption { font-size: .78rem; line-height: 1.25; color: #555; overflow-wrap: anywhere }
img { max-width: 100%; height: auto; display: block } .frame { border: 1px solid #ddd } .plot { width: 40rem }
.row { display: grid; grid-template-columns: repeat(var(--n), minmax(0, var(--w))); gap: 6px }
.row img { width: 100%; outline: 1px solid #ddd } details { margin: .6rem 0 } summary { cursor: pointer; color: #444 }
@media (min-width: 70rem) { .small img { image-rendering: pixelated } }
@media (max-width: 34rem) {
  body { margin: 1rem auto } .row { gap: 3px } th, td { padding-right: .6rem; font-size: .82rem }
  th.n { white-space: normal }
  .cards { grid-template-columns: 1fr 1fr } .card { padding: .5rem .6rem } figcaption { font-size: .68rem }
  .numbers tr { display: grid; grid-template-columns: 1fr auto; border-bottom: 1px solid #e3e3e3; padding: .35rem 0 }
  .numbers td { border: 0; padding: 0 } .numbers td:first-child { grid-row: span 3; padding-right: .6rem }
  .numbers tr:first-child { display: none } .numbers td:last-child::after { content: " samples" }
}
@media print {
  html { font-size: 10px } body { font-size: 1rem; max-width: none; margin: 0; padding: 0 2px } nav { display: none }
  .scroll { overflow: visible }
  h2, h3, h4 { break-after: avoid }
  section { break-inside: auto } figure, tr, .card, .row { break-inside: avoid } .plot { width: 12cm }
  details::details-content { content-visibility: visible; display: block } @page { margin: 1.4cm }
}
"""
