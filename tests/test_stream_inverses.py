"""Curvature of data that come in batches: the same fits and solutions as in memory, by every solver."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import KEY, OBJECTIVE, N, cut, influence, problem
from helpers import mainly, relative_error

import influence_jax as ij
from influence_jax._pytree import dataclass
from influence_jax.stream.loaders import Blocks


def regularised(*arguments):
    return ij.Hessian(*arguments) + 0.5 * ij.Identity(arguments[1])


SOLVERS = {
    "CG": ij.CG(1.0, rtol=1e-12),
    "preconditioned CG": ij.CG(1.0, rtol=1e-12, preconditioner=ij.Nystrom(1.0, rank=8)),
    "BlockCG": ij.BlockCG(1.0, rtol=1e-12),
    "LiSSA": ij.LiSSA(1.0, rtol=1e-12),
    "Arnoldi": ij.Arnoldi(1.0, rank=8),
    "Nystrom": ij.Nystrom(1.0, rank=8),
    "Direct": ij.Direct(1.0),
    "Eigh": ij.Eigh(ij.RelativeDamping(1.0)),
    "Blockwise": ij.Blockwise(
        {"in": ij.BlockCG(1.0, rtol=1e-12), "out": ij.Direct(2.0)}, {"in": ["in"], "out": ["out", "bias"]}
    ),
}


class TestInverses:
    """A solver reading a loader runs the recurrence that it runs in memory."""

    @pytest.mark.parametrize("name", mainly(SOLVERS, "CG", "BlockCG", "Direct", "Blockwise", "Nystrom"))
    def test_solutions_are_those_in_memory(self, name):
        self.check(ij.GGN, SOLVERS[name])

    @pytest.mark.parametrize(
        "curvature",
        mainly(
            [ij.Hessian, ij.EmpiricalFisher, functools.partial(ij.GGN, chunk=8), regularised], ij.Hessian, regularised
        ),
        ids=["Hessian", "EmpiricalFisher", "partial", "sum"],
    )
    def test_every_curvature(self, curvature):
        self.check(curvature, SOLVERS["BlockCG"])

    def check(self, curvature, solver):
        params, data, query = problem()
        V = ij.per_example_grads(OBJECTIVE, params, query)
        expected, told = ij.invert(curvature(OBJECTIVE, params, data), solver, key=KEY).solve_many(V)
        inverse = ij.stream.invert(curvature, OBJECTIVE, params, cut(data, 20), solver, key=KEY)
        found, info = inverse.solve_many(V)
        assert relative_error(ij.flatten(found, params), ij.flatten(expected, params)) < 1e-9
        np.testing.assert_array_equal(info.converged, told.converged)
        np.testing.assert_array_equal(info.steps, told.steps)

    def test_all_right_hand_sides_share_a_pass(self):
        params, data, query = problem()
        passes = []

        class Counted:
            def __iter__(self):
                passes.append(None)
                return iter(cut(data, 20))

        inverse = ij.stream.invert(ij.GGN, OBJECTIVE, params, Counted(), ij.CG(1.0))
        passes.clear()
        info = inverse.solve_many(ij.per_example_grads(OBJECTIVE, params, query))[1]
        assert len(passes) == int(info.steps.max()) + 1  # the residual takes one

    def test_an_inverse_that_is_all_arrays_is_compiled(self):
        params, data, query = problem()
        for solver in (ij.Direct(0.1), ij.Nystrom(0.1, rank=8)):
            inverse = ij.stream.invert(ij.GGN, OBJECTIVE, params, cut(data, 20), solver, key=KEY)
            scores = ij.Influence(OBJECTIVE, params, inverse).influences
            assert relative_error(jax.jit(scores)(query, data), scores(query, data)) < 1e-12
        info = inverse.solve_many(ij.per_example_grads(OBJECTIVE, params, query))[1]
        assert info.residual is None  # nobody has read the data for it
        with pytest.raises(ValueError, match=r"RelativeDamping .* read once"):
            inverse.with_damping(ij.RelativeDamping(0.1))

    def test_influence_takes_an_inverse_that_reads_a_loader(self):
        params, data, query = problem()
        inverse = ij.stream.invert(ij.GGN, OBJECTIVE, params, cut(data, 20), ij.BlockCG(0.1, rtol=1e-12))
        streamed = ij.Influence(OBJECTIVE, params, inverse)
        assert relative_error(streamed.influences(query, data), influence().influences(query, data)) < 1e-9
        assert relative_error(streamed.influences(data, query), influence().influences(data, query)) < 1e-9
        expected = influence().self_influences(query)
        assert relative_error(streamed.self_influences(query), expected) < 1e-9
        assert relative_error(ij.stream.self_influences(streamed, query), expected) < 1e-9
        swept = inverse.with_damping(1.0).solve_many(ij.per_example_grads(OBJECTIVE, params, query))[0]
        direct = ij.invert(ij.GGN(OBJECTIVE, params, data), ij.Direct(1.0))
        expected = direct.solve_many(ij.per_example_grads(OBJECTIVE, params, query))[0]
        assert relative_error(ij.flatten(swept, params), ij.flatten(expected, params)) < 1e-9
        with pytest.raises(TypeError, match="preconditioner: got an Inverse that reads its data from a loader"):
            ij.invert(ij.GGN(OBJECTIVE, params, data), ij.CG(0.1, preconditioner=inverse))

    @pytest.mark.thorough
    def test_bounds_of_an_inverse_that_reads_a_loader(self):
        params, data, query = problem()
        solver = ij.BlockCG(0.1, rtol=1e-2)
        inverse = ij.stream.invert(ij.GGN, OBJECTIVE, params, cut(data, 20), solver)
        streamed = ij.score_bounds(ij.Influence(OBJECTIVE, params, inverse), query, data)
        memory = ij.Influence(OBJECTIVE, params, ij.invert(ij.GGN(OBJECTIVE, params, data), solver))
        for got, expected in zip(streamed[:2], ij.score_bounds(memory, query, data)[:2], strict=True):
            assert relative_error(got, expected) < 1e-6

    @pytest.mark.parametrize("solver", [ij.Direct(0.1), ij.BlockCG(0.1, rtol=1e-12)], ids=["direct", "block_cg"])
    def test_batches_without_weight(self, solver):
        params, data, _ = problem()
        weights = np.where(np.arange(N) // 20 == 2, 0.0, 1.0)
        weighted = lambda objective, params, batch: ij.GGN(objective, params, batch, weights=batch["w"])
        loader = cut({**data, "w": weights}, 20)
        x = ij.stream.invert(weighted, OBJECTIVE, params, loader, solver).solve(params)[0]
        expected = ij.invert(ij.GGN(OBJECTIVE, params, data, weights=weights), ij.Direct(0.1)).solve(params)[0]
        assert relative_error(ij.flatten(x, params), ij.flatten(expected, params)) < 1e-9
        # Of a Hessian some may be negative, and those of a batch cancel though the batch counts.
        weights = np.where(np.arange(N) == 5, -19.0, 1.0)
        hessian = lambda objective, params, batch: ij.Hessian(objective, params, batch, weights=batch["w"])
        op = ij.stream.operator(hessian, OBJECTIVE, params, Blocks(cut({**data, "w": weights}, 20), "loader"))
        expected = ij.to_dense(ij.Hessian(OBJECTIVE, params, data, weights=weights))
        assert relative_error(ij.to_dense(op), expected) < 1e-12
        loader = cut({**data, "w": 0 * weights}, 20)
        with pytest.raises(ValueError, match="weights: those of all batches of loader sum to 0"):
            ij.stream.invert(weighted, OBJECTIVE, params, loader, solver).solve(params)

    def test_fisher_draws_other_labels_in_every_batch(self):
        params, data, _ = problem()
        same = [jax.tree.map(lambda x: x[:20], data)] * 2
        op = ij.stream.operator(functools.partial(ij.Fisher, key=KEY), OBJECTIVE, params, Blocks(same, "loader"))
        (first, _), (second, _) = op.parts()
        v = jax.tree.map(jnp.ones_like, params)
        assert relative_error(first.mv(v)["in"], second.mv(v)["in"]) > 1e-3
        whole = ij.Fisher(OBJECTIVE, params, jax.tree.map(lambda *x: np.concatenate(x), *same), key=KEY)
        assert relative_error(op.mv(v)["in"], whole.mv(v)["in"]) < 1e-12  # by place, whatever the batches

    def test_a_curvature_of_ones_own(self):
        """An operator that knows nothing of weights meets the last batch at its own length."""
        params, data, _ = problem()

        def scatter(objective, params, batch):
            assert len(batch["y"]) in (20, 3)
            mean = jnp.mean(jnp.asarray(batch["x"]) ** 2)
            return Own(jax.tree.map(jnp.asarray, params), mean)

        op = ij.stream.operator(scatter, OBJECTIVE, params, Blocks(cut(data, 20), "loader"))
        v = jax.tree.map(jnp.ones_like, params)
        assert relative_error(op.mv(v)["bias"][0], np.mean(data["x"] ** 2)) < 1e-12

    def test_spectrum(self):
        params, data, _ = problem()
        op = ij.stream.operator(ij.GGN, OBJECTIVE, params, Blocks(cut(data, 20), "loader"))
        found = ij.spectrum(op, 10, key=KEY)
        assert relative_error(found.values, ij.spectrum(ij.GGN(OBJECTIVE, params, data), 10, key=KEY).values) < 1e-9


@dataclass
class Own(ij.LinearOperator):
    params: dict
    scale: jax.Array

    def mv(self, v):
        return jax.tree.map(lambda x: self.scale * x, v)

    @property
    def space(self):
        return self.params


class TestKronecker:
    @pytest.mark.parametrize("labels", mainly(["exact", "empirical", "sampled"], "exact"))
    @pytest.mark.parametrize(("fit", "streamed"), [(ij.kfac, ij.stream.kfac), (ij.ekfac, ij.stream.ekfac)])
    def test_fits_are_those_in_memory(self, fit, streamed, labels):
        params, data, query = problem()
        V = ij.per_example_grads(OBJECTIVE, params, query)
        expected = fit(OBJECTIVE, params, data, labels=labels, key=KEY).mm(V)
        found = streamed(OBJECTIVE, params, cut(data, 20), labels=labels, key=KEY).mm(V)
        assert relative_error(ij.flatten(found, params), ij.flatten(expected, params)) < 1e-10

    def test_invert_takes_it_as_curvature(self):
        params, data, query = problem()
        curvature = functools.partial(ij.ekfac, labels="empirical")
        inverse = ij.stream.invert(curvature, OBJECTIVE, params, cut(data, 20), ij.Direct(ij.RelativeDamping(0.1)))
        in_memory = ij.invert(curvature(OBJECTIVE, params, data), ij.Direct(ij.RelativeDamping(0.1)))
        V = ij.per_example_grads(OBJECTIVE, params, query)
        assert relative_error(inverse.solve_many(V)[0]["in"], in_memory.solve_many(V)[0]["in"]) < 1e-9
