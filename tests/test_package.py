"""The package itself: what it imports, in which order, how long its files are, which jax it refuses."""

import ast
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import compile_quickly
from helpers import relative_error

import influence_jax as ij
from influence_jax._jax_version import require_supported_jax

PACKAGE = pathlib.Path(ij.__file__).parent

# Each layer may import the layers above it and its own siblings listed earlier.
LAYERS = [
    ["_typing", "_jax_version", "_jaxpr_compat", "_pytree", "_reprs", "_memory", "_mesh"],
    ["tree", "_words", "_traced", "_one_hot", "_crossed", "_predicted", "_lookups", "_rows"],
    ["batching", "blocks"],
    ["objective", "losses", "_class_numbers", "_sound"],
    ["adapters", "gradients"],
    [
        "capture.views",
        "capture.rules",
        "capture.analysis",
        "capture.run",
        "capture.layers",
        "capture.contract",
        "capture.coverage",
        "capture",
    ],
    ["scoring"],
    ["projections.base", "projections.whole", "projections.sides", "projections"],
    [
        "curvature.layout",
        "curvature.operator",
        "curvature.loops",
        "curvature.capabilities",
        "curvature.blocked",
        "curvature.structured",
        "curvature.algebra",
    ],
    [
        "curvature.projected",
        "curvature.outputs",
        "curvature.convexity",
        "curvature.parts",
        "curvature.exact",
        "curvature.flat",
        "curvature.spectrum",
        "curvature.masks",
        "curvature.labels",
        "curvature.fisher",
        "curvature.losses",
        "curvature.per_example",
        "curvature.assembled",
        "curvature.kronecker",
        "curvature.kronecker_fit",
        "curvature.unmasked",
        "curvature.kfac",
        "curvature",
    ],
    [
        "solvers.info",
        "solvers.damping",
        "solvers.base",
        "solvers.direct",
        "solvers.cg",
        "solvers.block_cg",
        "solvers.lissa",
        "solvers.lowrank",
        "solvers.harmonic",
        "solvers.sample_space",
        "solvers.precondition",
        "solvers.blockwise",
        "solvers",
    ],
    ["influence"],
    ["model", "bounds", "baselines"],
    [
        "store.files",
        "store.arrays",
        "store.manifests",
        "store.growing",
        "store.projected",
        "store.outcomes",
        "store.gradients",
        "store.scores",
        "store.states",
        "store",
    ],
    [
        "_progress",
        "stream.processes",
        "stream.loaders",
        "stream.averages",
        "stream.operators",
        "stream.identity",
        "stream.kronecker",
        "stream.inverse",
        "stream.tables",
        "stream.scores",
        "stream.gradients",
        "stream",
    ],
    ["_footprint", "planning", "sharding"],
    ["general"],
    ["_steps", "training", "unrolled"],
    ["_runs", "_outcomes", "retrain"],
    [
        "metrics.checks",
        "metrics.ranks",
        "metrics.retraining",
        "metrics.intervals",
        "metrics.rankings",
        "metrics",
    ],
    ["_drawing", "_gallery", "plot"],
    [""],
]
ORDER = [name for layer in LAYERS for name in layer]


def modules() -> dict[str, pathlib.Path]:
    """Dotted name below the package of every file."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


def imported(name: str, path: pathlib.Path) -> set[str]:
    """Modules of the package that a file imports, wherever in the file."""
    package = name.split(".")[:-1] if path.name != "__init__.py" else [part for part in name.split(".") if part]
    known, found = modules(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            for alias in node.names:
                module = ".".join([*base, alias.name])
                found.add(module if module in known else ".".join(base))
    return found


def test_every_module_has_its_place():
    assert sorted(modules()) == sorted(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_imports_run_one_way(name):
    for other in imported(name, modules()[name]):
        assert ORDER.index(other) < ORDER.index(name), f"{name} imports {other}"


def test_architecture_of_the_readme_is_that_of_the_imports():
    """Its table has the layers in the order that is checked above, packages by name."""
    section = (PACKAGE.parent / "README.md").read_text().split("### Architecture\n")[1].split("\n###")[0]
    table = [re.findall(r"`(\w+)`", line.split("|")[1]) for line in section.splitlines() if line.startswith("| `")]
    tops = [list(dict.fromkeys(name.split(".")[0] for name in layer)) for layer in LAYERS[:-1]]
    assert table == [layer for layer, before in zip(tops, [[], *tops], strict=False) if layer != before]


def test_files_hold_one_subject():
    """They are cut by subject; whatever is longer than this holds several."""
    root = PACKAGE.parent
    paths = [
        path
        for folder in ("influence_jax", "tests", "examples", "benchmarks")
        for path in root.glob(f"{folder}/**/*.py")
    ]
    lengths = {str(path.relative_to(root)): len(path.read_text().splitlines()) for path in paths}
    assert "tests/test_package.py" in lengths
    assert {name: length for name, length in lengths.items() if length > 800} == {}


def test_functions_fit_a_screen():
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                length = body[-1].end_lineno - body[0].lineno + 1 if body else 0
                assert length <= 40, f"{name}.{node.name} has {length} lines"


def test_library_leaves_the_configuration_alone():
    for path in modules().values():
        assert "config.update" not in path.read_text(), path


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_is_light():
    """No flax module, matplotlib, tensorstore, orbax; under half a second beyond jax and optax (best of three)."""
    code = (
        "import time, sys, jax, optax; start = time.process_time(); import influence_jax; "
        "print(time.process_time() - start, [m for m in sys.modules if m.split('.')[0] in "
        "('flax', 'matplotlib', 'tensorstore', 'orbax', 'sklearn')])"
    )
    runs = [run(code).split(" ", 1) for _ in range(3)]
    assert {heavy for _, heavy in runs} == {"[]"}
    assert min(float(seconds) for seconds, _ in runs) < 0.5


class TestJaxVersions:
    @pytest.mark.parametrize(
        "version", ["0.9.0", "0.9.2", "0.9.0.1", "0.11.0", "0.12.0.1", "1.0.0", "0.13.0.dev20270101"]
    )
    def test_supported(self, version):
        require_supported_jax(version)

    @pytest.mark.parametrize("version", ["0.10.0", "0.10.2", "0.10.3.dev1", "0.8.3", "0.4.38"])
    def test_refused_in_words(self, version):
        with pytest.raises(ImportError, match=rf"jax {version} .*pip install --upgrade 'jax>=0.9.0,!=0.10"):
            require_supported_jax(version)

    def test_importing_under_jax_0_10_is_refused(self):
        code = (
            "import jax; jax.__version__ = '0.10.2'\n"
            "try:\n    import influence_jax\nexcept ImportError as error:\n    print(error)\n"
            "else:\n    raise SystemExit('imported')"
        )
        message = run(code)
        assert message.startswith("jax 0.10.2 silently computes wrong numbers on CPU")
        assert "pip install --upgrade 'jax>=0.9.0,!=0.10.*'" in message


def test_what_was_compiled_quickly_is_compiled_again_as_users_do(compilations):
    @jax.jit
    def double(x):
        return 2 * x

    double(3.0)
    compile_quickly(False)
    with compilations() as names:
        double(3.0)
    compile_quickly(True)
    assert names == ["jit(double)"]


@pytest.mark.as_users
class TestProbe:
    """Programs that jax 0.10 gets wrong on CPU; any jax that fails here must be excluded, never retried."""

    @pytest.mark.parametrize(("dtype", "rows"), [(np.float64, 16_385), (np.float32, 32_769), (np.float32, 40_000)])
    @pytest.mark.parametrize("width", [2, 3, 4])
    def test_vmapped_matvec_then_reduction(self, dtype, rows, width):
        x = np.zeros((rows, width), dtype)
        x[:, 0] = np.arange(rows)
        matrix = np.eye(width, dtype=dtype)
        program = jax.jit(lambda m, x: jax.vmap(lambda row: jnp.sum((m @ row) ** 2))(x))
        assert np.count_nonzero(np.asarray(program(matrix, x)) != x[:, 0] ** 2) == 0

    @pytest.mark.parametrize("sharded", [False, True])
    def test_empirical_fisher_cholesky_solve(self, sharded):
        """Per-example gradients, their Gram matrix, a Cholesky solve, on one device and on eight."""
        rng = np.random.default_rng(0)
        x, y = rng.normal(size=(512, 20)), rng.normal(size=(512, 3))
        params = {"kernel": rng.normal(size=(20, 3)), "bias": rng.normal(size=3)}
        residual = x @ params["kernel"] + params["bias"] - y
        outer = (x[:, :, None] * residual[:, None, :]).reshape(512, -1)
        grads = np.concatenate([residual, outer], axis=1)
        dense = grads.T @ grads / 512 + 1e-2 * np.eye(63)
        v = rng.normal(size=(8, 63))
        data = ij.Batch(x, y)
        if sharded:
            mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
            data = jax.device_put(data, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
        loss = ij.Objective(lambda p, z: z.x @ p["kernel"] + p["bias"], lambda out, z: 0.5 * jnp.sum((out - z.y) ** 2))
        for _ in range(5):
            inverse = ij.invert(ij.EmpiricalFisher(loss, params, data, chunk=64), ij.Direct(1e-2))
            solved = ij.flatten(inverse.mm(ij.unflatten(jnp.asarray(v), params)), params)
            assert relative_error(solved, np.linalg.solve(dense, v.T).T) < 1e-10
