"""Diagnostics of populations whose state is known."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.reasoning.diagnostics import (
    changed_fraction,
    identical_pairs,
    no_signal,
    samples,
    spread,
    summary,
    visible,
    wrapped,
)

NAN = float("nan")
# Four members, five prompts: all right, all wrong, one right, one known, none known.
REWARDS = np.array(
    [[1, 0, 0, NAN, NAN], [1, 0, 1, 1, NAN], [1, 0, 0, NAN, NAN], [1, 0, NAN, NAN, NAN]]
)


def test_the_spread_is_within_prompts_and_not_between() -> None:
    # Deviations 0, 0 and that of (0, 1, 0).
    assert spread(REWARDS) == pytest.approx(np.std([0, 1, 0], ddof=1) / 3)
    assert no_signal(REWARDS) == 4 / 5
    assert np.isnan(spread(REWARDS[:, 3:]))
    assert no_signal(REWARDS[:, 2:3]) == 0


def test_a_summary_of_everything() -> None:
    texts = [["a", "b", "", "d", "e"]] * 2 + [list("abcde"), list("abcdx")]
    form = np.where(np.isnan(REWARDS), NAN, 1.0)
    lengths = np.arange(20).reshape(4, 5)
    ended = lengths < 15
    row = summary(
        REWARDS, texts, {"format": form, "exact": REWARDS}, lengths, ended, jnp.full((4, 5), 0.25)
    )
    assert row == {
        "reward_mean": pytest.approx(6 / 12),
        "reward_spread": spread(REWARDS),
        "no_signal": 4 / 5,
        "unknown_rewards": 8 / 20,
        "reward_format": 1.0,
        "reward_exact": pytest.approx(6 / 12),
        "identical_pairs": 9 / 10,
        "length": 9.5,
        "ended": 0.75,
        "entropy": 0.25,
    }
    assert {type(value) for value in row.values()} == {float}


def test_a_summary_of_nothing_known_does_not_warn() -> None:
    row = summary(np.full((2, 2), NAN, np.float32))
    assert np.isnan(row["reward_mean"]) and np.isnan(row["reward_spread"])
    assert (row["no_signal"], row["unknown_rewards"]) == (1, 1)
    assert set(row) == {"reward_mean", "reward_spread", "no_signal", "unknown_rewards"}


def test_pairs_are_neighbours_and_write_tokens_or_text() -> None:
    assert identical_pairs([["a"], ["b"], ["b"], ["a"]]) == 0
    assert identical_pairs([[[1, 2], [3]], [[1, 2], [3, 4]]]) == 0.5
    with pytest.raises(ValueError, match="the population must be even, got 3"):
        identical_pairs([["a"], ["a"], ["a"]])


def test_most_of_a_small_update_is_lost_to_rounding() -> None:
    wide = jax.random.normal(jax.random.key(0), (100, 100))
    before = {
        "w": wide.astype(jnp.bfloat16),
        "scale": jnp.ones(100),
        "frozen": jnp.zeros(7, jnp.int8),
    }
    step = lambda size: {
        **before,
        "w": (before["w"].astype(jnp.float32) + size).astype(jnp.bfloat16),
        "scale": before["scale"] + size,
    }
    # Changed where half of the last place, 2^(exponent - 8), is less than the step.
    size = 1.1 * 2.0**-10
    exponent = np.floor(np.log2(np.abs(np.asarray(before["w"], np.float32))))
    share = changed_fraction(before, step(size), jnp.bfloat16)
    assert share == pytest.approx(np.mean(2 ** (exponent - 8) < size), abs=0.01)
    assert 0.3 < share < 0.45
    assert changed_fraction(before, step(size), jnp.float32) == 1
    assert changed_fraction(before, step(size)) == pytest.approx((10_000 * share + 100) / 10_107)
    assert changed_fraction(before, before) == 0
    assert np.isnan(changed_fraction(before, before, jnp.float16))


def test_other_shapes_are_named() -> None:
    words = r"layers/up_proj has the shape \(3,\) before and \(4,\) after"
    with pytest.raises(ValueError, match=words):
        changed_fraction({"layers": {"up_proj": jnp.ones(3)}}, {"layers": {"up_proj": jnp.ones(4)}})


HOSTILE = "\x1b[31mred\r\n\u202eleft\x00\x07\u200b\ud800\u2028end"


def test_nothing_that_a_model_writes_moves_the_cursor() -> None:
    shown = visible(HOSTILE)
    assert shown.isprintable() and shown.encode()
    assert shown == r"\x1b[31mred\r\n\u202eleft\x00\x07\u200b\ud800\u2028end"
    rows: list[dict[str, Any]] = [
        {"reward": None, "text": HOSTILE * 1000},
        {"reward": 1.0, "text": "4"},
    ]
    lines = samples(rows, width=30).split("\n")
    assert all(line.isprintable() and len(line) <= 38 for line in lines)
    assert lines[1].startswith("None    \\x1b[31mred") and lines[-1] == "1.0     4"
    # Nothing is left out.
    assert "".join(line[8:] for line in lines[1:-1]) == visible(HOSTILE * 1000)
    assert samples([]) == ""
    with pytest.raises(ValueError, match="width must be at least 3, got 2"):
        samples(rows, width=2)


@pytest.mark.parametrize("width", [3, 4, 9, 10])
def test_a_wrapped_text_is_whole_and_no_wider(width: int) -> None:
    text = "so it is  2 + 2 = 4, which-is-long"
    lines = wrapped(text, width)
    assert "".join(lines) == text and max(map(len, lines)) <= width
    assert wrapped("", width) == [""]
