"""A family of language models as one record: configuration, functions, plan, int8, sharding and files.

The rest of the code knows language models by these records alone (`experiments.models.families` lists
them). CONTRIBUTING.md has the recipe for a new one.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from jaxtyping import Array, DTypeLike, Float, Int, Key, PyTree

from eggroll.plan import Planner
from experiments.models import quantised, tokens
from experiments.models.adapters import ModuleOf
from experiments.models.parallel import ShardingRules
from experiments.models.tokens import AnyTokenizer

# A tree of nested dicts, whose paths have the names of plans, of sharding and of files.
Params = dict[str, Any]
# What a family keeps of a sequence between tokens: a tree of arrays.
Cache = Any


@runtime_checkable
class ModelConfig(Protocol):
    """The sizes of one model: a frozen dataclass of a class that no other family has."""

    @property
    def vocab_size(self) -> int:
        """Tokens that the model has."""

    @property
    def context(self) -> int | None:
        """Tokens of the longest text that it was made for; None for any."""


# A `ModelConfig`.
C = TypeVar("C")


@dataclass(frozen=True, kw_only=True, eq=False)
class Family(Generic[C]):
    """A family of language models.

    All functions are of one sequence, or of a tree of parameters, and are mapped and compiled by their
    callers.

    Attributes:
        name: of ``--model NAME``, for a new model of random parameters.
        config: the class of its configurations.
        small: ``(vocab_size, width, layers) -> config``, of such a new model. It raises ValueError for a
            width that does not fit; the message goes on from "--width 33: ".
        init: ``(key, config) -> params``, untrained ones in float32.
        apply: ``(params, tokens [length], config, at, remat) -> logits [kept, vocab]``: the logits of the
            token after each of the tokens, or with ``at`` after those at these places. Where ``remat`` is
            true, a backward pass computes what is inside of a layer again instead of holding it.
        prefill: ``(params, tokens [prompt_slots], length, config, slots, prefix) -> (logits [vocab],
            cache)``: reads a prompt of ``length`` tokens that is padded behind its end. ``slots`` is the
            room for the padded prompt and all that is written after it; ``length`` may be traced.
            ``prefix`` is None, or the cache that ``prefill`` gave for the text that the prompt goes on
            from, which was not padded and had no room; all sequences of a batch share it.
        decode: ``(params, cache, token, t, config, prefix) -> (logits [vocab], cache)``: reads the t-th
            token after the prompt. ``t`` is one number for all sequences of a batch; the cache keeps its
            shapes.
        plan: ``(train, steps) -> planner``: the noise of every parameter (`plans.by_group` makes one).
            ``train`` names the groups that are trained beside the matrices of layers, ``steps`` are those
            of int8 matrices. It raises ValueError for a name that it does not have.
        output_axis: ``(path) -> axis``: the axis of a matrix that the scales of its int8 form are taken
            over, or None for a parameter that stays in floats. Functions read such matrices by
            `quantised.linear` and `quantised.look_up`.
        sharding: which axis of which weight and cache devices divide that share a model.
        architectures: values of ``architectures`` in config.json of the folders that `load` reads.
        model_types: values of ``model_type`` in config.json of such folders, where they name no
            architecture.
        load: ``(folder, dtype, on_host) -> (config, params)``, in ``dtype`` or, for None, that of the
            file; arrays of NumPy where ``on_host``. It raises UsageError for a folder that is damaged.
        save: ``(folder, config, params, source)``: writes a folder that `load` reads. ``source`` is the
            folder that the model was loaded from, or None; what belongs to the model beside its
            parameters, such as its tokenizer, is copied from there.
        tokenizer: ``(folder) -> tokenizer`` of a folder that `load` reads.
        adapter_module: ``(path) -> name``: the module of a stack of matrices, in the names of PEFT's adapters
            (`adapters.llama_module`), or None for another parameter. None for a family that PEFT does not
            know.
    """

    name: str
    config: type[C]
    small: Callable[[int, int, int], C]
    init: Callable[[Key[Array, ""], C], Params]
    apply: Callable[
        [Params, Int[Array, "length"], C, Int[Array, "kept"] | None, bool],
        Float[Array, "kept vocab"],
    ]
    prefill: Callable[
        [Params, Int[Array, "prompt_slots"], int | Int[Array, ""], C, int, Cache | None],
        tuple[Float[Array, "vocab"], Cache],
    ]
    decode: Callable[
        [Params, Cache, Int[Array, ""], int | Int[Array, ""], C, Cache | None],
        tuple[Float[Array, "vocab"], Cache],
    ]
    plan: Callable[[Collection[str], Mapping[str, float] | None], Planner]
    output_axis: Callable[[str], int | None]
    sharding: ShardingRules
    architectures: tuple[str, ...] = ()
    model_types: tuple[str, ...] = ()
    load: Callable[[Path, DTypeLike | None, bool], tuple[C, Params]]
    save: Callable[[Path, C, Params, Path | None], None]
    tokenizer: Callable[[Path], AnyTokenizer] = tokens.from_folder
    adapter_module: ModuleOf | None = None

    def reads(self, told: Mapping[str, Any]) -> bool:
        """Whether `load` is for the folder of a config.json.

        Args:
            told: the content of config.json.
        """
        names = told.get("architectures")
        if isinstance(names, list) and any(name in self.architectures for name in names):
            return True
        return told.get("model_type") in self.model_types

    def quantise(self, params: PyTree) -> PyTree:
        """The same model with its matrices in int8 (:mod:`quantised`)."""
        return quantised.quantise(params, self.output_axis)

    def dequantise(self, params: PyTree, dtype: DTypeLike) -> PyTree:
        """The parameters in floats; int8 matrices become such of ``dtype``, others stay as they are."""
        return quantised.dequantise(params, dtype, self.output_axis)
