"""How programs are compiled: quickly, for most tests compile for longer than they run, or as users do.

Compiled quickly, jax on CPU computes wrong gradients of a convolution followed by a relu and a maximum.  So whatever
has a convolution is refused there, already when it is traced: its tests are marked `as_users`.

A module of its own, for pytest imports its conftest under another name than tests do.
"""

import contextlib

import jax
from jax import lax
from jax._src import compiler

# What makes the compiler quick, beside leaving out optimisations, if this version of it has the option.
OPTIONS = {
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_opt_preset": "CPU_OPT_PRESET_FAST_COMPILE",
    "xla_cpu_parallel_codegen_split_count": 1,
}


def known_options() -> dict:
    """The options that this version of the compiler knows."""
    known = {}
    for name, value in OPTIONS.items():
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            jax.jit(lambda: 0).lower().compile(compiler_options={name: value})
            known[name] = value
    return known


class QuickConvolution(Exception):
    """A convolution in a test that is compiled quickly; of a class that the library does not put in other words."""


def compile_quickly(quick: bool) -> None:
    """Whether what is compiled from here on is compiled quickly, or as users do; nothing compiled otherwise is kept."""
    options = quick_options if quick else user_options
    if compiler.get_compile_options is not options:
        jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", quick)
    compiler.get_compile_options = options


def refuse_quick_convolutions() -> None:
    """From here on raise where a convolution is traced, to be compiled quickly."""
    bind = lax.conv_general_dilated_p.bind

    def bound(*arguments, **parameters):
        if compiler.get_compile_options is quick_options:
            raise QuickConvolution("mark a test of a convolution as_users: compiled quickly, its gradients are wrong")
        return bind(*arguments, **parameters)

    lax.conv_general_dilated_p.bind = bound


def quick_options(*arguments, env_options_overrides=None, **named):
    return user_options(*arguments, env_options_overrides={**KNOWN, **(env_options_overrides or {})}, **named)


user_options, KNOWN = getattr(compiler, "get_compile_options", None), known_options()
# The same for the processes that tests start.
QUICK = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "XLA_FLAGS": " ".join(f"--{name}={'false' if value is False else value}" for name, value in KNOWN.items()),
}
