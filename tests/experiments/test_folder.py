"""Files of a run folder are whole or not there."""

import errno
from pathlib import Path
from typing import BinaryIO

import pytest

from experiments.run.errors import RunError
from experiments.run.folder import write_json, write_whole


def test_a_file_that_cannot_be_written_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    write_json(tmp_path / "result.json", {"score": 1})

    def write(file: BinaryIO) -> None:
        file.write(b"{")
        raise OSError(errno.ENOSPC, "No space left on device")

    words = r"result.json could not be written: No space left on device; make room"
    with pytest.raises(RunError, match=words):
        write_whole(tmp_path / "result.json", write)
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    assert (tmp_path / "result.json").read_text() == '{\n  "score": 1\n}\n'


def test_a_folder_that_is_gone_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"result.json.part could not be written: No such file"):
        write_json(tmp_path / "gone" / "result.json", {})
