"""`eggroll reasoning`: every algorithm runs, goes on where it stopped, and learns."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import state_of

pytest.importorskip("tokenizers")

from experiments.models import hugging_face, tokens
from experiments.reasoning import tasks
from experiments.reasoning.config import PRESETS, Config
from experiments.reasoning.evolution import Evolution, objective
from experiments.reasoning.questions import Questions
from experiments.reasoning.sequences import Completions
from experiments.reasoning.start import keep_tokenizer, start, with_dtype
from experiments.reasoning.tasks import Question
from experiments.reasoning.train import Reasoning, describe, in_words
from experiments.run.cli import main
from experiments.run.commands import trainer_of
from experiments.run.errors import UsageError
from experiments.run.fields import changed
from experiments.run.metrics import read_metrics
from experiments.run.train import train

TINY = PRESETS["tiny"]
ARMS: dict[str, dict[str, Any]] = {
    "eggroll": dict(sigma=0.3, learning_rate=0.1, anchor=0.1, prompt_chunk=2, noise_reuse=2),
    "dense": dict(rank="full", sigma=0.3, learning_rate=0.1, temperature=1.0, samples=2, objective="best"),
    "grpo": dict(algorithm="grpo", temperature=1.0, optimizer="adamw", **{"grpo.group": 4, "grpo.kl": 0.1}),
    "sft": dict(algorithm="sft", optimizer="adamw", task_settings='{"digits": 2}'),
}  # fmt: skip


def settings(folder: Path, **changes: Any) -> Config:
    return changed(TINY, {"run_dir": folder, "checkpoint_seconds": 0.0, **changes})


@pytest.mark.parametrize(
    "arm",
    ["eggroll", "grpo", *(pytest.param(arm, marks=pytest.mark.soak) for arm in ("dense", "sft"))],
)
def test_a_run_in_two_parts_is_the_whole(arm: str, tmp_path: Path) -> None:
    whole, parts = (settings(tmp_path / name, **ARMS[arm]) for name in ("whole", "parts"))
    train(whole)
    train(changed(parts, generations=1))
    train(parts)
    untimed = [
        [{**row, "timing": None} for row in read_metrics(config.run_dir / "metrics.jsonl")]
        for config in (whole, parts)
    ]
    assert untimed[0] == untimed[1]
    assert [row["generation"] for row in untimed[0]] == [0, 1, 2, 3]
    states = (jax.tree.leaves(state_of(config.run_dir)) for config in (whole, parts))
    for leaf, right in zip(*states, strict=True):
        np.testing.assert_array_equal(leaf, right)
    result = json.loads((parts.run_dir / "result.json").read_text())
    written = {"eggroll": 8 * 4, "dense": 8 * 4 * 2, "grpo": 4 * 4, "sft": 0}[arm]
    assert result["generated_tokens"] <= 4 * written * 6
    assert (result["generated_tokens"] > 0) == (arm != "sft")
    text = (whole.run_dir / "samples.txt").read_text()
    assert [line for line in text.split("\n") if line.startswith("after")] == [
        "after 0 updates",
        "after 4 updates",
    ]


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has half learned to add two digits, by supervised learning."""
    folder = tmp_path_factory.mktemp("warm") / "run"
    changes = dict(algorithm="sft", optimizer="adamw", learning_rate=0.01, width=32, prompts=32)
    config = settings(folder, **changes, generations=60, evaluate_every=60, held_out_questions=8)
    train(config)
    rows = read_metrics(folder / "metrics.jsonl")
    assert rows[0]["loss"] > 5 and rows[-1]["loss"] < 1.2
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        dict(population=32, sigma=0.03, learning_rate=1e-3, generations=25, prompts=16),
        # With a reference: parameters that were read are not lost to the updates.
        pytest.param(
            dict(
                ARMS["grpo"],
                learning_rate=3e-3,
                generations=30,
                prompts=16,
                **{"grpo.kl": 0.01, "grpo.group": 8},
            ),
            marks=pytest.mark.soak,
        ),
    ],
    ids=["eggroll", "grpo"],
)
def test_rewards_alone_teach(changes: dict[str, Any], warm: Path, tmp_path: Path) -> None:
    config = settings(tmp_path / "run", start=warm, evaluate_every=100, **changes)
    train(config)
    rewards = [row["reward_mean"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert np.mean(rewards[-5:]) > rewards[0] + 0.1


def test_a_run_is_evaluated_sampled_and_exported(
    warm: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["eval", str(warm)]) == 0
    told = capsys.readouterr().out
    for name in ("held-out accuracy", "pass@1 of 8 samples", "pass@8 of 8 samples", "majority@8"):
        assert name in told
    assert main(["sample", str(warm), "--prompt", "2+2=", "--temperature", "0"]) == 0
    sampled = capsys.readouterr().out
    assert sampled.startswith("2+2=")
    assert main(["export", str(warm)]) == 0
    folder = warm / "exported"
    assert f"to {folder}" in capsys.readouterr().out
    params = hugging_face.load(folder)[1]
    trained = state_of(warm).learner.params
    for leaf, right in zip(jax.tree.leaves(params), jax.tree.leaves(trained), strict=True):
        np.testing.assert_array_equal(leaf, right)
    assert tokens.from_folder(folder).encode("2+2=") == list(b"2+2=")
    # An exported folder is a model like any other.
    words = ["sample", str(folder), "--prompt", "2+2=", "--temperature", "0", "--length", "6"]
    assert main(words) == 0
    assert capsys.readouterr().out == sampled
    assert main(["sample", str(folder)]) == 2
    assert "--prompt '': this model begins with nothing" in capsys.readouterr().err
    config = settings(tmp_path / "run", model=str(folder), generations=1)
    assert 8 * 4 <= train(config)["generated_tokens"] <= 8 * 4 * 6


@pytest.mark.soak
def test_byte_pairs_are_learned_once_and_stay_with_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = dict(tokenizer="bpe", vocabulary=280, algorithm="sft", task_settings='{"digits": 2}')
    config = settings(tmp_path / "run", **pairs, generations=1)
    train(config)
    kept = tokens.from_folder(tmp_path / "run" / "tokenizer")
    assert len(kept.encode("47+85=7+5=12")) < len("47+85=7+5=12")
    saved = kept.model.to_str()
    train(changed(config, run_dir=tmp_path / "again"))
    again = tokens.from_folder(tmp_path / "again" / "tokenizer")
    assert again.model.to_str() == saved
    read = lambda folder: jax.tree.leaves(state_of(folder))
    for leaf, right in zip(read(tmp_path / "again"), read(tmp_path / "run"), strict=True):
        np.testing.assert_array_equal(leaf, right)

    # From here on they are read: learning others would be told.
    monkeypatch.setattr(tokens, "train_bpe", None)
    train(changed(config, generations=2))
    moved = tmp_path / "moved"
    (tmp_path / "run").rename(moved)
    words = ["--prompt", "47+85=", "--length", "5"]
    assert main(["sample", str(moved), *words]) == 0
    sampled = capsys.readouterr().out
    assert main(["export", str(moved)]) == 0
    exported = moved / "exported"
    assert tokens.from_folder(exported).model.to_str() == saved
    capsys.readouterr()
    assert main(["sample", str(exported), *words]) == 0
    assert capsys.readouterr().out == sampled
    train(settings(tmp_path / "next", start=moved, generations=1))
    assert state_of(tmp_path / "next").learner.params["embed_tokens"].shape[0] == kept.vocab_size

    monkeypatch.undo()
    overwritten = changed(config, run_dir=moved, overwrite=True, vocabulary=270)
    train(overwritten)
    assert tokens.from_folder(moved / "tokenizer").vocab_size == 270
    assert trainer_of(moved).config.overwrite is False
    (moved / "tokenizer" / "tokenizer_config.json").unlink()
    for command in ("sample", "eval"):
        assert main([command, str(tmp_path / "next")]) == 2
        assert f"{moved} has checkpoints but no folder tokenizer" in capsys.readouterr().err


def test_a_run_that_lost_its_byte_pairs_is_not_continued_with_others(tmp_path: Path) -> None:
    config = settings(tmp_path, tokenizer="bpe", vocabulary=262)
    asked = []

    def task() -> tasks.Task:
        asked.append(True)
        return tasks.load("sums", digits=1)

    keep_tokenizer(config, start(config, task))
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    # A run that is there is read without its questions.
    assert start(config, task).tokenizer.vocab_size == 262
    assert len(asked) == 1
    shutil.rmtree(tmp_path / "tokenizer")
    with pytest.raises(UsageError, match="has checkpoints but no folder tokenizer.* --overwrite"):
        start(config, task)
    assert len(asked) == 1
    assert start(changed(config, overwrite=True), task).tokenizer.vocab_size == 262


def test_another_seed_learns_from_other_questions(tmp_path: Path) -> None:
    task = tasks.load("sums", digits=3)
    learned = []
    for seed in (0, 0, 1):
        config = settings(tmp_path, tokenizer="bpe", vocabulary=300, seed=seed)
        learned.append(start(config, lambda: task).tokenizer.model.to_str())
    assert learned[0] == learned[1] != learned[2]


def test_questions_are_passed_over_in_an_order_of_each_pass(tmp_path: Path) -> None:
    config = settings(tmp_path, prompts=23)
    trainer = Reasoning(config)
    passes = [
        [
            question.prompt
            for g in range(4 * turn, 4 * turn + 4)
            for question in trainer.questions.of_generation(g)
        ]
        for turn in range(2)
    ]
    everything = sorted(q.prompt for q in trainer.task.train)
    assert len(everything) == 92
    assert [sorted(one) for one in passes] == [everything] * 2
    assert passes[0] != passes[1]


def test_rewards_are_summed_by_weight_and_told_apart(tmp_path: Path) -> None:
    config = settings(tmp_path, reward="exact=2,format=0.5")
    trainer = Reasoning(config)
    questions, examiner = trainer.questions.measured[:2], trainer.examiner
    texts = [f"<answer>{questions[0].answer}</answer>", questions[1].answer]
    found = examiner.rewards(examiner.submit(texts, questions), (2,))
    assert found.rewards.tolist() == [2.5, 2.0]
    assert {name: part.tolist() for name, part in found.parts.items()} == {
        "exact": [1, 1],
        "format": [1, 0],
    }
    with pytest.raises(UsageError, match="a weight must be a number, as in exact=0.5, got 'x'"):
        assert Reasoning(settings(tmp_path, reward="exact=x")).notes


def test_a_completion_that_cannot_be_told_leaves_its_pair_out() -> None:
    config = changed(TINY, samples=2)
    rewards = np.array([[1.0, np.nan, 1.0, 0.0]])
    assert np.isnan(objective(rewards, config)[0, 0])
    assert objective(rewards, config)[0, 1] == 0.5
    best = changed(config, objective="best")
    assert objective(rewards, best)[0, 1] == 1


@pytest.mark.parametrize("copies", [pytest.param("float32", marks=pytest.mark.soak), "int8"])
def test_weights_in_int8_are_trained_on_and_exported_as_floats(
    copies: str, warm: Path, tmp_path: Path
) -> None:
    changes = dict(
        quantised=True, copies=copies, population=32, sigma=0.03, learning_rate=1e-3, prompts=16
    )
    config = settings(tmp_path / "run", start=warm, generations=8, evaluate_every=100, **changes)
    train(config)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert np.mean([row["reward_mean"] for row in rows[-3:]]) > rows[0]["reward_mean"]
    # A fifth of sigma is several steps for some matrices and a part of one for none.
    assert all(0.1 < row["changed_weights"] < 1 for row in rows)
    state = state_of(tmp_path / "run").learner
    layers = state.params["layers"]
    assert layers["up_proj"]["int8"].dtype == jnp.int8
    assert state.master["layers/up_proj/int8"].dtype == jnp.dtype(copies)
    before = state_of(warm).learner.params
    apart = layers["up_proj"]["int8"] * layers["up_proj"]["scale"][:, None]
    assert 0 < float(jnp.abs(apart - before["layers"]["up_proj"]).max()) < 0.5
    assert main(["export", str(tmp_path / "run")]) == 0
    floats = hugging_face.load(tmp_path / "run" / "exported")[1]
    np.testing.assert_allclose(floats["layers"]["up_proj"], apart, rtol=1e-6)
    # Another run may go on from it, in either form.
    for quantised in (True, False):
        config = settings(tmp_path / f"{quantised}", start=tmp_path / "run", quantised=quantised)
        again = Reasoning(config).base.params(jnp.int32(0))["layers"]["up_proj"]
        if quantised:
            again = again["int8"] * again["scale"][:, None]
        np.testing.assert_allclose(again, apart, atol=float(jnp.abs(apart).max()) / 200)


@pytest.mark.parametrize("fitness", ["likelihood", "match"])
def test_worked_solutions_are_a_fitness(fitness: Any, warm: Path, tmp_path: Path) -> None:
    changes = dict(fitness=fitness, population=32, sigma=0.03, learning_rate=1e-3, prompts=16)
    config = settings(tmp_path / "run", start=warm, generations=12, evaluate_every=100, **changes)
    assert train(config)["generated_tokens"] == 0
    scores = [row["fitness_mean"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert np.mean(scores[-3:]) > np.mean(scores[:3])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--population", "7"], "an even number of at least 2"),
        (["--algorithm", "grpo"], "--temperature 0: the answers of a group would all be the same"),
        (["--samples", "2"], "--samples 2: without --temperature they would all be the same"),
        (["--grpo.group", "1"], "--grpo.group 1: choose a whole number of at least 2"),
        (["--task", "sum"], "there is no task 'sum'"),
        (["--task-settings", "[1]"], "--task-settings must be an object such as '{\"size\": 1000}', got '[1]'"),
        (["--task-settings", '{"name": "sums"}'], "the name of a task is that of --task"),
        (["--task-settings", "{"], "--task-settings '{' is no JSON"),
        (["--task-settings", '{"digit": 1}'], "no setting 'digit'; did you mean 'digits'"),
        (["--reward", "exat"], "did you mean 'exact'"),
        (["--model", "nowhere"], "nowhere is no folder, nor OWNER/NAME"),
        (["--trained", "heads"], "--trained: train must name some of"),
        (["--optimizer", "sdg"], "did you mean 'sgd'"),
        (["--anchor", "-1"], "--anchor -1.0: choose 0 or a positive number"),
        (["--width", "33"], "--width 33: it is divided among 1 heads of an even width"),
        (["--fitness", "match", "--samples", "2", "--temperature", "1"], "--fitness match: nothing is"),
        (["--fitness", "match", "--algorithm", "sft"], "--fitness match: members of an evolution"),
        (["--quantised", "--algorithm", "sft"], "--quantised: --algorithm sft trains floats alone"),
        (["--copies", "int8"], "--copies int8: they are those of matrices in int8; add --quantised"),
        (["--chat"], "--chat: the tokenizer of transformer has no chat template; choose --no-chat"),
        (["--chat-settings", "{"], "--chat-settings '{' is no JSON"),
        (["--chat-settings", '{"x": 1}'], "they are those of --chat"),
        (["--tokenizer", "bpe", "--vocabulary", "257"], "--vocabulary 257: bytes and two special tokens"),
        (["--tokenizer", "bpe", "--model", "a/b"], "--tokenizer bpe: a/b has a tokenizer of its own"),
        (["--grpo.kl", "-1"], "--grpo.kl -1.0: choose 0 or a positive number"),
        (["--grpo.clip-low", "2"], "--grpo.clip-low 2.0: choose a number above 0, up to 1"),
        (["--grpo.micro-batch", "5"], "--grpo.micro-batch 5: it does not divide the 32 answers"),
    ],
)  # fmt: skip
def test_mistakes_get_one_sentence(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reasoning", "--preset", "tiny", "--run-dir", str(tmp_path / "run"), *words]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_run_without_a_language_model_is_not_sampled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--preset", "digits", "--population", "4", "--width", "4", "--generations", "1"]
    assert main(["supervised", *words, "--run-dir", str(tmp_path / "run")]) == 0
    assert main(["sample", str(tmp_path / "run")]) == 2
    assert "is a run without a language model" in capsys.readouterr().err


def test_task_settings_of_a_preset_give_way_to_another_task() -> None:
    assert changed(TINY, task="a.jsonl").settled().task_settings == "{}"
    assert TINY.settled().task_settings == '{"digits": 1}' and TINY.task_arguments() == {
        "digits": 1
    }
    assert TINY.settled().settled() == TINY.settled()
    # Those that were given stay, although they are the preset's.
    for given in ('{"size": 3}', '{"digits": 1}'):
        own = changed(TINY, task="my_file.py:make", task_settings=given)
        assert own.settled() == own and own.task_arguments() == json.loads(given)


OWN = """
from experiments.reasoning.tasks import Question, Task, split

def make() -> Task:
    train, held_out, fresh = split([Question(f"2*{i}=", str(2 * i)) for i in range(100)])
    return Task(name="doubles", train=train, held_out=held_out, fresh=fresh, max_new_tokens=3)
"""


def test_a_task_of_ones_own_is_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, run = tmp_path / "own.py", tmp_path / "run"
    file.write_text(OWN)
    words = ["--task", f"{file}:make", "--run-dir", str(run), "--sigma", "0.3"]
    assert main(["reasoning", "--preset", "tiny", *words, "--generations", "1"]) == 0
    told = capsys.readouterr()
    assert "doubles: 92 questions to train on, 2 held out, 2 fresh." in told.err
    assert "of fresh questions of doubles right" in told.out
    assert json.loads((run / "config.json").read_text())["writing"]["max_new_tokens"] == 3
    (row,) = read_metrics(run / "metrics.jsonl")
    assert 8 * 4 <= row["generated_tokens"] <= 8 * 4 * 3
    assert 8 * 4 * len("2*1=") <= row["prompt_tokens"] <= 8 * 4 * len("2*99=")
    rates = row["timing"]
    share = row["prompt_tokens"] / row["generated_tokens"]
    assert rates["prompt_tokens_per_second"] / rates["written_tokens_per_second"] == pytest.approx(
        share
    )
    file.write_text(OWN + "# another")
    assert main(["reasoning", "--preset", "tiny", *words, "--generations", "2"]) == 2
    assert "own.py has other content" in capsys.readouterr().err

    # What is read goes on, with a warning.
    warning = f"{run} was trained with other content of {file}.\n"
    assert main(["eval", str(run)]) == 0
    assert warning in capsys.readouterr().err
    begun = ["--run-dir", str(tmp_path / "next"), "--start", str(run), "--generations", "1"]
    assert main(["reasoning", "--preset", "tiny", *begun]) == 0
    assert warning in capsys.readouterr().err
    file.write_text(OWN)
    assert main(["eval", str(run)]) == 0
    assert warning not in capsys.readouterr().err
    # A model is trained on without the files that it came from.
    file.unlink()
    assert main(["reasoning", "--preset", "tiny", *begun, "--overwrite"]) == 0
    assert warning not in capsys.readouterr().err


def test_memory_is_planned_before_the_only_strategy_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many members and questions at a time as 300 KiB hold, in the learner that is built."""
    built = list[Evolution]()
    inner = Evolution.__init__
    monkeypatch.setattr(
        Evolution, "__init__", lambda self, *args: built.append(self) or inner(self, *args)
    )
    trainer = Reasoning(settings(tmp_path, memory_gib=300 / 2**20))
    assert not built
    assert trainer.notes[1].splitlines()[-2].startswith("at a time")
    (only,) = built
    assert trainer.learner is only
    members, prompts = only.es.chunk or 8, only._config.prompt_chunk
    assert f"{members} of 8 members, {prompts} prompts" in trainer.notes[1]
    assert members * prompts < 8 * 4
    assert trainer.config.evolution.chunk is None


def test_what_was_learned_is_told_by_fresh_questions_alone(tmp_path: Path) -> None:
    trainer = Reasoning(settings(tmp_path, held_out_questions=6))
    asked = {q.prompt for q in trainer.questions.fresh}
    others = {q.prompt for q in [*trainer.task.train, *trainer.questions.measured]}
    assert asked and not asked & others
    assert in_words(0.5, 0.5, "x").startswith("No gain: 50.0% of fresh questions")
    assert in_words(0.5, None, "x").startswith("Not confirmed")


def test_every_preset_can_be_right() -> None:
    for config in PRESETS.values():
        config.check()


def test_long_prompts_are_left_out_and_answers_end_at_texts(tmp_path: Path) -> None:
    config = changed(PRESETS["tiny"], run_dir=tmp_path, max_new_tokens=4)
    base = start(config)
    task = tasks.load("sums", digits=2)
    asked = lambda **changes: Questions(changed(config, **changes), base, lambda: task)
    whole, short = asked(), asked(max_prompt_tokens=4)
    prompts = [len(one.prompt) for one in task.train]
    assert (min(prompts), max(prompts)) == (4, 6)
    assert len(whole.trained) == len(task.train)
    assert {len(one.prompt) for one in (*short.trained, *short.measured, *short.fresh)} == {4}
    assert f"{sum(n > 4 for n in prompts):,} have more than --max-prompt-tokens" in describe(
        task, short
    )
    with pytest.raises(UsageError, match="--max-prompt-tokens must be at least 4, .* got 3"):
        asked(max_prompt_tokens=3).trained  # noqa: B018
    two = tasks.load("sums", digits=2)
    long = [one for one in two.held_out if len(one.prompt) > 4]
    apart = dataclasses.replace(two, held_out=long)
    with pytest.raises(UsageError, match="--max-prompt-tokens must be at least 5, .* got 4"):
        Questions(changed(config, max_prompt_tokens=4), base, lambda: apart).measured  # noqa: B018
    # Bytes have the text of one token in them, or none of two.
    stopped = asked(stop=("7", "34"))
    assert stopped.ends == (*base.tokenizer.eos, ord("7"))
    end = base.tokenizer.eos[0]
    rows = [[ord(x) for x in text] for text in ("127\0", "1345", "12\0\0", "1234")]
    rows[2][2] = end
    tokens, lengths = np.array(rows, np.int32), np.array([3, 4, 3, 4], np.int32)
    written = Completions(tokens, lengths, lengths < 4, np.zeros((4, 4)), np.zeros(4))
    assert stopped.texts(written) == ["12", "1", "12", "12"]
    assert whole.texts(written) == ["127", "1345", "12", "1234"]


def test_texts_that_are_longer_than_the_model_was_made_for_are_refused(tmp_path: Path) -> None:
    config = changed(PRESETS["tiny"], run_dir=tmp_path, max_new_tokens=4)
    base = start(config)
    base = base._replace(model=base.model._replace(context=8))
    questions = Questions(config, base, lambda: tasks.load("sums", digits=1))
    questions.prompts([Question("1+2=", "3")])
    told = "the prompt '1[+]22=1'... has 6 tokens, which with 4 .* than the 8 .*: --max-prompt-tokens 4"
    with pytest.raises(UsageError, match=told):
        questions.prompts([Question("1+22=1", "3")])
    told = "the prompt '1[+]2='... has 4 tokens, which with 6 to be written are more than the 8"
    with pytest.raises(UsageError, match=told):
        questions.solutions([Question("1+2=", "3", trace="1+2=3")])


def test_the_type_of_weights_is_that_of_the_earlier_run(tmp_path: Path) -> None:
    first = changed(PRESETS["tiny"], run_dir=tmp_path / "first", generations=1)
    train(first)
    later = changed(first, run_dir=tmp_path / "later", start=tmp_path / "first")
    assert with_dtype(later).dtype == "float32"
    with pytest.raises(UsageError, match="--dtype bfloat16: must be float32 as in --start"):
        start(changed(later, dtype="bfloat16"))


@pytest.mark.parametrize("family", ["transformer", "rwkv7"])
def test_new_models_are_of_the_type_that_is_named(family: str, tmp_path: Path) -> None:
    config = changed(PRESETS["tiny"], run_dir=tmp_path, model=family, width=64, generations=1)
    method = dict(algorithm="sft") if family == "transformer" else {}
    train(changed(config, dtype="bfloat16", **method))
    trained = jax.tree.leaves(state_of(tmp_path).learner.params)
    assert {x.dtype.name for x in trained} == {"bfloat16"}
