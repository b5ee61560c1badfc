"""Per-example derivatives against a loop of plain `jax.grad`, and how batches are cut."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative_error, tree_error
from hypothesis import given, strategies as st

import influence_jax as ij
from influence_jax import batching

PARAMS = helpers.random_mlp(jax.random.key(0))
BATCH = helpers.random_batch(jax.random.key(1), 9, 5, 3, classes=True)
OBJECTIVE = helpers.CLASSIFICATION


def example(index):
    return jax.tree.map(lambda x: x[index], BATCH)


@pytest.mark.parametrize("chunk", [None, 1, 2, 9, 20])
def test_per_example_grads(chunk):
    got = ij.per_example_grads(OBJECTIVE, PARAMS, BATCH, chunk=chunk)
    for index in range(9):
        expected = jax.grad(OBJECTIVE)(PARAMS, example(index))
        assert tree_error(jax.tree.map(lambda x, i=index: x[i], got), expected) < 1e-12
    bare = ij.per_example_grads(lambda p, z: OBJECTIVE(p, z), PARAMS, BATCH, chunk=chunk)
    assert tree_error(bare, got) < 1e-12


@pytest.mark.parametrize("chunk", [None, 1, 2])
@pytest.mark.parametrize("vectors", [1, 4, 12])
def test_jacobian_product_has_a_row_per_example(vectors, chunk):
    V = helpers.random_like(jax.random.key(2), PARAMS, rows=vectors)
    got = ij.jacobian_product(OBJECTIVE, PARAMS, BATCH, V, chunk=chunk, rhs_chunk=chunk)
    grads = helpers.flat(ij.per_example_grads(OBJECTIVE, PARAMS, BATCH), PARAMS)
    assert got.shape == (9, vectors)
    assert relative_error(got, grads @ helpers.flat(V, PARAMS).T) < 1e-12


@pytest.mark.parametrize("chunk", [None, 1, 4])
def test_mixed_grads_and_products(chunk):
    mixed = ij.mixed_grads(OBJECTIVE, PARAMS, BATCH, chunk=chunk)
    assert mixed["layer0"]["kernel"].shape == (9, 5, 5, 4)
    step = 1e-6
    for axis in (0, 4):
        shift = step * jnp.eye(5)[axis]
        moved = [ij.Batch(BATCH.x + sign * shift[None], BATCH.y) for sign in (1.0, -1.0)]
        grads = [helpers.flat(ij.per_example_grads(OBJECTIVE, PARAMS, batch), PARAMS) for batch in moved]
        got = helpers.flat(mixed, PARAMS)[:, axis]
        assert relative_error(got, (grads[0] - grads[1]) / (2 * step)) < 1e-8
    V = helpers.random_like(jax.random.key(2), PARAMS, rows=3)
    products = ij.mixed_product(OBJECTIVE, PARAMS, BATCH, V, chunk=chunk, rhs_chunk=chunk)
    expected = np.einsum("nxp,kp->nkx", helpers.flat(mixed, PARAMS), helpers.flat(V, PARAMS))
    assert relative_error(products, expected) < 1e-12


def test_mixed_grads_of_a_tree_input():
    data = {"in": {"a": BATCH.x[:, :2], "b": BATCH.x[:, 2:]}, "y": BATCH.y}

    def predict(params, z):
        hidden = jnp.tanh(
            jnp.concatenate([z["in"]["a"], z["in"]["b"]]) @ params["layer0"]["kernel"] + params["layer0"]["bias"]
        )
        return hidden @ params["layer1"]["kernel"] + params["layer1"]["bias"]

    objective = ij.Objective(predict, lambda out, z: jax.nn.logsumexp(out) - out[z["y"]])
    mixed = ij.mixed_grads(objective, PARAMS, data, wrt="in")
    expected = ij.mixed_grads(OBJECTIVE, PARAMS, BATCH)
    assert tree_error(mixed["a"], jax.tree.map(lambda x: x[:, :2], expected)) < 1e-12
    assert tree_error(mixed["b"], jax.tree.map(lambda x: x[:, 2:], expected)) < 1e-12


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_gradients_are_float32_at_least(float32, dtype):
    params = {"w": jnp.ones((5, 3), dtype)}
    batch = ij.Batch(jnp.asarray(BATCH.x, jnp.float32), jnp.asarray(BATCH.y, jnp.int32))
    objective = ij.Objective(lambda p, z: z.x.astype(p["w"].dtype) @ p["w"], helpers.cross_entropy)
    assert ij.per_example_grads(objective, params, batch)["w"].dtype == jnp.float32
    products = ij.jacobian_product(objective, params, batch, {"w": jnp.ones((2, 5, 3), dtype)})
    assert products.dtype == jnp.float32


@given(count=st.sampled_from([1, 5, 12, 23]), chunk=st.sampled_from([None, 1, 5, 12]))
def test_chunks_cover_the_batch_once_and_in_order(count, chunk):
    data = {"a": jnp.arange(float(count)), "b": jnp.arange(2.0 * count).reshape(count, 2)}
    assert batching.map_chunks(lambda part: part, data, chunk=chunk)["b"].tolist() == data["b"].tolist()
    assert batching.map_over(lambda z: z["a"] + z["b"][0], data, chunk=chunk).tolist() == [3 * i for i in range(count)]
    weights = jnp.linspace(1.0, 2.0, count)
    total, weight = batching.sum_over(lambda part, w: jnp.sum(part["a"] * w), data, weights, chunk=chunk)
    assert abs(total - jnp.sum(data["a"] * weights)) < 1e-9 * count**2
    assert abs(weight - jnp.sum(weights)) < 1e-12 * count


def test_chunks_are_as_equal_as_they_can_be():
    """One more example than a chunk does not cost twice the work."""
    sizes = []
    batching.map_chunks(lambda part: sizes.append(part.shape[0]) or part, jnp.arange(513), chunk=512)
    assert set(sizes) == {257}


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_flatten_and_unflatten_are_inverse(chunk):
    stack = helpers.random_like(jax.random.key(3), PARAMS, rows=chunk)
    flat = ij.flatten(stack, PARAMS)
    assert flat.shape == (chunk, 39)
    assert tree_error(ij.unflatten(flat, PARAMS), stack) == 0.0
    assert tree_error(ij.unflatten(flat[0], PARAMS), jax.tree.map(lambda x: x[0], stack)) == 0.0
    mixed = {"narrow": jnp.ones(2, jnp.bfloat16), "wide": jnp.ones(2, jnp.float32)}
    assert ij.flatten(mixed, mixed).dtype == jnp.float32
