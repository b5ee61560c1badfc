"""States on disk: what loads is what was saved, whatever it holds; what is damaged or half there never loads."""

import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chunks import flip, python
from helpers import CLASSIFICATION, random_batch, random_like, random_mlp, relative_error
from jax.sharding import NamedSharding, PartitionSpec

import influence_jax as ij
from influence_jax import store as stores
from influence_jax.store import files


class TestStates:
    def test_every_kind_of_leaf(self, tmp_path):
        state = {
            "float": 0.1,
            "int": -3,
            "bool": True,
            "nan": float("nan"),
            "none": None,
            "array": jnp.arange(6.0).reshape(2, 3),
            "weak": jnp.asarray(0.1),
            "narrow": jnp.arange(3, dtype=jnp.bfloat16),
            "scalar": jnp.float32(2.5),
            "empty": jnp.zeros((0, 4)),
            "flags": jnp.array([True, False]),
            "numpy": np.arange(4, dtype=np.int16),
            "numpy 0-d": np.array(1.5),
            "numpy scalar": np.float32(7),
            "key": jax.random.key(3),
            "keys": jax.random.split(jax.random.key(4, impl="rbg"), (2, 2)),
            "complex": jnp.array([1 + 2j]),
            "list": [jnp.zeros(1), (jnp.ones(2),)],
        }
        stores.save(tmp_path / "s", state)
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "dtype") else x, state)
        for like in (state, abstract):
            got = stores.load(tmp_path / "s", like)
            assert jax.tree.structure(got) == jax.tree.structure(state)
            for (name, a), b in zip(ij.tree.named_leaves(got), jax.tree.leaves(state), strict=True):
                assert type(a) is type(b), name
                assert files.fingerprint([a]) == files.fingerprint([b]), name
                assert getattr(a, "weak_type", None) == getattr(b, "weak_type", None), name
                assert getattr(a, "committed", None) == getattr(b, "committed", None), name

    def test_an_array_that_is_there_twice_is_kept_once(self, tmp_path):
        x = jnp.asarray(np.random.default_rng(0).normal(size=100_000))
        stores.save(tmp_path / "s", {"op": x, "state": {"op": x}})
        assert sum(file.stat().st_size for file in (tmp_path / "s").rglob("*") if file.is_file()) < 1.2 * x.nbytes
        got = stores.load(tmp_path / "s", {"op": x, "state": {"op": x}})
        assert got["op"] is got["state"]["op"]

    def test_inverse_in_a_fresh_process_solves_bit_for_bit(self, tmp_path):
        params = random_mlp(jax.random.key(0))
        data = random_batch(jax.random.key(1), 40, 5, 3, classes=True)
        inverse = ij.invert(ij.ekfac(CLASSIFICATION, params, data), ij.Direct(ij.RelativeDamping(0.1)))
        vector = random_like(jax.random.key(2), params)
        stores.save(tmp_path / "s", {"inverse": inverse, "vector": vector})
        code = """
            import conftest, sys
            import jax, influence_jax as ij, numpy as np
            from helpers import CLASSIFICATION, random_batch, random_mlp
            from influence_jax import store
            jax.config.update("jax_disable_most_optimizations", sys.argv[2] == "True")
            params = random_mlp(jax.random.key(0))
            data = random_batch(jax.random.key(1), 40, 5, 3, classes=True)
            def fit(params, data):
                return ij.invert(ij.ekfac(CLASSIFICATION, params, data), ij.Direct(ij.RelativeDamping(0.1)))
            like = jax.eval_shape(lambda p, d: {"inverse": fit(p, d), "vector": p}, params, data)
            state = store.load(sys.argv[1], like)
            solved, info = state["inverse"].solve(state["vector"])
            print(np.asarray(ij.flatten(solved, params)).tobytes().hex(), bool(info.converged))
        """
        solved, _ = inverse.solve(vector)
        expected = np.asarray(ij.flatten(solved, params))
        assert relative_error(expected, 0 * expected + 1) > 0.1
        # Compiled alike, or the last bits differ whatever was stored.
        compiler = jax.config.read("jax_disable_most_optimizations")
        assert python(code, tmp_path / "s", compiler) == f"{expected.tobytes().hex()} True"

    @pytest.mark.parametrize("solver", [ij.Direct(0.1), ij.SampleSpace(0.1)], ids=["Direct", "SampleSpace"])
    def test_what_was_found_out_from_values_is_vouched_for(self, tmp_path, solver):
        """That a loss of one's own is convex is not to be seen in shapes."""
        objective = ij.Objective(lambda p, z: z["x"] @ p["w"], lambda out, z: jnp.sum(jnp.cosh(out - z["y"])))
        rng = np.random.default_rng(0)
        params, data = {"w": jnp.asarray(rng.normal(size=(2, 2)))}, {"x": rng.normal(size=(3, 2)), "y": np.ones((3, 2))}
        fit = lambda data, vouched=False: ij.invert(curvature(data, vouched), solver)
        curvature = lambda data, vouched: (
            ij.GGN(objective, params, data).assume_psd() if vouched else ij.GGN(objective, params, data)
        )
        inverse = fit(data)
        stores.save(tmp_path / "s", inverse)
        with pytest.raises(ValueError, match=r"of the same call, but with GGN\(...\).assume_psd\(\) in it"):
            stores.load(tmp_path / "s", jax.eval_shape(fit, data))
        for like in (jax.eval_shape(lambda: fit(data)), jax.eval_shape(lambda d: fit(d, vouched=True), data)):
            loaded = stores.load(tmp_path / "s", like)
            np.testing.assert_array_equal(loaded.mv(params)["w"], inverse.mv(params)["w"])

    def test_sharded_over_eight_devices(self, tmp_path):
        mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        placed = NamedSharding(mesh, PartitionSpec("a", "b"))
        turned = NamedSharding(mesh, PartitionSpec("b", "a"))
        x = np.random.default_rng(0).normal(size=(8, 16))
        state = {"x": jax.device_put(x, placed), "y": jnp.arange(3), "key": jax.random.key(0)}
        stores.save(tmp_path / "s", state)
        got = stores.load(tmp_path / "s", state)
        assert got["x"].sharding == placed
        assert len(got["x"].addressable_shards) == 8
        abstract = {**state, "x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=turned)}
        assert stores.load(tmp_path / "s", abstract)["x"].sharding == turned
        here = stores.load(tmp_path / "s", {**state, "x": jax.ShapeDtypeStruct(x.shape, x.dtype)})["x"]
        for loaded in (got["x"], stores.load(tmp_path / "s", abstract)["x"], here):
            np.testing.assert_array_equal(loaded, x)
        np.testing.assert_array_equal(here + got["x"], 2 * x)  # what nobody placed mixes with what is sharded

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            ({"w": jnp.zeros((3, 2))}, r"leaf 'w' is saved as float64 \(2, 3\), like has float64 \(3, 2\)"),
            ({"w": jnp.zeros((2, 3), jnp.float32)}, r"leaf 'w' is saved as float64 \(2, 3\), like has float32"),
            ({"more": jnp.zeros(1)}, r"leaf 'more' is in like but not saved"),
            ({"w": None}, r"leaf 'w' is saved but not in like"),
            ({"c": 3}, r"leaf 'c' is saved as a Python float, like has a int"),
            ({"p": (jnp.zeros(2),)}, r"saved is the tree/p: list\(\); like is the tree/p: tuple\(\)"),
            ({"s": ij.Direct(0.1)}, r"saved is the tree/s: CG\(max_steps=7.*; like is the tree/s: Direct\("),
            ({"s": ij.CG(0.1, max_steps=8)}, r"saved is .*max_steps=7.*; like is .*max_steps=8"),
        ],
    )
    def test_other_states_are_refused(self, tmp_path, change, told):
        state = {"w": jnp.zeros((2, 3)), "c": 0.5, "p": [jnp.zeros(2)], "s": ij.CG(0.1, max_steps=7)}
        stores.save(tmp_path / "s", state)
        with pytest.raises(ValueError, match=r"like: differs from the state in .*; build it as") as caught:
            stores.load(tmp_path / "s", {**state, **change})
        if "Direct" not in told:  # its leaves differ from those of CG, too
            caught.match(told)

    def test_states_are_not_overwritten_by_accident(self, tmp_path):
        stores.save(tmp_path / "s", {"x": jnp.zeros(2)})
        with pytest.raises(ValueError, match=r"a state is saved in .* already; give another path, or overwrite=True"):
            stores.save(tmp_path / "s", {"x": jnp.ones(2)})
        stores.save(tmp_path / "s", {"x": jnp.ones(2)}, overwrite=True)
        assert stores.load(tmp_path / "s", {"x": jnp.ones(2)})["x"].tolist() == [1, 1]
        assert sorted(file.name for file in (tmp_path / "s").iterdir()) == ["arrays-1", "lock", "state.json"]

    def test_paths_of_something_else(self, tmp_path):
        (tmp_path / "file").write_text("text")
        with pytest.raises(ValueError, match="is a file, expected a folder"):
            stores.save(tmp_path / "file", {"x": jnp.zeros(2)})
        with pytest.raises(ValueError, match=r"\['file'\] in it and no state"):
            stores.save(tmp_path, {"x": jnp.zeros(2)})
        with pytest.raises(FileNotFoundError, match="there is no saved state"):
            stores.load(tmp_path, {"x": jnp.zeros(2)})
        with pytest.raises(TypeError, match="tree: leaf 'x' is a str"):
            stores.save(tmp_path / "s", {"x": "text"})
        assert not (tmp_path / "s").exists()

    def test_half_a_save_is_never_loaded(self, tmp_path, monkeypatch):
        old, new = {"x": jnp.zeros(2)}, {"x": jnp.ones(2)}

        def interrupt(*arguments):
            raise KeyboardInterrupt

        with monkeypatch.context() as context:
            context.setattr(stores.states, "write_json", interrupt)
            with pytest.raises(KeyboardInterrupt):
                stores.save(tmp_path / "s", old)
        with pytest.raises(FileNotFoundError):
            stores.load(tmp_path / "s", old)
        stores.save(tmp_path / "s", old)  # what it left is no obstacle
        with monkeypatch.context() as context:
            context.setattr(stores.states, "write_json", interrupt)
            with pytest.raises(KeyboardInterrupt):
                stores.save(tmp_path / "s", new, overwrite=True)
        assert stores.load(tmp_path / "s", old)["x"].tolist() == [0, 0]
        stores.save(tmp_path / "s", new, overwrite=True)
        assert stores.load(tmp_path / "s", old)["x"].tolist() == [1, 1]

    def test_damage_is_found(self, tmp_path):
        """Every byte of every file: what loads is what was saved."""
        state = {"x": jnp.asarray(np.random.default_rng(0).normal(size=500))}
        stores.save(tmp_path / "s", state)
        data = max(
            (file for file in (tmp_path / "s").rglob("*") if file.is_file()), key=lambda file: file.stat().st_size
        )
        content = data.read_bytes()
        found = 0
        for place in range(7, len(content), len(content) // 20):
            flip(data, place)
            try:
                np.testing.assert_array_equal(stores.load(tmp_path / "s", state)["x"], state["x"])
            except ValueError:
                found += 1
            data.write_bytes(content)
        assert found > 10
        data.unlink()
        with pytest.raises(ValueError, match="the saved state is damaged"):
            stores.load(tmp_path / "s", state)

    def test_damaged_description(self, tmp_path):
        stores.save(tmp_path / "s", {"x": jnp.zeros(2)})
        description = tmp_path / "s" / "state.json"
        description.write_bytes(description.read_bytes().replace(b"float64", b"float32"))
        with pytest.raises(ValueError, match="its checksum does not fit"):
            stores.load(tmp_path / "s", {"x": jnp.zeros(2)})
        stores.save(tmp_path / "s", {"x": jnp.ones(2)}, overwrite=True)
        assert stores.load(tmp_path / "s", {"x": jnp.zeros(2)})["x"].tolist() == [1, 1]

    def test_failed_write(self, tmp_path):
        state = {"x": jnp.asarray(np.random.default_rng(0).normal(size=200_000))}
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, hard))
        try:
            with pytest.raises(OSError, match="File too large, while writing a state"):
                stores.save(tmp_path / "s", state)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        with pytest.raises(FileNotFoundError):
            stores.load(tmp_path / "s", state)
        stores.save(tmp_path / "s", state)
        np.testing.assert_array_equal(stores.load(tmp_path / "s", state)["x"], state["x"])

    def test_float64_without_64_bit_mode(self, tmp_path):
        stores.save(tmp_path / "s", {"x": jnp.zeros(2)})
        like = {"x": jax.ShapeDtypeStruct((2,), np.float64)}
        with jax.enable_x64(False), pytest.raises(ValueError, match="leaf 'x' is float64 but 64-bit mode is off"):
            stores.load(tmp_path / "s", like)
