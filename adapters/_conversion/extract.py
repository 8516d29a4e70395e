"""LoRA from a model that was fine-tuned as a whole: the nearest of a rank to what changed, tensor by tensor."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchgraft.functional import Binding, Site
from torchgraft.functional.extending import Tree, describe, modules_of, quantised_form, sort

from .._arithmetic.products import config_of_ranks
from .._calibration.progress import shown
from .._config.matching import matches
from .._config.messages import names_of
from .._config.targets import exact
from .._config.ties import names_by_tensor
from .._methods.lora.lora import LoraConfig
from .changes import in_blocks, rounding_floor
from .report import ConversionReport, ModuleError
from .sources import Source, site_by_name, source_of
from .to_lora import converted
from .wanted import Wanted

Model = nn.Module | Mapping[str, Tensor] | str | os.PathLike[str]

_REST = ("refuse", "save", "leave")


def extract_lora(
    base: Model,
    tuned: Model,
    rank: int | None = None,
    *,
    energy: float | None = None,
    target_modules: Iterable[str] | str | None = None,
    rest: str = "refuse",
    model: nn.Module | None = None,
    dtype: torch.dtype = torch.float32,
    progress: bool = False,
) -> tuple[LoraConfig, Tree, ConversionReport]:
    """Return the LoRA nearest to the change that fine-tuning made to each layer's weight, and its errors.

        B A = the nearest of the rank to  W_tuned - W_base

    Of files, one tensor of each model is in memory at a time, whatever the model's size. Differences and
    decompositions are computed in float64, see `to_lora`.

    Args:
        base: The model before, as a module, a state dict, or the path of a safetensors file or of a folder with shards.
        tuned: The model after, of the same tensors.
        rank: The rank; modules too small for it get less.
        energy: In place of `rank`, the share of each module's energy to keep; with neither, all that is more than the
            rounding of the tuned weight to its dtype.
        target_modules: Modules to extract, as in a config; by default each layer that changed and that LoRA is for.
        rest: What to do with other tensors that changed (norms, biases, embeddings that are the output layer too, what
            `target_modules` leaves out): `"refuse"` is an error; `"save"` trains biases of the layers
            (`bias="lora_only"`) and puts other modules into `modules_to_save`; `"leave"` leaves them as the base has
            them and says so in the report.
        model: A module of that structure, perhaps on the meta device, which says what layers there are. By default
            `base` or `tuned`, if one is a module; else names and shapes and `config.json` tell.
        dtype: Dtype of the leaves.
        progress: Whether a bar shows how far it is, where tqdm is installed.

    Returns:
        `(config, params, report)`: a LoRA whose scaling factor is one, for the layers that changed.

    Raises:
        FileNotFoundError, ValueError: Files that are missing or damaged; models of other tensors or shapes; tensors
            that changed and that LoRA is not for; models without a difference. Names the tensor.

    >>> base, tuned = nn.Sequential(nn.Linear(4, 3)), nn.Sequential(nn.Linear(4, 3))
    >>> _ = tuned.load_state_dict(base.state_dict())
    >>> with torch.no_grad():
    ...     _ = tuned[0].weight.add_(torch.outer(torch.ones(3), torch.arange(4.0)))
    >>> config, params, report = extract_lora(base, tuned)
    >>> config.r, sorted(config.target_modules), report.relative < 1e-6
    (1, ['0'], True)
    """
    wanted = Wanted(rank, energy)
    wanted.check("extract_lora")
    if rest not in _REST:
        raise ValueError(f"extract_lora: rest is {rest!r}, expected one of {_REST}")
    before, after = source_of(base, "extract_lora: base"), source_of(tuned, "extract_lora: tuned")
    _check_same_names(before, after)
    layers = _Layers.of(before, after, model, target_modules)
    tree: Tree = {}
    errors: dict[str, ModuleError] = {}
    ranks: dict[str, int] = {}
    others: dict[str, float] = {}
    for name in shown(_names(before, after), "extracting", progress):
        old, new = before.read(name), after.read(name)
        if not _differ(name, old, new):
            continue
        site = layers.site(name, tuple(old.shape))
        difference = _minus(name, new, old)
        if site is None:
            others[name] = float(difference.abs().square().sum().sqrt())
            continue
        blocks = in_blocks(site, site.canonical(difference))
        floor = rounding_floor(in_blocks(site, site.canonical(new)).to(blocks.dtype), new.dtype)
        tree[site.path], ranks[site.path], errors[site.path] = converted(site, blocks, wanted, dtype, floor)
    if not ranks:
        raise ValueError(f"extract_lora: no layer's weight changed{_but(others)}; are base and tuned one model?")
    config = layers.config(ranks)
    if others and rest == "refuse":
        raise ValueError(
            f"extract_lora: {names_of(others)} changed too, which this LoRA is not for; pass rest='save' to have their "
            "modules in modules_to_save, or rest='leave' to do without"
        )
    if others and rest == "save":
        config = _save(config, tree, others, after, dtype)
    return config, sort(tree), ConversionReport(errors, others if rest == "leave" else {})


def _names(before: Source, after: Source) -> list[str]:
    return list(dict.fromkeys([*before.names, *after.names]))


def _check_same_names(before: Source, after: Source) -> None:
    for one, other in ((before, after), (after, before)):
        if missing := [name for name in one.names if name not in other.names]:
            raise ValueError(
                f"{other.what} lacks {names_of(missing)}, which the other model has; it has {names_of(other.names)}"
            )


def _differ(name: str, old: Tensor, new: Tensor) -> bool:
    """Return whether a tensor changed.

    Raises:
        ValueError: Another shape, or no values.
    """
    if old.shape != new.shape:
        raise ValueError(
            f"extract_lora: {name} is {tuple(old.shape)} in base and {tuple(new.shape)} in tuned; resize the base's "
            "embeddings first, if the vocabulary grew"
        )
    if old.is_meta or new.is_meta:
        raise ValueError(f"extract_lora: {name} is on the meta device, without values; load the model first")
    if old.dtype == new.dtype:
        return not torch.equal(old.detach().cpu(), new.detach().cpu())
    return bool(_minus(name, new, old).any())


def _minus(name: str, new: Tensor, old: Tensor) -> Tensor:
    """Return a difference, in float64.

    Raises:
        ValueError: Quantised codes, which are no weights.
    """
    for tensor in (new, old):
        if quantised_form(tensor) is not None or tensor.dtype.itemsize == 1:
            raise ValueError(
                f"extract_lora: {name} is {quantised_form(tensor) or tensor.dtype} and changed, and such codes are "
                "no weights; give the models as they were before quantisation, or dequantized(model)"
            )
    wide = torch.promote_types(torch.promote_types(new.dtype, old.dtype), torch.float64)
    return new.detach().cpu().to(wide) - old.detach().cpu().to(wide)


def _but(others: Mapping[str, float]) -> str:
    return f" (only {names_of(others)})" if others else ""


def _save(config: LoraConfig, tree: Tree, others: Iterable[str], after: Source, dtype: torch.dtype) -> LoraConfig:
    """Put tensors that no LoRA is for into a tree: biases of its layers, and other modules as a whole."""
    layers = list(tree)
    biases = [name for name in others if name.endswith(".bias") and name.removesuffix(".bias") in layers]
    for path in layers if biases else ():  # a config trains the biases of all its layers, or of none
        if f"{path}.bias" in after.names:
            tree[path]["bias"] = after.read(f"{path}.bias").to(dtype)
    saved = sorted({name.rpartition(".")[0] for name in others if name not in biases})
    if both := [path for path in saved if path in layers]:
        raise ValueError(
            f"extract_lora: {both[0]} changed in more than its weight and bias, so it cannot be a LoRA's layer and "
            "saved too; leave it out of target_modules"
        )
    for path in saved:
        own = [name for name in after.names if name.rpartition(".")[0] == path]
        tree.setdefault(path, {}).update({name.rpartition(".")[2]: after.read(name).to(dtype) for name in own})
    return dataclasses.replace(config, modules_to_save=saved or None, bias="lora_only" if biases else "none")


@dataclasses.dataclass(frozen=True)
class _Layers:
    """What layers there are: as a module says, or as names tell.

    Attributes:
        modules: The module's modules; `None` where there is none.
        sites: Sites by the name of their weight.
        fields: Fields of `config.json`.
        targets: What `target_modules` says.
        names: Names of all modules.
    """

    modules: Mapping[str, nn.Module] | None
    sites: Mapping[str, Site]
    fields: Mapping[str, Any]
    targets: LoraConfig | None
    names: frozenset[str]

    @classmethod
    def of(cls, before: Source, after: Source, model: nn.Module | None, targets: Any) -> _Layers:
        model = model or before.module or after.module
        fields = {**before.fields, **after.fields}
        config = (
            None if targets is None else LoraConfig(target_modules=targets if isinstance(targets, str) else [*targets])
        )
        if model is None:
            names = frozenset(name.rpartition(".")[0] for name in _names(before, after))
            return cls(None, {}, fields, config, names)
        modules = modules_of(model)
        return cls(modules, _sites(model, modules), fields, config, frozenset(modules))

    def site(self, name: str, shape: tuple[int, ...]) -> Site | None:
        """Return the layer whose weight a tensor is, if it is one to extract."""
        if self.modules is not None:
            site = self.sites.get(name)
        else:
            site = site_by_name(name, shape, self.fields)
            if site is not None and site.kind == "embedding" and self._is_output_too():
                site = None
        if site is None or (self.targets is not None and not matches(self.targets, site.path)):
            return None
        return site

    def _is_output_too(self) -> bool:
        """Return whether an embedding may be the output layer too, in files, which have such a tensor once."""
        return self.fields.get("tie_word_embeddings") is not False and not any("lm_head" in one for one in self.names)

    def config(self, ranks: Mapping[str, int]) -> LoraConfig:
        """Return a config for these modules."""
        return exact(LoraConfig(**config_of_ranks(ranks)), list(ranks), self.names)


def _sites(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, Site]:
    """Return a model's layers by the name of their weight, those left out whose weight other modules have too."""
    shared = {name for names in names_by_tensor(modules).values() if len(names) > 1 for name in names}
    paths = [path for path, module in modules.items() if _is_layer(path, module)]
    owners = set(paths)
    for path, module in modules.items():
        own = module._parameters.items() if path not in owners else ()
        paths += [f"{path}.{leaf}".lstrip(".") for leaf, one in own if one is not None and one.ndim == 3]
    if not paths:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = exact(LoraConfig(r=1), paths, modules)
        sites = Binding.plan(model, {"": config}, False).sites[""]
    named = {f"{site.owner}.{site.weight_names[0]}".lstrip("."): site for site in sites.values() if not site.blocks}
    return {name: site for name, site in named.items() if name not in shared}


def _is_layer(path: str, module: nn.Module) -> bool:
    site = describe(path, module)
    return site is not None and len(site.weight_names) == 1
