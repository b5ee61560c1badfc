"""Running out of memory is told in words: by which call, how much it asked for, and what takes less."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import planned
import pytest
from helpers import relative_error
from planned import first

import influence_jax as ij
from influence_jax._memory import OutOfMemory, is_out_of_memory, memory_errors, requested

problem = planned.problem  # the fixture
HUGE = np.broadcast_to(np.float32(1), (2**22, 2**22))  # 64 TiB, were it written out


def wide_loss(params, example):
    """Holds 64 TiB."""
    row = jnp.full((2**22,), example) * params["w"]
    return jnp.sum(jnp.tanh(jnp.outer(row, row)) @ row)


class TestRunningOutOfMemory:
    @pytest.mark.parametrize(
        ("message", "size"),
        [
            ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 4294967296 bytes.", "4.00 GiB"),
            ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12.00GiB.", "12.00 GiB"),
            ("INTERNAL: Error dispatching computation: Out of memory allocating 70368777732100 bytes.", "64.00 TiB"),
            ("RESOURCE_EXHAUSTED: Attempting to allocate 2.00G. That was not possible. There are 9.5M free.", "2.00 G"),
            ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 21.95G of 15.48G hbm.", "21.95 G"),
            ("RESOURCE_EXHAUSTED: Failed to allocate request for 2.0KiB (2048B) on device ordinal 0", "2.0 KiB"),
            ("RESOURCE_EXHAUSTED: quota", None),
        ],
    )
    def test_how_much_was_asked_for(self, message, size):
        assert requested(message) == size
        error = jax.errors.JaxRuntimeError(message)
        with (
            pytest.raises(MemoryError, match=r"Influence.influences: ran out of memory") as caught,
            memory_errors("Influence.influences"),
        ):
            raise error
        assert caught.value.__cause__ is error
        assert (f"asking for {size} at once" in str(caught.value)) == (size is not None)
        for knob in (
            "chunk=",
            "rhs_chunk=",
            "batch_size=",
            "fewer queries",
            "influence_jax.planning.plan(influence, query, train, budget=...)",
        ):
            assert knob in str(caught.value)

    def test_of_the_host(self):
        message = r"fit: ran out of memory, asking for 64.0 TiB at once. Less is taken by air"
        with pytest.raises(MemoryError, match=message) as caught, memory_errors("fit", "air"):
            np.ones((2**22, 2**22), np.float32)
        assert not isinstance(caught.value.__cause__, OutOfMemory)

    def test_real_allocations(self):
        params = {"w": jnp.float32(1.0)}
        batch = jnp.ones(1, jnp.float32)
        influence = ij.Influence(wide_loss, params, ij.invert(ij.Diagonal(params), ij.CG(1.0)))
        calls = {
            "influences": lambda: influence.influences(batch, batch),
            "influence_factors": lambda: influence.influence_factors(batch),
            "self_influences": lambda: influence.self_influences(batch),
            "top_k": lambda: influence.top_k(batch, batch, 1),
            "influences_from_factors": lambda: influence.influences_from_factors(
                {"w": jnp.ones((1,), jnp.float32)}, HUGE
            ),
        }
        for name, call in calls.items():
            with pytest.raises(
                MemoryError, match=rf"Influence.{name}: ran out of memory, asking for 64.00 TiB"
            ) as caught:
                call()
            assert isinstance(caught.value.__cause__, jax.errors.JaxRuntimeError)
            assert is_out_of_memory(caught.value.__cause__)

    def test_of_solvers(self, monkeypatch):
        params = {"w": jnp.ones(7)}  # a size of its own, or the programs are known already
        exhausted = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1048576 bytes.")

        def fail(*args, **kwargs):
            raise exhausted

        inverse = ij.invert(ij.Diagonal(params), ij.CG(1.0))
        monkeypatch.setattr(ij.CG, "solve", fail)
        with pytest.raises(MemoryError, match=r"Inverse.solve_many: .* 1.00 MiB at once. .* curvature operator"):
            inverse.solve_many({"w": jnp.ones((3, 7))})
        monkeypatch.setattr(ij.CG, "fit", fail)
        with pytest.raises(MemoryError, match=r"invert: ran out .* BlockCG or CG where Direct and Eigh form a matrix"):
            ij.invert(ij.Diagonal({"w": jnp.ones(9)}), ij.CG(1.0))

    def test_of_a_matrix(self, monkeypatch):
        """It is said how large it is, and what holds none; beyond what any device has it is refused at once."""
        exhausted = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1048576 bytes.")

        def fail(*args, **kwargs):
            raise exhausted

        loss = lambda params, z: jnp.sum(params["w"]) * z
        ours, data = (lambda size: {"w": jnp.zeros(size, jnp.float32)}), jnp.ones(1, jnp.float32)
        monkeypatch.setattr("influence_jax.solvers.direct.to_dense", fail)
        size = r"Direct holds a matrix of 1,024 x 1,024 parameters, 4.00 MiB; BlockCG\(damping\) holds none.*ekfac"
        with pytest.raises(MemoryError, match=rf"invert: ran out of memory, asking for 1.00 MiB at once. {size}"):
            ij.invert(ij.EmpiricalFisher(loss, ours(1024), data), ij.Direct(1.0))
        with pytest.raises(MemoryError, match=r"Of block 'w', Eigh holds a matrix of 512 x 512"):
            ij.invert(ij.EmpiricalFisher(loss, ours(512), data), ij.Blockwise(ij.Eigh(1.0)))
        with pytest.raises(MemoryError, match=r"solver: Direct holds a matrix of 4,194,304 x .* 64.00 TiB; BlockCG"):
            ij.invert(ij.EmpiricalFisher(loss, ours(2**22), data), ij.Direct(1.0))

    def test_of_a_matrix_that_fails_where_it_is_used(self, monkeypatch):
        loss, params, data = (lambda p, z: jnp.sum(p["w"]) * z), {"w": jnp.zeros(256)}, jnp.ones(1)
        inverse = ij.invert(ij.EmpiricalFisher(loss, params, data), ij.Direct(1.0))
        exhausted = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1048576 bytes.")
        influence = ij.Influence(loss, params, inverse)

        def fail(*args, **kwargs):
            raise exhausted

        monkeypatch.setattr("influence_jax.influence.as_mode", fail)
        with pytest.raises(
            MemoryError, match=r"Influence.influences: ran .* Direct holds a matrix of 256 x 256 .* BlockCG"
        ):
            influence.influences(data, data)

    def test_is_explained_once_by_the_innermost_call(self):
        with (
            pytest.raises(OutOfMemory, match=r"^inner: ran out") as caught,
            memory_errors("outer"),
            memory_errors("inner"),
        ):
            raise MemoryError
        assert type(caught.value.__cause__) is MemoryError

    @pytest.mark.parametrize("error", [ValueError("chunk: got 0"), RuntimeError("INTERNAL: other"), KeyError("memory")])
    def test_other_errors_pass(self, error):
        with pytest.raises(type(error)) as caught, memory_errors("fit"):
            raise error
        assert caught.value is error

    def test_methods_keep_their_names_and_compile_as_before(self, problem, compilations):
        influence, query, train = problem
        assert ij.Influence.influences.__name__ == "influences"
        assert "Influence of every training example" in ij.Influence.influences.__doc__
        train = first(train, 8)
        with compilations() as names:
            inside = jax.jit(lambda i, q, t: i.influences(q, t))(influence, query, train)
        assert len(names) == 1
        assert relative_error(inside, influence.influences(query, train)) < 1e-12
        slope = jax.grad(
            lambda d: jnp.sum(
                dataclasses.replace(
                    influence, inverse=ij.invert(ij.Diagonal(influence.params), ij.Direct(d))
                ).influences(query, train)
            )
        )
        assert math.isfinite(slope(1.0))
