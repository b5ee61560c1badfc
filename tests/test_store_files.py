"""What stores are made of: fingerprints that tell data apart, and trees of arrays in folders."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from influence_jax.store import arrays, files


class TestFiles:
    def test_fingerprints_tell_trees_apart(self):
        x = np.arange(6.0)
        key = jax.random.key(0)
        trees = [
            {"a": x},
            {"b": x},
            {"a": x.reshape(2, 3)},
            {"a": x.astype(np.float32)},
            {"a": x.view(np.int64)},
            {"a": np.where(x == 3, np.nextafter(3, 4), x)},
            {"a": x, "b": 1},
            {"a": x, "b": 1.0},
            {"a": x, "b": True},
            {"a": x[:3], "b": x[3:]},
            {"a": key},
            {"a": jax.random.key_data(key)},
            {"a": jax.random.key(0, impl="rbg")},
            {"a": x.astype(ml_dtypes.bfloat16)},
            {"a": x.astype(np.float16)},
            {"a": x[:0]},
        ]
        assert len({files.fingerprint(tree) for tree in trees}) == len(trees)

    def test_fingerprints_are_the_same_wherever_the_bytes_are(self):
        x = np.arange(16.0).reshape(8, 2)
        mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
        alike = [x, jnp.asarray(x), sharded, np.asfortranarray(x), np.repeat(x, 2, axis=0)[::2]]
        assert {files.fingerprint({"x": leaf}) for leaf in alike} == {"e6c7ec95bef7da477554338dc87adb4d"}

    def test_other_leaves_have_no_fingerprint(self):
        for leaf in (object(), np.array([object()]), iter([1])):
            with pytest.raises(TypeError, match=r"leaf 'a' is a .*, expected an array or a Python scalar"):
                files.fingerprint({"a": leaf})

    def test_trees_of_arrays_of_every_kind(self, tmp_path):
        leaves = {
            "dense/kernel": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
            "": np.array([True, False]),
            "scalar": np.array(2.5, np.float32),
            "none": np.zeros((0, 3)),
            "narrow": np.arange(4).astype(ml_dtypes.bfloat16),
            "../c/a b%": np.arange(3),
            "complex": np.array([1 + 2j, np.nan], np.complex64),
        }
        for _ in range(2):  # a second time in the same place
            arrays.write_tree(tmp_path / "t", leaves)
            got = arrays.read_tree(tmp_path / "t")
            assert list(got) == list(leaves)
            for name, leaf in leaves.items():
                assert (got[name].dtype, got[name].shape) == (leaf.dtype, leaf.shape)
                assert got[name].tobytes() == leaf.tobytes()
        assert list(tmp_path.iterdir()) == [tmp_path / "t"]

    def test_large_leaves_are_split(self, tmp_path, monkeypatch):
        monkeypatch.setattr(arrays, "_CHUNK_BYTES", 100)
        leaf = np.arange(60.0).reshape(10, 6)
        arrays.write_tree(tmp_path / "t", {"x": leaf})
        assert len(list((tmp_path / "t" / "x" / "c").iterdir())) == 5
        np.testing.assert_array_equal(arrays.read_tree(tmp_path / "t")["x"], leaf)
        arrays.chunk_file(tmp_path / "t" / "x", (3, 0)).unlink()
        with pytest.raises(ValueError, match="x/c/3/0: this chunk is missing"):
            arrays.read_tree(tmp_path / "t")
