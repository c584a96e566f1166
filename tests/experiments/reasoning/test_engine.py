"""Answers of populations against their members built, texts' ends, sampling, chunks, and memory."""

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from eggroll import EvolutionStrategy
from eggroll.population.placement import AXIS
from experiments.models import rwkv7, transformer
from experiments.reasoning import engine, sequences
from experiments.reasoning.engine import answer, generate, stream
from experiments.reasoning.language_model import LanguageModel, language_model
from experiments.reasoning.memory import plan_memory
from experiments.reasoning.sampling import Sampling, choose
from experiments.reasoning.sequences import pack
from experiments.run.errors import UsageError

VOCAB = 11
TRANSFORMER = language_model(
    transformer.TransformerConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=20, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.4,
    )
)  # fmt: skip
RWKV7 = language_model(
    rwkv7.RWKV7Config(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, head_dim=8, intermediate_size=24,
        decay_low_rank_dim=4, a_low_rank_dim=5, v_low_rank_dim=6, gate_low_rank_dim=7,
    )
)  # fmt: skip
FAMILY = pytest.mark.parametrize("model", [TRANSFORMER, RWKV7], ids=["transformer", "rwkv7"])
# Where a second family takes long and says the same.
ONE = [TRANSFORMER, pytest.param(RWKV7, marks=pytest.mark.soak)]
PROMPTS = pack([[3, 1, 4], [5, 9, 2, 6, 5], [7], [3, 1, 4]])
GREEDY = Sampling(max_new_tokens=9)
RANDOM = Sampling(max_new_tokens=9, temperature=1.0)
KEY = jax.random.key(5)


@functools.cache
def params_of(model: LanguageModel) -> Any:
    """Parameters of which none is a zero, so that texts are not all alike."""
    shapes, chance = jax.eval_shape(model.init, jax.random.key(0)), np.random.default_rng(2)
    return jax.tree.map(lambda x: jnp.asarray(chance.normal(0, 0.5, x.shape), x.dtype), shapes)


@functools.cache
def strategy(model: LanguageModel, population: int = 4, rank: int = 2) -> EvolutionStrategy:
    """From generation 1 on with next to no noise."""
    return EvolutionStrategy(
        optimizer=optax.sgd(1.0),
        population=population,
        sigma=lambda generation: jnp.where(generation == 0, 0.1, 1e-9),
        rank=rank,
        plan=model.plan,
        on_dense="error",
    )


def same(left: engine.Completions, right: engine.Completions, atol: float = 0.0) -> None:
    """The same texts to the bit, and numbers to a tolerance."""
    for a, b in zip(left, right, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=atol if a.dtype == np.float32 else 0)


def plain(model: LanguageModel, params: Any, eos: Any = 6, prompts: Any = PROMPTS) -> Any:
    return generate(model, params, prompts, KEY, GREEDY, eos, segment=4)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Gets an item for every program that is run."""
    calls: list[Any] = []
    inner = engine._call
    monkeypatch.setattr(engine, "_call", lambda fn, *a: calls.append(fn) or inner(fn, *a))
    return calls


# ---------------------------------------------------------------- what is written


@FAMILY
def test_members_write_what_their_built_parameters_do(model: LanguageModel) -> None:
    es = strategy(model)
    state = es.init(params_of(model), 0)
    answers = answer(model, es, state, PROMPTS, GREEDY, 6, segment=4)
    assert answers.tokens.shape == (4, 4, 9)
    assert len({tuple(member.ravel()) for member in answers.tokens}) == 4
    for i in range(4):
        own = plain(model, es.member(state, i))
        same(
            jax.tree.map(lambda x, i=i: x[i], answers),
            jax.tree.map(lambda x: x[:, 0], own),
            atol=1e-4,
        )


@pytest.mark.parametrize("model", ONE, ids=["transformer", "rwkv7"])
def test_what_all_prompts_begin_with_is_read_once(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    es, begin = strategy(model), [i % 6 for i in range(35)]
    prompts = pack([[*begin, 3, 1], [*begin, 9], [*begin, *(2 * [3, 1, 4, 1, 5, 9, 2, 6, 5, 3])]])
    state = es.init(params_of(model), 0)
    calls = counted(monkeypatch)
    answers = answer(model, es, state, prompts, GREEDY, 6, segment=4)
    assert sum(isinstance(fn, engine._ReadPrefix) for fn in calls) == 1
    monkeypatch.setattr(engine, "shared_length", lambda prompts: 0)
    same(answers, answer(model, es, state, prompts, GREEDY, 6, segment=4), atol=1e-4)
    same(
        jax.tree.map(lambda x: x[3], answers),
        jax.tree.map(lambda x: x[:, 0], plain(model, es.member(state, 3), prompts=prompts)),
        atol=1e-4,
    )
    # The last token of the shortest prompt is no part of what is shared.
    assert sequences.shared_length(prompts) == 32
    assert sequences.shared_length(pack([begin[:32], begin])) == 24
    assert sequences.tokens_read(prompts) == 32 + 5 + 4 + 23


@FAMILY
def test_greedy_texts_are_those_of_the_model_on_whole_texts(model: LanguageModel) -> None:
    params, apply = params_of(model), jax.jit(model.apply)
    written = plain(model, params)
    for i, length in enumerate(PROMPTS.lengths[:3]):
        text, entropies = np.zeros(16, np.int32), []
        text[:length] = PROMPTS.tokens[i, :length]
        for t in range(written.lengths[i, 0]):
            policy = jax.nn.log_softmax(apply(params, text)[length + t - 1])
            token = int(policy.argmax())
            assert token == written.tokens[i, 0, t]
            np.testing.assert_allclose(written.log_probs[i, 0, t], policy[token], atol=1e-4)
            entropies.append(-float(jnp.sum(jnp.exp(policy) * policy)))
            text[length + t] = token
        np.testing.assert_allclose(written.entropy[i, 0], np.mean(entropies), atol=1e-4)
        assert written.lengths[i, 0] == 9 or text[length + t] == 6


def test_nothing_of_a_text_changes_behind_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    params, calls = params_of(TRANSFORMER), counted(monkeypatch)
    whole = plain(TRANSFORMER, params, eos=())
    assert not whole.ended.any() and (whole.lengths == 9).all()
    assert len(calls) == 1 + 2  # the prompts, and two segments
    for at, programs in ((2, 2), (0, 1)):
        calls.clear()
        eos = whole.tokens[:, 0, at].tolist()
        cut = plain(TRANSFORMER, params, eos=eos)
        # All have ended before the second segment, or with the first token.
        assert len(calls) == programs
        assert cut.ended.all() and cut.tokens.shape == whole.tokens.shape
        for text, length, log_probs, entropy, right in zip(
            cut.tokens[:, 0], cut.lengths[:, 0], cut.log_probs[:, 0], cut.entropy, whole.tokens[:, 0],
            strict=True,
        ):  # fmt: skip
            assert length == 1 + np.flatnonzero(np.isin(right, eos))[0] <= at + 1
            np.testing.assert_array_equal(text[:length], right[:length])
            assert not text[length:].any() and not log_probs[length:].any()
            assert log_probs[:length].all() and entropy > 0


def test_answers_are_cut_at_their_longest() -> None:
    params = params_of(TRANSFORMER)
    whole = plain(TRANSFORMER, params, eos=())
    # Three segments of 2 tokens after the first one write 7.
    short = generate(TRANSFORMER, params, PROMPTS, KEY, Sampling(max_new_tokens=6), (), segment=2)
    np.testing.assert_array_equal(short.tokens, whole.tokens[..., :6])
    np.testing.assert_allclose(short.log_probs, whole.log_probs[..., :6], atol=1e-5)
    assert (short.lengths == 6).all() and not short.ended.any()


def test_how_much_is_written_is_told_after_every_segment() -> None:
    params, found = params_of(TRANSFORMER), list[tuple[int, int, str]]()
    share = lambda *told: found.append(told)
    rule = Sampling(max_new_tokens=6)
    how: Any = dict(segment=2, chunk=1, share=share)
    generate(TRANSFORMER, params, pack([[1], [2]]), KEY, rule, (), **how)
    # Two chunks, each of the first token and segments of 2.
    assert found == [(n, 12, "tokens") for n in (1, 3, 5, 6, 7, 9, 11, 12)]
    found.clear()
    es = strategy(TRANSFORMER)
    state = es.init(params, 0)
    first = answer(TRANSFORMER, es, state, pack([[1]]), rule, (), segment=2).tokens[..., 0].ravel()
    answer(
        TRANSFORMER, es, state, pack([[1]]), rule, sorted({*first.tolist()}), segment=2, share=share
    )
    assert found == [(6, 6, "tokens")]  # all answers have ended


def test_long_and_short_prompts_come_back_in_their_order() -> None:
    params, long = params_of(TRANSFORMER), [i % VOCAB for i in range(20)]
    prompts = [[3, 1, 4], long, [5, 9, 2, 6, 5], [7], [3, 1, 4]]
    mixed = plain(TRANSFORMER, params, prompts=pack(prompts))
    turned = plain(TRANSFORMER, params, prompts=pack(prompts[::-1]))
    same(mixed, jax.tree.map(lambda x: x[::-1], turned))
    alone = plain(TRANSFORMER, params)
    same(jax.tree.map(lambda x: x[[0, 2, 3, 4]], mixed), alone, atol=1e-5)


# ---------------------------------------------------------------- sampling


def draws(logits: Any, count: int = 4000, **settings: Any) -> np.ndarray:
    """How often each token was drawn."""
    sampling = Sampling(max_new_tokens=1, **settings)
    keys = jax.random.split(jax.random.key(0), count)
    tokens = jax.jit(jax.vmap(lambda key: choose(jnp.asarray(logits), key, sampling)))(keys)
    return np.bincount(tokens, minlength=len(logits)) / count


def test_tokens_are_drawn_by_their_chances() -> None:
    logits = np.array([0.3, 2.0, -1.0, 1.0], np.float32)
    chances = lambda x: np.exp(x) / np.exp(x).sum()
    for temperature in (0.5, 2.0):
        right = chances(logits / temperature)
        np.testing.assert_allclose(draws(logits, temperature=temperature), right, atol=0.03)
    some = chances(np.where(logits > 0.9, logits, -np.inf))
    np.testing.assert_allclose(draws(logits, temperature=1.0, top_k=2), some, atol=0.03)
    # The likeliest has .63 and the next .23.
    np.testing.assert_allclose(draws(logits, temperature=1.0, top_p=0.7), some, atol=0.03)
    for only in (dict(top_k=1), dict(top_p=0.01), dict(top_k=3, top_p=0.5)):
        assert draws(logits, count=50, temperature=1.0, **only)[1] == 1
    assert draws(logits, count=2)[1] == 1
    np.testing.assert_array_equal(
        draws(logits, temperature=1.0, top_k=99), draws(logits, temperature=1.0, top_k=4)
    )


def test_samples_differ_and_come_again() -> None:
    params, prompts = params_of(TRANSFORMER), pack([[3, 1, 4], [3, 1, 4]])
    rule = dataclasses.replace(RANDOM, temperature=2.0, top_k=9)
    write = lambda key: generate(TRANSFORMER, params, prompts, key, rule, (), samples=2)
    first = write(KEY)
    assert first.tokens.shape == (2, 2, 9)
    assert len({tuple(text) for text in first.tokens.reshape(4, 9)}) == 4
    same(first, write(KEY))
    assert (first.tokens != write(jax.random.key(6)).tokens).any()
    # Their chances are those of the policy at that temperature, whatever top_k leaves out.
    text = np.concatenate([prompts.tokens[0], first.tokens[0, 0]])
    policy = jax.nn.log_softmax(jax.jit(TRANSFORMER.apply)(params, text)[2:-1] / 2)
    right = policy[np.arange(9), first.tokens[0, 0]]
    np.testing.assert_allclose(first.log_probs[0, 0], right, atol=1e-4)


def test_chunks_change_nothing_and_pairs_share_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    es, calls = strategy(TRANSFORMER), counted(monkeypatch)
    state = es.init(params_of(TRANSFORMER), 0)
    whole = answer(TRANSFORMER, es, state, PROMPTS, RANDOM, 6)
    calls.clear()
    parts = stream(TRANSFORMER, es, state, PROMPTS, RANDOM, 6, chunk=2)
    for count, which in ((1, [0, 1]), (2, [2, 3])):
        part = next(parts)
        assert part.which.tolist() == which and len(calls) == 2 * count  # the next is not begun
        # Products of another size may be summed in another order.
        same(part.completions, jax.tree.map(lambda x, at=which: x[:, at], whole), atol=1e-5)
    assert next(parts, None) is None
    assert (whole.tokens[0::2] != whole.tokens[1::2]).any()
    still = answer(
        TRANSFORMER, es, state._replace(generation=jnp.int32(1)), PROMPTS, RANDOM, 6
    ).tokens
    np.testing.assert_array_equal(still[0::2], still[1::2])
    assert (still[0] != still[2]).any()  # another pair
    assert (still[:, 0] != still[:, 3]).any()  # the same prompt a second time


def test_on_devices_every_part_lies_where_its_members_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mesh = jax.make_mesh((4,), (AXIS,), axis_types=(AxisType.Auto,))
    es = dataclasses.replace(strategy(TRANSFORMER, 40), chunk=4, mesh=mesh)
    one = dataclasses.replace(strategy(TRANSFORMER, 40), chunk=4)
    state, texts, inner = one.init(params_of(TRANSFORMER), 0), list[Any](), engine._call
    begin = [i % 6 for i in range(9)]
    prompts = pack([[*begin, 3], [*begin, 4, 1]])
    expected = answer(TRANSFORMER, one, state, prompts, GREEDY, (), segment=4)

    def call(fn: Any, *args: Any) -> Any:
        found = inner(fn, *args)
        texts.append(found if isinstance(fn, engine._ReadPrefix) else found[0])
        return found

    monkeypatch.setattr(engine, "_call", call)
    same(answer(TRANSFORMER, es, state, prompts, GREEDY, (), segment=4), expected, atol=1e-4)
    for leaf in jax.tree.leaves(texts):
        assert leaf.shape[0] == 16 and leaf.sharding.shard_shape(leaf.shape)[0] == 4


@pytest.mark.parametrize("chunk", [2, 6])
def test_a_part_of_the_members_writes_at_a_time(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_es = strategy(TRANSFORMER, 10)
    es = dataclasses.replace(whole_es, chunk=chunk)
    state, calls = es.init(params_of(TRANSFORMER), 0), counted(monkeypatch)
    whole = answer(TRANSFORMER, whole_es, state, PROMPTS, RANDOM, 6)
    calls.clear()
    parts = list(stream(TRANSFORMER, es, state, PROMPTS, RANDOM, 6, chunk=3))
    # Five pairs: one at a time, or three and two.
    found = [part.members.tolist() for part in parts if part.which[0] == 0]
    assert found == [list(range(10))[i : i + chunk] for i in range(0, 10, chunk)]
    assert len(parts) == 2 * len(found) and len(calls) == 2 * len(parts)
    same(sequences.joined(parts, 10, 4), whole, atol=1e-5)


# ---------------------------------------------------------------- memory


def wide_model(family: str, size: int) -> LanguageModel:
    if family == "rwkv7":
        return language_model(
            rwkv7.RWKV7Config(
                vocab_size=32, hidden_size=size, num_hidden_layers=2, head_dim=8, intermediate_size=size
            )
        )  # fmt: skip
    return language_model(
        transformer.TransformerConfig(
            vocab_size=32, hidden_size=size, intermediate_size=size, num_hidden_layers=2,
            num_attention_heads=8, num_key_value_heads=1,
        )
    )  # fmt: skip


@pytest.mark.parametrize("family", ["transformer", "rwkv7"])
def test_no_matrix_is_built_and_no_cache_copied(family: str) -> None:
    """As the programs of a size that is never allocated tell."""
    population, size = 64, 1024
    model = wide_model(family, size)
    es = strategy(model, population, 1)
    state = jax.eval_shape(lambda: es.init(model.init(jax.random.key(0)), 0))
    ids = jax.ShapeDtypeStruct((1,), jnp.int32)
    tokens = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    read, write = engine._ReadPrompts(model, GREEDY, 8), engine._WriteSegment(model, GREEDY, 8)
    pairs = jax.ShapeDtypeStruct((population // 2,), jnp.int32)
    given = (ids, ids, tokens, ids)
    first = engine._plain_call.lower(read, es, state, pairs, None, None, given)
    texts = first.out_info[0]
    t = jax.ShapeDtypeStruct((), jnp.int32)
    given = (ids, ids, t)
    program = engine._plain_call.lower(write, es, state, pairs, texts, None, given).compile()
    memory, text = program.memory_analysis(), program.as_text()
    # One matrix for every member would be four times as much.
    assert memory.temp_size_in_bytes < population * size**2 * 4 / 4
    assert not re.search(rf"\[(\d+,)*({population}|{population // 2})(,\d+)*,{size},{size}\]", text)
    arrays = re.findall(r"\b[a-z]\w*\[([\d,]+)\]", text)
    assert max(math.prod(map(int, dims.split(","))) for dims in arrays) < population * size**2 / 20
    caches = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(texts.cache))
    assert memory.alias_size_in_bytes >= caches  # written where they were read


def planned(size: int = 128, rank: int = 1, budget: int = 2**30, **changes: Any) -> Any:
    model = wide_model("transformer", size)
    params = jax.eval_shape(model.init, jax.random.key(0))
    es = strategy(model, 64, rank)
    usual = dict(population=64, prompts=16, prompt_slots=40, sampling=Sampling(max_new_tokens=33))
    return plan_memory(model, es, params, budget_bytes=budget, **(usual | changes))


def test_a_members_memory_is_that_of_its_factors() -> None:
    one = planned()
    assert planned(rank=2).factors == 2 * one.factors
    wide = planned(size=256)
    assert wide.weights > 3.5 * one.weights
    assert wide.factors == 2 * one.factors
    # Keys and values of 48 + 32 slots, 2 layers and 1 head of 16, and the prompt's length.
    assert one.cache == 2 * 2 * 80 * 16 * 4 + 4
    assert one.logits == 3 * 4 * 32
    # What prompts share is there once a member.
    shared = planned(shared=32)
    assert shared.prefix == 2 * 2 * 32 * 16 * 4 + 4
    assert shared.cache == 2 * 2 * 48 * 16 * 4 + 4
    assert "caches of a shared prefix 8.0 KiB a member x 64" in shared.describe()
    # Long ones that few prompts go on from take most while they are read.
    long = planned(prompts=1, prompt_slots=500, shared=480)
    assert long.prefix_activations == 2 * 8 * 480**2 * 4 > 10 * long.activations
    assert long.total > 64 * long.prefix_activations
    # Reading long prompts, attention weights of 8 heads are the largest arrays: of 256 queries at most.
    assert planned(prompt_slots=500).activations == 2 * 8 * 512**2 * 4
    assert planned(prompt_slots=2000).activations == 2 * 8 * 256 * 2048 * 4


def test_what_fits_is_within_the_budget() -> None:
    roomy = planned()
    assert (roomy.members, roomy.prompts) == (64, 16)
    # A population of any size runs in the memory of a part of it.
    assert planned(population=2**20).members * 16 * roomy.cache < 2**30
    tight = planned(budget=40 * 2**20)  # 64 members with 3 prompts, 32 with 7, or 16 with 15
    assert 1 <= tight.prompts < 16 and tight.total <= 40 * 2**20
    one_more = tight.members * (tight.cache + tight.logits + tight.activations)
    assert tight.members == 64 and tight.total + one_more > 40 * 2**20
    # So little that members go a few at a time.
    assert planned(budget=8 * 2**20, prompts=1).members < 64
    # What is settled is so, or refused.
    settled = planned(members=6, together=5)
    assert (settled.members, settled.prompts) == (6, 5)
    assert settled.total == planned(members=6, together=5, budget=settled.total).total
    told = "--chunk 6 and --prompt-chunk 5 need .*, and the budget is .*: choose less"
    with pytest.raises(UsageError, match=told):
        planned(members=6, together=5, budget=settled.total - 1)
    long = Sampling(max_new_tokens=4096)
    told = (
        r"one prompt of 40 tokens with up to 4096 need .*caches 2.0 MiB.*--max-new-tokens 512 fits"
    )
    with pytest.raises(UsageError, match=told):
        planned(budget=3 * 2**19, sampling=long)
    with pytest.raises(
        UsageError, match=r"need .*: shorter prompts \(--max-prompt-tokens\) or more"
    ):
        planned(budget=2**20, prompt_slots=4000)
    with pytest.raises(UsageError, match=r"weights .* KiB of a device, .* \(--tensor-parallel\)"):
        planned(budget=2**16)


def test_a_plan_is_told() -> None:
    told = planned()._replace(read_per_s=5678.0, written_per_s=1234.0).describe()
    assert "64 of 64 members, 16 prompts" in told
    assert "at most 5,678 tokens/s read, 1,234 written" in told
    assert "tokens/s" not in planned().describe()


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(max_new_tokens=0), "max_new_tokens must be at least 1, got 0"),
        (dict(temperature=-1.0), "temperature must be 0 (greedy) or a number above it, got -1.0"),
        (dict(temperature=math.nan), "0 (greedy) or a number above it, got nan"),
        (dict(top_k=-1), "top_k must be 0 (off) or a whole number above it, got -1"),
        (dict(top_p=0.0), "top_p must be above 0 and at most 1 (off), got 0.0"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        Sampling(**{"max_new_tokens": 1, **changes})


def test_prompts_that_do_not_fit_are_refused() -> None:
    for prompts, slots, words in (
        ([], None, "prompts must have at least one, got none"),
        ([[1], []], None, "prompt 1 must have 1 to 1 tokens, got 0"),
        ([[1, 2, 3]], 2, "prompt 0 must have 1 to 2 tokens, got 3"),
    ):
        with pytest.raises(ValueError, match=words):
            pack(prompts, slots)
    for prompts, eos, how, words in (
        (pack([[1], [11]]), 0, {}, "tokens of prompt 1 must be from 0 to 10, got 11"),
        (
            pack([[1]])._replace(lengths=np.array([2])),
            0,
            {},
            "prompt 0 must have 1 to 1 tokens, got 2",
        ),
        (pack([[1]]), (3, 11), {}, "eos must be from 0 to 10, got 11"),
        (pack([[1]]), 0, dict(samples=0), "samples must be at least 1, got 0"),
        (pack([[1]]), 0, dict(chunk=0), "chunk must be at least 1, got 0"),
        (pack([[1]]), 0, dict(segment=0), "segment must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=words):
            generate(TRANSFORMER, {}, prompts, KEY, GREEDY, eos, **how)
