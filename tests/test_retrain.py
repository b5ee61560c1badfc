"""Retraining on subsets: many trainings in a program, the fastest way, several devices, and mistakes."""

import contextlib
import functools
import logging
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import retrainings
from helpers import relative_error
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from retrainings import (
    DATA,
    EXAMPLES,
    INPUTS,
    KEYS,
    MANY,
    MASKS,
    MEASURE,
    STEPS,
    TRAIN,
    WAYS,
    Descent,
    descended,
    expected,
    quietly,
)

import influence_jax as ij
from influence_jax import _runs
from influence_jax.retrain import retrain
from influence_jax.store import ScoreStore

computed = retrainings.computed  # the fixture


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
    @pytest.mark.parametrize("fastest", WAYS)
    def test_the_fastest_way_is_found_and_no_run_is_lost(self, fastest, monkeypatch, computed, caplog):
        compute = _runs.Runs.compute

        def slow(self, number, way):
            time.sleep(0.0 if way == fastest else 0.2)
            return compute(self, number, way)

        with monkeypatch.context() as patched, caplog.at_level(logging.INFO, "influence_jax"):
            patched.setattr(_runs.Runs, "compute", slow)
            got = quietly(TRAIN, MANY, KEYS, MEASURE, group=8)
        assert computed == [*enumerate(WAYS), *((number, fastest) for number in range(3, 12))]
        assert f"a minute; going on with {fastest}" in caplog.text
        assert relative_error(got, quietly(TRAIN, MANY, KEYS, MEASURE, how="each")) < 1e-12

    def test_an_eighth_at_a_time(self, computed):
        """Each group at once; what is timed is a small part."""
        quietly(TRAIN, MANY[:40], KEYS[0], MEASURE)
        assert [number for number, _ in computed] == list(range(8))
        assert {way for _, way in computed[:3]} == set(WAYS)

    def test_few_runs_are_computed_one_by_one(self, computed):
        quietly(TRAIN, MANY[:7], KEYS[0], MEASURE)
        assert computed == [(number, "each") for number in range(7)]

    def test_keys_that_draw_other_numbers_when_vectorised(self, computed):
        keys = jax.random.key(0, impl="rbg")
        got = quietly(TRAIN, MANY, keys, MEASURE, group=8)
        assert {way for _, way in computed} <= {"each", "map"}
        assert relative_error(got, quietly(TRAIN, MANY, keys, MEASURE, how="map")) < 1e-12
        with pytest.raises(ValueError, match=r"how: got 'vmap' with keys of key<rbg>.*impl='threefry2x32'"):
            quietly(TRAIN, MANY, keys, MEASURE, how="vmap")

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
