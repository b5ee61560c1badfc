"""Refuse the jax releases that are known to compute wrong numbers."""

from __future__ import annotations


def require_supported_jax(version: str) -> None:
    """Raise ImportError for jax below 0.9 and for the whole 0.10 line.

    On CPU, jax 0.10.2 miscomputes `vmap(matvec)` followed by a reduction (jax-ml/jax#39103), and 0.10.0 and 0.10.1
    are wrong intermittently under load.  A library of numbers cannot run on top of that.

    Args:
      version: The version string of the installed jax.

    Raises:
      ImportError: If that version is not supported; the message names the command that fixes it.

    Example:
      >>> require_supported_jax("0.9.2")
    """
    major, minor = (int(part) for part in version.split(".")[:2])
    if (major, minor) == (0, 10) or (major, minor) < (0, 9):
        reason = "silently computes wrong numbers on CPU" if minor == 10 else "is older than influence_jax supports"
        raise ImportError(
            f"jax {version} {reason}; influence_jax needs jax>=0.9.0,!=0.10.*. "
            "Fix: pip install --upgrade 'jax>=0.9.0,!=0.10.*' 'jaxlib>=0.9.0,!=0.10.*'"
        )
