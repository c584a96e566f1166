"""Counting work in the text of compiled programs, bounds on time, and a case compiled for a pod of TPUs."""

import dataclasses
import doctest
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType

from benchmarks import chips, hlo, pod, pod_cases, work
from benchmarks.chips import CHIPS
from benchmarks.hlo import Module
from benchmarks.work import Collective, Counts
from experiments.models import egg, families, rwkv7, transformer
from experiments.models.family import ModelConfig
from experiments.run.devices import MODEL

# Three trips of a loop of stride 2 to 6: a product [8,16] x [16,32] in a fusion, whose weight is a slice of a
# stack, and a sum over groups of four chips; then a gather over all, and a reduction.
PROGRAM = """HloModule jit_step, is_scheduled=true

%fused (param_0: bf16[8,16], param_1: bf16[6,16,32], param_2: s32[]) -> f32[8,32] {
  %param_0 = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %param_1 = bf16[6,16,32]{2,1,0:T(8,128)(2,1)} parameter(1)
  %param_2 = s32[]{:T(128)} parameter(2)
  %constant.1 = s32[]{:T(128)} constant(0)
  %slice.1 = bf16[1,16,32]{2,1,0} dynamic-slice(%param_1, %param_2, %constant.1, %constant.1), dynamic_slice_sizes={1,16,32}
  %bitcast.1 = bf16[16,32]{1,0} bitcast(%slice.1)
  ROOT %convolution.1 = f32[8,32]{1,0:T(8,128)} convolution(%param_0, %bitcast.1), dim_labels=bf_io->bf
}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %add.9 = f32[]{:T(128)} add(%a, %b)
}

%body (arg: (s32[], bf16[8,16], bf16[6,16,32], f32[8,32])) -> (s32[], bf16[8,16], bf16[6,16,32], f32[8,32]) {
  %arg = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)S(1)}, bf16[6,16,32]{2,1,0}, f32[8,32]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %x = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%arg), index=1
  %w = bf16[6,16,32]{2,1,0} get-tuple-element(%arg), index=2
  %constant.2 = s32[]{:T(128)} constant(2)
  %add.1 = s32[]{:T(128)} add(%i, %constant.2)
  %fusion.1 = f32[8,32]{1,0:T(8,128)} fusion(%x, %w, %i), kind=kOutput, calls=%fused, backend_config={"window_config":{"estimated_cycles":"100"}}
  %all-reduce.1 = f32[8,32]{1,0:T(8,128)} all-reduce(%fusion.1), channel_id=1, replica_groups=[4,4]<=[16], to_apply=%add
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)S(1)}, bf16[6,16,32]{2,1,0}, f32[8,32]{1,0}) tuple(%add.1, %x, %w, %all-reduce.1)
}

%condition (arg.1: (s32[], bf16[8,16], bf16[6,16,32], f32[8,32])) -> pred[] {
  %constant.3 = s32[]{:T(128)} constant(6)
  %arg.1 = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)S(1)}, bf16[6,16,32]{2,1,0}, f32[8,32]{1,0}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%i.1, %constant.3), direction=LT
}

ENTRY %main (p: bf16[8,16], q: bf16[6,16,32], r: f32[8,32]) -> f32[] {
  %p = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %q = bf16[6,16,32]{2,1,0} parameter(1)
  %r = f32[8,32]{1,0} parameter(2)
  %zero = s32[]{:T(128)} constant(0)
  %tuple.2 = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)S(1)}, bf16[6,16,32]{2,1,0}, f32[8,32]{1,0}) tuple(%zero, %p, %q, %r)
  %while.1 = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)S(1)}, bf16[6,16,32]{2,1,0}, f32[8,32]{1,0}) while(%tuple.2), condition=%condition, body=%body
  %y = f32[8,32]{1,0} get-tuple-element(%while.1), index=3
  %all-gather-start.1 = (f32[8,32]{1,0}, f32[128,32]{1,0}) all-gather-start(%y), channel_id=2, replica_groups={{0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15}}, dimensions={0}
  %all-gather-done.1 = f32[128,32]{1,0} all-gather-done(%all-gather-start.1)
  %float = f32[]{:T(128)} constant(0)
  ROOT %reduce.1 = f32[]{:T(128)} reduce(%all-gather-done.1, %float), dimensions={0,1}, to_apply=%add
}
"""
PRODUCT, SUMMED = 2 * 8 * 16 * 32, 8 * 32 * 4


def test_loops_count_as_often_as_they_run() -> None:
    module = Module(PROGRAM, 16)
    once, counts = work.count(module, loops=False), work.count(module)
    assert once.matmul == {"bf16": PRODUCT} and counts.matmul == {"bf16": 3 * PRODUCT}
    # The counter's addition and the test of each trip, and the reduction at the end.
    assert once.vector == 2 + 128 * 32 and counts.vector == 3 * 2 + 128 * 32
    assert counts.cycles == 300 and counts.unknown == 0


def test_collectives_by_kind_and_group() -> None:
    counts = work.count(Module(PROGRAM, 16))
    part, everywhere = Collective("all-reduce", 4), Collective("all-gather", 16)
    assert counts.calls == {part: 3, everywhere: 1}
    assert counts.payload == {part: 3 * SUMMED, everywhere: SUMMED}
    assert counts.sent == {part: 3 * SUMMED * 2 * 3 / 4, everywhere: 15 * SUMMED}


def test_bytes_are_those_of_main_memory_and_of_slices_that_are_taken() -> None:
    module = Module(PROGRAM, 16)
    fusion = module.computations["body"]["fusion.1"]
    # One of six slices of the weights, its number, and the product; x lies in the fast memory.
    assert work._bytes(module, module.computations["body"], fusion) == 16 * 32 * 2 + 4 + SUMMED


def test_a_loop_that_ends_by_what_it_computes_runs_as_often_as_said() -> None:
    text = PROGRAM.replace("constant(6)", "parameter(1)")
    counts = work.count(Module(text, 16), unknown_trips=7)
    assert counts.unknown == 1 and counts.matmul == {"bf16": 7 * PRODUCT}
    with pytest.raises(ValueError, match="ENTRY"):
        Module("no program", 1)


def test_what_gathers_look_up_is_counted_and_read() -> None:
    lines = """%look (param_0.1: s8[65536], param_1.1: s32[40,1]) -> s8[40] {
  %param_0.1 = s8[65536]{0:T(1024)} parameter(0)
  %param_1.1 = s32[40,1]{1,0} parameter(1)
  ROOT %gather.1 = s8[40]{0} gather(%param_0.1, %param_1.1), offset_dims={}, slice_sizes={1}
}

ENTRY %main (a: s8[65536], b: s32[40,1]) -> s8[40] {
  %a = s8[65536]{0:T(1024)} parameter(0)
  %b = s32[40,1]{1,0} parameter(1)
  ROOT %c = s8[40]{0} fusion(%a, %b), kind=kCustom, calls=%look
}
"""
    counts = work.count(Module(lines, 1))
    # 40 numbers of the table, 40 indices of four bytes, 40 numbers written; not the whole table.
    assert counts.gathered == 40 and counts.bytes == 40 + 4 * 40 + 40


def test_a_batch_axis_written_as_a_convolution_is_no_more_work() -> None:
    lines = """ENTRY %main (a: s8[9,6,7], b: s8[9,6,5]) -> s32[6,7,5] {
  %a = s8[9,6,7]{2,1,0} parameter(0)
  %b = s8[9,6,5]{2,1,0} parameter(1)
  ROOT %c = s32[6,7,5]{2,1,0} convolution(%a, %b), window={size=6 stride=5 lhs_dilate=6}, dim_labels=f0b_i0o->0bf
}
"""
    assert work.count(Module(lines, 1)).matmul == {"s8": 2 * 6 * 9 * 7 * 5}


@given(st.integers(2, 512), st.floats(1, 1e12))
def test_a_sum_is_a_scatter_and_a_gather_of_what_it_left(group: int, payload: float) -> None:
    both = work.sent("reduce-scatter", payload, group) + work.sent(
        "all-gather", payload / group, group
    )
    assert work.sent("all-reduce", payload, group) == pytest.approx(both)


def test_bounds_on_time_by_published_rates() -> None:
    chip = CHIPS["v5e"]
    job = Counts(bytes=819e9 * 0.5, cycles=1.5e9)
    job.matmul.update({"bf16": 197_000_000_000_000, "s8": 393_000_000_000_000})
    job.sent.update({Collective("all-reduce", 256): 200_000_000_000})
    t = chips.times(job, chip, 256)
    assert (t.matmul, t.memory, t.exchange) == pytest.approx((2, 0.5, 1))
    assert t.bound == "matmul" and t.roofline == pytest.approx(3)
    assert t.scheduled == pytest.approx(1, rel=0.01) and t.expected == pytest.approx(3)
    # A group of some chips has the links of one axis of the torus.
    job.sent.clear()
    job.sent.update({Collective("all-reduce", 16): 200_000_000_000})
    assert chips.times(job, chip, 256).exchange == pytest.approx(2)


def test_published_peaks_imply_a_clock_that_chips_have() -> None:
    clocks = {name: round(chip.clock / 1e9, 2) for name, chip in CHIPS.items()}
    assert clocks == {"v5e": 1.5, "v5p": 1.75, "v6e": 1.75}


def test_examples_of_the_docstrings() -> None:
    for module in (hlo, work, chips, pod_cases):
        assert doctest.testmod(module).failed == 0


def test_the_table_says_what_does_not_fit() -> None:
    t = chips.times(Counts(bytes=819e9), CHIPS["v5e"], 4)
    row = pod.Row("rl", "v5e:2x2", 4, 1, 64, 8, 1e9, 15.5e9, Counts(bytes=819e9), t, 1.0, 3.0)
    alone = dataclasses.replace(row, topology="v5e:1x1", devices=1, temporaries=1e9, population=16)
    refused = pod.Row("1b", "v5e:1x1", 1, 1, 64, 8, note="RESOURCE_EXHAUSTED: 17G of 16G")
    work_lines, time_lines = (
        t.splitlines() for t in pod.tables([alone, row, refused]).split("\n\n")
    )
    assert not row.fits and "103% TOO MUCH" in work_lines[3]
    assert alone.fits and "12%" in work_lines[2]
    assert not refused.fits and "17G of 16G" in work_lines[4]
    assert len({line.count("|") for line in work_lines}) == 1
    # The same work on four times the chips for four times the members.
    assert [line.split("|")[-2].strip() for line in time_lines[2:]] == ["100% / 100%"] * 2


# ---------------------------------------------------------------- the cases

SMALL = transformer.TransformerConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
)
RECURRENT = rwkv7.RWKV7Config(vocab_size=64, hidden_size=128, num_hidden_layers=2)


@pytest.mark.parametrize("config", [SMALL, RECURRENT], ids=["transformer", "rwkv7"])
def test_every_large_matrix_is_divided(config: ModelConfig) -> None:
    family = families.of(config)
    params = jax.eval_shape(lambda k: family.init(k, config), jax.random.key(0))
    divided = whole = 0
    for keys, x in jax.tree_util.tree_flatten_with_path(params)[0]:
        path = "/".join(k.key for k in keys)
        spec = family.sharding.spec_of(path, x.ndim)
        divided += x.size * (MODEL in spec)
        whole += x.size * (MODEL not in spec)
    # What stays whole are vectors and, of RWKV-7, the thin matrices, which are not thin at this width.
    assert whole < (0.02 if config is SMALL else 0.4) * divided


@pytest.mark.slow
def test_a_case_on_eight_devices_is_what_the_counts_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same reading of a program that is compiled for the devices there are."""
    monkeypatch.setattr(pod_cases, "TOKENS", 8)
    case = pod_cases.Case("small", 32, 4, {"v5e": 2}, pod_cases.of_transformer(SMALL))
    mesh = jax.make_mesh((4, 2), ("population", "model"), axis_types=(AxisType.Auto,) * 2)
    text = case.lower(mesh).compile().as_text()
    module = Module(text, 8)
    counts = work.count(module)
    sums = {k: n for k, n in counts.payload.items() if k == Collective("all-reduce", 4)}
    trained = 2 * (4 * 32 * 32 + 3 * 32 * 64)
    # Each device sums half of the trained matrices, in float32, with three others, and little else.
    assert trained / 2 * 4 <= sum(sums.values()) < 1.1 * trained / 2 * 4
    assert work.count(module, loops=False).operations < counts.operations / 2


TINY = """
import dataclasses, json, sys
from benchmarks import pod, pod_cases
from experiments.models import egg
pod.prepare()
build = pod_cases.integers(egg.CONFIGS["tiny"], tokens=5)
pod.CASES["integer"] = dataclasses.replace(pod.CASES["integer"], population=4096, chunk=8, build=build)
row = pod.compile_case("integer", "v5e:4x4")
print(json.dumps(pod.as_json(row) | {"fits": row.fits}))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'jax[tpu]'"
)
def test_a_small_case_compiles_for_sixteen_chips() -> None:
    """In a process of its own: libtpu reads the environment once."""
    root = Path(pod.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    environment.pop("XLA_FLAGS", None)
    done = subprocess.run(
        [sys.executable, "-c", TINY], cwd=root, env=environment, capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["devices"] == 16 and row["fits"] and row["unknown_loops"] == 0
    # Counted alike with every loop once, of which XLA's own count leaves most of the work out.
    assert row["against_xla"] == pytest.approx(1, abs=0.1) and row["loops"] > 5
    (exchange,) = [x for x in row["collectives"] if x["payload"] > 1000]
    assert exchange["kind"] == "all-reduce" and exchange["group"] == 16
    assert exchange["payload"] >= 4 * egg.CONFIGS["tiny"].parameters
    # A member reads five bytes: two operations for each of its matrices' entries and byte.
    entries = 12 * 32**2 + 32 * 256
    assert row["matmul"]["s8"] >= 4096 / 16 * 5 * 2 * entries


def test_cases_are_of_the_sizes_that_they_say() -> None:
    sizes = {"integer": 2**20, "rl": 2**18, "1b": 8192, "7b": 8192, "rwkv7": 8192}
    assert {name: case.population for name, case in pod_cases.CASES.items()} == sizes
    count = lambda init: sum(
        np.prod(x.shape) for x in jax.tree.leaves(jax.eval_shape(init, jax.random.key(0)))
    )
    seven = transformer.TransformerConfig()
    assert count(lambda k: transformer.init(k, seven)) == pytest.approx(6.74e9, rel=0.01)
    large = rwkv7.RWKV7Config(vocab_size=65536, hidden_size=2048, num_hidden_layers=24)
    assert count(lambda k: rwkv7.init(k, large)) == pytest.approx(1.5e9, rel=0.05)
