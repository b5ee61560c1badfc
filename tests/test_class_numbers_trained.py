"""Class numbers and tokens of trainings that do not fit, and losses that are NaN: told where they are made or run."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import influence_jax as ij
from influence_jax import unrolled
from influence_jax.retrain import retrain, training

RNG = np.random.default_rng(0)
N, D, C, V, T = 6, 3, 4, 5, 2
PARAMS = {"w": jnp.zeros((D, C))}
DATA = {"x": RNG.normal(size=(N, D)), "y": RNG.integers(0, C, N)}
BAD = DATA | {"y": np.where(np.isin(np.arange(N), [2, 5]), C, DATA["y"])}
KEY = jax.random.key(0)
RANGE = r"the numbers of part 'y' are out of range in 2 of 6 examples, the first example 2 \(4\); expected 0 to 3"


@pytest.fixture(autouse=True)
def broadcasting():
    """Let arrays of different ranks and dtypes meet, as users' programs do."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def logits(p, z):
    return z["x"] @ p["w"]


def index(out, z):
    return -jax.nn.log_softmax(out)[z["y"]]


def one_hot(out, z):
    return optax.softmax_cross_entropy(out, jax.nn.one_hot(z["y"], C))


def bare(p, z):
    return index(logits(p, z), z)


OWN = ij.Objective(logits, ij.losses.cross_entropy("y"))


def train(objective, data, params=PARAMS, **given):
    return training(objective, optax.sgd(0.1), params, data, epochs=2, **given)


@pytest.mark.parametrize(
    "make",
    [
        lambda: train(ij.Objective(logits, index), BAD),
        lambda: train(bare, BAD, batches="shared", batch_size=2),
        lambda: train(bare, BAD, lambda key: {"w": jax.random.normal(key, (D, C))}),
    ],
)
def test_data_of_a_training(make):
    with pytest.raises(ValueError, match="data: " + RANGE):
        make()


def test_tokens_before_layers_that_start_at_zero():
    """Where nothing follows from what is read at the start, as of a head of zeros, a point near it is looked at."""
    params = {"table": jnp.zeros((V, D)), "w": jnp.zeros((D, C))}
    objective = ij.Objective(lambda p, z: p["table"][z["t"]].mean(0) @ p["w"], ij.losses.cross_entropy("y"))
    data = {"t": RNG.integers(0, V, (N, T)), "y": DATA["y"]}
    train(objective, data, params)
    data["t"][3, 1] = V
    with pytest.raises(
        ValueError, match=r"data: the numbers of part 't' .* 1 of 6 examples, the first example 3 \(5\)"
    ):
        train(objective, data, params)


def test_one_hot_warns():
    with pytest.warns(UserWarning, match=f"data: {RANGE}.* the row is zero"):
        train(ij.Objective(logits, one_hot), BAD)


def test_queries_of_unrolled():
    objective = ij.Objective(logits, index)
    with pytest.raises(ValueError, match="query: " + RANGE):
        unrolled.influences(train(objective, DATA), BAD, key=KEY)
    asked = lambda p, z: logits(p, z)[z["y"]]
    with pytest.raises(ValueError, match="query: " + RANGE):
        unrolled.influences(train(objective, DATA), BAD, key=KEY, measurement=asked)


def test_losses_that_are_nan_are_named():
    """A training and its derivative are NaN for them, not for the learning rate."""
    told = r"data: the loss at the start of 2 of 6 examples is NaN .* the first example 2 \(nan\): look at the labels"
    masks = np.ones((1, N), bool)
    for data in (BAD, BAD | {"x": np.where(np.isin(np.arange(N), [2, 5])[:, None], np.nan, DATA["x"])}):
        with pytest.raises(ValueError, match=told):
            retrain(train(OWN, data), masks, KEY, progress=False)
    with pytest.raises(ValueError, match=told):
        unrolled.influences(train(OWN, BAD), DATA, key=KEY)
    with pytest.raises(ValueError, match=r"query: the loss at the start of 2 of 6"):
        unrolled.influences(train(OWN, DATA), BAD, key=KEY)
    with pytest.raises(ValueError, match=r"data: the loss at the start of 6 of 6"):
        retrain(train(OWN, BAD | {"y": np.full(N, C)}), masks, KEY, progress=False)
    masks[0, 2] = False  # what has no weight is not counted
    with pytest.raises(ValueError, match=r"loss at the start of 1 of 5 examples .* the first example 5"):
        retrain(train(OWN, BAD), masks, KEY, progress=False)
    with pytest.raises(ValueError, match=r"the training diverged.*lower the learning rate"):
        retrain(training(OWN, optax.sgd(1e200), PARAMS, DATA, epochs=3, penalty=1.0), masks, KEY, progress=False)


def test_under_tracing_nothing_is_said():
    assert np.isfinite(jax.jit(lambda data: train(bare, data)(jnp.ones(N), KEY)["w"])(BAD)).all()
