"""The principal part of a weight, from its singular values: frozen factors of methods that train what is between."""

from __future__ import annotations

import torch
from torch import Tensor

from torchgraft.functional import Site


def principal(weight: Tensor, r: int, niter: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first `r` singular triplets of a weight as a matrix, in float32 or wider.

    Args:
        weight: `"out in/groups *kernel"`.
        r: Number of triplets.
        niter: Steps of torch's randomised decomposition; `None` for the exact one.
        seed: Seed of the randomised decomposition.

    Returns:
        `"out r"`, `"r"` and `"r in/groups*kernel"`.

    >>> u, s, v = principal(torch.diag(torch.tensor([1.0, 3.0])), 1)
    >>> (u * s) @ v
    tensor([[0., 0.],
            [0., 3.]])
    """
    matrix = weight.flatten(1)
    matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    if niter is None:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :r].contiguous(), s[:r].clone(), vh[:r].contiguous()
    near = [] if matrix.device.type in ("cpu", "meta") else [matrix.device]
    with torch.random.fork_rng(devices=near, device_type=matrix.device.type if near else "cuda"):
        torch.manual_seed(seed)
        u, s, v = torch.svd_lowrank(matrix, q=r, niter=niter)
    return u, s, v.mT.contiguous()


def check_known(site: Site, factor: Tensor, leaf: Tensor, method: str) -> None:
    """Refuse factors of a weight that had no values when the model was bound.

    Raises:
        ValueError: They are on the meta device, and the leaf is not; names the site.
    """
    if factor.is_meta and not leaf.is_meta:
        raise ValueError(
            f"{site.path}: the weight was on the meta device when {method} was to decompose it, so its factors have no "
            "values; bind or inject again, now that the model is loaded"
        )
