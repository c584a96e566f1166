"""How a leaf is a matrix or a stack of matrices: which axes are rows, columns and stack."""

import math
from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array


@runtime_checkable
class DimensionNumbers(Protocol):
    """Which axes of a leaf are rows and columns; the others number a stack.

    ``optax.contrib.MuonDimensionNumbers`` and ``optax.contrib.GaLoreDimensionNumbers`` are such.

    Attributes:
      reduction_axis: the axes of the rows (of the inputs of a layer).
      output_axis: the axes of the columns.
    """

    @property
    def reduction_axis(self) -> int | tuple[int, ...]: ...

    @property
    def output_axis(self) -> int | tuple[int, ...]: ...


class View(NamedTuple):
    """How a leaf is a matrix or a stack of matrices.

    Attributes:
      shape: of the leaf.
      order: its axes: those that number the stack, then those of the rows, then those of the
        columns.
      matrix: the shape as a matrix, with one axis before it where there is a stack; the shape of
        the leaf where it is no matrix.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]
    matrix: tuple[int, ...]

    def to(self, leaf: Array) -> Array:
        """The leaf as matrices."""
        return leaf.transpose(self.order).reshape(self.matrix)

    def back(self, matrix: Array) -> Array:
        """Matrices as the leaf that they came from."""
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return matrix.reshape([self.shape[i] for i in self.order]).transpose(inverse)


def view(shape: tuple[int, ...], spec: DimensionNumbers | None = None, path: str = "") -> View:
    """The view of one leaf.

    Args:
      shape: of the leaf.
      spec: which axes are rows and columns. None: the last axis is the columns, the axes before it
        are the rows.
      path: of the leaf, for the message.

    Raises:
      ValueError: the spec names an axis that the shape does not have, or names one twice.

    Example:
      >>> from optax.contrib import MuonDimensionNumbers
      >>> view((12, 64, 4, 16), MuonDimensionNumbers(1, (2, 3))).matrix
      (12, 64, 64)
      >>> view((3, 3, 8, 16)).matrix
      (72, 16)
    """
    axes = tuple(range(len(shape)))
    if spec is None:
        matrix = (math.prod(shape[:-1]), shape[-1]) if len(shape) > 1 else shape
        return View(shape, axes, matrix)
    named = []
    for given in (spec.reduction_axis, spec.output_axis):
        group = (given,) if isinstance(given, int) else tuple(given)
        if any(not -len(shape) <= i < len(shape) for i in group):
            raise ValueError(f"{path}: {spec} names an axis that the shape {shape} does not have")
        named.append(tuple(i % len(shape) for i in group))
    rows, columns = named
    if len({*rows, *columns}) < len(rows) + len(columns):
        raise ValueError(f"{path}: {spec} names an axis twice; rows and columns share none")
    stack = tuple(i for i in axes if i not in rows + columns)
    sizes = [math.prod(shape[i] for i in group) for group in (stack, rows, columns)]
    return View(shape, stack + rows + columns, tuple(sizes if stack else sizes[1:]))
