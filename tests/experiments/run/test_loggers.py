"""What TensorBoard and Weights & Biases get is what the rows say."""

import struct
from pathlib import Path
from typing import Any

import pytest

from experiments.run.loggers import loggers, scalars
from experiments.run.settings import RunSettings

ROWS: list[dict[str, Any]] = [
    {
        "generation": g,
        "score": g / 2,
        "by_seed": [g, None],
        "missing": None,
        "timing": {"seconds": 0.5},
    }
    for g in range(3)
]


def settings(folder: Path, **changes: Any) -> RunSettings:
    return RunSettings(run_dir=folder, max_generations=3, **changes)


def events(folder: Path) -> dict[tuple[str, int], float]:
    """The scalars in TensorBoard's files: records of a length, a checksum, an event, a checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in sorted(folder.iterdir()):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + length])
            at += 16 + length
            for value in event.summary.value:
                found[value.tag, event.step] = value.simple_value
    return found


def test_tensorboard_has_every_number(tmp_path: Path) -> None:
    with loggers(settings(tmp_path, tensorboard=True), tmp_path, 0) as log:
        for row in ROWS:
            log(row)
    found = events(tmp_path / "tensorboard")
    assert found == {
        (name, g): value
        for g in range(3)
        for name, value in {"score": g / 2, "by_seed/0": g, "timing/seconds": 0.5}.items()
    }


def test_nothing_is_written_unless_asked_for(tmp_path: Path) -> None:
    with loggers(settings(tmp_path), tmp_path, 0) as log:
        log(ROWS[0])
    assert list(tmp_path.iterdir()) == []


def test_scalars_skip_what_is_no_number() -> None:
    assert dict(scalars(ROWS[1])) == {"score": 0.5, "by_seed/0": 1.0, "timing/seconds": 0.5}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_wandb_gets_every_number_under_one_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    ids, summaries = [], []
    for _ in range(2):
        with loggers(settings(tmp_path, wandb_project="toy"), tmp_path, 0) as log:
            for row in ROWS:
                log(row)
            ids.append(wandb.run.id)
            # A row is done when the next one begins.
            log({"generation": 3, "score": 9.0})
            summaries.append(dict(wandb.run.summary))
    assert [summary["score"] for summary in summaries] == [1.0, 1.0]
    assert ids[0] == ids[1] == (tmp_path / "wandb" / "id").read_text()
