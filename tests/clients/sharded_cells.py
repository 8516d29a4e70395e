"""What is done to models that are wrapped, sharded or offloaded, against the same done to the model itself.

A cell is an operation on a model under a wrapper. `run` tries all in one group of processes; `error_of` says which
are errors, with words of theirs; all others have to compute what the model alone computes.
"""

from __future__ import annotations

import copy
import functools
import os
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from torchgraft.adapters import (
    IA3Config,
    LoraConfig,
    disable_adapter,
    extract_graft,
    extract_params,
    get_base_model_state_dict,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_adapter,
    merge_adapter,
    merge_and_unload,
    save_adapter,
    set_base_model_state_dict,
    set_peft_model_state_dict,
    unmerge_adapter,
)
from torchgraft.functional import bind, merge, value_and_grad

IDS = torch.arange(24).view(4, 6) % 10
TARGET = torch.linspace(-1, 1, 4 * 6 * 4).view(4, 6, 4).sin()


class Net(nn.Module):
    """Kinds of layers: an embedding, linear layers, `transformers`' `Conv1D`, a convolution, a head."""

    def __init__(self):
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.turn = Conv1D(8, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 4)

    def forward(self, ids):
        x = self.turn(self.down(torch.tanh(self.up(self.embed(ids)))))
        return self.head(self.norm(self.conv(x.mT).mT))


ALL = ["embed", "up", "down", "turn", "conv"]
CONFIGS = {
    "lora": LoraConfig(r=2, target_modules=ALL, init_lora_weights=False),
    "dora": LoraConfig(r=2, use_dora=True, target_modules=ALL, init_lora_weights=False),
    "ia3": IA3Config(target_modules=["up", "down", "turn"], feedforward_modules=["down"]),
    "parameter": LoraConfig(r=2, target_modules=["down"], target_parameters=["up.weight"], init_lora_weights=False),
    "beside": LoraConfig(
        r=2,
        target_modules=["up", "turn"],
        modules_to_save=["head"],
        bias="lora_only",
        trainable_token_indices={"embed": [1, 3]},
    ),
}


def config_of(method, wrapper):
    config = copy.deepcopy(CONFIGS[method])
    if method == "beside" and "offload" in wrapper:
        config.bias = "none"
    return config


def tree_of(graft):
    """An adapter that makes a difference, the same in each process."""
    generator = torch.Generator().manual_seed(1)
    tree = graft.init(generator)
    return {
        path: {leaf: t + 0.3 * torch.randn(t.shape, generator=generator) for leaf, t in leaves.items()}
        for path, leaves in tree.items()
    }


# -- wrappers -------------------------------------------------------------------------------------------------------


def ddp(model):
    return nn.parallel.DistributedDataParallel(model)


def fsdp1(model, use_orig_params=True):
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=torch.device("cpu"))


def fsdp1_nested(model):
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import CustomPolicy

    def chosen(module):
        return hasattr(module, "base_layer") or isinstance(module, nn.LayerNorm)

    return FullyShardedDataParallel(
        model, use_orig_params=True, device_id=torch.device("cpu"), auto_wrap_policy=CustomPolicy(chosen)
    )


def fsdp1_flat(model):
    """Frozen as a whole: FSDP1 has no way to train some of the parameters that are parts of one."""
    return fsdp1(model.requires_grad_(False), use_orig_params=False)


def fsdp2(model):
    from torch.distributed.fsdp import fully_shard

    for part in (model.up, model.down, model.turn, model.conv):
        fully_shard(part, mesh=mesh())
    return fully_shard(model, mesh=mesh())


def fsdp2_root(model):
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=mesh())


def getattr_at(model, path):
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def tensor_parallel(model):
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    def name(path):
        inner = ["", ".base_layer", ".token_adapter.base_layer"]
        kinds = (nn.Linear, nn.Embedding)
        paths = [path + end for end in inner if isinstance(getattr_at(model, path + end), kinds)]
        return paths[0]

    plan = {"up": ColwiseParallel(), "down": RowwiseParallel(), "embed": RowwiseParallel(input_layouts=Replicate())}
    return parallelize_module(model, mesh(), {name(path): style for path, style in plan.items()})


def cpu_offload(model):
    import accelerate

    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def disk_offload(model):
    import accelerate

    return accelerate.disk_offload(model, tempfile.mkdtemp(), execution_device=torch.device("cpu"))


def checkpointed(model):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model.up, model.turn = checkpoint_wrapper(model.up), checkpoint_wrapper(model.turn)
    return model


@functools.cache
def mesh():
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (dist.get_world_size(),))


WRAPPERS = {
    "DDP": ddp,
    "FSDP1": fsdp1,
    "FSDP1, layers": fsdp1_nested,
    "FSDP1, flat": fsdp1_flat,
    "FSDP2": fsdp2,
    "FSDP2, root": fsdp2_root,
    "tensor parallel": tensor_parallel,
    "CPU offload": cpu_offload,
    "disk offload": disk_offload,
    "checkpoint wrapper": checkpointed,
}


# -- operations -----------------------------------------------------------------------------------------------------


class Cell:
    """A model under a wrapper, injected before or after that, and the same model alone."""

    def __init__(self, wrapper, method):
        self.wrap, self.wrapper, self.method = WRAPPERS[wrapper], wrapper, method
        self.config = config_of(method, wrapper)
        self.params = tree_of(bind(Net(), self.config))

    def alone(self):
        return inject_adapter_in_model(self.config, Net(), params=copy.deepcopy(self.params))

    def before(self):
        return self.wrap(self.alone())

    def base(self):
        return self.wrap(Net())

    def after(self, trained=False):
        model = self.base()
        config = copy.deepcopy(self.config)
        config.inference_mode = not trained
        return inject_adapter_in_model(config, model, params=copy.deepcopy(self.params))

    def injected(self):
        return self.after() if "offload" in self.wrapper else self.before()

    @functools.cached_property
    def y(self):
        return self.alone()(IDS).detach()


def close(given, expected, what=""):
    given = {key: whole(t) for key, t in given.items()} if isinstance(given, dict) else whole(given)
    if isinstance(given, dict):
        assert list(given) == list(expected) or sorted(given) == sorted(expected), (
            what,
            sorted(given),
            sorted(expected),
        )
        for key, t in expected.items():
            close(given[key], t, f"{what} {key}")
        return
    torch.testing.assert_close(given, whole(expected).detach(), rtol=2e-4, atol=2e-5, msg=lambda m: f"{what}: {m}")


def whole(t):
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).detach()


def injecting(cell):
    close(cell.before()(IDS), cell.y, "before")


def injecting_to_train(cell):
    close(cell.after(trained=True)(IDS), cell.y, "after")


def injecting_after(cell):
    close(cell.after()(IDS), cell.y, "after")


def training(cell):
    rank, size = dist.get_rank(), dist.get_world_size()
    alone = cell.alone()
    if cell.wrapper == "FSDP1, flat":
        cell.wrap = functools.partial(fsdp1, use_orig_params=False)
    model = cell.after(trained=True) if "offload" in cell.wrapper else cell.before()
    split = "DDP" in cell.wrapper or "FSDP" in cell.wrapper
    start = copy.deepcopy(get_peft_model_state_dict(alone))
    for net, rows in ((alone, slice(None)), (model, slice(rank, None, size) if split else slice(None))):
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            F.mse_loss(net(IDS[rows]), TARGET[rows]).backward()
            optimizer.step()
    trained = get_peft_model_state_dict(alone)
    assert not any(torch.equal(t, start[key]) for key, t in trained.items() if "base_layer" not in key)
    close(get_peft_model_state_dict(model), trained, "trained")
    close(model(IDS), alone(IDS), "output")


def getting(cell):
    for run_first in (False, True):
        model = cell.injected()
        if run_first:
            model(IDS)
        close(get_peft_model_state_dict(model), get_peft_model_state_dict(cell.alone()), f"get {run_first}")


def getting_from_state_dict(cell):
    from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType

    model = cell.injected()
    if "FSDP1" in cell.wrapper:
        with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT):
            state = model.state_dict()
    else:
        state = model.state_dict()
    close(get_peft_model_state_dict(model, state_dict=state), get_peft_model_state_dict(cell.alone()))


def setting(cell):
    alone, model = cell.alone(), cell.injected()
    new = {key: 0.5 * t + 0.1 for key, t in get_peft_model_state_dict(alone).items()}
    for net in (alone, model):
        assert set_peft_model_state_dict(net, new).unexpected_keys == []
    close(get_peft_model_state_dict(model), new)
    close(model(IDS), alone(IDS))


def merging(cell):
    for run_first in (False, True):
        model = cell.injected()
        if run_first:
            close(model(IDS), cell.y, "before")
        base = copy.deepcopy({key: whole(t) for key, t in get_base_model_state_dict(model).items()})
        merge_adapter(model)
        close(model(IDS), cell.y, f"merged {run_first}")
        close(get_base_model_state_dict(model), base, "base while merged")
        unmerge_adapter(model)
        for key, tensor in get_base_model_state_dict(model).items():
            assert torch.equal(whole(tensor), base[key]), key
        close(model(IDS), cell.y, "unmerged")
        close(get_peft_model_state_dict(model), get_peft_model_state_dict(cell.alone()), "adapter")


def merging_for_good(cell):
    model = cell.injected()
    merge_and_unload(model)
    close(model(IDS), cell.y)


def disabling(cell):
    alone, model = cell.alone(), cell.injected()
    with disable_adapter(alone), disable_adapter(model):
        close(model(IDS), alone(IDS), "disabled")
    close(model(IDS), cell.y, "enabled")
    merge_adapter(model)
    with disable_adapter(model):
        close(model(IDS), Net()(IDS), "disabled while merged")
    close(model(IDS), cell.y, "merged again")


def saving(cell):
    model = cell.injected()
    together = "FSDP" in cell.wrapper or cell.wrapper == "tensor parallel"  # else two would write the same files
    folder = shared_folder() if together else tempfile.mkdtemp()
    save_adapter(model, folder)
    dist.barrier()
    close(load_adapter(Net(), folder)(IDS), cell.y)


def loading(cell):
    folder = shared_folder()
    if dist.get_rank() == 0:
        save_adapter(cell.alone(), folder)
    dist.barrier()
    model = load_adapter(cell.base(), folder)
    close(model(IDS), cell.y)
    close(get_peft_model_state_dict(model), get_peft_model_state_dict(cell.alone()))


def base_states(cell):
    model = cell.injected()
    base = get_base_model_state_dict(model)
    close(base, Net().state_dict(), "get")
    new = {key: 0.5 * t for key, t in Net().state_dict().items()}
    set_base_model_state_dict(model, new)
    alone = cell.alone()
    set_base_model_state_dict(alone, new)
    close(get_base_model_state_dict(model), get_base_model_state_dict(alone), "set")
    close(model(IDS), alone(IDS))


def extracting_params(cell):
    model = cell.injected()
    expected = extract_params(cell.alone())
    given = extract_params(model)
    assert sorted(given) == sorted(expected)
    for path, leaves in expected.items():
        close(given[path], leaves, path)


def extracting_graft(cell):
    model = cell.injected()
    graft, params = extract_graft(model), extract_params(model)
    close(graft(params, IDS), cell.y, "graft")
    close(model(IDS), cell.y, "model")
    close(graft(params, IDS), cell.y, "graft again")


def binding(cell):
    plain = bind(Net(), cell.config)
    for run_first in (False, True):
        base = cell.base()
        if run_first:
            base(IDS)
        graft = bind(base, cell.config)
        names = [[name for name, _ in one.named_parameters()] for one in (base,)]
        close(graft(cell.params, IDS), cell.y, f"call {run_first}")
        close(graft.view(cell.params)(IDS), cell.y, "view")
        loss = [lambda params, one=one: F.mse_loss(one(params, IDS), TARGET) for one in (graft, plain)]
        given, expected = (value_and_grad(one)(cell.params)[1] for one in loss)
        for path, leaves in expected.items():
            close(given[path], leaves, f"gradients {path}")
        assert names == [[name for name, _ in one.named_parameters()] for one in (base,)]
        close(base(IDS), Net()(IDS), "the user's model")
        close(merge(graft, cell.params), merge(plain, cell.params), "merge")
        tree = graft.init(torch.Generator().manual_seed(3))
        for path, leaves in plain.init(torch.Generator().manual_seed(3)).items():
            close(tree[path], leaves, f"init {path}")


OPERATIONS = {
    "inject, then wrap": injecting,
    "wrap, then inject": injecting_after,
    "wrap, then inject to train": injecting_to_train,
    "train": training,
    "get": getting,
    "get from a state dict": getting_from_state_dict,
    "set": setting,
    "merge, unmerge": merging,
    "merge for good": merging_for_good,
    "disable": disabling,
    "save": saving,
    "load": loading,
    "base's state": base_states,
    "extract_params": extracting_params,
    "extract_graft": extracting_graft,
    "bind, call": binding,
}


FLAT = "TypeError", "parameters are parts of a flat one of FullyShardedDataParallel, which no copy can gather"
EXTRACT = "TypeError", "wrapped by FullyShardedDataParallel, whose flat parameters no graft can gather"
AVERAGED = (
    "ValueError",
    "the gradients of parameters that are added now would not be averaged; inject the adapter before",
)
UNIFORM = "ValueError", "Must flatten tensors with uniform `requires_grad` when `use_orig_params=False`"
NO_BIAS = (
    "ValueError",
    "is no parameter of its own now; wrap the model with FullyShardedDataParallel(..., use_orig_params=",
)
NO_COPY = "ValueError", "is offloaded by a hook of accelerate, which no adapter of a parameter can follow into a copy"
OFFLOADED = "ValueError", "is offloaded by a hook of accelerate, which would load the base's over what replaces it"


def error_of(size: int, wrapper: str, method: str, operation: str) -> tuple[str, str] | None:
    """The type and the words of the error that a cell is, `None` for one that computes what the model alone does."""
    flat, beside = wrapper.startswith("FSDP1"), method == "beside"
    errors = {
        FLAT: flat and operation == "bind, call",
        EXTRACT: flat and operation == "extract_graft",
        AVERAGED: operation == "wrap, then inject to train"
        and (wrapper == "DDP" or (wrapper.startswith("FSDP") and size > 1)),
        UNIFORM: wrapper == "FSDP1, flat" and operation == "train",
        NO_BIAS: wrapper == "FSDP1, flat" and beside and operation == "disable",
        NO_COPY: "offload" in wrapper and method == "parameter" and operation in ("bind, call", "extract_graft"),
        OFFLOADED: "offload" in wrapper and beside and operation in ("bind, call", "extract_graft"),
    }
    return next((words for words, here in errors.items() if here), None)


def table() -> str:
    """Every operation under every wrapper, in two processes, as Markdown."""
    lines = [f"| | {' | '.join(WRAPPERS)} |", f"|---|{'---|' * len(WRAPPERS)}"]
    for operation in OPERATIONS:
        row = []
        for wrapper in WRAPPERS:
            errors = [error_of(2, wrapper, method, operation) for method in CONFIGS]
            row.append("an error" if all(errors) else "yes, but" if any(errors) else "yes")
        lines.append(f"| {operation} | {' | '.join(row)} |")
    return "\n".join(lines)


def shared_folder():
    """A new directory, the same in each process."""
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    return folder[0]


class InStep:
    """What keeps processes together between cells, without a message of their group.

    Gloo aborts a process that gets a message of another length than the one it waits for. That is what comes of an
    error in one process alone, if the others wait in a collective and this one begins the next.
    """

    def __init__(self, size: int) -> None:
        context = torch.multiprocessing.get_context("spawn")
        self.barrier, self.failed = context.Barrier(size), context.Array("b", size)

    def meet(self, rank: int, failed: bool) -> bool:
        """Wait for all processes, and return whether a cell failed in any."""
        self.failed[rank] = failed
        self.barrier.wait()
        anywhere = any(self.failed)
        self.barrier.wait()
        return anywhere


def join(rank: int, size: int, rendezvous: Path) -> None:
    """Begin a group of processes that waits long for a peer, which may share its core with much else."""
    mesh.cache_clear()
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size, timeout=timedelta(minutes=5)
    )


def run(rank: int, size: int, folder: str, in_step: InStep, only: list[tuple[str, str, str]] | None = None) -> NoReturn:
    """One process of a group: every cell, and what came of it."""
    torch.set_num_threads(1)
    join(rank, size, Path(folder) / "rendezvous")
    outcomes = {}
    for index, cell in enumerate(only or cells()):
        wrapper, method, operation = cell
        torch.manual_seed(rank)  # nothing may count on equal random numbers
        try:
            OPERATIONS[operation](Cell(wrapper, method))
            outcomes[cell] = ""
        except Exception as error:
            outcomes[cell] = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
        failed = bool(outcomes[cell]) and error_of(size, *cell) is None
        if in_step.meet(rank, failed):  # messages of the cell may be on their way
            dist.destroy_process_group()
            join(rank, size, Path(folder) / f"rendezvous{index}")
    torch.save(outcomes, Path(folder) / f"{rank}.pt")
    in_step.meet(rank, False)
    dist.destroy_process_group()
    os._exit(0)  # what was sharded keeps gloo's threads, which an interpreter that ends would pull the ground from


def cells():
    return [(wrapper, method, operation) for wrapper in WRAPPERS for method in CONFIGS for operation in OPERATIONS]
