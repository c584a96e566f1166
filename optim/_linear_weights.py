"""Which leaves are weights of linear layers."""

import jax
from jaxtyping import PyTree

from optim._dimensions import Leaf, leaves_of
from optim._trees import Setting


def is_linear(leaf: Leaf) -> bool:
    """Whether a leaf is the weight of a linear layer."""
    is_head = leaf.names.is_head_outside and not leaf.is_stacked
    return leaf.is_matrix and not leaf.names.is_other and not is_head


def is_unknown(leaf: Leaf) -> bool:
    """Whether only unknown axes keep a leaf from being a linear weight."""
    own = len(leaf.shape) > 2 and 0 not in leaf.shape and leaf.spec is None
    return own and not leaf.names.is_other and not leaf.names.is_head_outside


def linear_weights(params: PyTree, dimension_numbers: Setting = None) -> PyTree:
    """Tells which leaves are weights of linear layers, by their axes and names.

    A leaf is one if it is a matrix, or a stack of matrices, and its path does not say that it is an
    embedding, a norm, a bias, a router or an output head. Names are read as words: ``lm_head``,
    ``policy_head`` and ``logits`` are heads, ``pos_emb`` and ``wte`` embeddings; ``output`` and
    ``decoder`` are heads where they stand above the layers, and linear weights within a layer. The
    last layer of a model whose layers have no names but numbers (``Dense_3``) counts as a linear
    weight.

    FRUGAL's authors list the names of what is split instead (attention, MLP); the parts of a
    transformer that this gives are the same.

    Args:
      params: the parameters, or their shapes: any tree, as of Flax, Equinox or Haiku.
      dimension_numbers: which axes are rows and columns, as ``optax.contrib.MuonDimensionNumbers``:
        one for all leaves of two or more axes, a tree (a prefix of the parameters') of them and
        Nones, or a function of the parameters that returns either. None: they are read from the
        tree. A subtree whose leaves all have the same first axis is a stack of layers if it is
        called ``layers``, ``blocks`` or the like, or if a leaf of two axes in it is called ``bias``
        or ``scale`` or belongs to a norm; kernels of attention with three axes have one of heads.
        Other leaves of three and more axes (convolutions) are no linear weights.

    Returns:
      A tree of booleans.

    Example:
      >>> import jax.numpy as jnp
      >>> w = jnp.zeros((4, 4))
      >>> block = {"attn": w, "bias": w[0]}
      >>> linear_weights({"wte": w, "block_0": block, "ln_1": w[0], "lm_head": w})
      {'block_0': {'attn': True, 'bias': False}, 'lm_head': False, 'ln_1': False, 'wte': False}
    """
    flags = [is_linear(leaf) for leaf in leaves_of(params, dimension_numbers)]
    return jax.tree.unflatten(jax.tree.structure(params), flags)
