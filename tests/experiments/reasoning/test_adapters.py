"""Runs as adapters: an update at the best rank, members exactly, in the layout of PEFT."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import model_folders
import numpy as np
import pytest
from jaxtyping import PyTree

pytest.importorskip("tokenizers")

from experiments.models import adapters, hugging_face, transformer
from experiments.models.adapters import Factors, cut, llama_module
from experiments.reasoning.adapters import numbers
from experiments.reasoning.config import PRESETS, Config
from experiments.run.cli import main
from experiments.run.commands import read_run
from experiments.run.errors import UsageError
from experiments.run.fields import changed
from experiments.run.train import train

# PEFT asks for what transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
TOKENS = np.random.default_rng(0).integers(0, 300, (2, 12))


def settings(folder: Path, **changes: Any) -> Config:
    small = dict(generations=2, evaluate_every=2, population=4, prompts=2, max_new_tokens=2)
    return changed(PRESETS["tiny"], {"run_dir": folder, **small, **changes})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folders.qwen3(tmp_path_factory.mktemp("model") / "qwen3")


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two updates of pairs with noise of rank 2, so that the update of a matrix has rank 8 at most."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    # Members differ in the likelihoods of answers, even where their texts are the same.
    how = dict(fitness="likelihood", rank=2, sigma=0.02, learning_rate=0.05, dtype="float32")
    train(settings(folder, model=str(model), **how))
    return folder


def logits(folder: Path, params: PyTree) -> np.ndarray:
    config, _ = hugging_face.load(folder)
    params = jax.tree.map(jnp.asarray, params)
    return np.asarray(transformer.apply(params, jnp.asarray(TOKENS), config), np.float32)


def logits_of_peft(adapter: Path) -> np.ndarray:
    """What PEFT computes of an adapter and the model that it names."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    name = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    base = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, adapter).eval()
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def relative(got: np.ndarray, right: np.ndarray) -> float:
    return float(np.linalg.norm(got - right) / np.linalg.norm(right))


def test_the_update_is_an_adapter(
    run: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run), "--adapter", "--to", str(tmp_path / "whole")]) == 0
    said = capsys.readouterr().out
    # Four pairs in all, with noise of rank 2.
    assert "an adapter of rank 8 for 14 matrices" in said and "would" not in said
    told = json.loads((tmp_path / "whole" / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == str(model)
    assert told["r"] == told["lora_alpha"] == 8
    with read_run(run, on_host=True) as found:
        final = found.state.learner.params
    _, start = hugging_face.load(model, jnp.float32, on_host=True)
    assert relative(logits(model, start), logits(model, final)) > 1e-3
    adapter = adapters.read(tmp_path / "whole", start, llama_module)
    mine = logits(model, adapters.add(start, adapter))
    np.testing.assert_allclose(mine, logits(model, final), atol=1e-4)


def test_what_a_smaller_rank_leaves_out_is_told(
    run: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", str(run), "--adapter", "--rank", "2", "--to", str(tmp_path / "cut")]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "an adapter of rank 2 for 14 matrices" in said and "--rank 8 would leave out 1%" in said
    with read_run(run, on_host=True) as found:
        final = found.state.learner.params["layers"]
    _, start = hugging_face.load(model, jnp.float32, on_host=True)
    near = adapters.add(start, adapters.read(tmp_path / "cut", start, llama_module))["layers"]
    names = [name for name in final if name.endswith("_proj")]
    update = [final[name] - start["layers"][name] for name in names]
    left = [final[name] - near[name] for name in names]
    size = lambda parts: np.sqrt(sum(np.square(x).sum() for x in parts))
    assert f"is {size(left) / size(update):.2%} of the update" in said
    # No matrix of rank 2 is nearer.
    best = [np.linalg.svd(x)[1][:, 2:] for x in update]
    np.testing.assert_allclose(size(left), size(best), rtol=1e-4)


def test_members_are_adapters_of_the_mean(
    run: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run), "--members", "0,1-2", "--to", str(tmp_path)]) == 0
    assert "Wrote member-0, member-1, member-2 of generation 2" in capsys.readouterr().out
    _, mean = hugging_face.load(tmp_path / "mean", on_host=True)
    with read_run(run) as found:
        es, state = found.trainer.learner.es, found.state.learner
        for i in range(3):
            folder = tmp_path / f"member-{i}"
            mine = logits(model, adapters.add(mean, adapters.read(folder, mean, llama_module)))
            np.testing.assert_allclose(mine, logits(model, es.member(state, i)), atol=1e-4)
            assert relative(mine, logits(model, mean)) > 1e-3


@pytest.mark.parametrize(("words", "name"), [(["--adapter"], ""), (["--members", "2"], "member-2")])
def test_peft_computes_the_same(run: Path, tmp_path: Path, words: list[str], name: str) -> None:
    assert main(["export", str(run), *words, "--to", str(tmp_path)]) == 0
    folder = tmp_path / name
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    _, params = hugging_face.load(Path(base), jnp.float32, on_host=True)
    added = adapters.add(params, adapters.read(folder, params, llama_module))
    np.testing.assert_allclose(logits_of_peft(folder), logits(Path(base), added), atol=2e-4)


def test_members_are_adapters_of_the_start(
    run: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", str(run), "--members", "1", "--to", str(tmp_path), "--rank"]
    with read_run(run) as found:
        right = logits(model, found.trainer.learner.es.member(found.state.learner, 1))
    _, start = hugging_face.load(model, jnp.float32, on_host=True)
    errors = []
    for rank in (16, 4):
        assert main([*words, str(rank)]) == 0
        assert f"adapters of rank {min(rank, 8) + 2}" in capsys.readouterr().out
        adapter = adapters.read(tmp_path / "member-1", start, llama_module)
        errors.append(relative(logits(model, adapters.add(start, adapter)), right))
    assert errors[0] < 1e-4 < errors[1]
    assert not (tmp_path / "mean").exists()


def test_a_model_in_no_folder_is_written_beside(tmp_path: Path) -> None:
    """bfloat16, whose float32 copies are what an adapter is made of, and a new model."""
    config = settings(
        tmp_path / "run", width=32, fitness="likelihood", dtype="bfloat16", learning_rate=0.05
    )
    train(config)
    assert main(["export", str(config.run_dir), "--adapter"]) == 0
    folder = config.run_dir / "adapter"
    start = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(start) == folder / "start"
    shape, params = hugging_face.load(folder / "start", on_host=True)
    assert shape.hidden_size == 32
    adapter = adapters.read(folder, params, llama_module)
    with read_run(config.run_dir, on_host=True) as found:
        final, master = found.state.learner.params, found.state.learner.master
    added = adapters.add(params, adapter)
    assert master
    for path, right in master.items():
        name = path.removeprefix("layers/")
        a, b = adapter[path]
        product = np.einsum("lri,lor->lio", a, b)
        np.testing.assert_allclose(product, right - np.float32(params["layers"][name]), atol=1e-6)
    np.testing.assert_allclose(
        np.float32(added["layers"]["up_proj"]), np.float32(final["layers"]["up_proj"]), atol=2e-3
    )


# By the name of the run, what it is.
OTHERS: dict[str, dict[str, Any]] = {
    "vectors": dict(trained=("vectors",)),
    "dense": dict(rank="full"),
    "int8": dict(quantised=True),
    "rwkv7": dict(model="rwkv7", width=64),
    "sft": dict(algorithm="sft", optimizer="adamw", fitness="reward"),
}


@pytest.fixture(scope="module")
def others(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @functools.cache
    def made(name: str) -> Path:
        folder = tmp_path_factory.mktemp("others") / name
        small = dict(generations=1, fitness="likelihood", learning_rate=0.1, width=32)
        train(settings(folder, **{**small, **OTHERS[name]}))
        return folder

    return lambda name: run if name == "run" else made(name)


@pytest.mark.parametrize(
    ("name", "words", "sentence"),
    [
        ("vectors", ["--adapter"], "has also trained"),
        ("vectors", ["--members", "0"], "has dense noise"),
        ("dense", ["--members", "0"], "has dense noise"),
        pytest.param("int8", ["--members", "0"], "in int8", marks=pytest.mark.slow),
        pytest.param("rwkv7", ["--adapter"], "no adapters of rwkv7", marks=pytest.mark.slow),
        ("sft", ["--members", "0"], "--algorithm sft has no members that are models"),
        ("run", ["--members", "0,4"], "has the members 0 to 3, and 4 is not among them"),
        ("run", ["--members", "one"], "write numbers as in 0,1,2"),
        ("run", ["--rank", "3"], "it is that of --adapter or --members"),
        ("run", ["--members", "0", "--adapter"], "choose one of them"),
    ],
)
def test_what_is_no_adapter_is_refused(
    name: str,
    words: list[str],
    sentence: str,
    others: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = others(name)
    capsys.readouterr()
    assert main(["export", str(folder), *words, "--to", str(tmp_path / "to")]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1


def test_numbers_of_members() -> None:
    assert numbers("3, 1,0-1", 8) == [3, 1, 0]
    with pytest.raises(UsageError, match="not among them"):
        numbers("2-1", 8)


def test_a_large_update_is_cut_in_a_random_subspace(monkeypatch: pytest.MonkeyPatch) -> None:
    chance = np.random.default_rng(0)
    before = {"w": chance.normal(size=(2, 80, 120)).astype(np.float32)}
    update = np.stack(
        [
            chance.normal(size=(80, 6)) * 0.5 ** np.arange(6) @ chance.normal(size=(6, 120))
            for _ in range(2)
        ]
    )
    after = {"w": (before["w"] + update).astype(np.float32)}
    whole = cut(before, after, 4)
    monkeypatch.setattr(adapters, "LARGE", 10)
    sampled = cut(before, after, 4)
    assert sampled.needed is None and whole.needed == 6
    assert sampled.error == pytest.approx(whole.error, rel=1e-3)
    assert cut(before, after, 10).rank == 6
    product = lambda found: np.einsum("lri,lor->lio", *found.adapter["w"])
    np.testing.assert_allclose(product(sampled), product(whole), atol=1e-3)


def test_damaged_adapters_are_told(tmp_path: Path) -> None:
    params = {"layers": {"q_proj": np.zeros((2, 6, 4), np.float32)}}
    one = {"layers/q_proj": Factors(np.ones((2, 3, 6)), np.ones((2, 4, 3)))}
    adapters.write(tmp_path, one, llama_module, "base")
    found = adapters.read(tmp_path, params, llama_module)
    jax.tree.map(np.testing.assert_array_equal, found, one)
    with pytest.raises(
        UsageError, match=r"layers\.0\.self_attn\.q_proj has no factors of \[6, 5\]"
    ):
        adapters.read(tmp_path, {"layers": {"q_proj": np.zeros((2, 6, 5))}}, llama_module)
    with pytest.raises(UsageError, match="has factors that the model does not"):
        adapters.read(tmp_path, {"layers": {"k_proj": np.zeros((2, 6, 4))}}, llama_module)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"junk")
    with pytest.raises(UsageError, match="is not a whole safetensors file"):
        adapters.read(tmp_path, params, llama_module)
    (tmp_path / "adapter_config.json").write_text('{"r": 0}')
    with pytest.raises(UsageError, match="lora_alpha"):
        adapters.read(tmp_path, params, llama_module)
