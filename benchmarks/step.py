"""A whole generation against plain inference, and against OpenES of evosax where it is installed.

    python -m benchmarks.step --models mlp --dims 1024 --population 1024 --observations 1 --rank 1

Rows of every case:

* plain inference: the unperturbed model on population * observations inputs in one batch;
* update: ``es.update`` alone, on given scores (it draws the noise again);
* whole step: ``es.step``, that is evaluation and update;
* dense ES step: ``es.step`` with ``rank="full"``, where it fits ``--memory``;
* evosax OpenES: ask, evaluation and tell in one jitted function, with the same fitness, population
  and optimizer and mirrored sampling, under the same limit.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from benchmarks import common
from benchmarks.common import PLAIN, Call, Case, Row
from benchmarks.forward import strategy
from benchmarks.models import Problem, problem
from eggroll import _programs as internals

try:
    from evosax.algorithms import Open_ES
except ImportError:
    Open_ES = None

UPDATE, STEP, DENSE, EVOSAX = (
    "update",
    "whole step",
    "dense ES, whole step",
    "evosax OpenES, whole step",
)


def calls_of(case: Case, args: argparse.Namespace) -> tuple[dict[str, Call], list[Row]]:
    """The rows of one case, and those that would take more than ``--memory`` MiB."""
    p = problem(case.model, case.dim, case.population, case.observations)
    es = strategy(case, p, chunk=args.chunk)
    state = es.init(p.params, jax.random.key(1))
    values = es.evaluate(state, p.score, members=p.observations)
    calls = {
        PLAIN: Call(
            lambda: p.plain(p.params, p.observations),
            common.temporaries(p.plain, p.params, p.observations),
        ),
        UPDATE: Call(
            lambda: es.update(state, values),
            common.temporaries(internals.update, es, state, values, None),
        ),
        STEP: Call(
            lambda: es.step(state, p.score, members=p.observations),
            common.temporaries(internals.step, es, state, p.score, (), p.observations, None),
        ),
    }
    rows = []

    def add(name: str, run: Callable[[], Any], needed: int | None) -> None:
        skipped = common.too_large(case, name, needed, args.memory)
        if skipped is None:
            calls[name] = Call(run, needed)
        else:
            rows.append(skipped)

    dense = strategy(case, p, dense=True)
    dense_state = dense.init(p.params, jax.random.key(1))
    needed = common.temporaries(
        internals.step, dense, dense_state, p.score, (), p.observations, None
    )
    add(DENSE, lambda: dense.step(dense_state, p.score, members=p.observations), needed)
    if Open_ES is None:
        rows.append(Row(case, EVOSAX, note="skipped: evosax is not installed"))
    else:
        generation, start = evosax_generation(p, case.population)
        needed = common.temporaries(generation, start, jax.random.key(1), p.observations)
        add(EVOSAX, lambda: generation(start, jax.random.key(1), p.observations), needed)
    return calls, rows


def evosax_generation(p: Problem, population: int) -> tuple[Callable[..., Any], Any]:
    """One jitted generation of evosax's OpenES, and the state that it starts from."""
    es = Open_ES(
        population_size=population,
        solution=p.params,
        optimizer=optax.adam(1e-2),
        std_schedule=optax.constant_schedule(0.05),
        use_antithetic_sampling=True,
    )
    settings = es.default_params

    @jax.jit
    def generation(state: Any, key: Array, data: Array) -> tuple[Any, Array]:
        ask_key, tell_key = jax.random.split(key)
        members, state = es.ask(ask_key, state, settings)
        scores = jax.vmap(lambda params, own: p.score(params, key, own))(members, data)
        # evosax minimises. Its metrics are not returned: XLA leaves out what nobody asks for.
        state, _ = es.tell(tell_key, members, -scores, state, settings)
        return state, jnp.mean(scores)

    return generation, es.init(jax.random.key(0), p.params, settings)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Runs the command line; gives the rows that it printed."""
    args = common.parse(common.parser("A whole generation against plain inference."), argv)
    return common.run(args, calls_of)


if __name__ == "__main__":
    main()
