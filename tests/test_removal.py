"""What scores predict, against training again in float64: removal of both kinds, weights, moved inputs; sign and unit.

References are written in numpy, or minimised by Newton's method to rounding; no solver of the library takes part.
"""

import functools
from typing import NamedTuple

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from helpers import relative_error

import influence_jax as ij
from influence_jax import metrics

COUNT, INPUTS, CLASSES, DECAY = 90, 3, 3, 0.03
X, QUERY_X = helpers.split_normals(jax.random.key(1), [(COUNT, INPUTS), (6, INPUTS)])
Y, QUERY_Y = (np.argmax(x @ np.array([[2.0, -1, 0], [0, 1, -1], [0.5, 0, 1]]) + [1, 0, -0.5], 1) for x in (X, QUERY_X))
Y = np.where(np.arange(COUNT) % 7 == 3, (Y + 1) % CLASSES, Y)  # some labels are wrong
TRAIN, QUERY = ij.Batch(X, Y), ij.Batch(QUERY_X, QUERY_Y)
SOFTMAX = {"bias": np.zeros(CLASSES), "kernel": np.zeros((INPUTS, CLASSES))}
NETWORK = helpers.random_mlp(jax.random.key(2), (INPUTS, 3, CLASSES))
# Groups of unequal size, each of neighbours, as clusters are; some overlap.
SIZES = (1, 2, 3, 5, 8, 10)
PLACES = np.argsort(np.argsort(X[:, :2], axis=0), axis=0).T
GROUPS = np.stack([(10 * i <= place) & (place < 10 * i + size) for place in PLACES for i, size in enumerate(SIZES)])


class Example(NamedTuple):
    """One example, which may be traced."""

    x: jax.Array
    y: jax.Array


class Trained:
    """A model at its optimum, and what training again from there does to the losses of queries."""

    def __init__(self, predict, start):
        self.objective = ij.Objective(predict, helpers.cross_entropy)
        theta, self.unflatten = jax.flatten_util.ravel_pytree(start)

        def loss(theta, weights, total, x):
            losses = jax.vmap(lambda x, y: self.objective(self.unflatten(theta), Example(x, y)))(x, jnp.asarray(Y))
            return weights @ losses / total + DECAY / 2 * theta @ theta

        def step(theta, *setting):
            slope = jax.grad(loss)(theta, *setting)
            return theta - jnp.linalg.solve(jax.hessian(loss)(theta, *setting), slope)

        def again(theta, query, weights, total, x):
            def towards(i, theta):
                """Weights change in four steps, so that the minimum is followed, with Newton's method at each."""
                way = jnp.minimum((i // 3 + 1) / 4, 1)
                return step(theta, 1 + way * (weights - 1), COUNT + way * (total - COUNT), x)

            theta = jax.lax.fori_loop(0, 15, towards, theta)
            slope = jnp.max(jnp.abs(jax.grad(loss)(theta, weights, total, x)))
            return jax.vmap(self.objective, (None, 0))(self.unflatten(theta), query), slope

        ones = (np.ones(COUNT), float(COUNT), X)
        both = jax.jit(jax.value_and_grad(loss))
        found = scipy.optimize.minimize(lambda t: both(t, *ones), np.asarray(theta), jac=True, tol=1e-10)
        for _ in range(4):
            found.x = jax.jit(step)(found.x, *ones)
        assert np.linalg.eigvalsh(jax.hessian(loss)(found.x, *ones))[0] > DECAY / 2
        self.theta, self.params = found.x, self.unflatten(found.x)
        self._again = jax.jit(jax.vmap(again, (None, None, 0, 0, 0)))
        inverse = ij.invert(ij.Hessian(self.objective, self.params, TRAIN), ij.Direct(DECAY))
        self.influence = ij.Influence(self.objective, self.params, inverse)

    def losses(self, weights, totals, x=None, query=None):
        """Of queries, after minimising the sum of weighted losses over totals, `(R, Q)`."""
        x = np.broadcast_to(X, (len(weights), *X.shape)) if x is None else x
        found, slopes = self._again(
            self.theta, QUERY if query is None else query, np.asarray(weights, float), np.asarray(totals, float), x
        )
        assert np.max(slopes) < 1e-12
        return np.asarray(found)

    def without(self, removed, removal):
        """Changes of the queries' losses when examples are left out, `(S, Q)`."""
        kept = ~removed
        totals = kept.sum(axis=1) if removal == "mean" else np.full(len(kept), COUNT)
        return self.losses(kept, totals) - self.losses(np.ones((1, COUNT)), [COUNT])


@functools.cache
def trained(name):
    return Trained(*{"softmax": (helpers.affine, SOFTMAX), "network": (helpers.mlp, NETWORK)}[name])


KINDS = ("mean", "sum")


def predictions(scores, masks, removal):
    """Of the removal that is asked about, and of the other."""
    kinds = (removal, *(kind for kind in KINDS if kind != removal))
    return [np.asarray(metrics.predicted_changes(scores, masks, removal=kind)) for kind in kinds]


def ridge(x, y, total, decay):
    """The minimiser of the sum of half squares over total, plus decay / 2 times its own square."""
    return np.linalg.solve(x.T @ x / total + decay * np.eye(x.shape[1]), x.T @ y / total)


MODELS = pytest.mark.parametrize("name", ["softmax", "network"])


class TestRemoval:
    """Each kind of removal is what the training of its kind does, and not what the other does."""

    @MODELS
    @pytest.mark.parametrize("removal", KINDS)
    def test_leaving_one_out(self, name, removal):
        model, masks = trained(name), ij.retrain.leave_one_out(COUNT)
        scores, actual = model.influence.influences(QUERY, TRAIN), model.without(~masks, removal)
        predicted, other = predictions(scores, masks, removal)
        right = np.sign(predicted) == np.sign(actual)
        assert np.mean(right) > 0.97
        assert np.mean(right) > np.mean(np.sign(other) == np.sign(actual)) + 0.07
        assert np.all(right[np.abs(actual) > np.median(np.abs(actual))])
        assert np.corrcoef(predicted.ravel(), actual.ravel())[0, 1] > 0.99
        assert 1 < np.sum(predicted * actual) / np.sum(predicted**2) < 1.15, "the size, not only the order"

    @MODELS
    @pytest.mark.parametrize("removal", KINDS)
    def test_unequal_groups(self, name, removal):
        model = trained(name)
        scores, actual = model.influence.influences(QUERY, TRAIN), model.without(GROUPS, removal)
        predicted, other = predictions(scores, ~GROUPS, removal)
        right = np.mean(np.sign(predicted) == np.sign(actual))
        assert right > max(0.95, np.mean(np.sign(other) == np.sign(actual)) + 0.07)
        assert np.linalg.norm(predicted - actual) < 0.92 * np.linalg.norm(other - actual)
        lds = {kind: np.mean(metrics.lds(scores, ~GROUPS, actual, removal=kind)) for kind in KINDS}
        assert lds[removal] > max(0.97, min(lds.values()) + 0.02)
        options = {"key": jax.random.key(0), "resamples": 50, "removal": removal}
        assert abs(metrics.lds_summary(scores, ~GROUPS, actual, **options).mean - lds[removal]) < 1e-12
        assert np.mean(metrics.lds(scores, ~GROUPS, actual)) == lds["mean"], "the default"

    @pytest.mark.parametrize("removal", KINDS)
    @pytest.mark.parametrize("decay", [0.5, 0.05, 1e-6])
    def test_ridge_in_closed_form(self, removal, decay):
        """The error is of the order (m / N)^2; that of the other kind m / N, where the penalty is worth mentioning."""
        rng = np.random.default_rng(5)
        x, query, count = rng.normal(size=(2000, 4)), rng.normal(size=(5, 4)), 2000
        y = x @ np.array([1.0, -2, 0.5, 0]) + x[:, 0] ** 2 + 0.3 * rng.normal(size=count)
        w = ridge(x, y, count, decay)
        solved = np.linalg.solve(x.T @ x / count + decay * np.eye(4), query.T)
        scores = solved.T @ (x * (x @ w - y)[:, None]).T
        sizes = np.array([4, 8, 16, 32, 64])
        masks = np.argsort(np.argsort(np.abs(x[:, 0] - 1))) >= sizes[:, None]  # not those about 1
        totals = count - sizes if removal == "mean" else np.full(5, count)
        exact = [query @ (ridge(x[mask], y[mask], total, decay) - w) for mask, total in zip(masks, totals, strict=True)]
        errors = [np.linalg.norm(p - exact, axis=1) for p in predictions(scores, masks, removal)]
        assert np.all(errors[0] < 4 * (sizes / count) ** 2)
        if decay > 1e-3:
            assert np.all(errors[1] > 0.25 * sizes / count)

    def test_ridge_by_the_library(self):
        """The whole way: Influence, masks, both kinds; of a linear measurement."""
        rng = np.random.default_rng(6)
        x, query = rng.normal(size=(300, 4)), rng.normal(size=(5, 4))
        y = x[:, 0] + x[:, 1] ** 2
        objective = ij.Objective(lambda params, z: z.x @ params["w"], lambda out, z: 0.5 * (out - z.y) ** 2)
        params, data = {"w": ridge(x, y, 300, 0.3)}, ij.Batch(x, y)
        inverse = ij.invert(ij.GGN(objective, params, data), ij.Direct(0.3))
        asked = ij.Influence(objective, params, inverse, measurement=lambda params, z: z @ params["w"])
        scores = asked.influences(query, data)
        masks = np.stack([np.arange(300) != 7, np.arange(300) >= 3, np.argsort(np.argsort(x[:, 0])) < 296])
        for removal, totals in zip(KINDS, (masks.sum(axis=1), [300] * 3), strict=True):
            exact = [query @ (ridge(x[m], y[m], n, 0.3) - params["w"]) for m, n in zip(masks, totals, strict=True)]
            got = metrics.predicted_changes(scores, masks, removal=removal)
            assert relative_error(got, np.array(exact)) < 0.06
            assert relative_error(got[0], np.array(exact[0])) < 0.01

    def test_with_the_library_s_own_training(self):
        """`retrain.training` takes means over what is left, with a penalty, so the default predicts it."""
        objective, start = ij.Objective(helpers.affine, helpers.cross_entropy), jax.tree.map(jnp.asarray, SOFTMAX)
        train = ij.retrain.training(objective, optax.sgd(1.0, momentum=0.9), start, TRAIN, epochs=400, penalty=DECAY)
        masks = np.concatenate([np.ones((1, COUNT), bool), ij.retrain.leave_one_out(COUNT), ~GROUPS])
        measure = jax.tree_util.Partial(lambda q, p: jax.vmap(objective, (None, 0))(p, q), QUERY)
        options = {"how": "vmap", "group": len(masks), "progress": False}
        outcomes = ij.retrain.retrain(train, masks, jax.random.key(0), measure, **options)
        reference = trained("softmax").without(np.concatenate([np.eye(COUNT, dtype=bool), GROUPS]), "mean")
        actual = outcomes[1:] - outcomes[0]
        assert relative_error(actual, reference) < 1e-6
        scores = trained("softmax").influence.influences(QUERY, TRAIN)
        predicted = metrics.predicted_changes(scores, masks[1:])
        assert np.corrcoef(np.ravel(predicted), actual.ravel())[0, 1] > 0.97


class TestSignAndUnit:
    """Derivatives of the losses of trained models, by training again on both sides of where they are."""

    STEP = 1e-4

    @MODELS
    def test_up_weighting(self, name):
        """At the optimum of the sum over N, one more unit of weight lowers the loss of a query by score / N."""
        model, steps = trained(name), self.STEP * np.eye(COUNT)
        ahead, behind = (model.losses(1 + s, np.full(COUNT, COUNT)) for s in (steps, -steps))
        slopes = (ahead - behind).T / (2 * self.STEP)
        scores = model.influence.influences(QUERY, TRAIN)
        assert relative_error(scores, -COUNT * slopes) < 1e-6
        assert np.mean(np.asarray(scores) > 0) > 0.2, "both signs occur"

    @MODELS
    def test_up_weighting_of_a_mean(self, name):
        """Where the weights are divided by their sum, it is the score less the query's mean score."""
        model, steps = trained(name), self.STEP * np.eye(COUNT)
        ahead, behind = (model.losses(1 + s, COUNT + s.sum(axis=1)) for s in (steps, -steps))
        scores = np.asarray(model.influence.influences(QUERY, TRAIN))
        slopes = (ahead - behind).T / (2 * self.STEP)
        assert relative_error(scores - scores.mean(axis=1, keepdims=True), -COUNT * slopes) < 1e-6

    @MODELS
    def test_self_influence_is_a_self_change(self, name):
        """What more weight of an example does to its own loss; positive, for it lowers it."""
        model, steps = trained(name), self.STEP * np.eye(COUNT)
        ahead, behind = (model.losses(1 + s, np.full(COUNT, COUNT), query=TRAIN) for s in (steps, -steps))
        own = np.diagonal(ahead - behind) / (2 * self.STEP)
        got = model.influence.self_influences(TRAIN)
        assert relative_error(got, -COUNT * own) < 1e-6
        assert np.all(np.asarray(got) > 0)
        assert relative_error(got, np.diagonal(model.influence.influences(TRAIN, TRAIN))) < 1e-10

    @MODELS
    def test_moving_an_input(self, name):
        """Moving one training input by delta lowers the loss of a query by <score, delta> / N."""
        model = trained(name)
        scores = np.asarray(model.influence.influences(QUERY, TRAIN, mode="perturbation"))
        assert scores.shape == (6, COUNT, INPUTS)
        delta = self.STEP * helpers.normal(jax.random.key(4), (COUNT, INPUTS))
        moves = np.eye(COUNT)[:, :, None] * delta  # row i moves example i, and no other
        weights, totals = np.ones((COUNT, COUNT)), np.full(COUNT, COUNT)
        ahead, behind = (model.losses(weights, totals, X + move) for move in (moves, -moves))
        fallen = (behind - ahead).T / 2
        assert relative_error(np.einsum("qni,ni->qn", scores, delta) / COUNT, fallen) < 1e-6
        once = (model.losses(weights, totals) - ahead).T  # a small move, without the one to the other side
        assert relative_error(np.einsum("qni,ni->qn", scores, delta) / COUNT, once) < 2e-3
