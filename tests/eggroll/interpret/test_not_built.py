"""The compiled program holds no matrix for each member: its arrays and its temporaries are small."""

import math
import re

import jax
import jax.numpy as jnp
import optax
import pytest

from eggroll import EvolutionStrategy, plan

POPULATION, LAYERS = 512, 3


def layers_apart(params, key, x):
    for w in params["layers"]:
        x = jnp.tanh(x @ w + params["bias"])
    return x.sum()


def layers_scanned(params, key, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w + params["bias"]), None), x, params["layers"])[
        0
    ].sum()


def layers_with_gains(params, key, x):
    """The gain is a member's own: it must not make the matrix one of its own too."""
    for w in params["layers"]:
        x = jnp.tanh(x @ (w * params["bias"]))
    return x.sum()


def layers_until(params, key, x):
    """A loop with the weights in its carry that each member leaves in its own time."""

    def body(carry):
        w, x, steps = carry
        return w, jnp.tanh(x @ w) * 0.5**steps, steps + 1

    carry = (params["layers"][0], x, 0)
    return jax.lax.while_loop(lambda c: jnp.abs(c[1]).max() > 0.1, body, carry)[1].sum()


def layers_normed(params, key, x):
    """Weight normalisation: a gain that is made of sums of squares of the matrix."""
    for w in params["layers"]:
        norm = jnp.linalg.norm(w, axis=0, keepdims=True)
        x = jnp.tanh(x @ (w / norm * params["bias"]))
    return x.sum()


def layers_standardised(params, key, x):
    """Matrices less their own means, over their own deviations."""
    for w in params["layers"]:
        w = (w - w.mean(0)) / (w.std(0) + 1e-5)
        x = jnp.tanh(x @ w)
    return x.sum()


def layers_masked(params, key, x):
    """Matrices times an array, and plus rows of a member's own."""
    for w in params["layers"]:
        x = jnp.tanh(x @ (jnp.tril(w) + params["bias"]))
    return x.sum()


def shapes(fitness, size):
    matrix = jax.ShapeDtypeStruct((size, size), jnp.float32)
    stack = jax.ShapeDtypeStruct((LAYERS, size, size), jnp.float32)
    layers = stack if fitness is layers_scanned else [matrix] * LAYERS
    params = {"layers": layers, "bias": jax.ShapeDtypeStruct((size,), jnp.float32)}
    return params, jax.ShapeDtypeStruct((1, size), jnp.float32)


def compiled(fitness, call, size, rank=1):
    """The program of a call at a size that is never allocated."""
    params, x = shapes(fitness, size)
    es = EvolutionStrategy(
        optimizer=optax.sgd(0.1),
        population=POPULATION,
        sigma=0.1,
        rank=rank,
        plan=plan.infer(fitness, params, x),
        on_dense="error",
    )
    state = jax.eval_shape(lambda params: es.init(params, 0), params)
    values = jax.ShapeDtypeStruct((POPULATION,), jnp.float32)
    if call == "update":
        return jax.jit(es.update).lower(state, values).compile()
    return jax.jit(lambda state, x: getattr(es, call)(state, fitness, x)).lower(state, x).compile()


def temporaries(program):
    return program.memory_analysis().temp_size_in_bytes


def largest_array(program):
    """Elements of the largest array that the program's text names, fused ones too."""
    found = re.findall(r"\b[a-z]\w*\[([\d,]+)\]", program.as_text())
    return max(math.prod(map(int, dims.split(","))) for dims in found)


@pytest.mark.parametrize(
    ("fitness", "call"),
    [
        (layers_apart, "evaluate"),
        (layers_apart, "step"),
        (layers_scanned, "evaluate"),
        (layers_scanned, "update"),
        (layers_scanned, "step"),
        (layers_with_gains, "evaluate"),
        (layers_until, "evaluate"),
        (layers_normed, "evaluate"),
        (layers_standardised, "evaluate"),
        (layers_masked, "evaluate"),
    ],
)
def test_no_matrix_is_built_for_a_member(fitness, call):
    size = 2048
    program = compiled(fitness, call, size)
    assert temporaries(program) < POPULATION * size**2 * 4 / 20
    assert not re.search(
        rf"\[(\d+,)*({POPULATION}|{POPULATION // 2})(,\d+)*,{size},{size}\]", program.as_text()
    )
    assert largest_array(program) < POPULATION * size**2 / 20


def test_the_memory_of_an_update_grows_with_the_rank_and_not_with_matrices():
    size, small, large = 2048, 1, 4
    programs = {rank: compiled(layers_apart, "update", size, rank) for rank in (small, large)}
    factors = LAYERS * POPULATION // 2 * (size + size) * 4  # bytes of all pairs at rank 1
    for rank, program in programs.items():
        assert largest_array(program) < POPULATION * size**2 / 20
        # What is drawn, what is weighted, and the sums that the parameters' size bounds.
        assert temporaries(program) < 2 * rank * factors + 2 * LAYERS * size**2 * 4
    assert temporaries(programs[large]) > temporaries(programs[small])


def test_full_rank_noise_is_seen_to_be_built():
    """The same measures, where there is something to see."""
    size = 64
    program = compiled(layers_apart, "evaluate", size, rank="full")
    assert temporaries(program) > POPULATION * size**2 * 4 / 20
    assert largest_array(program) >= POPULATION // 2 * size**2
