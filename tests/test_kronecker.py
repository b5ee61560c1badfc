"""K-FAC and EK-FAC: moments and eigenvalues by hand, laws of the operator."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    CLASSIFICATION,
    affine,
    cross_entropy,
    flat,
    half_squared_loss,
    linear,
    mainly,
    random_batch,
    random_like,
    random_mlp,
    relative_error,
    tree_error,
)
from zoo import CLASSES, LENGTH, VOCABULARY, WIDTH, ZOO, classified, compiled, normal, plain, texts

import influence_jax as ij
from influence_jax import tree
from influence_jax.curvature.per_example import dense_by_rows

KEY = jax.random.key(3)


def matrix_of(op, name):
    """The dense block of one leaf, in the order of its entries."""
    return np.asarray(ij.to_dense(ij.restrict(op, (name,))))


def empirical_gradients(case):
    return ij.per_example_grads(case.objective, case.params, case.data)


def moment(rows, weights=None):
    """Weighted mean of outer products of rows `(..., n)`."""
    rows = np.asarray(rows)
    weights = np.ones(rows.shape[:-1]) if weights is None else np.broadcast_to(weights, rows.shape[:-1])
    return np.einsum("x,xi,xj->ij", weights.ravel(), *2 * [rows.reshape(-1, rows.shape[-1])]) / weights.sum()


PARAMS = {"kernel": normal(WIDTH, CLASSES, number=1), "bias": normal(CLASSES, number=2)}


class TestMoments:
    """Dense K-FAC matrices of one layer against Kronecker products written down by hand."""

    SEQUENCES = ij.Batch(normal(6, LENGTH, WIDTH, number=3), normal(6, LENGTH, CLASSES, number=4))
    WEIGHTS = np.array([0.0, 1.0, 2.0, 0.5, 1.5, 3.0])

    @staticmethod
    def per_position(params, example):
        return example.x @ params["kernel"] + params["bias"][None]

    def cotangents(self):
        """Gradients of half the squared error in the outputs."""
        return np.asarray(jax.vmap(self.per_position, (None, 0))(PARAMS, self.SEQUENCES) - self.SEQUENCES.y)

    def expected(self, inputs, cotangents, weights=None):
        """The matrix of leaves in order: bias, then kernel."""
        ones = np.concatenate([np.ones((*inputs.shape[:-1], 1)), inputs], axis=-1)
        return np.kron(moment(ones, weights), moment(cotangents, weights))

    @pytest.mark.parametrize("weighted", [False, True])
    def test_averages_over_positions_of_all_examples(self, weighted):
        weights = self.WEIGHTS if weighted else None
        objective = ij.Objective(self.per_position, half_squared_loss)
        op = ij.kfac(objective, PARAMS, self.SEQUENCES, labels="empirical", weights=weights, chunk=4)
        each = None if weights is None else weights[:, None]
        expected = self.expected(np.asarray(self.SEQUENCES.x), self.cotangents(), each)
        assert relative_error(ij.to_dense(op), expected) < 1e-12

    @pytest.mark.parametrize("method", [ij.kfac, ij.ekfac])
    def test_padding_counts_neither_as_input_nor_as_output(self, method):
        """Masked positions are as if the sequences were shorter, the bias's constant input included."""
        lengths = np.array([5, 3, 1, 5, 2, 4])
        valid = np.arange(LENGTH)[None] < lengths[:, None]
        batch = ij.Batch({"x": self.SEQUENCES.x, "valid": jnp.asarray(valid)}, self.SEQUENCES.y)
        predict = lambda p, z: z.x["x"] @ p["kernel"] + p["bias"][None]
        objective = ij.Objective(
            predict, lambda out, z: 0.5 * jnp.sum(jnp.where(z.x["valid"][:, None], out - z.y, 0) ** 2)
        )
        op = method(objective, PARAMS, batch, labels="empirical", mask=lambda z: z.x["valid"])
        inputs, cotangents = np.asarray(self.SEQUENCES.x), self.cotangents() * valid[:, :, None]
        if method is ij.kfac:
            assert relative_error(ij.to_dense(op), self.expected(inputs, cotangents, 1.0 * valid)) < 1e-12
        garbage = jnp.where(valid[:, :, None], self.SEQUENCES.x, 1e3)
        other = dataclasses.replace(batch, x={**batch.x, "x": garbage})
        again = method(objective, PARAMS, other, labels="empirical", mask=lambda z: z.x["valid"])
        assert relative_error(ij.to_dense(again), ij.to_dense(op)) < 1e-12

    def test_eigenvalues_are_those_of_whole_examples(self):
        """Positions of one example share a parameter, so their gradients add up before they are squared."""
        case = plain(self.per_position, PARAMS, self.SEQUENCES, half_squared_loss)
        op = ij.ekfac(case.objective, case.params, case.data, labels="empirical")
        (layer,) = op.layers
        inputs = np.concatenate([self.SEQUENCES.x, np.ones((6, LENGTH, 1))], axis=-1)
        grads = np.einsum("nti,nto->nio", inputs, self.cotangents())
        rotated = np.einsum("ia,nio,ob->nab", layer.q_in[0], grads, layer.q_out[0])
        assert relative_error(layer.values[0], np.mean(rotated**2, axis=0)) < 1e-12

    @pytest.mark.as_users
    def test_grouped_convolution(self):
        """Each group has its own moments, of its own channels only."""
        kernel = normal(3, 2, 4, number=5)  # window 3, two channels a group, two groups of two outputs

        def predict(params, example):
            out = jax.lax.conv_general_dilated(
                example.x[None],
                params["kernel"],
                (1,),
                "VALID",
                feature_group_count=2,
                dimension_numbers=("NWC", "WIO", "NWC"),
            )
            return out[0]

        data = ij.Batch(normal(5, 7, 4, number=6), normal(5, 5, 4, number=7))
        op = ij.kfac(ij.Objective(predict, half_squared_loss), {"kernel": kernel}, data, labels="empirical")
        cotangents = np.asarray(jax.vmap(predict, (None, 0))({"kernel": kernel}, data) - data.y)
        windows = np.stack([np.asarray(data.x)[:, start : start + 5] for start in range(3)], axis=-2)  # (5, 5, 3, 4)
        expected = np.zeros((3, 2, 4, 3, 2, 4))
        for group in range(2):
            of_group = slice(2 * group, 2 * group + 2)
            inputs = windows[..., of_group].reshape(5, 5, 6)  # window, then channel, as the kernel has them
            block = np.kron(moment(inputs), moment(cotangents[..., of_group])).reshape(3, 2, 2, 3, 2, 2)
            expected[:, :, of_group, :, :, of_group] = block
        assert relative_error(ij.to_dense(op), expected.reshape(24, 24)) < 1e-12

    def test_embedding(self):
        """The second moment of one-hot inputs is diagonal, and so is kept; tokens out of range count nowhere."""
        params, data = {"table": normal(VOCABULARY, WIDTH)}, texts()
        objective = ij.Objective(lambda p, z: p["table"][z.x], lambda out, z: 0.5 * jnp.sum(out**2))
        op = ij.kfac(objective, params, data, labels="empirical")
        frequency = np.bincount(np.asarray(data.x).ravel(), minlength=VOCABULARY) / data.x.size
        expected = np.kron(np.diag(frequency), moment(np.asarray(params["table"])[np.asarray(data.x)]))
        assert op.layers[0].q_in is None
        assert relative_error(ij.to_dense(op), expected) < 1e-12

    def test_a_parameter_that_is_also_used_otherwise(self):
        """Gradients from elsewhere have a share in the moments, so that a use without effect does not hide them."""
        predict = lambda p, z: z.x @ (2 * p["w"]) + 0 * (z.x @ p["w"])
        params, data = {"w": normal(WIDTH, CLASSES)}, random_batch(KEY, 9, WIDTH, CLASSES, classes=False)
        objective = ij.Objective(predict, half_squared_loss)
        fisher = ij.trace(ij.EmpiricalFisher(objective, params, data))
        for method in (ij.kfac, ij.ekfac):
            assert float(ij.trace(method(objective, params, data, labels="empirical"))) == pytest.approx(float(fisher))

    def test_a_parameter_used_both_ways(self):
        """An autoencoder tied to its own transpose: the nearest product of both uses' keeps the trace of their sum."""
        params, data = {"w": normal(WIDTH, CLASSES)}, classified(WIDTH)
        encode = lambda p, z: jnp.tanh(z.x @ p["w"])
        objective = ij.Objective(lambda p, z: encode(p, z) @ p["w"].T, lambda out, z: 0.5 * jnp.sum((out - z.x) ** 2))
        op = ij.kfac(objective, params, data, labels="empirical")
        hidden = np.asarray(jax.vmap(encode, (None, 0))(params, data))
        w, x = np.asarray(params["w"]), np.asarray(data.x)
        outer = hidden @ w.T - x  # cotangents of the outputs, and of the encoder's outputs before tanh
        inner = (outer @ w) * (1 - hidden**2)
        uses = [(moment(x), moment(inner)), (moment(outer), moment(hidden))]
        total = sum(np.trace(rows) * np.trace(columns) for rows, columns in uses)
        rows = sum(rows * np.trace(columns) for rows, columns in uses)
        columns = sum(columns * np.trace(rows) for rows, columns in uses)
        assert relative_error(ij.to_dense(op), np.kron(rows, columns) / total) < 1e-12
        assert float(ij.trace(op)) == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("method", [ij.kfac, ij.ekfac])
def test_softmax_layer_at_zero_weights_is_exact(method, bias):
    """All predictions are uniform, so the Fisher matrix IS a Kronecker product, and its inverse is exact."""
    objective = ij.Objective(affine if bias else linear, cross_entropy)
    params = {"kernel": jnp.zeros((WIDTH, CLASSES))} | ({"bias": jnp.zeros(CLASSES)} if bias else {})
    train = random_batch(KEY, 40, WIDTH, CLASSES, classes=True)
    query = jax.tree.map(lambda x: x[:7], train)
    exact = ij.invert(ij.GGN(objective, params, train), ij.Direct(1e-2))
    ours = ij.invert(method(objective, params, train), ij.Direct(1e-2))
    scores, expected = (ij.Influence(objective, params, p).influences(query, train) for p in (ours, exact))
    assert relative_error(scores, expected) < 1e-10


LAWS = ["mlp", "conv 2-D groups 4 stride 2", "transformer, scan", "recurrent", "rotary", "odd"]


@jax.jit
def there_and_back(op, grads):
    """Coordinates in the eigenbasis, what they are coordinates of, and the eigenvalues."""
    to_basis, from_basis, values = ij.spectral(op)
    coordinates = to_basis(grads)
    return coordinates, from_basis(coordinates), values


@pytest.mark.parametrize("name", compiled(mainly(LAWS, "mlp", "conv 2-D groups 4 stride 2", "rotary")))
def test_corrected_eigenvalues_are_the_second_moments_in_the_basis(name):
    """For every kind of layer: coordinates are orthonormal, and eigenvalues the mean squares of the gradients'."""
    case = ZOO[name]()
    op = ij.ekfac(case.objective, case.params, case.data, labels="empirical", chunk=2)
    grads = empirical_gradients(case)
    coordinates, back, values = there_and_back(op, grads)
    assert tree_error(back, grads) < 1e-12
    squares = [np.asarray(x) ** 2 for x in coordinates]
    lengths = np.sum(flat(grads, case.params) ** 2, axis=1)
    assert relative_error(sum(np.sum(x, axis=(1, 2, 3)) for x in squares), lengths) < 1e-12
    assert tree_error(tuple(np.mean(x, axis=0) for x in squares), values) < 1e-11
    assert float(ij.trace(op)) == pytest.approx(np.mean(lengths), rel=1e-11)


@pytest.mark.parametrize("name", mainly(["no bias", "odd"], "no bias"))
def test_operator_laws(name):
    """Against its own dense matrix: products, diagonal, trace, blocks, inverse at any damping."""
    case = ZOO[name]()
    op = ij.ekfac(case.objective, case.params, case.data, labels="empirical")
    dense = np.asarray(ij.to_dense(op))
    assert relative_error(dense, dense.T) < 1e-12
    assert np.linalg.eigvalsh(dense).min() > -1e-12
    V = random_like(KEY, case.params, 3)
    rows = flat(V, case.params)
    assert relative_error(flat(jax.jit(lambda op, V: op.mm(V))(op, V), case.params), rows @ dense) < 1e-12
    assert relative_error(flat(jax.jit(ij.diagonal)(op), case.params), np.diag(dense)) < 1e-12
    assert float(ij.trace(op)) == pytest.approx(np.trace(dense), rel=1e-12)
    ends = np.cumsum([np.size(leaf) for _, leaf in tree.named_leaves(case.params)])
    leaves = zip(np.split(np.arange(op.size), ends[:-1]), tree.named_leaves(case.params), strict=True)
    places = {name: numbers for numbers, (name, _) in leaves}
    names = sorted(name for block in op.blocks.values() for name in block)
    assert names == sorted(places)
    outside = dense.copy()
    restricted = jax.jit(lambda op: [ij.to_dense(ij.restrict(op, block)) for block in op.blocks.values()])(op)
    for block, matrix in zip(op.blocks.values(), restricted, strict=True):
        own = np.sort(np.concatenate([np.ravel(places[name]) for name in block]))
        in_order = np.concatenate([np.ravel(places[name]) for name in places if name in block])
        assert relative_error(matrix, dense[np.ix_(in_order, in_order)]) < 1e-12
        outside[np.ix_(own, own)] = 0
    assert np.abs(outside).max() < 1e-12
    damping = float(np.median(np.linalg.eigvalsh(dense))) + 1e-6
    expected = np.linalg.solve(dense + damping * np.eye(len(dense)), rows.T).T
    for solver in (ij.Direct(damping), ij.Eigh(damping), ij.CG(damping, rtol=1e-11, max_steps=5000)):
        X, info = ij.invert(op, solver).solve_many(V)
        assert relative_error(flat(X, case.params), expected) < 1e-7
        assert bool(jnp.all(info.converged))


class TestAssembledGaussNewton:
    """The matrix from captures, against the one from examples' Jacobians."""

    def check(self, objective, params, data, **options):
        op = ij.GGN(objective, params, data, **options)
        assert relative_error(ij.to_dense(op), dense_by_rows(op)) < 1e-12

    @pytest.mark.parametrize("chunk", [None, 4])
    def test_network(self, chunk):
        data = random_batch(KEY, 21, 5, 3, classes=True)
        weights = jnp.linspace(0.0, 2.0, 21)
        self.check(CLASSIFICATION, random_mlp(KEY, (5, 4, 6, 3)), data, weights=weights, chunk=chunk)

    def test_no_bias_odd_leaves_and_a_loss_that_is_not_convex(self):
        predict = lambda p, z: jnp.tanh(z.x @ p["w"]) @ p["v"] * p["scale"] + 0 * jnp.sum(p["unused"])
        loss = lambda out, z: jnp.sum(jnp.cos(out * z.y))
        params = {"w": normal(5, 4), "v": normal(4, 3), "scale": normal(3), "unused": normal(2)}
        self.check(ij.Objective(predict, loss), params, random_batch(KEY, 9, 5, 3, classes=False))

    def test_a_leaf_that_a_scan_steps_through(self):
        predict = lambda p, z: jax.lax.scan(lambda c, s: (jnp.tanh(c * s), None), z.x, p["scales"])[0]
        objective = ij.Objective(predict, lambda out, z: 0.5 * jnp.sum(out**2))
        self.check(objective, {"scales": normal(3, 5)}, random_batch(KEY, 9, 5, 3, classes=False))

    def test_a_block(self):
        op = ij.GGN(CLASSIFICATION, random_mlp(KEY), random_batch(KEY, 21, 5, 3, classes=True))
        part = ij.restrict(op, ("layer1/kernel", "layer1/bias"))
        assert relative_error(ij.to_dense(part), dense_by_rows(part)) < 1e-12

    @pytest.mark.as_users
    def test_positions_go_the_other_way(self):
        case = ZOO["conv 1-D valid stride 2"]()
        self.check(case.objective, case.params, case.data)
