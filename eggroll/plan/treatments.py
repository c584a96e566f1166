"""The treatments of a parameter: low-rank noise, dense noise, node noise, given, frozen."""

import dataclasses
from collections.abc import Sequence

Axes = int | Sequence[int]


@dataclasses.dataclass(frozen=True, init=False)
class Matrix:
    """Low-rank noise: a factor ``A`` over the row axes and a factor ``B`` over the column axes.

    Attributes:
      rows: axes over which ``A`` varies, usually the axes that a product contracts.
      columns: axes over which ``B`` varies.
      batch: axes whose indices have independent noise: layers of a stack, experts.
      rank: number of columns of ``A`` and ``B``; None takes the strategy's rank.
      sigma: factor on the strategy's sigma for this parameter.

    Example:
      >>> Matrix(rows=0, columns=(1, 2))
      Matrix(rows=(0,), columns=(1, 2), batch=(), rank=None, sigma=1.0)
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    batch: tuple[int, ...]
    rank: int | None
    sigma: float

    def __init__(
        self,
        rows: Axes,
        columns: Axes,
        batch: Axes = (),
        rank: int | None = None,
        sigma: float = 1.0,
    ) -> None:
        for name, axes in (("rows", rows), ("columns", columns), ("batch", batch)):
            several = axes if isinstance(axes, Sequence) else (axes,)
            object.__setattr__(self, name, tuple(map(int, several)))
        object.__setattr__(self, "rank", rank)
        object.__setattr__(self, "sigma", sigma)


@dataclasses.dataclass(frozen=True)
class Dense:
    """Full-rank noise, one sample an entry: for vectors, small matrices, or plain OpenES.

    Attributes:
      sigma: factor on the strategy's sigma for this parameter.
    """

    sigma: float = 1.0


@dataclasses.dataclass(frozen=True)
class Frozen:
    """No noise and no update."""


@dataclasses.dataclass(frozen=True)
class Nodes:
    """Noise on what comes out of the products with the parameter, anew for every row.

    Attributes:
      sigma: factor on the strategy's sigma for the outputs of this parameter's products.
    """

    sigma: float = 1.0


@dataclasses.dataclass(frozen=True)
class Given:
    """No noise; the caller has the gradient, as for a layer whose error is known.

    ``es.gradient`` returns None for the parameter. The caller puts its own gradient there and passes the
    tree to ``es.apply_gradient``.
    """


Treatment = Matrix | Dense | Nodes | Given | Frozen
