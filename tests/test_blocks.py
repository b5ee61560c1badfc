"""Blocks of parameters: partitions, block-wise solvers, scores by block, and pyDVL's interface on top."""

import dataclasses
import threading
from collections import OrderedDict
from functools import partial

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import mainly, relative_error, tree_error

import influence_jax as ij
from influence_jax import blocks as blocks_module

PARAMS = helpers.random_mlp(jax.random.key(0), (5, 4, 3))
TRAIN = helpers.random_batch(jax.random.key(1), 17, 5, 3, classes=True)
QUERY = helpers.random_batch(jax.random.key(2), 6, 5, 3, classes=True)
OBJECTIVE = helpers.CLASSIFICATION
GGN = ij.GGN(OBJECTIVE, PARAMS, TRAIN)
LAYERS = ["layer0", "layer1"]
KEY = jax.random.key(3)
POISONED = ij.Batch(jnp.asarray(TRAIN.x).at[0, 0].set(jnp.nan), TRAIN.y)


@pytest.mark.parametrize("loss", mainly(["mse", "ce"], "ce"))
@pytest.mark.parametrize("structure", mainly(["full", "layer_wise", "parameter_wise"], "full", "parameter_wise"))
def test_every_block_of_pydvl(loss, structure):
    """Totals and each single block against pyDVL's DirectInfluence on an indefinite Hessian."""
    arrays, objective, params, train, query = helpers.tiny_mlp(loss)
    blocks = {"full": ij.full, "layer_wise": ij.by_layer, "parameter_wise": ij.by_parameter}[structure]
    solver = ij.Direct(float(arrays["regularization"]))
    model = ij.InfluenceFunctionModel(objective, params, curvature=ij.Hessian, solver=solver, blocks=blocks).fit(train)
    factors = helpers.torch_flat(model.influence_factors(query))
    assert relative_error(factors, arrays[f"{structure}/factors_test"]) < 1e-9
    assert relative_error(model.influences(train), arrays[f"{structure}/up_sym"]) < 1e-9
    for mode in ("up", "perturbation"):
        parts = model.influences_by_block(query, train, mode)
        assert list(parts) == list(model.block_names)
        for name, part in parts.items():
            theirs = name.replace("layer", "").replace("/kernel", ".weight").replace("/bias", ".bias")
            assert relative_error(part, arrays[f"{structure}/{mode}/block[{theirs}]"]) < 1e-9
        assert relative_error(model.influences(query, train, mode), arrays[f"{structure}/{mode}"]) < 1e-9
        assert relative_error(sum(parts.values()), arrays[f"{structure}/{mode}"]) < 1e-9


class TestPartition:
    def test_ready_made(self):
        assert list(blocks_module.partition(PARAMS, ij.full)) == [""]
        assert list(blocks_module.partition(PARAMS, ij.by_layer)) == LAYERS
        assert len(blocks_module.partition(PARAMS, ij.by_parameter)) == 4
        assert blocks_module.partition({"scale": jnp.ones(2)}, ij.by_layer) == {"scale": ("scale",)}

    def test_functions_and_prefixes(self):
        by_kind = blocks_module.partition(PARAMS, lambda name: name.rpartition("/")[2])
        assert list(by_kind) == ["bias", "kernel"]
        groups = {"head": ["layer1/kernel"], "body": ["layer0", "layer1/bias"]}
        prefixes = blocks_module.partition(PARAMS, groups)
        assert list(prefixes) == ["body", "head"], "in leaf order"
        assert len(prefixes["body"]) == 3

    def test_prefixes_are_whole_parts_of_a_name(self):
        params = {"layer1": jnp.ones(1), "layer10": jnp.ones(1)}
        assert blocks_module.partition(params, {"a": ["layer1"], "b": ["layer10"]})["a"] == ("layer1",)

    @pytest.mark.parametrize(
        ("blocks", "error", "words"),
        [
            ({"a": ["layer0"]}, ValueError, ["layer1/bias", "layer1/kernel", "exactly one"]),
            ({"a": ["layer0", "layer1/bias"], "b": ["layer1"]}, ValueError, ["layer1/bias", "['a', 'b']"]),
            ({"a": [""], "b": ["layer7"]}, ValueError, ["layer7", "match no parameter", "layer0/bias"]),
            ({"a": "layer0"}, TypeError, ["blocks", "'layer0'", "list"]),
            ("by_layer", TypeError, ["blocks", "'by_layer'", "by_parameter"]),
            (lambda name: 3, TypeError, ["blocks", "3", "string"]),
        ],
    )
    def test_mistakes(self, blocks, error, words):
        """pyDVL accepts a dict with a bogus block, and drops parameters that no block covers."""
        with pytest.raises(error) as caught:
            ij.invert(GGN, ij.Blockwise(ij.Direct(0.1), blocks=blocks))
        assert all(word in str(caught.value) for word in words)


class TestBlockwise:
    def test_is_direct_on_a_block_diagonal_problem(self):
        dense = ij.to_dense(GGN)
        names = [name for name, leaf in ij.tree.named_leaves(PARAMS) for _ in range(leaf.size)]
        layer = np.array([ij.by_layer(name) for name in names])
        values, vectors = jnp.linalg.eigh(jnp.where(layer[:, None] == layer[None], dense, 0.0))
        op = ij.LowRank(ij.unflatten(vectors.T, PARAMS), values)
        V = helpers.random_like(jax.random.key(3), PARAMS, rows=3)
        got = ij.invert(op, ij.Blockwise(ij.Direct(0.1))).mm(V)
        assert tree_error(got, ij.invert(op, ij.Direct(0.1)).mm(V)) < 1e-9
        same = ij.invert(GGN, ij.Blockwise(ij.Direct(0.1))).mm(V)
        assert tree_error(same, got) < 1e-9, "of the GGN, the block diagonal counts"

    def test_two_solvers_equal_the_two_by_hand(self):
        solvers = {"layer0": ij.Eigh(0.2), "layer1": ij.CG(0.3, rtol=1e-12)}
        inverse = ij.invert(GGN, ij.Blockwise(solvers))
        V = helpers.random_like(jax.random.key(3), PARAMS, rows=3)
        X, info = inverse.solve_many(V)
        for name, solver in solvers.items():
            block = (f"{name}/bias", f"{name}/kernel")
            expected = ij.invert(ij.restrict(GGN, block), solver).mm(blocks_module.select(V, block))
            assert tree_error(blocks_module.select(X, block), expected) < 1e-12
        assert info.steps.shape == (3,)
        assert bool(jnp.all(info.converged))
        assert inverse.blocks == {name: (f"{name}/bias", f"{name}/kernel") for name in LAYERS}

    def test_merged_info_is_that_of_the_whole(self):
        inverse = ij.invert(GGN, ij.Blockwise(ij.CG(0.01, rtol=1e-3)))
        v = helpers.random_like(jax.random.key(3), PARAMS)
        x, info = inverse.solve(v)
        parts = inverse.solve_by_block(v)
        assert info.steps == max(part.steps for _, part in parts.values())
        assert info.min_curvature == min(part.min_curvature for _, part in parts.values())
        missed = [ij.tree.dot(v[n], v[n]) * parts[n][1].residual ** 2 for n in LAYERS]
        assert abs(info.residual - jnp.sqrt(sum(missed) / ij.tree.dot(v, v))) < 1e-12
        assert tree_error(blocks_module.join({n: x for n, (x, _) in parts.items()}, PARAMS), x) < 1e-12
        failing = {"layer0": ij.CG(0.01, max_steps=1), "layer1": ij.Direct(0.1)}
        assert not bool(ij.invert(GGN, ij.Blockwise(failing)).solve(v)[1].converged)

    def test_relative_damping_is_per_block(self):
        inverse = ij.invert(GGN, ij.Blockwise(ij.Direct(ij.RelativeDamping(0.1))))
        for name, part in inverse.by_block.items():
            block = ij.to_dense(ij.restrict(GGN, (f"{name}/bias", f"{name}/kernel")))
            assert abs(part.damping - 0.1 * jnp.trace(block) / len(block)) < 1e-12
        zero = ij.Diagonal({"a": jnp.ones(2), "b": jnp.zeros(2)})
        solver = ij.Blockwise(ij.Direct(ij.RelativeDamping(0.1)), blocks=ij.by_parameter)
        dampings = [part.damping for part in ij.invert(zero, solver).by_block.values()]
        assert relative_error(dampings, [0.1, 0.05]) < 1e-12  # of a block without curvature, relative to all
        with pytest.raises(ValueError, match="mean eigenvalue"):
            ij.invert(0.0 * zero, solver)

    def test_with_damping_jit_vmap_and_derivatives(self):
        inverse = ij.invert(GGN, ij.Blockwise(ij.Eigh(0.5)))
        v = helpers.random_like(jax.random.key(3), PARAMS)
        swept = jax.vmap(lambda damping: inverse.with_damping(damping).mv(v))(jnp.array([0.1, 0.2]))
        expected = ij.invert(GGN, ij.Blockwise(ij.Direct(0.2))).mv(v)
        assert tree_error(jax.tree.map(lambda x: x[1], swept), expected) < 1e-9
        fn = lambda damping: ij.tree.dot(v, ij.invert(GGN, ij.Blockwise(ij.Direct(damping))).mv(v))
        difference = (jax.jit(fn)(0.2 + 1e-5) - fn(0.2 - 1e-5)) / 2e-5
        assert abs(jax.grad(fn)(0.2) - difference) < 1e-6 * abs(difference)

    @pytest.mark.parametrize(
        ("solver", "error", "words"),
        [
            ({"layer0": ij.Direct(0.1)}, ValueError, ["solver", "['layer0']", "'layer1'"]),
            ({"layer0": "cg"}, TypeError, ["solver", "'cg'"]),
            (ij.CG, TypeError, ["solver", "CG(damping"]),
        ],
    )
    def test_mistakes(self, solver, error, words):
        with pytest.raises(error) as caught:
            ij.invert(GGN, ij.Blockwise(solver))
        assert all(word in str(caught.value) for word in words)


class TestInfluenceByBlock:
    @pytest.mark.parametrize("mode", ["up", "perturbation"])
    @pytest.mark.parametrize("measured", mainly([False, True], True))
    def test_blocks_sum_to_the_total_for_any_inverse(self, mode, measured):
        measurement = (lambda p, z: helpers.mlp(p, z)[0]) if measured else None
        for solver in (None, ij.Blockwise(ij.Eigh(0.1))):
            inverse = ij.Identity(PARAMS) if solver is None else ij.invert(GGN, solver)
            influence = ij.Influence(OBJECTIVE, PARAMS, inverse, measurement=measurement)
            total = influence.influences(QUERY, TRAIN, mode)
            for blocks in (None, ij.by_layer, {"a": ["layer0/bias", "layer1"], "b": ["layer0/kernel"]}):
                parts = influence.influences_by_block(QUERY, TRAIN, mode, blocks=blocks)
                assert isinstance(parts, OrderedDict)
                assert relative_error(sum(parts.values()), total) < 1e-11
                factors = influence.influence_factors_by_block(QUERY, blocks=blocks)
                again = influence.influences_from_factors_by_block(factors, TRAIN, mode)
                assert list(again) == list(parts) == list(factors)
                assert all(relative_error(again[name], parts[name]) < 1e-9 for name in parts)
            assert relative_error(influence.influences_from_factors(factors, TRAIN, mode), total) < 1e-11

    def test_one_block_on_its_own(self):
        influence = ij.Influence(OBJECTIVE, PARAMS, ij.invert(GGN, ij.Blockwise(ij.Direct(0.1))))
        assert influence.block_names == tuple(LAYERS)
        parts = influence.influences_by_block(QUERY, TRAIN)
        for name in LAYERS:
            alone = influence.block(name)
            assert relative_error(alone.influences(QUERY, TRAIN), parts[name]) < 1e-12
            assert set(alone.params) == {f"{name}/bias", f"{name}/kernel"}
        named = ij.Influence(OBJECTIVE, PARAMS, ij.invert(GGN, ij.Blockwise(ij.Direct(0.1), blocks={"all": [""]})))
        assert list(named.influences_by_block(QUERY, TRAIN)) == list(named.influence_factors_by_block(QUERY)) == ["all"]
        whole = ij.Influence(OBJECTIVE, PARAMS, ij.Identity(PARAMS))
        assert whole.block("") is whole
        with pytest.raises(ValueError, match=r"name: got 'layer9', expected one of the blocks \['layer0'"):
            influence.block("layer9")

    @pytest.mark.parametrize(
        ("factors", "error", "words"),
        [
            ([1, 2], TypeError, ["factors", "influence_factors_by_block"]),
            (OrderedDict(layer0={"layer0/bias": jnp.ones((2, 4))}), ValueError, ["factors", "layer1/kernel", "once"]),
        ],
    )
    def test_mistakes(self, factors, error, words):
        influence = ij.Influence(OBJECTIVE, PARAMS, ij.Identity(PARAMS))
        with pytest.raises(error) as caught:
            influence.influences_from_factors_by_block(factors, TRAIN)
        assert all(word in str(caught.value) for word in words)


class TestInfluenceFunctionModel:
    MODEL = ij.InfluenceFunctionModel(OBJECTIVE, PARAMS, solver=ij.Direct(0.1), blocks=ij.by_layer)

    def test_fit_leaves_the_recipe_alone(self):
        fitted = self.MODEL.fit(TRAIN)
        assert fitted.is_fitted
        assert not self.MODEL.is_fitted
        assert fitted.is_thread_safe
        assert fitted.n_parameters == self.MODEL.n_parameters == GGN.size
        assert "not fitted" in repr(self.MODEL)
        assert "Blockwise" in repr(fitted)

    def test_every_method_is_that_of_the_influence(self):
        fitted = self.MODEL.fit(TRAIN)
        influence = ij.Influence(OBJECTIVE, PARAMS, ij.invert(GGN, ij.Blockwise(ij.Direct(0.1))))
        pairs = [
            (fitted.influences(QUERY, TRAIN), influence.influences(QUERY, TRAIN)),
            (fitted.influences(QUERY), influence.influences(QUERY, QUERY)),
            (fitted.influences(QUERY, TRAIN, "perturbation"), influence.influences(QUERY, TRAIN, "perturbation")),
            (fitted.influence_factors(QUERY), influence.influence_factors(QUERY)),
            (fitted.influence_factors_by_block(QUERY), influence.influence_factors_by_block(QUERY)),
            (fitted.influences_by_block(QUERY, TRAIN), influence.influences_by_block(QUERY, TRAIN)),
            (fitted.self_influences(TRAIN), influence.self_influences(TRAIN)),
            (fitted.top_k(QUERY, TRAIN, 3).values, influence.top_k(QUERY, TRAIN, 3).values),
        ]
        for got, expected in pairs:
            assert tree_error(got, expected) == 0.0
        factors = fitted.influence_factors_by_block(QUERY)
        by_block = fitted.influences_from_factors_by_block(factors, TRAIN)
        assert relative_error(sum(by_block.values()), fitted.influences_from_factors(factors, TRAIN)) < 1e-11
        assert fitted.block_names == tuple(LAYERS)

    def test_defaults_and_recipes(self):
        default = ij.InfluenceFunctionModel(OBJECTIVE, PARAMS).fit(TRAIN)
        assert isinstance(default.influence.inverse.op, ij.GGN)
        hessian = partial(ij.Hessian, chunk=4)
        chunked = ij.InfluenceFunctionModel(OBJECTIVE, PARAMS, curvature=hessian, solver=ij.Eigh(1.0))
        expected = ij.Influence(OBJECTIVE, PARAMS, ij.invert(ij.Hessian(OBJECTIVE, PARAMS, TRAIN), ij.Direct(1.0)))
        got = chunked.fit(TRAIN).influences(QUERY, TRAIN)
        assert relative_error(got, expected.influences(QUERY, TRAIN)) < 1e-9
        margin = ij.InfluenceFunctionModel(
            OBJECTIVE, PARAMS, solver=ij.Direct(0.1), measurement=lambda p, z: helpers.mlp(p, z)[0]
        )
        assert margin.fit(TRAIN).influences(QUERY, TRAIN).shape == (6, 17)

    def test_threads(self):
        """Fitted models of one recipe, used from eight threads at once, give what one thread gives."""
        expected = self.MODEL.fit(TRAIN).influences(QUERY, TRAIN)
        results: list = [None] * 8

        def work(index: int) -> None:
            results[index] = self.MODEL.fit(TRAIN).influences(QUERY, TRAIN)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(relative_error(result, expected) < 1e-12 for result in results)
        assert not self.MODEL.is_fitted

    @pytest.mark.parametrize(
        ("call", "error", "words"),
        [
            (lambda m: m.influences(QUERY), ij.NotFittedError, ["not fitted", "model.fit(training_data)"]),
            (lambda m: m.block_names, ij.NotFittedError, ["not fitted"]),
            (lambda m: m.fit(TRAIN).influences(ij.Batch(QUERY.x)), ValueError, ["query", "without y"]),
            (lambda m: m.fit(TRAIN).influences(QUERY, ij.Batch(None, TRAIN.y)), ValueError, ["train", "without x"]),
            (lambda m: m.fit(ij.Batch(TRAIN.x)), ValueError, ["data", "without y"]),
            (lambda m: m.fit(POISONED), ValueError, ["data", "loss of 1 of", "NaN", "first example"]),
            (lambda m: m.fit(TRAIN).influences(QUERY, TRAIN, "down"), ValueError, ["mode", "'down'"]),
            (
                lambda m: dataclasses.replace(m, solver=ij.Blockwise(ij.CG(1.0))),
                ValueError,
                ["blocks", "Blockwise", "one or the other"],
            ),
            (lambda m: dataclasses.replace(m, curvature=GGN), TypeError, ["curvature", "GGN"]),
        ],
    )
    def test_mistakes(self, call, error, words):
        with pytest.raises(error) as caught:
            call(self.MODEL)
        assert all(word in str(caught.value) for word in words)


def test_warnings_name_the_block_and_blame_the_callers_line():
    solvers = {"layer0": ij.Direct(0.1), "layer1": ij.CG(1e-6, max_steps=1)}
    influence = ij.Influence(OBJECTIVE, PARAMS, ij.invert(GGN, ij.Blockwise(solvers)))
    with pytest.warns(ij.ConvergenceWarning, match=r"in block 'layer1' \(worst relative residual") as caught:
        influence.influences(TRAIN, TRAIN)
    assert caught[0].filename == __file__
    info = influence.inverse.solve(PARAMS)[1]
    assert int(info.block) == 1
    assert info.residual > 0.01
    for doubled in (2.0 * influence.inverse, influence.inverse + ij.Identity(PARAMS)):
        with pytest.warns(ij.ConvergenceWarning, match="did not converge"):
            dataclasses.replace(influence, inverse=doubled).influences(TRAIN, TRAIN)


def test_factors_are_known_by_their_structure():
    """Parameters may be OrderedDicts themselves, and factors by block plain dicts."""
    expected = ij.Influence(OBJECTIVE, PARAMS, ij.Identity(PARAMS)).influences(TRAIN, TRAIN)
    for container in (OrderedDict, dict):
        params = container({name: container(layer) for name, layer in PARAMS.items()})
        influence = ij.Influence(OBJECTIVE, params, ij.Identity(params))
        factors = influence.influence_factors(TRAIN)
        assert relative_error(influence.influences_from_factors(factors, TRAIN), expected) < 1e-12
        by_block = dict(influence.influence_factors_by_block(TRAIN, blocks=ij.by_layer))
        assert relative_error(influence.influences_from_factors(by_block, TRAIN), expected) < 1e-12


def test_a_changed_recipe_is_not_fitted():
    fitted = ij.InfluenceFunctionModel(OBJECTIVE, PARAMS, solver=ij.Direct(0.1)).fit(TRAIN)
    changed = dataclasses.replace(fitted, solver=ij.Direct(10.0))
    assert fitted.is_fitted
    assert not changed.is_fitted
    assert relative_error(changed.fit(TRAIN).influences(TRAIN), fitted.influences(TRAIN)) > 0.1
    inside = jax.jit(lambda data: dataclasses.replace(fitted).fit(data).influences(data))(TRAIN)
    assert relative_error(inside, fitted.influences(TRAIN)) < 1e-9


class TestBlocksThatAreNoise:
    """A curvature of rounding is no curvature: a damping relative to its own mean would make rounding a score."""

    MEANS = (2.0, 1e-30, 3e-8)
    OP = ij.Diagonal({name: mean * jnp.array([0.5, 1.5]) for name, mean in zip("abc", MEANS, strict=True)})
    WHOLE = sum(MEANS) / 3

    @pytest.mark.parametrize("solver", [ij.Direct, ij.BlockCG, partial(ij.Arnoldi, rank=1), ij.Jacobi], ids=str)
    def test_is_damped_like_all(self, solver):
        relative = ij.RelativeDamping(0.1)
        blockwise = ij.Blockwise(solver(relative), blocks=ij.by_parameter)
        with pytest.warns(UserWarning, match=r"damping: in Diagonal.* block 'b' is rounding .* mean eigenvalue of all"):
            inverse = ij.invert(self.OP, blockwise, key=KEY)
        expected = [0.1 * self.MEANS[0], 0.1 * self.WHOLE, 0.1 * self.MEANS[2]]
        fitted = [part.damping for part in inverse.by_block.values()]
        assert relative_error(fitted, expected) < 1e-12
        assert repr(solver(relative)) in repr(inverse)
        moved = inverse.with_damping(ij.RelativeDamping(0.2))
        found = [part.damping for part in moved.by_block.values()]
        assert relative_error(found, 2 * np.array(expected)) < 1e-12

    def test_beside_blocks_with_a_damping_of_their_own(self):
        solvers = {"a": ij.CG(0.3), "b": ij.Eigh(ij.RelativeDamping(0.1)), "c": ij.CG(0.3)}
        with pytest.warns(UserWarning, match="block 'b' is rounding"):
            inverse = ij.invert(self.OP, ij.Blockwise(solvers, blocks=ij.by_parameter))
        assert relative_error(inverse.by_block["b"].damping, 0.1 * self.WHOLE) < 1e-12

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64, jnp.bfloat16])
    def test_what_is_small_but_real_keeps_its_own(self, dtype):
        op = ij.Diagonal({"a": jnp.ones(2, dtype), "b": jnp.full(2, 1e-8, dtype)})
        inverse = ij.invert(op, ij.Blockwise(ij.Direct(ij.RelativeDamping(0.1)), blocks=ij.by_parameter))
        assert abs(float(inverse.by_block["b"].damping) / (0.1 * float(op.tree["b"][0])) - 1) < 1e-6

    @pytest.mark.parametrize("fit", [ij.ekfac, ij.kfac])
    def test_a_parameter_in_front_of_a_normalisation(self, fit):
        """Scores do not change with the order of positions, and the block that the loss ignores has none."""
        params = {n: {"kernel": 0.5 * helpers.normal(jax.random.key(i), shape)} for i, (n, shape) in enumerate(NORMED)}
        shapes = ((12, 6, 3), (12, 4), (12, 6, 2))
        x, time, y = (helpers.normal(jax.random.key(4 + i), shape) for i, shape in enumerate(shapes))
        order = jnp.array([3, 0, 5, 1, 4, 2])
        scores = []
        for data in ({"x": x, "t": time, "y": y}, {"x": x[:, order], "t": time, "y": y[:, order]}):
            curvature = fit(NORMALISED, params, data, labels="empirical")
            with pytest.warns(UserWarning, match="block 'time/kernel' is rounding"):
                inverse = ij.invert(curvature, ij.Direct(ij.RelativeDamping(0.1)))
            influence = ij.Influence(NORMALISED, params, inverse)
            scores.append(influence.influences(data, data))
        parts = influence.influences_by_block(data, data)
        assert float(jnp.linalg.norm(parts["time/kernel"])) < 1e-20 * float(jnp.linalg.norm(scores[1]))
        assert relative_error(*scores) < 1e-9
        moved = inverse.with_damping(ij.RelativeDamping(0.1))
        assert relative_error(list(moved.damping.values.values()), list(inverse.damping.values.values())) < 1e-12


def normalised(p, z):
    h = z["x"] @ p["conv"]["kernel"] + (jnp.sin(z["t"]) @ p["time"]["kernel"])[None]
    h = (h - h.mean(0, keepdims=True)) / (h.std(0, keepdims=True) + 1e-3)
    return jnp.tanh(h) @ p["out"]["kernel"]


NORMED = (("time", (4, 8)), ("conv", (3, 8)), ("out", (8, 2)))
NORMALISED = ij.Objective(normalised, lambda out, z: 0.5 * jnp.sum((out - z["y"]) ** 2))
