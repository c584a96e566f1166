"""The sources of noise: their laws, their independence, and that they are pure functions.

Seeds are fixed, so every test is deterministic. A bound of ``k / sqrt(n)`` is k standard errors.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.experimental import pallas as pl
from scipy import stats

from eggroll import noise

# Every new shape compiles, so a third of the profile's examples.
fewer = settings(max_examples=settings.default.max_examples // 3)

SOURCES = {
    "counter": noise.counter(),
    "gaussian": noise.gaussian(),
    "rademacher": noise.rademacher(),
}
LEAF = "layer/kernel"


def seed(number=0):
    return noise.seed_words(jax.random.key(number))


def words(seed_=None, path=LEAF, epoch=0, pair=0, role=0):
    return noise.stream(seed() if seed_ is None else seed_, path, epoch, pair, role)


def stack(pairs, shape, source="counter", dtype=jnp.float32, path=LEAF, epoch=0, role=0, number=0):
    """The samples of many pairs, ``[pairs, *shape]``."""

    def one(pair):
        return SOURCES[source].sample(words(seed(number), path, epoch, pair, role), shape, dtype)

    return jax.jit(jax.vmap(one))(jnp.arange(pairs))


# ---- the exact law of the default ----------------------------------------------------------------


def exact_law():
    """Values of four summed bytes after the polynomial, with their probabilities."""
    two = np.convolve(np.full(256, 1 / 256), np.full(256, 1 / 256))
    sums = jnp.arange(-510, 511, dtype=jnp.float32)
    return np.asarray(noise._bend(sums), np.float64), np.convolve(two, two)


def test_exact_variance_and_kurtosis():
    value, probability = exact_law()
    variance = np.sum(probability * value**2)
    assert abs(variance - 1) < 1e-6
    assert abs(np.sum(probability * value**4) / variance**2 - 3) < 1e-6
    assert abs(np.sum(probability * value**6) - 15) < 0.05


def test_exact_law_is_odd_and_increasing():
    value, _ = exact_law()
    np.testing.assert_array_equal(value, -value[::-1])
    assert np.all(np.diff(value) > 0)
    assert 5.1 < value[-1] < 5.3


def test_exact_law_is_close_to_normal():
    value, probability = exact_law()
    middle = np.cumsum(probability) - probability / 2
    assert np.max(np.abs(middle - stats.norm.cdf(value))) < 1e-3
    for threshold, allowed in (
        (1, 0.01),
        (2, 0.01),
        (3, 0.05),
        (3.5, 0.05),
        (3.9, 0.05),
        (4.2, 0.1),
    ):
        tail = np.sum(probability[np.abs(value) > threshold])
        assert abs(tail / (2 * stats.norm.sf(threshold)) - 1) < allowed, threshold


def test_arithmetic_leaves_no_choice_to_the_compiler():
    """Equal, bit for bit, to a numpy version that rounds after every single operation."""
    key = np.asarray(words(pair=5))
    index = np.arange(200_000, dtype=np.uint32)
    bits = index + key[0]
    bits = (bits ^ (bits >> 17)) * np.uint32(0xED5AD4BB) ^ key[1]
    bits = (bits ^ (bits >> 11)) * np.uint32(0xAC4C1B51)
    bits = (bits ^ (bits >> 15)) * np.uint32(0x31848BAB)
    bits = bits ^ (bits >> 14)
    t = bits.view(np.uint8).reshape(-1, 4).sum(1).astype(np.float32) - np.float32(510)
    square = t * t
    fifth = t * (square * square)
    cut = (fifth.view(np.uint32) & np.uint32(0xFFFFF000)).view(np.float32)
    linear = square + np.float32(noise._LINEAR)
    steep = cut * cut + np.float32(noise._STEEP)
    expected = t * np.float32(noise._SCALE) * linear * steep
    actual = SOURCES["counter"].sample(jnp.asarray(key), (200_000,), jnp.float32)
    np.testing.assert_array_equal(np.asarray(actual), expected)


# ---- sampled laws --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("source", ["counter", "gaussian"])
def test_moments_and_tails(source, dtype):
    x = np.asarray(stack(2048, (256, 4), source, jnp.dtype(dtype)).astype(jnp.float32), np.float64)
    n = x.size
    assert abs(x.mean()) < 5 / math.sqrt(n)
    # Rounding to bfloat16 moves a value by up to 2**-9 of itself, either way: hardly any bias.
    slack = 1e-4 if dtype == "bfloat16" else 0
    assert abs(x.var() - 1) < 5 * math.sqrt(2 / n) + slack
    assert abs(np.mean(x**3)) < 5 * math.sqrt(15 / n)
    assert abs(np.mean(x**4) / x.var() ** 2 - 3) < 0.03
    for threshold in (2, 3, 3.5, 3.9):
        expected = 2 * stats.norm.sf(threshold)
        error = 5 * math.sqrt(expected / n)
        # 6 percent: what the exact law departs by. In bfloat16, at worst one step of 2**-6 falls on
        # the other side of the threshold, which has relative weight threshold * 2**-6.
        allowed = 0.06 if dtype == "float32" else 0.06 + threshold * 2**-6
        assert abs(np.mean(np.abs(x) > threshold) - expected) < error + allowed * expected, (
            threshold
        )
    assert 4.4 < np.abs(x).max() < 6


def test_rademacher_law():
    x = np.asarray(stack(256, (64, 4), "rademacher"))
    assert set(np.unique(x)) == {-1, 1}
    assert abs(x.mean()) < 5 / math.sqrt(x.size)


def test_bytes_are_uniform_and_neighbours_independent():
    """Chi-squared over the 65536 values of (byte of sample i, same byte of sample i + 1)."""
    key = jax.vmap(lambda pair: words(pair=pair))(jnp.arange(2048))
    index = jnp.arange(1024, dtype=jnp.uint32)
    bits = np.asarray(noise._hash(key[:, :1], key[:, 1:], index))
    for shift in (0, 8, 16, 24):
        byte = (bits >> shift).astype(np.uint8).astype(np.int32)
        for first, second in ((byte[:, :-1], byte[:, 1:]), (byte[:-1], byte[1:])):
            count = np.bincount((first * 256 + second).ravel(), minlength=65536)
            expected = first.size / 65536
            score = np.sum((count - expected) ** 2 / expected)
            assert abs(score - 65535) < 5 * math.sqrt(2 * 65535)


# ---- independence --------------------------------------------------------------------------------

CONTRASTS = {  # two stacks [512, 64, 8] that share no array but differ in one thing only
    "pairs": lambda source: (lambda x: (x[:-1], x[1:]))(stack(513, (64, 8), source)),
    "generations": lambda source: tuple(stack(512, (64, 8), source, epoch=e) for e in (6, 7)),
    "leaves": lambda source: tuple(
        stack(512, (64, 8), source, path=p) for p in ("layer_0/w", "layer_1/w")
    ),
    "rows": lambda source: (lambda x: (x[:, :-1], x[:, 1:]))(stack(512, (65, 8), source)),
    "columns": lambda source: (lambda x: (x[:, :, :-1], x[:, :, 1:]))(stack(512, (64, 9), source)),
    "A and B": lambda source: tuple(stack(512, (64, 8), source, role=r) for r in (0, 1)),
    "seeds": lambda source: tuple(stack(512, (64, 8), source, number=s) for s in (0, 1)),
    "epoch for pair": lambda source: (
        stack(513, (64, 8), source)[1:],
        stack(512, (64, 8), source, epoch=1),
    ),
}


@pytest.mark.parametrize("source", ["counter", "gaussian"])
@pytest.mark.parametrize("contrast", CONTRASTS)
def test_neighbours_are_uncorrelated(contrast, source):
    first, second = (np.asarray(x, np.float64).ravel() for x in CONTRASTS[contrast](source))
    bound = 5 / math.sqrt(first.size)
    views = {"value": lambda x: x, "square": np.square, "sign": np.sign}
    for name, view in views.items():
        assert abs(np.corrcoef(view(first), view(second))[0, 1]) < bound, name
    assert abs(np.corrcoef(first, second**2)[0, 1]) < bound


@pytest.mark.parametrize("view", [lambda x: x, lambda x: (x**2 - 1) / math.sqrt(2), np.sign])
def test_serial_correlation_at_every_lag(view):
    pairs, length = 512, 2048
    x = view(np.asarray(stack(pairs, (length,)), np.float64))
    spectrum = np.abs(np.fft.rfft(x, 2 * length, axis=1)) ** 2
    products = np.fft.irfft(spectrum.sum(0))[1 : length - 1]
    terms = pairs * (length - np.arange(1, length - 1))
    score = products / np.sqrt(terms)  # each about standard normal
    assert np.max(np.abs(score)) < 5.5
    # All lags together: a sum of squares of that many nearly uncorrelated scores.
    assert abs(np.mean(score**2) - 1) < 5 * math.sqrt(2 / score.size)


def test_serial_correlation_across_pairs():
    """The same along pairs, at one position: what the update sums over."""
    x = np.asarray(stack(4096, (256,)), np.float64).T
    products = np.fft.irfft((np.abs(np.fft.rfft(x, 8192, axis=1)) ** 2).sum(0))[1:2048]
    score = products / np.sqrt(256 * (4096 - np.arange(1, 2048)))
    assert np.max(np.abs(score)) < 5.5
    assert abs(np.mean(score**2) - 1) < 5 * math.sqrt(2 / score.size)


STACKS = {  # [4096, 512], side by side
    "pairs": lambda: stack(4096, (512,)),
    "factors": lambda: stack(4096, (64, 8)),
    "one dense array": lambda: stack(1, (4096, 512), role=2),
    "generations": lambda: jax.vmap(
        lambda epoch: SOURCES["counter"].sample(words(epoch=epoch), (512,), jnp.float32)
    )(jnp.arange(4096)),
    "leaves": lambda: jnp.concatenate(
        [stack(512, (512,), path=f"layers/{i}/kernel") for i in range(8)]
    ),
}


@pytest.mark.parametrize("layout", STACKS)
def test_singular_values_keep_to_the_marchenko_pastur_edges(layout):
    x = np.asarray(STACKS[layout](), np.float64).reshape(4096, 512)
    n, m = x.shape
    values = np.sqrt(np.linalg.eigvalsh(x.T @ x))
    # The extremes of n independent rows lie at sqrt(n) -+ sqrt(m), with Tracy-Widom fluctuations whose
    # scale, relative to the edge, is about (1/sqrt(n) +- 1/sqrt(m))**(1/3) / (sqrt(n) +- sqrt(m)) / 2.
    upper, lower = math.sqrt(n) + math.sqrt(m), math.sqrt(n) - math.sqrt(m)
    scale_upper = (1 / math.sqrt(n) + 1 / math.sqrt(m)) ** (1 / 3) / 2
    scale_lower = (1 / math.sqrt(m) - 1 / math.sqrt(n)) ** (1 / 3) / 2
    # Tracy-Widom (real): mean -1.21, standard deviation 1.27.
    assert abs((values[-1] - upper) / scale_upper + 1.21) < 5 * 1.27
    assert abs((lower - values[0]) / scale_lower + 1.21) < 5 * 1.27
    # And the bulk: the second moment of the eigenvalues of x'x/n is 1 + m/n.
    assert abs(np.mean((values**2 / n) ** 2) - (1 + m / n)) < 0.01


# ---- keys ----------------------------------------------------------------------------------------


def as_integers(keys):
    keys = np.asarray(keys).reshape(-1, 2).astype(np.uint64)
    return keys[:, 0] << np.uint64(32) | keys[:, 1]


def test_no_two_of_a_million_pairs_share_a_key():
    keys = np.asarray(jax.jit(jax.vmap(lambda pair: words(pair=pair)))(jnp.arange(2**20)))
    assert np.unique(as_integers(keys)).size == 2**20
    # Either word alone, and either half of both, coincides as often as random 32-bit numbers do
    # (2**40 / 2**33 = 128 times): the two words are not copies of each other.
    mixed = keys[:, 0] << 16 | keys[:, 1] & 0xFFFF
    for part in (keys[:, 0], keys[:, 1], mixed, keys[:, 0] ^ keys[:, 1]):
        assert abs(2**20 - np.unique(part).size - 128) < 5 * math.sqrt(128)


def test_no_two_of_a_million_pairs_share_their_noise():
    index = jnp.arange(2, dtype=jnp.uint32)

    def first_two(pair):
        key = words(pair=pair)
        return noise._hash(key[0], key[1], index)

    assert np.unique(as_integers(jax.jit(jax.vmap(first_two))(jnp.arange(2**20)))).size == 2**20


def test_no_collisions_over_generations_leaves_roles_pairs_and_seeds():
    leaves = [f"blocks/{i}/{name}" for i in range(3) for name in ("w", "b", "")]
    seeds = jax.vmap(noise.seed_words)(jax.vmap(jax.random.key)(jnp.arange(4)))

    @jax.jit
    def grid(seed_):
        over_pairs = lambda p, r: jax.vmap(
            lambda e: jax.vmap(lambda q: words(seed_, p, e, q, r))(ids)
        )(ids)
        ids = jnp.arange(64)
        return jnp.stack([over_pairs(path, role) for path in leaves for role in (0, 1, 2)])

    keys = as_integers(jax.vmap(grid)(seeds))
    assert keys.size == 4 * 9 * 3 * 64 * 64
    assert np.unique(keys).size == keys.size


def flips(function, inputs):
    """Largest deviation from 1/2 of P(output bit flips | input bit flips), in standard errors."""
    base = function(inputs)
    n, worst = inputs.shape[0], 0.0
    for bit in range(32 * inputs.shape[1]):
        mask = np.zeros(inputs.shape[1], np.uint32)
        mask[bit // 32] = np.uint32(1) << np.uint32(bit % 32)
        changed = np.asarray(base ^ function(inputs ^ mask))
        rate = np.unpackbits(changed.view(np.uint8), axis=1).mean(0)
        worst = max(worst, float(np.max(np.abs(rate - 0.5))) * 2 * math.sqrt(n))
    return worst


MIXERS = {
    "permutation": (2, lambda w: noise._permute(w)),
    "stream": (4, lambda w: noise.stream(w[:2], LEAF, w[2], w[3], 0)),
    "seed": (2, lambda w: noise.seed_words(jax.random.wrap_key_data(w, impl="threefry2x32"))),
    "sample": (3, lambda w: noise._hash(w[:1], w[1:2], w[2:])),
}


@pytest.mark.parametrize("mixer", MIXERS)
def test_avalanche(mixer):
    """Each output bit flips with probability 1/2 when any input bit does: random and tiny inputs."""
    size, function = MIXERS[mixer]
    mapped = jax.jit(jax.vmap(function))
    rng = np.random.default_rng(0)
    inputs = rng.integers(0, 2**32, (4096, size), dtype=np.uint32)
    assert flips(mapped, inputs) < 5.5
    # Small numbers, as seeds and pairs are; a sample's key never is small.
    inputs[:, 2 if mixer == "sample" else 0 :] %= 4096
    assert flips(mapped, inputs) < 5.5


def test_permutation_can_be_undone():
    """So no two states meet: injectivity of a pair's key in the pair rests on it."""
    state = np.random.default_rng(0).integers(0, 2**32, (1000, 2), dtype=np.uint32)
    out = np.asarray(jax.vmap(noise._permute)(jnp.asarray(state)))
    left, right = out[:, 0], out[:, 1]
    for word0, word1 in reversed(noise._ROUNDS):
        mixed = noise._hash(jnp.uint32(word0), jnp.uint32(word1), jnp.asarray(right))
        left, right = right, left ^ np.asarray(mixed)
    np.testing.assert_array_equal(np.stack([left, right], 1), state)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_seed_words_take_any_key(impl):
    key = lambda number: jax.random.key(number, impl=impl)
    found = [tuple(np.asarray(noise.seed_words(key(i))).tolist()) for i in range(64)]
    assert len(set(found)) == 64
    assert found[3] == tuple(np.asarray(jax.jit(noise.seed_words)(key(3))).tolist())
    split = jax.random.split(key(0), 5)
    mapped = np.asarray(jax.vmap(noise.seed_words)(split))
    np.testing.assert_array_equal(mapped, [noise.seed_words(k) for k in split])


def test_seed_words_use_all_of_a_long_key():
    data = jnp.arange(4, dtype=jnp.uint32)
    keys = [
        jax.random.wrap_key_data(data.at[i].add(d), impl="rbg") for i in range(4) for d in (0, 1)
    ]
    assert len({tuple(noise.seed_words(k).tolist()) for k in keys}) == 5


@pytest.mark.parametrize("bad", [jnp.zeros(2, jnp.uint32), jax.random.split(jax.random.key(0))])
def test_seed_words_refuse_what_is_not_one_key(bad):
    with pytest.raises(ValueError, match="expected"):
        noise.seed_words(bad)


def test_paths_do_not_depend_on_the_process():
    # Python's own hash of a string differs in every process.
    assert noise.path_words("layer/kernel") == (1886229229, 4075652348)
    assert noise.path_words("") != noise.path_words("/")


# ---- pure functions ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "dtype"), [*((name, "float32") for name in SOURCES), ("counter", "bfloat16")]
)
def test_same_values_however_it_is_run(source, dtype):
    dtype = jnp.dtype(dtype)

    def one(pair, seed_=None):
        return SOURCES[source].sample(
            words(seed() if seed_ is None else seed_, pair=pair), (5, 3), dtype
        )

    pairs = jnp.arange(6)
    expected = jnp.stack([one(i) for i in range(6)])
    assert expected.dtype == dtype
    with jax.disable_jit():
        plain = one(4)
    runs = {
        "vmap": jax.vmap(one)(pairs),
        "jit of vmap": jax.jit(jax.vmap(one))(pairs),
        "scan": lax.scan(lambda _, pair: (None, one(pair)), None, pairs)[1],
        "map": lax.map(one, pairs, batch_size=4),
        "unsigned pairs": jax.vmap(one)(pairs.astype(jnp.uint32)),
        "reversed": jax.vmap(one)(pairs[::-1])[::-1],
        "vmap over seeds": jax.vmap(lambda s: jax.vmap(lambda p: one(p, s))(pairs))(
            jnp.stack([seed(9), seed()])
        )[1],
    }
    for name, values in runs.items():
        np.testing.assert_array_equal(np.asarray(values), np.asarray(expected), err_msg=name)
    np.testing.assert_array_equal(np.asarray(plain), np.asarray(expected[4]))


def test_same_values_on_every_device():
    devices = jax.device_count()
    mesh = jax.make_mesh((devices,), ("population",), axis_types=(jax.sharding.AxisType.Auto,))
    one = lambda pair: SOURCES["counter"].sample(words(pair=pair), (7, 2), jnp.float32)
    spread = jax.shard_map(
        jax.vmap(one), mesh=mesh, in_specs=jax.P("population"), out_specs=jax.P("population")
    )
    pairs = jnp.arange(4 * devices)
    np.testing.assert_array_equal(
        np.asarray(jax.jit(spread)(pairs)), np.asarray(jax.vmap(one)(pairs))
    )


@fewer
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.sampled_from(sorted(SOURCES)))
def test_any_grouping_of_pairs_draws_the_same(sizes, source):
    whole = some_pairs(source, jnp.arange(20))
    ends = np.cumsum(sizes)
    chunks = [
        some_pairs(source, jnp.arange(end - size, end))
        for size, end in zip(sizes, ends, strict=True)
    ]
    np.testing.assert_array_equal(np.concatenate(chunks), whole[: ends[-1]])


@functools.partial(jax.jit, static_argnums=0)
def some_pairs(source, pairs):
    one = lambda pair: SOURCES[source].sample(words(pair=pair), (3, 2), jnp.float32)
    return jax.vmap(one)(pairs)


@fewer
@given(st.lists(st.integers(0, 6), max_size=4), st.integers(0, 2**32 - 1))
def test_any_shape_holds_the_same_sequence(shape, word):
    """Row-major order; a longer array starts with the shorter one; any element stands by itself."""
    key = jnp.array([word, word ^ 0x5A5A5A5A], jnp.uint32)
    samples = SOURCES["counter"].sample(key, tuple(shape), jnp.float32)
    assert samples.shape == tuple(shape)
    size = math.prod(shape)
    longer = SOURCES["counter"].sample(key, (1296,), jnp.float32)
    np.testing.assert_array_equal(samples.ravel(), longer[:size])
    at = noise.counter_at(key[0], key[1], jnp.arange(1296, dtype=jnp.uint32))
    np.testing.assert_array_equal(longer, at)


def test_inside_a_pallas_kernel():
    def kernel(key, out):
        rows, columns = out.shape
        row = lax.broadcasted_iota(jnp.uint32, out.shape, 0)
        column = lax.broadcasted_iota(jnp.uint32, out.shape, 1)
        row = row + pl.program_id(0).astype(jnp.uint32) * jnp.uint32(rows)
        out[...] = noise.counter_at(key[0], key[1], row * jnp.uint32(columns) + column)

    draw = pl.pallas_call(
        kernel,
        grid=(4,),
        in_specs=[pl.BlockSpec((2,), lambda i: (0,))],
        out_specs=pl.BlockSpec((8, 128), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((32, 128), jnp.float32),
        interpret=True,
    )
    expected = SOURCES["counter"].sample(words(), (32, 128), jnp.float32)
    np.testing.assert_array_equal(np.asarray(draw(words())), np.asarray(expected))


def test_exact_sources_are_those_of_jax():
    key = jax.random.wrap_key_data(words(), impl="threefry2x32")
    normal = SOURCES["gaussian"].sample(words(), (4, 5), jnp.float32)
    np.testing.assert_array_equal(normal, jax.random.normal(key, (4, 5)))
    signs = SOURCES["rademacher"].sample(words(), (4, 5), jnp.float32)
    np.testing.assert_array_equal(signs < 0, jax.random.bits(key, (4, 5)) >> 31 == 1)


@pytest.mark.parametrize("source", SOURCES)
def test_dtypes_only_round(source):
    single = SOURCES[source].sample(words(), (100,), jnp.float32)
    for dtype in (jnp.bfloat16, jnp.float16):
        rounded = SOURCES[source].sample(words(), (100,), dtype)
        np.testing.assert_array_equal(np.asarray(rounded), np.asarray(single.astype(dtype)))
    with jax.enable_x64(True):
        double = SOURCES[source].sample(words(), (100,), jnp.float64)
        assert double.dtype == jnp.float64
        np.testing.assert_array_equal(np.asarray(double), np.asarray(single))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint32, jnp.complex64])
def test_other_dtypes_are_refused(source, dtype):
    with pytest.raises(ValueError, match="expected a floating dtype, got"):
        SOURCES[source].sample(words(), (2,), dtype)


def test_too_large_an_array_is_refused():
    with pytest.raises(ValueError, match=r"got 4295032832 of the shape \[65536, 65537\]"):
        jax.eval_shape(
            lambda w: SOURCES["counter"].sample(w, (2**16, 2**16 + 1), jnp.float32), words()
        )


def test_sources_are_equal_and_do_not_recompile():
    for make in (noise.counter, noise.gaussian, noise.rademacher):
        assert make() == make() and hash(make()) == hash(make())
    traced = []

    def draw(source, epoch):
        traced.append(source.name)
        return source.sample(words(epoch=epoch), (3,), jnp.float32)

    compiled = jax.jit(draw, static_argnums=0)
    assert not np.array_equal(compiled(noise.counter(), 0), compiled(noise.counter(), 1))
    assert traced == ["counter"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        noise.counter().name = "other"


def test_golden_values():
    """A change here changes every run that anyone has made with the default noise: say so loudly."""
    key = noise.stream(noise.seed_words(jax.random.key(42)), LEAF, epoch=3, pair=17, role=1)
    assert key.tolist() == [981530838, 3453436270]
    samples = SOURCES["counter"].sample(key, (2, 3), jnp.float32)
    expected = [
        "-0x1.2c84a00000000p-1",
        "-0x1.73aa940000000p-1",
        "-0x1.5fb1c60000000p+0",
        "0x1.ef33780000000p-1",
        "0x1.a395840000000p-2",
        "-0x1.1ba8d80000000p-1",
    ]
    assert [value.hex() for value in samples.ravel().tolist()] == expected
