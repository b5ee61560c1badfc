"""Masks of positions: of named layers, and one that names none, which has to agree with the loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative_error
from zoo import normal

import influence_jax as ij

EXAMPLES, T, WIDTH = 8, 6, 4
LENGTHS = np.array([6, 3, 1, 5, 2, 4, 6, 3])
MASK = 1.0 * (np.arange(T)[None] < LENGTHS[:, None])


def masked_error(out, z):
    return 0.5 * jnp.sum(z["mask"][:, None] * (out - z["y"]) ** 2)


def mask(z):
    return z["mask"]


def matrices(*names):
    return {name: jnp.asarray(normal(WIDTH, WIDTH, number=n)) for n, name in enumerate(names)}


def sequences(**more):
    return {"x": normal(EXAMPLES, T, WIDTH, number=8), "mask": MASK, "y": normal(EXAMPLES, T, WIDTH, number=9), **more}


def moment(rows, counts):
    """Mean of outer products of rows `(N, T, n)` over the positions that count."""
    return np.einsum("nt,nti,ntj->ij", counts, rows, rows) / counts.sum()


def block(fitted, name):
    return np.asarray(ij.to_dense(ij.restrict(fitted, (name,))))


# An encoder-decoder: softmax over the source, so that every source position has a part in every output.
TRANSLATION = matrices("encoder", "query", "decoder", "out")


def translate(p, z):
    h = jnp.tanh(z["source"] @ p["encoder"])
    return jnp.tanh(z["x"] @ p["decoder"] + jax.nn.softmax(z["x"] @ p["query"] @ h.T) @ h) @ p["out"]


TRANSLATE = ij.Objective(translate, masked_error)
NAMED = {"decoder": mask, "out": mask}
ALL = np.ones((EXAMPLES, T))


def translations(source=T):
    return sequences(source=normal(EXAMPLES, source, WIDTH, number=10))


def translation_by_hand(data):
    """Inputs, and cotangents of the outputs, of every layer, in numpy."""
    p, d = {name: np.asarray(leaf) for name, leaf in TRANSLATION.items()}, data
    h = np.tanh(d["source"] @ p["encoder"])
    scores = d["x"] @ p["query"] @ h.swapaxes(1, 2)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    hidden = np.tanh(d["x"] @ p["decoder"] + weights @ h)
    d_out = d["mask"][:, :, None] * (hidden @ p["out"] - d["y"])
    d_sum = (d_out @ p["out"].T) * (1 - hidden**2)
    d_weights = d_sum @ h.swapaxes(1, 2)
    d_scores = weights * (d_weights - np.sum(d_weights * weights, axis=-1, keepdims=True))
    d_h = weights.swapaxes(1, 2) @ d_sum + d_scores.swapaxes(1, 2) @ (d["x"] @ p["query"])
    return {
        "encoder": (d["source"], d_h * (1 - h**2)),
        "query": (d["x"], d_scores @ h),
        "decoder": (d["x"], d_sum),
        "out": (hidden, d_out),
    }


@pytest.mark.parametrize("source", [T, T + 1])
class TestNamedLayers:
    """The mask of the decoder is for the decoder, however long the source is."""

    def test_kfac(self, source):
        data = translations(source)
        fitted = ij.kfac(TRANSLATE, TRANSLATION, data, labels="empirical", mask=NAMED)
        for name, (inputs, cotangents) in translation_by_hand(data).items():
            counts = MASK if name in NAMED else np.ones(inputs.shape[:2])
            expected = np.kron(moment(inputs, counts), moment(cotangents, counts))
            assert relative_error(block(fitted, name), expected) < 1e-12

    def test_ekfac(self, source):
        """Eigenvalues are those of whole examples, and in the basis of the positions that count."""
        data = translations(source)
        fitted = ij.ekfac(TRANSLATE, TRANSLATION, data, labels="empirical", mask=NAMED)
        layers = {layer.layer.kernel: layer for layer in fitted.layers}
        for name, (inputs, cotangents) in translation_by_hand(data).items():
            counts = MASK if name in NAMED else np.ones(inputs.shape[:2])
            q, layer = np.asarray(layers[name].q_in[0]), layers[name]
            basis = q.T @ moment(inputs, counts) @ q
            assert np.abs(basis - np.diag(np.diag(basis))).max() < 1e-12
            grads = np.einsum("nti,nto->nio", inputs, cotangents)
            rotated = np.einsum("ia,nio,ob->nab", q, grads, layer.q_out[0])
            assert relative_error(layer.values[0], np.mean(rotated**2, axis=0)) < 1e-12


class TestOneMaskForAll:
    def test_layers_of_another_length_are_not_meant(self):
        data, options = translations(T + 1), {"labels": "empirical"}
        fitted = ij.kfac(TRANSLATE, TRANSLATION, data, mask=mask, **options)
        named = ij.kfac(TRANSLATE, TRANSLATION, data, mask=dict.fromkeys(["query", "decoder", "out"], mask), **options)
        assert relative_error(ij.to_dense(fitted), ij.to_dense(named)) == 0

    @pytest.mark.parametrize("fit", [ij.kfac, ij.ekfac, ij.stream.kfac, ij.stream.ekfac])
    def test_layers_of_the_same_length_are_refused_by_name(self, fit):
        with pytest.raises(ValueError, match=r"mask: \['encoder'\] .* in 6 example.*mask=\{'decoder': \.\.\., 'out'"):
            fit(TRANSLATE, TRANSLATION, translations(), labels="empirical", mask=mask)

    def test_a_mask_that_leaves_nothing_out_changes_nothing(self):
        data = {**translations(), "mask": ALL}
        fitted, plain = (ij.kfac(TRANSLATE, TRANSLATION, data, labels="empirical", mask=m) for m in (mask, None))
        assert relative_error(ij.to_dense(fitted), ij.to_dense(plain)) < 1e-14

    def test_under_tracing_it_is_nan(self):
        fit = lambda data: ij.trace(ij.kfac(TRANSLATE, TRANSLATION, data, labels="empirical", mask=mask))
        assert np.isnan(jax.jit(fit)(translations()))
        assert np.isfinite(jax.jit(fit)(translations(T + 1)))

    def test_examples_of_no_weight_have_no_say(self):
        weights = np.where(LENGTHS == T, 1.0, 0.0)
        ij.kfac(TRANSLATE, TRANSLATION, translations(), labels="empirical", mask=mask, weights=weights)
        weights[1] = 1e-9
        with pytest.raises(ValueError, match="in 1 example"):
            ij.kfac(TRANSLATE, TRANSLATION, translations(), labels="empirical", mask=mask, weights=weights)


def mixed(p, z):
    """Tokens mixed by one matrix for every channel, of which there are as many as tokens; then channels."""
    return (jnp.tanh(z["x"].T @ p["tokens"]).T) @ p["channels"]


def deep(p, z):
    """One matrix for as many steps of a scan as there are positions, of the last one's state."""
    step = lambda h, _: (jnp.tanh(h @ p["step"]), None)
    return (z["x"] + jax.lax.scan(step, z["x"][0], None, length=T)[0][None]) @ p["out"]


def gated(p, z):
    """A gate for each of as many heads as there are positions, made from all of the sequence."""
    gates = jax.nn.sigmoid((z["heads"] * jnp.mean(z["x"])) @ p["gate"])
    return (z["x"] + jnp.mean(gates)) @ p["out"]


def attention(keys):
    def predict(p, z):
        scores = z["x"] @ p["query"] @ (z["x"] @ p["key"]).T
        scores = jnp.where(z["mask"][None] > 0, scores, -1e9) if keys else scores
        return z["x"] @ p["out"] + jax.nn.softmax(scores) @ (z["x"] @ p["value"])

    return predict


SQUARE = sequences(x=normal(EXAMPLES, T, T, number=8), heads=normal(EXAMPLES, T, 3, number=11))
COINCIDENCES = {
    "channels": (mixed, {"tokens": normal(T, T, number=1), "channels": normal(T, WIDTH, number=2)}, "tokens"),
    "depth": (deep, {"step": normal(T, T, number=1), "out": normal(T, WIDTH, number=2)}, "step"),
    "heads": (gated, {"gate": normal(3, 2, number=1), "out": normal(T, WIDTH, number=2)}, "gate"),
}


@pytest.mark.parametrize("axis", COINCIDENCES)
def test_other_axes_of_the_same_length_are_refused(axis):
    predict, params, wrong = COINCIDENCES[axis]
    (right,) = set(params) - {wrong}
    objective = ij.Objective(predict, masked_error)
    with pytest.raises(ValueError, match=rf"mask: \['{wrong}'\] .*mask=\{{'{right}'"):
        ij.kfac(objective, params, SQUARE, labels="empirical", mask=mask)
    fitted = ij.kfac(objective, params, SQUARE, labels="empirical", mask={right: mask})
    with pytest.warns(UserWarning, match=f"mask: none was given, but the loss masks positions of '{right}', first"):
        plain = ij.kfac(objective, params, SQUARE, labels="empirical")
    assert relative_error(block(fitted, wrong), block(plain, wrong)) < 1e-14
    inputs = jax.vmap(lambda z: predict({**params, right: jnp.eye(T)}, z))(SQUARE)
    outputs = jax.vmap(lambda z: predict(params, z))(SQUARE)
    expected = np.kron(moment(inputs, MASK), moment(MASK[:, :, None] * (outputs - SQUARE["y"]), MASK))
    assert relative_error(block(fitted, right), expected) < 1e-12


class TestPaddingThatLeaks:
    PARAMS = matrices("query", "key", "value", "out")
    DATA = sequences()

    def test_keys_left_out_of_attention(self):
        """Nothing of padding then matters: the fit is that of any other padding."""
        objective = ij.Objective(attention(True), masked_error)
        fitted = ij.ekfac(objective, self.PARAMS, self.DATA, labels="empirical", mask=mask)
        garbage = {**self.DATA, "x": np.where(MASK[:, :, None] > 0, self.DATA["x"], 30.0)}
        again = ij.ekfac(objective, self.PARAMS, garbage, labels="empirical", mask=mask)
        assert relative_error(ij.to_dense(again), ij.to_dense(fitted)) < 1e-12

    def test_keys_that_are_not(self):
        """Queries and the output are those of targets alone; keys and values of padding have an effect."""
        objective = ij.Objective(attention(False), masked_error)
        with pytest.raises(ValueError, match=r"mask: \['key', 'value'\] .*padding.*mask=\{'out': .*'query'"):
            ij.kfac(objective, self.PARAMS, self.DATA, labels="empirical", mask=mask)

    def test_names_are_taken_at_their_word(self):
        """Positions that do not count have no share in the moments, nor in the gradients of examples."""
        objective = ij.Objective(attention(False), masked_error)
        fitted = ij.ekfac(objective, self.PARAMS, self.DATA, labels="empirical", mask={"": mask})
        layer = next(x for x in fitted.layers if x.layer.kernel == "value")
        x, p = self.DATA["x"], self.PARAMS
        scores = x @ p["query"] @ (x @ p["key"]).swapaxes(1, 2)
        attend = np.asarray(jax.nn.softmax(scores))
        error = MASK[:, :, None] * (x @ p["out"] + attend @ (x @ p["value"]) - self.DATA["y"])
        cotangents = attend.swapaxes(1, 2) @ np.asarray(error)
        grads = np.einsum("nt,nti,nto->nio", MASK, x, cotangents)
        rotated = np.einsum("ia,nio,ob->nab", layer.q_in[0], grads, layer.q_out[0])
        assert relative_error(layer.values[0], np.mean(rotated**2, axis=0)) < 1e-12

    def test_a_loss_that_averages_over_padding_too(self):
        objective = ij.Objective(lambda p, z: z["x"] @ p["out"], lambda out, z: jnp.mean((out - z["y"]) ** 2))
        with pytest.raises(ValueError, match="does not leave padding out"):
            ij.kfac(objective, {"out": self.PARAMS["out"]}, self.DATA, labels="empirical", mask=mask)


def test_streams_give_the_same():
    data = translations(T + 1)
    batches = [{name: leaf[start : start + 3] for name, leaf in data.items()} for start in (0, 3, 6)]
    for given in (mask, NAMED):
        whole = ij.ekfac(TRANSLATE, TRANSLATION, data, labels="empirical", mask=given)
        streamed = ij.stream.ekfac(TRANSLATE, TRANSLATION, batches, labels="empirical", mask=given, progress=False)
        assert relative_error(ij.to_dense(streamed), ij.to_dense(whole)) < 1e-12


def test_a_stream_is_refused_at_its_first_batch_or_at_its_end():
    seen = []

    def loader(*, reverse):
        data = translations()
        order = np.argsort(LENGTHS)[:: -1 if reverse else 1]
        for number in range(4):
            seen.append(number)
            yield {name: leaf[order[2 * number : 2 * number + 2]] for name, leaf in data.items()}

    fit = lambda reverse: ij.stream.kfac(
        TRANSLATE, TRANSLATION, lambda: loader(reverse=reverse), labels="empirical", mask=mask, progress=False
    )
    with pytest.raises(ValueError, match=r"mask: \['encoder'\]"):
        fit(False)
    assert 3 not in seen
    with pytest.raises(ValueError, match=r"mask: \['encoder'\]"):
        fit(True)  # whose first batch leaves nothing out
    assert 3 in seen
