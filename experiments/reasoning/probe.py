"""`eggroll probe`: what a population answers at several sigmas before a run, and the settings to take.

All sigmas are generations of one strategy whose noise stays the same, so that one program runs them. At
--temperature 0 the table compares sigmas alone. At a higher temperature tokens are drawn with other keys at
each sigma, so that the columns also differ by chance. Nothing is trained and no run folder is written.
"""

import dataclasses
import inspect
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.reasoning import probing, rewards
from experiments.reasoning.answer_noise import LEARNERS, OutputNoise, WeightNoise
from experiments.reasoning.config import Config
from experiments.reasoning.evolution import Evolution
from experiments.reasoning.examiner import Examiner
from experiments.reasoning.probing import Choice, Probed
from experiments.reasoning.questions import Questions
from experiments.reasoning.reward_values import names
from experiments.reasoning.start import Start
from experiments.reasoning.tasks import Question, columns
from experiments.run import hosts
from experiments.run.devices import Layout
from experiments.run.folder import read_config
from experiments.run.progress import Progress, part

# What rewards import beside this project.
PACKAGES = {"math": "math_verify", "gym": "reasoning_gym"}


class Probe(NamedTuple):
    """What was found before a run.

    Attributes:
        base: the model without noise.
        tried: the population, by rising sigma.
        choice: the sigma to take.
        settings: what to change in the settings for it; empty where no sigma will do.
        sentence: the choice in words.
    """

    base: Probed
    tried: Sequence[Probed]
    choice: Choice
    settings: Mapping[str, float]
    sentence: str

    def describe(self) -> str:
        """The table, and the sentence below it."""
        return f"{probing.table(self.base, self.tried)}\n\n{self.sentence}"


def probe(
    config: Config, base: Start, questions: Questions, examiner: Examiner, layout: Layout
) -> Probe:
    """Asks the questions of generation 0 at each sigma.

    Args:
        config: the settings, with the numbers of members and questions at a time.
        base: the model that training begins with.
        questions: of the task.
        examiner: rewards answers.
        layout: the devices.
    """
    sigmas = sorted(config.probing.probe_sigmas or probing.ladder(config.evolution.sigma))
    asked = questions.of_generation(0)
    # The model without noise is the first column.
    learner = _learner((0.0, *sigmas), config, base, questions, examiner, layout)
    state = learner.start(jnp.int32(config.seed))
    if learner.sharding is not None:
        state = jax.device_put(state, learner.sharding)
    found = []
    with (
        _RewardTables(config, questions, asked) as tables,
        Progress(len(sigmas) + 1, shown=hosts.first()) as progress,
    ):
        for i, sigma in enumerate((0.0, *sigmas)):
            progress.update(i, f"sigma {sigma:g}" if i else "without noise")
            began = time.perf_counter()
            one = learner.answers(state._replace(generation=jnp.int32(i)), asked, part)
            seconds = time.perf_counter() - began if i else None
            # Without noise all members are the model.
            some = slice(None) if i else slice(1)
            texts = one.texts[some]
            others = tables.of(texts, one.asked)
            ended = one.completions.ended[some]
            found.append(
                probing.probed(sigma, one.rewards[some], texts.tolist(), ended, others, seconds)
            )
    first, *tried = found
    reward = config.rewards.reward or "+".join(names(examiner.reward))
    choice = probing.choose(first, tried, reward, config.sigma_scale == "rms")
    return Probe(first, tried, choice, *_told(config, choice))


def recorded(config: Config) -> Mapping[str, float] | None:
    """The sigma and the learning rate of the run that the run folder holds; None where it has none, or one
    that is replaced."""
    if config.overwrite or not (config.run_dir / "config.json").exists():
        return None
    content: Any = read_config(config.run_dir)
    try:
        sigma, rate = content["evolution"]["sigma"], content["optimizer"]["learning_rate"]
    except (KeyError, TypeError):
        return {}  # of another driver, or damaged: what opens the folder says so
    found = {"sigma": sigma, "learning_rate": rate}
    return found if all(isinstance(value, float | int) for value in found.values()) else {}


def _told(config: Config, choice: Choice) -> tuple[dict[str, float], str]:
    """Settings for a sigma, and a sentence."""
    if choice.sigma is None:
        return {}, f"No sigma of these will do: {choice.why}."
    settings, words = {"sigma": choice.sigma}, f"Take --sigma {choice.sigma:g}"
    if config.sigma_scale == "rms":
        words += " --sigma-scale rms"
    if config.optimizer.name == "sgd" and config.perturb == "weights":
        rate = probing.learning_rate(choice.sigma, config.evolution.population)
        settings["learning_rate"] = rate
        words += f" --learning-rate {rate:g} (sigma^2 sqrt(population))"
    return settings, f"{words}: {choice.why}."


def _learner(
    sigmas: Sequence[float],
    config: Config,
    base: Start,
    questions: Questions,
    examiner: Examiner,
    layout: Layout,
) -> Evolution | WeightNoise | OutputNoise:
    """Learning whose generation i has the i-th sigma, the noise of generation 0, and its own keys of
    sampling."""
    learner = LEARNERS[config.perturb](config, base, questions, examiner, layout)
    learner.es = dataclasses.replace(
        learner.es,
        sigma=lambda generation: jnp.asarray(sigmas, jnp.float32)[generation],
        noise_reuse=len(sigmas),
    )
    return learner


class _RewardTables:
    """Tables of the registered rewards that are defined for these questions."""

    def __init__(self, config: Config, questions: Questions, asked: Sequence[Question]) -> None:
        text = ",".join(_applicable(columns(asked)))
        own = dataclasses.replace(config.rewards, reward=text)
        self._examiner = Examiner(own, questions)

    def of(self, texts: np.ndarray, asked: Sequence[Question]) -> dict[str, np.ndarray]:
        """A table of each, by its name."""
        handle = self._examiner.submit(texts.ravel().tolist(), list(asked) * len(texts))
        return dict(self._examiner.rewards(handle, texts.shape).parts)

    def __enter__(self) -> "_RewardTables":
        return self

    def __exit__(self, *error: object) -> None:
        self._examiner.close()


def _applicable(known: Mapping[str, Any]) -> list[str]:
    """Names of rewards that need no other columns than these, and no package that is missing."""

    def able(name: str) -> bool:
        given = inspect.signature(rewards.REWARDS[name]).parameters.values()
        needed = [one.name for one in given if one.kind is one.KEYWORD_ONLY]
        there = name not in PACKAGES or find_spec(PACKAGES[name]) is not None
        return there and all(column in known for column in needed)

    return [name for name in rewards.REWARDS if able(name)]
