"""Operators over data: equal to an independent dense matrix, indifferent to how data is cut, in any dtype."""

import dataclasses
from functools import partial

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import mainly, relative_error, tree_error
from hypothesis import given, strategies as st
from operator_problems import COUNT, MODELS, problem

import influence_jax as ij
from influence_jax.curvature import Restricted, Sum

OVER_DATA = [ij.Hessian, ij.GGN, ij.EmpiricalFisher]


@pytest.mark.parametrize("kind", OVER_DATA)
@pytest.mark.parametrize(
    ("model", "count", "chunk"),
    [
        ("classification", 1, None),
        *mainly([(model, COUNT, 5) for model in MODELS], ("classification", COUNT, 5), ("dead, bias-free", COUNT, 5)),
    ],
)
def test_equals_independent_dense_reference(kind, model, count, chunk):
    objective, params, data = problem(model, count)
    weights = jnp.linspace(0.5, 2.0, count) if chunk else None
    expected = helpers.dense_reference(kind, objective, params, data, weights)
    op = kind(objective, params, data, weights=weights, chunk=chunk)
    v = helpers.random_like(jax.random.key(3), params)
    product = helpers.flat(op.mv(v), params)
    assert relative_error(product, expected @ helpers.flat(v, params)) < 1e-11
    if chunk:
        assert relative_error(ij.to_dense(op), expected) < 1e-11
        assert relative_error(helpers.flat(ij.diagonal(op), params), np.diag(expected)) < 1e-11


@pytest.mark.parametrize("kind", mainly(OVER_DATA, ij.GGN))
@given(chunk=st.sampled_from([1, 2, 5, 12, 100]), seed=st.integers(0, 3))
def test_chunks_padding_and_order_do_not_matter(kind, chunk, seed):
    objective, params, data = problem("classification")
    order = jax.random.permutation(jax.random.key(seed), COUNT)
    weights = jnp.linspace(0.1, 1.0, COUNT)
    shuffled = jax.tree.map(lambda x: x[order], data)
    v = helpers.random_like(jax.random.key(3), params)
    expected = kind(objective, params, data, weights=weights).mv(v)
    got = kind(objective, params, shuffled, weights=weights[order], chunk=chunk).mv(v)
    assert tree_error(got, expected) < 1e-12


def test_padding_never_evaluates_an_invalid_example():
    """A loss that is singular at zero stays finite in a ragged tail: padding repeats a real example."""
    objective = ij.Objective(lambda p, z: p["w"] * z, lambda out, z: jnp.log(out))
    data = jnp.arange(1.0, 6.0)
    for kind in OVER_DATA:
        op = kind(objective, {"w": jnp.array(2.0)}, data, chunk=3)
        assert jnp.isfinite(op.mv({"w": jnp.array(1.0)})["w"])


@pytest.mark.parametrize("kind", OVER_DATA)
def test_integer_weights_are_repetitions(kind):
    objective, params, data = problem("regression", 5)
    counts = np.array([1, 3, 0, 2, 1])
    repeated = jax.tree.map(lambda x: np.repeat(x, counts, axis=0), data)
    v = helpers.random_like(jax.random.key(3), params)
    weighted = kind(objective, params, data, weights=jnp.asarray(counts, jnp.float64), chunk=2)
    assert tree_error(weighted.mv(v), kind(objective, params, repeated).mv(v)) < 1e-12


def test_ggn_equals_hessian_on_a_linear_model_and_fisher_identity():
    """No model curvature: GGN is the Hessian. Softmax: GGN is the expectation of gg^T over the model's own labels."""
    key = jax.random.key(0)
    params = {"kernel": helpers.normal(key, (5, 3)), "bias": jnp.zeros(3)}
    data = helpers.random_batch(key, COUNT, 5, 3, classes=True)
    objective = ij.Objective(helpers.affine, helpers.cross_entropy)
    ggn = ij.to_dense(ij.GGN(objective, params, data))
    assert relative_error(ggn, ij.to_dense(ij.Hessian(objective, params, data))) < 1e-12
    fisher = 0.0
    logits = jax.vmap(helpers.affine, (None, 0))(params, data)
    for label in range(3):
        relabelled = ij.Batch(data.x, jnp.full(COUNT, label))
        grads = helpers.flat(ij.per_example_grads(objective, params, relabelled), params)
        fisher += jnp.einsum("n,ni,nj->ij", jax.nn.softmax(logits)[:, label], grads, grads) / COUNT
    assert relative_error(ggn, fisher) < 1e-12


@pytest.mark.parametrize("rhs_chunk", [1, 2, 5, 64])
def test_groups_of_right_hand_sides_do_not_matter(rhs_chunk):
    objective, params, data = problem("classification")
    V = helpers.random_like(jax.random.key(2), params, rows=5)
    op = ij.GGN(objective, params, data)
    assert tree_error(dataclasses.replace(op, rhs_chunk=rhs_chunk).mm(V), op.mm(V)) < 1e-12


@pytest.mark.parametrize("kind", OVER_DATA)
def test_second_call_compiles_nothing(kind, compilations):
    objective, params, data = problem("classification", 11)
    v = helpers.random_like(jax.random.key(2), params)
    kind(objective, params, data, chunk=4).mv(v)
    moved = jax.tree.map(lambda x: x + 0.1, params)
    jax.block_until_ready(moved)
    with compilations() as names:
        kind(objective, moved, data, chunk=4).mv(v)
    assert names == []


@pytest.mark.parametrize(
    ("params_dtype", "dtype"),
    [
        (jnp.bfloat16, jnp.bfloat16),
        (jnp.bfloat16, jnp.float32),
        (jnp.float32, jnp.bfloat16),
        (jnp.float32, jnp.float32),
        (jnp.float64, jnp.float64),
    ],
)
@pytest.mark.parametrize("kind", OVER_DATA)
def test_products_keep_the_dtype_of_the_vector(kind, params_dtype, dtype):
    """The vector decides the precision: float32 vectors get float32 products from bfloat16 parameters."""
    objective = ij.Objective(lambda p, z: z.x.astype(p["w"].dtype) @ p["w"], helpers.cross_entropy)
    key = jax.random.key(0)
    data = helpers.random_batch(key, 6, 5, 3, classes=True)
    exact = {"w": helpers.normal(key, (5, 3)).astype(params_dtype).astype(jnp.float64)}
    v = helpers.random_like(key, exact)
    expected = kind(objective, exact, data).mv(v)
    params = jax.tree.map(lambda x: x.astype(params_dtype), exact)
    got = kind(objective, params, data).mv(jax.tree.map(lambda x: x.astype(dtype), v))
    assert got["w"].dtype == dtype
    tolerance = {jnp.bfloat16: 0.05, jnp.float32: 1e-5, jnp.float64: 1e-12}[dtype]
    assert relative_error(got["w"].astype(jnp.float64), expected["w"]) < tolerance


@pytest.mark.parametrize("kind", [ij.GGN, ij.EmpiricalFisher])
@pytest.mark.parametrize("weighted", [False, True])
def test_root(kind, weighted):
    r"""$A v = \sum_i \omega_i R_i^\top R_i v$, and transpose is the adjoint of apply."""
    objective, params, data = problem("classification")
    weights = jnp.linspace(0.5, 2.0, COUNT) if weighted else None
    op = kind(objective, params, data, weights=weights, chunk=5)
    root = ij.root(op)
    v = helpers.random_like(jax.random.key(4), params)
    rows = root.apply(v)
    assert rows.shape == (COUNT, 1 if kind is ij.EmpiricalFisher else 3)
    assert abs(jnp.sum(root.weights) - 1) < 1e-12
    assert tree_error(root.transpose(root.weights[:, None] * rows), op.mv(v)) < 1e-12
    u = helpers.normal(jax.random.key(5), rows.shape)
    assert abs(jnp.sum(u * rows) - ij.tree.dot(root.transpose(u), v)) < 1e-11
    doubled = ij.root(2.0 * op)
    assert relative_error(doubled.weights, 2 * root.weights) < 1e-12


def test_minibatches_without_weight():
    """Examples of weight zero are zero, as long as the whole data have some weight."""
    objective, params, data = problem("classification", 5)
    op = ij.GGN(objective, params, data, weights=jnp.array([1.0, 2.0, 0.0, 0.0, 1.0]))
    product = ij.minibatch(op, jnp.array([2, 3])).mv(params)
    assert np.max(np.abs(helpers.flat(product, params))) == 0.0


@pytest.mark.parametrize("size", [1.0, 1e-18])
def test_root_of_a_loss_that_is_not_convex_is_refused_or_nan(size):
    """However small the loss: it may be divided by the number of examples or tokens."""
    objective = ij.Objective(lambda p, z: p["w"] * z, lambda out, z: -size * out**2)
    at, data = {"w": jnp.array(1.0)}, jnp.arange(1.0, 4.0)
    with pytest.raises(ValueError, match="not convex in the output, first at example 0"):
        ij.root(ij.GGN(objective, at, data))
    with pytest.raises(ValueError, match="not convex in the output, first at example 0"):
        ij.kfac(objective, at, data)
    assert jnp.all(jnp.isnan(jax.jit(lambda at: ij.root(ij.GGN(objective, at, data)).apply(at))(at)))


@pytest.mark.parametrize("kind", mainly(OVER_DATA, ij.GGN))
def test_sums_of_two_halves_add_up(kind):
    objective, params, data = problem("classification")
    weights = jnp.linspace(0.5, 2.0, COUNT)
    V = helpers.random_like(jax.random.key(2), params, rows=2)
    parts = []
    for part in (slice(0, 5), slice(5, COUNT)):
        half = jax.tree.map(lambda x, part=part: x[part], data)
        parts.append(ij.sums(kind(objective, params, half, weights=weights[part]), V))
    total = jax.tree.map(jnp.add, *(product for product, _ in parts))
    mean = jax.tree.map(lambda x: x / (parts[0][1] + parts[1][1]), total)
    assert tree_error(mean, kind(objective, params, data, weights=weights).mm(V)) < 1e-12
    scaled = ij.sums(3.0 * kind(objective, params, data), V)
    assert (
        tree_error(jax.tree.map(lambda x: x / (3.0 * scaled[1]), scaled[0]), kind(objective, params, data).mm(V))
        < 1e-12
    )


@pytest.mark.parametrize(("kind", "weighted"), [(ij.Hessian, False), (ij.GGN, True), (ij.EmpiricalFisher, True)])
def test_minibatches_are_unbiased(kind, weighted):
    """The mean over all minibatches of one example, and over all of two, is the whole operator, weights or not."""
    objective, params, data = problem("classification", 5)
    weights = jnp.array([0.1, 1.0, 5.0, 2.0, 0.3]) if weighted else None
    op = kind(objective, params, data, weights=weights) + 0.5 * ij.Identity(params)
    v = helpers.random_like(jax.random.key(2), params)
    ones = [ij.minibatch(op, jnp.array([i])).mv(v) for i in range(5)]
    twos = [ij.minibatch(op, jnp.array([i, j])).mv(v) for i in range(5) for j in range(5)]
    for products in (ones, twos):
        mean = jax.tree.map(lambda *parts: sum(parts) / len(parts), *products)
        assert tree_error(mean, op.mv(v)) < 1e-12
    nested = ij.minibatch(ij.minibatch(op, jnp.array([4, 1, 2])), jnp.array([1]))
    assert isinstance(nested, Sum)
    assert tree_error(nested.mv(v), ones[1]) < 1e-12


@pytest.mark.parametrize("kind", OVER_DATA)
@pytest.mark.parametrize(
    "block",
    [("layer0/bias", "layer1/kernel"), pytest.param(("layer1/kernel", "layer1/bias"), marks=pytest.mark.thorough)],
)
def test_restrict_is_the_diagonal_block_in_the_same_class(kind, block):
    objective, params, data = problem("classification")
    op = kind(objective, params, data)
    small = ij.restrict(op, block)
    assert type(small) is kind
    places = helpers.flat(ij.tree.unflatten(jnp.arange(float(op.size)), params), params).astype(int)
    named = dict(ij.tree.named_leaves(ij.unflatten(places, params)))
    chosen = jnp.concatenate([named[name].ravel() for name in sorted(block)])
    expected = ij.to_dense(op)[chosen][:, chosen]
    assert relative_error(ij.to_dense(small), expected) < 1e-12
    assert relative_error(ij.to_dense(Restricted(op, tuple(sorted(block)))), expected) < 1e-12
    again = ij.restrict(small, block[:1])
    assert relative_error(ij.to_dense(again), ij.to_dense(ij.restrict(op, block[:1]))) < 1e-12
    both = ij.restrict(2.0 * op + ij.Identity(params), block)
    assert relative_error(ij.to_dense(both), 2 * expected + jnp.eye(len(expected))) < 1e-12


def test_many_outputs_take_the_other_way_to_the_same_matrix():
    """More outputs than rows are worth assembling: the matrix comes from products."""
    key = jax.random.key(0)
    params = {"kernel": helpers.normal(key, (2, 40)), "bias": jnp.zeros(40)}
    data = helpers.random_batch(key, 6, 2, 40, classes=True)
    objective = ij.Objective(helpers.affine, helpers.cross_entropy)
    op = ij.GGN(objective, params, data)
    expected = helpers.dense_reference(ij.GGN, objective, params, data)
    assert relative_error(ij.to_dense(op), expected) < 1e-12
    assert relative_error(helpers.flat(ij.diagonal(op), params), np.diag(expected)) < 1e-12
    assert abs(ij.trace(op) - jnp.trace(expected)) < 1e-12


def test_memory_of_a_chunked_product_is_flat_in_the_data():
    """Temporary memory does not grow with N, padded or not."""
    from influence_jax.curvature.exact import _mean_product

    params = helpers.random_mlp(jax.random.key(0), (64, 128, 10))
    temporary = []
    for count in (1024, 8192, 8191):
        data = helpers.random_batch(jax.random.key(1), count, 64, 10, classes=True)
        compiled = _mean_product.lower(ij.GGN(helpers.CLASSIFICATION, params, data, chunk=128), params).compile()
        temporary.append(compiled.memory_analysis().temp_size_in_bytes)
    # What may grow is 12 bytes an example: its weight and its index.
    assert max(temporary[1:]) < temporary[0] + 12 * 8192


def test_roots_compile_once(compilations):
    objective, params, data = problem("classification")
    root, v = ij.root(ij.GGN(objective, params, data, chunk=4)), helpers.random_like(jax.random.key(0), params)
    root.transpose(root.apply(v))
    other = jax.tree.map(lambda x: x[::-1], data)
    with compilations() as names:
        root = ij.root(ij.GGN(objective, params, other, chunk=4))
        root.transpose(root.apply(v))
    assert names == []


def test_block_of_a_bfloat16_model_is_computed_as_the_whole_is():
    objective, params, data = problem("classification")
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    op = ij.GGN(objective, params, ij.Batch(data.x.astype(jnp.bfloat16), data.y))
    places = ij.unflatten(jnp.arange(39.0), params)["layer1"]["kernel"].astype(int).ravel()
    with jax.numpy_dtype_promotion("standard"):
        block, whole = ij.to_dense(ij.restrict(op, ("layer1/kernel",))), ij.to_dense(op)
    assert relative_error(block, whole[places][:, places]) < 1e-6


def test_models_without_forward_mode():
    """`jax.custom_vjp` gives a function derivatives in reverse only; products then transpose them."""

    @jax.custom_vjp
    def relu(x):
        return jnp.maximum(x, 0)

    relu.defvjp(lambda x: (relu(x), x > 0), lambda positive, g: (jnp.where(positive, g, 0),))
    data = problem("classification")[2]
    params = {"w": helpers.normal(jax.random.key(0), (5, 3)), "head": helpers.normal(jax.random.key(1), (3, 3))}
    v = helpers.random_like(jax.random.key(2), params)
    custom, plain = (
        ij.Objective(lambda p, z, f=f: f(z.x @ p["w"]) @ p["head"], helpers.cross_entropy) for f in (relu, jax.nn.relu)
    )
    for kind in (ij.GGN, ij.EmpiricalFisher, ij.Hessian, partial(ij.Fisher, key=jax.random.key(0))):
        expected = kind(plain, params, data)
        assert tree_error(kind(custom, params, data).mv(v), expected.mv(v)) < 1e-12
    solver = ij.CG(0.1, rtol=1e-12)
    scores, expected = (
        ij.Influence(f, params, ij.invert(ij.GGN(f, params, data), solver)).influences(data, data)
        for f in (custom, plain)
    )
    assert relative_error(scores, expected) < 1e-9
    assert (
        relative_error(ij.root(ij.GGN(custom, params, data)).apply(v), ij.root(ij.GGN(plain, params, data)).apply(v))
        < 1e-12
    )
