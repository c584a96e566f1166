"""Optimizers that optax lacks, as optax transforms: they drop into any chain.

Lion and Lion-K, SGDP and AdamP.
"""

from optim import kappa
from optim.adamp import adamp, scale_by_adamp
from optim.diagnostics import constraint_violation, kkt_score, lyapunov
from optim.lion import ScaleByLionState, lion, scale_by_lion
from optim.lion_k import lion_k, scale_by_lion_k
from optim.sgdp import ScaleBySgdpState, scale_by_sgdp, sgdp

__all__ = [
    "ScaleByLionState",
    "ScaleBySgdpState",
    "adamp",
    "constraint_violation",
    "kappa",
    "kkt_score",
    "lion",
    "lion_k",
    "lyapunov",
    "scale_by_adamp",
    "scale_by_lion",
    "scale_by_lion_k",
    "scale_by_sgdp",
    "sgdp",
]
