"""Optimizers that optax lacks or has in another form, as optax transforms for any chain.

Lion and Lion-K, SGDP and AdamP, FRUGAL, GaLore and BAdam. What this module exports is public, with
the modules ``dual``, ``kappa`` and ``projector``; modules whose names begin with an underscore are
private.
"""

from optim import dual, kappa, projector
from optim._linear_weights import linear_weights
from optim.adamp import adamp, scale_by_adamp
from optim.badam import badam
from optim.diagnostics import constraint_violation, kkt_score, lyapunov
from optim.frugal import FrugalState, frugal, scale_by_frugal
from optim.galore import galore
from optim.lion import ScaleByLionState, lion, scale_by_lion
from optim.lion_k import lion_k, scale_by_lion_k
from optim.memory import StateBytes, state_bytes
from optim.sgdp import ScaleBySgdpState, scale_by_sgdp, sgdp

__all__ = [
    "FrugalState",
    "ScaleByLionState",
    "ScaleBySgdpState",
    "StateBytes",
    "adamp",
    "badam",
    "constraint_violation",
    "dual",
    "frugal",
    "galore",
    "kappa",
    "kkt_score",
    "linear_weights",
    "lion",
    "lion_k",
    "lyapunov",
    "projector",
    "scale_by_adamp",
    "scale_by_frugal",
    "scale_by_lion",
    "scale_by_lion_k",
    "scale_by_sgdp",
    "sgdp",
    "state_bytes",
]
