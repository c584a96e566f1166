"""The registry of rules: every primitive has a case, and the page in the docs is printed from it."""

import importlib
from collections.abc import Iterator

import jax
import pytest
from jax import Array, lax
from jax.extend import core
from places import DOCS
from support import built, cases, checked_in_float64, data, matrix, run_case

from eggroll.interpret import registry

PAGE = DOCS / "rules.md"
HEAD = """# Rules of the interpreter

What stays low rank under each of JAX's primitives. An operation that is not here, or not in the form that
the table says, has the perturbed matrix built for every member, and is reported with the parameter's path.
"Integers" says whether the rule also holds for int8 parameters in fixed point; without it, the operation
is an error there. `eggroll/interpret/registry.py` prints this table from the rules themselves.

"""


def solved(w: Array, x: Array) -> Array:
    """The solution of ``(w w^T + 9) y = x``."""
    dense = lambda v: w @ (w.T @ v) + 9.0 * v
    iterate = lambda matvec, b: lax.fori_loop(
        0, 40, lambda _, y: (b - matvec(y) + 99.0 * y) / 99.0, b
    )
    return lax.custom_linear_solve(dense, x, iterate, iterate)


# Files with tables of cases: (function, what makes its arguments).
TABLES = (
    "test_rules", "test_interpreter", "test_arithmetic_rules", "test_writes", "test_integer",
    "test_registry",
)  # fmt: skip
# ragged_dot_general, which JAX itself cannot map over members: test_member_loops compares it with loops.
# Primitives of meshes, which test_interpreter and test_meshes run on devices, and names of other
# versions of JAX, which share the rule of a name that has a case.
BEYOND = frozenset(
    "call closed_call core_call checkpoint composite compute_on copy_p custom_partitioning "
    "custom_vjp_call_jaxpr eval_jaxpr linear_call pcast pjit pvary ragged_dot_general remat remat_opt "
    "reshard shard_map sharding_constraint".split()
)


@cases(
    ("precision", lambda w, x: x @ lax.reduce_precision(w, 11, 52), matrix(5, 7), data(3, 5)),
    (
        "unstacked",
        lambda w, x: [x @ v for v in lax.unstack(w)],
        matrix(2, 5, 7, batch=(0,)),
        data(5),
    ),
    ("solved", solved, matrix(5, 5), data(5)),
)
def test_more_primitives(fn, makers):
    with checked_in_float64():
        run_case(fn, makers)


def table_cases() -> Iterator[tuple]:
    for module in map(importlib.import_module, TABLES):
        for name, test in vars(module).items():
            # Cases of one function of two makers are given their values by the test.
            if name.startswith("test") and name != "test_two_narrow_parameters_meet_in_float32":
                for mark in getattr(test, "pytestmark", []):
                    if mark.name == "parametrize" and mark.args[0] == ("fn", "makers"):
                        yield from (case.values for case in mark.args[1])


def primitives(jaxpr: core.Jaxpr) -> Iterator[str]:
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        for param in jax.tree.leaves(
            list(eqn.params.values()),
            is_leaf=lambda x: isinstance(x, core.Jaxpr | core.ClosedJaxpr),
        ):
            if isinstance(param, core.Jaxpr | core.ClosedJaxpr):
                yield from primitives(getattr(param, "jaxpr", param))


def test_every_primitive_has_a_case_in_a_table():
    met: set[str] = set()
    with jax.enable_x64(True):
        for fn, makers in table_cases():
            args = [built(make()) for make in makers]
            met |= set(primitives(jax.make_jaxpr(fn)(*args).jaxpr))
    ruled = {name for name, entry in registry.entries().items() if entry.rule is not None}
    assert ruled - BEYOND - met == set()


def test_a_primitive_has_one_rule():
    with pytest.raises(ValueError, match="'transpose' has a rule already"):
        registry.rule("transpose", keeps="all")(lambda ctx, eqn, value: value)


def test_the_page_of_rules_is_current():
    assert PAGE.read_text() == HEAD + registry.markdown(), (
        "docs/rules.md is not what the registry prints; "
        "cd tests/eggroll/interpret; PYTHONPATH=../../helpers:../integer python -c 'import test_registry; test_registry.write_page()'"
    )


def write_page() -> None:
    """Writes docs/rules.md anew."""
    PAGE.write_text(HEAD + registry.markdown())
