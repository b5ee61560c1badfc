"""One test per defect known of pyDVL 0.10, so that none is made here. The names are those of its list of defects."""

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
    assert [float(part.state.damping) for part in inverse.by_block.values()] == [0.1, 0.7]
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
