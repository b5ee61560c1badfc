"""Losses that check themselves, and losses that take an integer label for a one-hot vector."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import relative_error

import influence_jax as ij

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(6, 4)) * 3
LABELS = np.array([0, 3, 1, 2, 2, -100])
SEEN = np.array([1, 1, 0, 1, 0, 0])


def softmax(logits):
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def by_hand(rows, logits=LOGITS, labels=LABELS):
    """The loss of some rows one by one, its gradient in all logits, in float64."""
    entries = [np.log(np.exp(logits[t] - logits[t].max()).sum()) + logits[t].max() - logits[t, labels[t]] for t in rows]
    gradient = np.zeros_like(logits)
    for t in rows:
        gradient[t] = softmax(logits[t]) - np.eye(logits.shape[1])[labels[t]]
    return np.sum(entries), gradient


class TestCrossEntropy:
    """Against sums written out."""

    @pytest.mark.parametrize(
        ("settings", "rows"),
        [({"ignore": -100}, range(5)), ({"mask": "seen"}, (0, 1, 3)), ({"mask": "seen", "ignore": 3}, (0, 3))],
        ids=["ignored", "masked", "both"],
    )
    @pytest.mark.parametrize("reduction", ["sum", "mean"])
    def test_value_and_gradient(self, settings, rows, reduction):
        loss = ij.losses.cross_entropy("y", reduction=reduction, **settings)
        value, gradient = jax.value_and_grad(loss)(jnp.asarray(LOGITS), {"y": LABELS, "seen": SEEN})
        by = 1 if reduction == "sum" else len(list(rows))
        expected, expected_gradient = by_hand(rows)
        assert relative_error(value, expected / by) < 1e-13
        assert relative_error(gradient, expected_gradient / by) < 1e-13

    @pytest.mark.parametrize(("dtype", "classes"), [(np.uint8, 256), (np.uint8, 300), (np.int8, 200)])
    def test_labels_in_a_byte(self, dtype, classes):
        """As of byte-level language models; a label that is ignored is itself, not what it wraps to."""
        logits, labels = RNG.normal(size=(3, classes)), np.array([1, 100, 56], dtype)
        loss = ij.losses.cross_entropy("y", ignore=56 - 256)
        expected = np.sum(np.log(np.exp(logits).sum(-1)) - logits[np.arange(3), labels])
        assert relative_error(loss(jnp.asarray(logits), {"y": jnp.asarray(labels)}), expected) < 1e-13

    def test_extreme_logits(self, float32):
        logits = jnp.array([[1e4, 0.0, -1e4], [-jnp.inf, 0.0, 20.0]], jnp.float32)
        value, gradient = jax.value_and_grad(ij.losses.cross_entropy("y"))(logits, {"y": jnp.array([1, 2])})
        assert relative_error(value, 1e4 + np.log1p(np.exp(-20))) < 1e-6
        assert relative_error(gradient[1, 1], 1 / (1 + np.exp(20))) < 1e-6
        assert np.isfinite(gradient).all()

    @pytest.mark.parametrize("label", [4, -1, 5])
    def test_label_out_of_range(self, label):
        value, gradient = jax.value_and_grad(ij.losses.cross_entropy("y"))(jnp.zeros(4), {"y": jnp.array(label)})
        assert np.isnan(value)
        assert np.isnan(gradient).all()

    def test_what_is_masked_is_not_looked_at(self):
        logits = jnp.asarray(LOGITS).at[2].set(jnp.nan)
        value, gradient = jax.value_and_grad(ij.losses.cross_entropy("y", mask="seen"))(
            logits, {"y": LABELS, "seen": SEEN}
        )
        assert relative_error(value, by_hand((0, 1, 3))[0]) < 1e-13
        assert np.isfinite(gradient).all()

    def test_a_mask_is_of_zeros_and_ones(self):
        half = ij.losses.cross_entropy("y", mask="seen")(
            jnp.zeros((2, 3)), {"y": jnp.zeros(2, int), "seen": jnp.array([0.5, 1.0])}
        )
        assert np.isnan(half)


class TestOthers:
    """Squared error and binary cross-entropy."""

    @pytest.mark.parametrize("dtype", [float, int])
    def test_squared_error(self, dtype):
        target = np.round(RNG.normal(size=(3, 2)) * 3).astype(dtype)
        out = RNG.normal(size=(3, 2))
        mask = np.array([[1, 0], [1, 1], [0, 1]], bool)
        value, gradient = jax.value_and_grad(ij.losses.squared_error("y", mask="m", reduction="mean"))(
            jnp.asarray(out), {"y": target, "m": mask}
        )
        assert relative_error(value, 0.5 * np.sum((out - target)[mask] ** 2) / 4) < 1e-13
        assert relative_error(gradient, np.where(mask, out - target, 0) / 4) < 1e-13

    @pytest.mark.parametrize("labels", [[True, False, True], [1, 0, 1], [0.2, 0.0, 1.0]], ids=["bool", "int", "float"])
    def test_binary_cross_entropy(self, labels):
        out, y = np.array([-30.0, 2.0, 40.0]), np.asarray(labels, float)
        value, gradient = jax.value_and_grad(ij.losses.binary_cross_entropy("y"))(
            jnp.asarray(out), {"y": np.asarray(labels)}
        )
        log_p, log_not_p = -np.logaddexp(0, -out), -np.logaddexp(0, out)
        assert relative_error(value, -np.sum(y * log_p + (1 - y) * log_not_p)) < 1e-13
        assert relative_error(gradient, 1 / (1 + np.exp(-out)) - y) < 1e-13

    def test_binary_label_out_of_range(self):
        assert np.isnan(ij.losses.binary_cross_entropy("y")(jnp.zeros(()), {"y": jnp.array(-1)}))

    def test_equal_by_settings(self):
        make = lambda: ij.losses.cross_entropy("y", ignore=-100)
        assert make() == make()
        assert hash(make()) == hash(make())
        assert make() != ij.losses.cross_entropy("y")
        assert repr(make()) == "cross_entropy('y', ignore=-100)"


MISTAKES = {
    "one-hot": (ij.losses.cross_entropy(), jnp.zeros(3), jnp.eye(3)[0], TypeError, ["'y'", "one-hot", "argmax"]),
    "another shape": (ij.losses.cross_entropy(), jnp.zeros((4, 3)), jnp.zeros(3, int), ValueError, ["(3,)", "(4,)"]),
    "no logits": (ij.losses.cross_entropy(), jnp.zeros(()), jnp.zeros((), int), TypeError, ["output", "(..., C)"]),
    "a tuple": (ij.losses.cross_entropy(), (jnp.zeros(3),), jnp.zeros((), int), TypeError, ["output", "tuple"]),
    "broadcast": (ij.losses.squared_error(), jnp.zeros((3, 1)), jnp.zeros(3), ValueError, ["(3,)", "(3, 1)"]),
    "binary": (ij.losses.binary_cross_entropy(), jnp.zeros((1,)), jnp.zeros(()), ValueError, ["()", "(1,)"]),
    "bools": (ij.losses.squared_error(), jnp.zeros(2), jnp.ones(2, bool), TypeError, ["bool", "real"]),
    "no part": (ij.losses.squared_error("z"), jnp.zeros(2), jnp.ones(2), ValueError, ["label", "'z'", "'y'"]),
    "mask": (ij.losses.squared_error(mask="m"), jnp.zeros(2), jnp.ones(2), ValueError, ["mask", "(3,)", "(2,)"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name):
    loss, out, labels, kind, words = MISTAKES[name]
    with pytest.raises(kind) as raised:
        loss(out, {"y": labels, "m": jnp.ones(3)})
    assert all(word in str(raised.value) for word in words), str(raised.value)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="reduction: got 'average'"):
        ij.losses.cross_entropy(reduction="average")
    with pytest.raises(TypeError, match="ignore: got 'pad'"):
        ij.losses.cross_entropy(ignore="pad")
    with pytest.raises(TypeError, match="label: got None"):
        ij.losses.squared_error(None)


DATA = {
    "x": jnp.ones((4, 3)),
    "y": jnp.array([0, 1, 2, 1]),
    "v": jnp.ones((4, 3)),
    "t": jnp.ones((4, 5), int),
    "w": jnp.arange(4),
}
flat = lambda p, z: z["x"] @ p["w"]
tokens = lambda p, z: jnp.ones((5, 1)) * (z["x"] @ p["w"])[None]
indexed = optax.softmax_cross_entropy_with_integer_labels
ONE_HOT = {
    "cross-entropy": (flat, lambda o, z: optax.softmax_cross_entropy(o, z["y"])),
    "of every token": (tokens, lambda o, z: jnp.sum(-(z["y"] * jax.nn.log_softmax(o)))),
    "smoothed": (flat, lambda o, z: optax.softmax_cross_entropy(o, z["y"] * 0.9 + 0.03)),
    "binary": (flat, lambda o, z: jnp.mean(optax.sigmoid_binary_cross_entropy(o, z["y"]))),
    "squared": (flat, lambda o, z: jnp.sum((o - z["y"]) ** 2)),
    "cast": (flat, lambda o, z: jnp.sum((z["y"].astype(o.dtype) - o) ** 2)),
    "jitted": (flat, jax.jit(lambda o, z: optax.softmax_cross_entropy(o, z["y"]))),
}
MEANT = {
    "one_hot": (flat, lambda o, z: optax.softmax_cross_entropy(o, jax.nn.one_hot(z["y"], 3))),
    "comparison": (flat, lambda o, z: -jnp.sum((jnp.arange(3) == z["y"]) * jax.nn.log_softmax(o))),
    "by index": (flat, lambda o, z: jax.nn.logsumexp(o) - o[z["y"]]),
    "weight": (flat, lambda o, z: jnp.sum(z["w"] * (o - z["v"]) ** 2)),
    "weighted": (flat, lambda o, z: z["w"] * indexed(o, z["y"])),
    "class weights": (flat, lambda o, z: jnp.arange(3.0)[z["y"]] * indexed(o, z["y"])),
    "mask of tokens": (tokens, lambda o, z: -jnp.sum(z["t"][:, None] * jax.nn.log_softmax(o))),
    "length": (flat, lambda o, z: jnp.sum(jnp.where(jnp.arange(3) < z["w"], o, 0)) / z["w"]),
    "one output": (lambda p, z: flat(p, z)[:1], lambda o, z: jnp.sum((o - z["y"]) ** 2)),
    "its own": (flat, ij.losses.cross_entropy("y")),
}


class TestOneHot:
    """Functions of one-hot labels that are given class numbers: a scalar broadcasts over the classes."""

    def losses(self, predict, loss):
        return jax.vmap(ij.Objective(predict, loss), (None, 0))({"w": jnp.ones((3, 3))}, DATA)

    @pytest.mark.parametrize("name", ONE_HOT)
    @pytest.mark.usefixtures("broadcasting")
    def test_class_numbers_are_refused(self, name):
        with pytest.raises(ValueError, match=r"loss: .*broadcasts the integer part 'y'.*cross_entropy.*one_hot"):
            self.losses(*ONE_HOT[name])

    @pytest.mark.parametrize("name", MEANT)
    @pytest.mark.usefixtures("broadcasting")
    def test_other_uses_are_not(self, name):
        assert self.losses(*MEANT[name]).shape == (4,)

    @pytest.mark.usefixtures("broadcasting")
    def test_a_float_is_meant(self):
        """Quantiles of one number."""
        data = {"x": jnp.ones((4, 3)), "y": jnp.arange(4.0)}
        objective = ij.Objective(flat, lambda o, z: jnp.sum(jnp.abs(z["y"] - o)))
        assert jax.vmap(objective, (None, 0))({"w": jnp.ones((3, 3))}, data).shape == (4,)


@pytest.fixture
def broadcasting():
    """Let arrays of different ranks and dtypes meet, as users' programs do."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield
