"""Evolution strategies for int8 parameters: the same strategy, with not one float in a generation."""

from eggroll.integer.strategies import _quantiles as _quantiles
from eggroll.integer.strategies import float_operations as float_operations
from eggroll.integer.strategies import normal as normal
from eggroll.integer.strategies import strategy as strategy
from eggroll.integer.threshold import ThresholdState as ThresholdState
from eggroll.integer.threshold import error_feedback as error_feedback
from eggroll.integer.threshold import inverse_decay as inverse_decay
from eggroll.integer.threshold import momentum as momentum
from eggroll.integer.threshold import threshold as threshold
