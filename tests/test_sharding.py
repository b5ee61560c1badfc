"""Several devices: every result is that of one device and laid out as arguments are."""

import functools
from functools import partial

import helpers
import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest
from helpers import mainly, relative_error, tree_error
from meshes import ALL, AUTO, EXPLICIT, MESHES, SOME, laid_out_alike, on, problem, split_of

import influence_jax as ij

mesh = meshes.mesh  # the fixture


def sequence_model(params, example):
    """Windows of three positions, then a recurrence."""
    wide = jnp.pad(example.x, ((1, 1), (0, 0)))
    x = sum(wide[k : k + example.x.shape[0]] @ params["conv"][k] for k in range(3))
    step = lambda h, row: (jnp.tanh(row @ params["in"] + h @ params["back"]), None)
    return jax.lax.scan(step, jnp.zeros_like(params["back"][0]), jnp.tanh(x))[0] @ params["head"]


SEQUENCES = ij.Objective(sequence_model, helpers.cross_entropy)


def sequences(count):
    keys = jax.random.split(jax.random.key(5), 6)
    shapes = (("conv", (3, 3, 4)), ("in", (4, 8)), ("back", (8, 8)), ("head", (8, 4)))
    params = {name: 0.4 * jax.random.normal(keys[i], shape) for i, (name, shape) in enumerate(shapes)}
    return params, ij.Batch(jax.random.normal(keys[4], (count, 5, 3)), jax.random.randint(keys[5], (count,), 0, 4))


# With draws of its own: those by way of the loss Hessian's square root hang on rounding of its zero eigenvalue.
CLASSES = ij.Objective(helpers.mlp, helpers.cross_entropy, sample=ij.softmax_labels("y"))

OPERATORS = {
    "hessian": ij.Hessian,
    "ggn": ij.GGN,
    "empirical fisher": ij.EmpiricalFisher,
    "fisher": partial(ij.Fisher, key=jax.random.key(3)),
}


class TestProducts:
    @on(("split params", EXPLICIT), thorough=SOME)
    @pytest.mark.parametrize("kind", mainly(OPERATORS, "ggn", "fisher"))
    def test_are_those_of_one_device(self, mesh, kind, float32):
        params, data = problem(96)
        v, V = (helpers.random_like(jax.random.key(2), params, rows) for rows in (None, 3))
        one = OPERATORS[kind](CLASSES, params, data, chunk=32)
        many = OPERATORS[kind](CLASSES, mesh.params(params), mesh.split(data), chunk=32)
        product, products = many.mv(v), many.mm(V)
        assert tree_error(product, one.mv(v)) < 1e-6
        assert tree_error(products, one.mm(V)) < 1e-6
        assert laid_out_alike(product, many.params)
        assert laid_out_alike(products, many.params, lead=(None,))

    @on(("split params", EXPLICIT), thorough=ALL)
    def test_of_convolutions_and_recurrences(self, mesh, float32):
        params, data = sequences(64)
        v = helpers.random_like(jax.random.key(2), params)
        many = ij.GGN(SEQUENCES, mesh.params(params), mesh.split(data), chunk=32)
        assert tree_error(many.mv(v), ij.GGN(SEQUENCES, params, data).mv(v)) < 1e-6
        assert laid_out_alike(many.mv(v), many.params)

    @on(("data", AUTO), thorough=[("data", EXPLICIT)])
    def test_of_parameters_that_are_on_no_mesh(self, mesh, float32):
        params, data = problem(64)
        many = ij.GGN(helpers.CLASSIFICATION, params, mesh.split(data))
        assert tree_error(many.mv(params), ij.GGN(helpers.CLASSIFICATION, params, data).mv(params)) < 1e-6

    @on(("split params", EXPLICIT), thorough=[("split params", AUTO)])
    def test_of_blocks_minibatches_and_diagonals(self, mesh, float32):
        params, data = problem(64)
        one = ij.GGN(helpers.CLASSIFICATION, params, data, chunk=16)
        many = ij.GGN(helpers.CLASSIFICATION, mesh.params(params), mesh.split(data), chunk=16)
        names = ("layer0/bias", "layer0/kernel")
        part = ij.restrict(many, names)
        v = {name: params["layer0"][name.split("/")[1]] for name in names}
        assert tree_error(part.mv(v), ij.restrict(one, names).mv(v)) < 1e-6
        assert laid_out_alike(part.mv(v), part.params)
        few = jnp.array([3, 60, 9, 9])
        assert tree_error(ij.minibatch(many, few).mv(params), ij.minibatch(one, few).mv(params)) < 1e-6
        assert tree_error(ij.diagonal(many), ij.diagonal(one)) < 2e-6
        assert relative_error(ij.to_dense(many), ij.to_dense(one)) < 1e-6
        assert relative_error(ij.trace(many), ij.trace(one)) < 1e-6

    @on(("data", AUTO), thorough=[("data", EXPLICIT)])
    def test_with_dead_weights_of_padding(self, mesh, float32):
        params, data = problem(1003)
        padded, weights = ij.sharding.shard_batch(data, mesh.mesh)
        many = ij.GGN(helpers.CLASSIFICATION, mesh.all(params), padded, weights=weights, chunk=100)
        assert tree_error(many.mv(params), ij.GGN(helpers.CLASSIFICATION, params, data).mv(params)) < 1e-6


KEY = jax.random.key(4)
TIGHT = {"rtol": 1e-11}
SOLVERS = {
    "cg": (ij.GGN, ij.CG(0.1, **TIGHT)),
    "preconditioned": (ij.GGN, ij.CG(0.1, preconditioner=ij.Nystrom(0.1, 8), **TIGHT)),
    "block cg": (ij.GGN, ij.BlockCG(0.1, **TIGHT)),
    "direct": (ij.GGN, ij.Direct(0.1)),
    "indefinite": (ij.Hessian, ij.Direct(1.0)),
    "lissa": (ij.GGN, ij.LiSSA(1.0, depth=30, rtol=0.5)),
    "minibatches": (ij.GGN, ij.LiSSA(1.0, scale=5.0, depth=20, batch_size=16, rtol=0.9)),
    "arnoldi": (ij.GGN, ij.Arnoldi(0.1, 4, steps=8)),
    "nystrom": (ij.GGN, ij.Nystrom(0.1, 8)),
    "harmonic mean": (ij.EmpiricalFisher, ij.HarmonicMean(0.1)),
    "sample space": (ij.EmpiricalFisher, ij.SampleSpace(0.1)),
    "sample space, outputs": (ij.GGN, ij.SampleSpace(0.1)),
    "blockwise": (ij.GGN, ij.Blockwise(ij.BlockCG(ij.RelativeDamping(0.5), **TIGHT))),
    "ekfac": (ij.ekfac, ij.Direct(ij.RelativeDamping(0.1))),
}


@functools.cache
def solved_on_one_device(name):
    curvature, solver = SOLVERS[name]
    params, data = problem(64)
    v = helpers.random_like(jax.random.key(2), params, 2)
    return ij.invert(curvature(helpers.CLASSIFICATION, params, data, chunk=32), solver, key=KEY).solve_many(v)


class TestInverses:
    """In 64-bit mode, where what differs is not rounding."""

    @pytest.mark.parametrize("name", mainly(SOLVERS, "block cg", "direct", "sample space"))
    @on(("split params", EXPLICIT))
    def test_are_those_of_one_device(self, mesh, name):
        self.compare(mesh, name)

    @pytest.mark.parametrize("name", mainly(["block cg", "direct", "sample space", "ekfac"], "ekfac"))
    @on(("data", AUTO), thorough=[("both axes", EXPLICIT)])
    def test_whatever_the_mesh(self, mesh, name):
        self.compare(mesh, name)

    def compare(self, mesh, name):
        curvature, solver = SOLVERS[name]
        params, data = problem(64)
        v = helpers.random_like(jax.random.key(2), params, 2)
        many = curvature(helpers.CLASSIFICATION, mesh.params(params), mesh.split(data), chunk=32)
        solved, info = ij.invert(many, solver, key=KEY).solve_many(v)
        expected, expected_info = solved_on_one_device(name)
        assert tree_error(solved, expected) < 1e-8
        assert np.array_equal(info.converged, expected_info.converged)

    @on(("split params", EXPLICIT), thorough=[("split params", AUTO)])
    def test_solutions_stay_split(self, mesh, float32):
        params, data = problem(64)
        many = ij.GGN(helpers.CLASSIFICATION, mesh.params(params), mesh.split(data))
        v = jax.tree.map(jnp.ones_like, many.params)
        assert laid_out_alike(ij.invert(many, ij.CG(0.1)).solve(v)[0], many.params)
        pairs = ij.invert(many, ij.Arnoldi(0.1, 4, steps=8), key=KEY).fit.pairs
        assert laid_out_alike(pairs.basis, many.params, lead=(None,))


class TestScores:
    def influence(self, params, data):
        inverse = ij.invert(ij.ekfac(helpers.CLASSIFICATION, params, data), ij.Direct(0.1))
        return ij.Influence(helpers.CLASSIFICATION, params, inverse, chunk=32)

    @on(("data", AUTO), thorough=[("split params", EXPLICIT)])
    def test_are_those_of_one_device(self, mesh):
        params, data = problem(64)
        query = jax.tree.map(lambda x: x[:5], problem(8, 3)[1])
        one, many = self.influence(params, data), self.influence(mesh.params(params), mesh.split(data))
        train, asked = mesh.split(data), mesh.all(query)
        got = many.influences(asked, train)
        assert relative_error(got, one.influences(query, data)) < 1e-11
        assert split_of(got) == (None, "data")
        two = jax.tree.map(lambda x: x[:2], query)
        assert relative_error(many.influences(mesh.all(two), train), one.influences(two, data)) < 1e-11
        assert relative_error(many.influences(train, asked), one.influences(data, query)) < 1e-11
        got = many.influences(asked, train, "perturbation")
        assert relative_error(got, one.influences(query, data, "perturbation")) < 1e-11
        got = many.self_influences(train)
        assert relative_error(got, one.self_influences(data)) < 1e-11
        assert split_of(got) == ("data",)
        top, expected = many.top_k(asked, train, 3), one.top_k(query, data, 3)
        assert relative_error(top.values, expected.values) < 1e-11
        assert np.array_equal(top.indices, expected.indices)
        parts, expected = many.influences_by_block(asked, train), one.influences_by_block(query, data)
        assert all(relative_error(parts[name], expected[name]) < 1e-11 for name in expected)

    @on(("data", AUTO), thorough=[("split params", EXPLICIT)])
    def test_bounds_and_forms(self, mesh):
        params, data = problem(64)
        query = jax.tree.map(lambda x: x[:4], data)
        make = lambda p, d: ij.GGN(helpers.CLASSIFICATION, p, d)
        one, many = make(params, data), make(mesh.params(params), mesh.split(data))
        bounds = [
            ij.score_bounds(ij.Influence(op.objective, op.params, ij.invert(op, ij.CG(1.0, rtol=1e-3))), query, op.data)
            for op in (one, many)
        ]
        assert relative_error(bounds[1][0], bounds[0][0]) < 1e-11
        assert relative_error(bounds[1][1], bounds[0][1]) < 1e-8
        forms = [
            op.as_bilinear_form().grads_inner_prod(query, op.data, objective=op.objective, params=op.params)
            for op in (one, many)
        ]
        assert relative_error(forms[1], forms[0]) < 1e-11
        rows = ij.per_example_grads(many.objective, many.params, many.data)
        flat = ij.flatten(rows, many.params)
        assert relative_error(flat, ij.flatten(ij.per_example_grads(one.objective, params, data), params)) < 1e-11

    @on(("data", EXPLICIT))
    def test_of_the_facade(self, mesh, float32):
        params, data = problem(64)
        query = jax.tree.map(lambda x: x[:4], data)
        model = ij.InfluenceFunctionModel(helpers.CLASSIFICATION, params, solver=ij.Direct(0.1))
        many = ij.InfluenceFunctionModel(helpers.CLASSIFICATION, mesh.all(params), solver=ij.Direct(0.1))
        got = many.fit(mesh.split(data)).influences(query, mesh.split(data))
        assert relative_error(got, model.fit(data).influences(query, data)) < 1e-5


class TestContexts:
    """Whatever mesh is in force, and inside of what a user compiles."""

    @on(("split params", EXPLICIT), thorough=[("split params", AUTO)])
    def test_inside_of_jit_and_grad(self, mesh, float32):
        params, data = problem(64)
        v = helpers.random_like(jax.random.key(2), params)

        def entry(damping, params, data, v):
            inverse = ij.invert(ij.GGN(helpers.CLASSIFICATION, params, data, chunk=16), ij.CG(damping, rtol=1e-7))
            return jnp.sum(inverse.mv(v)["layer0"]["bias"])

        run = jax.jit(jax.value_and_grad(entry))
        expected, got = run(0.5, params, data, v), run(0.5, mesh.params(params), mesh.split(data), mesh.params(v))
        assert relative_error(jnp.stack(got), jnp.stack(expected)) < 2e-6

    @on(("data", EXPLICIT), thorough=[("data", AUTO)])
    @pytest.mark.parametrize("context", [AUTO, EXPLICIT])
    def test_with_a_mesh_in_force(self, mesh, context, float32):
        params, data = problem(64)
        expected = ij.GGN(helpers.CLASSIFICATION, params, data).mv(params)
        with jax.set_mesh(MESHES["data"](context).mesh):
            op = ij.GGN(helpers.CLASSIFICATION, mesh.params(params), mesh.split(data))
            assert tree_error(op.mv(op.params), expected) < 1e-6

    def test_axes_of_both_types(self, float32):
        params, data = problem(64)
        auto, explicit = MESHES["data"](AUTO), MESHES["data"](EXPLICIT)
        expected = ij.GGN(helpers.CLASSIFICATION, params, data).mv(params)
        op = ij.GGN(helpers.CLASSIFICATION, auto.params(params), explicit.split(data))
        assert tree_error(op.mv(params), expected) < 1e-6

    def test_two_meshes_are_refused(self):
        params, data = problem(64)
        one, other = MESHES["data"](EXPLICIT), MESHES["split params"](EXPLICIT)
        op = ij.GGN(helpers.CLASSIFICATION, other.params(params), one.split(data))
        with pytest.raises(ValueError, match=r"meshes \(data=2, model=4\) and \(data=8, model=1\), expected one"):
            op.mv(params)
