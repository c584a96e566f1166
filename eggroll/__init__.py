"""Low-rank evolution strategies (EGGROLL, arXiv 2511.16652) for any JAX model, unchanged."""

from eggroll import credit as credit
from eggroll import estimator as estimator
from eggroll import exchange as exchange
from eggroll import integer as integer
from eggroll import noise as noise
from eggroll import plan as plan
from eggroll import shaping as shaping
from eggroll.factors import Factors as Factors
from eggroll.interpret import DenseBuildError as DenseBuildError
from eggroll.interpret import DenseBuildWarning as DenseBuildWarning
from eggroll.interpret import MemberLoopWarning as MemberLoopWarning
from eggroll.interpret.node_pass import Rows as Rows
from eggroll.plan import Dense as Dense
from eggroll.plan import Frozen as Frozen
from eggroll.plan import Given as Given
from eggroll.plan import Matrix as Matrix
from eggroll.plan import Nodes as Nodes
from eggroll.state import Metrics as Metrics
from eggroll.state import State as State
from eggroll.strategy import EvolutionStrategy as EvolutionStrategy

__all__ = [
    "Dense",
    "DenseBuildError",
    "DenseBuildWarning",
    "EvolutionStrategy",
    "Factors",
    "Frozen",
    "Given",
    "Matrix",
    "MemberLoopWarning",
    "Metrics",
    "Nodes",
    "Rows",
    "State",
    "credit",
    "estimator",
    "exchange",
    "integer",
    "noise",
    "plan",
    "shaping",
]
