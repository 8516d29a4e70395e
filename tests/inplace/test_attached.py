"""What is attached to an adapter's own modules takes part in the forward, as it does in PEFT."""

import copy
import functools
import pickle

import pytest
import torch
import torch._dynamo
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, parametrize

from torchgraft import adapters
from torchgraft.adapters import IA3Config, LoraConfig, OFTConfig, VeraConfig, inject_adapter_in_model, set_adapter

from .models import both, inject, inputs, layers, net, randomise

LORA = [
    pytest.param("LORA", kind, fields, id=f"{kind}-{name}")
    for kind in ("linear", "transposed", "embedding", "conv1d", "conv2d", "conv3d")
    for name, fields in {
        "plain": {},
        "dropout": {"lora_dropout": 0.5},
        "bias": {"lora_bias": True},
        "dora": {"use_dora": True},
        "dora with dropout": {"use_dora": True, "lora_dropout": 0.5},
    }.items()
    if not (kind == "embedding" and name in ("bias", "dropout"))
]
OTHERS = [
    pytest.param("ADALORA", "linear", {"lora_dropout": 0.5}, id="adalora"),
    pytest.param("VERA", "linear", {"vera_dropout": 0.5}, id="vera"),
    pytest.param("OFT", "linear", {}, id="oft"),
    pytest.param("OFT", "embedding", {}, id="oft-embedding"),
    pytest.param("IA3", "linear", {}, id="ia3"),
]
HELD = ("lora_", "vera_", "oft_", "ia3_")


def holders(model):
    """The modules that hold an adapter's leaves, and its dropout, by name."""
    found = {}
    for name, module in model.named_modules():
        parts = name.split(".")
        if any(part.startswith(HELD) for part in parts[:-1]) and not isinstance(
            module, (nn.ModuleDict, nn.ParameterDict)
        ):
            found[name] = module
    return found


def record(model):
    """What goes into each such module, what comes out, and its gradient, in the order of the calls."""
    seen, grads = [], []

    def forward(module, args, kwargs, y, name):
        seen.append((name, args[0].detach(), [t.detach() for t in (y if isinstance(y, tuple) else (y,))]))

    for name, module in holders(model).items():
        if "oft_dropout" not in name:
            module.register_forward_hook(lambda *call, name=name: forward(*call, name), with_kwargs=True)
            module.register_full_backward_hook(lambda m, into, out, name=name: grads.append((name, into, out)))
    return seen, grads


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize(("method", "kind", "fields"), [*LORA, *OTHERS])
def test_hooks_see_what_they_see_in_peft(method, kind, fields):
    mine, theirs = both(method, kind, **fields)
    randomise(mine), randomise(theirs)
    found = []
    for model in (mine, theirs):
        model.train()(inputs(kind))  # hooks come after the first forward
        seen, grads = record(model)
        torch.manual_seed(4)
        y = model(inputs(kind))
        y.square().sum().backward()
        found.append((y, seen, grads, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}))
    (y, seen, grads, own), (expected, their_seen, their_grads, others) = found
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    assert [name for name, *_ in seen] == [name for name, *_ in their_seen]
    for (name, x, out), (_, their_x, their_out) in zip(seen, their_seen, strict=True):
        torch.testing.assert_close(x, their_x, rtol=1e-9, atol=1e-9, msg=f"input of {name}")
        for one, other in zip(out, their_out, strict=True):
            torch.testing.assert_close(one.reshape(other.shape), other, rtol=1e-9, atol=1e-9, msg=f"output of {name}")
    by_name = {name: (into, out) for name, into, out in grads}
    assert by_name.keys() == {name for name, *_ in their_grads}
    for name, into, out in their_grads:
        for one, other in zip((*by_name[name][0], *by_name[name][1]), (*into, *out), strict=True):
            if one is not None and other is not None:
                torch.testing.assert_close(
                    one.reshape(other.shape), other, rtol=1e-8, atol=1e-8, msg=f"gradient at {name}"
                )
    for name, grad in own.items():
        torch.testing.assert_close(grad, others[name], rtol=1e-8, atol=1e-8, msg=name)


def test_hooks_come_and_go():
    model, x = randomise(inject(inject(net(), "LORA", "other"), "LORA")), inputs()
    expected, seen = model(x), []
    held = model.first.lora_B["default"]
    for register, call in (
        (held.register_forward_hook, lambda *_: seen.append(1)),
        (held.register_forward_pre_hook, lambda *_: seen.append(1)),
        (held.register_full_backward_hook, lambda *_: seen.append(1)),
        (held.register_full_backward_pre_hook, lambda *_: seen.append(1)),
        (register_module_forward_hook, lambda module, *_: seen.append(1) if module is held else None),
    ):
        handle = register(call)
        y = model(x)
        y.sum().backward()
        assert seen == [1]
        torch.testing.assert_close(y, expected)
        handle.remove()
        model(x).sum().backward()
        assert seen == [1]
        seen.clear()
    held.register_forward_hook(lambda module, args, y: seen.append(1))
    set_adapter(model, "other")
    model(x)
    set_adapter(model, ["default", "other"])
    assert not seen
    both, _ = model(x), seen.clear()
    held._forward_hooks.clear()
    torch.testing.assert_close(model(x), both)
    held.register_forward_hook(lambda module, args, y: seen.append(1))
    with adapters.disable_adapter(model):
        model(x)
    adapters.merge_adapter(model)
    model(x)
    assert not seen
    adapters.unmerge_adapter(model)
    model(x)
    copy.deepcopy(model)(x)
    assert seen == [1, 1]


def zeroed(module, args, y):
    return 0 * y


def scaled_down(cls, module, x):
    return 0 * cls.forward(module, x)


def scaled_down_by(module, cls, x):
    return scaled_down(cls, module, x)


@pytest.mark.parametrize("change", ["hook", "forward", "class"])
@pytest.mark.parametrize("name", ["lora_A", "lora_B", "lora_dropout"])
def test_what_is_attached_changes_the_output(name, change):
    model, x = randomise(inject(net(), "LORA")), inputs()
    model(x)
    for layer in layers(model):
        held = getattr(layer, name)["default"]
        if change == "hook":
            held.register_forward_hook(zeroed)
        elif change == "forward":
            held.forward = functools.partial(scaled_down, type(held), held)
        else:
            own = type(held)
            held.__class__ = type("Own", (own,), {"forward": functools.partialmethod(scaled_down_by, own)})
    torch.testing.assert_close(model(x), net()(x))


class Halves(nn.Module):
    """A map that has no weight."""

    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self, x):
        return x[..., : self.size] / 2


def test_a_module_of_another_class_is_called():
    model, x = randomise(inject(net(), "LORA")), inputs()
    model(x)
    b, scaling = model.first.lora_B["default"].weight, model.first.scaling["default"]
    model.first.lora_A["default"] = Halves(3)
    y = model.first(x)
    torch.testing.assert_close(y, model.first.base_layer(x) + scaling * (x[..., :3] / 2) @ b.mT)
    with pytest.raises(TypeError, match="first: the weight of lora_A, a Halves, is NoneType, .* instead of calling it"):
        adapters.merge_adapter(model)
    assert not model.first.merged
    with pytest.raises(TypeError, match=r"first: lora_A\['default'\] is a Halves, whose weight is no tensor"):
        adapters.get_peft_model_state_dict(model)
    set_adapter(model, "default")
    model.first.lora_A["default"] = nn.Linear(8, 3).double()  # with a bias
    with torch.no_grad():
        torch.testing.assert_close(
            model.first(x), model.first.base_layer(x) + scaling * model.first.lora_A["default"](x) @ b.mT
        )
    model.first.lora_dropout["default"] = nn.Dropout(0.5)
    torch.manual_seed(0)
    y = model.train().first(x)
    torch.manual_seed(0)
    expected = scaling * model.first.lora_A["default"](nn.functional.dropout(x, 0.5)) @ b.mT
    torch.testing.assert_close(y, model.first.base_layer(x) + expected)


def test_the_dropout_module_is_the_dropout():
    model, x = randomise(inject(net(), "LORA", lora_dropout=0.5)), inputs()
    expected = model(x)
    assert type(model.first.lora_dropout["default"]) is nn.Dropout and not torch.allclose(model.train()(x), expected)
    for layer in layers(model):
        layer.lora_dropout["default"].eval()
    torch.testing.assert_close(model(x), expected)
    model.train()
    for layer in layers(model):
        layer.lora_dropout["default"].p = 0.0
    torch.testing.assert_close(model(x), expected)
    assert type(inject(net(), "LORA").first.lora_dropout["default"]) is nn.Identity
    adapters.delete_adapter(model, "default")
    assert not model.first.lora_dropout


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_a_parametrized_or_normed_map_is_what_it_computes(kind):
    model, x = randomise(inject(net(kind), "LORA")), inputs(kind)
    held = model.first.lora_A["default"]
    parametrizations.weight_norm(held)
    expected = model(x)
    parametrize.remove_parametrizations(held, "weight")
    torch.testing.assert_close(model(x), expected)
    nn.utils.spectral_norm(model.first.lora_B["default"])
    y = model(x)
    adapters.merge_adapter(model)
    torch.testing.assert_close(model(x), y)
    adapters.unmerge_adapter(model)
    nn.utils.remove_spectral_norm(model.first.lora_B["default"])
    torch.testing.assert_close(model(x), y)


@pytest.mark.slow
def test_compiled_forwards_decide_while_they_are_traced():
    model, x = randomise(inject(net(), "LORA", lora_dropout=0.5)), inputs()
    for layer in layers(model):
        layer.lora_B["default"].register_forward_hook(zeroed)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), net()(x))


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, use_dora=True, init_lora_weights=False),
        OFTConfig(oft_block_size=4, init_weights=False),
        VeraConfig(r=2, vera_dropout=0.5, init_weights=False),
        IA3Config(feedforward_modules=[], init_ia3_weights=False),
    ],
    ids=lambda config: config.peft_type,
)
def test_compiled_forwards_call_what_has_hooks(config):
    config.target_modules = ["first", "second"]
    model, x = inject_adapter_in_model(config, net()).eval(), inputs()
    before = model(x)
    for held in holders(model).values():
        held.register_forward_hook(lambda module, args, y: 2 * y)
    torch._dynamo.reset()
    y = model(x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), y)
    assert torch.allclose(y, before) == (not holders(model))


def test_half_precision_maps_get_their_own_precision():
    model, x = inject(net(dtype=torch.bfloat16), "LORA", init_lora_weights=False), inputs(dtype=torch.bfloat16)
    model.first.lora_A["default"].float(), model.first.lora_B["default"].float()
    expected, seen = model(x), []
    model.first.lora_A["default"].register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    y = model(x)
    assert seen == [torch.float32] and y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("dora", [False, True])
def test_initialisations_from_the_weight(init, dora):
    model, x = randomise(inject(net(), "LORA", init_lora_weights=init, use_dora=dora), scale=0.1), inputs()
    expected = model(x)
    for held in holders(model).values():
        held.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_call_what_they_have(clone):
    model, x = randomise(inject(net(), "LORA", use_dora=True)), inputs()
    model.first.lora_B["default"].register_forward_hook(zeroed)
    expected = model(x)
    other = clone(model)
    torch.testing.assert_close(other(x), expected)
    other.first.lora_B["default"]._forward_hooks.clear()
    assert not torch.allclose(other(x), expected)
    torch.testing.assert_close(model(x), expected)
