"""The HTML page of `eggroll report`: one file that asks for nothing from elsewhere."""

import base64
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.run.errors import UsageError
from experiments.run.samples import read_samples

# An episode.gif that is larger is named instead of embedded.
LARGEST_GIF = 8 * 2**20
# So many points of a curve can be pointed at; of more, some are left out.
MOST_POINTS = 1000


class Point(NamedTuple):
    """A point of a curve.

    Attributes:
        across: where it is in the picture, from its left edge, as a share of its width.
        down: from its upper edge, as a share of its height.
        x: its place on the axis.
        y: its value.
        span: the edges of the band there; None for none.
    """

    across: float
    down: float
    x: float
    y: float
    span: tuple[float, float] | None = None


class Series(NamedTuple):
    """A curve that can be pointed at."""

    label: str
    color: str
    points: Sequence[Point]


class Details(NamedTuple):
    """What is told of a run besides its curve."""

    path: Path
    sentence: str
    settings: Mapping[str, object]


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
img, svg { max-width: 100%; height: auto; }
table { border-collapse: collapse; margin: .5rem 0; display: block; overflow-x: auto; }
td, th { padding: .2rem .8rem .2rem 0; text-align: left; border-bottom: 1px solid #ddd; }
pre { overflow-x: auto; background: #f6f6f6; padding: .5rem; }
#picture { position: relative; }
#picture svg { display: block; width: 100%; }
.dot { position: absolute; width: 9px; height: 9px; margin: -5px 0 0 -5px; border-radius: 50%;
       border: 1px solid #fff; pointer-events: none; }
#told { position: absolute; pointer-events: none; background: #fffffff0; border: 1px solid #bbb;
        border-radius: 4px; padding: .3rem .6rem; font-size: 13px; white-space: nowrap; }
"""

# The nearest point of every curve that reaches to where the mouse is.
SCRIPT = """
const data = JSON.parse(document.getElementById("points").textContent);
const box = document.getElementById("picture"), told = document.getElementById("told");
const show = v => Math.abs(v) >= 1e4 ? Math.round(v).toLocaleString("en") : String(Number(v.toPrecision(5)));
function clear() { box.querySelectorAll(".dot").forEach(d => d.remove()); told.hidden = true; }
function point(event) {
  const frame = box.getBoundingClientRect(), at = (event.clientX - frame.left) / frame.width;
  clear();
  const lines = [];
  for (const one of data.series) {
    const p = one.points;
    if (!p.length || at < p[0][0] - .02 || at > p[p.length - 1][0] + .02) continue;
    const near = p.reduce((a, b) => Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a);
    const dot = document.createElement("div");
    dot.className = "dot";
    dot.style.cssText = `left:${100 * near[0]}%;top:${100 * near[1]}%;background:${one.color}`;
    box.append(dot);
    const band = near[4] === null ? "" : ` (${show(near[4])} to ${show(near[5])})`;
    lines.push([one.color, `${one.label}: ${show(near[3])}${band} at ${show(near[2])} ${data.x}`]);
  }
  if (!lines.length) return;
  told.replaceChildren(...lines.map(([color, text]) => {
    const line = document.createElement("div");
    line.textContent = text;
    line.style.borderLeft = `4px solid ${color}`;
    line.style.paddingLeft = ".4rem";
    return line;
  }));
  told.hidden = false;
  const left = at < .5 ? event.clientX - frame.left + 14 : event.clientX - frame.left - told.offsetWidth - 14;
  told.style.left = `${Math.max(0, left)}px`;
  told.style.top = `${Math.max(0, event.clientY - frame.top + 14)}px`;
}
box.addEventListener("pointermove", point);
box.addEventListener("pointerleave", clear);
"""


def as_html(
    alt: str,
    x: str,
    svg: str,
    series: Sequence[Series],
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    details: Sequence[Details],
) -> str:
    """The page.

    Args:
        alt: what the picture shows.
        x: what it is drawn over.
        svg: the picture.
        series: its curves.
        head: of the table.
        rows: of the table.
        details: of each run.
    """
    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Runs compared</title>',
        '<meta name="viewport" content="width=device-width">',
        f"<style>{STYLE}</style></head><body>\n<h1>Runs compared</h1>",
        f'<div id="picture" role="img" aria-label="{html.escape(alt)}">{inline(svg)}',
        '<div id="told" hidden></div></div>',
        table(rows, head),
    ]
    for one in details:
        parts += [
            f"<details><summary>{html.escape(str(one.path))}</summary>",
            f"<p>{html.escape(one.sentence)}</p>{episode(one.path)}{samples(one.path)}",
            f"{table(one.settings.items())}</details>",
        ]
    parts += [
        f'<script id="points" type="application/json">{hover(x, series)}</script>',
        f"<script>{SCRIPT}</script>",
    ]
    return "\n".join([*parts, "</body></html>\n"])


def inline(svg: str) -> str:
    """An SVG file as a part of a page: without its head, which names addresses on the network."""
    return svg[svg.index("<svg") :] if "<svg" in svg else svg


def hover(x: str, series: Sequence[Series]) -> str:
    """What the page knows of the points: JSON that no text can end early.

    Example:
        >>> hover("</script>", [Series("a", "#000", [Point(0.5, 0.25, 3.0, 1.5)])])[:24]
        '{"x": "\\\\u003c/script>", '
    """
    told = []
    for one in series:
        step = -(-len(one.points) // MOST_POINTS) or 1
        # The last is always among them.
        kept = list(one.points[::-step])[::-1]
        points = [
            [round(p.across, 5), round(p.down, 5), p.x, p.y, *(p.span or (None, None))]
            for p in kept
        ]
        told.append({"label": one.label, "color": one.color, "points": points})
    return json.dumps({"x": x, "series": told}, allow_nan=False).replace("<", "\\u003c")


def table(rows: Iterable[Sequence[object]], head: Sequence[str] = ()) -> str:
    """An HTML table; whatever is in a cell is text."""

    def line(cells: Sequence[object], kind: str) -> str:
        return "".join(f"<{kind}>{html.escape(str(cell))}</{kind}>" for cell in cells)

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    top = f"<tr>{line(head, 'th')}</tr>" if head else ""
    return f"<table>{top}{body}</table>"


def episode(folder: Path) -> str:
    """The film of an episode that a run folder has, if it has one.

    Raises:
        UsageError: for a file that is no GIF.
    """
    path = folder / "episode.gif"
    if not path.is_file():
        return ""
    if path.stat().st_size > LARGEST_GIF:
        return f"<p>An episode: {html.escape(str(path))} (too large to be shown here).</p>"
    data = path.read_bytes()
    if data[:6] not in (b"GIF87a", b"GIF89a"):
        raise UsageError(f"{path} is not a GIF: remove it, or make it anew")
    return f'<p><img alt="an episode" src="data:image/gif;base64,{base64.b64encode(data).decode()}"></p>'


def samples(folder: Path) -> str:
    """What the model of a run wrote first and last, if the folder has it."""
    found = read_samples(folder / "samples.txt")
    parts = []
    for one in dict.fromkeys((found[0], found[-1]) if found else ()):
        text = html.escape("\n".join(one.lines))
        parts.append(f"<p>Written after {one.generation} updates:</p><pre>{text}</pre>")
    return "".join(parts)
