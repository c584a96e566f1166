"""Ground rules of the project: who imports what, what an import costs, what a wheel holds."""

import ast
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = {"jax", "jaxtyping", "numpy", "optax", "eggroll"}


def imports(path):
    """The top-level names of the modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("path", sorted((ROOT / "eggroll").rglob("*.py")), ids=lambda p: p.stem)
def test_the_library_imports_little(path):
    foreign = set(imports(path)) - CORE - sys.stdlib_module_names
    assert not foreign, f"{path.name} imports {foreign}"


def loaded_by(statement):
    code = f"import sys; {statement}; print(*sorted(m for m in sys.modules if '.' not in m))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_heavy_imports_are_lazy():
    heavy = {"gymnax", "flax", "matplotlib", "rich", "orbax"}
    assert not loaded_by("import eggroll") & heavy
    assert not loaded_by("import experiments.run.cli") & (heavy | {"jax"})


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
    assert {"eggroll/py.typed", "experiments/py.typed", "experiments/run/cli.py"} <= set(names)
    assert not any(name.startswith(("tests/", "benchmarks/")) for name in names)

    # Installed in an environment of its own that sees this one's packages, but not the checkout.
    venv.create(tmp_path / "env", with_pip=False)
    site = next((tmp_path / "env").glob("lib/python*/site-packages"))
    zipfile.ZipFile(wheel).extractall(site)
    others = sysconfig.get_paths()["purelib"]
    code = f"import sys; sys.path.append({others!r}); import eggroll; print(eggroll.__file__)"
    done = subprocess.run(
        [tmp_path / "env" / "bin" / "python", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert done.stdout.startswith(str(tmp_path))
