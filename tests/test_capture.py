"""Capture: gradients put together from inputs and cotangents are the model's own, whatever it does with parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import mainly, random_like, relative_error, tree_error
from zoo import (
    CLASSES,
    LENGTH,
    VOCABULARY,
    WIDTH,
    ZOO,
    classified,
    compiled,
    normal,
    plain,
    square,
    squared,
    texts,
    token_loss,
)

import influence_jax as ij
from influence_jax import tree
from influence_jax.capture import arrange, gradient, layer_factors, layers, products
from influence_jax.capture.run import capture


def first(data):
    return jax.tree.map(lambda x: x[0], data)


def summed(parts):
    """Leaves by name, added where several layers have a part of one."""
    whole = {}
    for part in parts:
        for name, leaf in part.items():
            whole[name] = whole[name] + leaf if name in whole else leaf
    return whole


@jax.jit
def rebuilt(objective, params, data, vectors):
    """Losses, gradients `(N, *leaf)` and inner products with vectors `(N, Q)`, from captured factors."""
    plan, layers = arrange(objective, params, first(data))
    losses = jax.vmap(lambda z: capture(plan, params, z).output)(data)
    factors = layer_factors(plan, layers, params, data, lambda loss, _: jnp.ones(1, loss.dtype), lambda loss, _: loss)
    space = dict(tree.named_leaves(params))
    grads = summed(la.leaves(gradient(la, f)[:, 0], space) for la, f in zip(layers, factors, strict=True))
    leaves = dict(tree.named_leaves(vectors))
    scores = sum(products(la, f, la.matrix(leaves)) for la, f in zip(layers, factors, strict=True))
    return losses, jax.tree.structure(params).unflatten([grads[name] for name in space]), scores


@jax.jit
def differentiated(objective, params, data):
    return jax.vmap(jax.value_and_grad(objective), (None, 0))(params, data)


def check(case, tolerance):
    objective, params, data = case
    vectors = random_like(jax.random.key(1), params, 7)
    losses, grads, scores = rebuilt(objective, params, data, vectors)
    expected_losses, expected = differentiated(objective, params, data)
    assert tree_error(losses, expected_losses) < tolerance
    assert tree_error(grads, expected) < tolerance
    assert relative_error(scores, tree.gram(expected, vectors)) < 10 * tolerance


@pytest.mark.parametrize(
    "name", compiled(mainly(ZOO, *(name for name in ZOO if "transformer" not in name), "transformer, scan and remat"))
)
def test_gradients_are_rebuilt(name):
    check(ZOO[name](), 1e-12)


@pytest.mark.parametrize("name", compiled(mainly(["mlp", "conv 2-D groups 2 dilated", "rotary"], "mlp")))
def test_gradients_are_rebuilt_in_single_precision(float32, name):
    check(ZOO[name](), 1e-6)


def test_bfloat16_parameters(float32):
    """As everywhere, derivatives are taken in float32 of parameters that are bfloat16."""
    objective, params, data = ZOO["rotary"]()
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    factors = random_like(jax.random.key(1), params, 5)
    scores = ij.Influence(objective, narrow, ij.Identity(narrow)).influences_from_factors(factors, data)
    expected = tree.gram(factors, ij.per_example_grads(objective, tree.promote(narrow), data))
    assert scores.dtype == jnp.float32
    assert relative_error(scores, expected) < 1e-6


@pytest.mark.parametrize("name", mainly(["odd", "looped", "transformer, scan", "rotary"], "odd", "looped"))
def test_every_entry_is_in_one_layer(name):
    """Arranging numbered entries and putting them back changes nothing, so layers tile the parameters."""
    objective, params, data = ZOO[name]()
    _, layers = arrange(objective, params, first(data))
    numbers = dict(tree.named_leaves(ij.unflatten(jnp.arange(1.0, 1 + tree.size(params)), params)))
    stack = {name: leaf[None] for name, leaf in numbers.items()}
    assert sum(la.groups * la.rows * la.columns for la in layers) == tree.size(params)
    back = summed(la.leaves(la.matrix(stack), numbers) for la in layers)
    assert all(np.array_equal(back[name][0], leaf) for name, leaf in numbers.items())


KINDS = {
    "transformer": {"Embed_0/embedding": "matrix", "positions": "block", "block0/q/bias": "bias"},
    "transformer, scan": {"ScanBlock_0/q/kernel": "matrix", "ScanBlock_0/Norm_0/scale": "block"},
    "recurrent": {"LSTMCell_0/hi/kernel": "matrix", "GRUCell_0/hn/bias": "bias"},
    "nnx": {"heads/kernel": "matrix", "mixed/bias": "bias", "conv/kernel": "matrix"},
    "rotary": {"per_head": "matrix", "table": "matrix", "out_bias": "bias"},
    "odd": {
        "halves": "matrix",
        "stack": "matrix",
        "normed": "block",
        "shared": "matrix",
        "gate": "block",
        "unused": "block",
    },
    "looped": {
        "closed": "matrix",
        "layers/nested": "matrix",
        "layers/bias": "bias",
        "carried": "block",
        "branch": "block",
    },
    "customised": {"halved": "block", "softened": "block", "plain": "matrix"},
}


@pytest.mark.parametrize("name", compiled(KINDS))
def test_coverage(name):
    objective, params, data = ZOO[name]()
    covered = ij.coverage(objective, params, first(data))
    assert ij.coverage(objective, *jax.eval_shape(lambda: (params, first(data)))) == covered
    kinds = {leaf.name: leaf.kind for leaf in covered.leaves}
    assert list(kinds) == [leaf for leaf, _ in tree.named_leaves(params)]
    assert {leaf: kinds[leaf] for leaf in KINDS[name]} == KINDS[name]
    assert all(leaf.name in repr(covered) and leaf.details in repr(covered) for leaf in covered.leaves)
    assert covered.share("matrix", "bias") + covered.share("block", "diagonal") == pytest.approx(1)


def test_coverage_says_what_it_is_about():
    """Large leaves by their diagonal, long sides in their own basis, leaves without effect, and why."""
    predict = lambda p, z: (z.x @ p["w"]) * p["scale"][None] + 0 * jnp.sum(p["large"] ** 2)
    params = {"w": normal(WIDTH, CLASSES), "scale": normal(CLASSES), "large": normal(40, 40), "dead": normal(2)}
    covered = ij.coverage(ij.Objective(predict, squared), params, first(classified(LENGTH, WIDTH)), max_side=6)
    details = {leaf.name: (leaf.kind, leaf.details) for leaf in covered.leaves}
    assert details["w"] == ("matrix", "8 x 4; dot; 5 positions; own basis of its rows")
    assert details["scale"] == ("block", "4 x 4, exact; mul")
    assert details["large"] == ("diagonal", "1,600 entries; integer_pow")
    assert details["dead"] == ("block", "2 x 2, exact; has no effect on the output")


# Look-ups of matrices, of rows of several axes, tables of one column and of many, parts treated differently.
LOOKED_UP = plain(
    lambda p, z: (
        jnp.einsum("td,tdh->th", z.x, p["experts"][(n := z.y + jnp.arange(LENGTH))])
        + p["table"][n]
        + p["column"][n]
        + p["wide"][n].reshape(LENGTH, -1)[:, ::8]
        + (z.x[:, :2] @ p["parts"][:2]) @ p["parts"][2:].T @ p["head"]
        + p["bias"][None]
    ),
    {
        "experts": normal(VOCABULARY, WIDTH, WIDTH, number=1),
        "table": normal(VOCABULARY, WIDTH, number=2),
        "column": normal(VOCABULARY, 1, number=3),
        "wide": normal(VOCABULARY, 8, WIDTH, number=7),
        "parts": normal(2 + 3, 7, number=4),
        "head": normal(3, WIDTH, number=5),
        "bias": normal(WIDTH, number=6),
    },
    classified(LENGTH, WIDTH),
    squared,
)
LOOPED = plain(
    lambda p, z: jax.lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p["stack"][i]), z.x),
    {"stack": square(1, 3)},
    classified(LENGTH, WIDTH),
    squared,
)


def structure(fitted, names):
    """Entries of each leaf by what is done with them, read off the eigenvectors that a fit has."""
    found = {name: {} for name in names}
    for layer in fitted.layers:
        of = layer.layer
        dense = [n > 1 for n, q in ((of.rows, layer.q_in), (of.columns, layer.q_out)) if q is not None]
        single = not of.of_entries and of.rows == of.columns == 1  # of one entry, in its own eigenbasis
        kind = "diagonal" if not any(dense) and not single else "matrix"
        if of.of_entries:
            kind = "diagonal" if layer.q_out is None else "block"
        parts = [(of.kernel, kind, of.groups * (of.rows - (of.bias is not None)) * of.columns)]
        if of.bias is not None:
            parts.append((of.bias[0], "bias" if kind == "matrix" else kind, of.groups * of.columns))
        for name, kind, size in parts:
            found[name][kind] = found[name].get(kind, 0) + size
    return found


LOOKS = {"looked up": lambda: LOOKED_UP, "loop": lambda: LOOPED}
OFTEN = ["mlp", "conv 2-D groups 4 stride 2", "transformer, scan", "rotary", "odd", "looped", *LOOKS]


@pytest.mark.parametrize("max_side", [4096, 7, 2])
@pytest.mark.parametrize("name", compiled(mainly([*ZOO, *LOOKS], *OFTEN)))
def test_coverage_is_what_is_fitted(name, max_side):
    """Every leaf, at any longest side: a matrix has a side in an eigenbasis, a diagonal none."""
    objective, params, data = {**ZOO, **LOOKS}[name]()
    fit = lambda params, data: ij.kfac(objective, params, data, labels="empirical", max_side=max_side)
    covered = ij.coverage(objective, params, first(data), max_side=max_side)
    expected = structure(jax.eval_shape(fit, params, data), [leaf.name for leaf in covered.leaves])
    kinds = ("matrix", "bias", "block", "diagonal")
    total = {kind: sum(sizes.get(kind, 0) for sizes in expected.values()) for kind in kinds}
    for leaf in covered.leaves:
        assert {kind: size for kind, size in leaf.parts if size} == {k: n for k, n in expected[leaf.name].items() if n}
        assert leaf.kind == max(leaf.parts, key=lambda part: part[1])[0]
    for kind, size in total.items():
        assert covered.share(kind) == pytest.approx(size / sum(total.values()))


def test_rows_of_several_axes_beyond_the_longest_side_are_a_diagonal():
    """A look-up whose rows no product takes for matrices; where products do, each is one."""
    objective, params, data = LOOKED_UP
    kinds = lambda **options: {la.name: la for la in ij.coverage(objective, params, first(data), **options).leaves}
    assert kinds()["wide"][2:5:2] == ("matrix", "11 x 64; gather; 5 positions; own basis of its rows")
    beyond = kinds(max_side=63)
    assert beyond["wide"].details == "11 x 64; gather; 5 positions; own basis of its rows and columns"
    assert beyond["experts"].details == "11 of 8 x 8; picked by number"
    assert {name: leaf.kind for name, leaf in beyond.items()} == {
        "bias": "block",
        "column": "diagonal",
        "experts": "matrix",
        "head": "matrix",
        "parts": "matrix",
        "table": "matrix",
        "wide": "diagonal",
    }
    share = ij.coverage(objective, params, first(data), max_side=63).share("diagonal")
    assert share == pytest.approx((704 + 11) / (704 + 704 + 88 + 11 + 35 + 24 + 8))


SIDE = 12  # of five experts, too large together for a block
NUMBERS = jnp.array([0, 3, 3, 1, 4])


def routed(p, z):
    """The best two of five experts for each token, as a mixture does it."""
    weight, index = jax.lax.top_k(jax.nn.softmax(z.x @ p["gate"]), 2)
    return jnp.einsum("td,tkdh,tk->th", z.x, p["stack"][index], weight)


STACKS = {
    "routed": routed,
    "mapped": lambda p, z: jax.vmap(lambda x, n: jnp.tanh(x @ p["stack"][n]))(z.x, NUMBERS) + z.x @ p["gate"][:, :1],
    "looped": lambda p, z: jax.lax.fori_loop(1, 4, lambda i, h: jnp.tanh(h @ p["stack"][i]), z.x) @ p["gate"],
    "outputs in front": lambda p, z: jnp.einsum("td,hd->th", z.x, jnp.take(p["stack"], z.y, axis=2)) @ p["gate"],
    "at a table's rows": lambda p, z: (p["gate"][NUMBERS] @ p["gate"].T + z.x) @ p["stack"][z.y],
}


def stacked(way):
    shape = (SIDE, SIDE, 5) if way == "outputs in front" else (5, SIDE, SIDE)
    params = {"stack": normal(*shape, number=1), "gate": normal(SIDE, 5, number=2)}
    if way == "at a table's rows":
        params["gate"] = normal(SIDE, 7, number=2)
    return plain(STACKS[way], params, classified(LENGTH, SIDE), squared)


@pytest.mark.parametrize("way", STACKS)
def test_matrices_picked_by_number(way, monkeypatch):
    """Each is a matrix of its own: gradients, their second moments on both sides, and eigenvalues."""
    monkeypatch.setattr(layers, "MAX_BLOCK", 500)
    case = stacked(way)
    covered = {leaf.name: leaf for leaf in ij.coverage(case.objective, case.params, first(case.data)).leaves}
    assert covered["stack"].details == "5 of 12 x 12; picked by number"
    check(case, 1e-12)
    fitted = ij.ekfac(case.objective, case.params, case.data, labels="empirical")
    (layer,) = (layer for layer in fitted.layers if layer.layer.kernel == "stack")
    grads = np.asarray(differentiated(case.objective, case.params, case.data)[1]["stack"])
    grads = np.moveaxis(grads, 3, 1).swapaxes(2, 3) if way == "outputs in front" else grads  # (N, 5, inputs, outputs)
    for q, rows in ((layer.q_in, grads), (layer.q_out, grads.swapaxes(2, 3))):
        moments = np.einsum("neij,nekj->eik", rows, rows)
        turned = np.einsum("eia,eij,ejb->eab", q, moments, q)
        assert np.abs(turned - np.einsum("eaa->ea", turned)[:, :, None] * np.eye(SIDE)).max() < 1e-12
    rotated = np.einsum("eia,neij,ejb->neab", layer.q_in, grads, layer.q_out)
    assert relative_error(layer.values, np.mean(rotated**2, axis=0)) < 1e-11


NO_STACKS = {
    "also summed": lambda p, z: z.x @ p["stack"][z.y] + jnp.sum(p["stack"]),
    "from both sides": lambda p, z: jnp.tanh(z.x @ p["stack"][z.y]) @ p["stack"][z.y].T,
    "entry by entry": lambda p, z: jnp.sum(p["stack"][NUMBERS] * z.x[:, :, None], axis=1),
    "part of each": lambda p, z: z.x @ jax.lax.dynamic_slice(p["stack"], (z.y, 0, 0), (1, SIDE, 7))[0],
    "two of them": lambda p, z: z.x @ jax.lax.dynamic_slice(p["stack"], (z.y, 0, 0), (2, SIDE, SIDE))[1],
}


@pytest.mark.parametrize("way", NO_STACKS)
def test_other_uses_of_a_stack(way, monkeypatch):
    """Nothing is told by the shape: what is also used otherwise is what it was."""
    monkeypatch.setattr(layers, "MAX_BLOCK", 500)
    case = plain(NO_STACKS[way], {"stack": normal(5, SIDE, SIDE, number=1)}, classified(LENGTH, SIDE), squared)
    (leaf,) = ij.coverage(case.objective, case.params, first(case.data)).leaves
    assert "picked" not in leaf.details
    check(case, 1e-12)


def test_overlapping_slices_are_taken_as_they_are():
    """A slice of a parameter that is also used as a whole fits no matrix of its own."""
    predict = lambda p, z: jnp.tanh(z.x @ p["w"]) @ p["w"][:, :CLASSES]
    case = plain(predict, {"w": square(1)}, classified(LENGTH, WIDTH), squared)
    assert [leaf.kind for leaf in ij.coverage(case.objective, case.params, first(case.data)).leaves] == ["block"]
    check(case, 1e-12)


@jax.jit
def product_and_more(x, w):
    """A product that is read before it is returned, so that its cotangent has two parts."""
    y = x @ w
    return y, jnp.tanh(y)


BIASES = {
    "read twice": lambda p, z: (y := z.x @ p["w"]) * 2 + jnp.tanh(y + p["b"][None]),
    "one for two products": lambda p, z: (z.x @ p["w"] + p["b"][None]) + (jnp.tanh(z.x) @ p["v"] + p["b"][None]),
    "on one of two uses": lambda p, z: jnp.tanh(z.x @ p["w"] + p["b"][None]) @ p["w"],
    "of every position": lambda p, z: z.x @ p["w"] + p["by_position"],
    "on the left": lambda p, z: p["b"][None] + z.x @ p["w"],
    "through a transpose": lambda p, z: (z.x @ p["w"]).T + p["b"][:, None],
    "twice": lambda p, z: z.x @ p["w"] + p["b"][None] + p["c"][None],
    "times two": lambda p, z: z.x @ p["w"] + 2 * p["b"][None],
    "of an embedding": lambda p, z: p["table"][z.y + jnp.arange(LENGTH)] + p["b"][None],
    "after a call that read it": lambda p, z: (r := product_and_more(z.x, p["w"]))[1] * (r[0] + p["b"][None]),
    "after rounding": lambda p, z: (z.x @ p["w"]).astype(jnp.bfloat16).astype(z.x.dtype) + p["b"][None],
    "after rounding to integers": lambda p, z: jnp.floor(z.x @ p["w"]).astype(int).astype(z.x.dtype) + p["b"][None],
    "as integers": lambda p, z: z.x @ p["w"] + (8 * p["b"]).astype(int).astype(z.x.dtype)[None] * p["c"][None],
    "a row of a matrix": lambda p, z: jnp.tanh(z.x @ p["w"] + p["v"][0][None]) @ p["v"],
}
ROWS = {"on the left": {"b"}, "through a transpose": {"b"}, "twice": {"b"}}


@pytest.mark.parametrize("way", BIASES)
def test_biases(way):
    """A bias is a row of its matrix only if that is what it is; else it is a block."""
    params = {"w": square(1), "v": square(2), "b": normal(WIDTH, number=3), "c": normal(WIDTH, number=4)}
    params |= {"by_position": normal(LENGTH, WIDTH, number=5), "table": normal(VOCABULARY, WIDTH, number=6)}
    case = plain(BIASES[way], params, classified(LENGTH, WIDTH), squared)
    covered = ij.coverage(case.objective, case.params, first(case.data))
    assert {leaf.name for leaf in covered.leaves if leaf.kind == "bias"} == ROWS.get(way, set())
    check(case, 1e-12)


@pytest.mark.parametrize("mode", ["clip", "fill", "wrap"])
def test_lookups_outside_of_the_table(mode):
    predict = lambda p, z: jnp.nan_to_num(jnp.take(p["table"], z.x + 3, axis=0, mode=mode)) @ p["table"].T
    check(plain(predict, {"table": normal(VOCABULARY, WIDTH)}, texts(), token_loss), 1e-12)


def test_capture_changes_neither_loss_nor_gradients_of_parameters():
    """Derivatives through a captured run are those of the function itself."""
    objective, params, data = ZOO["looped"]()
    plan, _ = arrange(objective, params, first(data))
    through = jax.jit(jax.value_and_grad(lambda p: capture(plan, p, first(data)).output))
    assert tree_error(through(params), jax.jit(jax.value_and_grad(objective))(params, first(data))) < 1e-12
