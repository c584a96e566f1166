"""Damaged files of runs and sweeps get one sentence: a tenth of `make fuzz`."""

import pytest
from fuzz_files import KINDS, fuzz


@pytest.mark.slow
# Threads of orbax tell an event loop that has ended of what is told already.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_no_damage_is_silent_or_a_traceback() -> None:
    shown: list[str] = []
    counts = fuzz(100, 0, shown.append)
    assert sum(counts.values()) == 100
    assert counts["one sentence"] > 50
    assert not any(counts[kind] for kind in KINDS[2:]), shown
