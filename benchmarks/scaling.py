"""What the options of several devices cost: a deterministic step, and an exchange of scores alone.

    python -m benchmarks.scaling --devices 1 8 --dim 256 --population 512

Devices are parts of this machine's CPU, so that nothing here tells how a step gets faster with real
ones. Rounds are interleaved (every row once a round), and a row's ratio is the median over rounds, with
quartiles, of its time over that of the default step on as many devices. CPU is the same ratio in CPU time
of all threads, which other processes disturb less.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
from jax.sharding import AxisType

from benchmarks import common
from benchmarks.models import problem
from eggroll import EvolutionStrategy

DEFAULT = "default"
ROWS: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    "deterministic": {"deterministic": True},
    "exchange='fitness'": {"exchange": "fitness"},
}


def step_of(devices: int, dim: int, population: int, changes: dict[str, Any]) -> Callable[[], Any]:
    """One compiled generation of the MLP on so many devices."""
    p = problem("mlp", dim, population, 1)
    mesh = jax.make_mesh(
        (devices,), ("population",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )
    es = EvolutionStrategy(
        optimizer=optax.adam(1e-2), population=population, sigma=0.05, mesh=mesh, **changes
    )
    state = es.init(p.params, jax.random.key(1))
    run = lambda: es.step(state, p.score, members=p.observations)
    jax.block_until_ready(run())
    return run


def measure(
    devices: int, dim: int, population: int, rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """Seconds and CPU seconds of every row in every round."""
    runs = {name: step_of(devices, dim, population, changes) for name, changes in ROWS.items()}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(common.once(run, 1))
    return seconds


def main(argv: Sequence[str] | None = None) -> dict[tuple[int, str], float]:
    """Prints the table; returns the median ratio of every row."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--devices", nargs="+", type=int, default=[1, 8], help="at most 8")
    p.add_argument("--dim", type=int, default=256, help="width of the MLP")
    p.add_argument("--population", type=int, default=512)
    p.add_argument("--rounds", type=int, default=31)
    args = p.parse_args(argv)
    m = common.machine()
    print(f"{m['cpu']}, {m['cores']} cores, JAX {m['jax']}; MLP D={args.dim} N={args.population}")
    print(f"{'devices':>7}  {'step':<20} {'ms':>8} {'x default':>10} {'quartiles':>13} {'CPU':>6}")
    ratios = {}
    for devices in args.devices:
        seconds = measure(devices, args.dim, args.population, args.rounds)
        for name, times in seconds.items():
            both = zip(times, seconds[DEFAULT], strict=True)
            wall, cpu = zip(*[(t / u, c / d) for (t, c), (u, d) in both], strict=True)
            low, middle, high = statistics.quantiles(wall, n=4, method="inclusive")
            ratios[devices, name] = middle
            print(
                f"{devices:>7}  {name:<20} {1e3 * statistics.median(t for t, _ in times):>8.2f} "
                f"{middle:>10.2f} {f'{low:.2f}-{high:.2f}':>13} {statistics.median(cpu):>6.2f}",
                flush=True,
            )
    return ratios


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    main()
