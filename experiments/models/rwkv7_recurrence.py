"""The recurrence of RWKV-7, ``S = S (diag(w) + a b^T) + v k^T``: token by token, and in chunks of tokens."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def recurrence_scan(
    state: Float[Array, "heads width width"],
    r: Float[Array, "length heads width"],
    log_w: Float[Array, "length heads width"],
    k: Float[Array, "length heads width"],
    v: Float[Array, "length heads width"],
    a: Float[Array, "length heads width"],
    b: Float[Array, "length heads width"],
) -> tuple[Float[Array, "length heads width"], Float[Array, "heads width width"]]:
    """``S = S (diag(w) + a b^T) + v k^T``, one token after another.

    Args:
        state: S before the first token, [heads, values, keys].
        r: what S is read with.
        log_w: logarithms of the decays, -exp(-1/2) to 0.
        k: where v is written.
        v: what is written.
        a: the direction that is taken out, times -1.
        b: a direction in whose place it is written again.

    Returns:
        ``S r`` after each token, and S after the last one. All in float32.
    """

    def one(s: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
        r, log_w, k, v, a, b = (x[:, None, :] for x in token)
        taken = jnp.sum(s * a, -1, keepdims=True)
        s = s * jnp.exp(log_w) + taken * b + v.mT * k
        return s, jnp.sum(s * r, -1)

    state, y = lax.scan(one, state, (r, log_w, k, v, a, b))
    return y, state


def recurrence_chunked(
    state: Float[Array, "heads width width"],
    r: Float[Array, "length heads width"],
    log_w: Float[Array, "length heads width"],
    k: Float[Array, "length heads width"],
    v: Float[Array, "length heads width"],
    a: Float[Array, "length heads width"],
    b: Float[Array, "length heads width"],
    chunk: int = 16,
) -> tuple[Float[Array, "length heads width"], Float[Array, "heads width width"]]:
    """The same as :func:`recurrence_scan` by products of matrices over chunks of tokens.

    With the decay since a chunk's beginning divided out of S, a token adds ``u b^T + v k^T`` to it, where
    ``u = S a`` holds the u of the tokens before: a triangular system of the chunk's size. Its solution
    is linear in the S before the chunk, so all systems are solved at once, and what remains one after
    another is three products a chunk.

    Args:
        chunk: tokens to a chunk. Decays of 64 tokens (e^-39 at most) are well within float32.
    """
    length = r.shape[0]

    def split(x: Array) -> Array:  # [chunks, heads, chunk, width]; a padded token changes nothing
        x = jnp.pad(x, ((0, -length % chunk), (0, 0), (0, 0)))
        return x.reshape(-1, chunk, *x.shape[1:]).swapaxes(1, 2)

    r, log_w, k, v, a, b = map(split, (r, log_w, k, v, a, b))
    total = jnp.cumsum(log_w, axis=-2)
    r, a = r * jnp.exp(total), a * jnp.exp(total - log_w)
    k, b = k * jnp.exp(-total), b * jnp.exp(-total)
    before, until = jnp.tri(chunk, k=-1, dtype=bool), jnp.tri(chunk, dtype=bool)
    scores = lambda x, y, seen: jnp.where(seen, x @ y.mT, 0)
    # Numbers of very different sizes are summed: no TF32 or bfloat16 where float32 is asked for.
    with jax.default_matmul_precision("highest"):
        known = jnp.concatenate([a, scores(a, k, before) @ v], -1)
        solved = inverse_of_one_minus(scores(a, b, before)) @ known
        # Of a state s before the chunk: u = of_s s^T + own, and what is read is read_s s^T + read.
        of_s, own = jnp.split(solved, 2, axis=-1)
        seen = scores(r, b, until)
        read_s, read = r + seen @ of_s, seen @ own + scores(r, k, until) @ v
        written = v.mT @ k

        def one(s: Array, parts: tuple[Array, ...]) -> tuple[Array, Array]:
            of_s, own, read_s, read, b, written, decay = parts
            u = of_s @ s.mT + own
            return (s + u.mT @ b + written) * decay, read_s @ s.mT + read

        decay = jnp.exp(total[..., -1:, :])
        state, y = lax.scan(one, state, (of_s, own, read_s, read, b, written, decay))
    return y.swapaxes(1, 2).reshape(-1, *y.shape[1:2], y.shape[-1])[:length], state


def inverse_of_one_minus(lower: Float[Array, "*batch n n"]) -> Float[Array, "*batch n n"]:
    """``(1 - L)^-1`` of strictly lower triangular matrices, by products alone.

    What is known are the inverses X of diagonal blocks; two neighbours and the block C of L below them make
    one of twice the size, ``X + X C X``. (OpenBLAS, which would solve the system on a CPU, can come to wait
    for itself where several programs' threads call it.)
    """
    n = lower.shape[-1]
    inverse, size, place = (
        jnp.broadcast_to(jnp.eye(n, dtype=lower.dtype), lower.shape),
        1,
        jnp.arange(n),
    )
    while size < n:
        of = lambda width: place[:, None] // width == place // width
        inverse = inverse + inverse @ jnp.where(of(2 * size) & ~of(size), lower, 0) @ inverse
        size *= 2
    return inverse
