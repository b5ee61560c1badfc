"""Random projections: linear, unbiased, the same everywhere; stores of projected gradients."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from helpers import CLASSIFICATION, random_batch, random_like, random_mlp, relative_error

import influence_jax as ij
from influence_jax.projections import base, gaussian, rademacher, sides, two_sided
from influence_jax.store.files import fingerprint
from influence_jax.store.gradients import GradientStore

KEY = jax.random.key(3)
PARAMS = {"b": jnp.zeros(3), "w": jnp.zeros((4, 3)), "s": jnp.zeros(())}
ONE_SIDED = [rademacher, gaussian]


def of_layers(case: zoo.Case, sides, key=KEY, **options):
    return two_sided(case.objective, case.params, jax.tree.map(lambda x: x[0], case.data), sides, key, **options)


def matrix_of(projection, params) -> np.ndarray:
    """The projection of every basis vector, `(P, dim)`."""
    return np.asarray(projection.project(ij.unflatten(jnp.eye(ij.flatten(params, params).size), params)))


def classifier(examples: int = 11):
    params = random_mlp(jax.random.key(0), (6, 5, 4))
    return params, random_batch(jax.random.key(1), examples, 6, 4, classes=True)


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

    @pytest.mark.parametrize("name", ["conv 2-D groups 2 dilated", "rotary", "looped"])
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

    @pytest.mark.parametrize("kind", base.KINDS)
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

    @pytest.mark.parametrize("number", [1, 2])
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


def fill(path, projection, rows, *, params="none", train_rows=4, dtype=None, only=None):
    """Write rows to a store as a host loop would, and finish it unless only some blocks are wanted."""
    rows = np.asarray(rows).astype(jnp.dtype(dtype or rows.dtype))
    with GradientStore.create(path) as store:
        store.begin({"params": params}, projection=projection, train_rows=train_rows, dtype=rows.dtype)
        for block, start in enumerate(range(0, len(rows), train_rows)):
            if (only is None or block in only) and store.finished(block) != f"batch {block}":
                store.write(block, rows[start : start + train_rows], data=f"batch {block}")
        if only is None:
            store.finish(len(rows))
    return GradientStore.open(path)


@pytest.fixture
def stored(tmp_path):
    """A classifier, projected gradients of its 11 examples, and where to store them."""
    params, data = classifier(11)
    projection = rademacher(params, 16, KEY)
    return params, data, projection, projection.project_grads(CLASSIFICATION, params, data), tmp_path / "gradients"


class TestScoresFromAStore:
    @pytest.mark.parametrize(("dtype", "rounding"), [("float64", 1e-15), ("float32", 1e-6), ("bfloat16", 2e-2)])
    @pytest.mark.parametrize("train_rows", [4, 11, 20])
    def test_are_inner_products(self, stored, dtype, rounding, train_rows):
        params, _, projection, rows, path = stored
        store = fill(path, projection, rows, dtype=dtype, train_rows=train_rows)
        vectors = random_like(KEY, params, 3)
        scores = store.scores(vectors, projection)
        expected = np.asarray(projection.project(vectors)) @ np.asarray(rows).T
        assert relative_error(scores, expected) < 10 * rounding
        held = np.asarray(store).astype(np.float64)
        assert relative_error(held, rows) < rounding
        assert relative_error(scores, np.asarray(projection.project(vectors)) @ held.T) < 1e-12
        top = store.top_k(vectors, projection, 5)
        assert np.array_equal(top.indices, np.argsort(-scores, axis=1, kind="stable")[:, :5])
        assert np.array_equal(top.values, np.take_along_axis(scores, top.indices, axis=1))

    def test_in_single_precision(self, stored, float32):
        params, data = jax.tree.map(lambda x: np.float32(x) if x.dtype == np.float64 else np.asarray(x), stored[:2])
        projection = rademacher(params, 16, KEY)
        rows = projection.project_grads(CLASSIFICATION, params, data)
        store = fill(stored[4], projection, rows)
        scores = store.scores(ij.per_example_grads(CLASSIFICATION, params, data), projection, params=None)
        assert scores.dtype == np.float32
        assert relative_error(scores, np.float64(rows) @ np.float64(rows).T) < 1e-6
        inverse = store.inverse(1e-3)
        solved = inverse(rows)
        assert solved.dtype == jnp.float32
        moment = np.float64(rows).T @ np.float64(rows) / 11 + 1e-3 * np.eye(16)
        assert relative_error(solved, np.linalg.solve(moment, np.float64(rows).T).T) < 1e-3  # condition times rounding

    def test_ties_go_to_the_lower_index(self, stored):
        *_, projection, rows, path = stored
        store = fill(path, projection, jnp.ones_like(rows), train_rows=2)
        assert store.top_k(jnp.ones((1, 16)), None, 11).indices.tolist() == [list(range(11))]

    def test_through_an_orthogonal_map_are_influences(self, stored):
        """Long sides keep every entry, so scores are exact: of factors, of gradients, through a kernel, by layer."""
        params, data, *_, path = stored
        projection = of_layers(zoo.Case(CLASSIFICATION, params, data), 100)
        store = fill(path, projection, projection.project_grads(CLASSIFICATION, params, data))
        query = jax.tree.map(lambda x: x[:3], data)
        grads = ij.per_example_grads(CLASSIFICATION, params, query)
        fisher = ij.EmpiricalFisher(CLASSIFICATION, params, data)
        through = lambda inverse: ij.Influence(CLASSIFICATION, params, inverse)
        exact = through(ij.invert(fisher, ij.Direct(1e-2)))
        expected = exact.influences(query, data)
        assert relative_error(store.scores(exact.influence_factors(query), projection), expected) < 1e-10
        similar = through(ij.Identity(params)).influences(query, data)
        assert relative_error(store.scores(grads, projection), similar) < 1e-12
        inverse = store.inverse(0.3)
        assert (
            relative_error(store.scores(inverse.with_damping(1e-2)(store.project(grads, projection))), expected) < 1e-10
        )
        by_layer = through(ij.invert(fisher, ij.Blockwise(ij.Direct(1e-2), ij.by_layer))).influences(query, data)
        blocks = store.inverse(1e-2, by_layer=True)
        assert repr(blocks) == "ProjectedInverse(35 + 24, 11 examples, damping=0.01)"
        assert relative_error(store.scores(blocks(store.project(grads, projection))), by_layer) < 1e-10
        assert relative_error(by_layer, expected) > 1e-2

    def test_singular_systems_are_named(self, stored):
        *_, projection, rows, path = stored
        store = fill(path, projection, rows)
        with pytest.raises(ValueError, match=r"damping: with 0 the projected Fisher .* singular \(16 x 16 from 11 "):
            store.inverse(0)
        with pytest.raises(ValueError, match=r"damping: with 1e-18 .* singular .*raise the damping, e.g. to"):
            store.inverse(1e-18)
        with pytest.raises(ValueError, match="damping: got -1"):
            store.inverse(1.0).with_damping(-1)
        with pytest.raises(TypeError, match="damping: got None, expected a number"):
            store.inverse(None)
        few = rademacher(stored[0], 5, KEY)
        store = fill(path.parent / "few", few, rows[:, :5])
        moment = np.asarray(rows[:, :5].T @ rows[:, :5]) / 11
        assert relative_error(store.inverse(0)(jnp.eye(5)), np.linalg.inv(moment)) < 1e-10
        with pytest.raises(ValueError, match="every gradient in it is zero"):
            fill(path.parent / "zero", few, jnp.zeros((11, 5))).inverse(0)


class TestStoresContinueAndFindDamage:
    def test_on_disk_as_zarr(self, stored):
        *_, projection, rows, path = stored
        fill(path, projection, rows, dtype="float32")
        group = json.loads((path / "zarr.json").read_text())
        assert (group["zarr_format"], group["node_type"]) == (3, "group")
        array = json.loads((path / "gradients" / "zarr.json").read_text())
        assert array["shape"] == [11, 16]
        assert array["dimension_names"] == ["train", "projected"]
        assert array["chunk_grid"]["configuration"]["chunk_shape"] == [4, 16]
        assert [codec["name"] for codec in array["codecs"]] == ["bytes", "crc32c"]

    def test_continued(self, stored):
        """What is finished is not computed again; a store that is not complete says so."""
        *_, projection, rows, path = stored
        store = fill(path, projection, rows, only=[0, 2])
        assert not store.complete
        assert repr(store).endswith("11 x 16 float64, 2 of 3 chunks so far)")
        with pytest.raises(ValueError, match="gradients/c/1/0: this chunk is not finished; run the same command again"):
            np.asarray(store)
        with GradientStore.create(path) as store:
            store.begin({"params": "none"}, projection=projection, train_rows=4, dtype="float64")
            assert [store.finished(block) for block in range(4)] == ["batch 0", None, "batch 2", None]
            with pytest.raises(ValueError, match=r"examples: got 11, .* lack \[\(1, 0\)\]"):
                store.finish(11)
        store = fill(path, projection, rows)
        assert store.complete
        assert np.array_equal(store, rows)
        assert np.array_equal(fill(path, projection, rows), rows)  # nothing to do

    @pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "another", "description"])
    def test_damage_is_refused_and_repaired(self, stored, damage):
        *_, projection, rows, path = stored
        fill(path, projection, rows)
        file = path / "gradients" / "c" / "1" / "0"
        content = bytearray(file.read_bytes())
        content[7] ^= 4
        if damage == "gone":
            file.unlink()
        elif damage == "description":
            (path / "gradients" / "zarr.json").write_text("{}")
        else:
            other = (path / "gradients" / "c" / "0" / "0").read_bytes()
            file.write_bytes({"flipped": bytes(content), "cut": content[:-9], "another": other}[damage])
        with pytest.raises(ValueError, match=r"missing|damaged|holds other gradients"):
            GradientStore.open(path).scores(jnp.ones((1, 16)))
        with GradientStore.create(path) as store:
            store.begin({"params": "none"}, projection=projection, train_rows=4, dtype="float64")
            assert (store.finished(1) is None) == (damage != "description")
            assert store.finished(0) == "batch 0"
        assert np.array_equal(fill(path, projection, rows), rows)

    def test_an_interrupted_ledger(self, stored):
        *_, projection, rows, path = stored
        fill(path, projection, rows)
        ledger = path / "ledger-0.jsonl"
        ledger.write_bytes(ledger.read_bytes()[:-5])
        with pytest.raises(ValueError, match="gradients/c/2/0: this chunk is not finished"):
            np.asarray(GradientStore.open(path))
        assert np.array_equal(fill(path, projection, rows), rows)

    def test_one_writer_at_a_time_and_several_processes(self, stored):
        *_, projection, rows, path = stored
        rows = np.asarray(rows)
        begin = lambda store, process: store.begin(
            {}, projection=projection, train_rows=4, dtype="float64", process=process
        )
        with GradientStore.create(path) as first, GradientStore.create(path) as second:
            begin(first, 0)
            with pytest.raises(BlockingIOError, match="is being written by"):
                begin(GradientStore.create(path), 0)
            begin(second, 1)
            second.write(1, rows[4:8], data="b")
            first.write(0, rows[:4], data="a")
            second.write(2, rows[8:], data="c")
            first.finish(11)
        assert np.array_equal(GradientStore.open(path), rows)

    def test_other_computations_are_refused(self, stored):
        params, _, projection, rows, path = stored
        fill(path, projection, rows, params=fingerprint(params))
        with pytest.raises(ValueError, match=r'another computation .*params: .* in the store, "other" now'):
            fill(path, projection, rows, params="other")
        with pytest.raises(ValueError, match="train_rows: 4 in the store, 5 now"):
            fill(path, projection, rows, params=fingerprint(params), train_rows=5)
        store, vectors = GradientStore.open(path), jax.tree.map(lambda x: x[None], params)
        store.scores(vectors, projection, params=params)
        moved = jax.tree.map(lambda x: x + 1, params)
        with pytest.raises(ValueError, match=r"gradients at other parameters or of another projection \(params: "):
            store.scores(vectors, projection, params=moved)
        for other, what in [
            (rademacher(params, 16, jax.random.key(4)), "projection key: "),
            (rademacher(params, 8, KEY), "projection dim: 16 in the store, 8 given"),
            (gaussian(params, 16, KEY), 'projection kind: "rademacher" in the store, "gaussian" given'),
        ]:
            with pytest.raises(ValueError, match=f"of another projection .*{what}"):
                store.top_k(vectors, other, 1)
        with pytest.raises(ValueError, match=r"holds gradients of another computation .*projection key"):
            fill(path, rademacher(params, 16, jax.random.key(4)), rows, params=fingerprint(params))


class TestMistakes:
    def test_with_stores_in_words(self, stored):
        params, _, projection, rows, path = stored
        store, rows = GradientStore.create(path), np.asarray(rows)
        with pytest.raises(ValueError, match="nothing is written yet"):
            store.scores(jnp.ones((1, 16)))
        with pytest.raises(ValueError, match=r"is not being written; give GradientStore.create\(path\)"):
            store.write(0, rows[:4], data="")
        with pytest.raises(TypeError, match="dtype: got int32"):
            store.begin({}, projection=projection, train_rows=4, dtype="int32")
        with pytest.raises(TypeError, match="projection: got a NoneType, expected a projection"):
            store.begin({}, projection=None, train_rows=4, dtype="float64")
        with store:
            store.begin({}, projection=projection, train_rows=4, dtype="float64")
            with pytest.raises(ValueError, match="holds no gradients yet"):
                store.inverse(1.0)
            for wrong in (rows[:5], rows[:0], rows[:4, :3], np.float32(rows[:4]), rows[0]):
                with pytest.raises(ValueError, match=r"gradients: got .* for chunk \(0, 0\), expected float64"):
                    store.write(0, wrong, data="")
            with pytest.raises(ValueError, match="gradient of training example 6 is NaN or infinite in float64"):
                store.write(1, np.where(np.arange(4)[:, None] == 2, np.inf, rows[:4]), data="")
            store.write(0, rows[:4], data="")
        with pytest.raises(ValueError, match="k: got 5, expected between 1 and 4"):
            store.top_k(rows, None, 5)
        with pytest.raises(ValueError, match=r"vectors: got dict without a projection, expected .* \(Q, 16\)"):
            store.scores(params)
        with pytest.raises(ValueError, match="vectors: got shape"):
            store.inverse(1.0)(jnp.ones(16))
        with pytest.raises(FileNotFoundError, match="there is no manifest of a store of gradients"):
            GradientStore.open(path.parent / "nothing")
        (path.parent / "file").write_text("")
        with pytest.raises(ValueError, match="is a file, expected a folder for a store of gradients"):
            GradientStore.create(path.parent / "file")
        with pytest.raises(
            ValueError, match=r"is a folder with .* in it and without the manifest of a store of gradients"
        ):
            GradientStore.create(path.parent)

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
