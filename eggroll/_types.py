"""Types of arguments that several packages share."""

from typing import Any, Protocol, runtime_checkable

# A NumPy dtype or an extended dtype of JAX, such as a key's; no public class covers both.
DType = Any


@runtime_checkable
class HasDtype(Protocol):
    """An array, an abstract array, or any other object with a dtype."""

    @property
    def dtype(self) -> DType: ...


@runtime_checkable
class IsArray(HasDtype, Protocol):
    """A shape and a dtype: ``jax.Array``, ``numpy.ndarray``, ``jax.ShapeDtypeStruct``."""

    @property
    def shape(self) -> tuple[int, ...]: ...
