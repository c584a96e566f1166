"""Settings survive the way to config.json and back; what decides a run is compared."""

import json
from pathlib import Path

import pytest

from experiments.optimizers.study import StudySettings
from experiments.reasoning.config import PRESETS as REASONING
from experiments.rl.config import PAPER_SEARCH_SPACE
from experiments.rl.config import PRESETS as RL
from experiments.run import report
from experiments.run.commands import EvalSettings, ExportSettings, SampleSettings
from experiments.run.drivers import find_driver
from experiments.run.errors import UsageError
from experiments.run.fields import changed, differences, from_json, members, places, to_json
from experiments.run.settings import Optimizer, RunSettings
from experiments.supervised.config import PRESETS as SUPERVISED
from experiments.sweep.spec import Executor
from experiments.sweep.sweep import SweepSettings

ALL = {**RL, **SUPERVISED}


@pytest.mark.parametrize("name", list(ALL))
def test_presets_are_right_and_survive_json(name: str) -> None:
    config = ALL[name]
    config.check()
    assert config.preset == name
    again = from_json(type(config), json.loads(json.dumps(to_json(config))))
    assert again == config
    assert isinstance(again.run_dir, Path)


def test_settings_of_another_version_are_named() -> None:
    content = to_json(RL["cartpole"])
    with pytest.raises(UsageError, match=r"'ppo.warp', unknown to this version"):
        from_json(type(RL["cartpole"]), {**content, "ppo": {**content["ppo"], "warp": 9}})
    del content["run_dir"]
    with pytest.raises(UsageError, match="lacks a setting.*run_dir"):
        from_json(type(RL["cartpole"]), content)


def told(old: RunSettings, new: RunSettings) -> list[str]:
    return list(differences(to_json(old), to_json(new), type(new), new.cluster.same_bits))


def test_differences_name_what_decides_a_run() -> None:
    old = RL["cartpole"]
    free = changed(old, run_dir=Path("x"), generations=7, checkpoint_seconds=1.0)
    assert told(old, free) == []
    # Which devices share a product decides the last bits alone.
    tiny = REASONING["tiny"]
    assert told(tiny, changed(tiny, tensor_parallel=2)) == []
    exact = changed(tiny, same_bits=True)
    assert told(exact, changed(exact, tensor_parallel=2)) == ["--tensor-parallel 1 -> 2"]
    new = changed(old, {"ppo.clip": 0.3}, sigma=0.2, seed=3)
    assert told(old, new) == [
        "--ppo.clip 0.2 -> 0.3", "--seed 0 -> 3", "--sigma 0.1 -> 0.2",
    ]  # fmt: skip


@pytest.mark.parametrize("name", list(PAPER_SEARCH_SPACE))
def test_the_search_space_of_the_paper_is_of_settings_that_are_right(name: str) -> None:
    for value in PAPER_SEARCH_SPACE[name]:
        changed(RL["cartpole"], {name: value}).check()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("width", "x", "width must be a whole number, got 'x'"),
        ("seed", 1.5, "seed must be a whole number, got 1.5"),
        ("generations", "x", "generations must be a whole number or null, got 'x'"),
        ("overwrite", 1, "overwrite must be true or false, got 1"),
        ("run_dir", 3, "run_dir must be a path, got 3"),
        ("algorithm", "x", "algorithm must be 'eggroll' or 'ppo', got 'x'"),
        ("ppo", [], r"ppo must be an object, got \[\]"),
        ("ppo", {"clip": "x"}, "ppo.clip must be a number, got 'x'"),
    ],
)
def test_settings_of_other_types_are_named(name: str, value: object, words: str) -> None:
    content = {**to_json(RL["cartpole"]), name: value}
    with pytest.raises(UsageError, match=f"config.json: {words}"):
        from_json(type(RL["cartpole"]), content)


@pytest.mark.parametrize("name", ["rl", "pretrain", "reasoning", "supervised", "optimizers"])
def test_every_setting_says_what_it_may_be(name: str) -> None:
    """Numbers have bounds, names are one for one setting, and every preset is within them."""
    driver = find_driver(name)
    assert driver.name == name == driver.config.driver
    known = places(driver.config)
    assert len({place.key for place in known.values()}) == len(known)
    for flag, place in known.items():
        if {int, float} & set(members(place.hint)):
            assert place.range is not None, f"{flag} has no bounds"
    for preset, config in driver.presets.items():
        config.check()
        assert config.preset == preset


@pytest.mark.parametrize(
    "kind",
    [EvalSettings, ExportSettings, SampleSettings, StudySettings, SweepSettings, Executor, report.Settings],
)  # fmt: skip
def test_every_number_of_the_other_commands_has_bounds(kind: type) -> None:
    for flag, place in places(kind).items():
        if {int, float} & set(members(place.hint)):
            assert place.range is not None, f"{flag} has no bounds"


def test_changed_goes_by_the_names_of_flags() -> None:
    config = changed(RL["cartpole"], {"ppo.steps": 8}, population=64, optimizer="sgd", width=4)
    assert (config.ppo.steps, config.evolution.population, config.width) == (8, 64, 4)
    assert config.optimizer.name == "sgd"
    assert config.optimizer.learning_rate == RL["cartpole"].optimizer.learning_rate
    with pytest.raises(UsageError, match="'populaton' is no setting; did you mean 'population'"):
        changed(config, populaton=2)


def test_changed_takes_whole_groups_by_the_names_of_their_fields() -> None:
    # "optimizer" is a flag as well, of a field in the group.
    group = Optimizer(name="sgd", learning_rate=0.5)
    config = changed(RL["cartpole"], optimizer=group)
    assert config.optimizer == group
    config.check()
    with pytest.raises(UsageError, match="'optimiser' is no setting; did you mean 'optimizer'"):
        changed(config, optimiser=group)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        (
            "population",
            3,
            "--population 3: members come in opposite pairs, so choose an even number",
        ),
        ("population", 2**31, "--population 2147483648: choose at most 2147483647"),
        ("sigma", float("nan"), "--sigma nan: choose a positive number"),
        ("sigma", 1e39, r"--sigma 1e\+39: choose at most 1e\+38"),
        ("sigma", 1e-30, "--sigma 1e-30: choose at least 1e-18"),
        ("nodes.gamma", 1.5, "--nodes.gamma 1.5: choose a number from 0 to 1"),
        ("ppo.discount", 0.0, "--ppo.discount 0.0: choose a number above 0, up to 1"),
        ("ppo.entropy", -1.0, "--ppo.entropy -1.0: choose 0 or a positive number"),
        ("width", 10**6, "--width 1000000: choose a whole number from 1 to 65536"),
        ("seed", -1, "--seed -1: choose a whole number from 0 to 2147483646"),
    ],
)
def test_numbers_out_of_bounds_are_named(name: str, value: float, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        changed(RL["cartpole"], {name: value}).check()
