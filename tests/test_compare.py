"""The side-by-side comparison is what it says: every method on two sides, and nothing in its report hidden."""

import ast
import pathlib
import sys

import pytest

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

from comparison import measuring, methods, report, running  # noqa: E402
from comparison.methods import KRONFLUENCE, METHODS, MODULES, OURS, PYDVL  # noqa: E402


def functions(side):
    """Names of the functions of a side's module and of their arguments, without importing what it imports."""
    tree = ast.parse((BENCHMARKS / "comparison" / f"{MODULES[side]}.py").read_text())
    return {f.name: {a.arg for a in f.args.args} for f in tree.body if isinstance(f, ast.FunctionDef)}


def served(side):
    """What its module hands to `main`."""
    tree = ast.parse((BENCHMARKS / "comparison" / f"{MODULES[side]}.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {arg.id for call in calls if ast.unparse(call.func) == "measuring.main" for arg in call.args}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_method_is_on_two_sides(method):
    """Ours first and a peer's, each by a function that there is, with options it takes."""
    assert next(iter(method.sides)) == OURS
    assert len(method.sides) >= 2
    for name, side in method.sides.items():
        arguments = functions(name)[side.function]
        assert side.function in served(name)
        assert set(side.options) <= arguments
        if side.function != "factors":  # whose other options go to the solver
            assert all(set(setting) <= arguments for setting in side.tries)


def test_every_problem_and_function_is_used():
    assert {method.problem for method in METHODS.values()} == set(methods.PROBLEMS)
    for name in MODULES:
        used = {method.sides[name].function for method in METHODS.values() if name in method.sides}
        assert used == served(name)
        quick = {METHODS[each].sides[name].function for each in methods.QUICK if name in METHODS[each].sides}
        assert quick == used


def row(method, side, warm, cold, peak, **more):
    times = {"warm_cpu_s": warm, "warm_wall_s": 2 * warm, "cold_cpu_s": cold, "cold_wall_s": 2 * cold}
    memory = {"peak_mb": peak, "warm_peak_mb": peak / 2}
    figures = {"setting": {"rtol": 0.1}, "error": 1e-4, "imports_cpu_s": 1.0, "stages_cpu_s": {"fit": 0.25}}
    return {"method": method, "side": side, "problem": "digits"} | figures | times | memory | more


@pytest.fixture
def results():
    """Made up: ahead warm by 8 and behind cold by 4 in one method, behind warm by 2 in another, and a failure."""
    rows = [
        row("cg", OURS, 0.5, 8.0, 100.0),
        row("cg", PYDVL, 4.0, 2.0, 50.0),
        row("harmonic", OURS, 0.5, 1.0, 100.0),
        row("harmonic", PYDVL, 0.25, 4.0, 200.0),
        row("dot", OURS, 0.5, 1.0, 10.0),
        {"method": "dot", "side": KRONFLUENCE, "problem": "digits", "failed": "ValueError: a | b"},
    ]
    versions = {OURS: {"jax": "1.2.3"}, "peers": {"torch": "4.5.6"}}
    header = {"date": "2020-01-01", "machine": "abacus", "threads": "one", "versions": versions, "quick": False}
    return {"header": header | {"load": {"before": 0.1, "after": 1.0}, "problems": methods.PROBLEMS}, "rows": rows}


def test_table(results):
    lines = report.table(results).splitlines()
    assert len(lines) == 2 + 6
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    ours, theirs = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:4])
    assert ours[:4] == [METHODS["cg"].title + " (digits)", OURS, "rtol 0.1", "1.0e-04"]
    assert ours[-2:] == ["", ""]
    assert theirs[4:8] == ["4.00", "8.00", "2.00", "4.00"]
    assert theirs[8:] == ["50", "25", "", "8", "0.25"]


def test_means_are_of_both_ways(results):
    (told,) = report.means(results)
    assert told.startswith("pyDVL: geometric mean of CPU seconds over 2 methods with errors of at most 0.1")
    assert told.endswith(" 2 times ours warm, 1 times ours cold.")


def test_what_is_slower_is_told(results):
    warm, cold, peak, memory = report.behind(results)
    assert warm == f"* CPU seconds warm: {METHODS['harmonic'].title} (pyDVL) 2.0."
    assert cold == f"* CPU seconds cold: {METHODS['cg'].title} (pyDVL) 4.0."
    assert peak == f"* peak memory: {METHODS['cg'].title} (pyDVL) 2.0."
    assert memory == f"* memory of a warm run: {METHODS['cg'].title} (pyDVL) 2.0."


def test_failures_and_a_busy_machine_are_told(results):
    text = report.markdown(results, "chart.png")
    assert "failed: ValueError: a \\| b" in text
    assert "1 rows failed" in text
    assert "not idle" not in text
    results["header"]["load"]["before"] = 0.9
    text = report.markdown(results, "chart.png")
    for told in ("not idle: load 0.90", "jax 1.2.3", "torch 4.5.6", "abacus"):
        assert told in text


def test_inaccurate_answers_are_not_timed_warm(monkeypatch):
    """And those accurate enough are, at most as often as ordered, all stages each time."""
    monkeypatch.setattr(measuring, "freeze", lambda: None)  # this process goes on
    monkeypatch.setattr(measuring, "start_peak", lambda: 1.0)
    monkeypatch.setattr(measuring, "memory", lambda field: 3.0)
    calls = []
    stages = {"fit": lambda: calls.append("fit") or 2.0, "scores": lambda fitted: calls.append("scores") or [fitted, 0]}
    order = {"answer": "scores", "within": 0.1, "runs": 3}
    wrong = measuring.figures(measuring.Case(stages), {"scores": [1.0, 0.0]}, order)
    assert wrong["error"] == 1
    assert "warm_cpu_s" not in wrong
    right = measuring.figures(measuring.Case(stages), {"scores": [2.0, 0.0]}, order)
    assert right["error"] == 0
    assert right["warm_runs"] == 3
    assert calls == ["fit", "scores"] * 5
    assert set(right["stages_cpu_s"]) == {"fit", "scores"}
    assert right["peak_mb"] == right["warm_peak_mb"] == 2


def test_interrupted_runs_continue(tmp_path):
    """With the rows that were finished and did not fail; those of other versions are gone."""
    done = row("cg", OURS, 0.5, 8.0, 100.0)
    kept = running.Kept(tmp_path, {"jax": "1"})
    kept.add(done)
    kept.add({"method": "cg", "side": PYDVL, "failed": "no memory"})
    (tmp_path / "digits.npz").touch()
    with kept.file.open("a") as file:
        file.write('{"method": "harm')  # killed while writing
    kept = running.Kept(tmp_path, {"jax": "1"})
    kept.add(row("dot", OURS, 0.5, 8.0, 100.0))
    again = running.Kept(tmp_path, {"jax": "1"})
    assert list(again.rows) == [("cg", OURS), ("dot", OURS)]
    assert again.rows["cg", OURS] == done
    assert running.Kept(tmp_path, {"jax": "2"}).rows == {}
    assert not (tmp_path / "digits.npz").exists()
