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
    generator = torch.Generator("cpu" if matrix.is_meta else matrix.device).manual_seed(seed)
    u, s, v = random_triplets(matrix, r, niter, generator)
    return u, s, v.mT.contiguous()


def random_triplets(
    matrix: Tensor, r: int, niter: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return about the first `r` singular triplets, as `torch.svd_lowrank` does, which takes no generator.

    Halko et al., 2009, arXiv:0909.4061, algorithms 4.4 and 5.1.

    Args:
        matrix: `"m n"`.
        r: Number of triplets.
        niter: Number of steps that make the basis better.
        generator: What random numbers are drawn from; by default torch's own.

    Returns:
        `"m r"`, `"r"` and `"n r"`.

    >>> matrix = torch.randn(5, 4)
    >>> given = random_triplets(matrix, 2, 1, torch.Generator().manual_seed(3))
    >>> _ = torch.manual_seed(3)
    >>> all(map(torch.equal, given, torch.svd_lowrank(matrix, q=2, niter=1)))
    True
    """
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT
    where = None if generator is None else generator.device
    drawn = torch.randn(tall.shape[1], r, dtype=tall.dtype, generator=generator, device=where).to(tall.device)
    basis = torch.linalg.qr(tall @ drawn).Q
    for _ in range(niter):
        basis = torch.linalg.qr(tall.mT @ basis).Q
        basis = torch.linalg.qr(tall @ basis).Q
    u, s, vh = torch.linalg.svd(basis.mT @ tall, full_matrices=False)
    u, v = basis @ u, vh.mT
    return (u, s, v) if tall is matrix else (v, s, u)


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
