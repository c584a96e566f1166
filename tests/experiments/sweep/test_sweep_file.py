"""The file of a sweep: what it means, and one sentence for whatever cannot be right in it."""

from pathlib import Path

import pytest
from places import DOCS

from experiments.run.cli import main
from experiments.run.errors import UsageError
from experiments.sweep.plan import make_plan
from experiments.sweep.spec import KEYS, Halving, read_spec

GOOD = """
driver: rl
preset: pendulum
fixed: {generations: 20, deterministic: false, ppo.learning-rate: 1e-3}
space:
  learning-rate: {log-uniform: [1e-3, 1e-1]}
  sigma: {uniform: [0.02, 0.3]}
  rank: [1, 2, full]
  optimizer: {choice: [adam, sgd]}
  ppo.epochs: {uniform: [1, 9]}
samples: 4
seeds: [7, 3]
out: somewhere
executor: {at_once: 3, together: 2}
halving: {first: 2, eta: 3}
"""


def write(path: Path, text: str) -> Path:
    file = path / "sweep.yaml"
    file.write_text(text)
    return file


def test_a_file_is_read(tmp_path: Path) -> None:
    spec = read_spec(write(tmp_path, GOOD))
    assert spec.driver == "rl"
    assert (spec.base.env, spec.base.generations, spec.base.deterministic) == (
        "Pendulum-v1",
        20,
        False,
    )
    assert spec.base.ppo.learning_rate == 1e-3  # YAML reads 1e-3 as a text
    axes = {axis.field: axis for axis in spec.axes}
    assert axes["learning_rate"].values == (0.001, 0.1)
    assert axes["rank"].values == (1, 2, "full")
    assert [axes[name].unit for name in ("sigma", "ppo.epochs")] == [0, 1]
    assert (spec.seeds, spec.samples, spec.out) == ((7, 3), 4, Path("somewhere"))
    assert (spec.metric, spec.maximise) == ("held_out_return", True)
    assert (spec.executor.kind, spec.executor.at_once, spec.executor.together) == (
        "processes",
        3,
        2,
    )
    assert spec.halving == Halving(2, 3)
    assert spec.rungs == (2, 6, 18, 20)


def test_what_is_not_said_is_sensible(tmp_path: Path) -> None:
    spec = read_spec(write(tmp_path, "driver: pretrain\npreset: tiny\nspace: {alpha: [0.5, 1]}"))
    assert (spec.metric, spec.maximise) == ("held_out_bits_per_byte", False)
    assert (spec.seeds, spec.out, spec.rungs) == ((0,), Path("runs/sweep"), ())


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("driver: rl", "driver: rk", "driver: 'rk' is no driver; did you mean 'rl'?"),
        ("driver: rl", "", "driver: None is no driver; there are rl, pretrain"),
        ("preset: pendulum", "preset: pendlum", "preset: 'pendlum' is no preset; did you mean 'pendulum'"),
        ("sigma: {uniform", "sigm: {uniform", "space: 'sigm' is no setting of this driver; did you mean 'sigma'"),
        ("generations: 20", "generation: 20", "fixed: 'generation' is no setting of this driver; did you mean 'generations'"),
        ("ppo.epochs", "ppo.epochz", "did you mean 'ppo.epochs'"),
        ("samples: 4", "sample: 4", "there is no field sample; did you mean 'samples' or 'space'?"),
        ("samples: 4", "samples: 0", "samples: 0: choose a whole number of at least 1"),
        ("samples: 4", "samples: many", "samples: 'many': choose a whole number"),
        ("[0.02, 0.3]", "[0.3, 0.02]", "space.sigma: uniform: [0.3, 0.02]: choose two numbers, the lower first"),
        ("[0.02, 0.3]", "[0.02]", "space.sigma: uniform: [0.02]: choose two numbers"),
        ("[0.02, 0.3]", "[]", "space.sigma: uniform: []: choose a list with at least one value"),
        ("[0.02, 0.3]", "[0, .nan]", "the lower first"),
        ("[1e-3, 1e-1]", "[0, 1e-1]", "space.learning-rate: log-uniform: [0, '1e-1']: a logarithm needs both above 0"),
        ("[1, 9]", "[1, 9.5]", "choose two whole numbers"),
        ("[1, 2, full]", "[]", "space.rank: grid: []: choose a list with at least one value"),
        ("[1, 2, full]", "[1, fully]", "space.rank: grid: 'fully': choose a whole number or 'full'"),
        ("[1, 2, full]", "[1, 2, 1]", "space.rank: grid: 1 is there twice"),
        ("[1, 2, full]", "3", "space.rank: 3: choose a list, or one of grid, choice, uniform, log-uniform"),
        ("{choice: [adam", "{choise: [adam", "there is no kind 'choise'; did you mean 'choice'"),
        ("{choice: [adam, sgd]}", "{uniform: [0, 1]}", "space.optimizer: uniform: this setting has no numbers"),
        ("deterministic: false", "deterministic: 3", "fixed.deterministic: 3: choose true or false"),
        ("deterministic: false", "sigma: 0.1", "space.sigma: it is fixed too"),
        ("deterministic: false", "seed: 4", "fixed.seed: the sweep sets it: use seeds of the sweep"),
        ("deterministic: false", "overwrite: true", "'overwrite' is no setting"),
        ("deterministic: false", "coordinator: 'a:1'", "'coordinator' is no setting"),
        ("deterministic: false", "population: .inf", "fixed.population: inf: choose a whole number"),
        ("driver: rl", "driver: [rl]", "driver: ['rl'] is no driver"),
        ("seeds: [7, 3]", "metric: {goal: [x]}", "metric.goal: ['x'] is no goal"),
        ("deterministic: false", "generations: 2", "line 4, column 26 is not YAML that can be used: 'generations' is there twice"),
        ("seeds: [7, 3]", "seeds: [7, 7]", "seeds: [7, 7]: choose different whole numbers"),
        ("seeds: [7, 3]", "seeds: 0", "seeds: 0: choose a whole number of at least 1"),
        ("seeds: [7, 3]", "metric: held_out_retrun", "metric.name: 'held_out_retrun' is not in result.json of rl; did you mean 'held_out_return"),
        ("seeds: [7, 3]", "metric: environment_steps", "metric.goal: say whether to maximise or minimise"),
        ("seeds: [7, 3]", "metric: {goal: maximize}", "'maximize' is no goal; did you mean 'maximise'"),
        ("at_once: 3", "at_once: 0", "executor.at_once: 0: choose a whole number of at least 1"),
        ("at_once: 3", "at-once: 3", "there is no field executor.at-once; did you mean 'at_once'"),
        ("at_once: 3", "kind: slrm", "executor.kind: 'slrm' is no executor; did you mean 'slurm'"),
        ("at_once: 3", "kind: gke", "executor.image: name the container image"),
        ("first: 2", "first: 20", "halving.first: 20: choose fewer generations than fixed.generations, 20"),
        ("eta: 3", "eta: 1", "halving.eta: 1: choose a whole number of at least 2"),
        ("generations: 20, ", "", "halving: say how long the best train: set fixed.generations"),
        ("rank:", "max-generations:", "choose a whole number"),
        ("samples: 4", "samples: 1000000000000", "samples: 1000000000000: choose at most 2147483647"),
        ("samples: 4", "samples: 20000", "60,000 settings with 2 seeds each are 120,000 runs; choose at most 100,000"),
        ("seeds: [7, 3]", "seeds: 1000000000000", "seeds: 1000000000000: choose at most 2147483647"),
        ("seeds: [7, 3]", "seeds: 1000000", "seeds: 1000000: choose at most 100000"),
        ("at_once: 3", "at_once: 1000000000000", "executor.at_once: 1000000000000: choose at most"),
        ("first: 2", "first: 1000000000000", "halving.first: 1000000000000: choose at most"),
        ("[1, 9]", "[1, 1.0e+300]", "space.ppo.epochs: uniform: [1, 1e+300]: choose at most 2147483647"),
        ("uniform: [0.02, 0.3]", "log-uniform: [0.02, 1.0e+39]", "space.sigma: log-uniform: [0.02, 1e+39]: choose at most 1e+38"),
        ("[0.02, 0.3]", "[-1.0e+308, 1.0e+308]", "space.sigma: uniform: [-1e+308, 1e+308]: choose a positive number"),
        ("preset: pendulum", "preset: 2020-13-45", "is not YAML that can be used: month must be in 1..12"),
        ("out: somewhere", 'out: "a\\0b"', "choose a folder"),
        ("out: somewhere", "out: 3", "out: 3: choose a folder"),
        ("driver: rl", "[", "is not YAML that can be used"),
        (GOOD, "3", "holds 3: it has to begin with names"),
    ],
)  # fmt: skip
def test_a_mistake_gets_one_sentence_before_anything_runs(
    old: str, new: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert old in GOOD
    file = write(tmp_path, GOOD.replace(old, new, 1))
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", str(file)]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert str(file) in message
    assert message.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.yaml"]


def test_settings_that_the_driver_refuses_are_told_with_their_point(tmp_path: Path) -> None:
    text = "driver: rl\nspace: {population: [8, 7], rank: [1]}"
    with pytest.raises(
        UsageError, match=r"at population 7, rank 1: --population 7: members come in"
    ):
        make_plan(read_spec(write(tmp_path, text)))


def test_the_sweep_of_the_page_is_right() -> None:
    docs = DOCS
    plan = make_plan(read_spec(docs / "sweep-digits.yaml"))
    assert len(plan.runs) == 32
    assert (docs / "sweep-digits.yaml").read_text() in (docs / "sweeps.md").read_text()
    # The page's own example, with everything that a file may say.
    text = (docs / "sweeps.md").read_text().split("```yaml\n")[1].split("```")[0]
    assert {line.split(":")[0] for line in text.splitlines() if line[0] != " "} == set(KEYS)


def test_the_example_of_the_page_is_read(tmp_path: Path) -> None:
    page = (DOCS / "sweeps.md").read_text()
    for example in page.split("```yaml\n")[1:]:
        text = example.split("```")[0]
        if "driver:" not in text:
            text = f"driver: rl\nspace: {{sigma: [0.1]}}\n{text}"
        assert make_plan(read_spec(write(tmp_path, text))).jobs


@pytest.mark.parametrize("text", [None, b"\xff\xfe\xff"])
def test_a_file_that_cannot_be_read(text: bytes | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "sweep.yaml").write_bytes(text)
    with pytest.raises(UsageError, match="sweep.yaml (cannot be read|is not a text)"):
        read_spec(tmp_path / "sweep.yaml")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--rung", "0"], "--rung 0: it goes with --index"),
        (["--status", "--index", "0"], "--status runs nothing"),
        (["--index", "99", "--rung", "0"], "--index 99: the sweep has the jobs 0 to"),
        (["--index", "0"], "--rung None: the sweep has the rungs 0 to 3"),
        (["--index", "0", "--rung", "1"], "--rung 1: the rungs below it are not done yet"),
    ],
)
def test_wrong_flags(
    args: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", str(write(tmp_path, GOOD)), *args]) == 2
    assert words in capsys.readouterr().err
