"""Curvature as linear operators on parameter-shaped trees."""

from . import algebra as algebra, assembled as assembled, losses as losses, per_example as per_example
from .blocked import diagonal_blocks as diagonal_blocks
from .capabilities import (
    Restricted as Restricted,
    Root as Root,
    Spectral as Spectral,
    Unsupported as Unsupported,
    check_losses as check_losses,
    diagonal as diagonal,
    minibatch as minibatch,
    restrict as restrict,
    root as root,
    spectral as spectral,
    sums as sums,
    to_dense as to_dense,
    trace as trace,
)
from .exact import GGN as GGN, EmpiricalFisher as EmpiricalFisher, Hessian as Hessian
from .fisher import Fisher as Fisher
from .kfac import ekfac as ekfac, kfac as kfac
from .kronecker import Kronecker as Kronecker
from .operator import LinearOperator as LinearOperator, Scaled as Scaled, Sum as Sum
from .projected import Projected as Projected
from .spectrum import Spectrum as Spectrum, spectrum as spectrum
from .structured import Diagonal as Diagonal, Identity as Identity, LowRank as LowRank
