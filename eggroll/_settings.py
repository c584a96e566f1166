"""The settings of an evolution strategy, and their checks."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import optax
from jax.sharding import Mesh

from eggroll import noise as noises
from eggroll import plan as plans
from eggroll import shaping as shapings
from eggroll._checks import is_even, is_number, is_positive, is_whole
from eggroll.arithmetic import FLOATS, INTEGERS, Arithmetic
from eggroll.credit import Credit
from eggroll.exchange import Auto, costs
from eggroll.interpret import OnDense
from eggroll.interpret.node_pass import Rows
from eggroll.plan.leaf import Plan
from eggroll.population.placement import Specs, check_mesh
from eggroll.population.schedule import Schedule

# The shaping of weight noise, if the user names none.
DEFAULT_SHAPING = shapings.zscore()


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Settings:
    """The fields of :class:`eggroll.EvolutionStrategy`, which documents them.

    Settings are compared by identity, so a program is compiled once for each strategy object.
    """

    # Some types are wider than documented: `check` refuses a wrong value with a message.
    optimizer: Any
    population: int
    sigma: float | optax.Schedule
    rank: Any = 1
    perturb: str = "weights"
    rows: int | Rows | None = None
    credit: Credit | None = None
    shaping: shapings.Shaping | None = DEFAULT_SHAPING
    plan: plans.Planner = dataclasses.field(default_factory=plans.by_shape)
    noise: Any = dataclasses.field(default_factory=noises.counter)
    chunk: int | None = None
    mesh: Mesh | None = None
    exchange: str | Auto = "update"
    deterministic: bool = False
    noise_reuse: int = 1
    on_dense: str = "warn"
    agreement: bool = False
    shared_keys: bool = True
    master_weights: bool | Literal["int8"] = True
    factor_memory: int = 2**25
    specs: Specs | None = dataclasses.field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.perturb == "nodes" and self.shaping is DEFAULT_SHAPING:
            # Differences of the two members of a pair are credit as they are.
            object.__setattr__(self, "shaping", None)
        check(self)

    @property
    def arithmetic(self) -> Arithmetic:
        """The arithmetic of a generation; the noise determines it."""
        return INTEGERS if self.noise.integer else FLOATS

    @property
    def schedule(self) -> Schedule:
        """The order of computation: how members and sums of noise are divided."""
        make = Schedule.reproducible if self.deterministic else Schedule.fast
        return make(self.chunk)

    @property
    def dense_report(self) -> OnDense:
        """The response to an operation that builds a low-rank matrix; an error for integers."""
        return "error" if self.noise.integer else self.on_dense  # type: ignore[return-value]

    def sends_scores_alone(self, plan: Plan) -> bool:
        """Whether devices send scores alone, and each device sums the noise of all members."""
        if self.exchange in ("update", "fitness"):
            return self.exchange == "fitness"
        rates = self.exchange if isinstance(self.exchange, Auto) else None
        return costs(plan, self.population, self.mesh, rates=rates).choice == "fitness"


def check(given: Settings) -> None:
    """Checks every setting.

    Raises:
      ValueError: a setting is wrong; the message names the field, its value and the right values.
    """

    def require(field: str, ok: bool, right: str) -> None:
        if not ok:
            raise ValueError(f"{field}={getattr(given, field)!r}: must be {right}")

    require(
        "population",
        is_even(given.population),
        "an even number of at least 2, since members form pairs with opposite noise",
    )
    require(
        "sigma",
        callable(given.sigma) or is_positive(given.sigma),
        "a positive number or a schedule over generations",
    )
    require(
        "rank",
        given.rank == "full" or (is_whole(given.rank) and given.rank >= 1),
        "an integer of at least 1, or 'full' for dense noise",
    )
    require("perturb", given.perturb in ("weights", "nodes"), "'weights' or 'nodes'")
    length = given.rows.length if isinstance(given.rows, Rows) else given.rows
    require(
        "rows",
        length is None or (is_whole(length) and length >= 1),
        "the number of scores of a member, an integer of at least 1, or eggroll.Rows(...)",
    )
    require(
        "credit",
        given.credit is None or isinstance(given.credit, Credit),
        "eggroll.credit.own(), causal(gamma) or episode()",
    )
    require(
        "chunk",
        given.chunk is None or is_even(given.chunk),
        "an even number of members of at least 2, or None for all members at once",
    )
    require(
        "noise_reuse",
        is_whole(given.noise_reuse) and given.noise_reuse >= 1,
        "a number of generations, an integer of at least 1",
    )
    require(
        "master_weights",
        given.master_weights in (True, False, "int8"),
        "True, False or 'int8'",
    )
    require(
        "on_dense", given.on_dense in ("error", "warn", "ignore"), "'error', 'warn' or 'ignore'"
    )
    if given.deterministic and given.exchange not in ("update", "fitness"):
        raise ValueError(
            f"exchange={given.exchange!r}: must be 'update' or 'fitness' with deterministic=True, "
            "whose costs are not estimated"
        )
    require(
        "exchange",
        given.exchange in ("update", "fitness", "auto") or isinstance(given.exchange, Auto),
        "'update', 'fitness', 'auto' or eggroll.exchange.auto(bandwidth, flops)",
    )
    require(
        "factor_memory",
        is_number(given.factor_memory) and given.factor_memory >= 0,
        "a number of bytes of at least 0",
    )
    _check_parts(given, require)
    given.arithmetic.check_settings(given.sigma, given.shaping, given.agreement)
    check_mesh(given.mesh)


def _check_parts(given: Settings, require: Callable[[str, bool, str], None]) -> None:
    """Checks the settings that are results of functions in this library or optax."""
    require(
        "optimizer",
        isinstance(given.optimizer, optax.GradientTransformation),
        "an optax transform such as optax.adam(1e-2)",
    )
    for field, module in (("shaping", shapings), ("plan", plans), ("noise", noises)):
        value = getattr(given, field)
        name = getattr(value, "__name__", "")
        made_here = bool(name) and getattr(module, name, None) is value
        require(field, not made_here, f"the result of a call, {name}()")
    require(
        "shaping",
        given.shaping is None or callable(given.shaping),
        "a shaping such as eggroll.shaping.zscore(), or None to use the scores as weights",
    )
    require(
        "plan",
        callable(given.plan),
        "eggroll.plan.by_shape(overrides) or eggroll.plan.infer(fitness, params, *args)",
    )
    require(
        "noise", isinstance(given.noise, noises.Noise), "a Noise such as eggroll.noise.counter()"
    )
