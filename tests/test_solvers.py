"""Laws of the solvers: the same answer as numpy on the same dense system, Info that can be believed, derivatives."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative_error, tree_error
from hypothesis import given, strategies as st

import influence_jax as ij
from influence_jax.solvers import conjugate_gradients

PARAMS = helpers.random_mlp(jax.random.key(0))
DATA = helpers.random_batch(jax.random.key(1), 40, 5, 3, classes=True)
OBJECTIVE = helpers.CLASSIFICATION
OPERATORS = {
    "Hessian": ij.Hessian(OBJECTIVE, PARAMS, DATA),  # indefinite
    "GGN": ij.GGN(OBJECTIVE, PARAMS, DATA),
    "EmpiricalFisher": ij.EmpiricalFisher(OBJECTIVE, PARAMS, DATA),
    "Identity": ij.Identity(PARAMS),
    "Diagonal": ij.Diagonal(jax.tree.map(jnp.square, helpers.random_like(jax.random.key(2), PARAMS))),
    "LowRank": ij.LowRank(
        ij.unflatten(jnp.linalg.qr(helpers.normal(jax.random.key(3), (39, 7)))[0].T, PARAMS), jnp.arange(1.0, 8.0)
    ),
    "Sum": ij.GGN(OBJECTIVE, PARAMS, DATA) + 0.2 * ij.Identity(PARAMS),
    "Scaled": 3.0 * ij.LowRank(ij.unflatten(jnp.eye(39)[:2], PARAMS), jnp.array([1.0, 2.0])),
}
SOLVERS = {"Direct": ij.Direct, "Eigh": ij.Eigh, "CG": lambda damping: ij.CG(damping, rtol=1e-13, max_steps=400)}
EXACT = ["Direct", "Eigh"]


def median_eigenvalue(op: ij.LinearOperator) -> float:
    """Damping of the order of the spectrum, so that a wrong operator cannot hide behind it."""
    return max(float(np.median(np.abs(np.linalg.eigvalsh(np.asarray(ij.to_dense(op)))))), 1e-2)


def right_hand_sides(rows: int = 4, seed: int = 5):
    return helpers.random_like(jax.random.key(seed), PARAMS, rows=rows)


@pytest.mark.parametrize(
    ("name", "solver"), [(n, s) for n in OPERATORS for s in SOLVERS if n in ("Hessian", "LowRank") or s != "Eigh"]
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
    assert info.converged.shape == info.steps.shape == info.residual.shape == info.min_curvature.shape == (4,)
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


@pytest.mark.parametrize("name", ["Hessian", "GGN"])
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
    """A closed form or an eigendecomposition can change its damping, a Cholesky factor refuses in words."""
    v = jax.tree.map(lambda x: x[0], right_hand_sides())
    for name in ("Diagonal", "LowRank", "Hessian"):
        moved = ij.invert(OPERATORS[name], ij.Direct(2.0)).with_damping(5.0)
        assert tree_error(moved.mv(v), ij.invert(OPERATORS[name], ij.Direct(5.0)).mv(v)) < 1e-12
    with pytest.raises(ValueError, match=r"damping: .*Eigh"):
        ij.invert(OPERATORS["GGN"], ij.Direct(2.0)).with_damping(5.0)


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
@pytest.mark.parametrize("argument", ["damping", "weights", "params"])
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


class TestConjugateGradients:
    def test_residual_reported_is_the_true_one(self):
        op, V = OPERATORS["GGN"], right_hand_sides()
        for rtol in (1e-2, 1e-6, 1e-10):
            X, info = ij.invert(op, ij.CG(0.05, rtol=rtol)).solve_many(V)
            residual = jax.tree.map(lambda v, ax, x: v - ax - 0.05 * x, V, op.mm(X), X)
            expected = ij.tree.norms(residual) / ij.tree.norms(V)
            assert relative_error(info.residual, expected) < 1e-5
            assert bool(jnp.all(info.converged))
            assert bool(jnp.all(info.residual <= 2 * rtol))

    def test_tolerances(self):
        """The stricter of the two does not count: either rtol or atol suffices."""
        op, V = OPERATORS["GGN"], right_hand_sides()
        loose = ij.invert(op, ij.CG(0.05, rtol=0.0, atol=1.0)).solve_many(V)[1]
        assert bool(jnp.all(loose.residual * ij.tree.norms(V) <= 2.0))
        assert bool(jnp.all(loose.converged))
        assert bool(jnp.all(loose.steps < ij.invert(op, ij.CG(0.05, rtol=1e-8)).solve_many(V)[1].steps))

    def test_every_right_hand_side_stops_on_its_own(self):
        """An eigenvector takes one step, zero none; neither is changed by its batch-mates."""
        values, vectors = np.linalg.eigh(np.asarray(ij.to_dense(OPERATORS["GGN"])))
        stack = np.stack([vectors[:, -1], np.zeros(39), vectors @ np.ones(39), vectors @ np.ones(39)])
        V = ij.unflatten(stack, PARAMS)
        inverse = ij.invert(OPERATORS["GGN"], ij.CG(0.05, rtol=1e-10))
        X, info = inverse.solve_many(V)
        assert info.steps.tolist()[:2] == [1, 0]
        assert info.steps[2] == info.steps[3] > 5
        assert info.converged.tolist() == [True] * 4
        assert info.residual[1] == 0.0
        assert jnp.isnan(info.min_curvature[1])
        assert abs(info.min_curvature[0] - values[-1] - 0.05) < 1e-9
        assert np.max(np.abs(helpers.flat(X, PARAMS)[1])) == 0.0
        for index in range(4):
            alone, alone_info = inverse.solve(jax.tree.map(lambda v, i=index: v[i], V))
            # Stacks of different lengths are different programs; what they round differently a recurrence carries on,
            # up to the tolerance.
            difference = np.max(np.abs(helpers.flat(alone, PARAMS) - helpers.flat(X, PARAMS)[index]))
            assert difference <= 1e-10 * np.max(np.abs(helpers.flat(X, PARAMS)))
            assert alone_info.steps == info.steps[index]

    def test_more_right_hand_sides_than_parameters(self):
        """pyDVL leaves those beyond the number of parameters at zero."""
        V = right_hand_sides(60)
        X = ij.invert(OPERATORS["GGN"], ij.CG(0.1, rtol=1e-12)).mm(V)
        assert tree_error(X, ij.invert(OPERATORS["GGN"], ij.Direct(0.1)).mm(V)) < 1e-9

    def test_negative_curvature_is_reported_not_divided_by(self):
        op = OPERATORS["Hessian"]
        lowest = jnp.linalg.eigvalsh(ij.to_dense(op))[0]
        assert lowest < -1e-2
        X, info = ij.invert(op, ij.CG(0.0)).solve_many(right_hand_sides())
        assert not bool(jnp.any(info.converged))
        assert bool(jnp.all(info.min_curvature < 0))
        assert bool(jnp.all(info.min_curvature >= lowest))
        assert np.all(np.isfinite(helpers.flat(X, PARAMS)))

    def test_breakdown_on_a_singular_system(self):
        """Solvable: converges. Not solvable: stops, finite, and says so."""
        op = ij.LowRank({"w": jnp.eye(4)[:2]}, jnp.array([1.0, 2.0]))
        V = {"w": jnp.array([[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])}
        X, info = ij.invert(op, ij.CG(0.0)).solve_many(V)
        assert info.converged.tolist() == [True, False, False]
        assert relative_error(X["w"][0], jnp.array([1.0, 0.5, 0.0, 0.0])) < 1e-12
        assert bool(jnp.all(jnp.isfinite(X["w"])))

    def test_not_a_number_is_not_convergence(self):
        v = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), PARAMS)
        assert not bool(ij.invert(OPERATORS["GGN"], ij.CG(0.1)).solve(v)[1].converged)
        poisoned = ij.GGN(OBJECTIVE, PARAMS, ij.Batch(jnp.asarray(DATA.x).at[3].set(jnp.nan), DATA.y))
        x, info = ij.invert(poisoned, ij.CG(0.1)).solve(PARAMS)
        assert not bool(info.converged)
        assert np.all(np.isnan(helpers.flat(x, PARAMS))), "zero would pass for an answer"

    def test_max_steps(self):
        info = ij.invert(OPERATORS["GGN"], ij.CG(1e-3, rtol=1e-12, max_steps=3)).solve_many(right_hand_sides())[1]
        assert info.steps.tolist() == [3] * 4
        assert not bool(jnp.any(info.converged))

    def test_preconditioners(self):
        """A solver is fitted to the same operator, an operator is used as it is; neither changes the answer."""
        op, V = OPERATORS["GGN"], right_hand_sides()
        expected = ij.invert(op, ij.Direct(1e-3)).mm(V)
        plain = ij.invert(op, ij.CG(1e-3, rtol=1e-11)).solve_many(V)[1]
        diagonal = ij.invert(ij.Diagonal(ij.diagonal(op)), ij.Direct(1e-3))
        for preconditioner, most in ((ij.Direct(1e-3), 2), (ij.Direct(3e-3), 20), (diagonal, 200)):
            inverse = ij.invert(op, ij.CG(1e-3, rtol=1e-11, preconditioner=preconditioner))
            X, info = inverse.solve_many(V)
            assert tree_error(X, expected) < 1e-8
            assert bool(jnp.all(info.converged))
            assert int(jnp.max(info.steps)) <= most
            assert bool(jnp.all(info.steps < plain.steps)) or preconditioner is diagonal

    def test_indefinite_preconditioner_is_caught(self):
        inverse = ij.invert(OPERATORS["GGN"], ij.CG(0.1, preconditioner=-1.0 * ij.Identity(PARAMS)))
        X, info = inverse.solve_many(right_hand_sides())
        assert not bool(jnp.any(info.converged))
        assert np.all(np.isfinite(helpers.flat(X, PARAMS)))

    def test_loop_on_the_host(self):
        """The same recurrence driven by Python, as a stream of data outside of memory needs it."""

        def host_loop(condition, body, state):
            while condition(state):
                state = body(state)
            return state

        op, V = OPERATORS["GGN"], right_hand_sides()
        mm = lambda X: jax.tree.map(lambda a, x: a + 0.1 * x, op.mm(X), X)
        X, info = conjugate_gradients(mm, V, rtol=1e-12, while_loop=host_loop)
        Y, expected = conjugate_gradients(mm, V, rtol=1e-12)
        assert tree_error(X, Y) < 1e-12
        assert info.steps.tolist() == expected.steps.tolist()

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
    def test_narrow_parameters_are_solved_in_float32(self, dtype, float32):
        params = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
        data = ij.Batch(jnp.asarray(DATA.x, jnp.float32), jnp.asarray(DATA.y, jnp.int32))
        objective = ij.Objective(
            lambda p, z: helpers.mlp(jax.tree.map(lambda x: x.astype(jnp.float32), p), z), helpers.cross_entropy
        )
        inverse = ij.invert(ij.GGN(objective, params, data), ij.CG(0.1))
        v = jax.tree.map(jnp.ones_like, params)
        x, info = inverse.solve(v)
        assert {leaf.dtype for leaf in jax.tree.leaves(x)} == {jnp.dtype(jnp.float32)}
        assert {leaf.dtype for leaf in jax.tree.leaves(inverse.mv(v))} == {jnp.dtype(dtype)}
        assert bool(info.converged)
        assert float(info.residual) < 2e-5


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
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
        assert abs(relative.state.damping - absolute) < 1e-9 * absolute
        V = right_hand_sides(2)
        assert tree_error(relative.mm(V), ij.invert(op, solver(absolute)).mm(V)) < 1e-9

    def test_can_be_set_later(self):
        inverse = ij.invert(OPERATORS["GGN"], ij.Eigh(1.0)).with_damping(ij.RelativeDamping(0.1))
        expected = ij.invert(OPERATORS["GGN"], ij.Eigh(ij.RelativeDamping(0.1)))
        assert inverse.state.damping == expected.state.damping

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
        assert 0 < inverse.state.damping < 5


def test_a_solver_of_ones_own():
    """Any frozen pytree with init, apply_many, apply and with_damping is a solver."""
    from influence_jax import _pytree

    @_pytree.dataclass
    class Richardson(ij.Solver):
        """x <- x + step (v - A x), a fixed number of times."""

        step: float = 0.1
        steps: int = _pytree.static(default=2000)

        def init(self, op, *, key=None):
            return op

        def apply_many(self, op, V):
            body = lambda _, X: jax.tree.map(lambda x, v, ax: x + self.step * (v - ax), X, V, op.mm(X))
            X = jax.lax.fori_loop(0, self.steps, body, jax.tree.map(jnp.zeros_like, V))
            rows = jnp.ones(jax.tree.leaves(V)[0].shape[0])
            return X, ij.Info(jnp.int32(rows), jnp.nan * rows, rows > 0, jnp.nan * rows)

        def with_damping(self, state, damping, *, key=None):
            raise ValueError("damping: Richardson has none")

    op = OPERATORS["Diagonal"] + 1.0 * ij.Identity(PARAMS)
    v = jax.tree.map(lambda x: x[0], right_hand_sides())
    assert tree_error(ij.invert(op, Richardson()).mv(v), ij.invert(op, ij.Direct()).mv(v)) < 1e-9
