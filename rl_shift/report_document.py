"""A document of a few kinds of blocks, written as Markdown and as one self-contained HTML page.

Texts may hold **strong** and `code`; everything else is plain and escaped.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rl_shift.plotting import DPI


@dataclass(frozen=True)
class Heading:
    """A title; level 1 is the document's."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """A few sentences; `small` for what is read second."""

    text: str
    small: bool = False


@dataclass(frozen=True)
class Listing:
    """A list that must not be overlooked."""

    title: str
    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    """Rows of texts.

    Attributes:
        caption: what the numbers are, and of which data.
        head: names of the columns.
        rows: of as many texts.
        words: how many leading columns hold words; the others hold numbers.
        folded: shown on request only, where that is possible.
        told: shown on the terminal as well.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1
    folded: bool = False
    told: bool = False


@dataclass(frozen=True)
class Picture:
    """A PNG file beside the document."""

    path: Path
    text: str


Block = Heading | Paragraph | Listing | Table | Picture

STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #f4f5f7; color: #1d2330;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 2.5rem 2.5rem 4rem; background: #fff;
  box-shadow: 0 0 24px rgb(20 30 60 / 8%); }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .6rem; }
h2 { font-size: 1.35rem; margin: 2.8rem 0 .6rem; padding-top: 1.2rem;
  border-top: 1px solid #e3e6ec; }
h3 { font-size: 1.08rem; margin: 2rem 0 .4rem; }
p { max-width: 48rem; margin: .5rem 0 1rem; }
.small { color: #5b6475; font-size: .88rem; }
.wide { overflow-x: auto; margin: .3rem 0 1.6rem; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .34rem .65rem; text-align: right; white-space: nowrap; }
th { font-weight: 600; vertical-align: bottom; white-space: normal; }
thead th { border-bottom: 2px solid #c9cfda; color: #414a5c; }
tbody tr + tr > * { border-top: 1px solid #eceef2; }
tbody tr:hover { background: #f6f8fc; }
.word { text-align: left; }
td strong { color: #0b5cad; }
code { font: .86em ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  background: #eef0f4; border-radius: 3px; padding: .1em .3em; }
img { max-width: 100%; height: auto; display: block; }
figure { margin: 1.2rem 0 1.8rem; }
figcaption { color: #5b6475; font-size: .88rem; max-width: 56rem; }
aside { background: #fff7e3; border-left: 4px solid #e0a100; padding: .8rem 1.2rem;
  margin: 1.4rem 0; border-radius: 0 4px 4px 0; }
aside b { display: block; }
aside ul { margin: .3rem 0 0; padding-left: 1.2rem; }
summary { cursor: pointer; color: #0b5cad; font-size: .92rem; }
@media (max-width: 50rem) { main { padding: 1.4rem 1rem 3rem; } }
@media print { body, main { background: #fff; box-shadow: none; }
  tr, figure { break-inside: avoid; } }
"""


# ---- Markdown ----------------------------------------------------------------------------------


def markdown(blocks: Sequence[Block]) -> str:
    """The document as Markdown with tables; pictures are linked."""
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {_plain(text)}"
        case Paragraph(text):
            return _plain(text)
        case Listing(title, items):
            return "\n".join([f"**{_plain(title)}**", "", *(f"- {_plain(item)}" for item in items)])
        case Picture(path, text):
            return f"![{_plain(text)}]({path.name})"
        case Table():
            return _markdown_table(block)


def _markdown_table(table: Table) -> str:
    aligned = [":---" if k < table.words else "---:" for k in range(len(table.head))]
    rows = [table.head, aligned, *table.rows]
    lines = ["| " + " | ".join(_cell(text) for text in row) + " |" for row in rows]
    return "\n".join([_plain(table.caption), "", *lines])


def _cell(text: str) -> str:
    return _plain(text).replace("|", "\\|")


def _plain(text: str) -> str:
    """Markdown may hold HTML, names of runs and datasets must not."""
    return " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")


# ---- HTML --------------------------------------------------------------------------------------


def page(blocks: Sequence[Block]) -> str:
    """The document as one HTML page that needs no other file."""
    title = next((block.text for block in blocks if isinstance(block, Heading)), "Report")
    body = "\n".join(_html(block) for block in blocks)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _html(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{_inline(text)}</h{level}>"
        case Paragraph(text, small):
            return f'<p class="small">{_inline(text)}</p>' if small else f"<p>{_inline(text)}</p>"
        case Listing(title, items):
            listed = "".join(f"<li>{_inline(item)}</li>" for item in items)
            return f"<aside><b>{_inline(title)}</b><ul>{listed}</ul></aside>"
        case Picture(path, text):
            content = path.read_bytes()
            width = int.from_bytes(content[16:20]) * 96 // DPI  # the header of a PNG
            data = base64.b64encode(content).decode("ascii")
            said = html.escape(text)
            return (
                f'<figure><img width="{width}" alt="{said}" src="data:image/png;base64,{data}">'
                f"<figcaption>{_inline(text)}</figcaption></figure>"
            )
        case Table():
            return _html_table(block)


def _html_table(table: Table) -> str:
    def row(texts: Sequence[str], tag: str) -> str:
        cells = []
        for k, text in enumerate(texts):
            kind = ' class="word"' if k < table.words else ""
            scope = ' scope="col"' if tag == "th" else ""
            cells.append(f"<{tag}{kind}{scope}>{_inline(text)}</{tag}>")
        return f"<tr>{''.join(cells)}</tr>"

    body = "\n".join(row(texts, "td") for texts in table.rows)
    head = f"<thead>{row(table.head, 'th')}</thead>"
    text = f'<div class="wide"><table>\n{head}\n<tbody>\n{body}\n</tbody>\n</table></div>'
    caption = _inline(table.caption)
    if table.folded:
        return f"<details><summary>{caption}</summary>{text}</details>"
    return f"<figure><figcaption>{caption}</figcaption>{text}</figure>"


def _inline(text: str) -> str:
    """Escaped text with its strong and code parts."""
    text = html.escape(" ".join(text.split()), quote=False)
    text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)
    return re.sub(r"`(.+?)`", r"<code>\1</code>", text)
