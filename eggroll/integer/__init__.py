"""Evolution strategies for int8 parameters: the same strategy, without float operations.

A model is any function of ``jnp`` integer operations on a tree of int8 arrays in [-127, 127]. Its
fixed point is from arXiv 2511.16652 (integer pretraining): 16 represents 1. A member is defined by
the perturbed integer operations (:mod:`eggroll.values.fixed_point`). A product with a matrix is
``x W + sign * (((x B) A) >> (4 + s))`` in int32; a looked-up row or a vector is rounded to int8. An
operation without such a rule is an error that names the parameter and the operation.
"""

from eggroll.integer.noise import normal as normal
from eggroll.integer.proof import float_operations as float_operations
from eggroll.integer.strategies import strategy as strategy
from eggroll.integer.threshold import FeedbackState as FeedbackState
from eggroll.integer.threshold import ThresholdState as ThresholdState
from eggroll.integer.threshold import TraceState as TraceState
from eggroll.integer.threshold import by_rows as by_rows
from eggroll.integer.threshold import error_feedback as error_feedback
from eggroll.integer.threshold import inverse_decay as inverse_decay
from eggroll.integer.threshold import momentum as momentum
from eggroll.integer.threshold import threshold as threshold
from eggroll.values.fixed_point import floor_divide as floor_divide
from eggroll.values.fixed_point import saturate as saturate
