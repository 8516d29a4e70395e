"""Initialisations of LoRA beside its plain ones: one file per family, pure functions of weight, data and randomness."""

from .configs import CordaConfig as CordaConfig
from .configs import EvaConfig as EvaConfig
from .configs import LoftQConfig as LoftQConfig
from .configs import LoraGAConfig as LoraGAConfig
from .initial_values import FROM_DATA as FROM_DATA
from .initial_values import NAMES as NAMES
from .initial_values import REMOVING as REMOVING
from .initial_values import constants as constants
from .initial_values import factors as factors
from .initial_values import kind_of as kind_of
from .initial_values import warn_of_plain as warn_of_plain
from .statistics import Statistics as Statistics
