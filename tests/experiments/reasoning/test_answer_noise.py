"""Noise of its own for every answer: an exact policy gradient, runs that learn, and what is refused."""

import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import state_of

pytest.importorskip("tokenizers")

import eggroll
from eggroll.interpret.node_pass import Rows
from experiments.models.transformer import TransformerConfig
from experiments.reasoning.answer_noise import (
    CHOSEN,
    Own,
    WeightNoise,
    Writes,
    _flat,
    _table,
    read_prompts,
    rows_of,
)
from experiments.reasoning.config import PRESETS, Config
from experiments.reasoning.language_model import LanguageModel, language_model
from experiments.reasoning.planning import on_outputs
from experiments.reasoning.sampling import Sampling
from experiments.reasoning.sequences import pack
from experiments.reasoning.train import Reasoning
from experiments.run.cli import main
from experiments.run.fields import changed
from experiments.run.metrics import read_metrics
from experiments.run.train import train

VOCAB, STEPS, PROMPT = 5, 2, [1, 2, 3]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return language_model(
        TransformerConfig(
            vocab_size=VOCAB, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
            num_attention_heads=2, initializer_range=0.3,
        )
    )  # fmt: skip


def strategy(model: LanguageModel, **settings: Any) -> eggroll.EvolutionStrategy:
    usual: dict[str, Any] = dict(
        optimizer=optax.sgd(1.0), plan=on_outputs(model.plan), perturb="nodes", rows=Rows(STEPS, pick=0),
        shaping=None, credit=eggroll.credit.causal(),
    )  # fmt: skip
    return eggroll.EvolutionStrategy(**{**usual, **settings})


@pytest.mark.slow
def test_the_estimate_is_the_gradient_of_the_expected_reward(model: LanguageModel) -> None:
    """By the chances of all answers of two tokens, of which some have an end after the first."""
    params, end = model.init(jax.random.key(1)), 4
    every = np.array(list(itertools.product(range(VOCAB), repeat=STEPS)), np.int32)
    reward = np.random.default_rng(0).normal(size=(VOCAB, VOCAB)).astype(np.float32)
    # What follows the end counts for nothing.
    reward[end] = reward[end, 0]

    read = read_prompts(model, params, pack([PROMPT]), STEPS)
    first = jax.tree.map(lambda whole: whole[0], read.caches)

    def expected(params: Any) -> jax.Array:
        """What is read of the prompt has no noise, and no part in the gradient."""

        def chance(answer: jax.Array) -> jax.Array:
            cache, token, product = first, jnp.asarray(read.last[0]), jnp.float32(1)
            for t in range(STEPS):
                logits, cache = model.decode(params, cache, token, t, None)
                product *= jax.nn.softmax(logits)[answer[t]]
                token = answer[t]
            return product

        return (jax.vmap(chance)(every) * reward[every[:, 0], every[:, 1]]).sum()

    right = jax.grad(expected)(params)["layers"]
    es = strategy(model, population=2**17, sigma=0.04, chunk=2**14)
    state = es.init(params, 0)
    writes, eos = Writes(model, Sampling(max_new_tokens=STEPS, temperature=1.0)), jnp.array([end])
    prompts = np.zeros(es.population, np.int32)
    own = Own(prompts, np.full((es.population, STEPS), CHOSEN, np.int32))
    tokens = np.asarray(es.map(state, writes, read, eos, members=own).token)
    lengths = np.where(tokens[:, 0] == end, 1, 2)
    values = rows_of(reward[tokens[:, 0], tokens[:, 1]], lengths, STEPS)
    grads = es.gradient(state, values, writes, read, eos, members=own._replace(given=tokens))[
        "layers"
    ]
    names = [name for name in right if "proj" in name]
    flat = lambda tree: np.concatenate([np.ravel(tree[name]) for name in names])
    cosine = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert cosine(-flat(grads), flat(right)) > 0.7
    assert cosine(-np.ravel(grads["o_proj"]), np.ravel(right["o_proj"])) > 0.9
    # The length along the right direction, which noise does not change.
    along = -flat(grads) @ flat(right) / (flat(right) @ flat(right))
    assert 0.6 < along < 1.2


def test_answers_are_read_again_as_they_were_written(model: LanguageModel) -> None:
    """The same tokens have the same chances, also where fewer are read than there may be."""
    es = strategy(model, population=8, sigma=1.0, rows=None)
    state = es.init(model.init(jax.random.key(1)), 0)
    prompts = pack([[*PROMPT, 1], [2, 3]])
    read = read_prompts(model, state.params, prompts, 6)
    writes, eos = Writes(model, Sampling(max_new_tokens=6, temperature=1.0)), jnp.array([4])
    own = Own(np.arange(8, dtype=np.int32) // 2 % 2, np.full((8, 6), CHOSEN, np.int32))
    first = es.map(state, writes, read, eos, members=own)
    again = es.map(
        state, writes, read, eos, members=own._replace(given=np.asarray(first.token)[:, :4])
    )
    np.testing.assert_array_equal(again.token, first.token[:, :4])
    np.testing.assert_allclose(again.log_prob, first.log_prob[:, :4], atol=1e-5)
    assert len({tuple(row) for row in np.asarray(first.token).tolist()}) > 4


def test_without_noise_it_is_the_model_that_writes(model: LanguageModel) -> None:
    """Prompts of several lengths, with a beginning that all of them share."""
    from experiments.reasoning.engine import generate

    params, shared = model.init(jax.random.key(1)), [1, 2, 3, 0] * 5
    prompts = pack([[*shared, 3], [*shared, 2, 1, 3], [*shared, 0, 2]])
    es = strategy(model, population=6, sigma=lambda generation: 0.0, rows=None)
    read = read_prompts(model, params, prompts, 5)
    assert read.prefix is not None
    own = Own(np.arange(6, dtype=np.int32) // 2, np.full((6, 5), CHOSEN, np.int32))
    writes = Writes(model, Sampling(max_new_tokens=5))
    found = es.map(es.init(params, 0), writes, read, jnp.array([4]), members=own)
    right = generate(model, params, prompts, jax.random.key(0), Sampling(max_new_tokens=5), 4)
    np.testing.assert_array_equal(found.token[::2], right.tokens[:, 0])
    np.testing.assert_allclose(found.log_prob[::2], right.log_probs[:, 0], atol=1e-5)


def test_a_prompt_of_one_token_is_refused(model: LanguageModel) -> None:
    with pytest.raises(ValueError, match="prompt 1 must have at least 2 tokens, got 1"):
        read_prompts(model, model.init(jax.random.key(1)), pack([[1, 2], [3]]), 2)


def test_a_question_of_one_token_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text(
        "".join(f'{{"question": "{c}", "answer": "1"}}\n' for c in "abcdefghijklmnop")
    )
    words = ["--preset", "tiny", "--perturb", "answers", "--run-dir", str(tmp_path / "run")]
    words += ["--task", str(tmp_path / "a.jsonl"), "--reward", "exact"]
    words += ["--task-settings", '{"template": "{question}"}', "--generations", "1"]
    assert main(["reasoning", *words]) == 2
    assert "--perturb answers: the prompt" in (told := capsys.readouterr().err)
    assert "must have at least 2 tokens, got 1" in told


def test_tables_have_pairs_side_by_side() -> None:
    answers = np.arange(24).reshape(12, 2)
    table = _table(answers, 3)
    assert table.shape == (4, 3, 2)
    np.testing.assert_array_equal(_flat(table), answers)
    # Members 2p and 2p + 1 of the strategy are a pair, and answer the same question.
    assert (table[1::2] - table[::2] == 2).all()


def settings(folder: Path, **changes: Any) -> Config:
    return changed(PRESETS["tiny"], {"run_dir": folder, "perturb": "nodes", **changes})


@pytest.fixture
def plain(tmp_path: Path) -> str:
    """A reward for answers in ASCII, which random ones are by half."""
    path = tmp_path / "plain.py"
    path.write_text(
        "def plain(completions, answers):\n"
        "    return [sum(c.isascii() for c in text) / 6 for text in completions]\n"
    )
    return f"{path}:plain"


@pytest.mark.soak
def test_a_run_goes_on_with_the_same_bits(plain: str, tmp_path: Path) -> None:
    usual = dict(generations=4, optimizer="adam", learning_rate=0.01, sigma=0.1, temperature=1.0)
    usual |= dict(reward=plain, reward_workers=0, chunk=16)
    whole, parts = (settings(tmp_path / name, **usual) for name in ("whole", "parts"))
    train(whole)
    train(changed(parts, generations=2))
    train(parts)
    rows = [read_metrics(one.run_dir / "metrics.jsonl") for one in (whole, parts)]
    without = lambda row: {name: x for name, x in row.items() if name != "timing"}
    assert list(map(without, rows[0])) == list(map(without, rows[1]))
    assert rows[0][-1]["update_norm"] > 0
    # Every prompt is read once, whatever the population.
    assert rows[0][0]["prompt_tokens"] < 4 * 8 * 4
    assert not (whole.run_dir / "history.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("perturb", "least"),
    [("answers", 0.75), pytest.param("nodes", 0.6, marks=pytest.mark.soak)],
)
def test_rewards_teach(perturb: str, least: float, plain: str, tmp_path: Path) -> None:
    config = settings(
        tmp_path / "run", reward=plain, reward_workers=0, generations=30, evaluate_every=30, population=64,
        prompts=8, temperature=1.0, optimizer="adam", learning_rate=0.1, sigma=0.1, trained=("head",),
        perturb=perturb,
    )  # fmt: skip
    train(config)
    rows = read_metrics(config.run_dir / "metrics.jsonl")
    assert rows[0]["reward_mean"] < 0.55 and rows[-1]["reward_mean"] > least
    # Every answer of weight noise is a member; node noise has no noise of weights.
    assert (rows[0]["noise_norm"] > 0) == (perturb == "answers")


def test_weight_noise_for_answers_is_replayed(plain: str, tmp_path: Path) -> None:
    config = settings(
        tmp_path / "run",
        perturb="answers",
        generations=2,
        reward=plain,
        reward_workers=0,
        sigma=0.1,
    )
    train(config)
    assert len((config.run_dir / "history.jsonl").read_text().splitlines()) == 2
    assert main(["replay", str(config.run_dir)]) == 0


def test_scores_of_weight_noise_for_answers_are_those_of_their_members(
    model: LanguageModel,
) -> None:
    """An answer is what the member that is built writes after a prompt that was read without noise."""
    es = eggroll.EvolutionStrategy(
        optimizer=optax.sgd(1.0), population=6, sigma=0.5, plan=model.plan, shaping=None
    )
    params, eos = model.init(jax.random.key(1)), jnp.array([4])
    state = es.init(params, 0)
    read = read_prompts(model, params, pack([PROMPT, [2, 3]]), STEPS)
    writes = Writes(model, Sampling(max_new_tokens=STEPS))
    own = Own(np.arange(6, dtype=np.int32) // 2 % 2, np.full((6, STEPS), CHOSEN, np.int32))
    found = es.map(state, writes, read, eos, members=own)
    for i in range(6):
        mine = jax.tree.map(lambda x: x[i], own)  # noqa: B023
        right = writes(es.member(state, i), jax.random.key(0), mine, read, eos)
        np.testing.assert_array_equal(found.token[i], right.token)
        np.testing.assert_allclose(found.log_prob[i], right.log_prob, atol=1e-4)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--rank", "2"], "--rank 2: must be left out with --perturb nodes"),
        (["--algorithm", "sft"], "--algorithm sft: must be left out"),
        (["--subspaces", "2"], "--subspaces 2: must be left out"),
        (["--quantised"], "--quantised: must be left out"),
        (["--fitness", "likelihood"], "--fitness likelihood: must be left out"),
        (["--prompt-chunk", "2"], "--prompt-chunk 2: must be left out"),
    ],
)
def test_what_does_not_go_together_is_refused(
    words: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = f"reasoning --preset tiny --perturb nodes --run-dir {tmp_path / 'run'}".split()
    assert main([*given, *words]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("perturb", [pytest.param("answers", marks=pytest.mark.soak), "nodes"])
def test_devices_change_no_bit(perturb: str, plain: str, tmp_path: Path) -> None:
    usual = dict(perturb=perturb, generations=2, optimizer="sgd", learning_rate=0.05, sigma=0.1)
    usual |= dict(reward=plain, reward_workers=0, chunk=8, same_bits=True)
    one, two = (settings(tmp_path / str(n), **usual, devices=n) for n in (1, 2))
    train(one)
    train(two)
    states = [state_of(each.run_dir).learner.params for each in (one, two)]
    jax.tree.map(np.testing.assert_array_equal, *states)
    assert read_metrics(one.run_dir / "metrics.jsonl")[0]["update_norm"] > 0


def test_answers_are_the_same_some_at_a_time(tmp_path: Path) -> None:
    """Of 32 answers, in groups of 12 whose last is filled up; what is done is told in between."""
    found, told = [], list[tuple[int, int, str]]()
    for chunk in (None, 12):
        config = settings(tmp_path / "run", perturb="answers", sigma=0.3, chunk=chunk)
        with Reasoning(config) as trainer:
            learner, asked = trainer.learner, trainer.questions.of_generation(0)
            assert isinstance(learner, WeightNoise)
            told.clear()
            tell = lambda *done: told.append(done)
            state = learner.start(jnp.int32(0))
            found.append(learner.answers(state, asked, tell).completions.tokens)
    np.testing.assert_array_equal(*found)
    assert told == [
        (0, 32, "answers"),
        (12, 32, "answers"),
        (24, 32, "answers"),
        (32, 32, "answers"),
    ]


def test_a_run_has_no_members_to_export_and_no_history_to_replay(
    plain: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(settings(run, generations=1, reward=plain, reward_workers=0))
    assert main(["export", str(run), "--members", "0"]) == 2
    assert "--members: a run with --perturb nodes has no members" in capsys.readouterr().err
    assert main(["replay", str(run)]) == 2
    assert "history.jsonl" in capsys.readouterr().err


def test_the_probe_compares_sigmas(
    plain: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"probe --preset tiny --perturb nodes --reward {plain} --reward-workers 0".split()
    words += f"--run-dir {tmp_path / 'run'} --probe-sigmas 1e-7 1".split()
    main(words)
    said = capsys.readouterr().out
    identical = next(line for line in said.splitlines() if line.startswith("identical pairs"))
    small, large = (int(share[:-1]) for share in identical.split()[-2:])
    assert small > 50 > large
    assert "learning-rate" not in said
