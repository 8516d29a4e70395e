"""A graft and its parameters as a module: what torch's own tools do with it is what they do with the tree."""

import copy
import io
import warnings

import optree
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from torchgraft.adapters import IA3Config, LoraConfig, load_adapter, save_adapter
from torchgraft.functional import AdapterModule, bind, stack, trainable

from ..toy_methods import BankConfig

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
CONFIGS = {
    "one": LoraConfig(r=2, target_modules=["0", "2"], modules_to_save=["3"]),
    "named": {"a": LoraConfig(r=2, target_modules=["0"]), "b": IA3Config(target_modules=["2"])},
    "shared": BankConfig(target_modules=["0", "2"]),
}


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Dropout(), nn.Linear(6, 6), nn.Linear(6, 3))


def made(name="one"):
    graft = bind(mlp().eval(), CONFIGS[name])
    return graft, optree.tree_map(lambda t: t + 0.1 * torch.randn_like(t), graft.init())


def steps(leaves, run):
    optimizer = torch.optim.AdamW(leaves, lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        run(X).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("name", CONFIGS)
def test_training_the_module_is_training_the_tree(name):
    graft, params = made(name)
    alone = optree.tree_map(torch.clone, params)
    steps(trainable(alone), lambda x: graft(alone, x))
    module = AdapterModule(graft, params)
    assert {id(p) for p in module.parameters()} == {id(p) for p in optree.tree_leaves(module.params)}
    assert all(p.requires_grad for p in module.parameters())
    steps(module.parameters(), module)
    assert optree.tree_all(optree.tree_map(torch.equal, module.params, alone))
    assert optree.tree_all(optree.tree_map(torch.equal, params, alone)), "in the memory of what was given"


@pytest.mark.parametrize("name", CONFIGS)
def test_a_state_dict_has_the_trees_names_and_is_loaded(name):
    graft, params = made(name)
    module, other = AdapterModule(graft, params), AdapterModule(graft, graft.init())
    paths = [".".join(path) for path in optree.tree_paths(params)]
    assert list(module.state_dict()) == [name for name, _ in module.named_parameters()] == paths
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(X), module(X)) and torch.equal(module(X), graft(params, X))
    changed = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    y = torch.func.functional_call(module, changed, (X,))
    assert torch.equal(y, graft(optree.tree_map(torch.zeros_like, params), X))


def test_it_saves_like_its_tree(tmp_path):
    graft, params = made()
    module = AdapterModule(graft, params)
    again = load_adapter(graft, save_adapter(graft, tmp_path, params=module.params))
    assert optree.tree_all(optree.tree_map(torch.equal, again, params))


class Odd(nn.Module):
    """Names that a module has methods and attributes of."""

    def __init__(self):
        super().__init__()
        self.register_module("inner", nn.ModuleDict({"first": nn.Linear(4, 4)}))
        for name in ("train", "params", "graft", "0"):
            self._modules[name] = nn.Linear(4, 4)

    def forward(self, x):
        for name in ("train", "params", "graft", "0"):
            x = self._modules[name](x)
        return self.inner["first"](x)


def test_sites_may_have_any_name():
    config = LoraConfig(r=2, target_modules="all-linear")
    graft = bind(Odd(), config)
    module = AdapterModule(graft, graft.init())
    assert "train.lora_A" in module.state_dict() and torch.equal(module(X), graft.model(X))
    module.load_state_dict(module.state_dict())
    root = bind(nn.Linear(4, 3), config)
    assert list(AdapterModule(root, root.init()).state_dict()) == ["lora_A", "lora_B"]
    names = {"a": LoraConfig(target_modules=["inner.first"]), "a.inner": LoraConfig(target_modules=["first"])}
    graft = bind(nn.ModuleDict({"inner": nn.ModuleDict({"first": nn.Linear(4, 4)})}), names | {"a": config})
    tree = {"a": {"inner.first": graft.init()["a"]["inner.first"]}}
    AdapterModule(graft, tree)


def test_modes_are_the_modules_and_the_models_stay():
    graft, params = made()
    module = AdapterModule(graft, params)
    assert not module.training, "as the model"
    y = module(X)
    module.train()
    assert not torch.equal(module(X), y), "dropout of the base"
    torch.manual_seed(1)
    expected = graft.in_mode(training=True)(params, X)
    torch.manual_seed(1)
    assert torch.equal(module(X), expected) and not any(m.training for m in graft.model.modules())
    graft.model.train()
    assert torch.equal(module.eval()(X), y) and all(m.training for m in graft.model.modules())
    assert not any(m.training for m in module.view().modules()) and torch.equal(module.view()(X), y)
    graft.model[0].weight.data.mul_(2)
    assert not torch.equal(module(X), y), "later changes of the base are seen"


def test_batch_norm_in_training_mode_uses_the_batch_and_writes_nothing():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval()
    graft = bind(model, LoraConfig(target_modules=["0"]))
    y = graft.in_mode(training=True)(graft.init(), X)
    torch.testing.assert_close(y.mean(0), torch.zeros(3))
    assert model[1].num_batches_tracked == 0


def test_torchscript_keeps_its_mode_or_is_an_error():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(nn.Linear(3, 3), torch.ones(1, 3))
    graft = bind(nn.Sequential(nn.Linear(4, 3), traced), LoraConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match=r"1 is a module of TorchScript.*training=True; call its eval\(\)"):
        graft.in_mode(training=False)


def test_moves_and_copies_are_the_adapters_alone():
    graft, params = made()
    module = AdapterModule(graft, params)
    module.double()
    assert {p.dtype for p in module.parameters()} == {torch.float64} and graft.model[0].weight.dtype == torch.float32
    copied = copy.deepcopy(module)
    assert copied.graft is graft and torch.equal(copied(X), module(X))
    copied.get_parameter("0.lora_B").data.add_(1)
    assert not torch.equal(copied(X), module(X))
    copied.to("meta")
    assert {p.device.type for p in module.parameters()} == {graft.model[0].weight.device.type} == {"cpu"}


def test_methods_of_the_model_are_those_of_a_view():
    class Writer(nn.Sequential):
        def generate(self, x):
            return self(x)

    graft = bind(Writer(nn.Linear(4, 3)), LoraConfig(target_modules=["0"], init_lora_weights=False))
    module = AdapterModule(graft, graft.init())
    assert torch.equal(module.view().generate(X), module(X))
    with pytest.raises(AttributeError, match=r"no 'generate', which the base has; module.view\(\).generate"):
        module.generate(X)
    with pytest.raises(AttributeError, match="has no attribute 'generat'"):
        module.generat  # noqa: B018


@pytest.mark.slow
def test_compiled_in_one_piece_in_both_modes():
    graft, params = made()
    module = AdapterModule(graft, params)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(X), module(X))
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.1)
    module.train()
    assert not torch.equal(compiled(X), compiled(X))


def test_in_ddp_it_trains_as_alone(tmp_path):
    graft, params = made()
    alone = optree.tree_map(torch.clone, params)
    steps(trainable(alone), lambda x: graft(alone, x))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        module = AdapterModule(graft, params)
        steps(module.parameters(), DistributedDataParallel(module))
    finally:
        dist.destroy_process_group()
    assert optree.tree_all(optree.tree_map(torch.equal, module.params, alone))


@pytest.mark.slow
def test_fully_sharded_it_trains_as_alone(tmp_path):
    from torch.distributed.fsdp import fully_shard

    graft, params = made()
    alone = optree.tree_map(torch.clone, params)
    steps(trainable(alone), lambda x: graft(alone, x))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        module = AdapterModule(graft, params)
        fully_shard(module, mesh=dist.init_device_mesh("cpu", (1,)))
        steps(module.parameters(), module)
        found = {name: p.full_tensor() for name, p in module.named_parameters()}
    finally:
        dist.destroy_process_group()
    expected = AdapterModule(graft, optree.tree_map(torch.Tensor.detach, alone)).state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_what_is_no_tree_of_the_graft_is_refused():
    graft, params = made()
    with pytest.raises(TypeError, match="graft is of type Sequential, expected what bind returned"):
        AdapterModule(graft.model, params)
    with pytest.raises(ValueError, match="looks like a stack of 2 adapters"):
        AdapterModule(graft, stack([params, params]))
    with pytest.raises(ValueError, match=r"AdapterModule: leaf \[0\]\[lora_A\] was computed from tensors"):
        AdapterModule(graft, optree.tree_map(lambda t: t.requires_grad_() * 2, params))
    with pytest.raises(TypeError, match="AdapterModule: params is of type Graft.*a graft holds no parameters"):
        AdapterModule(graft, graft)
