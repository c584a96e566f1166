"""Members that are scored by how near they are to teachers."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import model_folders
import numpy as np
import pytest

pytest.importorskip("tokenizers")

from experiments.reasoning.config import PRESETS, Config
from experiments.reasoning.distilling import Teachers, mixture, teacher_score
from experiments.reasoning.language_model import LanguageModel
from experiments.reasoning.start import start
from experiments.run.commands import read_run
from experiments.run.errors import UsageError
from experiments.run.fields import changed
from experiments.run.train import train

# A model of which the parameters are the logits themselves.
LOGITS = LanguageModel(5, *[None] * 6)._replace(apply=lambda params, tokens: params)  # type: ignore[arg-type]
TOKENS = jnp.array([[0, 1, 2, 3], [4, 3, 2, 1]])
MASK = jnp.array([[False, True, True, True], [False, False, True, False]])


def random_logits(seed: int) -> Any:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(4, 5)), jnp.float32)


def test_scores_are_minus_the_divergence_from_the_mixture() -> None:
    teachers, own = [random_logits(1), random_logits(2)], random_logits(3)
    found = mixture([LOGITS, LOGITS], 0.5, teachers, TOKENS, MASK)
    scores = teacher_score(LOGITS, own, None, TOKENS, MASK, found)
    softmax = lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    every = [softmax(np.asarray(x, np.float64))[:-1] for x in teachers]
    for i in range(2):
        at = np.flatnonzero(MASK[i, 1:])
        losses = [-np.log(p[at, np.asarray(TOKENS)[i, 1:][at]]).mean() for p in every]
        weights = softmax(-np.array(losses) / 0.5)
        np.testing.assert_allclose(found.weights[i], weights, rtol=1e-5)
        aim = sum(w * p for w, p in zip(weights, every, strict=True))
        np.testing.assert_allclose(found.probabilities[i], aim, rtol=1e-5)
        mine = softmax(np.asarray(own, np.float64))[:-1]
        divergence = (aim * np.log(aim / mine)).sum(-1)[at].mean()
        np.testing.assert_allclose(scores[i], -divergence, rtol=1e-4)
    # Nobody is nearer to a teacher than itself, and one that is sure of a token is no NaN.
    alone = mixture([LOGITS], 1.0, teachers[:1], TOKENS, MASK)
    np.testing.assert_allclose(
        teacher_score(LOGITS, teachers[0], None, TOKENS, MASK, alone), 0, atol=1e-6
    )
    sure = mixture([LOGITS], 1.0, [1e4 * teachers[0]], TOKENS, MASK)
    assert np.isfinite(teacher_score(LOGITS, own, None, TOKENS, MASK, sure)).all()


def test_the_better_teacher_of_a_question_counts_more() -> None:
    right = 9.0 * jax.nn.one_hot(jnp.array([1, 2, 3, 0]), 5)
    found = mixture([LOGITS, LOGITS], 0.1, [right, random_logits(1)], TOKENS, MASK)
    assert found.weights[0, 0] > 0.99
    even = mixture([LOGITS, LOGITS], 1e6, [right, random_logits(1)], TOKENS, MASK)
    np.testing.assert_allclose(even.weights, 0.5, atol=1e-4)


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose model is a teacher."""
    folder = tmp_path_factory.mktemp("runs") / "teacher"
    learning = dict(algorithm="sft", optimizer="adamw", learning_rate=1e-2, prompts=32)
    train(settings(folder, seed=7, generations=60, evaluate_every=60, **learning))
    return folder


def settings(folder: Path, **changes: Any) -> Config:
    return changed(PRESETS["tiny"], run_dir=folder, layers=2, width=32, **changes)


@pytest.mark.slow
@pytest.mark.parametrize(
    "student",
    [{}, pytest.param({"quantised": True}, marks=pytest.mark.soak)],
    ids=["floats", "int8"],
)
def test_a_student_comes_nearer_to_its_teachers(
    student: dict[str, Any], taught: Path, tmp_path: Path
) -> None:
    config = settings(
        tmp_path / "run",
        **student,
        fitness="teachers",
        teachers=(str(taught), str(taught)),
        population=32,
        prompts=8,
        sigma=0.03,
        learning_rate=5e-3 if student else 2e-2,
        trained=() if student else ("head", "embeddings"),
        held_out_questions=16,
        generations=30,
        evaluate_every=30,
    )
    train(config)
    with read_run(config.run_dir) as run:
        trainer: Any = run.trainer
        given = tuple(map(jnp.asarray, trainer.questions.solutions(trainer.questions.measured)))
        mixed = Teachers(config, trainer.base).mixture(*given)

        def score(params: Any) -> float:
            return float(teacher_score(trainer.base.model, params, None, *given, mixed).mean())

        before = score(trainer.start().learner.params)
        after = score(run.state.learner.params)
    # Minus divergences, on questions that were not trained on.
    assert after > (0.99 if student else 0.9) * before


def test_teachers_that_read_other_tokens_are_refused(taught: Path, tmp_path: Path) -> None:
    other = model_folders.qwen3(tmp_path / "qwen")
    config = settings(tmp_path / "run", fitness="teachers", teachers=(str(taught), str(other)))
    told = (
        "--teachers .*qwen: must have the tokenizer of the student, of 258 tokens, and has another"
    )
    with pytest.raises(UsageError, match=told):
        Teachers(config, start(config))
    for changes, words in (
        (
            dict(fitness="teachers"),
            "--fitness teachers: learns from models; name them by --teachers",
        ),
        (dict(teachers=("a",)), "--teachers a: they are those of --fitness teachers; add it"),
    ):
        with pytest.raises(UsageError, match=words):
            changed(PRESETS["tiny"], changes).check()
    with pytest.raises(UsageError, match="nowhere"):
        settings(tmp_path, fitness="teachers", teachers=("nowhere",)).check_places()
