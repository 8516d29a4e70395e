"""Adapters whose tensors rest elsewhere between calls: offloaded by accelerate, sharded by FSDP module by module."""

import copy
import functools

import pytest
import torch
import torch.distributed as dist
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_module
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy
from transformers.pytorch_utils import Conv1D

from torchgraft import adapters
from torchgraft.adapters import inject_adapter_in_model


class Scaled(nn.Embedding):
    """A class with a forward of its own."""

    def forward(self, ids):
        return 3 * super().forward(ids)


class Experts(nn.Module):
    """A bare parameter."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 6, 8))

    def forward(self, x):
        return torch.einsum("bi,eoi->bo", x, self.up)


LAYERS = {
    "linear": (lambda: nn.Linear(8, 6), lambda: torch.randn(3, 8)),
    "transposed": (lambda: Conv1D(6, 8), lambda: torch.randn(3, 8)),
    "embedding": (lambda: nn.Embedding(8, 6), lambda: torch.randint(0, 8, (3, 2))),
    "own forward": (lambda: Scaled(8, 6), lambda: torch.randint(0, 8, (3, 2))),
    "conv2d": (lambda: nn.Conv2d(8, 6, 3, padding=1), lambda: torch.randn(2, 8, 5, 5)),
    "parameter": (Experts, lambda: torch.randn(3, 8)),
}
LORA = {"r": 2, "init_lora_weights": False, "target_modules": ["0"]}
CONFIGS = {
    "lora": adapters.LoraConfig(**LORA),
    "dropout": adapters.LoraConfig(**LORA, lora_dropout=0.5),
    "bias": adapters.LoraConfig(**{**LORA, "init_lora_weights": True}, lora_bias=True),
    "dora": adapters.LoraConfig(**LORA, use_dora=True),
    "pissa": adapters.LoraConfig(**{**LORA, "init_lora_weights": "pissa"}),
    "parameter": adapters.LoraConfig(r=2, init_lora_weights=False, target_parameters=["0.up"]),
    "ia3": adapters.IA3Config(target_modules=["0"], feedforward_modules=[], init_ia3_weights=False),
    "adalora": adapters.AdaLoraConfig(init_r=2, total_step=9, target_modules=["0"], init_lora_weights=False),
    "vera": adapters.VeraConfig(r=2, target_modules=["0"], init_weights=False),
    "oft": adapters.OFTConfig(oft_block_size=2, target_modules=["0"], init_weights=False),
}
PAIRS = [
    *(("linear", config) for config in CONFIGS if config != "parameter"),
    *(("transposed", config) for config in ("lora", "dora")),
    *(("embedding", config) for config in ("lora", "dora", "oft")),
    *(("own forward", config) for config in ("lora", "dora", "oft")),
    *(("conv2d", config) for config in ("lora", "bias", "dora", "ia3", "adalora", "oft")),
    ("parameter", "parameter"),
]


def injected(kind, config):
    torch.manual_seed(0)
    make, inputs = LAYERS[kind]
    model = nn.Sequential(make(), nn.Tanh()).eval()
    model = inject_adapter_in_model(CONFIGS[config], model)
    return model, inputs()


OFFLOADS = {
    "cpu": lambda model, folder: cpu_offload(model, execution_device=torch.device("cpu")),
    "disk": lambda model, folder: disk_offload(model, folder, execution_device=torch.device("cpu")),
    "dispatch": lambda model, folder: dispatch_model(
        model, {"0": "disk", "1": "cpu"}, main_device="cpu", offload_dir=folder, force_hooks=True
    ),
}


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize(("kind", "config"), PAIRS)
def test_offloading_changes_where_tensors_rest_and_not_what_comes_out(kind, config, offload, tmp_path):
    model, x = injected(kind, config)
    expected, other = model(x), copy.deepcopy(model)
    for one in (model, other):  # one that ran before, and one that did not
        OFFLOADS[offload](one, str(tmp_path))
        for _ in range(2):
            torch.testing.assert_close(one(x), expected)
        assert all(p.is_meta for p in one.parameters())
        with adapters.disable_adapter(one):
            assert not torch.allclose(one(x), expected) or config in ("pissa", "bias")
        torch.testing.assert_close(one(x), expected)
    if offload == "cpu":
        remove_hook_from_module(model, recurse=True)
        assert not any(p.is_meta for p in model.parameters())
        torch.testing.assert_close(model(x), expected)


def test_a_forward_set_on_a_module_with_one_of_its_class_is_refused():
    model, x = injected("own forward", "lora")
    model[0].base_layer.forward = functools.partial(nn.Embedding.forward, model[0].base_layer)
    with pytest.raises(RuntimeError, match="0: this Scaled has a forward set on itself, which would run without"):
        model(x)


@pytest.fixture(scope="module")
def mesh():
    """A group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def gradients(model):
    found = {name.replace("_fsdp_wrapped_module.", ""): p.grad for name, p in model.named_parameters()}
    return {name: getattr(g, "full_tensor", lambda g=g: g)() for name, g in found.items() if g is not None}


def shard(model, mesh, base):
    for name, module in list(model.named_modules()):
        if (base or "base_layer" not in name) and list(module.parameters(recurse=False)):
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
    return fully_shard(model, mesh=mesh)


def wrap(model, mesh):
    """As PEFT's policy for FSDP: every leaf with a trained weight is a unit."""

    def alone(module):
        return not list(module.children()) and getattr(getattr(module, "weight", None), "requires_grad", False)

    policy = functools.partial(lambda_auto_wrap_policy, lambda_fn=alone)
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu"))


SHARDS = {
    "fsdp2": functools.partial(shard, base=False),
    "fsdp2 with the base": functools.partial(shard, base=True),
    "fsdp1": wrap,
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:FSDP is switching:UserWarning")
@pytest.mark.parametrize("way", SHARDS)
@pytest.mark.parametrize(("kind", "config"), PAIRS)
def test_units_of_their_own_compute_and_train(kind, config, way, mesh):
    if way == "fsdp1" and kind == "transposed":
        pytest.skip("a weight that FSDP has flattened is no parameter")
    model, x = injected(kind, config)
    expected = model(x)
    expected.square().sum().backward()
    grads = gradients(model)
    model.zero_grad(set_to_none=True)
    model = SHARDS[way](model, mesh)
    for _ in range(2):
        y = model(x)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    found = gradients(model)
    assert found.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(found[name].view_as(grad), grad, rtol=1e-4, atol=1e-5, msg=name)
