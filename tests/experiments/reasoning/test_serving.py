"""Members on a server: the code of docs/serving-members.md gives the updates of a run in one process."""

import re
from pathlib import Path
from typing import Any

import jax
import model_folders
import numpy as np
import pytest

pytest.importorskip("tokenizers")

from engine_server import serving

from experiments.reasoning.config import PRESETS
from experiments.reasoning.engine import answer
from experiments.reasoning.train import Reasoning
from experiments.run.fields import changed

PAGE = Path(__file__).parents[3] / "docs" / "serving-members.md"


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)


def reward(text: str, answer: str) -> float | None:
    """Any function of texts, here with differences between members; some answers have none."""
    return None if text.startswith("z") else float(len(set(text)) + 0.1 * len(text))


def test_scores_of_a_server_make_the_same_update(tmp_path: Path) -> None:
    model = model_folders.qwen3(tmp_path / "model", scale=0.3)
    settings = dict(model=str(model), dtype="float32", prompts=3, max_new_tokens=4)
    rates = dict(population=4, sigma=0.05, learning_rate=0.05, optimizer="adam")
    config = changed(PRESETS["tiny"], {"run_dir": tmp_path / "run", **settings, **rates})
    page: dict[str, Any] = {}
    exec(blocks()[0], page)
    with serving() as (url, engine):
        carry, told = page["train"](config, url, tmp_path / "members", reward, 2)
    assert engine.calls.count("/v1/completions") == 2 * 4

    trainer = Reasoning(config.settled())
    es, state = trainer.learner.es, trainer.start().learner
    questions, spread = trainer.questions, []
    for generation in range(2):
        asked = questions.of_generation(generation)
        written = answer(
            trainer.base.model,
            es,
            state,
            questions.prompts(asked),
            questions.sampling(),
            questions.ends,
        )
        texts = np.array(questions.texts(written), object).reshape(4, 3)
        scores = [
            [reward(text, one.answer) for text, one in zip(row, asked, strict=True)]
            for row in texts
        ]
        spread.append(len({str(row) for row in scores}))
        state, metrics = es.update(state, scores)
        assert metrics.updated and metrics.update_norm == told[generation].update_norm
    assert min(spread) > 1
    jax.tree.map(np.testing.assert_array_equal, carry.learner, state)


def test_the_settings_of_the_page_are_right() -> None:
    page: dict[str, Any] = {}
    exec(blocks()[1], page)
    page["config"].check()
