"""The time of an optimizer's step against the bytes that it must move, and against optax.

    python -m benchmarks.optim --shapes flat matrix llama-60m leaves

Everything is timed in interleaved rounds in one process: each round takes one step of every optimizer,
and what is reported are medians over rounds of ratios within a round, with quartiles.

* x floor: time over the time that a triad (x + a g, 12 bytes a parameter, in place) would take for the
  bytes that the optimizer has to move, each array read or written once a pass.
* x optax: time over that of its counterpart in optax.

Parameters and states are donated. PyTorch's fused optimizers run where torch is installed, with as many
threads as it likes; they need every gradient in memory too, as the others do.
"""

import argparse
import dataclasses
import importlib.util
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optim
from benchmarks import common, llama
from optim import linear_weights

TRIAD = "triad"
# A row faster than this takes several steps a round, since timers are not exact.
SHORTEST = 0.002


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """What is timed.

    Attributes:
      bytes: per float32 parameter and step, of a vector (or what has no matrix to it).
      make: gives the transform; None for what is no optax transform.
      matrix_bytes: the same for leaves of two and more axes, where that is more: sums over the leaf come
        before the step, so that it is gone over twice.
      linear_bytes: the same for weights of linear layers, where those have another optimizer.
      counterpart: the row of optax that it replaces.
    """

    bytes: float
    make: Callable[[], optax.GradientTransformation] | None = None
    matrix_bytes: float | None = None
    linear_bytes: float | None = None
    counterpart: str | None = None

    def floor(self, shapes: Any) -> float:
        """Bytes of a step over a tree of these shapes."""
        matrix = self.bytes if self.matrix_bytes is None else self.matrix_bytes
        linear = matrix if self.linear_bytes is None else self.linear_bytes
        leaves = zip(jax.tree.leaves(shapes), jax.tree.leaves(linear_weights(shapes)), strict=True)
        return sum(
            float(x.size) * (linear if is_linear else matrix if x.ndim > 1 else self.bytes)
            for x, is_linear in leaves
        )


OPTIMIZERS: dict[str, Optimizer] = {
    # 4 bytes each way: parameter in and out, gradient in; then each moment in and out.
    "optax.sgd": Optimizer(12, lambda: optax.sgd(1e-4)),
    "optax.sgd, momentum": Optimizer(20, lambda: optax.sgd(1e-4, momentum=0.9)),
    "optax.adamw": Optimizer(28, lambda: optax.adamw(1e-4)),
    "optax.lion": Optimizer(20, lambda: optax.lion(1e-4)),
    "lion": Optimizer(20, lambda: optim.lion(1e-4), counterpart="optax.lion"),
    "lion, bfloat16 moment": Optimizer(
        16, lambda: optim.lion(1e-4, mu_dtype=jnp.bfloat16), counterpart="optax.lion"
    ),
    # The norm is a pass of its own over moment and gradient.
    "lion_k l2": Optimizer(28, lambda: optim.lion_k(1e-4, optim.kappa.l2()), counterpart="optax.lion"),
    "sgdp": Optimizer(
        20, lambda: optim.sgdp(1e-4, momentum=0.9), matrix_bytes=28, counterpart="optax.sgd, momentum"
    ),
    "adamp": Optimizer(28, lambda: optim.adamp(1e-4), matrix_bytes=40, counterpart="optax.adamw"),
}  # fmt: skip
for name, projector in (("columns", optim.projector.columns), ("rows", optim.projector.rows)):
    OPTIMIZERS[f"frugal .25 {name}"] = Optimizer(
        28,
        lambda projector=projector: optim.frugal(1e-4, density=0.25, projector=projector()),  # type: ignore[misc]
        linear_bytes=16,
        counterpart="optax.adamw",
    )
if importlib.util.find_spec("torch") is not None:
    OPTIMIZERS["torch SGD, fused"] = Optimizer(12, counterpart="optax.sgd")
    OPTIMIZERS["torch AdamW, fused"] = Optimizer(28, counterpart="optax.adamw")


def _leaves(*shapes: tuple[int, ...]) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]


SHAPES: dict[str, Any] = {
    "flat": _leaves((16_000_000,)),
    "matrix": _leaves((4000, 4000)),
    "llama-60m": llama.shapes("60M"),
    "leaves": _leaves(*[(32, 32), (32,)] * 500),
    "tiny": _leaves((64, 64), (64,)),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One measured row; ratios are lower quartile, median, upper quartile over rounds."""

    shape: str
    name: str
    milliseconds: float
    times_floor: tuple[float, float, float]
    times_counterpart: tuple[float, float, float] | None
    counterpart: str | None
    temporaries: int | None
    compile_seconds: float | None


@dataclasses.dataclass
class Call:
    """A step, with what compiling it told."""

    step: Callable[[], Any]
    temporaries: int | None = None
    compile_seconds: float | None = None


def _arrays(shapes: Any, scale: float) -> Any:
    chance = np.random.default_rng(0)
    draw = lambda x: jnp.asarray(scale * chance.standard_normal(x.shape, dtype=np.float32))
    return jax.tree.map(draw, shapes)


def jax_call(update: Callable[..., Any], params: Any, state: Any, grads: Any) -> Call:
    """Steps of ``update(params, state, grads) -> (params, state)`` in place."""
    start = time.perf_counter()
    compiled = jax.jit(update, donate_argnums=(0, 1)).lower(params, state, grads).compile()
    seconds = time.perf_counter() - start
    analysis = compiled.memory_analysis()
    held = [params, state]

    def step() -> Any:
        held[:] = compiled(*held, grads)
        return jax.block_until_ready(held)

    return Call(step, None if analysis is None else int(analysis.temp_size_in_bytes), seconds)


def torch_call(name: str, shapes: Any) -> Call:
    """Steps of PyTorch's fused optimizer of that name, on the device that JAX uses too."""
    import torch

    device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
    params = [
        torch.nn.Parameter(0.02 * torch.randn(x.shape, device=device))
        for x in jax.tree.leaves(shapes)
    ]
    for x in params:
        x.grad = 1e-3 * torch.randn_like(x)
    solver = getattr(torch.optim, name)(params, lr=1e-4, fused=True)

    def step() -> None:
        solver.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return Call(step)


def calls_of(shapes: Any, names: Sequence[str]) -> dict[str, Call]:
    """The triad and the named optimizers on leaves of these shapes."""
    grads = _arrays(shapes, 1e-3)

    def triad(params: Any, state: Any, grads: Any) -> Any:
        return jax.tree.map(lambda x, g: x + 0.5 * g, params, grads), state

    calls = {TRIAD: jax_call(triad, _arrays(shapes, 0.02), (), grads)}
    for name in names:
        make = OPTIMIZERS[name].make
        if make is None:
            calls[name] = torch_call(name.split()[1].rstrip(","), shapes)
            continue
        solver = make()

        def update(params: Any, state: Any, grads: Any, solver: Any = solver) -> Any:
            updates, state = solver.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        params = _arrays(shapes, 0.02)
        calls[name] = jax_call(update, params, solver.init(params), grads)
    return calls


def measure(shape: str, names: Sequence[str], rounds: int) -> list[Row]:
    """Interleaved rounds of every optimizer on one set of leaves."""
    calls = calls_of(SHAPES[shape], names)
    repeats = {}
    for name, call in calls.items():
        for _ in range(3):
            start = time.perf_counter()
            call.step()
            once = time.perf_counter() - start
        repeats[name] = max(1, int(SHORTEST / max(once, 1e-6)))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for i in range(rounds):
        # Each round starts with another row, so that none always follows the same one.
        for name in order[i % len(order) :] + order[: i % len(order)]:
            start = time.perf_counter()
            for _ in range(repeats[name]):
                calls[name].step()
            seconds[name].append((time.perf_counter() - start) / repeats[name])

    taken = {name: np.array(s) for name, s in seconds.items()}
    triad = taken[TRIAD] / Optimizer(12).floor(SHAPES[shape])  # seconds a byte

    def quartiles(ratios: np.ndarray) -> tuple[float, float, float]:
        low, median, high = (float(q) for q in np.quantile(ratios, [0.25, 0.5, 0.75]))
        return low, median, high

    rows = []
    for name, call in calls.items():
        optimizer = OPTIMIZERS.get(name, Optimizer(12))
        other = optimizer.counterpart if optimizer.counterpart in taken else None
        rows.append(
            Row(
                shape,
                name,
                1e3 * float(np.median(taken[name])),
                quartiles(taken[name] / (triad * optimizer.floor(SHAPES[shape]))),
                None if other is None else quartiles(taken[name] / taken[other]),
                other,
                call.temporaries,
                call.compile_seconds,
            )
        )
    return rows


def print_rows(rows: Sequence[Row]) -> None:
    shapes = jax.tree.leaves(SHAPES[rows[0].shape])
    size = sum(x.size for x in shapes)
    print(f"\n{rows[0].shape}: {size / 1e6:.1f}M parameters in {len(shapes)} leaves")
    head = (
        f"{'row':<24} {'ms':>8} {'x floor':>8} {'quartiles':>12} {'x optax':>8} {'quartiles':>12}"
    )
    head += f"  {'of':<20} {'temp MiB':>8} {'compile s':>9}"
    print(f"{head}\n{'-' * len(head)}")
    for row in rows:
        low, median, high = row.times_floor
        line = (
            f"{row.name:<24} {row.milliseconds:>8.2f} {median:>8.2f} {f'{low:.2f}-{high:.2f}':>12} "
        )
        low, median, high = row.times_counterpart or (0, 0, 0)
        known = row.times_counterpart is not None
        line += (
            f"{f'{median:.2f}' if known else '':>8} {f'{low:.2f}-{high:.2f}' if known else '':>12}"
        )
        temp = "" if row.temporaries is None else f"{row.temporaries / common.MIB:.1f}"
        spent = "" if row.compile_seconds is None else f"{row.compile_seconds:.1f}"
        print(f"{line}  {row.counterpart or '':<20} {temp:>8} {spent:>9}", flush=True)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Runs the command line; gives the rows that it printed."""
    p = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    default = [name for name in SHAPES if name != "tiny"]
    p.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=default)
    p.add_argument("--optimizers", nargs="+", choices=list(OPTIMIZERS), default=list(OPTIMIZERS))
    p.add_argument("--rounds", type=int, default=15, help="interleaved rounds")
    p.add_argument("--json", type=Path, help="also write the table to this file")
    args = p.parse_args(argv)
    if args.rounds < 1:
        p.error(f"--rounds {args.rounds}: must be at least 1")
    m = common.machine()
    print(f"{m['cpu']}, {m['cores']} cores, device {m['device']}, JAX {m['jax']}")
    rows: list[Row] = []
    for shape in args.shapes:
        found = measure(shape, args.optimizers, args.rounds)
        print_rows(found)
        rows += found
    if args.json:
        table = [dataclasses.asdict(row) for row in rows]
        document = {"machine": m, "rounds": args.rounds, "rows": table}
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
