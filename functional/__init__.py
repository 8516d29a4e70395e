"""Models as pure functions of (adapter, inputs).

`bind` a model to adapter configs; the graft it returns is a function of a parameter tree and the model's inputs,
under any transform of `torch.func`, `torch.compile` and threads. The model is never changed.
"""

from ._abilities import AddsLeafwise as AddsLeafwise
from ._abilities import AddsProduct as AddsProduct
from ._abilities import DrawsNoise as DrawsNoise
from ._abilities import KeepsDtype as KeepsDtype
from ._abilities import MergesOver as MergesOver
from ._abilities import Precomputes as Precomputes
from ._abilities import RunsInOneStep as RunsInOneStep
from ._abilities import SharesLeaves as SharesLeaves
from ._abilities import SplitsProjection as SplitsProjection
from ._abilities import TakesComplex as TakesComplex
from ._bind import bind as bind
from ._binding.binding import Binding as Binding
from ._call import functional_call as functional_call
from ._constants import Constants as Constants
from ._constants import Varying as Varying
from ._copy_rows import copy_rows as copy_rows
from ._dequantized import dequantized as dequantized
from ._grads import grad as grad
from ._grads import value_and_grad as value_and_grad
from ._graft import Graft as Graft
from ._merge import merge as merge
from ._method import Config as Config
from ._method import Layer as Layer
from ._method import Method as Method
from ._method import Tree as Tree
from ._method import Weights as Weights
from ._module import AdapterModule as AdapterModule
from ._norms import clip_by_norm as clip_by_norm
from ._norms import norms as norms
from ._per_example import PerExample as PerExample
from ._per_example import per_example as per_example
from ._perturb import perturb as perturb
from ._places import Places as Places
from ._project import project as project
from ._routing.route import Routed as Routed
from ._routing.route import route as route
from ._rows import PerAdapter as PerAdapter
from ._rows import Rows as Rows
from ._sites.kinds import register_layer as register_layer
from ._sites.site import Site as Site
from ._sites.tensors import widen as widen
from ._stacks import StackedGraft as StackedGraft
from ._trainable import trainable as trainable
from ._trees import stack as stack
from ._trees import unstack as unstack
from ._unsupported import Unsupported as Unsupported
from ._unsupported import UnsupportedCall as UnsupportedCall
from ._unsupported import UnsupportedConfig as UnsupportedConfig
from ._vectors import ravel as ravel
from ._vectors import unravel as unravel

__version__ = "0.1.0"
__all__ = ["__version__", *(name for name in sorted(globals()) if not name.startswith("_"))]


def __dir__() -> list[str]:
    return [*__all__]
