"""Parity with stored float64 arrays: independent torch.func references, and pyDVL's direct method.

`tests/golden/README.md` says what each array is.
"""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import mainly

import influence_jax as ij

pytestmark = pytest.mark.as_users
CURVATURES = {"H": ij.Hessian, "GGN": ij.GGN, "EF": ij.EmpiricalFisher}


class Golden:
    """One stored problem: objective, parameters, data and the arrays to be met."""

    def __init__(self, file: str, objective: ij.Objective, layers: dict[str, str], dtype: type) -> None:
        self.arrays = np.load(helpers.GOLDEN / file)
        self.objective = objective
        work = {name.removeprefix("work/"): self.arrays[name] for name in self.arrays.files if name[:5] == "work/"}
        weights = {name.removeprefix("param64/"): value for name, value in work.items() if name[:8] == "param64/"}
        cast = lambda x: jnp.asarray(x, dtype if np.issubdtype(x.dtype, np.floating) else jnp.int32)
        self.params = jax.tree.map(cast, helpers.torch_layers(weights, layers))
        self.train = ij.Batch(cast(work["x_train"]), cast(work["y_train"]))
        self.query = ij.Batch(cast(work["x_test"]), cast(work["y_test"]))
        self.columns = jax.tree.map(lambda x: x[:50], self.train)

    def reference(self, name: str) -> np.ndarray:
        return self.arrays[f"ref/{name}"]

    def influence(self, curvature: str, solver: ij.Solver) -> ij.Influence:
        op = CURVATURES[curvature](self.objective, self.params, self.train)
        return ij.Influence(self.objective, self.params, ij.invert(op, solver))


def affine_layer(params: dict, example: ij.Batch) -> jax.Array:
    return helpers.affine(params["lin"], example)


LINEAR = ij.Objective(affine_layer, helpers.squared_loss)


def linear_regression(dtype: type = jnp.float64) -> Golden:
    return Golden("linear_regression.npz", LINEAR, {"lin": "lin"}, dtype)


def digits(dtype: type = jnp.float64) -> Golden:
    return Golden("digits_mlp_small.npz", helpers.CLASSIFICATION, {"fc1": "fc1", "fc2": "fc2"}, dtype)


@pytest.mark.parametrize("curvature", CURVATURES)
def test_linear_regression_matrix(curvature):
    golden = linear_regression()
    dense = ij.to_dense(CURVATURES[curvature](golden.objective, golden.params, golden.train))
    order = helpers.torch_order(golden.params)
    assert helpers.relative_error(dense[order][:, order], golden.reference(curvature)) < 1e-9


def test_linear_regression_gradients():
    golden = linear_regression()
    grads = ij.per_example_grads(golden.objective, golden.params, golden.query)
    assert helpers.relative_error(helpers.torch_flat(grads), golden.reference("grads_test")) < 1e-9


@pytest.mark.parametrize("solver", [ij.Direct, ij.Eigh, lambda damping: ij.CG(damping, rtol=1e-13)])
@pytest.mark.parametrize("curvature", CURVATURES)
def test_linear_regression_influence(curvature, solver):
    golden = linear_regression()
    influence = golden.influence(curvature, solver(1e-3))
    factors = influence.influence_factors(golden.query)
    scores = influence.influences_from_factors(factors, golden.columns)
    perturbed = influence.influences_from_factors(factors, golden.columns, "perturbation")
    assert helpers.relative_error(helpers.torch_flat(factors), golden.reference(f"factors_{curvature}_lam0.001")) < 1e-9
    assert helpers.relative_error(scores, golden.reference(f"infl_{curvature}_lam0.001")) < 1e-9
    assert helpers.relative_error(perturbed[:6], golden.reference(f"pert_{curvature}_lam0.001")) < 1e-9
    assert helpers.relative_error(influence.influences(golden.query, golden.columns), scores) < 1e-12


@pytest.mark.parametrize("curvature", CURVATURES)
def test_digits_influence(curvature):
    golden = digits()
    influence = golden.influence(curvature, ij.Eigh(1e-2))
    factors = influence.influence_factors(golden.query)
    got = helpers.torch_flat(factors)[:4]
    assert helpers.relative_error(got, golden.reference(f"factors_{curvature}_lam0.01")) < 1e-9
    scores = influence.influences(golden.query, golden.columns)
    assert helpers.relative_error(scores, golden.reference(f"infl_{curvature}_lam0.01")) < 1e-9
    if curvature != "EF":
        perturbed = influence.influences(golden.query, golden.columns, "perturbation")[:4]
        assert helpers.relative_error(perturbed, golden.reference(f"pert_{curvature}_lam0.01")) < 1e-9
        other = ij.Influence(golden.objective, golden.params, influence.inverse.with_damping(1e-3))
        scores = other.influences(golden.query, golden.columns)
        assert helpers.relative_error(scores, golden.reference(f"infl_{curvature}_lam0.001")) < 1e-9


@pytest.mark.parametrize("curvature", mainly(["GGN", "EF"], "GGN"))
def test_digits_cholesky_and_cg(curvature):
    golden = digits()
    expected = golden.reference(f"infl_{curvature}_lam0.01")
    for solver in (ij.Direct(1e-2), ij.CG(1e-2, rtol=1e-12)):
        scores = golden.influence(curvature, solver).influences(golden.query, golden.columns)
        assert helpers.relative_error(scores, expected) < 1e-9


@pytest.mark.parametrize("solver", [ij.Direct(1e-2), ij.CG(1e-2)], ids=["direct", "cg"])
@pytest.mark.parametrize("problem", mainly([linear_regression, digits], digits))
@pytest.mark.parametrize("curvature", mainly(["H", "GGN"], "GGN"))
def test_float32(float32, problem, curvature, solver):
    """Factors, scores and perturbations in single precision, with the solver's default tolerance."""
    golden = problem(jnp.float32)
    influence = golden.influence(curvature, solver)
    scores = influence.influences(golden.query, golden.columns)
    assert scores.dtype == jnp.float32
    assert helpers.relative_error(scores, golden.reference(f"infl_{curvature}_lam0.01")) < 1e-4
    factors = helpers.torch_flat(influence.influence_factors(golden.query))
    expected = golden.reference(f"factors_{curvature}_lam0.01")
    assert helpers.relative_error(factors[: len(expected)], expected) < 1e-4


@pytest.mark.parametrize("problem", mainly([linear_regression, digits], linear_regression))
def test_lissa_recursion(problem):
    """pyDVL's full-batch series, step for step: 2000 steps converge on the linear layer, 50 do not on the network."""
    golden, linear = problem(), problem is linear_regression
    solver = ij.LiSSA(1e-3 if linear else 1e-2, scale=10.0, depth=2000 if linear else 50, rtol=1e-13)
    influence = golden.influence("H", solver)
    if linear:
        factors = helpers.torch_flat(influence.influence_factors(golden.query))
        assert helpers.relative_error(factors, golden.arrays["pydvl/factors_lissa_H_scale10_it2000_fullbatch"]) < 1e-9
        return
    with pytest.warns(ij.ConvergenceWarning, match="LiSSA.* 20 of 20 solves did not converge"):
        scores = influence.influences(golden.query, golden.columns)
    assert helpers.relative_error(scores, golden.arrays["pydvl/infl_lissa_H_scale10_it50_fullbatch"]) < 1e-9


@pytest.mark.parametrize(("complement", "name"), mainly([(False, "lowrank"), (True, "woodbury")], (False, "lowrank")))
def test_digits_arnoldi(complement, name):
    """pyDVL's eigenpairs come from ARPACK with a tolerance of 1e-6, which limits the agreement."""
    golden = digits()
    op = CURVATURES["H"](golden.objective, golden.params, golden.train)
    solver = ij.Arnoldi(1e-2, rank=100, steps=400, complement=complement)
    influence = ij.Influence(golden.objective, golden.params, ij.invert(op, solver, key=jax.random.key(0)))
    scores = influence.influences(golden.query, golden.columns)
    assert helpers.relative_error(scores, golden.arrays[f"pydvl/infl_arnoldi_rank100_{name}"]) < 1e-7


def test_linear_regression_nystrom_from_the_stored_sketch():
    golden = linear_regression()
    op = CURVATURES["H"](golden.objective, golden.params, golden.train)
    order, theirs = helpers.torch_order(golden.params), golden.arrays["pydvl/nystroem_omega_rank20"]
    sketch = np.zeros_like(theirs.T)
    sketch[:, order] = theirs.T
    solver = ij.Nystrom(1e-3, rank=20)
    fit = ij.solvers.from_sketch(op, ij.unflatten(sketch, golden.params))
    assert (
        helpers.relative_error(np.sort(fit.pairs.values), np.sort(golden.arrays["pydvl/nystroem_rank20_eigvals"]))
        < 1e-9
    )
    influence = ij.Influence(golden.objective, golden.params, ij.Inverse(op, solver, jnp.array(1e-3), fit))
    factors = helpers.torch_flat(influence.influence_factors(golden.query))
    assert helpers.relative_error(factors, golden.arrays["pydvl/factors_nystroem_rank20_seed0"]) < 1e-9
    scores = influence.influences(golden.query, golden.columns)
    assert helpers.relative_error(scores, golden.arrays["pydvl/infl_nystroem_rank20_seed0"]) < 1e-9


@pytest.mark.thorough
def test_digits_nystrom_as_a_preconditioner():
    """A hundred products in advance save five sixths of the iterations, for the same answer."""
    golden, steps = digits(jnp.float32), []
    rhs = jax.tree.map(lambda g: g[:8], ij.per_example_grads(golden.objective, golden.params, golden.query))
    for preconditioner in (None, ij.Nystrom(1e-3, rank=100)):
        op = ij.GGN(golden.objective, golden.params, golden.train)
        solver = ij.CG(1e-3, rtol=1e-4, preconditioner=preconditioner)
        _, info = ij.invert(op, solver, key=jax.random.key(0)).solve_many(rhs)
        assert bool(jnp.all(info.converged))
        steps.append(info.steps)
    assert int(jnp.min(steps[0])) >= 4 * int(jnp.max(steps[1]))


@pytest.mark.parametrize("problem", [linear_regression, digits])
def test_harmonic_mean(problem):
    golden, damping = problem(), 1e-3 if problem is linear_regression else 1e-2
    influence = golden.influence("EF", ij.HarmonicMean(damping))
    expected = golden.reference(f"factors_IHM_lam{damping}")
    factors = helpers.torch_flat(influence.influence_factors(golden.query))[: len(expected)]
    assert helpers.relative_error(factors, expected) < 1e-9
    scores = influence.influences(golden.query, golden.columns)
    assert helpers.relative_error(scores, golden.reference(f"infl_IHM_lam{damping}")) < 1e-9


DAMPINGS = {"1e-3": 1e-3, "1e-2": 1e-2, "heuristic": ij.RelativeDamping(0.1)}
EKFAC = np.load(helpers.GOLDEN / "digits_ekfac.npz")


@pytest.mark.parametrize(("kind", "labels"), [("emp", "empirical"), ("true", "exact")])
@pytest.mark.parametrize("method", ["kfac", "ekfac"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), mainly([(jnp.float64, 1e-9), (jnp.float32, 1e-3)], (jnp.float64, 1e-9))
)
def test_digits_kronecker(dtype, tolerance, method, kind, labels):
    """Independent float64 references, and with the data's labels kronfluence; one fit for all dampings."""
    golden = digits(dtype)
    op = getattr(ij, method)(golden.objective, golden.params, golden.train, labels=labels)
    inverse = ij.invert(op, ij.Direct(0.0))
    for name, damping in DAMPINGS.items():
        influence = ij.Influence(golden.objective, golden.params, inverse.with_damping(damping))
        scores = influence.influences(golden.query, golden.columns)
        assert scores.dtype == dtype
        assert helpers.relative_error(scores, EKFAC[f"ekfac_ref/infl_{method}_{kind}_damp{name}"]) < tolerance
        if kind == "emp":
            assert helpers.relative_error(scores, EKFAC[f"kronfluence/scores_{method}_damp{name}"]) < tolerance


def test_digits_kronecker_eigenvalues():
    """The corrected eigenvalues themselves, which do not depend on the signs of eigenvectors."""
    golden = digits()
    op = ij.ekfac(golden.objective, golden.params, golden.train)
    for layer, name in zip(op.layers, ("fc1", "fc2"), strict=True):
        expected = EKFAC[f"ekfac_ref/true/{name}/lambda_ekfac"].T
        assert helpers.relative_error(layer.values[0], expected) < 1e-9
        for q, moment in ((layer.q_in[0], "A"), (layer.q_out[0], "G")):
            rotated = q.T @ EKFAC[f"ekfac_ref/true/{name}/{moment}"] @ q
            assert helpers.relative_error(rotated, np.diag(np.diag(rotated))) < 1e-9


@pytest.mark.parametrize("damping", DAMPINGS)
def test_digits_diagonal_and_identity(damping):
    """kronfluence's other strategies, as operators of ours."""
    golden = digits()
    fisher = ij.EmpiricalFisher(golden.objective, golden.params, golden.train)
    solver = ij.Blockwise(ij.Direct(DAMPINGS[damping]), blocks=ij.by_layer)
    inverse = ij.invert(ij.Diagonal(ij.diagonal(fisher)), solver)
    for operator, name in ((inverse, f"diagonal_damp{damping}"), (ij.Identity(golden.params), "identity_damp1e-3")):
        scores = ij.Influence(golden.objective, golden.params, operator).influences(golden.query, golden.columns)
        assert helpers.relative_error(scores, EKFAC[f"kronfluence/scores_{name}"]) < 1e-9


@pytest.mark.parametrize("loss", ["mse", "ce"])
def test_tiny_mlp_against_pydvl(loss):
    """pyDVL's DirectInfluence on an indefinite Hessian: factors, up, perturbation and the symmetric case."""
    arrays, objective, params, train, query = helpers.tiny_mlp(loss)
    hessian = ij.Hessian(objective, params, train)
    order = helpers.torch_order(params)
    assert helpers.relative_error(ij.to_dense(hessian)[order][:, order], arrays["hessian"]) < 1e-9
    influence = ij.Influence(objective, params, ij.invert(hessian, ij.Direct(float(arrays["regularization"]))))
    factors = influence.influence_factors(query)
    assert helpers.relative_error(helpers.torch_flat(factors), arrays["full/factors_test"]) < 1e-9
    for mode in ("up", "perturbation"):
        assert helpers.relative_error(influence.influences(query, train, mode), arrays[f"full/{mode}"]) < 1e-9
