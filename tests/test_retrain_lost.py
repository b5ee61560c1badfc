"""Trainings without an example whose loss is not finite: a weight of zero removes it, whatever it holds."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import relative_error

import influence_jax as ij

RNG = np.random.default_rng(0)
N, BAD = 9, 4
X, Y, LABELS = RNG.normal(size=(N, 3)), RNG.normal(size=N), RNG.integers(0, 2, N)
WEIGHTS = jnp.ones(N).at[BAD].set(0)
KEY = jax.random.key(0)


def squares(p, z):
    return 0.5 * (z["x"] @ p["w"] - z["y"]) ** 2


cross_entropy = ij.Objective(lambda p, z: z["x"] @ p["w"], ij.losses.cross_entropy("y"))


def counts(p, z):
    """The logarithm of a rate that may be zero, where no step can lead away from."""
    rate = z["exposure"] * jnp.exp(z["x"] @ p["w"])
    return rate - z["y"] * jnp.log(rate)


def spoilt(array, value):
    array = array.copy()
    array[BAD] = value
    return array


# Loss, start, data without and with an example that is not to be there.
CASES = {
    "an input is NaN": (squares, np.zeros(3), {"x": X, "y": Y}, {"x": spoilt(X, np.nan), "y": Y}),
    "a target is infinite": (squares, np.ones(3), {"x": X, "y": Y}, {"x": X, "y": spoilt(Y, np.inf)}),
    "a label is out of range": (
        cross_entropy,
        RNG.normal(size=(3, 2)),
        {"x": X, "y": LABELS},
        {"x": X, "y": spoilt(LABELS, -100)},
    ),
    "a rate is zero": (
        counts,
        np.zeros(3),
        {"x": X, "y": LABELS + 1.0, "exposure": np.ones(N)},
        {"x": X, "y": LABELS + 1.0, "exposure": spoilt(np.ones(N), 0.0)},
    ),
}
HOW = {"full": {}, "own": {"batch_size": 4}, "shared": {"batch_size": 4, "batches": "shared"}}


@pytest.mark.parametrize(
    ("case", "how"),
    [*((case, "full") for case in CASES), ("a label is out of range", "own"), ("a rate is zero", "shared")],
)
def test_without_weight_it_is_not_there(case, how):
    objective, start, *both = CASES[case]
    clean, train = (
        ij.retrain.training(objective, optax.sgd(0.1), {"w": start}, data, epochs=3, **HOW[how]) for data in both
    )
    expected = clean(WEIGHTS, KEY)["w"]
    assert relative_error(train(WEIGHTS, KEY)["w"], expected) < 1e-12
    assert np.isnan(train(jnp.ones(N), KEY)["w"]).all()


@pytest.mark.parametrize("how", ["full", "shared"])
def test_many_masks(how):
    objective, start, *both = CASES["an input is NaN"]
    masks = np.stack([WEIGHTS > 0, np.arange(N) < BAD])
    found, expected = (
        ij.retrain.retrain(
            ij.retrain.training(objective, optax.sgd(0.1), {"w": start}, data, epochs=3, **HOW[how]),
            masks,
            KEY,
            how="vmap",
        )["w"]
        for data in both[::-1]
    )
    assert relative_error(found, expected) < 1e-12


def test_against_numpy():
    """Gradient descent on the others alone."""
    w, kept = np.zeros(3), np.arange(N) != BAD
    for _ in range(3):
        w = w - 0.1 * ((X @ w - Y)[kept] @ X[kept] / kept.sum() + 0.01 * w)
    objective, start, _, data = CASES["an input is NaN"]
    train = ij.retrain.training(objective, optax.sgd(0.1), {"w": start}, data, epochs=3, penalty=0.01)
    assert relative_error(train(WEIGHTS, KEY)["w"], w) < 1e-12
    assert relative_error(train.checkpoints(WEIGHTS, KEY, [0, 3])["w"][1], w) < 1e-12
    assert np.isnan(train.checkpoints(jnp.ones(N), KEY, [3])["w"]).all()


@pytest.mark.parametrize("how", ["full", "shared"])
def test_derivatives_in_the_weights(how):
    """Those of the others are right, and its own, of a training that it would spoil, is NaN."""
    objective, start, *both = CASES["an input is NaN"]
    trains = [ij.retrain.training(objective, optax.sgd(0.1), {"w": start}, d, epochs=3, **HOW[how]) for d in both]
    expected, found = (jax.grad(lambda w, train=train: jnp.sum(train(w, KEY)["w"]))(WEIGHTS) for train in trains)
    assert np.isnan(found).nonzero()[0].tolist() == [BAD]
    assert relative_error(np.delete(found, BAD), np.delete(expected, BAD)) < 1e-12
    query = jax.tree.map(lambda x: x[:2], both[0])
    expected, found = (ij.unrolled.influences(train, query, WEIGHTS, key=KEY) for train in trains)
    assert np.isnan(found).any(axis=0).nonzero()[0].tolist() == [BAD]
    assert relative_error(np.delete(found, BAD, 1), np.delete(expected, BAD, 1)) < 1e-12


def test_what_is_undefined_at_the_start_only_is_kept():
    """The logarithm of zero at zero, which a first step on the others leaves."""
    loss = lambda p, z: jnp.where(z["log"], -jnp.log(jnp.maximum(p["w"], 0)), (p["w"] - 1) ** 2)
    data = {"log": np.arange(N) == BAD}
    train = ij.retrain.training(loss, optax.sgd(0.1), {"w": np.zeros(())}, data, epochs=1)
    assert train.lost is None
    drawn = lambda key: {"w": jax.random.uniform(key)}
    assert ij.retrain.training(squares, optax.sgd(0.1), {"w": np.zeros(3)}, {"x": X, "y": Y}, epochs=1).lost is None
    lost = ij.retrain.training(lambda p, z: p["w"] * z["x"], optax.sgd(0.1), drawn, {"x": spoilt(Y, np.nan)}, epochs=2)
    assert np.flatnonzero(lost.lost).tolist() == [BAD]
    assert np.isfinite(lost(WEIGHTS, KEY)["w"])
