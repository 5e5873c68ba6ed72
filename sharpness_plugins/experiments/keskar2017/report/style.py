"""The page's style sheet: one column, light and dark, a phone's width, and paper."""

from __future__ import annotations

__all__ = ["CSS"]

CSS = """
:root { --paper: #ffffff; --ink: #1c1f23; --grey: #5d6670; --rule: #cdd3d9; --wash: #f4f6f8;
  --blue: #0072b2; --orange: #d55e00; --green: #009e73; --link: #005b94;
  --yes: #00664b; --partly: #7a5200; --no: #a33a00; color-scheme: light dark; }
@media screen and (prefers-color-scheme: dark) { :root { --paper: #15181c; --ink: #e4e7ea; --grey: #a0a9b2; --rule: #3b434c;
  --wash: #1e2329; --blue: #56b4e9; --orange: #f0883e; --green: #35c99b; --link: #7cc0ee;
  --yes: #4fd1a5; --partly: #e6b450; --no: #ff9d6b; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0 auto; padding: 1.2rem 1rem 4rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .4rem 0 .8rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .6rem; padding-top: .6rem; border-top: 1px solid var(--rule); }
h3 { font-size: 1.05rem; margin: 1.8rem 0 .4rem; }
p, li, dd { max-width: 46rem; }
a { color: var(--link); }
code { font: .9em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
pre { background: var(--wash); padding: .7rem .9rem; overflow-x: auto; border-radius: 6px; white-space: pre-wrap; }
.answer { font-size: 1.1rem; background: var(--wash); border-left: 4px solid var(--blue); padding: .8rem 1rem;
  max-width: 50rem; }
.note, .missing, figcaption, caption { color: var(--grey); font-size: .9rem; }
.note { margin: .2rem 0; }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1rem; padding: 0; list-style: none; max-width: none; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; margin: .6rem 0; }
dt { font-weight: 600; } dd { margin: 0; overflow-wrap: anywhere; }
.guide { display: block; } .guide dd { margin: 0 0 .6rem; }
.scroll { overflow-x: auto; margin: .8rem 0 .3rem; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; line-height: 1.35; }
caption { text-align: left; padding-bottom: .4rem; font-weight: 600; color: var(--ink); }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--rule); text-align: right; vertical-align: top; }
thead th { border-bottom: 2px solid var(--grey); vertical-align: bottom; min-width: 4.6rem; }
thead th:first-child { text-align: left; }
th[scope="row"] { text-align: left; font-weight: 500; min-width: 9rem; }
tr.paper th, tr.paper td { color: var(--grey); }
td.number { white-space: nowrap; }
.agreement td, .agreement thead th, .files td, .files thead th { text-align: left; }
.agreement td { min-width: 11rem; }
.agreement .rule, .agreement .reason { display: block; margin-top: .25rem; }
.agreement .rule, .where { color: var(--grey); font-size: .8rem; }
.where { display: block; }
.verdict { font-weight: 700; white-space: nowrap; }
.yes { color: var(--yes); } .partly { color: var(--partly); } .no { color: var(--no); } .unknown { color: var(--grey); }
figure { margin: 1.2rem 0 2rem; break-inside: avoid; }
figure h3 { margin-bottom: .3rem; }
figcaption { max-width: 46rem; margin-top: .3rem; }
figure .scroll svg { display: block; width: 100%; height: auto; min-width: 34rem; max-width: 46rem; }
svg * { stroke-linejoin: round; stroke-linecap: butt; } svg text { fill: var(--ink); }
.downloads { font-size: .85rem; }
@media screen and (max-width: 44rem) {
  caption span { display: block; max-width: calc(100vw - 2rem); }
  .number-table th[scope="row"] { position: sticky; left: 0; background: var(--paper); min-width: 6.5rem; }
  body { padding: .6rem .8rem 3rem; } h1 { font-size: 1.4rem; } dl { display: block; } dd { margin-bottom: .4rem; }
  .agreement, .agreement tbody, .agreement tr, .agreement th, .agreement td { display: block; min-width: 0; border: 0; }
  .agreement caption { display: block; } .agreement thead { position: absolute; left: -9999px; }
  .agreement tr { border-bottom: 1px solid var(--rule); padding: .6rem 0; }
  .agreement th, .agreement td { padding: .1rem 0; }
  .agreement td::before { content: attr(data-label) ": "; color: var(--grey); }
}
@media print {
  html { font-size: 9.5pt; } body { max-width: none; padding: 0; } nav { display: none; } h2 { break-after: avoid; }
  .scroll { overflow: visible; } table { font-size: .8rem; } tr { break-inside: avoid; }
  thead { display: table-header-group; }
  th, td, thead th, .agreement td, th[scope="row"] { min-width: 0; padding: 2pt 4pt; }
  figure .scroll svg { min-width: 0; max-width: 15cm; } a { color: inherit; }
}
@page { margin: 1.6cm; }
"""
