"""Damping in all its forms, for every solver; and what an inverse holds beyond its operator."""

import warnings
from collections import OrderedDict

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import flat, mainly, relative_error

import influence_jax as ij

KEY = jax.random.key(5)
PARAMS = helpers.random_mlp(jax.random.key(0), (5, 4, 3))
DATA = helpers.random_batch(jax.random.key(1), 17, 5, 3, classes=True)
OBJECTIVE = helpers.CLASSIFICATION
GGN, EMPIRICAL = ij.GGN(OBJECTIVE, PARAMS, DATA), ij.EmpiricalFisher(OBJECTIVE, PARAMS, DATA)
KRONECKER = ij.ekfac(OBJECTIVE, PARAMS, DATA)
SIZE = GGN.size
V = helpers.random_like(jax.random.key(2), jax.tree.map(lambda leaf: jnp.zeros((3, *leaf.shape)), PARAMS))
BY_LAYER = {"layer0": 0.3, "layer1": 0.05}
# What is asked for, and what that is of every leaf.
FORMS = {
    "number": (0.1, jax.tree.map(lambda _: 0.1, PARAMS)),
    "dict by block": (BY_LAYER, {name: jax.tree.map(lambda _, x=x: x, PARAMS[name]) for name, x in BY_LAYER.items()}),
    "tree": ({"layer0": {"bias": 0.02, "kernel": 0.3}, "layer1": {"bias": 0.2, "kernel": 0.05}},) * 2,
}
EXACT = {
    "Direct": ij.Direct,
    "Eigh": ij.Eigh,
    "CG": lambda damping: ij.CG(damping, rtol=1e-11),
    "BlockCG": lambda damping: ij.BlockCG(damping, rtol=1e-11),
    "preconditioned": lambda damping: ij.CG(damping, rtol=1e-11, preconditioner=ij.Nystrom(damping, rank=6)),
    "LiSSA": lambda damping: ij.LiSSA(damping, rtol=1e-11, depth=20_000),
    "Arnoldi": lambda damping: ij.Arnoldi(damping, rank=SIZE),
    "Nystrom": lambda damping: ij.Nystrom(damping, rank=SIZE),
    "SampleSpace": ij.SampleSpace,
}
OPERATORS = {"GGN": GGN, "EmpiricalFisher": EMPIRICAL, "Kronecker": KRONECKER}


def dense_solution(op, of_leaf, V):
    """Of the damped operator, by numpy."""
    damping = flat(jax.tree.map(lambda d, leaf: np.full(leaf.shape, d), of_leaf, PARAMS), PARAMS)
    return np.linalg.solve(np.asarray(ij.to_dense(op)) + np.diag(damping), flat(V, PARAMS).T).T


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", mainly(EXACT, "Direct", "BlockCG", "Arnoldi", "SampleSpace"))
def test_every_solver_takes_every_form(name, form):
    asked, of_leaf = FORMS[form]
    inverse = ij.invert(EMPIRICAL, EXACT[name](asked), key=KEY)
    X, info = inverse.solve_many(V)
    assert relative_error(flat(X, PARAMS), dense_solution(EMPIRICAL, of_leaf, V)) < 1e-8
    assert info.converged.all()
    asked, of_leaf = FORMS["tree" if form == "number" else "number"]
    moved = inverse.with_damping(asked)
    assert relative_error(flat(moved.mm(V), PARAMS), dense_solution(EMPIRICAL, of_leaf, V)) < 1e-8


@pytest.mark.parametrize("form", ["dict by block", "tree"])
@pytest.mark.parametrize("operator", ["GGN", "Kronecker"])
def test_exact_solvers_of_other_operators(operator, form):
    """A closed form takes one number for each of its blocks; a finer damping needs the matrix."""
    op, (asked, of_leaf) = OPERATORS[operator], FORMS[form]
    for solver in (ij.Direct, ij.Eigh):
        inverse = ij.invert(op, solver(asked))
        assert relative_error(flat(inverse.mm(V), PARAMS), dense_solution(op, of_leaf, V)) < 1e-9
        assert (inverse.fit == ()) == (operator == "Kronecker" and form == "dict by block")


def test_within_the_eigenpairs_alone():
    """The inverse of what the damped operator is on the space of the eigenpairs."""
    asked, of_leaf = FORMS["tree"]
    inverse = ij.invert(EMPIRICAL, ij.Arnoldi(asked, rank=4, complement=False), key=KEY)
    Q, values = map(np.asarray, (inverse.fit.pairs.basis, inverse.fit.pairs.values))
    damping = flat(jax.tree.map(lambda d, leaf: np.full(leaf.shape, d), of_leaf, PARAMS), PARAMS)
    inner = np.diag(values) + Q * damping @ Q.T
    assert relative_error(flat(inverse.mm(V), PARAMS), (Q.T @ np.linalg.solve(inner, Q @ flat(V, PARAMS).T)).T) < 1e-10


def test_the_harmonic_mean():
    asked, of_leaf = FORMS["tree"]
    got = ij.invert(EMPIRICAL, ij.HarmonicMean(asked)).mm(V)
    damping = flat(jax.tree.map(lambda d, leaf: np.full(leaf.shape, d), of_leaf, PARAMS), PARAMS)
    grads = flat(ij.per_example_grads(OBJECTIVE, PARAMS, DATA), PARAMS)
    each = [np.linalg.solve(np.diag(damping) + np.outer(g, g), flat(V, PARAMS).T).T for g in grads]
    assert relative_error(flat(got, PARAMS), np.mean(each, axis=0)) < 1e-10


def test_the_diagonal():
    asked, of_leaf = FORMS["tree"]
    got = ij.invert(EMPIRICAL, ij.Jacobi(asked)).mm(V)
    entries = jax.tree.map(lambda d, leaf: d + leaf, of_leaf, ij.diagonal(EMPIRICAL))
    assert relative_error(flat(got, PARAMS), flat(V, PARAMS) / flat(entries, PARAMS)) < 1e-12


class TestRelative:
    def test_in_part(self):
        """Of the block's own mean eigenvalue, beside numbers."""
        inverse = ij.invert(EMPIRICAL, ij.BlockCG({"layer0": 0.3, "layer1": ij.RelativeDamping(0.5)}))
        block = np.asarray(ij.to_dense(ij.restrict(EMPIRICAL, ("layer1/bias", "layer1/kernel"))))
        assert relative_error(inverse.damping.values["layer1"], 0.5 * np.trace(block) / len(block)) < 1e-12
        assert inverse.damping.values["layer0"] == 0.3
        assert repr(inverse.damping).startswith("BlockDamping(layer0=0.3, layer1=0.")

    def test_iterative_solvers_take_those_of_blocks(self):
        """Of every block of the operator: what the closed form does."""
        relative = ij.RelativeDamping(0.1)
        exact = ij.invert(KRONECKER, ij.Direct(relative))
        assert (
            relative_error(
                flat(ij.invert(KRONECKER, ij.BlockCG(relative, rtol=1e-12)).mm(V), PARAMS), flat(exact.mm(V), PARAMS)
            )
            < 1e-9
        )

    def test_of_a_preconditioner_that_has_none(self):
        op = ij.Diagonal({"w": jnp.array([1.0, -1.0])})
        with pytest.raises(ValueError, match="mean eigenvalue, which is not positive"):
            ij.invert(op, ij.CG(2.0, preconditioner=ij.Jacobi(ij.RelativeDamping(0.1))))


class TestTwoReadings:
    def test_a_name_of_a_block_and_of_a_leaf(self):
        """`by_kind` calls one leaf what the tree calls another: refused, for either could be meant."""

        class Crossed(ij.LinearOperator):
            space = property(lambda self: {"a": jnp.ones(2), "b": jnp.ones(1)})
            mv = lambda self, v: v

        @ij.diagonal_blocks.register
        def _(op: Crossed):
            return OrderedDict({"b": ("a",), "a": ("b",)})

        with pytest.raises(ValueError, match=r"damping: .*\['a', 'b'\], which are both names of blocks and parts"):
            ij.invert(Crossed(), ij.CG({"a": 1.0, "b": 2.0}))

    @pytest.mark.parametrize("asked", [{"layer0": 0.1}, {"layer0": 0.1, "layer1": 0.2, "layer2": 0.1}, [0.1, 0.2]])
    def test_of_other_parameters(self, asked):
        with pytest.raises(ValueError, match="which has to cover every leaf once"):
            ij.invert(GGN, ij.CG(asked))

    @pytest.mark.parametrize("asked", [{}, {"layer0": "0.1", "layer1": 0.1}, {"layer0": None, "layer1": 0.1}])
    def test_no_numbers(self, asked):
        with pytest.raises(TypeError, match=r"damping: got .* a dict or tree of these"):
            ij.CG(asked)


@pytest.mark.parametrize("form", ["dict by block", "tree"])
def test_derivatives_in_a_damping_for_each_block(form):
    asked, of_leaf = FORMS[form]
    inverse = ij.invert(EMPIRICAL, ij.BlockCG(asked, rtol=1e-12))
    v = jax.tree.map(lambda x: x[0], V)
    quadratic = lambda asked: ij.tree.dot(v, inverse.with_damping(asked).mv(v))
    grads = jax.grad(quadratic)(asked)
    x = dense_solution(EMPIRICAL, of_leaf, jax.tree.map(lambda leaf: leaf[None], v))[0]
    x = ij.unflatten(x, PARAMS)
    for name in ("layer0", "layer1"):
        squares = jax.tree.map(lambda leaf: -jnp.sum(leaf**2), x[name])
        expected = sum(jax.tree.leaves(squares)) if form == "dict by block" else squares
        assert relative_error(jax.tree.leaves(grads[name]), jax.tree.leaves(expected)) < 1e-8


@pytest.mark.parametrize("solver", mainly([ij.Direct, ij.Eigh, ij.CG, ij.BlockCG, ij.SampleSpace], ij.Direct, ij.CG))
def test_derivatives_in_the_damping_of_one_block(solver):
    """The others' right-hand sides are known to be zero, which is no reason to stop."""
    v = jax.tree.map(lambda x: x[0], V)
    fn = lambda x: ij.tree.dot(v, ij.invert(EMPIRICAL, solver({"layer0": x, "layer1": 0.05})).mv(v))
    difference = (fn(0.3 + 1e-3) - fn(0.3 - 1e-3)) / 2e-3
    assert relative_error(jax.grad(fn)(0.3), difference) < 1e-3


class TestBlockwise:
    """A tree of the whole is shared out; what is for a block is the block's."""

    def dense(self, of_leaf):
        parts = []
        for name in ("layer0", "layer1"):
            block = np.asarray(ij.to_dense(ij.restrict(EMPIRICAL, (f"{name}/bias", f"{name}/kernel"))))
            ones = {leaf: np.full(PARAMS[name][leaf].shape, of_leaf[name][leaf]) for leaf in ("bias", "kernel")}
            rhs = flat(V[name], PARAMS[name])
            parts.append(np.linalg.solve(block + np.diag(flat(ones, PARAMS[name])), rhs.T).T)
        return np.concatenate(parts, axis=1)

    @pytest.mark.parametrize("solver", mainly([ij.Direct, ij.BlockCG], ij.BlockCG))
    def test_takes_every_form(self, solver):
        for asked, of_leaf in FORMS.values():
            inverse = ij.invert(EMPIRICAL, ij.Blockwise(solver(asked)))
            assert relative_error(flat(inverse.mm(V), PARAMS), self.dense(of_leaf)) < 1e-4
            moved = ij.invert(EMPIRICAL, ij.Blockwise(solver(1.0))).with_damping(asked)
            assert relative_error(flat(moved.mm(V), PARAMS), self.dense(of_leaf)) < 1e-4

    def test_names_that_collide(self):
        op = ij.Identity({"l1": {"b": jnp.ones(1), "w": jnp.ones(2)}, "l2": jnp.ones(3)})
        solvers = {"g": ij.CG({"l1/w": 1.0, "l1/b": 2.0}), "g/l1/w": ij.CG(9.0)}
        with pytest.raises(ValueError, match="'g/l1/w' is both a block and a part of another"):
            ij.invert(op, ij.Blockwise(solvers, blocks={"g": ["l1"], "g/l1/w": ["l2"]}))

    def test_a_part_across_blocks(self):
        with pytest.raises(ValueError, match="one for each part of the parameters within a block"):
            ij.invert(EMPIRICAL, ij.Blockwise(ij.CG({"layer0": 0.1, "layer1": 0.1}), ij.by_parameter))


def test_leaves_without_entries():
    """They take no part, in stacks of any length, and have no mean."""
    loss = lambda p, z: (z["x"] @ p["a"] + jnp.sum(p["e"]) - z["y"]) ** 2
    rng = np.random.default_rng(0)
    data, params = {"x": rng.normal(size=(6, 3)), "y": rng.normal(size=6)}, {"a": jnp.ones(3), "e": jnp.zeros((0, 4))}
    op, scores = ij.EmpiricalFisher(loss, params, data), []
    for solver in (ij.CG(0.5, rtol=1e-10), ij.SampleSpace(0.5), ij.Nystrom(0.5, rank=3)):
        influence = ij.Influence(loss, params, ij.invert(op, solver, key=KEY))
        scores.append(influence.influences(data, data))
    assert all(relative_error(each, scores[0]) < 1e-8 for each in scores)
    relative = ij.invert(op, ij.CG({"a": ij.RelativeDamping(0.1), "e": ij.RelativeDamping(0.1)}))
    assert np.isfinite(list(relative.damping.values.values())).all()


@jax.tree_util.register_pytree_node_class
class Held:
    """Parameters in a container that does not say when it is equal to another."""

    def __init__(self, *parts):
        self.parts = parts

    def tree_flatten(self):
        return self.parts, None

    @classmethod
    def tree_unflatten(cls, _, parts):
        return cls(*parts)


@pytest.mark.parametrize("dtypes", [(jnp.float64, jnp.float64), (jnp.float32, jnp.float64)])
def test_eigenpairs_of_any_container(dtypes):
    params = Held(*(jnp.ones(size, dtype) for size, dtype in zip((3, 2), dtypes, strict=True)))
    for solver in (ij.Arnoldi(0.5, rank=5), ij.Nystrom(0.5, rank=5)):
        solved = ij.invert(ij.Identity(params), solver, key=KEY).mv(params)
        assert relative_error(np.concatenate(solved.parts), np.full(5, 1 / 1.5)) < 1e-6


def test_a_matrix_that_no_device_holds_is_named():
    op = ij.Diagonal({"a": jnp.ones(1_500_000), "b": jnp.ones(1_500_000)})
    with pytest.raises(MemoryError, match="Direct holds a matrix of 3,000,000 x 3,000,000 parameters"):
        ij.invert(op, ij.Direct({"a": 1.0, "b": 2.0}))


def test_bounds_of_an_operator_that_is_vouched_for():
    hessian = ij.Hessian(OBJECTIVE, PARAMS, DATA).assume_psd()
    influence = ij.Influence(OBJECTIVE, PARAMS, ij.invert(hessian, ij.CG(2.0)))
    assert np.isfinite(ij.score_bounds(influence, DATA, DATA)[1]).all()


def buffers(tree):
    return {leaf.unsafe_buffer_pointer(): leaf.nbytes for leaf in jax.tree.leaves(tree) if hasattr(leaf, "nbytes")}


HELD = {
    "CG": ij.CG(0.1),
    "BlockCG": ij.BlockCG(0.1),
    "LiSSA": ij.LiSSA(0.1, batch_size=4),
    "Blockwise": ij.Blockwise(ij.CG(0.1)),
    "Blockwise by parameter": ij.Blockwise(ij.BlockCG(0.1), ij.by_parameter),
    "HarmonicMean": ij.HarmonicMean(0.1),
}


@pytest.mark.parametrize("solver", HELD.values(), ids=HELD)
def test_an_inverse_holds_nothing_that_its_operator_holds(solver):
    """Every buffer beyond the operator's is the solver's own: at most a twentieth, whatever the number of layers."""
    params = helpers.random_mlp(jax.random.key(0), (40, 20, 20, 20, 3))
    data = jax.tree.map(jnp.asarray, helpers.random_batch(jax.random.key(1), 400, 40, 3, classes=True))
    op = ij.EmpiricalFisher(OBJECTIVE, params, data)
    own, held = buffers(op), buffers(ij.invert(op, solver, key=KEY))
    assert sum(size for place, size in held.items() if place not in own) <= 0.05 * sum(own.values())


def test_factors_are_held_once():
    """A closed form adds its damping alone, in memory and on disk; a sum with the identity is one, too."""
    for op in (KRONECKER, 2.0 * KRONECKER + 0.3 * ij.Identity(PARAMS)):
        inverse = ij.invert(op, ij.Direct(0.1))
        added = [size for place, size in buffers(inverse).items() if place not in buffers(op)]
        assert sum(added) <= 64
        assert jax.tree.structure(inverse.fit) == jax.tree.structure(())


SHIFTED = {
    "plus": lambda op, one: op + 0.5 * one,
    "array": lambda op, one: 2.0 * op + one * jnp.array(0.3) + one,
    "minus": lambda op, one: op - (-0.2 * one),
    "over": lambda op, one: (op + one) / 2,
    "negative": lambda op, one: -op + 9.0 * one,
}


@pytest.mark.parametrize("name", SHIFTED)
def test_a_multiple_of_the_identity_keeps_a_closed_form(name):
    op = SHIFTED[name](KRONECKER, ij.Identity(PARAMS))
    inverse = ij.invert(op, ij.Direct(0.1))
    assert inverse.fit == ()
    assert list(inverse.by_block) == ["layer0", "layer1"]
    expected = dense_solution(op, jax.tree.map(lambda _: 0.1, PARAMS), V)
    assert relative_error(flat(inverse.mm(V), PARAMS), expected) < 1e-10


def test_sums_of_the_identity_with_itself():
    one = ij.Identity(PARAMS)
    assert relative_error(flat(ij.invert(one + one, ij.Direct(0.0)).mm(V), PARAMS), flat(V, PARAMS) / 2) < 1e-14
    with pytest.raises(TypeError, match="Sum has no spectral"):
        ij.spectral(KRONECKER + KRONECKER)


def test_division():
    for divisor in (0, np.nan, np.inf, np.ones(2), "2"):
        with pytest.raises(ValueError, match="divisor: got"):
            GGN / divisor
    with pytest.raises(ValueError, match="factor: got shape"):
        np.ones(2) * GGN
    with pytest.raises(TypeError):
        GGN / GGN
    half = jax.tree.map(lambda x: x / 2, GGN.mm(V))
    assert relative_error(flat((GGN / jnp.array(2.0)).mm(V), PARAMS), flat(half, PARAMS)) < 1e-14
    assert relative_error(flat((GGN - GGN / 2).mm(V), PARAMS), flat(half, PARAMS)) < 1e-12


def test_a_block_of_an_inverse_that_reads_a_loader():
    inverse = ij.stream.invert(ij.GGN, OBJECTIVE, PARAMS, [DATA], ij.CG(0.1, rtol=1e-11), progress=False)
    block = ("layer1/bias", "layer1/kernel")
    part = ij.restrict(inverse, block)
    assert part.on_host
    assert part.psd
    assert part.symmetric
    dense = np.linalg.inv(np.asarray(ij.to_dense(GGN)) + 0.1 * np.eye(SIZE))
    places = flat(
        jax.tree.map(jnp.zeros_like, PARAMS) | {"layer1": jax.tree.map(jnp.ones_like, PARAMS["layer1"])}, PARAMS
    )
    dense = dense[np.ix_(places > 0, places > 0)]
    rows = {name: V["layer1"][name.partition("/")[2]] for name in block}
    got, rhs = (np.concatenate([np.reshape(x[n], (3, -1)) for n in block], axis=1) for x in (part.mm(rows), rows))
    assert relative_error(got, rhs @ dense) < 1e-8


class Scaled(ij.Solver):
    """A solver with nothing but `solve`."""

    def solve(self, op, damping, fit, V):
        X = jax.tree.map(lambda v: v / (1 + damping), V)
        rows = jnp.ones(len(jax.tree.leaves(V)[0]))
        return X, ij.Info(jnp.int32(rows), None, rows > 0)


jax.tree_util.register_static(Scaled)


def test_bounds_of_a_solver_of_ones_own():
    """The certificate needs nothing of a solver: what it was asked to invert is the inverse's."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        influence = ij.Influence(OBJECTIVE, PARAMS, ij.invert(GGN + 0.5 * ij.Identity(PARAMS), Scaled()))
        scores, bounds, _ = ij.score_bounds(influence, DATA, DATA)
    exact = ij.Influence(OBJECTIVE, PARAMS, ij.invert(GGN, ij.Direct(0.5))).influences(DATA, DATA)
    assert (np.abs(scores - exact) <= bounds * (1 + 1e-9)).all()
    assert np.isfinite(bounds).all()
