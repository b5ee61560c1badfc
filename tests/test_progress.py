"""Progress bars: where they show, and how they end."""

import builtins
import contextlib
import importlib
import inspect
import io
import os
import pkgutil
import pty
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import influence_jax as ij
from influence_jax import _progress
from influence_jax.stream import operators

PARAMS = {"w": jnp.array(1.0)}
QUERY = ij.Batch(jnp.array([1.0]))
ERASED = r"\r\x1b\[2K(\x1b\[1A\x1b\[2K)*\x1b\[\?25h\r$"  # all lines are empty, and the cursor is shown again
BATCHES = [ij.Batch(jnp.array([1.0 + i, 2.0])) for i in range(4)]


def loss(params, z):
    return 0.5 * (params["w"] * z.x) ** 2


INFLUENCE = ij.Influence(loss, PARAMS, ij.Identity(PARAMS))


class Screen:
    """What is written to a terminal, or shown under the cells of a notebook."""

    def __init__(self) -> None:
        self.cell, self.shown = 1, {}  # the text of every output, by its cell
        self.updates = 0

    def display(self, bundle, *, raw, display_id):
        assert raw
        assert display_id
        self.shown[self.cell] = bundle["text/plain"]
        assert "scores" not in bundle["text/plain"] or "scores" in bundle["text/html"]
        return types.SimpleNamespace(update=lambda bundle, raw, cell=self.cell: self.updated(cell, bundle))

    def updated(self, cell, bundle):
        self.updates += 1
        self.shown[cell] = bundle["text/plain"]


@pytest.fixture
def notebook(monkeypatch):
    """A notebook, as IPython shows one to Python."""
    screen = Screen()
    Shell = type("ZMQInteractiveShell", (), {"execution_count": property(lambda self: screen.cell)})
    shell, display = Shell(), types.ModuleType("IPython.display")
    display.display = screen.display
    front = types.ModuleType("IPython")
    front.display, front.get_ipython, front.version_info = display, lambda: shell, (9, 0)  # jax asks, too
    monkeypatch.setitem(sys.modules, "IPython", front)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setattr(builtins, "get_ipython", lambda: shell, raising=False)
    monkeypatch.setattr(_progress, "REDRAWN", 0)
    monkeypatch.setattr(_progress, "_LATEST", [None])
    return screen


@contextlib.contextmanager
def terminal():
    """A terminal for standard error; when the block has ended, what was written to it is in the list."""
    ours, theirs = pty.openpty()
    written = []
    with pytest.MonkeyPatch.context() as patch, open(theirs, "w") as stream, open(ours, "rb", buffering=0) as screen:
        patch.setenv("TERM", "xterm")
        patch.setenv("COLUMNS", "100")
        patch.setattr(sys, "stderr", stream)  # here, for pytest replaces it when a test begins
        os.set_blocking(ours, False)
        yield written
        stream.flush()
        written.append(b"".join(iter(lambda: screen.read(65536), None)).decode())


def lines(text: str) -> list[str]:
    """Name and count of every bar."""
    return [f"{name} {count}" for name, count in re.findall(r"^(.*?) +[━╸╺ ]+ (\d+/[\d?]+) ", text, re.MULTILINE)]


def test_notebook_shows_one_line_for_each_kind_of_loop(notebook):
    ij.stream.scores(INFLUENCE, QUERY, BATCHES)
    assert lines(notebook.shown[1]) == ["scores 4/4"]
    assert notebook.updates >= 4
    for _ in range(3):
        ij.stream.top_k(INFLUENCE, QUERY, lambda: iter(BATCHES[:3]), 2)  # whose length is not known
    assert lines(notebook.shown[1]) == ["scores 4/4", "top 2 3/3"]
    notebook.cell += 1
    ij.stream.scores(INFLUENCE, QUERY, BATCHES[:2])
    assert [lines(text) for text in notebook.shown.values()] == [["scores 4/4", "top 2 3/3"], ["scores 2/2"]]


def test_notebook_shows_passes_of_a_solve_in_one_line(notebook):
    inverse = ij.stream.invert(ij.Hessian, loss, PARAMS, BATCHES[:2], ij.CG(damping=1.0))
    assert lines(notebook.shown[1]) == ["curvature 2/2"]  # for the losses
    influence = ij.Influence(loss, PARAMS, inverse)
    ij.stream.self_influences(influence, BATCHES[:3])
    first, second = lines(notebook.shown[1])
    assert first == "self-influences 3/3"
    assert re.fullmatch(r"curvature, pass \d+ 2/2", second)
    inverse.mv(PARAMS)
    assert len(lines(notebook.shown[1])) == 2


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_notebook_bars_end_with_the_loop(notebook, error):
    def fail(batch):
        if batch.x[0] > 2:
            raise error("of the loop")
        return batch.x

    with pytest.raises(error) as kept:  # as a notebook keeps the last traceback, and with it the loop's frame
        ij.stream.accumulate(fail, BATCHES)
    assert lines(notebook.shown[1]) == ["average, stopped 2/4"]
    del kept
    ij.stream.accumulate(lambda batch: batch.x, BATCHES)
    assert lines(notebook.shown[1]) == ["average 4/4"]


def test_notebook_bars_end_with_a_product(notebook, monkeypatch):
    def stop(total, part):
        raise KeyboardInterrupt

    inverse = ij.stream.invert(ij.Hessian, loss, PARAMS, BATCHES, ij.CG(damping=1.0))
    monkeypatch.setattr(operators, "_added", stop)
    with pytest.raises(KeyboardInterrupt) as kept:
        inverse.mv(PARAMS)
    assert lines(notebook.shown[1]) == ["curvature, pass 2, stopped 1/4"]
    assert kept.tb


def test_terminal_shows_bars_and_is_left_clean():
    inverse = ij.stream.invert(ij.Hessian, loss, PARAMS, BATCHES[:2], ij.CG(damping=1.0))
    with terminal() as written:
        ij.stream.self_influences(ij.Influence(loss, PARAMS, inverse), BATCHES[:3])
    (text,) = written
    assert "self-influences" in text
    assert re.search(ERASED, text)
    assert text.count("\x1b[?25l") == 1  # the passes of the solves, nested in the other, had no display of their own


def test_terminal_bar_ends_with_the_loop():
    def fail(batch):
        if batch.x[0] > 2:
            raise KeyboardInterrupt
        return batch.x

    with terminal() as written, pytest.raises(KeyboardInterrupt) as kept:
        ij.stream.accumulate(fail, BATCHES)
    assert re.search(ERASED, written[0])
    assert kept.tb  # which holds the loop


def test_what_is_printed_meanwhile_goes_where_it_would(monkeypatch):
    file = io.StringIO()
    monkeypatch.setattr(sys, "stdout", file)
    with terminal() as written:
        ij.stream.accumulate(lambda batch: print("a line") or batch.x, BATCHES)
    assert file.getvalue() == "a line\n" * 4
    assert "average" in written[0]
    assert "a line" not in written[0]


@pytest.mark.parametrize("force", [False, True])
def test_nothing_is_written_where_nobody_watches(capfd, monkeypatch, force):
    if force:
        monkeypatch.setenv("FORCE_COLOR", "1")
    ij.stream.scores(INFLUENCE, QUERY, BATCHES)
    assert capfd.readouterr() == ("", "")


def test_no_bars_when_not_asked_for_of_one_batch_and_in_other_processes(notebook, monkeypatch):
    ij.stream.scores(INFLUENCE, QUERY, BATCHES, progress=False)
    ij.stream.scores(INFLUENCE, QUERY, BATCHES[:1])
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    ij.stream.scores(INFLUENCE, QUERY, BATCHES)
    assert not notebook.shown


def test_retraining_says_how_fast(notebook):
    mean = lambda weights, key: (weights @ jnp.arange(6.0)) / weights.sum()
    ij.retrain.retrain(mean, ij.retrain.leave_one_out(6), jax.random.key(0), group=2, how="each")
    assert re.match(r"retraining, each, [\d,]+ a minute ━+ 6/6 ", notebook.shown[1])


def functions():
    """Every public function of the package."""
    modules = [importlib.import_module(info.name) for info in pkgutil.walk_packages(ij.__path__, "influence_jax.")]
    for module in (ij, *modules):
        for name, value in vars(module).items():
            if inspect.isfunction(value) and not name.startswith("_") and value.__module__.startswith("influence_jax"):
                yield value


def test_bars_are_on_by_default_everywhere():
    defaults = {
        function: inspect.signature(function).parameters["progress"].default
        for function in functions()
        if "progress" in inspect.signature(function).parameters and "._" not in function.__module__
    }
    assert len(defaults) >= 13
    assert set(defaults.values()) == {True}
    assert np.all(["progress: Whether to show" in function.__doc__ for function in defaults])
