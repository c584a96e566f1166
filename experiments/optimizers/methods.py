"""What `eggroll study` compares, and the learning rates that it tries. Imports nothing heavy."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from experiments.optimizers.config import PRESETS, Config
from experiments.run.fields import changed

StudyName = Literal["lm", "digits", "tiny"]

# All learning rates are rungs of one ladder: 1e-6, 3e-6, 1e-5, ..., 3, 10.
LADDER = tuple(float(f"{first}e{power}") for power in range(-6, 2) for first in (1, 3))


class Method(NamedTuple):
    """One row of the comparison.

    Attributes:
        settings: fields of Config that make it.
        text: the learning rate in the middle of the first three that are tried, on text.
        digits: the same on digits.
        only: the task that it belongs to; None: both.
        rate_of: the method whose best learning rate it takes, without a search of its own.
    """

    settings: Mapping[str, Any]
    text: float
    digits: float
    only: str | None = None
    rate_of: str | None = None


def _frugal(density: float, **settings: Any) -> dict[str, Any]:
    # Columns are what the study was made with; optim.frugal itself now takes rows by default.
    return {"optimizer": "optim.frugal", "density": density, "projector": "columns", **settings}


# The middles are customary values, or for Lion-K with a norm, whose steps are shorter by the root of the
# number of entries, those of Lion times about so much. Where they are wrong, the search moves away.
METHODS: dict[str, Method] = {
    "adamw": Method({"optimizer": "adamw"}, 1e-2, 1e-2),
    # Where training is as short as the default second moment's memory of a thousand updates.
    "adamw-b2-0.95": Method({"optimizer": "adamw", "b2": 0.95}, 1e-2, 1e-2),
    "lion": Method({"optimizer": "optim.lion"}, 3e-3, 1e-3),
    "optax-lion": Method({"optimizer": "lion"}, 3e-3, 1e-3, rate_of="lion"),  # the same mathematics
    "lion-k-huber": Method({"optimizer": "optim.lion_k", "kappa": "huber:0.0003"}, 3e-3, 1e-3),
    "lion-k-l2": Method({"optimizer": "optim.lion_k", "kappa": "l2"}, 3e-1, 1e-1),
    "lion-k-lp": Method({"optimizer": "optim.lion_k", "kappa": "lp:1.5"}, 1e-1, 3e-2, "text"),
    # Not of text: its products of matrices cost more there than the model.
    "lion-k-nuclear": Method({"optimizer": "optim.lion_k", "kappa": "nuclear"}, 1e-2, 1e-2, "digits"),
    "sgd": Method({"optimizer": "sgd", "momentum": 0.9}, 1e-1, 1e-1, "digits"),
    "sgdp": Method({"optimizer": "optim.sgdp", "momentum": 0.9}, 3e-1, 1e-1),
    "adamp": Method({"optimizer": "optim.adamp"}, 1e-2, 1e-2),
    "galore": Method({"optimizer": "optim.galore", "density": 0.25, "scale": 1.0}, 3e-2, 1e-2),
    "badam": Method({"optimizer": "optim.badam", "density": 0.25}, 1e-2, 1e-2),
    "frugal-0": Method(_frugal(0.0), 1e-2, 1e-3),
    "frugal-0.1": Method(_frugal(0.1), 1e-2, 1e-3),
    "frugal-0.25": Method(_frugal(0.25), 1e-2, 1e-3),
    "frugal-0.5": Method(_frugal(0.5), 1e-2, 1e-3),
    "frugal-1": Method(_frugal(1.0), 1e-2, 1e-2),
    # What signs do to other parameters than linear weights.
    "sign-sgd": Method({"optimizer": "sign_sgd"}, 3e-3, 1e-3),
    "frugal-0-head": Method(_frugal(0.0, also_split="lm_head"), 1e-2, 1e-3, "text", "frugal-0"),
    "frugal-0-embedding": Method(
        _frugal(0.0, also_split="embed_tokens"), 1e-2, 1e-3, "text", "frugal-0"
    ),
}  # fmt: skip

# Updates from one split of FRUGAL and GaLore, or block of BAdam, to the next.
GAP = 15

STUDIES: dict[str, Config] = {
    # Embedding, norms and head take four times the steps of the matrices, by every optimizer: as GaLore's
    # own scale has it, which is switched off so that it is no advantage of one.
    "lm": changed(
        PRESETS["lm"], max_generations=150, schedule=150, evaluate_every=150, linear_rate=0.25
    ),
    "digits": changed(PRESETS["digits"], max_generations=200, schedule=200, evaluate_every=50),
    "tiny": PRESETS["tiny"],
}


def methods_of(base: Config) -> dict[str, Method]:
    """The methods that belong to the task."""
    return {name: one for name, one in METHODS.items() if one.only in (None, base.task)}


def middle(method: Method, base: Config) -> int:
    """The rung of the ladder that the search begins at."""
    return LADDER.index(method.text if base.task == "text" else method.digits)


def config_of(base: Config, name: str, rate: float, seed: int, folder: Path) -> Config:
    """The settings of one run of the comparison."""
    settings = dict(METHODS[name].settings)
    if "density" in settings:
        settings["gap"] = GAP
    return changed(
        base,
        run_dir=folder / name / f"rate-{rate:g}" / f"seed-{seed}",
        learning_rate=rate,
        seed=seed,
        # Runs are short; each saves at its end and when it is stopped.
        checkpoint_seconds=60.0,
        **settings,
    )
