"""Conjugate gradients: Info that can be believed, and what happens where they cannot get on."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative_error, tree_error
from systems import DATA, OBJECTIVE, OPERATORS, PARAMS, SIZE, right_hand_sides

import influence_jax as ij
from influence_jax.solvers import conjugate_gradients


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
        stack = np.stack([vectors[:, -1], np.zeros(SIZE), vectors @ np.ones(SIZE), vectors @ np.ones(SIZE)])
        V = ij.unflatten(stack, PARAMS)
        inverse = ij.invert(OPERATORS["GGN"], ij.CG(0.05, rtol=1e-10))
        X, info = inverse.solve_many(V)
        assert info.steps.tolist()[:2] == [1, 0]
        assert info.steps[2] == info.steps[3] > 5
        assert info.converged.tolist() == [True] * 4
        assert info.residual[1] == 0.0
        assert jnp.isinf(info.min_curvature[1])  # the least of nothing
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
        fit = jax.jit(lambda op: ij.invert(op, ij.CG(0.1)).solve(PARAMS))  # under tracing losses are not looked at
        x, info = fit(poisoned)
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
