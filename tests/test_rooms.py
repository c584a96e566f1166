"""Imports go one way: between rooms as the table says, between files without a cycle."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("eggroll", "optim", "experiments")

# For each room of eggroll, from the ground up, the rooms whose files it may import. docs/architecture.md
# says what is in them.
BASE = {"_types", "_compat", "_calling", "_isolation"}
ROOMS = {
    "_types": set(),
    "_compat": set(),
    "_calling": set(),
    "_isolation": {"_compat"},
    "noise": set(),
    "shaping": set(),
    "credit": set(),
    "values": {"_compat", "_isolation"},
    "interpret": {"values", *BASE},
    "arithmetic": {"credit", "values", "shaping", *BASE},
    "plan": {"arithmetic", "interpret", "values", *BASE},
    "population": BASE,
    "perturbation": {
        "arithmetic", "interpret", "noise", "plan", "population", "values", *BASE,
    },
    "nodes": {"interpret", "noise", "population", "values", *BASE},
    "estimator": {"perturbation", "noise", "plan", "arithmetic", "population", "values", *BASE},
    "exchange": {"plan", "population", *BASE},
    "state": {"plan", *BASE},
    "_checks": {"plan", "state", *BASE},
    "_settings": {
        "_checks", "arithmetic", "credit", "exchange", "interpret", "noise", "plan", "population",
        "shaping", *BASE,
    },
    "inputs": {
        "_settings", "arithmetic", "nodes", "interpret", "noise", "plan", "population", "state", *BASE,
    },
    "factors": {"inputs", "noise", "perturbation", "plan", "population", "values", *BASE},
    "members": {
        "_checks", "_settings", "arithmetic", "estimator", "inputs", "interpret", "nodes", "noise",
        "perturbation", "plan", "population", *BASE,
    },
    "generation": {
        "_checks", "_settings", "arithmetic", "credit", "estimator", "inputs", "members", "noise",
        "perturbation", "plan", "population", "state", *BASE,
    },
    "_programs": {
        "_checks", "_settings", "arithmetic", "factors", "generation", "inputs", "members",
        "perturbation", "population", "state", *BASE,
    },
    "strategy": {
        "_checks", "_programs", "_settings", "arithmetic", "exchange", "factors", "inputs", "interpret",
        "members", "noise", "perturbation", "plan", "population", "state", *BASE,
    },
    "integer": {"strategy", "noise", "shaping", "values", *BASE},
}  # fmt: skip


def files(package: str) -> dict[str, Path]:
    """The modules of a package by their names."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = {name: path for package in PACKAGES for name, path in files(package).items()}


def imports(name: str, whole: bool = True) -> set[str]:
    """Modules of this project that a module names in its imports; without ``whole``, at its top alone."""
    tree = ast.parse(MODULES[name].read_text())
    found = set()
    for node in ast.walk(tree) if whole else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{name} has a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else node.module)
    return {module for module in found if module.split(".")[0] in PACKAGES}


def room(module: str) -> str:
    return [*module.split("."), "__init__"][1]


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("eggroll.")])
def test_a_room_imports_what_the_table_allows(name):
    others = {room(module) for module in imports(name) if module != "eggroll"} - {room(name)}
    assert others <= ROOMS[room(name)], f"{name} imports {sorted(others - ROOMS[room(name)])}"


def test_the_table_is_in_order_and_complete():
    seen: set[str] = set()
    for name, below in ROOMS.items():
        assert below <= seen, f"{name} imports rooms that stand after it: {sorted(below - seen)}"
        seen.add(name)
    assert seen == {room(name) for name in MODULES if name.startswith("eggroll.")}


def test_the_libraries_know_neither_each_other_nor_the_drivers():
    for package in ("eggroll", "optim"):
        others = set(PACKAGES) - {package}
        for name in files(package):
            assert not {module.split(".")[0] for module in imports(name)} & others, name


def test_drivers_import_public_rooms_alone():
    """Of optim what its __init__ says; of eggroll no file with an underscore."""
    for name in files("experiments"):
        for module in imports(name):
            if module.split(".")[0] != "experiments":
                assert not any(part.startswith("_") for part in module.split(".")), (name, module)


# For each room of experiments, from the ground up, the rooms whose files it may import.
EXPERIMENTS = {
    "run": set(),
    "models": {"run"},
    "supervised": {"run", "models"},
    "optimizers": {"run", "models", "supervised"},
    "pretrain": {"run", "models"},
    "rl": {"run", "models"},
    "reasoning": {"run", "models"},
    "sweep": {"run"},
}
# These find drivers and commands by their names.
FINDERS = {"experiments.run.cli", "experiments.run.drivers"}


def test_a_driver_knows_what_all_share_and_not_the_other_way_round():
    rooms = [name for name in MODULES if name.count(".") >= 2 and name.startswith("experiments.")]
    assert {room(name) for name in rooms} == set(EXPERIMENTS)
    for name in rooms:
        others = {room(m) for m in imports(name) if m.startswith("experiments.")} - {room(name)}
        if name not in FINDERS:
            assert others <= EXPERIMENTS[room(name)], f"{name} imports {sorted(others)}"


def test_no_two_files_import_each_other():
    """No cycle of imports at the top of files; a package's __init__ imports its own files."""
    graph = {
        name: {module for module in imports(name, whole=False) if module in MODULES}
        for name in MODULES
        if MODULES[name].name != "__init__.py"
    }
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above[above.index(name) :], name))
        if name in graph and name not in done:
            for module in sorted(graph[name]):
                visit(module, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def summary(name: str) -> str:
    """The first paragraph of a module's docstring, in one line."""
    docstring = ast.get_docstring(ast.parse(MODULES[name].read_text()))
    assert docstring, f"{name} has no docstring"
    return " ".join(docstring.split("\n\n")[0].split())


def the_map() -> str:
    lines = []
    for name, path in sorted(MODULES.items(), key=lambda item: item[1].parts):
        if len(path.relative_to(ROOT).parts) == 2 and path.name == "__init__.py":
            lines.append(f"\n### {name}\n")
        lines.append(f"- `{path.relative_to(ROOT)}`: {summary(name)}")
    return "\n".join(lines) + "\n"


def test_the_map_in_the_docs_is_current():
    page = (ROOT / "docs" / "architecture.md").read_text()
    found = page.split("<!-- map -->\n")[1].split("<!-- end of map -->")[0]
    assert found == the_map(), (
        "docs/architecture.md does not list the modules as they are; "
        "cd tests; python -c 'import test_rooms; test_rooms.write_map()' writes the list anew"
    )


def write_map() -> None:
    """Writes the list of modules in docs/architecture.md anew."""
    page = ROOT / "docs" / "architecture.md"
    before, rest = page.read_text().split("<!-- map -->\n")
    after = rest.split("<!-- end of map -->")[1]
    page.write_text(f"{before}<!-- map -->\n{the_map()}<!-- end of map -->{after}")
