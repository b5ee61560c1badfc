"""Several devices: no device asks for all data, chunks and padding, and convolutions."""

import importlib
import math
import re

import helpers
import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest
from helpers import relative_error, tree_error
from meshes import ALL, AUTO, EXPLICIT, MESHES, SOME, on, problem, split_of

import influence_jax as ij
from influence_jax import gradients, influence as scores
from influence_jax.batching import _fold
from influence_jax.curvature import exact
from influence_jax.sharding import padded_length

kfac = importlib.import_module("influence_jax.curvature.kfac")

mesh = meshes.mesh  # the fixture
KEY = jax.random.key(4)


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
    @on(("data", AUTO), thorough=[("data", EXPLICIT)])
    @pytest.mark.parametrize(("name", "count"), [("product", 2000), *((name, 2048) for name in PROGRAMS)])
    def test_sums_only_where_parameters_are_everywhere(self, mesh, name, count, float32):
        sent = moved(programs(mesh, count)[name]())
        assert {kind for kind, _ in sent} <= {"all-reduce"}
        assert len(sent) == {"product": 1, "products": 1, "scores": 0, "gradients": 0, "ekfac": 2}[name]

    @on(("split params", EXPLICIT), thorough=[("split params", AUTO)])
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

    @on(("data", AUTO), thorough=[("split params", EXPLICIT)])
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


@pytest.mark.as_users
class TestConvolutions:
    """XLA gets gradients of single examples wrong where it may split convolutions with channels last over devices."""

    @on(*SOME, thorough=ALL)
    def test_gradients_of_single_examples(self, mesh):
        self.compare(mesh, None)

    @on(("data", AUTO), thorough=ALL)
    def test_gradients_in_chunks(self, mesh):
        self.compare(mesh, 8)

    def compare(self, mesh, chunk):
        params, data = images()
        got = ij.per_example_grads(IMAGES, mesh.params(params), mesh.split(data), chunk=chunk)
        assert tree_error(got, ij.per_example_grads(IMAGES, params, data)) < 1e-12

    @on(thorough=[("data", AUTO), ("split params", EXPLICIT)])
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

    @on(("data", AUTO), thorough=[("split params", EXPLICIT)])
    def test_derivatives_through_them(self, mesh):
        params, data = images()

        def length(p, d):
            return jnp.sum(ij.flatten(ij.per_example_grads(IMAGES, p, d), p) ** 2)

        got, expected = (
            jax.jit(jax.grad(length))(*x) for x in ((mesh.params(params), mesh.split(data)), (params, data))
        )
        assert tree_error(got, expected) < 1e-11
