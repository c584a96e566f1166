"""What the path of a leaf says of it: embedding, norm, output head, router or linear weight."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import PyTree

from optim._trees import nodes, paths

# Last names of paths that name a variable and not a layer.
KERNELS = frozenset({"kernel", "weight", "weights", "w", "int8"})
VARIABLES = KERNELS | {"embedding", "embeddings", "table", "weight_ih", "weight_hh"}
# Names of leaves that are vectors; with other axes they number layers or heads.
VECTORS = frozenset({"bias", "biases", "b", "scale", "gain", "offset", "beta", "gamma", "shift"})
NORMS = frozenset({"ln", "bn", "gn", "rms"})
TABLES = frozenset({"emb", "wte", "wpe", "vocab", "vocabulary", "pos", "position", "positions"})
HEADS = frozenset({"logit", "logits", "classifier", "score", "readout"})
ATTENTION = frozenset({"attention", "attn", "att", "mha", "self"})


def tokens(name: str) -> list[str]:
    """The words of a name, without numbers.

    Example:
      >>> tokens("lm_head"), tokens("LayerNorm_0"), tokens("ln1"), tokens("RMSNorm")
      (['lm', 'head'], ['layer', 'norm'], ['ln'], ['rms', 'norm'])
    """
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
    return [word.lower() for word in words]


class Names(NamedTuple):
    """The names above a leaf, and what they say.

    Attributes:
      path: as ``"layers/0/mlp/kernel"``, for messages.
      owner: the name of the layer that holds it, in lower case.
      tokens: the words of the owner's and the leaf's names, and of the owner's class.
      is_kernel: whether its own name is that of the weight of a layer.
      is_vector: whether its names are those of a bias or of a norm.
      is_other: whether its names are those of an embedding, a norm, a bias, a router or an output
        head.
      is_head_outside: whether it is an output head unless it is in a layer of a stack.
    """

    path: str
    owner: str
    tokens: frozenset[str]
    is_kernel: bool
    is_vector: bool
    is_other: bool
    is_head_outside: bool


def _names(path: str, owner_class: str) -> Names:
    names = [name for name in path.split("/") if name]
    # Flax NNX puts the name of the value behind that of the variable.
    if len(names) > 1 and names[-1] in ("value", "raw_value"):
        if names[-2] in VARIABLES | VECTORS:
            names.pop()
    own = names[-1] if names else ""
    is_variable = own.lower() in VARIABLES | VECTORS
    above = names[:-1] if is_variable else names
    owner = above[-1] if above else ""
    words = frozenset([*tokens(owner), *tokens(own), *tokens(owner_class)])
    every = frozenset(word for name in [*names, owner_class] for word in tokens(name))
    is_numbered = any(re.search(r"\d$", name) for name in above[:-1])

    is_vector = (
        own.lower() in VECTORS
        or any(word in VECTORS for word in tokens(own) if word != "b")
        or any(word in NORMS or word.endswith("norm") for word in words)
    )
    is_table = (
        any("embed" in word or word.endswith("emb") for word in every)
        or bool(words & TABLES)
        or bool(every & {"vocab", "vocabulary"})
        or ("shared" == owner.lower() and own.lower() != "kernel")
    )
    ends = [tokens(name)[-2:] for name in names]
    is_head = bool(every & HEADS) or any(
        end[-1:] == ["head"] and not {"multi", *ATTENTION}.intersection(end) for end in ends
    )
    is_router = "router" in every or (owner == "gate" and "moe" in every)
    is_output = owner.lower() in ("output", "output_layer", "decoder")
    return Names(
        path,
        owner.lower(),
        words,
        own.lower() in KERNELS,
        is_vector,
        is_vector or is_table or is_head or is_router,
        is_output and not is_numbered and not every & ATTENTION,
    )


def names_of(params: PyTree) -> Sequence[Names]:
    """The names of every leaf of a tree, in their order."""
    found = paths(params)
    owners = [""] * len(found)
    for node in nodes(params):
        owners[node.start : node.stop] = [node.type] * (node.stop - node.start)
    return [_names(path, owner) for path, owner in zip(found, owners, strict=True)]
