"""The source of noise: a pure function of (seed, leaf path, epoch, pair, role).

No random state is stored. ``stream`` mixes these arguments into the 64-bit key of one array, and a
``Noise`` maps a key and a shape to samples. Every device, chunk size and order of leaves therefore
gives the same numbers:

    seed_words(key) -> stream(seed, path, epoch, pair, role) -> noise.sample(words, shape, dtype)

``counter`` is the default. It hashes the position of a sample with the key, adds the four bytes of
the hash, and maps the sum to a nearly normal law by a polynomial: about thirty vector instructions
a sample. Its arithmetic is chosen so that compilers cannot change a bit of the result. ``gaussian``
and ``rademacher`` draw from JAX's threefry generator.
"""

import enum
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Integer, UInt32

Index = int | Integer[Array, ""]


class Role(enum.IntEnum):
    """The purpose of an array of random numbers.

    Streams are keyed by the value, so the value of a role never changes.
    """

    A = 0
    B = 1
    DENSE = 2
    FITNESS_KEY = 3
    NODE = 4
    SUBSPACE = 5


@dataclass(frozen=True)
class Noise:
    """A source of independent samples with zero mean and unit variance, symmetric about zero.

    ``Noise("name", sample)`` defines another source. Two sources are equal if their functions are
    the same object: pass a module-level function. A new lambda for every call recompiles the
    program.

    Attributes:
        name: the name in configurations and reports.
        sample: ``(words, shape, dtype) -> samples`` for the uint32 ``words`` ``[2]`` of ``stream``,
            a static ``shape`` and a floating ``dtype``.
        integer: whether the noise is for int8 parameters. Then ``dtype`` is int8, the first axis of
            ``shape`` is the rank, and samples have the scale of :func:`eggroll.integer.normal`.

    Example:
        >>> words = stream(seed_words(jax.random.key(0)), "layer/kernel", epoch=0, pair=3, role=0)
        >>> counter().sample(words, (256, 2), jnp.float32).shape
        (256, 2)
    """

    name: str
    sample: Callable[[UInt32[Array, "2"], tuple[int, ...], DTypeLike], Array]
    integer: bool = False


def counter() -> Noise:
    """The default source: a counter hash, the sum of its four bytes, and a polynomial.

    Sample ``i`` (row-major) of an array depends on the key and ``i`` alone. A longer array
    therefore starts with the samples of a shorter one, and ``counter_at`` computes any sample
    directly. Variance 1 and kurtosis 3 are exact. Tail frequencies are within 5 percent of the
    normal law out to 4 standard deviations, and the largest value is 5.19. There are 1021 distinct
    values, with the same bits on every backend.

    Samples are float32 values rounded to the requested dtype; float64 adds no digits.

    Raises (from ``sample``):
        ValueError: the dtype is not floating, or the array has more than 2**32 samples.

    Example:
        >>> words = jnp.array([1, 2], jnp.uint32)
        >>> x = counter().sample(words, (1000, 1000), jnp.float32)
        >>> print(f"{x.std():.2f} {(x**4).mean():.1f}")
        1.00 3.0
        >>> bool((counter().sample(words, (7,), jnp.float32) == x.ravel()[:7]).all())
        True
    """
    return Noise("counter", _counter)


def gaussian() -> Noise:
    """Exact normal samples from ``jax.random.normal`` with a threefry key.

    On a CPU this costs twenty to forty times as much as ``counter``. Samples are float32 values
    rounded to the requested dtype, and depend on the configuration flag
    ``jax_threefry_partitionable``.

    Raises (from ``sample``):
        ValueError: the dtype is not floating.

    Example:
        >>> words = jnp.array([1, 2], jnp.uint32)
        >>> gaussian().sample(words, (2, 3), jnp.bfloat16).dtype
        dtype(bfloat16)
    """
    return Noise("gaussian", _gaussian)


def rademacher() -> Noise:
    """Signs, +1 or -1 with equal probability (kurtosis 1), from threefry.

    Noise of rank 1 then consists of signs too, and all members are at the same distance from the
    mean.

    Raises (from ``sample``):
        ValueError: the dtype is not floating.

    Example:
        >>> words = jnp.array([1, 2], jnp.uint32)
        >>> sorted(set(rademacher().sample(words, (50,), jnp.float32).tolist()))
        [-1.0, 1.0]
    """
    return Noise("rademacher", _rademacher)


def seed_words(key: Array) -> UInt32[Array, "2"]:
    """Two words that represent a typed JAX key of any implementation.

    Args:
        key: a scalar key, as ``jax.random.key`` makes it. Distinct 64-bit keys (threefry) give
            distinct words; longer keys (rbg) are hashed.

    Returns:
        uint32 ``[2]``.

    Raises:
        ValueError: ``key`` is not one typed key.

    Example:
        >>> seed_words(jax.random.key(0)).shape
        (2,)
    """
    if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        got = f"{key.dtype}{list(key.shape)}" if isinstance(key, jax.Array) else type(key).__name__
        raise ValueError(f"key: expected a typed key such as jax.random.key(seed), got {got}")
    if key.shape:
        raise ValueError(f"key: expected one key, got keys of the shape {list(key.shape)}")
    data = jax.random.key_data(key).astype(jnp.uint32)
    data = jnp.concatenate([data, jnp.zeros(data.size % 2, jnp.uint32)])
    words = data[:2]
    for start in range(2, data.size, 2):
        words = _permute(words) ^ data[start : start + 2]
    return _permute(words)


def path_words(path: str) -> tuple[int, int]:
    """A fixed 64-bit hash of a leaf's path, as two 32-bit integers.

    The hash is BLAKE2b, since Python's ``hash`` of a string differs from process to process.

    Example:
        >>> path_words("layer/kernel")
        (1886229229, 4075652348)
    """
    digest = hashlib.blake2b(path.encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def stream(
    seed: UInt32[Array, "2"], path: str, epoch: Index, pair: Index, role: int
) -> UInt32[Array, "2"]:
    """The 64-bit key of one array of noise.

    A permutation mixes every argument into all 64 bits. For a fixed seed and path, two pairs of one
    epoch never share a key, and neither do two (epoch, role) of one pair. Two paths with different
    hashes never share a key if all other arguments are equal. Any other collision has probability
    2**-64.

    Args:
        seed: the words of ``seed_words``.
        path: the path of the leaf in the tree of parameters.
        epoch: ``generation // noise_reuse``; may be traced. Reduced modulo 2**32.
        pair: index of the antithetic pair, ``member // 2``; may be traced, usually by a ``vmap``.
            Reduced modulo 2**32.
        role: a :class:`Role`, or its value.

    Returns:
        uint32 ``[2]``, for ``Noise.sample``.

    Example:
        >>> seed = seed_words(jax.random.key(0))
        >>> keys = jax.vmap(lambda pair: stream(seed, "layer/kernel", 0, pair, 0))(jnp.arange(4))
        >>> keys.shape
        (4, 2)
    """
    # The pair comes last, so that a vmap over pairs computes the other steps once.
    words = _permute(seed ^ jnp.array(path_words(path), jnp.uint32))
    words = _permute(words ^ _words(epoch, int(role)))
    return _permute(words ^ _words(pair, 0))


def looped(words: UInt32[Array, "2"], loops: tuple[Index, ...]) -> UInt32[Array, "2"]:
    """The key of one step of nested loops, from the key of an array that is drawn in them.

    Args:
        words: from :func:`stream`.
        loops: the step of each loop, from the outside in; may be traced.

    Example:
        >>> words = jnp.array([1, 2], jnp.uint32)
        >>> bool((looped(words, ()) == words).all()), bool((looped(words, (0,)) == words).all())
        (True, False)
    """
    for depth, step in enumerate(loops):
        words = _permute(words ^ _words(step, depth + 1))
    return words


def bits_at(
    word0: UInt32[Array, "..."], word1: UInt32[Array, "..."], index: UInt32[Array, "..."]
) -> UInt32[Array, "..."]:
    """The 32 random bits behind the samples at the given positions of an array with this key."""
    return _hash(word0, word1, index)


def groups_at(
    word0: UInt32[Array, ""], word1: UInt32[Array, ""], index: UInt32[Array, "..."], count: int
) -> UInt32[Array, "..."]:
    """The group, from 0 to ``count - 1``, of each position: a random partition in equal parts.

    Every block of ``count`` consecutive positions has one position of each group, in an order that is
    uniform over permutations and independent of other blocks. A group therefore has ``size / count``
    positions, up to one.

    Args:
        word0: first word of the key.
        word1: second word of the key.
        index: positions.
        count: number of groups.

    Example:
        >>> words = jnp.array([1, 2], jnp.uint32)
        >>> groups_at(words[0], words[1], jnp.arange(8, dtype=jnp.uint32), 4).tolist()
        [3, 2, 1, 0, 1, 2, 3, 0]
    """
    # A position's group is the rank of its bits in its block; equal bits rank by position.
    slot = index % count
    slots = jnp.arange(count, dtype=jnp.uint32)
    others = bits_at(word0, word1, (index - slot)[..., None] + slots)
    own = bits_at(word0, word1, index)[..., None]
    before = (others < own) | ((others == own) & (slots < slot[..., None]))
    return before.sum(-1, dtype=jnp.uint32)


def counter_at(
    word0: UInt32[Array, "..."], word1: UInt32[Array, "..."], index: UInt32[Array, "..."]
) -> Float32[Array, "..."]:
    """The samples of ``counter`` at the given row-major positions, in float32.

    The function is elementwise and uses integer and float arithmetic alone. It also works inside a
    Pallas kernel, or for a few rows of a large factor.

    Args:
        word0: first word of the array's key.
        word1: second word of the array's key.
        index: positions. The three arguments broadcast against each other.

    Example:
        >>> words = jnp.array([1, 2], jnp.uint32)
        >>> whole = counter().sample(words, (10, 4), jnp.float32)
        >>> row = counter_at(words[0], words[1], jnp.arange(28, 32, dtype=jnp.uint32))
        >>> bool((row == whole[7]).all())
        True
    """
    bits = _hash(word0, word1, index)
    # Add adjacent bytes, then the two 16-bit halves; the mask removes the carry above bit 16.
    halves = (bits & 0x00FF00FF) + ((bits >> 8) & 0x00FF00FF)
    total = (halves + (halves >> 16)) & 0x7FF
    return _bend((total.astype(jnp.int32) - 510).astype(jnp.float32))


def _hash(
    word0: UInt32[Array, "..."], word1: UInt32[Array, "..."], index: UInt32[Array, "..."]
) -> UInt32[Array, "..."]:
    # Shifts and multipliers are from Chris Wellons's "triple32" (public domain,
    # github.com/skeeto/hash-prospector), which a search selected for low avalanche bias. Two rounds
    # would be a tenth faster, but the bytes of neighbouring samples would be measurably dependent.
    # One word enters before the first multiplication and the other after it. Two streams that share
    # one word are therefore shifted copies of each other only if the other word nearly agrees too:
    # related streams need a collision in 64 bits and not in 32.
    bits = index + word0
    bits = (bits ^ (bits >> 17)) * jnp.uint32(0xED5AD4BB)
    bits = bits ^ word1
    bits = (bits ^ (bits >> 11)) * jnp.uint32(0xAC4C1B51)
    bits = (bits ^ (bits >> 15)) * jnp.uint32(0x31848BAB)
    return bits ^ (bits >> 14)


# With z = t / sqrt(var t) the polynomial is z (1 + .01442 z^2) (1 + 1.412e-6 z^10), normalised. The
# coefficient of the last factor minimises the squared log ratio of the tail probabilities to those
# of the normal law between 1 and 4.2 standard deviations. _LINEAR then gives kurtosis 3, and _SCALE
# variance 1, over the exact law of four summed bytes (to 1e-6; a test recomputes both). The ratios
# of the tail probabilities at 3, 3.5, 3.9 and 4.2 are .96, .97, 1.03 and .91. The cheaper z + .0196
# z^3 has .89, .34, .01 and 0; z + .0025 z^5 has 1.07, .97, .60 and .19.
_LINEAR = 1514776.0
_STEEP = 3.52e27
_SCALE = 1.2166088e-36


def _bend(t: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """The odd polynomial, for integers from -510 to 510 in float32.

    Every addition below has an exact product as an operand (of integers under 2**24, or the square
    of a number with 12 significant bits). A fused multiply-add then rounds as a multiplication and
    an addition do, so the result does not depend on the compiler's choice. In Horner's form it
    would.
    """
    square = t * t
    fifth = t * (square * square)
    bits = lax.bitcast_convert_type(fifth, jnp.uint32) & jnp.uint32(0xFFFFF000)
    cut = lax.bitcast_convert_type(bits, jnp.float32)
    return (t * _SCALE) * (square + _LINEAR) * (cut * cut + _STEEP)


def _words(first: Index, second: Index) -> UInt32[Array, "2"]:
    return jnp.stack([jnp.asarray(part).astype(jnp.uint32) for part in (first, second)])


# Arbitrary constants: the first six words of the fractional part of pi.
_ROUNDS = ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0))


@partial(jax.jit, inline=True)
def _permute(words: UInt32[Array, "2"]) -> UInt32[Array, "2"]:
    """A bijection of 64 bits, three Feistel rounds; each output bit depends on each input bit."""
    left, right = words[0], words[1]
    for word0, word1 in _ROUNDS:
        left, right = right ^ _hash(jnp.uint32(word0), jnp.uint32(word1), left), left
    return jnp.stack([left, right])


LONG = 128


@partial(jax.jit, inline=True, static_argnames=("shape", "dtype"))
def _counter(
    words: UInt32[Array, "2"], shape: tuple[int, ...], dtype: DTypeLike
) -> Float[Array, "..."]:
    size = math.prod(shape)
    if size > 2**32:
        raise ValueError(
            f"noise: expected at most 2**32 samples, got {size} of the shape {list(shape)}"
        )
    return _cast(counter_at(words[0], words[1], _positions(shape)).reshape(shape), dtype)


def _positions(shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """Row-major positions in an array of the shape, with as many entries but fewer axes.

    Long axes are kept, so that a compiler can make an array that is sharded along one of them in
    shards. Short trailing axes are joined, since a loop over a narrow axis would be slow.
    """
    axes = [n for n in shape if n != 1]
    while len(axes) > 1 and axes[-1] < LONG:
        axes[-2:] = [axes[-2] * axes[-1]]
    index = jnp.zeros(axes, jnp.uint32)
    for axis in range(len(axes)):
        stride = jnp.uint32(math.prod(axes[axis + 1 :]))
        index += lax.broadcasted_iota(jnp.uint32, axes, axis) * stride
    return index


def _gaussian(
    words: UInt32[Array, "2"], shape: tuple[int, ...], dtype: DTypeLike
) -> Float[Array, "..."]:
    return _cast(jax.random.normal(_threefry(words), shape, jnp.float32), dtype)


def _rademacher(
    words: UInt32[Array, "2"], shape: tuple[int, ...], dtype: DTypeLike
) -> Float[Array, "..."]:
    # From bits, since the signs of jax.random.rademacher depend on whether 64-bit dtypes are
    # enabled.
    bits = jax.random.bits(_threefry(words), shape, jnp.uint32)
    return _cast(1 - 2 * (bits >> 31).astype(jnp.float32), dtype)


def _threefry(words: UInt32[Array, "2"]) -> Array:
    return jax.random.wrap_key_data(words, impl="threefry2x32")


def _cast(samples: Float32[Array, "*shape"], dtype: DTypeLike) -> Float[Array, "*shape"]:
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"noise: expected a floating dtype, got {jnp.dtype(dtype).name}")
    return samples.astype(dtype)
