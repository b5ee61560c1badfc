r"""Random projections of gradients: inner products of vectors far shorter than the parameters, and right on average.

A projection is a linear map $\varphi(g) = R^\top g$ with $\mathbb{E}[R R^\top] = I$, so that
$\mathbb{E}\,\langle\varphi(a), \varphi(b)\rangle = \langle a, b\rangle$.  Its entries are functions of the key, the
place of the leaf and the block of rows alone: they are drawn when they are needed and never held together, and are the
same on every device, under every sharding and chunk size, with 64-bit mode on or off.
"""

from .base import Projection
from .sides import TwoSided, two_sided
from .whole import OneSided, gaussian, rademacher

__all__ = [
    "OneSided",
    "Projection",
    "TwoSided",
    "gaussian",
    "rademacher",
    "two_sided",
]
