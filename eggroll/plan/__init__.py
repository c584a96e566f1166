"""The treatment of every parameter: low-rank noise (and its row axes), dense noise, or frozen.

A plan is fixed before any noise is drawn. It depends on the paths and shapes of the parameters
alone (:func:`by_shape`), or on one trace of the fitness (:func:`infer`). Members can therefore be
built, and scores from other sources used, without a fitness function.
"""

from eggroll.plan._settle import Overrides as Overrides
from eggroll.plan._settle import Planner as Planner
from eggroll.plan.by_shape import by_shape as by_shape
from eggroll.plan.choice import Patterns as Patterns
from eggroll.plan.choice import only as only
from eggroll.plan.choice import without as without
from eggroll.plan.infer import infer as infer
from eggroll.plan.leaf import Leaf as Leaf
from eggroll.plan.leaf import Plan as Plan
from eggroll.plan.parameters import is_float as is_float
from eggroll.plan.parameters import leaf_paths as leaf_paths
from eggroll.plan.parameters import trained_type as trained_type
from eggroll.plan.scaled import Factor as Factor
from eggroll.plan.scaled import relative as relative
from eggroll.plan.scaled import rms_of as rms_of
from eggroll.plan.scaled import scaled as scaled
from eggroll.plan.subspaces import subspaces as subspaces
from eggroll.plan.treatments import Axes as Axes
from eggroll.plan.treatments import Dense as Dense
from eggroll.plan.treatments import Frozen as Frozen
from eggroll.plan.treatments import Given as Given
from eggroll.plan.treatments import Matrix as Matrix
from eggroll.plan.treatments import Nodes as Nodes
from eggroll.plan.treatments import Treatment as Treatment
