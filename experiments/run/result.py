"""The result of a run, of any driver: result.json."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run came to; figures of several seeds are averaged.

    Attributes:
        sentence: in words.
        learned: whether the target was reached on data that decided nothing, by all seeds; None without one.
        generations: updates made.
        parameters: numbers that were trained, of one seed.
        by_seed: the driver's figure of every seed; None where there is one.
        timing: seconds of every phase.
        figures: held-out figures of the last state, the same "_before" training, the driver's figure of fresh
            data, totals of the run, and what else the driver tells, by their names in result.json.

    Example:
        >>> done = Result(sentence="Learned.", learned=None, generations=3, parameters=10, by_seed=None,
        ...     timing={}, figures={"held_out_loss": 0.5})
        >>> done["held_out_loss"], done["generations"]
        (0.5, 3)
    """

    sentence: str
    learned: bool | None
    generations: int
    parameters: int
    by_seed: list[float] | None
    timing: Mapping[str, float]
    figures: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        """A value of result.json."""
        return self.to_json()[name]

    def to_json(self) -> dict[str, Any]:
        """result.json: the figures and the rest, in one object."""
        return {
            **self.figures,
            "learned": self.learned,
            "by_seed": self.by_seed,
            "parameters": self.parameters,
            "generations": self.generations,
            "sentence": self.sentence,
            "timing": dict(self.timing),
        }
