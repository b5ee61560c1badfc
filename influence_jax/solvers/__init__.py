"""Ways to invert an operator."""

from .base import Inverse as Inverse, Solver as Solver, invert as invert, solve_with_info as solve_with_info
from .blockwise import Blockwise as Blockwise
from .cg import CG as CG, conjugate_gradients as conjugate_gradients
from .damping import RelativeDamping as RelativeDamping
from .direct import Direct as Direct, Eigh as Eigh
from .info import ConvergenceWarning as ConvergenceWarning, Info as Info, warn_unconverged as warn_unconverged
