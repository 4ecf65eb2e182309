"""Manual pages in mdoc(7): from words, tables and a little Markdown."""

import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

LINE_MAX = 76
"""Columns of a line of text."""

_SENTENCE = re.compile(r"(?<=[A-Za-z0-9)`»*][.?!]) +(?=[A-Z`*«])")
"""Where a new line begins: an editor of manuals wants one for each sentence."""


def text(words: str) -> str:
    """*words* as lines of text; each sentence begins a new one."""
    sentences = _SENTENCE.split(" ".join(words.split()))
    return "".join(
        f"{_guarded(line)}\n"
        for sentence in sentences
        for line in textwrap.wrap(
            _inline(sentence), LINE_MAX, break_long_words=False, break_on_hyphens=False
        )
    )


def paragraphs(*bodies: str) -> str:
    """Each of *bodies*, which are mdoc, as a paragraph."""
    return ".Pp\n".join(bodies)


def section(title: str, body: str) -> str:
    """*body* under a heading."""
    return f".Sh {title.upper()}\n{body}"


def rows(items: Iterable[tuple[str, str]]) -> str:
    """A list of terms, and below each what it means; both are mdoc."""
    body = "".join(f".It {term}\n{meaning}" for term, meaning in items)
    return f".Bl -tag -width Ds\n{body}.El\n"


def literal(term: str) -> str:
    """*term*, which is typed as it stands, for a line that begins with a macro."""
    return f"Li {argument(term)}"


def argument(words: str) -> str:
    """*words* as one argument of a macro."""
    return '"' + _escaped(words).replace('"', '""') + '"'


def command(line: str) -> str:
    """A command line to be copied."""
    return f".Dl {argument(line)}\n"


def listing(lines: Sequence[str]) -> str:
    """Lines that stay as they are."""
    body = "".join(f"{_guarded(_escaped(line))}\n" for line in lines)
    return f".Bd -literal -offset indent\n{body}.Ed\n"


def references(pages: Mapping[str, int]) -> str:
    """The names and sections of other *pages*."""
    ordered = sorted(pages.items(), key=lambda page: (page[1], page[0]))
    lines = [f".Xr {name} {number}" for name, number in ordered]
    return " ,\n".join(lines) + "\n"


def from_markdown(source: str) -> str:
    """The sections of a Markdown text: headings, paragraphs, lists, listings, and tables.

    A table becomes a list: of the first column, with the second below it, and then any further one
    with its heading.
    """
    return "".join(_blocks(source.split("\n")))


def _blocks(lines: Sequence[str]) -> Iterator[str]:
    block: list[str] = []
    listed = False
    begun = True  # a section has begun, and needs no break before its first paragraph
    for line in [*lines, ""]:
        if line.startswith("```"):
            if listed:
                yield listing(block)
                block, begun = [], True
            listed = not listed
        elif listed or line.startswith("|"):
            block.append(line)
        elif line.startswith("#"):
            yield f".Sh {_escaped(line.lstrip('# ').upper())}\n"
            begun = True
        elif line:
            block.append(line)
        elif block:
            made = _LISTS.get(block[0][0])
            if not begun and made is None:
                yield ".Pp\n"
            yield text(" ".join(block)) if made is None else made(block)
            block, begun = [], False


def _table(lines: Sequence[str]) -> str:
    (_, _, *headings), _, *others = map(_cells, lines)
    entries = []
    for seen, means, *further in others:
        told = [f"{means[:1].upper()}{means[1:]}."] if means else []
        named = zip(headings, further, strict=True)
        told += [f"{name[:1].upper()}{name[1:]}: {cell}." for name, cell in named]
        term = _inline(seen).replace('"', '""')  # as one argument: a word may be a macro's name
        entries.append((f'"{term}"', paragraphs(*map(text, told))))
    return rows(entries)


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def _bullets(lines: Sequence[str]) -> str:
    items: list[str] = []
    for line in lines:
        if line.startswith("- "):
            items.append(line.removeprefix("- "))
        else:
            items[-1] += f" {line}"
    body = "".join(f".It\n{text(item)}" for item in items)
    return f".Bl -bullet\n{body}.El\n"


_LISTS: Mapping[str, Callable[[Sequence[str]], str]] = {"|": _table, "-": _bullets}
"""Blocks that are no paragraphs, by how their first line begins."""


def _inline(words: str) -> str:
    """*words* with what Markdown marks as code in bold, and no other marks."""
    pieces = re.split(r"`([^`]+)`", words)
    return "".join(
        f"\\fB{_escaped(piece)}\\fP" if number % 2 else _escaped(piece.replace("**", ""))
        for number, piece in enumerate(pieces)
    )


def _escaped(words: str) -> str:
    return words.replace("\\", "\\e").replace("-", "\\-")


def _guarded(line: str) -> str:
    """*line*, which is text, and no request to the formatter."""
    return f"\\&{line}" if line.startswith((".", "'")) else line
