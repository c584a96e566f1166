"""Models whose weights are divided over devices: what is where, and that results are those of one device."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from runs import state_of

from experiments.reasoning import engine
from experiments.reasoning.config import PRESETS
from experiments.reasoning.memory import plan_memory
from experiments.reasoning.sampling import Sampling
from experiments.reasoning.sequences import pack
from experiments.reasoning.train import Reasoning
from experiments.run.fields import changed
from experiments.run.metrics import read_metrics
from experiments.run.train import train

# Two heads, of both families; scores of worked solutions, which differ by every member's noise.
SMALL = changed(PRESETS["tiny"], width=64, layers=2, fitness="likelihood", optimizer="adam")
SHARED = dict(devices=4, tensor_parallel=2)


def shards(tree: Any) -> dict[str, tuple[int, ...]]:
    """Shapes on one device, by path."""
    return {
        jax.tree_util.keystr(keys, simple=True, separator="/"): x.sharding.shard_shape(x.shape)
        for keys, x in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        pytest.param(dict(model="rwkv7"), marks=pytest.mark.soak),
        pytest.param(dict(quantised=True, rank=2), marks=pytest.mark.soak),
        pytest.param(dict(rank="full"), marks=pytest.mark.soak),
    ],
)
def test_a_run_is_that_of_one_device_whatever_shares_its_weights(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    settings = dict(optimizer="sgd", learning_rate=1e-4, checkpoint_seconds=0.0, evaluate_every=2)
    config = changed(SMALL, **settings, **changes)
    train(changed(config, generations=3, run_dir=tmp_path / "alone"))
    shared = changed(config, run_dir=tmp_path / "shared")
    train(changed(shared, generations=1, **SHARED))
    train(changed(shared, generations=3, devices=8, tensor_parallel=4))
    rows = [read_metrics(tmp_path / x / "metrics.jsonl") for x in ("alone", "shared")]
    told = [[row["fitness_mean"] for row in one] for one in rows]
    np.testing.assert_allclose(*told, rtol=1e-4)
    began = Reasoning(config).start().learner
    states = (*(state_of(tmp_path / x).learner for x in ("alone", "shared")), began)
    most = 0.0
    for a, b, first in zip(*map(jax.tree.leaves, states), strict=True):
        # Copies that are the same but for rounding may be rounded to neighbours in int8.
        apart, moved = (np.abs(np.float32(a) - np.float32(x)).max() for x in (b, first))
        assert apart <= (1 if a.dtype == np.int8 else 0.01 * moved)
        most = max(most, moved)
    assert most > 0.01


@pytest.mark.parametrize("model", ["transformer", pytest.param("rwkv7", marks=pytest.mark.soak)])
def test_devices_hold_their_part_of_weights_and_caches(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = changed(SMALL, model=model, width=64 if model == "transformer" else 128)
    shared, alone = (Reasoning(changed(config, **changes)) for changes in (SHARED, {}))
    state, whole = (c.start().learner for c in (shared, alone))
    held, right = shards(state), shards(whole)
    large = {path for path, shape in right.items() if np.prod(shape) >= 2 * config.width**2}
    assert len(large) > 15 and {path.split("/")[0] for path in large} == {"params", "optimizer"}
    for path in large:
        assert np.prod(held[path]) == np.prod(right[path]) / 2, path
    copies = Reasoning(changed(config, quantised=True, **SHARED)).learner.sharding.master
    assert copies and all("model" in where.spec for where in copies.values())

    rule, prompts = Sampling(max_new_tokens=5), pack([[1, 2], [3]])
    plans, written, caches = [], [], []
    inner = engine._call

    def call(*args: Any) -> Any:
        out = inner(*args)
        caches.append(out[0].cache)
        return out

    monkeypatch.setattr(engine, "_call", call)
    for c, s in ((shared, state), (alone, whole)):
        es, model_ = c.learner.es, c.base.model
        plans.append(plan_memory(model_, es, s.params, 8, 2, 2, rule, 2**30))
        written.append(engine.answer(model_, es, s, prompts, rule, c.base.tokenizer.eos))
    np.testing.assert_array_equal(written[0].tokens, written[1].tokens)
    assert plans[0].weights < 0.8 * plans[1].weights
    assert plans[0].training < 0.6 * plans[1].training
    assert plans[0].cache < 0.6 * plans[1].cache
    # As planned: on each device half of the heads of half of the members.
    for cache in caches[:2]:
        own = sum(
            x.itemsize * np.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(cache)
        )
        assert own == plans[0].cache * 4 * 2
