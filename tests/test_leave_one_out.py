"""Influence against retraining: the exact identity for ridge regression, and softmax regression written out densely."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative_error

import influence_jax as ij


class TestLeaveOneOut:
    """The exact identity for ridge regression, and the sign it fixes."""

    def setup_method(self):
        key_x, key_y, key_q = jax.random.split(jax.random.key(3), 3)
        self.x, self.y = helpers.normal(key_x, (30, 4)), helpers.normal(key_y, (30, 2))
        self.data = ij.Batch(self.x, self.y)
        self.query = ij.Batch(helpers.normal(key_q, (5, 4)), np.zeros((5, 2)))
        self.damping = 0.1
        self.objective = ij.Objective(helpers.linear, helpers.half_squared_loss)
        self.params = {"kernel": self.retrain()}

    def retrain(self, without=()):
        """Minimiser of (1/N) sum over kept examples plus damping/2 ||theta||^2, with N never changed."""
        x, y = (np.delete(part, without, axis=0) for part in (self.x, self.y))
        return np.linalg.solve(x.T @ x / 30 + self.damping * np.eye(4), x.T @ y / 30)

    @pytest.mark.parametrize("curvature", [ij.Hessian, ij.GGN])
    def test_exact(self, curvature):
        measurement = lambda params, example: helpers.linear(params, example)[0]
        inverse = ij.invert(curvature(self.objective, self.params, self.data), ij.Direct(self.damping))
        influence = ij.Influence(self.objective, self.params, inverse, measurement=measurement)
        scores = influence.influences(self.query, self.data)
        hat = np.linalg.inv(self.x.T @ self.x / 30 + self.damping * np.eye(4))
        leverage = np.einsum("ni,ij,nj->n", self.x, hat, self.x) / 30
        changes = [self.query.x @ (self.retrain([i]) - self.params["kernel"]) for i in range(30)]
        change = np.stack(changes, axis=1)[..., 0]
        assert relative_error(change, np.asarray(scores) / (30 * (1 - leverage)[None])) < 1e-8

    def test_positive_means_that_training_on_it_helps(self):
        """Removing the example with the highest score raises the query's loss; the lowest score, lowers it."""
        query = ij.Batch(self.query.x, jnp.ones((5, 2)))
        inverse = ij.invert(ij.GGN(self.objective, self.params, self.data), ij.Direct(self.damping))
        scores = ij.Influence(self.objective, self.params, inverse).influences(query, self.data)
        loss = lambda kernel: jax.vmap(self.objective, (None, 0))({"kernel": kernel}, query)
        for row in range(5):
            for column, sign in ((int(jnp.argmax(scores[row])), 1), (int(jnp.argmin(scores[row])), -1)):
                without = self.retrain([column])
                change = loss(without)[row] - loss(self.params["kernel"])[row]
                assert sign * change > 0
                assert 0.5 < scores[row, column] / 30 / change < 1.1, "first order in 1/N"


@pytest.mark.thorough
@pytest.mark.as_users
def test_softmax_regression_on_digits_against_dense_float64():
    """Trained to its minimum with numpy-style Newton steps; GGN, Hessian and their scores written out densely."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = (digits.data / 16.0)[:600, 8:40], digits.target[:600]
    train, query, damping = ij.Batch(x[:500], y[:500]), ij.Batch(x[500:520], y[500:520]), 1e-2
    objective = ij.Objective(helpers.affine, helpers.cross_entropy)
    inputs = np.concatenate([np.ones((600, 1)), x], axis=1)  # bias first, as the leaves are ordered
    theta = np.zeros((33, 10))

    def softmax(logits):
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        return exponentials / exponentials.sum(axis=1, keepdims=True)

    def dense(theta):
        p = softmax(inputs[:500] @ theta)
        blocks = np.einsum("nc,cd->ncd", p, np.eye(10)) - np.einsum("nc,nd->ncd", p, p)
        pairs = np.einsum("ni,nj->ijn", inputs[:500], inputs[:500]).reshape(33 * 33, 500)
        matrix = (pairs @ blocks.reshape(500, 100)).reshape(33, 33, 10, 10).transpose(0, 2, 1, 3) / 500
        return matrix.reshape(330, 330) + damping * np.eye(330), p

    for _ in range(12):
        matrix, p = dense(theta)
        residual = p - np.eye(10)[y[:500]]
        gradient = (inputs[:500].T @ residual / 500 + damping * theta).ravel()
        theta = theta - np.linalg.solve(matrix, gradient).reshape(33, 10)
    assert np.max(np.abs(gradient)) < 1e-10
    matrix, _ = dense(theta)
    grads = np.einsum("ni,nc->nic", inputs, softmax(inputs @ theta) - np.eye(10)[y]).reshape(600, 330)
    solved = np.linalg.solve(matrix, grads[:500].T)
    expected = grads[500:520] @ solved
    params = {"bias": jnp.asarray(theta[0]), "kernel": jnp.asarray(theta[1:])}
    for curvature, solver in ((ij.GGN, ij.Direct(damping)), (ij.Hessian, ij.CG(damping, rtol=1e-12))):
        inverse = ij.invert(curvature(objective, params, train), solver)
        scores = ij.Influence(objective, params, inverse).influences(query, train)
        assert relative_error(scores, expected) < 1e-9
    assert np.all(np.diag(grads[:500] @ solved) > 0)
