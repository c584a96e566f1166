r"""Dual ascent: updates of multipliers, as optax transforms.

Multipliers weigh constraints or objectives: routing biases of experts, Lagrange multipliers,
weights of rewards. They descend the gradient of the dual as parameters descend that of a loss, and
``optax.apply_updates`` returns the new ones. The transforms differ in the set of the multipliers:
all numbers (:func:`sign`), an interval (:func:`squashed`), the probabilities
(:func:`exponentiated`). The last two keep an unbounded latent variable that the multipliers are a
function of: put them last in a chain, and let nothing else change the multipliers.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from optim import _numerics
from optim._trees import Scalar, need_params

Tensor = Float[Array, "*shape"]


class Link(NamedTuple):
    """Multipliers as a function of latent variables.

    Attributes:
      forward: latent -> multipliers.
      inverse: multipliers -> latent.
      slope: latent -> the derivative of ``forward``, which gradients of the multipliers are
        multiplied by. With None they are used as they are, which is mirror descent.
    """

    forward: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor] | None = None


def sigmoid() -> Link:
    """Multipliers in (0, 1), for constraints that ask for at least a threshold."""
    return Link(
        jax.nn.sigmoid,
        lambda y: jnp.log(y) - jnp.log1p(-y),
        lambda x: jax.nn.sigmoid(x) * jax.nn.sigmoid(-x),
    )


def tanh() -> Link:
    """Multipliers in (-1, 1), for constraints that ask for equality."""
    return Link(jnp.tanh, jnp.arctanh, lambda x: 1 - jnp.tanh(x) ** 2)


def softmax(axis: int | Sequence[int] | None = None) -> Link:
    """Positive weights that sum to 1 along ``axis``, or over each whole leaf where that is None."""
    along = tuple(axis) if isinstance(axis, Sequence) else axis
    return Link(lambda x: jax.nn.softmax(x, axis=along), jnp.log)


class LatentState(NamedTuple):
    """State of :func:`latent`.

    Attributes:
      latent: tree like the multipliers, of float32 or float64.
      inner: state of the optimizer of the latent variables.
    """

    latent: PyTree
    inner: PyTree


def latent(
    inner: optax.GradientTransformation, link: Link
) -> optax.GradientTransformationExtraArgs:
    """Runs an optimizer on the latent variables of multipliers.

    Args:
      inner: any optax transform, with its learning rate.
      link: the function; :func:`sigmoid`, :func:`tanh`, :func:`softmax` or one of your own.

    Returns:
      A transform of gradients of the multipliers, with a :class:`LatentState`. Its update needs the
      multipliers and returns updates in their dtypes.

    Raises:
      ValueError: by ``init``, where multipliers are complex.
    """
    inner = optax.with_extra_args_support(inner)

    def init_fn(multipliers: PyTree) -> LatentState:
        def start(path: tuple, y: ArrayLike) -> Array:
            if jnp.iscomplexobj(y):
                name = jax.tree_util.keystr(path, simple=True, separator="/") or "the multiplier"
                raise ValueError(f"multipliers must be real, got {name} of {jnp.result_type(y)}")
            return link.inverse(_numerics.wide(y))

        start_at = jax.tree_util.tree_map_with_path(start, multipliers)
        return LatentState(start_at, inner.init(start_at))

    def update_fn(
        grads: PyTree, state: LatentState, multipliers: PyTree = None, **extra: object
    ) -> tuple[PyTree, LatentState]:
        multipliers = need_params(multipliers)

        def latent_gradient(g: ArrayLike, x: Array) -> Array:
            return jnp.asarray(g, x.dtype) * (1 if link.slope is None else link.slope(x))

        def difference(x: Array, y: ArrayLike) -> Array:
            return (link.forward(x) - jnp.asarray(y, x.dtype)).astype(jnp.result_type(y))

        steps = jax.tree.map(latent_gradient, grads, state.latent)
        steps, inner_state = inner.update(steps, state.inner, state.latent, **extra)
        moved = optax.apply_updates(state.latent, steps)
        return jax.tree.map(difference, moved, multipliers), LatentState(moved, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def sign(learning_rate: optax.ScalarOrSchedule = 1e-3) -> optax.GradientTransformationExtraArgs:
    r"""Steps against the sign of the gradient: balances experts without an auxiliary loss.

    .. math::
        b \leftarrow b - u \operatorname{sign}(\text{load} - \text{mean load})

    Tokens go to the experts with the largest score plus bias; gates use the score alone. The
    gradient of the dual is the excess load. The theory has decreasing steps in proportion to that
    load, which ``optax.sgd(schedule)`` takes.

    Args:
      learning_rate: u, a number or a schedule.

    Returns:
      A transform for ``optax.apply_updates``.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optim
      >>> noise = jax.random.normal(jax.random.key(0), (512, 8))
      >>> score = jax.nn.sigmoid(noise + jnp.linspace(0, 1, 8))
      >>> def load(bias):                         # tokens of each expert, two experts a token
      ...     chosen = jax.lax.top_k(score + bias, 2)[1]
      ...     return jnp.bincount(chosen.ravel(), length=8).astype(float)
      >>> solver = optim.dual.sign(0.001)
      >>> bias = jnp.zeros(8)
      >>> def step(_, carry):
      ...     bias, state = carry
      ...     updates, state = solver.update(load(bias) - load(bias).mean(), state)
      ...     return optax.apply_updates(bias, updates), state
      >>> balanced, _ = jax.lax.fori_loop(0, 400, step, (bias, solver.init(bias)))
      >>> for b in (bias, balanced):
      ...     print(f"largest load {load(b).max():.0f}, where the mean is {load(b).mean():.0f}")
      largest load 211, where the mean is 128
      largest load 130, where the mean is 128

    References:
      Wang et al., `Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts
      <https://arxiv.org/abs/2408.15664>`_, 2024; theory in arXiv 2512.03915
    """
    return optax.chain(optax.scale_by_sign(), optax.scale_by_learning_rate(learning_rate))


def squashed(
    learning_rate: optax.ScalarOrSchedule = 0.1,
    momentum: Scalar = 0.1,
    link: Link | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Bounded multipliers sigmoid(x) or tanh(x), by SGD with momentum on x.

    .. math::
        x \leftarrow x - \eta\, \text{momentum}(\nabla_x \textstyle\sum_k \lambda_k(x) (J_k - \theta_k))

    The gradient of multiplier k is the value of its constraint less its threshold,
    :math:`J_k - \theta_k`. The multiplier rises while the value is below the threshold. The policy
    maximises :func:`lagrangian` meanwhile.

    Args:
      learning_rate: a number or a schedule.
      momentum: decay of the momentum.
      link: ``sigmoid()``, the default, for constraints of at least a threshold; ``tanh()`` for
        equalities. Multipliers must begin strictly inside the interval, for example at .5 or at 0.

    Returns:
      A transform for ``optax.apply_updates``. Its update needs the multipliers.

    Raises:
      ValueError: by ``init``, where multipliers are complex.

    Example:
      >>> import jax.numpy as jnp, optax, optim
      >>> solver = optim.dual.squashed(learning_rate=1.0)
      >>> multiplier = jnp.array([0.5])
      >>> state = solver.init(multiplier)
      >>> for value in (0.2, 0.4, 0.9):                         # of the constraint: at least 0.8
      ...     updates, state = solver.update(jnp.array([value - 0.8]), state, multiplier)
      ...     multiplier = optax.apply_updates(multiplier, updates)
      ...     print(f"{multiplier[0]:.3f}")
      0.537
      0.566
      0.563

    References:
      Moskovitz et al., `Confronting Reward Model Overoptimization with Constrained RLHF
      <https://arxiv.org/abs/2310.04373>`_, 2023
    """
    return latent(optax.sgd(learning_rate, momentum), link or sigmoid())


def exponentiated(
    learning_rate: optax.ScalarOrSchedule, axis: int | Sequence[int] | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Exponentiated gradient: mirror descent on weights that sum to 1.

    .. math::
        w \leftarrow \operatorname{softmax}(\log w - \eta \nabla)

    To weigh rewards by their influence, pass the gradient :math:`-I_k = -\sum_l \langle g_k,
    g_l\rangle` with g the gradients of the objectives. The learning rate is then that of the actor
    over the regularisation, 1e-6 / 1e-5 in the authors' program.

    Args:
      learning_rate: a number or a schedule.
      axis: axis or axes along which weights sum to 1; None: over each whole leaf.

    Returns:
      A transform for ``optax.apply_updates``. Its update needs the weights.

    Raises:
      ValueError: by ``init``, where weights are complex.

    Example:
      >>> import jax.numpy as jnp, optax, optim
      >>> g = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])     # gradients of three objectives
      >>> solver = optim.dual.exponentiated(0.1)
      >>> weights = jnp.full(3, 1 / 3)
      >>> influence = (g @ g.T).sum(1)
      >>> updates, _ = solver.update(-influence, solver.init(weights), weights)
      >>> print(optax.apply_updates(weights, updates).round(6))
      [0.310424 0.310424 0.379152]

    References:
      Kivinen and Warmuth, Exponentiated Gradient versus Gradient Descent for Linear Predictors,
      1997; the weights of rewards are those of github.com/yining610/dynamic-reward-weighting
    """
    return latent(optax.sgd(learning_rate), softmax(axis))


def lagrangian(
    multipliers: Float[Array, " constraints"],
    task: Float[Array, "*scores"],
    constraints: Float[Array, "constraints *scores"],
) -> Float[Array, "*scores"]:
    r"""The weighted advantages that the policy maximises under :func:`squashed`.

    .. math::
        (K - \textstyle\sum_k\lambda_k) A_0 + \sum_k \lambda_k A_k

    Args:
      multipliers: one for each of the K constraints.
      task: advantages of the task, of any shape, standardised.
      constraints: advantages of the constraints, each standardised separately.

    Example:
      >>> import jax.numpy as jnp, optim
      >>> task, constraints = jnp.array([2.0, 2.0]), jnp.array([[7.0, 7.0], [0.0, 1.0]])
      >>> optim.dual.lagrangian(jnp.array([0.0, 1.0]), task, constraints)
      Array([2., 3.], dtype=float32)
    """
    left = multipliers.size - multipliers.sum()
    return left * task + jnp.tensordot(multipliers, constraints, 1)
