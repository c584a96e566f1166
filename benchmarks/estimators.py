"""Estimators of a gradient from scores: cosine to the exact one, and the loss after equal forward passes.

    python -m benchmarks.estimators

Two models: an MLP 64-128-128-10 on random inputs, whose rows are examples, and a GRU of bytes of width 32
on texts that Python carries, whose rows are the 20 bytes of a stream. A generation is a number of pairs;
both members of a pair run its rows, and every estimator runs the same pairs. (Node noise runs them again
for its sum; that pass is not counted.)

* cosine: between the mean of the estimates of four generations and the gradient of backpropagation on the
  same rows, at the same parameters; the mean over draws of the noise.
* loss: on held-out rows after some generations of Adam, each on new rows; the best of three rates, which
  stands beside it.

The library has weight noise and node noise. The other estimators are distributions of full-rank noise, and
are written here on flat vectors of parameters.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.flatten_util import ravel_pytree

from benchmarks import common
from eggroll import EvolutionStrategy, Frozen, credit, noise, plan
from experiments.run import text

Params = dict[str, Any]
Data = Any
# (parameters, number of the generation, data of pairs) -> the gradient of the loss.
Estimator = Callable[[Params, Array, Data], Params]
# (number of the generation, pairs, parameters) -> noise [pairs, parameters].
Directions = Callable[[Array, int, int], Array]

HIDDEN, CLASSES, FEATURES = 128, 10, 64
WIDTH, BYTES, STREAM = 32, 256, 20
EXAMPLES = 16
# Generations whose estimates are averaged before the cosine is taken.
TOGETHER = 4


@dataclasses.dataclass(frozen=True)
class Problem:
    """A model, its data, and the settings that suit it.

    Attributes:
      name: of its columns.
      params: at the start; weights of all but the embedding have variance 1 / fan-in.
      losses: ``losses(params, data of a pair) -> [rows]``.
      data: ``data(i, pairs)`` gives the rows of generation i; leaves ``[pairs, ...]``.
      rows: of a member.
      layers: the layer of every parameter, a number from 0.
      weight_sigma: of noise on weights.
      node_sigma: of noise on outputs.
      gamma: the credit that suits node noise.
      rates: of Adam.
    """

    name: str
    params: Params
    losses: Callable[[Params, Data], Array]
    data: Callable[[int, int], Data]
    rows: int
    layers: dict[str, int]
    weight_sigma: float
    node_sigma: float
    gamma: float
    rates: tuple[float, ...]

    def score(self, params: Params, key: Array, data: Data) -> Array:
        """The scores of the rows of a member."""
        return -self.losses(params, data)


# ---------------------------------------------------------------- the models


def _matrix(key: Array, fan_in: int, outputs: int) -> Array:
    return jax.random.normal(key, (fan_in, outputs)) / fan_in**0.5


def mlp() -> Problem:
    """64-128-128-10 with tanh; the label is the largest output of a fixed random layer."""
    a, b, c, teacher = jax.random.split(jax.random.key(0), 4)
    params = {
        "a": _matrix(a, FEATURES, HIDDEN),
        "b": _matrix(b, HIDDEN, HIDDEN),
        "c": _matrix(c, HIDDEN, CLASSES),
    }
    labels = jax.random.normal(teacher, (FEATURES, CLASSES))

    def losses(params: Params, data: Data) -> Array:
        x, y = data
        for name in ("a", "b"):
            x = jnp.tanh(x @ params[name])
        return optax.softmax_cross_entropy_with_integer_labels(x @ params["c"], y)

    def data(i: int, pairs: int) -> Data:
        key = jax.random.fold_in(jax.random.key(1), i)
        x = jax.random.normal(key, (pairs, EXAMPLES, FEATURES))
        return x, jnp.argmax(x @ labels, -1)

    layers = {"a": 0, "b": 1, "c": 2}
    return Problem(
        "MLP", params, losses, data, EXAMPLES, layers, 0.02, 0.05, 0.0, (0.003, 0.01, 0.03)
    )


def gru() -> Problem:
    """A GRU of bytes of width 32 on the help topics of Python, in bits a byte."""
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "embed": jax.random.normal(keys[0], (BYTES, WIDTH)),
        "inputs": _matrix(keys[1], WIDTH, 3 * WIDTH),
        "states": _matrix(keys[2], WIDTH, 3 * WIDTH),
        "bias": jnp.zeros(3 * WIDTH),
        "head": _matrix(keys[3], WIDTH, BYTES),
    }
    corpus = np.frombuffer(b"\0".join(text.documents(None)), np.uint8).astype(np.int32)

    def losses(params: Params, data: Data) -> Array:
        def step(h: Array, byte: Array) -> tuple[Array, Array]:
            x = jnp.split(params["embed"][byte] @ params["inputs"] + params["bias"], 3)
            s = jnp.split(h @ params["states"], 3)
            z, r = jax.nn.sigmoid(x[0] + s[0]), jax.nn.sigmoid(x[1] + s[1])
            h = h + z * (jnp.tanh(x[2] + r * s[2]) - h)
            return h, h @ params["head"]

        _, logits = jax.lax.scan(step, jnp.zeros(WIDTH), data[:-1])
        bits = optax.softmax_cross_entropy_with_integer_labels(logits, data[1:])
        return bits / jnp.log(2.0)

    def data(i: int, pairs: int) -> Data:
        starts = np.random.default_rng(i).integers(0, len(corpus) - STREAM - 1, (pairs, 1))
        return jnp.asarray(corpus[starts + np.arange(STREAM + 1)])

    layers = {"embed": 0, "inputs": 1, "bias": 1, "states": 2, "head": 3}
    return Problem("GRU", params, losses, data, STREAM, layers, 0.05, 0.1, 0.5, (0.01, 0.03, 0.1))


PROBLEMS = {"mlp": mlp, "gru": gru}
HELD_OUT = 2**20  # a number that no generation has


# ---------------------------------------------------------------- what the library has


def backpropagation(p: Problem) -> Estimator:
    """The exact gradient."""

    def gradient(params: Params, generation: Array, data: Data) -> Params:
        return jax.grad(lambda params: jax.vmap(p.losses, (None, 0))(params, data).mean())(params)

    return gradient


def weights(p: Problem, rank: int | str) -> Estimator:
    """Noise on weights: EGGROLL (arXiv 2511.16652), or at rank "full" OpenES (arXiv 1703.03864)."""

    def fitness(params: Params, key: Array, data: Data) -> Array:
        return p.score(params, key, data).mean()

    return _of_library(p, fitness, {"sigma": p.weight_sigma, "rank": rank, "shaping": None})


def nodes(p: Problem, gamma: float) -> Estimator:
    """Noise on the outputs of products, anew for every row, with credit that decays by gamma."""
    how = {"perturb": "nodes", "rows": p.rows, "credit": credit.causal(gamma)}
    return _of_library(p, p.score, {"sigma": p.node_sigma, **how})


def nodes_again(p: Problem, draws: int) -> Estimator:
    """Node noise of gamma 0, several pairs on the same rows and so fewer rows."""
    estimate = nodes(p, 0.0)

    def gradient(params: Params, generation: Array, data: Data) -> Params:
        fewer = jax.tree.map(lambda x: jnp.repeat(x[::draws], draws, 0), data)
        return estimate(params, generation, fewer)

    return gradient


def nodes_by_layer(p: Problem) -> Estimator:
    """Node noise on one layer alone in every pair, the layers in turn."""
    layers = range(max(p.layers.values()) + 1)
    how = {"perturb": "nodes", "rows": p.rows, "credit": credit.causal(p.gamma)}

    def only(layer: int) -> Estimator:
        others = {name: Frozen() for name, other in p.layers.items() if other != layer}
        settings = {"sigma": p.node_sigma, "plan": plan.by_shape(others), **how}
        return _of_library(p, p.score, settings)

    of_layer = [only(layer) for layer in layers]

    def gradient(params: Params, generation: Array, data: Data) -> Params:
        found: Params = {}
        for layer, estimate in zip(layers, of_layer, strict=True):
            own = jax.tree.map(lambda x, layer=layer: x[layer :: len(layers)], data)
            parts = estimate(params, generation, own)
            found |= {name: x for name, x in parts.items() if x is not None}
        return found

    return gradient


def _of_library(p: Problem, fitness: Callable[..., Array], settings: dict[str, Any]) -> Estimator:
    def gradient(params: Params, generation: Array, data: Data) -> Params:
        members = jax.tree.map(lambda x: jnp.repeat(x, 2, 0), data)
        population = jax.tree.leaves(members)[0].shape[0]
        es = EvolutionStrategy(optimizer=optax.identity(), population=population, **settings)
        state = es.init(p.params, 0)._replace(params=params, generation=generation)
        values = es.evaluate(state, fitness, members=members)
        if "perturb" in settings:
            return es.gradient(state, values, fitness, members=members)
        return es.gradient(state, values)

    return gradient


# ---------------------------------------------------------------- what it does not have


def two_sided(p: Problem, directions: Directions) -> Estimator:
    """``mean over pairs of (l(w + sigma E) - l(w - sigma E)) / (2 sigma) E``, for any noise E."""

    def gradient(params: Params, generation: Array, data: Data) -> Params:
        flat, tree = ravel_pytree(params)
        pairs = jax.tree.leaves(data)[0].shape[0]
        e = directions(generation, pairs, flat.size)

        def of_members(sign: float) -> Array:
            loss = lambda e, own: p.losses(tree(flat + sign * p.weight_sigma * e), own).mean()
            return jax.vmap(loss)(e, data)

        differences = (of_members(1) - of_members(-1)) / (2 * p.weight_sigma)
        return tree(differences @ e / pairs)

    return gradient


def gaussian(generation: Array, pairs: int, size: int, stream: int = 0) -> Array:
    """Independent normal entries."""
    key = jax.random.fold_in(jax.random.key(stream), generation)
    return noise.counter().sample(noise.seed_words(key), (pairs, size), jnp.float32)


def disjoint(parts: int) -> Directions:
    """Random disjoint subspaces: a pair perturbs one of K parts of the parameters, by sqrt(K) sigma.

    The parts are drawn anew every generation; block coordinate descent (arXiv 2501.19099), all blocks at
    once.
    """

    def directions(generation: Array, pairs: int, size: int) -> Array:
        key = jax.random.fold_in(jax.random.key(1), generation)
        part = jax.random.permutation(key, jnp.arange(size) % parts)
        return _masked(gaussian(generation, pairs, size), part, parts)

    return directions


def by_layer(p: Problem) -> Directions:
    """One layer at a time: the same with layers for parts (arXiv 2501.19099)."""
    each = {name: jnp.full(x.shape, p.layers[name]) for name, x in p.params.items()}
    layer, parts = ravel_pytree(each)[0], max(p.layers.values()) + 1
    return lambda generation, pairs, size: _masked(gaussian(generation, pairs, size), layer, parts)


def _masked(e: Array, part: Array, parts: int) -> Array:
    own = part == jnp.arange(e.shape[0])[:, None] % parts
    return jnp.where(own, parts**0.5 * e, 0)


def shared_subspace(dimensions: int) -> Directions:
    """All pairs of a generation perturb within one random subspace (arXiv 2410.08989)."""

    def directions(generation: Array, pairs: int, size: int) -> Array:
        basis = gaussian(generation, dimensions, size, stream=1)
        return gaussian(generation, pairs, dimensions) @ basis / dimensions**0.5

    return directions


def sparse(share: float) -> Directions:
    """Sparse noise: a random share of the entries, the same for all pairs (arXiv 2006.01759)."""

    def directions(generation: Array, pairs: int, size: int) -> Array:
        key = jax.random.fold_in(jax.random.key(1), generation)
        kept = jax.random.uniform(key, (size,)) < share
        return jnp.where(kept, gaussian(generation, pairs, size) / share**0.5, 0)

    return directions


def orthogonal(chunk: int) -> Directions:
    """Directions at right angles within a chunk of pairs (arXiv 1804.02395), by Gram-Schmidt."""

    def directions(generation: Array, pairs: int, size: int) -> Array:
        e = gaussian(generation, pairs, size).reshape(-1, min(chunk, pairs), size)
        triangles = jnp.linalg.inv(jnp.linalg.cholesky(e @ e.mT))
        return size**0.5 * (triangles @ e).reshape(pairs, size)

    return directions


ESTIMATORS: dict[str, Callable[[Problem], Estimator]] = {
    "backpropagation": backpropagation,
    "nodes, gamma 0": lambda p: nodes(p, 0.0),
    "nodes, gamma 0.5": lambda p: nodes(p, 0.5),
    "nodes, gamma 0.9": lambda p: nodes(p, 0.9),
    "nodes, gamma 1": lambda p: nodes(p, 1.0),
    "nodes, gamma 0, two pairs a row": lambda p: nodes_again(p, 2),
    "nodes, gamma 0, four pairs a row": lambda p: nodes_again(p, 4),
    "nodes, one layer a pair": nodes_by_layer,
    "weights, rank 1": lambda p: weights(p, 1),
    "weights, rank 4": lambda p: weights(p, 4),
    "weights, full rank": lambda p: weights(p, "full"),
    "weights, 2 disjoint parts": lambda p: two_sided(p, disjoint(2)),
    "weights, 4 disjoint parts": lambda p: two_sided(p, disjoint(4)),
    "weights, 8 disjoint parts": lambda p: two_sided(p, disjoint(8)),
    "weights, one layer a pair": lambda p: two_sided(p, by_layer(p)),
    "weights, shared subspace of 64": lambda p: two_sided(p, shared_subspace(64)),
    "weights, sparse, one in ten": lambda p: two_sided(p, sparse(0.1)),
    "weights, orthogonal": lambda p: two_sided(p, orthogonal(128)),
}


# ---------------------------------------------------------------- what is measured


@dataclasses.dataclass(frozen=True)
class Row:
    """One estimator on one model.

    Attributes:
      model: its name.
      name: of the estimator.
      cosines: of every draw.
      losses: held out at the end, for each of the rates.
      rates: of Adam.
      seconds: of one estimate, compiled.
    """

    model: str
    name: str
    cosines: list[float]
    losses: list[float]
    rates: tuple[float, ...]
    seconds: float

    @property
    def cosine(self) -> float:
        return float(np.mean(self.cosines))

    @property
    def best(self) -> tuple[float, float]:
        """The lowest loss, and its rate."""
        return min(zip(self.losses, self.rates, strict=True))


class Measurement:
    """What all estimators of a model share: rows, the exact gradient, the loss and the optimizer.

    Args:
      p: the model.
      pairs: of a generation.
      draws: of the noise, for the cosine.
      generations: of a learning run.
      first: the number of the first generation, from which its noise comes; rows do not change.
    """

    def __init__(
        self, p: Problem, pairs: int, draws: int, generations: int, first: int = 0
    ) -> None:
        self.p, self.draws, self.generations, self.first = p, draws, generations, first
        self.rows = [p.data(i, pairs) for i in range(max(TOGETHER, generations))]
        self.exact = self.mean(jax.jit(backpropagation(p)), 0)
        held_out = p.data(HELD_OUT, 512)
        self.loss = jax.jit(lambda params: jax.vmap(p.losses, (None, 0))(params, held_out).mean())
        self.start = jax.jit(optax.scale_by_adam().init)(p.params)

        @jax.jit
        def move(params: Params, state: Any, grads: Params, rate: float) -> tuple[Params, Any]:
            updates, state = optax.adam(rate).update(grads, (state, optax.EmptyState()))
            return optax.apply_updates(params, updates), state[0]

        self.move = move

    def mean(self, estimate: Estimator, draw: int) -> np.ndarray:
        """The mean estimate of the first generations."""
        parts = [
            estimate(self.p.params, np.int32(self.first + TOGETHER * draw + i), self.rows[i])
            for i in range(TOGETHER)
        ]
        flat = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(g)]) for g in parts]
        return np.mean(flat, 0, dtype=np.float64)

    def row(self, name: str) -> Row:
        """Measures one estimator."""
        estimate = jax.jit(ESTIMATORS[name](self.p))
        cosines = []
        for draw in range(self.draws):
            x = self.mean(estimate, draw)
            size = np.linalg.norm(x) * np.linalg.norm(self.exact)
            cosines.append(float(x @ self.exact / size))
        losses = []
        begun = time.perf_counter()
        for rate in self.p.rates:
            params, state = self.p.params, self.start
            for i in range(self.generations):
                grads = estimate(params, np.int32(self.first + i), self.rows[i])
                params, state = self.move(params, state, grads, rate)
            losses.append(float(self.loss(params)))
        seconds = (time.perf_counter() - begun) / (self.generations * len(self.p.rates))
        return Row(self.p.name, name, cosines, losses, self.p.rates, seconds)


def table(rows: Sequence[Row], names: Sequence[str], models: Sequence[str]) -> list[str]:
    """The lines of a Markdown table: an estimator a line."""
    of = {(row.model, row.name): row for row in rows}
    heads = [f"{m}: cosine | loss | rate" for m in models]
    lines = [f"| estimator | {' | '.join(heads)} |", "|---" * (1 + 3 * len(models)) + "|"]
    for name in names:
        cells = [name]
        for model in models:
            row = of[model, name]
            loss, rate = row.best
            cells += [f"{row.cosine:.3f}", f"{loss:.3f}", f"{rate:g}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Runs the command line; gives the rows that it printed."""
    p = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    p.add_argument("--models", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    p.add_argument("--estimators", nargs="+", choices=list(ESTIMATORS), default=list(ESTIMATORS))
    p.add_argument("--pairs", type=int, default=128, help="of a generation; a multiple of 128")
    p.add_argument("--draws", type=int, default=4, help="of the noise, for the cosine")
    p.add_argument("--generations", type=int, default=60, help="of a learning run")
    p.add_argument(
        "--quick", action="store_true", help="the first model, 4 pairs, 1 draw, 2 generations"
    )
    p.add_argument("--seed", type=int, default=0, help="of the noise")
    p.add_argument("--json", type=Path, help="also write the table to this file")
    args = p.parse_args(argv)
    if args.pairs < 1 or args.pairs % 128:
        p.error(f"--pairs {args.pairs}: must be a multiple of 128")
    for name in ("draws", "generations"):
        if getattr(args, name) < 1:
            p.error(f"--{name} {getattr(args, name)}: must be at least 1")
    if args.quick:
        args.models, args.pairs, args.draws, args.generations = args.models[:1], 4, 1, 2

    m = common.machine()
    print(f"{m['cpu']}, {m['cores']} cores, device {m['device']}, JAX {m['jax']}")
    rows, models = [], []
    for key in args.models:
        problem = PROBLEMS[key]()
        models.append(problem.name)
        size = sum(x.size for x in jax.tree.leaves(problem.params))
        print(
            f"{problem.name}: {size:,} parameters; {args.pairs} pairs of {problem.rows} rows; cosine of "
            f"{TOGETHER} generations, mean of {args.draws} draws; loss after {args.generations} generations",
            flush=True,
        )
        measurement = Measurement(
            problem, args.pairs, args.draws, args.generations, 1000 * args.seed
        )
        rows += [measurement.row(name) for name in args.estimators]
    print("\n" + "\n".join(table(rows, args.estimators, models)), flush=True)
    if args.json:
        document = {
            "machine": m, "pairs": args.pairs, "draws": args.draws, "generations": args.generations,
            "seed": args.seed, "rows": [dataclasses.asdict(row) for row in rows],
        }  # fmt: skip
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
