"""Values that stand for a perturbed array without ever building it."""

from eggroll.values.arithmetic import FLOATS as FLOATS
from eggroll.values.arithmetic import QUANTISED as QUANTISED
from eggroll.values.arithmetic import FixedPoint as FixedPoint
from eggroll.values.arithmetic import Floats as Floats
from eggroll.values.arithmetic import Quantised as Quantised
from eggroll.values.arithmetic import ValueArithmetic as ValueArithmetic
from eggroll.values.dtypes import accumulator as accumulator
from eggroll.values.dtypes import is_integer as is_integer
from eggroll.values.dtypes import is_narrow as is_narrow
from eggroll.values.lowrank import LateBroadcast as LateBroadcast
from eggroll.values.lowrank import LowRank as LowRank
from eggroll.values.lowrank import Upcast as Upcast
from eggroll.values.lowrank import build as build
