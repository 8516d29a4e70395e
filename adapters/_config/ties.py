"""Tied tensors: which names of a model are one tensor."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

Modules = Mapping[str, nn.Module]


def names_by_tensor(modules: Modules) -> dict[int, list[str]]:
    """Return the names of each parameter by its identity, those of shared modules and of tied tensors too.

    >>> module = nn.Linear(2, 2, bias=False)
    >>> list(names_by_tensor({"a": module, "b": module}).values())
    [['a.weight', 'b.weight']]
    """
    found: dict[int, list[str]] = {}
    for path, module in modules.items():
        for leaf, tensor in module._parameters.items():
            if tensor is not None:
                found.setdefault(id(tensor), []).append(f"{path}.{leaf}" if path else leaf)
    return found


def others_tied_to(path: str, modules: Modules) -> list[str]:
    """Return other modules that have a module's weight as their own, each under one of its names.

    >>> embed, head = nn.Embedding(3, 2), nn.Linear(2, 3, bias=False)
    >>> head.weight = embed.weight
    >>> others_tied_to("head", {"embed": embed, "head": head})
    ['embed']
    """
    module = modules[path]
    weight = module._parameters.get("weight")
    if weight is None:
        return []
    found = {id(one): name for name, one in reversed(list(modules.items())) if one._parameters.get("weight") is weight}
    found.pop(id(module))
    return sorted(found.values())


def input_embeddings(modules: Modules, model: nn.Module) -> str | None:
    """Return the path of a model's input embeddings: what `get_input_embeddings` says, or else a module `embed_tokens`.

    >>> input_embeddings({"": nn.Sequential(), "body.embed_tokens": nn.Embedding(2, 2)}, nn.Sequential())
    'body.embed_tokens'
    """
    get = getattr(model, "get_input_embeddings", None)
    found = get() if callable(get) else None
    for attribute in ("token_adapter", "original_module", "base_layer"):  # what adapters in the model put around it
        found = getattr(found, attribute, found)
    for path, module in modules.items():
        if module is found if found is not None else path.rpartition(".")[2] == "embed_tokens":
            return path
    return None


def source(names: list[str], modules: Modules) -> str:
    """Of the names of a tied tensor, the one that it is trained under: an embedding's, or else the first."""
    return next((name for name in names if isinstance(modules[name.rpartition(".")[0]], nn.Embedding)), names[0])


def tied_to(path: str, modules: Modules) -> list[str]:
    """Other modules that have an embedding's matrix as their weight, each under one of its names.

    >>> embed, head = nn.Embedding(3, 2), nn.Linear(2, 3, bias=False)
    >>> head.weight = embed.weight
    >>> tied_to("embed", {"embed": embed, "head": head})
    ['head']
    """
    return others_tied_to(path, modules) if isinstance(modules[path], nn.Embedding) else []


def embedding_for(path: str, modules: Modules) -> str:
    """Return the first embedding whose matrix a module has as its weight, or the module itself.

    >>> first, second = nn.Embedding(3, 2), nn.Embedding(3, 2)
    >>> second.weight = first.weight
    >>> embedding_for("second", {"first": first, "second": second})
    'first'
    """
    weight = modules[path]._parameters.get("weight")
    if weight is None:
        return path
    same = [name for name, one in modules.items() if one._parameters.get("weight") is weight]
    return next((name for name in same if isinstance(modules[name], nn.Embedding)), path)
