"""One test per defect known of pyDVL 0.10, numbered as in its list of defects, and of dattri: none is made here."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative_error, tree_error

import influence_jax as ij

PARAMS = helpers.random_mlp(jax.random.key(0))
TRAIN = helpers.random_batch(jax.random.key(1), 24, 5, 3, classes=True)
QUERY = helpers.random_batch(jax.random.key(2), 6, 5, 3, classes=True)
OBJECTIVE = helpers.CLASSIFICATION
GGN = ij.GGN(OBJECTIVE, PARAMS, TRAIN)


def test_b4_regularisation_per_block():
    """A dict of dampings is used as given; one with a bogus or a missing block is an error, not silently no damping."""
    solvers = {"layer0": ij.Direct(0.1), "layer1": ij.Direct(0.7)}
    inverse = ij.invert(GGN, ij.Blockwise(solvers))
    assert [float(part.damping) for part in inverse.by_block.values()] == [0.1, 0.7]
    for wrong in ({**solvers, "layer9": ij.Direct(0.1)}, {"layer0": ij.Direct(0.1)}):
        with pytest.raises(ValueError, match="solver: got solvers for"):
            ij.invert(GGN, ij.Blockwise(wrong))


def test_b5_preconditioner_is_used():
    plain = ij.invert(GGN, ij.CG(1e-3, rtol=1e-8)).solve(PARAMS)[1]
    exact = ij.invert(GGN, ij.CG(1e-3, rtol=1e-8, preconditioner=ij.Direct(1e-3))).solve(PARAMS)[1]
    assert exact.steps <= 2 < plain.steps


def test_b6_more_right_hand_sides_than_parameters():
    """None stays at zero, and each has a tolerance of its own."""
    op = ij.Diagonal({"w": jnp.array([1.0, 4.0, 9.0])})
    V = {"w": jnp.arange(1.0, 31.0).reshape(10, 3) ** 3}
    X, info = ij.invert(op, ij.CG(1.0, rtol=1e-10)).solve_many(V)
    assert relative_error(X["w"], V["w"] / jnp.array([[2.0, 5.0, 10.0]])) < 1e-9
    assert bool(jnp.all(info.converged))
    assert info.steps.shape == (10,)


def test_b7_tolerance_is_relative_to_the_norm():
    """rtol means ||r|| <= rtol ||b||: scaling b changes no iteration count, and a loose one takes fewer steps."""
    steps = {}
    for rtol in (1e-2, 1e-8):
        inverse = ij.invert(GGN, ij.CG(0.01, rtol=rtol))
        for size in (1e-6, 1.0, 1e6):
            info = inverse.solve(jax.tree.map(lambda x, s=size: s * x, PARAMS))[1]
            steps.setdefault(rtol, set()).add(int(info.steps))
            assert info.residual <= 2 * rtol
    assert len(steps[1e-2]) == len(steps[1e-8]) == 1
    assert max(steps[1e-2]) < min(steps[1e-8])


def test_b8_one_ill_conditioned_right_hand_side():
    """The number of steps does not depend on the number of right-hand sides."""
    op = ij.Diagonal({"w": jnp.logspace(-5, 0, 40)})
    info = ij.invert(op, ij.CG(0.0, rtol=1e-6, max_steps=2000)).solve({"w": jnp.ones(40)})[1]
    assert bool(info.converged)
    assert info.steps > 10


def test_b9_perturbation_with_more_queries_than_examples():
    influence = ij.Influence(OBJECTIVE, PARAMS, ij.Identity(PARAMS))
    few = jax.tree.map(lambda x: x[:2], TRAIN)
    whole = influence.influences(QUERY, TRAIN, "perturbation")
    assert relative_error(influence.influences(QUERY, few, "perturbation"), whole[:, :2]) < 1e-12


@pytest.mark.parametrize("by_block", [False, True])
def test_b16_modes_as_strings(by_block):
    """A string is its mode in every method, and garbage is an error in every method."""
    influence = ij.Influence(OBJECTIVE, PARAMS, ij.Identity(PARAMS))
    factors = influence.influence_factors_by_block(QUERY) if by_block else influence.influence_factors(QUERY)
    name = "influences_from_factors_by_block" if by_block else "influences_from_factors"
    up, same = (getattr(influence, name)(factors, TRAIN, mode) for mode in ("up", ij.InfluenceMode.Up))
    assert jax.tree.leaves(up)[0].shape == jax.tree.leaves(same)[0].shape == (6, 24)
    with pytest.raises(ValueError, match="mode: got 'garbage'"):
        getattr(influence, name)(factors, TRAIN, "garbage")


@pytest.mark.parametrize("chunk", [23])
def test_b19_ragged_batches_are_weighted_by_their_examples(chunk):
    """Whatever the solver and the chunks, the curvature is the mean over examples."""
    ragged = ij.GGN(OBJECTIVE, PARAMS, TRAIN, chunk=chunk)
    expected = ij.invert(GGN, ij.Direct(0.1)).mv(PARAMS)
    for solver in (ij.Direct(0.1), ij.CG(0.1, rtol=1e-12)):
        assert tree_error(ij.invert(ragged, solver).mv(PARAMS), expected) < 1e-9


def test_b20_one_vector_stays_one_vector():
    """The shape of a result is that of its argument for every operator, and dense problems can be solved by CG."""
    matrix = jnp.array([[2.0, 1.0], [1.0, 3.0]])
    values, vectors = jnp.linalg.eigh(matrix)
    op = ij.LowRank({"w": vectors.T}, values)
    for operator in (op, ij.invert(op, ij.CG(0.5)), ij.invert(op, ij.Direct(0.5)), 2.0 * op):
        assert operator.mv({"w": jnp.ones(2)})["w"].shape == (2,)
        assert operator.mm({"w": jnp.ones((1, 2))})["w"].shape == (1, 2)
    expected = jnp.linalg.solve(matrix + 0.5 * jnp.eye(2), jnp.ones(2))
    assert relative_error(ij.invert(op, ij.CG(0.5)).mv({"w": jnp.ones(2)})["w"], expected) < 1e-9


def test_b22_parameters_follow_when_moved_to_another_device():
    """Nothing keeps a copy of the parameters behind: what is moved is used where it is."""
    device = jax.devices()[3]
    recipe = ij.InfluenceFunctionModel(OBJECTIVE, PARAMS, solver=ij.Direct(0.1))
    moved, train, query = jax.device_put((recipe, TRAIN, QUERY), device)
    scores = moved.fit(train).influences(query, train)
    assert scores.devices() == {device}
    assert relative_error(np.asarray(scores), np.asarray(recipe.fit(TRAIN).influences(QUERY, TRAIN))) < 1e-12


def softmax_layer(examples: int = 30, width: int = 4, classes: int = 3, *, bias: bool = True, scale: float = 0.0):
    """A softmax regression on correlated inputs; at scale 0 all predictions are uniform and K-FAC is exact."""
    data = helpers.random_batch(jax.random.key(4), examples, width, classes, classes=True)
    mixing = jnp.triu(jnp.arange(1.0, 1 + width**2).reshape(width, width)) / width
    params = {"kernel": scale * helpers.normal(jax.random.key(5), (width, classes))}
    params |= {"bias": scale * jnp.arange(1.0 * classes)} if bias else {}
    objective = ij.Objective(helpers.affine if bias else helpers.linear, helpers.cross_entropy)
    return objective, params, ij.Batch(data.x @ mixing + 1, data.y)


def test_b10_uniform_predictions_have_curvature():
    """Labels are the model's own, not a pseudo-loss whose Fisher matrix vanishes for two equally likely classes."""
    objective, params, data = softmax_layer(classes=2)
    for method in (ij.kfac, ij.ekfac):
        curvature = method(objective, params, data)
        assert relative_error(ij.to_dense(curvature), ij.to_dense(ij.GGN(objective, params, data))) < 1e-12


@pytest.mark.parametrize("method", [ij.kfac, ij.ekfac])
def test_b11_a_layer_without_bias_has_none(method):
    """The last weights are not taken for a bias: trained or not, each of them is treated as the others are."""
    objective, params, data = softmax_layer(bias=False, scale=1.0)
    curvature, order = method(objective, params, data), jnp.array([3, 1, 0, 2])
    turned = ij.Batch(data.x[:, order], data.y)
    permuted = method(objective, {"kernel": params["kernel"][order]}, turned)
    v = jnp.arange(12.0).reshape(4, 3)
    expected = ij.invert(curvature, ij.Direct(0.1)).mv({"kernel": v})["kernel"][order]
    assert relative_error(ij.invert(permuted, ij.Direct(0.1)).mv({"kernel": v[order]})["kernel"], expected) < 1e-10


def test_b12_by_layer_with_more_queries_than_examples():
    """Scores by layer are (queries, examples) in every mode, and sum to the total."""
    few = jax.tree.map(lambda x: x[:2], TRAIN)
    influence = ij.Influence(OBJECTIVE, PARAMS, ij.invert(ij.ekfac(OBJECTIVE, PARAMS, TRAIN), ij.Direct(0.1)))
    for mode, shape in (("up", (6, 2)), ("perturbation", (6, 2, 5))):
        by_layer = influence.influences_by_block(QUERY, few, mode)
        assert [scores.shape for scores in by_layer.values()] == [shape, shape]
        assert relative_error(sum(by_layer.values()), influence.influences(QUERY, few, mode)) < 1e-12


@pytest.mark.parametrize("length", [1, 8, 32])
def test_b13_sequences_keep_their_trace(length):
    """However long the sequences, the trace is that of the Fisher matrix, and outputs may have two axes."""
    objective = ij.Objective(lambda p, z: z.x @ p["kernel"], lambda out, z: 0.5 * jnp.mean(jnp.sum(out**2, axis=1)))
    x = jnp.repeat(helpers.normal(jax.random.key(6), (9, 1, 4)), length, axis=1)
    params = {"kernel": helpers.normal(jax.random.key(7), (4, 3))}
    data = ij.Batch(x, jnp.zeros(9))
    trace = ij.trace(ij.ekfac(objective, params, data, labels="empirical"))
    assert float(trace) == pytest.approx(float(ij.trace(ij.EmpiricalFisher(objective, params, data))), rel=1e-12)
    once = ij.ekfac(objective, params, ij.Batch(x[:, :1], data.y), labels="empirical")
    assert float(trace) == pytest.approx(float(ij.trace(once)), rel=1e-12)


def test_b14_dead_inputs_without_damping():
    """A singular curvature gives finite factors and a warning; the least damping makes it regular."""
    objective, params, data = softmax_layer()
    data = ij.Batch(jnp.asarray(data.x).at[:, 0].set(0), data.y)
    curvature = ij.ekfac(objective, params, data)
    query = jax.tree.map(lambda x: x[:3], data)
    with pytest.warns(ij.ConvergenceWarning, match="did not converge"):
        factors = ij.Influence(objective, params, ij.invert(curvature, ij.Direct(0.0))).influence_factors(query)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(factors))
    both = {**params, "turn": helpers.normal(jax.random.key(8), (4, 4))}
    deep = ij.Objective(lambda p, z: z.x @ p["turn"] @ p["kernel"] + p["bias"], helpers.cross_entropy)
    influence = ij.Influence(deep, both, ij.invert(ij.ekfac(deep, both, data), ij.Direct(0.0)))
    # Inputs to `turn` are dead, and of `kernel` one output too many: each is singular beside its largest eigenvalue.
    with pytest.warns(ij.ConvergenceWarning, match="in block '(turn|kernel)'"):
        influence.influence_factors(query)
    influence = ij.Influence(objective, params, ij.invert(curvature, ij.Direct(1e-8)), throw=True)
    assert bool(jnp.all(jnp.isfinite(influence.influences(query, data))))


def test_b15_fitting_leaves_the_model_as_it_was():
    from flax import nnx

    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model)))
    objective, params = ij.from_nnx(model, helpers.cross_entropy)
    _, _, data = softmax_layer()
    ij.ekfac(objective, params, jax.tree.map(lambda x: x, ij.Batch(data.x.astype(jnp.float32), data.y)))
    after = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model)))
    assert jax.tree.structure(before) == jax.tree.structure(after)
    assert all(np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (before, after)), strict=True))


def test_dattri_rotation_and_bias_layout():
    """Eigenvectors are columns, and the bias is the row of the constant input: both by the formula, and exactly.

    Turning gradients by the transposes, or pairing the bias with another input, is far off for correlated inputs.
    """
    objective, params, data = softmax_layer()
    curvature = ij.kfac(objective, params, data)
    inputs = np.concatenate([np.asarray(data.x), np.ones((30, 1))], axis=1)
    a, s = inputs.T @ inputs / 30, np.eye(3) / 3 - 1 / 9
    (a_values, q_a), (s_values, q_s) = np.linalg.eigh(a), np.linalg.eigh(s)
    v = {"kernel": jnp.arange(12.0).reshape(4, 3), "bias": jnp.array([5.0, -7.0, 1.0])}
    matrix = np.concatenate([v["kernel"], v["bias"][None]])
    solve = lambda p, q: p @ ((p.T @ matrix @ q) / (np.outer(a_values, s_values) + 0.1)) @ q.T
    got = ij.invert(curvature, ij.Direct(0.1)).mv(v)
    got = np.concatenate([got["kernel"], got["bias"][None]])
    assert relative_error(got, solve(q_a, q_s)) < 1e-10
    assert relative_error(solve(q_a.T, q_s.T), solve(q_a, q_s)) > 0.1
