"""`eggroll reasoning`: from settings to a fine-tuned language model, its curve, samples and a sentence."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from experiments.reasoning import diagnostics, scores, tasks
from experiments.reasoning.backprop import GroupPolicy, Supervised
from experiments.reasoning.config import Config
from experiments.reasoning.engine import Completions, Sampling, generate, pack
from experiments.reasoning.evolution import Evolution
from experiments.reasoning.examiner import (
    Examiner,
    asked,
    repeated,
    reward_of,
    sampling_of,
    texts_of,
)
from experiments.reasoning.memory import MemoryPlan, device_bytes, plan_memory
from experiments.reasoning.pool import RewardPool
from experiments.reasoning.rewards import extract
from experiments.reasoning.speed import expected_tokens_per_s
from experiments.reasoning.start import Start, keep_tokenizer, start
from experiments.reasoning.start import save as save_model
from experiments.reasoning.tasks import Question, Task
from experiments.run import agreement, hosts
from experiments.run.devices import Layout, layout_of
from experiments.run.errors import UsageError
from experiments.run.folder import open_run_folder, write_json
from experiments.run.loop import Job, run
from experiments.run.metrics import Row, read_metrics
from experiments.run.plots import learning_curve
from experiments.run.samples import add_sample
from experiments.run.stopwatch import Stopwatch

METHODS: dict[str, Any] = {"grpo": GroupPolicy, "sft": Supervised}
# A completion with this reward is right.
RIGHT = 1.0


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
        generations: updates made.
        generated_tokens: written in training, by all members.
        parameters: numbers of the model.
        sentence: the result in words.
        timing: seconds of every phase.
    """

    held_out_accuracy: float
    held_out_accuracy_before: float
    generations: int
    generated_tokens: int
    parameters: int
    sentence: str
    timing: dict[str, float]


class Course:
    """A task, a model that is to learn it, and how.

    Args:
        config: the settings.

    Raises:
        UsageError: for a task, a model or a reward that there is not.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        evolves = config.algorithm == "eggroll"
        alone = None if evolves else f"--algorithm {config.algorithm} has no population to divide"
        self.layout = layout_of(config, config.population, alone, config.tensor_parallel)
        self.task: Task = tasks.load(config.task, **config.task_arguments())
        self.begin: Start = start(config, self.task)
        self.reward = reward_of(config, self.task)
        self.method: Any = method_of(config, self.begin, self.layout)

    def fit_memory(self, examiner: Examiner) -> MemoryPlan:
        """What a population takes of the memory; where not all fits at once, members and questions take
        turns."""
        config = self.config
        prompts = examiner.prompts(examiner.questions(0))
        shapes = jax.eval_shape(self.begin.params, jnp.int32(0))
        # Every device, or group of them, has the members of at most so many pairs.
        share = 2 * -(-config.population // (2 * self.layout.groups))
        # The same for all processes, whose programs are one.
        budget = agreement.least(
            device_bytes() if config.memory_gib is None else int(config.memory_gib * 2**30)
        )
        plan = plan_memory(
            self.begin.model,
            self.method.es,
            shapes,
            share,
            config.prompts * config.samples,
            prompts.tokens.shape[1],
            sampling_of(config),
            budget,
        )
        chunk = plan.members if plan.members < share else None
        few = max(1, plan.prompts // config.samples)
        self.config = dataclasses.replace(
            config,
            chunk=config.chunk or chunk,
            prompt_chunk=config.prompt_chunk or (few if few < config.prompts else None),
        )
        self.method = method_of(self.config, self.begin, self.layout)
        # Devices of a CPU share its cores.
        devices = 1 if jax.default_backend() == "cpu" else self.layout.devices
        speed = devices * expected_tokens_per_s(shapes, plan.members * plan.prompts)
        return plan._replace(tokens_per_s=speed)

    @functools.cached_property
    def held_out(self) -> Sequence[Question]:
        """The questions that are measured on."""
        return list(self.task.held_out)[: self.config.held_out_questions]

    def first(self) -> Carry:
        """The state before generation 0."""
        seed = jnp.int32(self.config.seed)
        carry = Carry(self.method.start(seed), jnp.int32(0), seed)
        return carry if self.lies is None else jax.device_put(carry, self.lies)

    @property
    def lies(self) -> Carry | None:
        """How the state lies on several devices."""
        everywhere: Any = self.layout.everywhere
        return None if everywhere is None else Carry(self.method.lies, everywhere, everywhere)

    @contextlib.contextmanager
    def examiner(self) -> Iterator[Examiner]:
        """Processes for rewards, as long as they are needed."""
        config = self.config
        with RewardPool(
            config.reward_workers,
            config.reward_seconds,
            self.reward,
            memory_gib=config.reward_memory_gib,
        ) as pool:
            yield Examiner(self.config, self.begin, self.task, pool)

    def answers(
        self,
        examiner: Examiner,
        params: PyTree,
        questions: Sequence[Question],
        samples: int = 1,
        seed: int = 0,
    ) -> tuple[Completions, list[str], np.ndarray]:
        """Completions of questions, their texts, and rewards [questions, samples].

        They are the likeliest tokens where there is one sample of each, else drawn, at temperature 1
        where training has none.
        """
        sampling = sampling_of(self.config, greedy=samples == 1)
        if samples > 1 and not sampling.temperature:
            sampling = dataclasses.replace(sampling, temperature=1.0)
        written = generate(
            self.begin.model,
            params,
            examiner.prompts(questions),
            jax.random.key(seed),
            sampling,
            self.begin.tokenizer.eos,
            samples=samples,
        )
        texts = examiner.texts(written)
        handle = examiner.hand_in(texts, repeated(questions, samples))
        marks = examiner.marks(handle, (len(questions), samples))
        return written, texts, marks.rewards


def method_of(config: Config, begin: Start, layout: Layout) -> Any:
    """How the model learns."""
    if config.algorithm == "eggroll":
        return Evolution(config, begin, layout)
    return METHODS[config.algorithm](config, begin)


def job(config: Config, course: Course | None = None, examiner: Examiner | None = None) -> Job:
    """The run as the loop takes it; without an examiner only its start can be used.

    Raises:
        UsageError: for a task, a model or a reward that there is not.
    """
    course = course or Course(config)
    method = course.method

    def generation(carry: Carry) -> tuple[Carry, dict[str, Any]]:
        assert examiner is not None
        g, began = int(carry.generation), time.perf_counter()
        questions = examiner.questions(g)
        training, row = method.generation(carry.training, g, questions, examiner)
        jax.block_until_ready(training)
        rate = row["generated_tokens"] / (time.perf_counter() - began)
        row["timing"] = {"tokens_per_second": rate}
        return Carry(training, carry.generation + 1, carry.seed), row

    def measure(carry: Carry) -> dict[str, float]:
        assert examiner is not None
        written, _, rewards = course.answers(
            examiner, method.params(carry.training), course.held_out
        )
        return {
            "held_out_accuracy": float(np.mean(rewards >= RIGHT)),
            "held_out_reward": diagnostics.known_mean(rewards),
            "held_out_length": float(written.lengths.mean()),
        }

    return Job(
        start=course.first,
        generation=generation,
        measure=measure,
        reached=functools.partial(no_longer_rises, config),
        tell=tell,
        measured=("held_out_accuracy", "held_out_reward", "held_out_length"),
        totals=("generated_tokens",),
        sharding=course.lies,
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
    rate = row["timing"]["tokens_per_second"]
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
    course = Course(config)
    hosts.say(describe(course))

    with open_run_folder("reasoning", config) as folder, course.examiner() as examiner:
        keep_tokenizer(config, course.begin)
        if config.algorithm == "eggroll":
            hosts.say(course.fit_memory(examiner).describe())
        task_job = job(config, course, examiner)

        def measure(carry: Carry) -> Any:
            if int(carry.generation) == 0:
                show(folder, course, examiner, carry)
            return task_job.measure(carry)

        watch.finish("setup")
        outcome = run(task_job._replace(measure=measure), config, folder, watch)
        show(folder, course, examiner, outcome.state)
        watch.finish("training")

        after, before = (x["held_out_accuracy"] for x in (outcome.after, outcome.before))
        lesson = in_words(before, after, config)
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
        params = course.method.params(outcome.state.training)
        tokens = outcome.rows[-1]["generated_tokens"] if outcome.rows else 0
        updates = "update" if outcome.generations == 1 else "updates"
        result = Result(
            held_out_accuracy=after,
            held_out_accuracy_before=before,
            generations=outcome.generations,
            generated_tokens=tokens,
            parameters=sum(leaf.size for leaf in jax.tree.leaves(params)),
            sentence=f"{lesson}, after {outcome.generations} {updates} {how(config)}"
            f"{f', {tokens:,} tokens written' if tokens else ''}, {watch.total():.1f} s from start.",
            timing=watch.phases,
        )
        write_json(folder / "result.json", result._asdict())
    return result


def describe(course: Course) -> str:
    """The task in a line."""
    return (
        f"{course.task.name}: {len(course.task.train):,} questions to train on, "
        f"{len(course.held_out):,} held out."
    )


def show(folder: Path, course: Course, examiner: Examiner, carry: Carry, count: int = 8) -> None:
    """Adds to samples.txt what the model answers to the first held-out questions."""
    questions = course.held_out[:count]
    _, texts, rewards = course.answers(examiner, course.method.params(carry.training), questions)
    rows = [
        {"question": q.prompt.strip(), "completion": text, "answer": q.answer, "reward": f"{r:g}"}
        for q, text, (r,) in zip(questions, texts, rewards, strict=True)
    ]
    table = diagnostics.samples(rows, width=48)
    add_sample(folder / "samples.txt", int(carry.generation), table)


def evaluate(config: Config, state: Carry, episodes: int, seed: int) -> dict[str, list[float]]:
    """Held-out accuracy, greedily; pass@k and majority@k of 8 samples of each question.

    `episodes` is for other drivers; `seed` decides the samples.
    """
    course, samples = Course(config), 8
    params = course.method.params(state.training)
    with course.examiner() as examiner:
        greedy = course.answers(examiner, params, course.held_out)[2]
        _, texts, rewards = course.answers(examiner, params, course.held_out, samples, seed)
    right = rewards >= RIGHT
    told = {"held-out accuracy": (greedy[:, 0] >= RIGHT).astype(float).tolist()}
    for k in (1, 2, 4, 8):
        found = scores.pass_at_k(right.sum(1), samples, k)
        told[f"pass@{k} of {samples} samples"] = np.asarray(found).tolist()
    votes = np.array([extract(text) for text in texts], object).reshape(right.shape)
    told[f"majority@{samples}"] = [
        scores.majority_at_k(list(row), list(map(bool, ok)))
        for row, ok in zip(votes, right, strict=True)
    ]
    return told


def parameters(config: Config, state: Carry) -> PyTree:
    """The trained parameters, for export."""
    return state.training.params if config.algorithm == "eggroll" else state.training[0]


def save(config: Config, state: Carry, folder: Path) -> str:
    """Writes the model as a folder of its own, for `--model`, `eggroll sample` and transformers."""
    begin = start(config)
    params = parameters(config, state)
    save_model(begin, params, folder, config.dtype)
    numbers = sum(leaf.size for leaf in jax.tree.leaves(params))
    return f"Wrote a model of {numbers:,} numbers to {folder}."


def write(
    config: Config,
    state: Carry | None,
    prompts: Sequence[str],
    length: int | None,
    temperature: float,
    seed: int,
) -> list[str]:
    """What the model of a run, or without a state the one that the settings name, writes after prompts."""
    begin = start(config)
    params = begin.params(jnp.int32(config.seed)) if state is None else parameters(config, state)
    params = jax.tree.map(jnp.asarray, params)
    tokenizer = begin.tokenizer
    given = [tokenizer.encode(asked(config, tokenizer, text)) for text in prompts]
    if not all(given):
        raise UsageError(
            "--prompt '': this model begins with nothing; give it a text to go on from"
        )
    sampling = Sampling(max_new_tokens=length or config.max_new_tokens, temperature=temperature)
    written = generate(
        begin.model,
        params,
        pack(given),
        jax.random.key(seed),
        sampling,
        tokenizer.eos,
    )
    return texts_of(tokenizer, written)


def in_words(before: float, after: float, config: Config) -> str:
    """What was learned."""
    if after > before:
        return (
            f"Answers {after:.1%} of held-out questions of {config.task} right, {before:.1%} before"
        )
    return f"No gain: {after:.1%} of held-out questions of {config.task} right, {before:.1%} before"


def how(config: Config) -> str:
    """The method in a few words."""
    if config.algorithm == "eggroll":
        kind = "dense ES" if config.rank == "full" else f"EGGROLL of rank {config.rank}"
        return f"by {kind} with a population of {config.population}"
    return f"by {config.algorithm.upper()} and {config.optimizer}"
