"""What a new user runs first: the README's code and the example scripts."""

import os
import pathlib
import re
import subprocess
import sys

from conftest import KNOWN

ROOT = pathlib.Path(__file__).parent.parent
USER_ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
USER_ENVIRONMENT["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
USER_ENVIRONMENT["XLA_FLAGS"] = " ".join(f"--{name}={str(value).lower()}" for name, value in KNOWN.items())


def run(*arguments: str) -> str:
    """A script in a fresh interpreter with the user's defaults: no 64-bit mode, one device.

    Only the compiler is told to be quick, for its optimisations take longer than what they save.
    """
    command = [sys.executable, "-W", "error::DeprecationWarning:influence_jax", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=USER_ENVIRONMENT)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_readme_code_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 3
    checks = """
assert scores.shape == (20, 180) and how_to_change.shape == (20, 180, 8) and suspicious.shape == (180,)
assert bool(info.converged) and best.indices.shape == (20, 5) and scores.dtype == jnp.float32
"""
    run("-c", "\n".join(blocks) + checks)


def test_readme_commands_are_one_line_each():
    lines = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert [len(block.splitlines()) for block in lines] == [1, 1]
    assert lines[0].strip().endswith("examples/quickstart.py")
    assert lines[1].strip().endswith("-m pytest")


def test_quickstart(tmp_path):
    picture = tmp_path / "quickstart.png"
    printed = run("examples/quickstart.py", "--train", "400", "--picture", str(picture))
    assert picture.stat().st_size > 20_000
    assert "most helpful" in printed
    assert "most harmful" in printed
    precision, recall = map(int, re.search(r"top +20 .*precision (\d+)%, recall (\d+)%", printed).groups())
    assert precision == recall >= 70, printed


def test_transformer(tmp_path):
    picture = tmp_path / "transformer.png"
    small = ("--sequences", "200", "--steps", "200", "--width", "32", "--blocks", "1", "--picture", str(picture))
    printed = run("examples/transformer.py", *small)
    assert picture.stat().st_size > 50_000
    assert "Most harmful" in printed
    hits, share = map(int, re.search(r"is in (\d+) of the 10 most helpful sequences, and in (\d+)%", printed).groups())
    assert hits >= 5 > share / 5, printed  # many times the share among all


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


def test_lds_study(tmp_path):
    picture = tmp_path / "lds_study.png"
    small = ("--train", "200", "--queries", "30", "--subsets", "15", "--seeds", "2", "--hidden", "4")
    printed = run("examples/lds_study.py", *small, "--picture", str(picture))
    assert picture.stat().st_size > 30_000
    scores = {name: float(value) for name, value in re.findall(r"^(\S.*?) {2,}(\d\.\d{3})", printed, re.MULTILINE)}
    assert len(scores) == 5, printed
    assert scores["gradient dot"] < scores["exact Gauss-Newton"] < scores["ceiling of the seeds"] <= 1, printed


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
