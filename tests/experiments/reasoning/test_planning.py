"""`--only` and `--sigma-scale`: which parameters evolve, and at which sigma."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import state_of

pytest.importorskip("tokenizers")

import eggroll
from experiments.reasoning.config import PRESETS, Config
from experiments.reasoning.evolution import in_noise_units, strategy
from experiments.reasoning.planning import planner_of
from experiments.reasoning.start import start
from experiments.run.errors import UsageError
from experiments.run.fields import changed
from experiments.run.train import train

TINY = PRESETS["tiny"]


def settings(**changes: Any) -> Config:
    return changed(TINY, {"layers": 3, "seed": 1, **changes})


def plan_of(config: Config) -> eggroll.plan.Plan:
    base = start(config)
    return strategy(config, base).plan_of(base.params(jnp.int32(config.seed)))


def test_sigma_is_relative_to_each_matrix() -> None:
    config = settings(sigma_scale="rms")
    params = start(config).params(jnp.int32(1))
    leaf = plan_of(config)["layers/q_proj"]
    w = np.asarray(params["layers"]["q_proj"], np.float64)
    np.testing.assert_allclose(np.ravel(leaf.scale), np.sqrt(np.mean(w**2, axis=(1, 2))), rtol=1e-3)
    same = plan_of(settings())["layers/q_proj"]
    assert same.scale == 1.0


def test_two_starts_have_the_same_factors_and_another_seed_others() -> None:
    first, again, other = (
        plan_of(settings(sigma_scale="rms", seed=seed))["layers/up_proj"].scale
        for seed in (1, 1, 2)
    )
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_one_learning_rate_moves_every_matrix_by_the_same_share() -> None:
    config = settings(sigma_scale="rms", sigma=0.1, optimizer="sgd", learning_rate=0.01)
    plain = start(settings(sigma=0.1))

    def unequal(seed: jax.Array) -> Any:
        """New models have one size for all matrices, which one sigma fits."""
        params = plain.params(seed)
        layers = params["layers"]
        return {**params, "layers": {**layers, "up_proj": 8 * layers["up_proj"]}}

    plan = planner_of(config, plain.model.plan, unequal)
    base = plain._replace(params=unequal, model=plain.model._replace(plan=plan))
    es = strategy(config, base)
    state = es.init(base.params(jnp.int32(1)), 0)
    new, _ = es.update(state, jax.random.normal(jax.random.key(0), (8, 4)))
    shares = []
    for name in ("q_proj", "up_proj", "down_proj"):
        before, after = (np.asarray(x.params["layers"][name], np.float64) for x in (state, new))
        rms = lambda x: np.sqrt(np.mean(x**2, axis=(1, 2)))
        shares += list(rms(after - before) / rms(before))
    assert max(shares) < 2.5 * min(shares)


def test_noise_units_by_slices_are_those_of_each_slice() -> None:
    sigma = np.array([2.0, 4.0]).reshape(2, 1)
    rule = in_noise_units(optax.sgd(1.0), {"w": sigma, "frozen": 0.0})
    w = {"w": jnp.ones((2, 3))}
    update, _ = rule.update(w, rule.init(w), w)
    np.testing.assert_allclose(update["w"], -(sigma**2) * np.ones((2, 3)))


@pytest.mark.parametrize(
    ("patterns", "paths"),
    [
        (("q_proj",), {"layers/q_proj"}),
        (
            ("layers/?_proj", "down_proj"),
            {f"layers/{n}_proj" for n in ("q", "k", "v", "o", "down")},
        ),
        (("layers",), None),
    ],
)
def test_parameters_by_name(patterns: tuple[str, ...], paths: set[str] | None) -> None:
    whole = {leaf.path for leaf in plan_of(settings()).leaves if leaf.trainable}
    found = {leaf.path for leaf in plan_of(settings(only=patterns)).leaves if leaf.trainable}
    assert found == (whole if paths is None else paths)


def test_parameters_by_name_of_a_model_in_int8() -> None:
    leaves = plan_of(settings(quantised=True, only=("q_proj",))).leaves
    assert {leaf.path for leaf in leaves if leaf.trainable} == {
        "layers/q_proj/int8",
        "layers/q_proj/scale",
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(only=("qproj",)), "--only: pattern 'qproj': must match a parameter, such as 'layers/q_proj'"),
        (dict(only=("embed_tokens",)), "--only embed_tokens: must match a parameter that is trained"),
        (dict(only=("q_proj",), algorithm="sft"), "--only: it is about noise"),
        (dict(sigma_scale="rms", algorithm="sft"), "--sigma-scale: it is about noise"),
        (dict(sigma_scale="rms", quantised=True), "--sigma-scale rms: the noise of --quantised"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence_before_training(changes: dict[str, Any], words: str) -> None:
    config = settings(**changes)
    with pytest.raises(UsageError, match=words):
        config.check()
        start(config)


def test_a_run_trains_what_it_names_alone_and_goes_on(tmp_path: Path) -> None:
    changes = dict(
        only=("q_proj",),
        sigma_scale="rms",
        fitness="likelihood",
        sigma=0.3,
        learning_rate=0.1,
        checkpoint_seconds=0.0,
    )
    whole, parts = (settings(run_dir=tmp_path / name, **changes) for name in ("whole", "parts"))
    train(whole)
    train(changed(parts, generations=1))
    train(parts)
    states = [state_of(config.run_dir) for config in (whole, parts)]
    for a, b in zip(*(jax.tree.leaves(state) for state in states), strict=True):
        np.testing.assert_array_equal(a, b)
    first, last = start(whole).params(jnp.int32(1))["layers"], states[0].learner.params["layers"]
    moved = {name for name in first if not np.array_equal(first[name], last[name])}
    assert moved == {"q_proj"}


def test_members_are_divided_over_subspaces(tmp_path: Path) -> None:
    config = settings(subspaces=2, population=8, run_dir=tmp_path, generations=1)
    base = start(config)
    es = strategy(config, base)
    state = es.init(base.params(jnp.int32(1)), 0)
    moved = es.ask(state, [0, 2])["layers"]["up_proj"] - state.params["layers"]["up_proj"]
    # Pairs 0 and 1 are in one half each.
    assert np.all((moved[0] != 0) ^ (moved[1] != 0))
    assert train(config).generations == 1
    with pytest.raises(
        UsageError, match="--subspaces 3: must divide the 4 pairs of --population 8"
    ):
        settings(subspaces=3, population=8).check()
    with pytest.raises(UsageError, match="--subspaces: it is about noise"):
        settings(subspaces=2, algorithm="sft").check()
