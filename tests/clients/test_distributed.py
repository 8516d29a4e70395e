"""Two processes, and forwards that are computed twice: training comes to the same numbers."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from torchgraft.adapters import (
    IA3Config,
    LoraConfig,
    OFTConfig,
    get_base_model_state_dict,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)

STEPS = 3
CONFIGS = {
    "lora": LoraConfig(r=2, target_modules=["0", "2"], modules_to_save=["3"]),
    "dora": LoraConfig(r=2, use_dora=True, target_modules=["0", "2"], modules_to_save=["3"]),
    "ia3": IA3Config(target_modules=["0", "2"], feedforward_modules=["2"]),
}
X = torch.linspace(-1, 1, 32).view(8, 4)
Y = X.sin().roll(1, 0)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6), nn.Linear(6, 4))


def injected(method):
    model = inject_adapter_in_model(CONFIGS[method], mlp())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def train(model, x, y):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()


def work(rank: int, folder: str, methods: list[str]) -> None:
    """One of two processes: train on half of the batch and keep what came out."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        trained = {}
        for method in methods:
            model = injected(method)
            if rank:  # DDP gives every process what the first one has
                for parameter in model.parameters():
                    parameter.data.zero_()
            train(DistributedDataParallel(model), X[rank::2], Y[rank::2])
            trained[method] = dict(model.state_dict())
        torch.save(trained, Path(folder) / f"{rank}.pt")
        dist.barrier()  # nobody leaves while another computes
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained(once_per_run):
    """What each of the two processes has in the end."""

    def make(folder):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("GLOO_SOCKET_IFNAME", "lo")
            torch.multiprocessing.spawn(work, (str(folder), list(CONFIGS)), nprocs=2)

    folder = once_per_run("ddp", make)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("method", CONFIGS)
def test_two_processes_train_like_one_on_the_whole_batch(trained, method):
    alone = injected(method)
    start = copy.deepcopy(get_peft_model_state_dict(alone))
    train(alone, X, Y)
    assert not any(torch.allclose(tensor, start[key]) for key, tensor in get_peft_model_state_dict(alone).items())
    base = mlp().state_dict()
    for key, tensor in get_base_model_state_dict(alone).items():
        assert torch.equal(tensor, base[key]), key
    for process in trained:
        for key, expected in alone.state_dict().items():
            torch.testing.assert_close(process[method][key], expected, msg=key)
    first, second = trained
    for key, tensor in first[method].items():
        assert torch.equal(tensor, second[method][key]), key


def gradients(model, call, x):
    nn.functional.mse_loss(call(x), Y).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", CONFIGS)
def test_checkpointed_layers_have_the_same_gradients(method, reentrant):
    expected = gradients(*2 * [injected(method)], X)
    model = injected(method)

    def call(x):
        for layer in model:
            x = checkpoint(layer, x, use_reentrant=reentrant)
        return x

    given = gradients(model, call, X.clone().requires_grad_())
    assert given.keys() == expected.keys()
    for name, grad in given.items():
        torch.testing.assert_close(grad, expected[name], msg=name)


TRANSFORMERS = {
    "lora": LoraConfig(r=2, lora_dropout=0.5, init_lora_weights=False, target_modules=["q_proj", "down_proj"]),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "oft": OFTConfig(oft_block_size=2, target_modules=["q_proj", "down_proj"]),
}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", TRANSFORMERS)
def test_gradient_checkpointing_of_transformers(llama, method, reentrant):
    found = []
    for checkpointing in (False, True):
        model = inject_adapter_in_model(TRANSFORMERS[method], llama.model()).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(1)
        ids = llama.inputs["input_ids"]
        model(input_ids=ids, labels=ids).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    expected, given = found
    assert all(grad.abs().max() > 0 for grad in expected.values())
    for name, grad in expected.items():
        torch.testing.assert_close(given[name], grad, msg=name)
