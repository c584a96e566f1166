"""Files of a run folder are whole or not there."""

import dataclasses
import errno
from pathlib import Path
from typing import BinaryIO

import pytest

from experiments.reasoning.config import PRESETS, Config
from experiments.run.errors import RunError, UsageError
from experiments.run.folder import open_run_folder, read_result, write_json, write_whole


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


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[]", "result.json must hold an object, got an array; remove it"),
        (b'{"a": \xff}', "result.json is not text in UTF-8: byte 0xff at position 6"),
        (b'{\n"a" 1}', "result.json is not JSON: Expecting ':' delimiter at line 2, column 5"),
        (
            b'{"sentence": "x"}',
            "result.json: generations must be a whole number of at least 0, got nothing",
        ),
        (b'{"generations": 1, "sentence": []}', "sentence must be a text, got an array"),
        (
            b'{"generations": 1, "sentence": "x", "held_out_a": "x"}',
            "held_out_a must be a number, null or a list of them, got 'x'",
        ),
    ],
)
def test_a_result_of_other_types_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "result.json").write_bytes(content)
    with pytest.raises(UsageError) as error:
        read_result(tmp_path)
    assert words in str(error.value)


def test_a_file_with_other_content_is_another_run(tmp_path: Path) -> None:
    file, run_dir = tmp_path / "own.py", tmp_path / "run"
    file.write_text("one")
    config = dataclasses.replace(PRESETS["tiny"], run_dir=run_dir)

    def opened(config: Config) -> None:
        with open_run_folder("reasoning", config, [file]):
            pass

    opened(config)
    opened(config)
    (run_dir / "result.json").write_text("{}")
    file.write_text("two")
    words = (
        r"holds a run of other settings \(.*own.py has other content\): choose another --run-dir"
    )
    with pytest.raises(UsageError, match=words):
        opened(config)
    assert (run_dir / "result.json").exists()
    opened(dataclasses.replace(config, accept_changes=True))
    opened(config)
    file.write_text("three")
    opened(dataclasses.replace(config, overwrite=True))
    file.unlink()
    with pytest.raises(UsageError, match=r"own.py cannot be read: No such file"):
        opened(config)
