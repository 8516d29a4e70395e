"""Models as pure functions of (adapter, inputs).

`bind` a model to adapter configs; the graft it returns is a function of a parameter tree and the model's inputs,
under any transform of `torch.func`, `torch.compile` and threads. The model is never changed.
"""

from .call import functional_call as functional_call
from .grads import grad as grad
from .grads import value_and_grad as value_and_grad
from .graft import Graft as Graft
from .graft import bind as bind
from .layers import register_layer as register_layer
from .merge import merge as merge
from .method import Config as Config
from .method import Layer as Layer
from .method import Method as Method
from .method import Tree as Tree
from .method import Weights as Weights
from .norms import clip_by_norm as clip_by_norm
from .norms import norms as norms
from .route import Routed as Routed
from .route import route as route
from .rows import PerAdapter as PerAdapter
from .rows import Rows as Rows
from .site import Site as Site
from .site import widen as widen
from .stacks import StackedGraft as StackedGraft
from .trees import stack as stack
from .trees import unstack as unstack
from .unsupported import Unsupported as Unsupported
from .unsupported import UnsupportedCall as UnsupportedCall
from .unsupported import UnsupportedConfig as UnsupportedConfig

__version__ = "0.1.0"
