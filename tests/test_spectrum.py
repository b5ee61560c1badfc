"""Lanczos spectra against eigenvalues that are known."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
from helpers import from_spectrum, relative_error

import influence_jax as ij

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
