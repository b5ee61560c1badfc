"""Lanczos spectra against eigenvalues that are known."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import from_spectrum, relative_error

import influence_jax as ij
from influence_jax.curvature.layout import Layout
from influence_jax.curvature.spectrum import lanczos

PARAMS = helpers.random_mlp(jax.random.key(0), biases=False)
DATA = helpers.random_batch(jax.random.key(1), 17, 5, 3, classes=True)
GGN, HESSIAN = (kind(helpers.CLASSIFICATION, PARAMS, DATA) for kind in (ij.GGN, ij.Hessian))
KEY = jax.random.key(7)


class TestSpectrum:
    def test_is_differentiable_in_the_operator(self):
        def largest(diagonal):
            return ij.spectrum(ij.Diagonal({"w": diagonal}), 4, key=jax.random.key(0)).largest[0]

        gradient = jax.grad(largest)(jnp.array([1.0, 4.0, 2.0, 3.0]))
        np.testing.assert_allclose(gradient, [0, 1, 0, 0], atol=1e-10)

    def test_against_the_eigenvalues(self):
        values = np.linspace(0.5, 3.0, 40)
        op, _ = from_spectrum(values)
        ritz = ij.spectrum(op, 40, key=KEY, probes=3)
        assert relative_error(ritz.largest[0], 3.0) < 1e-10
        assert relative_error(ritz.smallest[0], 0.5) < 1e-10
        dimension, spread = ritz.effective_dimension(0.3)
        assert abs(float(dimension) - np.sum(values / (values + 0.3))) < 4 * float(spread) + 0.5
        points = np.linspace(-1, 5, 601)
        assert abs(np.trapezoid(np.asarray(ritz.density(points, 0.1)), points) - 1) < 1e-3

    def test_residuals_bound_the_distance_to_an_eigenvalue(self):
        values = 10 ** np.linspace(-2, 2, 100)
        op, _ = from_spectrum(values)
        ritz = ij.spectrum(op, 20, key=KEY)
        distance = np.min(np.abs(np.asarray(ritz.values)[0][:, None] - values[None]), axis=1)
        assert np.all(distance <= np.asarray(ritz.residuals)[0] + 1e-10)

    def test_prints_a_guide(self):
        text = str(ij.spectrum(HESSIAN, 20, key=KEY))
        assert "effective dimension" in text
        assert "indefinite" in text
        assert "32 eigenvalues" in text

    def test_one_probe_knows_no_error(self):
        assert ij.spectrum(GGN, 5, key=KEY).effective_dimension(0.1)[1] is None


LAWS = {
    "distinct": np.array([-2.0, -0.5, 0.0, 0.1, 1.0, 2.5, 3.0, 4.0, 7.0, 20.0]),
    "repeated": np.array([3.0] * 6 + [0.0] * 3 + [5.0]),
    "of one value": np.full(10, 2.0),
}


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize(("steps", "check"), [(10, 0), (4, 0), (4, 3)])
def test_the_recurrence(name, steps, check):
    r"""$A Q^\top = Q^\top T + r e^\top$ with orthonormal rows of Q, also behind a start of its own."""
    values = LAWS[name]
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(10, 10)))[0]
    matrix = rotation * values @ rotation.T
    mv = lambda v: jnp.asarray(matrix) @ v
    space, layout = jax.ShapeDtypeStruct((10,), jnp.float64), Layout()
    found = lanczos(mv, space, steps, jax.random.key(0), layout=layout, check=check)
    Q, T, lengths = map(np.asarray, (found.vectors, found.matrix, found.lengths))
    assert relative_error(Q @ Q.T, np.eye(steps + check)) < 1e-12
    assert np.abs(Q @ matrix @ Q.T - T).max() < 1e-12 * 20
    rest = matrix @ Q.T - Q.T @ T
    ends = [steps - 1, steps + check - 1]  # where it stops, or begins again
    inside = [place for place in range(steps + check) if place not in ends]
    assert np.abs(rest[:, inside]).max(initial=0.0) < 1e-11 * 20
    if not check:
        assert np.abs(np.linalg.norm(rest[:, -1]) - lengths[-1]) < 1e-11 * 20
        theta, W, residuals = map(np.asarray, found.pairs(steps))
        pairs = Q.T @ W
        assert np.abs(np.linalg.norm(matrix @ pairs - pairs * theta, axis=0) - residuals).max() < 1e-10
