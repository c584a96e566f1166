"""Generated tokens per second of a perturbed population against plain batched decoding of one model.

    python -m benchmarks.reasoning --models transformer --population 64 --prompts 4 --tokens 33

Rows of every case, all with population * prompts sequences of the same lengths, prompts read included:

* plain inference: the unperturbed model answers every prompt as often as there are members;
* perturbed: every member answers every prompt, its noise drawn anew in every segment;
* drawing alone: the noise of all pairs, once.

Texts have no end, so that all rows write the same number of tokens.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import common
from benchmarks.common import PLAIN, Call, Case, Row
from eggroll import EvolutionStrategy
from eggroll.perturbation import draw_pairs
from experiments.models import rwkv7, transformer
from experiments.reasoning.engine import answer, generate
from experiments.reasoning.language_model import LanguageModel, language_model
from experiments.reasoning.sampling import Sampling
from experiments.reasoning.sequences import pack, segments

PERTURBED, DRAWING = "perturbed", "drawing alone"
HEAD_DIM = 32
MODELS = ("transformer", "rwkv7")


def model_of(name: str, hidden: int, layers: int, vocab: int) -> LanguageModel:
    """A model with heads of width 32 and, in the MLP, about as many parameters as in the family."""
    if name == "rwkv7":
        return language_model(
            rwkv7.RWKV7Config(
                vocab_size=vocab, hidden_size=hidden, num_hidden_layers=layers, head_dim=HEAD_DIM
            )
        )
    return language_model(
        transformer.TransformerConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=8 * hidden // 3,
            num_hidden_layers=layers,
            num_attention_heads=hidden // HEAD_DIM,
        )
    )


def calls_of(case: Case, model: LanguageModel, args: argparse.Namespace) -> dict[str, Call]:
    """The rows of one case."""
    params = jax.jit(model.init)(jax.random.key(0))
    es = EvolutionStrategy(
        optimizer=optax.sgd(1.0),
        population=case.population,
        sigma=0.01,
        rank=case.rank,
        plan=model.plan,
        chunk=args.chunk,
        on_dense="error",
    )
    state = es.init(params, 0)
    shape = (case.observations, args.prompt_tokens)
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, shape)
    few, many = pack(tokens.tolist()), pack(tokens.tolist() * case.population)
    sampling, key = Sampling(max_new_tokens=args.tokens), jax.random.key(0)
    plan, pairs = es.plan_of(params), jnp.arange(case.population // 2, dtype=jnp.int32)
    draw = jax.jit(lambda seed: draw_pairs(plan, es.noise, seed, jnp.int32(0), pairs))
    how = dict(eos=(), segment=args.segment)
    return {
        PLAIN: Call(lambda: generate(model, params, many, key, sampling, **how)),
        PERTURBED: Call(lambda: answer(model, es, state, few, sampling, **how)),
        DRAWING: Call(lambda: draw(state.seed)),
    }


def print_rows(case: Case, rows: Sequence[Row], size: int, tokens: int, wait: float | None) -> None:
    """The table of one case, and the ratio that the target is about."""
    waited = "" if wait is None else f"   (waiting for a CPU: {wait:.0%} of the time)"
    head = f"{'row':<20} {'ms':>9} {'tok/s':>8} {'x plain':>8} {'quartiles':>13} {'CPU':>6}"
    print(
        f"\n{case.model} of {size / 1e6:.1f}M, {case} T={tokens}{waited}\n{head}\n{'-' * len(head)}"
    )
    for row in rows:
        assert row.seconds is not None and row.times_plain is not None
        low, median, high = row.times_plain
        written = case.population * case.observations * tokens
        speed = "" if row.name == DRAWING else f"{written / row.seconds:.0f}"
        print(
            f"{row.name:<20} {1e3 * row.seconds:>9.2f} {speed:>8} {median:>8.3f} "
            f"{f'{low:.3f}-{high:.3f}':>13} {row.cpu_times_plain:>6.2f}"
        )
    (perturbed,) = (row for row in rows if row.name == PERTURBED)
    assert perturbed.times_plain is not None
    print(f"perturbed {1 / perturbed.times_plain[1]:.0%} of plain inference", flush=True)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Runs the command line; gives the rows that it printed."""
    p = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    p.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    p.add_argument("--hidden", type=int, default=192, help=f"width, a multiple of {HEAD_DIM}")
    p.add_argument("--layers", type=int, default=4)
    p.add_argument("--vocab", type=int, default=4096)
    p.add_argument("--population", nargs="+", type=int, default=[64])
    p.add_argument("--prompts", type=int, default=4, help="that every member answers")
    p.add_argument("--prompt-tokens", type=int, default=32)
    p.add_argument("--tokens", type=int, default=33, help="of an answer")
    p.add_argument("--rank", nargs="+", type=int, default=[1])
    p.add_argument("--chunk", type=int, help="members at a time; all by default")
    p.add_argument("--segment", type=int, default=32)
    p.add_argument("--rounds", type=int, default=5, help="interleaved rounds")
    p.add_argument("--tries", type=int, default=1, help="rounds made for each one kept")
    p.add_argument("--json", type=Path, help="also write the table to this file")
    args = p.parse_args(argv)
    if any(n < 2 or n % 2 for n in args.population):
        p.error(f"--population {args.population}: even numbers of at least 2 are right")
    if args.hidden < HEAD_DIM or args.hidden % HEAD_DIM:
        p.error(f"--hidden {args.hidden}: must be a multiple of {HEAD_DIM}")
    for name in (
        "layers",
        "vocab",
        "prompts",
        "prompt_tokens",
        "tokens",
        "segment",
        "rounds",
        "tries",
    ):
        if getattr(args, name) < 1:
            p.error(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")

    m = common.machine()
    print(f"{m['cpu']}, {m['cores']} cores, device {m['device']}, JAX {m['jax']}")
    count, steps = segments(args.tokens, args.segment)
    print(f"prompts of {args.prompt_tokens} tokens; 1 and {count} segments of {steps} tokens")
    rows, waits = [], {}
    for name in args.models:
        model = model_of(name, args.hidden, args.layers, args.vocab)
        shapes = jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0)))
        size = sum(x.size for x in shapes)
        for population in args.population:
            for rank in args.rank:
                case = Case(name, args.hidden, population, args.prompts, rank)
                calls = calls_of(case, model, args)
                found, waits[str(case)] = common.measure(case, calls, args.rounds, args.tries)
                print_rows(case, found, size, args.tokens, waits[str(case)])
                rows += found
    if args.json:
        table = [
            {**{k: v for k, v in dataclasses.asdict(r).items() if k != "case"}, **dataclasses.asdict(r.case)}
            for r in rows
        ]  # fmt: skip
        settings = {
            k: v for k, v in vars(args).items() if k not in ("json", "models", "rank", "population")
        }
        document = {"machine": m, **settings, "waited": waits, "rows": table}
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
