"""Tokens per second of integer pretraining, its phases apart, against the same model's plain inference.

    python -m benchmarks.integer --model 6L-256D --population 512 --tokens 100

Rows of every population:

* int8 matmuls alone: those of the model in the same loops over tokens and layers, on what the one
  before gave, cut to int8 without any other arithmetic;
* plain inference: the unperturbed model, one stream a member, loss included;
* forward: ``es.evaluate``, the noise drawn inside;
* noise: drawing alone;
* fitness: from scores to the signs of the pairs;
* update: ``es.update``, which draws the noise again;
* generation: ``es.evaluate`` and ``es.update``.

tok/s counts the tokens of all members. The last lines give what the targets are about.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from benchmarks import common
from benchmarks.common import MIB, PLAIN, Call, Case, Row
from eggroll import _programs as internals
from eggroll import integer
from eggroll.arithmetic.integers import pair_signs
from eggroll.perturbation import draw_pairs
from experiments.models import egg

MATMULS, FORWARD, NOISE, FITNESS, UPDATE, GENERATION = (
    "int8 matmuls alone",
    "forward",
    "noise",
    "fitness",
    "update",
    "generation",
)


def fitness(params: Any, key: Any, member: tuple[Array, Array]) -> tuple[Array, Array]:
    """Minus the loss of a member's stream, and its new hidden state."""
    state, tokens = member
    state, total = egg.sequence(params, state, tokens)
    return -total, state


@jax.jit
def plain(params: Any, members: tuple[Array, Array]) -> Any:
    """The unperturbed model on the same streams."""
    return jax.vmap(lambda member: fitness(params, None, member))(members)


@jax.jit
def matmuls(params: Any, x: Array, tokens: Array) -> Array:
    """The products of the model, in its order, for as many tokens."""
    dot = lambda u, m: lax.dot(u, m, preferred_element_type=jnp.int32)
    cut = lambda y: (y >> 8).astype(jnp.int8)

    def layer(x: Array, p: Any) -> tuple[Array, None]:
        gate = cut(dot(x, p["wf"]) + dot(x, p["uf"]))
        new = cut(dot(x, p["wh"]) + dot(gate, p["uh"]))
        return cut(dot(cut(dot(new, p["w1"])), p["w2"])), None

    def token(x: Array, _: Array) -> tuple[Array, None]:
        x, _ = lax.scan(layer, x, params["layers"])
        return cut(dot(x, params["head"]))[:, : x.shape[1]], None

    return lax.scan(token, x, tokens)[0]


def calls_of(case: Case, config: egg.Config, tokens: int, chunk: int | None) -> dict[str, Call]:
    """The rows of one population."""
    params = egg.init(jax.random.key(0), config)
    es = integer.strategy(
        population=case.population,
        rank=case.rank,
        optimizer=integer.threshold(integer.inverse_decay()),
        plan=egg.plan(),
        chunk=chunk,
    )
    state = es.init(params, jax.random.key(1))
    text = jax.random.randint(jax.random.key(2), (case.population, tokens + 1), 1, 256, jnp.int32)
    hidden = jnp.zeros((case.population, config.layers, config.width), jnp.int8)
    members = (hidden, text.astype(jnp.uint8))
    values, _ = es.evaluate(state, fitness, members=members)
    signs = jax.jit(lambda values: pair_signs(values[:, None]))
    plan, pairs = es.plan_of(params), jnp.arange(case.population // 2, dtype=jnp.int32)
    draw = jax.jit(lambda seed: draw_pairs(plan, es.noise, seed, jnp.int32(0), pairs))
    x = jax.random.randint(jax.random.key(3), (case.population, config.width), -64, 65, jnp.int8)

    def generation() -> Any:
        values, hidden = es.evaluate(state, fitness, members=members)
        return es.update(state, values), hidden

    def call(run: Any, jitted: Any, *args: Any) -> Call:
        return Call(run, common.temporaries(jitted, *args))

    evaluate = (es, state, fitness, (), members)
    return {
        MATMULS: call(lambda: matmuls(params, x, text[0, 1:]), matmuls, params, x, text[0, 1:]),
        PLAIN: call(lambda: plain(params, members), plain, params, members),
        FORWARD: call(
            lambda: es.evaluate(state, fitness, members=members), internals.evaluate, *evaluate
        ),
        NOISE: call(lambda: draw(state.seed), draw, state.seed),
        FITNESS: call(lambda: signs(values), signs, values),
        UPDATE: call(lambda: es.update(state, values), internals.update, es, state, values, None),
        GENERATION: Call(generation),
    }


def print_rows(case: Case, rows: Sequence[Row], tokens: int, wait: float | None) -> None:
    """The table of one population, and the ratios that the targets are about."""
    waited = "" if wait is None else f"   (waiting for a CPU: {wait:.0%} of the time)"
    head = f"{'row':<20} {'ms':>9} {'tok/s':>8} {'x plain':>8} {'quartiles':>13} {'temp MiB':>9}"
    print(f"\n{case.model} N={case.population} T={tokens} rank={case.rank}{waited}\n{head}")
    print("-" * len(head))
    of = {row.name: row for row in rows}
    for row in rows:
        assert row.seconds is not None and row.times_plain is not None
        low, median, high = row.times_plain
        speed = f"{case.population * tokens / row.seconds:.0f}" if row.name in TIMED else ""
        temp = "" if row.temporaries is None else f"{row.temporaries / MIB:.1f}"
        print(
            f"{row.name:<20} {1e3 * row.seconds:>9.2f} {speed:>8} {median:>8.3f} "
            f"{f'{low:.3f}-{high:.3f}':>13} {temp:>9}"
        )
    times = {name: row.times_plain[1] for name, row in of.items() if row.times_plain}
    print(
        f"perturbed {1 / times[FORWARD]:.0%} of plain inference; plain inference "
        f"{times[MATMULS]:.0%} of its matmuls alone; update {times[UPDATE] / times[GENERATION]:.1%} "
        "of a generation",
        flush=True,
    )


TIMED = {MATMULS, PLAIN, FORWARD, GENERATION}


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Runs the command line; gives the rows that it printed."""
    p = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    p.add_argument("--model", choices=list(egg.CONFIGS), default="6L-256D")
    p.add_argument("--population", nargs="+", type=int, default=[256, 512, 1024, 2048, 4096])
    p.add_argument("--tokens", type=int, default=100, help="of a member")
    p.add_argument("--rank", type=int, default=1)
    p.add_argument("--chunk", type=int, help="members at a time; all by default")
    p.add_argument("--rounds", type=int, default=5, help="interleaved rounds")
    p.add_argument("--tries", type=int, default=1, help="rounds made for each one kept")
    p.add_argument("--json", type=Path, help="also write the table to this file")
    args = p.parse_args(argv)
    if any(n < 2 or n % 2 for n in args.population):
        p.error(f"--population {args.population}: even numbers of at least 2 are right")
    for name in ("tokens", "rank", "rounds", "tries"):
        if getattr(args, name) < 1:
            p.error(f"--{name} {getattr(args, name)}: must be at least 1")

    m, config = common.machine(), egg.CONFIGS[args.model]
    print(f"{m['cpu']}, {m['cores']} cores, device {m['device']}, JAX {m['jax']}")
    rows, waits = [], {}
    for population in args.population:
        case = Case(args.model, config.width, population, 1, args.rank)
        calls = calls_of(case, config, args.tokens, args.chunk)
        found, waits[str(case)] = common.measure(case, calls, args.rounds, args.tries)
        print_rows(case, found, args.tokens, waits[str(case)])
        rows += found
    if args.json:
        table = [
            {**{k: v for k, v in dataclasses.asdict(r).items() if k != "case"}, **dataclasses.asdict(r.case)}
            for r in rows
        ]  # fmt: skip
        document = {
            "machine": m, "tokens": args.tokens, "rounds": args.rounds, "tries": args.tries,
            "chunk": args.chunk, "waited": waits, "rows": table,
        }  # fmt: skip
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
