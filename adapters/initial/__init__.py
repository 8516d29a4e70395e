"""Initialisations of LoRA beside its plain ones: one file per family, pure functions of weight, data and randomness."""

from .configs import CordaConfig as CordaConfig
from .configs import EvaConfig as EvaConfig
from .configs import LoftQConfig as LoftQConfig
from .configs import LoraGAConfig as LoraGAConfig
from .start import FROM_DATA as FROM_DATA
from .start import NAMES as NAMES
from .start import REMOVING as REMOVING
from .start import constants as constants
from .start import factors as factors
from .start import kind_of as kind_of
from .start import warn_of_plain as warn_of_plain
from .statistics import Statistics as Statistics
