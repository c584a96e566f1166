"""`eggroll doctor`: whether an installation works; `eggroll doctor RUN`: why a run did not learn."""

import importlib
import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.run import diagnosis
from experiments.run.compared import essence
from experiments.run.diagnosis import Finding
from experiments.run.errors import RunError, UsageError
from experiments.run.folder import read_config, read_result, versions
from experiments.run.metrics import Row, read_metrics

# What an installation without extras has, beside JAX.
NEEDED = ("eggroll", "jaxtyping", "numpy", "optax")
# What else the drivers import, by the extra that installs it.
SHARED = ("matplotlib", "orbax.checkpoint", "rich", "safetensors", "tyro")
EXTRAS = {
    "rl": ("flax", "gymnasium", "gymnax", *SHARED),
    "supervised": ("flax", "sklearn", *SHARED),
    "reasoning": ("tokenizers", "jinja2", *SHARED),
}


def doctor() -> int:
    """Print a report of the installation; the exit code is 0 if everything that is installed works."""
    import jax
    import jax.numpy as jnp

    found = versions()
    print(f"Python {found['python']} on {found['platform']}, {found['cpus']} CPUs")
    for name, version in found["packages"].items():
        print(f"  {name:17} {version or 'not installed'}")
    print(f"JAX devices: {', '.join(found['devices'])} (backend {jax.default_backend()})")

    for extra, names in EXTRAS.items():
        missing = [name for name in names if not is_there(name)]
        if missing:
            print(f"eggroll {extra} needs {', '.join(missing)}: pip install 'eggroll-jax[{extra}]'")
    optional = sorted({name for names in EXTRAS.values() for name in names if is_there(name)})
    broken = [problem for problem in map(import_problem, (*NEEDED, *optional)) if problem]
    for problem in broken:
        print(f"problem: {problem}")

    before = time.perf_counter()
    total = int(jax.jit(lambda x: (x @ x).sum())(jnp.ones((64, 64))))
    print(f"compiled and ran a small program in {time.perf_counter() - before:.2f} s")
    if total != 64**3:
        broken.append("wrong sum")
        print(f"problem: it gave {total}, and {64**3} is right")
    print("Everything works." if not broken else f"{len(broken)} of the checks failed.")
    return 1 if broken else 0


def is_there(name: str) -> bool:
    """Whether a package is installed, be it broken or not."""
    return importlib.util.find_spec(name.partition(".")[0]) is not None


def import_problem(name: str) -> str | None:
    """Why `name` cannot be imported, or None if it can."""
    try:
        importlib.import_module(name)
    except ImportError as error:
        return f"{name} cannot be imported: {error}"
    return None


class Examined(NamedTuple):
    """A run folder and what is found in it."""

    rows: list[Row]
    findings: list[Finding]
    learned: bool


def examine(path: Path) -> Examined:
    """Reads a run folder.

    Raises:
        UsageError: if it holds no run, or one without metric rows.
        RunError: for rows that are damaged.
    """
    content = read_config(path)
    config, driver = essence(content, every=True), str(content.get("driver"))
    rows = read_metrics(path / "metrics.jsonl")
    if not rows:
        raise UsageError(f"{path} has no metric rows yet: train for a generation at least")
    result = read_result(path) or {}
    # It may be that of a shorter run than the rows.
    final = result if result.get("generations") == len(rows) else {}
    run = diagnosis.Run(driver, config, rows, final)
    found = diagnosis.diagnose(driver, config, rows, final)
    return Examined(rows, found, diagnosis.learned(run))


def tell(paths: Sequence[Path]) -> int:
    """Print why runs did not learn; the exit code is 0.

    Raises:
        UsageError: if a folder holds no run, or one without metric rows.
    """
    for path in paths:
        print(told(path, examine(path)))
    return 0


def told(path: Path, examined: Examined) -> str:
    """What is printed of a run."""
    count = len(examined.rows)
    head = f"{path}, {count} generation{'s' * (count != 1)}: "
    if examined.learned:
        return f"{head}it learns."
    if not examined.findings:
        return (
            f"{head}it did not learn, and no cause is seen in its rows; docs/why-not-learning.md has what to "
            "check next."
        )
    lines = [
        f"  {number}. {one.name}: {one.sentence}" for number, one in enumerate(examined.findings, 1)
    ]
    return "\n".join([f"{head}it did not learn. The likeliest cause first:", *lines])


def last_line(path: Path) -> str | None:
    """The last line of a run that did not learn: the likeliest cause; None for a run that learned.

    None too where nothing is found, or the run is too short to tell.
    """
    try:
        found = examine(path).findings
    except (UsageError, RunError):
        return None  # it has no rows, or what ended it is told already
    if not found or found[0].name == diagnosis.TOO_FEW:
        return None
    more = len(found) - 1
    others = f" {more} more: eggroll doctor {path}" if more else ""
    return f"Why, most likely ({found[0].name}): {found[0].sentence}{others}"
