"""What `benchmarks.pod` compiles: whole generations, as shapes on a mesh of chips that nobody has here."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding

from eggroll import EvolutionStrategy, integer
from eggroll import _programs as programs
from eggroll.population.placement import AXIS
from experiments.models import egg, parallel, rwkv7, rwkv7_family, transformer, transformer_family

EVERYWHERE = jax.P()
TOKENS, SEQUENCES = 256, 4


@dataclasses.dataclass(frozen=True)
class Case:
    """One kind of training.

    Attributes:
      title: for the table.
      population: members.
      chunk: members at a time on a group of chips that share the weights.
      sharing: how many chips share the weights, by chip; empty for small weights, where the mesh has no
        axis "model" (even one of size 1 makes programs that need more memory).
      build: of a mesh and the case, what :func:`lower` takes.
      trips: of loops that end by what they compute: the longest episode.
    """

    title: str
    population: int
    chunk: int
    sharing: Mapping[str, int]
    build: Callable[["Case", Mesh], tuple[Any, ...]]
    trips: int = 1

    def lower(self, mesh: Mesh) -> Any:
        """The lowered step of a strategy on the mesh: evaluation and update in one program."""
        es, state, fitness, args, members = self.build(self, mesh)
        return programs.step.lower(es.placed(state), state, fitness, args, members, None)


def placed(tree: Any, mesh: Mesh, spec: Any = EVERYWHERE) -> Any:
    """Shapes of arrays that lie on the mesh, all by one spec."""
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


# ---------------------------------------------------------------- integers


def integers(config: egg.Config, tokens: int) -> Callable[[Case, Mesh], tuple[Any, ...]]:
    """Pretraining of the int8 language model; every member reads a text of its own."""

    def build(case: Case, mesh: Mesh) -> tuple[Any, ...]:
        es = integer.strategy(
            population=case.population,
            optimizer=integer.threshold(integer.inverse_decay()),
            plan=egg.plan(),
            chunk=case.chunk,
            mesh=mesh,
        )

        def fitness(params: Any, key: Array, member: Any) -> Array:
            return -egg.sequence(params, *member)[1]

        start = lambda key: es.init(egg.init(key, config), key)
        state = placed(jax.eval_shape(start, jax.random.key(0)), mesh)
        hidden = jax.ShapeDtypeStruct((case.population, config.layers, config.width), jnp.int8)
        text = jax.ShapeDtypeStruct((case.population, tokens + 1), jnp.uint8)
        return es, state, fitness, (), placed((hidden, text), mesh, jax.P(AXIS))

    return build


# ---------------------------------------------------------------- reinforcement learning


def episodes(preset: str) -> Callable[[Case, Mesh], tuple[Any, ...]]:
    """One episode a member, by a preset's environment and policy."""

    def build(case: Case, mesh: Mesh) -> tuple[Any, ...]:
        # Imported here: gymnax takes seconds, and is an extra that the other cases do without.
        from experiments.rl import config as rl
        from experiments.rl.evolution import make_strategy
        from experiments.rl.rollout import run_episode
        from experiments.rl.statistics import nothing_seen
        from experiments.rl.train import parts

        settings = rl.PRESETS[preset]
        task, policy = parts(settings)
        sizes: dict[str, Any] = {"population": case.population, "chunk": case.chunk, "mesh": mesh}
        es = dataclasses.replace(make_strategy(settings), **sizes)

        def fitness(params: Any, key: Array, statistics: Any) -> Array:
            return run_episode(task, policy, params, statistics, key).score

        start = lambda key: es.init(policy.init(key), key)
        state = placed(jax.eval_shape(start, jax.random.key(0)), mesh)
        statistics = placed(jax.eval_shape(lambda: nothing_seen(task.observations)), mesh)
        return es, state, fitness, (statistics,), None

    return build


# ---------------------------------------------------------------- language models in bfloat16


def language_model(
    init: Callable[[Array], Any],
    logits: Callable[[Any, Array], Array],
    plan: Any,
    rules: parallel.ShardingRules,
) -> Callable[[Case, Mesh], tuple[Any, ...]]:
    """Weights in bfloat16 with float32 copies; scored by the likelihood of a few texts, plain SGD."""

    def build(case: Case, mesh: Mesh) -> tuple[Any, ...]:
        es = EvolutionStrategy(
            optimizer=optax.sgd(1e-2), population=case.population, sigma=1e-3, plan=plan,
            chunk=case.chunk, mesh=mesh, on_dense="error",
        )  # fmt: skip

        def fitness(params: Any, key: Array, tokens: Array) -> Array:
            out = logits(params, tokens[:, :-1]).astype(jnp.float32)
            return -optax.softmax_cross_entropy_with_integer_labels(out, tokens[:, 1:]).mean()

        def narrow(key: Array) -> Any:
            return jax.tree.map(lambda x: x.astype(jnp.bfloat16), init(key))

        state = jax.eval_shape(lambda key: es.init(narrow(key), key), jax.random.key(0))
        state = jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
            state,
            parallel.shardings(state, mesh, rules),
        )
        tokens = placed(jax.ShapeDtypeStruct((SEQUENCES, TOKENS + 1), jnp.int32), mesh)
        return es, state, fitness, (tokens,), None

    return build


def of_transformer(config: transformer.TransformerConfig) -> Any:
    return language_model(
        lambda key: transformer.init(key, config),
        lambda params, tokens: transformer.apply(params, tokens, config),
        transformer.plan(),
        transformer_family.FAMILY.sharding,
    )


def of_rwkv7(config: rwkv7.RWKV7Config) -> Any:
    state = lambda: rwkv7.initial_state(config, jnp.bfloat16)

    def logits(params: Any, tokens: Array) -> Array:
        return jax.vmap(lambda text: rwkv7.sequence(params, state(), text, config)[0])(tokens)

    rules = rwkv7_family.FAMILY.sharding
    return language_model(lambda key: rwkv7.init(key, config), logits, rwkv7.plan(), rules)


CASES = {
    "integer": Case(
        "int8 language model, 6 layers of 256, 100 bytes", 2**20, 512, {},
        integers(egg.CONFIGS["6L-256D"], 100),
    ),
    "rl": Case("CartPole, one episode", 2**18, 1024, {}, episodes("cartpole"), trips=500),
    "1b": Case(
        "transformer of 1.3B, 4 texts of 256 tokens", 8192, 8, {"v5e": 2, "v5p": 1, "v6e": 1},
        of_transformer(transformer.TransformerConfig(
            hidden_size=2048, intermediate_size=5504, num_hidden_layers=24, num_attention_heads=16,
        )),
    ),
    "7b": Case(
        "transformer of 7B, 4 texts of 256 tokens", 8192, 8, {"v5e": 16, "v5p": 4, "v6e": 8},
        of_transformer(transformer.TransformerConfig()),
    ),
    "rwkv7": Case(
        "RWKV-7 of 1.5B, 4 texts of 256 tokens", 8192, 8, {"v5e": 2, "v5p": 1, "v6e": 1},
        of_rwkv7(rwkv7.RWKV7Config(vocab_size=65536, hidden_size=2048, num_hidden_layers=24)),
    ),
}  # fmt: skip
