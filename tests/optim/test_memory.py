"""Bytes of states: those that the state really takes, by field and by parameter, at any size."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from transforms import TRANSFORMS

import optim

PARAMS = {
    "layers": [{"kernel": jnp.ones((6, 8)), "bias": jnp.ones(8)}, {"kernel": jnp.ones((8, 4))}],
    "scale": jnp.ones(()),
    "nothing": None,
}
SIZE = 48 + 8 + 32 + 1


@pytest.mark.parametrize("name", list(TRANSFORMS))
def test_it_is_what_the_state_takes(name: str) -> None:
    factory, settings = TRANSFORMS[name]
    solver = factory(**settings)
    state = solver.init(PARAMS)
    found = optim.state_bytes(solver, PARAMS)
    assert found.total == sum(x.nbytes for x in jax.tree.leaves(state))
    assert found.total == sum(found.fields.values())
    assert list(found.parameters) == [
        "layers/0/bias", "layers/0/kernel", "layers/1/kernel", "scale"
    ]  # fmt: skip
    # Counts, keys and the like are no parameter's; nor are BAdam's moments, of whichever block is active.
    moments = 8 * (48 + 8) if name == "badam" else 0
    assert moments <= found.total - sum(found.parameters.values()) <= moments + 48


def test_fields_and_parameters_of_adam() -> None:
    found = optim.state_bytes(optax.chain(optax.clip(1.0), optax.adam(1e-3)), PARAMS)
    assert found.fields == {"count": 4, "mu": 4 * SIZE, "nu": 4 * SIZE}
    assert found.parameters["layers/0/kernel"] == 8 * 48
    assert str(found).splitlines()[-1].split() == ["total", f"{8 * SIZE + 4:,}"]


def test_narrow_moments_and_wrappers() -> None:
    narrow = optim.state_bytes(optim.lion(1e-3, mu_dtype=jnp.bfloat16), PARAMS)
    assert narrow.fields == {"count": 4, "mu": 2 * SIZE}
    labels = {"layers": "ours", "scale": "sgd", "nothing": "sgd"}
    parts = {"ours": optim.lion(1e-3), "sgd": optax.sgd(0.1)}
    split = optim.state_bytes(optax.partition(parts, labels), PARAMS)
    assert split.fields == {
        "inner_states.ours.inner_state.count": 4,
        "inner_states.ours.inner_state.mu": 4 * (SIZE - 1),
    }
    assert split.parameters["scale"] == 0
    alone = optim.state_bytes(optim.sgdp(0.1, 0.9), jnp.ones((3, 4)))
    assert alone.fields == {"count": 4, "momentum": 48}
    assert optim.state_bytes(optax.sgd(0.1), PARAMS) == (
        0, {}, dict.fromkeys(narrow.parameters, 0)
    )  # fmt: skip


def test_keys_are_counted() -> None:
    def init(params: Any) -> Any:
        del params
        return {"key": jax.random.key(0)}

    solver = optax.GradientTransformation(init, lambda u, s, p=None: (u, s))
    assert optim.state_bytes(solver, {}).fields == {"key": 8}


def test_nothing_is_allocated() -> None:
    """Sixty-four tebibytes would not fit."""
    shape = jax.ShapeDtypeStruct((2**22, 2**22), jnp.float32)
    assert optim.state_bytes(optim.adamp(1e-3), {"w": shape}).fields["mu"] == 2**46
