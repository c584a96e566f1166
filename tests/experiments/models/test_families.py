"""What holds for every family of language models, and for one that is registered here from one file."""

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_family
from jax.sharding import AxisType
from places import HELPERS, ROOT

import eggroll
from eggroll.plan import Dense, Frozen, Matrix, leaf_paths
from experiments.models import families, names, parallel, quantised
from experiments.models.family import Family
from experiments.reasoning.config import PRESETS
from experiments.reasoning.engine import generate
from experiments.reasoning.sampling import Sampling
from experiments.reasoning.sequences import pack
from experiments.reasoning.start import save, start
from experiments.run.devices import MODEL
from experiments.run.errors import UsageError

EVERY = (*families.ALL, toy_family.FAMILY)
VOCABULARY, LENGTH, PADDED = 12, 6, 4
TEXTS = np.random.default_rng(0).integers(0, VOCABULARY, (2, LENGTH))


class Subject(NamedTuple):
    """A small model of a family whose parameters are all different."""

    family: Family[Any]
    config: Any
    params: Any

    def apply(self, params: Any, text: Any) -> Any:
        return applied(self.family, self.config, params, text)


@functools.partial(jax.jit, static_argnums=(0, 1))
def applied(family: Family[Any], config: Any, params: Any, text: Any) -> Any:
    """One compiled function for all tests of a family."""
    return family.apply(params, text, config, None, False)


@pytest.fixture(scope="module", params=EVERY, ids=lambda family: family.name)
def subject(request: pytest.FixtureRequest) -> Subject:
    family = request.param
    config = family.small(VOCABULARY, 128, 2)
    chance = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda: family.init(jax.random.key(0), config))
    began = jax.jit(lambda key: family.init(key, config))(jax.random.key(0))
    assert jax.tree.structure(began) == jax.tree.structure(shapes)
    assert {leaf.dtype for leaf in jax.tree.leaves(began)} == {jnp.dtype("float32")}
    noisy = lambda x: jnp.asarray(x + 0.1 * chance.normal(size=x.shape), jnp.float32)
    return Subject(family, config, jax.tree.map(noisy, began))


def test_a_config_names_its_family(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    family, config, _ = subject
    monkeypatch.setitem(families.FAMILIES, family.name, family)
    assert families.of(config) is family
    assert config.vocab_size == VOCABULARY
    # Compiled programs are kept by it.
    assert hash(config) == hash(dataclasses.replace(config))


def test_prompts_of_any_length_are_read_and_gone_on_with(subject: Subject) -> None:
    family, config, params = subject
    right = np.stack([subject.apply(params, text) for text in TEXTS])
    lengths = np.array([3, 1])
    prompts = np.where(np.arange(PADDED) < lengths[:, None], TEXTS[:, :PADDED], 7)
    read = lambda prompt, length: family.prefill(params, prompt, length, config, PADDED + 3, None)
    logits, caches = jax.jit(jax.vmap(read))(prompts, lengths)
    decode = jax.jit(
        jax.vmap(
            lambda cache, token, t: family.decode(params, cache, token, t, config, None),
            (0, 0, None),
        )
    )
    rows = np.arange(2)
    close(logits, right[rows, lengths - 1])
    for t in range(3):
        before = jax.tree.map(lambda x: (x.shape, x.dtype), caches)
        logits, caches = decode(caches, TEXTS[rows, lengths + t], t)
        close(logits, right[rows, lengths + t])
        assert jax.tree.map(lambda x: (x.shape, x.dtype), caches) == before


def test_logits_of_some_places_and_layers_computed_again(subject: Subject) -> None:
    """What GRPO and SFT differentiate: the same values and gradients, with fewer logits held."""
    family, config, params = subject
    at, text = jnp.array([1, 4, 4]), jnp.asarray(TEXTS[0])

    def loss(params: Any, at: Any, remat: bool) -> Any:
        logits = family.apply(params, text, config, at, remat)
        wanted = logits if at is not None else logits[jnp.array([1, 4, 4])]
        return (wanted * jnp.cos(jnp.arange(wanted.size)).reshape(wanted.shape)).sum()

    graded = jax.jit(jax.value_and_grad(loss), static_argnums=2)
    right = graded(params, None, False)
    for remat in (False, True):
        jax.tree.map(close, graded(params, at, remat), right)
    held = lambda remat: len(
        jax.tree.leaves(
            jax.eval_shape(lambda p: jax.vjp(lambda p: loss(p, at, remat), p)[1], params)
        )
    )
    assert held(True) < held(False)


def test_texts_go_on_from_a_prefix_that_they_share(subject: Subject) -> None:
    family, config, params = subject
    shared, lengths, rows = 2, np.array([2, 1]), np.arange(2)
    texts = np.concatenate([np.repeat(TEXTS[:1, :shared], 2, 0), TEXTS[:, shared:]], 1)
    right = np.stack([subject.apply(params, text) for text in texts])
    prompts = np.where(np.arange(PADDED) < lengths[:, None], texts[:, shared:][:, :PADDED], 7)

    def read(prompts: Any, lengths: Any) -> Any:
        text = jnp.asarray(texts[0, :shared])
        prefix = family.prefill(params, text, shared, config, shared, None)[1]
        one = lambda prompt, length: family.prefill(
            params, prompt, length, config, PADDED + 2, prefix
        )
        return prefix, *jax.vmap(one)(prompts, lengths)

    prefix, logits, caches = jax.jit(read)(prompts, lengths)
    close(logits, right[rows, shared + lengths - 1])
    decode = jax.jit(
        jax.vmap(
            lambda cache, token, t: family.decode(params, cache, token, t, config, prefix),
            (0, 0, None),
        )
    )
    for t in range(2):
        logits, caches = decode(caches, texts[rows, shared + lengths + t], t)
        close(logits, right[rows, shared + lengths + t])


def test_a_plan_covers_every_parameter(subject: Subject) -> None:
    family, _, params = subject
    paths = {path for path, _ in leaf_paths(params)}
    named = ("embeddings", "head", "vectors")
    treatments = {}
    for train in ((), named):
        leaves = family.plan(train, None)(params, 1)
        assert {leaf.path for leaf in leaves.leaves} == paths
        treatments[train] = {leaf.path: leaf.treatment for leaf in leaves.leaves}
    matrices = {path for path, one in treatments[()].items() if isinstance(one, Matrix)}
    assert matrices
    for path, treatment in treatments[named].items():
        assert isinstance(treatment, Matrix | Dense), path
        assert path in matrices or treatments[()][path] == Frozen()
    with pytest.raises(ValueError, match="train must name some of .*, got 'heads'"):
        family.plan(["heads"], None)


def test_members_are_perturbed_and_no_matrix_is_built(subject: Subject) -> None:
    family, config, params = subject
    es = eggroll.EvolutionStrategy(
        optimizer=optax.sgd(0.1),
        population=2,
        sigma=0.1,
        plan=family.plan((), None),
        on_dense="error",
    )
    state = es.init(params, jax.random.key(1))
    score = lambda params, key: family.apply(params, jnp.asarray(TEXTS[0]), config, None, False)
    members = es.map(state, score)
    close(members[1], subject.apply(es.member(state, 1), TEXTS[0]))
    assert jnp.abs(members[0] - members[1]).max() > 0.01

    def write(params: Any, key: Any) -> Any:
        text = jnp.asarray(TEXTS[0, :PADDED])
        logits, cache = family.prefill(params, text, 3, config, LENGTH, None)
        return family.decode(params, cache, logits.argmax(), 0, config, None)

    jax.eval_shape(lambda state: es.map(state, write), state)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_saved_is_loaded(
    subject: Subject, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, config, params = subject
    monkeypatch.setitem(families.FAMILIES, family.name, family)
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    family.save(tmp_path, config, params, None)
    assert families.of_folder(tmp_path) is family
    found, loaded = family.load(tmp_path, None, True)
    assert type(found) is family.config and found.vocab_size == VOCABULARY
    assert {type(leaf) for leaf in jax.tree.leaves(loaded)} == {np.ndarray}
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    # RWKV-7 does not keep what its first layer does not use: what is compared is written again.
    family.save(tmp_path / "again", found, loaded, None)
    again = family.load(tmp_path / "again", None, False)[1]
    jax.tree.map(same_bits, loaded, again)
    wide = family.load(tmp_path, jnp.float32, False)[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(wide)} == {np.dtype("float32")}
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    same_bits(subject.apply(params, TEXTS[0]), subject.apply(wide, TEXTS[0]))


def test_devices_divide_weights_and_caches(subject: Subject) -> None:
    family, config, params = subject
    rules, mesh = family.sharding, jax.make_mesh((2,), (MODEL,), axis_types=(AxisType.Auto,))
    _, cache = jax.eval_shape(
        lambda: family.prefill(params, jnp.asarray(TEXTS[0]), LENGTH, config, LENGTH)
    )
    divided = {}
    for tree in (params, cache):
        places = jax.tree.leaves(parallel.shardings(tree, mesh, rules))
        for (path, leaf), place in zip(leaf_paths(tree), places, strict=True):
            spec = rules.spec_of(path, leaf.ndim)
            assert len(spec) in (0, leaf.ndim), path
            divided[path] = MODEL in spec
            # Sizes that the devices do not divide stay whole.
            whole = not divided[path] or leaf.shape[spec.index(MODEL)] % 2
            share = int(np.prod(place.shard_shape(leaf.shape)))
            assert share == leaf.size // (1 if whole else 2), path
    for name in (*rules.by_output, *rules.by_input, *rules.caches):
        ends = [path for path in divided if f"/{path}".endswith(f"/{name}")]
        assert ends and all(divided[path] for path in ends), f"no array is called {name}"
    assert set(rules.tables) <= set(rules.by_output)
    assert any(divided[path] for path, _ in leaf_paths(cache))
    large = [(path, x) for path, x in leaf_paths(params) if x.size >= 2 * 128**2]
    assert large and all(divided[path] for path, _ in large)

    placed = jax.device_put(params, parallel.shardings(params, mesh, rules))
    close(subject.apply(placed, TEXTS[0]), subject.apply(params, TEXTS[0]))


def test_an_int8_model_is_close_and_planned(subject: Subject) -> None:
    family, _, params = subject
    small = family.quantise(params)
    whole = {path.removesuffix("/int8") for path, _ in leaf_paths(small) if path.endswith("/int8")}
    assert whole == {path for path, _ in leaf_paths(params) if family.output_axis(path) is not None}
    back = family.dequantise(small, jnp.float32)
    for (path, leaf), (_, found) in zip(leaf_paths(params), leaf_paths(back), strict=True):
        # Half a step at most.
        limit = np.abs(leaf).max() / quantised.LARGEST if path in whole else 0.0
        assert np.abs(leaf - found).max() <= 0.51 * limit, path
    logits, right = subject.apply(small, TEXTS[0]), subject.apply(params, TEXTS[0])
    close(logits, subject.apply(back, TEXTS[0]))
    assert 0 < jnp.abs(logits - right).max() < 0.2 * jnp.abs(right).max()

    steps = quantised.steps(small)
    assert steps.keys() == whole
    leaves = family.plan((), steps)(small, 1)
    assert {leaf.path for leaf in leaves.leaves} == {path for path, _ in leaf_paths(small)}
    trained = {leaf.path for leaf in leaves.leaves if isinstance(leaf.treatment, Matrix)}
    assert any(path.endswith("/int8") for path in trained)
    with pytest.raises(ValueError, match="is quantised"):
        family.plan((), None)(small, 1)


def test_a_family_of_one_file_is_begun_saved_and_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver by nothing but the name of a family that it has never heard of."""
    pytest.importorskip("tokenizers")
    monkeypatch.setitem(families.FAMILIES, toy_family.NAME, toy_family.FAMILY)
    monkeypatch.setattr(names, "FOLDER", HELPERS)
    config = dataclasses.replace(PRESETS["tiny"], model=toy_family.NAME, width=32, quantised=True)
    config.check()
    config.check_places()
    begin = start(config)
    params = begin.params(jnp.int32(0))
    save(begin, params, tmp_path, "float32")
    again = start(dataclasses.replace(PRESETS["tiny"], model=str(tmp_path)))
    read = again.params(jnp.int32(0))
    jax.tree.map(same_bits, read, toy_family.FAMILY.dequantise(params, "float32"))
    assert again.tokenizer.encode("2+2") == begin.tokenizer.encode("2+2")
    read, text = jax.tree.map(jnp.asarray, read), [1, 2, 3]
    rule, key = Sampling(max_new_tokens=1), jax.random.key(0)
    written = generate(again.model, read, pack([text]), key, rule, again.tokenizer.eos)
    likeliest = applied(toy_family.FAMILY, again.shape, read, jnp.array(text))[-1].argmax()
    assert written.tokens.tolist() == [[[likeliest]]]
    with pytest.raises(UsageError, match="--width 33: it is divided among 2 heads"):
        start(dataclasses.replace(config, width=33))


def test_the_command_line_knows_every_family_by_the_name_of_its_file() -> None:
    assert list(names.new_models()) == sorted(families.FAMILIES)


def test_no_two_families_are_taken_for_each_other() -> None:
    for unique in (
        [family.name for family in EVERY],
        [family.config for family in EVERY],
        [name for family in EVERY for name in (*family.architectures, *family.model_types)],
    ):
        assert len(set(unique)) == len(unique)
    assert all(family.architectures or family.model_types for family in EVERY)


def test_models_of_no_family_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="must be one of TransformerConfig, .*got ToyConfig"):
        families.of(toy_family.small(7, 8, 1))
    with pytest.raises(UsageError, match="is not a folder of a model: it has no config.json"):
        families.of_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    words = r"'GPT2LMHeadModel'\] is not supported; .*, or the model_type 'rwkv7'"
    with pytest.raises(UsageError, match=words):
        families.of_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ["gpt2"], "architectures": 7}')
    with pytest.raises(UsageError, match="architectures 7 must be a list of texts"):
        families.of_folder(tmp_path)


def test_the_guide_names_every_family() -> None:
    table = (ROOT / "docs" / "reasoning.md").read_text().split("## Models")[1].split("\n##")[0]
    for family in families.ALL:
        assert f"`{family.name}`" in table


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"width": "8"}, "width '8' must be a whole number"),
        ({"width": 7}, "width 7 must be a multiple of heads 2"),
        ({"depth": 2}, "depth is no setting of toy; the settings are context, heads, layers,"),
        ({"model_type": "rwkv7"}, "has the model_type 'rwkv7'; it must be 'toy'"),
        ({"vocab_size": 8}, r"head has the shape .* it must be \[8, 8\] by"),
    ],
)
def test_a_plain_folder_that_is_wrong_is_told(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    config = toy_family.small(7, 8, 1)
    params = toy_family.init(jax.random.key(0), config)
    toy_family.save(tmp_path, config, params, None)
    told = families.fields.read_json(tmp_path / "config.json") | change
    (tmp_path / "config.json").write_text(repr(told).replace("'", '"'))
    with pytest.raises(UsageError, match=words):
        toy_family.FAMILY.load(tmp_path, None, True)


def test_a_plain_folder_without_a_tensor_is_told(tmp_path: Path) -> None:
    config = toy_family.small(7, 8, 1)
    params = toy_family.init(jax.random.key(0), config)
    for odd, words in (
        ({"extra": params["norm"]}, "has the tensor extra, which a toy does not"),
        ({}, "has no tensor norm"),
    ):
        own = {**params, **odd} if odd else {k: v for k, v in params.items() if k != "norm"}
        toy_family.save(tmp_path, config, own, None)
        with pytest.raises(UsageError, match=words):
            toy_family.FAMILY.load(tmp_path, None, True)
    (tmp_path / "model.safetensors").write_bytes(b"{")
    with pytest.raises(UsageError, match="is not a whole safetensors file"):
        toy_family.FAMILY.load(tmp_path, None, True)


def close(found: Any, right: Any) -> None:
    np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-4 * float(np.abs(right).max()))


def same_bits(a: Any, b: Any) -> None:
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
