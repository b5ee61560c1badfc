"""Laws of the solvers: the same answer as numpy on the same dense system, Info that can be believed, derivatives."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import mainly, relative_error, tree_error
from hypothesis import given, strategies as st
from systems import DATA, EXACT, OBJECTIVE, OPERATORS, PARAMS, SOLVERS, right_hand_sides

import influence_jax as ij


def median_eigenvalue(op: ij.LinearOperator) -> float:
    """Damping of the order of the spectrum, so that a wrong operator cannot hide behind it."""
    return max(float(np.median(np.abs(np.linalg.eigvalsh(np.asarray(ij.to_dense(op)))))), 1e-2)


@pytest.mark.parametrize(
    ("name", "solver"),
    mainly(
        [(n, s) for n in OPERATORS for s in SOLVERS if n in ("Hessian", "LowRank") or s != "Eigh"],
        *[(n, s) for n in ("Hessian", "GGN", "LowRank") for s in ("Direct", "CG")],
        *[("Hessian", "Eigh"), ("EmpiricalFisher", "Direct"), ("Sum", "CG"), ("Diagonal", "Direct")],
        *[("Identity", "CG"), ("Scaled", "Direct")],
    ),
)
def test_solves_like_numpy(name, solver):
    op = OPERATORS[name]
    damping = median_eigenvalue(op)
    if solver == "CG" and name == "Hessian":  # what it does on an indefinite system has a test of its own
        damping = 1.0 - float(np.linalg.eigvalsh(np.asarray(ij.to_dense(op)))[0])
    V = right_hand_sides()
    dense = np.asarray(ij.to_dense(op)) + damping * np.eye(op.size)
    expected = np.linalg.solve(dense, helpers.flat(V, PARAMS).T).T
    inverse = ij.invert(op, SOLVERS[solver](damping))
    X, info = inverse.solve_many(V)
    assert relative_error(helpers.flat(X, PARAMS), expected) < 1e-9
    assert info.converged.shape == info.steps.shape == info.min_curvature.shape == (4,)
    assert info.residual.shape == (4,) if solver == "CG" else info.residual is None  # no product was spent on it
    assert bool(jnp.all(info.converged))
    x, one = inverse.solve(jax.tree.map(lambda leaf: leaf[2], V))
    assert relative_error(helpers.flat(x, PARAMS), expected[2]) < 1e-9
    assert one.converged.shape == ()
    assert tree_error(inverse.mm(V), X) < 1e-12
    lowest = np.linalg.eigvalsh(dense)[0]
    assert bool(jnp.all(info.min_curvature >= lowest - 1e-9))
    if solver == "Eigh" or (name in ("Hessian", "Identity", "Diagonal", "LowRank", "Scaled") and solver == "Direct"):
        assert abs(float(info.min_curvature[0]) - lowest) < 1e-9


@pytest.mark.parametrize("solver", SOLVERS)
@given(seed=st.integers(0, 100), log_damping=st.floats(-2.0, 1.0))
def test_inverse_undoes_the_damped_operator(solver, seed, log_damping):
    op, damping = OPERATORS["GGN"], 10.0**log_damping
    v = helpers.random_like(jax.random.key(seed), PARAMS)
    inverse = ij.invert(op, SOLVERS[solver](damping))
    damped = jax.tree.map(lambda a, b: a + damping * b, op.mv(v), v)
    assert tree_error(inverse.mv(damped), v) < 1e-9


@pytest.mark.parametrize("solver", EXACT)
def test_inverse_of_inverse(solver):
    inverse = ij.invert(OPERATORS["GGN"], SOLVERS[solver](0.1))
    again = ij.invert(inverse, SOLVERS[solver](0.0))
    v = right_hand_sides(1)
    damped = jax.tree.map(lambda a, b: a + 0.1 * b, OPERATORS["GGN"].mm(v), v)
    assert tree_error(again.mm(v), damped) < 1e-9


@pytest.mark.parametrize("name", mainly(["Hessian", "GGN"], "Hessian"))
@pytest.mark.parametrize("solver", ["Eigh", "CG"])
def test_one_fit_serves_every_damping(name, solver):
    op = OPERATORS[name]
    inverse = ij.invert(op, SOLVERS[solver](2.0))
    v = jax.tree.map(lambda x: x[0], right_hand_sides())
    grid = jnp.array([1.0, 3.0, 10.0])
    swept = jax.vmap(lambda damping: inverse.with_damping(damping).mv(v))(grid)
    refitted = jax.vmap(lambda damping: ij.invert(op, SOLVERS[solver](damping)).mv(v))(grid)
    for index, damping in enumerate((1.0, 3.0, 10.0)):
        expected = ij.invert(op, ij.Direct(damping)).mv(v)
        assert tree_error(jax.tree.map(lambda x, i=index: x[i], swept), expected) < 1e-9
        assert tree_error(jax.tree.map(lambda x, i=index: x[i], refitted), expected) < 1e-9
    assert inverse.with_damping(3.0).solver.damping == 3.0


def test_direct_with_damping():
    """A closed form or an eigendecomposition serves every damping; a Cholesky factor is computed anew."""
    v = jax.tree.map(lambda x: x[0], right_hand_sides())
    for name in ("Diagonal", "LowRank", "Hessian", "GGN"):
        inverse = ij.invert(OPERATORS[name], ij.Direct(2.0))
        moved = inverse.with_damping(5.0)
        assert (moved.fit is inverse.fit) == (name != "GGN")
        assert tree_error(moved.mv(v), ij.invert(OPERATORS[name], ij.Direct(5.0)).mv(v)) < 1e-12


@pytest.mark.parametrize("solver", [*EXACT, "CG"])
def test_jit_and_vmap_of_solves(solver):
    op, V = OPERATORS["GGN"], right_hand_sides()
    inverse = ij.invert(op, SOLVERS[solver](0.1))
    expected = inverse.mm(V)
    assert tree_error(jax.vmap(inverse.mv)(V), expected) < 1e-9
    assert tree_error(jax.jit(lambda op, V: ij.invert(op, SOLVERS[solver](0.1)).mm(V))(op, V), expected) < 1e-9
    shapes = jax.eval_shape(lambda op: ij.invert(op, SOLVERS[solver](0.1)).mm(V), op)
    assert jax.tree.structure(shapes) == jax.tree.structure(V)


@pytest.mark.parametrize("solver", [*EXACT, "CG"])
def test_second_solve_compiles_nothing(solver, compilations):
    op, V = OPERATORS["GGN"], right_hand_sides(3)
    ij.invert(op, SOLVERS[solver](0.1)).solve_many(V)
    other = ij.GGN(OBJECTIVE, jax.tree.map(lambda x: 1.1 * x, PARAMS), DATA)
    V = jax.block_until_ready(jax.tree.map(lambda x: 2.0 * x, V))
    with compilations() as names:
        ij.invert(other, SOLVERS[solver](0.7)).solve_many(V)
    assert names == []


def solved(solver, params=PARAMS, weights=None, damping=0.3):
    """A scalar function of a solve: its derivatives are checked in every argument."""
    op = ij.GGN(OBJECTIVE, params, DATA, weights=jnp.ones(40) if weights is None else weights)
    left, right = (jax.tree.map(lambda x, i=i: x[i], right_hand_sides()) for i in (0, 1))
    return ij.tree.dot(left, ij.invert(op, SOLVERS[solver](damping)).mv(right))


def central_difference(fn, x, direction, step=1e-5):
    shift = lambda sign: jax.tree.map(lambda a, d: a + sign * step * d, x, direction)
    return (fn(shift(1.0)) - fn(shift(-1.0))) / (2 * step)


@pytest.mark.parametrize(("solver", "mode"), [("Direct", "reverse"), ("Eigh", "forward"), ("CG", "reverse")])
@pytest.mark.parametrize("argument", mainly(["damping", "weights", "params"], "params"))
def test_derivatives_through_solves(solver, mode, argument):
    start = {"damping": jnp.array(0.3), "weights": jnp.linspace(0.5, 1.5, 40), "params": PARAMS}[argument]
    direction = helpers.random_like(jax.random.key(9), start)
    fn = lambda x: solved(solver, **{argument: x})
    expected = central_difference(fn, start, direction)
    got = jax.jvp(fn, (start,), (direction,))[1] if mode == "forward" else ij.tree.dot(jax.grad(fn)(start), direction)
    assert abs(got - expected) < 1e-6 * abs(expected)


def test_derivatives_through_closed_forms():
    fn = lambda d: ij.tree.dot(PARAMS, ij.invert(ij.Diagonal(d), ij.Direct(0.5)).mv(PARAMS))
    start = OPERATORS["Diagonal"].tree
    direction = helpers.random_like(jax.random.key(9), start)
    got = ij.tree.dot(jax.grad(fn)(start), direction)
    assert abs(got - central_difference(fn, start, direction)) < 1e-7 * abs(got)


@pytest.mark.parametrize("dtype", mainly([jnp.float32, jnp.float64], jnp.float32))
@pytest.mark.parametrize("solver", EXACT)
def test_singular_systems_say_so(solver, dtype):
    """Fewer examples than parameters, damping 0: no digit is right, whatever the factorisation made of it."""
    params = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
    few = ij.Batch(DATA.x[:4].astype(dtype), DATA.y[:4])
    info = ij.invert(ij.GGN(OBJECTIVE, params, few), SOLVERS[solver](0.0)).solve(params)[1]
    assert not bool(info.converged)
    damped = ij.invert(ij.GGN(OBJECTIVE, params, few), SOLVERS[solver](0.1)).solve(params)[1]
    assert bool(damped.converged)


@pytest.mark.parametrize("damping", [0.0, 1e-6])
@pytest.mark.parametrize("solver", [*EXACT, "CG"])
@pytest.mark.parametrize("count", [60, 3000])
def test_a_null_space_of_one_is_noticed(float32, solver, damping, count):
    """One feature is the sum of the others: no solution that float32 spoilt is called converged."""
    objective = ij.Objective(helpers.linear, helpers.half_squared_loss)
    spoilt = 0
    for seed in range(5):
        x = np.random.default_rng(seed).normal(size=(count, 6)).astype(np.float32)
        x = np.concatenate([x, x.sum(1, keepdims=True)], axis=1)
        data = ij.Batch(x, np.zeros((count, 1), np.float32))
        op = ij.GGN(objective, {"kernel": jnp.ones((7, 1), jnp.float32)}, data)
        v = {"kernel": jnp.asarray(np.random.default_rng(seed + 99).normal(size=(7, 1)), jnp.float32)}
        solvers = {"Direct": ij.Direct, "Eigh": ij.Eigh, "CG": ij.CG}
        solved, info = ij.invert(op, solvers[solver](damping)).solve(v)
        matrix = x.astype(np.float64).T @ x / count + damping * np.eye(7)
        residual = np.linalg.norm(matrix @ np.asarray(solved["kernel"], np.float64) - v["kernel"])
        wrong = not residual < 1e-2 * np.linalg.norm(v["kernel"])
        spoilt += wrong
        assert not (wrong and bool(info.converged))
    assert spoilt >= (1 if solver == "CG" else 3), "otherwise this shows nothing"


def test_small_eigenvalues_known_exactly_are_not_left_out():
    x, info = ij.invert(ij.Diagonal({"w": jnp.array([1e-18, 1.0])}), ij.Direct(0.0)).solve({"w": jnp.ones(2)})
    assert relative_error(x["w"], jnp.array([1e18, 1.0])) < 1e-12
    assert bool(info.converged)


def test_well_conditioned_float32_systems_converge(float32):
    """The judgement is not so strict that ordinary work is called into question."""
    params = jax.tree.map(lambda x: x.astype(jnp.float32), PARAMS)
    data = ij.Batch(DATA.x.astype(jnp.float32), DATA.y.astype(jnp.int32))
    for damping in (1e-1, 1e-2, 1e-3):
        for solver in (ij.Direct, ij.Eigh):
            assert bool(ij.invert(ij.GGN(OBJECTIVE, params, data), solver(damping)).solve(params)[1].converged)


def test_zero_operator_and_dead_parameters():
    zero = ij.invert(ij.Diagonal({"w": jnp.zeros(3)}), ij.Direct(0.0))
    x, info = zero.solve({"w": jnp.ones(3)})
    assert not bool(info.converged)
    assert bool(jnp.all(jnp.isfinite(x["w"])))
    dead = ij.invert(ij.Diagonal({"w": jnp.array([2.0, 0.0])}), ij.Direct(0.5))
    x, info = dead.solve({"w": jnp.ones(2)})
    assert x["w"].tolist() == [0.4, 2.0]
    assert bool(info.converged)


class TestRelativeDamping:
    @pytest.mark.parametrize(
        ("name", "solver"),
        [
            ("GGN", "CG"),
            ("GGN", "Direct"),
            ("EmpiricalFisher", "Eigh"),
            ("Diagonal", "Direct"),
            ("LowRank", "Eigh"),
            ("Sum", "CG"),
        ],
    )
    def test_is_a_multiple_of_the_mean_eigenvalue(self, name, solver):
        op, solver = OPERATORS[name], SOLVERS[solver]
        absolute = 0.1 * float(jnp.mean(jnp.linalg.eigvalsh(ij.to_dense(op))))
        relative = ij.invert(op, solver(ij.RelativeDamping(0.1)))
        assert abs(relative.damping - absolute) < 1e-9 * absolute
        V = right_hand_sides(2)
        assert tree_error(relative.mm(V), ij.invert(op, solver(absolute)).mm(V)) < 1e-9

    def test_can_be_set_later(self):
        inverse = ij.invert(OPERATORS["GGN"], ij.Eigh(1.0)).with_damping(ij.RelativeDamping(0.1))
        expected = ij.invert(OPERATORS["GGN"], ij.Eigh(ij.RelativeDamping(0.1)))
        assert inverse.damping == expected.damping

    def test_is_differentiable_and_maps(self):
        v = jax.tree.map(lambda x: x[0], right_hand_sides())
        fn = lambda c: ij.tree.dot(v, ij.invert(OPERATORS["GGN"], ij.Direct(ij.RelativeDamping(c))).mv(v))
        assert abs(jax.grad(fn)(0.2) - (fn(0.2 + 1e-5) - fn(0.2 - 1e-5)) / 2e-5) < 1e-6 * abs(jax.grad(fn)(0.2))
        assert relative_error(jax.vmap(fn)(jnp.array([0.1, 0.2]))[1], fn(0.2)) < 1e-12

    def test_non_positive_mean_is_an_error(self):
        negative = ij.Diagonal({"w": jnp.array([-1.0, 0.5])})
        with pytest.raises(ValueError, match=r"mean eigenvalue, which is not positive"):
            ij.invert(negative, ij.Direct(ij.RelativeDamping(0.1)))
        with pytest.raises(ValueError, match=r"mean eigenvalue, which is not positive"):
            ij.invert(ij.Diagonal({"w": jnp.zeros(2)}), ij.CG(ij.RelativeDamping(0.1)))

    def test_estimated_trace_needs_a_key(self, monkeypatch):
        monkeypatch.setattr("influence_jax.curvature.capabilities.EXACT_TRACE_SIZE", 10)
        shifted = OPERATORS["Hessian"] + 5.0 * ij.Identity(PARAMS)
        with pytest.raises(ValueError, match="key: None"):
            ij.invert(shifted, ij.CG(ij.RelativeDamping(0.1), max_steps=7))
        inverse = ij.invert(shifted, ij.CG(ij.RelativeDamping(0.1), max_steps=7), key=jax.random.key(0))
        assert 0 < inverse.damping < 5


def test_a_solver_of_ones_own():
    """Any frozen pytree with solve is a solver."""
    from influence_jax import _pytree

    @_pytree.dataclass
    class Richardson(ij.Solver):
        """x <- x + step (v - A x), a fixed number of times."""

        step: float = 0.1
        steps: int = _pytree.static(default=2000)

        def solve(self, op, damping, fit, V):
            body = lambda _, X: jax.tree.map(lambda x, v, ax: x + self.step * (v - ax), X, V, op.mm(X))
            X = jax.lax.fori_loop(0, self.steps, body, jax.tree.map(jnp.zeros_like, V))
            rows = jnp.ones(jax.tree.leaves(V)[0].shape[0])
            return X, ij.Info(jnp.int32(rows), None, rows > 0)

    op = OPERATORS["Diagonal"] + 1.0 * ij.Identity(PARAMS)
    v = jax.tree.map(lambda x: x[0], right_hand_sides())
    inverse = ij.invert(op, Richardson())
    assert tree_error(inverse.mv(v), ij.invert(op, ij.Direct(0.0)).mv(v)) < 1e-9
    with pytest.raises(ValueError, match=r"damping: got 1.0, but Richardson\(step=0.1\) has none"):
        inverse.with_damping(1.0)


DEBUGGED = {
    **{solver.__name__: (solver(0.1), "GGN") for solver in (ij.Direct, ij.Eigh, ij.CG, ij.BlockCG, ij.SampleSpace)},
    "chains": (ij.LiSSA(0.1, batch_size=4, depth=50, rtol=0.5), "GGN"),
    "low rank in blocks": (ij.Blockwise(ij.Arnoldi(ij.RelativeDamping(0.1), rank=2)), "GGN"),
    "preconditioned": (ij.CG(0.1, preconditioner=ij.Nystrom(0.1, rank=2)), "Hessian"),
    "harmonic": (ij.HarmonicMean(0.1), "EmpiricalFisher"),
    "diagonal": (ij.Jacobi(0.1), "EmpiricalFisher"),
}


@pytest.mark.parametrize("name", mainly(DEBUGGED, "Direct", "SampleSpace", "chains", "low rank in blocks", "harmonic"))
def test_what_is_not_known_is_absent(name):
    """Under JAX's switches that look for NaN and infinity, whatever is right runs through."""
    solver, kind = DEBUGGED[name]
    op = OPERATORS[kind] + 2.0 * ij.Identity(PARAMS) if kind == "Hessian" else OPERATORS[kind]
    V = right_hand_sides()
    with jax.debug_nans(True), jax.debug_infs(True):
        _, info = ij.invert(op, solver, key=jax.random.key(0)).solve_many(V)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(info))
    assert "nan" not in repr(info)
