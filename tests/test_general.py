"""The one-call functions, averages over batches, certificates, and errors instead of warnings."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import mainly, relative_error, tree_error

import influence_jax as ij

OBJECTIVE = helpers.CLASSIFICATION
PARAMS = helpers.random_mlp(jax.random.key(0))
TRAIN = helpers.random_batch(jax.random.key(1), 17, 5, 3, classes=True)
QUERY = helpers.random_batch(jax.random.key(2), 6, 5, 3, classes=True)
DAMPING = 0.9  # above the Hessian's smallest eigenvalue
KEY = jax.random.key(3)


def split(batch, *ends):
    return [ij.Batch(x, y) for x, y in zip(jnp.split(batch.x, ends), jnp.split(batch.y, ends), strict=True)]


@pytest.fixture(scope="module")
def exact():
    """What `hessian_regularization=DAMPING` asks for."""
    hessian = ij.Hessian(OBJECTIVE, PARAMS, TRAIN)
    return ij.Influence(OBJECTIVE, PARAMS, ij.invert(hessian, ij.Direct(DAMPING)))


class TestGeneral:
    @pytest.mark.parametrize(
        ("method", "tolerance"),
        mainly(
            [("direct", 1e-12), (ij.InversionMethod.Cg, 1e-4), ("lissa", 1e-2), (ij.InversionMethod.Arnoldi, 0.3)],
            ("direct", 1e-12),
            (ij.InversionMethod.Cg, 1e-4),
        ),
    )
    def test_methods(self, exact, method, tolerance):
        options = {"inversion_method": method, "hessian_regularization": DAMPING, "key": KEY}
        scores = ij.compute_influences(OBJECTIVE, PARAMS, TRAIN, test_data=QUERY, **options)
        assert relative_error(scores, exact.influences(QUERY, TRAIN)) < tolerance
        own = ij.compute_influences(OBJECTIVE, PARAMS, TRAIN, **options)
        assert own.shape == (17, 17)

    @pytest.mark.parametrize("kind", ["up", ij.InfluenceType.Perturbation])
    def test_three_roles_in_batches(self, exact, kind):
        """Training, test and input data are kept apart, each as a batch or as a ragged loader."""
        inputs = helpers.random_batch(jax.random.key(4), 9, 5, 3, classes=True)
        scores = ij.compute_influences(
            OBJECTIVE,
            PARAMS,
            split(TRAIN, 7, 15),
            test_data=split(QUERY, 4),
            input_data=split(inputs, 2, 6),
            inversion_method=ij.Direct(DAMPING),
            influence_type=kind,
        )
        assert relative_error(scores, exact.influences(QUERY, inputs, str(kind))) < 1e-12

    def test_in_two_steps(self, exact):
        result = ij.compute_influence_factors(
            OBJECTIVE, PARAMS, TRAIN, QUERY, ij.InversionMethod.Direct, hessian_perturbation=DAMPING
        )
        assert tree_error(result.x, exact.influence_factors(QUERY)) < 1e-12
        assert result.info.converged.shape == (6,)
        for factors in (result, result.x):
            up = ij.compute_influences_up(OBJECTIVE, PARAMS, TRAIN, factors)
            assert relative_error(up, exact.influences(QUERY, TRAIN)) < 1e-12
        perturbed = ij.compute_influences_pert(OBJECTIVE, PARAMS, TRAIN, result)
        assert relative_error(perturbed, exact.influences(QUERY, TRAIN, "perturbation")) < 1e-12

    @pytest.mark.parametrize(
        ("options", "error", "words"),
        [
            ({"inversion_method": "newton"}, ValueError, "inversion_method: got 'newton'.*'direct', 'cg'"),
            ({"inversion_method": ij.CG(0.1), "hessian_regularization": 0.1}, ValueError, "damping of its own"),
            ({"inversion_method": 3}, TypeError, "solver: got 3"),
            ({"inversion_method": "cg"}, TypeError, "hessian_regularization: got none for.*'cg'.*RelativeDamping"),
            ({"hessian_regularization": -1.0}, ValueError, "hessian_regularization: got -1.0"),
            ({"influence_type": "down"}, ValueError, "mode: got 'down'.*'up', 'perturbation'"),
            (
                {"test_data": iter([QUERY]), "hessian_regularization": DAMPING},
                TypeError,
                "test_data: got the one-shot iterator",
            ),
            ({"test_data": [], "hessian_regularization": DAMPING}, ValueError, "test_data: is empty"),
            ({"input_data": 3, "hessian_regularization": DAMPING}, TypeError, "input_data: got a int"),
            ({"inversion_method": "arnoldi", "hessian_regularization": 0.1}, ValueError, "key: Arnoldi"),
        ],
    )
    def test_mistakes(self, options, error, words):
        with pytest.raises(error, match=words):
            ij.compute_influences(OBJECTIVE, PARAMS, TRAIN, **options)


def test_an_error_instead_of_a_warning():
    options = {"inversion_method": ij.CG(1e-4, max_steps=1), "curvature": ij.GGN}
    with pytest.warns(ij.ConvergenceWarning, match="17 of 17 solves did not converge"):
        ij.compute_influences(OBJECTIVE, PARAMS, TRAIN, **options)
    with pytest.raises(ij.ConvergenceError, match=r"CG\(.*17 of 17 solves did not converge \(worst.*raise the damping"):
        ij.compute_influences(OBJECTIVE, PARAMS, TRAIN, throw=True, **options)
    model = ij.InfluenceFunctionModel(OBJECTIVE, PARAMS, solver=options["inversion_method"], throw=True)
    with pytest.raises(ij.ConvergenceError, match="GGN"):
        model.fit(TRAIN).self_influences(TRAIN)


class TestAccumulate:
    def test_b2_averages_by_points(self):
        """However the data are cut, the mean is that over examples, for one vector and for a stack."""
        whole, v = ij.GGN(OBJECTIVE, PARAMS, TRAIN), helpers.random_like(KEY, PARAMS)
        stack = helpers.random_like(KEY, PARAMS, 4)
        for loader in ([TRAIN], split(TRAIN, 1, 9), split(TRAIN, 8)):
            product = ij.stream.accumulate(lambda batch: ij.GGN(OBJECTIVE, PARAMS, batch).mv(v), loader)
            assert tree_error(product, whole.mv(v)) < 1e-12
            products = ij.stream.accumulate(lambda batch: ij.GGN(OBJECTIVE, PARAMS, batch).mm(stack), loader)
            assert tree_error(products, whole.mm(stack)) < 1e-12

    def test_b1_b3_empirical_fisher_inverse(self):
        """pyDVL's Gauss-Newton factors depend on the batches, or are infinite for one; these do neither."""
        grads = helpers.flat(ij.per_example_grads(OBJECTIVE, PARAMS, TRAIN), PARAMS)
        expected = np.linalg.solve(grads.T @ grads / 17 + 0.1 * np.eye(ij.tree.size(PARAMS)), grads.T).T @ grads.T
        for solver in (ij.Direct(0.1), ij.CG(0.1, rtol=1e-12), ij.BlockCG(0.1, rtol=1e-12), ij.SampleSpace(0.1)):
            for training in (TRAIN, split(TRAIN, 9)):
                options = {"inversion_method": solver, "curvature": ij.EmpiricalFisher, "input_data": TRAIN}
                scores = ij.compute_influences(OBJECTIVE, PARAMS, training, test_data=TRAIN, **options)
                assert relative_error(scores, expected) < 1e-9

    def test_averages_by_chunks(self):
        loader = [jnp.array([1.0, 2.0, 3.0]), jnp.array([6.0])]
        mean = lambda batch: jnp.mean(batch)
        assert float(ij.stream.accumulate(mean, loader, ij.ChunkAveraging())) == 4.0
        assert float(ij.stream.accumulate(mean, loader, ij.PointAveraging())) == 3.0

    @pytest.mark.parametrize(
        ("arguments", "error", "words"),
        [
            ((iter([TRAIN]),), TypeError, "loader: got the one-shot iterator"),
            (([],), ValueError, "loader: is empty"),
            ((3,), TypeError, "loader: got a int"),
            ((TRAIN,), TypeError, r"loader: got one batch, a Batch; expected an iterable of batches, e.g. \[batch\]"),
            ((TRAIN.x,), TypeError, "loader: got one batch, a "),
            (([TRAIN], ij.PointAveraging), TypeError, "averaging: got <class.*expected"),
            (([TRAIN], "points"), TypeError, r"averaging: got 'points', expected PointAveraging\(\)"),
        ],
    )
    def test_mistakes(self, arguments, error, words):
        with pytest.raises(error, match=words):
            ij.stream.accumulate(len, *arguments)

    def test_narrow_parts_are_added_in_float32(self):
        """A sum of ones in bfloat16 stops at 256; integers become numbers that have a mean."""
        for ones in (jnp.ones(2, jnp.bfloat16), jnp.ones(2, jnp.int32)):
            mean = ij.stream.accumulate(lambda batch: batch, [ones] * 300, ij.ChunkAveraging())
            assert mean.dtype == jnp.float32
            assert mean.tolist() == [1.0, 1.0]

    def test_results_have_to_be_alike(self):
        with pytest.raises(ValueError, match=r"fn: returned \(1,\) for a batch, after \(3,\)"):
            ij.stream.accumulate(lambda batch: batch, [jnp.arange(3.0), jnp.arange(1.0)])
        assert float(ij.stream.accumulate(len, [jnp.arange(3.0), jnp.arange(1.0)], ij.ChunkAveraging())) == 2.0


class TestBounds:
    @pytest.mark.parametrize("blocks", mainly([ij.full, ij.by_layer], ij.by_layer))
    @pytest.mark.parametrize(
        "solver",
        [
            ij.CG(0.05, max_steps=4),
            *(
                pytest.param(solver, marks=pytest.mark.thorough)
                for solver in (ij.BlockCG(0.05, max_steps=2), ij.Jacobi(0.05))
            ),
            ij.Arnoldi(0.05, rank=4),
        ],
    )
    def test_hold_against_the_exact_scores(self, solver, blocks):
        op = ij.GGN(OBJECTIVE, PARAMS, TRAIN)
        exact = ij.Influence(OBJECTIVE, PARAMS, ij.invert(op, ij.Blockwise(ij.Direct(0.05), blocks)))
        inverse = ij.invert(op, ij.Blockwise(solver, blocks), key=KEY)
        scores, bounds, info = ij.score_bounds(ij.Influence(OBJECTIVE, PARAMS, inverse), QUERY, TRAIN)
        missed = jnp.abs(scores - exact.influences(QUERY, TRAIN))
        assert jnp.all(missed <= bounds * (1 + 1e-9))
        assert jnp.max(missed / bounds) > 1e-3, "a bound that is never approached says little"
        assert info.residual.shape == (6,)

    def test_indefinite(self):
        """NaN unless the smallest eigenvalue is told, and where it is too small."""
        op = ij.Hessian(OBJECTIVE, PARAMS, TRAIN)
        lowest = np.linalg.eigvalsh(np.asarray(ij.to_dense(op)))[0]
        influence = ij.Influence(OBJECTIVE, PARAMS, ij.invert(op, ij.CG(DAMPING, max_steps=3)))
        exact = ij.Influence(OBJECTIVE, PARAMS, ij.invert(op, ij.Direct(DAMPING))).influences(QUERY, TRAIN)
        assert jnp.all(jnp.isinf(ij.score_bounds(influence, QUERY, TRAIN)[1]))
        scores, bounds, _ = ij.score_bounds(influence, QUERY, TRAIN, lambda_min=lowest)
        assert jnp.all(jnp.abs(scores - exact) <= bounds)
        assert jnp.all(jnp.isinf(ij.score_bounds(influence, QUERY, TRAIN, lambda_min=-2 * DAMPING)[1]))

    def test_a_loss_that_is_not_convex_in_the_output(self):
        """The GGN is then indefinite, and nothing is known without a bound from the user."""
        objective = ij.Objective(lambda p, z: p["w"] @ z.x, lambda out, z: jnp.log1p((out - z.y) ** 2))
        params = {"w": jnp.array([0.3, -0.2, 0.5])}
        data = ij.Batch(helpers.normal(KEY, (24, 3)), jnp.full(24, 2.0))
        op = ij.GGN(objective, params, data)
        lowest = float(np.linalg.eigvalsh(np.asarray(ij.to_dense(op)))[0])
        assert lowest < -0.1
        for operator in (op, 2.0 * op, op + op):
            influence = ij.Influence(objective, params, ij.invert(operator, ij.CG(1.0, max_steps=1)))
            assert jnp.all(jnp.isinf(ij.score_bounds(influence, data, data)[1]))
        influence = ij.Influence(objective, params, ij.invert(op, ij.CG(1.0, max_steps=1)))
        exact = ij.Influence(objective, params, ij.invert(op, ij.Eigh(1.0))).influences(data, data)
        scores, bounds, _ = ij.score_bounds(influence, data, data, lambda_min=lowest)
        assert jnp.all(jnp.abs(scores - exact) <= bounds * (1 + 1e-9))

    def test_tiny_gradients(self, float32):
        """Their squares are zero in float32; scores, bounds and the order of the best are not."""
        f = lambda params, z: params["w"] @ z
        data, tiny = helpers.normal(KEY, (30, 8), jnp.float32), jnp.full((1, 8), 1e-25, jnp.float32)
        op = ij.EmpiricalFisher(f, {"w": jnp.zeros(8, jnp.float32)}, data)
        influence = ij.Influence(f, {"w": jnp.zeros(8, jnp.float32)}, ij.invert(op, ij.CG(0.5, max_steps=2)))
        scores, bounds, _ = ij.score_bounds(influence, tiny, data)
        exact = ij.Influence(f, {"w": jnp.zeros(8, jnp.float32)}, ij.invert(op, ij.Direct(0.5))).influences(tiny, data)
        assert jnp.all(jnp.abs(scores - exact) <= bounds)
        assert jnp.all(bounds > 0)

    def test_lambda_min_is_a_number(self):
        influence = ij.Influence(OBJECTIVE, PARAMS, ij.invert(ij.GGN(OBJECTIVE, PARAMS, TRAIN), ij.CG(0.5)))
        for wrong in ("a", True, jnp.zeros(2)):
            with pytest.raises(TypeError, match=r"lambda_min: got .* expected a number, or None"):
                ij.score_bounds(influence, QUERY, TRAIN, lambda_min=wrong)

    @pytest.mark.parametrize(
        ("influence", "words"),
        [
            ("mine", "influence: got a str"),
            (ij.Influence(OBJECTIVE, PARAMS, ij.Identity(PARAMS)), "expected an Inverse"),
        ],
    )
    def test_mistakes(self, influence, words):
        with pytest.raises(TypeError, match=words):
            ij.score_bounds(influence, QUERY, TRAIN)
