"""`eggroll reasoning`: from settings to a fine-tuned language model, its curve, samples and a sentence.

    eggroll reasoning --preset warm-start    # two minutes on two cores: a small model learns to add
    eggroll reasoning --preset eggroll       # ... and goes on from rewards alone

A generation asks a part of the task's questions, and a learner makes an update of the answers
(:mod:`~experiments.reasoning.evolution`, or one of :mod:`~experiments.reasoning.backprop`). Held-out
questions are measured all along a run; what it comes to is told by fresh ones, which decided nothing before.
"""

import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from experiments.reasoning import diagnostics, scores, tasks
from experiments.reasoning.answers import extract
from experiments.reasoning.backprop import GroupPolicy, Supervised
from experiments.reasoning.config import Config
from experiments.reasoning.engine import Share, generate, unseen
from experiments.reasoning.evolution import Evolution
from experiments.reasoning.examiner import Examiner, reward_of
from experiments.reasoning.fitting import fit
from experiments.reasoning.questions import Questions, as_asked, repeated, texts_of
from experiments.reasoning.rewards import files as reward_files
from experiments.reasoning.sampling import Sampling
from experiments.reasoning.sequences import Completions, pack
from experiments.reasoning.start import Start, keep_tokenizer, start
from experiments.reasoning.start import save as save_model
from experiments.reasoning.tasks import Question, Task
from experiments.run import hosts
from experiments.run.devices import layout_of
from experiments.run.errors import UsageError
from experiments.run.folder import open_run_folder, write_json
from experiments.run.loop import Job, run
from experiments.run.metrics import Row, plain, read_metrics
from experiments.run.plots import learning_curve
from experiments.run.samples import add_sample
from experiments.run.stopwatch import Stopwatch

# A completion with this reward is right.
RIGHT = 1.0
# Samples of each question that `eggroll eval` draws.
SAMPLES = 8
MEASURED = ("held_out_accuracy", "held_out_reward", "held_out_length")


class Carry(NamedTuple):
    """All that a run carries.

    Attributes:
        training: of the strategy, or parameters and the optimizer's state.
        generation: updates done.
        seed: what everything random comes from.
    """

    training: Any
    generation: Array
    seed: Array


class Result(NamedTuple):
    """What a run came to.

    Attributes:
        held_out_accuracy: share of held-out questions that the final model answers right, greedily.
        held_out_accuracy_before: the same before training.
        fresh_accuracy: the same of fresh questions, which decided nothing before; NaN where there are none.
        generations: updates made.
        generated_tokens: written in training, by all members.
        parameters: numbers of the model.
        sentence: the result in words.
        timing: seconds of every phase.
    """

    held_out_accuracy: float
    held_out_accuracy_before: float
    fresh_accuracy: float
    generations: int
    generated_tokens: int
    parameters: int
    sentence: str
    timing: dict[str, float]


class Reasoning:
    """Trains a language model on a task. What it consists of is made when it is first asked for.

    Args:
        config: the settings.
        share: told how much of a generation is done.
    """

    def __init__(self, config: Config, share: Share = unseen) -> None:
        self.config, self._share = config, share
        self._fitted = config
        alone = None
        if config.algorithm != "eggroll":
            alone = f"--algorithm {config.algorithm} has no population to divide"
        self.layout = layout_of(config, config.population, alone, config.tensor_parallel)

    @functools.cached_property
    def task(self) -> Task:
        """The task that the settings name."""
        return tasks.load(self.config.task, **self.config.task_arguments())

    @functools.cached_property
    def base(self) -> Start:
        """The model that training begins with."""
        return start(self.config, self.task if self.config.tokenizer == "bpe" else None)

    @functools.cached_property
    def questions(self) -> Questions:
        """The questions as the model reads them."""
        return Questions(self.config, self.base, self.task)

    @functools.cached_property
    def examiner(self) -> Examiner:
        """What rewards answers."""
        return Examiner(self.config, reward_of(self.config, self.task))

    @functools.cached_property
    def learner(self) -> Evolution | GroupPolicy | Supervised:
        """What makes an update of a generation's questions."""
        if self.config.algorithm == "eggroll":
            parts = (self._fitted, self.base, self.questions, self.examiner)
            return Evolution(*parts, self.layout)
        make = GroupPolicy if self.config.algorithm == "grpo" else Supervised
        return make(self.config, self.base, self.questions, self.examiner)

    def plan(self) -> list[str]:
        """Settles what fits into the memory, makes all parts, and tells of the task and the memory.

        Raises:
            UsageError: for anything in the settings that cannot be right.
        """
        said = [describe(self.task, self.questions)]
        assert self.examiner is not None  # raises now what is wrong with a reward
        if self.config.algorithm == "eggroll":
            self._fitted, memory = fit(self.config, self.base, self.questions, self.layout)
            said.append(memory.describe())
        assert self.learner is not None
        return said

    @property
    def files(self) -> list[Path]:
        """The files that a task and rewards are read from."""
        own = reward_files(self.config.reward) if self.config.reward is not None else []
        return [*tasks.files(self.config.task, self.config.task_arguments()), *own]

    @property
    def sharding(self) -> Carry | None:
        """Where the state lies on several devices; None for one."""
        everywhere: Any = self.layout.everywhere
        return None if everywhere is None else Carry(self.learner.sharding, everywhere, everywhere)

    def start(self) -> Carry:
        """The state before generation 0."""
        seed = jnp.int32(self.config.seed)
        carry = Carry(self.learner.start(seed), jnp.int32(0), seed)
        return carry if self.sharding is None else jax.device_put(carry, self.sharding)

    def generation(self, carry: Carry) -> tuple[Carry, dict[str, Any]]:
        """Answers or solutions of a generation's questions, and an update by them."""
        began = time.perf_counter()
        training, row = self.learner.generation(carry.training, int(carry.generation), self._share)
        jax.block_until_ready(training)
        seconds = time.perf_counter() - began
        row["timing"] = {
            "prompt_tokens_per_second": row["prompt_tokens"] / seconds,
            "written_tokens_per_second": row["generated_tokens"] / seconds,
        }
        return Carry(training, carry.generation + 1, carry.seed), row

    def measure(self, carry: Carry) -> dict[str, float]:
        """What the model answers to held-out questions."""
        params = self.learner.params(carry.training)
        written, _, rewards = self.answers(params, self.questions.measured)
        return {
            "held_out_accuracy": float(np.mean(rewards >= RIGHT)),
            "held_out_reward": float(np.nanmean(rewards)),
            "held_out_length": float(written.lengths.mean()),
        }

    def confirm(self, carry: Carry) -> dict[str, float]:
        """What the model answers to fresh questions, which decided nothing before."""
        if not self.questions.fresh:
            return {"fresh_accuracy": float("nan")}
        params = self.learner.params(carry.training)
        rewards = self.answers(params, self.questions.fresh)[2]
        return {"fresh_accuracy": float(np.mean(rewards >= RIGHT))}

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
            self.base.tokenizer.eos,
            samples=samples,
            share=self._share,
        )
        texts = self.questions.texts(written)
        handle = self.examiner.submit(texts, repeated(questions, samples))
        return written, texts, self.examiner.rewards(handle, (len(questions), samples)).rewards

    def sample(self, carry: Carry, count: int = 8) -> str:
        """What the model answers to the first held-out questions, as a table."""
        questions = self.questions.measured[:count]
        _, texts, rewards = self.answers(self.learner.params(carry.training), questions)
        rows = [
            {
                "question": q.prompt.strip(),
                "completion": text,
                "answer": q.answer,
                "reward": f"{r:g}",
            }
            for q, text, (r,) in zip(questions, texts, rewards, strict=True)
        ]
        return diagnostics.samples(rows, width=48)

    def evaluate(self, carry: Carry, seed: int) -> dict[str, list[float]]:
        """Accuracy on held-out and on fresh questions, greedily; pass@k and majority@k of samples of the
        held-out ones."""
        params = self.learner.params(carry.training)
        greedy = self.answers(params, self.questions.measured)[2]
        found = {"held-out accuracy": (greedy[:, 0] >= RIGHT).astype(float).tolist()}
        if self.questions.fresh:
            fresh = self.answers(params, self.questions.fresh)[2]
            found["accuracy on fresh questions"] = (fresh[:, 0] >= RIGHT).astype(float).tolist()
        _, texts, rewards = self.answers(params, self.questions.measured, SAMPLES, seed)
        right = rewards >= RIGHT
        for k in (1, 2, 4, 8):
            passed = scores.pass_at_k(right.sum(1), SAMPLES, k)
            found[f"pass@{k} of {SAMPLES} samples"] = np.asarray(passed).tolist()
        votes = np.array([extract(text) for text in texts], object).reshape(right.shape)
        found[f"majority@{SAMPLES}"] = [
            scores.majority_at_k(list(row), list(map(bool, ok)))
            for row, ok in zip(votes, right, strict=True)
        ]
        return found

    def write(
        self,
        carry: Carry | None,
        prompts: Sequence[str],
        length: int | None,
        temperature: float,
        seed: int,
    ) -> list[str]:
        """What the model writes after prompts; without a state the one that training begins with."""
        base, config = self.base, self.config
        if carry is None:
            params = base.params(jnp.int32(config.seed))
        else:
            params = self.learner.params(carry.training)
        given = [base.tokenizer.encode(as_asked(config, base, text)) for text in prompts]
        if not all(given):
            raise UsageError(
                "--prompt '': this model begins with nothing; give it a text to go on from"
            )
        longest = length or config.max_new_tokens or self.task.max_new_tokens
        written = generate(
            base.model,
            jax.tree.map(jnp.asarray, params),
            pack(given),
            jax.random.key(seed),
            Sampling(max_new_tokens=longest, temperature=temperature),
            base.tokenizer.eos,
        )
        return texts_of(base, written)

    def close(self) -> None:
        """Ends the processes of rewards."""
        if "examiner" in vars(self):
            self.examiner.close()


def job(config: Config, trainer: Reasoning | None = None) -> Job:
    """The run as the loop takes it."""
    trainer = trainer or Reasoning(config)
    return Job(
        start=trainer.start,
        generation=trainer.generation,
        measure=trainer.measure,
        reached=functools.partial(no_longer_rises, config),
        tell=tell,
        measured=MEASURED,
        totals=("generated_tokens",),
        sharding=trainer.sharding,
    )


def no_longer_rises(config: Config, measured: Row) -> bool:
    """Whether the last `patience` measurements of a run, this one included, are no better than before."""
    if config.patience is None:
        return False
    rows = read_metrics(config.run_dir / "metrics.jsonl")
    found = [r["held_out_accuracy"] for r in rows if r["held_out_accuracy"] is not None]
    found.append(measured["held_out_accuracy"])
    before, last = found[: -config.patience], found[-config.patience :]
    return bool(before) and max(last) <= max(before)


def tell(row: Row) -> str:
    """A row in a few words."""
    words = []
    if row.get("held_out_accuracy") is not None:
        words.append(f"{row['held_out_accuracy']:.1%} of held-out questions right")
    if row.get("reward_mean") is not None:
        words.append(f"reward {row['reward_mean']:.3f}")
    elif row.get("loss") is not None:
        words.append(f"loss {row['loss']:.3f}")
    rate = row["timing"]["written_tokens_per_second"]
    return ", ".join([*words, f"{rate:,.0f} tokens/s"] if rate else words)


def train(config: Config, started: float | None = None) -> Result:
    """Train as `config` says, or go on where its run folder stands, and fill the folder.

    Raises:
        UsageError: for settings that cannot be right, or a run folder that cannot be used.
        Interrupted: after SIGTERM or Ctrl-C.
        RunError: where a file cannot be written, or a reward fails.
    """
    watch = Stopwatch(started)
    watch.finish("imports")
    config.check()
    config = config.settled()
    trainer = Reasoning(config)
    for said in trainer.plan():
        hosts.say(said)
    try:
        with open_run_folder("reasoning", config, trainer.files) as folder:
            keep_tokenizer(config, trainer.base)
            trainer.examiner.open()
            task_job = job(config, trainer)

            def measure(carry: Carry) -> Any:
                if int(carry.generation) == 0:
                    add_sample(folder / "samples.txt", 0, trainer.sample(carry))
                return task_job.measure(carry)

            watch.finish("setup")
            outcome = run(task_job._replace(measure=measure), config, folder, watch)
            text = trainer.sample(outcome.state)
            add_sample(folder / "samples.txt", outcome.generations, text)
            fresh = trainer.confirm(outcome.state)["fresh_accuracy"]
            watch.finish("training")

            after, before = (x["held_out_accuracy"] for x in (outcome.after, outcome.before))
            lesson = in_words(before, after, fresh, config)
            learning_curve(
                folder / "curve.png",
                outcome.rows,
                title=lesson,
                measure="share of held-out questions answered right",
                final=(outcome.generations, after),
                name="held_out_accuracy",
                population=False,
                who="model",
            )
            watch.finish("results")
            params = trainer.learner.params(outcome.state.training)
            tokens = outcome.rows[-1]["generated_tokens"] if outcome.rows else 0
            updates = "update" if outcome.generations == 1 else "updates"
            result = Result(
                held_out_accuracy=after,
                held_out_accuracy_before=before,
                fresh_accuracy=fresh,
                generations=outcome.generations,
                generated_tokens=tokens,
                parameters=sum(leaf.size for leaf in jax.tree.leaves(params)),
                sentence=f"{lesson}, after {outcome.generations} {updates} {how(config)}"
                f"{f', {tokens:,} tokens written' if tokens else ''}, {watch.total():.1f} s from start.",
                timing=watch.phases,
            )
            write_json(folder / "result.json", plain(result._asdict()))
    finally:
        trainer.close()
    return result


def describe(task: Task, questions: Questions) -> str:
    """The task in a line."""
    return (
        f"{task.name}: {len(task.train):,} questions to train on, "
        f"{len(questions.measured):,} held out, {len(questions.fresh):,} fresh."
    )


def evaluate(config: Config, state: Carry, episodes: int, seed: int) -> dict[str, list[float]]:
    """Scores of a state; `episodes` is for other drivers, `seed` decides the samples."""
    trainer = Reasoning(config)
    try:
        return trainer.evaluate(state, seed)
    finally:
        trainer.close()


def parameters(config: Config, state: Carry) -> PyTree:
    """The trained parameters, for export."""
    return state.training.params if config.algorithm == "eggroll" else state.training[0]


def save(config: Config, state: Carry, folder: Path) -> str:
    """Writes the model as a folder of its own, for `--model`, `eggroll sample` and transformers."""
    base = Reasoning(config).base
    params = parameters(config, state)
    save_model(base, params, folder, config.dtype)
    numbers = sum(leaf.size for leaf in jax.tree.leaves(params))
    return f"Wrote a model of {numbers:,} numbers to {folder}."


def write(config: Config, state: Carry | None, *args: Any) -> list[str]:
    """What the model of a run, or without a state the one that the settings name, writes after prompts."""
    return Reasoning(config).write(state, *args)


def in_words(before: float, after: float, fresh: float, config: Config) -> str:
    """What was learned, by fresh questions."""
    if np.isnan(fresh):
        told = f"{after:.1%} of held-out questions of {config.task} right, {before:.1%} before"
        return f"{told}; there was no fresh question to confirm it"
    told = f"{fresh:.1%} of fresh questions of {config.task} right"
    if fresh > before:
        return f"Answers {told}, where {before:.1%} of held-out ones were before"
    return f"No gain: {told}, where {before:.1%} of held-out ones were before"


def how(config: Config) -> str:
    """The method in a few words."""
    if config.algorithm == "eggroll":
        kind = "dense ES" if config.rank == "full" else f"EGGROLL of rank {config.rank}"
        return f"by {kind} with a population of {config.population}"
    return f"by {config.algorithm.upper()} and {config.optimizer}"
