"""What optimizers keep for Llama models of 60M to 7B parameters, in GiB, without allocating any of it.

    python -m benchmarks.memory

Parameters and moments are float32. What is split by FRUGAL and GaLore are the linear weights of the layers;
embeddings, norms and the output head have Adam.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import optax

import optim
from benchmarks import llama

GIB = 2**30
OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "AdamW": lambda: optax.adamw(1e-3),
    "Lion": lambda: optim.lion(1e-4),
    # GaLore is FRUGAL's machinery with bases of singular vectors and nothing done with the rest.
    "GaLore .25": lambda: optim.frugal(
        1e-2, density=0.25, projector=optim.projector.svd(), state_free=None, on_refresh="keep"
    ),
    "FRUGAL .25": lambda: optim.frugal(1e-3, density=0.25),
    "FRUGAL 0": lambda: optim.frugal(1e-3, density=0.0),
}


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Runs the command line; gives the table that it printed, in GiB."""
    p = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    p.add_argument("--models", nargs="+", choices=list(llama.SIZES), default=list(llama.SIZES))
    p.add_argument("--fields", action="store_true", help="also the fields of each state")
    p.add_argument("--json", type=Path, help="also write the table to this file")
    args = p.parse_args(argv)
    print(f"{'model':<6} {'parameters':>10} " + " ".join(f"{name:>10}" for name in OPTIMIZERS))
    table: dict[str, dict[str, float]] = {}
    for model in args.models:
        params = llama.shapes(model)
        count = sum(x.size for x in jax.tree.leaves(params))
        found = {name: optim.state_bytes(make(), params) for name, make in OPTIMIZERS.items()}
        table[model] = {name: state.total / GIB for name, state in found.items()}
        cells = " ".join(f"{size:>10.2f}" for size in table[model].values())
        print(f"{model:<6} {count / 1e6:>9.1f}M {cells}", flush=True)
        if args.fields:
            for name, state in found.items():
                parts = (f"{key} {size / GIB:.3f}" for key, size in state.fields.items())
                print(f"    {name}: {', '.join(parts)}")
    if args.json:
        args.json.write_text(json.dumps(table, indent=1) + "\n")
    return table


if __name__ == "__main__":
    main()
