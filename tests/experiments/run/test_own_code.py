"""A user's own functions: found, run from what was read, and mistakes in one sentence with file and line."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.run import own_code
from experiments.run.errors import UsageError

GOOD = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Pair:
    left: int

def make(n: int) -> Pair:
    return Pair(1 // n)

value = 3
"""


def test_a_file_runs_as_a_module_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "good.py"
    path.write_text(GOOD)
    make = own_code.load(f"{path}:make", "--task")
    assert make(1).left == 1
    assert own_code.load(f"{path}:make", "--task") is make
    assert own_code.file_of(f"{path}:make") == path
    path.write_text(GOOD.replace("1 // n", "2 // n"))
    assert own_code.load(f"{path}:make", "--task")(1).left == 2
    assert make(1).left == 1


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        ("{}/none.py:f", "--env X: there is no file {}/none.py"),
        ("{}:f", "--env X: there is no module '{}'; a file is named as my_file.py:NAME"),
        ("{}/good.py", "--env X: must name a function in a file, as {}/good.py:NAME does"),
        ("{}/good.py:", "--env X: must name a function in a file, as {}/good.py:NAME does"),
        ("{}/good.py:mke", "--env X: {}/good.py has no function 'mke'; did you mean 'make'?"),
        ("{}/good.py:value", "--env X: value in {}/good.py must be a function, got 3 (int)"),
        ("{}/folder.py:f", "--env X: {}/folder.py cannot be read: Is a directory"),
        ("{}/syntax.py:f", "--env X: {}/syntax.py, line 2 raised SyntaxError: invalid syntax"),
        ("{}/null.py:f", "--env X: {}/null.py raised ValueError: source code string"),
        ("{}/raises.py:f", "--env X: {}/raises.py, line 3 raised KeyError: 'x'"),
        ("{}/ends.py:f", "--env X: {}/ends.py, line 2 raised SystemExit: 0"),
        ("{}/beside.py:f", "--env X: {}/beside.py, line 1 raised ModuleNotFoundError: No module named 'good'"),
        ("no_such.module:f", "--env X: there is no module 'no_such'"),
    ],
)  # fmt: skip
def test_what_cannot_be_loaded_is_told_in_a_sentence(
    place: str, sentence: str, tmp_path: Path
) -> None:
    files = {
        "good.py": GOOD,
        "syntax.py": "x = 1\nx = = 2\n",
        "null.py": "x = 1\0",
        "raises.py": "def inner():\n    # comment\n    return {}['x']\ninner()\n",
        "ends.py": "import sys\nsys.exit(0)\n",
        "beside.py": "import good\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "folder.py").mkdir()
    before = set(sys.modules)
    with pytest.raises(UsageError) as told:
        own_code.load(place.format(tmp_path), "--env X")
    # Python 3.12 says this of a null byte as a SyntaxError.
    found = str(told.value).replace("SyntaxError: source", "ValueError: source")
    assert found.startswith(sentence.format(tmp_path)) and "\n" not in found
    left = {name for name in set(sys.modules) - before if name.startswith("own_code_")}
    assert all(name in own_code._LOADED for name in left)


def test_an_error_in_a_call_is_told_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text(GOOD)
    make = own_code.load(f"{tmp_path}/good.py:make", "--task X")
    with pytest.raises(UsageError, match=r"^--task X: .*good.py, line 10 raised ZeroDivisionError"):
        own_code.call(make, "--task X", 0)
    with pytest.raises(UsageError, match="raised TypeError: make.. missing 1 required"):
        own_code.call(make, "--task X")


ADOPTS = """
import pickle, sys
from experiments.run import own_code
sources, function = pickle.loads(sys.stdin.buffer.read())
own_code.adopt(sources)
print(pickle.loads(function)(1).left)
"""


def test_another_process_runs_what_was_read_although_the_file_has_changed(tmp_path: Path) -> None:
    path = tmp_path / "good.py"
    path.write_text(GOOD.replace("1 // n", "7 // n"))
    make = own_code.load(f"{path}:make", "--task")
    # Another file of the same process, which runs in none that does not need it.
    other = tmp_path / "other.py"
    other.write_text("import sys\nassert 'pytest' in sys.modules\ndef make(): ...\n")
    own_code.load(f"{other}:make", "--task")
    path.write_text("1 / 0")
    sent = pickle.dumps((own_code.sources(), pickle.dumps(make)))
    told = subprocess.run([sys.executable, "-c", ADOPTS], input=sent, capture_output=True)
    assert told.stdout.strip() == b"7", told.stderr.decode()
