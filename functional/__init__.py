"""Models as pure functions of (adapter, inputs).

`bind` a model to adapter configs; the graft it returns is a function of a parameter tree and the model's inputs,
under any transform of `torch.func`, `torch.compile` and threads. The model is never changed.
"""

from .abilities import AddsProduct as AddsProduct
from .abilities import KeepsDtype as KeepsDtype
from .abilities import MergesOver as MergesOver
from .abilities import Precomputes as Precomputes
from .abilities import SharesLeaves as SharesLeaves
from .abilities import SplitsProjection as SplitsProjection
from .abilities import TakesComplex as TakesComplex
from .bind import bind as bind
from .binding.binding import Binding as Binding
from .call import functional_call as functional_call
from .constants import Constants as Constants
from .constants import Varying as Varying
from .grads import grad as grad
from .grads import value_and_grad as value_and_grad
from .graft import Graft as Graft
from .merge import merge as merge
from .method import Config as Config
from .method import Layer as Layer
from .method import Method as Method
from .method import Tree as Tree
from .method import Weights as Weights
from .norms import clip_by_norm as clip_by_norm
from .norms import norms as norms
from .places import Places as Places
from .routing.route import Routed as Routed
from .routing.route import route as route
from .rows import PerAdapter as PerAdapter
from .rows import Rows as Rows
from .sites.kinds import register_layer as register_layer
from .sites.site import Site as Site
from .sites.site import widen as widen
from .stacks import StackedGraft as StackedGraft
from .trees import stack as stack
from .trees import unstack as unstack
from .unsupported import Unsupported as Unsupported
from .unsupported import UnsupportedCall as UnsupportedCall
from .unsupported import UnsupportedConfig as UnsupportedConfig

__version__ = "0.1.0"
