"""What checkpoints cost a run that saves every generation: the time that it waits in `save`.

    python -m benchmarks.saving --mib 64 --seconds 0.5 5

Orbax copies the state and writes it beside the next generation; a save waits for the one before. The
generation is products of matrices on this machine's CPU, which the writing has to share; its length is
what it takes without saving. Blocks with and without saving take turns.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks.common import MIB
from experiments.run.checkpoints import Checkpoints


def work(seconds: float) -> Callable[[], object]:
    """Arithmetic that takes about so long."""
    x = jnp.eye(512) + 0.01

    @jax.jit
    def products(x: jax.Array, times: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, times, lambda _, y: jnp.tanh(y @ x), x)

    def run(times: int) -> float:
        began = time.perf_counter()
        jax.block_until_ready(products(x, jnp.int32(times)))
        return time.perf_counter() - began

    run(1)
    one = statistics.median(run(10) / 10 for _ in range(5))
    return lambda: run(max(1, round(seconds / one)))


def measure(mib: int, seconds: float, generations: int, blocks: int) -> tuple[float, float, float]:
    """Seconds of a generation without saving, seconds of one with, and of these those in `save`; medians
    of generations."""
    generation = work(seconds)
    # Random bits, which do not compress.
    state = {"params": jax.random.normal(jax.random.key(0), (mib, MIB // 4))}
    plain: list[float] = []
    saving: list[float] = []
    inside: list[float] = []
    with tempfile.TemporaryDirectory() as folder, Checkpoints(Path(folder) / "c") as checkpoints:
        checkpoints.save(1, state, {})
        done = 1
        for _ in range(blocks):
            checkpoints.wait()
            for _ in range(generations):
                began = time.perf_counter()
                generation()
                plain.append(time.perf_counter() - began)
            for _ in range(generations):
                began = time.perf_counter()
                generation()
                done += 1
                before = time.perf_counter()
                checkpoints.save(done, state, {})
                now = time.perf_counter()
                saving.append(now - began)
                inside.append(now - before)
    return statistics.median(plain), statistics.median(saving), statistics.median(inside)


def main(argv: Sequence[str] | None = None) -> dict[float, float]:
    """Prints the table; returns the share of the time that is spent in `save`, by wanted seconds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=64)
    parser.add_argument("--seconds", type=float, nargs="+", default=[0.5, 5.0])
    parser.add_argument("--generations", type=int, default=5)
    parser.add_argument("--blocks", type=int, default=3)
    args = parser.parse_args(argv)
    print(f"{args.mib} MiB saved every generation; seconds of a generation, medians")
    print(f"{'without':>10}{'with':>10}{'in save':>10}{'share':>8}")
    shares = {}
    for seconds in args.seconds:
        plain, saving, inside = measure(args.mib, seconds, args.generations, args.blocks)
        shares[seconds] = inside / saving
        print(f"{plain:10.3f}{saving:10.3f}{inside:10.3f}{shares[seconds]:8.1%}")
    return shares


if __name__ == "__main__":
    main()
