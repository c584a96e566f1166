"""How far a sweep is, as a table on the screen, status.json and status.csv."""

import csv
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from experiments.run.folder import write_json, write_whole
from experiments.sweep.records import Records, Standing, plain

STATES = ("done", "running", "queued", "dropped", "failed")


def write_status(records: Records, standings: Sequence[Standing]) -> None:
    """status.json and status.csv."""
    out, axes = records.spec.out, [axis.field for axis in records.spec.axes]
    rows = [_row(records, one) for one in standings]
    write_json(out / "status.json", {"metric": records.spec.metric, "runs": rows})
    text = io.StringIO()
    names = [name for name in rows[0] if name != "settings"]
    writer = csv.writer(text)
    writer.writerow([*names, *axes])
    for row in rows:
        writer.writerow([*(row[name] for name in names), *(row["settings"][a] for a in axes)])
    write_whole(out / "status.csv", lambda file: file.write(text.getvalue().encode()))


def _row(records: Records, one: Standing) -> dict[str, Any]:
    return {
        "run": one.run.number,
        "id": one.run.id,
        "seed": one.run.seed,
        "settings": {name: plain(value) for name, value in one.run.values.items()},
        "state": one.state,
        "generations": one.generations,
        "metric": one.metric,
        "seconds": round(one.seconds, 3),
        "error": one.error,
    }


def print_status(records: Records, standings: Sequence[Standing]) -> None:
    """The table, and a line of how many are where."""
    axes = [axis.field for axis in records.spec.axes]
    head = ["run", "id", *axes, "seed", "state", "generations", records.spec.metric, "seconds"]
    rows = [
        [
            str(one.run.number),
            one.run.id,
            *(shown(one.run.values[name]) for name in axes),
            str(one.run.seed),
            one.state,
            f"{one.generations} of {one.run.config.limit}",
            shown(one.metric),
            f"{one.seconds:.1f}",
        ]
        for one in standings
    ]
    print_table(head, rows)
    print(counted(standings) + ".")
    for one in standings:
        if one.error is not None:
            print(f"Run {one.run.number} ({one.run.id}) failed: {one.error}")


def counted(standings: Sequence[Standing]) -> str:
    """How many runs are in which state."""
    count = Counter(one.state for one in standings)
    return ", ".join(f"{count[state]} {state}" for state in STATES if count[state])


def shown(value: Any) -> str:
    """A setting or a metric in a table.

    Example:
        >>> shown(0.0012345678), shown(None), shown("adam"), shown(-1234.5678)
        ('0.001235', '', 'adam', '-1235')
    """
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Columns on the screen; as wide as they are where nobody looks."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in head:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console()
    Console(width=None if console.is_terminal else 400, highlight=False).print(table)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The same as a table in Markdown.

    Example:
        >>> print(markdown(["a", "b"], [["1", "2"]]))
        | a | b |
        |---|---|
        | 1 | 2 |
    """
    lines = [list(head), *map(list, rows)]
    text = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    return "\n".join([text[0], "|" + "---|" * len(head), *text[1:]])
