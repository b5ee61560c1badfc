"""What a new user runs first: the README's code and the example scripts."""

import os
import pathlib
import re
import subprocess
import sys
import types

import jupytext
import matplotlib
import pytest
from compiling import QUICK

ROOT = pathlib.Path(__file__).parent.parent
USER_ENVIRONMENT = os.environ | QUICK


def run(*arguments: str, **environment: str) -> str:
    """A script in a fresh interpreter with the user's defaults: no 64-bit mode, one device.

    Only the compiler is told to be quick, for its optimisations take longer than what they save.
    """
    command = [sys.executable, "-W", "error::DeprecationWarning:influence_jax", *arguments]
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env=USER_ENVIRONMENT | environment
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


README = (ROOT / "README.md").read_text()


def code_blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", README, re.DOTALL)


# What the README's code has to have found, by formulas of their own.
CHECKS = """
assert scores.shape == nnx_scores.shape == plain_scores.shape == layer_wise.shape == (20, 180)
assert bool(info.converged) and best.indices.shape == (20, 5) and scores.dtype == jnp.float32
assert abs(change * count * (1 - leverage) / score - 1) < 1e-4

def grads(batch):
    return np.asarray(ij.flatten(ij.per_example_grads(objective, params, batch), params), np.float64)

def error(found, operator, damping):
    damped = np.asarray(ij.to_dense(operator), np.float64) + damping * np.eye(operator.size)
    exact = grads(query) @ np.linalg.solve(damped, grads(train).T)
    return np.max(np.abs(found - exact)) / np.max(np.abs(exact))

assert error(certain, curvature, 1e-2) < 1e-3
assert error(richardson_scores, curvature, 0.1) < 1e-3
assert error(penalised_scores, curvature + penalty, 1e-3) < 1e-3
"""


def test_readme_code_runs():
    """Every block, in order; a solver and an operator written as it says solve what they are for."""
    run("-c", "\n".join(code_blocks("python")) + CHECKS)


def test_readme_code_for_a_cluster_runs():
    """In a cluster of one process, as Slurm would start it."""
    (block,) = code_blocks("python cluster")
    connect, rest = block.split("\n", 1)
    before = """
import tempfile, jax, jax.numpy as jnp, numpy as np, optax, influence_jax as ij
from jax.sharding import NamedSharding, PartitionSpec
"""
    data = """
folder, rng = tempfile.mkdtemp(), np.random.default_rng(0)
memory_maps = ij.Batch(np.float32(rng.normal(size=(100, 4))), np.int32(rng.integers(0, 2, 100)))
query = jax.tree.map(lambda x: x[:7], memory_maps)
cross_entropy = lambda out, z: optax.softmax_cross_entropy_with_integer_labels(out, z.y)
objective, params = ij.Objective(lambda p, z: z.x @ p["w"], cross_entropy), {"w": jnp.ones((4, 2))}
"""
    names = ("STEP_NUM_NODES", "STEP_NUM_TASKS", "STEP_TASKS_PER_NODE", "NTASKS", "JOB_ID")
    slurm = dict.fromkeys((f"SLURM_{name}" for name in names), "1")
    slurm |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "localhost"}
    shape = 'print(ij.store.ScoreStore.open(f"{folder}/scores.zarr").shape)'
    assert run("-c", before + connect + data + rest + shape, **slurm).strip() == "(7, 100)"


def test_readme_has_no_code_that_is_not_run():
    kinds = set(re.findall(r"^```(\S.*)$", README, re.MULTILINE))
    assert kinds == {"sh", "python", "python cluster", "text", "bibtex"}
    first, *_ = blocks = code_blocks("python")
    (solver,) = (block for block in blocks if "(ij.Solver)" in block)
    (operator,) = (block for block in blocks if "(ij.LinearOperator)" in block)
    assert max(len(block.splitlines()) for block in (first, solver, operator)) <= 30


def test_readme_commands_are_one_line_each():
    lines = code_blocks("sh")
    assert [len(block.splitlines()) for block in lines] == [1, 1]
    assert lines[0].strip().endswith("examples/quickstart.py")
    assert lines[1].strip().endswith("-m pytest")


def test_examples_are_notebooks(monkeypatch):
    """Text and code in turn; and in a kernel, whose arguments are not theirs, code that takes no notice of them."""
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    monkeypatch.delattr(matplotlib, "use")  # pictures are shown where the kernel shows them
    examples = sorted((ROOT / "examples").glob("*.py"))
    assert len(examples) >= 8
    for path in examples:
        cells = jupytext.read(path).cells
        texts = [cell.source for cell in cells if cell.cell_type == "markdown"]
        assert [cell.cell_type for cell in cells[:3]] == ["markdown", "markdown", "code"], path
        assert texts[0].startswith("# "), path
        assert all(text.startswith("## ") for text in texts[1:]), path
        scope = {"__name__": path.stem, "__doc__": "Of the notebook."}  # and no __file__
        code = [cell.source for cell in cells if cell.cell_type == "code"]
        exec(code[0], scope)
        if path.stem != "processes":
            assert scope["args"].picture == f"{path.stem}.png"
            continue
        for source in code[1:]:
            exec(source, scope)
        assert scope["parse"]().processes is None


def test_quickstart(tmp_path):
    picture = tmp_path / "quickstart.png"
    printed = run("examples/quickstart.py", "--train", "400", "--picture", str(picture))
    assert picture.stat().st_size > 20_000
    assert "most helpful" in printed
    assert "most harmful" in printed
    precision, recall = map(int, re.search(r"top +20 .*precision (\d+)%, recall (\d+)%", printed).groups())
    assert precision == recall >= 70, printed


@pytest.mark.thorough
def test_transformer(tmp_path):
    picture = tmp_path / "transformer.png"
    data = ("--sequences", "150", "--steps", "300", "--batch", "8")
    network = ("--width", "32", "--blocks", "1")
    printed = run("examples/transformer.py", *data, *network, "--picture", str(picture))
    assert picture.stat().st_size > 50_000
    assert "Most harmful" in printed
    hits, share = map(int, re.search(r"is in (\d+) of the 10 most helpful sequences, and in (\d+)%", printed).groups())
    assert hits >= 7 > share / 2, printed  # many times the share among all
    assert re.search(r"most helpful are from these families: ([7-9]|10) brief", printed), printed


@pytest.mark.thorough
def test_training_loop(tmp_path):
    picture = tmp_path / "training_loop.png"
    small = ("--train", "400", "--epochs", "12", "--every", "4", "--picture", str(picture))
    printed = run("examples/training_loop.py", *small)
    assert picture.stat().st_size > 10_000
    plain, curated = map(float, re.findall(r"test accuracy ([\d.]+)%", printed))
    assert curated > plain + 3, printed
    precisions = [int(share) for share in re.findall(r"(\d+)% of them with a wrong label", printed)]
    assert len(precisions) == 2, printed
    assert min(precisions) > 80, printed


@pytest.mark.thorough
def test_mislabels(tmp_path):
    picture = tmp_path / "mislabels.png"
    small = ("--train", "300", "--checked", "40", "--hidden", "8", "--epochs", "60", "--picture", str(picture))
    printed = run("examples/mislabels.py", *small)
    assert picture.stat().st_size > 50_000
    area = {name: float(value) for name, value in re.findall(r"^(\S.*?) +(\d\.\d{3}) \(", printed, re.MULTILINE)}
    assert len(area) == 3, printed
    assert min(area["self-influence"], area["loss"]) > 0.9, printed
    assert area["harm to checked images"] > 0.6, printed
    best, second = re.search(r"Best here: (.*), by .* before (.*)\.", printed).groups()
    assert [best, second] == sorted(area, key=area.get)[:0:-1], printed


@pytest.mark.thorough
def test_lds_study(tmp_path):
    picture = tmp_path / "lds_study.png"
    small = ("--train", "200", "--queries", "30", "--subsets", "15", "--seeds", "2", "--hidden", "4")
    printed = run("examples/lds_study.py", *small, "--picture", str(picture))
    assert picture.stat().st_size > 30_000
    scores = {name: float(value) for name, value in re.findall(r"^(\S.*?) {2,}(\d\.\d{3})", printed, re.MULTILINE)}
    assert len(scores) == 5, printed
    assert scores["gradient dot"] < scores["exact Gauss-Newton"] < scores["ceiling of the seeds"] <= 1, printed


@pytest.mark.thorough
def test_damping(tmp_path):
    picture = tmp_path / "damping.png"
    small = ("--train", "200", "--queries", "60", "--subsets", "15", "--hidden", "4", "--picture", str(picture))
    printed = run("examples/damping.py", *small)
    assert picture.stat().st_size > 30_000
    swept = {damping: float(score) for damping, score in re.findall(r"damping (\S+): LDS (-?\d\.\d{3})", printed)}
    chosen, judged = re.search(r"chosen (\S+); LDS of the other test images (\d\.\d{3})", printed).groups()
    assert len(swept) == 9, printed
    assert swept[chosen] == max(swept.values()) > swept["1.0e+00"] + 0.1, printed
    assert float(judged) > swept["1.0e+00"] + 0.1, printed


@pytest.mark.thorough
def test_repair(tmp_path):
    picture = tmp_path / "repair.png"
    small = ("--train", "300", "--checked", "60", "--hidden", "8", "--seeds", "3", "--picture", str(picture))
    printed = run("examples/repair.py", *small)
    assert picture.stat().st_size > 50_000
    accuracy = {
        (name, int(count)): float(value)
        for count, name, value in re.findall(r"^ *(\d+)  (\S.*?)  .*?([\d.]+)% \(", printed, re.MULTILINE)
    }
    assert accuracy["most harmful", 60] > accuracy["none", 0] + 2, printed
    assert accuracy["most harmful", 60] > accuracy["at random", 60] + 2, printed
