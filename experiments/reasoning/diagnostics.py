"""What tells early whether a population of language models learns, and from what.

Reward may rise by the format alone, most questions may say nothing since all members agree, the members of
a pair may write the same text, and most of an update may be lost to rounding: each has its number here.
"""

import itertools
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer, PyTree

from experiments.reasoning.rewards import exact

Table = Float[Array | np.ndarray, "population prompts"]
Texts = Sequence[Sequence[Any]]


def summary(
    rewards: Table,
    completions: Texts | None = None,
    parts: Mapping[str, Table] | None = None,
    lengths: Integer[Array | np.ndarray, "population prompts"] | None = None,
    ended: Bool[Array | np.ndarray, "population prompts"] | None = None,
    entropies: Table | None = None,
) -> dict[str, float]:
    """A row of metrics; what is not given is not told.

    Args:
        rewards: NaN for those that are not known.
        completions: ``[population, prompts]``, text or tokens; members 2p and 2p + 1 are a pair.
        parts: the rewards that these are summed from, such as format and correctness, by name.
        lengths: tokens of each completion.
        ended: whether a completion ended by itself.
        entropies: mean over each completion's tokens.

    Example:
        >>> rewards = np.array([[1.0, 0.0, 0.5], [1.0, 1.0, np.nan]])
        >>> for name, value in summary(rewards, [["a", "b", "c"], ["a", "d", "c"]],
        ...                            ended=np.array([[True, True, False], [True, True, True]])).items():
        ...     print(f"{name} {value:.3f}")
        reward_mean 0.700
        reward_spread 0.354
        no_signal 0.667
        unknown_rewards 0.167
        identical_pairs 0.667
        ended 0.833
    """
    row = {
        "reward_mean": known_mean(rewards),
        "reward_spread": spread(rewards),
        "no_signal": no_signal(rewards),
        "unknown_rewards": known_mean(np.isnan(rewards)),
    }
    row |= {f"reward_{name}": known_mean(part) for name, part in (parts or {}).items()}
    if completions is not None:
        row["identical_pairs"] = identical_pairs(completions)
    others = {"length": lengths, "ended": ended, "entropy": entropies}
    return row | {name: known_mean(table) for name, table in others.items() if table is not None}


def of_rewards(
    rewards: Float[Array | np.ndarray, "..."], texts: Sequence[str], right: Sequence[str]
) -> dict[str, float]:
    """What tells a reward that takes all for wrong from a model that is always wrong, for a row of metrics.

    Args:
        rewards: in any shape, NaN for those that are not known.
        texts: the completions.
        right: the right answer of each.

    Returns:
        ``reward_best``: the largest reward; NaN where none is known. ``exact_answers``: share of completions
        that give the right answer as a number or in words; NaN where a reward is above 0, which tells as
        much.

    Example:
        >>> of_rewards(np.zeros((2, 1)), ["It is 18.", "so 4"], ["18", "5"])
        {'reward_best': 0.0, 'exact_answers': 0.5}
    """
    known = np.asarray(rewards, np.float64)
    known = known[~np.isnan(known)]
    best = float(known.max()) if known.size else math.nan
    asked = math.nan if best > 0 else known_mean(exact(list(texts), list(right)))
    return {"reward_best": best, "exact_answers": asked}


def spread(rewards: Table) -> float:
    """Standard deviation of the members' rewards on a prompt (ddof 1), a mean over prompts.

    Prompts with fewer than two known rewards are left out; NaN where that leaves none.

    Example:
        >>> spread(np.array([[0.0, 1.0], [2.0, 1.0]])) == 0.5**0.5
        True
    """
    return known_mean([np.std(column, ddof=1) for column in _known(rewards) if len(column) > 1])


def no_signal(rewards: Table) -> float:
    """Share of prompts on which all known rewards are equal: nothing is learned from them.

    Example:
        >>> no_signal(np.array([[0.0, 1.0], [0.0, 0.0]]))
        0.5
    """
    return known_mean([len(np.unique(column)) < 2 for column in _known(rewards)])


def identical_pairs(completions: Texts) -> float:
    """Share of pairs, members 2p and 2p + 1, that wrote the same for a prompt.

    Where it is near 1, sigma is too small for the noise to change what is written.

    Raises:
        ValueError: for an odd population.

    Example:
        >>> identical_pairs([["a", "b"], ["a", "c"]])
        0.5
    """
    if len(completions) % 2:
        raise ValueError(f"the population must be even, got {len(completions)}")
    pairs = zip(completions[::2], completions[1::2], strict=True)
    return known_mean([np.array_equal(*both) for pair in pairs for both in zip(*pair, strict=True)])


def changed_fraction(before: PyTree, after: PyTree, dtype: Any = None) -> Any:
    """Share of entries that an update has changed.

    Of bfloat16 parameters few entries change in a small update, the others lose it to rounding, unless
    float32 copies collect it.

    Args:
        before: parameters.
        after: the same tree after the update.
        dtype: counts leaves of this type alone, such as ``jnp.bfloat16``.

    Returns:
        float32 scalar; NaN where nothing counts.

    Raises:
        ValueError: for trees or shapes that differ.

    Example:
        >>> before = {"w": jnp.array([1.0, 0.01], jnp.bfloat16), "b": jnp.zeros(2)}
        >>> after = jax.tree.map(lambda x: (x + 0.001).astype(x.dtype), before)
        >>> print(changed_fraction(before, after, jnp.bfloat16), changed_fraction(before, after))
        0.5 0.75
    """
    changed, size = [], 0

    def count(path: Any, old: Any, new: Any) -> None:
        nonlocal size
        if old.shape != new.shape:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(f"{name} has the shape {old.shape} before and {new.shape} after")
        if dtype is None or old.dtype == dtype:
            changed.append(jnp.sum(old != new, dtype=jnp.float32))
            size += old.size

    jax.tree_util.tree_map_with_path(count, before, after)
    return sum(changed, jnp.float32(0)) / size if size else jnp.float32(jnp.nan)


def changed_weights(before: PyTree, after: PyTree, dtype: str | None) -> dict[str, Any]:
    """A row's `changed_fraction` of weights of a narrow type; nothing where there are none."""
    if dtype is None:
        return {}
    return {"changed_weights": changed_fraction(before, after, jnp.dtype(dtype))}


def samples(rows: Iterable[Mapping[str, Any]], width: int = 40) -> str:
    """A table of completions, or whatever else: a column for each key, at most `width` characters wide.

    What has no shape on a page (ends of lines, control and direction characters) is written as an escape.
    Longer texts go on below, whole.

    Args:
        rows: each with the same keys.
        width: of a column, 3 at least.

    Raises:
        ValueError: for a narrower column.

    Example:
        >>> print(samples([{"reward": 1.0, "completion": "2 + 2\\nis 4"},
        ...                {"reward": 0.25, "completion": "I wonder what it may be\\x1b[2J"}], width=16))
        reward  completion
        1.0     2 + 2\\nis 4
        0.25    I wonder what it
                 may be\\x1b[2J
    """
    if width < 3:
        raise ValueError(f"width must be at least 3, got {width}")
    told = list(rows)
    if not told:
        return ""
    table = [list(told[0])] + [[row[name] for name in told[0]] for row in told]
    cells = [[wrapped(visible(str(cell)), width) for cell in line] for line in table]
    widths = [max(max(map(len, cell)) for cell in column) for column in zip(*cells, strict=True)]
    lines = (
        zip(parts, widths, strict=True)
        for line in cells
        for parts in itertools.zip_longest(*line, fillvalue="")
    )
    return "\n".join("  ".join(cell.ljust(size) for cell, size in line).rstrip() for line in lines)


def visible(text: str) -> str:
    r"""Characters that do not print as their escapes; all of them stand in one line then.

    Example:
        >>> print(visible("a\tb\x00 é \u202e"))
        a\tb\x00 é \u202e
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def wrapped(text: str, width: int) -> list[str]:
    """A text in lines of `width` characters, which end at spaces where there are some. Nothing is left out.

    Example:
        >>> wrapped("a long text with an answer: 4", 11)
        ['a long text', ' with an ', 'answer: 4']
    """
    lines = textwrap.wrap(text, width, drop_whitespace=False, break_on_hyphens=False)
    return lines or [""]


def _known(rewards: Table) -> list[np.ndarray]:
    """The rewards of each prompt that are no NaN."""
    return [column[~np.isnan(column)] for column in np.asarray(rewards).T]


def known_mean(values: Any) -> float:
    """The mean of those that are no NaN; NaN where there are none."""
    known = np.asarray(values, np.float64)
    known = known[~np.isnan(known)]
    return float(known.mean()) if known.size else float("nan")
