"""Retraining on subsets: masks, many trainings in a program, on several devices, and interrupted at any moment."""

import contextlib
import functools
import itertools
import logging
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import normal, random_batch, relative_error
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import influence_jax as ij
from influence_jax import _runs
from influence_jax._pytree import dataclass, static
from influence_jax.retrain import leave_k_out, leave_one_out, retrain, subsets
from influence_jax.store import OutcomeStore, ScoreStore, arrays

EXAMPLES, INPUTS, CLASSES, STEPS, RATE = 24, 4, 3, 12, 0.5
DATA = random_batch(jax.random.key(1), EXAMPLES, INPUTS, CLASSES, classes=True)
QUERY = random_batch(jax.random.key(2), 5, INPUTS, CLASSES, classes=True)
KEYS = jax.random.split(jax.random.key(3), 2)
MASKS = subsets(EXAMPLES, 0.5, 9, jax.random.key(4))
WAYS = ("each", "map", "vmap")


def descended(x, y, weights, key, steps=STEPS):
    """Softmax regression by gradient descent, from a start drawn with the key."""
    start = 0.1 * jax.random.normal(key, (INPUTS, CLASSES), weights.dtype)

    def loss(kernel):
        logits = x @ kernel
        losses = jax.nn.logsumexp(logits, axis=1) - jnp.take_along_axis(logits, y[:, None], axis=1)[:, 0]
        return weights @ losses / jnp.sum(weights)

    step = lambda kernel, _: (kernel - RATE * jax.grad(loss)(kernel), None)
    return {"kernel": jax.lax.scan(step, start, None, length=steps)[0]}


@dataclass
class Descent:
    """A training that is a tree, with its data as leaves."""

    x: jax.Array
    y: jax.Array
    steps: int = static(default=STEPS)

    def __call__(self, weights, key):
        return descended(self.x, self.y, weights, key, self.steps)


def losses(query, params):
    logits = query.x @ params["kernel"]
    return jax.nn.logsumexp(logits, axis=1) - jnp.take_along_axis(logits, query.y[:, None], axis=1)[:, 0]


TRAIN = Descent(jnp.asarray(DATA.x), jnp.asarray(DATA.y))
MEASURE = jax.tree_util.Partial(losses, jax.tree.map(jnp.asarray, QUERY))
quietly = functools.partial(retrain, progress=False)


def on_subset(mask, key):
    """The same training in numpy, on the examples of the subset alone."""
    x, y = DATA.x[mask], DATA.y[mask]
    kernel = 0.1 * normal(key, (INPUTS, CLASSES))
    for _ in range(STEPS):
        logits = x @ kernel
        odds = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        kernel = kernel - RATE * x.T @ (odds - np.eye(CLASSES)[y]) / len(x)
    return kernel


@functools.cache
def expected():
    kernels = np.asarray([[on_subset(mask, key) for key in KEYS] for mask in MASKS])
    logits = QUERY.x @ kernels
    own = np.take_along_axis(logits, np.broadcast_to(QUERY.y[:, None], (*logits.shape[:-1], 1)), axis=-1)
    return kernels, np.log(np.exp(logits).sum(axis=-1)) - own[..., 0]


@pytest.fixture
def computed(monkeypatch):
    """Groups that are computed, and by which way."""
    seen, compute = [], _runs.Runs.compute

    def spy(self, number, way):
        seen.append((number, way))
        return compute(self, number, way)

    monkeypatch.setattr(_runs.Runs, "compute", spy)
    return seen


class TestMasks:
    @pytest.mark.parametrize(("fraction", "kept"), [(0.5, 12), (0.1, 2), (1, 24), (np.float32(0.9), 22)])
    def test_subsets_have_exactly_so_many(self, fraction, kept):
        masks = subsets(EXAMPLES, fraction, 30, jax.random.key(0))
        assert (masks.shape, masks.dtype) == ((30, EXAMPLES), np.bool_)
        assert (masks.sum(axis=1) == kept).all()

    def test_more_subsets_keep_the_earlier_ones(self):
        few, many = (subsets(EXAMPLES, 0.5, count, jax.random.key(0)) for count in (7, 50))
        np.testing.assert_array_equal(few, many[:7])
        assert len(np.unique(many, axis=0)) == 50
        assert not (subsets(EXAMPLES, 0.5, 7, jax.random.key(1)) == few).all(axis=1).any()

    def test_examples_are_kept_alike_often_and_independently(self):
        """Frequencies, and those of pairs, within five standard deviations of what they are on average."""
        masks = subsets(10, 0.3, 2000, jax.random.key(0)).astype(float)
        pairs = masks.T @ masks / 2000
        assert np.abs(np.diagonal(pairs) - 0.3).max() < 5 * np.sqrt(0.3 * 0.7 / 2000)
        together = 3 * 2 / (10 * 9)
        assert np.abs(pairs[~np.eye(10, dtype=bool)] - together).max() < 5 * np.sqrt(together / 2000)

    def test_64_bit_mode_changes_no_mask(self):
        with jax.enable_x64(False):
            narrow = subsets(EXAMPLES, 0.5, 9, jax.random.key(4))
        np.testing.assert_array_equal(narrow, MASKS)

    def test_leave_one_out(self):
        np.testing.assert_array_equal(leave_one_out(5), ~np.eye(5, dtype=bool))
        np.testing.assert_array_equal(leave_one_out(5, [3, 0]), ~np.eye(5, dtype=bool)[[3, 0]])

    def test_leave_k_out(self):
        masks = leave_k_out(EXAMPLES, 5, 20, jax.random.key(0))
        assert ((~masks).sum(axis=1) == 5).all()
        np.testing.assert_array_equal(masks[:4], leave_k_out(EXAMPLES, 5, 4, jax.random.key(0)))

    @pytest.mark.parametrize(
        ("make", "error", "told"),
        [
            (lambda key: subsets(0, 0.5, 3, key), ValueError, "n: got 0"),
            (lambda key: subsets(9.0, 0.5, 3, key), TypeError, "n: got 9.0"),
            (lambda key: subsets(9, 0, 3, key), ValueError, "fraction: got 0 of 9 examples"),
            (lambda key: subsets(9, 0.01, 3, key), ValueError, "expected at least one of them"),
            (lambda key: subsets(9, 1.5, 3, key), ValueError, "fraction: got 1.5"),
            (lambda key: subsets(9, float("nan"), 3, key), ValueError, "fraction: got nan"),
            (lambda key: subsets(9, "half", 3, key), TypeError, "fraction: got 'half'"),
            (lambda key: subsets(9, 0.5, 0, key), ValueError, "count: got 0"),
            (lambda key: subsets(9, 0.5, 3, None), ValueError, "key: masks are drawn at random"),
            (lambda key: subsets(9, 0.5, 3, 17), TypeError, "expected one random key"),
            (lambda key: leave_k_out(9, 9, 3, key), ValueError, "k: got 9, expected less than the 9"),
            (lambda key: leave_k_out(9, 0, 3, key), ValueError, "k: got 0"),
            (lambda key: leave_one_out(1), ValueError, "something is left"),
            (lambda key: leave_one_out(9, [9]), ValueError, "from 0 to 8"),
            (lambda key: leave_one_out(9, [-1]), ValueError, "from 0 to 8"),
            (lambda key: leave_one_out(9, []), TypeError, "expected ints"),
            (lambda key: leave_one_out(9, np.ones(9, bool)), TypeError, r"numpy\.flatnonzero"),
        ],
    )
    def test_masks_of_no_sense(self, make, error, told):
        with pytest.raises(error, match=told):
            make(jax.random.key(0))


class TestRetraining:
    @pytest.mark.parametrize("how", WAYS)
    @pytest.mark.parametrize("group", [1, 5, 18, 100])
    def test_equals_training_on_each_subset_alone(self, how, group):
        """Whatever the group, of which the last is ragged."""
        got = quietly(TRAIN, MASKS, KEYS, MEASURE, how=how, group=group)
        assert isinstance(got, np.ndarray)
        assert got.shape == (9, 2, 5)
        assert relative_error(got, expected()[1]) < 1e-12

    def test_ways_differ_where_models_do(self):
        """The reference is no constant: masks and keys matter."""
        kernels, outcomes = expected()
        assert np.std(outcomes, axis=0).min() > 1e-3
        assert np.abs(kernels[:, 0] - kernels[:, 1]).max() > 1e-2

    def test_one_key_has_no_axis(self):
        got = quietly(TRAIN, MASKS, KEYS[1], MEASURE)
        assert relative_error(got, expected()[1][:, 1]) < 1e-12

    def test_keys_of_either_kind(self):
        got = quietly(TRAIN, MASKS, jax.random.key_data(KEYS), MEASURE)
        assert relative_error(got, expected()[1]) < 1e-12
        one = quietly(TRAIN, MASKS, jax.random.key_data(KEYS)[0], MEASURE)
        assert relative_error(one, expected()[1][:, 0]) < 1e-12

    def test_without_a_measure_the_parameters(self):
        got = quietly(TRAIN, MASKS, KEYS)
        assert set(got) == {"kernel"}
        assert relative_error(got["kernel"], expected()[0]) < 1e-12

    def test_measures_of_any_shape(self):
        measure = lambda params: (jnp.sum(params["kernel"]), {"first": params["kernel"][0], "rows": INPUTS})
        total, rest = quietly(TRAIN, MASKS, KEYS, measure)
        assert relative_error(total, expected()[0].sum(axis=(2, 3))) < 1e-11
        assert relative_error(rest["first"], expected()[0][:, :, 0]) < 1e-12
        assert (rest["rows"] == INPUTS).all()
        assert rest["rows"].shape == (9, 2)

    @pytest.mark.parametrize("kind", ["partial", "tree partial", "closure", "jitted"])
    def test_functions_of_any_kind(self, kind):
        x, y = jnp.asarray(DATA.x), jnp.asarray(DATA.y)
        train_fn = {
            "partial": functools.partial(descended, DATA.x, DATA.y, steps=STEPS),  # numpy's
            "tree partial": jax.tree_util.Partial(descended, x, y),
            "closure": lambda weights, key: descended(x, y, weights, key),
            "jitted": jax.jit(lambda weights, key: descended(x, y, weights, key)),
        }[kind]
        assert relative_error(quietly(train_fn, MASKS, KEYS, MEASURE), expected()[1]) < 1e-12

    def test_weights_are_passed_on_as_they_are(self):
        weights = np.random.default_rng(0).uniform(-1, 1, (6, EXAMPLES)).astype(np.float32)
        seen = quietly(lambda weights, key: weights, weights, KEYS[0])
        assert seen.dtype == np.float32
        np.testing.assert_array_equal(seen, weights)
        np.testing.assert_array_equal(quietly(lambda weights, key: weights, jnp.asarray(MASKS), KEYS[0]), MASKS)

    def test_single_precision(self, float32):
        narrow = jax.tree.map(
            lambda x: np.asarray(x, np.float32 if x.dtype.kind == "f" else np.int32), (TRAIN, MEASURE)
        )
        got = quietly(narrow[0], MASKS, KEYS, narrow[1])
        assert got.dtype == np.float32
        alone = [[narrow[1](narrow[0](mask.astype(np.float32), key)) for key in KEYS] for mask in MASKS]
        assert relative_error(got, np.asarray(alone)) < 1e-5
        start = quietly(lambda weights, key: weights, MASKS, KEYS[0])
        assert start.dtype == np.float32

    def test_other_data_of_the_same_shape_compile_nothing(self, compilations):
        """Data are arguments, so the program neither holds them nor depends on them."""
        big = 2.0 + np.arange(EXAMPLES * 1000.0).reshape(EXAMPLES, 1000)
        train_fn = lambda data: functools.partial(lambda x, weights, key: weights @ x, data)
        first = train_fn(big)
        runs = _runs.Runs(first, None, MASKS, KEYS, None, None)
        program = _runs._computed.lower(runs._arrays, *runs._arguments(0, 1), program=runs._program)
        assert len(program.as_text()) < 10_000
        np.testing.assert_allclose(quietly(first, MASKS, KEYS[0]), MASKS @ big, rtol=1e-12)
        other = functools.partial(first.func, big[::-1].copy())
        with compilations() as names:
            got = quietly(other, MASKS, KEYS[0])
        assert not names
        np.testing.assert_allclose(got, MASKS @ big[::-1], rtol=1e-12)


class TestFastest:
    MANY = subsets(EXAMPLES, 0.5, 48, jax.random.key(5))

    @pytest.mark.parametrize("fastest", WAYS)
    def test_the_fastest_way_is_found_and_no_run_is_lost(self, fastest, monkeypatch, computed, caplog):
        compute = _runs.Runs.compute

        def slow(self, number, way):
            time.sleep(0.0 if way == fastest else 0.2)
            return compute(self, number, way)

        with monkeypatch.context() as patched, caplog.at_level(logging.INFO, "influence_jax"):
            patched.setattr(_runs.Runs, "compute", slow)
            got = quietly(TRAIN, self.MANY, KEYS, MEASURE, group=8)
        assert computed == [*enumerate(WAYS), *((number, fastest) for number in range(3, 12))]
        assert f"a minute; going on with {fastest}" in caplog.text
        assert relative_error(got, quietly(TRAIN, self.MANY, KEYS, MEASURE, how="each")) < 1e-12

    def test_an_eighth_at_a_time(self, computed):
        """Each group at once; what is timed is a small part."""
        quietly(TRAIN, self.MANY[:40], KEYS[0], MEASURE)
        assert [number for number, _ in computed] == list(range(8))
        assert {way for _, way in computed[:3]} == set(WAYS)

    def test_few_runs_are_computed_one_by_one(self, computed):
        quietly(TRAIN, self.MANY[:7], KEYS[0], MEASURE)
        assert computed == [(number, "each") for number in range(7)]

    def test_keys_that_draw_other_numbers_when_vectorised(self, computed):
        keys = jax.random.key(0, impl="rbg")
        got = quietly(TRAIN, self.MANY, keys, MEASURE, group=8)
        assert {way for _, way in computed} <= {"each", "map"}
        assert relative_error(got, quietly(TRAIN, self.MANY, keys, MEASURE, how="map")) < 1e-12
        with pytest.raises(ValueError, match=r"how: got 'vmap' with keys of key<rbg>.*impl='threefry2x32'"):
            quietly(TRAIN, self.MANY, keys, MEASURE, how="vmap")

    def test_bar_with_runs_per_minute(self, capsys, monkeypatch):
        retrain(TRAIN, MASKS, KEYS, MEASURE, how="map", group=6)
        assert capsys.readouterr() == ("", "")
        told = []

        @contextlib.contextmanager
        def bar(what, total, *, show):
            assert (what, total, show) == ("retraining", 18, True)
            yield lambda count, note: told.append((count, note))

        monkeypatch.setattr("influence_jax.retrain.bar", bar)
        retrain(TRAIN, MASKS, KEYS, MEASURE, how="map", group=6)
        assert [count for count, _ in told] == [6, 6, 6]
        assert all(note.startswith("map, ") and note.endswith(" a minute") for _, note in told), told


class TestDevices:
    @pytest.mark.parametrize("how", [*WAYS, None])
    @pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
    def test_eight_devices_equal_one(self, how, kind):
        mesh = jax.make_mesh((8,), ("runs",), axis_types=(kind,))
        sharding = NamedSharding(mesh, PartitionSpec("runs"))
        got = quietly(TRAIN, MASKS, KEYS, MEASURE, how=how, sharding=sharding)
        assert relative_error(got, expected()[1]) < 1e-12

    @pytest.mark.parametrize("spec", [PartitionSpec("a"), PartitionSpec(("b", "a"))])
    def test_meshes_of_two_axes_and_data_that_are_elsewhere(self, spec):
        sharding = NamedSharding(jax.make_mesh((4, 2), ("a", "b")), spec)
        elsewhere = jax.device_put(TRAIN, jax.devices()[5])
        got = quietly(elsewhere, MASKS, KEYS, MEASURE, how="vmap", group=16, sharding=sharding)
        assert relative_error(got, expected()[1]) < 1e-12

    def test_every_device_has_its_share(self):
        sharding = NamedSharding(jax.make_mesh((8,), ("runs",), axis_types=(AxisType.Auto,)), PartitionSpec("runs"))
        for way in WAYS:
            runs = _runs.Runs(TRAIN, MEASURE, MASKS, KEYS, 16, sharding)
            step = 8 if way == "each" else 16
            out = _runs._computed(runs._arrays, *runs._arguments(0, step), program=runs._of(way))
            assert [shard.data.shape for shard in out.addressable_shards] == [(step // 8, 5)] * 8
            text = _runs._computed.lower(runs._arrays, *runs._arguments(0, step), program=runs._of(way)).compile()
            assert not any(word in text.as_text() for word in ("all-gather", "all-reduce", "collective-permute"))

    def test_data_that_are_split_over_devices(self):
        """Without a sharding of runs each training runs on all devices that its data are on."""
        split = NamedSharding(jax.make_mesh((8,), ("data",)), PartitionSpec("data"))
        train_fn = Descent(*jax.device_put((TRAIN.x, TRAIN.y), split))
        got = quietly(train_fn, MASKS, KEYS[0], MEASURE, how="map", group=9)
        assert relative_error(got, expected()[1][:, 0]) < 1e-12


class TestMistakes:
    def test_numbers_that_are_equal_but_of_another_type_have_programs_of_their_own(self):
        divide = lambda by, weights, key: weights.sum() // by if isinstance(by, int) else weights.sum() / by
        masks = np.ones((1, 6), bool)
        found = [quietly(functools.partial(divide, by), masks, KEYS[0]).item() for by in (4, 4.0)]
        assert found == [1.0, 1.5]

    def test_weights_that_a_training_cannot_take(self):
        f = lambda params, z: 0.5 * (params["mean"] - z) ** 2
        train = ij.retrain.training(f, optax.sgd(0.5), {"mean": jnp.array(0.0)}, jnp.arange(3.0), epochs=2)
        with pytest.raises(ValueError, match=r"masks: got shape \(1, 4\), expected \(S, 3\)"):
            quietly(train, np.ones((1, 4), bool), KEYS[0])
        with pytest.raises(ValueError, match=r"masks: got the weight -1.0"):
            quietly(train, -np.ones((1, 3)), KEYS[0])
        with pytest.raises(TypeError, match=r"masks: got random keys"):
            quietly(train, KEYS, np.ones((1, 3), bool))

    @pytest.mark.parametrize(
        ("changed", "error", "told"),
        [
            ({"train_fn": 3}, TypeError, r"train_fn: got a int, expected a function train_fn\(weights, key\)"),
            ({"measure": "loss"}, TypeError, "measure: got a str"),
            ({"train_fn": functools.partial(descended, DATA.x, steps={1})}, TypeError, "train_fn: unhashable type"),
            ({"masks": MASKS.astype(int)}, TypeError, r"masks: got int64.*masks\.astype\(bool\)"),
            ({"masks": MASKS[0]}, ValueError, r"masks: got shape \(24,\), expected \(S, N\)"),
            ({"masks": MASKS[:0]}, ValueError, r"masks: got shape \(0, 24\)"),
            ({"masks": MASKS & (np.arange(9) != 4)[:, None]}, ValueError, "1 of 9 keep no example, .* mask 4"),
            ({"masks": np.where(MASKS, np.nan, 1.0)}, ValueError, "masks: .* NaN or infinite"),
            ({"keys": 7}, TypeError, "keys: got 7, expected jax.random.key"),
            ({"keys": jnp.arange(3)}, TypeError, r"keys: got an array int64\[3\]"),
            ({"keys": KEYS[:0]}, ValueError, r"keys: got shape \(0,\)"),
            ({"keys": KEYS[None]}, ValueError, r"keys: got shape \(1, 2\)"),
            ({"how": "fast"}, ValueError, "how: got 'fast', expected one of 'each', 'map', 'vmap', or None"),
            ({"group": 0}, ValueError, "group: got 0"),
            ({"group": 2.5}, TypeError, "group: got 2.5"),
            ({"sharding": jax.devices()[0]}, TypeError, "sharding: got .* expected a jax.sharding.NamedSharding"),
            ({"sharding": NamedSharding(jax.make_mesh((8,), ("runs",)), PartitionSpec())}, ValueError, "sharding: got"),
            (
                {"sharding": NamedSharding(jax.make_mesh((8,), ("runs",)), PartitionSpec("runs")), "group": 12},
                ValueError,
                "group: got 12, expected a multiple of the 8 devices",
            ),
            ({"sink": "outcomes"}, TypeError, r"sink: got 'outcomes', expected .*OutcomeStore\.create\(path\)"),
            ({"sink": ScoreStore("nowhere")}, TypeError, "sink: got ScoreStore"),
        ],
    )
    def test_bad_input_is_told_before_anything_is_trained(self, changed, error, told, computed):
        given = {"train_fn": TRAIN, "masks": MASKS, "keys": KEYS, "measure": MEASURE, **changed}
        with pytest.raises(error, match=told):
            quietly(**given)
        assert computed == []

    def test_wide_data_without_64_bit_mode(self, float32):
        with pytest.raises(TypeError, match="train_fn: its array '0/0' is float64 but 64-bit mode is off"):
            quietly(functools.partial(descended, np.ones((3, 2)), np.zeros(3, int)), MASKS, KEYS)
        with pytest.raises(TypeError, match="masks: are float64"):
            quietly(lambda weights, key: weights, MASKS.astype(float), KEYS)

    @pytest.mark.parametrize("how", WAYS)
    def test_diverged_trainings_are_named(self, how, computed):
        """Of mask 6 with key 1; in a group of four runs these are the third and what follows."""
        wrong = MASKS[6].astype(float), jax.random.key_data(KEYS[1])

        def train_fn(weights, key):
            diverged = jnp.all(weights == wrong[0]) & jnp.all(jax.random.key_data(key) == wrong[1])
            return jnp.where(diverged, jnp.inf, jnp.sum(weights))

        told = "outcomes: 1 of 4 runs gave NaN or infinity, the first of them mask 6 with key 1; .* lower the learning"
        with pytest.raises(ValueError, match=told):
            quietly(train_fn, MASKS, KEYS, how=how, group=4)
        assert len(computed) == 4  # the others are not worth computing
        with pytest.warns(RuntimeWarning, match=r"outcomes: 1 of 18 runs .* mask 6 with key 1") as caught:
            got = quietly(train_fn, MASKS, KEYS, how=how, group=4, throw=False)
        assert caught[0].filename == __file__
        np.testing.assert_array_equal(np.argwhere(~np.isfinite(got)), [[6, 1]])

    def test_too_little_memory_is_told_with_what_to_change(self, monkeypatch):
        def exhausted(*_):
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 2147483648 bytes.")

        monkeypatch.setattr(_runs.Runs, "compute", exhausted)
        with pytest.raises(MemoryError, match=r"retrain: ran out of memory.*2\.00 GiB.*how=\"each\".*group="):
            quietly(TRAIN, MASKS, KEYS, MEASURE, how="vmap")


def stored(path, *, train_fn=TRAIN, masks=MASKS, keys=KEYS, measure=MEASURE, how="map", group=4, **options):
    return quietly(train_fn, masks, keys, measure, how=how, group=group, sink=OutcomeStore.create(path), **options)


def interrupted(monkeypatch, path, writes, **options):
    """A call that is interrupted when it is about to write for the n-th time."""
    numbers, write = itertools.count(), OutcomeStore.write

    def stopped(self, *args, **kwargs):
        if next(numbers) == writes:
            raise KeyboardInterrupt
        write(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(OutcomeStore, "write", stopped)
        with pytest.raises(KeyboardInterrupt):
            stored(path, **options)


TRAINED = []


def counted(weights, key):
    jax.debug.callback(lambda _: TRAINED.append(1), weights)
    return descended(jnp.asarray(DATA.x), jnp.asarray(DATA.y), weights, key)


def other_start(weights, key):
    return descended(jnp.asarray(DATA.x), jnp.asarray(DATA.y), weights, jax.random.fold_in(key, 1))


class TestStore:
    @pytest.mark.parametrize("how", WAYS)
    def test_stored_equal_those_in_memory_bit_for_bit(self, how, tmp_path):
        got = stored(tmp_path / "s", how=how)
        np.testing.assert_array_equal(got, quietly(TRAIN, MASKS, KEYS, MEASURE, how=how, group=4))
        store = OutcomeStore.open(tmp_path / "s")
        np.testing.assert_array_equal(store.outcomes(), got)
        assert store.complete
        assert store.shape == (18, 5)
        assert repr(store).endswith("outcomes of retraining, 18 x 5 float64, complete)")

    @pytest.mark.parametrize("keys", [KEYS, KEYS[0]])
    @pytest.mark.parametrize("measured", [(), (2, 3)])
    def test_outcomes_of_any_shape(self, keys, measured, tmp_path):
        measure = lambda params: jnp.broadcast_to(jnp.sum(params["kernel"]), measured).astype(jnp.float32)
        got = stored(tmp_path / "s", keys=keys, measure=measure)
        assert got.shape == (9, *keys.shape, *measured)
        np.testing.assert_array_equal(OutcomeStore.open(tmp_path / "s").outcomes(), got)

    def test_zarr_reads_them(self, tmp_path):
        import zarr

        got = stored(tmp_path / "s")
        group = zarr.open_group(tmp_path / "s", mode="r")
        np.testing.assert_array_equal(group["outcomes"][...], got.reshape(18, 5))
        assert group["outcomes"].metadata.dimension_names == ("run", "measured")
        assert group.attrs["influence_jax"]["how"] == "map"

    @pytest.mark.parametrize("how", WAYS)
    @pytest.mark.parametrize("writes", [0, 1, 3])
    def test_interrupted_it_continues_bit_for_bit_without_training_again(self, how, writes, monkeypatch, tmp_path):
        masks, options = MASKS[:8], {"how": how, "train_fn": counted}  # 16 runs, so none is there twice
        whole = stored(tmp_path / "whole", masks=masks, **options)
        interrupted(monkeypatch, tmp_path / "s", writes, masks=masks, **options)
        with pytest.raises(ValueError, match="is not complete; run the same command again"):
            OutcomeStore.open(tmp_path / "s").outcomes()
        jax.effects_barrier()
        TRAINED.clear()
        np.testing.assert_array_equal(stored(tmp_path / "s", masks=masks, **options), whole)
        jax.effects_barrier()
        assert len(TRAINED) == 16 - 4 * writes
        stored(tmp_path / "s", masks=masks, **options)
        jax.effects_barrier()
        assert len(TRAINED) == 16 - 4 * writes

    def test_the_way_that_was_found_is_kept(self, monkeypatch, tmp_path, computed):
        """Whatever would be the fastest now."""
        masks = TestFastest.MANY
        interrupted(monkeypatch, tmp_path / "s", 5, masks=masks, how=None, group=8)
        found = OutcomeStore.open(tmp_path / "s").manifest
        way = computed[-1][1]
        assert (found["how"], found["chosen"]) == ("measured", way)
        computed.clear()
        monkeypatch.setattr(_runs.Runs, "compile", None)  # what only those call who look for the fastest
        got = stored(tmp_path / "s", masks=masks, how=None, group=None)
        assert computed == [(number, way) for number in range(5, 12)]
        assert relative_error(got, quietly(TRAIN, masks, KEYS, MEASURE, how="each")) < 1e-12
        for number in (0, 1, 2, 4):  # damage
            arrays.chunk_file(tmp_path / "s" / "outcomes", (number, 0)).unlink()
        computed.clear()
        np.testing.assert_array_equal(stored(tmp_path / "s", masks=masks, how=None, group=None), got)
        assert computed == [*enumerate(WAYS), (4, way)]

    def test_interrupted_while_looking_for_the_fastest(self, monkeypatch, tmp_path, computed):
        masks = TestFastest.MANY
        interrupted(monkeypatch, tmp_path / "s", 2, masks=masks, how=None, group=8)
        computed.clear()
        got = stored(tmp_path / "s", masks=masks, how=None, group=8)
        assert computed[:3] == list(enumerate(WAYS))
        assert len(computed) == 12
        assert relative_error(got, quietly(TRAIN, masks, KEYS, MEASURE, how="each")) < 1e-12

    @pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
    def test_damaged_groups_are_computed_again(self, damage, tmp_path, computed):
        whole = stored(tmp_path / "s")
        file = arrays.chunk_file(tmp_path / "s" / "outcomes", (2, 0))
        content = bytearray(file.read_bytes())
        content[17] ^= 4
        file.write_bytes(content[: 40 if damage == "cut" else None])
        if damage == "delete":
            file.unlink()
        with pytest.raises(ValueError, match=r"c/2/0: this chunk is (damaged|missing)"):
            OutcomeStore.open(tmp_path / "s").outcomes()
        computed.clear()
        np.testing.assert_array_equal(stored(tmp_path / "s"), whole)
        assert computed == [(2, "map")]
        np.testing.assert_array_equal(OutcomeStore.open(tmp_path / "s").outcomes(), whole)

    @pytest.mark.parametrize(
        ("changed", "told"),
        [
            ({"keys": KEYS[::-1]}, "keys: .* in the store, .* now"),
            ({"keys": KEYS[:1]}, "seeds: 2 in the store, 1 now"),
            ({"masks": MASKS[:, :20], "train_fn": Descent(TRAIN.x[:20], TRAIN.y[:20])}, "examples of a mask: 24"),
            (
                {"masks": MASKS.astype(np.float32), "measure": None, "train_fn": lambda weights, key: weights},
                'weights: "float64" in the store, "f',
            ),
            ({"train_fn": Descent(TRAIN.x, TRAIN.y[::-1])}, "trained: .* in the store"),
            ({"train_fn": Descent(TRAIN.x, TRAIN.y, STEPS + 1)}, "trained: .* in the store"),
            ({"train_fn": functools.partial(descended, TRAIN.x, TRAIN.y)}, "trained: .* in the store"),
            ({"measure": jax.tree_util.Partial(losses, ij.Batch(QUERY.x[::-1], QUERY.y))}, "measured by: "),
            ({"measure": None, "train_fn": lambda weights, key: weights}, "measured by: "),
            ({"how": "each"}, 'how: "map" in the store, "each" now'),
            ({"group": 3}, "group: 4 in the store, 3 now"),
            ({"masks": MASKS[::-1]}, "masks: from mask 0 on they are not those"),
            ({"masks": np.concatenate([MASKS[:8], ~MASKS[8:]])}, "masks: from mask 8 on they are not those"),
            ({"masks": MASKS[:7]}, "masks: from mask 6 on they are not those"),
        ],
    )
    def test_another_computation_is_told_apart(self, changed, told, tmp_path, computed):
        whole = stored(tmp_path / "s")
        computed.clear()
        with pytest.raises(ValueError, match=told):
            stored(tmp_path / "s", **changed)
        assert computed == []
        np.testing.assert_array_equal(stored(tmp_path / "s", how=None, group=None), whole)

    def test_another_code_is_told_apart(self, tmp_path):
        stored(tmp_path / "s", train_fn=counted)
        with pytest.raises(ValueError, match=r"train_fn: .*; trained: "):
            stored(tmp_path / "s", train_fn=other_start)

    def test_more_masks_continue(self, tmp_path, computed):
        """The last group, which was shorter, is computed again, the others are not."""
        more = subsets(EXAMPLES, 0.5, 13, jax.random.key(4))
        first = stored(tmp_path / "s")
        computed.clear()
        got = stored(tmp_path / "s", masks=more, how=None, group=None)
        assert computed == [(number, "map") for number in (4, 5, 6)]
        np.testing.assert_array_equal(got[:9], first)
        np.testing.assert_array_equal(got, quietly(TRAIN, more, KEYS, MEASURE, how="map", group=4))
        np.testing.assert_array_equal(OutcomeStore.open(tmp_path / "s").outcomes(), got)

    def test_fewer_masks_are_refused(self, tmp_path, computed):
        stored(tmp_path / "s")
        computed.clear()
        with pytest.raises(
            ValueError, match=r"masks: got 8 with 16 runs, but .* holds outcomes of 18 runs; give all masks"
        ):
            stored(tmp_path / "s", masks=MASKS[:8])
        assert computed == []

    def test_second_writer_is_refused(self, tmp_path, computed):
        stored(tmp_path / "s")
        file = arrays.chunk_file(tmp_path / "s" / "outcomes", (2, 0))
        file.unlink()
        refused = []

        def compute(self, number, way):
            with pytest.raises(BlockingIOError, match="the store is being written by process"):
                stored(tmp_path / "s")
            refused.append(number)
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(_runs.Runs, "compute", compute)
            sink = OutcomeStore.create(tmp_path / "s")
            with pytest.raises(KeyboardInterrupt):
                quietly(TRAIN, MASKS, KEYS, MEASURE, sink=sink)
        assert refused == [2]
        stored(tmp_path / "s")  # nobody writes now, although the first writer is still there
        assert "18 x 5" in repr(sink)

    def test_diverged_trainings_are_not_stored(self, tmp_path):
        train_fn = functools.partial(diverging, MASKS[5].astype(float))
        with pytest.raises(ValueError, match=r"mask 5 with key 0.*What is finished is kept; throw=False"):
            stored(tmp_path / "s", train_fn=train_fn, measure=None)
        assert OutcomeStore.open(tmp_path / "s").shape == (8, 1)
        for _ in range(2):  # also those that are there are told
            with pytest.warns(RuntimeWarning, match="outcomes: 2 of 18 runs"):
                got = stored(tmp_path / "s", train_fn=train_fn, measure=None, throw=False)
            np.testing.assert_array_equal(np.isnan(got), np.arange(9)[:, None] + np.zeros(2) == 5)
        with pytest.raises(ValueError, match="outcomes: 2 of 18 runs gave NaN"):
            stored(tmp_path / "s", train_fn=train_fn, measure=None)

    def test_trees_are_refused(self, tmp_path):
        with pytest.raises(TypeError, match=r"measure: gives .*kernel.*influence_jax\.flatten\(params, params\)"):
            stored(tmp_path / "s", measure=None)
        assert not (tmp_path / "s").exists()

    def test_sharded_runs_continue(self, monkeypatch, tmp_path):
        sharding = NamedSharding(jax.make_mesh((8,), ("runs",)), PartitionSpec("runs"))
        options = {"how": "vmap", "group": 8, "sharding": sharding}
        whole = stored(tmp_path / "whole", **options)
        interrupted(monkeypatch, tmp_path / "s", 1, **options)
        with pytest.raises(ValueError, match="devices: 8 in the store, 1 now"):
            stored(tmp_path / "s", how="vmap", group=8)
        np.testing.assert_array_equal(stored(tmp_path / "s", **options), whole)
        assert relative_error(whole, expected()[1]) < 1e-12


def diverging(wrong, weights, key):
    return jnp.where(jnp.all(weights == wrong), jnp.nan, 1.0)
