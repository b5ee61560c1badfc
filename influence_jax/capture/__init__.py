"""Layer capture: what a model does with its parameters, read from the jaxpr of any JAX function."""

from .analysis import Plan as Plan
from .contract import (
    Factors as Factors,
    InBasis as InBasis,
    LayerFactors as LayerFactors,
    einsum as einsum,
    gradient as gradient,
    held_entries as held_entries,
    layer_factors as layer_factors,
    moments as moments,
    products as products,
    quadratic as quadratic,
    rotate as rotate,
    rotated as rotated,
    squares as squares,
)
from .coverage import Coverage as Coverage, LeafCoverage as LeafCoverage, coverage as coverage
from .layers import MAX_SIDE as MAX_SIDE, Layer as Layer, arrange as arrange, components as components
