"""Results of long computations on disk: interrupted at any moment they continue, and damage is found, never served."""

from .gradients import GradientStore as GradientStore
from .outcomes import OutcomeStore as OutcomeStore
from .projected import ProjectedInverse as ProjectedInverse
from .scores import ScoreStore as ScoreStore
from .states import load as load, save as save
