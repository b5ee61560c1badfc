"""Ways to invert an operator."""

from .base import Inverse as Inverse, Solver as Solver, invert as invert, solve_with_info as solve_with_info
from .block_cg import BlockCG as BlockCG, block_conjugate_gradients as block_conjugate_gradients
from .blockwise import Blockwise as Blockwise
from .cg import CG as CG, conjugate_gradients as conjugate_gradients
from .damping import (
    BlockDamping as BlockDamping,
    RelativeDamping as RelativeDamping,
    damped_product as damped_product,
)
from .direct import (
    Direct as Direct,
    Eigh as Eigh,
    inverted_layers as inverted_layers,
    rows_at_once as rows_at_once,
)
from .harmonic import HarmonicMean as HarmonicMean
from .info import (
    ConvergenceError as ConvergenceError,
    ConvergenceWarning as ConvergenceWarning,
    Info as Info,
    all_converged as all_converged,
    is_nan as is_nan,
    report as report,
)
from .lissa import LiSSA as LiSSA
from .lowrank import Arnoldi as Arnoldi, Nystrom as Nystrom, from_sketch as from_sketch
from .precondition import Jacobi as Jacobi
from .sample_space import SampleSpace as SampleSpace
