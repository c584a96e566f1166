"""The documented commands on folders of published architectures: trained, continued, read back."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import model_folders
import numpy as np
import pytest
from places import HELPERS
from runs import state_of

pytest.importorskip("tokenizers")
pytest.importorskip("reasoning_gym")

from eggroll import _checks as checks
from experiments.models import hugging_face, rwkv7_weights
from experiments.reasoning.config import PRESETS
from experiments.reasoning.questions import Questions
from experiments.reasoning.start import start
from experiments.reasoning.train import Reasoning
from experiments.run.cli import main
from experiments.run.fields import changed
from experiments.run.metrics import read_metrics
from experiments.run.train import train

SMALL = (
    "reasoning --preset countdown --population 4 --prompts 2 --prompt-chunk 2 --chunk 4 --max-new-tokens 5 "
    "--held-out-questions 2 --reward-workers 0 --checkpoint-seconds 0 --sigma 0.02"
).split()
# Random models answer nothing right, and without a difference nothing is learned.
REWARD = f"{HELPERS / 'own_reward.py'}:letters"


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folders.qwen3(tmp_path_factory.mktemp("models") / "qwen")


def command(folder: Path, model: Path, *words: str) -> list[str]:
    # As on an accelerator.
    own = ["--model", str(model), "--dtype", "bfloat16", "--run-dir", str(folder / "run")]
    # Questions of one length: prompts of every other length are a program more.
    task = ["--task", "sums", "--task-settings", '{"least": 10, "size": 40}']
    return [*SMALL, *own, *task, "--reward", REWARD, *words]


def rows(folder: Path) -> list[dict[str, Any]]:
    return read_metrics(folder / "run" / "metrics.jsonl")


@pytest.mark.slow
def test_the_documented_command_of_a_qwen3(
    qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A learning rate whose steps are far below the spacing of bfloat16 near 1.
    words = command(tmp_path, qwen, "--learning-rate", "1e-4")
    assert main([*words, "--generations", "2"]) == 0
    assert main([*words, "--generations", "3"]) == 0
    assert "Continuing" in capsys.readouterr().err
    assert [row["updated"] for row in rows(tmp_path)] == [True] * 3
    training = state_of(tmp_path / "run").learner
    shape, before = hugging_face.load(qwen)
    assert {leaf.dtype for leaf in jax.tree.leaves(training.params)} == {jnp.dtype("bfloat16")}
    assert training.master.keys() == {f"layers/{x}" for x in before["layers"] if "_proj" in x}
    moved = 0
    for name, master in training.master.items():
        first = before["layers"][name.split("/")[1]].astype(jnp.float32)
        assert master.dtype == jnp.float32
        assert 0 < jnp.abs(master - first).max() < 0.1
        # What a bfloat16 keeps of it is not the whole.
        moved += int((master != master.astype(jnp.bfloat16)).sum())
    assert moved > 1000
    np.testing.assert_array_equal(training.params["embed_tokens"], before["embed_tokens"])

    assert main(["eval", str(tmp_path / "run")]) == 0
    assert "held-out accuracy" in capsys.readouterr().out
    written = ["--prompt", "How many apples?", "--length", "9"]
    assert main(["sample", str(tmp_path / "run"), *written]) == 0
    sampled = capsys.readouterr().out
    assert sampled.startswith("How many apples?")
    assert main(["export", str(tmp_path / "run")]) == 0
    exported = tmp_path / "run" / "exported"
    told, right = (json.loads((x / "config.json").read_text()) for x in (exported, qwen))
    assert told == right
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (exported / name).read_bytes() == (qwen / name).read_bytes()
    again = hugging_face.load(exported)
    assert again[0] == shape
    jax.tree.map(np.testing.assert_array_equal, again[1], training.params)
    capsys.readouterr()
    assert main(["sample", str(exported), "--chat", *written]) == 0
    assert capsys.readouterr().out == sampled
    assert (
        main(command(tmp_path, exported, "--run-dir", str(tmp_path / "next"), "--generations", "1"))
        == 0
    )


@pytest.mark.soak
def test_what_is_read_stays_on_the_host(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Devices that share a model get their parts from there: none has room for all of it."""
    run, tiny = tmp_path / "run", PRESETS["tiny"]
    train(changed(tiny, generations=1, run_dir=run, quantised=True))
    read = [rwkv7_weights.load(model_folders.rwkv(tmp_path / "rwkv"), on_host=True)[1]]
    for changes in (dict(model=str(qwen)), dict(model=str(qwen), quantised=True), dict(start=run)):
        read.append(start(changed(tiny, **changes)).params(jnp.int32(0)))
    for params in read:
        assert {type(leaf) for leaf in jax.tree.leaves(params)} == {np.ndarray}

    # Where a state is only described, nothing goes to a device, and nothing is checked there.
    monkeypatch.setattr(jax, "make_array_from_callback", None)
    monkeypatch.setattr(
        checks, "_count_unfit", lambda known, unfit: {} if not known else pytest.fail()
    )
    shared = changed(tiny, model=str(qwen), devices=4, tensor_parallel=2)
    for config in (shared, changed(shared, devices=1, tensor_parallel=1)):
        trainer = Reasoning(config)
        assert jax.eval_shape(trainer.start).learner.params["norm"].shape == (64,)


def test_a_chat_is_asked_and_ended_as_the_folder_says(qwen: Path) -> None:
    config = changed(PRESETS["countdown"], model=str(qwen))
    base = start(config)
    asked = lambda config: Questions(config, base, pytest.fail).as_asked("1+1?")
    plain = asked(config)
    assert plain == "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    quiet = changed(config, chat_settings='{"enable_thinking": false}')
    assert asked(quiet) == plain + "<think>\n\n</think>\n\n"
    short = asked(changed(config, system="Be short."))
    assert short == "<|im_start|>system\nBe short.<|im_end|>\n" + plain
    # On a CPU weights are read in float32.
    assert config.dtype == "auto"
    assert {x.dtype for x in jax.tree.leaves(base.params(0))} == {np.dtype("float32")}
    ends = [base.tokenizer.model.token_to_id(x) for x in (model_folders.STOP, model_folders.END)]
    assert list(base.tokenizer.eos) == ends
    # Each special token is one, and none of them is in what was written.
    ids = base.tokenizer.encode(plain)
    assert [ids.count(base.tokenizer.encode(model_folders.START)[0]), ids.count(ends[0])] == [2, 1]
    assert base.tokenizer.decode(ids) == "user\n1+1?\nassistant\n"


@pytest.mark.soak
@pytest.mark.parametrize(
    "words",
    [
        "--algorithm grpo --temperature 1 --grpo.group 2 --grpo.kl 0.1 --learning-rate 0.01",
        "--quantised",
    ],
    ids=["grpo", "quantised"],
)
def test_a_qwen3_in_shards_is_trained_otherwise(words: str, tmp_path: Path) -> None:
    folder = model_folders.qwen3(tmp_path / "shards", sharded=True)
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert main(command(tmp_path, folder, *words.split(), "--generations", "1")) == 0
    (row,) = rows(tmp_path)
    assert row["reward_spread"] > 0
    training = state_of(tmp_path / "run").learner
    assert main(["export", str(tmp_path / "run")]) == 0
    before = hugging_face.load(folder)[1]
    _, after = hugging_face.load(tmp_path / "run" / "exported")
    assert {leaf.dtype for leaf in jax.tree.leaves(after)} == {jnp.dtype("bfloat16")}
    assert jnp.any(after["layers"]["up_proj"] != before["layers"]["up_proj"])
    assert 0 < row["changed_weights"] < 1
    if words == "--quantised":
        matrix = training.params["layers"]["up_proj"]
        assert row["updated"] and matrix["int8"].dtype == jnp.int8
        built = (matrix["int8"] * matrix["scale"][:, None]).astype(jnp.bfloat16)
        np.testing.assert_array_equal(after["layers"]["up_proj"], built)
        return
    jax.tree.map(np.testing.assert_array_equal, after, training.params)


@pytest.mark.soak
def test_the_documented_command_of_an_rwkv7(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rwkv")
    folder = model_folders.rwkv(tmp_path / "rwkv")
    words = command(tmp_path, folder, "--no-chat", "--learning-rate", "1e-4")
    assert main([*words, "--generations", "2"]) == 0
    assert [row["updated"] for row in rows(tmp_path)] == [True] * 2
    capsys.readouterr()
    written = ["--prompt", "How many?", "--length", "9"]
    assert main(["sample", str(tmp_path / "run"), *written]) == 0
    sampled = capsys.readouterr().out
    assert main(["export", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    exported = tmp_path / "run" / "exported"
    assert main(["sample", str(exported), *written]) == 0
    assert capsys.readouterr().out == sampled
    training = state_of(tmp_path / "run").learner
    _, params = rwkv7_weights.load(exported)
    key = lambda tree: tree["blocks"]["ffn"]["key"]
    np.testing.assert_array_equal(key(params), key(training.params))
    assert jnp.any(key(params) != key(rwkv7_weights.load(folder)[1]))
    np.testing.assert_array_equal(params["emb"], training.params["emb"])
    grpo = "--algorithm grpo --temperature 1 --grpo.group 2 --generations 1".split()
    again = command(tmp_path, exported, "--no-chat", "--run-dir", str(tmp_path / "next"), *grpo)
    assert main(again) == 0


@pytest.mark.slow
def test_an_rwkv7_of_ones_own_is_exported_with_its_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(tmp_path / "run")
    words = ["--preset", "tiny", "--model", "rwkv7", "--algorithm", "sft", "--generations", "1"]
    assert main(["reasoning", *words, "--run-dir", run]) == 0
    assert main(["export", run]) == 0
    capsys.readouterr()
    written = ["--prompt", "2+2=", "--temperature", "0", "--length", "5"]
    told = []
    for folder in (run, f"{run}/exported"):
        assert main(["sample", folder, *written]) == 0
        told.append(capsys.readouterr().out)
    assert told[0] == told[1]
