"""Laws of the operators: linear, self-adjoint, equal to an independent dense matrix, indifferent to how data is cut."""

import dataclasses
from functools import partial

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative_error, tree_error
from hypothesis import given, settings, strategies as st

import influence_jax as ij
from influence_jax.curvature import Restricted, Scaled, Sum

OVER_DATA = [ij.Hessian, ij.GGN, ij.EmpiricalFisher]
COUNT = 13


def dead_unit(params: dict, example: ij.Batch) -> jax.Array:
    """A network whose parameter `unused` never matters, without biases."""
    return jnp.tanh(example.x @ params["first"]) @ params["second"] + 0.0 * jnp.sum(params["unused"])


def dead_params(key: jax.Array) -> dict:
    return helpers.random_like(key, {"first": jnp.ones((5, 4)), "second": jnp.ones((4, 3)), "unused": jnp.ones(2)})


MODELS = {
    "regression": (helpers.REGRESSION, helpers.random_mlp, False),
    "classification": (helpers.CLASSIFICATION, helpers.random_mlp, True),
    "dead, bias-free": (ij.Objective(dead_unit, helpers.cross_entropy), dead_params, True),
}


def problem(model: str, count: int = COUNT, seed: int = 0):
    objective, init, classes = MODELS[model]
    key_params, key_data = jax.random.split(jax.random.key(seed))
    return objective, init(key_params), helpers.random_batch(key_data, count, 5, 3, classes=classes)


def operators(model: str = "classification") -> dict[str, ij.LinearOperator]:
    """Every kind of operator on one space."""
    objective, params, data = problem(model)
    key = jax.random.key(7)
    ggn = ij.GGN(objective, params, data)
    rows = jnp.linalg.qr(helpers.normal(key, (ggn.size, 5)))[0].T
    names = [name for name, _ in ij.tree.named_leaves(params)]
    return {
        "Hessian": ij.Hessian(objective, params, data),
        "GGN": ggn,
        "EmpiricalFisher": ij.EmpiricalFisher(objective, params, data, chunk=4),
        "weighted": ij.GGN(objective, params, data, weights=jnp.arange(1.0, COUNT + 1)),
        "Identity": ij.Identity(params),
        "Diagonal": ij.Diagonal(helpers.random_like(key, params)),
        "LowRank": ij.LowRank(ij.unflatten(rows, params), jnp.array([3.0, 2.0, 1.0, -0.5, 0.1])),
        "Sum": ggn + 0.3 * ij.Identity(params),
        "Scaled": 2.5 * ggn,
        "Inverse": ij.invert(ggn, ij.Direct(0.1)),
        "restricted GGN": ij.restrict(ggn, names[:2]),
        "Restricted": Restricted(ggn, tuple(names[1:3])),
    }


NAMES = ["Hessian", "GGN", "EmpiricalFisher", "weighted", "Identity", "Diagonal", "LowRank", "Sum", "Scaled"]
NAMES += ["Inverse", "restricted GGN", "Restricted"]


@pytest.fixture(scope="module")
def all_operators():
    made = operators()
    assert list(made) == NAMES
    return made


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 99), c=st.floats(-3.0, 3.0), d=st.floats(-3.0, 3.0))
@settings(max_examples=5)
def test_linear_and_self_adjoint(all_operators, name, seed, c, d):
    op = all_operators[name]
    keys = jax.random.split(jax.random.key(seed))
    u, v = (helpers.random_like(k, op.space) for k in keys)
    combined = op.mv(jax.tree.map(lambda a, b: c * a + d * b + a, u, v))
    expected = jax.tree.map(lambda a, b: c * a + d * b + a, op.mv(u), op.mv(v))
    assert tree_error(combined, expected) < 1e-12
    left, right = ij.tree.dot(u, op.mv(v)), ij.tree.dot(op.mv(u), v)
    assert abs(left - right) < 1e-12 * jnp.sqrt(ij.tree.dot(u, u) * ij.tree.dot(op.mv(v), op.mv(v)))


@pytest.mark.parametrize("name", NAMES)
def test_products_equal_dense(all_operators, name):
    """`mv`, `mm`, `to_dense`, `diagonal` and `trace` are one matrix."""
    op = all_operators[name]
    V = helpers.random_like(jax.random.key(2), op.space, rows=6)
    dense = np.asarray(ij.to_dense(op))
    expected = helpers.flat(V, op.space) @ dense
    assert relative_error(helpers.flat(op.mm(V), op.space), expected) < 1e-12
    for row in (0, 5):
        product = op.mv(jax.tree.map(lambda x, row=row: x[row], V))
        assert relative_error(helpers.flat(product, op.space), expected[row]) < 1e-12
    assert relative_error(helpers.flat(ij.diagonal(op), op.space), np.diag(dense)) < 1e-12
    assert abs(float(ij.trace(op)) - np.trace(dense)) < 1e-12 * np.linalg.norm(dense)
    assert op.size == len(dense)


@pytest.mark.parametrize("name", NAMES)
def test_psd_is_true_where_claimed(all_operators, name):
    op = all_operators[name]
    eigenvalues = np.linalg.eigvalsh(np.asarray(ij.to_dense(op)))
    if op.psd:
        assert eigenvalues[0] >= -1e-12 * eigenvalues[-1]
    assert op.psd == (name not in ("Hessian", "Diagonal", "LowRank"))


def test_multiples_that_are_not_psd(all_operators):
    op = all_operators["GGN"]
    assert not (-1.0 * op).psd
    assert not (jnp.array(2.0) * op).psd, "a traced or array factor has an unknown sign"
    assert (op + op).psd
    assert jax.jit(lambda op: jnp.array(ij.restrict(2.0 * op, ("layer0/bias",)).psd))(op), "kept through tracing"
    assert sum([op, op, op]).psd
    assert not (op + -1.0 * op).psd


@pytest.mark.parametrize("kind", OVER_DATA)
@pytest.mark.parametrize(
    ("model", "count", "chunk"), [("classification", 1, None), *((model, COUNT, 5) for model in MODELS)]
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


@pytest.mark.parametrize("kind", OVER_DATA)
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


@pytest.mark.parametrize("name", ["Hessian", "EmpiricalFisher", "Sum", "LowRank", "Inverse"])
def test_jit_and_vmap_agree_with_plain_calls(all_operators, name):
    op = all_operators[name]
    V = helpers.random_like(jax.random.key(2), op.space, rows=3)
    plain = op.mm(V)
    rows = jax.vmap(op.mv)(V)
    assert tree_error(jax.jit(lambda op, V: op.mm(V))(op, V), plain) < 1e-12
    assert tree_error(rows, plain) < 1e-12
    if name in ("EmpiricalFisher", "LowRank"):
        with jax.disable_jit():
            assert tree_error(op.mv(jax.tree.map(lambda x: x[1], V)), jax.tree.map(lambda x: x[1], plain)) < 1e-12


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


def test_parameters_called_value_keep_their_name():
    attention = {"query": jnp.ones(2), "value": {"value": jnp.ones(3)}}
    assert [name for name, _ in ij.tree.named_leaves(attention)] == ["query", "value/value"]
    assert ij.restrict(ij.Identity(attention), ("value/value",)).size == 3


def test_root_of_a_loss_that_is_not_convex_is_nan():
    objective = ij.Objective(lambda p, z: p["w"] * z, lambda out, z: -(out**2))
    op = ij.GGN(objective, {"w": jnp.array(1.0)}, jnp.arange(1.0, 4.0))
    assert jnp.all(jnp.isnan(ij.root(op).apply({"w": jnp.array(1.0)})))


@pytest.mark.parametrize("name", ["Identity", "Diagonal", "LowRank"])
@pytest.mark.parametrize("factor", [1.0, -2.0])
def test_spectral_closed_forms(all_operators, name, factor):
    op = all_operators[name] if factor == 1.0 else factor * all_operators[name]
    V = helpers.random_like(jax.random.key(2), op.space, rows=4)
    to_basis, from_basis, values = ij.spectral(op)
    coordinates = to_basis(V)
    assert tree_error(from_basis(coordinates), V) < 1e-12
    scaled = jax.tree.map(lambda c, d: c * jnp.broadcast_to(d, c.shape), coordinates, values)
    assert tree_error(from_basis(scaled), op.mm(V)) < 1e-12


def test_full_rank_spectral_has_no_complement():
    rows = jnp.linalg.qr(helpers.normal(jax.random.key(0), (4, 4)))[0]
    op = ij.LowRank({"w": rows}, jnp.arange(1.0, 5.0))
    assert ij.spectral(op).values.shape == (4,)
    assert relative_error(ij.to_dense(op), rows.T @ jnp.diag(jnp.arange(1.0, 5.0)) @ rows) < 1e-12


@pytest.mark.parametrize("kind", OVER_DATA)
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
@pytest.mark.parametrize("block", [("layer0/bias", "layer1/kernel"), ("layer1/kernel", "layer1/bias")])
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


def test_restrict_structured():
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    diagonal = ij.Diagonal({"a": jnp.array([1.0, 2.0]), "b": jnp.arange(3.0)})
    assert ij.to_dense(ij.restrict(diagonal, ("b",))).tolist() == jnp.diag(jnp.arange(3.0)).tolist()
    low_rank = ij.LowRank(ij.unflatten(jnp.eye(5)[:2], params), jnp.array([2.0, 3.0]))
    assert ij.to_dense(ij.restrict(low_rank, ("a",))).tolist() == [[2.0, 0.0], [0.0, 3.0]]
    assert isinstance(ij.restrict(diagonal + 2.0 * low_rank, ("a",)), Sum)
    assert isinstance(ij.restrict(2.0 * low_rank, ("a",)), Scaled)


def test_hutchinson_trace_is_within_its_standard_error(all_operators, monkeypatch):
    """Rademacher probes: the variance of one is 2 (||A||_F^2 - sum of squared diagonal)."""
    monkeypatch.setattr("influence_jax.curvature.capabilities.EXACT_TRACE_SIZE", 10)
    op = all_operators["Hessian"]
    dense = np.asarray(ij.to_dense(op))
    deviation = jnp.sqrt(2 * (jnp.sum(dense**2) - jnp.sum(jnp.diag(dense) ** 2)) / 64)
    estimate = ij.trace(op, key=jax.random.key(0))
    assert 0 < abs(estimate - jnp.trace(dense)) < 4 * deviation
    with pytest.raises(ValueError, match=r"key: None.*estimated"):
        ij.trace(op)


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


class TestFisher:
    """Labels drawn from the model: the GGN in expectation, the data's labels never."""

    def fisher(self, samples=1, seed=0, data=None, **options):
        objective, params, given = problem("classification")
        data = given if data is None else data
        return ij.Fisher(objective, params, data, key=jax.random.key(seed), samples=samples, **options)

    def test_is_the_ggn_within_its_standard_error(self):
        ggn = ij.to_dense(ij.GGN(*problem("classification")))
        draws = jnp.stack([ij.to_dense(self.fisher(8, seed)) for seed in range(40)])
        error = jnp.std(draws, axis=0) / 40**0.5
        assert jnp.max(jnp.abs(jnp.mean(draws, axis=0) - ggn) / (error + 1e-12)) < 5
        assert relative_error(jnp.mean(draws, axis=0), ggn) < 0.2
        assert relative_error(draws[0], ggn) > 0.05, "a single draw is random"

    def test_exact_for_one_output(self):
        """A Rademacher sign squared is one: with a scalar output a single draw is exact."""
        objective = ij.Objective(
            lambda p, z: jnp.tanh(z.x @ p["w"])[None], lambda out, z: 0.5 * jnp.sum((out - z.y[0]) ** 2)
        )
        params, data = {"w": jnp.linspace(-1.0, 1.0, 5)}, problem("regression")[2]
        fisher = ij.Fisher(objective, params, data, key=jax.random.key(0))
        assert relative_error(ij.to_dense(fisher), ij.to_dense(ij.GGN(objective, params, data))) < 1e-12

    def test_labels_of_the_data_do_not_matter(self):
        data = problem("classification")[2]
        other = ij.Batch(data.x, (data.y + 1) % 3)
        assert relative_error(ij.to_dense(self.fisher(2, data=other)), ij.to_dense(self.fisher(2))) < 1e-12

    def test_draws_belong_to_their_example(self):
        """Chunks, minibatches and blocks see the same labels."""
        v = helpers.random_like(jax.random.key(3), self.fisher().params)
        expected = self.fisher(3).mv(v)
        assert tree_error(self.fisher(3, chunk=4).mv(v), expected) < 1e-12
        singles = [ij.minibatch(self.fisher(3), jnp.array([i])).mv(v) for i in range(COUNT)]
        assert tree_error(jax.tree.map(lambda *parts: sum(parts) / COUNT, *singles), expected) < 1e-12
        block = ij.restrict(self.fisher(3), ("layer1/kernel",))
        assert isinstance(block, ij.Fisher)
        places = ij.unflatten(jnp.arange(39.0), v)["layer1"]["kernel"].astype(int).ravel()
        assert relative_error(ij.to_dense(block), ij.to_dense(self.fisher(3))[places][:, places]) < 1e-12

    def test_products_and_factors_are_one_matrix(self):
        samples = 3
        op = self.fisher(samples, weights=jnp.linspace(0.5, 2.0, COUNT))
        v = helpers.random_like(jax.random.key(3), op.params)
        dense = np.asarray(ij.to_dense(op))
        assert relative_error(helpers.flat(op.mv(v), op.params), dense @ helpers.flat(v, op.params)) < 1e-12
        assert relative_error(helpers.flat(ij.diagonal(op), op.params), np.diag(dense)) < 1e-12
        root = ij.root(op)
        assert root.apply(v).shape == (COUNT, samples)
        assert tree_error(root.transpose(root.weights[:, None] * root.apply(v)), op.mv(v)) < 1e-12

    @pytest.mark.parametrize("scale", [1.0, 3.0, 6.0, 12.0])
    def test_confident_predictions(self, float32, scale):
        """Their output Hessians are rounding all over, which is no reason to call the loss non-convex."""
        key = jax.random.key(1)
        objective = ij.Objective(lambda p, z: z.x @ p["w"], helpers.cross_entropy)
        params = {"w": scale * helpers.normal(key, (5, 3), jnp.float32)}
        data = ij.Batch(helpers.normal(key, (200, 5), jnp.float32), jnp.zeros(200, jnp.int32))
        ggn, root = ij.GGN(objective, params, data), ij.root(ij.GGN(objective, params, data))
        v = {"w": helpers.normal(key, (5, 3), jnp.float32)}
        rebuilt = root.transpose(root.weights[:, None] * root.apply(v))
        assert relative_error(rebuilt["w"], ggn.mv(v)["w"]) < 1e-4
        fisher = ij.Fisher(objective, params, data, key=key, samples=400)
        assert relative_error(ij.trace(fisher), ij.trace(ggn)) < 0.05

    def test_many_classes_keep_their_curvature(self, float32):
        """Rare classes have little curvature, not none."""
        classes, key = 400, jax.random.key(0)
        objective = ij.Objective(lambda p, z: p["b"], helpers.cross_entropy)
        params = {"b": 3.0 * helpers.normal(key, (classes,), jnp.float32)}
        data = ij.Batch(jnp.zeros((1, 1), jnp.float32), jnp.zeros(1, jnp.int32))
        fisher = ij.Fisher(objective, params, data, key=key, samples=2000)
        exact = ij.diagonal(ij.GGN(objective, params, data))["b"]
        ratio = np.asarray(ij.diagonal(fisher)["b"] / exact)[exact > 1e-5 * jnp.max(exact)]
        assert len(ratio) > 200
        assert np.max(np.abs(ratio - 1)) < 0.3

    def test_not_convex_is_not_a_number(self):
        objective = ij.Objective(lambda p, z: z.x @ p["w"], lambda out, z: -jnp.sum(out**2))
        data = ij.Batch(jnp.ones((2, 5)), jnp.ones(2))
        assert jnp.isnan(
            ij.Fisher(objective, {"w": jnp.ones((5, 3))}, data, key=jax.random.key(0)).mv({"w": jnp.ones((5, 3))})["w"]
        ).all()

    @pytest.mark.parametrize("sample", [None, ij.softmax_sample])
    def test_derivative_in_the_parameters(self, sample):
        """Labels are drawn at the parameters, so they move with them; finite differences at the same key."""
        objective, params, data = problem("classification")
        objective = dataclasses.replace(objective, sample=sample)
        v, step = helpers.random_like(jax.random.key(5), params), helpers.random_like(jax.random.key(6), params)

        @jax.jit
        def quadratic(t):
            moved = jax.tree.map(lambda p, s: p + t * s, params, step)
            fisher = ij.Fisher(objective, moved, data, key=jax.random.key(0), samples=2)
            return sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(v), jax.tree.leaves(fisher.mv(v)), strict=True))

        difference = (quadratic(1e-5) - quadratic(-1e-5)) / 2e-5
        assert relative_error(jax.grad(quadratic)(0.0), difference) < 1e-7

    def test_replacing_the_key_draws_again(self):
        fisher = self.fisher(2)
        again = dataclasses.replace(fisher, key=jax.random.key(1))
        assert relative_error(ij.to_dense(again), ij.to_dense(self.fisher(2, seed=1))) < 1e-12
        assert relative_error(ij.to_dense(again), ij.to_dense(fisher)) > 1e-2

    def test_output_in_a_container(self):
        objective, params, data = problem("classification")
        inside = ij.Objective(
            lambda p, z: {"logits": objective.predict(p, z)}, lambda out, z: objective.loss(out["logits"], z)
        )
        fisher = ij.Fisher(inside, params, data, key=jax.random.key(0))
        assert relative_error(ij.to_dense(fisher), ij.to_dense(self.fisher())) < 1e-12

    def test_sequences_take_a_sample_function(self):
        """Outputs (T, V): a label per position, whose covariance is that of the softmax."""
        predict = lambda p, z: jnp.stack([z.x, 2.0 * z.x]) @ p["w"]
        loss = lambda out, z: jnp.sum(jax.nn.logsumexp(out, axis=-1) - out[:, 0])
        params, data = {"w": 0.3 * helpers.normal(jax.random.key(0), (5, 3))}, problem("classification")[2]
        objective = ij.Objective(predict, loss, sample=ij.softmax_sample)
        ggn = ij.to_dense(ij.GGN(objective, params, data))
        fishers = [ij.Fisher(objective, params, data, key=jax.random.key(s), samples=64) for s in range(8)]
        mean = sum(ij.to_dense(fisher) for fisher in fishers) / 8
        assert relative_error(mean, ggn) < 0.15
        plain = ij.Fisher(ij.Objective(predict, loss), params, data, key=jax.random.key(0))
        with pytest.raises(ValueError, match=r"objective: its output \(2, 3\).*softmax_sample"):
            plain.mv(params)

    def test_mistakes(self):
        objective, params, data = problem("classification")
        with pytest.raises(ValueError, match="key: Fisher draws labels"):
            ij.Fisher(objective, params, data)
        with pytest.raises(TypeError, match="objective: Fisher got the bare function"):
            ij.Fisher(lambda p, z: objective(p, z), params, data, key=jax.random.key(0))
        with pytest.raises(ValueError, match="samples: got 0"):
            self.fisher(0)


class TestBilinearForm:
    """Three products, with the operator on the smaller side; pyDVL applies it to the larger one."""

    @pytest.mark.parametrize(("left", "right"), [(2, 7), (7, 2), (3, None)])
    def test_inner_products(self, all_operators, left, right, monkeypatch):
        op = all_operators["Hessian"]
        dense, key = np.asarray(ij.to_dense(op)), jax.random.key(8)
        U = helpers.random_like(key, op.space, rows=left)
        V = None if right is None else helpers.random_like(jax.random.fold_in(key, 1), op.space, rows=right)
        applied = []
        monkeypatch.setattr(type(op), "mm", lambda self, W: applied.append(len(W["layer0"]["bias"])) or _mm(self, W))
        form = op.as_bilinear_form()
        expected = helpers.flat(U, op.space) @ dense @ helpers.flat(U if V is None else V, op.space).T
        assert relative_error(form.inner_prod(U, V), expected) < 1e-12
        assert applied == [min(left, right or left)]

    def test_further_axes_on_the_right(self, all_operators):
        op = all_operators["GGN"]
        U = helpers.random_like(jax.random.key(8), op.space, rows=2)
        rows = helpers.random_like(jax.random.key(9), op.space, rows=3 * 4 * 5)
        V = jax.tree.map(lambda x: x.reshape((3, 4, 5, *x.shape[1:])), rows)
        flat = op.as_bilinear_form().inner_prod(U, rows)
        assert relative_error(op.as_bilinear_form().inner_prod(U, V), flat.reshape(2, 3, 4, 5)) < 1e-12
        with pytest.raises(ValueError, match="right: leaf 'layer0/kernel'"):
            op.as_bilinear_form().inner_prod(U, {**V, "layer0": {**V["layer0"], "kernel": jnp.ones((3, 4))}})

    def test_of_gradients_and_mixed_derivatives(self):
        objective, params, data = problem("classification", 6)
        op = ij.GGN(objective, params, data)
        form, few = op.as_bilinear_form(), jax.tree.map(lambda x: x[:2], data)
        influence = ij.Influence(objective, params, op)
        given = {"objective": objective, "params": params}
        assert relative_error(form.grads_inner_prod(few, data, **given), influence.influences(few, data)) < 1e-12
        assert relative_error(form.grads_inner_prod(few, **given), influence.influences(few, few)) < 1e-12
        expected = influence.influences(few, data, "perturbation")
        assert relative_error(form.mixed_grads_inner_prod(few, data, **given), expected) < 1e-12
        mixed = form.inner_prod(ij.per_example_grads(objective, params, few), ij.mixed_grads(objective, params, data))
        assert relative_error(mixed, expected) < 1e-12


_mm = ij.LinearOperator.mm


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
