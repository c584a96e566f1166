"""What backpropagation needs of a device's memory, and how many answers' gradients fit at once.

Everything is counted from shapes; nothing is computed or allotted.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from experiments.reasoning import memory
from experiments.reasoning.language_model import LanguageModel
from experiments.reasoning.memory import SEQUENCES, size_of
from experiments.reasoning.sampling import Sampling
from experiments.reasoning.sequences import SEGMENT, padded_length
from experiments.reasoning.sft import Backward, log_probs_and_entropies
from experiments.run.errors import UsageError

# So many tokens at a time keep a device busy: more take more memory and no less time.
BUSY = 8192
# In float32, beside the parameters: the sum of gradients, that of a part, and what the optimizer adds.
GRADIENTS = 3


class GradientPlan(NamedTuple):
    """Bytes on one device, and what fits.

    Attributes:
        weights: of the parameters.
        training: of float32 copies of them, and what the optimizer keeps.
        gradients: of gradients, their sums and updates.
        writing: of one answer while it is written; 0 where none is.
        sequence: of one text between its forward and its backward pass.
        sequences: texts of an update.
        written: answers that are written at a time.
        backward: how gradients are computed, with the texts at a time.
        total: at the peak.
        budget: that it is within.
    """

    weights: int
    training: int
    gradients: int
    writing: int
    sequence: int
    sequences: int
    written: int
    backward: Backward
    total: int
    budget: int

    def describe(self) -> str:
        """A small table."""
        held = self.weights + self.training
        at_once = self.backward.micro_batch or self.sequences
        again = "computed again" if self.backward.remat else "held"
        rows = [
            ("weights", size_of(self.weights)),
            ("optimizer, float32 copies", size_of(self.training)),
            ("gradients", size_of(self.gradients)),
            ("layers' outputs", f"{size_of(self.sequence)} a text x {at_once}, {again}"),
            (
                "total",
                f"{size_of(self.total)} of {size_of(self.budget)}, {size_of(held)} of it held",
            ),
            ("at a time", f"{at_once} of {self.sequences} texts"),
        ]
        if self.writing:
            rows.insert(4, ("answers", f"{size_of(self.writing)} x {self.written} at a time"))
        return "\n".join(f"{name:<26}{text}" for name, text in rows)


def plan_gradient(
    model: LanguageModel,
    optimizer: optax.GradientTransformation,
    params: PyTree,
    sequences: int,
    slots: int,
    longest: int,
    budget_bytes: int,
    sampling: Sampling | None = None,
    prompt_slots: int = 0,
    micro_batch: int | None = None,
    remat: bool | None = None,
    busy: int = BUSY,
) -> GradientPlan:
    """The number of texts that are differentiated at a time: as many as keep the device busy, or as fit, and
    where so many do not fit otherwise, with the inside of layers computed again.

    Args:
        model: what its functions are.
        optimizer: of `sft.optimizer_of`.
        params: of the model, or their shapes.
        sequences: texts of an update.
        slots: tokens of each, with the padding.
        longest: tokens of the longest completion.
        budget_bytes: of the device.
        sampling: how answers are written before they are learned from; None for worked solutions.
        prompt_slots: tokens of the longest prompt of these answers.
        micro_batch: texts at a time, if that is settled.
        remat: whether layers are computed again, if that is settled.
        busy: tokens at a time that keep the device busy.

    Raises:
        UsageError: where not even one text fits; says what takes most, and what would fit.

    Example:
        >>> from experiments.models.transformer import TransformerConfig
        >>> from experiments.reasoning import sft
        >>> from experiments.reasoning.language_model import language_model
        >>> model = language_model(TransformerConfig(vocab_size=4096, hidden_size=256,
        ...     intermediate_size=512, num_hidden_layers=4, num_attention_heads=4))
        >>> params = jax.eval_shape(model.init, jax.random.key(0))
        >>> adamw = sft.optimizer_of("adamw", 1e-5)
        >>> print(plan_gradient(model, adamw, params, 64, 128, 64, 2**28).describe())
        weights                   18.0 MiB
        optimizer, float32 copies 36.0 MiB
        gradients                 54.0 MiB
        layers' outputs           5.3 MiB a text x 16, computed again
        total                     192.2 MiB of 256.0 MiB, 54.0 MiB of it held
        at a time                 16 of 64 texts
    """
    state = jax.eval_shape(optimizer.init, params)
    wide = sum(4 * leaf.size for leaf in jax.tree.leaves(params))
    plan = GradientPlan(
        weights=memory.bytes_of(params),
        training=memory.bytes_of(state),
        gradients=GRADIENTS * wide,
        writing=0 if sampling is None else _writing(model, params, prompt_slots, sampling),
        sequence=0,
        sequences=sequences,
        written=0,
        backward=Backward(),
        total=0,
        budget=budget_bytes,
    )
    whole = _held(model, params, slots, longest, remat=False)
    again = _held(model, params, slots, longest, remat=True)
    ways = {False: whole.bytes, True: again.bytes + whole.a_layer}

    enough = max(1, busy // slots)

    def best(recomputed: bool) -> GradientPlan | None:
        sizes = _divisors(sequences, enough) if micro_batch is None else iter([micro_batch])
        for size in sizes:
            own = plan._replace(
                sequence=ways[recomputed], backward=Backward(size, longest, recomputed)
            )
            if (total := _total(own)) <= budget_bytes:
                most = (budget_bytes - plan.weights - plan.training) // max(plan.writing, 1)
                written = min(sequences, most) if plan.writing else 0
                beside = plan.weights + plan.training + written * plan.writing
                return own._replace(written=written, total=max(total, beside))
        return None

    found = [one for way in ([False, True] if remat is None else [remat]) if (one := best(way))]
    fitting = [one for one in found if not plan.writing or one.written]
    if not fitting:
        raise UsageError(_too_large(plan, ways, micro_batch, remat, prompt_slots, sampling))
    # The first of the largest: layers are held where that does for as many texts.
    return max(fitting, key=lambda one: one.backward.micro_batch or sequences)


class _Held(NamedTuple):
    """Bytes of one text that a backward pass needs.

    Attributes:
        bytes: of all of it.
        a_layer: of a single layer's part.
    """

    bytes: int
    a_layer: int


def _held(model: LanguageModel, params: PyTree, slots: int, longest: int, remat: bool) -> _Held:
    """What is between the passes: the arrays that are as many as the texts."""

    def residuals(params: PyTree, tokens: Any) -> Any:
        def read(params: PyTree) -> Any:
            places = jnp.arange(1, longest + 1)
            one = lambda text: log_probs_and_entropies(model, params, text, at=places, remat=remat)
            return jax.vmap(one)(tokens)[0].sum()

        return jax.vjp(read, params)[1]

    tokens = jax.ShapeDtypeStruct((SEQUENCES, slots), "int32")
    leaves = jax.tree.leaves(jax.eval_shape(residuals, params, tokens))
    own = [leaf for leaf in leaves if SEQUENCES in leaf.shape]
    bytes_of = lambda leaf: leaf.size * leaf.dtype.itemsize // SEQUENCES
    # Those of a scan over layers have the layers in front.
    stacked = [leaf for leaf in own if leaf.shape[0] != SEQUENCES]
    layer = sum(bytes_of(leaf) // leaf.shape[0] for leaf in stacked)
    return _Held(sum(map(bytes_of, own)), layer)


def _writing(model: LanguageModel, params: PyTree, prompt_slots: int, sampling: Sampling) -> int:
    """Bytes of one answer while it is written."""
    slots = padded_length(prompt_slots)
    return sum(
        memory.of_sequence(model, params, slots, SEGMENT, None, None, sampling.max_new_tokens)
    )


def _total(plan: GradientPlan) -> int:
    """Bytes at the peak of an update."""
    own = plan.sequence * (plan.backward.micro_batch or plan.sequences)
    return plan.weights + plan.training + plan.gradients + own


def _divisors(number: int, most: int) -> Iterator[int]:
    """From the largest that is not above the most."""
    return (size for size in range(min(number, most), 0, -1) if number % size == 0)


def _too_large(
    plan: GradientPlan,
    ways: dict[bool, int],
    micro_batch: int | None,
    remat: bool | None,
    prompt_slots: int,
    sampling: Sampling | None,
) -> str:
    """Why not even one text fits, and what would help."""
    held = plan.weights + plan.training
    least = plan._replace(sequence=ways[remat is not False], backward=Backward(micro_batch or 1))
    said = f"the budget is {size_of(plan.budget)}"
    if held + plan.gradients > plan.budget:
        return (
            f"the weights, what the optimizer keeps and the gradients take {size_of(held + plan.gradients)}, "
            f"and {said}: --algorithm eggroll needs no gradients, and --optimizer sgd keeps nothing"
        )
    need = max(_total(least), held + plan.writing)
    what = (
        f"gradients of {micro_batch or 1} texts at a time"
        if micro_batch
        else "the gradient of one text"
    )
    parts = (
        f"weights and optimizer {size_of(held)}, gradients {size_of(plan.gradients)}, layers' outputs "
        f"{size_of(least.sequence)} a text"
    )
    ways_out = []
    if micro_batch and micro_batch > 1:
        ways_out.append("leave --grpo.micro-batch out")
    if remat is False:
        ways_out.append("leave --gradient-checkpointing out")
    if sampling is not None:
        ways_out.append("choose fewer --max-new-tokens")
    ways_out.append("shorter prompts (--max-prompt-tokens)")
    return f"{what} needs {size_of(need)} ({parts}), and {said}: {', or '.join(ways_out)}"
