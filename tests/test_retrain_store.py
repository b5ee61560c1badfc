"""Outcomes of retraining in a store: interrupted at any moment, damaged, continued, and told apart."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import retrainings
from helpers import relative_error
from jax.sharding import NamedSharding, PartitionSpec
from retrainings import (
    DATA,
    EXAMPLES,
    KEYS,
    MANY,
    MASKS,
    MEASURE,
    QUERY,
    STEPS,
    TRAIN,
    WAYS,
    Descent,
    descended,
    expected,
    losses,
    quietly,
)

import influence_jax as ij
from influence_jax import _runs
from influence_jax.retrain import subsets
from influence_jax.store import OutcomeStore, arrays

computed = retrainings.computed  # the fixture


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
        masks = MANY
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
        masks = MANY
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
            ({"train_fn": Descent(TRAIN.x, TRAIN.y[::-1])}, "train_fn: .* in the store"),
            ({"train_fn": Descent(TRAIN.x, TRAIN.y, STEPS + 1)}, "train_fn: .* in the store"),
            ({"measure": jax.tree_util.Partial(losses, ij.Batch(QUERY.x[::-1], QUERY.y))}, "measure: "),
            ({"measure": None, "train_fn": lambda weights, key: weights}, "measure: "),
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

    def test_the_same_training_in_another_form_continues(self, tmp_path, computed):
        whole = stored(tmp_path / "s")
        computed.clear()
        again = stored(tmp_path / "s", train_fn=functools.partial(descended, TRAIN.x, TRAIN.y))
        assert computed == []
        np.testing.assert_array_equal(again, whole)

    def test_another_code_is_told_apart(self, tmp_path):
        stored(tmp_path / "s", train_fn=counted)
        with pytest.raises(ValueError, match=r"train_fn: another program than in the store"):
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
