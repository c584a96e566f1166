"""Mistakes on the command line get one sentence and exit code 2; help is instant."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments.run import cli
from experiments.run.cli import main
from experiments.run.drivers import find_driver
from experiments.run.errors import RunError
from experiments.run.fields import changed


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "rl " in text
    assert "doctor " in text


@pytest.mark.parametrize(
    "args", [["--help"], ["rl", "--population", "7"], ["rk"], ["sweep", "there-is-none.yaml"]]
)
def test_help_and_mistakes_load_nothing_heavy(args: list[str]) -> None:
    code = f"import sys; from experiments.run.cli import main; main({args}); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    loaded = set(done.stdout.splitlines()[-1].split())
    assert not {"jax", "numpy", "gymnax", "flax", "matplotlib"} & loaded


# What is wrong is a flag, a name or a file; the words are those of its sentence.
MISTAKES: list[tuple[list[str], str]] = [
    (["rl", "--env", "CartPole-v2"], "did you mean 'CartPole-v1'"),
    (["rl", "--env", "gymnasium:CartPol-v1"], "did you mean 'CartPole-v1'"),
    (["rl", "--optimizer", "lbfgs"], "asks for values of the loss along a line"),
    (["rl", "--optimizer", "polyak_sgd"], "choose another one, such as adam"),
    (["rl", "--optimizer", "contrib.muon"], "must be an optimizer of optax, such as adam"),
    (["rl", "--optimizer", "sm3", "--learning-rate-decay", "0.5"], "the same in every step"),
    (["rl", "--run-dir", "/dev/null/run"], "/dev/null is no folder"),
    (["pretrain", "--data", "nope"], "--data nope: there is no such file or folder"),
    (["pretrain", "--optimizer", "adm"], "did you mean 'adam'"),
    (["supervised", "--data", "nope"], "--data nope: there is no such file or folder"),
    (["supervised", "--optimizer", "optim.lyon"], "did you mean 'lion'"),
    (["optimizers", "--data", "nope"], "--data nope: there is no such file or folder"),
    (["optimizers", "--optimizer", "rprop"], "the same in every step"),
    (["optimizers", "--momentum", "0.9"], "--momentum 0.9: adamw has no such setting"),
    (["optimizers", "--b2", "2"], "--b2 2.0: choose a number from 0 to below 1"),
    (["optimizers", "--kappa", "hubert"], "--kappa hubert: there is no such function"),
    (["optimizers", "--optimizer", "optim.lion_k", "--kappa", "huber"], "it needs a number"),
    (["optimizers", "--optimizer", "optim.galore", "--density", "0"], "needs a share above 0"),
    (["optimizers", "--optimizer", "lion", "--also-split", "lm_head"], "has no such setting"),
    (["reasoning", "--start", "nope"], "--start: nope is not a run folder"),
    (["reasoning", "--preset", "tiny", "--model", "nope"], "--model nope is no folder"),
    (["reasoning", "--preset", "tiny", "--task", "nope"], "there is no task 'nope'"),
    (["reasoning", "--preset", "tiny", "--task", "nope.py:make"], "there is no file"),
    (["reasoning", "--preset", "tiny", "--task", "nope.jsonl"], "there is no file nope.jsonl"),
    (["reasoning", "--preset", "tiny", "--task-settings", '{"digit": 1}'], "did you mean 'digits'"),
    (["reasoning", "--preset", "tiny", "--task-settings", '{"size": 1000000000000}'], "at most"),
    (["reasoning", "--preset", "tiny", "--task-settings", '{"size": 1, "size": 2}'], "twice"),
    (["reasoning", "--preset", "tiny", "--reward", "nope.py:score"], "there is no file"),
    (["reasoning", "--preset", "tiny", "--reward", "exact=nan"], "as in exact=0.5, got 'nan'"),
    (["reasoning", "--preset", "tiny", "--optimizer", "lbfgs"], "along a line"),
    (["study", "tiny", "--methods", "adm"], "there is no such method"),
    (["sweep", "there-is-none.yaml"], "there-is-none.yaml cannot be read"),
    (["report", "nope"], "nope is not a run folder"),
    (["eval", "nope"], "nope is not a run folder"),
    (["eval", "nope", "--episodes", "0"], "--episodes 0: choose a whole number of at least 1"),
    (["eval", ""], "--run: a path must not be empty"),
    (["sample", "nope"], "nope is no folder"),
    (
        ["sample", "nope", "--temperature", "nan"],
        "--temperature nan: choose 0 or a positive number",
    ),
    (["export", "nope"], "nope is not a run folder"),
    (["doctor", "nope"], "nope is not a run folder"),
]


def test_mistakes_are_told_before_jax_is_imported(tmp_path: Path) -> None:
    """One process for all: whatever one of them imported would be seen after those behind it too."""
    code = (
        "import contextlib, io, json, sys\n"
        "from experiments.run.cli import main\n"
        "for args in json.load(sys.stdin):\n"
        "    with contextlib.redirect_stderr(io.StringIO()) as told:\n"
        "        code = main(args)\n"
        "    print(json.dumps([code, told.getvalue(), 'jax' in sys.modules]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps([args for args, _ in MISTAKES]),
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    for (args, words), (code, told, heavy) in zip(MISTAKES, answers, strict=True):
        assert code == 2 and words in told and told.count("\n") == 1, (args, told)
        assert told.startswith(f"eggroll {args[0]}: ")
        assert not heavy, args
    assert list(tmp_path.iterdir()) == []


def test_the_last_of_two_presets_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = find_driver("rl")
    words = ["--preset", "cartpole", "--preset=pendulum", "--width", "4"]
    config = cli.parse(driver.config, driver.presets, words, "eggroll rl")
    assert config == changed(driver.presets["pendulum"], width=4)


def test_no_control_character_reaches_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "--data", "a\nb\x1b[31m"]) == 2
    told = capsys.readouterr().err
    assert "--data a\\nb\\x1b[31m: there is no" in told
    assert told.count("\n") == 1


@pytest.mark.parametrize("word", ["a\0b", "\udcff"])
def test_what_is_no_text_is_refused(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rl", "--run-dir", word]) == 2
    assert "must be text in UTF-8 without NUL" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["rk"], "no command 'rk'; did you mean 'rl'?"),
        (["rl", "--population", "7"], "an even number of at least 2"),
        (["rl", "--population", "0"], "an even number of at least 2"),
        (["rl", "--sigma", "0"], "--sigma 0.0: choose a positive number"),
        (["rl", "--learning-rate", "nan"], "--learning-rate nan: choose a positive number"),
        (["rl", "--generations", "0"], "--generations 0: choose a whole number of at least 1"),
        (["rl", "--rank", "0"], "--rank 0: choose a whole number of at least 1"),
        (["rl", "--seed", "-1"], "--seed -1: choose a whole number from 0"),
        (["rl", "--env", "CartPole-v2"], "no environment 'CartPole-v2'; did you mean"),
        (["rl", "--ppo.clip", "0"], "--ppo.clip 0.0: choose a positive number"),
        (
            ["rl", "--ppo.minibatches", "7"],
            "--ppo.minibatches 7 does not divide the 16 x 128 = 2048",
        ),
        (["rl", "--sigma-decay", "1.5"], "--sigma-decay 1.5: choose a number above 0, up to 1"),
        (["rl", "--checkpoint-seconds", "-1"], "--checkpoint-seconds -1.0: choose 0 or a positive"),
        (["rl", "--optimizer", "optim.lyon"], "optim has no such optimizer"),
        (
            ["rl", "--env", "gymnasium:CartPole-v1", "--seeds", "2"],
            "--seeds 2: --env gymnasium:CartPole-v1 is stepped by worker processes",
        ),
        (["rl", "--preset", "cartpol"], "no such preset; did you mean 'cartpole'"),
        (
            ["rl", "--preset=xyz"],
            "--preset xyz: there is no such preset; there are cartpole, pendulum,",
        ),
        (["doctor", "--fast"], "takes no options"),
    ],
)
def test_a_mistake_gets_one_sentence(
    args: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = ["--run-dir", str(tmp_path / "run")] if args[0] == "rl" else []
    assert main([*args, *folder]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--populaton", "8"], "--population"),
        (["--population", "many"], "--population"),
    ],
)
def test_unknown_words_are_answered_with_known_ones(
    args: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["rl", *args])
    assert exit.value.code == 2
    assert words in capsys.readouterr().err


def test_a_run_folder_that_cannot_be_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["rl", "--run-dir", str(tmp_path / "file" / "run")]) == 2
    assert "cannot be written to" in capsys.readouterr().err


def test_a_folder_without_permission(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Of a file system that nobody may write to, whoever runs this.
    assert main(["rl", "--run-dir", "/proc/run"]) == 2
    message = capsys.readouterr().err
    assert "--run-dir /proc/run cannot be written to" in message
    assert message.count("\n") == 1


def test_an_earlier_run_of_other_settings_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"generation": 0}\n')
    (tmp_path / "config.json").write_text('{"driver": "rl", "evolution": {"sigma": 9}}')
    assert main(["rl", "--run-dir", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "--sigma 9 -> 0.1" in message
    assert "--overwrite" in message
    assert (tmp_path / "metrics.jsonl").read_text() == '{"generation": 0}\n'


@pytest.mark.parametrize(
    ("error", "code"), [(RunError("no scores"), 1), (KeyboardInterrupt(), 130)]
)
def test_what_else_went_wrong_is_told_too(
    error: BaseException,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    error.add_note("a checkpoint could not be written")

    def run(args: object) -> int:
        raise error

    monkeypatch.setitem(cli.COMMANDS, "doctor", cli.Command("", run))
    assert main(["doctor"]) == code
    message = capsys.readouterr().err
    assert "a checkpoint could not be written" in message
    assert str(error) in message


def test_doctor_is_content_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    report = capsys.readouterr().out
    assert "jax" in report
    assert report.endswith("Everything works.\n")


def test_environments_are_listed_by_the_names_that_env_takes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["rl", "--list-envs"]) == 0
    names = capsys.readouterr().out.split()
    assert {"CartPole-v1", "Pendulum-v1", "gymnasium:Acrobot-v1"} <= set(names)
    assert main(["rl", "--list-envs", "--preset", "cartpole"]) == 2
    assert "--list-envs: takes no other options, but got '--preset'" in capsys.readouterr().err


def test_an_error_that_nothing_can_catch_is_told_but_for_that_of_a_loop_that_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[object] = []
    monkeypatch.setattr(sys, "__unraisablehook__", told.append)
    ended, other = (
        SimpleNamespace(exc_value=RuntimeError(words))
        for words in ("Event loop is closed", "other")
    )
    for found in (ended, other):
        cli._unraisable(found)  # type: ignore[arg-type]
    assert told == [other]


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_doctor_has_a_help(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", flag]) == 0
    assert capsys.readouterr().out.startswith(
        "usage: eggroll doctor\n       eggroll doctor RUN [RUN ...]\n"
    )
