"""Credit: what each row of a member is given of the differences of scores in its pair.

Under node noise a member returns a score for every row: a token, an example, a step of an
environment. Row t of a pair is given credit from the differences ``d_s`` of its two members' scores, and the
estimate for a matrix is the mean over rows and pairs of ``x_t (outer) c_t e_t / (2 sigma)``.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Num

# Wider than the documented type: a wrong value is refused with a message.
Gamma = Any


@dataclasses.dataclass(frozen=True)
class Credit:
    """The credit of rows; made by :func:`own`, :func:`causal` or :func:`episode`.

    Attributes:
      gamma: the weight of the difference of the next row, to that of a row itself; None for all rows
        alike.
    """

    gamma: float | None

    def __call__(self, differences: Num[Array, "pairs rows"]) -> Num[Array, "pairs rows"]:
        """The credit of every row; integers stay integers."""
        if self.gamma is None:
            total = differences.sum(1, keepdims=True, dtype=differences.dtype)
            return jnp.broadcast_to(total, differences.shape)
        if self.gamma == 0 or differences.shape[1] == 1:
            return differences
        integers = jnp.issubdtype(differences.dtype, jnp.integer)
        # Rounded towards zero: members that change places change the sign of the credit.
        shift = -math.log2(self.gamma)
        gamma = jnp.asarray(self.gamma, jnp.float32 if integers else differences.dtype)

        def decayed(c: Array) -> Array:
            return jnp.sign(c) * (jnp.abs(c) >> int(shift)) if integers else gamma * c

        def back(later: Array, d: Array) -> tuple[Array, Array]:
            c = d + decayed(later)
            return c, c

        start = jnp.zeros(differences.shape[0], differences.dtype)
        return lax.scan(back, start, differences.T, reverse=True)[1].T

    def check_integers(self) -> None:
        """Raises ValueError if integers cannot be decayed by ``gamma``."""
        if self.gamma and not math.log2(self.gamma).is_integer():
            raise ValueError(
                f"credit=causal({self.gamma}): for int8 parameters gamma must be 0 or a power of two, such "
                "as 0.5"
            )

    def __repr__(self) -> str:
        if self.gamma is None:
            return "episode()"
        return f"causal({self.gamma})" if self.gamma else "own()"


def own() -> Credit:
    """Every row has the difference of its own scores: for examples that do not act on each other.

    Example:
      >>> own()(jnp.array([[1.0, 2.0, 4.0]])).tolist()
      [[1.0, 2.0, 4.0]]
    """
    return Credit(0.0)


def causal(gamma: Gamma = 1.0) -> Credit:
    """Every row has its own difference and those of later rows: ``c_t = d_t + gamma c_(t+1)``.

    With gamma 1 (reward to go) the estimate is unbiased for the objective under noise; a smaller gamma
    trades bias for variance.

    Args:
      gamma: from 0 to 1; for int8 parameters 0 or a power of two.

    Raises:
      ValueError: ``gamma`` is out of range.

    Example:
      >>> causal(0.5)(jnp.array([[1.0, 2.0, 4.0]])).tolist()
      [[3.0, 4.0, 4.0]]
    """
    if not (isinstance(gamma, int | float) and 0 <= gamma <= 1):
        raise ValueError(f"credit: gamma={gamma!r}: must be a number from 0 to 1")
    return Credit(float(gamma))


def episode() -> Credit:
    """Every row has the sum of all differences: one score for all rows.

    Example:
      >>> episode()(jnp.array([[1.0, 2.0, 4.0]])).tolist()
      [[7.0, 7.0, 7.0]]
    """
    return Credit(None)
