"""OSF's step: gradients without what would change the singular vectors that stay."""

from __future__ import annotations

from collections.abc import Mapping

from torchgraft.functional import Graft, Site, Tree

from .._methods.osf import LEAVES, projected


def osf_gradients(graft: Graft, grads: Tree) -> Tree:
    """OSF's gradients from those of the loss: of `U` and `V` the parts orthogonal to the triplets that stay.

        dU <- (I - U1 U1^T) dU,    dV <- dV (I - V1^T V1)

    A pure function, for any optimizer. Works under `torch.func`, `torch.compile` and for stacks. In place the
    parameters' own hooks do this.

    Args:
        graft: The graft; adapters of other methods beside OSF keep their gradients.
        grads: Gradients, a tree like the parameters, of one adapter or a stack.

    Returns:
        A tree like `grads`.

    Raises:
        TypeError: No graft.
        ValueError: No OSF adapter.
        KeyError: A site of OSF without gradients.

    >>> import optree
    >>> from torch import nn
    >>> from torchgraft.adapters import OSFConfig
    >>> from torchgraft.functional import bind
    >>> graft = bind(nn.Linear(4, 3), OSFConfig(effective_rank=1, target_modules="all-linear"))
    >>> grads = optree.tree_map(lambda leaf: leaf + 1, graft.init())
    >>> projected_grads = osf_gradients(graft, grads)[""]["osf_svd_params.V_low"]
    >>> bool((projected_grads @ graft.sites[""][""].constants.high_V.T).abs().max() < 1e-5)
    True
    """
    if not isinstance(graft, Graft):
        raise TypeError(f"osf_gradients: graft is of type {type(graft).__name__}, expected what bind returned")
    if not any(config.method.name == "OSF" for config in graft.configs.values()):
        raise ValueError("osf_gradients: the graft has no OSF adapter; bind an OSFConfig")
    if not graft.binding.named:
        return _projected_tree(graft.sites[""], grads)
    return {
        name: _projected_tree(graft.sites[name], own) if graft.configs[name].method.name == "OSF" else own
        for name, own in grads.items()
    }


def _projected_tree(sites: Mapping[str, Site], grads: Tree) -> Tree:
    made = {path: dict(leaves) for path, leaves in grads.items()}
    for path, site in sites.items():
        if path not in grads:
            raise KeyError(f"osf_gradients: grads lacks the site {path!r}, expected a tree like the parameters")
        made[path] |= {leaf: projected(site, leaf, grads[path][leaf]).to(grads[path][leaf].dtype) for leaf in LEAVES}
    return made
