"""Labels drawn from the model: their second moment is the Hessian of the user's own loss."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import relative_error

import influence_jax as ij
from influence_jax.curvature.labels import check_sample, softmax_of

N, T, C, E = 3, 5, 4, 3
RNG = np.random.default_rng(0)
token = optax.softmax_cross_entropy_with_integer_labels
CLASS_WEIGHTS = np.array([0.3, 1.0, 4.0, 2.0])


def data(length=T, classes=C):
    y = RNG.integers(0, classes, (N, length))
    seen = np.arange(length)[None] < np.array([[length], [2], [length - 1]])
    return {
        "x": RNG.normal(size=(N, length, E)),
        "y": y,
        "ignored": np.where(seen, y, -100),
        "seen": seen.astype(float),
        "w": RNG.uniform(0.1, 3, (N, length)),
    }


DATA = data()
predict = lambda p, z: z["x"] @ p["w"]
params = lambda scale=1.0, classes=C: {"w": scale * jnp.asarray(np.random.default_rng(1).normal(size=(E, classes)))}
LOSSES = {
    "sum": lambda o, z: jnp.sum(token(o, z["y"])),
    "mean": lambda o, z: jnp.mean(token(o, z["y"])),
    "masked mean": lambda o, z: jnp.sum(token(o, z["y"]) * z["seen"]) / jnp.sum(z["seen"]),
    "ignored": ij.losses.cross_entropy("ignored", ignore=-100, reduction="mean"),
    "weights": lambda o, z: jnp.sum(z["w"] * token(o, z["y"])),
    "class weights": lambda o, z: jnp.sum(jnp.asarray(CLASS_WEIGHTS)[z["y"]] * token(o, z["y"])),
    "cold": lambda o, z: jnp.sum(token(o / 0.5, z["y"])),
    "hot": lambda o, z: jnp.sum(token(o / 3.0, z["y"])),
    "smoothed": lambda o, z: jnp.sum(
        optax.softmax_cross_entropy(o, optax.smooth_labels(jax.nn.one_hot(z["y"], C), 0.1))
    ),
    "adjusted": lambda o, z: jnp.mean(token(o + jnp.log(jnp.asarray(CLASS_WEIGHTS))[None], z["y"])),
    "fewer classes": lambda o, z: jnp.sum(token(jnp.where((jnp.arange(C) < 3)[None], o, -1e9), z["y"] % 3)),
}
OTHERS = {
    "squared": lambda o, z: jnp.sum(o**2),
    "z-loss": lambda o, z: jnp.sum(token(o, z["y"]) + 1e-3 * jax.nn.logsumexp(o, -1) ** 2),
    "positions mixed": lambda o, z: jnp.sum(token(o - 0.5 * jnp.mean(o, 0, keepdims=True), z["y"])),
    "negative weight": lambda o, z: -jnp.sum(token(o, z["y"])),
}


def drawn(loss, scale=1.0, **options):
    return ij.Objective(predict, loss, sample=ij.softmax_labels("y")), params(scale, **options)


def expectation(objective, at, examples):
    """The sum over all labels of each position, and the Hessian by `jax.hessian`, of every example."""

    def one(z):
        out = objective.predict(at, z)
        found = softmax_of(objective, objective.sample, out, z)
        eye = jnp.eye(out.shape[-1])
        u = jnp.sqrt(found.scale)[..., None, None] * (found.p[..., None, :] - eye[None])
        blocks = jnp.einsum("tk,tki,tkj->tij", found.p, u, u)
        whole = jnp.einsum("tij,ts->tisj", blocks, jnp.eye(len(blocks)))
        return found.fits, whole, jax.hessian(lambda o: objective.loss(o, z))(out)

    return jax.jit(jax.vmap(one))(jax.tree.map(jnp.asarray, examples))


class TestSoftmaxLabels:
    """The exact expectation over labels against the Hessian of the loss, and what comes of it."""

    @pytest.mark.parametrize("name", LOSSES)
    @pytest.mark.parametrize("scale", [1.0, 8.0])
    def test_second_moment_is_the_hessian(self, name, scale):
        fits, moment, hessian = expectation(*drawn(LOSSES[name], scale), DATA)
        assert fits.all()
        assert relative_error(moment, hessian) < 1e-9

    @pytest.mark.parametrize("classes", [2, 3, 9])
    def test_two_classes_and_more(self, classes):
        objective, at = drawn(LOSSES["mean"], classes=classes)
        fits, moment, hessian = expectation(objective, at, data(16, classes))
        assert fits.all()
        assert relative_error(moment, hessian) < 1e-9

    @pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e3])
    def test_single_precision(self, float32, scale):
        """Confident predictions are rounding all over, which is no reason to refuse."""
        narrow = jax.tree.map(lambda x: np.asarray(x, np.float32 if x.dtype == float else np.int32), DATA)
        objective, at = drawn(LOSSES["masked mean"], scale)
        fits, moment, hessian = expectation(objective, jax.tree.map(jnp.float32, at), narrow)
        assert fits.all()
        assert np.max(np.abs(moment - hessian)) < 1e-5

    def test_curvature_is_that_of_the_loss(self):
        """EK-FAC and Fisher with the scale of the GGN, where a label's own gradient has that of its square."""
        objective, at = drawn(LOSSES["weights"])
        ggn = ij.trace(ij.GGN(objective, at, DATA))
        key = jax.random.key(0)
        fisher = ij.trace(ij.Fisher(objective, at, DATA, key=key, samples=2000))
        fitted = [
            float(ij.trace(ij.ekfac(objective, at, DATA, labels="sampled", key=jax.random.key(i)))) for i in range(60)
        ]
        assert relative_error(fisher, ggn) < 0.05
        assert abs(np.mean(fitted) - ggn) < 4 * np.std(fitted) / 60**0.5

    @pytest.mark.parametrize("name", OTHERS)
    def test_another_loss_is_refused(self, name):
        objective, at = drawn(OTHERS[name], 2.0)
        with pytest.raises(ValueError, match=r"sample: softmax_labels.*at example 0 is not"):
            ij.Fisher(objective, at, DATA, key=jax.random.key(0))

    def test_right_where_it_has_the_form(self):
        """The Hessian of a focal loss has it at some outputs, with other probabilities."""
        focal = lambda o, z: jnp.sum((1 - jnp.exp(-token(o, z["y"]))) ** 2 * token(o, z["y"]))
        for scale in (0.1, 1.0, 6.0):
            fits, moment, hessian = expectation(*drawn(focal, scale), DATA)
            convex = np.linalg.eigvalsh(hessian.reshape(N, T * C, T * C))[:, 0] > -1e-9
            assert not (fits & ~convex).any()
            assert not fits.any() or relative_error(moment[fits], hessian[fits]) < 1e-9

    def test_another_loss_is_nan_under_tracing(self):
        objective, at = drawn(OTHERS["squared"])
        traced = jax.jit(lambda p: ij.Fisher(objective, p, DATA, key=jax.random.key(0)).mv(p))(at)
        assert np.isnan(traced["w"]).all()

    @pytest.mark.parametrize(
        ("label", "kind", "words"),
        [
            ("z", ValueError, "sample: got 'z'"),
            ("w", TypeError, "integer labels"),
            ("x", TypeError, "integer labels"),
            ("first", ValueError, r"shape \(\)"),
        ],
    )
    def test_the_labels_are_checked(self, label, kind, words):
        objective = ij.Objective(predict, LOSSES["sum"], sample=ij.softmax_labels(label))
        with pytest.raises(kind, match=words):
            ij.Fisher(objective, params(), {**DATA, "first": np.zeros(N, int)}, key=jax.random.key(0))

    def test_outputs_are_logits_alone(self):
        both = ij.Objective(
            lambda p, z: {"logits": predict(p, z), "aux": jnp.ones(2)},
            lambda o, z: LOSSES["sum"](o["logits"], z),
            sample=ij.softmax_labels("y"),
        )
        with pytest.raises(ValueError, match=r"sample: .*aux \(2,\).*expected logits \(\.\.\., C\) alone"):
            ij.Fisher(both, params(), DATA, key=jax.random.key(0))


def softmax_draw(factor=1.0, temperature=1.0):
    def sample(key, out):
        label = jax.random.categorical(key, out / temperature)
        return factor * (jax.nn.softmax(out / temperature) - jax.nn.one_hot(label, out.shape[-1]))

    return sample


class TestCheckedSamples:
    """Samples of the user's own: never refused where right, always where off."""

    def check(self, loss, sample, scale=1.0):
        check_sample(ij.Objective(predict, loss, sample=sample), params(scale), DATA)

    @pytest.mark.parametrize("scale", [0.1, 3.0, 100.0])
    def test_right_ones_pass(self, scale):
        self.check(LOSSES["sum"], softmax_draw(), scale)
        self.check(LOSSES["mean"], softmax_draw(T**-0.5), scale)
        self.check(LOSSES["hot"], softmax_draw(1 / 3, 3.0), scale)

    def test_right_ones_of_other_losses_pass(self):
        self.check(lambda o, z: 0.5 * jnp.sum(o**2), lambda key, o: jax.random.normal(key, o.shape))
        self.check(lambda o, z: 0.5 * jnp.sum(o**2), lambda key, o: jax.random.rademacher(key, o.shape, float))
        binary = lambda key, o: jax.nn.sigmoid(o) - jax.random.bernoulli(key, jax.nn.sigmoid(o)).astype(o.dtype)
        self.check(lambda o, z: jnp.sum(jax.nn.softplus(o) - o), binary, 20.0)

    @pytest.mark.parametrize("scale", [0.1, 3.0, 100.0])
    @pytest.mark.parametrize("loss", ["mean", "masked mean", "weights", "hot"])
    def test_scales_are_seen(self, loss, scale):
        with pytest.raises(ValueError, match=r"second moment is not the Hessian.*softmax_labels"):
            self.check(LOSSES[loss], softmax_draw(), scale)

    @pytest.mark.parametrize("factor", [1.3, 1 / 1.3])
    def test_a_third_is_seen(self, factor):
        with pytest.raises(ValueError, match=r"it is (1\.[1-4]|0\.[6-8])\d* times that"):
            self.check(LOSSES["sum"], softmax_draw(factor**0.5), 100.0)

    def test_masked_positions_are_seen(self):
        masked = lambda o, z: jnp.sum(token(o, z["y"]) * z["seen"])
        with pytest.raises(ValueError, match="masked positions"):
            self.check(masked, softmax_draw())

    def test_a_mask_of_the_fit_leaves_out_what_the_loss_does(self):
        """A sample function does not see the example; what it draws at padding is left out by the mask of the fit."""
        objective = ij.Objective(predict, lambda o, z: jnp.sum(z["seen"] * token(o, z["y"])), sample=ij.softmax_sample)
        fit = lambda seed, **mask: ij.ekfac(
            objective, params(), DATA, labels="sampled", key=jax.random.key(seed), **mask
        )
        with pytest.raises(ValueError, match=r"not zero where the loss has no curvature.*mask= of a fit"):
            fit(0)
        seen = lambda z: z["seen"]
        traces = np.asarray([ij.trace(fit(seed, mask=seen)) for seed in range(100)])
        p = np.exp(DATA["x"] @ np.asarray(params()["w"]))
        p /= p.sum(-1, keepdims=True)
        expected = np.sum(DATA["seen"] * np.sum(DATA["x"] ** 2, -1) * (1 - np.sum(p**2, -1))) / N
        assert abs(traces.mean() - expected) < 4 * traces.std() / 10
        assert traces.std() / 10 < 0.06 * expected

    def test_by_whoever_draws(self):
        objective = ij.Objective(predict, LOSSES["mean"], sample=softmax_draw())
        key = jax.random.key(0)
        with pytest.raises(ValueError, match="sample: "):
            ij.Fisher(objective, params(), DATA, key=key)
        with pytest.raises(ValueError, match="sample: "):
            ij.ekfac(objective, params(), DATA, labels="sampled", key=key)
        with pytest.raises(ValueError, match="sample: "):
            ij.stream.kfac(objective, params(), [DATA], labels="sampled", key=key, progress=False)


class TestUndefined:
    """A loss without a second derivative at an example has no Fisher matrix."""

    @pytest.mark.parametrize("kind", ["scalar", "one of several", "root of zero"])
    def test_is_refused_or_nan(self, kind):
        out = {"scalar": lambda p, z: jax.nn.sigmoid(z.x @ p["w"]), "one of several": lambda p, z: z.x * p["w"]}
        log = lambda o, z: -(z.y * jnp.log(o) + (1 - z.y) * jnp.log1p(-o))
        loss = {
            "scalar": log,
            "one of several": lambda o, z: jnp.sum(o**2) + log(jax.nn.sigmoid(o[1]), z),
            "root of zero": lambda o, z: jnp.sqrt(jnp.sum((o - z.y) ** 2)),
        }[kind]
        x = np.array([[1.0, 1.0], [0.5, 2.0], [100.0, 500.0]])
        y = np.array([0.0, 1.0, 0.0])
        model, w = out.get(kind, out["one of several"]), jnp.ones(2)
        if kind == "root of zero":
            x, y = np.array([[1.0, 2.0], [2.0, 1.0], [3.0, 3.0]]), np.array([0.0, 0.0, 3.0])
        objective, batch = ij.Objective(model, loss), ij.Batch(x, y)
        for fit in (ij.kfac, ij.ekfac):
            with pytest.raises(ValueError, match=r"(second derivative|NaN or infinite).*example 2"):
                fit(objective, {"w": w}, batch)
        fisher = lambda at: ij.Fisher(objective, {"w": at}, batch, key=jax.random.key(0))
        assert np.isnan(jax.jit(lambda at: ij.trace(fisher(at)))(w)), "nothing raises under tracing"


def test_exact_labels_of_several_axes_and_leaves():
    """The trace of EK-FAC is that of the GGN, whatever the shape of the output."""
    heads = ij.Objective(
        lambda p, z: {"a": predict(p, z), "b": jnp.tanh(z["x"]) @ p["w"]},
        lambda o, z: LOSSES["mean"](o["a"], z) + 0.5 * jnp.sum(o["b"] ** 2),
    )
    for objective, mask in ((ij.Objective(predict, LOSSES["masked mean"]), lambda z: z["seen"]), (heads, None)):
        ggn = ij.trace(ij.GGN(objective, params(), DATA))
        assert relative_error(ij.trace(ij.ekfac(objective, params(), DATA, mask=mask)), ggn) < 1e-9
