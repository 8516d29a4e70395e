"""The internals for packages that extend this one: methods with layers of their own, and the in-place style.

Users need none of it, and it may change from one version to the next.
"""

from ._abilities import Leaves as Leaves
from ._abilities import Original as Original
from ._abilities import Step as Step
from ._base_with_weights import with_weights as with_weights
from ._binding.joined import JoinedBinding as JoinedBinding
from ._binding.leaves import shapes_at as shapes_at
from ._binding.leaves import shared_shapes as shared_shapes
from ._binding.padding import Blocks as Blocks
from ._binding.padding import cut_to as cut_to
from ._binding.padding import pad_to as pad_to
from ._binding.padding import view_of_part as view_of_part
from ._binding.plan import structure_for as structure_for
from ._binding.plan import weights_of as weights_of
from ._binding.plan import with_parts as with_parts
from ._binding.replaced import Plan as Plan
from ._binding.replaced import Replaced as Replaced
from ._binding.replaced import each as each
from ._binding.replaced import merged as merged
from ._binding.replaced import over as over
from ._binding.replaced import replaced as replaced
from ._binding.replaced import tensor_at as tensor_at
from ._binding.stacked import StackedBinding as StackedBinding
from ._binding.stacking import NoRoomError as NoRoomError
from ._binding.stacking import SharedFieldError as SharedFieldError
from ._binding.tied import TiedAdapter as TiedAdapter
from ._binding.tied import TiedSite as TiedSite
from ._binding.tied import TiedSites as TiedSites
from ._binding.tied import tied_adapter as tied_adapter
from ._dense import active_trees as active_trees
from ._dense import adapted_layers as adapted_layers
from ._dequantized import is_quantised as is_quantised
from ._execution.pool import Watch as Watch
from ._given import check_config as check_config
from ._given import check_module as check_module
from ._given import check_no_view as check_no_view
from ._layers.adapted import Adapted as Adapted
from ._layers.adapted import step_of as step_of
from ._layers.around import Around as Around
from ._layers.base import Base as Base
from ._layers.base import BaseWithTensors as BaseWithTensors
from ._layers.base import held_tensors as held_tensors
from ._layers.base import linear_tensors as linear_tensors
from ._locating.looking import is_look as is_look
from ._messages import advice_on as advice_on
from ._messages import closest as closest
from ._messages import did_you_mean as did_you_mean
from ._messages import given_type as given_type
from ._messages import register_advice as register_advice
from ._method import SHARED as SHARED
from ._method import SiteAdapter as SiteAdapter
from ._method import Tree as Tree
from ._method import as_tree as as_tree
from ._method import beside as beside
from ._rows import rows_of as rows_of
from ._sites.attention import ProjectionSlice as ProjectionSlice
from ._sites.kernels import has_rows as has_rows
from ._sites.kernels import is_folded as is_folded
from ._sites.kinds import describe as describe
from ._sites.kinds import forward_class as forward_class
from ._sites.kinds import is_linear as is_linear
from ._sites.kinds import register_by_name as register_by_name
from ._sites.parameters import Key as Key
from ._sites.parameters import register_hidden_product as register_hidden_product
from ._sites.site import PARAMETERS as PARAMETERS
from ._sites.site import Site as Site
from ._sites.tensors import Dense as Dense
from ._sites.tensors import add_scaled as add_scaled
from ._sites.tensors import check_base as check_base
from ._sites.tensors import own_tensor as own_tensor
from ._sites.tensors import quantised_form as quantised_form
from ._sites.tensors import trainable_dtype as trainable_dtype
from ._sites.tensors import wide_dtype as wide_dtype
from ._skeleton.context import CallContext as CallContext
from ._skeleton.parameters import ParameterRuntime as ParameterRuntime
from ._skeleton.parameters import names_grouped as names_grouped
from ._skeleton.parameters import parametrised_class as parametrised_class
from ._skeleton.reach import Reach as Reach
from ._skeleton.runtime import SiteRuntime as SiteRuntime
from ._skeleton.runtime import adapted_class as adapted_class
from ._skeleton.runtime import inner_class as inner_class
from ._skeleton.sharded import adopt_unit as adopt_unit
from ._skeleton.sharded import attributes_of as attributes_of
from ._skeleton.sharded import hooks_of_unit as hooks_of_unit
from ._skeleton.sharded import is_unit as is_unit
from ._skeleton.sharded import unsharded_type as unsharded_type
from ._tensors.placement import agreed as agreed
from ._tensors.placement import computed as computed
from ._tensors.placement import copied_hooks as copied_hooks
from ._tensors.placement import is_computed as is_computed
from ._tensors.placement import is_sharded as is_sharded
from ._tensors.placement import local_part as local_part
from ._tensors.placement import offloading as offloading
from ._tensors.placement import resting as resting
from ._tensors.placement import spread as spread
from ._tensors.placement import store as store
from ._tensors.placement import whole as whole
from ._tensors.placement import write as write
from ._tensors.wrappers import bare_name as bare_name
from ._tensors.wrappers import child_of_wrapper as child_of_wrapper
from ._tensors.wrappers import modules_of as modules_of
from ._tensors.wrappers import state_of as state_of
from ._tensors.wrappers import submodule as submodule
from ._tensors.wrappers import unwrapped as unwrapped
from ._trees import check_tree as check_tree
from ._trees import sort as sort
from ._versions import count_writes as count_writes

__all__ = [name for name in sorted(globals()) if not name.startswith("_")]


def __dir__() -> list[str]:
    return [*__all__]
