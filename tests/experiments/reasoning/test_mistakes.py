"""What is wrong with a folder, a file or a reward is said in a sentence, and what was there stays."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import model_folders
import numpy as np
import pytest

pytest.importorskip("tokenizers")

from experiments.run.cli import main
from experiments.run.metrics import read_metrics


def refused(words: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """The sentence of a command that fails."""
    capsys.readouterr()
    assert main(["reasoning", "--preset", "tiny", *words]) == code
    told = capsys.readouterr().err
    assert "Traceback" not in told
    return told


def edit(folder: Path, **changes: object) -> None:
    told = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(told))


def tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    from safetensors.numpy import load_file, save_file

    held = load_file(folder / "model.safetensors")
    change(held)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


NORM, DOWN = "model.layers.1.self_attn.q_norm.weight", "model.layers.0.mlp.down_proj.weight"
FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda x: (x / "config.json").unlink(), "is not a folder of a model: it has no config.json"),
    "missing": (lambda x: tensors(x, lambda held: held.pop(NORM)), f"has no tensor {NORM}"),
    "misshapen": (
        lambda x: tensors(x, lambda held: held.update({DOWN: held[DOWN][:, 1:].copy()})),
        f"{DOWN} must have the shape [64, 192] by config.json, got [64, 191]",
    ),
    "architecture": (
        lambda x: edit(x, architectures=["Qwen3MoeForCausalLM"]),
        "architectures ['Qwen3MoeForCausalLM'] is not supported; one of LlamaForCausalLM, Qwen2ForCausalLM, "
        "Qwen3ForCausalLM",
    ),
    "no tokenizer": (lambda x: (x / "tokenizer.json").unlink(), "has no tokenizer.json"),
    "no template": (
        lambda x: (x / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}'),
        "has no chat template; choose --no-chat",
    ),
    "small": (lambda x: (x / "model.safetensors").write_bytes(b"{"), "is not a whole safetensors file"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_is_wrong_is_told(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, sentence = FOLDERS[case]
    folder, run = model_folders.qwen3(tmp_path / "qwen"), tmp_path / "run"
    change(folder)
    told = refused(["--model", str(folder), "--chat", "--run-dir", str(run)], capsys)
    assert sentence in told and str(folder) in told
    assert told.count("\n") == 1
    assert not run.exists()


def test_an_rwkv7_without_its_tensor_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = model_folders.rwkv(tmp_path / "rwkv", vocabulary=300)
    words = ["--model", str(folder), "--run-dir", str(tmp_path / "run")]
    tensors(folder, lambda held: held.update({"ln_out.weight": np.ones(3, np.float32)}))
    assert "ln_out.weight must have the shape [32], got [3]" in refused(words, capsys)
    tensors(folder, lambda held: held.pop("ln_out.weight"))
    assert "lacks the tensor ln_out.weight" in refused(words, capsys)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"question": "x"}', "a.jsonl, line 2 has no 'answer' but 'question'"),
        ('{"question": "x", "answer": ', "a.jsonl, line 2 is no JSON: Expecting value"),
        (None, "a.jsonl must have a line such as {'question': ..., 'answer': ...}, but is empty"),
    ],
)
def test_a_line_that_is_wrong_is_told(
    line: str | None, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("" if line is None else f'{{"question": "1+1", "answer": "2"}}\n{line}\n')
    words = ["--task", str(path), "--task-settings", "{}", "--run-dir", str(tmp_path / "run")]
    told = refused(words, capsys)
    assert sentence in told and told.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--task", "countdown-esy"], "there is no task 'countdown-esy'.*did you mean 'countdown-easy'"),
        (["--reward", "exacd"], "there is no reward 'exacd'.*did you mean 'exact'"),
        (["--model", "qwen"], "qwen is no folder, nor OWNER/NAME of the Hugging Face hub"),
        (["--model", "a/b", "--start", "c"], "--start c and --model a/b: each names a model"),
    ],
)  # fmt: skip
def test_a_name_that_is_wrong_is_told(
    words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = refused([*words, "--run-dir", str(tmp_path / "run")], capsys)
    assert re.search(sentence, told)
    assert told.count("\n") == 1


def test_a_hub_that_is_out_of_reach_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    words = ["--model", "Qwen/Qwen3-0.6B", "--run-dir", str(tmp_path / "run")]
    told = refused(words, capsys)
    assert "Qwen/Qwen3-0.6B is no folder, and the Hugging Face hub does not give it" in told
    assert told.count("\n") == 1


REWARD = """
import pathlib
PLACE = pathlib.Path(__file__).with_name("bad")

def mine(completions, answers, **_):
    fine = [float(len(text)) for text in completions]
    return eval(PLACE.read_text()) if PLACE.exists() else fine
"""


@pytest.mark.slow
def test_a_reward_that_fails_ends_the_run_which_then_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(REWARD)
    run = tmp_path / "run"
    words = ["--reward", f"{tmp_path / 'mine.py'}:mine", "--run-dir", str(run), "--sigma", "0.3"]
    assert main(["reasoning", "--preset", "tiny", *words, "--generations", "1"]) == 0
    before = read_metrics(run / "metrics.jsonl")
    assert len(before) == 1
    for bad, sentence in {
        "1 / 0": "mine.py:mine' raised ZeroDivisionError: division by zero; the first of 8",
        "fine[1:]": "mine.py:mine' gave 7 values for 8 completions; the first of 8",
        "['high'] * len(fine)": "mine.py:mine' must give numbers or None, got 'high' (str)",
        "None": "mine.py:mine' must give a list of 8 values, got None (NoneType)",
    }.items():
        (tmp_path / "bad").write_text(bad)
        told = refused([*words, "--generations", "2"], capsys, code=1)
        assert sentence in told
        assert "the right answer" in told
        assert read_metrics(run / "metrics.jsonl") == before
    (tmp_path / "bad").unlink()
    assert main(["reasoning", "--preset", "tiny", *words, "--generations", "2"]) == 0
    rows = read_metrics(run / "metrics.jsonl")
    assert rows[:1] == before and len(rows) == 2


GSM8K = [
    {"question": f"{i} boxes of {j} eggs?", "answer": f"{i}*{j}=<<{i}*{j}={i * j}>>{i * j} eggs\n#### {i * j}"}
    for i in range(2, 9) for j in range(2, 9)
]  # fmt: skip


@pytest.mark.soak
def test_worked_solutions_of_a_file_teach_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, run = tmp_path / "eggs.jsonl", tmp_path / "run"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in GSM8K))
    folder = model_folders.qwen3(tmp_path / "qwen")
    words = [
        *("--preset", "sft", "--model", str(folder), "--task", str(path), "--chat"),
        *("--prompts", "16", "--generations", "50", "--evaluate-every", "50", "--run-dir", str(run)),
        *("--held-out-questions", "4", "--reward-workers", "0", "--max-new-tokens", "40"),
    ]  # fmt: skip
    assert main(["reasoning", *words]) == 0
    rows = read_metrics(run / "metrics.jsonl")
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    # The form of a solution is learned, and that it ends.
    last = (run / "samples.txt").read_text().rpartition("after 50 updates")[2]
    assert re.findall(r"\d eggs\\n#### \d+  +\d+  ", last), last
    assert json.loads((run / "config.json").read_text())["start"] is None
    plain = tmp_path / "plain.jsonl"
    plain.write_text("".join(f'{{"question": "{i}", "answer": "{i}"}}\n' for i in range(40)))
    short = [
        "--preset",
        "sft",
        "--model",
        str(folder),
        "--task",
        str(plain),
        "--reward-workers",
        "0",
    ]
    capsys.readouterr()
    assert main(["reasoning", *short, "--run-dir", str(tmp_path / "next")]) == 2
    assert "has no worked solution to learn from" in capsys.readouterr().err


@pytest.mark.slow
def test_a_model_that_writes_hostile_answers_is_trained_on(tmp_path: Path) -> None:
    """A power of 95 with more digits than memory holds, from the model to the update."""
    path, warm, run = tmp_path / "powers.jsonl", tmp_path / "warm", tmp_path / "run"
    power = "95**36**21**3"
    rows = [
        {"question": f"{i}=", "answer": str(i), "how": f"<answer>{power}</answer>", "numbers": [i], "target": i}
        for i in range(40)
    ]  # fmt: skip
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    task = dict(trace="how", columns=["numbers", "target"], reward="countdown=1,format=0.5")
    words = [
        *(
            "reasoning",
            "--preset",
            "tiny",
            "--task",
            str(path),
            "--task-settings",
            json.dumps(task),
        ),
        *("--width", "32", "--max-new-tokens", "40", "--reward-workers", "1"),
    ]
    taught = "--algorithm sft --optimizer adamw --learning-rate 0.02 --prompts 16 --generations 60"
    assert main([*words, *taught.split(), "--evaluate-every", "60", "--run-dir", str(warm)]) == 0
    assert power in (warm / "samples.txt").read_text()
    learned = ["--start", str(warm), "--sigma", "0.05", "--temperature", "1"]
    assert main([*words, *learned, "--generations", "2", "--run-dir", str(run)]) == 0
    assert power in (run / "samples.txt").read_text()
    for row in read_metrics(run / "metrics.jsonl"):
        assert row["unknown_rewards"] == 0
        assert 0 < row["reward_mean"] <= 0.5  # for the form alone
        assert row["updated"]
