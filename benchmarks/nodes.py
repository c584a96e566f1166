"""A generation with node noise against the perturbed forward pass alone.

    python -m benchmarks.nodes

Rows of every model:

* weights: evaluate: ``es.evaluate`` with noise of rank 1 on weights, which the others are divided by;
* weights: step: ``es.step`` with the same noise;
* nodes: evaluate: ``es.evaluate`` with noise on the outputs of products;
* nodes: step: ``es.step``, which runs the members a second time for the sums of node noise.

The models are the MLP and the GRU of :mod:`benchmarks.estimators`, and EGG in int8. A row of a member is an
example of the MLP and a byte of the others; rows/s counts those of all members.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from benchmarks import common, estimators
from benchmarks.common import MIB, Call, Case, Row
from eggroll import EvolutionStrategy, Frozen, credit, integer, plan
from eggroll import _programs as internals
from experiments.models import egg

FORWARD, WEIGHTS, EVALUATE, STEP = (
    "weights: evaluate",
    "weights: step",
    "nodes: evaluate",
    "nodes: step",
)


class Setting(NamedTuple):
    """A model under both kinds of noise.

    Attributes:
      params: the parameters.
      members: the data of all members.
      rows: of a member.
      fitness: gives the scores of all rows; with noise on weights, their sum is the score.
      weights: a strategy with noise on weights.
      nodes: a strategy with noise on outputs.
    """

    params: Any
    members: Any
    rows: int
    fitness: Any
    weights: EvolutionStrategy
    nodes: EvolutionStrategy


def of_floats(name: str, args: argparse.Namespace) -> Setting:
    """The MLP or the GRU of bytes."""
    p = estimators.PROBLEMS[name]()
    members = jax.tree.map(lambda x: jnp.repeat(x, 2, 0), p.data(0, args.population // 2))

    def strategy(sigma: float, **settings: Any) -> EvolutionStrategy:
        return EvolutionStrategy(
            optimizer=optax.adam(1e-2),
            population=args.population,
            sigma=sigma,
            chunk=args.chunk,
            factor_memory=args.factor_memory,
            on_dense="error",
            **settings,
        )

    gamma = credit.causal(p.gamma)
    nodes = strategy(p.node_sigma, perturb="nodes", rows=p.rows, credit=gamma)
    return Setting(p.params, members, p.rows, p.score, strategy(p.weight_sigma), nodes)


def of_integers(args: argparse.Namespace) -> Setting:
    """EGG in int8: every matrix, the embedding and the biases by nodes, gains as they are."""
    config, length = egg.CONFIGS[args.egg], args.tokens
    shape = (args.egg_population, length + 1)
    text = jax.random.randint(jax.random.key(2), shape, 1, 256, jnp.int32)
    hidden = jnp.zeros((args.egg_population, config.layers, config.width), jnp.int8)

    def fitness(params: Any, key: Array, member: tuple[Array, Array]) -> Array:
        state, tokens = member

        def one(state: Array, pair: tuple[Array, Array]) -> tuple[Array, Array]:
            state, logits = egg.step(params, state, pair[0])
            return state, egg.loss(logits, pair[1])

        return -lax.scan(one, state, (tokens[:-1], tokens[1:]))[1]

    def strategy(*rules: Any, **settings: Any) -> EvolutionStrategy:
        optimizer = optax.chain(*rules, integer.threshold(integer.inverse_decay()))
        return integer.strategy(
            population=args.egg_population,
            optimizer=optimizer,
            chunk=args.chunk,
            factor_memory=args.factor_memory,
            **settings,
        )

    gains = plan.by_shape({"layers/ln*": Frozen(), "ln": Frozen()})
    nodes = strategy(
        integer.by_rows(),
        shift=2,
        perturb="nodes",
        rows=length,
        credit=credit.causal(0.5),
        plan=gains,
    )
    params = egg.init(jax.random.key(0), config)
    return Setting(params, (hidden, text), length, fitness, strategy(plan=egg.plan()), nodes)


def calls_of(s: Setting, temporaries: bool) -> dict[str, Call]:
    """The rows of one model; what they allot takes another compilation of each."""

    def whole(params: Any, key: Array, member: Any) -> Array:
        return s.fitness(params, key, member).sum()

    def pair(es: EvolutionStrategy, fitness: Any) -> tuple[Call, Call]:
        state = es.init(s.params, 1)
        evaluate = lambda: es.evaluate(state, fitness, members=s.members)
        step = lambda: es.step(state, fitness, members=s.members)
        if not temporaries:
            return Call(evaluate), Call(step)
        given = (es, state, fitness, (), s.members)
        bytes_of = common.temporaries
        return (
            Call(evaluate, bytes_of(internals.evaluate, *given)),
            Call(step, bytes_of(internals.step, *given, None)),
        )

    forward, weights = pair(s.weights, whole)
    evaluate, step = pair(s.nodes, s.fitness)
    return {FORWARD: forward, WEIGHTS: weights, EVALUATE: evaluate, STEP: step}


def print_rows(case: Case, rows: Sequence[Row], length: int, wait: float | None) -> None:
    """The table of one model."""
    waited = "" if wait is None else f"   (waiting for a CPU: {wait:.0%} of the time)"
    head = f"{'row':<20} {'ms':>9} {'rows/s':>9} {'x forward':>9} {'quartiles':>13} {'CPU':>6}"
    head += f" {'temp MiB':>9}"
    title = f"{case.model} D={case.dim} N={case.population} rows={length}{waited}"
    print(f"\n{title}\n{head}\n{'-' * len(head)}")
    seconds = {}
    for row in rows:
        assert row.seconds is not None and row.times_plain is not None
        seconds[row.name] = row.seconds
        low, median, high = row.times_plain
        temp = "" if row.temporaries is None else f"{row.temporaries / MIB:.1f}"
        print(
            f"{row.name:<20} {1e3 * row.seconds:>9.2f} {case.population * length / row.seconds:>9.0f} "
            f"{median:>9.2f} {f'{low:.2f}-{high:.2f}':>13} {row.cpu_times_plain:>6.2f} {temp:>9}"
        )
    print(
        f"a generation with node noise takes {seconds[STEP] / seconds[EVALUATE]:.2f} times its own "
        f"evaluation, and {seconds[STEP] / seconds[WEIGHTS]:.2f} times one with noise on weights",
        flush=True,
    )


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Runs the command line; gives the rows that it printed."""
    p = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    models = ["mlp", "gru", "egg"]
    p.add_argument("--models", nargs="+", choices=models, default=models)
    p.add_argument("--population", type=int, default=256, help="members of the MLP and the GRU")
    p.add_argument("--egg", choices=list(egg.CONFIGS), default="6L-256D", help="shape of EGG")
    p.add_argument("--egg-population", type=int, default=64, help="members of EGG")
    p.add_argument("--tokens", type=int, default=25, help="of a member of EGG")
    p.add_argument("--chunk", type=int, help="members at a time; all by default")
    p.add_argument("--factor-memory", type=int, default=2**25,
                   help="bytes that a step may keep from the evaluation to the update")  # fmt: skip
    p.add_argument("--temporaries", action="store_true", help="also tell the bytes of temporaries")
    p.add_argument("--rounds", type=int, default=7, help="interleaved rounds")
    p.add_argument("--tries", type=int, default=1, help="rounds made for each one kept")
    p.add_argument("--json", type=Path, help="also write the table to this file")
    args = p.parse_args(argv)
    for name in ("population", "egg_population"):
        n = getattr(args, name)
        if n < 2 or n % 2:
            p.error(f"--{name.replace('_', '-')} {n}: must be an even number of at least 2")
    for name in ("tokens", "rounds", "tries"):
        if getattr(args, name) < 1:
            p.error(f"--{name} {getattr(args, name)}: must be at least 1")

    m = common.machine()
    print(f"{m['cpu']}, {m['cores']} cores, device {m['device']}, JAX {m['jax']}")
    print(f"x forward: time over that of '{FORWARD}' in the same round, median and quartiles")
    table, waits, lengths = [], {}, {}
    for model in args.models:
        if model == "egg":
            setting = of_integers(args)
            case = Case(args.egg, egg.CONFIGS[args.egg].width, args.egg_population, 1, 1)
        else:
            setting = of_floats(model, args)
            width = estimators.HIDDEN if model == "mlp" else estimators.WIDTH
            case = Case(model, width, args.population, 1, 1)
        calls = calls_of(setting, args.temporaries)
        rows, wait = common.measure(case, calls, args.rounds, args.tries, base=FORWARD)
        print_rows(case, rows, setting.rows, wait)
        waits[model], lengths[model] = wait, setting.rows
        table += rows
    if args.json:
        document = {
            "machine": m, "rounds": args.rounds, "tries": args.tries, "chunk": args.chunk,
            "factor_memory": args.factor_memory, "rows_of_a_member": lengths, "waited": waits,
            "rows": [
                {
                    "model": r.case.model, "population": r.case.population, "name": r.name,
                    "seconds": r.seconds, "times_forward": r.times_plain,
                    "cpu_times_forward": r.cpu_times_plain, "temporaries": r.temporaries,
                }
                for r in table
            ],
        }  # fmt: skip
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    return table


if __name__ == "__main__":
    main()
