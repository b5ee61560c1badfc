"""A fit without a mask of a loss that masks positions: a warning says so, once, and nothing else sets it off."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo import normal

import influence_jax as ij

EXAMPLES, T, WIDTH, CLASSES = 8, 6, 4, 3
LENGTHS = np.array([6, 3, 1, 5, 2, 4, 6, 3])
MASK = 1.0 * (np.arange(T)[None] < LENGTHS[:, None])
DATA = {"x": normal(EXAMPLES, T, WIDTH, number=8), "mask": MASK, "y": np.arange(EXAMPLES * T).reshape(EXAMPLES, T) % 3}
PARAMS = {
    "encoder": jnp.asarray(normal(WIDTH, WIDTH, number=0)),
    "mixer": jnp.asarray(normal(WIDTH, WIDTH, number=1)),
    "head": jnp.asarray(normal(WIDTH, CLASSES, number=2)),
}


def mask(z):
    return z["mask"]


def attended(p, z, keys, activation=jnp.tanh):
    """A layer of attention, of which padding is left out as keys where `keys` are given."""
    h = activation(z["x"] @ p["encoder"])
    scores = h @ p["mixer"] @ h.T
    scores = scores if keys is None else jnp.where(keys[None] > 0, scores, -jnp.inf)
    return h + jax.nn.softmax(scores) @ h


def tokens(p, z):
    return attended(p, z, z["mask"]) @ p["head"]


def leaky_tokens(p, z):
    return attended(p, z, None) @ p["head"]


def relu_pooled(p, z):
    hidden = attended(p, z, z["mask"], jax.nn.relu)
    return jnp.sum(z["mask"][:, None] * hidden, axis=0) @ p["head"]


def pooled(p, z):
    return jnp.mean(attended(p, z, None), axis=0) @ p["head"]


def maximum(p, z):
    return jnp.max(jax.nn.relu(z["x"] @ p["encoder"]) @ p["mixer"], axis=0) @ p["head"]


def relu_unit(p, z):
    """One unit, which is off at half of the positions."""
    return jax.nn.relu(z["x"] @ p["encoder"][:, :1]) @ p["mixer"][:1] @ p["head"]


def nll(out, y):
    return jax.nn.logsumexp(out, axis=-1) - jnp.take_along_axis(out, y[..., None], axis=-1)[..., 0]


def masked_sum(out, z):
    return jnp.sum(z["mask"] * nll(out, z["y"]))


def masked_mean(out, z):
    return masked_sum(out, z) / jnp.sum(z["mask"])


def ignored(out, z):
    seen = jnp.where(z["mask"] > 0, z["y"], -100)
    return jnp.sum(jnp.where(seen >= 0, nll(out, jnp.maximum(seen, 0)), 0))


def label(out, z):
    return nll(out, z["y"][0])


def next_token(out, z):
    return jnp.sum(nll(out[:-1], z["y"][1:]))


def last_token(out, z):
    return nll(out[-1], z["y"][0])


def every_token(out, z):
    return jnp.sum(nll(out, z["y"]))


def hinge(out, z):
    return jnp.sum(jnp.maximum(0, 1 - out[:, 0] * jnp.where(z["y"] > 0, 1.0, -1.0)))


def told(fit):
    """Return the warnings of a fit."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit()
    return [str(warning.message) for warning in caught]


MASKED = {
    "a sum over tokens": (tokens, masked_sum),
    "a mean over tokens": (tokens, masked_mean),
    "ignored labels": (tokens, ignored),
    "a masked average, with ReLU": (relu_pooled, label),
}
BY_DESIGN = {
    "an average": (pooled, label),
    "all but the last": (leaky_tokens, next_token),
    "the last alone": (leaky_tokens, last_token),
    "a maximum": (maximum, label),
    "a ReLU": (relu_unit, every_token),
    "a hinge": (leaky_tokens, hinge),
}


@pytest.mark.parametrize("name", MASKED)
def test_masked_positions_are_told(name):
    objective = ij.Objective(*MASKED[name])
    (message,) = told(lambda: ij.kfac(objective, PARAMS, DATA, labels="empirical"))
    assert message.startswith("mask: none was given")
    assert f"pass mask=lambda example: ..., {T} entries" in message
    assert "first position" in message
    assert not told(lambda: ij.kfac(objective, PARAMS, DATA, labels="empirical", mask=mask))


@pytest.mark.parametrize("name", BY_DESIGN)
def test_what_a_model_leaves_out_is_not(name):
    objective = ij.Objective(*BY_DESIGN[name])
    assert not told(lambda: ij.kfac(objective, PARAMS, DATA, labels="empirical"))


def test_the_first_place_is_right():
    objective = ij.Objective(tokens, masked_sum)
    data = {**DATA, "mask": np.where(np.arange(EXAMPLES)[:, None] == 5, MASK, 1.0)}
    (message,) = told(lambda: ij.ekfac(objective, PARAMS, data))
    assert "first position 4 of example 5" in message
    weights = jnp.where(jnp.arange(EXAMPLES) == 5, 0.0, 1.0)
    assert not told(lambda: ij.ekfac(objective, PARAMS, data, weights=weights))
    assert not told(lambda: ij.ekfac(objective, PARAMS, data, mask=lambda z: z["mask"] >= 0))  # meant to count


@pytest.mark.parametrize("name", ["a sum over tokens", "ignored labels"])
def test_a_mask_that_keeps_what_the_loss_masks_is_told(name):
    """Here one position more in each example; of a fit that is streamed likewise, and not where named layers are."""
    objective = ij.Objective(*MASKED[name])
    wide = lambda z: jnp.roll(z["mask"], 1).at[0].set(1.0)
    fits = (
        lambda mask: ij.kfac(objective, PARAMS, DATA, labels="empirical", mask=mask),
        lambda mask: ij.stream.kfac(objective, PARAMS, [DATA], labels="empirical", mask=mask, progress=False),
    )
    for fit in fits:
        (message,) = told(lambda fit=fit: fit(wide))
        assert "mask: it keeps positions of" in message
        assert "first position 3 of example 1" in message
        assert not told(lambda fit=fit: fit(mask))
    assert not told(lambda: fits[0]({"head": wide}))


def test_layers_that_padding_leaks_through_are_not_named():
    """Keys that are not left out: the mask is for the rest, by name, and as advised it is taken without a word."""
    objective = ij.Objective(leaky_tokens, masked_sum)
    (message,) = told(lambda: ij.kfac(objective, PARAMS, DATA, labels="empirical"))
    assert "mask={'head': fn" in message
    assert "'encoder'" not in message
    assert not told(lambda: ij.kfac(objective, PARAMS, DATA, labels="empirical", mask={"head": mask}))


def test_streams_say_it_once_and_programs_nothing():
    objective = ij.Objective(tokens, masked_mean)
    loader = [jax.tree.map(lambda x, i=i: x[i : i + 4], DATA) for i in (0, 4)]
    for fit in (ij.stream.kfac, ij.stream.ekfac):
        (message,) = told(lambda f=fit: f(objective, PARAMS, loader, labels="empirical", progress=False))
        assert "mask: none was given" in message
    bare = lambda params, z: objective(params, z)
    assert len(told(lambda: ij.kfac(bare, PARAMS, DATA, labels="empirical"))) == 1
    program = jax.jit(lambda params, data: ij.kfac(objective, params, data, labels="empirical").mv(params))
    assert not told(lambda: program(PARAMS, DATA))
