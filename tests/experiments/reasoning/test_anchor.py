"""The anchor by both norms against what they minimise, and the drift that is told, in evolution and GRPO."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.reasoning.anchor import AnchorState, anchored, drift_of
from experiments.reasoning.config import PRESETS
from experiments.run.fields import changed
from experiments.run.metrics import read_metrics
from experiments.run.train import train

START = {"w": jnp.array([1.0, 2.0, -3.0, 0.5]), "b": jnp.array([0.25])}


def stepped(rule: optax.GradientTransformation, updates: Any, params: Any) -> tuple[Any, Any]:
    updates, state = rule.update(updates, rule.init(START), params)
    return optax.apply_updates(params, updates), state


def test_l2_goes_a_share_of_the_way_back() -> None:
    moved = {"w": jnp.array([3.0, 2.0, -3.0, 0.5]), "b": jnp.array([0.25])}
    after, _ = stepped(anchored(0.25), jax.tree.map(jnp.zeros_like, moved), moved)
    assert after["w"].tolist() == [2.5, 2.0, -3.0, 0.5] and after["b"].tolist() == [0.25]


@given(st.lists(st.floats(-2, 2, width=32), min_size=4, max_size=4), st.floats(0.01, 1))
def test_l1_is_the_proximal_step(way: list[float], rate: float) -> None:
    """Nothing is lower in |x - start| rate + (x - stepped)^2 / 2 than where it comes to."""
    update = {"w": jnp.array(way, jnp.float32), "b": jnp.zeros(1)}
    after, state = stepped(anchored(rate, "l1"), update, START)
    x, a = np.asarray(after["w"], np.float64), np.asarray(START["w"], np.float64)
    target = a + np.asarray(update["w"], np.float64)
    value = lambda x: rate * np.abs(x - a) + (x - target) ** 2 / 2
    for other in (x + 1e-3, x - 1e-3, a, target):
        assert (value(x) <= value(other) + 1e-5).all()
    # A step that is below the rounding of its weight is counted, and does nothing.
    least, most = (x != a).sum() / 5, (np.abs(target - a) > rate - 1e-6).sum() / 5
    assert least - 1e-6 <= float(state.moved) <= most + 1e-6


def test_the_drift_is_the_way_from_the_start() -> None:
    way = {"w": jnp.array([0.3, 0.0, -0.4, 0.0]), "b": jnp.zeros(1)}
    _, state = stepped(anchored(0.0), way, START)
    size = np.sqrt(1 + 4 + 9 + 0.25 + 0.0625)
    found = drift_of((optax.EmptyState(), state))
    np.testing.assert_allclose(found["drift"]["relative"], 0.5 / size, rtol=1e-6)
    assert float(found["drift"]["moved"]) == pytest.approx(0.4)
    assert drift_of(optax.adam(0.1).init(START)) == {}
    assert isinstance(anchored(0.1).init(START), AnchorState)


@pytest.mark.parametrize("algorithm", ["eggroll", "sft"])
@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_a_run_tells_its_drift_and_stays_nearer(algorithm: str, norm: str, tmp_path: Path) -> None:
    own: dict[str, Any] = dict(
        algorithm=algorithm, optimizer="sgd", generations=3, evaluate_every=3
    )
    if algorithm == "eggroll":
        own |= dict(fitness="likelihood", learning_rate=1e-4)
    else:
        own |= dict(learning_rate=0.1)

    def drifts(anchor: float) -> list[dict[str, float]]:
        folder = tmp_path / f"{anchor}"
        config = changed(
            PRESETS["tiny"], dict(own, anchor=anchor, anchor_norm=norm, run_dir=folder)
        )
        train(config)
        return [row["drift"] for row in read_metrics(folder / "metrics.jsonl")]

    # By L1 a step is learning_rate times the anchor, in units of weights.
    strong = 0.3 / own["learning_rate"] if norm == "l2" else 1e-3 / own["learning_rate"]
    loose, tight = drifts(1e-6), drifts(strong)
    assert 0 < tight[-1]["relative"] < 0.9 * loose[-1]["relative"]
    if norm == "l1":
        assert tight[-1]["moved"] < 0.9 * loose[-1]["moved"]
