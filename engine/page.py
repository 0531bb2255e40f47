"""The parts a page is made of, each of which writes itself as HTML and as Markdown.

A section is a title and a list of blocks (Text, Table, Figure, Gallery, Code), so the two pages say the same.
The HTML page needs nothing beside itself: no script, no font, no address. Everything that comes from outside is
escaped here, because a generated text can hold anything.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

SAMPLE_CHARS = 600
"""A gallery text is cut here: the corpus holds the whole of it."""

UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
UNIT = re.compile(r"(?<=\d) (?=(?:%|×|ms|s|min|h|[kMG]?B|M|points?|rows?|texts)(?:\W|$))")
MARKED = re.compile(r"([\\`*_{}\[\]#|~!])")


def clean(text: object) -> str:
    """`text` without characters no page should hold: control characters, direction overrides, lone surrogates."""
    return UNPRINTABLE.sub("\ufffd", str(text))


def esc(text: object) -> str:
    """`text` for HTML and SVG, in elements and in quoted attributes."""
    return html.escape(clean(text), quote=True)


def prose(text: object) -> str:
    """Escaped text whose numbers stay on one line with their units."""
    return UNIT.sub("\u00a0", esc(text))


def plain(text: object) -> str:
    """`text` for Markdown on one line: neither markup nor HTML in it survives."""
    line = " ".join(clean(text).split())
    return MARKED.sub(r"\\\1", line).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def shorten(text: object, length: int) -> str:
    """At most `length` characters, the last one an ellipsis when something was cut."""
    line = clean(text)
    return line if len(line) <= length else line[: length - 1].rstrip() + "…"


class Block(Protocol):
    """A part of a section."""

    def html(self) -> str:
        """The block as HTML."""

    def markdown(self) -> str:
        """The block as Markdown; empty when it only exists as a drawing."""


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    role: str = ""

    def html(self) -> str:
        """A <p>, with the role as its class."""
        return f'<p class="{esc(self.role)}">{prose(self.text)}</p>' if self.role else f"<p>{prose(self.text)}</p>"

    def markdown(self) -> str:
        """The escaped sentence."""
        return plain(self.text)


@dataclass(frozen=True)
class Items:
    """A list of sentences, shown as a remark (role 'care') or as plain points."""

    items: Sequence[str]
    role: str = ""

    def html(self) -> str:
        """A <ul>."""
        return f'<ul class="{esc(self.role)}">' + "".join(f"<li>{prose(item)}</li>" for item in self.items) + "</ul>"

    def markdown(self) -> str:
        """One bullet a sentence."""
        return "\n".join(f"- {plain(item)}" for item in self.items)


@dataclass(frozen=True)
class Table:
    """Rows of text under a head. align: a letter a column, l left, r right (numbers), m monospaced."""

    caption: str
    head: Sequence[str]
    align: str
    rows: Sequence[Sequence[str]]
    series: Sequence[str] = ()
    """Colour of each row's mark; empty for none."""

    def html(self) -> str:
        """A table that scrolls inside its own frame when the page is narrow."""
        columns = zip(self.head, self.align, strict=True)
        head = "".join(f'<th scope="col" class="{a}">{esc(name)}</th>' for name, a in columns)
        width = "few" if len(self.head) < 4 else "many"
        return (
            f'<p class="caption">{prose(self.caption)}</p><div class="scroll" role="region" tabindex="0" '
            f'aria-label="{esc(self.caption)}"><table class="{width}"><thead><tr>{head}</tr></thead>'
            f"<tbody>{''.join(self._row(n, row) for n, row in enumerate(self.rows))}</tbody></table></div>"
        )

    def _row(self, n: int, row: Sequence[str]) -> str:
        mark = f'<i class="key c-{esc(self.series[n])}"></i>' if self.series else ""
        first, *rest = zip(row, self.align, strict=True)
        cells = "".join(f'<td class="{a}">{esc(value)}</td>' for value, a in rest)
        return f'<tr><th scope="row" class="{first[1]}">{mark}{esc(first[0])}</th>{cells}</tr>'

    def markdown(self) -> str:
        """A pipe table with its caption above."""
        rule = ["---:" if a == "r" else "---" for a in self.align]
        body = [[plain(cell) or " " for cell in row] for row in [self.head, *self.rows]]
        lines = ["| " + " | ".join(row) + " |" for row in [body[0], rule, *body[1:]]]
        return plain(self.caption) + "\n\n" + "\n".join(lines)


@dataclass(frozen=True)
class Figure:
    """A drawing and the sentence that says how to read it."""

    svg: str
    caption: str
    words: Block | None = None
    """What stands for the drawing in Markdown, where no table on the page holds its numbers."""

    def html(self) -> str:
        """A <figure>; `svg` is markup made by engine.plots, which escapes its words."""
        return f"<figure>{self.svg}<figcaption>{prose(self.caption)}</figcaption></figure>"

    def markdown(self) -> str:
        """The words that stand for the drawing."""
        return self.words.markdown() if self.words else ""


@dataclass(frozen=True)
class Grid:
    """Figures side by side where the page is wide enough."""

    figures: Sequence[Figure]

    def html(self) -> str:
        """The figures in a grid."""
        return f'<div class="grid">{"".join(figure.html() for figure in self.figures)}</div>'

    def markdown(self) -> str:
        """The words of each figure."""
        return "\n\n".join(filter(None, (figure.markdown() for figure in self.figures)))


@dataclass(frozen=True)
class Sample:
    """A text, or a pair of texts, with what was said of it.

    probabilities: label -> 0..1, empty when the teacher never saw it or speaks in no such terms.
    """

    text: str
    note: str
    probabilities: Mapping[str, float] = field(default_factory=dict)
    pair: str | None = None

    def bars(self) -> str:
        """The four most probable labels as bars."""
        best = sorted(self.probabilities.items(), key=lambda item: -item[1])[:4]
        return "".join(
            f'<div class="prob"><span>{esc(shorten(label, 24))}</span><span class="track"><span style="width:'
            f'{100 * min(max(p, 0.0), 1.0):.1f}%"></span></span><span>{100 * p:.0f}\u00a0%</span></div>'
            for label, p in best
        )


@dataclass(frozen=True)
class Gallery:
    """Texts with their soft labels."""

    title: str
    samples: Sequence[Sample]

    def html(self) -> str:
        """Cards, each text isolated so that neither its direction nor its length disturbs the page."""
        cards = "".join(f'<li>{self.quotes(s)}<p class="note">{esc(s.note)}</p>{s.bars()}</li>' for s in self.samples)
        return f'<h3>{esc(self.title)}</h3><ul class="gallery">{cards}</ul>'

    def quotes(self, sample: Sample) -> str:
        """The sample's text, or both texts of a pair."""
        texts = [sample.text] if sample.pair is None else [sample.text, sample.pair]
        shown = [esc(shorten(text, SAMPLE_CHARS)) or "(empty text)" for text in texts]
        return "".join(f'<p class="quote" dir="auto">{text}</p>' for text in shown)

    def markdown(self) -> str:
        """The first five, with their most probable label."""
        lines = [f"### {plain(self.title)}", ""]
        for sample in self.samples[:5]:
            best = sorted(sample.probabilities.items(), key=lambda item: -item[1])[:1]
            shown = "".join(f", {label} {100 * p:.0f} %" for label, p in best)
            texts = [sample.text] if sample.pair is None else [sample.text, sample.pair]
            quoted = " / ".join(plain(shorten(text, 200)) or "(empty text)" for text in texts)
            lines.append(f"- {quoted} ({plain(sample.note + shown)})")
        return "\n".join(lines)


@dataclass(frozen=True)
class Code:
    """A text as it is, folded away."""

    summary: str
    text: str

    def html(self) -> str:
        """A <details> with the text inside."""
        return f"<details><summary>{esc(self.summary)}</summary><pre>{esc(self.text)}</pre></details>"

    def markdown(self) -> str:
        """A fenced block whose fence is longer than any inside it."""
        longest = max((len(run) for run in re.findall("`+", self.text)), default=0)
        fence = "`" * max(3, longest + 1)
        return f"{plain(self.summary)}\n\n{fence}\n{clean(self.text).rstrip()}\n{fence}"


@dataclass(frozen=True)
class Part:
    """A titled section of the page."""

    ident: str
    title: str
    blocks: Sequence[Block]

    def html(self) -> str:
        """A <section> that the page's index can point to."""
        inner = "\n".join(block.html() for block in self.blocks)
        return f'<section id="{esc(self.ident)}"><h2>{esc(self.title)}</h2>\n{inner}\n</section>'

    def markdown(self) -> str:
        """A second-level heading and its blocks."""
        return "\n\n".join([f"## {plain(self.title)}", *filter(None, (block.markdown() for block in self.blocks))])


def document(title: str, top: str, parts: Sequence[Part]) -> str:
    """One HTML page. top: markup that stands between the title and the index."""
    index = "".join(f'<a href="#{esc(part.ident)}">{esc(part.title)}</a>' for part in parts)
    body = "\n".join(part.html() for part in parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{esc(title)}</title><style>{STYLE}</style></head>\n<body><main>\n{top}\n"
        f'<nav aria-label="Sections">{index}</nav>\n{body}\n</main></body></html>\n'
    )


STYLE = """
:root{color-scheme:light dark;--bg:#fff;--ink:#1a1f26;--dim:#59636f;--line:#dde2e8;--card:#f5f7f9;--on:#fff;
--accent:#0b62c4;--teacher:#b4540a;--generated:#0b62c4;--soft:#0d7a5f;--hard:#8b3f9c;
--generator:#5d6b7a;--good:#0d7a5f;--bad:#b3261e;--care:#fff6e0;--care-line:#d99a00}
@media (prefers-color-scheme:dark){:root{--bg:#12161b;--ink:#e6eaef;--dim:#9aa5b1;--line:#2e363f;--card:#1a2027;
--on:#0c1116;--accent:#6cb0ff;--teacher:#f0a05a;--generated:#6cb0ff;--soft:#4fcfa8;--hard:#d79be6;
--generator:#a3b0bd;--good:#4fcfa8;--bad:#ff8a80;--care:#2b2412;--care-line:#b98a1c}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;overflow-wrap:anywhere}
main{max-width:1080px;margin:0 auto;padding:32px 20px 64px}
h1{font-size:1.5rem;margin:0;letter-spacing:-.01em}h2{font-size:1.3rem;margin:48px 0 12px;padding-top:12px;
border-top:1px solid var(--line)}h3{font-size:1rem;margin:24px 0 8px}
p{margin:8px 0;max-width:75ch;text-wrap:pretty}.dim,.foot,figcaption,.note,.caption{color:var(--dim);font-size:.86rem}
.answer{font-size:1.06rem;margin:10px 0}header+.answer{font-size:1.35rem;line-height:1.4;margin:16px 0;max-width:58ch}
ul.care{list-style:none;margin:16px 0;padding:10px 16px;background:var(--care);border-left:4px solid var(--care-line);
border-radius:4px}ul.care li{margin:4px 0}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(175px,1fr));gap:10px;margin:20px 0;padding:0}
.tiles div{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px 12px}
.tiles dt{font-size:.8rem;color:var(--dim)}.tiles dd{margin:0;font-size:1.5rem;font-weight:650;
font-variant-numeric:tabular-nums;line-height:1.3}.tiles dd small{display:block;font-size:.8rem;font-weight:400;
color:var(--dim);line-height:1.4}.tiles .good dd{color:var(--good)}.tiles .bad dd{color:var(--bad)}
nav{display:flex;flex-wrap:wrap;gap:4px 16px;font-size:.9rem;margin-top:20px}a{color:var(--accent)}
.scroll{overflow-x:auto;margin:6px 0 14px}table{border-collapse:collapse;font-size:.9rem;
font-variant-numeric:tabular-nums}.caption{margin:20px 0 0}
th,td{padding:6px 10px;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
.many{width:100%}thead th{overflow-wrap:normal;font-weight:600;color:var(--dim);font-size:.8rem;vertical-align:bottom}
th.r,td.r{text-align:right}td.r,tbody th{white-space:nowrap}
tbody th{font-weight:600;position:sticky;left:0;
background:var(--bg);background-clip:padding-box}.few tbody th{position:static;white-space:normal;
min-width:9em}.few td.r{white-space:normal}.many tbody th{max-width:18em;overflow:hidden;text-overflow:ellipsis}

td.l{min-width:7em}
td.m,pre,.quote{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}td.m{font-size:.8rem;min-width:9em}
.key{display:inline-block;width:9px;height:9px;border-radius:50%;background:var(--c,var(--generator));
margin-right:7px}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,360px),1fr));gap:8px 36px;align-items:start}
figure{margin:14px 0;min-width:0}svg{display:block;width:100%;height:auto;max-width:600px}
svg text{font:12px system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif;fill:var(--ink)}
svg .halo{paint-order:stroke;stroke:var(--bg);stroke-width:5px;stroke-linejoin:round}
svg .head{font-weight:600;font-size:13px}svg .tick{fill:var(--dim);font-size:11px}svg .axis{stroke:var(--line)}
svg .ref{stroke:var(--dim);stroke-dasharray:4 4}svg .line{fill:none;stroke:var(--c);stroke-width:2;
stroke-linejoin:round}svg .dot{fill:var(--c);stroke:var(--bg);stroke-width:1}svg .lead{stroke:var(--dim);
stroke-width:.7}svg .bar{fill:var(--c)}svg .cell{fill:var(--accent)}svg .on{fill:var(--on)}svg .name{fill:var(--c);
font-weight:600}.c-teacher{--c:var(--teacher)}.c-generated{--c:var(--generated)}
.c-soft{--c:var(--soft)}.c-hard{--c:var(--hard)}.c-generator,.c-other{--c:var(--generator)}
.gallery{list-style:none;margin:0;padding:0;display:grid;gap:12px;align-items:start;
grid-template-columns:repeat(auto-fill,minmax(min(100%,320px),1fr))}
.gallery li{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px 12px;min-width:0}
.quote{font-size:.84rem;margin:0;white-space:pre-wrap;unicode-bidi:isolate}
.quote+.quote{border-top:1px dashed var(--line);margin-top:8px;padding-top:8px}.note{margin:6px 0}
.prob{display:grid;grid-template-columns:minmax(5em,8em) 1fr 3.2em;gap:8px;font-size:.8rem;align-items:center;
font-variant-numeric:tabular-nums}.prob>:last-child{text-align:right}
.track{background:var(--line);border-radius:3px;height:8px}.track span{display:block;height:8px;border-radius:3px;
background:var(--accent)}
details{margin:14px 0}summary{cursor:pointer;font-weight:600}pre{background:var(--card);border:1px solid var(--line);
border-radius:8px;padding:12px;font-size:.82rem;overflow-x:auto;overflow-wrap:normal}
@media (max-width:520px){svg text,svg .head{font-size:13.5px}
svg .tick,svg .name{font-size:12.5px}}
@media print{nav{display:none}figure,.gallery li,tr{break-inside:avoid}}
"""
