"""Perturbed inference against plain inference.

    python -m benchmarks.forward --models mlp --dims 1024 --population 1024 --observations 1 --rank 1

Rows of every case:

* plain inference: the unperturbed model on population * observations inputs in one batch;
* kept factors: every member's own perturbation, the noise drawn before and passed in;
* noise drawn inside: the same by ``es.evaluate``, which draws it;
* dense ES: ``es.evaluate`` with ``rank="full"``, where it fits ``--memory``.
"""

import argparse
from collections.abc import Sequence

import jax
import optax
from jax import Array

import eggroll
from benchmarks import common
from benchmarks.common import PLAIN, Call, Case, Row
from benchmarks.models import Problem, problem
from eggroll import _programs as internals
from eggroll import generation
from eggroll.generation import Task

KEPT, LIVE, DENSE = "perturbed, kept factors", "perturbed, noise drawn inside", "dense ES"


def strategy(
    case: Case, p: Problem, *, dense: bool = False, chunk: int | None = None
) -> eggroll.EvolutionStrategy:
    """The strategy of a case; an operation that would build a member's matrix is an error."""
    return eggroll.EvolutionStrategy(
        optimizer=optax.adam(1e-2),
        population=case.population,
        sigma=0.05,
        rank="full" if dense else case.rank,
        plan=eggroll.plan.infer(p.score, p.params, members=p.observations),
        on_dense="error",
        chunk=chunk,
    )


def calls_of(case: Case, args: argparse.Namespace) -> tuple[dict[str, Call], list[Row]]:
    """The rows of one case, and those that would take more than ``--memory`` MiB."""
    p = problem(case.model, case.dim, case.population, case.observations)
    es = strategy(case, p, chunk=args.chunk)
    state = es.init(p.params, jax.random.key(1))
    draws = jax.jit(lambda s: generation.all_draws(generation.begin(es, s)))(state)

    def kept(state: eggroll.State, draws: list[tuple[Array, ...]], data: Array) -> Array:
        g = generation.begin(es, state)
        return generation.map_members(g, state.params, Task(p.score, members=data), draws)

    kept = jax.jit(kept)
    evaluate = internals.evaluate
    calls = {
        PLAIN: Call(
            lambda: p.plain(p.params, p.observations),
            common.temporaries(p.plain, p.params, p.observations),
        ),
        KEPT: Call(
            lambda: kept(state, draws, p.observations),
            common.temporaries(kept, state, draws, p.observations),
        ),
        LIVE: Call(
            lambda: es.evaluate(state, p.score, members=p.observations),
            common.temporaries(evaluate, es, state, p.score, (), p.observations),
        ),
    }
    dense = strategy(case, p, dense=True)
    dense_state = dense.init(p.params, jax.random.key(1))
    needed = common.temporaries(evaluate, dense, dense_state, p.score, (), p.observations)
    skipped = common.too_large(case, DENSE, needed, args.memory)
    if skipped is None:
        calls[DENSE] = Call(
            lambda: dense.evaluate(dense_state, p.score, members=p.observations), needed
        )
    return calls, [skipped] if skipped else []


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Runs the command line; gives the rows that it printed."""
    args = common.parse(common.parser("Perturbed inference against plain inference."), argv)
    return common.run(args, calls_of)


if __name__ == "__main__":
    main()
