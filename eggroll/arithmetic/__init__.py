"""The arithmetics of parameters: how they are perturbed, summed and updated."""

from eggroll.arithmetic._interface import Arithmetic as Arithmetic
from eggroll.arithmetic._interface import Outcome as Outcome
from eggroll.arithmetic._interface import Sigma as Sigma
from eggroll.arithmetic._interface import Weighed as Weighed
from eggroll.arithmetic.floats import Floats as Floats
from eggroll.arithmetic.integers import Integers as Integers
from eggroll.arithmetic.quantised import Quantised as Quantised

FLOATS, QUANTISED, INTEGERS = Floats(), Quantised(), Integers()
