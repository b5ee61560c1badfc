"""Several processes: the numbers of one, one store, and no waiting for the dead."""

import argparse
import functools
import importlib.util
import pathlib
import textwrap
import time

import numpy as np
import pytest
from compiling import QUICK
from helpers import relative_error

import influence_jax as ij

EXAMPLE = pathlib.Path(__file__).parent.parent / "examples" / "processes.py"

# What each process runs; `problem` is shared with the test, which runs it in one process on one device.
PROBLEM = """
import jax, jax.numpy as jnp, numpy as np
import influence_jax as ij

OBJECTIVE = ij.Objective(
    lambda params, z: jnp.tanh(z["x"] @ params["in"]) @ params["out"],
    lambda output, z: jax.nn.logsumexp(output) - output[z["y"]],
)

def problem():
    draw = np.random.default_rng(0)
    params = {"in": draw.normal(size=(6, 8)).astype("f") / 3, "out": draw.normal(size=(8, 3)).astype("f") / 3}
    data = {"x": draw.normal(size=(203, 6)).astype("f"), "y": draw.integers(0, 3, 203).astype("i")}
    return params, data, jax.tree.map(lambda x: x[:5], data)
"""
WORKER = """
import argparse, os, pathlib
parser = argparse.ArgumentParser()
parser.add_argument("--worker", action="store_true")
kinds = {"coordinator": str, "processes": int, "process": int, "timeout": float, "out": pathlib.Path}
for name, kind in kinds.items():
    parser.add_argument(f"--{name}", type=kind)
arguments = parser.parse_args()
die = (arguments.out.parent / "die").exists() and arguments.process == 1

ij.stream.connect(arguments.coordinator, arguments.processes, arguments.process, timeout=arguments.timeout)
mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
options = {"batch_size": 32, "sharding": jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))}
params, data, query = problem()
share = ij.stream.share(data, batch_size=32)

def dying():
    for number, batch in enumerate(share):
        if die and number == 4:
            os.kill(os.getpid(), 9)
        yield batch

curvature = ij.stream.ekfac(OBJECTIVE, params, share, **options)
influence = ij.Influence(OBJECTIVE, params, ij.invert(curvature, ij.Direct(0.1)))
ij.stream.scores(influence, query, dying, ij.store.ScoreStore.create(arguments.out), **options)
best = ij.stream.top_k(influence, query, share, 7, **options)
own = ij.stream.self_influences(influence, share, **options)
inverse = ij.stream.invert(ij.GGN, OBJECTIVE, params, share, ij.BlockCG(0.1), **options)
exact = ij.stream.scores(ij.Influence(OBJECTIVE, params, inverse), query, share, **options)
if jax.process_index() == 0:
    np.savez(arguments.out.parent / "found.npz", indices=best.indices, values=best.values, own=own, exact=exact)
"""


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("processes", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(example, tmp_path, monkeypatch):
    """Run the worker in two processes of two devices each, and tell its exit code."""
    for name, value in QUICK.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "programs"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    script = tmp_path / "worker.py"
    script.write_text(PROBLEM + WORKER)
    arguments = argparse.Namespace(processes=2, devices=2, timeout=10.0, out=tmp_path / "scores")
    return functools.partial(example.launch, arguments, str(script))


@pytest.mark.usefixtures("float32")
class TestTwoProcesses:
    def test_numbers_are_those_of_one_process(self, run, tmp_path, capfd):
        self.compare(run, tmp_path, capfd)

    @pytest.mark.thorough
    def test_one_of_them_dies_and_the_next_run_is_that_of_one_process(self, run, tmp_path, capfd):
        (tmp_path / "die").touch()
        start = time.monotonic()
        assert run() == 1
        assert time.monotonic() - start < 120
        told = capfd.readouterr().err
        assert "process 1 stopped with exit code -9" in told
        assert "lost another one, which stopped" in told or "another task died" in told

        (tmp_path / "die").unlink()
        self.compare(run, tmp_path, capfd)

    def compare(self, run, tmp_path, capfd):
        assert run() == 0, capfd.readouterr().err
        store, found = ij.store.ScoreStore.open(tmp_path / "scores"), np.load(tmp_path / "found.npz")
        assert store.complete

        scope: dict = {}
        exec(textwrap.dedent(PROBLEM), scope)
        params, data, query = scope["problem"]()
        curvature = ij.ekfac(scope["OBJECTIVE"], params, data)
        influence = ij.Influence(scope["OBJECTIVE"], params, ij.invert(curvature, ij.Direct(0.1)))
        assert relative_error(np.asarray(store), influence.influences(query, data)) < 2e-6
        best = influence.top_k(query, data, 7)
        np.testing.assert_array_equal(found["indices"], best.indices)
        assert relative_error(found["values"], best.values) < 2e-6
        assert relative_error(found["own"], influence.self_influences(data)) < 2e-6
        exact = ij.Influence(
            scope["OBJECTIVE"], params, ij.invert(ij.GGN(scope["OBJECTIVE"], params, data), ij.Direct(0.1))
        )
        assert relative_error(found["exact"], exact.influences(query, data)) < 1e-4  # the tolerance of BlockCG

    def test_example(self, example, tmp_path, capfd, monkeypatch):
        for name, value in QUICK.items():
            monkeypatch.setenv(name, value)
        arguments = argparse.Namespace(processes=2, devices=1, timeout=30.0, out=tmp_path / "scores")
        assert example.launch(arguments) == 0, capfd.readouterr().err
        assert "2 processes, 2 devices" in capfd.readouterr().out


class TestShares:
    def test_mistakes(self):
        with pytest.raises(ValueError, match="timeout: got 0"):
            ij.stream.connect(timeout=0)

    def test_rows_missing_in_the_middle(self):
        from influence_jax.stream.processes import check_counts

        check_counts(np.array([4, 3, 0]), 4, "loader")
        with pytest.raises(ValueError, match=r"\[3, 4\], so examples would be missing in the middle"):
            check_counts(np.array([3, 4]), 4, "loader")
