"""Shapings: pure functions from scores to weights, chained like optax transforms."""

from eggroll.shaping.rules import Shaping as Shaping
from eggroll.shaping.rules import center as center
from eggroll.shaping.rules import centered_rank as centered_rank
from eggroll.shaping.rules import chain as chain
from eggroll.shaping.rules import identity as identity
from eggroll.shaping.rules import pair_sign as pair_sign
from eggroll.shaping.rules import per_task as per_task
from eggroll.shaping.rules import scale as scale
from eggroll.shaping.rules import zscore as zscore
