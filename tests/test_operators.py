"""Laws of every kind of operator: linear, self-adjoint, one matrix, and what its structure gives in closed form."""

import dataclasses

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import mainly, relative_error, tree_error
from hypothesis import given, settings, strategies as st
from operator_problems import COUNT, problem

import influence_jax as ij
from influence_jax.batching import map_rows
from influence_jax.curvature import Restricted, Scaled, Sum
from influence_jax.curvature.capabilities import settled


def operators(model: str = "classification") -> dict[str, ij.LinearOperator]:
    """Every kind of operator on one space."""
    objective, params, data = problem(model)
    key = jax.random.key(7)
    ggn = ij.GGN(objective, params, data)
    rows = jnp.linalg.qr(helpers.normal(key, (ggn.size, 5)))[0].T
    names = [name for name, _ in ij.tree.named_leaves(params)]
    return {
        "Hessian": ij.Hessian(objective, params, data),
        "GGN": ggn,
        "EmpiricalFisher": ij.EmpiricalFisher(objective, params, data, chunk=4),
        "weighted": ij.GGN(objective, params, data, weights=jnp.arange(1.0, COUNT + 1)),
        "Identity": ij.Identity(params),
        "Diagonal": ij.Diagonal(helpers.random_like(key, params)),
        "LowRank": ij.LowRank(ij.unflatten(rows, params), jnp.array([3.0, 2.0, 1.0, -0.5, 0.1])),
        "Sum": ggn + 0.3 * ij.Identity(params),
        "Scaled": 2.5 * ggn,
        "Inverse": ij.invert(ggn, ij.Direct(0.1)),
        "restricted GGN": ij.restrict(ggn, names[:2]),
        "Restricted": Restricted(ggn, tuple(names[1:3])),
    }


NAMES = ["Hessian", "GGN", "EmpiricalFisher", "weighted", "Identity", "Diagonal", "LowRank", "Sum", "Scaled"]
NAMES += ["Inverse", "restricted GGN", "Restricted"]


@pytest.fixture(scope="module")
def all_operators():
    made = operators()
    assert list(made) == NAMES
    return made


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 99), c=st.floats(-3.0, 3.0), d=st.floats(-3.0, 3.0))
@settings(max_examples=5)
def test_linear_and_self_adjoint(all_operators, name, seed, c, d):
    op = all_operators[name]
    keys = jax.random.split(jax.random.key(seed))
    u, v = (helpers.random_like(k, op.space) for k in keys)
    combined = op.mv(jax.tree.map(lambda a, b: c * a + d * b + a, u, v))
    expected = jax.tree.map(lambda a, b: c * a + d * b + a, op.mv(u), op.mv(v))
    assert tree_error(combined, expected) < 1e-12
    left, right = ij.tree.dot(u, op.mv(v)), ij.tree.dot(op.mv(u), v)
    assert abs(left - right) < 1e-12 * jnp.sqrt(ij.tree.dot(u, u) * ij.tree.dot(op.mv(v), op.mv(v)))


@pytest.mark.parametrize("name", NAMES)
def test_products_equal_dense(all_operators, name):
    """`mv`, `mm`, `to_dense`, `diagonal` and `trace` are one matrix."""
    op = all_operators[name]
    V = helpers.random_like(jax.random.key(2), op.space, rows=6)
    dense = np.asarray(ij.to_dense(op))
    expected = helpers.flat(V, op.space) @ dense
    assert relative_error(helpers.flat(op.mm(V), op.space), expected) < 1e-12
    for row in (0, 5):
        product = op.mv(jax.tree.map(lambda x, row=row: x[row], V))
        assert relative_error(helpers.flat(product, op.space), expected[row]) < 1e-12
    assert relative_error(helpers.flat(ij.diagonal(op), op.space), np.diag(dense)) < 1e-12
    assert abs(float(ij.trace(op)) - np.trace(dense)) < 1e-12 * np.linalg.norm(dense)
    assert op.size == len(dense)


@pytest.mark.parametrize("name", NAMES)
def test_psd_is_true_where_claimed(all_operators, name):
    op = all_operators[name]
    eigenvalues = np.linalg.eigvalsh(np.asarray(ij.to_dense(op)))
    if op.psd:
        assert eigenvalues[0] >= -1e-12 * eigenvalues[-1]
    assert op.psd == (name not in ("Hessian", "Diagonal", "LowRank"))


def test_multiples_that_are_not_psd(all_operators):
    op = all_operators["GGN"]
    assert not (-1.0 * op).psd
    assert all((factor * op).psd for factor in (jnp.array(2.0), np.float32(2.0), 2)), "whatever the factor is made of"
    assert not jax.jit(lambda factor: jnp.array((factor * settled(op)).psd))(2.0), "a traced one has an unknown sign"
    assert not (-op).psd
    assert not (op - op).psd
    assert (op / jnp.array(2.0)).psd
    assert (-1 * -op).psd
    vouched = (-op).assume_psd(), 2.0 * (-op).assume_psd(), dataclasses.replace(op, convex=False).assume_psd()
    assert all(each.psd for each in vouched), "whoever knows more can say so"
    assert (op + op).psd
    kept = jax.jit(lambda op: jnp.array(ij.restrict(2.0 * op, ("layer0/bias",)).psd))
    assert kept(settled(op)), "what has been found out is kept through tracing"
    assert not kept(op), "and nothing can be found out then"
    assert sum([op, op, op]).psd
    assert not (op + -1.0 * op).psd


@pytest.mark.parametrize(
    "name", mainly(["Hessian", "EmpiricalFisher", "Sum", "LowRank", "Inverse"], "Hessian", "Sum", "Inverse")
)
def test_jit_and_vmap_agree_with_plain_calls(all_operators, name):
    op = all_operators[name]
    V = helpers.random_like(jax.random.key(2), op.space, rows=3)
    plain = op.mm(V)
    rows = jax.vmap(op.mv)(V)
    assert tree_error(jax.jit(lambda op, V: op.mm(V))(op, V), plain) < 1e-12
    assert tree_error(rows, plain) < 1e-12
    if name in ("EmpiricalFisher", "LowRank"):
        with jax.disable_jit():
            assert tree_error(op.mv(jax.tree.map(lambda x: x[1], V)), jax.tree.map(lambda x: x[1], plain)) < 1e-12


def test_parameters_called_value_keep_their_name():
    attention = {"query": jnp.ones(2), "value": {"value": jnp.ones(3)}}
    assert [name for name, _ in ij.tree.named_leaves(attention)] == ["query", "value/value"]
    assert ij.restrict(ij.Identity(attention), ("value/value",)).size == 3


@pytest.mark.parametrize("name", ["Identity", "Diagonal", "LowRank"])
@pytest.mark.parametrize("factor", [1.0, -2.0])
def test_spectral_closed_forms(all_operators, name, factor):
    op = all_operators[name] if factor == 1.0 else factor * all_operators[name]
    V = helpers.random_like(jax.random.key(2), op.space, rows=4)
    to_basis, from_basis, values = ij.spectral(op)
    coordinates = to_basis(V)
    assert tree_error(from_basis(coordinates), V) < 1e-12
    scaled = jax.tree.map(lambda c, d: c * jnp.broadcast_to(d, c.shape), coordinates, values)
    assert tree_error(from_basis(scaled), op.mm(V)) < 1e-12


def test_full_rank_spectral_has_no_complement():
    rows = jnp.linalg.qr(helpers.normal(jax.random.key(0), (4, 4)))[0]
    op = ij.LowRank({"w": rows}, jnp.arange(1.0, 5.0))
    assert ij.spectral(op).values.shape == (4,)
    assert relative_error(ij.to_dense(op), rows.T @ jnp.diag(jnp.arange(1.0, 5.0)) @ rows) < 1e-12


def test_restrict_structured():
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    diagonal = ij.Diagonal({"a": jnp.array([1.0, 2.0]), "b": jnp.arange(3.0)})
    assert ij.to_dense(ij.restrict(diagonal, ("b",))).tolist() == jnp.diag(jnp.arange(3.0)).tolist()
    low_rank = ij.LowRank(ij.unflatten(jnp.eye(5)[:2], params), jnp.array([2.0, 3.0]))
    assert ij.to_dense(ij.restrict(low_rank, ("a",))).tolist() == [[2.0, 0.0], [0.0, 3.0]]
    assert isinstance(ij.restrict(diagonal + 2.0 * low_rank, ("a",)), Sum)
    assert isinstance(ij.restrict(2.0 * low_rank, ("a",)), Scaled)


def test_hutchinson_trace_is_within_its_standard_error(all_operators, monkeypatch):
    """Rademacher probes: the variance of one is 2 (||A||_F^2 - sum of squared diagonal)."""
    monkeypatch.setattr("influence_jax.curvature.capabilities.EXACT_TRACE_SIZE", 10)
    op = all_operators["Hessian"]
    dense = np.asarray(ij.to_dense(op))
    deviation = jnp.sqrt(2 * (jnp.sum(dense**2) - jnp.sum(jnp.diag(dense) ** 2)) / 64)
    estimate = ij.trace(op, key=jax.random.key(0))
    assert 0 < abs(estimate - jnp.trace(dense)) < 4 * deviation
    with pytest.raises(ValueError, match=r"key: None.*estimated"):
        ij.trace(op)


class TestBilinearForm:
    """Three products, with the operator on the smaller side; pyDVL applies it to the larger one."""

    @pytest.mark.parametrize(("left", "right"), [(2, 7), (7, 2), (3, None)])
    def test_inner_products(self, all_operators, left, right, monkeypatch):
        op = all_operators["Hessian"]
        dense, key = np.asarray(ij.to_dense(op)), jax.random.key(8)
        U = helpers.random_like(key, op.space, rows=left)
        V = None if right is None else helpers.random_like(jax.random.fold_in(key, 1), op.space, rows=right)
        applied = []
        monkeypatch.setattr(type(op), "mm", lambda self, W: applied.append(len(W["layer0"]["bias"])) or _mm(self, W))
        form = op.as_bilinear_form()
        expected = helpers.flat(U, op.space) @ dense @ helpers.flat(U if V is None else V, op.space).T
        assert relative_error(form.inner_prod(U, V), expected) < 1e-12
        assert applied == [min(left, right or left)]

    def test_further_axes_on_the_right(self, all_operators):
        op = all_operators["GGN"]
        U = helpers.random_like(jax.random.key(8), op.space, rows=2)
        rows = helpers.random_like(jax.random.key(9), op.space, rows=3 * 4 * 5)
        V = jax.tree.map(lambda x: x.reshape((3, 4, 5, *x.shape[1:])), rows)
        flat = op.as_bilinear_form().inner_prod(U, rows)
        assert relative_error(op.as_bilinear_form().inner_prod(U, V), flat.reshape(2, 3, 4, 5)) < 1e-12
        with pytest.raises(ValueError, match="right: leaf 'layer0/kernel'"):
            op.as_bilinear_form().inner_prod(U, {**V, "layer0": {**V["layer0"], "kernel": jnp.ones((3, 4))}})

    def test_of_gradients_and_mixed_derivatives(self):
        objective, params, data = problem("classification", 6)
        op = ij.invert(ij.GGN(objective, params, data), ij.Direct(0.1))
        form, few = op.as_bilinear_form(), jax.tree.map(lambda x: x[:2], data)
        influence = ij.Influence(objective, params, op)
        given = {"objective": objective, "params": params}
        assert relative_error(form.grads_inner_prod(few, data, **given), influence.influences(few, data)) < 1e-12
        assert relative_error(form.grads_inner_prod(few, **given), influence.influences(few, few)) < 1e-12
        expected = influence.influences(few, data, "perturbation")
        assert relative_error(form.mixed_grads_inner_prod(few, data, **given), expected) < 1e-12
        mixed = form.inner_prod(ij.per_example_grads(objective, params, few), ij.mixed_grads(objective, params, data))
        assert relative_error(mixed, expected) < 1e-12


_mm = ij.LinearOperator.mm


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 6, 7, 8, 11])
def test_rows_of_any_number(rows):
    """A last chunk that ends with the last row has rows of the one before again: each is there once, in order."""
    stack = {"a": jnp.arange(2.0 * rows).reshape(rows, 2), "e": jnp.zeros((rows, 0))}
    for chunk in (1, 2, 4, 20):
        got = map_rows(lambda row: jax.tree.map(lambda x: 3 * x, row), stack, chunk)
        assert np.array_equal(got["a"], 3 * stack["a"])
        assert got["e"].shape == (rows, 0)
