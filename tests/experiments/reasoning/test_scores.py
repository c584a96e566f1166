"""pass@k, best of k, majority votes and advantages against slow ones and published numbers."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from experiments.reasoning.scores import (
    ADVANTAGES,
    dr_grpo,
    grpo,
    majority_at_k,
    max_at_k,
    pass_at_k,
    rloo,
)


@pytest.mark.parametrize(("samples", "k"), [(5, 1), (5, 2), (5, 5), (6, 3)])
def test_pass_and_best_of_k_are_means_over_all_groups(samples: int, k: int) -> None:
    rewards = np.random.default_rng(0).integers(0, 2, (4, 3, samples)).astype(np.float32)
    groups = list(itertools.combinations(range(samples), k))
    right = np.mean([rewards[..., list(group)].max(-1) for group in groups], axis=0)
    found = jax.jit(pass_at_k, static_argnums=(1, 2))(rewards.sum(-1).astype(int), samples, k)
    np.testing.assert_allclose(found, right, atol=1e-6)
    np.testing.assert_allclose(max_at_k(rewards, k), right, atol=1e-6)
    values = np.random.default_rng(1).normal(size=(7, samples)).astype(np.float32)
    right = np.mean([values[:, list(group)].max(-1) for group in groups], axis=0)
    np.testing.assert_allclose(jax.jit(max_at_k, static_argnums=1)(values, k), right, atol=1e-6)


def test_pass_at_k_of_many_samples_does_not_overflow() -> None:
    found = pass_at_k(np.array([0, 1, 100, 1901, 2000]), samples=2000, k=100)
    np.testing.assert_allclose(found, [0, 0.05, 0.994826, 1, 1], atol=1e-4)


def test_best_of_k_of_an_unknown_reward_is_unknown() -> None:
    found = np.asarray(max_at_k(np.array([[1.0, np.nan], [1.0, 2.0]]), 2))
    np.testing.assert_array_equal(found, [np.nan, 2.0])


@pytest.mark.parametrize("k", [0, 4])
def test_k_is_at_most_the_samples(k: int) -> None:
    words = f"k must be from 1 to the 3 samples, got {k}"
    calls: list[Callable[[], Any]] = [
        lambda: pass_at_k(np.array([1]), 3, k),
        lambda: max_at_k(np.zeros(3), k),
        lambda: majority_at_k(["1"] * 3, [True] * 3, k),
    ]
    for one in calls:
        with pytest.raises(ValueError, match=words):
            one()


def test_majority() -> None:
    answers, correct = ["a", "b", "b", "a", None, None, None], [False, True, True] + [False] * 4
    assert majority_at_k(answers, correct) == 0.0  # as many votes: the first seen
    assert majority_at_k(answers, correct, k=3) == 1.0
    assert majority_at_k(answers, correct, k=1) == 0.0
    assert majority_at_k([None, None], [False, False]) == 0.0


def test_advantages_are_the_published_ones() -> None:
    rewards = np.array([[1.0, 0, 0, 1, 0, 0, 0, 0], [3, 3, 3, 3, 3, 3, 3, 3]], np.float32)
    found = jax.jit(grpo)(rewards)
    np.testing.assert_allclose(found[0, :2], [1.620182, -0.540061], atol=2e-6)
    np.testing.assert_allclose(dr_grpo(rewards)[0, :2], [0.75, -0.25])
    # Those of the others: one right of seven, two right of seven.
    np.testing.assert_allclose(rloo(rewards)[0, :2], [1 - 1 / 7, -2 / 7], atol=1e-6)
    for advantage in ADVANTAGES.values():
        np.testing.assert_array_equal(advantage(rewards)[1], 0)
        np.testing.assert_allclose(advantage(rewards).sum(-1), 0, atol=1e-5)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_unknown_rewards_are_left_out_of_their_group(name: str) -> None:
    advantage = ADVANTAGES[name]
    some = np.array([1.0, np.nan, 0.0, np.nan, 0.5])
    found = np.asarray(advantage(some))
    np.testing.assert_allclose(found[[0, 2, 4]], advantage(some[[0, 2, 4]]), atol=1e-6)
    np.testing.assert_array_equal(found[[1, 3]], 0)
    np.testing.assert_array_equal(advantage(np.array([np.nan, 7.0])), 0)
    np.testing.assert_array_equal(advantage(np.array([np.nan, np.nan])), 0)
