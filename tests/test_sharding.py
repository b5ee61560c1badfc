"""Several devices: every result is that of one device and laid out as arguments are; no device asks for all data."""

import functools
import importlib
import math
import re
from functools import partial

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative_error, tree_error
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import influence_jax as ij
from influence_jax import gradients, influence as scores
from influence_jax.batching import _fold
from influence_jax.curvature import exact
from influence_jax.sharding import padded_length

kfac = importlib.import_module("influence_jax.curvature.kfac")

SIZES = (6, 8, 8, 4)


def split_last(x) -> PartitionSpec:
    """Parameters over the mesh's second axis, where it divides their last."""
    return PartitionSpec(*(None,) * (x.ndim - 1), "model") if x.ndim and x.shape[-1] % 4 == 0 else PartitionSpec()


class Mesh:
    """Eight devices, how parameters are laid out on them, and over which axes data are split."""

    def __init__(self, shape, kind, data, params=lambda x: PartitionSpec()):
        self.mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(kind, kind))
        self.axes, self.layout = data, params

    def params(self, tree):
        return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(self.mesh, self.layout(x))), tree)

    def split(self, batch):
        return jax.device_put(batch, NamedSharding(self.mesh, PartitionSpec(self.axes)))

    def all(self, tree):
        return ij.sharding.replicate(tree, self.mesh)


MESHES = {
    "data": lambda kind: Mesh((8, 1), kind, "data"),
    "second axis": lambda kind: Mesh((1, 8), kind, "model"),
    "both axes": lambda kind: Mesh((2, 4), kind, ("data", "model")),
    "split params": lambda kind: Mesh((2, 4), kind, "data", split_last),
}
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
SOME = [("data", AUTO), ("split params", AUTO), ("split params", EXPLICIT)]
ALL = [(name, kind) for name in MESHES for kind in (AUTO, EXPLICIT)]


@pytest.fixture
def mesh(request):
    name, kind = request.param
    return MESHES[name](kind)


def on(*cases):
    return pytest.mark.parametrize("mesh", cases, indirect=True, ids=lambda case: f"{case[0]}, {case[1].name}")


def problem(count, seed=0):
    params = helpers.random_mlp(jax.random.key(seed), SIZES)
    return params, helpers.random_batch(jax.random.key(seed + 1), count, SIZES[0], SIZES[-1], classes=True)


def sequence_model(params, example):
    """Windows of three positions, then a recurrence."""
    wide = jnp.pad(example.x, ((1, 1), (0, 0)))
    x = sum(wide[k : k + example.x.shape[0]] @ params["conv"][k] for k in range(3))
    step = lambda h, row: (jnp.tanh(row @ params["in"] + h @ params["back"]), None)
    return jax.lax.scan(step, jnp.zeros_like(params["back"][0]), jnp.tanh(x))[0] @ params["head"]


SEQUENCES = ij.Objective(sequence_model, helpers.cross_entropy)


def sequences(count):
    keys = jax.random.split(jax.random.key(5), 6)
    shapes = (("conv", (3, 3, 4)), ("in", (4, 8)), ("back", (8, 8)), ("head", (8, 4)))
    params = {name: 0.4 * jax.random.normal(keys[i], shape) for i, (name, shape) in enumerate(shapes)}
    return params, ij.Batch(jax.random.normal(keys[4], (count, 5, 3)), jax.random.randint(keys[5], (count,), 0, 4))


# With draws of its own: those by way of the loss Hessian's square root hang on rounding of its zero eigenvalue.
CLASSES = ij.Objective(helpers.mlp, helpers.cross_entropy, sample=ij.softmax_sample)

OPERATORS = {
    "hessian": ij.Hessian,
    "ggn": ij.GGN,
    "empirical fisher": ij.EmpiricalFisher,
    "fisher": partial(ij.Fisher, key=jax.random.key(3)),
}


def split_of(x) -> tuple:
    """Over which mesh axes each axis of an array is split."""
    assert isinstance(x.sharding, NamedSharding)
    spec = tuple(None if axis == () else axis for axis in x.sharding.spec)
    return spec + (None,) * (x.ndim - len(spec))


def laid_out_alike(stack, params, lead=()):
    return jax.tree.map(split_of, stack) == jax.tree.map(lambda x: lead + split_of(x), params)


class TestProducts:
    @on(*SOME)
    @pytest.mark.parametrize("kind", OPERATORS)
    def test_are_those_of_one_device(self, mesh, kind, float32):
        params, data = problem(96)
        v, V = (helpers.random_like(jax.random.key(2), params, rows) for rows in (None, 3))
        one = OPERATORS[kind](CLASSES, params, data, chunk=32)
        many = OPERATORS[kind](CLASSES, mesh.params(params), mesh.split(data), chunk=32)
        product, products = many.mv(v), many.mm(V)
        assert tree_error(product, one.mv(v)) < 1e-6
        assert tree_error(products, one.mm(V)) < 1e-6
        assert laid_out_alike(product, many.params)
        assert laid_out_alike(products, many.params, lead=(None,))

    @on(*ALL)
    def test_of_convolutions_and_recurrences(self, mesh, float32):
        params, data = sequences(64)
        v = helpers.random_like(jax.random.key(2), params)
        many = ij.GGN(SEQUENCES, mesh.params(params), mesh.split(data), chunk=32)
        assert tree_error(many.mv(v), ij.GGN(SEQUENCES, params, data).mv(v)) < 1e-6
        assert laid_out_alike(many.mv(v), many.params)

    @on(("data", AUTO), ("data", EXPLICIT))
    def test_of_parameters_that_are_on_no_mesh(self, mesh, float32):
        params, data = problem(64)
        many = ij.GGN(helpers.CLASSIFICATION, params, mesh.split(data))
        assert tree_error(many.mv(params), ij.GGN(helpers.CLASSIFICATION, params, data).mv(params)) < 1e-6

    @on(("split params", AUTO), ("split params", EXPLICIT))
    def test_of_blocks_minibatches_and_diagonals(self, mesh, float32):
        params, data = problem(64)
        one = ij.GGN(helpers.CLASSIFICATION, params, data, chunk=16)
        many = ij.GGN(helpers.CLASSIFICATION, mesh.params(params), mesh.split(data), chunk=16)
        names = ("layer1/bias", "layer1/kernel")
        part = ij.restrict(many, names)
        v = {name: params["layer1"][name.split("/")[1]] for name in names}
        assert tree_error(part.mv(v), ij.restrict(one, names).mv(v)) < 1e-6
        assert laid_out_alike(part.mv(v), part.params)
        few = jnp.array([3, 60, 9, 9])
        assert tree_error(ij.minibatch(many, few).mv(params), ij.minibatch(one, few).mv(params)) < 1e-6
        assert tree_error(ij.diagonal(many), ij.diagonal(one)) < 2e-6
        assert relative_error(ij.to_dense(many), ij.to_dense(one)) < 1e-6
        assert relative_error(ij.trace(many), ij.trace(one)) < 1e-6

    @on(("data", AUTO), ("data", EXPLICIT))
    def test_with_dead_weights_of_padding(self, mesh, float32):
        params, data = problem(1003)
        padded, weights = ij.sharding.shard_batch(data, mesh.mesh)
        many = ij.GGN(helpers.CLASSIFICATION, mesh.all(params), padded, weights=weights, chunk=100)
        assert tree_error(many.mv(params), ij.GGN(helpers.CLASSIFICATION, params, data).mv(params)) < 1e-6


KEY = jax.random.key(4)
TIGHT = {"rtol": 1e-11}
SOLVERS = {
    "cg": (ij.GGN, ij.CG(0.1, **TIGHT)),
    "preconditioned": (ij.GGN, ij.CG(0.1, preconditioner=ij.Nystrom(0.1, 8), **TIGHT)),
    "block cg": (ij.GGN, ij.BlockCG(0.1, **TIGHT)),
    "direct": (ij.GGN, ij.Direct(0.1)),
    "indefinite": (ij.Hessian, ij.Direct(1.0)),
    "lissa": (ij.GGN, ij.LiSSA(1.0, depth=30, rtol=0.5)),
    "minibatches": (ij.GGN, ij.LiSSA(1.0, scale=5.0, depth=20, batch_size=16, rtol=0.9)),
    "arnoldi": (ij.GGN, ij.Arnoldi(0.1, 4, steps=8)),
    "nystrom": (ij.GGN, ij.Nystrom(0.1, 8)),
    "harmonic mean": (ij.EmpiricalFisher, ij.HarmonicMean(0.1)),
    "sample space": (ij.EmpiricalFisher, ij.SampleSpace(0.1)),
    "sample space, outputs": (ij.GGN, ij.SampleSpace(0.1)),
    "blockwise": (ij.GGN, ij.Blockwise(ij.BlockCG(ij.RelativeDamping(0.5), **TIGHT))),
    "ekfac": (ij.ekfac, ij.Direct(ij.RelativeDamping(0.1))),
}


@functools.cache
def solved_on_one_device(name):
    curvature, solver = SOLVERS[name]
    params, data = problem(64)
    v = helpers.random_like(jax.random.key(2), params, 2)
    return ij.invert(curvature(helpers.CLASSIFICATION, params, data, chunk=32), solver, key=KEY).solve_many(v)


class TestInverses:
    """In 64-bit mode, where what differs is not rounding."""

    @pytest.mark.parametrize("name", SOLVERS)
    @on(("split params", EXPLICIT))
    def test_are_those_of_one_device(self, mesh, name):
        self.compare(mesh, name)

    @pytest.mark.parametrize("name", ["block cg", "direct", "sample space", "ekfac"])
    @on(("data", AUTO), ("both axes", EXPLICIT))
    def test_whatever_the_mesh(self, mesh, name):
        self.compare(mesh, name)

    def compare(self, mesh, name):
        curvature, solver = SOLVERS[name]
        params, data = problem(64)
        v = helpers.random_like(jax.random.key(2), params, 2)
        many = curvature(helpers.CLASSIFICATION, mesh.params(params), mesh.split(data), chunk=32)
        solved, info = ij.invert(many, solver, key=KEY).solve_many(v)
        expected, expected_info = solved_on_one_device(name)
        assert tree_error(solved, expected) < 1e-8
        assert np.array_equal(info.converged, expected_info.converged)

    @on(("split params", AUTO), ("split params", EXPLICIT))
    def test_solutions_stay_split(self, mesh, float32):
        params, data = problem(64)
        many = ij.GGN(helpers.CLASSIFICATION, mesh.params(params), mesh.split(data))
        v = jax.tree.map(jnp.ones_like, many.params)
        assert laid_out_alike(ij.invert(many, ij.CG(0.1)).solve(v)[0], many.params)
        pairs = ij.invert(many, ij.Arnoldi(0.1, 4, steps=8), key=KEY).state.pairs
        assert laid_out_alike(pairs.basis, many.params, lead=(None,))


class TestScores:
    def influence(self, params, data):
        inverse = ij.invert(ij.ekfac(helpers.CLASSIFICATION, params, data), ij.Direct(0.1))
        return ij.Influence(helpers.CLASSIFICATION, params, inverse, chunk=32)

    @on(("split params", EXPLICIT), ("data", AUTO))
    def test_are_those_of_one_device(self, mesh):
        params, data = problem(64)
        query = jax.tree.map(lambda x: x[:5], problem(8, 3)[1])
        one, many = self.influence(params, data), self.influence(mesh.params(params), mesh.split(data))
        train, asked = mesh.split(data), mesh.all(query)
        got = many.influences(asked, train)
        assert relative_error(got, one.influences(query, data)) < 1e-11
        assert split_of(got) == (None, "data")
        two = jax.tree.map(lambda x: x[:2], query)
        assert relative_error(many.influences(mesh.all(two), train), one.influences(two, data)) < 1e-11
        assert relative_error(many.influences(train, asked), one.influences(data, query)) < 1e-11
        got = many.influences(asked, train, "perturbation")
        assert relative_error(got, one.influences(query, data, "perturbation")) < 1e-11
        got = many.self_influences(train)
        assert relative_error(got, one.self_influences(data)) < 1e-11
        assert split_of(got) == ("data",)
        top, expected = many.top_k(asked, train, 3), one.top_k(query, data, 3)
        assert relative_error(top.values, expected.values) < 1e-11
        assert np.array_equal(top.indices, expected.indices)
        parts, expected = many.influences_by_block(asked, train), one.influences_by_block(query, data)
        assert all(relative_error(parts[name], expected[name]) < 1e-11 for name in expected)

    @on(("split params", EXPLICIT), ("data", AUTO))
    def test_bounds_and_forms(self, mesh):
        params, data = problem(64)
        query = jax.tree.map(lambda x: x[:4], data)
        make = lambda p, d: ij.GGN(helpers.CLASSIFICATION, p, d)
        one, many = make(params, data), make(mesh.params(params), mesh.split(data))
        bounds = [
            ij.score_bounds(ij.Influence(op.objective, op.params, ij.invert(op, ij.CG(1.0, rtol=1e-3))), query, op.data)
            for op in (one, many)
        ]
        assert relative_error(bounds[1][0], bounds[0][0]) < 1e-11
        assert relative_error(bounds[1][1], bounds[0][1]) < 1e-8
        forms = [
            op.as_bilinear_form().grads_inner_prod(query, op.data, objective=op.objective, params=op.params)
            for op in (one, many)
        ]
        assert relative_error(forms[1], forms[0]) < 1e-11
        rows = ij.per_example_grads(many.objective, many.params, many.data)
        flat = ij.flatten(rows, many.params)
        assert relative_error(flat, ij.flatten(ij.per_example_grads(one.objective, params, data), params)) < 1e-11

    @on(("data", EXPLICIT))
    def test_of_the_facade(self, mesh, float32):
        params, data = problem(64)
        query = jax.tree.map(lambda x: x[:4], data)
        model = ij.InfluenceFunctionModel(helpers.CLASSIFICATION, params, solver=ij.Direct(0.1))
        many = ij.InfluenceFunctionModel(helpers.CLASSIFICATION, mesh.all(params), solver=ij.Direct(0.1))
        got = many.fit(mesh.split(data)).influences(query, mesh.split(data))
        assert relative_error(got, model.fit(data).influences(query, data)) < 1e-5


def moved(program) -> list[tuple[str, int]]:
    """What the devices of a compiled program send each other: kind, and entries of the largest array it makes."""
    sends = r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
    found = []
    for result, kind in re.findall(sends, program.compile().as_text()):
        shapes = re.findall(r"\w+\[([\d,]*)\]", result)
        found.append((kind, max(math.prod(map(int, filter(None, shape.split(",")))) for shape in shapes)))
    return found


def programs(mesh, count):
    """The programs that pass over data, compiled for data of several chunks."""
    params, data = problem(count)
    params, data = mesh.params(params), mesh.split(data)
    op = ij.GGN(helpers.CLASSIFICATION, params, data, chunk=256)
    V = helpers.random_like(jax.random.key(2), params, 3)
    through = ij.Influence(op.objective, params, ij.Identity(params), chunk=256)
    recipe = kfac.as_recipe(op.objective, "exact", None, 4096)
    fisher = kfac.keyed_fisher(op.objective, params, data, None, 256, recipe, None)
    return {
        "product": lambda: exact._mean_product.lower(op, params),
        "products": lambda: exact._mean_products.lower(op, V),
        "scores": lambda: scores._up.lower(through, V, data),
        "gradients": lambda: gradients._per_example_grads.lower(op.objective, params, data, 256),
        "ekfac": lambda: kfac._fit.lower(fisher, recipe, True),
    }


PROGRAMS = ["product", "products", "scores", "gradients", "ekfac"]


class TestWhatDevicesSend:
    @on(("data", AUTO), ("data", EXPLICIT))
    @pytest.mark.parametrize(("name", "count"), [("product", 2000), *((name, 2048) for name in PROGRAMS)])
    def test_sums_only_where_parameters_are_everywhere(self, mesh, name, count, float32):
        sent = moved(programs(mesh, count)[name]())
        assert {kind for kind, _ in sent} <= {"all-reduce"}
        assert len(sent) == {"product": 1, "products": 1, "scores": 0, "gradients": 0, "ekfac": 2}[name]

    @on(("split params", AUTO), ("split params", EXPLICIT))
    @pytest.mark.parametrize("name", PROGRAMS)
    def test_no_data_where_parameters_are_split(self, mesh, name, float32):
        count = 8192
        sent = moved(programs(mesh, count)[name]())
        assert sent, "split parameters have to be sent"
        # Smaller than the labels, which are the smallest array of the data.
        assert max(entries for kind, entries in sent if kind == "all-gather") < count

    @on(("data", AUTO))
    def test_a_program_that_takes_all_data_is_noticed(self, mesh, float32):
        data = mesh.split(problem(2048)[1])
        rows = jax.jit(lambda batch: jax.lax.map(lambda z: jnp.sum(z.x), batch, batch_size=256))
        assert max(entries for kind, entries in moved(rows.lower(data)) if kind == "all-gather") >= 2048

    @on(("data", AUTO), ("split params", EXPLICIT))
    def test_same_shapes_never_recompile(self, mesh, compilations, float32):
        def run(seed):
            params, data = problem(64, seed)
            params, data = mesh.params(params), mesh.split(data)
            inverse = ij.invert(ij.GGN(helpers.CLASSIFICATION, params, data), ij.CG(0.1))
            return ij.Influence(helpers.CLASSIFICATION, params, inverse).influences(data, data)

        run(0)
        with compilations() as names:
            run(7)
        assert [name for name in names if name.startswith("_")] == []


class TestChunks:
    @pytest.mark.parametrize("devices", [2, 6, 8, 64])
    @pytest.mark.parametrize("chunk", [1, 37, 256, None])
    def test_every_device_has_its_share_of_every_chunk(self, devices, chunk):
        for count in (1, 50, 257, 1003, 60_000):
            fold = _fold(padded_length(count, devices), chunk, devices)
            assert fold.chunks == 1 or (fold.chunks * fold.length == fold.count and fold.length % devices == 0)
            assert fold.length <= max(chunk or 256, devices)
            if count >= 1003:
                fewest = -(-fold.count // max(chunk or 256, devices))
                assert fold.chunks <= 2 * fewest

    def test_of_one_device_are_as_few_as_can_be(self):
        assert _fold(1003, 100).chunks == 11
        assert _fold(1003, 100).length == 92

    def test_padding_is_at_most_a_sixteenth(self):
        for devices in (1, 4, 8):
            for count in (1, 7, 100, 1003, 12_345):
                least = -(-count // devices) * devices
                assert least <= padded_length(count, devices) <= least * 17 / 16


class TestContexts:
    """Whatever mesh is in force, and inside of what a user compiles."""

    @on(("split params", EXPLICIT), ("split params", AUTO))
    def test_inside_of_jit_and_grad(self, mesh, float32):
        params, data = problem(64)
        v = helpers.random_like(jax.random.key(2), params)

        def entry(damping, params, data, v):
            inverse = ij.invert(ij.GGN(helpers.CLASSIFICATION, params, data, chunk=16), ij.CG(damping, rtol=1e-7))
            return jnp.sum(inverse.mv(v)["layer0"]["bias"])

        run = jax.jit(jax.value_and_grad(entry))
        expected, got = run(0.5, params, data, v), run(0.5, mesh.params(params), mesh.split(data), mesh.params(v))
        assert relative_error(jnp.stack(got), jnp.stack(expected)) < 2e-6

    @on(("data", EXPLICIT), ("data", AUTO))
    @pytest.mark.parametrize("context", [AUTO, EXPLICIT])
    def test_with_a_mesh_in_force(self, mesh, context, float32):
        params, data = problem(64)
        expected = ij.GGN(helpers.CLASSIFICATION, params, data).mv(params)
        with jax.set_mesh(MESHES["data"](context).mesh):
            op = ij.GGN(helpers.CLASSIFICATION, mesh.params(params), mesh.split(data))
            assert tree_error(op.mv(op.params), expected) < 1e-6

    def test_axes_of_both_types(self, float32):
        params, data = problem(64)
        auto, explicit = MESHES["data"](AUTO), MESHES["data"](EXPLICIT)
        expected = ij.GGN(helpers.CLASSIFICATION, params, data).mv(params)
        op = ij.GGN(helpers.CLASSIFICATION, auto.params(params), explicit.split(data))
        assert tree_error(op.mv(params), expected) < 1e-6

    def test_two_meshes_are_refused(self):
        params, data = problem(64)
        one, other = MESHES["data"](EXPLICIT), MESHES["split params"](EXPLICIT)
        op = ij.GGN(helpers.CLASSIFICATION, other.params(params), one.split(data))
        with pytest.raises(ValueError, match=r"meshes \(data=2, model=4\) and \(data=8, model=1\), expected one"):
            op.mv(params)


class TestShardBatch:
    @on(("data", AUTO), ("data", EXPLICIT))
    def test_pads_with_copies_of_the_last_example(self, mesh):
        batch = {"x": np.arange(1003.0)[:, None], "key": jax.random.split(KEY, 1003), "y": jnp.arange(1003)}
        padded, weights = ij.sharding.shard_batch(batch, mesh.mesh)
        assert len(weights) == 1024
        assert np.array_equal(padded["x"][:, 0], np.minimum(np.arange(1024), 1002))
        assert np.array_equal(padded["y"], np.minimum(np.arange(1024), 1002))
        assert jnp.issubdtype(padded["key"].dtype, jax.dtypes.prng_key)
        assert np.array_equal(weights, np.arange(1024) < 1003)
        assert split_of(weights) == split_of(padded["y"]) == ("data",)

    def test_over_several_axes(self):
        mesh = MESHES["both axes"](AUTO).mesh
        padded, weights = ij.sharding.shard_batch(ij.Batch(np.ones((13, 2))), mesh, ("data", "model"))
        assert len(padded) == len(weights) == 16
        assert split_of(weights) == (("data", "model"),)

    def test_a_batch_that_was_split_is_split_again(self):
        mesh = MESHES["data"](EXPLICIT).mesh
        once, _ = ij.sharding.shard_batch(ij.Batch(np.ones((1000, 2))), mesh)
        twice, weights = ij.sharding.shard_batch(jax.tree.map(lambda x: x[:1000], jax.device_get(once)), mesh)
        assert weights.sum() == 1000
        assert once.x.shape == twice.x.shape == (1024, 2)

    def test_mistakes_are_told(self):
        mesh, batch = MESHES["data"](AUTO).mesh, ij.Batch(np.ones((16, 2)))
        with pytest.raises(TypeError, match=r"mesh: got a list, expected a jax.sharding.Mesh such as jax.make_mesh"):
            ij.sharding.shard_batch(batch, jax.devices())
        for axis in ("batch", ("data", "data"), (), 0):
            with pytest.raises(ValueError, match=r"axis: got .*, expected one of the mesh's axes \['data', 'model'\]"):
                ij.sharding.shard_batch(batch, mesh, axis)
        with pytest.raises(ValueError, match="batch: leaves disagree in length"):
            ij.sharding.shard_batch({"x": np.ones(4), "y": np.ones(5)}, mesh)
        with pytest.raises(TypeError, match="mesh: got a NoneType"):
            ij.sharding.replicate({}, None)


def standardised_model(params, x):
    """Two convolutions with channels last, of which capture does not see the first one's kernel."""
    kernel = params["first"] / jnp.sqrt(jnp.sum(params["first"] ** 2, axis=(0, 1, 2), keepdims=True))
    for weights in (kernel, params["second"]):
        axes = ("NHWC", "HWIO", "NHWC")
        x = jnp.tanh(jax.lax.conv_general_dilated(x, weights, (2, 2), "SAME", dimension_numbers=axes))
    return jnp.mean(x, axis=(0, 1, 2)) @ params["head"]


IMAGES = ij.Objective(lambda params, z: standardised_model(params, z.x[None]), helpers.cross_entropy)


def images():
    keys = jax.random.split(jax.random.key(6), 5)
    shapes = {"first": (3, 3, 2, 4), "second": (3, 3, 4, 4), "head": (4, 3)}
    params = {name: jax.random.normal(keys[i], shapes[name]) for i, name in enumerate(shapes)}
    return params, ij.Batch(jax.random.normal(keys[3], (32, 6, 6, 2)), jax.random.randint(keys[4], (32,), 0, 3))


class TestConvolutions:
    """XLA gets gradients of single examples wrong where it may split convolutions with channels last over devices."""

    @on(*ALL)
    @pytest.mark.parametrize("chunk", [None, 8])
    def test_gradients_of_single_examples(self, mesh, chunk):
        params, data = images()
        got = ij.per_example_grads(IMAGES, mesh.params(params), mesh.split(data), chunk=chunk)
        assert tree_error(got, ij.per_example_grads(IMAGES, params, data)) < 1e-12

    @on(("data", AUTO), ("split params", EXPLICIT))
    def test_whatever_is_made_of_them(self, mesh):
        params, data = images()
        few, v = jax.tree.map(lambda x: x[:3], data), helpers.random_like(jax.random.key(7), params)
        fisher = lambda p, d: ij.EmpiricalFisher(IMAGES, p, d)
        made = [
            lambda p, d: ij.to_dense(fisher(p, d)),
            lambda p, d: ij.invert(fisher(p, d), ij.HarmonicMean(0.1)).mv(v),
            lambda p, d: ij.ekfac(IMAGES, p, d, labels="empirical").mv(v),
            lambda p, d: ij.Influence(IMAGES, p, ij.Identity(p)).influences(few, d),
            lambda p, d: ij.Influence(IMAGES, p, ij.Identity(p)).self_influences(d),
        ]
        for make in made:
            got, expected = make(mesh.params(params), mesh.split(data)), make(params, data)
            pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
            assert all(relative_error(x, y) < 1e-9 for x, y in pairs)

    @on(("data", AUTO), ("split params", EXPLICIT))
    def test_derivatives_through_them(self, mesh):
        params, data = images()

        def length(p, d):
            return jnp.sum(ij.flatten(ij.per_example_grads(IMAGES, p, d), p) ** 2)

        got, expected = (
            jax.jit(jax.grad(length))(*x) for x in ((mesh.params(params), mesh.split(data)), (params, data))
        )
        assert tree_error(got, expected) < 1e-11
