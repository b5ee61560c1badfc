"""Scores through K-FAC and EK-FAC: what changes nothing, dampings, blocks, positions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    CLASSIFICATION,
    flat,
    mainly,
    random_batch,
    random_like,
    random_mlp,
    relative_error,
    tree_error,
)
from zoo import LENGTH, VOCABULARY, WIDTH, ZOO, classified, normal, plain, square, squared, texts, token_loss

import influence_jax as ij
from influence_jax import tree

KEY = jax.random.key(3)


def fitted(case, method=ij.ekfac, damping=0.1, **options):
    """Scores of all examples on each other."""
    op = method(case.objective, case.params, case.data, **{"labels": "empirical", **options})
    inverse = ij.invert(op, ij.Direct(damping))
    return ij.Influence(case.objective, case.params, inverse).influences(case.data, case.data)


def mlp_case(count=21):
    return plain(CLASSIFICATION.predict, random_mlp(KEY), random_batch(KEY, count, 5, 3, classes=True))


class TestInvariances:
    @pytest.mark.parametrize("labels", mainly(["empirical", "exact", "sampled"], "exact"))
    @pytest.mark.parametrize("method", mainly([ij.kfac, ij.ekfac], ij.ekfac))
    def test_chunks_and_repeated_calls(self, method, labels):
        """Neither the chunk, nor a ragged tail, nor calling again changes anything, drawn labels included."""
        case, options = mlp_case(), {"method": method, "labels": labels, "key": KEY}
        once = fitted(case, **options)
        assert np.array_equal(fitted(case, **options), once)
        for chunk in (1, 4, 21):
            assert relative_error(fitted(case, chunk=chunk, **options), once) < 1e-11

    def test_order_of_examples_and_weights(self):
        """A permutation permutes scores; a weight of two is an example that occurs twice."""
        case = mlp_case()
        order = np.random.default_rng(0).permutation(21)
        permuted = case._replace(data=jax.tree.map(lambda x: x[order], case.data))
        assert relative_error(fitted(permuted), fitted(case)[order][:, order]) < 1e-11
        twice = case._replace(data=jax.tree.map(lambda x: jnp.concatenate([x, x[:5]]), case.data))
        weights = np.ones(21)
        weights[:5] = 2
        assert relative_error(fitted(case, weights=weights), fitted(twice)[:21, :21]) < 1e-11

    def test_jit(self):
        case = mlp_case()
        run = jax.jit(lambda p, data: fitted(case._replace(params=p, data=data)))
        assert relative_error(run(case.params, case.data), fitted(case)) < 1e-11

    @pytest.mark.thorough
    def test_scan_remat_and_a_loop_are_the_same(self):
        """The same weights in layers one after the other, and in checkpointed ones under a scan."""
        loop, scan = ZOO["transformer"](), ZOO["transformer, scan and remat"]()
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), loop.params["block0"], loop.params["block1"])
        rest = {name: leaf for name, leaf in loop.params.items() if "block" not in name}
        scan = scan._replace(params={**rest, "ScanCheckpointBlock_0": stacked})
        assert relative_error(fitted(scan), fitted(loop)) < 1e-10

    def test_a_shared_layer_in_a_scan_and_in_a_loop(self):
        """Uses of one matrix are positions of it, wherever they are."""
        params, data = {"w": square(1)}, classified(WIDTH)
        loop = lambda p, z: jnp.tanh(jnp.tanh(z.x @ p["w"]) @ p["w"]) @ p["w"]
        scan = lambda p, z: jax.lax.fori_loop(0, 3, lambda k, x: jnp.where(k > 0, jnp.tanh(x), x) @ p["w"], z.x)
        for method in (ij.kfac, ij.ekfac):
            first, second = (method(ij.Objective(f, squared), params, data, labels="empirical") for f in (loop, scan))
            assert relative_error(ij.to_dense(second), ij.to_dense(first)) < 1e-12

    def test_tied_gradients_are_sums_of_untied_ones(self):
        """A tied embedding's scores through the identity are those of table and head apart, added and crossed."""
        data, table = texts(), normal(VOCABULARY, WIDTH)
        tied = ij.Objective(lambda p, z: jnp.tanh(p["table"][z.x]) @ p["table"].T, token_loss)
        untied = ij.Objective(lambda p, z: jnp.tanh(p["table"][z.x]) @ p["head"], token_loss)
        grads = ij.per_example_grads(untied, {"table": table, "head": table.T}, data)
        whole = {"table": grads["table"] + jnp.swapaxes(grads["head"], 1, 2)}
        factors = random_like(KEY, {"table": table}, 5)
        influence = ij.Influence(tied, {"table": table}, ij.Identity({"table": table}))
        assert relative_error(influence.influences_from_factors(factors, data), tree.gram(factors, whole)) < 1e-12


class TestInfluence:
    def test_blocks_are_the_layers(self):
        case = ZOO["rotary"]()
        op = ij.ekfac(case.objective, case.params, case.data, labels="empirical")
        influence = ij.Influence(case.objective, case.params, ij.invert(op, ij.Direct(0.1)))
        assert influence.block_names == ("out", "per_head", "qkv", "table")
        by_block = influence.influences_by_block(case.data, case.data)
        assert relative_error(sum(by_block.values()), influence.influences(case.data, case.data)) < 1e-12
        assert influence.inverse.blocks["out"] == ("out", "out_bias")

    def test_relative_damping_is_relative_to_each_layer(self):
        case = mlp_case()
        op = ij.ekfac(case.objective, case.params, case.data)
        inverse = ij.invert(op, ij.Direct(ij.RelativeDamping(0.1)))
        for part, layer in zip(inverse.by_block.values(), op.layers, strict=True):
            assert float(part.damping) == pytest.approx(0.1 * float(jnp.mean(layer.values)), rel=1e-12)

    def test_relative_damping_of_a_leaf_without_effect(self):
        """It takes the mean of all, and the others' scores are as if it were not there."""
        case = mlp_case()
        spare = {**case.params, "unused": jnp.ones(3)}
        predict = lambda p, z: CLASSIFICATION.predict({k: x for k, x in p.items() if k != "unused"}, z)
        scores = fitted(plain(predict, spare, case.data), damping=ij.RelativeDamping(0.1))
        assert relative_error(scores, fitted(case, damping=ij.RelativeDamping(0.1))) < 1e-12

    def test_one_fit_serves_a_grid_of_dampings(self):
        case = mlp_case()
        op = jnp.array(2.0) * ij.ekfac(case.objective, case.params, case.data)
        assert (2.0 * op).psd
        assert op.psd
        assert not (-1.0 * op).psd
        inverse, v = ij.invert(op, ij.Direct(1.0)), random_like(KEY, case.params)
        sweep = jax.vmap(lambda damping: inverse.with_damping(damping).mv(v))(jnp.array([0.1, 1.0, 10.0]))
        for index, damping in enumerate((0.1, 1.0, 10.0)):
            expected = ij.invert(op, ij.Eigh(damping)).mv(v)
            assert tree_error(jax.tree.map(lambda x, k=index: x[k], sweep), expected) < 1e-12

    def test_through_the_facade_and_by_block(self):
        """A recipe takes it as any curvature; blocks finer than its layers are blocks of it."""
        case = mlp_case()
        recipe = ij.InfluenceFunctionModel(case.objective, case.params, curvature=ij.ekfac, solver=ij.Direct(0.1))
        scores = recipe.fit(case.data).influences(case.data)
        assert relative_error(scores, fitted(case, labels="exact")) < 1e-12
        finer = dataclasses.replace(recipe, blocks=ij.by_parameter).fit(case.data)
        dense = np.asarray(ij.to_dense(ij.ekfac(case.objective, case.params, case.data)))
        labels = ij.unflatten(jnp.arange(len(dense)), case.params)
        leaf = np.concatenate([np.full(x.size, k) for k, x in enumerate(jax.tree.leaves(labels))])
        dense = np.where(leaf[:, None] == leaf[None], dense, 0) + 0.1 * np.eye(len(dense))
        grads = flat(ij.per_example_grads(case.objective, case.params, case.data), case.params)
        expected = grads @ np.linalg.solve(dense, grads.T)
        assert relative_error(finer.influences(case.data), expected) < 1e-10

    def test_derivative_through_the_fit(self, float32):
        """Of the trace in the parameters, also where eigenvectors are computed in a precision of their own."""
        case = mlp_case()
        fit = lambda p, data: ij.trace(ij.kfac(case.objective, p, data, labels="empirical"))
        params, data = jax.tree.map(
            lambda x: x.astype(jnp.float32) if x.dtype == float else x, (case.params, case.data)
        )
        slope = tree.dot(jax.jit(jax.grad(fit))(params, data), params)
        moved = [jax.tree.map(lambda x, s=s: (1 + s) * x, params) for s in (1e-2, -1e-2)]
        difference = (fit(moved[0], data) - fit(moved[1], data)) / 2e-2
        assert float(slope) == pytest.approx(float(difference), rel=1e-2)

    def test_derivative_in_the_damping(self):
        case = mlp_case()
        op = ij.ekfac(case.objective, case.params, case.data)
        value = jax.jit(lambda damping: tree.dot(case.params, ij.invert(op, ij.Direct(damping)).mv(case.params)))
        difference = (value(0.1 + 1e-5) - value(0.1 - 1e-5)) / 2e-5
        assert float(jax.grad(value)(0.1)) == pytest.approx(float(difference), rel=1e-7)

    def test_certificates(self):
        case = mlp_case()
        op = ij.ekfac(case.objective, case.params, case.data)
        influence = ij.Influence(case.objective, case.params, ij.invert(op, ij.Direct(0.1)))
        scores, bounds, _ = ij.score_bounds(influence, case.data, case.data)
        assert float(jnp.max(bounds)) < 1e-10 * float(jnp.max(jnp.abs(scores)))

    def test_positions_sum_to_the_score(self):
        case = ZOO["rotary"]()
        influence = ij.Influence(case.objective, case.params, ij.Identity(case.params), rhs_chunk=2)
        by_position = influence.token_influences(case.data, case.data)
        assert by_position.shape == (3, 3, LENGTH)
        assert relative_error(jnp.sum(by_position, axis=2), influence.influences(case.data, case.data)) < 1e-12

    def test_positions_are_losses_of_tokens(self):
        """What one position contributes is what the score would be if the loss were that of its token alone."""
        case = ZOO["rotary"]()
        influence = ij.Influence(case.objective, case.params, ij.Identity(case.params))
        factors = influence.influence_factors(case.data)
        only = lambda out, z: token_loss(out[2:3], ij.Batch(z.y[2:3], z.y[2:3]))
        alone = dataclasses.replace(influence, objective=ij.Objective(case.objective.predict, only))
        expected = alone.influences_from_factors(factors, case.data)
        assert relative_error(influence.token_influences(case.data, case.data)[:, :, 2], expected) < 1e-12

    def test_the_same_program_for_other_numbers(self, compilations):
        case = mlp_case()
        ij.ekfac(case.objective, case.params, case.data)
        other = jax.tree.map(lambda x: 1.1 * x, (case.params, case.data.x))
        with compilations() as names:
            ij.ekfac(case.objective, other[0], ij.Batch(other[1], case.data.y))
        assert names == []


@pytest.mark.parametrize("solver", [ij.Direct, ij.Eigh])
@pytest.mark.parametrize("fit", [ij.ekfac, ij.kfac])
def test_a_feature_that_is_always_zero(fit, solver):
    """Without a damping its direction is left out, and said not to have converged; with one it is as any other."""
    params = {"a": {"kernel": normal(4, 3, number=0)}, "b": {"kernel": jnp.eye(3)[:, :2]}}
    objective = ij.Objective(
        lambda p, z: jnp.tanh(z.x @ p["a"]["kernel"]) @ p["b"]["kernel"], lambda out, z: 0.5 * jnp.sum((out - z.y) ** 2)
    )
    x = normal(30, 4, number=1) * np.array([[1.0, 1.0, 0.0, 1.0]])
    data = ij.Batch(x, normal(30, 2, number=2))
    query = ij.Batch(normal(2, 4, number=3), data.y[:2])  # where the feature is not zero
    curvature, V = fit(objective, params, data, labels="empirical"), ij.per_example_grads(objective, params, query)
    matrix = np.asarray(ij.to_dense(curvature))
    values, vectors = np.linalg.eigh(matrix)
    for damping in (0.0, 1e-6):
        alive = (values + damping) > 1e-12 * values.max()
        inverse = vectors[:, alive] / (values[alive] + damping) @ vectors[:, alive].T
        for blocks in (False, True):
            X, info = ij.invert(curvature, ij.Blockwise(solver(damping)) if blocks else solver(damping)).solve_many(V)
            assert bool(info.converged.all()) is (damping > 0)
            assert relative_error(flat(X, params), flat(V, params) @ inverse) < 1e-6


class TestSelfInfluence:
    """From captured factors: what the products of whole gradients with the dense inverse are."""

    @staticmethod
    def check(case, inverse):
        influence = ij.Influence(case.objective, case.params, inverse)
        grads = flat(ij.per_example_grads(case.objective, case.params, case.data), case.params)
        dense = np.linalg.inv(np.asarray(ij.to_dense(inverse.op)) + inverse_damping(inverse, case.params))
        expected = np.einsum("ni,ij,nj->n", grads, dense, grads)
        assert relative_error(influence.self_influences(case.data), expected) < 1e-9
        assert relative_error(jax.jit(influence.self_influences)(case.data), expected) < 1e-9

    @pytest.mark.parametrize("labels", mainly(["empirical", "exact"], "exact"))
    @pytest.mark.parametrize("method", [ij.kfac, ij.ekfac])
    def test_of_a_network(self, method, labels):
        case = mlp_case()
        op = method(case.objective, case.params, case.data, labels=labels)
        for damped in (ij.Direct(0.1), ij.Eigh(ij.RelativeDamping(0.1))):
            self.check(case, ij.invert(op, damped))
        self.check(case, ij.invert(2.0 * op + 0.3 * ij.Identity(case.params), ij.Direct(0.1)))

    @pytest.mark.parametrize("name", mainly(["rotary", "transformer"], "rotary"))
    def test_of_positions_lookups_and_ties(self, name):
        case = ZOO[name]()
        op = ij.ekfac(case.objective, case.params, case.data, labels="empirical")
        self.check(case, ij.invert(op, ij.Direct(0.1)))

    def test_of_a_model_that_uses_other_matrices(self):
        """The curvature of one model, the losses of another: gradients as they are, through the same inverse."""
        case = mlp_case()
        op = ij.ekfac(case.objective, case.params, case.data)
        first = sorted(case.params)[0]
        twice = lambda p: {**p, first: jax.tree.map(lambda x: x * x, p[first])}
        other = ij.Objective(lambda p, z: case.objective.predict(twice(p), z), case.objective.loss)
        self.check(case._replace(objective=other), ij.invert(op, ij.Direct(0.1)))

    def test_of_rows_looked_up_in_what_was_fitted_as_a_matrix(self):
        params, data = {"emb": normal(5, 3)}, ij.Batch(np.array([0, 2, 4, 2, 1]), np.arange(15.0).reshape(5, 3))
        square_loss = lambda out, z: 0.5 * jnp.sum((out - z.y) ** 2)
        product = ij.Objective(lambda p, z: jax.nn.one_hot(z.x, 5, dtype=p["emb"].dtype) @ p["emb"], square_loss)
        lookup = ij.Objective(lambda p, z: p["emb"][z.x], square_loss)
        inverse = ij.invert(ij.ekfac(product, params, data, labels="empirical"), ij.Direct(0.1))
        for objective in (product, lookup):
            influence = ij.Influence(objective, params, inverse)
            expected = jnp.diag(influence.influences(data, data))
            assert relative_error(influence.self_influences(data), expected) < 1e-10


def inverse_damping(inverse, params):
    """Of every entry, a diagonal matrix."""
    of_leaf = {}
    for part in inverse.by_block.values():
        of_leaf |= {name: np.full(np.shape(leaf), part.damping) for name, leaf in tree.named_leaves(part.space)}
    rows = [of_leaf[name].ravel() for name, _ in tree.named_leaves(params)]
    return np.diag(np.concatenate(rows))
