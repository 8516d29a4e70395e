"""The table of the contract: one row for each method and each variant of one, and from a row every promise.

What a new row has to give:

- `config`, for a model whose two layers are `first` and `second`, small enough for layers of 4 and 6 features;
- `formula`, the dense meaning from the paper, in float64, in tensors alone: nothing of the library, and not its code
  written down again. It reads the config's fields and the tree's leaves by PEFT's names, so that these are tested too;
- `call`, how PEFT's model is called, where it takes more than the input;
- `output`, where no weight expresses it: what becomes of the layer's output;
- `other`, a config of the same method that may stand beside it in a stack, and differs in as much as a stack allows;
- `apart`, fields that make it a config that no stack takes;
- `wrong`, values that the config refuses (or, on linear layers, `bind`), each with what the error says of them. Values
  of a wrong type need not be named: they are tried for every field;
- `peft`, fields that PEFT's config of the same name needs beside those that differ from the defaults here, or `None`
  where PEFT has no such method;
- `rounds`, what is rounded once at a layer in half precision, where it is not the sum (see `test_rounding.py`);
- `evaluated`, where it draws noise in training, so that only evaluation has a formula;
- `sites`, where the variant supports fewer kinds of layer than the method does;
- `exempt`, the promises that it does not keep, by the names of the tests, with the reason and, where some sites keep
  them, the sites that do not. The reasons stand at the end of each run, and a promise that is kept all the same is a
  failure.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import nn

from torchgraft.adapters import (
    AdaLoraConfig,
    AdamssConfig,
    AdapterConfig,
    ArrowLoraConfig,
    BeftConfig,
    BOFTConfig,
    BottleneckConfig,
    C3AConfig,
    DeftConfig,
    DeloraConfig,
    FourierFTConfig,
    FrodConfig,
    GloraConfig,
    GraloraConfig,
    HiraConfig,
    HRAConfig,
    IA3Config,
    LilyConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    LoraXSConfig,
    LoReftConfig,
    MissConfig,
    OFTConfig,
    OSFConfig,
    PeanutConfig,
    PolyConfig,
    PsoftConfig,
    PveraConfig,
    RandLoraConfig,
    RoadConfig,
    ShiraConfig,
    SupertuningConfig,
    TinyLoraConfig,
    UniLoraConfig,
    VBLoRAConfig,
    VeraConfig,
    WaveFTConfig,
)
from torchgraft.functional import UnsupportedCall, UnsupportedConfig


@dataclasses.dataclass(frozen=True)
class Exempt:
    """Promises that a method does not keep: why, on which sites (none: on all), and what is raised instead."""

    promises: tuple[str, ...]
    reason: str
    sites: frozenset[str] = frozenset()
    raises: type[Exception] | tuple[type[Exception], ...] = AssertionError


@dataclasses.dataclass(frozen=True)
class Where:
    """What a formula may know of a layer: its name, its type, the base's dtype and all layers' `(out, in)`."""

    path: str
    layer: type[nn.Module]
    dtype: torch.dtype
    sizes: Mapping[str, tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Row:
    """One method or variant; see above for what the fields are.

    A formula is `(config, where, leaves, weight, bias) -> (weight, bias)`. Weights are linear maps, `"out in"`: of an
    embedding `"dim vocab"`, of a convolution `"out in *kernel"`. An output is
    `(config, where, leaves, x, y) -> y`, of the layer's input and the base's output, features last.
    """

    config: AdapterConfig
    formula: Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
    other: AdapterConfig
    apart: Mapping[str, Any]
    wrong: tuple[tuple[Mapping[str, Any], str], ...]
    peft: Mapping[str, Any] | None = dataclasses.field(default_factory=dict)
    sites: frozenset[str] = frozenset()
    exempt: tuple[Exempt, ...] = ()
    rounds: str | Mapping[str, str] | Callable[..., torch.Tensor] = "sum"
    evaluated: bool = False
    output: Callable[..., torch.Tensor] | None = None
    call: Callable[[nn.Module, torch.Tensor], torch.Tensor] = lambda model, x: model(x)


# -- the formulas ----------------------------------------------------------------------------------------------------


def product(leaves, weight):
    """`B A`, of convolutions as matrices."""
    a, b = (next(t for name, t in leaves.items() if name in (f"lora_{x}", f"lora_embedding_{x}")) for x in "AB")
    return (b.flatten(1) @ a.flatten(1)).reshape(weight.shape)


def scaling(config):
    return config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)


def lora(config, where, leaves, weight, bias):
    """`W + s B A`, and with `lora_bias` `bias + s b`: Hu et al., 2021; rank-stabilised: Kalajdzievski, 2023."""
    if config.lora_bias:
        bias = bias + scaling(config) * leaves["lora_B_bias"]
    return weight + scaling(config) * product(leaves, weight), bias


def bdlora(config, where, leaves, weight, bias):
    """LoRA whose `A`, or `B`, has blocks along its diagonal, and zeros elsewhere."""
    name = "lora_A" if where.path == "first" else "lora_B"
    whole = torch.block_diag(*leaves[name].chunk(2))
    return lora(config, where, {**leaves, name: whole}, weight, bias)


def pissa(config, where, leaves, weight, bias):
    """LoRA, on a base without the first `r` of its singular triplets: Meng et al., 2024."""
    if config.init_lora_weights == "pissa":
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        weight = weight - (u[:, : config.r] * s[: config.r]) @ v[: config.r]
    return lora(config, where, leaves, weight, bias)


def mica(config, where, leaves, weight, bias):
    """LoRA whose `B` is fixed: the last `r` left singular vectors, whose signs depend on the precision."""
    wide = weight.to(torch.promote_types(where.dtype, torch.float32))
    b = torch.linalg.svd(wide, full_matrices=False)[0][:, -config.r :].to(weight)
    return lora(config, where, {**leaves, "lora_B": b}, weight, bias)


def dora(config, where, leaves, weight, bias):
    """`m (W + s B A) / |W + s B A|`, whose norm is a constant of the gradient: Liu et al., 2024, section 4.3."""
    ones = (1,) * (weight.ndim - 1)
    direction = weight + scaling(config) * product(leaves, weight)
    norm = direction.detach().flatten(1).square().sum(1).sqrt().view(-1, *ones)
    return leaves["lora_magnitude_vector"].view(-1, *ones) * direction / norm, bias


def dora_of_output(config, where, leaves, weight, bias, x, y):
    """DoRA's output from the base's, `bias + g (y - bias + s B A x)`, with the gain `g`."""
    added = scaling(config) * product(leaves, weight)
    gain = leaves["lora_magnitude_vector"] / (weight + added).square().sum(1).sqrt()
    bias = 0 if bias is None else bias
    return bias + gain * (y - bias + x @ added.mT)


def ia3(config, where, leaves, weight, bias):
    """Rows, and the bias, times a vector; columns where the layer is feed-forward: Liu et al., 2022."""
    ones, scale = (1,) * (weight.ndim - 2), leaves["ia3_l"].flatten()
    if where.path in config.feedforward_modules:
        return weight * scale.view(1, -1, *ones), bias
    return weight * scale.view(-1, 1, *ones), None if bias is None else bias * scale


def adalora(config, where, leaves, weight, bias):
    """`W + s B diag(E) A`: Zhang et al., 2023, with PEFT's scaling factor."""
    delta = leaves["lora_B"] @ torch.diag(leaves["lora_E"].flatten()) @ leaves["lora_A"]
    return weight + config.lora_alpha / (config.init_r + 1e-5) * delta.reshape(weight.shape), bias


def loha(config, where, leaves, weight, bias):
    """`W + s (B1 A1) * (B2 A2)`: FedPara, 2021; of kernels a product `B^T T A` at each place: its proposition 3."""

    def matrix(i):
        b, a = leaves[f"hada_w{i}_a"], leaves[f"hada_w{i}_b"]
        if f"hada_t{i}" not in leaves:
            return (b @ a).reshape(weight.shape)
        places = leaves[f"hada_t{i}"].flatten(2).unbind(2)
        return torch.stack([b.T @ t @ a for t in places], 2).reshape(weight.shape)

    return weight + config.alpha / config.rank_pattern.get(where.path, config.r) * matrix(1) * matrix(2), bias


def lokr(config, where, leaves, weight, bias):
    """`W + s C (x) D`, block by block: Yeh et al., 2023; the kernel of `D` is FedPara's proposition 3.

    A whole `D` of a 1-d convolution is as PEFT has it: blocks of inputs and places within each of its outputs.
    """
    first = leaves["lokr_w1"] if "lokr_w1" in leaves else leaves["lokr_w1_a"] @ leaves["lokr_w1_b"]
    if "lokr_w2" in leaves:
        second = leaves["lokr_w2"]
    elif "lokr_t2" in leaves:
        places = leaves["lokr_t2"].flatten(2).unbind(2)
        second = torch.stack([leaves["lokr_w2_a"].T @ t @ leaves["lokr_w2_b"] for t in places], 2)
    else:
        second = leaves["lokr_w2_a"] @ leaves["lokr_w2_b"]
        second = second.reshape(len(second), weight.shape[1] // first.shape[1], -1)
    if where.layer is nn.Conv1d and "lokr_w2" in leaves:
        blocks = [torch.cat([torch.cat([c * d for c in row], 1) for row in first], 0) for d in second]
        delta = torch.stack(blocks)
    else:
        delta = torch.cat([torch.cat([c * second for c in row], 1) for row in first], 0)
    return weight + config.alpha / config.rank_pattern.get(where.path, config.r) * delta.reshape(weight.shape), bias


def oft(config, where, leaves, weight, bias):
    """`W R^T`, of an embedding `R^T W`, with Cayley's `R` or five terms of its series: Qiu et al., 2023 and 2025.

    Both turn as PEFT does: the series is that of `(I + Q) (I - Q)^-1`, the exact form `(I + Q)^-1 (I - Q)`.
    """
    flat = weight.mT if where.layer is nn.Embedding else weight.flatten(1)
    blocks = []
    vectors = next(iter(leaves.values()))
    size = flat.shape[1] // config.r if config.r else config.oft_block_size
    for vector in vectors:
        q = torch.zeros(size, size).to(vector)
        q[tuple(torch.triu_indices(size, size, 1))] = vector
        q, one = q - q.T, torch.eye(size).to(vector)
        series = one + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q
        blocks.append(series if config.use_cayley_neumann else torch.linalg.inv(one + q) @ (one - q))
    turn = torch.block_diag(*blocks)
    return ((flat @ turn).mT if where.layer is nn.Embedding else (flat @ turn.T).reshape(weight.shape)), bias


def vera(config, where, leaves, weight, bias):
    """`W + diag(b) B diag(d) A` with `A` and `B` from a seed, as large as the largest layer: Kopiczko et al., 2023."""
    generator = torch.Generator().manual_seed(config.projection_prng_key)
    outputs, inputs = (max(sizes) for sizes in zip(*where.sizes.values(), strict=True))
    a, b = torch.empty(config.r, inputs), torch.empty(outputs, config.r)
    for matrix in (a, b):
        nn.init.kaiming_uniform_(matrix, nonlinearity="relu", generator=generator)
    a, b = a[:, : weight.shape[1]].to(weight), b[: weight.shape[0]].to(weight)
    return weight + leaves["vera_lambda_b"].diag() @ b @ leaves["vera_lambda_d"].diag() @ a, bias


def c3a(config, where, leaves, weight, bias):
    """`W + C / d`, each row of a block of `C` the one above it turned by one: Chen et al., 2024, with PEFT's factor."""

    def block(row):
        return torch.stack([row.roll(turn, 0) for turn in range(len(row))])

    blocks = [[block(row) for row in rows] for rows in leaves["c3a_kernel"]]
    matrix = torch.cat([torch.cat(row, 1) for row in blocks], 0)
    return weight + matrix / weight[0].numel(), bias


def delora(config, where, leaves, weight, bias):
    """`W + (lambda / r) sum_i b_i a_i^T / (|b_i| |a_i|)`, columns times those norms of `W`: Bini et al., 2025."""
    flat, r = weight.flatten(1), len(leaves["delora_A"])
    delta = torch.zeros_like(flat)
    for a, b in zip(leaves["delora_A"], leaves["delora_B"].T, strict=True):
        delta = delta + torch.outer(b, a) / (a.square().sum() * b.square().sum()).sqrt()
    delta = leaves["delora_lambda"] / r * delta * flat.detach().square().sum(0).sqrt()
    return weight + delta.reshape(weight.shape), bias


def shira(config, where, leaves, weight, bias):
    """`W + S`, as many numbers as LoRA has parameters, in entries that a seed chooses: Bhardwaj et al., 2024."""
    generator = torch.Generator()
    if config.random_seed is not None:
        generator.manual_seed(config.random_seed)
    count = config.r * (len(weight) + weight[0].numel())
    chosen = torch.zeros(weight.numel(), dtype=torch.bool)
    chosen[torch.randperm(weight.numel(), generator=generator)[:count]] = True
    delta = torch.where(chosen, leaves["shira_weight"][(chosen.cumsum(0) - 1).clamp(min=0)], 0.0)
    return weight + delta.view(weight.shape), bias


def supertuning(config, where, leaves, weight, bias):
    """`W + S + s B A`, with numbers at the largest, or smallest, entries of `W`; torch picks of equal ones: 2026."""
    sizes, values = weight.detach().to(where.dtype).abs().flatten(), leaves["supertuning_values"]
    largest = sizes.topk(len(values), largest=config.select_top).indices
    delta = torch.zeros_like(weight).flatten().index_put((largest,), values).view(weight.shape)
    if config.r is not None:
        delta = delta + config.lora_alpha / config.r * leaves["supertuning_lora_B"] @ leaves["supertuning_lora_A"]
    return weight + delta, bias


def osf(config, where, leaves, weight, bias):
    """`U1 S1 V1 + U S V`, the weight with the leaves in the place of its smaller triplets: Nayak et al., 2025."""
    k = {"first": 1}.get(where.path) if config.rank_pattern else None
    k = min(weight.shape) // 2 if k is None and config.effective_rank is None else k or config.effective_rank
    parts = torch.linalg.svd(weight.detach().to(torch.float32), full_matrices=False)
    u, s, v = (part.to(where.dtype).to(weight) for part in parts)
    smaller = sum(s[i] * torch.outer(u[:, i], v[i]) for i in range(k, len(s)))
    low = [leaves[f"osf_svd_params.{part}_low"] for part in "USV"]
    return weight - smaller + low[0] @ low[1].diag() @ low[2], bias


def frod(config, where, leaves, weight, bias):
    """`W + U (S + diag(l - l0)) V^T` with `W V^-T = U diag(l0)`; `V` of one weight, and places of a seed: AAAI 2026."""
    n, w = weight.shape[1], weight.detach().to(where.dtype).float().contiguous()
    if len(w) < n:
        v = torch.linalg.svd(w, full_matrices=True)[2].T
    else:
        q, r = torch.linalg.qr(w)
        ridged = q.T @ q + config.regularization_alpha * torch.eye(n)
        v = r.T @ torch.linalg.eigh(torch.zeros(n, n) + torch.linalg.inv(ridged))[1]
    v = v.to(where.dtype).to(weight)
    turned = torch.linalg.solve(v, weight.detach().to(where.dtype).double().T).T
    start = turned.square().sum(0).sqrt()
    u = (turned / start).float().to(where.dtype).to(weight)
    generator = torch.Generator().manual_seed(config.projection_prng_key)
    for path, (_, inputs) in sorted(where.sizes.items()):
        beside = [(i, j) for i in range(inputs) for j in range(inputs) if i != j]
        drawn = torch.randperm(len(beside), generator=generator)[: int(inputs * inputs * config.sparse_rate)]
        places = [beside[place] for place in drawn] if path == where.path else []
        if places:
            s = torch.zeros(n, n).to(weight).index_put(tuple(torch.tensor(places).T), leaves["frod_lambda_s_values"])
    return weight + u @ (s + (leaves["frod_lambda_l"] - start.float().to(weight)).diag()) @ v.T, bias


def bare(tensor):
    """Return the numbers of a tensor that transforms of torch have wrapped."""
    tensor = tensor.detach()  # itself wrapped again
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def adamss(config, where, leaves, weight, bias):
    """`[W, b] + U' V`, rows of `U'` by clusters of scikit-learn, `V` with signs of the decomposition: Zheng, 2025."""
    whole = weight if bias is None else torch.cat([weight, bias.unsqueeze(1)], 1)
    plain = bare(whole)
    with torch.random.fork_rng(devices=[]), torch._C._DisableFuncTorch():
        torch.manual_seed(config.random_seed)
        u, _, v = torch.svd_lowrank(plain.to(where.dtype).float(), q=config.r, niter=2)
        means = KMeans(config.num_subspaces, init="random", n_init=1, max_iter=10, random_state=123456789)
        labels = means.fit_predict(u.numpy()).tolist()
    delta = torch.zeros_like(whole)
    for row, cluster in enumerate(labels):
        place = labels[:row].count(cluster)
        b, a = leaves[f"adamss_B.{cluster}"][place], leaves[f"adamss_A.{cluster}"]
        delta[row] = b @ a @ v.mT.to(where.dtype).to(weight)
    inputs = weight.shape[1]
    return weight + delta[:, :inputs], None if bias is None else bias + delta[:, inputs]


def unilora(config, where, leaves, weight, bias):
    """`W + B A`, entries `theta_k / sqrt(n_k)`, of indices that NumPy deals and roots in float32: Li et al., 2025."""
    shapes = {path: ((config.r, inputs), (out, config.r)) for path, (out, inputs) in where.sizes.items()}
    count, n = sum(math.prod(shape) for pair in shapes.values() for shape in pair), config.theta_d_length
    generator = np.random.default_rng(config.proj_seed)
    more = generator.choice(n, size=count % n, replace=False) if count % n else []
    dealt = np.array([*sorted(list(range(n)) * (count // n)), *more])
    generator.shuffle(dealt)
    dealt, start = torch.tensor(dealt), sum(math.prod(s) for path in shapes for s in shapes[path] if path < where.path)
    matrices = []
    for shape in shapes[where.path]:
        index = dealt[start : start + math.prod(shape)]
        often = torch.tensor([(dealt == k).sum().item() for k in index.tolist()])
        entries = leaves["unilora_theta_d"][index] * (1 / often.float().sqrt()).to(where.dtype).double()
        matrices.append(entries.view(shape))
        start += math.prod(shape)
    return weight + matrices[1] @ matrices[0], bias


def vblora(config, where, leaves, weight, bias):
    """`W + B A`, part by part a sum over the bank, with shares of the k largest logits alone: Li et al., 2024."""

    def parts(logits):
        least = logits.sort(-1, descending=True).values[..., config.topk - 1 : config.topk]
        shares = torch.where(logits >= least, logits.exp(), 0)
        return (shares / shares.sum(-1, keepdim=True)) @ leaves["vblora_vector_bank"]

    a = torch.cat(parts(leaves["vblora_logits_A"]).unbind(1), 1)
    b = torch.cat([part.T for part in parts(leaves["vblora_logits_B"])], 0)
    return weight + b @ a, bias


def tinylora(config, where, leaves, weight, bias):
    """`W + B (sum v_i P_i) A` around the first singular triplets, whose signs depend on the precision: Morris, 2026."""
    stored = weight.mT if where.layer is nn.Embedding else weight
    u, s, v = torch.linalg.svd(stored.float(), full_matrices=False)
    u, s, v = (part.to(where.dtype) for part in (u[:, : config.r], s[: config.r], v[: config.r]))
    b, a = (u * s.sqrt()).to(weight), (s.sqrt().unsqueeze(1) * v).to(weight)  # as files have them, in the base's dtype
    place, r = list(where.sizes).index(where.path), config.r
    generator = torch.Generator().manual_seed(config.projection_seed + place)
    drawn = torch.empty(config.u, r, r).normal_(0, r**-0.5, generator=generator)
    between = torch.tensordot(leaves["tinylora_v"], drawn.to(where.dtype).to(weight), 1)
    delta = b @ between @ a
    return weight + (delta.mT if where.layer is nn.Embedding else delta), bias


def gralora(config, where, leaves, weight, bias):
    """`W + s (G + B A)`, a product of rank `r / k` in each of `k x k` blocks: Jung et al., 2025."""
    k, part = config.gralora_k, config.r // config.gralora_k
    rows = []
    for j in range(k):
        own = [leaves["gralora_B"][j, n * part : (n + 1) * part].T for n in range(k)]
        other = [leaves["gralora_A"][n, :, j * part : (j + 1) * part].T for n in range(k)]
        rows.append(torch.cat([b @ a for b, a in zip(own, other, strict=True)], 1))
    delta = torch.cat(rows, 0)
    if config.hybrid_r:
        delta = delta + leaves["gralora_B_general"] @ leaves["gralora_A_general"]
    return weight + config.alpha / (config.r + config.hybrid_r) * delta, bias


def miss(config, where, leaves, weight, bias):
    """`W` plus one block for all shards of inputs: Kang et al., 2024; `bat`: `W_pn + W_pn B_p + B_p`."""
    r, block = config.r, leaves["miss_block"]
    out, inputs = weight.shape
    if config.init_weights == "bat":
        rows = []
        for p in range(out // r):
            shards = [weight[p * r : p * r + r, n * r : n * r + r] for n in range(inputs // r)]
            rows.append(torch.cat([shard + shard @ block[p] + block[p] for shard in shards], 1))
        return torch.cat(rows, 0), bias
    block = torch.cat([block] * (out // block.shape[1]), 1)
    return weight + torch.cat([block.T] * (inputs // r + 1), 1)[:, :inputs], bias


def hira(config, where, leaves, weight, bias):
    """`W + W * (B A)`, of kernels as matrices: Huang et al., 2025."""
    b, a = (next(leaf for name, leaf in leaves.items() if name.endswith(end)) for end in "BA")
    gains = sum(torch.outer(u, v) for u, v in zip(b.flatten(1).T, a.flatten(1), strict=True))
    return weight + weight * gains.reshape(weight.shape), bias


def beft(config, where, leaves, weight, bias):
    """`bias + b`: Huang et al., 2025."""
    return weight, bias + leaves["beft_bias"][0]


def deft(config, where, leaves, weight, bias):
    """`(I - Q P^T) W + s Q R`, with `Q` and `P` from one matrix: Kumar et al., 2025."""
    q = p = leaves["deft_P"]
    if config.decomposition_method == "qr":
        q, _ = torch.linalg.qr(p)
    right = q if config.decomposition_method == "qr" else p * (p > 0)
    put = torch.zeros_like(weight[: q.shape[1]]) if config.para else leaves["deft_R"]
    scale = config.alpha / q.shape[1] if config.alpha else 1
    return (torch.eye(len(q)).to(q) - q @ right.T) @ weight + scale * q @ put, bias


def principal(config, where, weight):
    """The first singular triplets of a weight as a matrix, whose signs depend on the precision."""
    wide = weight.flatten(1).to(torch.promote_types(where.dtype, torch.float32))
    u, s, v = torch.linalg.svd(wide, full_matrices=False)
    return u[:, : config.r].to(weight), s[: config.r].to(weight), v[: config.r].to(weight)


def lora_xs(config, where, leaves, weight, bias):
    """`W + s U S R V^T` with the first singular triplets: Bałazy et al., 2024."""
    u, s, v = principal(config, where, weight)
    delta = config.lora_alpha / config.r * u @ s.diag() @ leaves["lora_xs_R"] @ v
    return weight + delta.reshape(weight.shape), bias


def psoft(config, where, leaves, weight, bias):
    """`W + U S (diag(v_b) R diag(v_a) - I) V^T` with Cayley's `R`, four powers of its series, or a free one.

    Wu et al., 2025; with `pissa_init` the roots of the singular values are on both sides, as in PEFT.
    """
    u, s, v = principal(config, where, weight)
    one, given = torch.eye(config.r).to(weight), leaves["psoft_R.weight"]
    if config.psoft_orth:
        q = torch.zeros(config.r, config.r).to(weight)
        q[tuple(torch.triu_indices(config.r, config.r, 1))] = given
        q = q - q.T
        series = one + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q
        given = series if config.use_cayley_neumann else (one + q) @ torch.linalg.inv(one - q)
    for leaf, turn in (("psoft_R.vector_b", lambda t: t.T), ("psoft_R.vector_a", lambda t: t)):
        given = turn(turn(given) * leaves[leaf]) if leaf in leaves else given
    left, right = (s, torch.ones_like(s)) if config.ab_svd_init == "psoft_init" else (s.sqrt(), s.sqrt())
    return weight + (u * left @ (given - one) @ (right.unsqueeze(1) * v)).reshape(weight.shape), bias


def peanut(config, where, leaves, weight, bias):
    """`W + s B f(A W)`, an autoencoder of the columns of `W` with skips: Zhong et al., 2024."""
    act = {"relu": torch.relu, "tanh": torch.tanh}[config.act_fn]
    h = act(leaves["peanut_A.weight"] @ weight.flatten(1))
    skips = [h]
    for encoder in leaves.get("peanut_encoders", ()):
        skips.append(act(encoder @ skips[-1]))
    h = skips.pop()
    for decoder in leaves.get("peanut_decoders", ()):
        h = act(decoder @ h) + skips.pop()
    return weight + config.scaling * (leaves["peanut_B.weight"] @ h).reshape(weight.shape), bias


def glora(config, where, leaves, weight, bias):
    """`W + W * A + B` and `b + b * D + E + W C`: Chavan et al., 2023."""

    def matrix(path, shape):
        name = f"glora_{path}"
        if f"{name}.Xd" in leaves:
            return leaves[f"{name}.Xd"] @ leaves[f"{name}.Xu"]
        return leaves[f"{name}.X"].expand(shape) if f"{name}.X" in leaves else torch.zeros(shape).to(weight)

    out, inputs = weight.shape
    a, b, c = matrix("A", weight.shape), matrix("B", weight.shape), matrix("C", (inputs, 1))
    if bias is not None:
        bias = bias + bias * matrix("D", (out,)) + matrix("E", (out,)) + (weight @ c).flatten()
    return weight + weight * a + b, bias


# -- the rows --------------------------------------------------------------------------------------------------------

BOTH = {"target_modules": ["first", "second"]}
BLOCKS = {"target_modules_bd_a": ["first"], "target_modules_bd_b": ["second"], "nblocks": 2}
OF_LORA = (
    ({"r": 0}, "LoraConfig: r is 0 at first, expected a positive integer"),
    ({"lora_dropout": 1.5}, "LoraConfig: lora_dropout is 1.5, expected 0 <= p < 1"),
    ({"init_lora_weights": "magic"}, "LoraConfig: init_lora_weights is 'magic', expected True, False"),
    ({"bias": "some"}, "LoraConfig: bias is 'some', expected 'none', 'all' or 'lora_only'"),
)
DROPPED = {"lora_dropout": 0.5}


def hra(config, where, leaves, weight, bias):
    """`W H_1 ... H_r`, reflections, or `W (I - 2 Q Q^T)` with the vectors after Gram and Schmidt: Yuan et al., 2024."""
    turned, before = weight.flatten(1), []
    for u in leaves["hra_u"].T:
        if config.apply_GS:
            for q in before:
                u = u - (q @ u) * q
            before.append(u / u.norm())
        turned = turned - 2 * torch.outer(turned @ u, u) / (u @ u)
    return turned.reshape(weight.shape), bias


def road(config, where, leaves, weight, bias):
    """`R W` and `R b`, rotations and scales of pairs of outputs, entry by entry: Liao et al., 2024, equation 4."""
    half, n = config.group_size // 2, int(config.variant[-1])
    theta, alpha = (leaves[f"road_{leaf}"].view(-1, n, half) for leaf in ("theta", "alpha"))
    turn = torch.zeros(len(weight), len(weight)).to(weight)
    for group, i in torch.cartesian_prod(torch.arange(len(theta)), torch.arange(half)).tolist():
        t, a = ([leaf[group, k % n, i] for k in range(4)] for leaf in (theta, alpha))
        if n == 4:
            (c1, c2), (s1, s2) = (t[0].cos() * a[0], t[1].cos() * a[1]), (t[2].sin() * a[2], t[3].sin() * a[3])
        else:
            (c1, c2), (s1, s2) = ((f(t[0]) * a[0], f(t[1]) * a[1]) for f in (torch.cos, torch.sin))
        first = config.group_size * group + i
        places = torch.tensor([first, first, first + half, first + half]), torch.tensor([first, first + half] * 2)
        turn = turn.index_put(places, torch.stack([c1, -s1, s2, c2]))
    return torch.tensordot(turn, weight, 1), None if bias is None else turn @ bias


def boft(config, where, leaves, weight, bias):
    """`diag(s) W R^T`, `R` a product of block-diagonal rotations whose inputs are sorted by turns: Liu et al., 2023."""
    flat = weight.flatten(1)
    width, turn = flat.shape[1], torch.eye(flat.shape[1]).to(weight)
    for i, blocks in enumerate(leaves["boft_R"]):
        half, one = blocks.shape[-1] // 2, torch.eye(blocks.shape[-1]).to(weight)
        rotations = [torch.linalg.inv(one + (q - q.T) / 2).mm(one - (q - q.T) / 2) for q in blocks]
        pieces = torch.arange(width).view(-1, half).tolist()
        halves = [pieces[start : start + 2 ** (i + 1)] for start in range(0, len(pieces), 2 ** (i + 1))]
        order = [place for some in halves for piece in some[0::2] + some[1::2] for place in piece]
        mixed = one.new_zeros(width, width).index_put((torch.arange(width), torch.tensor(order)), one.new_ones(()))
        turn = mixed @ torch.block_diag(*rotations) @ mixed.T @ turn
    scale = leaves["boft_s"].flatten() if "boft_s" in leaves else torch.ones(len(weight)).to(weight)
    return scale.view(-1, *(1,) * (weight.ndim - 1)) * (flat @ turn.T).reshape(weight.shape), bias


def placed(config, coefficients, weight):
    """Yield row and column, drawn from a seed, of each coefficient of a weight as a matrix, and the coefficient."""
    columns = weight[0].numel()
    drawn = torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(config.random_loc_seed)).tolist()
    for place, coefficient in zip(drawn, coefficients, strict=False):
        yield place // columns, place % columns, coefficient


def fourierft(config, where, leaves, weight, bias):
    """`W + s Re(F^-1 C)`, a plane wave for each coefficient: Gao et al., 2024, equation 3."""
    rows, columns = len(weight), weight[0].numel()
    t, i = torch.meshgrid(torch.arange(rows).to(weight), torch.arange(columns).to(weight), indexing="ij")
    delta = torch.zeros_like(t)
    for j, k, c in placed(config, leaves["fourierft_spectrum"], weight):
        delta = delta + c * torch.cos(2 * math.pi * (j * t / rows + k * i / columns))
    return weight + config.scaling * (delta / (rows * columns)).reshape(weight.shape), bias


def waveft(config, where, leaves, weight, bias):
    """`W + s` times the inverse wavelet transform of `C`, an axis after the other: Bilican et al., 2025.

    The quarters are as PEFT has them: those off the diagonal the other way round than in `pywt.idwt2`.
    """
    if config.use_idwt:
        a, b = math.sqrt(2) * (1 + math.sqrt(3)) / 8, math.sqrt(2) * (1 - math.sqrt(3)) / 8
        low = [math.sqrt(0.5)] * 2 if config.wavelet_family == "db1" else [a, math.sqrt(3) * a, -math.sqrt(3) * b, b]
    spectrum, size = torch.zeros_like(weight.flatten(1)), weight.flatten(1).shape
    for row, column, c in placed(config, leaves["waveft_spectrum"], weight):
        spectrum = spectrum.index_put((torch.tensor(row), torch.tensor(column)), c)
    if config.use_idwt:
        more = len(low) - 2
        sizes = [number + more + (number + more) % 2 for number in size]
        edges = [((all_ - number) // 2, (all_ - number + 1) // 2) for all_, number in zip(sizes, size, strict=True)]
        spectrum = nn.functional.pad(spectrum, (*edges[1], *edges[0]))
        (ll, hl), (lh, hh) = (half.chunk(2, 1) for half in spectrum.chunk(2, 0))
        spectrum = torch.cat([torch.cat([ll, lh], 1), torch.cat([hl, hh], 1)], 0)
        for axis in (0, 1):
            half = sizes[axis] // 2
            inverse = torch.zeros(size[axis], 2 * half).to(weight)
            for at, j, f in torch.cartesian_prod(*map(torch.arange, (size[axis], half, len(low)))).tolist():
                if at == 2 * j + f - more:
                    inverse[at, j], inverse[at, half + j] = low[f], (-1) ** f * low[-1 - f]
            spectrum = (inverse @ spectrum).T
    return weight + config.scaling * spectrum.reshape(weight.shape), bias


def randlora(config, where, leaves, weight, bias):
    """`W + s sum_k B_k diag(l_k) A diag(g_k)`, or its transpose, with bases from a seed: Albert et al., 2025.

    Which column of all `B_k` meets which row is as PEFT has it.
    """
    (outputs, inputs), r = (max(sizes) for sizes in zip(*where.sizes.values(), strict=True)), config.r
    smaller, larger = min(outputs, inputs), max(outputs, inputs)
    generator, count = torch.Generator().manual_seed(config.projection_prng_key), -(-smaller // r)
    if config.sparse:
        a, b = torch.rand(r, 1, smaller, generator=generator), torch.rand(larger, count, r, generator=generator)
        a, b = (torch.where((one - 0.5).abs() > 1 / 3, (one - 0.5).sign(), 0) for one in (a, b))
    else:
        shapes = [(r, 1, smaller), *[(larger, 1, r)] * count]
        a, *b = (torch.empty(shape, dtype=torch.bfloat16) for shape in shapes)
        for one in (a, *b):
            nn.init.kaiming_uniform_(one, a=5**0.5, generator=generator)
        b = torch.cat(b, 1)
    a, b = ((one / one.std()).to(weight) for one in (a, b))
    first, second = leaves["randlora_lambda"], leaves["randlora_gamma"]
    smaller, larger, count = min(weight.shape), max(weight.shape), len(second)
    columns = torch.cat([b[:larger, k] for k in range(count)], 1)
    rows = torch.stack([first[i, k] * a[i, 0, :smaller] * second[k] for i in range(r) for k in range(count)])
    update = sum(torch.outer(columns[:, place], rows[place]) for place in range(r * count))
    return weight + config.randlora_alpha / r * (update if len(weight) >= weight.shape[1] else update.T), bias


def pvera(config, where, leaves, weight, bias):
    """VeRA with the first half of `A` and of `d`, those of the mean: Fillioux et al., 2025."""
    generator = torch.Generator().manual_seed(config.projection_prng_key)
    outputs, inputs = (max(sizes) for sizes in zip(*where.sizes.values(), strict=True))
    a, b = torch.empty(2 * config.r, inputs), torch.empty(outputs, config.r)
    for matrix in (a, b):
        nn.init.kaiming_uniform_(matrix, nonlinearity="relu", generator=generator)
    a, b = a[: config.r, : weight.shape[1]].to(weight), b[: weight.shape[0]].to(weight)
    return weight + leaves["pvera_lambda_b"].diag() @ b @ leaves["pvera_lambda_d"][: config.r].diag() @ a, bias


def loreft_basis(leaves):
    """The rows of `R`, by Gram and Schmidt one after the other."""
    rows = []
    for row in leaves["loreft_rotate"]:
        rest = row - sum((row @ other) * other for other in rows)
        rows.append(rest / (rest @ rest).sqrt())
    return torch.stack(rows)


def loreft(config, where, leaves, weight, bias):
    """`h + R^T (W h + b - R h)` of the output `h`: Wu et al., 2024, equation 2."""
    basis = loreft_basis(leaves)
    edit = torch.eye(len(weight)).to(weight) + basis.T @ (leaves["loreft_weight"] - basis)
    return torch.tensordot(edit, weight, 1), edit @ bias + basis.T @ leaves["loreft_bias"]


def loreft_of_output(config, where, leaves, weight, bias, x, y):
    basis = loreft_basis(leaves)
    return y + (y @ leaves["loreft_weight"].T + leaves["loreft_bias"] - y @ basis.T) @ basis


def unweighted(config, where, leaves, weight, bias):
    raise AssertionError(f"{where.path}: no weight expresses {type(config).__name__}")


def bottleneck(config, where, leaves, x, y):
    """`h + U f(D h + d) + u`: Houlsby et al., 2019, section 2.1."""
    d, down, u, up = (leaves[f"bottleneck_{name}"] for name in ("down_bias", "down", "up_bias", "up"))
    z = d + sum(y[..., i, None] * down[:, i] for i in range(down.shape[1]))
    if config.non_linearity == "gelu":
        z = z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))
    else:
        z = (torch.exp(z) - torch.exp(-z)) / (torch.exp(z) + torch.exp(-z))
    return y + u + sum(z[..., i, None] * up[:, i] for i in range(up.shape[1]))


def poly(config, where, leaves, weight, bias):
    """`W + B A / r`, part by part sums of skills by their shares: Ponti et al., 2022; Caccia et al., 2022."""
    odds = leaves["poly_router.module_logits"][0].exp().view(config.n_splits, config.n_skills)
    gates = odds / (1 + odds)
    a, b = [], []
    for split, own in enumerate(gates):
        shares = own / own.sum()
        a.append(sum(p * m for p, m in zip(shares, leaves["poly_lora_A"][split], strict=True)))
        b.append(sum(p * m for p, m in zip(shares, leaves["poly_lora_B"][split], strict=True)))
    return weight + (torch.cat(a, 0) @ torch.cat(b, 1)).T / config.r, bias


def lily(config, where, leaves, x, y):
    """`y + s h sum_e p_e B_e`, example by example: Zhong et al., 2024, section 3, with PEFT's mean over tokens."""
    outputs = []
    for example in x:
        hidden = example @ leaves["lily_A"].T
        odds = (hidden @ leaves["lily_router"].T).exp()
        shares = (odds / odds.sum(-1, keepdim=True)).reshape(-1, config.num_B).mean(0)
        outputs.append(hidden @ sum(p * b for p, b in zip(shares, leaves["lily_B"].chunk(config.num_B), strict=True)))
    return y + config.scaling * torch.stack(outputs)


def arrow(config, where, leaves, x, y):
    """`y + sum_e c_e B_e A_e x`, directions as 15 powers of `(B A)^T B A` leave them: Ostapenko et al., 2024."""
    start = torch.randn(x.shape[-1], generator=torch.Generator().manual_seed(config.rng_seed or 0))
    start, similar, outputs = (start / (start.norm() + 1e-8)).double(), [], []
    for a, b in zip(leaves["arrow_A"], leaves["arrow_B"], strict=True):
        with torch.no_grad():
            square = (b @ a).T @ (b @ a)
            before, after = (torch.linalg.matrix_power(square, n) @ start for n in (14, 15))
            size = (square @ before / before.norm()).norm()
            direction = after / after.norm() * size / (size + 1e-8)
        similar.append((x @ direction).abs() / config.router_temperature)
        outputs.append(x @ a.T @ b.T)
    similar = torch.stack(similar, -1)
    least = similar.sort(-1, descending=True).values[..., config.top_k - 1 : config.top_k]
    odds = torch.where(similar >= least, similar.exp(), 0)
    return y + (torch.stack(outputs, -1) * (odds / odds.sum(-1, keepdim=True)).unsqueeze(-2)).sum(-1)


PEFTS = ("test_outputs_are_pefts_with_either_ones_parameters", "test_files_go_to_peft_and_back")
CONVOLVED = Exempt(
    PEFTS,
    "PEFT's A is a convolution without the base's dilation and padding mode",
    frozenset({"conv2d", "conv2d (dilated)"}),
    (AssertionError, RuntimeError),
)
NOT_IN_PEFTS = (*PEFTS, "test_state_dicts_and_seeds_are_pefts", "test_seeds_are_pefts_bit_for_bit")
OF_HIRA = (
    ({"r": 0}, "HiraConfig: r is 0 at first, expected a positive integer"),
    ({"hira_dropout": 1.0}, "HiraConfig: hira_dropout is 1.0, expected 0 <= p < 1"),
    ({"init_weights": "magic"}, "HiraConfig: init_weights is 'magic', expected True, False, None or 'gaussian'"),
)
PADDED = Exempt(PEFTS, "PEFT pads with zeros, whatever the base's padding mode", frozenset({"conv2d"}))
OF_LOHA = (
    ({"r": 0, "rank_pattern": {}}, "LoHaConfig: r is 0 at first, expected a positive integer"),
    ({"rank_dropout": 1.0}, "LoHaConfig: rank_dropout is 1.0, expected 0 <= p < 1"),
    ({"module_dropout": -0.5}, "LoHaConfig: module_dropout is -0.5, expected 0 <= p < 1"),
)
EXEMPT_LOHA = (
    Exempt(NOT_IN_PEFTS, "PEFT's LoHa does not know Conv1D", frozenset({"linear (Conv1D)"}), TypeError),
    PADDED,
)
OF_LOKR = (
    ({"r": 0, "rank_pattern": {}}, "LoKrConfig: r is 0 at first, expected a positive integer"),
    ({"rank_dropout": 1.0}, "LoKrConfig: rank_dropout is 1.0, expected 0 <= p < 1"),
    ({"module_dropout": -0.5}, "LoKrConfig: module_dropout is -0.5, expected 0 <= p < 1"),
    ({"decompose_factor": 0}, "LoKrConfig: decompose_factor is 0, expected -1 or a positive integer"),
    ({"init_weights": "magic"}, "LoKrConfig: init_weights is 'magic', expected True, False or 'lycoris'"),
)
EXEMPT_LOKR = (
    Exempt(
        NOT_IN_PEFTS,
        "PEFT's LoKr knows linear layers and 1- and 2-d convolutions",
        frozenset({"linear (Conv1D)", "embedding", "conv3d"}),
        (TypeError, ValueError),
    ),
    PADDED,
)
OF_TINYLORA = (
    ({"r": 0}, "TinyLoraConfig: r is 0, expected a positive integer"),
    ({"u": -1}, "TinyLoraConfig: u is -1, expected a positive integer"),
    ({"weight_tying": 1.5}, "TinyLoraConfig: weight_tying is 1.5, expected 0 <= share <= 1"),
    ({"tinylora_dropout": 1.0}, "TinyLoraConfig: tinylora_dropout is 1.0, expected 0 <= p < 1"),
    ({"init_weights": "magic"}, "TinyLoraConfig: init_weights is 'magic', expected True, False or 'uniform'"),
)
OF_OFT = (
    Exempt(NOT_IN_PEFTS, "PEFT's OFT does not know Conv1D", frozenset({"linear (Conv1D)"}), TypeError),
    Exempt(NOT_IN_PEFTS, "PEFT's OFT refuses dilation", frozenset({"conv2d (dilated)"}), ValueError),
    Exempt(
        PEFTS,
        "PEFT's forward rotates overlapping patches and adds them up, which is not what it merges",
        frozenset({"conv2d"}),
    ),
)
CHANNELS = frozenset({"conv1d", "conv2d", "conv2d (dilated)", "conv3d"})
LINEAR_IN_PEFT = "PEFT's layers are linear ones"
NO_CONV1D = Exempt(NOT_IN_PEFTS, LINEAR_IN_PEFT, frozenset({"linear (Conv1D)"}), TypeError)
ALWAYS_LINEAR = Exempt(
    NOT_IN_PEFTS, LINEAR_IN_PEFT, CHANNELS | {"linear (Conv1D)", "embedding"}, (TypeError, ValueError)
)
OF_HRA = (
    Exempt(
        NOT_IN_PEFTS,
        "PEFT's HRA knows linear layers and 2-d convolutions",
        frozenset({"linear (Conv1D)", "conv1d", "conv3d"}),
        TypeError,
    ),
    Exempt(
        PEFTS,
        "PEFT ignores dilation and padding mode",
        frozenset({"conv2d", "conv2d (dilated)"}),
        (AssertionError, RuntimeError),
    ),
)
NO_IDENTITY = (
    "test_identity_at_init",
    "test_identity_at_init_bit_for_bit",
    "test_layouts_of_memory_keep_the_identity_bit_for_bit",
)
RANDOM_FACTORS = (
    Exempt(NO_IDENTITY, "both factors are random at first, in the paper and in PEFT"),
    Exempt(
        ("test_named_beside_others",),
        "both factors are random at first, so that a name that is new changes the output",
        frozenset({"linear", "linear (3-d input)", "linear (Conv1D)", "linear (registered)"}),
    ),
)
OF_SPECTRA = (Exempt(NOT_IN_PEFTS, LINEAR_IN_PEFT, CHANNELS, (TypeError, ValueError)),)
OF_BOFT = (
    Exempt(
        NOT_IN_PEFTS,
        "PEFT's BOFT knows linear layers and 2-d convolutions",
        frozenset({"linear (Conv1D)", "conv1d", "conv3d"}),
        TypeError,
    ),
    OF_HRA[1],
)
UNWEIGHTED = Exempt(
    (
        "test_merged_weights_are_the_formulas",
        "test_merged_weights_are_rounded_once",
        "test_merging_in_place_is_the_formula_and_unmerging_restores_every_bit",
        "test_named_beside_others",
        "test_model_is_what_it_was",
    ),
    "no weight expresses a network of the output, so that merging is an error",
    CHANNELS | {"embedding", "linear", "linear (3-d input)", "linear (Conv1D)", "linear (registered)"},
    UnsupportedConfig,
)
UNTIED = frozenset({"linear", "linear (3-d input)", "linear (Conv1D)", "linear (registered)"})
ROAD = {"group_size": 2, **BOTH}
OF_ROAD = (
    ({"variant": "road_3"}, "RoadConfig: variant is 'road_3', expected one of road_1, road_2, road_4"),
    ({"group_size": 3}, "RoadConfig: group_size is 3, expected a positive even number"),
    ({"group_size": 4}, "RoadConfig: group_size is 4 at first, which has 6 outputs, expected an even divisor"),
)
OF_DEFT = (
    ({"r": 0}, "DeftConfig: r is 0, expected a positive integer"),
    ({"decomposition_method": "svd"}, "DeftConfig: decomposition_method is 'svd', expected 'relu' or 'qr'"),
    ({"deft_dropout": 1.0}, "DeftConfig: deft_dropout is 1.0, expected 0 <= p < 1"),
)
OF_GLORA = (
    Exempt(NOT_IN_PEFTS, LINEAR_IN_PEFT, frozenset({"linear (Conv1D)"}), ValueError),
    Exempt(NOT_IN_PEFTS, "PEFT's states have zeros for what a layer without bias has not", frozenset({"linear"})),
)
OF_PEANUT = (
    ({"r": 0}, "PeanutConfig: r is 0, expected a positive integer"),
    ({"depth": -1}, "PeanutConfig: depth is -1, expected an integer >= 0"),
    ({"act_fn": "magic"}, "PeanutConfig: act_fn is 'magic', expected one of elu, gelu"),
)
OF_PSOFT = (
    ({"r": 0}, "PsoftConfig: r is 0, expected a positive integer"),
    ({"r": 5}, "r is 5 at first, whose weight as a matrix has the rank 4; expected r <= 4"),
    ({"psoft_alpha": 0}, "PsoftConfig: psoft_alpha is 0, expected another number"),
    ({"psoft_dropout": 1.0}, "PsoftConfig: psoft_dropout is 1.0, expected 0 <= p < 1"),
    ({"psoft_svd": "magic"}, "PsoftConfig: psoft_svd is 'magic', expected 'full' or 'lowrank'"),
    ({"cayley_neumann_eps": 1.5}, "PsoftConfig: cayley_neumann_eps is 1.5, expected None or 0 < eps < 1"),
)
OTHERS_OF_PSOFT = (
    Exempt(NOT_IN_PEFTS, LINEAR_IN_PEFT, CHANNELS | {"linear (Conv1D)", "embedding"}, (TypeError, ValueError)),
)


def row_of_lora(formula, fields, other, wrong=(), **rest):
    """A row of a LoRA variant; fields hold for both configs but where `other` says otherwise."""
    fields = {"lora_alpha": 3, **BOTH, **fields}
    config, beside = LoraConfig(**fields), LoraConfig(**{**fields, **other})
    return Row(config, formula, beside, DROPPED, (*wrong, *OF_LORA), **rest)


METHODS = {
    "lora": row_of_lora(lora, {"r": 2}, {"r": 3, "lora_alpha": 5, "use_rslora": True}, exempt=(CONVOLVED,)),
    "rslora": row_of_lora(lora, {"r": 4, "use_rslora": True}, {"r": 1, "use_rslora": False}, exempt=(CONVOLVED,)),
    "pissa": row_of_lora(
        pissa,
        {"r": 2, "init_lora_weights": "pissa"},
        {"r": 3, "init_lora_weights": True},
        [({"r": 5}, "r is 5 at first, whose weight is 6 x 4; 'pissa' needs r <= 4")],
        sites=frozenset({"linear"}),
        exempt=(
            Exempt(
                NOT_IN_PEFTS, "PEFT takes from a tied weight what both of its layers lose", frozenset({"linear (tied)"})
            ),
        ),
    ),
    "mica": row_of_lora(
        mica,
        {"r": 2, "init_lora_weights": "mica"},
        {"r": 3, "lora_alpha": 1},
        [({"r": 5}, "r is 5 at first, whose weight is 6 x 4; 'mica' needs r <= 4")],
        sites=frozenset({"linear", "embedding"}),
    ),
    "lora with bias": row_of_lora(
        lora,
        {"r": 2, "lora_bias": True, "target_modules": ["first"]},
        {"r": 3},
        [({"use_dora": True}, "use_dora and lora_bias are both True, and DoRA has no bias; set one")],
        sites=frozenset({"linear", "conv1d", "conv2d", "conv3d", "attention"}),
        exempt=(CONVOLVED,),
    ),
    "dora": row_of_lora(
        dora,
        {"r": 2, "use_dora": True},
        {"r": 3, "lora_alpha": 1},
        [({"lora_bias": True}, "use_dora and lora_bias are both True, and DoRA has no bias; set one")],
        sites=frozenset({"linear", "embedding", "conv1d", "conv2d", "conv3d"}),
        exempt=(
            Exempt(
                ("test_gradients_of_gradients_are_differences",),
                "the norm is a constant of the gradient (section 4.3 of the paper), which differences of outputs vary",
            ),
            CONVOLVED,
        ),
        rounds=dora_of_output,
    ),
    "ia3": Row(
        IA3Config(feedforward_modules=["second"], **BOTH),
        ia3,
        IA3Config(feedforward_modules=["second"], init_ia3_weights=False, **BOTH),
        {"bias": "all"},
        (({"feedforward_modules": ["third"]}, "IA3Config: feedforward_modules has ['third'], expected a subset"),),
        rounds={"first": "product", "second": "input"},
    ),
    "adalora": Row(
        AdaLoraConfig(init_r=3, target_r=2, total_step=10, **BOTH),
        adalora,
        AdaLoraConfig(init_r=2, target_r=1, lora_alpha=5, **BOTH),
        DROPPED,
        (
            ({"init_r": 0}, "AdaLoraConfig: init_r is 0, expected a positive integer"),
            ({"beta1": 1.0}, "AdaLoraConfig: beta1 is 1.0, expected 0 < beta < 1"),
            ({"tinit": 10}, "leave no step to allocate in, expected tinit < total_step - tfinal"),
            ({"lora_dropout": -0.5}, "AdaLoraConfig: lora_dropout is -0.5, expected 0 <= p < 1"),
        ),
        exempt=(PADDED,),
    ),
    "loha": Row(
        LoHaConfig(r=2, alpha=3, rank_pattern={"first": 1}, **BOTH),
        loha,
        LoHaConfig(r=3, alpha=5, **BOTH),
        {"rank_dropout": 0.5},
        OF_LOHA,
        exempt=EXEMPT_LOHA,
    ),
    "loha tucker": Row(
        LoHaConfig(r=2, use_effective_conv2d=True, **BOTH),
        loha,
        LoHaConfig(r=3, alpha=5, use_effective_conv2d=True, init_weights=False, **BOTH),
        {"use_effective_conv2d": False},
        OF_LOHA,
        exempt=EXEMPT_LOHA,
    ),
    "lokr": Row(
        LoKrConfig(r=1, alpha=3, **BOTH),
        lokr,
        LoKrConfig(r=1, alpha=5, init_weights="lycoris", **BOTH),
        {"rank_dropout": 0.5},
        OF_LOKR,
        exempt=EXEMPT_LOKR,
    ),
    "lokr whole": Row(
        LoKrConfig(r=4, alpha=3, rank_pattern={"first": 5}, init_weights="lycoris", **BOTH),
        lokr,
        LoKrConfig(r=5, alpha=5, init_weights=False, **BOTH),
        {"decompose_factor": 2},
        OF_LOKR,
        exempt=EXEMPT_LOKR,
    ),
    "lokr both": Row(
        LoKrConfig(r=2, decompose_both=True, decompose_factor=6, **BOTH),
        lokr,
        LoKrConfig(r=1, alpha=5, decompose_both=True, decompose_factor=6, **BOTH),
        {"decompose_both": False},
        OF_LOKR,
        exempt=EXEMPT_LOKR,
    ),
    "lokr tucker": Row(
        LoKrConfig(r=1, use_effective_conv2d=True, **BOTH),
        lokr,
        LoKrConfig(r=1, alpha=5, use_effective_conv2d=True, init_weights=False, **BOTH),
        {"use_effective_conv2d": False},
        OF_LOKR,
        exempt=(
            Exempt(PEFTS, "PEFT's Tucker form of rank 1 fails in torch.kron", frozenset({"conv1d"}), RuntimeError),
            *EXEMPT_LOKR,
        ),
    ),
    "oft": Row(
        OFTConfig(oft_block_size=2, **BOTH),
        oft,
        OFTConfig(oft_block_size=2, init_weights=False, **BOTH),
        {"num_cayley_neumann_terms": 4},
        (
            ({"r": 2}, "OFTConfig: r is 2 and oft_block_size is 2, expected one positive and the other 0"),
            ({"eps": 0.0}, "OFTConfig: eps is 0.0, expected a positive number"),
            ({"num_cayley_neumann_terms": 1}, "num_cayley_neumann_terms is 1, expected 2 or more"),
        ),
        exempt=OF_OFT,
        rounds="input",
    ),
    "oft exact": Row(
        OFTConfig(r=2, oft_block_size=0, use_cayley_neumann=False, **BOTH),
        oft,
        OFTConfig(r=2, oft_block_size=0, use_cayley_neumann=False, init_weights=False, **BOTH),
        {"use_cayley_neumann": True},
        (
            ({"r": 4}, "r=4 makes blocks of 1 at first, which has 4 coordinates; expected blocks of 2 or more"),
            ({"module_dropout": 1.0}, "OFTConfig: module_dropout is 1.0, expected 0 <= p < 1"),
        ),
        exempt=(
            Exempt(
                ("test_two_in_place_are_two_that_are_named",),
                "of several rotations of an input the first that is active is the outermost in place, as in PEFT, and "
                "the innermost in a graft (blocks of 2, as the other row has, commute)",
                frozenset(
                    {"linear", "linear (3-d input)", "linear (Conv1D)", "linear (registered)"}
                    | {"conv2d", "conv2d (dilated)"}
                ),
            ),
            *OF_OFT,
        ),
        rounds="input",
    ),
    "hra": Row(
        HRAConfig(r=4, **BOTH),
        hra,
        HRAConfig(r=3, init_weights=False, **BOTH),
        {"apply_GS": True},
        (({"r": 0}, "HRAConfig: r is 0, expected a positive integer"),),
        exempt=OF_HRA,
        rounds="input",
    ),
    "hra orthonormal": Row(
        HRAConfig(r=2, apply_GS=True, init_weights=False, **BOTH),
        hra,
        HRAConfig(r=1, apply_GS=True, init_weights=False, **BOTH),
        {"apply_GS": False},
        (
            (
                {"r": 5},
                "r is 5 at first, whose vectors have 4 entries; apply_GS makes them orthonormal, which needs r <= 4",
            ),
        ),
        exempt=(
            Exempt(NO_IDENTITY, "reflections without pairs are no identity"),
            Exempt(
                ("test_named_beside_others",),
                "reflections without pairs are no identity, so that a name that is new changes the output",
                CHANNELS | {"linear", "linear (3-d input)", "linear (Conv1D)", "linear (registered)"},
            ),
            *OF_HRA,
        ),
        rounds="input",
    ),
    "road": Row(
        RoadConfig(**ROAD),
        road,
        RoadConfig(init_weights=False, **ROAD),
        {"variant": "road_2"},
        OF_ROAD,
        exempt=(ALWAYS_LINEAR,),
        rounds="product",
    ),
    "road 2": Row(
        RoadConfig(variant="road_2", **ROAD),
        road,
        RoadConfig(variant="road_2", init_weights=False, **ROAD),
        {"variant": "road_4"},
        (),
        exempt=(ALWAYS_LINEAR,),
        rounds="product",
    ),
    "road 4": Row(
        RoadConfig(variant="road_4", **ROAD),
        road,
        RoadConfig(variant="road_4", init_weights=False, **ROAD),
        {"variant": "road_1"},
        (),
        exempt=(ALWAYS_LINEAR,),
        rounds="product",
    ),
    "boft": Row(
        BOFTConfig(boft_block_size=2, **BOTH),
        boft,
        BOFTConfig(boft_block_size=2, init_weights=False, **BOTH),
        {"boft_dropout": 0.5},
        (
            ({"boft_block_num": 2}, "BOFTConfig: boft_block_size is 2 and boft_block_num is 2, expected one positive"),
            ({"boft_block_size": 3}, "boft_block_size is 3 at first, whose outputs have 4 inputs, expected a divisor"),
            ({"boft_n_butterfly_factor": 0}, "boft_n_butterfly_factor is 0, expected a positive integer"),
            (
                {"boft_n_butterfly_factor": 2},
                "is 2 at second, which has 3 blocks of 2; expected an even size, and a mu",
            ),
            ({"boft_dropout": 1.0}, "BOFTConfig: boft_dropout is 1.0, expected 0 <= p < 1"),
        ),
        exempt=OF_BOFT,
        rounds="input, then boft_s",
    ),
    "boft butterfly": Row(
        BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=2, target_modules=["first"]),
        boft,
        BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=2, init_weights=False, target_modules=["first"]),
        {"boft_block_size": 1},
        (),
        exempt=(
            Exempt(
                NOT_IN_PEFTS,
                "PEFT takes one factor where its CUDA extension is not",
                CHANNELS | {"linear", "linear (3-d input)", "linear (Conv1D)", "linear (tied)"},
                (AssertionError, RuntimeError, TypeError),
            ),
        ),
        rounds="input, then boft_s",
    ),
    "loreft": Row(
        LoReftConfig(r=2, init_weights=False, target_modules=["first"]),
        loreft,
        LoReftConfig(r=3, target_modules=["first"]),
        {"bias": "all"},
        (
            ({"r": 0}, "LoReftConfig: r is 0, expected a positive integer"),
            ({"r": 7}, "LoReftConfig: r is 7 at first, which has 6 outputs, expected r <= 6"),
        ),
        peft=None,
        exempt=(
            Exempt(NO_IDENTITY, "the authors' start is no identity"),
            Exempt(
                ("test_named_beside_others",),
                "the authors' start is no identity, so that a name that is new changes the output",
                CHANNELS | {"linear", "linear (3-d input)", "linear (Conv1D)", "linear (registered)"},
            ),
        ),
        rounds=loreft_of_output,
    ),
    "poly": Row(
        PolyConfig(r=2, n_skills=3, n_splits=2, **BOTH),
        poly,
        PolyConfig(r=3, n_skills=3, n_splits=2, init_weights=False, **BOTH),
        {"n_skills": 2},
        (
            ({"r": 0}, "PolyConfig: r is 0, expected a positive integer"),
            ({"n_tasks": 0}, "PolyConfig: n_tasks is 0, expected a positive integer"),
            ({"poly_type": "mhr"}, "PolyConfig: poly_type is 'mhr', expected 'poly'"),
            ({"n_splits": 4}, "PolyConfig: n_splits is 4 at first, whose out_features is 6, expected a divisor"),
        ),
        exempt=(
            NO_CONV1D,
            Exempt(
                PEFTS,
                "PEFT's layers take inputs of three axes alone",
                frozenset({"linear", "linear (tied)"}),
                RuntimeError,
            ),
        ),
        evaluated=True,
        call=lambda model, x: model.base_model(x, task_ids=torch.zeros(len(x), dtype=torch.long)),
    ),
    "arrow": Row(
        ArrowLoraConfig(r=2, num_experts=3, top_k=2, router_temperature=0.5, **BOTH),
        unweighted,
        ArrowLoraConfig(r=2, num_experts=3, top_k=2, router_temperature=0.5, init_weights=False, **BOTH),
        {"top_k": 3},
        (
            ({"r": 0}, "ArrowLoraConfig: r is 0, expected a positive integer"),
            ({"top_k": 4}, "ArrowLoraConfig: top_k is 4 and num_experts is 3, expected top_k <= 3"),
            ({"router_temperature": 0.0}, "ArrowLoraConfig: router_temperature is 0.0, expected a positive number"),
        ),
        peft=None,
        exempt=(
            Exempt(
                ("test_gradients_of_gradients_are_differences", "test_hessians_are_the_formulas"),
                "directions are constants of the gradient, which differences of it vary",
            ),
            dataclasses.replace(UNWEIGHTED, sites=UNTIED, reason="no weight expresses shares that depend on the token"),
        ),
        output=arrow,
    ),
    "lily": Row(
        LilyConfig(r=2, num_B=3, scaling=2.0, target_modules="first|second"),
        unweighted,
        LilyConfig(r=2, num_B=3, scaling=0.5, init_weights=False, target_modules="first|second"),
        {"r": 3},
        (
            ({"r": 0}, "LilyConfig: r is 0, expected an integer >= 1"),
            ({"stride_A": 0}, "LilyConfig: stride_A is 0, expected an integer >= 1"),
            ({"num_B": 1}, "LilyConfig: num_B is 1, expected an integer >= 2"),
        ),
        exempt=(
            Exempt(
                ("test_routed_tokens_are_a_loop",),
                "its router mixes by all tokens of an example, so that tokens of their own are an error",
                raises=UnsupportedCall,
            ),
            dataclasses.replace(UNWEIGHTED, sites=UNTIED, reason="no weight expresses a mix that depends on the input"),
            Exempt(NOT_IN_PEFTS, LINEAR_IN_PEFT, frozenset({"linear (Conv1D)"}), NotImplementedError),
            Exempt(
                PEFTS,
                "PEFT's router takes the mean over the batch, so that an example's output depends on the others",
                frozenset({"linear", "linear (3-d input)", "linear (tied)"}),
                (AssertionError, ValueError),
            ),
        ),
        output=lily,
    ),
    "bottleneck": Row(
        BottleneckConfig(r=3, non_linearity="gelu", **BOTH),
        unweighted,
        BottleneckConfig(r=2, non_linearity="gelu", init_weights=False, **BOTH),
        {"non_linearity": "relu"},
        (
            ({"r": 0}, "BottleneckConfig: r is 0, expected a positive integer"),
            ({"non_linearity": "swish"}, "BottleneckConfig: non_linearity is 'swish', expected one of gelu, relu"),
        ),
        peft=None,
        exempt=(UNWEIGHTED,),
        output=bottleneck,
    ),
    "bottleneck tanh": Row(
        BottleneckConfig(r=2, non_linearity="tanh", **BOTH),
        unweighted,
        BottleneckConfig(r=4, non_linearity="tanh", **BOTH),
        {"non_linearity": "gelu"},
        (),
        peft=None,
        exempt=(UNWEIGHTED,),
        output=bottleneck,
    ),
    "fourierft": Row(
        FourierFTConfig(n_frequency=7, init_weights=True, n_frequency_pattern={"first": 5}, **BOTH),
        fourierft,
        FourierFTConfig(n_frequency=4, scaling=90.0, random_loc_seed=3, **BOTH),
        {"bias": "all"},
        (
            ({"n_frequency": 0, "n_frequency_pattern": {}}, "FourierFTConfig: n_frequency is 0 at first, whose weight"),
            (
                {"n_frequency": 25},
                "n_frequency is 25 at second, whose weight has 24 entries, expected 1 <= n_frequency <=",
            ),
        ),
        exempt=OF_SPECTRA,
    ),
    "waveft": Row(
        WaveFTConfig(n_frequency=7, n_frequency_pattern={"first": 5}, wavelet_family="db2", scaling=2.0, **BOTH),
        waveft,
        WaveFTConfig(n_frequency=4, scaling=3.0, random_loc_seed=3, init_weights=False, **BOTH),
        {"bias": "all"},
        (
            ({"n_frequency": 0, "n_frequency_pattern": {}}, "WaveFTConfig: n_frequency is 0 at first, whose weight"),
            (
                {"n_frequency": 25},
                "n_frequency is 25 at second, whose weight has 24 entries, expected 1 <= n_frequency <=",
            ),
            ({"wavelet_family": "coif4"}, "WaveFTConfig: wavelet_family is 'coif4', expected one of db1, db2"),
            (
                {"proportional_parameters": True},
                "proportional_parameters is True, so n_frequency_pattern has no effect",
            ),
        ),
        exempt=OF_SPECTRA,
    ),
    "waveft sparse": Row(
        WaveFTConfig(n_frequency=6, use_idwt=False, proportional_parameters=True, scaling=2.0, **BOTH),
        waveft,
        WaveFTConfig(n_frequency=3, **BOTH),
        {"bias": "all"},
        (),
        exempt=OF_SPECTRA,
    ),
    "bdlora": Row(
        LoraConfig(r=4, use_bdlora=BLOCKS, **BOTH),
        bdlora,
        LoraConfig(r=4, use_bdlora=BLOCKS, lora_alpha=3, use_rslora=True, init_lora_weights=False, **BOTH),
        {"r": 2},
        (
            ({"use_bdlora": {"nblocks": 0}}, "BdLoraConfig: nblocks is 0, expected a positive integer"),
            ({"use_bdlora": {"blocks": 2}}, "use_bdlora is {'blocks': 2}, expected a BdLoraConfig, or a dict with"),
            ({"use_bdlora": {"target_modules_bd_a": "first"}}, "target_modules_bd_a is 'first', expected a list of"),
            ({"use_bdlora": {**BLOCKS, "target_modules_bd_b": ["first"]}}, "['first'] are in target_modules_bd_a and"),
            ({"use_bdlora": {**BLOCKS, "target_modules_bd_b": []}}, "has second neither in target_modules_bd_a nor in"),
            (
                {"use_bdlora": {**BLOCKS, "target_modules_bd_b": ["sec", "ir"]}},
                "has first in target_modules_bd_a and in",
            ),
            ({"r": 3}, "use_bdlora has nblocks 2, which does not divide r, 3, at first"),
            (
                {"use_dora": True},
                "use_bdlora is given with init_lora_weights True, use_dora True, lora_bias False; exp",
            ),
            ({"init_lora_weights": "pissa"}, "use_bdlora is given with init_lora_weights 'pissa', use_dora False"),
        ),
        peft={"use_bdlora": BLOCKS},
        sites=frozenset({"linear"}),
        exempt=(
            Exempt(
                NOT_IN_PEFTS,
                "PEFT's BD-LoRA does not know Conv1D",
                frozenset({"linear (Conv1D)"}),
                AttributeError,
            ),
        ),
    ),
    "vera": Row(
        VeraConfig(r=3, **BOTH),
        vera,
        VeraConfig(r=2, projection_prng_key=1, d_initial=0.3, **BOTH),
        {"vera_dropout": 0.5},
        (
            ({"r": 0}, "VeraConfig: r is 0, expected a positive integer"),
            ({"vera_dropout": 1.0}, "VeraConfig: vera_dropout is 1.0, expected 0 <= p < 1"),
        ),
    ),
    "pvera": Row(
        PveraConfig(r=3, **BOTH),
        pvera,
        PveraConfig(r=3, projection_prng_key=1, d_initial=0.3, **BOTH),
        {"r": 2},
        (
            ({"r": 0}, "PveraConfig: r is 0, expected a positive integer"),
            ({"pvera_dropout": 1.0}, "PveraConfig: pvera_dropout is 1.0, expected 0 <= p < 1"),
        ),
        evaluated=True,
    ),
    "randlora": Row(
        RandLoraConfig(r=3, randlora_alpha=2, **BOTH),
        randlora,
        RandLoraConfig(r=3, randlora_alpha=1, projection_prng_key=1, init_weights=False, **BOTH),
        {"r": 2},
        (
            ({"r": 0}, "RandLoraConfig: r is 0, expected a positive integer"),
            ({"randlora_dropout": 1.0}, "RandLoraConfig: randlora_dropout is 1.0, expected 0 <= p < 1"),
        ),
    ),
    "randlora sparse": Row(
        RandLoraConfig(r=2, randlora_alpha=1, sparse=True, **BOTH),
        randlora,
        RandLoraConfig(r=2, randlora_alpha=2, **BOTH),
        {"randlora_dropout": 0.5},
        (),
    ),
    "c3a": Row(
        C3AConfig(block_size=2, init_weights=True, **BOTH),
        c3a,
        C3AConfig(block_size=2, init_weights="gaussian", **BOTH),
        {"block_size": 1},
        (
            ({"block_size": 4}, "block_size is 4 at first, whose weight is 6 x 4; expected a divisor of 2"),
            ({"block_size": 0}, "C3AConfig: block_size is 0 at first, expected a positive integer"),
            ({"init_weights": "magic"}, "C3AConfig: init_weights is 'magic', expected one of True, False, 'gaussian'"),
        ),
        exempt=(Exempt(NOT_IN_PEFTS, LINEAR_IN_PEFT, CHANNELS | {"linear (Conv1D)"}, TypeError),),
    ),
    "delora": Row(
        DeloraConfig(r=2, delora_lambda=3, rank_pattern={"first": 1}, **BOTH),
        delora,
        DeloraConfig(r=3, delora_lambda=5, init_weights=False, **BOTH),
        {"module_dropout": 0.5},
        (
            ({"r": 0, "rank_pattern": {}}, "DeloraConfig: r is 0 at first, expected a positive integer"),
            ({"delora_lambda": 0}, "DeloraConfig: delora_lambda is 0 at first, expected a positive number"),
            ({"module_dropout": 1.0}, "DeloraConfig: module_dropout is 1.0, expected 0 <= p < 1"),
        ),
        exempt=(Exempt(NOT_IN_PEFTS, LINEAR_IN_PEFT, CHANNELS | {"linear (Conv1D)", "embedding"}, TypeError),),
    ),
    "shira": Row(
        ShiraConfig(r=1, random_seed=1, **BOTH),
        shira,
        ShiraConfig(r=2, init_weights=False, **BOTH),
        {"bias": "all"},
        (
            ({"r": 0}, "ShiraConfig: r is 0, expected a positive integer"),
            ({"r": 3}, "r is 3 at first, a mask of r * (6 + 4) = 30 entries, and the weight has 24; expected r <= 2"),
            ({"mask_type": "magnitude"}, "random_seed is 1 and mask_type is 'magnitude', which draws nothing from it"),
            ({"mask_fn": len}, "mask_type is 'random', so mask_fn has no effect; give mask_type a name of your own"),
        ),
        exempt=(Exempt(NOT_IN_PEFTS, LINEAR_IN_PEFT, CHANNELS | {"linear (Conv1D)"}, TypeError),),
    ),
    "supertuning": Row(
        SupertuningConfig(sparsity=0.7, **BOTH),
        supertuning,
        SupertuningConfig(sparsity=0.5, select_top=False, init_weights=False, **BOTH),
        {"r": 2},
        (
            ({"sparsity": 1.0}, "SupertuningConfig: sparsity is 1.0, expected 0 <= share < 1"),
            (
                {"sparsity": 0.99},
                "at first, whose weight has 24 entries, so that none is trained; expected sparsity <=",
            ),
            ({"lora_alpha": 2.0}, "lora_alpha is 2.0 and r is None, without which it has no effect; set r, or leave"),
        ),
        exempt=(NO_CONV1D,),
    ),
    "supertuning and lora": Row(
        SupertuningConfig(sparsity=0.7, select_top=False, r=2, lora_alpha=3, **BOTH),
        supertuning,
        SupertuningConfig(sparsity=0.6, r=2, lora_alpha=5, init_weights=False, **BOTH),
        {"lora_dropout": 0.5},
        (
            ({"r": 0}, "SupertuningConfig: r is 0, expected a positive integer or None"),
            ({"lora_dropout": 1.0}, "SupertuningConfig: lora_dropout is 1.0, expected 0 <= p < 1"),
        ),
        exempt=(NO_CONV1D,),
    ),
    "unilora": Row(
        UniLoraConfig(r=2, theta_d_length=7, init_theta_d_bound=1.0, **BOTH),
        unilora,
        UniLoraConfig(r=3, theta_d_length=9, proj_seed=3, init_weights=False, **BOTH),
        {"unilora_dropout": 0.5},
        (
            ({"r": 0}, "UniLoraConfig: r is 0, expected a positive integer"),
            ({"theta_d_length": 0}, "UniLoraConfig: theta_d_length is 0, expected a positive integer"),
            ({"proj_seed": -1}, "UniLoraConfig: proj_seed is -1, expected an integer >= 0"),
            ({"unilora_dropout": 1.0}, "UniLoraConfig: unilora_dropout is 1.0, expected 0 <= p < 1"),
            ({"init_theta_d_bound": 0.0}, "UniLoraConfig: init_theta_d_bound is 0.0, expected a positive number"),
        ),
        exempt=RANDOM_FACTORS,
    ),
    "unilora with indices": Row(
        UniLoraConfig(r=1, theta_d_length=5, save_indices=True, init_weights=False, **BOTH),
        unilora,
        UniLoraConfig(r=2, theta_d_length=50, save_indices=True, **BOTH),
        {"bias": "all"},
        (),
        exempt=RANDOM_FACTORS,
    ),
    "osf": Row(
        OSFConfig(rank_pattern={"first": 1}, **BOTH),
        osf,
        OSFConfig(effective_rank=3, init_weights=False, **BOTH),
        {"bias": "all"},
        (
            ({"rank_pattern": {"first": 4}}, "effective_rank keeps 4 singular triplets at first, whose weight has 4"),
            ({"effective_rank": 0, "rank_pattern": None}, "keeps 0 singular triplets at first, whose weight has 4; ex"),
        ),
        exempt=(
            Exempt(
                NOT_IN_PEFTS,
                "PEFT leaves what is no linear layer of torch as it is, without a word",
                frozenset({"linear (Conv1D)"}),
            ),
        ),
    ),
    "vblora": Row(
        VBLoRAConfig(r=2, num_vectors=5, vector_length=2, init_vector_bank_bound=2.0, **BOTH),
        vblora,
        VBLoRAConfig(r=2, num_vectors=5, vector_length=2, init_logits_std=0.5, save_only_topk_weights=True, **BOTH),
        {"topk": 3},
        (
            ({"r": 0}, "VBLoRAConfig: r is 0, expected a positive integer"),
            ({"topk": 6}, "VBLoRAConfig: topk is 6 and num_vectors is 5, expected topk <= num_vectors"),
            ({"vector_length": 4}, "vector_length is 4 at first, whose out_features is 6, expected a divisor"),
            ({"vblora_dropout": 1.0}, "VBLoRAConfig: vblora_dropout is 1.0, expected 0 <= p < 1"),
            ({"init_logits_std": -1.0}, "VBLoRAConfig: init_logits_std is -1.0, expected a number >= 0"),
        ),
        exempt=RANDOM_FACTORS,
    ),
    "tinylora": Row(
        TinyLoraConfig(r=2, u=5, **BOTH),
        tinylora,
        TinyLoraConfig(r=3, u=4, projection_seed=7, init_weights="uniform", **BOTH),
        {"weight_tying": 1.0},
        OF_TINYLORA,
    ),
    "tinylora tied": Row(
        TinyLoraConfig(r=2, u=3, weight_tying=1.0, projection_seed=1, save_projection=False, **BOTH),
        tinylora,
        TinyLoraConfig(r=1, u=5, weight_tying=1.0, **BOTH),
        {"tinylora_dropout": 0.5},
        OF_TINYLORA,
    ),
    "gralora": Row(
        GraloraConfig(r=4, alpha=3, **BOTH),
        gralora,
        GraloraConfig(r=4, alpha=5, init_weights=False, **BOTH),
        {"r": 2},
        (
            ({"r": 3}, "GraloraConfig: r is 3 and gralora_k is 2, expected a positive multiple of gralora_k"),
            ({"gralora_k": 0}, "GraloraConfig: gralora_k is 0, expected a positive integer"),
            ({"gralora_k": 4}, "gralora_k is 4 at first, which has 4 inputs and 6 outputs, expected a divisor of 2"),
            ({"hybrid_r": -1}, "GraloraConfig: hybrid_r is -1, expected an integer >= 0"),
            ({"gralora_dropout": 1.0}, "GraloraConfig: gralora_dropout is 1.0, expected 0 <= p < 1"),
        ),
    ),
    "gralora hybrid": Row(
        GraloraConfig(r=2, hybrid_r=1, alpha=3, **BOTH),
        gralora,
        GraloraConfig(r=2, hybrid_r=1, alpha=2, **BOTH),
        {"hybrid_r": 2},
        (),
    ),
    "miss": Row(
        MissConfig(r=3, **BOTH),
        miss,
        MissConfig(r=3, init_weights=False, **BOTH),
        {"r": 2},
        (
            ({"r": 0}, "MissConfig: r is 0 at first, which has 4 inputs, expected 1 <= r <= 4"),
            ({"r": 5}, "r is 5 at first, which has 4 inputs, expected 1 <= r <= 4"),
            ({"init_weights": "bat"}, "has 4 inputs and 6 outputs; 'bat' expects a divisor of both, of 2"),
            ({"init_weights": "mini", "mini_r": 4}, "mini_r is 4 at first, which has 6 outputs, expected a divisor"),
            ({"init_weights": "magic"}, "MissConfig: init_weights is 'magic', expected True, False, 'bat' or 'mini'"),
            ({"miss_dropout": 1.0}, "MissConfig: miss_dropout is 1.0, expected 0 <= p < 1"),
        ),
        exempt=(Exempt(NOT_IN_PEFTS, LINEAR_IN_PEFT, frozenset({"linear (Conv1D)"}), TypeError),),
    ),
    "miss mini": Row(
        MissConfig(r=2, init_weights="mini", mini_r=2, **BOTH),
        miss,
        MissConfig(r=2, init_weights="mini", mini_r=2, inference_mode=True, **BOTH),
        {"mini_r": 1},
        (),
        exempt=(Exempt(NOT_IN_PEFTS, LINEAR_IN_PEFT, frozenset({"linear (Conv1D)"}), TypeError),),
    ),
    "miss bat": Row(
        MissConfig(r=2, init_weights="bat", **BOTH),
        miss,
        MissConfig(r=2, init_weights="bat", inference_mode=True, **BOTH),
        {"r": 1},
        (),
        exempt=(Exempt(NOT_IN_PEFTS, LINEAR_IN_PEFT, frozenset({"linear (Conv1D)"}), TypeError),),
    ),
    "hira": Row(
        HiraConfig(r=3, **BOTH),
        hira,
        HiraConfig(r=1, init_weights="gaussian", **BOTH),
        {"hira_dropout": 0.5},
        OF_HIRA,
        exempt=(PADDED,),
    ),
    "beft": Row(
        BeftConfig(target_modules=["first"]),
        beft,
        BeftConfig(init_weights=False, target_modules=["first"]),
        {"bias": "all"},
        (),
        exempt=(Exempt(NOT_IN_PEFTS, LINEAR_IN_PEFT, CHANNELS | {"linear (Conv1D)"}, TypeError),),
    ),
    "deft": Row(
        DeftConfig(r=2, alpha=4, **BOTH),
        deft,
        DeftConfig(r=2, alpha=2, init_weights=False, **BOTH),
        {"decomposition_method": "qr"},
        OF_DEFT,
    ),
    "deft qr": Row(
        DeftConfig(r=3, decomposition_method="qr", **BOTH),
        deft,
        DeftConfig(r=3, decomposition_method="qr", alpha=5, **BOTH),
        {"r": 2},
        OF_DEFT,
    ),
    "lora_xs": Row(
        LoraXSConfig(r=2, lora_alpha=3, **BOTH),
        lora_xs,
        LoraXSConfig(r=3, lora_alpha=5, init_weights="gaussian", **BOTH),
        {"lora_dropout": 0.5},
        (
            ({"r": 0}, "LoraXSConfig: r is 0, expected a positive integer"),
            ({"r": 5}, "r is 5 at first, whose weight as a matrix has the rank 4; expected r <= 4"),
            ({"lora_dropout": 1.0}, "LoraXSConfig: lora_dropout is 1.0, expected 0 <= p < 1"),
            ({"init_weights": "magic"}, "LoraXSConfig: init_weights is 'magic', expected True or 'gaussian'"),
        ),
        peft=None,
        exempt=(
            Exempt(
                ("test_files_go_to_peft_and_back",),
                "PEFT has no such method",
                CHANNELS | {"linear", "linear (3-d input)", "linear (Conv1D)", "linear (tied)", "embedding"},
                KeyError,
            ),
        ),
    ),
    "adamss": Row(
        AdamssConfig(r=3, num_subspaces=2, subspace_rank=2, **BOTH),
        adamss,
        AdamssConfig(r=3, num_subspaces=2, subspace_rank=2, init_weights=None, use_asa=True, **BOTH),
        {"num_subspaces": 3},
        (
            ({"r": 0}, "AdamssConfig: r is 0, expected a positive integer"),
            ({"num_subspaces": -1}, "AdamssConfig: num_subspaces is -1, expected a positive integer"),
            ({"init_weights": "zero"}, "AdamssConfig: init_weights is 'zero', expected 'orthogonal' or None"),
            ({"svd_threshold": 1.0}, "AdamssConfig: svd_threshold is 1.0, expected 0 <= threshold < 1"),
            ({"use_asa": True, "mask_interval": 0}, "AdamssConfig: mask_interval is 0, expected a positive number"),
            ({"use_asa": True, "init_warmup": 2000}, "init_warmup is 2000 and final_warmup 1000, expected the first"),
            ({"r": 1}, "rows at first has the rank 2, and there are 1 singular vectors; set subspace_rank=1"),
        ),
        exempt=(Exempt(NOT_IN_PEFTS, LINEAR_IN_PEFT, frozenset({"linear (Conv1D)"}), TypeError),),
    ),
    "frod": Row(
        FrodConfig(sparse_rate=0.2, **BOTH),
        frod,
        FrodConfig(sparse_rate=0.2, projection_prng_key=3, regularization_alpha=0.1, init_weights=False, **BOTH),
        {"sparse_rate": 0.3},
        (
            ({"sparse_rate": 1.5}, "FrodConfig: sparse_rate is 1.5, expected 0 to 1, the share of the trained entries"),
            ({"frod_dropout": 1.0}, "FrodConfig: frod_dropout is 1.0, expected 0 <= p < 1"),
            ({"regularization_alpha": -1.0}, "FrodConfig: regularization_alpha is -1.0, expected 0 or more"),
        ),
    ),
    "psoft": Row(
        PsoftConfig(r=3, psoft_alpha=5, **BOTH),
        psoft,
        PsoftConfig(r=3, psoft_alpha=2, init_weights=False, **BOTH),
        {"r": 2},
        OF_PSOFT,
        exempt=OTHERS_OF_PSOFT,
    ),
    "psoft series": Row(
        PsoftConfig(r=3, use_cayley_neumann=True, ab_svd_init="pissa_init", psoft_mag_a=False, **BOTH),
        psoft,
        PsoftConfig(r=3, use_cayley_neumann=True, ab_svd_init="pissa_init", psoft_mag_a=False, psoft_alpha=1, **BOTH),
        {"num_cayley_neumann_terms": 3},
        (({"num_cayley_neumann_terms": 1}, "num_cayley_neumann_terms is 1, expected 2 or more"),),
        exempt=OTHERS_OF_PSOFT,
    ),
    "psoft free": Row(
        PsoftConfig(r=2, psoft_orth=False, **BOTH),
        psoft,
        PsoftConfig(r=2, psoft_orth=False, psoft_alpha=7, init_weights=False, **BOTH),
        {"psoft_orth": True},
        (),
        exempt=OTHERS_OF_PSOFT,
    ),
    "peanut": Row(
        PeanutConfig(r=2, scaling=1.5, **BOTH),
        peanut,
        PeanutConfig(r=2, scaling=3, init_weights=False, **BOTH),
        {"depth": 1},
        OF_PEANUT,
        exempt=(Exempt(NOT_IN_PEFTS, LINEAR_IN_PEFT, CHANNELS | {"linear (Conv1D)"}, NotImplementedError),),
    ),
    "peanut deep": Row(
        PeanutConfig(r=3, depth=2, act_fn="tanh", **BOTH),
        peanut,
        PeanutConfig(r=3, depth=2, act_fn="tanh", scaling=0.5, **BOTH),
        {"act_fn": "relu"},
        OF_PEANUT,
        exempt=(Exempt(NOT_IN_PEFTS, LINEAR_IN_PEFT, CHANNELS | {"linear (Conv1D)"}, NotImplementedError),),
    ),
    "glora": Row(
        GloraConfig(r=2, **BOTH),
        glora,
        GloraConfig(r=3, init_weights=False, **BOTH),
        {"config_A_B": "vector"},
        (
            ({"r": 0}, "GloraConfig: r is 0, expected a positive integer"),
            ({"config_C": "constant"}, "GloraConfig: config_C is 'constant', expected one of 'lora', 'vector', 'none'"),
            ({"config_A_B": "none"}, "there is nothing to train at second, which has no bias and no A and B"),
        ),
        exempt=OF_GLORA,
    ),
    "glora vectors": Row(
        GloraConfig(config_A_B="vector", config_C="vector", config_D_E="vector", **BOTH),
        glora,
        GloraConfig(config_A_B="vector", config_C="vector", config_D_E="vector", init_weights=False, **BOTH),
        {"config_D_E": "none"},
        (),
        exempt=OF_GLORA,
    ),
}
