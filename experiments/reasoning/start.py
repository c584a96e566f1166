"""The model and tokenizer that training begins with: new ones, a folder's, or those of an earlier run."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, PyTree

from experiments.models import families, hugging_face, quantised, tokens
from experiments.models.family import ModelConfig
from experiments.models.tokens import AnyTokenizer
from experiments.reasoning.config import Config
from experiments.reasoning.language_model import LanguageModel, language_model
from experiments.reasoning.planning import planner_of
from experiments.reasoning.tasks import Task
from experiments.run import hosts
from experiments.run.commands import read_run
from experiments.run.drivers import read_settings
from experiments.run.errors import UsageError
from experiments.run.fields import changed


class Start(NamedTuple):
    """What training begins with.

    Attributes:
        model: the functions.
        shape: the configuration of the model, whose type says its family (`families.of`).
        tokenizer: of its texts.
        params: makes the parameters; an array of the seed decides new ones. Those that are read, or
            rounded to int8, lie on the host.
        folder: that they were read from, if any.
    """

    model: LanguageModel
    shape: ModelConfig
    tokenizer: AnyTokenizer
    params: Callable[[Array], PyTree]
    folder: Path | None = None


def start(config: Config, task: Callable[[], Task] | None = None) -> Start:
    """The model that the settings name.

    Args:
        config: the settings.
        task: gives what byte pairs are learned from, where the run has none yet; may be None elsewhere.

    Raises:
        UsageError: for a folder or a run that cannot be read, or settings that it does not take.
    """
    config = with_dtype(config)
    if config.tokenizer == "bpe" and (
        config.start is not None or config.model not in families.FAMILIES
    ):
        raise UsageError(
            f"--tokenizer bpe: {config.start or config.model} has a tokenizer of its own; leave this out"
        )
    if config.start is not None:
        found = _of_run(config)
    elif config.model in families.FAMILIES:
        found = _new(config, task)
    else:
        found = _of_folder(config)
    # Tokenizers without any have no template: that of RWKV's World vocabulary.
    if config.chat and getattr(found.tokenizer, "template", None) is None:
        raise UsageError(
            f"--chat: the tokenizer of {config.start or config.model} has no chat template; choose --no-chat"
        )
    found = in_int8(found, config) if config.quantised else found
    plan = planner_of(config, found.model.plan, found.params)
    return found._replace(model=found.model._replace(plan=plan))


def with_dtype(config: Config) -> Config:
    """The settings with the type of the weights that "auto" stands for here."""
    if config.dtype != "auto":
        return config
    if config.start is not None:
        earlier = read_settings(config.start)[1]
        if not isinstance(earlier, Config):
            raise UsageError(f"--start {config.start}: that run is of another driver")
        return changed(config, dtype=with_dtype(earlier).dtype)
    narrow = config.model not in families.FAMILIES and jax.default_backend() != "cpu"
    return changed(config, dtype="bfloat16" if narrow else "float32")


def in_int8(found: Start, config: Config) -> Start:
    """The same with its matrices in int8. What a step of them is worth is that of the first parameters."""
    params = families.of(found.shape).quantise(jax.device_get(found.params(jnp.int32(config.seed))))
    model = _functions(found.shape, config, quantised.steps(params))
    return found._replace(model=model, params=lambda seed: params)


def in_floats(shape: ModelConfig, params: PyTree, dtype: DTypeLike) -> PyTree:
    """The parameters of a model in floats, if some are in int8."""
    return families.of(shape).dequantise(params, dtype)


def _new(config: Config, task: Callable[[], Task] | None) -> Start:
    """A model of random parameters that reads bytes or byte pairs."""
    tokenizer = tokens.bytes_tokenizer() if config.tokenizer == "bytes" else _pairs(config, task)
    try:
        shape = families.FAMILIES[config.model].small(
            tokenizer.vocab_size, config.width, config.layers
        )
    except ValueError as error:
        raise UsageError(f"--width {config.width}: {error}") from error
    model = _functions(shape, config)

    def params(seed: Array) -> PyTree:
        return jax.tree.map(lambda x: x.astype(config.dtype), model.init(jax.random.key(seed)))

    return Start(model, shape, tokenizer, params)


# Questions that byte pairs are learned from, at most.
ENOUGH = 2000


def _pairs(config: Config, task: Callable[[], Task] | None) -> tokens.Tokenizer:
    """The byte pairs of the run folder, or of the task where no checkpoint was trained on others."""
    folder = config.run_dir / "tokenizer"
    # The file that is written last.
    if (folder / "tokenizer_config.json").exists() and not config.overwrite:
        return tokens.from_folder(folder)
    if any((config.run_dir / "checkpoints").glob("[0-9]*")) and not config.overwrite:
        raise UsageError(
            f"{config.run_dir} has checkpoints but no folder tokenizer, which --tokenizer bpe needs: put it "
            "back, choose another --run-dir, or replace the run with --overwrite"
        )
    assert task is not None
    train = task().train
    order = np.random.default_rng(config.seed).permutation(len(train))[:ENOUGH]
    text = lambda question: question.prompt + (question.trace or question.answer)
    return tokens.train_bpe((text(train[int(i)]) for i in order), config.vocabulary)


def keep_tokenizer(config: Config, base: Start) -> None:
    """Writes byte pairs into the run folder, once: another version of tokenizers may learn others."""
    folder = config.run_dir / "tokenizer"
    if not hosts.first() or config.tokenizer != "bpe":
        return
    assert isinstance(base.tokenizer, tokens.Tokenizer)
    if not (folder / "tokenizer_config.json").exists():
        base.tokenizer.save(folder)


def _of_folder(config: Config) -> Start:
    """The checkpoint of a folder, by the family that reads it."""
    folder, dtype = hugging_face.resolve(config.model), jnp.dtype(config.dtype)
    family = families.of_folder(folder)
    shape, params = family.load(folder, dtype, True)
    tokenizer = family.tokenizer(folder)
    if tokenizer.vocab_size > shape.vocab_size:
        raise UsageError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model {shape.vocab_size}"
        )
    return Start(_functions(shape, config), shape, tokenizer, lambda seed: params, folder)


def _of_run(config: Config) -> Start:
    """The model of an earlier run, with the parameters that it ended with."""
    assert config.start is not None
    with read_run(config.start, on_host=True) as found:
        trainer: Any = found.trainer
        if not isinstance(trainer.config, Config):
            raise UsageError(f"--start {config.start}: that run is of another driver")
        before: Start = trainer.base
        if config.dtype != trainer.config.dtype:
            raise UsageError(
                f"--dtype {config.dtype}: must be {trainer.config.dtype} as in --start {config.start}; "
                "leave it out"
            )
        params = in_floats(before.shape, found.state.learner.params, trainer.config.dtype)
    return before._replace(model=_functions(before.shape, config), params=lambda seed: params)


def _functions(
    shape: ModelConfig, config: Config, steps: Mapping[str, float] | None = None
) -> LanguageModel:
    try:
        return language_model(shape, config.trained, steps)
    except ValueError as error:
        raise UsageError(f"--trained: {error}") from error


def save(base: Start, params: PyTree, folder: Path, dtype: DTypeLike) -> None:
    """Writes a model as a folder that `--model` takes, and transformers where it knows the model.

    Matrices in int8 are written as the floats of `dtype` that they stand for.
    """
    params = in_floats(base.shape, params, dtype)
    families.of(base.shape).save(folder, base.shape, params, base.folder)
    # The tokenizer of a folder is copied from there.
    if base.folder is None and isinstance(base.tokenizer, tokens.Tokenizer):
        base.tokenizer.save(folder)
