"""Metric rows for TensorBoard and Weights & Biases, each only where it is asked for."""

import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from experiments.run import hosts
from experiments.run.errors import UsageError
from experiments.run.fields import to_json
from experiments.run.settings import RunSettings

Log = Callable[[Mapping[str, Any]], None]


@contextmanager
def loggers(settings: RunSettings, folder: Path, generation: int) -> Iterator[Log]:
    """A function that sends a row to all that the settings name.

    Args:
        settings: with `tensorboard` and `wandb_project`.
        folder: the run folder; both keep their files in it.
        generation: the first that will be logged; later ones of an earlier process are dropped.
    """
    with ExitStack() as stack:
        logs: list[Log] = []
        if settings.tensorboard and hosts.first():
            logs.append(stack.enter_context(_tensorboard(folder / "tensorboard", generation)))
        if settings.wandb_project is not None and hosts.first():
            logs.append(stack.enter_context(_wandb(settings, folder)))

        def log(row: Mapping[str, Any]) -> None:
            for one in logs:
                one(row)

        yield log


@contextmanager
def _tensorboard(path: Path, generation: int) -> Iterator[Log]:
    try:
        from tensorboardX import SummaryWriter
    except ModuleNotFoundError as error:
        raise UsageError("--tensorboard needs the package: pip install tensorboardX") from error
    with SummaryWriter(str(path), purge_step=generation or None) as writer:

        def log(row: Mapping[str, Any]) -> None:
            for name, value in scalars(row):
                writer.add_scalar(name, value, row["generation"])
            writer.flush()

        yield log


@contextmanager
def _wandb(settings: RunSettings, folder: Path) -> Iterator[Log]:
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise UsageError("--wandb-project needs the package: pip install wandb") from error
    # One id a run folder, so that a continued run continues its curve.
    name = folder / "wandb" / "id"
    name.parent.mkdir(exist_ok=True)
    if not name.exists():
        name.write_text(secrets.token_hex(8))
    run = wandb.init(
        project=settings.wandb_project,
        id=name.read_text(),
        resume="allow",
        name=folder.name,
        dir=str(folder),
        config=to_json(settings),
    )
    try:
        yield lambda row: run.log(dict(scalars(row)), step=row["generation"])
    finally:
        run.finish()


def scalars(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a row; lists by position, objects by name.

    Example:
        >>> list(scalars({"generation": 3, "best": [1.0, 2.0], "timing": {"seconds": 0.5}, "x": None}))
        [('best/0', 1.0), ('best/1', 2.0), ('timing/seconds', 0.5)]
    """
    for name, value in row.items():
        if name == "generation":
            continue
        if isinstance(value, list):
            value = dict(enumerate(value))
        if isinstance(value, Mapping):
            yield from scalars(
                {str(key): inner for key, inner in value.items()}, f"{prefix}{name}/"
            )
        elif value is not None:
            yield prefix + name, float(value)
