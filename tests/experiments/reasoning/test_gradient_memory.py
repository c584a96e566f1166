"""The plan of the memory of GRPO and SFT against what the compiler allots, and what it says where nothing fits."""

import re
from typing import Any

import jax
import pytest

from experiments.models.rwkv7 import RWKV7Config
from experiments.models.transformer import TransformerConfig
from experiments.reasoning import sft
from experiments.reasoning.gradient_memory import GradientPlan, plan_gradient
from experiments.reasoning.language_model import LanguageModel, language_model
from experiments.reasoning.sampling import Sampling
from experiments.reasoning.sft import Backward
from experiments.run.errors import UsageError

SHAPE = dict(vocab_size=512, hidden_size=128, num_hidden_layers=6)
MODELS = {
    "transformer": language_model(
        TransformerConfig(**SHAPE, intermediate_size=256, num_attention_heads=4)
    ),
    "rwkv7": language_model(RWKV7Config(**SHAPE, head_dim=32)),
}
ADAMW = sft.optimizer_of("adamw", 1e-3)
SLOTS, LONGEST = 64, 16


def planned(model: LanguageModel, budget: int, sequences: int = 16, **how: Any) -> GradientPlan:
    params = jax.eval_shape(model.init, jax.random.key(0))
    return plan_gradient(model, ADAMW, params, sequences, SLOTS, LONGEST, budget, **how)


def allotted(model: LanguageModel, backward: Backward, sequences: int = 16) -> int:
    """Bytes of the compiled update."""
    params = jax.eval_shape(model.init, jax.random.key(0))
    state = jax.eval_shape(ADAMW.init, params)
    data = (jax.ShapeDtypeStruct((sequences, SLOTS), kind) for kind in ("int32", "bool"))
    update = jax.jit(sft.make_update(model, ADAMW, backward), donate_argnums=(0, 1))
    found = update.lower(params, state, *data).compile().memory_analysis()
    return found.temp_size_in_bytes + found.argument_size_in_bytes


@pytest.mark.parametrize("remat", [False, True], ids=["held", "again"])
@pytest.mark.parametrize("name", MODELS)
def test_the_plan_is_what_the_compiler_allots(name: str, remat: bool) -> None:
    model = MODELS[name]
    plan = planned(model, 2**40, micro_batch=8, remat=remat)
    real = allotted(model, plan.backward)
    assert 0.9 * real < plan.total < 1.3 * real


def test_layers_are_computed_again_where_few_texts_fit() -> None:
    model = MODELS["transformer"]
    plenty = planned(model, 2**40)
    assert plenty.backward == Backward(16, LONGEST, False)
    one = planned(model, 2**40, micro_batch=1, remat=False)
    narrow = planned(model, one.total)
    assert narrow.backward.remat and narrow.backward.micro_batch > 1
    assert narrow.total <= one.total
    assert planned(model, one.total, remat=False).backward == Backward(1, LONGEST, False)
    # As many tokens as keep the device busy, and no more.
    assert planned(model, 2**40, busy=300).backward == Backward(4, LONGEST, False)
    assert planned(model, 2**40, remat=True).backward == Backward(16, LONGEST, True)
    # Twelve texts are divided into parts of one size.
    sizes = {planned(model, one.total + i * 2**20, 12).backward.micro_batch for i in range(40)}
    assert sizes <= {1, 2, 3, 4, 6, 12} and len(sizes) > 2


def test_answers_are_written_as_many_at_a_time_as_fit() -> None:
    model = MODELS["transformer"]
    sampling = Sampling(max_new_tokens=LONGEST)
    told = lambda budget: planned(model, budget, 4096, sampling=sampling, prompt_slots=48)
    wide = told(2**40)
    assert wide.written == 4096 and wide.total >= 4096 * wide.writing
    budget = wide.weights + wide.training + 1000 * wide.writing
    narrow = told(budget)
    assert narrow.written == 1000 and narrow.total <= budget
    assert "x 1000 at a time" in narrow.describe()


@pytest.mark.parametrize(
    ("budget", "how", "words"),
    [
        (2**20, {}, "the weights, what the optimizer keeps and the gradients take .* MiB, and the budget is 1.0"),
        (30 * 2**20, dict(micro_batch=16), "gradients of 16 texts at a time needs .*: leave --grpo.micro-batch out"),
        (27 * 2**20, dict(remat=False), "leave --gradient-checkpointing out, or shorter prompts"),
        (27 * 2**20, dict(sampling=Sampling(max_new_tokens=16), prompt_slots=48, remat=False), "choose fewer --max-new-tokens"),
    ],
    ids=["weights", "micro-batch", "never", "answers"],
)  # fmt: skip
def test_what_does_not_fit_is_refused(budget: int, how: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as found:
        planned(MODELS["transformer"], budget, **how)
    assert re.search(words, str(found.value)), str(found.value)


def test_no_array_is_made() -> None:
    """A model of a size that no machine here holds is planned."""
    large = language_model(TransformerConfig(num_hidden_layers=80, hidden_size=8192, intermediate_size=28672, num_attention_heads=64))  # fmt: skip
    plan = planned(large, 2**42)
    assert plan.weights > 2**37 and plan.backward.micro_batch
