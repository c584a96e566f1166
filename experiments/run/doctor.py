"""`eggroll doctor`: what is installed, and whether JAX can compile and run something here."""

import importlib
import time

from experiments.run.folder import versions

# What the drivers import, beside JAX.
NEEDED = (
    "eggroll", "flax", "gymnasium", "gymnax", "matplotlib", "optax", "orbax.checkpoint", "rich",
    "safetensors", "sklearn", "tyro",
)  # fmt: skip


def doctor() -> int:
    """Print a report; the exit code is 0 if everything works."""
    import jax
    import jax.numpy as jnp

    found = versions()
    print(f"Python {found['python']} on {found['platform']}, {found['cpus']} CPUs")
    for name, version in found["packages"].items():
        print(f"  {name:17} {version or 'not installed'}")
    print(f"JAX devices: {', '.join(found['devices'])} (backend {jax.default_backend()})")

    broken = [problem for problem in map(import_problem, NEEDED) if problem]
    for problem in broken:
        print(f"problem: {problem}")

    before = time.perf_counter()
    total = int(jax.jit(lambda x: (x @ x).sum())(jnp.ones((64, 64))))
    print(f"compiled and ran a small program in {time.perf_counter() - before:.2f} s")
    if total != 64**3:
        broken.append("wrong sum")
        print(f"problem: it gave {total}, and {64**3} is right")
    print("Everything works." if not broken else f"{len(broken)} of the checks failed.")
    return 1 if broken else 0


def import_problem(name: str) -> str | None:
    """Why `name` cannot be imported, or None if it can."""
    try:
        importlib.import_module(name)
    except ImportError as error:
        return f"{name} cannot be imported: {error}"
    return None
