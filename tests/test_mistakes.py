"""Mistakes are told in words: the argument, what it got, what was expected, and the way out.

`python tests/test_mistakes.py` prints all of them with their messages.
"""

import pathlib
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mistakes_data import CLASSES, EXAMPLES, INPUTS, STATES
from mistakes_kronecker import KRONECKER
from mistakes_operators import CAPABILITIES, OPERATORS, WEIGHTS
from mistakes_solvers import BLOCKS, SOLVERS
from small_classifier import BATCH, GGN, INFLUENCE, OBJECTIVE, PARAMS

import influence_jax as ij

PACKAGE = pathlib.Path(ij.__file__).parent

# (id, call, error, words the message must hold)
MISTAKES = [*KRONECKER, *INPUTS, *STATES, *CLASSES, *SOLVERS, *OPERATORS, *EXAMPLES, *WEIGHTS, *BLOCKS, *CAPABILITIES]


@pytest.mark.parametrize(("call", "error", "words"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_mistake(call, error, words):
    with pytest.raises(error) as caught:
        call()
    message = said(caught.value)
    for word in words:
        assert word in message
    if noted(caught.value):  # the exception of somebody's own function, with its class and its traceback
        return
    assert type(caught.value).__module__ in ("builtins", "influence_jax.curvature.capabilities")
    last = traceback.extract_tb(caught.value.__traceback__)[-1]
    assert PACKAGE in pathlib.Path(last.filename).parents, f"the traceback ends in {last.filename}"


def noted(error: Exception) -> list[str]:
    """Return what the library added to an exception that it did not raise; jax adds a note of its own."""
    return [note for note in getattr(error, "__notes__", ()) if not note.startswith("-----")]


def said(error: Exception) -> str:
    """Return what a reader sees of an exception, its notes included."""
    return "\n".join([str(error), *noted(error)])


def test_an_exception_has_one_note():
    """However many functions of the library it comes through."""
    name, call, error, _ = next(mistake for mistake in CLASSES if mistake[0].endswith("another objective"))
    with pytest.raises(error) as caught:
        call()
    assert len(noted(caught.value)) == 1, name


def test_float64_with_x64_off(float32):
    with pytest.raises(TypeError, match=r"params: leaf 'w' is float64 but 64-bit mode is off.*enable_x64"):
        ij.Identity({"w": np.ones(2)})
    with pytest.raises(TypeError, match=r"data: leaf 'x' is float64 but 64-bit mode is off.*astype"):
        ij.Hessian(OBJECTIVE, {"w": np.ones(2, np.float32)}, ij.Batch(np.ones((3, 2)), np.ones(3, np.int64)))


def test_checks_do_not_get_in_the_way_of_transformations():
    """Containers are rebuilt by JAX with stacked, traced and placeholder leaves; no check may see those."""
    assert jax.tree.map(lambda x: x.shape, BATCH).x == (9, 5)
    assert jax.vmap(lambda z: OBJECTIVE(PARAMS, z))(BATCH).shape == (9,)
    assert jax.tree.structure(jax.tree.map(lambda _: None, GGN)) is not None
    assert jax.jit(lambda damping: ij.CG(damping).damping * 2)(-1.0) == -2.0
    weights = jnp.ones((2, 9))
    assert jax.vmap(lambda w: ij.trace(ij.GGN(OBJECTIVE, PARAMS, BATCH, weights=w)))(weights).shape == (2,)
    assert len(jax.tree.leaves(jax.eval_shape(lambda op: op, GGN))) == len(jax.tree.leaves(GGN))


@pytest.mark.parametrize("solver", [ij.Direct, ij.CG])
def test_mistakes_are_found_before_any_long_computation(solver, compilations):
    """A bad mode, k or wrt is refused without compiling a solve."""
    influence = ij.Influence(OBJECTIVE, PARAMS, ij.invert(GGN, solver(0.1)))
    with compilations() as names:
        for call in (
            lambda: influence.influences(BATCH, BATCH, "down"),
            lambda: influence.influences(BATCH, BATCH, "perturbation", wrt="y"),
            lambda: influence.top_k(BATCH, BATCH, 100),
        ):
            with pytest.raises((ValueError, TypeError)):
                call()
    assert names == []


def test_reprs_say_what_a_thing_is():
    assert repr(GGN) == "GGN(39 parameters, 9 examples)"
    assert repr(INFLUENCE.inverse) == "Inverse(GGN(39 parameters, 9 examples), Direct(damping=0.1))"
    assert "Objective(mlp, cross_entropy)" in repr(INFLUENCE)
    assert repr(BATCH) == "Batch(float64[9, 5], int64[9])"
    assert repr(ij.CG(ij.RelativeDamping(0.1))).startswith("CG(damping=RelativeDamping(0.1)")


def listed() -> str:
    """Every mistake above and what it is told, for people to read: `python tests/test_mistakes.py`."""
    told = []
    for name, call, error, _ in MISTAKES:
        with pytest.raises(error) as caught:
            call()
        told.append(f"{name}\n    {type(caught.value).__name__}: {said(caught.value)}\n")
    return f"{len(MISTAKES)} mistakes\n\n" + "\n".join(told)


if __name__ == "__main__":
    print(listed())
