"""Types of arguments that several rooms share."""

from typing import Any, Protocol, runtime_checkable

# A type of numbers, or one of JAX's extended types, such as that of keys (no public class names both).
DType = Any


@runtime_checkable
class HasDtype(Protocol):
    """An array, an abstract array, or anything else with a type of numbers."""

    @property
    def dtype(self) -> DType: ...


@runtime_checkable
class IsArray(HasDtype, Protocol):
    """A shape and a type of numbers: ``jax.Array``, ``numpy.ndarray``, ``jax.ShapeDtypeStruct``."""

    @property
    def shape(self) -> tuple[int, ...]: ...
