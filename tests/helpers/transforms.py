"""Every transform, as the tests that hold for all of them build it.

The settings suit optax's own test problems, of two to four numbers with values up to 10 and 30,000
steps: small learning rates, no weight decay.
"""

from collections.abc import Callable
from typing import Any

import optim
from optim import kappa

TRANSFORMS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "adamp": (optim.adamp, {"learning_rate": 1e-2}),
    "adamp-nesterov": (optim.adamp, {"learning_rate": 1e-2, "nesterov": True}),
    "badam": (optim.badam, {"learning_rate": 1e-2}),
    "frugal": (optim.frugal, {"learning_rate": 1e-3, "density": 0.5, "update_gap": 20}),
    "galore": (
        optim.galore,
        {"learning_rate": 1e-2, "rank": 2, "update_proj_gap": 20, "scale": 1.0},
    ),
    "lion": (optim.lion, {"learning_rate": 1e-3, "weight_decay": 0.0}),
    "lion-cautious": (
        optim.lion,
        {"learning_rate": 1e-3, "weight_decay": 0.0, "cautious": True},
    ),
    "lion_k-l2": (
        optim.lion_k,
        {"learning_rate": 1e-3, "kappa": kappa.l2(), "weight_decay": 0.0},
    ),
    "lion_k-nuclear": (
        optim.lion_k,
        {"learning_rate": 1e-3, "kappa": kappa.nuclear(), "weight_decay": 0.0},
    ),
    "lion_k-topk": (
        optim.lion_k,
        {"learning_rate": 1e-3, "kappa": kappa.topk(12), "weight_decay": 0.0},
    ),
    "sgdp": (optim.sgdp, {"learning_rate": 1e-3, "momentum": 0.9}),
}

# Numbers that fix a shape or a branch: a user of optax.inject_hyperparams names them as static.
STATIC: tuple[str, ...] = ("active", "density", "rank", "update_gap", "update_proj_gap")

# Those that work on whole leaves; the others on a part of every matrix, drawn or decomposed.
WHOLE: tuple[str, ...] = tuple(
    name for name in TRANSFORMS if name not in ("badam", "frugal", "galore")
)
