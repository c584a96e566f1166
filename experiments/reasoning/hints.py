"""What the first generation of a run already says of settings that cannot be right, a sentence each."""

import math
from collections.abc import Mapping
from typing import Any

from experiments.reasoning.config import Config

# Largest share of completions that `exact` may take for right if the reward takes none.
EXACT = 0.2
# Largest share of pairs whose members may write the same.
IDENTICAL = 0.9


def hints(row: Mapping[str, Any], config: Config) -> list[str]:
    """Sentences about a row of metrics, each with the flag to change.

    Args:
        row: of generation 0.
        config: the settings.

    Example:
        >>> from experiments.reasoning.config import PRESETS
        >>> hints({"ended": 1.0, "identical_pairs": 0.95, "reward_best": 1.0}, PRESETS["tiny"])
        ['95% of pairs wrote the same: raise --sigma above 0.01 (eggroll probe finds a value)']
    """
    found, value = [], lambda name: row.get(name, math.nan)
    if value("reward_best") <= 0 and value("exact_answers") > EXACT:
        own = f"--reward {config.rewards.reward}" if config.rewards.reward else "the task's reward"
        found.append(
            f"{own} takes every answer for wrong, although {value('exact_answers'):.0%} give the right one "
            "as a number or in words: try --reward exact"
        )
    if value("ended") == 0:
        longest = config.writing.max_new_tokens
        found.append(
            f"no answer ended within --max-new-tokens {longest}: raise it, or let answers end (--chat, "
            "--stop)"
        )
    if value("identical_pairs") > IDENTICAL and config.algorithm == "eggroll":
        found.append(
            f"{value('identical_pairs'):.0%} of pairs wrote the same: raise --sigma "
            f"above {config.evolution.sigma:g} (eggroll probe finds a value)"
        )
    return found
