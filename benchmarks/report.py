"""Stored results as one page: python benchmarks/report.py [RESULTS] [-o FOLDER]

Reads every JSON file of benchmarks/results (or another folder) and writes report.md and report.html: what was measured,
on which machine, with which versions and command; the newest day first, and within a day `bitnet compare`, `sweep` and
`bench` first. Results of these verbs get their own tables and pictures, drawn here from the JSON:

    NAME.json of bench      NAME-roofline.svg, NAME-comparison.svg
    NAME.json of compare    NAME.svg
    NAME.json of sweep      NAME-points.svg; NAME-curves.svg where it has curves; NAME-scaling.svg for several sizes

Any other file gets tables of its figures. Pictures in the folder of the results that are named after a file and not
drawn here (NAME*.svg or NAME*.png) are copied.
"""

import argparse
import html
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitnet.benchmarks.bench import plot, table
from bitnet.benchmarks.compare import plot as compare_plot
from bitnet.benchmarks.compare import table as compare_table
from bitnet.benchmarks.sweep import plot as sweep_plot
from bitnet.benchmarks.sweep.summary import summarize_again
from bitnet.benchmarks.sweep.table import sweep_cells, tuned_gaps
from bitnet.errors import BitNetError
from bitnet.plotting import save

RESULTS = Path(__file__).with_name("results")
_LONG = 60  # characters of a cell; longer values are cut here and complete in the file
_WIDE = 12  # columns; a wider table of a single row is turned by 90 degrees
_FIRST = ("compare", "sweep", "bench")  # the order within a day


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Contents:
    headings: list[str]


@dataclass(frozen=True)
class Line:
    """A paragraph; `code`: a command."""

    text: str
    code: bool = False


@dataclass(frozen=True)
class Grid:
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


@dataclass(frozen=True)
class Picture:
    path: Path
    text: str


Block = Contents | Heading | Line | Grid | Picture


def read(folder: Path) -> dict[Path, dict[str, Any]]:
    """All results of a folder in the page's order. Raises BitNetError where there is none, and for invalid JSON."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            found[path] = table.stored(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise BitNetError(
                f"report: {path.name}: got no JSON ({error}), expected a result; remove or repair it"
            ) from None
    if not found:
        raise BitNetError(f"report: got no JSON file in '{folder}', expected results; see benchmarks/")
    ranks = {path: _FIRST.index(kind) if (kind := found[path].get("benchmark")) in _FIRST else 9 for path in found}
    days = sorted({path.name[:10] for path in found}, reverse=True)
    return {
        path: found[path] for path in sorted(found, key=lambda path: (days.index(path.name[:10]), ranks[path], path))
    }


def blocks(path: Path, document: dict[str, Any], out: Path) -> Iterator[Block]:
    """One result: its heading, tables and pictures. The pictures are written to `out`."""
    yield Heading(path.stem)
    if command := document.get("command"):
        yield Line(" ".join(command) if isinstance(command, list) else str(command), code=True)
    match document.get("benchmark"):
        case "bench":
            yield from _bench(path, document, out)
        case "compare":
            yield from _compare(path, document, out)
        case "sweep":
            yield from _sweep(path, document, out)
        case _:
            if machine := document.get("machine"):
                yield Line(machine if isinstance(machine, str) else table.machine_line(machine))
            yield from _figures(document)
    for picture in _stored_pictures(path, document):
        if picture.resolve() != (out / picture.name).resolve():
            shutil.copyfile(picture, out / picture.name)
        yield Picture(Path(picture.name), picture.stem)


def _stored_pictures(path: Path, document: dict[str, Any]) -> list[Path]:
    """Pictures named after a document and after no other; SVG where both formats exist; none that is drawn here."""
    if document.get("benchmark") in _FIRST:
        return []
    others = [other.stem for other in path.parent.glob(f"{path.stem}*.json") if other != path]
    found = {
        picture.stem: picture
        for suffix in (".png", ".svg")
        for picture in sorted(path.parent.glob(f"{path.stem}*{suffix}"))
        if not any(picture.stem.startswith(other) for other in others)
    }
    return [found[stem] for stem in sorted(found)]


def _bench(path: Path, document: dict[str, Any], out: Path) -> Iterator[Block]:
    header, rows = table.cells(document["results"])
    yield Grid(tuple(header), [tuple(row) for row in rows])
    yield from (Line(note) for note in table.notes(document))
    for picture in plot.draw(document, out / f"{path.stem}.svg"):
        yield Picture(Path(picture.name), picture.stem)


def _drawn(figure: Any, name: str, out: Path) -> Picture:
    """Write a figure as NAME.svg into `out`."""
    (path,) = save(figure, out / f"{name}.svg")
    return Picture(Path(path.name), name)


def _compare(path: Path, stored: dict[str, Any], out: Path) -> Iterator[Block]:
    document = compare_table.with_current_keys(stored)
    yield from (Line(line) for line in compare_table.head(document))
    measured = [row for row in document["results"] if row["status"] == "ok"]
    yield Grid(compare_table.COLUMNS, [compare_table.cells(row) for row in measured])
    if rest := [row for row in document["results"] if row["status"] != "ok"]:
        yield Line("not measured")
        yield Grid(("method", "why"), [(row["title"], row["note"]) for row in rest])
    if measured:
        yield _drawn(compare_plot.comparison(document), path.stem, out)


def _sweep(path: Path, document: dict[str, Any], out: Path) -> Iterator[Block]:
    comments = [line.removeprefix("#").strip() for line in document["spec"].splitlines() if line.startswith("#")]
    yield from (Line(comment, code=comment.startswith("bitnet ")) for comment in comments)
    report = summarize_again(document)
    yield Grid(*sweep_cells(report))
    yield from (Line(line) for line in tuned_gaps(report))
    yield Line(f"± is the standard error over seeds. {table.machine_line(document['machine'])}")
    for name, figure in sweep_plot.figures(report).items():
        yield _drawn(figure, f"{path.stem}-{name}", out)


def _figures(document: dict[str, Any], title: str = "") -> Iterator[Block]:
    """Any document: a table of its single values, and one of each list or dictionary of dictionaries."""
    single: list[tuple[str, ...]] = []
    for key, value in document.items():
        if not title and key in ("machine", "command", "benchmark"):
            continue
        name = f"{title}, {key}".removeprefix(", ").replace("_", " ")
        if _deep(value):
            yield from _figures(value, name)
        elif rows := _rows(value):
            keys = list(dict.fromkeys(name for row in rows for name in row))
            yield Line(name)
            if len(rows) == 1 and len(keys) > _WIDE:
                yield Grid((name, ""), [(key.replace("_", " "), _cell(rows[0][key])) for key in keys])
                continue
            yield Grid(
                tuple(name.replace("_", " ") for name in keys),
                [tuple(_cell(row.get(name)) for name in keys) for row in rows],
            )
        else:
            single.append((key.replace("_", " "), _cell(value)))
    if single:
        if title:
            yield Line(title)
        yield Grid(("figure", "value"), single)


def _is_spread(value: Any) -> bool:
    return isinstance(value, dict) and set(value) == {"median", "low", "high"}


def _depth(value: Any) -> int:
    """How deep dictionaries are nested; a median with its quartiles is one value."""
    if not isinstance(value, dict) or _is_spread(value):
        return 0
    return 1 + max((_depth(one) for one in value.values()), default=0)


def _deep(value: Any) -> bool:
    """Whether a value needs more than one table."""
    depth = _depth(value)
    named = depth and all(_depth(one) for one in value.values())  # a row for each
    return depth > (3 if named else 1)


def _rows(value: Any) -> list[dict[str, Any]] | None:
    """A value as rows of a table, nested values flattened; None where it is no table."""
    if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
        return [_flat(one) for one in value]
    if _depth(value) and value and all(_depth(one) for one in value.values()):
        return [{"name": name, **_flat(one)} for name, one in value.items()]
    return [_flat(value)] if _depth(value) and value else None


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix} {key}".strip()
        if isinstance(value, dict) and not _is_spread(value):
            found |= _flat(value, name)
        else:
            found[name] = value
    return found


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if _is_spread(value):
        return f"{_cell(value['median'])} ({_cell(value['low'])} to {_cell(value['high'])})"
    if isinstance(value, list):
        value = ", ".join(_cell(one) for one in value)
    text = str(value)
    return text if len(text) <= _LONG else text[: _LONG - 1] + "…"


def as_markdown(page: list[Block]) -> str:
    """The page as Markdown."""
    return "\n\n".join(_markdown(block) for block in page) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Contents(headings):
            return "\n".join(f"- [{text}](#{text})" for text in headings)
        case Heading(text):
            return f"## {text}"
        case Line(text, code):
            return f"    {text}" if code else text
        case Picture(path, text):
            return f"![{text}]({path})"
        case Grid(header, rows):
            safe = [tuple(cell.replace("|", "\\|") for cell in row) for row in rows]
            return table.markdown(header, safe, _words(rows))


def _words(rows: list[tuple[str, ...]]) -> set[int]:
    """Columns that hold words: at least one cell neither begins with a digit nor is empty."""
    return {
        i
        for i, column in enumerate(zip(*rows))
        if not all(not cell or cell.lstrip("-+±")[:1].isdigit() for cell in column)
    }


_STYLE = """body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem }
table { border-collapse: collapse; font-size: 13px; margin: 1rem 0; display: block; overflow-x: auto }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }
th.w, td.w { text-align: left }
img { max-width: 100%; margin: .5rem 0 } pre { background: #f4f4f4; padding: .5rem; overflow-x: auto }
h2 { margin-top: 3rem; border-top: 2px solid #444; padding-top: .5rem }"""


def as_html(title: str, page: list[Block]) -> str:
    """The page as one HTML file, which refers to its pictures."""
    body = "\n".join(_html(block) for block in page)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width">\n<style>\n{_STYLE}\n</style></head>\n<body>\n'
        f"<h1>{html.escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def _html(block: Block) -> str:
    match block:
        case Contents(headings):
            links = (f'<li><a href="#{html.escape(text)}">{html.escape(text)}</a></li>' for text in headings)
            return "<ul>\n" + "\n".join(links) + "\n</ul>"
        case Heading(text):
            return f'<h2 id="{html.escape(text)}">{html.escape(text)}</h2>'
        case Line(text, code):
            tag = "pre" if code else "p"
            return f"<{tag}>{html.escape(text)}</{tag}>"
        case Picture(path, text):
            return f'<img src="{html.escape(str(path))}" alt="{html.escape(text)}">'
        case Grid(header, rows):
            words = _words(rows)
            lines = [_html_row("th", header, words), *(_html_row("td", row, words) for row in rows)]
            return "<table>\n" + "\n".join(lines) + "\n</table>"


def _html_row(tag: str, cells: tuple[str, ...], words: set[int]) -> str:
    marks = ((' class="w"' if i in words else "", html.escape(cell)) for i, cell in enumerate(cells))
    return "<tr>" + "".join(f"<{tag}{mark}>{cell}</{tag}>" for mark, cell in marks) + "</tr>"


def write(results: Path, out: Path) -> list[Path]:
    """Write report.md, report.html and their pictures into `out`. Returns the paths of both pages."""
    documents = read(results)
    out.mkdir(parents=True, exist_ok=True)
    page: list[Block] = [Contents([path.stem for path in documents])]
    page += [block for path, document in documents.items() for block in blocks(path, document, out)]
    title = f"Measured: {len(documents)} results"
    written = {out / "report.md": f"# {title}\n\n{as_markdown(page)}", out / "report.html": as_html(title, page)}
    for path, text in written.items():
        path.write_text(text, encoding="utf-8")
    return list(written)


def main() -> int:
    """Write the page. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", default=RESULTS)
    parser.add_argument("-o", "--out", type=Path, default=Path("build/report"), help="folder; default: build/report")
    options = parser.parse_args()
    try:
        for path in write(options.results, options.out):
            print(path)
    except (BitNetError, OSError) as error:
        print(f"report: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
