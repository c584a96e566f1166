"""What a pretraining run carries from generation to generation."""

from typing import Any, NamedTuple

from jaxtyping import Array, Int, PyTree


class Carry(NamedTuple):
    """All that decides the future of a run, beside its settings and its text.

    Attributes:
        training: the evolution strategy's state, or (parameters, optimizer state) of backpropagation.
        hidden: states of the model, leading axis [population], or [streams] where all of a stream are one.
        cursor: updates done: where every stream stands in the text.
        seed: what everything random comes from.
    """

    training: Any
    hidden: PyTree
    cursor: Int[Array, ""]
    seed: Int[Array, ""]
