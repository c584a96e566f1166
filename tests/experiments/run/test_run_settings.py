"""Settings survive the way to config.json and back; what decides a run is compared."""

import dataclasses
import json
from pathlib import Path

import pytest

from experiments.reasoning.config import PRESETS as REASONING
from experiments.rl.config import PAPER_SEARCH_SPACE
from experiments.rl.config import PRESETS as RL
from experiments.run.errors import UsageError
from experiments.run.settings import differences, from_json, to_json
from experiments.supervised.config import PRESETS as SUPERVISED

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
    del content["sigma"], content["run_dir"]
    with pytest.raises(UsageError, match="lacks a setting.*run_dir"):
        from_json(type(RL["cartpole"]), content)


def test_differences_name_what_decides_a_run() -> None:
    old = RL["cartpole"]
    free = dataclasses.replace(old, run_dir=Path("x"), generations=7, checkpoint_seconds=1.0)
    assert list(differences(to_json(old), to_json(free))) == []
    # Which devices share a product decides the last bits alone.
    tiny = to_json(REASONING["tiny"])
    assert list(differences(tiny, tiny | {"tensor_parallel": 2})) == []
    told = list(
        differences(tiny | {"same_bits": True}, tiny | {"same_bits": True, "tensor_parallel": 2})
    )
    assert told == ["--tensor-parallel 1 -> 2"]
    new = dataclasses.replace(old, sigma=0.2, seed=3, ppo=dataclasses.replace(old.ppo, clip=0.3))
    assert list(differences(to_json(old), to_json(new))) == [
        "--ppo.clip 0.2 -> 0.3", "--seed 0 -> 3", "--sigma 0.1 -> 0.2",
    ]  # fmt: skip


@pytest.mark.parametrize("name", list(PAPER_SEARCH_SPACE))
def test_the_search_space_of_the_paper_is_of_settings_that_are_right(name: str) -> None:
    for value in PAPER_SEARCH_SPACE[name]:
        dataclasses.replace(RL["cartpole"], **{name: value}).check()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("width", "x", "width is 'x'; a whole number is right"),
        ("seed", 1.5, "seed is 1.5; a whole number is right"),
        ("generations", "x", "generations is 'x'; a whole number or null is right"),
        ("overwrite", 1, "overwrite is 1; true or false is right"),
        ("run_dir", 3, "run_dir is 3; a path is right"),
        ("algorithm", "x", "algorithm is 'x'; 'eggroll' or 'ppo' is right"),
        ("ppo", [], r"ppo is \[\]; an object is right"),
        ("ppo", {"clip": "x"}, "ppo.clip is 'x'; a number is right"),
    ],
)
def test_settings_of_other_types_are_named(name: str, value: object, words: str) -> None:
    content = {**to_json(RL["cartpole"]), name: value}
    with pytest.raises(UsageError, match=f"config.json: {words}"):
        from_json(type(RL["cartpole"]), content)
