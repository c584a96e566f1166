"""How a gradient is split: a compact part for the full optimizer, the rest for one without state.

A :class:`Projector` works on a tree of matrices, or of stacks of matrices whose layers are split
one by one. Its state holds arrays alone: indices or bases. A projector of one's own is four
functions.
"""

from optim.projector._bases import random, svd
from optim.projector._blocks import blockwise
from optim.projector._coordinates import columns, randk, rows
from optim.projector._interface import Projector

__all__ = ["Projector", "blockwise", "columns", "randk", "random", "rows", "svd"]
