"""Random projections: linear, unbiased, the same everywhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from helpers import CLASSIFICATION, mainly, random_batch, random_like, relative_error
from projected import KEY, classifier, of_layers

import influence_jax as ij
from influence_jax.projections import base, gaussian, rademacher, sides, two_sided

PARAMS = {"b": jnp.zeros(3), "w": jnp.zeros((4, 3)), "s": jnp.zeros(())}
ONE_SIDED = [rademacher, gaussian]


def matrix_of(projection, params) -> np.ndarray:
    """The projection of every basis vector, `(P, dim)`."""
    return np.asarray(projection.project(ij.unflatten(jnp.eye(ij.flatten(params, params).size), params)))


@pytest.fixture
def small_blocks(monkeypatch):
    """Leaves of a few entries take several blocks of rows, the last one cut short."""
    monkeypatch.setattr(base, "BLOCK_ENTRIES", 320)
    jax.clear_caches()
    yield
    jax.clear_caches()


class TestOneSided:
    @pytest.mark.parametrize("make", ONE_SIDED)
    def test_is_the_matrix_of_its_basis(self, make, small_blocks):
        projection = make(PARAMS, 64, KEY)
        matrix = matrix_of(projection, PARAMS)
        assert matrix.shape == (16, 64)
        assert len(np.unique(matrix.round(12), axis=0)) == 16  # no two rows share entries, in whichever block
        stack = random_like(KEY, PARAMS, 5)
        assert relative_error(projection.project(stack), ij.flatten(stack, PARAMS) @ matrix) < 1e-12

    def test_signs(self):
        assert np.array_equal(np.unique(matrix_of(rademacher(PARAMS, 16, KEY), PARAMS)), [-0.25, 0.25])

    def test_blocks_are_numbered_rows_of_the_key(self, small_blocks):
        """The definition, written again: entries of leaf l and block b are drawn from the key folded with l and b."""
        expected = []
        for place, rows in enumerate((3, 1, 12)):  # leaves b, s, w; blocks of 320 // 64 rows
            key = jax.random.fold_in(KEY, place)
            for block, start in enumerate(range(0, rows, 5)):
                shape = (min(5, rows - start), 64)
                expected.append(jax.random.normal(jax.random.fold_in(key, block), shape, jnp.float32))
        assert relative_error(matrix_of(gaussian(PARAMS, 64, KEY), PARAMS), np.concatenate(expected) / 8) < 1e-7

    def test_a_leaf_of_many_blocks(self):
        """Blocks as long as they are in use; the matrix has a million rows, and is nowhere."""
        params = {"w": jnp.zeros((1_200, 1_000))}
        projection = rademacher(params, 16, KEY)
        ones = jax.tree.map(lambda x: jnp.zeros((3, *x.shape)), params)
        places = [0, base.BLOCK_ENTRIES // 16, 1_199_999]
        picked = ones["w"].reshape(3, -1).at[jnp.arange(3), jnp.array(places)].set(1).reshape(3, 1_200, 1_000)
        rows = projection.project({"w": picked})
        for row, place in zip(rows, places, strict=True):
            block, within = divmod(place, base.BLOCK_ENTRIES // 16)
            words = jax.random.bits(jax.random.fold_in(jax.random.fold_in(KEY, 0), block), (within + 1, 1), jnp.uint32)
            bits = (int(words[within, 0]) >> np.arange(16)) & 1
            assert np.array_equal(np.asarray(row) * 4, 1 - 2 * bits)

    @pytest.mark.parametrize(("make", "fourth"), [(rademacher, 2), (gaussian, 0)])
    def test_inner_products_are_unbiased_with_the_variance_stated(self, make, fourth):
        dim, keys = 16, 4_000
        pair = random_like(jax.random.key(5), PARAMS, 2)
        a, b = np.asarray(ij.flatten(pair, PARAMS))
        project = jax.jit(jax.vmap(lambda key: make(PARAMS, dim, key).of_stack(pair)))
        projected = np.asarray(project(jax.random.split(KEY, keys)))
        products = np.sum(projected[:, 0] * projected[:, 1], axis=1)
        variance = (a @ a * (b @ b) + (a @ b) ** 2 - fourth * np.sum(a**2 * b**2)) / dim
        assert abs(products.mean() - a @ b) < 4 * np.sqrt(variance / keys)
        assert abs(products.var() / variance - 1) < 0.1

    @pytest.mark.parametrize("make", ONE_SIDED)
    def test_of_gradients(self, make):
        params, data = classifier()
        projection = make(params, 10, KEY)
        expected = projection.project(ij.per_example_grads(CLASSIFICATION, params, data))
        for chunk in (5, 11):
            assert relative_error(projection.project_grads(CLASSIFICATION, params, data, chunk=chunk), expected) < 1e-12

    def test_memory_is_flat_in_the_examples(self):
        params, _ = classifier()
        data = random_batch(KEY, 4_096, 6, 4, classes=True)
        projection = rademacher(params, 4, KEY)
        program = base._project_grads.lower(projection, ij.objective.as_objective(CLASSIFICATION), params, data, 8)
        assert program.compile().memory_analysis().temp_size_in_bytes < 4_096 * 59 * 8 / 4  # all gradients are 59 wide


class TestTwoSided:
    def test_is_the_kronecker_product_of_its_sides(self):
        """A bias is one more input; a side that is no longer than asked for is kept."""
        params, data = classifier()
        case = zoo.Case(CLASSIFICATION, params, data)
        projection = of_layers(case, (3, 4))
        assert projection.dim == 2 * 3 * 4
        assert projection.widths == (12, 12)
        pairs = [projection._sides(place) for place in (0, 1)]
        assert [[side if side is None else side.shape for side in pair] for pair in pairs] == [
            [(1, 7, 3), (1, 5, 4)],
            [(1, 6, 3), None],
        ]
        grads = ij.per_example_grads(CLASSIFICATION, params, data)
        expected = []
        for (left, right), name in zip(pairs, sorted(params), strict=True):
            whole = np.concatenate([grads[name]["kernel"], grads[name]["bias"][:, None]], axis=1)
            right = np.eye(4) if right is None else np.asarray(right[0])
            assert np.array_equal(np.unique(np.abs(np.asarray(left))), np.float32([1 / np.sqrt(3)]))
            expected.append(whole.reshape(len(whole), -1) @ np.kron(np.asarray(left[0]), right))
        assert relative_error(projection.project(grads), np.concatenate(expected, axis=1)) < 1e-7

    @pytest.mark.parametrize("name", zoo.compiled(mainly(["conv 2-D groups 2 dilated", "rotary", "looped"], "rotary")))
    def test_of_gradients(self, name):
        """Look-ups, convolutions, scans, tied and cut leaves: from captured factors as from gradients."""
        case = zoo.ZOO[name]()
        projection = of_layers(case, (2, 3))
        assert sum(projection.widths) == projection.dim
        expected = projection.project(ij.per_example_grads(case.objective, case.params, case.data))
        got = projection.project_grads(case.objective, case.params, case.data, chunk=2)
        assert relative_error(got, expected) < 1e-12

    def test_long_sides_keep_everything(self):
        case = zoo.ZOO["odd"]()
        projection = of_layers(case, 100)
        matrix = matrix_of(projection, case.params)
        assert relative_error(matrix @ matrix.T, np.eye(len(matrix))) < 1e-12

    def test_leaves_that_are_no_matrix(self):
        """Kept as long as they are no longer than a projected layer, and as long as one beyond."""
        predict = lambda p, z: jnp.tanh(z.x * p["long"] + jnp.sum(p["short"] ** 2)) @ p["kernel"]
        params = {"long": jnp.ones(50), "short": jnp.ones(6), "kernel": zoo.normal(50, 4)}
        case = zoo.plain(predict, params, zoo.classified(50))
        projection = of_layers(case, (3, 2))
        assert projection.dim == 6 + 6 + 3 * 2
        assert not np.array_equal(
            projection.project(jax.tree.map(lambda x: x[None], params)), np.zeros((1, projection.dim))
        )
        short = projection.project({**jax.tree.map(lambda x: jnp.zeros((6, *x.shape)), params), "short": jnp.eye(6)})
        assert np.array_equal(short[:, projection.dim - 6 :], np.eye(6))

    @pytest.mark.parametrize("kind", mainly(base.KINDS, base.KINDS[0]))
    def test_inner_products_are_unbiased_whatever_the_shapes(self, kind):
        """Each layer's part has the inner product of that layer on average: none counts more for its shape."""
        case = zoo.ZOO["odd"]()
        pair = random_like(jax.random.key(5), case.params, 2)
        one, keys = of_layers(case, 2, kind=kind), jax.random.split(KEY, 3_000)
        structure = jax.tree.structure(one)
        project = jax.jit(jax.vmap(lambda key: structure.unflatten([key]).of_stack(pair)))
        projected = np.asarray(project(keys))
        assert relative_error(projected[7], of_layers(case, 2, keys[7], kind=kind).project(pair)) < 1e-6
        parts = np.split(projected[:, 0] * projected[:, 1], np.cumsum(one.widths)[:-1], axis=1)
        products = np.stack([part.sum(1) for part in parts], axis=1)
        leaves = dict(ij.tree.named_leaves(pair))
        expected = np.concatenate([np.sum(np.prod(layer.matrix(leaves), axis=0), axis=(1, 2)) for layer in one.layers])
        assert products.shape == (3_000, len(expected))
        assert np.all(np.abs(products.mean(0) - expected) < 4.5 * products.std(0) / np.sqrt(len(keys)) + 1e-6)

    def test_of_another_function_of_the_same_parameters(self):
        """A query's measurement, in which layers are found elsewhere or not at all, goes through the same map."""
        params, data = classifier()
        projection = of_layers(zoo.Case(CLASSIFICATION, params, data), 2)
        measurement = lambda p, z: jnp.sum(p["layer0"]["kernel"] ** 2) * z.x[0] + p["layer1"]["bias"][0]
        expected = projection.project(ij.per_example_grads(measurement, params, data))
        assert relative_error(projection.project_grads(measurement, params, data), expected) < 1e-12

    def test_many_positions_and_few_take_the_cheaper_way(self):
        """Gradients of a layer are formed where positions are many and sides long, and not otherwise."""
        params = {"w": zoo.normal(8, 8)}
        loss = lambda p, z: jnp.sum(jnp.tanh(z @ p["w"]) ** 2)
        for positions, side, formed in ((64, 7, True), (64, 2, False), (1, 7, False)):
            example = zoo.normal(positions, 8)
            plan, layers = sides.arrange(loss, params, example)
            projection = two_sided(loss, params, example, side, KEY)
            assert sides._forming_is_less(plan, layers[0], *projection._sides(0)) == formed
            data = zoo.normal(3, positions, 8)
            expected = projection.project(ij.per_example_grads(loss, params, data))
            assert relative_error(projection.project_grads(loss, params, data), expected) < 1e-7


def every_kind(params, data):
    case = zoo.Case(CLASSIFICATION, params, data)
    return [rademacher(params, 16, KEY), gaussian(params, 16, KEY), of_layers(case, 2), of_layers(case, (2, 50))]


class TestTheSameEverywhere:
    def test_on_eight_devices(self, small_blocks):
        params, data = classifier(16)
        mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        place = lambda tree: jax.device_put(tree, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
        grads = ij.per_example_grads(CLASSIFICATION, params, data)
        for projection in every_kind(params, data)[::2]:
            expected = projection.project(grads)
            assert relative_error(projection.project(place(grads)), expected) < 1e-12
            spread = projection.project_grads(CLASSIFICATION, params, place(data), chunk=8)
            assert relative_error(spread, expected) < 1e-7
        across = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "data"))
        wide = random_like(KEY, {"w": jnp.zeros(64)}, 2)  # parameters on several devices
        projection = rademacher({"w": wide["w"][0]}, 8, KEY)
        assert relative_error(projection.project(jax.device_put(wide, across)), projection.project(wide)) < 1e-12

    @pytest.mark.parametrize("number", mainly([1, 2], 2))
    def test_in_single_precision(self, number):
        params, data = classifier()
        grads = ij.per_example_grads(CLASSIFICATION, params, data)
        wide = every_kind(params, data)[number]
        expected, manifest = np.asarray(wide.project(grads)), wide.manifest()
        with jax.enable_x64(False):
            narrow = lambda tree: jax.tree.map(
                lambda x: jnp.asarray(np.asarray(x, np.float32) if x.dtype == np.float64 else np.asarray(x)), tree
            )
            params, data = narrow(params), narrow(data)
            projection = every_kind(params, data)[number]
            assert projection.manifest() == manifest
            got = projection.project(narrow(grads))
            assert got.dtype == jnp.float32
            assert relative_error(got, expected) < 1e-6
            of_batch = projection.project_grads(CLASSIFICATION, params, data, chunk=5)
            assert of_batch.dtype == jnp.float32
            assert relative_error(of_batch, expected) < 1e-5

    def test_narrow_vectors_are_summed_wide(self):
        stack = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_like(KEY, PARAMS, 4))
        projection = rademacher(PARAMS, 8, KEY)
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), stack)
        assert np.array_equal(projection.project(stack), projection.project(wide))

    def test_one_program_for_all_keys(self, compilations):
        stack = random_like(KEY, PARAMS, 4)
        rademacher(PARAMS, 8, jax.random.key(0)).project(stack)
        another = rademacher(PARAMS, 8, jax.random.key(1))
        with compilations() as names:
            another.project(stack)
        assert names == []

    def test_manifests_tell_projections_apart(self):
        params, data = classifier()
        kinds = [
            *every_kind(params, data),
            rademacher(params, 17, KEY),
            rademacher(params, 16, jax.random.key(4)),
            rademacher({**params, "more": jnp.ones(1)}, 16, KEY),
        ]
        manifests = [repr(projection.manifest()) for projection in kinds]
        assert len(set(manifests)) == len(manifests)
        assert rademacher(params, 16, jax.random.PRNGKey(3)).manifest() == kinds[0].manifest()


class TestMistakes:
    def test_with_projections_in_words(self):
        params, data = classifier()
        example = jax.tree.map(lambda x: x[0], data)
        with pytest.raises(ValueError, match=r"key: a projection draws its entries from it; got None"):
            rademacher(PARAMS, 8, None)
        with pytest.raises(ValueError, match=r"key: got one of rbg, .*expected a threefry key"):
            gaussian(PARAMS, 8, jax.random.key(0, impl="rbg"))
        with pytest.raises(ValueError, match="dim: got 0"):
            rademacher(PARAMS, 0, KEY)
        with pytest.raises(TypeError, match=r"dim: got 8\.0"):
            gaussian(PARAMS, 8.0, KEY)
        with pytest.raises(TypeError, match="params: leaf 'w' is int"):
            rademacher({"w": jnp.arange(3)}, 8, KEY)
        with pytest.raises(ValueError, match="sides: got -1"):
            two_sided(CLASSIFICATION, params, example, (4, -1), KEY)
        with pytest.raises(ValueError, match=r"sides: got \(1, 2, 3\), expected one length, or a pair"):
            two_sided(CLASSIFICATION, params, example, (1, 2, 3), KEY)
        with pytest.raises(ValueError, match="kind: got 'sparse', expected one of"):
            two_sided(CLASSIFICATION, params, example, 4, KEY, kind="sparse")
        projection = rademacher(PARAMS, 8, KEY)
        with pytest.raises(ValueError, match=r"stack: .*flat array"):
            projection.project(jnp.ones((2, 16)))
        with pytest.raises(ValueError, match="params, against the space of the projection: its leaves differ"):
            projection.project_grads(CLASSIFICATION, params, data)
