"""Random programs on a population agree with the same programs on members that are built densely."""

import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from program import DATA, PARAMS, SELDOM
from random_programs import programs
from support import normal

from eggroll import EvolutionStrategy, Matrix, plan
from eggroll.interpret import interpreter, registry
from eggroll.values import LowRank

POPULATION = 4
PLANS = {
    "by shape": plan.by_shape(),
    "stacks apart": plan.by_shape(
        {"s": Matrix(rows=1, columns=2, batch=0), "k": Matrix(rows=1, columns=2, batch=0)}
    ),
}

# Primitives with a rule that no program here can reach: meshes, and names of other JAX versions.
BEYOND = frozenset(
    "call closed_call core_call checkpoint composite compute_on copy_p custom_partitioning "
    "custom_vjp_call_jaxpr eval_jaxpr linear_call pcast pjit pvary remat remat_opt reshard "
    "shard_map sharding_constraint".split()
)


@pytest.fixture(scope="module", autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@functools.cache
def arrays(parameters):
    shapes = PARAMS if parameters else DATA
    return {name: jnp.asarray(normal(shape, name)) for name, shape in shapes.items()}


@functools.cache
def strategy(name, rank):
    """A strategy, its state, and all members built: leaves ``[population, ...]``."""
    return members_of(PLANS[name], rank)


def members_of(planner, rank):
    es = EvolutionStrategy(
        optimizer=optax.sgd(0.1),
        population=POPULATION,
        sigma=0.2,
        rank=rank,
        plan=planner,
        on_dense="ignore",
    )
    state = es.init(arrays(True), 0)
    return es, state, es.ask(state, range(POPULATION))


def run_all(batch, params, data, everything=False):
    return [program.run({**params, **data}, everything) for program in batch]


def compare(batch, es, state, built):
    """Asserts that each program gives the same on a population and on its built members."""
    data = arrays(False)
    es = dataclasses.replace(es)  # which has seen no other function, and does not warn of a new one
    got = es.map(state, lambda params, key, data: run_all(batch, params, data), data)

    @jax.jit
    def reference(params, data):
        # Not a vmap, which not all of JAX supports.
        return jax.lax.map(
            lambda p: (run_all(batch, p, data), run_all(batch, p, data, True)), params
        )

    expected, every = reference(built, data)
    for program, outs, wanted, values in zip(batch, got, expected, every, strict=True):
        # Rounding is relative to the largest number on the way. Scales are float32.
        sizes = [np.abs(v, where=np.isfinite(v), out=np.zeros(v.shape)).max() for v in values]
        for name, a, b in zip(program.outputs, outs, wanted, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype), f"{name}{program}"
            close = dict(rtol=1e-6, atol=1e-6 * (1 + max(sizes)))
            np.testing.assert_allclose(a, b, **close, err_msg=f"{name}{program}")


def check(batch, es, state, built):
    """:func:`compare`, which prints the shortest program of a batch that fails."""
    try:
        compare(batch, es, state, built)
    except Exception:
        # The programs one by one, and each one line by line, which takes seconds; hypothesis would
        # compile hundreds of programs to shrink a batch.
        for program in batch:
            for name, _ in program.lines:
                shortest = program.up_to(name)
                try:
                    compare([shortest], es, state, built)
                except Exception as error:
                    raise AssertionError(f"this program fails:\n{shortest.source}") from error
        raise


BATCHES = st.lists(programs(), min_size=8, max_size=10)
NO_SHRINKING = (hypothesis.Phase.explicit, hypothesis.Phase.reuse, hypothesis.Phase.generate)
CONFIGURATIONS = st.tuples(st.sampled_from(list(PLANS)), st.sampled_from([1, 2]))


@pytest.mark.slow
def test_a_population_agrees_with_built_members(monkeypatch):
    met = set()
    plain = interpreter.step

    def step(context, eqn, values):
        if any(isinstance(v, LowRank) for v in values):
            met.add(eqn.primitive.name)
        return plain(context, eqn, values)

    monkeypatch.setattr(interpreter, "step", step)
    count = 0

    @hypothesis.settings(max_examples=10, phases=NO_SHRINKING)
    @given(BATCHES, CONFIGURATIONS)
    def run(batch, configuration):
        nonlocal count
        count += len(batch)
        check(batch, *strategy(*configuration))

    run()
    assert count > 75
    check(SELDOM, *strategy("stacks apart", 2))
    ruled = {e.primitive for e in registry.entries().values() if e.rule is not None}
    assert not ruled - BEYOND - met, sorted(ruled - BEYOND - met)


@hypothesis.settings(max_examples=3, phases=NO_SHRINKING)
@given(BATCHES, st.sampled_from([1, 2]))
def test_members_by_an_inferred_plan_agree(batch, rank):
    fn = lambda params, key, data: run_all(batch, params, data)
    planner = plan.infer(fn, arrays(True), arrays(False))
    check(batch, *members_of(planner, rank))


@pytest.mark.soak
@hypothesis.settings(phases=NO_SHRINKING)
@given(BATCHES, CONFIGURATIONS)
def test_thousands_of_programs_agree(batch, configuration):
    check(batch, *strategy(*configuration))
