"""Which parameter gets what noise: low rank, dense, or none."""

from eggroll.plan.planners import Axes as Axes
from eggroll.plan.planners import Dense as Dense
from eggroll.plan.planners import Frozen as Frozen
from eggroll.plan.planners import Leaf as Leaf
from eggroll.plan.planners import Matrix as Matrix
from eggroll.plan.planners import Overrides as Overrides
from eggroll.plan.planners import Plan as Plan
from eggroll.plan.planners import Planner as Planner
from eggroll.plan.planners import Treatment as Treatment
from eggroll.plan.planners import by_shape as by_shape
from eggroll.plan.planners import infer as infer
from eggroll.plan.planners import is_float as is_float
from eggroll.plan.planners import leaf_paths as leaf_paths
from eggroll.plan.planners import trained_type as trained_type
