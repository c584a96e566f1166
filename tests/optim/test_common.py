"""Optax's own test cases, which ship in its wheel, run over every transform of ours.

Their lists of optimizers are literals: a private copy of the source, in memory, gets our table instead.
Nothing of optax itself is changed.
"""

import importlib.util
import re
import types
import unittest
from pathlib import Path
from typing import Any

import pytest
from transforms import STATIC, TRANSFORMS

pytest.importorskip("absl.testing", reason="optax's tests are written with absl")


def rewritten(name: str, changes: dict[str, str], **names: Any) -> types.ModuleType:
    """A module of optax with patterns in its source replaced and further names known to it."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        pytest.skip(f"this optax ships without {name}", allow_module_level=True)
    source = Path(spec.origin).read_text()
    for pattern, new in changes.items():
        source, found = re.subn(pattern, lambda _, new=new: new, source, flags=re.M | re.S)
        assert found, f"{pattern!r} is not in {name}"
    module = types.ModuleType(f"rewritten.{name}")
    module.__dict__.update(names)
    exec(compile(source, spec.origin, "exec"), module.__dict__)
    return module


contrib = rewritten(
    "optax.contrib._common_test",
    {
        "^(?=class ContribTest)": "_ALL_OPTIMIZERS_UNDER_TEST = _MAIN_OPTIMIZERS_UNDER_TEST = OURS\n",
        "'rank', 'update_proj_gap'": f"*{STATIC!r}",
    },
    OURS=tuple(
        {"opt_name": name, "opt_kwargs": settings, "wrapper_name": None, "wrapper_kwargs": None}
        for name, (_, settings) in TRANSFORMS.items()
    ),
)
contrib._get_opt_factory = lambda name: TRANSFORMS[name][0]

sharding = rewritten(
    "optax._src.sharding_test",
    {
        "^OPTIMIZERS = {.*?^}": "OPTIMIZERS = OURS",
        # conftest.py has set what it sets, among other flags.
        r"^os.environ\['XLA_FLAGS'\].*?$": "",
        # It compares versions as strings, by which 0.10 is older than 0.7.2, and would skip.
        r"jax.__version__ < '0.7.2'": "False",
    },
    OURS={name: factory(**settings) for name, (factory, settings) in TRANSFORMS.items()},
)


def cases() -> Any:
    """Every case as a pytest parameter, but those that use no optimizer."""
    for test_class in (contrib.ContribTest, sharding.ShardingTest):
        for name in unittest.TestLoader().getTestCaseNames(test_class):
            if not name.startswith("test_microbatch"):
                yield pytest.param(test_class(name), id=name)


# FRUGAL and GaLore leave leaves of three axes whole, and say so.
@pytest.mark.filterwarnings("ignore:.*left whole")
@pytest.mark.parametrize("case", list(cases()))
def test_optax(case: unittest.TestCase) -> None:
    result = unittest.TestResult()
    case.run(result)
    told = [text for _, text in [*result.errors, *result.failures]]
    assert not told, told[0]
    assert result.testsRun == 1
    if result.skipped:
        pytest.skip(result.skipped[0][1])
