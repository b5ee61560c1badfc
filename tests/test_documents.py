"""What a new user runs first: the README's code and the example scripts."""

import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
USER_ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
USER_ENVIRONMENT["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"


def run(*arguments: str) -> str:
    """A script in a fresh interpreter with the user's defaults: no 64-bit mode, one device.

    Only the compiler's optimisations are left out, which take longer than what they save.
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
