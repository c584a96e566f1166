"""Runs any traced JAX function on perturbed parameters that are never built.

Importing the package fills the table of rules (:mod:`eggroll.interpret.registry`).
"""

from eggroll.interpret import arithmetic as arithmetic
from eggroll.interpret import control_flow as control_flow
from eggroll.interpret import convolutions as convolutions
from eggroll.interpret import grouped as grouped
from eggroll.interpret import joins as joins
from eggroll.interpret import lookups as lookups
from eggroll.interpret import products as products
from eggroll.interpret import reductions as reductions
from eggroll.interpret import selection as selection
from eggroll.interpret import structure as structure
from eggroll.interpret import writes as writes
from eggroll.interpret.context import Context as Context
from eggroll.interpret.context import DenseBuildError as DenseBuildError
from eggroll.interpret.context import DenseBuildWarning as DenseBuildWarning
from eggroll.interpret.context import OnDense as OnDense
from eggroll.interpret.interpreter import interpret as interpret
from eggroll.interpret.member_loops import MemberLoopWarning as MemberLoopWarning
from eggroll.values.lowrank import LowRank as LowRank
