"""Iterative, low-rank and closed-form inverses, against the dense damped inverse."""

from functools import partial

import helpers
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import from_spectrum, mainly, relative_error

import influence_jax as ij
from influence_jax.solvers import solve_with_info

OBJECTIVE = helpers.CLASSIFICATION
PARAMS = helpers.random_mlp(jax.random.key(0), biases=False)
DATA = helpers.random_batch(jax.random.key(1), 17, 5, 3, classes=True)
WEIGHTS = jnp.linspace(0.5, 2.0, 17)
KEY = jax.random.key(7)
DAMPING = 0.02
GGN = ij.GGN(OBJECTIVE, PARAMS, DATA)
HESSIAN = ij.Hessian(OBJECTIVE, PARAMS, DATA)
EMPIRICAL = ij.EmpiricalFisher(OBJECTIVE, PARAMS, DATA, weights=WEIGHTS)
SIZE = GGN.size
V = helpers.random_like(jax.random.key(3), PARAMS, 5)


def flat(tree):
    return helpers.flat(tree, PARAMS)


def exact(op, V, damping=DAMPING):
    return np.linalg.solve(np.asarray(ij.to_dense(op)) + damping * np.eye(op.size), flat(V).T).T


def error(op, solver, expected=None):
    solved, info = ij.invert(op, solver, key=KEY).solve_many(V)
    return relative_error(flat(solved), exact(op, V) if expected is None else expected), info


EXACT = {
    "BlockCG": ij.BlockCG(DAMPING, rtol=1e-12),
    "BlockCG in blocks": ij.BlockCG(DAMPING, rtol=1e-12, block_size=2),
    "LiSSA": ij.LiSSA(DAMPING, rtol=1e-11, depth=5000),
    "Arnoldi": ij.Arnoldi(DAMPING, rank=SIZE),
    "Nystrom": ij.Nystrom(DAMPING, rank=SIZE),
    "SampleSpace": ij.SampleSpace(DAMPING),
    "CG with Nystrom": ij.CG(DAMPING, rtol=1e-12, preconditioner=ij.Nystrom(DAMPING, rank=9)),
    "CG with Jacobi": ij.CG(DAMPING, rtol=1e-12, preconditioner=ij.Jacobi(DAMPING)),
    "CG with Jacobi by Hutchinson": ij.CG(DAMPING, rtol=1e-12, preconditioner=ij.Jacobi(DAMPING, probes=20)),
}


@pytest.mark.parametrize(
    "name", mainly(EXACT, "BlockCG in blocks", "LiSSA", "Arnoldi", "Nystrom", "SampleSpace", "CG with Jacobi")
)
def test_equals_the_dense_inverse(name):
    op, solver = EMPIRICAL if name in ("BlockCG in blocks", "Arnoldi", "CG with Jacobi") else GGN, EXACT[name]
    wrong, info = error(op, solver)
    assert wrong < 1e-8
    assert bool(jnp.all(info.converged))
    assert info.residual.shape == info.steps.shape == (5,)
    assert jnp.max(info.residual) < 1e-8
    if "CG with" in name:
        return  # a preconditioner keeps its own damping
    single = helpers.random_like(jax.random.key(3), PARAMS)
    moved = ij.invert(op, solver, key=KEY).with_damping(0.3).solve(single)[0]
    assert relative_error(flat(moved), exact(op, jax.tree.map(lambda x: x[None], single), 0.3)[0]) < 1e-7


class TestBlockCG:
    def test_needs_fewer_steps_than_cg(self):
        op, _ = from_spectrum(np.linspace(0.0, 1.0, 60))
        V = {"w": helpers.normal(KEY, (20, 60))}
        together = ij.invert(op, ij.BlockCG(1e-3, rtol=1e-8)).solve_many(V)[1]
        alone = ij.invert(op, ij.CG(1e-3, rtol=1e-8)).solve_many(V)[1]
        assert jnp.max(together.steps) <= 5 < 30 < jnp.min(alone.steps)
        assert jnp.all(together.converged & alone.converged)

    @hypothesis.given(st.lists(st.integers(0, 4), min_size=9, max_size=9), st.integers(-12, 12))
    def test_dependent_right_hand_sides(self, picks, exponent):
        """Zero, duplicated, opposite and tiny right-hand sides, and more of them than parameters, are no trouble."""
        op, _ = from_spectrum(np.linspace(0.1, 1.0, 6))
        base = np.random.default_rng(1).normal(size=(2, 6))
        choices = np.stack([base[0], base[1], -base[0], np.zeros(6), base[0] * 10.0**exponent])
        rhs = choices[np.array(picks)]
        inverse = ij.invert(op, ij.BlockCG(0.1, rtol=1e-12))
        solved, info = inverse.solve_many({"w": jnp.asarray(rhs)})
        expected = np.linalg.solve(np.asarray(ij.to_dense(op)) + 0.1 * np.eye(6), rhs.T).T
        scale = np.maximum(np.linalg.norm(expected, axis=1), 1e-300)
        assert np.max(np.linalg.norm(np.asarray(solved["w"]) - expected, axis=1) / scale) < 1e-9
        assert bool(jnp.all(info.converged))
        assert info.steps[np.array(picks) == 3].tolist() == [0] * picks.count(3)

    def test_singular_but_consistent(self):
        op, basis = from_spectrum(np.concatenate([np.zeros(3), np.linspace(0.5, 1.0, 5)]))
        rhs = jnp.asarray(np.random.default_rng(2).normal(size=(2, 5)) @ basis.T[3:])
        solved, info = ij.invert(op, ij.BlockCG(0.0, rtol=1e-10)).solve_many({"w": rhs})
        assert relative_error(solved["w"] @ np.asarray(ij.to_dense(op)), rhs) < 1e-8
        assert bool(jnp.all(info.converged))

    def test_indefinite_is_reported(self):
        _, info = error(HESSIAN, ij.BlockCG(1e-3))
        assert not jnp.any(info.converged)
        assert jnp.all(info.min_curvature < 0)

    def test_not_a_number_is_reported(self):
        broken = jax.tree.map(lambda x: jnp.asarray(x).at[1].set(jnp.nan), V)
        solved, info = ij.invert(GGN, ij.BlockCG(DAMPING)).solve_many(broken)
        assert not info.converged[1]
        assert bool(jnp.isnan(flat(solved)[1]).all())
        others = jnp.array([0, 2, 3, 4])
        assert jnp.all(info.converged[others])
        assert relative_error(flat(solved)[others], exact(GGN, V)[others]) < 1e-4

    def test_float32(self, float32):
        """Single precision reaches its default tolerance, as far as it lets a residual be known."""
        basis, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(200, 200)))
        op = ij.LowRank({"w": jnp.asarray(basis.T, jnp.float32)}, jnp.asarray(np.logspace(-6, 0, 200), jnp.float32))
        _, info = ij.invert(op, ij.BlockCG(1e-2)).solve_many({"w": helpers.normal(KEY, (30, 200), jnp.float32)})
        assert bool(jnp.all(info.converged))
        assert jnp.max(info.residual) < 2e-5


@pytest.mark.parametrize("exponent", [-32, -20, 20, 30])
@pytest.mark.parametrize("solver", [ij.CG(0.1), ij.BlockCG(0.1), ij.LiSSA(0.1, rtol=1e-5), ij.Direct(0.1)])
def test_whatever_the_right_hand_side_is_measured_in(solver, exponent, float32):
    """Squares of its entries may leave the range of float32; the solution does not."""
    op = ij.Diagonal({"w": jnp.linspace(0.1, 1.0, 20, dtype=jnp.float32)})
    rhs = {"w": jnp.full(20, 10.0**exponent, jnp.float32)}
    solved, info = ij.invert(op, solver, key=KEY).solve(rhs)
    assert bool(info.converged)
    assert relative_error(solved["w"] / rhs["w"], 1 / (op.tree["w"] + 0.1)) < 1e-4


class TestLiSSA:
    """`test_b17`, `test_b18` are pyDVL's defects of those numbers."""

    def test_b17_dead_parameters(self):
        """A parameter without gradient and curvature keeps its zero and stops nothing."""
        op = ij.Diagonal({"w": jnp.array([1.0, 0.0, 2.0])})
        solved, info = ij.invert(op, ij.LiSSA(0.5, scale=3.0, rtol=1e-10)).solve({"w": jnp.array([3.0, 0.0, 5.0])})
        assert relative_error(solved["w"], [2.0, 0.0, 2.0]) < 1e-9
        assert bool(info.converged)
        assert info.steps < 1000

    def test_b18_divergence_is_stopped_and_reported(self):
        op = ij.Diagonal({"w": jnp.array([1.0, 100.0])})
        solved, info = ij.invert(op, ij.LiSSA(0.1, scale=1.0)).solve({"w": jnp.ones(2)})
        assert not info.converged
        assert info.steps < 50
        assert jnp.all(jnp.abs(solved["w"]) < 1e6)

    def test_minibatches_average_to_the_inverse(self):
        solver = ij.LiSSA(0.1, scale=8.0, depth=400, batch_size=6, repeats=16, rtol=0.1)
        wrong, info = error(GGN, solver, exact(GGN, V, 0.1))
        assert 1e-4 < wrong < 0.1
        assert jnp.all((info.standard_error > 1e-4) & (info.standard_error < 0.1))
        assert not ij.invert(GGN, solver, key=KEY).symmetric
        again = ij.invert(GGN, solver, key=jax.random.key(8)).solve_many(V)[0]
        assert relative_error(flat(again), exact(GGN, V, 0.1)) < 0.1
        spread = np.linalg.norm(flat(again) - flat(ij.invert(GGN, solver, key=KEY).solve_many(V)[0]), axis=1)
        expected = np.asarray(info.standard_error) * np.linalg.norm(exact(GGN, V, 0.1), axis=1) * 2**0.5
        assert np.all((spread > 0.3 * expected) & (spread < 3 * expected))

    def test_errors_of_blocks_add_up(self):
        """Of a whole whose one block is random, the error is that of the block, relative to the whole."""
        chains = ij.LiSSA(0.1, scale=8.0, depth=50, batch_size=6, repeats=4)
        inverse = ij.invert(GGN, ij.Blockwise({"layer0": chains, "layer1": ij.Direct(0.1)}), key=KEY)
        solved, info = inverse.solve_many(V)
        part, alone = inverse.by_block["layer0"].solve_many({f"layer0/{k}": v for k, v in V["layer0"].items()})
        shares = np.linalg.norm(np.concatenate([part[k].reshape(5, -1) for k in part], axis=1), axis=1)
        expected = alone.standard_error * shares / np.linalg.norm(flat(solved), axis=1)
        assert relative_error(info.standard_error, expected) < 1e-12
        assert jnp.all(info.standard_error > 1e-3)

    def test_a_sum_over_different_data_has_no_minibatch(self):
        op = GGN + ij.GGN(OBJECTIVE, PARAMS, jax.tree.map(lambda x: x[:3], DATA))
        with pytest.raises(ValueError, match=r"batch_size: .* data of \[3, 17\] examples"):
            ij.invert(op, ij.LiSSA(0.1, batch_size=4), key=KEY)

    def test_one_chain_knows_no_error(self):
        _, info = error(GGN, ij.LiSSA(0.1, scale=8.0, depth=5, batch_size=6))
        assert info.standard_error is None


class TestLowRank:
    def test_top_eigenvalues(self):
        """Sixty steps on 100 eigenvalues over four decades find the ten largest to 1e-6."""
        values = 10 ** np.linspace(-2, 2, 100)
        op, _ = from_spectrum(values)
        pairs = ij.invert(op, ij.Arnoldi(1.0, rank=10, steps=60), key=KEY).fit.pairs
        assert np.max(np.abs(np.sort(pairs.values)[::-1] / values[::-1][:10] - 1)) < 1e-6

    @pytest.mark.parametrize("solver", [partial(ij.Arnoldi, steps=100), ij.Nystrom])
    @pytest.mark.parametrize("rank", mainly([5, 20], 20))
    def test_error_is_bounded_by_the_next_eigenvalue(self, solver, rank):
        """Relative to the exact inverse: of Arnoldi by the next eigenvalue, of Nystrom by a few times that."""
        values, damping = 10 ** np.linspace(-3, 1, 100)[::-1], 0.1
        op, _ = from_spectrum(values)
        dense = np.linalg.inv(np.asarray(ij.to_dense(op)) + damping * np.eye(100))
        got = np.asarray(ij.to_dense(ij.invert(op, solver(damping, rank=rank), key=KEY)))
        bound = (4 if solver is ij.Nystrom else 1) * values[rank] / damping
        missed = np.linalg.norm((got - dense) @ np.linalg.inv(dense), 2)
        assert 0.5 * values[rank] / damping < missed <= bound * (1 + 1e-9)

    def test_repeated_eigenvalues_need_restarts(self):
        """The Krylov space of a multiple of the identity is one vector; all of it is found all the same."""
        op = ij.Diagonal({"w": jnp.array([2.0, 2.0, 2.0, 5.0, 5.0, 0.0])})
        inverse = ij.invert(op, ij.Arnoldi(1.0, rank=6), key=KEY)
        assert relative_error(np.sort(inverse.fit.pairs.values), [0, 2, 2, 2, 5, 5]) < 1e-12
        assert relative_error(ij.to_dense(inverse), jnp.diag(1 / jnp.array([3.0, 3, 3, 6, 6, 1]))) < 1e-12

    def test_missed_copies_of_an_eigenvalue_are_reported(self):
        """A Krylov space holds one of ten, a sketch all."""
        values = np.concatenate([np.full(10, 5.0), np.linspace(0.0, 0.2, 190)])
        rhs = {"w": jnp.ones(200)}
        op = ij.Diagonal({"w": jnp.asarray(values)})
        assert not ij.invert(op, ij.Arnoldi(0.1, rank=10), key=KEY).solve(rhs)[1].converged
        sketched = ij.invert(op, ij.Nystrom(0.1, rank=40), key=KEY)
        assert bool(sketched.solve(rhs)[1].converged)
        assert np.sort(sketched.fit.pairs.values)[-10] > 3.0

    def test_nothing_is_found_of_nothing(self):
        op = ij.Diagonal({"w": jnp.zeros(5)})
        for solver in (ij.Arnoldi(0.1, rank=3), ij.Nystrom(0.1, rank=3), ij.Jacobi(0.1)):
            solved, info = ij.invert(op, solver, key=KEY).solve({"w": jnp.ones(5)})
            assert relative_error(solved["w"], np.full(5, 10.0)) < 1e-12
            assert bool(info.converged)

    def test_indefinite(self):
        """Arnoldi keeps signs and is exact at full rank; Nystrom, for positive operators only, says so."""
        wrong, info = error(HESSIAN, ij.Arnoldi(DAMPING, rank=SIZE))
        assert wrong < 1e-9
        lowest = np.linalg.eigvalsh(np.asarray(ij.to_dense(HESSIAN)))[0]
        assert relative_error(info.min_curvature, np.full(5, lowest + DAMPING)) < 1e-8
        _, info = error(HESSIAN, ij.Nystrom(DAMPING, rank=20))
        assert not jnp.any(info.converged)
        assert jnp.all(info.min_curvature < 0)

    def test_without_complement(self):
        op, basis = from_spectrum(np.arange(1.0, 9.0))
        inverse = ij.invert(op, ij.Arnoldi(1.0, rank=3, steps=8, complement=False), key=KEY)
        top = basis[:, 5:]
        assert relative_error(ij.to_dense(inverse), top @ np.diag(1 / np.array([7.0, 8, 9])) @ top.T) < 1e-10

    def test_preconditioning_pays(self):
        op, _ = from_spectrum(np.concatenate([np.logspace(3, 0, 20), np.full(180, 1e-3)]))
        rhs = {"w": helpers.normal(KEY, (200,))}
        steps = [
            int(ij.invert(op, ij.CG(1e-2, preconditioner=p), key=KEY).solve(rhs)[1].steps)
            for p in (None, ij.Nystrom(1e-2, rank=40))
        ]
        assert steps[1] * 4 <= steps[0]


class TestJacobi:
    def test_b5_the_preconditioner_is_used(self):
        op = ij.Diagonal({"w": jnp.logspace(-3, 3, 50)})
        rhs = {"w": helpers.normal(KEY, (50,))}
        plain, jacobi = (
            int(ij.invert(op, ij.CG(1e-4, preconditioner=p)).solve(rhs)[1].steps) for p in (None, ij.Jacobi(1e-4))
        )
        assert jacobi <= 2 < 20 < plain

    def test_is_positive_whatever_the_operator(self):
        for op in (HESSIAN, ij.Diagonal(jax.tree.map(jnp.zeros_like, PARAMS))):
            dense = ij.to_dense(ij.invert(op, ij.Jacobi(0.0, probes=3), key=KEY))
            assert jnp.min(jnp.diag(dense)) > 0
            assert jnp.all(jnp.isfinite(dense))

    def test_hutchinson(self):
        exactly, estimate = (ij.invert(GGN, ij.Jacobi(0.0, probes=p), key=KEY).fit for p in (None, 2000))
        assert relative_error(flat(estimate), flat(exactly)) < 0.1


class TestHarmonicMean:
    @pytest.mark.parametrize("weights", [None, WEIGHTS])
    @pytest.mark.parametrize("chunk", mainly([None, 4], 4))
    def test_closed_form(self, weights, chunk):
        op = ij.EmpiricalFisher(OBJECTIVE, PARAMS, DATA, weights=weights, chunk=chunk)
        grads = flat(ij.per_example_grads(OBJECTIVE, PARAMS, DATA))
        shares = np.ones(17) / 17 if weights is None else np.asarray(weights / weights.sum())
        each = [np.linalg.inv(np.outer(g, g) + DAMPING * np.eye(SIZE)) for g in grads]
        expected = flat(V) @ np.einsum("n,nij->ij", shares, each)
        wrong, info = error(op, ij.HarmonicMean(DAMPING), expected)
        assert wrong < 1e-10
        assert bool(jnp.all(info.converged))
        assert jnp.min(info.residual) > 0.1, "it is not the damped inverse, and does not pretend to be"

    def test_b3_solutions_do_not_depend_on_their_batch(self):
        inverse = ij.invert(EMPIRICAL, ij.HarmonicMean(DAMPING))
        together = flat(inverse.solve_many(V)[0])
        alone = flat(inverse.solve(jax.tree.map(lambda x: x[2], V))[0])
        assert relative_error(alone, together[2]) < 1e-12

    def test_by_block(self):
        params = helpers.random_mlp(KEY)
        op = ij.EmpiricalFisher(OBJECTIVE, params, DATA, weights=WEIGHTS)
        V = helpers.random_like(KEY, params, 5)
        solved = ij.invert(op, ij.Blockwise(ij.HarmonicMean(DAMPING))).solve_many(V)[0]
        for name in ("layer0", "layer1"):
            block = ij.restrict(op, (f"{name}/bias", f"{name}/kernel"))
            part = {f"{name}/{leaf}": V[name][leaf] for leaf in ("bias", "kernel")}
            alone = ij.invert(block, ij.HarmonicMean(DAMPING)).solve_many(part)[0]
            assert relative_error(solved[name]["kernel"], alone[f"{name}/kernel"]) < 1e-12


class TestSampleSpace:
    @pytest.mark.parametrize("chunk", mainly([1, 4, None], 4))
    def test_chunks(self, chunk):
        op = ij.GGN(OBJECTIVE, PARAMS, DATA, weights=WEIGHTS, chunk=chunk)
        assert error(op, ij.SampleSpace(DAMPING))[0] < 1e-8

    def test_fisher(self):
        op = ij.Fisher(OBJECTIVE, PARAMS, DATA, key=KEY, samples=2)
        assert error(op, ij.SampleSpace(DAMPING))[0] < 1e-8


DIFFERENTIABLE = {
    "BlockCG": ij.BlockCG(0.1, rtol=1e-13),
    "LiSSA": ij.LiSSA(0.1, scale=4.0, rtol=1e-12, depth=3000),
    "SampleSpace": ij.SampleSpace(0.1),
    "HarmonicMean": ij.HarmonicMean(0.1),
    "Arnoldi": ij.Arnoldi(0.1, rank=6),
    "Nystrom": ij.Nystrom(0.1, rank=6),
    "Jacobi": ij.Jacobi(0.1),
}


@pytest.mark.parametrize("name", mainly(DIFFERENTIABLE, "BlockCG", "SampleSpace", "Nystrom"))
def test_derivatives(name):
    """In damping for all; in the parameters too where the solver is exact or in closed form."""
    step, through = helpers.random_like(jax.random.key(9), PARAMS), DIFFERENTIABLE[name]
    v = jax.tree.map(lambda x: x[0], V)
    fitted = ij.invert(EMPIRICAL, through, key=KEY)

    @jax.jit
    def quadratic(t, damping):
        params = jax.tree.map(lambda p, s: p + t * s, PARAMS, step)
        op = ij.EmpiricalFisher(OBJECTIVE, params, DATA, weights=WEIGHTS)
        inverse = ij.invert(op, through, key=KEY) if name not in ("Arnoldi", "Nystrom", "Jacobi") else fitted
        x = inverse.with_damping(damping).solve(v)[0]
        return sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(v), jax.tree.leaves(x), strict=True))

    in_params, in_damping = jax.grad(quadratic, argnums=(0, 1))(0.0, 0.1)
    difference = lambda h, k: (quadratic(h, 0.1 + k) - quadratic(-h, 0.1 - k)) / 2e-5
    assert relative_error(in_damping, difference(0.0, 1e-5)) < 1e-6
    if name in ("BlockCG", "LiSSA", "SampleSpace", "HarmonicMean"):
        assert relative_error(in_params, difference(1e-5, 0.0)) < 1e-6


APPROXIMATE = {
    "Arnoldi": (ij.Arnoldi(DAMPING, rank=4), True),
    "in blocks": (ij.Blockwise(ij.Nystrom(DAMPING, rank=4)), True),
    "in some blocks": (ij.Blockwise({"layer0": ij.HarmonicMean(DAMPING), "layer1": ij.Direct(DAMPING)}), False),
}


@pytest.mark.parametrize("name", mainly(APPROXIMATE, "in blocks"))
def test_an_approximation_is_measured_on_request(name):
    """Influences do not pay for a residual that says how good an approximation is; `solve_many` gives it."""
    solver, approximate = APPROXIMATE[name]
    inverse = ij.invert(EMPIRICAL, solver, key=KEY)
    assert inverse.solver.approximate is approximate
    solved, info = inverse.solve_many(V)
    again, unmeasured = solve_with_info(inverse, V)
    assert relative_error(flat(again), flat(solved)) < 1e-14
    assert jnp.all(info.residual > 0.01)
    assert (unmeasured.residual is None) is approximate
    assert jnp.all(unmeasured.converged)
    costs = [
        jax.jit(lambda V, run=run: run(inverse, V)).lower(V).compile().cost_analysis()["flops"]
        for run in (lambda inverse, V: inverse.solve_many(V), solve_with_info)
    ]
    assert (costs[1] < 0.7 * costs[0]) is approximate
