"""Starting the sides, one process for each figure, and keeping what they found."""

import hashlib
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import venv
from datetime import UTC, datetime
from pathlib import Path

from .methods import MODULES, OURS, PROBLEMS

HERE = Path(__file__).parent
THREADS = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
PACKAGES = {
    OURS: ("influence-jax", "jax", "jaxlib", "flax", "optax", "numpy"),
    "peers": ("torch", "pydvl", "kronfluence", "numpy"),
}
RUNS, SECONDS = 9, 900  # warm runs at most, and how long one process may take


def peers_python():
    """The Python of an environment with what the peers need, made once beside this file."""
    folder = HERE / ".venv"
    done, python = folder / "complete", folder / "bin" / "python"
    if not done.exists():
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "-r", HERE / "requirements.txt"], check=True)
        done.touch()
    return str(python)


def environment():
    """One thread for everybody, no programs compiled before, and the defaults of jax."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    return ours | THREADS | {"JAX_PLATFORMS": "cpu"}


def call(python, module, *arguments, seconds=SECONDS):
    """Run a module of this folder; a RuntimeError says what went wrong there."""
    command = [python, "-m", f"comparison.{module}", *map(str, arguments)]
    settings = {"capture_output": True, "text": True, "env": environment(), "cwd": HERE.parent}
    try:
        done = subprocess.run(command, timeout=seconds, **settings)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"not done after {seconds} s") from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise RuntimeError(said[-1].strip() if said else f"ended by signal {-done.returncode}")


def versions(python):
    """Of Python and of the packages on either side."""
    code = "import importlib.metadata as m, json, platform, sys\n"
    code += "print(json.dumps({'python': platform.python_version()} | {p: m.version(p) for p in sys.argv[1:]}))"
    found = subprocess.run([python, "-c", code, *PACKAGES["peers"]], capture_output=True, text=True, check=True)
    ours = {name: importlib.metadata.version(name) for name in PACKAGES[OURS]}
    return {OURS: {"python": platform.python_version()} | ours, "peers": json.loads(found.stdout)}


def machine():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, one used"


def sources():
    """A digest of the code that is measured and that measures."""
    root = HERE.parent.parent
    files = sorted([*(root / "influence_jax").rglob("*.py"), *HERE.glob("*.py")])
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


class Kept:
    """Rows of a comparison so far, in a folder that is there until all are done."""

    def __init__(self, folder, about):
        self.folder, self.file = folder, folder / "rows.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        text = self.file.read_text() if self.file.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # without a line that was being written
        start, *rows = [json.loads(line) for line in whole.splitlines()] or [{}]
        now = {"versions": about, "sources": sources()}
        if now != {name: start.get(name) for name in now}:
            for file in folder.iterdir():  # of another version
                file.unlink()
            start, rows = now | {"date": f"{datetime.now(UTC):%Y-%m-%d}", "load": os.getloadavg()[0]}, []
            whole = json.dumps(start) + "\n"
        self.file.write_text(whole)
        self.start = start
        self.rows = {(row["method"], row["side"]): row for row in rows if "failed" not in row}

    def add(self, row):
        self.rows[row["method"], row["side"]] = row
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def remove(self):
        for file in self.folder.iterdir():
            file.unlink()
        self.folder.rmdir()


class Runner:
    """Measures methods, `quick` for small problems and one setting each."""

    def __init__(self, folder, python, quick):
        self.folder, self.python, self.quick = folder, python, quick

    def problem(self, name):
        """The file of a problem, made when first asked for."""
        made, path = self.folder / f"{name}.npz", self.folder / f"{name}.partial.npz"
        if not made.exists():
            call(sys.executable, "problems", name, path, *(["--quick"] if self.quick else []))
            path.rename(made)
        return made

    def once(self, method, name, setting):
        """Figures of one side with one setting."""
        side, output = method.sides[name], self.folder / f"figures{os.getpid()}.json"
        order = {
            "options": side.options | setting,
            "answer": side.answer or method.answer,
            "within": method.within or float("inf"),
            "runs": 1 if self.quick else RUNS,
            "gauss_newton": method.gauss_newton,
        }
        python = sys.executable if name == OURS else self.python
        call(python, MODULES[name], self.problem(method.problem), side.function, json.dumps(order), output)
        found = json.loads(output.read_text()) | {"setting": setting}
        if not math.isfinite(found["error"]):
            raise RuntimeError("its answer is not finite")
        return found

    def best(self, method, name):
        """Of the settings of a side the first that is accurate enough, or the fastest where none has to be."""
        tries = method.sides[name].tries
        tried, said = [], []
        for setting in tries[:1] if self.quick and method.within is None else tries:
            try:
                tried.append(self.once(method, name, setting))
            except RuntimeError as error:
                said.append(str(error))
                continue
            if method.within and tried[-1]["error"] <= method.within:
                return tried[-1]
        if not tried:
            raise RuntimeError(said[0])
        if method.within:
            nearest = min(figures["error"] for figures in tried)
            raise RuntimeError(f"no setting reaches an error of {method.within}, the best {nearest:.1e}")
        return min(tried, key=lambda figures: figures["warm_cpu_s"])

    def row(self, method, name):
        """One row of the comparison."""
        about = {"problem": method.problem, "method": method.name, "side": name}
        try:
            return about | self.best(method, name)
        except RuntimeError as error:
            return about | {"failed": str(error)[:300]}


def header(kept, about, quick):
    """What the figures depend on."""
    threads = "every process is bound to one core; OMP, OpenBLAS, MKL, torch and XLA have one thread each"
    loads = {"before": kept.start["load"], "after": os.getloadavg()[0]}
    return {
        "date": kept.start["date"],
        "machine": machine(),
        "threads": threads,
        "load": loads,
        "versions": about,
        "problems": PROBLEMS,
        "quick": quick,
    }
