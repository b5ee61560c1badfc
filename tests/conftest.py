"""Test settings: 64-bit mode, strict promotion, eight host devices, one BLAS thread.

These are settings of the tests, never of the library.
"""

import contextlib
import gc
import logging
import os
import pathlib

# Before jax is imported. LAPACK slows down many times over when its threads fight with the other test processes.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import hypothesis
import jax
import pytest
from compiling import compile_quickly, refuse_quick_convolutions

jax.config.update("jax_enable_x64", True)

# Tracing makes many objects and few cycles: looking for these less often saves a part of the time.
gc.set_threshold(20_000, 20, 20)

hypothesis.settings.register_profile("fixed", deadline=None, derandomize=True, max_examples=15, database=None)
hypothesis.settings.load_profile("fixed")

refuse_quick_convolutions()
compile_quickly(True)  # also what test modules compute when they are imported


def pytest_configure(config):
    config.addinivalue_line("markers", "thorough: left out by default; `-m thorough` runs these, `-m ''` all")
    config.addinivalue_line("markers", "as_users: compiled with all optimisations, as users do")


def as_users(item):
    return item.get_closest_marker("as_users") is not None


def pytest_collection_modifyitems(items):
    """Within a module, put tests compiled as users do last: nothing compiled is kept when that changes."""
    first = {}
    for place, item in enumerate(items):
        first.setdefault(item.path, place)
    items.sort(key=lambda item: (first[item.path], as_users(item)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Compile quickly, but as users do where a test asks for it: before its fixtures, of modules too, are made."""
    compile_quickly(not as_users(item))


# Every compiled program maps memory, and Linux grants a process 65,530 maps: beyond, the compiler crashes.
MOST_MAPS = 40_000


@pytest.fixture(autouse=True)
def few_programs(request):
    """Drop compiled programs before a process holds too many; looked at after every tenth test."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    request.config.tests_run = getattr(request.config, "tests_run", 0) + 1
    if request.config.tests_run % 10 == 0 and maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()


@pytest.fixture(autouse=True)
def strict():
    """No silent promotion of dtypes or ranks anywhere in the library."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def float32():
    """Run a test as most users do, with 64-bit mode off."""
    with jax.enable_x64(False):
        yield


@pytest.fixture
def compilations():
    """A context manager that yields the list of programs compiled inside it."""

    @contextlib.contextmanager
    def record():
        names: list[str] = []

        class Handler(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                if record.getMessage().startswith("Compiling "):
                    names.append(record.getMessage().split()[1])

        logger, handler = logging.getLogger("jax"), Handler()
        logger.addHandler(handler)
        try:
            with jax.log_compiles():
                yield names
        finally:
            logger.removeHandler(handler)

    return record
