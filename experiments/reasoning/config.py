"""The settings of `eggroll reasoning`, and its presets. Imports nothing heavy."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from experiments.run.errors import UsageError
from experiments.run.fields import (
    Role,
    changed,
    count,
    flag,
    from_zero,
    positive,
    setting,
    share,
)
from experiments.run.settings import Evolution, Flat, Optimizer, RunSettings, target_is_share

PresetName = Literal[
    "warm-start",
    "sft",
    "grpo",
    "eggroll",
    "dense-es",
    "rwkv7",
    "countdown",
    "gsm-symbolic",
    "smollm2-sums",
    "smollm2-answers",
    "smollm2-sorting",
    "tiny",
]


@dataclass(frozen=True, kw_only=True)
class Grpo:
    """What only GRPO has."""

    group: int = count(8, least=2)
    """Completions of every prompt, which are compared with each other."""
    advantages: Literal["grpo", "dr_grpo", "rloo"] = "grpo"
    """How rewards are compared within a group."""
    clip_low: float = share(0.2)
    """The ratio of new and old probabilities counts down to 1 - clip_low."""
    clip_high: float = positive(0.28)
    """... and up to 1 + clip_high."""
    kl: float = from_zero(0.0)
    """Weight of the KL divergence from the model that training began with."""
    epochs: int = count(1)
    """Passes over the completions of a generation."""
    micro_batch: int | None = count(None)
    """Completions whose gradient is taken at a time; by default as many as fit and keep the device
    busy. Changes nothing but rounding."""


@dataclass(frozen=True, kw_only=True)
class Rewards:
    """What answers are rewarded by, and the processes that do it."""

    reward: str | None = None
    """Rewards with weights, such as "countdown=1,format=0.1" or "my_rewards.py:score"; the task's own by
    default. What has 1 or more counts as right."""
    reward_workers: int = count(2, least=0)
    """Processes that compute rewards; 0 for this one, without limits."""
    reward_seconds: float = positive(5.0)
    """Seconds after which the reward of a completion is given up, which leaves the completion out."""
    reward_memory_gib: float | None = positive(4.0)
    """Memory that a reward may take beyond what its process holds when it begins, which is counted as address
    space; None for no limit, which a reward needs that has a model on a GPU."""


@dataclass(frozen=True, kw_only=True)
class Writing:
    """How answers are written in training; measurements always take the likeliest tokens."""

    max_new_tokens: int | None = count(None)
    """Tokens of a completion, at most; by default the task's own number."""
    temperature: float = from_zero(0.0)
    """Of sampling in training; 0 takes the likeliest token. Measurements always do."""
    top_k: int = count(0, least=0)
    """Sample among so many of the likeliest tokens; 0 for all."""
    top_p: float = share(1.0)
    """Sample among the likeliest tokens that together have this probability."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer and are no part of it. Writing goes on to the end of a token that has one in
    it; one that takes several tokens cuts the answer afterwards."""


@dataclass(frozen=True, kw_only=True)
class Probing:
    """Finding sigma before a run, as `eggroll probe` does."""

    probe: bool = setting(False, role=Role.FREE)
    """Before a new run let the population answer at several sigmas, and take the sigma and learning rate
    that suit. They are recorded with the run's settings: a run that goes on keeps them."""
    probe_sigmas: tuple[float, ...] = setting((), role=Role.FREE)
    """Up to six sigmas to try; by default five from a quarter of --sigma to four times it."""


@dataclass(frozen=True, kw_only=True)
class Config(RunSettings):
    """Fine-tune a language model on answers that can be checked, with or without backpropagation."""

    driver: ClassVar[str] = "reasoning"

    preset: PresetName = setting(role=Role.FREE)
    """Where the other settings start from."""

    model: str = "transformer"
    """"transformer" or "rwkv7" for a new one; else a folder, a hub id or a GGUF file of the Llama, Qwen2 or
    Qwen3 family, "smollm2" (after `eggroll import smollm2`), or a folder that RWKV-7 was converted to."""
    start: Path | None = None
    """Run folder of this driver whose model is trained on. A model that is named takes the place of a
    preset's start."""
    layers: int = count(4, most=1000)
    """Blocks of a new model."""
    width: int = count(128, most=2**16)
    """Its width."""
    tokenizer: Literal["bytes", "bpe"] = "bytes"
    """What it reads: bytes, or byte pairs that are learned from the questions and solutions of the task."""
    vocabulary: int = count(512)
    """Tokens of "bpe", at most."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """The type of the weights; evolution strategies and backpropagation train float32 copies of bfloat16.
    "auto" is float32 on a CPU, where products in bfloat16 are slower, and bfloat16 elsewhere; that of the
    earlier run for --start, and float32 for a new model."""
    quantised: bool = False
    """Hold the matrices in int8, with copies that collect their updates, and train their scales."""
    copies: Literal["float32", "int8"] = "float32"
    """What collects the updates of matrices in int8: float32 copies, or in int8 what rounding left of them
    (arXiv 2602.03120), with two bytes a weight in all instead of five."""
    trained: tuple[str, ...] = ()
    """What is trained beside the matrices of layers: any of "embeddings", "head", "vectors"."""
    only: tuple[str, ...] = ()
    """Names or patterns of parameters that evolve, such as "q_proj" or "layers/*_proj"; by default the
    matrices of layers and what --trained adds. A name stands for that matrix of every layer."""
    chat: bool = False
    """Ask in the model's chat template."""
    chat_settings: str = "{}"
    """What else the template knows, as a JSON object, such as {"enable_thinking": false} of Qwen3."""
    system: str | None = None
    """The system's message in front of every question; by default what the template has for none."""

    task: str = "countdown-easy"
    """"sums", "sorting", "countdown-easy", a task of reasoning-gym, a file of questions that ends with
    .jsonl, or your own as my_file.py:make."""
    task_settings: str | None = None
    """Its settings, as a JSON object; by default those of the preset, if the task is the preset's."""
    rewards: Flat[Rewards] = Rewards()
    """What answers are rewarded by."""
    held_out_questions: int = count(256)
    """Questions that are measured on, and fresh ones at the end, at most; none of them is trained on."""
    max_prompt_tokens: int | None = count(None)
    """Leave questions out whose prompts have more tokens; their number is told."""

    algorithm: Literal["eggroll", "grpo", "sft"] = "eggroll"
    """"sft" is supervised, on worked solutions; "grpo" samples groups of answers and backpropagates."""
    prompts: int = count(16)
    """Questions of a generation."""
    optimizer: Flat[Optimizer] = Optimizer(name="sgd", learning_rate=2e-4)
    """What moves the parameters. SGD at sigma^2 sqrt(population) moves weights by about sigma an update."""
    gradient_norm: float = positive(1.0)
    """Gradients of backpropagation are scaled down to this norm."""
    gradient_checkpointing: Literal["auto", "always", "never"] = setting("auto", role=Role.ROUNDING)
    """Backpropagation computes the inside of layers again instead of holding it, which takes up to a
    third more time and much less memory; "auto" where it lets more texts fit that the device has use for."""
    grpo: Grpo = Grpo()
    """What only GRPO has."""

    evolution: Flat[Evolution] = Evolution(population=64, sigma=0.01)
    """Evolution strategies, whose members all answer the questions of a generation."""
    perturb: Literal["weights", "answers", "nodes"] = "weights"
    """What the noise of members is on: "weights", the same for all answers of a member; "answers", weights,
    anew for every answer; "nodes", what comes out of products with matrices, anew for every token."""
    sigma_scale: Literal["same", "rms"] = "same"
    """What sigma is multiplied by: 1 for all parameters, or for each matrix its root mean square when
    training begins, so that a sigma of 0.01 moves every matrix by 1%."""
    subspaces: int = count(1, most=64)
    """Divide the parameters at random into so many parts, anew for every noise, and the members over them:
    each is perturbed in its own part alone, by sigma times the root of their number (arXiv 2608.02391)."""
    probing: Flat[Probing] = Probing()
    """Finding sigma before a run."""
    noise_reuse: int = count(1)
    """Generations that see the same noise."""
    tensor_parallel: int = count(1, role=Role.ROUNDING)
    """Devices that share each large matrix, for models that one cannot hold; members are divided over the
    rest."""
    memory_gib: float | None = positive(None)
    """Memory that training may take; by default nine tenths of the device's, half of a CPU's."""
    prompt_chunk: int | None = count(None)
    """Questions answered at a time: rewards of some are computed while others are answered. By default as
    many as fit."""
    anchor: float = from_zero(0.0)
    """Share of the way back to the model that training began with, times the learning rate, an update."""
    anchor_norm: Literal["l2", "l1"] = "l2"
    """What --anchor keeps small of the way from there: "l1" takes the same step back for every weight, in
    units of weights, so that few of them end elsewhere than they began."""
    fitness: Literal["reward", "likelihood", "match", "teachers"] = "reward"
    """What a member is scored by: "reward", the rewards of its answers; "likelihood", the mean
    log-probability of worked solutions, which "sft" raises too; "match", the share of them that it would
    write, each token after the right ones before it; "teachers", how near its predictions on them are to
    those of teachers."""
    teachers: tuple[str, ...] = ()
    """Models that "teachers" learns from: run folders of this driver, or what --model takes, with the same
    tokenizer."""
    teacher_temperature: float = positive(1.0)
    """How little the mixture prefers the teachers that predict a question's solution better: near 0 the best
    alone counts, a large number weighs all alike."""
    objective: Literal["mean", "best"] = "mean"
    """Of several samples of a member for a question: their mean reward, or the best of them (pass@k)."""
    samples: int = count(1)
    """Completions of a member for each question."""

    writing: Flat[Writing] = Writing()
    """How answers are written in training."""

    def check(self) -> None:
        """Raises UsageError for the first setting that cannot be right."""
        super().check()
        self.optimizer.check()
        target_is_share(self, "a share of questions")
        answers = self.prompts * self.grpo.group
        if self.grpo.micro_batch is not None and answers % self.grpo.micro_batch:
            raise UsageError(
                f"--grpo.micro-batch {self.grpo.micro_batch}: it does not divide the {answers} answers of a "
                "generation (--prompts times --grpo.group)"
            )
        if self.quantised and self.algorithm != "eggroll":
            raise UsageError(
                f"--quantised: --algorithm {self.algorithm} trains floats alone; choose eggroll"
            )
        if self.copies == "int8" and not self.quantised:
            raise UsageError("--copies int8: they are those of matrices in int8; add --quantised")
        of_noise = {
            "sigma_scale": self.sigma_scale != "same",
            "only": self.only,
            "subspaces": self.subspaces > 1,
        }
        for name, given in of_noise.items():
            if given and self.algorithm != "eggroll":
                raise UsageError(
                    f"{flag(name)}: it is about noise, and --algorithm {self.algorithm} has none; "
                    "choose eggroll"
                )
        if self.perturb != "weights":
            self._check_answers()
        if self.evolution.population // 2 % self.subspaces:
            raise UsageError(
                f"--subspaces {self.subspaces}: must divide the {self.evolution.population // 2} pairs of "
                f"--population {self.evolution.population}"
            )
        self._check_probing()
        if self.quantised and self.sigma_scale != "same":
            raise UsageError(
                f"--sigma-scale {self.sigma_scale}: the noise of --quantised is in steps of its matrices; "
                "choose one of the two"
            )
        greedy = not self.writing.temperature
        if self.algorithm == "grpo" and greedy:
            raise UsageError(
                "--temperature 0: the answers of a group would all be the same; choose 1 for GRPO"
            )
        if self.samples > 1 and greedy:
            raise UsageError(
                f"--samples {self.samples}: without --temperature they would all be the same"
            )
        if self.fitness != "reward" and (self.algorithm != "eggroll" or self.samples > 1):
            why = (
                "nothing is sampled; leave --samples out"
                if self.algorithm == "eggroll"
                else "members of an evolution strategy have one; choose --algorithm eggroll"
            )
            raise UsageError(f"--fitness {self.fitness}: {why}")
        if (self.fitness == "teachers") != bool(self.teachers):
            raise UsageError(
                "--fitness teachers: learns from models; name them by --teachers"
                if not self.teachers
                else f"--teachers {' '.join(self.teachers)}: they are those of --fitness teachers; add it"
            )
        if self.tokenizer == "bpe" and self.vocabulary < 258:
            raise UsageError(
                f"--vocabulary {self.vocabulary}: bytes and two special tokens make 258; choose as many"
            )
        if "" in self.writing.stop:
            raise UsageError("--stop '': must be a text, got an empty one, which is everywhere")
        if self.system is not None and not self.chat:
            raise UsageError(f"--system {self.system!r}: it is part of a chat; add --chat")
        self.task_arguments()
        self.settled()
        if self.chat_arguments() and not self.chat:
            raise UsageError(f"--chat-settings {self.chat_settings!r}: they are those of --chat")

    def _check_answers(self) -> None:
        """Raises UsageError for what noise of its own for every answer does not go with."""
        others = {
            f"--algorithm {self.algorithm}": self.algorithm != "eggroll",
            f"--fitness {self.fitness}": self.fitness != "reward",
            f"--prompt-chunk {self.prompt_chunk}": self.prompt_chunk is not None,
        }
        if self.perturb == "nodes":
            others |= {
                f"--rank {self.evolution.rank}": self.evolution.rank != 1,
                f"--sigma-scale {self.sigma_scale}": self.sigma_scale != "same",
                f"--subspaces {self.subspaces}": self.subspaces > 1,
                "--quantised": self.quantised,
            }
        for what, given in others.items():
            if given:
                raise UsageError(
                    f"{what}: must be left out with --perturb {self.perturb}, whose noise is that of single "
                    "answers"
                )

    def _check_probing(self) -> None:
        own = self.probing
        if own.probe and (self.algorithm != "eggroll" or self.fitness != "reward"):
            what = "algorithm" if self.algorithm != "eggroll" else "fitness"
            raise UsageError(
                f"--probe: it compares rewards of a population, and --{what} {getattr(self, what)} has none; "
                "leave one of them out"
            )
        sigmas = own.probe_sigmas
        if len(sigmas) > 6 or not all(0 < sigma < math.inf for sigma in sigmas):
            raise UsageError(
                f"--probe-sigmas {' '.join(map(str, sigmas))}: must be one to six positive numbers"
            )

    def check_places(self) -> None:
        """Raises UsageError for the first file, folder or name outside the settings that is not there."""
        super().check_places()
        # They import nothing heavy, but more than the settings.
        from experiments.models.names import check_model
        from experiments.reasoning import rewards, tasks
        from experiments.run.drivers import check_run, read_settings

        if self.start is None:
            check_model(self.model)
        else:
            try:
                check_run(self.start)
                other = read_settings(self.start)[0].name
            except UsageError as error:
                raise UsageError(f"--start: {error}") from error
            if other != self.driver:
                raise UsageError(f"--start {self.start}: that run is of another driver")
        for name in self.teachers:
            if (Path(name) / "checkpoints").is_dir():
                check_run(Path(name))
            else:
                check_model(name)
        tasks.check(self.task, **self.task_arguments())
        if self.rewards.reward is not None:
            rewards.check(self.rewards.reward)

    def on_one_device(self) -> "Config":
        """The same by one process on one device."""
        return replace(super().on_one_device(), tensor_parallel=1)

    @property
    def narrow_type(self) -> str | None:
        """The type of weights that a small update may leave as they are."""
        if self.quantised:
            return "int8"
        return None if self.dtype == "float32" else self.dtype

    def task_arguments(self) -> dict[str, Any]:
        """The settings of the task.

        Raises:
            UsageError: where they are no JSON object.
        """
        found = _object("task_settings", self._task_settings, '{"size": 1000}')
        if "name" in found:
            raise UsageError(
                f"--task-settings {self._task_settings!r}: the name of a task is that of --task"
            )
        return found

    @property
    def _task_settings(self) -> str:
        """The settings of the task as they were given, or those of the preset where the task is its own."""
        if self.task_settings is not None:
            return self.task_settings
        own = self.task == PRESETS[self.preset].task
        return TASK_SETTINGS.get(self.preset, "{}") if own else "{}"

    def settled(self) -> "Config":
        """The same with one model and the settings of its task: a preset's start gives way to a model that
        was chosen beside it.

        Raises:
            UsageError: where both a model and a start were chosen.
        """
        usual, settled = PRESETS[self.preset], replace(self, task_settings=self._task_settings)
        if self.start is None or self.model == usual.model:
            return settled
        if self.start != usual.start:
            raise UsageError(
                f"--start {self.start} and --model {self.model}: each names a model; choose one of them"
            )
        return replace(settled, start=None)

    def chat_arguments(self) -> dict[str, Any]:
        """The settings of the chat template.

        Raises:
            UsageError: where they are no JSON object.
        """
        return _object("chat_settings", self.chat_settings, '{"enable_thinking": false}')


def _object(name: str, text: str, example: str) -> dict[str, Any]:
    try:
        found = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{flag(name)} {text!r} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise UsageError(f"{flag(name)} must be an object such as '{example}', got {text!r}")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; the second of two values of a name would replace the first silently."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
        raise ValueError(f"{twice!r} is there twice")
    return found


def preset(name: PresetName, **settings: object) -> Config:
    config = Config(
        preset=name,
        run_dir=Path("runs/reasoning") / name,
        max_generations=200,
        evaluate_every=10,
    )
    return changed(config, settings)


# A model of 131,000 weights that learns to add two numbers, digit by digit, in half a minute.
SMALL: dict[str, object] = dict(layers=2, width=64, task="sums")
SFT: dict[str, object] = dict(
    algorithm="sft", optimizer="adamw", learning_rate=3e-3, prompts=64, evaluate_every=40
)
# What the four arms go on from, each for about two minutes on two cores.
WARM: dict[str, object] = dict(**SMALL, start=Path("runs/reasoning/warm-start"))
EVOLVED: dict[str, object] = dict(population=128, prompts=32, sigma=0.01, learning_rate=1e-3)

# A model of the Hugging Face hub on one GPU. arXiv 2511.16652: sigma 7e-4 to 2e-3, rank 1, greedy.
HUB: dict[str, object] = dict(
    model="Qwen/Qwen3-0.6B",
    chat=True,
    population=512,
    prompts=16,
    sigma=1e-3,
    learning_rate=5e-6,
)

# SmolLM2-135M-Instruct (`make smollm2`) on sums of numbers from 1 to 20, a third of which it gets right.
SMOLLM2: dict[str, object] = dict(
    model="smollm2",
    chat=True,
    task="sums",
    reward="number",
    reward_workers=0,
    stop=("\n",),
    max_new_tokens=12,
    population=32,
    prompts=8,
    optimizer="adam",
    sigma=0.007,
    learning_rate=1e-3,
    held_out_questions=80,
    max_generations=60,
)
SMOLLM2_SUMS = (
    '{"least": 1, "most": 20, "held_out": 0.4, "form": "{a}+{b}", "template": '
    '"What is {question}?"}'
)

SMOLLM2_SORTING = (
    '{"least": 10, "size": 2000, "held_out": 0.2, "form": "Sort in ascending order: {numbers}"}'
)
# Three numbers to be sorted, which it does with a quarter; an answer is a short sentence.
SORTING: dict[str, object] = dict(SMOLLM2, task="sorting", reward="numbers", max_new_tokens=28)

# Settings of a preset's own task; another task that is named has none of them.
TASK_SETTINGS: dict[str, str] = {
    "tiny": '{"digits": 1}',
    "smollm2-sums": SMOLLM2_SUMS,
    "smollm2-answers": SMOLLM2_SUMS,
    "smollm2-sorting": SMOLLM2_SORTING,
}
PRESETS: dict[str, Config] = {
    "warm-start": preset("warm-start", **SMALL, **SFT, max_generations=240),
    "sft": preset("sft", **WARM, **SFT, max_generations=600),
    "grpo": preset(
        "grpo",
        **WARM,
        algorithm="grpo",
        optimizer="adamw",
        learning_rate=3e-4,
        prompts=32,
        temperature=1.0,
        max_generations=600,
    ),
    "eggroll": preset("eggroll", **WARM, **EVOLVED, max_generations=100),
    "dense-es": preset("dense-es", **WARM, **EVOLVED, rank="full", max_generations=100),
    "rwkv7": preset("rwkv7", **SMALL, **SFT, model="rwkv7", max_generations=240),
    "countdown": preset("countdown", **HUB, task="countdown"),
    "gsm-symbolic": preset("gsm-symbolic", **HUB, task="gsm_symbolic"),
    "smollm2-sums": preset("smollm2-sums", **SMOLLM2),
    "smollm2-answers": preset("smollm2-answers", **SMOLLM2, perturb="answers"),
    "smollm2-sorting": preset("smollm2-sorting", **SORTING),
    "tiny": preset(
        "tiny",
        layers=1,
        width=16,
        task="sums",
        population=8,
        prompts=4,
        held_out_questions=2,
        reward_workers=0,
        max_generations=4,
        evaluate_every=2,
    ),
}
