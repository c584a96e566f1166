"""What theory says of low-rank noise ``E = A B^T / sqrt(r)`` and of the estimator built on it.

Straight from the noise functions, by einsum, so that it also stands as a check on the rest of the
library. Source: arXiv 2511.16652; the identities below were derived anew. Bounds are in standard
errors of the sample at hand (named where used); seeds are fixed.
"""

import math
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special, stats

from eggroll import noise

SOURCES = {
    "counter": noise.counter(),
    "gaussian": noise.gaussian(),
    "rademacher": noise.rademacher(),
}
KURTOSIS = {"counter": 3.0, "gaussian": 3.0, "rademacher": 1.0}


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def draw(source, pairs, size, role, epoch):
    """Factors of many pairs ``[pairs, *size]``."""
    seed = noise.seed_words(jax.random.key(0))
    return jax.vmap(
        lambda pair: SOURCES[source].sample(
            noise.stream(seed, "layer/kernel", epoch, pair, role), size, jnp.float32
        )
    )(jnp.arange(pairs))


def factors(source, pairs, rows, columns, rank, epoch=0):
    """A ``[pairs, rows, rank]`` and B ``[pairs, columns, rank]`` of one leaf, as numpy float64."""
    a = draw(source, pairs, (rows, rank), 0, epoch)
    b = draw(source, pairs, (columns, rank), 1, epoch)
    return np.asarray(a, np.float64), np.asarray(b, np.float64)


def perturbations(source, pairs, rows, columns, rank, epoch=0):
    """E ``[pairs, rows, columns]``."""
    a, b = factors(source, pairs, rows, columns, rank, epoch)
    return np.einsum("pir,pjr->pij", a, b) / math.sqrt(rank)


def entries(source, rank):
    """Independent entries of E ``[size]``: one pair of 64 rows and columns gives its diagonal."""
    pairs = 2**14 if source == "counter" else 2**12  # threefry is slow
    a, b = factors(source, pairs, 64, 64, rank)
    return np.einsum("pir,pir->pi", a, b).ravel() / math.sqrt(rank)


def assert_mean(samples, expected, errors=4.5):
    """The mean over axis 0 is the expected one, within so many of its estimated standard errors."""
    error = samples.std(0) / math.sqrt(len(samples))
    np.testing.assert_array_less(np.abs(samples.mean(0) - expected), errors * error + 1e-5)


def gradient_matrix(rows, columns):
    return np.random.default_rng(7).normal(size=(rows, columns))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("rank", [1, 2, 4, 8])
def test_kurtosis_of_an_entry(source, rank):
    """Identity 1: 3 + (k^2 - 3) / r for factors of kurtosis k: 9, 6, 4.5, 3.75 for normal ones."""
    e = entries(source, rank)
    assert_mean(e, 0)
    assert_mean(e**2, 1)
    assert_mean(e**4, 3 + (KURTOSIS[source] ** 2 - 3) / rank)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("rank", [1, 2])
def test_estimate_is_unbiased_for_a_quadratic(source, rank):
    """Identity 2: for degree up to 2 the expectation is the gradient itself, for any sigma and rank.

    One-sided, f(M + sigma E) E / sigma: the mirrored estimate would drop the even terms by itself.
    """
    rows, columns, sigma = 3, 4, 0.5
    rng = np.random.default_rng(1)
    mean, linear = rng.normal(size=(2, rows, columns))
    left = rng.normal(size=(rows, rows))
    right = rng.normal(size=(columns, columns))
    e = perturbations(source, 2**17, rows, columns, rank)
    w = mean + sigma * e
    # f(W) = <L, W> + <W, S W T> / 2, with gradient L + (S M T + S' M T') / 2.
    value = np.einsum("ij,pij->p", linear, w)
    value += np.einsum("pij,pij->p", w, np.einsum("ik,pkl,lj->pij", left, w, right)) / 2
    gradient = linear + (left @ mean @ right + left.T @ mean @ right.T) / 2
    assert_mean(value[:, None, None] * e / sigma, gradient)
    # Sharp enough to see a gradient that is wrong by a fifth.
    assert (
        np.max((value[:, None, None] * e / sigma).std(0)) / 2**8.5 < 0.2 * np.abs(gradient).mean()
    )


@pytest.mark.parametrize("source", ["counter", "gaussian"])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_bias_for_a_cubic(source, rank):
    """Identity 2: f = W^3 at 0 gives sigma^2 (3 + 6/r); dense noise gives 3 sigma^2."""
    sigma = 0.3
    e = entries(source, rank)
    assert_mean((sigma * e) ** 3 * e / sigma, sigma**2 * (3 + 6 / rank))


@pytest.mark.parametrize("source", ["counter", "gaussian"])
def test_dense_noise_for_a_cubic(source):
    seed = noise.seed_words(jax.random.key(0))
    words = noise.stream(seed, "layer/bias", 0, 0, 2)
    e = np.asarray(SOURCES[source].sample(words, (2**20,), jnp.float32), np.float64)
    assert_mean((0.3 * e) ** 3 * e / 0.3, 0.3**2 * 3)


@pytest.mark.parametrize("source", ["counter", "gaussian"])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_second_moment_of_the_estimate(source, rank):
    """Identity 3: |G|^2 (mn + 2 + (2m + 2n + 2)/r) for f = <G, W> and one sample."""
    rows, columns = 4, 6
    gradient = gradient_matrix(rows, columns)
    e = perturbations(source, 2**17, rows, columns, rank)
    square = np.einsum("ij,pij->p", gradient, e) ** 2 * np.einsum("pij,pij->p", e, e)
    factor = rows * columns + 2 + (2 * rows + 2 * columns + 2) / rank
    assert_mean(square, np.sum(gradient**2) * factor)


@pytest.mark.parametrize("source", SOURCES)
def test_second_moment_of_the_estimate_for_any_kurtosis(source):
    """Identity 3 at rank 1 for factors of kurtosis k: |G|^2 (m + k - 1)(n + k - 1)."""
    rows, columns = 4, 6
    gradient = gradient_matrix(rows, columns)
    e = perturbations(source, 2**17, rows, columns, 1)
    square = np.einsum("ij,pij->p", gradient, e) ** 2 * np.einsum("pij,pij->p", e, e)
    extra = KURTOSIS[source] - 1
    assert_mean(square, np.sum(gradient**2) * (rows + extra) * (columns + extra))


@pytest.mark.parametrize("pairs,stated", [(64, 0.229), (256, 0.426), (1024, 0.686), (4096, 0.883)])
def test_alignment_with_the_gradient(pairs, stated):
    """Identity 4: cos(g, G) is about 1 / sqrt(1 + c/P), and 1 / (1 + 2c/P) between two halves."""
    side, repeats = 32, 24
    gradient = gradient_matrix(side, side)
    c = side * side + 1 + 2 * side + 2 * side + 2
    predicted = 1 / math.sqrt(1 + c / pairs)
    assert abs(predicted - stated) < 1e-3
    cosine = lambda x, y: np.sum(x * y) / math.sqrt(np.sum(x * x) * np.sum(y * y))
    whole, halves = [], []
    for repeat in range(repeats):
        a, b = factors("counter", pairs, side, side, 1, epoch=repeat)
        a, b = a[..., 0], b[..., 0]
        weighted = a * np.einsum("pi,ij,pj->p", a, gradient, b)[:, None]
        first, second = (weighted[s].T @ b[s] for s in np.split(np.arange(pairs), 2))
        whole.append(cosine(first + second, gradient))
        halves.append(cosine(first, second))
    # The formulas take the ratio of expectations for the expected ratio: up to .006 too high.
    for found, expected in ((whole, predicted), (halves, 1 / (1 + 2 * c / pairs))):
        assert abs(np.mean(found) - expected) < 4 * np.std(found) / math.sqrt(repeats) + 0.006


def entry_density(x, rank):
    """The law of an entry for normal factors: of characteristic function (1 + t^2/r)^(-r/2).

    It is a variance-gamma density. At 0, where that of rank 1 is infinite, any finite value serves.
    """
    x = math.sqrt(rank) * max(abs(x), 1e-12)
    order = (rank - 1) / 2
    log = order * math.log(x / 2) - math.lgamma(rank / 2) - math.log(math.pi) / 2
    return math.sqrt(rank) * math.exp(log) * special.kv(order, x)


def integral(function, low, high):
    return integrate.quad(function, low, high, limit=200)[0]


def distance_to_normal(rank):
    """The integral of |density - normal density|, split where the sign of the difference changes."""
    difference = lambda x: entry_density(x, rank) - stats.norm.pdf(x)
    grid = np.linspace(1e-9, 12, 1201)
    signs = np.sign([difference(x) for x in grid])
    cuts = [0.0, *grid[1:][np.diff(signs) != 0], 40.0]
    return 2 * sum(abs(integral(difference, a, b)) for a, b in pairwise(cuts))


DISTANCES = {1: 0.4751, 2: 0.2826, 4: 0.1567, 8: 0.0828, 16: 0.0425, 32: 0.0216, 64: 0.0109}


def test_distances_fall_as_one_over_the_rank():
    """Identity 5, the numbers: the exact law of an entry against N(0, 1)."""
    found = {rank: distance_to_normal(rank) for rank in DISTANCES}
    for rank, distance in DISTANCES.items():
        # Cutting on a grid of .01 costs up to about 1e-4.
        assert abs(found[rank] - distance) < 2e-4, rank
    assert abs(found[32] / found[64] - 2) < 0.03


@pytest.mark.parametrize("source", ["counter", "gaussian"])
@pytest.mark.parametrize("rank", [1, 2, 4, 8, 16])
def test_law_of_an_entry(source, rank):
    """Identity 5, the samples: their histogram is that of the exact law, at its distance from normal."""
    # Zero is in the middle of a bin: three counter samples in a thousand are exactly zero.
    half_edges = np.array([0, *np.arange(0.1, 5.2, 0.2)])
    edges = np.concatenate([-half_edges[:0:-1], half_edges[1:]])
    e = entries(source, rank)
    size = e.size
    found = np.histogram(e, edges)[0] / size
    density = lambda x: entry_density(x, rank)
    half = np.array([integral(density, a, b) for a, b in pairwise(half_edges)])
    exact = np.concatenate([half[:0:-1], 2 * half[:1], half[1:]])
    normal = np.diff(stats.norm.cdf(edges))
    # A count's mean absolute error is sqrt(2 p / (pi size)); that of their sum scatters by a fifth.
    sampling = np.sum(np.sqrt(2 * exact / (math.pi * size)))
    assert np.sum(np.abs(found - exact)) < 1.6 * sampling
    # Outside the edges, where the exact law is above the normal, comes on top.
    outside = 1 - exact.sum()
    distance = np.sum(np.abs(found - normal)) + outside
    assert (
        abs(distance - DISTANCES[rank]) < 2 * sampling + 0.003
    )  # .003: within a bin, signs cancel


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_rank_of_the_update(rank):
    """Identity 6: min(P r, m, n)."""
    rows, columns = 24, 16
    a, b = factors("counter", 40, rows, columns, rank)
    weights = np.random.default_rng(0).normal(size=40)
    for pairs in (1, 3, 8, 40):
        update = np.einsum("p,pir,pjr->ij", weights[:pairs], a[:pairs], b[:pairs])
        assert np.linalg.matrix_rank(update) == min(pairs * rank, rows, columns)
