"""The numbers of a set as one self-contained page of plots: pictures inside, no script, no remote asset."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from clipkit.data.describing.summary import Summary, lines_of, rows_of, shown
from clipkit.redaction import visible

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:68em;padding:0 1em}"
    "table{border-collapse:collapse}td,th{padding:.2em .9em .2em 0;text-align:right}"
    "td:first-child,th:first-child{text-align:left}td.text{text-align:left}"
    "figure{display:inline-block;margin:.5em;width:30em;max-width:100%}img{width:100%}"
    "figcaption{font-weight:600}"
)
_BARS = 12
_BINS = 40


def page_of(summary: Summary, title: str) -> str:
    """Returns the page as HTML; whatever came with the data is escaped."""
    head, *rows = rows_of(summary)
    context = summary.description.tokens.context
    figures = [
        *(
            _histogram(summary.histogram(name), words, logarithmic, mark)
            for name, words, logarithmic, mark in (
                ("words", "words per caption", False, None),
                ("tokens", f"tokens per caption (line: {context})", False, context),
                ("short side", "shorter side, pixels", True, None),
                ("aspect", "width by height", True, None),
                ("image bytes", "bytes per image", True, None),
            )
        ),
        _bars({script: summary.cut(script)[1] for script in summary.scripts()}, "captions by script"),
        _bars(summary.counts["extensions"], "members by extension"),
        _bars(summary.counts["modes"], "images by colour mode"),
    ]
    frequent = [(text, f"{times:,}") for text, times in summary.frequent]
    parts = [
        f"<h1>{_escaped(title)}</h1>",
        f"<p>{summary.samples:,} samples in {summary.shards:,} shards, {summary.bytes:,} bytes</p>",
        _table(head, rows),
        "<ul>" + "".join(f"<li>{_escaped(line.strip())}</li>" for line in lines_of(summary)) + "</ul>",
        "".join(figures),
        "<h2>most frequent captions</h2>" + _table(("caption", "times"), frequent) if frequent else "",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{_escaped(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _escaped(text: str) -> str:
    return html.escape(visible(text))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{_escaped(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + line(head, "th") + "".join(line(row, "td") for row in rows) + "</table>"


def _histogram(counts: Mapping[float, int], words: str, logarithmic: bool, mark: float | None) -> str:
    import numpy as np

    if not counts:
        return ""
    values, times = np.array(list(counts)), np.array(list(counts.values()))
    low, high = values.min(), values.max()
    if logarithmic and low > 0 and high > low:
        edges = np.geomspace(low, high, _BINS)
    else:
        logarithmic = False
        # Whole numbers: bars of equal, whole width, so that none stands empty between others.
        step = max(1, -(-int(high - low + 1) // _BINS))
        edges = np.arange(low - 0.5, high + step + 0.5, step)

    def draw(axes: Any) -> None:
        axes.hist(values, bins=edges, weights=times, color="#4269d0")
        if logarithmic:
            axes.set_xscale("log")
        if mark is not None:
            axes.axvline(mark + 0.5, color="#d04242")

    return _figure(words, draw)


def _bars(counts: Mapping[str, int], words: str) -> str:
    bars = shown(counts, _BARS)
    if not bars:
        return ""

    def draw(axes: Any) -> None:
        # A dollar sign would start a formula.
        names = [visible(name)[:24].replace("$", r"\$") for name, _ in reversed(bars)]
        axes.barh(range(len(bars)), [times for _, times in reversed(bars)], color="#4269d0")
        axes.set_yticks(range(len(bars)), names)

    return _figure(words, draw)


def _figure(words: str, draw: Any) -> str:
    """Returns a plot as an image inside the page; scripts in an image never run."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # Fixed salt and no date: same numbers, same bytes. Text stays text, in whatever font shows it.
    with matplotlib.rc_context({"svg.hashsalt": "clipkit", "svg.fonttype": "none"}):
        figure = Figure(figsize=(6, 3), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        out = io.BytesIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    picture = base64.b64encode(out.getvalue()).decode()
    caption = _escaped(words)
    return (
        f'<figure><figcaption>{caption}</figcaption><img alt="{caption}" '
        f'src="data:image/svg+xml;base64,{picture}"></figure>'
    )
