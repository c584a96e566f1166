"""Commands that are typed at random get an answer: a tenth of `make fuzz`."""

import pytest
from fuzz_commands import KINDS, fuzz


@pytest.mark.slow
def test_no_command_is_a_traceback_or_another_one() -> None:
    shown: list[str] = []
    counts = fuzz(50, 0, shown.append)
    assert sum(counts.values()) == 50
    assert counts["good"] > 10 and counts["one sentence"] > 10
    assert not any(counts[kind] for kind in KINDS[2:]), shown
