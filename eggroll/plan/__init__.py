"""Which parameter gets what noise: low rank (and which axes are rows), dense, or none.

A plan is fixed before anything is drawn. It depends on the parameters' paths and shapes alone
(:func:`by_shape`), or on a trace of the fitness made once (:func:`infer`), so that members can be built,
and values from elsewhere used, without a fitness function at hand.
"""

from eggroll.plan._settle import Overrides as Overrides
from eggroll.plan._settle import Planner as Planner
from eggroll.plan.by_shape import by_shape as by_shape
from eggroll.plan.infer import infer as infer
from eggroll.plan.leaf import Leaf as Leaf
from eggroll.plan.leaf import Plan as Plan
from eggroll.plan.parameters import is_float as is_float
from eggroll.plan.parameters import leaf_paths as leaf_paths
from eggroll.plan.parameters import trained_type as trained_type
from eggroll.plan.treatments import Axes as Axes
from eggroll.plan.treatments import Dense as Dense
from eggroll.plan.treatments import Frozen as Frozen
from eggroll.plan.treatments import Matrix as Matrix
from eggroll.plan.treatments import Treatment as Treatment
