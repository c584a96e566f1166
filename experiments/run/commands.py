"""What is done with a run that is there: it is read, evaluated, sampled, exported."""

import contextlib
import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tyro.conf import Positional

from experiments.run.drivers import Driver, check_run, find_driver, settings_to_read
from experiments.run.errors import UsageError
from experiments.run.fields import changed, check_ranges, count, from_zero
from experiments.run.folder import REPLACE, read_config, read_object
from experiments.run.paths import check_writable
from experiments.run.settings import SEED, RunSettings

if TYPE_CHECKING:
    from experiments.run.trainer import Carry, Trainer

# Of adapters that are written, where no rank is chosen.
ADAPTER_RANK = 16


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """Measure the newest checkpoint of a run on episodes or data that it was not trained on."""

    run: Positional[Path]
    """The run folder."""
    episodes: int = count(256)
    """Episodes to play (reinforcement learning)."""
    seed: int = count(0, least=0, most=SEED)
    """Decides the episodes."""
    render: bool = False
    """Also draw an episode, as episode.gif in the run folder (reinforcement learning)."""


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """Write the trained parameters of a run as safetensors: one tensor a leaf, named by its path, or (of
    `eggroll reasoning`) a folder that other programs know."""

    run: Positional[Path]
    """The run folder."""
    to: Path | None = None
    """The file, or folder; params.safetensors, or exported, in the run folder by default."""
    adapter: bool = False
    """Write what was learned as an adapter (LoRA, as PEFT has it) of the model that the run began with; to
    adapter, in the run folder by default (language models)."""
    rank: int | None = count(None)
    """Of the adapter, at most; 16 by default. With --members: they are added to the model that the run began
    with, and have the update since then in this rank at most."""
    members: str | None = None
    """Numbers of members, as in 0,1,2 or 0-7, to be written as adapters of the mean of the population; to
    members, in the run folder by default (language models that evolve)."""


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """Let a language model write: that of a run, of a folder that one was exported to, or of a GGUF file."""

    run: Positional[Path]
    """The run folder, a folder with a model, or what else names one: a GGUF file, or "smollm2"."""
    prompt: tuple[str, ...] = ("",)
    """What the model goes on from; several texts are answered one after another."""
    length: int | None = count(None)
    """Tokens (bytes, for those that read bytes) of an answer at most; by default as in training."""
    temperature: float = from_zero(1.0)
    """Of sampling; 0 takes the likeliest token."""
    chat: bool = False
    """Ask in the chat template of a folder with a model; that of a run is asked as it was in training."""
    seed: int = count(0, least=0, most=SEED)
    """Decides what is drawn."""


class Found(NamedTuple):
    """A run read back: its trainer, and its newest state."""

    trainer: "Trainer[Any]"
    generation: int
    state: "Carry"


@contextlib.contextmanager
def read_run(path: Path, on_host: bool = False) -> Iterator[Found]:
    """The newest state of a run.

    Args:
        path: the run folder.
        on_host: gives arrays of NumPy; else the state lies on the first device.

    Raises:
        UsageError: if the folder holds no run, or no checkpoint that can be read.
    """
    check_run(path)

    from experiments.run.checkpoints import Checkpoints

    with trainer_of(path) as trainer:
        with Checkpoints(path / "checkpoints", read_only=True) as checkpoints:
            found = checkpoints.restore(trainer.start, on_host=on_host)
        if found is None:
            raise UsageError(f"{path} has no checkpoint yet")
        yield Found(trainer, found[0], found[1])


def trainer_of(path: Path) -> "Trainer[Any]":
    """The trainer of a run, for one device.

    Raises:
        UsageError: if the folder holds no run.
    """
    driver, config = settings_to_read(path)
    return driver.load()(config)


def other_files(path: Path) -> str | None:
    """A sentence that names the files of a run, such as a task of one's own, whose content is another now.

    Files that are no longer where they were are left out: what needs them says so.

    Args:
        path: the run folder.

    Raises:
        UsageError: if files.json is damaged.
    """
    found = []
    for name, digest in (read_object(path / "files.json", REPLACE) or {}).items():
        # A name that was damaged is no file's.
        with contextlib.suppress(OSError, ValueError):
            if hashlib.sha256(Path(name).read_bytes()).hexdigest() != digest:
                found.append(name)
    return f"{path} was trained with other content of {' and '.join(found)}." if found else None


def evaluate(settings: EvalSettings) -> str:
    """A table of what the run's newest state scores, in words."""
    check_ranges(settings)
    check_run(settings.run)

    import numpy as np

    from experiments.run.trainer import Films

    if warning := other_files(settings.run):
        print(warning, file=sys.stderr)
    film = ""
    with read_run(settings.run) as run:
        if settings.render and not isinstance(run.trainer, Films):
            raise UsageError(f"--render: {settings.run} is a run without episodes")
        scores = run.trainer.evaluate(run.state, settings.episodes, settings.seed)
        if isinstance(run.trainer, Films) and settings.render:
            film = run.trainer.film(run.trainer.config, run.state, settings.seed)
        lines = [f"{settings.run}, after {run.generation} generations:"]
    for name, values in scores.items():
        x = np.asarray(values, float)
        spread = f" ± {x.std(ddof=1) / np.sqrt(x.size):.3g} (standard error)" if x.size > 1 else ""
        among = f", {x.min():.4g} to {x.max():.4g} in {x.size}" if x.size > 1 else ""
        lines.append(f"  {name}: {x.mean():.6g}{spread}{among}")
    return "\n".join(filter(None, [*lines, film]))


def sample(settings: SampleSettings) -> str:
    """What the model writes after each prompt.

    Raises:
        UsageError: where there is no language model in the folder, or a setting cannot be right.
    """
    check_ranges(settings)
    named = not settings.run.is_dir() and (
        settings.run.suffix == ".gguf" or settings.run.name == str(settings.run)
    )
    of_run = not named and "driver" in read_config(settings.run)
    # Mistakes are told before anything heavy is imported.
    if of_run:
        check_run(settings.run)
    else:
        driver, config = _of_model(settings)

    from experiments.run.trainer import LanguageTrainer

    with contextlib.ExitStack() as stack:
        state = None
        if of_run:
            trainer, _, state = stack.enter_context(read_run(settings.run))
        else:
            trainer = stack.enter_context(driver.load()(config))
        if not isinstance(trainer, LanguageTrainer):
            raise UsageError(
                f"{settings.run} is a run without a language model: there is none to sample"
            )
        written = trainer.write(
            state, settings.prompt, settings.length, settings.temperature, settings.seed
        )
    return "\n\n".join(a + b for a, b in zip(settings.prompt, written, strict=True))


def _of_model(settings: SampleSettings) -> tuple[Driver, RunSettings]:
    """The driver that takes models by their names, and settings for one without a run.

    Raises:
        UsageError: for what names no model.
    """
    driver = find_driver("reasoning")
    config = changed(
        driver.presets["tiny"], model=str(settings.run), chat=settings.chat, max_new_tokens=64
    )
    try:
        config.check_places()
    except UsageError as error:
        raise UsageError(str(error).removeprefix("--model ")) from error
    return driver, config.settled()


def export(settings: ExportSettings) -> str:
    """Writes the file and says what is in it."""
    check_ranges(settings)
    if settings.adapter and settings.members is not None:
        raise UsageError("--adapter and --members: choose one of them")
    if settings.rank is not None and not settings.adapter and settings.members is None:
        raise UsageError(f"--rank {settings.rank}: it is that of --adapter or --members")
    if settings.to is not None:
        check_writable(settings.to.parent, f"--to {settings.to}")
    with read_run(settings.run, on_host=True) as run:
        if not (settings.adapter or settings.members is not None):
            return run.trainer.export(run.state, settings.to)

        from experiments.run.trainer import Adapts

        if not isinstance(run.trainer, Adapts):
            flag = "--adapter" if settings.adapter else "--members"
            raise UsageError(f"{flag}: {settings.run} is a run without adapters")
        if settings.members is not None:
            return run.trainer.export_members(
                run.state, settings.to, settings.members, settings.rank
            )
        return run.trainer.export_update(run.state, settings.to, settings.rank or ADAPTER_RANK)
