"""Optimizers are found by name, in optax and in optim; a wrong name gets its neighbours."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optim
from experiments.run.errors import UsageError
from experiments.run.optimizers import make_optimizer

PARAMS = {"w": jnp.ones((2, 3))}
GRADS = {"w": jnp.arange(6.0).reshape(2, 3)}


@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("sgd", optax.sgd(0.1)), ("adamw", optax.adamw(0.1)), ("optim.lion", optim.lion(0.1)),
        ("optim.lion_k", optim.lion_k(0.1)), ("optim.adamp", optim.adamp(0.1)), ("optim.sgdp", optim.sgdp(0.1)),
    ],
)  # fmt: skip
def test_a_name_is_the_optimizer_with_its_defaults(
    name: str, right: optax.GradientTransformation
) -> None:
    found = make_optimizer(name, 0.1)
    a, _ = found.update(GRADS, found.init(PARAMS), PARAMS)
    b, _ = right.update(GRADS, right.init(PARAMS), PARAMS)
    np.testing.assert_array_equal(a["w"], b["w"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("adm", "optax has no such optimizer; did you mean 'adam'"),
        ("optim.lyon", "optim has no such optimizer; did you mean 'lion'"),
        # Neither an optimizer, although optax has it ...
        ("chain", "optax has no such optimizer"),
        ("scale_by_adam", "optax has no such optimizer"),
        # ... nor of a package that is looked in.
        ("os.system", "--optimizer os.system"),
    ],
)
def test_other_names_are_refused(name: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make_optimizer(name, 0.1)
