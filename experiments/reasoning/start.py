"""The model and tokenizer that training begins with: new ones, a folder's, or those of an earlier run."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, PyTree

from experiments.models import (
    hugging_face,
    quantised,
    rwkv7,
    rwkv7_weights,
    tokens,
    transformer,
    world_tokenizer,
)
from experiments.reasoning.config import Config
from experiments.reasoning.language_model import LanguageModel, of_rwkv7, of_transformer
from experiments.reasoning.tasks import Task
from experiments.run import hosts
from experiments.run.drivers import read_run
from experiments.run.errors import UsageError


class Start(NamedTuple):
    """What training begins with.

    Attributes:
        model: the functions.
        shape: the configuration of the model: a TransformerConfig or RWKV7Config.
        tokenizer: of its texts.
        params: makes the parameters; an array of the seed decides new ones. Those that are read, or
            rounded to int8, lie on the host.
        folder: that they were read from, if any.
    """

    model: LanguageModel
    shape: Any
    tokenizer: Any
    params: Callable[[Array], PyTree]
    folder: Path | None = None


def start(config: Config, task: Task | None = None) -> Start:
    """The model that the settings name.

    Args:
        config: the settings.
        task: what byte pairs are learned from, unless the run folder has them; None where it does.

    Raises:
        UsageError: for a folder or a run that cannot be read, or settings that it does not take.
    """
    if config.tokenizer == "bpe" and (config.start is not None or config.model not in NEW):
        raise UsageError(
            f"--tokenizer bpe: {config.start or config.model} has a tokenizer of its own; leave this out"
        )
    if config.start is not None:
        found = _of_run(config)
    elif config.model in NEW:
        found = _new(config, task)
    else:
        found = _of_folder(config)
    # Tokenizers without any have no template: that of RWKV's World vocabulary.
    if config.chat and getattr(found.tokenizer, "template", None) is None:
        raise UsageError(
            f"--chat: the tokenizer of {config.start or config.model} has no chat template; choose --no-chat"
        )
    return in_int8(found, config) if config.quantised else found


def in_int8(found: Start, config: Config) -> Start:
    """The same with its matrices in int8. What a step of them is worth is that of the first parameters."""
    quantise = _family(found.shape).quantise
    params = quantise(jax.device_get(found.params(jnp.int32(config.seed))))
    model = _functions(found.shape, config, quantised.steps(params))
    return found._replace(model=model, params=lambda seed: params)


def in_floats(shape: Any, params: PyTree, dtype: DTypeLike) -> PyTree:
    """The parameters of a model in floats, if some are in int8."""
    return quantised.dequantise(params, dtype, _family(shape).output_axis)


def _family(shape: Any) -> Any:
    return rwkv7 if isinstance(shape, rwkv7.RWKV7Config) else transformer


NEW = ("transformer", "rwkv7")


def _new(config: Config, task: Task | None) -> Start:
    """A model of random parameters that reads bytes or byte pairs."""
    tokenizer = tokens.bytes_tokenizer() if config.tokenizer == "bytes" else _pairs(config, task)
    if config.model == "rwkv7":
        narrow = min(64, config.width)
        if config.width % narrow:
            raise UsageError(
                f"--width {config.width}: heads are 64 wide, so choose a multiple of 64"
            )
        shape: Any = rwkv7.RWKV7Config(
            vocab_size=tokenizer.vocab_size,
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            head_dim=narrow,
        )
    else:
        heads = max(1, config.width // 32)
        if config.width % (2 * heads):
            raise UsageError(
                f"--width {config.width}: it is divided among {heads} heads of an even width, so choose a "
                "multiple of 32"
            )
        shape = transformer.TransformerConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=config.width,
            intermediate_size=8 * config.width // 3,
            num_hidden_layers=config.layers,
            num_attention_heads=heads,
        )
    model = _functions(shape, config)
    return Start(model, shape, tokenizer, lambda seed: model.init(jax.random.key(seed)))


# Questions that byte pairs are learned from, at most.
ENOUGH = 2000


def _pairs(config: Config, task: Task | None) -> tokens.Tokenizer:
    """The byte pairs of the run folder, or of the task where the run has not begun."""
    folder = config.run_dir / "tokenizer"
    # The file that is written last.
    if (folder / "tokenizer_config.json").exists() and not config.overwrite:
        return tokens.from_folder(folder)
    if task is None:
        raise UsageError(
            f"{config.run_dir} has lost its folder tokenizer, without which it is not read"
        )
    order = np.random.default_rng(config.seed).permutation(len(task.train))[:ENOUGH]
    text = lambda question: question.prompt + (task.trace(question) or question.answer)
    return tokens.train_bpe((text(task.train[int(i)]) for i in order), config.vocabulary)


def keep_tokenizer(config: Config, begin: Start) -> None:
    """Writes byte pairs into the run folder, once: another version of tokenizers may learn others."""
    folder = config.run_dir / "tokenizer"
    if not hosts.first():
        return
    if config.tokenizer == "bpe" and not (folder / "tokenizer_config.json").exists():
        begin.tokenizer.save(folder)


# One for a process: its 65,529 lines take a second to read.
_world = functools.cache(world_tokenizer.WorldTokenizer)


def _of_folder(config: Config) -> Start:
    """A checkpoint of the Hugging Face layout, or of RWKV-7."""
    folder, dtype = hugging_face.resolve(config.model), jnp.dtype(config.dtype)
    if rwkv7_weights.is_folder(folder):
        shape: Any
        shape, params = rwkv7_weights.load(folder, dtype, on_host=True)
        # One that was trained here has a tokenizer of its own; the published ones have theirs in common.
        own = (folder / "tokenizer.json").exists()
        tokenizer: Any = tokens.from_folder(folder) if own else _world()
    else:
        shape, params = hugging_face.load(folder, dtype, on_host=True)
        tokenizer = tokens.from_folder(folder)
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
        params = in_floats(before.shape, found.state.learner.params, trainer.config.dtype)
    return before._replace(model=_functions(before.shape, config), params=lambda seed: params)


def _functions(
    shape: Any, config: Config, steps: Mapping[str, float] | None = None
) -> LanguageModel:
    try:
        if isinstance(shape, rwkv7.RWKV7Config):
            return of_rwkv7(shape, config.trained, steps)
        return of_transformer(shape, config.trained, steps)
    except ValueError as error:
        raise UsageError(f"--trained: {error}") from error


def save(begin: Start, params: PyTree, folder: Path, dtype: DTypeLike) -> None:
    """Writes a model as a folder that `--model` takes, and transformers where it knows the model.

    Matrices in int8 are written as the floats of `dtype` that they stand for.
    """
    params = in_floats(begin.shape, params, dtype)
    if isinstance(begin.shape, rwkv7.RWKV7Config):
        rwkv7_weights.save(folder, begin.shape, params)
        if isinstance(begin.tokenizer, tokens.Tokenizer):
            begin.tokenizer.save(folder)
        return
    hugging_face.save(folder, begin.shape, params, source=begin.folder)
    if begin.folder is None:
        begin.tokenizer.save(folder)
