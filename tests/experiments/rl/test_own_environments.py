"""Environments of one's own: a file's function gives either kind, and everything else is told in a sentence."""

import json
from pathlib import Path

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import own_environments
import own_gymnasium
import pytest
from policies import make_jax_environment

from experiments.rl import libraries, names
from experiments.rl.config import PPO, PRESETS
from experiments.rl.environments import (
    Continuous,
    Discrete,
    Environment,
    OutsideEnvironment,
    make_environment,
)
from experiments.rl.libraries.gymnax import Gymnax
from experiments.rl.train import make_trainer
from experiments.run.errors import UsageError
from experiments.run.fields import changed
from experiments.run.train import train

FILE = own_environments.__file__
POINT, LINE = f"{FILE}:point", f"{own_gymnasium.__file__}:line"
SMALL = changed(
    PRESETS["own"], env=POINT, population=64, width=8, depth=1, held_out_episodes=16, render=False,
    learning_rate=0.1, generations=15,
)  # fmt: skip


@pytest.mark.slow
def test_a_jax_environment_is_learned(tmp_path: Path) -> None:
    result = train(changed(SMALL, run_dir=tmp_path / "run"))
    assert result["held_out_return_before"] < -15
    assert result["held_out_return"] > -10
    assert result["environment_steps"] == 15 * 64 * 20


@pytest.mark.slow
def test_a_gymnasium_environment_is_learned(tmp_path: Path) -> None:
    config = changed(SMALL, env=LINE, workers=1)
    result = train(changed(config, run_dir=tmp_path / "run"))
    assert result["held_out_return_before"] < -5
    assert result["held_out_return"] > -8


@pytest.mark.slow
def test_ppo_trains_in_it_and_episodes_start_anew() -> None:
    ppo = PPO(environments=2, steps=25, epochs=1, minibatches=2)
    trainer = make_trainer(changed(SMALL, algorithm="ppo", ppo=ppo))
    carry, row = trainer.generation(trainer.start())
    assert int(row["episodes"]) == 2  # 25 steps of two environments, episodes of 20
    assert carry.own.env_state.steps.tolist() == [5, 5]


def test_the_kind_is_that_of_the_type() -> None:
    found = make_environment(POINT)
    assert isinstance(found, Environment)
    assert (found.observations, found.time_limit) == (4, 20)
    found = make_environment(LINE)
    assert isinstance(found, OutsideEnvironment)
    assert (found.observations, found.actions) == (1, Discrete(2))
    found = make_environment(f"{FILE}:cartpole_of_gymnax")
    assert isinstance(found, Gymnax)
    assert (found.observations, found.time_limit) == (4, 9)
    assert isinstance(make_environment(f"{FILE}:PointMass"), Environment)  # a class makes one, too


def test_settings_reach_what_makes_an_environment() -> None:
    assert make_jax_environment(POINT, libraries.parse_settings(["limit=7"])).time_limit == 7
    assert make_jax_environment("gymnax:CartPole-v1", {"max_steps_in_episode": 3}).time_limit == 3
    icy, firm = (
        libraries.make("gymnasium:FrozenLake-v1", {"is_slippery": slippery})
        for slippery in (True, False)
    )
    assert len(icy.unwrapped.P[0][0]) == 3
    assert len(firm.unwrapped.P[0][0]) == 1
    with pytest.raises(UsageError, match="--env-settings limit: expected NAME=VALUE"):
        libraries.parse_settings(["limit"])
    with pytest.raises(UsageError, match="does not take --env-settings length=3: .*'length'"):
        make_environment(POINT, {"length": 3})
    with pytest.raises(UsageError, match="Gymnasium cannot make 'CartPole-v1'"):
        make_environment("gymnasium:CartPole-v1", {"length": 3})


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("a_dictionary", "expected an Environment of .*, got an object of the type dict"),
        ("fails", "raised RuntimeError: no data"),
        ("without_limit", "time_limit must be a whole number of at least 1, got None"),
        ("other_actions", r"actions must be Discrete\(n\) or Continuous\(low, high\), got 3"),
        ("three_values", r"step must give \(observation, state, reward, end\), got 3 values"),
        (
            "another_state",
            r"a state of one shape and type, got state\[1\] as float32 \[2\] and float32 \[3\]",
        ),
        ("reward_of_two", r"a number as the reward, got float32 \[2\]"),
        ("step_fails", r"step: .*own_environments\.py, line \d+ raised TypeError: "),
        (
            "branches",
            r"step: .*own_environments\.py, line \d+ raised TracerBoolConversionError: .*bool\[\]\.$",
        ),
        ("without_actions", r"actions must be .* n of at least 1, got Discrete\(n=0\)"),
        ("half_an_action", r"actions must be .* n of at least 1, got Discrete\(n=2\.5\)"),
        ("sees_nothing", r"reset must give an observation with numbers in it, got float32 \[0\]"),
        (
            "of_no_gymnax",
            r"the environment that it gives: .*own_environments\.py raised (AttributeE|TypeCheckE)rror: ",
        ),
        ("pointmass", "has no function 'pointmass'; did you mean 'PointMass'"),
        ("", "must name a function in a file, as .*own_environments.py:NAME does"),
    ],
)
def test_what_cannot_be_right_is_told(function: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make_environment(f"{FILE}:{function}")


def test_an_outside_environment_without_a_time_limit_is_told() -> None:
    with pytest.raises(UsageError, match="must have a time limit, .*TimeLimit"):
        make_environment(f"{own_gymnasium.__file__}:endless")


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("without_spaces", "observation_space must be a Box or Discrete, got None"),
        ("space_fails", r"action_space: .*own_gymnasium\.py, line \d+ raised KeyError: 'no data'"),
        ("empty", r"observation_space must have numbers in it, got Box\(.*\(0,\)"),
        ("equal_bounds", r"action_space: lower bounds must be below upper bounds, got \[1"),
        ("matrix_of_actions", r"action_space must be Discrete or a Box of one axis, got Box"),
        ("close_fails", r"close: .*own_gymnasium\.py, line \d+ raised KeyError: 'no data'"),
    ],
)
def test_what_cannot_be_right_about_an_outside_environment_is_told(
    function: str, words: str
) -> None:
    with pytest.raises(UsageError, match=words) as told:
        make_environment(f"{own_gymnasium.__file__}:{function}")
    assert str(told.value).startswith("--env ")
    assert "\n" not in str(told.value)


def test_files_and_libraries_that_there_are_not_are_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no file .*nothing.py"):
        make_environment("nothing.py:make")
    with pytest.raises(UsageError, match="got 'gymnasum'; did you mean 'gymnasium'"):
        make_environment("gymnasum:CartPole-v1")
    broken = tmp_path / "broken.py"
    broken.write_text("import nothing_of_this_name\n")
    with pytest.raises(UsageError, match="broken.py, line 1 raised ModuleNotFoundError"):
        make_environment(f"{broken}:make")


def test_bounds_of_actions_are_checked() -> None:
    for low, high, words in (
        ([-1], [1, 1], "of one length"),
        ([0], [np.inf], "must be finite"),
        ([1], [0], "must be below"),
    ):
        with pytest.raises(ValueError, match=words):
            Continuous(low, high)


def test_settings_that_do_not_go_with_an_outside_environment_are_told() -> None:
    for changes, words in (
        ({"algorithm": "ppo"}, "--algorithm ppo"),
        ({"seeds": 2}, "--seeds 2"),
        ({"perturb": "nodes"}, "--perturb nodes"),
    ):
        with pytest.raises(UsageError, match=f"{words}: .* is stepped by worker processes"):
            make_trainer(changed(SMALL, env=LINE, **changes))  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_run_goes_on_with_the_same_file_alone(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(Path(FILE).read_text())
    config = changed(
        SMALL, env=f"{file}:point", run_dir=tmp_path / "run", population=4, generations=1
    )
    train(config)
    assert list(json.loads((tmp_path / "run" / "files.json").read_text())) == [str(file)]
    train(changed(config, generations=2))
    file.write_text(file.read_text() + "\n# changed\n")
    with pytest.raises(UsageError, match=r"mine\.py"):
        train(changed(config, generations=3))


def test_a_library_is_one_file_and_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module with names, make and adapt; objects of its types may also come from a file of one's own."""
    monkeypatch.setitem(
        libraries.LIBRARIES, "fake_library", libraries.Library("fake_library", False)
    )
    names.check("fake_library:falling")
    assert libraries.is_outside("fake_library:falling") is False
    assert "fake_library:falling" in libraries.names()
    found = make_jax_environment("fake_library:falling")
    observation, state = found.reset(jax.random.key(0))
    assert found.step(jax.random.key(0), state, jnp.int32(1))[0] == observation - 1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("CartPole-v2", "gymnax has no environment 'CartPole-v2'; did you mean 'CartPole-v1'"),
        (
            "gymnax:CartPole-v2",
            "gymnax has no environment 'CartPole-v2'; did you mean 'CartPole-v1'",
        ),
        ("gymnasium:CartPole-v9", "Gymnasium has no environment 'CartPole-v9'; did you mean"),
        ("gymnasum:CartPole-v1", "got 'gymnasum'; did you mean 'gymnasium'"),
    ],
)
def test_names_are_checked_by_their_own_library(name: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        names.check(name)


@pytest.mark.parametrize(
    ("function", "taken"),
    [
        ("with_changes", True),  # **changes
        ("point", False),
        ("of_positions", False),  # render_mode stands before a slash
        ("without_signature", False),
    ],
)
def test_functions_that_take_a_setting_are_told_from_those_that_do_not(
    function: str, taken: bool
) -> None:
    assert libraries.own.takes(f"{FILE}:{function}", "render_mode") is taken


def test_workers_make_environments_without_jax() -> None:
    """They start fast, and as many processes as there are would each take JAX's memory."""
    import subprocess
    import sys

    program = (
        "import sys, experiments.rl.workers as w; "
        "w.libraries.adapt(w.libraries.make('gymnasium:CartPole-v1', {})); "
        "print('jax' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert told.stdout == "False\n", told.stderr


def test_gymnasium_environments_are_adapted_as_they_are() -> None:
    made = gymnasium.make("CartPole-v1")
    assert libraries.adapt(made) is made
    assert libraries.adapt(object()) is None
