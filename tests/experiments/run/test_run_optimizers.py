"""Optimizers are found by name, in optax and in optim; a wrong name gets its neighbours."""

import inspect
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optim
from experiments.optimizers.methods import STUDIES, config_of, methods_of
from experiments.run.drivers import find_driver
from experiments.run.errors import UsageError
from experiments.run.fields import changed
from experiments.run.optimizers import (
    check_optimizer,
    decayed,
    find_optimizer,
    make_optimizer,
    optimizers,
    signature_of,
)

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


NAMES = [*optimizers("optax"), *(f"optim.{name}" for name in optimizers("optim"))]


def works(name: str, rate: object) -> bool:
    """Whether a driver can use an optimizer: gradients, a state and parameters are all it gets."""

    def step(params: object) -> object:
        # Not `make_optimizer`: it is asked for what is refused as well.
        optimizer = find_optimizer(name)(rate)
        return optimizer.update(params, optimizer.init(params), params)

    try:
        jax.eval_shape(step, {"w": jnp.ones((4, 3)), "b": jnp.ones(3)})
    except (TypeError, ValueError):
        return False
    return True


# optax deprecates some; they work.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Specifying a key:UserWarning")
@pytest.mark.parametrize("name", NAMES)
def test_an_optimizer_is_refused_where_no_driver_could_use_it(name: str) -> None:
    for rate in (0.1, decayed(0.1, 0.5)):
        if works(name, rate):
            check_optimizer(name, scheduled=callable(rate))
        else:
            with pytest.raises(UsageError, match=f"--optimizer {name}: .*; choose another one"):
                check_optimizer(name, scheduled=callable(rate))


@pytest.mark.parametrize("package", [optax, optim])
def test_the_names_in_the_source_are_those_of_the_package(package: ModuleType) -> None:
    there = {
        name
        for name, found in vars(package).items()
        if inspect.isfunction(found) and name[0] != "_" and not name.startswith("scale_by")
        # Under their own name, and with the learning rate in front.
        if found.__name__ == name
        and [*inspect.signature(found).parameters][:1] == ["learning_rate"]
    }
    assert set(optimizers(package.__name__)) == there
    for name in there:
        parameters = inspect.signature(getattr(package, name)).parameters
        prefix = "" if package is optax else "optim."
        assert set(signature_of(prefix + name).names) == set(parameters) - {"learning_rate"}


@pytest.mark.parametrize("driver", ["rl", "pretrain", "reasoning", "supervised", "optimizers"])
@pytest.mark.parametrize("name", ["adm", "lbfgs", "contrib.muon", "optim.lyon"])
def test_every_driver_checks_its_optimizer(driver: str, name: str) -> None:
    for preset in find_driver(driver).presets.values():
        with pytest.raises(UsageError, match=f"--optimizer {name}: "):
            changed(preset, optimizer=name).check()


def test_a_rate_that_falls_is_refused_where_the_optimizer_has_one_rate() -> None:
    config = changed(find_driver("rl").presets["cartpole"], optimizer="rprop")
    config.check()
    with pytest.raises(UsageError, match="rprop: its learning rate is the same in every step"):
        changed(config, {"learning_rate_decay": 0.9}).check()
    changed(config, {"ppo.anneal": True}).check()
    with pytest.raises(UsageError, match="rprop"):
        changed(config, {"ppo.anneal": True}, algorithm="ppo").check()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"optimizer": "adam", "momentum": 0.9}, "--momentum 0.9: adam has no such setting"),
        ({"optimizer": "optim.frugal", "scale": 0.5}, "--scale 0.5: optim.frugal has no such"),
        ({"optimizer": "sgd", "weight_decay": 0.1}, "--weight-decay 0.1: sgd has no weight decay"),
        ({"optimizer": "optim.badam", "density": 0.0}, "--density 0.0: optim.badam needs a share above 0"),
        ({"kappa": "l3"}, "--kappa l3: there is no such function"),
        ({"optimizer": "optim.lion_k", "kappa": "l2:3"}, "must be none; leave it out"),
        ({"optimizer": "optim.lion_k", "kappa": "huber:nan"}, "must be a positive number"),
        ({"optimizer": "optim.lion_k", "kappa": "_norm:2"}, "there is no such function"),
    ],
)  # fmt: skip
def test_a_setting_that_the_optimizer_does_not_have_is_refused(
    settings: dict[str, object], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        changed(find_driver("optimizers").presets["lm"], settings).check()


def test_every_method_of_the_study_is_right() -> None:
    for base in STUDIES.values():
        for name in methods_of(base):
            config_of(base, name, 0.01, 0, Path("study")).check()


@pytest.mark.parametrize(("density", "given"), [(0.0, 0.0), (1.0, 1.0)])
def test_frugal_may_have_all_or_none_of_a_matrix(density: float, given: float) -> None:
    config = changed(
        find_driver("optimizers").presets["lm"], optimizer="optim.frugal", density=density
    )
    config.check()
    assert config.optimizer.arguments(config.width, config.depth)["density"] == given
