"""What a run has learned, and the members of its population, as adapters (LoRA) that servers load."""

import re
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import eggroll
from eggroll.plan import leaf_paths
from experiments.models import adapters, families
from experiments.models.names import of_hub
from experiments.reasoning.config import Config
from experiments.reasoning.start import Start, save
from experiments.run.errors import UsageError
from experiments.run.trainer import Carry


def export_update(config: Config, base: Start, carry: Carry, to: Path | None, rank: int) -> str:
    """Writes the update since the start as the adapter of a rank that comes closest; says what was written.

    Args:
        config: of the run.
        base: the model that training began with.
        carry: the state, on the host.
        to: the folder; adapter, in the run folder by default.
        rank: of the adapter, at most.

    Raises:
        UsageError: if nothing has changed, if more than matrices of layers has, for a family without adapters
            in PEFT, and for matrices in int8.
    """
    module = _module_of(config, base, "--adapter")
    found = _update(config, base, carry, rank, "--adapter")
    if not found.adapter:
        raise UsageError("--adapter: the run has not changed the model yet, so there is no update")
    folder = to or config.run_dir / "adapter"
    adapters.write(folder, found.adapter, module, _name_of_start(config, base, folder))
    count = sum(len(factors.a) for factors in found.adapter.values())
    said = f"Wrote an adapter of rank {found.rank} for {count} matrices to {folder}."
    return f"{said} {_left_out(found, module)}"


def _update(config: Config, base: Start, carry: Carry, rank: int, flag: str) -> adapters.Cut:
    """The update since the start, cut to a rank.

    Raises:
        UsageError: where more has changed than matrices.
    """
    module = _module_of(config, base, flag)
    before = dict(leaf_paths(jax.device_get(base.params(jnp.int32(config.seed)))))
    # The float32 copies of narrow weights are trained.
    after = dict(leaf_paths(carry.learner.params)) | dict(getattr(carry.learner, "master", {}))
    matrices = [path for path in before if module(path) is not None]
    rest = [
        path for path in before
        if path not in matrices
        and not np.array_equal(np.asarray(before[path]), np.asarray(after[path]))
    ]  # fmt: skip
    if rest:
        raise UsageError(
            f"{flag}: the run has also trained {', '.join(rest)}, and an adapter has matrices of layers "
            f"alone; leave {flag} out to write the whole model"
        )
    return adapters.cut(
        {path: before[path] for path in matrices}, {path: after[path] for path in matrices}, rank
    )


def _left_out(found: adapters.Cut, module: adapters.ModuleOf) -> str:
    """What an adapter leaves out of an update, in words."""
    path, layer = found.where
    said = (
        f"What it leaves out is {found.error:.2%} of the update over all matrices, at most {found.worst:.2%} "
        f"(layers.{layer}.{module(path)})"
    )
    if found.error > 0.01 and found.needed is not None:
        return f"{said}; --rank {found.needed} would leave out 1%."
    return f"{said}."


def export_members(
    config: Config,
    base: Start,
    es: eggroll.EvolutionStrategy,
    carry: Carry,
    to: Path | None,
    members: Sequence[int],
    rank: int | None = None,
) -> str:
    """Writes members of the coming generation, each exactly as an adapter of the mean; says what was written.

    Args:
        config: of the run.
        base: the model that training begins with.
        es: of the run.
        carry: the state, on the host.
        to: the folder that gets member-0, member-1, ...; members, in the run folder by default. Once the
            model has changed, it gets the mean too, as the folder "mean".
        members: their numbers.
        rank: makes them adapters of the model that training began with instead, which have the update since
            then in this rank at most beside the noise.

    Raises:
        UsageError: if the noise has no low-rank factors, or there is no such member.
    """
    folder = to or config.run_dir / "members"
    generation = int(carry.generation)
    written = adapters_of(config, base, es, carry.learner, members)
    module = _module_of(config, base, "--members")
    left = ""
    if rank is not None and generation:
        found = _update(config, base, carry, rank, "--members")
        written = [adapters.joined(found.adapter, one) for one in written]
        left = f" {_left_out(found, module)}" if found.adapter else ""
    if rank is not None or generation == 0:
        mean = _name_of_start(config, base, folder)
    else:
        save(base, carry.learner.params, folder / "mean", config.dtype)
        mean = str((folder / "mean").resolve())
    for i, adapter in zip(members, written, strict=True):
        adapters.write(folder / f"member-{i}", adapter, module, mean)
    names = ", ".join(f"member-{i}" for i in members)
    size = next(iter(written[0].values())).a.shape[1]
    return (
        f"Wrote {names} of generation {generation} as adapters of rank {size} to {folder}; they are added to "
        f"{mean}.{left}"
    )


def adapters_of(
    config: Config,
    base: Start,
    es: eggroll.EvolutionStrategy,
    state: eggroll.State,
    members: Sequence[int],
) -> list[dict[str, adapters.Factors]]:
    """The members of the coming generation as adapters of the mean. Arguments as in :func:`export_members`.

    Raises:
        UsageError: if the noise has no low-rank factors, or there is no such member.
    """
    module = _module_of(config, base, "--members")
    try:
        noise = [jax.device_get(es.factors(state, i)) for i in members]
    except ValueError as error:
        raise UsageError(f"--members: {error}") from error
    for path in noise[0]:
        if module(path) is None:
            raise UsageError(
                f"--members: the run perturbs {path} too, and an adapter has matrices of layers alone"
            )
    return [{path: _stacked(one) for path, one in by_path.items()} for by_path in noise]


def _stacked(one: eggroll.Factors) -> adapters.Factors:
    """Factors ``[rank, layers, inputs, 1]`` and ``[rank, layers, 1, outputs]`` in PEFT's order."""
    a, b = (np.asarray(x, np.float32) for x in (one.a, one.b))
    return adapters.Factors(
        a[..., 0].swapaxes(0, 1), np.float32(one.scale) * b[:, :, 0].transpose(1, 2, 0)
    )


def numbers(text: str, population: int) -> list[int]:
    """The numbers of members from a list such as "0,1,2" or "0-7".

    Raises:
        UsageError: for anything else, or a member that there is not.

    Example:
        >>> numbers("0,2-4", 8)
        [0, 2, 3, 4]
    """
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part.strip())
        if match is None:
            raise UsageError(f"--members {text!r}: write numbers as in 0,1,2 or 0-7")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last >= population:
            raise UsageError(
                f"--members {text}: the run has the members 0 to {population - 1}, and {part.strip()} "
                "is not among them"
            )
        found += range(first, last + 1)
    return list(dict.fromkeys(found))


def _module_of(config: Config, base: Start, flag: str) -> adapters.ModuleOf:
    """The names of the matrices of the family.

    Raises:
        UsageError: where it has none in PEFT's names, or holds matrices in int8.
    """
    module = families.of(base.shape).adapter_module
    if module is None:
        raise UsageError(
            f"{flag}: PEFT has no adapters of {families.of(base.shape).name}; leave {flag} out to write the "
            "whole model"
        )
    if config.quantised:
        raise UsageError(
            f"{flag}: the run holds its matrices in int8, and an adapter is added to floats; leave {flag} "
            "out to write the whole model"
        )
    return module


def _name_of_start(config: Config, base: Start, folder: Path) -> str:
    """The hub id or folder of the model that the run began with.

    A model that is in no folder, since it was new or an earlier run's, is written as `start` into `folder`.
    """
    if base.folder is None or config.start is not None:
        params = jax.device_get(base.params(jnp.int32(config.seed)))
        save(base, params, folder / "start", config.dtype)
        return str((folder / "start").resolve())
    local = Path(config.model).exists()
    return config.model if of_hub(config.model) and not local else str(base.folder.resolve())
