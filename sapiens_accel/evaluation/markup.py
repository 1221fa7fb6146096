"""Pieces of a page as HTML and SVG: tables, charts, bars, keys. Words that come in are escaped, markup is not."""

from collections.abc import Iterable, Sequence
from html import escape

STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1c1f23;--faint:#6a727c;--line:#d9dee4;--bar:#3b7dd8;--soft:#f3f5f8}
@media(prefers-color-scheme:dark){:root{--paper:#15181c;--ink:#e6e9ed;--faint:#98a2ad;--line:#353b43;--bar:#5b9bf0;
--soft:#1f242a}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:75rem;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.5rem}h2{font-size:1.2rem;border-bottom:1px solid var(--line);margin-top:2.5rem}h3{font-size:1rem}
small,.faint{color:var(--faint)}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.15rem .55rem;text-align:right;white-space:nowrap}th:first-child,td:first-child{text-align:left}
thead th{border-bottom:1px solid var(--line);font-weight:600}
.panels div{flex:1 1 9.5rem;min-width:0;max-width:20rem}.panels small{display:block}
.bars{width:100%;max-width:46rem}.bars td:last-child,.bars th:last-child{width:60%;text-align:left}
.bars.two td:nth-last-child(-n+2),.bars.two th:nth-last-child(-n+2){width:36%;text-align:left}
.bar{display:flex;height:.9rem;background:var(--soft);border-radius:2px;overflow:hidden}.bar i{display:block}
.row{display:flex;flex-wrap:wrap;gap:1.5rem;align-items:flex-start}.row>*{flex:1 1 18rem;min-width:0}
svg{width:100%;max-width:34rem;height:auto}svg text{fill:var(--faint);font:11px system-ui,sans-serif}
svg .grid{stroke:var(--line)}svg polyline{fill:none;stroke-width:1.6;vector-effect:non-scaling-stroke}
ul.key{list-style:none;padding:0;display:flex;flex-wrap:wrap;gap:.1rem 1.2rem}
ul.key i,.kind i{display:inline-block;width:.8em;height:.8em;border-radius:2px;margin-right:.4em}
figure{margin:1.5rem 0}figcaption{margin-bottom:.4rem}.panels{display:flex;flex-wrap:wrap;gap:4px}
.panels img{display:block;width:100%;height:auto}
details>summary{cursor:pointer;padding:.3rem 0}
@media(max-width:44rem){.stack,.stack tbody{display:block}.stack thead{display:none}
.stack tr{display:flex;flex-wrap:wrap;gap:.1rem .5rem;padding:.4rem 0;border-bottom:1px solid var(--line)}
.stack td,.stack td:first-child{padding:0;min-width:3.9rem;text-align:left;white-space:normal}
.stack td:first-child{flex-basis:100%;font-weight:600}
.stack td[data-head]::before{content:attr(data-head);display:block;color:var(--faint);font-size:.75rem}
.bars{table-layout:fixed;font-size:.85rem}.bars th,.bars td{padding:.15rem .3rem;white-space:normal}
.bars th:first-child{width:26%}.bars th:nth-child(2){width:21%}
.bars th:nth-child(3){width:17%}.bars th:last-child,.bars td:last-child{width:auto}
.bars.two th:nth-last-child(-n+2),.bars.two td:nth-last-child(-n+2){width:26.5%}}
"""


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A table of words; on a narrow page each row is a block, and each cell under its heading."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    rows = "\n".join(f"<tr>{''.join(map(_cell, head, row))}</tr>" for row in body)
    return (
        f'<div class="wide"><table class="stack"><thead><tr>{top}</tr></thead><tbody>\n{rows}\n</tbody></table></div>'
    )


def _cell(heading: str, text: str) -> str:
    return f'<td data-head="{escape(heading)}">{escape(text)}</td>' if heading else f"<td>{escape(text)}</td>"


def chart(across: str, up: str, inner: str) -> str:
    """An SVG with axes of 0 to 100; what is in it has y upwards."""
    grid = "".join(
        f'<path class="grid" d="M{40 + 3 * at} 10v200M40 {210 - 2 * at}h300"/>'
        f'<text x="{40 + 3 * at}" y="225" text-anchor="middle">{at}</text>'
        f'<text x="34" y="{214 - 2 * at}" text-anchor="end">{at}</text>'
        for at in (0, 20, 40, 60, 80, 100)
    )
    words = (
        f'<text x="190" y="242" text-anchor="middle">{escape(across)}</text>'
        f'<text x="10" y="110" text-anchor="middle" transform="rotate(-90 10 110)">{escape(up)}</text>'
    )
    name = f"{escape(up)} by {escape(across)}"
    scaled = f'<g transform="translate(40 210) scale(3 -2)">{inner}</g>'
    return f'<svg viewBox="0 0 350 248" role="img" aria-label="{name}">{grid}{words}{scaled}</svg>'


def key(names: Iterable[tuple[str, str]]) -> str:
    """What each colour means."""
    entries = "".join(f'<li><i style="background:{colour}"></i>{escape(text)}</li>' for text, colour in names)
    return f'<ul class="key">{entries}</ul>'


def bar(pieces: Iterable[tuple[float, str, str]]) -> str:
    """Pieces (share of the width, colour, what it says under the pointer) in a row."""
    inner = "".join(
        f'<i style="width:{100 * share:.2f}%;background:{colour}"'
        + (f' title="{escape(text)}"' if text else "")
        + "></i>"
        for share, colour, text in pieces
        if share > 0
    )
    return f'<div class="bar">{inner}</div>'


def folded(kind: str, head: Sequence[str], top: Sequence[str], body: Sequence[str], most: int) -> str:
    """A table of rows; those of the body are folded away where they are more than `most`."""
    heads = f"<thead><tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr></thead>"

    def part(rows: Sequence[str]) -> str:
        return f'<div class="wide"><table class="{kind}">{heads}<tbody>\n{chr(10).join(rows)}\n</tbody></table></div>'

    if len(body) <= most:
        return part([*top, *body])
    return f"{part(top)}<details><summary>all {len(body)}</summary>{part(body)}</details>"
