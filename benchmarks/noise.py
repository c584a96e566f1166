"""Samples per second of each source of noise, as a multiple of ``jax.random.normal``.

    python -m benchmarks.noise --samples 4194304

Rounds are interleaved (every source once a round) and a source's ratio is the median over rounds of
(time of ``jax.random.normal``) / (its own time), so that a machine that slows down for a while slows
both sides of a ratio.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from eggroll import noise
from eggroll.noise import Noise

BASELINE = "jax.random.normal"
ROWS, RANK = 256, 4


def flat(source: Noise, samples: int, dtype: str) -> Callable[[Key[Array, ""]], Array]:
    """One long array."""
    return lambda key: source.sample(noise.seed_words(key), (samples,), jnp.dtype(dtype))


def pairs(source: Noise, samples: int, dtype: str) -> Callable[[Key[Array, ""]], Array]:
    """The hot use: factors ``[ROWS, RANK]`` of a vmap over pairs, keys included."""

    def draw(key: Key[Array, ""]) -> Array:
        seed = noise.seed_words(key)

        def one(pair: Array) -> Array:
            words = noise.stream(seed, "layer/kernel", 0, pair, 0)
            return source.sample(words, (ROWS, RANK), jnp.dtype(dtype))

        return jax.vmap(one)(jnp.arange(samples // (ROWS * RANK)))

    return draw


def measure(samples: int, rounds: int) -> list[dict[str, str | float]]:
    """One row a case: nanoseconds a sample and the ratio to the baseline."""
    factors = f"pairs of [{ROWS}, {RANK}]"
    cases = {
        (BASELINE, "flat", "float32"): lambda key: jax.random.normal(key, (samples,)),
        ("counter", "flat", "float32"): flat(noise.counter(), samples, "float32"),
        ("counter", factors, "float32"): pairs(noise.counter(), samples, "float32"),
        ("counter", factors, "bfloat16"): pairs(noise.counter(), samples, "bfloat16"),
        ("gaussian", factors, "float32"): pairs(noise.gaussian(), samples, "float32"),
        ("rademacher", factors, "float32"): pairs(noise.rademacher(), samples, "float32"),
    }
    key = jax.random.key(0)
    compiled = {case: jax.jit(draw).lower(key).compile() for case, draw in cases.items()}
    times: dict[tuple[str, str, str], list[float]] = {case: [] for case in cases}
    for index in range(rounds + 1):
        for case, draw in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(draw(key))
            if index:  # the first round warms caches up
                times[case].append(time.perf_counter() - start)
    base = times[BASELINE, "flat", "float32"]
    return [
        {
            "source": source,
            "layout": layout,
            "dtype": dtype,
            "ns_per_sample": 1e9 * statistics.median(own) / samples,
            "ratio": statistics.median(b / t for b, t in zip(base, own, strict=True)),
        }
        for (source, layout, dtype), own in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of the sources of noise.")
    parser.add_argument("--samples", type=int, default=2**22, help="samples of one call")
    parser.add_argument("--rounds", type=int, default=20, help="interleaved rounds")
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    if args.samples < 1 or args.samples % (ROWS * RANK) or args.rounds < 1:
        parser.error(f"--samples must be a multiple of {ROWS * RANK}, --rounds at least 1")

    table = measure(args.samples, args.rounds)
    device = jax.devices()[0]
    print(
        f"{args.samples} samples a call, {args.rounds} rounds, {device.device_kind}, JAX {jax.__version__}"
    )
    print(f"{'source':<18} {'layout':<20} {'dtype':<9} {'ns/sample':>9} {'ratio':>7}")
    for row in table:
        print(
            f"{row['source']:<18} {row['layout']:<20} {row['dtype']:<9} "
            f"{row['ns_per_sample']:>9.3f} {row['ratio']:>7.1f}"
        )
    if args.json:
        setting = {"samples": args.samples, "rounds": args.rounds, "device": device.device_kind}
        args.json.write_text(
            json.dumps({**setting, "jax": jax.__version__, "rows": table}, indent=1)
        )


if __name__ == "__main__":
    main()
