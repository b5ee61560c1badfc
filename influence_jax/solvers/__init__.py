"""Ways to invert an operator."""

from .base import (
    ConvergenceWarning as ConvergenceWarning,
    Info as Info,
    Inverse as Inverse,
    RelativeDamping as RelativeDamping,
    Solver as Solver,
    invert as invert,
    warn_unconverged as warn_unconverged,
)
from .blockwise import Blockwise as Blockwise
from .cg import CG as CG, conjugate_gradients as conjugate_gradients
from .direct import Direct as Direct, Eigh as Eigh
