"""A multilayer perceptron as an ordinary Flax linen module."""

from typing import Literal

import flax.linen as nn
from jaxtyping import Array, Float

Activation = Literal["relu", "tanh", "layer_norm_relu"]


class MLP(nn.Module):
    """`depth` hidden layers of `width` units and a linear head.

    Attributes:
        outputs: size of the head, e.g. the number of actions.
        width: units of every hidden layer.
        depth: number of hidden layers; 0 is a linear map.
        activation: `"relu"`, `"tanh"`, or `"layer_norm_relu"` for relu(layer_norm(x)), the choice of
            the EGGROLL paper's policies (arXiv 2511.16652).

    Example:
        >>> import jax
        >>> model = MLP(outputs=2, width=16, depth=1)
        >>> params = model.init(jax.random.key(0), jax.numpy.zeros(4))["params"]
        >>> params["Dense_0"]["kernel"].shape
        (4, 16)
    """

    outputs: int
    width: int = 256
    depth: int = 3
    activation: Activation = "layer_norm_relu"

    @nn.compact
    def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
        """Map inputs to outputs along the last axis, in the dtype of `x`."""
        for _ in range(self.depth):
            x = nn.Dense(self.width)(x)
            if self.activation == "layer_norm_relu":
                x = nn.LayerNorm()(x)
            x = nn.tanh(x) if self.activation == "tanh" else nn.relu(x)
        return nn.Dense(self.outputs)(x)
