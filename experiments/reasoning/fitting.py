"""How many members write at a time, and to how many questions: settled before anything is built."""

import math

import jax
import jax.numpy as jnp

from experiments.reasoning.config import Config
from experiments.reasoning.evolution import strategy
from experiments.reasoning.memory import MemoryPlan, device_bytes, plan_memory
from experiments.reasoning.questions import Questions
from experiments.reasoning.sequences import shared_length
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
    # The same for all processes, whose programs are one.
    budget = agreement.least(
        device_bytes() if config.memory_gib is None else int(config.memory_gib * 2**30)
    )
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
        budget,
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
