"""`eggroll reasoning`: language models that learn from answers that can be checked.

    eggroll reasoning --preset warm-start    # two minutes on two cores: a small model learns to add
    eggroll reasoning --preset eggroll       # two more: it goes on from rewards alone

A generation is :meth:`Reasoning.generation`: a part of the task's questions, and an update by a learner,
:class:`~experiments.reasoning.evolution.Evolution` or one of :mod:`~experiments.reasoning.backprop`. Held-out
questions are measured all along a run; what it comes to is told by fresh ones, which decided nothing before.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PyTree

from experiments.reasoning import adapters, diagnostics, rewards, scores, tasks
from experiments.reasoning import probe as probing
from experiments.reasoning.answer_noise import LEARNERS, OutputNoise, WeightNoise
from experiments.reasoning.answers import extract
from experiments.reasoning.backprop import GroupPolicy, Supervised
from experiments.reasoning.config import Config
from experiments.reasoning.engine import generate
from experiments.reasoning.evolution import Evolution
from experiments.reasoning.examiner import Examiner
from experiments.reasoning.fitting import fit
from experiments.reasoning.hints import hints
from experiments.reasoning.questions import Questions, repeated
from experiments.reasoning.sampling import Sampling
from experiments.reasoning.sequences import Completions, pack
from experiments.reasoning.start import keep_tokenizer, save, start, with_dtype
from experiments.reasoning.tasks import Question, Task
from experiments.run import hosts
from experiments.run.axes import GENERATED_TOKENS, SECONDS
from experiments.run.commands import other_files
from experiments.run.devices import layout_of
from experiments.run.errors import UsageError
from experiments.run.fields import changed
from experiments.run.plots import Curve
from experiments.run.progress import part
from experiments.run.trainer import Adapts, Carry, Conclusion, LanguageTrainer, Outcome, Replays

Learner = Evolution | WeightNoise | OutputNoise | GroupPolicy | Supervised
BY_BACKPROPAGATION: Mapping[str, Callable[..., GroupPolicy | Supervised]] = {
    "grpo": GroupPolicy,
    "sft": Supervised,
}
# A completion with this reward is right.
RIGHT = 1.0
# Samples of each question that `eggroll eval` draws, and answers that samples.txt shows.
SAMPLES, SHOWN = 8, 8


class Reasoning(LanguageTrainer[Config], Adapts, Replays):
    """Trains a language model on a task.

    Args:
        config: the settings.

    Raises:
        UsageError: for a model or devices that there are not. What is wrong with a task, a reward, an
            optimizer or the memory is told with the notes, before training.
    """

    measured = ("held_out_accuracy", "held_out_reward", "held_out_length")
    totals = ("prompt_tokens", "generated_tokens")

    def __init__(self, config: Config) -> None:
        chosen, config = config.dtype, with_dtype(config)
        super().__init__(config)
        self._chosen = chosen
        evolves = config.algorithm == "eggroll"
        alone = None if evolves else f"--algorithm {config.algorithm} has no population to divide"
        population = config.evolution.population
        self.layout = layout_of(config.cluster, population, alone, config.tensor_parallel)
        self.base = start(config, lambda: self.task)
        self.questions = Questions(config, self.base, lambda: self.task)
        self.examiner = Examiner(config.rewards, self.questions)
        self.resources.callback(self.examiner.close)
        # With the numbers of members and questions at a time, once the memory is planned.
        self._fitted = config

    @functools.cached_property
    def task(self) -> Task:
        """The task that the settings name."""
        return tasks.load(self.config.task, **self.config.task_arguments())

    @functools.cached_property
    def learner(self) -> Learner:
        """What makes an update; it holds no arrays, so that it may be first asked for inside a trace."""
        parts = (self._fitted, self.base, self.questions, self.examiner)
        if self.config.algorithm == "eggroll":
            return LEARNERS[self.config.perturb](*parts, self.layout)
        return BY_BACKPROPAGATION[self.config.algorithm](*parts)

    @functools.cached_property
    def notes(self) -> Sequence[str]:  # type: ignore[override]
        """The task, the plan of the memory, which is made here, before the learner, and what has changed
        since the run that is trained on; what the task decides where the settings do not is settled first."""
        longest = self.questions.sampling().max_new_tokens
        self.config = self._fitted = changed(self.config, max_new_tokens=longest)
        said = [describe(self.task, self.questions)]
        if self._chosen == "auto" and self.base.folder is not None:
            said.append(f"Weights in {self.config.dtype}; --dtype chooses another type.")
        assert self.examiner.reward is not None  # raises now where there is none
        if self.config.algorithm == "eggroll":
            self._fitted, plan = fit(self.config, self.base, self.questions, self.layout)
            said.append(plan.describe())
        elif isinstance(self.learner, GroupPolicy | Supervised):
            said.append(self.learner.plan.describe())
        if self.config.probing.probe:
            said += self._take_sigma()
        if self.config.start is not None and (warning := other_files(self.config.start)):
            said.append(warning)
        assert self.learner is not None
        return said

    def probe(self) -> probing.Probe:
        """What the population answers at several sigmas; asked for after the notes, and before training."""
        return probing.probe(self._fitted, self.base, self.questions, self.examiner, self.layout)

    def _take_sigma(self) -> Sequence[str]:
        """Settles sigma and the learning rate: as the run folder has them, or as a probe finds them."""
        told, values = list[str](), probing.recorded(self.config)
        if values is None:
            found = self.probe()
            if found.choice.sigma is None:
                hosts.say(found.describe())
                raise UsageError(
                    "--probe: no sigma of these will do; the table and what to do are above"
                )
            told, values = [found.describe()], found.settings
        self.config = changed(self.config, values)
        self._fitted = changed(self._fitted, values)
        return told

    @property
    def files(self) -> Sequence[Path]:  # type: ignore[override]
        """The files that the task and rewards are read from."""
        own, reward = self.config.task_arguments(), self.config.rewards.reward
        return [
            *tasks.files(self.config.task, own),
            *(rewards.files(reward) if reward is not None else []),
        ]

    @property
    def sharding(self) -> PyTree | None:  # type: ignore[override]
        """Where the state lies on several devices."""
        everywhere: Any = self.layout.everywhere
        if everywhere is None:
            return None
        return Carry(self.learner.sharding, None, everywhere, everywhere)

    def prepare(self, folder: Path) -> None:
        """Writes the tokenizer, and begins the processes of rewards."""
        keep_tokenizer(self.config, self.base)
        self.examiner.open()

    def start(self) -> Carry:
        seed = jnp.int32(self.config.seed)
        carry = Carry(self.learner.start(seed), None, jnp.int32(0), seed)
        return carry if self.sharding is None else jax.device_put(carry, self.sharding)

    def generation(self, carry: Carry) -> tuple[Carry, Mapping[str, Any]]:
        """An update by the questions of this generation."""
        began = time.perf_counter()
        learner, row = self.learner.generation(carry.learner, int(carry.generation), part)
        jax.block_until_ready(learner)
        seconds = time.perf_counter() - began
        timing = {
            "prompt_tokens_per_second": row["prompt_tokens"] / seconds,
            "written_tokens_per_second": row["generated_tokens"] / seconds,
        }
        if int(carry.generation) == 0:
            for hint in hints(jax.device_get(row), self.config):
                hosts.say(f"hint: {hint}")
        carry = carry._replace(learner=learner, generation=carry.generation + 1)
        return carry, {**row, "timing": timing}

    def measure(self, carry: Carry) -> Mapping[str, float]:
        written, _, found = self.answers(carry.learner.params, self.questions.measured)
        return {
            "held_out_accuracy": float(np.mean(found >= RIGHT)),
            "held_out_reward": diagnostics.known_mean(found),
            "held_out_length": float(written.lengths.mean()),
        }

    def confirm(self, carry: Carry) -> Mapping[str, float]:
        """The accuracy on fresh questions; NaN where the task has none."""
        if not self.questions.fresh:
            return {"fresh_accuracy": float("nan")}
        found = self.answers(carry.learner.params, self.questions.fresh)[2]
        return {"fresh_accuracy": float(np.mean(found >= RIGHT))}

    def answers(
        self, params: PyTree, questions: Sequence[Question], samples: int = 1, seed: int = 0
    ) -> tuple[Completions, list[str], Float[np.ndarray, "questions samples"]]:
        """Completions of questions, their texts, and rewards.

        They are the likeliest tokens where there is one sample of each, else drawn, at temperature 1
        where training has none.
        """
        sampling = self.questions.sampling(greedy=samples == 1)
        if samples > 1 and not sampling.temperature:
            sampling = Sampling(max_new_tokens=sampling.max_new_tokens, temperature=1.0)
        written = generate(
            self.base.model,
            params,
            self.questions.prompts(questions),
            jax.random.key(seed),
            sampling,
            self.questions.ends,
            samples=samples,
            share=part,
        )
        texts = self.questions.texts(written)
        handle = self.examiner.submit(texts, repeated(questions, samples))
        return written, texts, self.examiner.rewards(handle, (len(questions), samples)).rewards

    def evaluate(self, carry: Carry, episodes: int, seed: int) -> Mapping[str, Sequence[float]]:
        """Accuracy on held-out and on fresh questions, greedily; pass@k and majority@k of samples of the
        held-out ones."""
        params, asked, found = carry.learner.params, self.questions, dict[str, Sequence[float]]()
        for name, questions in {"held-out": asked.measured, "fresh": asked.fresh}.items():
            if questions:
                right = self.answers(params, questions)[2][:, 0] >= RIGHT
                found[f"{name} accuracy"] = right.astype(float).tolist()
        _, texts, drawn = self.answers(params, asked.measured, SAMPLES, seed)
        said = np.array([extract(text) for text in texts], object).reshape(drawn.shape)
        return found | scores.of_samples(said.tolist(), drawn >= RIGHT)

    def sample(self, carry: Carry) -> str:
        """Answers to the first held-out questions, as a table."""
        questions = self.questions.measured[:SHOWN]
        _, texts, found = self.answers(carry.learner.params, questions)
        return diagnostics.samples(
            [
                {"question": q.prompt.strip(), "completion": text, "answer": q.answer, "reward": f"{r:g}"}
                for q, text, (r,) in zip(questions, texts, found, strict=True)
            ],
            width=48,
        )  # fmt: skip

    def write(
        self,
        carry: Carry | None,
        prompts: Sequence[str],
        length: int | None,
        temperature: float,
        seed: int,
    ) -> list[str]:
        base = self.base
        first = jnp.int32(self.config.seed)
        params = base.params(first) if carry is None else carry.learner.params
        asked = self.questions
        given = [base.tokenizer.encode(asked.as_asked(text)) for text in prompts]
        if not all(given):
            raise UsageError(
                "--prompt '': this model begins with nothing; give it a text to go on from"
            )
        longest = length or asked.sampling().max_new_tokens
        for text, tokens in zip(prompts, given, strict=True):
            asked.check_length(text, len(tokens), longest)
        written = generate(
            base.model,
            jax.tree.map(jnp.asarray, params),
            pack(given),
            jax.random.key(seed),
            Sampling(max_new_tokens=longest, temperature=temperature),
            asked.ends,
        )
        return asked.texts(written)

    def export(self, carry: Carry, to: Path | None) -> str:
        """Writes the model as a folder of its own, for `--model`, `eggroll sample` and transformers."""
        folder, params = to or self.config.run_dir / "exported", carry.learner.params
        save(self.base, params, folder, self.config.dtype)
        numbers = sum(leaf.size for leaf in jax.tree.leaves(params))
        return f"Wrote a model of {numbers:,} numbers to {folder}."

    @property
    def keeps_history(self) -> bool:  # type: ignore[override]
        """Whether updates can be made again from scores alone."""
        return self.config.algorithm == "eggroll" and self.config.perturb != "nodes"

    def replay(self, carry: Carry, scores: np.ndarray) -> tuple[Carry, Mapping[str, Any]]:
        assert isinstance(self.learner, Evolution | WeightNoise)
        learner, row = self.learner.update(carry.learner, scores)
        return carry._replace(learner=learner, generation=carry.generation + 1), row

    def export_update(self, carry: Carry, to: Path | None, rank: int) -> str:
        return adapters.export_update(self.config, self.base, carry, to, rank)

    def export_members(
        self, carry: Carry, to: Path | None, members: str, rank: int | None = None
    ) -> str:
        if not isinstance(self.learner, Evolution):
            evolves = self.config.algorithm == "eggroll"
            name = "perturb" if evolves else "algorithm"
            raise UsageError(
                f"--members: a run with --{name} {getattr(self.config, name)} has no members that are models"
            )
        chosen = adapters.numbers(members, self.config.evolution.population)
        es = self.learner.es
        return adapters.export_members(self.config, self.base, es, carry, to, chosen, rank)

    def conclude(self, config: Config, outcome: Outcome) -> Conclusion:
        """The accuracy on fresh questions, in words, and the curve of that on held-out ones."""
        before = outcome.before["held_out_accuracy"]
        lesson = in_words(before, outcome.fresh["fresh_accuracy"], self.task.name)
        tokens = outcome.totals.get("generated_tokens", 0)
        updates = "update" if outcome.generations == 1 else "updates"
        path = f"after {outcome.generations} {updates} {how(config)}"
        path += f", {tokens:,} tokens written" if tokens else ""
        curve = Curve(
            name="held_out_accuracy",
            words="share of held-out questions answered right",
            who="model",
            target=config.target,
            x=SECONDS if config.algorithm == "sft" else GENERATED_TOKENS,
            of=len(self.questions.measured),
        )
        return Conclusion(lesson, path, curve)


def describe(task: Task, questions: Questions) -> str:
    """The task in a line."""
    out = len(task.train) - len(questions.fitting(task.train))
    return (
        f"{task.name}: {len(task.train) - out:,} questions to train on, "
        f"{len(questions.measured):,} held out, {len(questions.fresh):,} fresh."
        + (f" {out:,} have more than --max-prompt-tokens and are left out." if out else "")
    )


def in_words(before: float, fresh: float | None, task: str) -> str:
    """What was learned.

    Args:
        before: share of held-out questions that were answered right before training.
        fresh: share of fresh questions that are answered right; None where there are none.
        task: its name.

    Example:
        >>> in_words(0.1, 0.25, "sums")
        'Answers 25.0% of fresh questions of sums right, 10.0% of held-out ones before'
    """
    if fresh is None:
        return f"Not confirmed: {task} has too few questions to keep fresh ones"
    what = f"{fresh:.1%} of fresh questions of {task} right"
    told = f"Answers {what}" if fresh > before else f"No gain: {what}"
    return f"{told}, {before:.1%} of held-out ones before"


def how(config: Config) -> str:
    """The method in a few words."""
    if config.algorithm == "eggroll":
        rank = config.evolution.rank
        kind = "dense ES" if rank == "full" else f"EGGROLL of rank {rank}"
        own = {
            "nodes": "node noise",
            "answers": f"{kind} with noise of its own for every answer and",
        }
        kind = own.get(config.perturb, kind)
        and_with = "" if config.perturb == "answers" else " with"
        return f"by {kind}{and_with} a population of {config.evolution.population}"
    return f"by {config.algorithm.upper()} and {config.optimizer.name}"
