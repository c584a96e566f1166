"""Ground rules of the project: who imports what, what an import costs, what a wheel holds."""

import ast
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import jax.numpy as jnp
import pytest
from hatchling.builders.sdist import SdistBuilder
from jaxtyping import TypeCheckError
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from eggroll import noise

ROOT = Path(__file__).parents[1]
CORE = {"jax", "jaxtyping", "numpy", "optax"}


def imports(path):
    """The top-level names of the modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("library", ["eggroll", "optim"])
def test_the_libraries_import_little_and_not_each_other(library):
    for path in (ROOT / library).rglob("*.py"):
        foreign = set(imports(path)) - CORE - {library} - sys.stdlib_module_names
        assert not foreign, f"{path.name} imports {foreign}"


def loaded_by(statement):
    code = f"import sys; {statement}; print(*sorted(m for m in sys.modules if '.' not in m))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_heavy_imports_are_lazy():
    heavy = {
        "gymnax",
        "gymnasium",
        "flax",
        "matplotlib",
        "rich",
        "orbax",
        "sklearn",
        "wandb",
        "torch",
    }
    assert not loaded_by("import eggroll") & heavy
    assert not loaded_by("import experiments.run.cli") & (heavy | {"jax"})


def test_signatures_are_checked():
    words = jnp.zeros(3, jnp.uint32)  # two are asked for
    with pytest.raises(TypeCheckError):
        noise.stream(words, "layer/kernel", 0, 0, 0)


@pytest.mark.parametrize(
    ("file", "jax"), [("constraints.txt", "0.10"), ("constraints-newest.txt", "0.11")]
)
def test_the_constraints_pin_what_is_declared(file, jax):
    lines = (ROOT / file).read_text().splitlines()[1:]
    found = [re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][A-Za-z0-9.!+]*)", line) for line in lines]
    assert all(found), "names and exact versions only"
    pins = {canonicalize_name(pin[1]): pin[2] for pin in found}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for extra in ("rl", "supervised", "reasoning", "gguf", "logging", "dev"):
        for need in map(Requirement, [*project["dependencies"], *extras[extra]]):
            if need.name != "pip":  # the one that came with the environment
                assert pins[canonicalize_name(need.name)] in need.specifier, need
    assert pins["jax"].startswith(f"{jax}.")


def test_the_page_of_the_optimizers_names_them_all():
    import optim

    page = (ROOT / "docs" / "optimizers.md").read_text()
    names = [n for n in optim.__all__ if callable(getattr(optim, n)) and n[0].islower()]
    assert {"lion", "state_bytes"} <= set(names)
    for name in names:
        assert f"`{name.removeprefix('scale_by_')}" in page or f"{name}(" in page, name


def tracked_files():
    done = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.split("\n") if name]


def test_no_file_names_a_machine_or_an_index():
    # Spelled apart, so that this file passes its own test.
    forbidden = ["/" + "work/", "/" + "root/", "pypi" + ".org", "files.python" + "hosted"]
    for path in tracked_files():
        if path.is_file() and path.suffix in {".py", ".md", ".toml", ".txt", ".ipynb", ".cff", ""}:
            text = path.read_text(errors="replace")
            found = [word for word in forbidden if word in text]
            assert not found, f"{path.relative_to(ROOT)} holds {found}"


def test_the_source_archive_holds_what_git_tracks():
    tracked = {path.relative_to(ROOT).as_posix() for path in tracked_files() if path.is_file()}
    held = {file.distribution_path for file in SdistBuilder(str(ROOT)).recurse_included_files()}
    # hatchling adds these by itself.
    assert tracked - held == {".ci/run", ".gitignore", "pyproject.toml"}


@pytest.mark.slow
def test_the_wheel_holds_the_library_and_works(tmp_path):
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            tmp_path,
            ROOT,
        ],
        check=True,
    )
    (wheel,) = tmp_path.glob("eggroll_jax-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    libraries = {f"{name}/py.typed" for name in ("eggroll", "experiments", "optim")}
    assert libraries | {"experiments/run/cli.py", "optim/lion.py"} <= set(names)
    assert not any(name.startswith(("tests/", "benchmarks/")) for name in names)

    # Installed in an environment of its own that sees this one's packages, but not the checkout.
    venv.create(tmp_path / "env", with_pip=False)
    site = next((tmp_path / "env").glob("lib/python*/site-packages"))
    zipfile.ZipFile(wheel).extractall(site)
    code = f"""
import sys
sys.path.append({sysconfig.get_paths()["purelib"]!r})
from importlib.metadata import entry_points, version
import eggroll
print(eggroll.__file__, version("eggroll-jax"))
(script,) = entry_points(group="console_scripts", name="eggroll")
script.load()(["--help"])
"""
    done = subprocess.run(
        [tmp_path / "env" / "bin" / "python", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert done.stdout.startswith(str(tmp_path))
    assert "doctor" in done.stdout


PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]


def anchors(page: Path) -> set[str]:
    """What links to the headings of a page end in."""
    heads = [line.lstrip("#").strip() for line in page.read_text().splitlines() if line[:1] == "#"]
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?:|mailto:", target):
            continue
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        assert there.exists(), f"{target} leads nowhere"
        if anchor and there.suffix == ".md":
            assert anchor in anchors(there), f"{target}: {there.name} has no such heading"
