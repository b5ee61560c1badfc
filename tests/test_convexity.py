"""Whether a loss is convex in the output is found out, and solvers go by it."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import dense_reference, relative_error

import influence_jax as ij

N, E = 12, 3
RNG = np.random.default_rng(3)
DATA = ij.Batch(RNG.normal(size=(N, E)), 3 * RNG.normal(size=N))
QUERY = ij.Batch(DATA.x[:2], DATA.y[:2])
predict = lambda p, z: z.x @ p["w"]
token = optax.softmax_cross_entropy_with_integer_labels


def params(outputs, scale=1.0):
    return {"w": scale * jnp.asarray(np.random.default_rng(1).normal(size=(E, outputs)))}


def mixture(o, z):
    means, scales, shares = o[:3], o[3:6], jax.nn.log_softmax(o[6:])
    return -jax.nn.logsumexp(shares - 0.5 * ((z.y - means) * jnp.exp(-scales)) ** 2 - scales)


def ctc(o, z):
    none = lambda n: jnp.zeros((1, n))
    return optax.ctc_loss(o.reshape(1, 10, 4), none(10), jnp.array([[1, 2, 3]]), none(3))[0]


NOT_CONVEX = {
    "Cauchy": (1, lambda o, z: jnp.log1p((o[0] - z.y) ** 2)),
    "learned variance": (2, lambda o, z: 0.5 * o[1] + 0.5 * (z.y - o[0]) ** 2 * jnp.exp(-o[1])),
    "mixture density": (9, mixture),
    "cosine distance": (4, lambda o, z: 1e-3 * (1 - jnp.sum(o) / jnp.linalg.norm(o))),
    "CTC": (40, ctc),
    "tanh": (2, lambda o, z: jnp.sum((jnp.tanh(o) - z.y) ** 2)),
    "one entry of many": (50, lambda o, z: jnp.sum(jnp.where(jnp.arange(50) == 7, jnp.cos(o), (o - z.y) ** 2))),
}
CONVEX = {
    "cross-entropy": (4, 1.0, lambda o, z: token(o, jnp.argmax(o))),
    "confident": (4, 40.0, lambda o, z: token(o, jnp.argmax(o))),
    "weighted and confident": (4, 40.0, lambda o, z: 1e4 * token(o, jnp.argmax(o))),
    "tiny": (4, 3.0, lambda o, z: 1e-6 * token(o, jnp.argmax(o))),
    "many classes": (60, 20.0, lambda o, z: token(o, jnp.argmax(o))),
    "squared": (3, 1.0, lambda o, z: jnp.sum((o - z.y) ** 2)),
    "binary": (3, 40.0, lambda o, z: jnp.sum(jax.nn.softplus(o))),
    "Huber": (3, 1.0, lambda o, z: jnp.sum(optax.huber_loss(o, jnp.full_like(o, z.y)))),
    "Poisson": (1, 1.0, lambda o, z: jnp.exp(o[0]) - jnp.abs(z.y) * o[0]),
    "log-sum-exp": (6, 20.0, lambda o, z: jax.nn.logsumexp(o)),
}


def narrow(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def not_convex(name):
    outputs, loss = NOT_CONVEX[name]
    return ij.Objective(predict, loss), params(outputs)


class TestPsd:
    """What a GGN says of itself."""

    @pytest.mark.parametrize("name", NOT_CONVEX)
    def test_not_convex(self, name, float32):
        objective, at = not_convex(name)
        assert not ij.GGN(objective, narrow(at), narrow(DATA)).psd

    @pytest.mark.parametrize("name", CONVEX)
    def test_convex(self, name, float32):
        outputs, scale, loss = CONVEX[name]
        assert ij.GGN(ij.Objective(predict, loss), narrow(params(outputs, scale)), narrow(DATA)).psd

    def test_of_examples_that_weigh_something(self):
        """Cauchy is convex where residuals are small."""
        objective, at = not_convex("Cauchy")
        near = np.abs(DATA.x @ np.asarray(at["w"])[:, 0] - DATA.y) < 1
        assert 0 < near.sum() < N
        assert ij.GGN(objective, at, DATA, weights=jnp.asarray(near, float)).psd
        assert not ij.GGN(objective, at, DATA).psd

    def test_declared_or_unknown(self):
        """Losses that say so need no look; of traced arrays nothing else is known."""
        declared = ij.Objective(lambda p, z: predict(p, z)[0], ij.losses.squared_error("y"))
        other = ij.Objective(predict, CONVEX["squared"][2])
        seen = []
        jax.jit(lambda p: [seen.append(ij.GGN(o, p, DATA).psd) for o in (declared, other)])(params(3))
        assert seen == [True, False]

    def test_sums_multiples_blocks(self):
        op = ij.GGN(*not_convex("Cauchy"), DATA)
        for made in (op + ij.Identity(op.params), 2.0 * op, ij.restrict(op, ("w",))):
            assert not made.psd

    def test_weights_do_not_hang_on_it(self):
        with pytest.raises(ValueError, match="weights: got -1"):
            ij.GGN(*not_convex("Cauchy"), DATA, weights=-jnp.ones(N))


class TestSolvers:
    """Exact, or refused in words."""

    @pytest.mark.parametrize("name", ["Cauchy", "learned variance", "tanh"])
    @pytest.mark.parametrize("solver", [ij.Direct(1e-2), ij.Eigh(1e-2), ij.Blockwise(ij.Direct(1e-2), ij.full)])
    def test_exact(self, name, solver):
        objective, at = not_convex(name)
        grads = np.asarray(jax.vmap(lambda z: jax.grad(objective)(at, z)["w"].ravel())(DATA))
        dense = dense_reference(ij.GGN, objective, at, DATA)
        assert np.linalg.eigvalsh(dense)[0] < 0
        expected = grads[:2] @ np.linalg.solve(dense + 1e-2 * np.eye(len(dense)), grads.T)
        for op in (ij.GGN(objective, at, DATA), 0.5 * ij.GGN(objective, at, DATA) + 0.5 * ij.GGN(objective, at, DATA)):
            got = ij.Influence(objective, at, ij.invert(op, solver)).influences(QUERY, DATA)
            assert relative_error(got, expected) < 1e-9

    def test_inside_of_a_program(self):
        objective, at = not_convex("Cauchy")
        make = lambda p: ij.invert(ij.GGN(objective, p, DATA), ij.Direct(1e-2)).mv(p)["w"]
        dense = dense_reference(ij.GGN, objective, at, DATA) + 1e-2 * np.eye(E)
        expected = np.linalg.solve(dense, np.asarray(at["w"]).ravel())
        assert relative_error(jax.jit(make)(at).ravel(), expected) < 1e-9

    @pytest.mark.parametrize("name", ["Cauchy", "mixture density"])
    def test_refusals(self, name):
        objective, at = not_convex(name)
        op = ij.GGN(objective, at, DATA)
        words = r"not convex in the output, first at example \d+"
        for solver in (ij.SampleSpace(1e-2), ij.Blockwise(ij.SampleSpace(1e-2), ij.full)):
            with pytest.raises(ValueError, match=rf"op: SampleSpace.*{words}; use Direct or Eigh"):
                ij.invert(op, solver)
        with pytest.raises(ValueError, match=rf"no root, for the loss .*{words}"):
            ij.root(op)
        for fit in (ij.kfac, ij.ekfac):
            with pytest.raises(ValueError, match=rf"labels=.* give no curvature of \['w'\], for the loss .*{words}"):
                fit(objective, at, DATA)

    @pytest.mark.parametrize("solver", [ij.Direct(1e-2), ij.Blockwise(ij.Direct(1e-2), ij.full)])
    def test_a_loader_is_looked_at_to_its_end(self, solver):
        """Cauchy's loss is convex where residuals are below one: in the first batch here, and not in the second."""
        outputs, loss = NOT_CONVEX["Cauchy"]
        objective, at = ij.Objective(predict, loss), params(outputs)
        residuals = np.abs(DATA.x @ np.asarray(at["w"])[:, 0] - DATA.y)
        order, inside = np.argsort(residuals), int(np.sum(residuals < 1))
        batches = [ij.Batch(DATA.x[part], DATA.y[part]) for part in (order[:inside], order[inside:])]
        assert ij.GGN(objective, at, batches[0]).psd
        inverse = ij.stream.invert(ij.GGN, objective, at, batches, solver, progress=False)
        dense = dense_reference(ij.GGN, objective, at, DATA) + 1e-2 * np.eye(E)
        assert relative_error(inverse.mv(at)["w"].ravel(), np.linalg.solve(dense, np.asarray(at["w"]).ravel())) < 1e-9

    def test_convex_ones_are_factorised(self):
        """Sample space and Cholesky go on to serve losses that do not say of themselves that they are convex."""
        outputs, _, loss = CONVEX["log-sum-exp"]
        objective, at = ij.Objective(predict, loss), params(outputs)
        op = ij.GGN(objective, at, DATA)
        inverse = ij.invert(op, ij.Direct(1e-2))
        assert hasattr(inverse.fit, "factor")
        assert relative_error(ij.invert(op, ij.SampleSpace(1e-2)).mv(at)["w"], inverse.mv(at)["w"]) < 1e-9

    def test_bounds(self):
        """Nothing is known of an indefinite operator, unless its smallest eigenvalue is given."""
        objective, at = not_convex("Cauchy")
        influence = ij.Influence(objective, at, ij.invert(ij.GGN(objective, at, DATA), ij.Eigh(0.5)))
        assert not np.isfinite(ij.score_bounds(influence, QUERY, DATA)[1]).any()
        assert np.isfinite(ij.score_bounds(influence, QUERY, DATA, lambda_min=-0.4)[1]).all()

    def test_a_warning_names_the_loss(self):
        objective, at = not_convex("Cauchy")
        influence = ij.Influence(objective, at, ij.invert(ij.GGN(objective, at, DATA), ij.CG(1e-4)))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            influence.influences(QUERY, DATA)
        assert any("not convex in the output, first at example" in str(w.message) for w in caught)
