"""Long repetitions, run by `make soak` alone."""

import pytest

from experiments.run.cli import main


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(10))
def test_cartpole_is_solved_from_every_seed(seed, tmp_path, capsys):
    main(["rl", "--preset", "cartpole", "--run-dir", str(tmp_path / "run"), "--seed", str(seed)])
    assert "Learned to balance the pole" in capsys.readouterr().out
