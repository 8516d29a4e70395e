"""Kinds of models and calls under `fully_shard` and accelerate's hooks, beside the table of `test_sharded.py`."""

import copy

import pytest
import torch
import torch.distributed as dist
from accelerate import cpu_offload, dispatch_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from torchgraft.adapters import (
    LoraConfig,
    delete_adapter,
    extract_params,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_adapter,
    merge_adapter,
    save_adapter,
    set_adapter,
    set_peft_model_state_dict,
    unmerge_adapter,
)
from torchgraft.functional import bind, functional_call, route, stack

from .. import toy_methods

CONFIG = LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
X = torch.linspace(-1, 1, 32).view(4, 8)


@pytest.fixture(scope="module", autouse=True)
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))


def sharded(model, **options):
    mesh = init_device_mesh("cpu", (1,))
    fully_shard(model[0], mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def offloaded(model):
    return cpu_offload(model, execution_device=torch.device("cpu"))


PLACED = {"sharded": sharded, "offloaded": offloaded}
close = torch.testing.assert_close


@pytest.mark.parametrize("placed", PLACED.values(), ids=PLACED)
def test_rows_of_many_adapters(placed):
    plain, graft = bind(mlp(), CONFIG), bind(placed(mlp()), CONFIG)
    many, rows = stack([plain.init() for _ in range(3)]), torch.tensor([0, 2, 1, 0])
    close(graft(route(many, rows), X), plain(route(many, rows), X))


@pytest.mark.parametrize("placed", PLACED.values(), ids=PLACED)
def test_views_and_their_copies(placed):
    plain = bind(mlp(), CONFIG)
    params = plain.init()
    view = bind(placed(mlp()), CONFIG).view(params)
    for module in (view, copy.deepcopy(view)):
        close(module(X), plain(params, X))


def test_a_graft_computes_in_the_dtypes_of_a_unit():
    plain = bind(mlp(), CONFIG)
    params = plain.init()
    graft = bind(sharded(mlp(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)), CONFIG)
    y = graft(params, X)
    assert y.dtype == torch.bfloat16
    close(y.float(), plain(params, X), rtol=5e-2, atol=5e-2)


def test_a_graft_leaves_the_users_step_alone():
    model, plain = sharded(mlp()), bind(mlp(), CONFIG)
    graft, params = bind(model, CONFIG), plain.init()
    leaves = {path: {leaf: t.requires_grad_() for leaf, t in own.items()} for path, own in params.items()}
    y = model(X)
    graft(leaves, X).sum().backward()
    y.sum().backward()
    alone = mlp()
    alone(X).sum().backward()
    for own, expected in zip(model.parameters(), alone.parameters(), strict=True):
        close(own.grad.full_tensor(), expected.grad)
    close(graft(params, X), plain(params, X))


def test_base_tensors_are_given_to_a_sharded_model():
    plain, graft = bind(mlp(), CONFIG), bind(sharded(mlp()), CONFIG)
    params, base = plain.init(), {name: 2 * t for name, t in mlp().state_dict().items()}
    close(functional_call(graft, (base, params), (X,)), functional_call(plain, (base, params), (X,)))


def test_base_tensors_that_are_offloaded_cannot_be_given():
    graft = bind(offloaded(mlp()), CONFIG)
    words = r"base_params\['0.weight'\]: the model's is offloaded by a hook of accelerate"
    with pytest.raises(ValueError, match=words):
        functional_call(graft, ({"0.weight": torch.zeros(8, 8)}, bind(mlp(), CONFIG).init()), (X,))


class Scaled(nn.Embedding):
    def forward(self, ids):
        return 3 * super().forward(ids)


@pytest.mark.parametrize("placed", PLACED.values(), ids=PLACED)
def test_layers_with_a_forward_of_their_own(placed):
    def model():
        torch.manual_seed(0)
        return nn.Sequential(Scaled(6, 4), nn.Linear(4, 3))

    config = LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False)
    ids, plain = torch.tensor([[1, 2], [3, 0]]), bind(model(), config)
    params = plain.init()
    expected = plain(params, ids)
    close(bind(placed(model()), config)(params, ids), expected)
    close(inject_adapter_in_model(config, placed(model()), params=params)(ids), expected)
    close(placed(inject_adapter_in_model(config, model(), params=params))(ids), expected)


def test_a_parent_that_reads_weights():
    def model():
        torch.manual_seed(0)
        return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)

    config = LoraConfig(r=2, target_modules=["self_attn", "linear1"], init_lora_weights=False)
    x, plain, mesh = torch.randn(2, 3, 8), bind(model(), config), init_device_mesh("cpu", (1,))
    params = plain.init()
    expected = plain(params, x)
    close(bind(fully_shard(model(), mesh=mesh), config)(params, x), expected)
    injected = fully_shard(inject_adapter_in_model(config, model(), params=params), mesh=mesh)
    close(injected(x), expected)
    merge_adapter(injected)
    close(injected(x), expected)


@pytest.mark.filterwarnings("ignore")
def test_a_model_on_several_devices(tmp_path):
    plain = bind(mlp(), CONFIG)
    params = plain.init()
    devices = {"0": "disk", "1": "cpu", "2": "cpu"}
    model = dispatch_model(mlp(), devices, main_device="cpu", offload_dir=tmp_path / "offloaded", force_hooks=True)
    close(bind(model, CONFIG)(params, X), plain(params, X))
    inject_adapter_in_model(CONFIG, model, params=params)
    close(model(X), plain(params, X))
    merge_adapter(model)
    close(model(X), plain(params, X))
    unmerge_adapter(model)
    save_adapter(model, tmp_path / "adapter")
    close(load_adapter(mlp(), tmp_path / "adapter")(X), plain(params, X))


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning")
def test_two_adapters_in_a_sharded_model(tmp_path):
    plain = bind(mlp(), CONFIG)
    params = plain.init()
    model = sharded(inject_adapter_in_model(CONFIG, mlp(), params=params))
    load_adapter(model, save_adapter(model, tmp_path), "second")
    set_adapter(model, ["default", "second"])
    y = model(X)
    for names in (["second"], None):
        merge_adapter(model, names)
        close(model(X), y)
    unmerge_adapter(model, ["second"])
    close(model(X), y)
    set_adapter(model, "default")
    delete_adapter(model, "second")
    close(model(X), plain(params, X))


def test_keys_are_those_of_the_model_within_all_wrappers():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = inject_adapter_in_model(CONFIG, mlp())
    expected = set(get_peft_model_state_dict(model))
    model[0] = checkpoint_wrapper(model[0])
    wrapped = DistributedDataParallel(model)
    assert set(get_peft_model_state_dict(wrapped)) == expected
    assert set(get_peft_model_state_dict(wrapped, state_dict=wrapped.state_dict())) == expected


def test_a_target_that_is_compiled_by_itself_is_refused():
    model = mlp()
    model[0] = torch.compile(model[0])
    with pytest.raises(
        ValueError, match="0: was compiled by itself, and would go on without the adapter; inject first"
    ):
        inject_adapter_in_model(CONFIG, model)


def test_a_file_in_the_way_is_an_error_for_the_process_that_writes(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="is a file, expected a directory"):
        save_adapter(sharded(inject_adapter_in_model(CONFIG, mlp())), tmp_path / "file")


@pytest.mark.parametrize("placed", ["one group", "layers", "offloaded"])
@pytest.mark.parametrize("fields", [{}, {"by_size": False}, {"mixed": False}], ids=str)
def test_leaves_that_layers_share(fields, placed, tmp_path):
    config = toy_methods.BankConfig(**toy_methods.CONFIG, **fields)
    graft = bind(toy_methods.Model().double(), config)
    params = toy_methods.away(graft.init(torch.Generator().manual_seed(0)))
    expected = graft(params, toy_methods.X)
    model = inject_adapter_in_model(config, toy_methods.Model().double(), params=params)
    before = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(model).items()}
    mesh, shared = init_device_mesh("cpu", (1,)), {p for name, p in model.named_parameters() if ".bank." in name}
    if placed == "offloaded":
        offloaded(model)
    elif placed == "layers":
        fully_shard(model.second, mesh=mesh, ignored_params=shared)
    if placed != "offloaded":
        fully_shard(model, mesh=mesh)
    close(model(toy_methods.X), expected)
    for key, tensor in get_peft_model_state_dict(model).items():
        close(tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor, before[key])
    merge_adapter(model)
    close(model(toy_methods.X), expected)
    unmerge_adapter(model)
    close(model(toy_methods.X), expected)
    close(extract_params(model), params)
    set_peft_model_state_dict(model, {key: 2 * tensor for key, tensor in before.items()})
    save_adapter(model, tmp_path)
    close(load_adapter(graft, tmp_path), {path: {k: 2 * t for k, t in own.items()} for path, own in params.items()})
