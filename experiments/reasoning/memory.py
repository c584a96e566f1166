"""What a population that writes answers needs of a device's memory, and how much of it fits at once.

Everything is counted from shapes; nothing is computed or allotted.
"""

import functools
import math
import os
from collections.abc import Callable, Iterator
from itertools import repeat
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import PyTree

from eggroll import EvolutionStrategy
from experiments.models import parallel
from experiments.models.parallel import ShardingRules
from experiments.reasoning.language_model import LanguageModel
from experiments.reasoning.sampling import Sampling
from experiments.reasoning.sequences import SEGMENT, padded_length, segments
from experiments.run.errors import UsageError

# As many sequences as no model's other axes have entries: what has an axis of this size is a sequence's own.
SEQUENCES = 10007


class MemoryPlan(NamedTuple):
    """Bytes on one device, and what fits.

    Attributes:
        weights: of the parameters.
        training: of float32 copies of them, of the optimizer, and of sums that an update makes.
        factors: of a pair's noise, in proportion to rank x (rows + columns) of each matrix.
        prefix: of a member's state for what all prompts begin with.
        prefix_activations: of a member while it reads this.
        cache: of a member's state for the rest of one prompt and its answer.
        logits: of one sequence: themselves, the policy's logarithms, and one temporary.
        activations: of one sequence while its prompt is read: the two largest arrays.
        population: members.
        members: of them at a time, for `EvolutionStrategy(chunk=...)`.
        prompts: at a time, for `engine.answer(chunk=...)`.
        total: with so many members and prompts.
        budget: that it is within.
        read_per_s: tokens that all members together read a second at most
            (`speed.expected_tokens_per_s`), where it is known.
        written_per_s: tokens that they write.
    """

    weights: int
    training: int
    factors: int
    prefix: int
    prefix_activations: int
    cache: int
    logits: int
    activations: int
    population: int
    members: int
    prompts: int
    total: int
    budget: int
    read_per_s: float | None = None
    written_per_s: float | None = None

    def describe(self) -> str:
        """A small table."""
        held, sequences = self.weights + self.training, self.members * self.prompts
        rows = [
            ("weights", f"{size_of(self.weights)}"),
            ("optimizer, float32 copies", f"{size_of(self.training)}"),
            ("noise", f"{size_of(self.factors)} a pair x {self.members // 2} pairs"),
            ("caches", f"{size_of(self.cache)} a sequence x {sequences}"),
            ("logits", f"{size_of(self.logits)} a sequence x {sequences}"),
            ("activations", f"{size_of(self.activations)} a sequence x {sequences}"),
            (
                "total",
                f"{size_of(self.total)} of {size_of(self.budget)}, {size_of(held)} of it held",
            ),
            ("at a time", f"{self.members} of {self.population} members, {self.prompts} prompts"),
        ]
        if self.prefix:
            shared = f"{size_of(self.prefix)} a member x {self.members}"
            rows.insert(3, ("caches of a shared prefix", shared))
        if self.read_per_s is not None and self.written_per_s is not None:
            speed = f"{self.read_per_s:,.0f} tokens/s read, {self.written_per_s:,.0f} written"
            rows.append(("speed", f"at most {speed} (products alone)"))
        return "\n".join(f"{name:<26}{text}" for name, text in rows)


def plan_memory(
    model: LanguageModel,
    es: EvolutionStrategy,
    params: PyTree,
    population: int,
    prompts: int,
    prompt_slots: int,
    sampling: Sampling,
    budget_bytes: int,
    segment: int = SEGMENT,
    shared: int = 0,
    members: int | None = None,
    together: int | None = None,
    sums: int = 0,
) -> MemoryPlan:
    """The numbers of members and prompts at a time that fit a budget: those with the fewest passes, and among
    these the one with most members.

    Args:
        model: what its functions are.
        es: says rank, plan and optimizer, and by its mesh how many devices share weights and caches. Noise,
            logits and activations are counted as if each of them had these whole.
        params: of the model, or their shapes.
        population: members; on a mesh those of one device, or of one group that shares weights.
        prompts: that there are.
        prompt_slots: tokens of the longest, with the shared ones.
        sampling: how many tokens are written.
        budget_bytes: of the device.
        segment: as in `engine.answer`.
        shared: tokens that all prompts begin with (`sequences.shared_length`).
        members: at a time, if that is settled.
        together: prompts at a time, if that is settled.
        sums: bytes of the sums that an update makes beside, as of node noise.

    Raises:
        UsageError: where not even two members at a time on one prompt fit; says what takes most, and
            what would fit.

    Example:
        >>> import optax
        >>> from experiments.models.transformer import TransformerConfig
        >>> from experiments.reasoning.language_model import language_model
        >>> model = language_model(TransformerConfig(vocab_size=4096, hidden_size=256,
        ...     intermediate_size=512, num_hidden_layers=4, num_attention_heads=4))
        >>> params = jax.eval_shape(model.init, jax.random.key(0))
        >>> es = EvolutionStrategy(optimizer=optax.sgd(1.0), population=64, sigma=0.1, plan=model.plan)
        >>> rule = Sampling(max_new_tokens=65)
        >>> print(plan_memory(model, es, params, 64, 16, 60, rule, 2**30).describe())
        weights                   18.0 MiB
        optimizer, float32 copies 0.0 KiB
        noise                     68.0 KiB a pair x 32 pairs
        caches                    1.0 MiB a sequence x 640
        logits                    48.0 KiB a sequence x 640
        activations               512.0 KiB a sequence x 640
        total                     1010.1 MiB of 1.0 GiB, 18.0 MiB of it held
        at a time                 64 of 64 members, 10 prompts
    """
    state = jax.eval_shape(lambda params: es.init(params, 0), params)
    weights = bytes_of(state.params, es.mesh, model.sharding)
    slots = padded_length(prompt_slots - shared)
    prefix = _cache(model, params, shared, 0, None) if shared else None
    of_one = functools.partial(of_sequence, model, params, slots, segment, prefix, es.mesh)
    sequence = of_one(sampling.max_new_tokens)
    plan = MemoryPlan(
        weights=weights,
        training=bytes_of(state, es.mesh, model.sharding) - weights + sums,
        factors=es.plan_of(params).noise_bytes,
        prefix=bytes_of(prefix, es.mesh, model.sharding),
        prefix_activations=_activations(model, params, None, shared) if shared else 0,
        cache=sequence.cache,
        logits=sequence.logits,
        activations=sequence.activations,
        population=population,
        members=0,
        prompts=0,
        total=0,
        budget=budget_bytes,
    )
    fitting = list(_choices(plan, prompts, members, together))
    if not fitting:
        cache_of = lambda new: of_one(new).cache
        settled = (members, together) if list(_choices(plan, prompts, None, None)) else None
        raise UsageError(_too_large(plan, settled, prompt_slots, sampling.max_new_tokens, cache_of))
    calls = lambda p: -(-population // p.members) * -(-prompts // p.prompts)
    return min(fitting, key=lambda p: (calls(p), -p.members))


def _too_large(
    plan: MemoryPlan,
    settled: tuple[int | None, int | None] | None,
    prompt_slots: int,
    longest: int,
    cache_of: Callable[[int], int],
) -> str:
    """Why nothing fits, and what would.

    Args:
        plan: what is needed.
        settled: the numbers of members and prompts at a time that do not fit, where others would.
        prompt_slots: tokens of the longest prompt.
        longest: tokens of the longest answer.
        cache_of: bytes of a cache by the tokens of an answer.
    """
    budget, held = f"the budget is {size_of(plan.budget)}", plan.weights + plan.training
    if settled is not None:
        members, together = settled
        given = {"--chunk": members, "--prompt-chunk": together}
        said = " and ".join(f"{name} {number}" for name, number in given.items() if number)
        needed = size_of(_total(plan, members or 2, together or 1))
        return f"{said} need {needed}, and {budget}: choose less, or leave it out for what fits"
    if held > plan.budget:
        return (
            f"the weights and what the optimizer holds of them take {size_of(held)} of a device, and "
            f"{budget}: let more devices share them (--tensor-parallel)"
        )
    parts = {
        "caches": 2 * plan.cache,
        "activations": 2 * plan.activations,
        "logits": 2 * plan.logits,
        "noise": plan.factors,
        "weights and optimizer": held,
    }
    listed = ", ".join(f"{name} {size_of(number)}" for name, number in parts.items())
    room = plan.budget - _total(plan._replace(cache=0), 2, 1)
    fits = [new for new in _halves(longest) if 2 * cache_of(new) <= room]
    way_out = (
        f"--max-new-tokens {fits[0]} fits"
        if fits
        else "shorter prompts (--max-prompt-tokens) or more devices (--tensor-parallel) are needed"
    )
    return (
        f"two members that answer one prompt of {prompt_slots} tokens with up to {longest} need "
        f"{size_of(_total(plan, 2, 1))} ({listed}), and {budget}: {way_out}"
    )


class OfSequence(NamedTuple):
    """Bytes of a text that is written: see :class:`MemoryPlan`."""

    cache: int
    logits: int
    activations: int


def of_sequence(
    model: LanguageModel,
    params: PyTree,
    slots: int,
    segment: int,
    prefix: Any,
    mesh: Mesh | None,
    new: int,
) -> OfSequence:
    """Bytes of one prompt and its answer.

    Args:
        model: what its functions are.
        params: of the model, or their shapes.
        slots: of the padded prompt, without what it shares with others.
        segment: as in `engine.answer`.
        prefix: the shapes of the cache of what it shares, or None.
        mesh: devices that share caches.
        new: tokens of the longest answer.
    """
    count, steps = segments(new, segment)
    found = _cache(model, params, slots, count * steps, prefix)
    cache = bytes_of(found, mesh, model.sharding)
    return OfSequence(cache, 3 * 4 * model.vocab_size, _activations(model, params, prefix, slots))


def device_bytes() -> int:
    """Nine tenths of the first device's memory; of a machine without any but its CPU, half.

    Example:
        >>> device_bytes() > 2**28
        True
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return int(0.9 * stats["bytes_limit"])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _choices(
    plan: MemoryPlan, prompts: int, members: int | None, together: int | None
) -> Iterator[MemoryPlan]:
    """What fits: the most prompts for each number of members at a time, or what is settled."""
    for count in _members(plan.population) if members is None else [min(members, plan.population)]:
        each = count * (plan.cache + plan.logits + plan.activations)
        most = (plan.budget - _held(plan, count)) // each
        wanted = min(prompts, most) if together is None else min(prompts, together)
        total = _total(plan, count, wanted)
        if wanted >= 1 and total <= plan.budget:
            yield plan._replace(members=count, prompts=wanted, total=total)


def _members(population: int) -> Iterator[int]:
    """All of them, and half as many, as long as these are pairs."""
    members = population
    while members >= 2:
        yield members
        members = members // 4 * 2


def _halves(number: int) -> Iterator[int]:
    """A half of a number, a quarter, and so on down to 1."""
    while number > 1:
        number //= 2
        yield number


def _held(plan: MemoryPlan, members: int) -> int:
    """Bytes that are there all along."""
    noise = members // 2 * plan.factors
    return plan.weights + plan.training + noise + members * plan.prefix


def _total(plan: MemoryPlan, members: int, prompts: int) -> int:
    """Bytes at the peak: while the prefix is read, or the prompts and answers."""
    writing = prompts * (plan.cache + plan.logits + plan.activations)
    return _held(plan, members) + members * max(plan.prefix_activations, writing)


def _cache(model: LanguageModel, params: Any, slots: int, room: int, prefix: Any) -> Any:
    """Shapes of the cache of a text."""
    tokens, length = jax.ShapeDtypeStruct((slots,), "int32"), jax.ShapeDtypeStruct((), "int32")

    def read(params: Any, tokens: Any, length: Any, prefix: Any) -> Any:
        return model.prefill(params, tokens, length, slots + room, prefix)[1]

    return jax.eval_shape(read, params, tokens, length, prefix)


def _activations(model: LanguageModel, params: Any, prefix: Any, slots: int) -> int:
    """Bytes a sequence of two arrays as large as the largest on the way: one is read, one written."""

    def read(params: Any, prefix: Any, tokens: Any, length: Any) -> Any:
        return model.prefill(params, tokens, length, tokens.size, prefix)

    tokens = jax.ShapeDtypeStruct((SEQUENCES, slots), "int32")
    lengths = jax.ShapeDtypeStruct((SEQUENCES,), "int32")
    each = jax.vmap(read, (None, None, 0, 0))
    traced = jax.make_jaxpr(each)(params, prefix, tokens, lengths)

    def largest(jaxpr: Any) -> int:
        # Outputs are counted by those who get them: the cache is not among the activations.
        outs = set(map(id, jaxpr.outvars))
        inside = [v for eqn in jaxpr.eqns for v in eqn.outvars if id(v) not in outs]
        own = [v.aval for v in inside if SEQUENCES in getattr(v.aval, "shape", ())]
        sizes = [aval.size * aval.dtype.itemsize // SEQUENCES for aval in own]
        for part in jax.tree.leaves([list(eqn.params.values()) for eqn in jaxpr.eqns]):
            inner = getattr(part, "jaxpr", part)
            sizes += [largest(inner)] if hasattr(inner, "eqns") else []
        return max(sizes, default=0)

    return 2 * largest(traced.jaxpr)


def bytes_of(tree: PyTree, mesh: Mesh | None = None, rules: ShardingRules = parallel.WHOLE) -> int:
    """Bytes of arrays, or of their shapes, on one device."""
    places = jax.tree.leaves(parallel.shardings(tree, mesh, rules)) or repeat(None)

    def own(x: Any, place: NamedSharding | None) -> int:
        shape = x.shape if place is None else place.shard_shape(x.shape)
        return math.prod(shape) * jnp.dtype(x.dtype).itemsize

    return sum(map(own, jax.tree.leaves(tree), places))


def size_of(n: int) -> str:
    """A number of bytes in words.

    Example:
        >>> size_of(3 * 2**20)
        '3.0 MiB'
    """
    for unit, bytes_of in (("GiB", 2**30), ("MiB", 2**20)):
        if n >= bytes_of:
            return f"{n / bytes_of:.1f} {unit}"
    return f"{n / 2**10:.1f} KiB"
