"""EGG against a slow reference in Python's integers, its edges, and what it learns."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eggroll import integer
from eggroll.perturbation import draw_pairs
from experiments.models import egg

# 12 is no power of 4: its products are divided by 16 * 3.
CONFIG = egg.Config(layers=2, width=12)
PARAMS = egg.init(jax.random.key(0), CONFIG)
TEXT = jnp.frombuffer(b"\0to be or\0not to be", jnp.uint8)


def clip(x):
    return max(-127, min(127, x))


class Reference:
    """The model in Python's integers, perturbed by a pair's factors (int lists) and a sign, or not at all.

    A product adds ``sign * ((sum_r (u . a_r) b_r) >> 8)`` to ``u W``; rows and vectors are rounded.
    """

    def __init__(self, params, draws=None, sign=0):
        flat = {
            jax.tree_util.keystr(k, simple=True, separator="/"): np.asarray(v).astype(int)
            for k, v in jax.tree_util.tree_flatten_with_path(params)[0]
        }
        self.params, self.draws, self.sign = flat, draws, sign
        self.layers = flat["layers/bf"].shape[0]

    def noise(self, products):
        return [self.sign * int(math.copysign((abs(p) + 128) >> 8, p)) for p in map(int, products)]

    def vector(self, path, layer=None):
        index = () if layer is None else (layer,)
        w = self.params[path][index]
        if self.draws is None:
            return w.tolist()
        a, b = (f[0][index] for f in self.draws[path])
        return [clip(int(x) + n) for x, n in zip(w, self.noise(a * b), strict=True)]

    def row(self, byte):
        w = self.params["embed"][byte]
        if self.draws is None:
            return w.tolist()
        a, b = self.draws["embed"]  # [rank, 256, 1], [rank, 1, width]
        products = [sum(int(a[r, byte, 0]) * int(b[r, 0, j]) for r in range(len(a))) for j in range(len(w))]  # fmt: skip
        return [clip(int(x) + n) for x, n in zip(w, self.noise(products), strict=True)]

    def product(self, u, path, layer=None):
        w = self.params[path] if layer is None else self.params[path][layer]
        total = [sum(x * int(m) for x, m in zip(u, column, strict=True)) for column in w.T]
        if self.draws is not None:
            a, b = (f if layer is None else f[:, layer] for f in self.draws[path])
            thin = [
                sum(x * int(m) for x, m in zip(u, a[r, :, 0], strict=True)) for r in range(len(a))
            ]
            for j in range(len(total)):
                total[j] += self.sign * (sum(t * int(b[r, 0, j]) for r, t in enumerate(thin)) >> 8)
        return [clip(t // (16 * math.isqrt(len(u)))) for t in total]

    @staticmethod
    def layer_norm(u, gain):
        mean = max(sum(map(abs, u)), 1) // len(u)
        return [clip(x * g // mean) if mean else 0 for x, g in zip(u, gain, strict=True)]

    def block(self, x, s, i):
        u = self.layer_norm(x, self.vector("layers/ln1", i))
        add = lambda *terms: [clip(sum(t)) for t in zip(*terms, strict=True)]
        f = add(
            self.product(u, "layers/wf", i),
            self.product(s, "layers/uf", i),
            self.vector("layers/bf", i),
        )
        kept = [((g + 127) * v) >> 8 for g, v in zip(f, s, strict=True)]
        h = add(
            self.product(u, "layers/wh", i),
            self.product(kept, "layers/uh", i),
            self.vector("layers/bh", i),
        )
        s = [v + (((g + 127) * (n - v)) >> 8) for g, n, v in zip(f, h, s, strict=True)]
        x = add(x, s)
        u = self.layer_norm(x, self.vector("layers/ln2", i))
        return add(x, self.product(self.product(u, "layers/w1", i), "layers/w2", i)), s  # fmt: skip

    def step(self, state, byte):
        x, new = self.row(byte), []
        for i in range(self.layers):
            s = [0] * len(x) if byte == 0 else state[i]
            x, s = self.block(x, s, i)
            new.append(s)
        return new, self.product(self.layer_norm(x, self.vector("ln")), "head")

    @staticmethod
    def loss(logits, target):
        """By the paper's tables: EXP2[i] = floor(16 * 2^(i/16)), LOG2[i] = floor(16 log2(i / 16))."""
        y = [v + 128 for v in logits]
        total = sum(math.floor(16 * 2 ** (v / 16)) for v in y)
        return math.floor(16 * math.log2(total / 16)) - y[target]

    def sequence(self, state, tokens):
        total = 0
        for byte, target in itertools.pairwise(tokens):
            state, logits = self.step(state, int(byte))
            total += self.loss(logits, int(target))
        return state, total


def fitness(params, key, member, tokens):
    state, total = egg.sequence(params, member, tokens)
    return -total, state


def test_the_model_is_that_of_pythons_integers():
    reference, state = Reference(PARAMS), egg.initial_state(CONFIG)
    step = jax.jit(egg.step)
    expected = state.tolist()
    for byte in TEXT:
        state, logits = step(PARAMS, state, byte)
        expected, right = reference.step(expected, int(byte))
        assert logits.tolist() == right
        assert state.tolist() == expected
    assert np.abs(logits).max() > 30
    state, total = egg.sequence(PARAMS, egg.initial_state(CONFIG), TEXT)
    assert (state.tolist(), int(total)) == Reference(PARAMS).sequence([[0] * 12] * 2, TEXT)


def test_perturbed_members_are_those_of_pythons_integers():
    es = integer.strategy(population=4, rank=2, optimizer=integer.threshold(0.1), plan=egg.plan())
    state = es.init(PARAMS, 0)
    chance = np.random.default_rng(0)
    hidden = chance.integers(-127, 128, (4, 2, 12), np.int8)
    values, after = es.evaluate(state, fitness, TEXT[7:12], members=hidden)
    plan = es.plan_of(PARAMS)
    draws = draw_pairs(plan, es.noise, state.seed, jnp.int32(0), jnp.arange(2))
    for member in (0, 3):
        own = {
            leaf.path: [np.asarray(x[member // 2]).astype(int) for x in d]
            for leaf, d in zip(plan.leaves, draws, strict=True)
        }
        reference = Reference(PARAMS, own, 1 - 2 * (member % 2))
        expected, total = reference.sequence(hidden[member].tolist(), TEXT[7:12])
        assert (-int(values[member]), after[member].tolist()) == (total, expected)
    assert len(set(values.tolist())) > 2


# ---------------------------------------------------------------- the edges


def test_layer_norm_is_a_floor_division_for_every_pair_of_numbers():
    numbers = np.arange(-127, 128)
    u = np.stack(np.meshgrid(numbers, numbers), -1).reshape(-1, 2)
    mean = np.maximum(np.abs(u).sum(1, keepdims=True), 1) // 2
    norm = jax.jit(jax.vmap(egg._layer_norm, (0, None)))
    for gain in ([127, -127], [16, 1], [-16, 0], [3, -1]):
        got = norm(jnp.asarray(u, jnp.int8), jnp.array(gain, jnp.int8))
        quotient = np.floor_divide(u * gain, np.maximum(mean, 1))
        expected = np.where(mean == 0, 0, np.clip(quotient, -127, 127))
        np.testing.assert_array_equal(got, expected)
    assert (mean == 0).sum() == 5 and mean.max() == 127


def test_a_state_never_leaves_its_range():
    numbers = np.arange(-127, 128)
    s, new = np.meshgrid(numbers, numbers)
    for gate in range(255):
        state = s + ((gate * (new - s)) >> 8)
        assert (np.minimum(s, new) <= state).all() and (state <= np.maximum(s, new)).all()


def test_the_largest_products_saturate():
    for n in (1, 4, 1024, 16384):
        full = jnp.full((n,), 127, jnp.int8)
        for sign in (1, -1):
            got = egg._product(full, jnp.full((n, 2), sign * 127, jnp.int8))
            assert got.tolist() == [clip(sign * 127 * 127 * n // (16 * math.isqrt(n)))] * 2
    assert egg._product(jnp.array([1], jnp.int8), jnp.array([[-1]], jnp.int8)).tolist() == [-1]
    terms = [jnp.array([100, -100, 127], jnp.int8)] * 3
    assert egg._add(*terms).tolist() == [127, -127, 127]


def test_byte_0_starts_anew():
    state = jnp.full((2, 12), 99, jnp.int8)
    for byte, same in ((0, True), (1, False)):
        a = egg.step(PARAMS, state, jnp.uint8(byte))
        b = egg.step(PARAMS, egg.initial_state(CONFIG), jnp.uint8(byte))
        assert all(bool((x == y).all()) for x, y in zip(a, b, strict=True)) == same


# ---------------------------------------------------------------- the loss


def test_the_loss_is_that_of_the_tables_and_just_below_the_exact_one():
    chance = np.random.default_rng(0)
    scale = chance.integers(1, 128, (4000, 1))
    logits = np.clip(chance.normal(size=(4000, 256)) * scale, -127, 127).astype(np.int8)
    logits[0], logits[1], logits[2] = -127, 127, 0
    logits[3], logits[3, 7] = -127, 127
    targets = chance.integers(0, 256, 4000)
    got = np.asarray(jax.vmap(egg.loss)(logits, targets))
    for i in range(300):
        assert got[i] == Reference.loss(logits[i].tolist(), targets[i])
    gap = np.asarray(egg.exact_bits(jnp.asarray(logits), jnp.asarray(targets))) - got / 16
    # Rounded down twice; the terms only matter where all logits are near the bottom.
    assert -1e-5 < gap[4:].min() and gap[4:].max() < 0.0635
    assert gap[4:].mean() == pytest.approx(0.031, abs=0.003)
    assert got[2] == 128


def test_exact_bits_is_the_softmax_of_logits_in_sixteenths_of_a_bit():
    logits = np.random.default_rng(1).integers(-127, 128, (5, 256), np.int8)
    p = 2.0 ** (logits.astype(float) / 16)
    expected = -np.log2(p[np.arange(5), 3] / p.sum(1))
    got = egg.exact_bits(jnp.asarray(logits), jnp.full(5, 3))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


# ---------------------------------------------------------------- training


def strategy(**changes):
    settings = dict(
        population=64, optimizer=integer.threshold(integer.inverse_decay()), plan=egg.plan()
    )
    return integer.strategy(**{**settings, **changes})  # fmt: skip


def generation(es, state, hidden, tokens):
    values, hidden = es.evaluate(state, fitness, tokens, members=hidden)
    return *es.update(state, values), hidden, values


def start(es):
    hidden = jnp.zeros((es.population, CONFIG.layers, CONFIG.width), jnp.int8)
    return es.init(PARAMS, 0), hidden


def test_a_whole_generation_of_the_model_has_no_float():
    es = strategy()
    state, hidden = start(es)
    run = lambda state, hidden, tokens: (lambda out: (out[0], *out[2:]))(
        generation(es, state, hidden, tokens)
    )
    assert integer.float_operations(run, state, hidden, TEXT) == []
    assert integer.float_operations(egg.exact_bits, jnp.zeros(256, jnp.int8), jnp.int32(0))
    plan, reported = es.describe(PARAMS), es.describe(PARAMS, fitness, TEXT, members=hidden)
    assert "BUILT" not in reported and "rows 1, columns 2, batch 0" in plan


def test_it_learns_to_predict_a_text():
    es = strategy()
    state, hidden = start(es)
    sentence = jnp.frombuffer(b"\0to be or not to be", jnp.uint8)

    def bits(params):
        logits = []
        hidden = egg.initial_state(CONFIG)
        for byte in sentence[:-1]:
            hidden, out = step(params, hidden, byte)
            logits.append(out)
        return float(egg.exact_bits(jnp.stack(logits), sentence[1:]).mean())

    step = jax.jit(egg.step)
    before = bits(PARAMS)
    for _ in range(70):
        state, metrics, hidden, _ = generation(es, state, hidden, sentence)
    after = bits(es.params(state))
    assert before > 7 and after < 4
    # The mean member is no better than the mean.
    assert -float(metrics.fitness_mean) / 16 / (len(sentence) - 1) > after - 0.1


@pytest.mark.parametrize(
    ("changes", "message"), [(dict(layers=0), "layers must be at least 1, got 0"), (dict(width=5000), "width must be from 1 to 4096, got 5000")]
)  # fmt: skip
def test_shapes_out_of_range_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        egg.Config(**{"layers": 1, "width": 8, **changes})


def test_the_presets_have_the_papers_sizes():
    assert egg.CONFIGS["6L-256D"].parameters == 4_856_064
    assert sum(x.size for x in jax.tree.leaves(PARAMS)) == CONFIG.parameters
    assert {x.dtype for x in jax.tree.leaves(PARAMS)} == {jnp.dtype(jnp.int8)}
    embed = np.asarray(PARAMS["embed"], float)
    assert abs(embed.std() - 16) < 0.6 and abs(embed.mean()) < 0.9
