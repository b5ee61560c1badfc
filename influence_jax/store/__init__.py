"""Results of long computations on disk: interrupted at any moment they continue, and damage is found, never served."""

from .gradients import GradientStore
from .outcomes import OutcomeStore
from .projected import ProjectedInverse
from .scores import ScoreStore
from .states import load, save

__all__ = [
    "GradientStore",
    "OutcomeStore",
    "ProjectedInverse",
    "ScoreStore",
    "load",
    "save",
]
