"""How many members write at a time, and to how many questions, or how many texts are differentiated at a
time: settled before anything is built."""

import functools
import math

import jax
import jax.numpy as jnp
import optax

from experiments.reasoning.config import Config
from experiments.reasoning.evolution import strategy
from experiments.reasoning.gradient_memory import GradientPlan, plan_gradient
from experiments.reasoning.memory import MemoryPlan, device_bytes, plan_memory
from experiments.reasoning.questions import Questions
from experiments.reasoning.sequences import shared_length
from experiments.reasoning.sft import room
from experiments.reasoning.speed import expected_tokens_per_s
from experiments.reasoning.start import Start
from experiments.run import agreement
from experiments.run.devices import Layout
from experiments.run.fields import changed

# Rows of a product are hardly faster in larger ones.
LARGEST = 512


def fit(
    config: Config, base: Start, questions: Questions, layout: Layout
) -> tuple[Config, MemoryPlan]:
    """The settings with as many members and questions at a time as fit into the memory, and the plan of it.

    The plan is made from shapes alone. What the settings say themselves is left as it is.

    Args:
        config: the settings.
        base: the model that training begins with.
        questions: of the task, of which those of the first generation say how long prompts are.
        layout: the devices.

    Raises:
        UsageError: where not even two members fit, or for an optimizer that there is not.
    """
    prompts = questions.prompts(questions.of_generation(0))
    shapes = jax.eval_shape(base.params, jnp.int32(0))
    # Every device, or group of them, has the members of at most so many pairs.
    es = strategy(config, base, layout)
    share = 2 * -(-es.population // (2 * layout.groups))
    # A member writes one answer.
    own = config.perturb != "weights"
    # Those of a token beside those of all tokens before it.
    trained = sum(math.prod(leaf.shape) for leaf in es.plan_of(shapes).leaves if leaf.trainable)
    plan = plan_memory(
        base.model,
        es,
        shapes,
        share,
        1 if own else config.prompts * config.samples,
        prompts.tokens.shape[1],
        questions.sampling(),
        _budget(config),
        shared=shared_length(prompts),
        members=config.evolution.chunk,
        together=config.prompt_chunk and config.prompt_chunk * config.samples,
        sums=2 * 4 * trained if config.perturb == "nodes" else 0,
    )
    members = plan.members if plan.members < share else None
    few = max(1, plan.prompts // config.samples)
    together = config.prompt_chunk or (few if few < config.prompts and not own else None)
    settled = changed(config, chunk=config.evolution.chunk or members, prompt_chunk=together)
    # Devices of a CPU share its cores.
    devices = 1 if jax.default_backend() == "cpu" else layout.devices
    sequences = plan.members * plan.prompts
    longest = min(LARGEST, sequences * prompts.tokens.shape[1])
    read, written = (devices * expected_tokens_per_s(shapes, n) for n in (longest, sequences))
    return settled, plan._replace(read_per_s=read, written_per_s=written)


def fit_gradient(
    config: Config, base: Start, questions: Questions, optimizer: optax.GradientTransformation
) -> GradientPlan:
    """How many texts GRPO or SFT differentiates, and how many answers it writes, at a time.

    Args:
        config: the settings.
        base: the model that training begins with.
        questions: of the task, of which those of the first generation say how long texts are.
        optimizer: of the parameters.

    Raises:
        UsageError: where not even one text fits.
    """
    shapes, first = jax.eval_shape(base.params, jnp.int32(0)), questions.of_generation(0)
    remat = {"auto": None, "always": True, "never": False}[config.gradient_checkpointing]
    plan = functools.partial(
        plan_gradient, base.model, optimizer, shapes, budget_bytes=_budget(config), remat=remat
    )
    if jax.default_backend() == "cpu":
        plan = functools.partial(plan, busy=LARGEST)
    if config.algorithm == "sft":
        packed = questions.solutions(first)
        sequences, slots = packed.tokens.shape
        return plan(sequences=sequences, slots=slots, longest=packed.longest)
    prompt_slots, sampling = questions.prompts(first).tokens.shape[1], questions.sampling()
    longest = sampling.max_new_tokens
    return plan(
        sequences=len(first) * config.grpo.group,
        slots=room(prompt_slots + longest),
        longest=longest,
        sampling=sampling,
        prompt_slots=prompt_slots,
        micro_batch=config.grpo.micro_batch,
    )


def _budget(config: Config) -> int:
    """Bytes that may be taken of a device, the same for all processes, whose programs are one."""
    own = config.memory_gib
    return agreement.least(device_bytes() if own is None else int(own * 2**30))
