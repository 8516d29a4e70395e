"""What errors say of mistakes that newcomers make: what was given, what was expected, where, and what to write."""

import copy
import dataclasses

import peft
import pytest
import torch
from torch import nn

import torchgraft
import torchgraft.adapters as adapters
from torchgraft.adapters import (
    IA3Config,
    LoraConfig,
    extract_params,
    inject_adapter_in_model,
    load_adapter,
    merge_adapter,
    save_adapter,
    save_config,
    set_adapter,
)
from torchgraft.functional import bind, functional_call, grad, merge, route, stack, unstack, value_and_grad

X = torch.randn(4, 3)
"""A batch of as many features as some rows have entries."""


def mlp():
    return nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 3))


def lora(r=2, **fields):
    return LoraConfig(r=r, target_modules=["0", "2"], **fields)


class Attention(nn.Module):
    """Modules named as a language model has them."""

    def __init__(self):
        super().__init__()
        self.h = nn.ModuleList(nn.ModuleDict({"c_attn": nn.Linear(3, 3), "c_proj": nn.Linear(3, 3)}) for _ in "ab")
        self.head = nn.Linear(3, 3)


class World:
    """One of each thing that is given in a wrong place, made anew for each test."""

    def __init__(self, folder):
        self.model, self.folder = mlp(), folder
        self.graft = bind(self.model, lora())
        self.params = self.graft.init(torch.Generator().manual_seed(0))
        self.many = stack([self.params, self.params])
        self.named = bind(self.model, {"style": lora(), "task": lora()})
        self.trees = self.named.init()
        self.mixed = bind(self.model, [lora(1), lora(3)])
        self.padded = self.mixed.init()
        self.injected = inject_adapter_in_model(lora(), mlp())

    def saved(self):
        return save_adapter(self.graft, self.folder / "style", params=self.params)

    @property
    def wrapped(self):
        return peft.get_peft_model(mlp(), peft.LoraConfig(target_modules=["0"]))


THEIRS = peft.LoraConfig(r=4, target_modules=["0"])
ROWS = torch.tensor([0, 1, 0, 1])
GIVE_BASE = ("is PEFT's: give the model as it was before get_peft_model",)

TABLE = {
    # -- the model ----------------------------------------------------------------------------------------------
    "PEFT's model": (lambda w: bind(w.wrapped, lora()), TypeError, ("the model: PeftModel", *GIVE_BASE)),
    "PEFT's model, all-linear": (
        lambda w: bind(w.wrapped, LoraConfig(target_modules="all-linear")),
        TypeError,
        ("the model: PeftModel", *GIVE_BASE),
    ),
    "PEFT's layers": (
        lambda w: bind(peft.inject_adapter_in_model(THEIRS, mlp()), lora()),
        TypeError,
        ("0: Linear is PEFT's", "load_adapter(model, folder)"),
    ),
    "PEFT's model in place": (lambda w: inject_adapter_in_model(lora(), w.wrapped), TypeError, GIVE_BASE),
    "load into PEFT's model": (lambda w: load_adapter(w.wrapped, w.saved()), TypeError, GIVE_BASE),
    "unload of PEFT's layers": (
        lambda w: adapters.unload(peft.inject_adapter_in_model(THEIRS, mlp())),
        TypeError,
        ("0: Linear is PEFT's",),
    ),
    "disable_adapter of PEFT's layers": (
        lambda w: adapters.disable_adapter(peft.inject_adapter_in_model(THEIRS, mlp())).__enter__(),
        TypeError,
        ("0: Linear is PEFT's",),
    ),
    "set_adapter of PEFT's layers": (
        lambda w: set_adapter(peft.inject_adapter_in_model(THEIRS, mlp()), "default"),
        TypeError,
        ("0: Linear is PEFT's",),
    ),
    "state of PEFT's layers": (
        lambda w: adapters.get_peft_model_state_dict(peft.inject_adapter_in_model(THEIRS, mlp())),
        TypeError,
        ("0: Linear is PEFT's",),
    ),
    "injected model": (
        lambda w: bind(w.injected, lora()),
        TypeError,
        ("0: BaseTunerLayer has adapters in place", "extract_graft(model)", "unload(model)"),
    ),
    "injected model, all-linear": (
        lambda w: bind(w.injected, LoraConfig(target_modules="all-linear")),
        TypeError,
        ("0: BaseTunerLayer has adapters in place",),
    ),
    "bind swapped": (
        lambda w: bind(lora(), w.model),
        TypeError,
        ("bind: model is of type LoraConfig, expected a torch.nn.Module", "arguments swapped?"),
    ),
    "inject swapped": (lambda w: inject_adapter_in_model(w.model, lora()), TypeError, ("arguments swapped?",)),
    "class": (lambda w: bind(nn.Linear, lora()), TypeError, ("the class Linear", "not its class")),
    "name of a model": (lambda w: bind("gpt2", lora()), TypeError, ("of type str", "load the model first")),
    "graft in place": (lambda w: set_adapter(w.graft, "a"), TypeError, ("of type Graft", "graft.model")),
    "view in place": (
        lambda w: inject_adapter_in_model(lora(), w.graft.view(w.params)),
        TypeError,
        ("inject_adapter_in_model: 0 is already adapted: this is a view", "graft.model"),
    ),
    "save of a view": (
        lambda w: save_adapter(w.graft.view(w.params), w.folder),
        TypeError,
        ("0 is already adapted: this is a view", "save_adapter(graft, path, params=params)"),
    ),
    "container": (
        lambda w: bind(Attention(), LoraConfig(target_modules=["h"])),
        ValueError,
        (
            "h: LORA does not support ModuleList",
            "Within it are 'h.0.c_attn', 'h.0.c_proj', 'h.1.c_attn', ... (4 in all)",
        ),
    ),
    # -- the config ---------------------------------------------------------------------------------------------
    "PEFT's config": (
        lambda w: bind(w.model, THEIRS),
        TypeError,
        ("bind: config is of type LoraConfig, and it is PEFT's: LoraConfig.from_dict(config.to_dict())",),
    ),
    "PEFT's config by name": (lambda w: bind(w.model, {"a": THEIRS}), TypeError, ("config['a']", "it is PEFT's")),
    "PEFT's config in place": (lambda w: inject_adapter_in_model(THEIRS, w.model), TypeError, ("it is PEFT's",)),
    "from_dict of PEFT's config": (lambda w: LoraConfig.from_dict(THEIRS), TypeError, ("it is PEFT's", "to_dict()")),
    "save_config of PEFT's": (lambda w: save_config(THEIRS, w.folder), TypeError, ("it is PEFT's",)),
    "save_config swapped": (
        lambda w: save_config(w.folder, lora()),
        TypeError,
        ("save_config: config is of type PosixPath, expected a config object",),
    ),
    "dict of fields": (
        lambda w: bind(w.model, {"r": 4, "target_modules": ["0"]}),
        TypeError,
        ("config['r'] is 4", "a dict maps names of adapters to configs", "LoraConfig(r=4, target_modules=['0'])"),
    ),
    "dict of fields in place": (
        lambda w: inject_adapter_in_model({"r": 4}, w.model),
        TypeError,
        ("peft_config is of type dict", "LoraConfig(r=4)"),
    ),
    "configs by name in place": (
        lambda w: inject_adapter_in_model({"a": lora()}, w.model),
        TypeError,
        ("expected one config", "adapter_name) once for each"),
    ),
    "class of configs": (
        lambda w: bind(w.model, IA3Config),
        TypeError,
        ("the class IA3Config", "IA3Config(target_mod"),
    ),
    "None": (lambda w: bind(w.model, None), TypeError, ("bind: config is None, expected a config object",)),
    "names of fields": (
        lambda w: LoraConfig(rank=4, alpha=8),
        TypeError,
        ("LoraConfig has no field 'rank' (did you mean 'r'?), 'alpha' (did you mean 'lora_alpha'?)",),
    ),
    "typo in a field": (lambda w: LoraConfig(lora_aplha=8), TypeError, ("'lora_aplha' (did you mean 'lora_alpha'?)",)),
    "field of another method": (lambda w: IA3Config(r=4), TypeError, ("no field 'r'; it has", "'feedforward_modules'")),
    "field without a name": (lambda w: LoraConfig(8), TypeError, ("8 is given without a name", "LoraConfig(target_")),
    "field in replace": (lambda w: dataclasses.replace(lora(), rank=4), TypeError, ("'rank' (did you mean 'r'?)",)),
    "field written": (lambda w: setattr(lora(), "rank", 4), AttributeError, ("no field 'rank'; did you mean 'r'?",)),
    "config of no method": (lambda w: adapters.AdapterConfig(), TypeError, ("of no method; use LoraConfig",)),
    "string for a list": (lambda w: lora(modules_to_save="head"), ValueError, ("'head', expected list", "['head']")),
    "peft_type in small letters": (
        lambda w: adapters.AdapterConfig.from_dict({"peft_type": "lora"}),
        ValueError,
        ("did you mean 'LORA'?",),
    ),
    # -- names of modules ---------------------------------------------------------------------------------------
    "typo in a module": (
        lambda w: bind(Attention(), LoraConfig(target_modules=["c_atn"])),
        ValueError,
        ("target_modules=['c_atn'] matches no module", "did you mean 'c_attn'?"),
    ),
    "all_linear": (
        lambda w: bind(Attention(), LoraConfig(target_modules="all_linear")),
        ValueError,
        ("did you mean 'all-linear'?",),
    ),
    "all-linear in a list": (
        lambda w: bind(Attention(), LoraConfig(target_modules=["all-linear"])),
        ValueError,
        ("did you mean the string 'all-linear', not in a list?",),
    ),
    "names in one string": (
        lambda w: bind(Attention(), LoraConfig(target_modules="c_attn,c_proj")),
        ValueError,
        ("did you mean the list ['c_attn', 'c_proj']?",),
    ),
    "pattern in a list": (
        lambda w: bind(Attention(), LoraConfig(target_modules=["*c_attn"])),
        ValueError,
        ("names in a list are no patterns", "target_modules='.*c_attn'"),
    ),
    "parameter for a module": (
        lambda w: bind(Attention(), LoraConfig(target_modules=["h.0.c_attn.weight"])),
        ValueError,
        ("did you mean 'h.0.c_attn'?",),
    ),
    "typo in target_parameters": (
        lambda w: bind(Attention(), LoraConfig(target_parameters=["head.wieght"])),
        ValueError,
        ("match no parameter of the model", "did you mean 'head.weight'?"),
    ),
    "typo in modules_to_save": (
        lambda w: bind(Attention(), LoraConfig(target_modules=["c_attn"], modules_to_save=["haed"])),
        ValueError,
        ("modules_to_save has 'haed'", "did you mean 'head'?"),
    ),
    "typo in a base tensor": (
        lambda w: functional_call(w.graft, ({"0.wieght": X}, w.params), (X,)),
        KeyError,
        ("did you mean '0.weight'?",),
    ),
    # -- trees --------------------------------------------------------------------------------------------------
    "no tree": (lambda w: w.graft(X), TypeError, ("params is of type Tensor", "graft(params, x)")),
    "tree by name": (
        lambda w: w.graft({"default": w.params}, X),
        KeyError,
        ("looks like adapters by name ('default'), and one unnamed adapter is expected", "params['default']"),
    ),
    "tree without its name": (
        lambda w: w.named(w.params, X),
        KeyError,
        ("looks like the tree of one adapter: give its name too, {'style': params}",),
    ),
    "typo in an adapter": (lambda w: w.named({"sytle": w.params}, X), KeyError, ("did you mean 'style'?",)),
    "list of trees": (lambda w: w.graft([w.params] * 2, X), TypeError, ("graft(route(stack(trees), rows), x)",)),
    "state dict": (
        lambda w: w.graft(dict(w.model.state_dict()), X),
        KeyError,
        ("unknown site '0.weight'", "looks like a state dict", "load_adapter(graft, folder)"),
    ),
    "other mapping": (lambda w: w.graft(w.model.state_dict(), X), TypeError, ("OrderedDict", "dict(params)")),
    "stack for a tree": (lambda w: w.graft(w.many, X), ValueError, ("a stack of 2 adapters", "unstack(many)[i]")),
    "typo in a site": (
        lambda w: w.graft({"0": w.params["0"], "22": w.params["2"]}, X),
        KeyError,
        ("unknown site '22'", "did you mean '2'?"),
    ),
    "tree for a stack": (
        lambda w: w.graft(route(w.params, ROWS), X),
        ValueError,
        ("['0']['lora_A'] has shape (2, 3)", "the tree of one adapter: stack([params])"),
    ),
    "padded tree to a member": (
        lambda w: w.mixed.member(0)(unstack(w.padded)[0], X),
        ValueError,
        ("has shape (3, 3), expected (1, 3)", "padded to the largest: graft.unstack(many)"),
    ),
    "own tree in a stack": (
        lambda w: w.mixed.at(0)(w.mixed.unstack(w.padded)[0], X),
        ValueError,
        ("has shape (1, 3), expected (3, 3)", "graft.pad(tree)"),
    ),
    "stacks of several sizes": (
        lambda w: w.graft(route({"0": w.many["0"], "2": stack([w.params["2"]] * 3)}, ROWS), X),
        ValueError,
        ("of 2 adapters and this one of 3",),
    ),
    "stack of one tree": (lambda w: stack(w.params), TypeError, ("got one dict", "stack([params])")),
    "stack of names": (lambda w: stack({"a": w.params}), TypeError, ("stack(list(trees.values()))",)),
    "stack of several ranks": (
        lambda w: stack([w.params, bind(w.model, lora(3)).init()]),
        ValueError,
        ("several ranks are a stack of bind(model, [config, ...])",),
    ),
    "stack on two devices": (
        lambda w: stack([w.params, w.graft.init(device="meta")]),
        ValueError,
        ("leaf [0][lora_A] is on cpu in tree 0 and on meta in tree 1",),
    ),
    "unstack of a tree": (lambda w: unstack(w.params), ValueError, ("stacked by stack([params])",)),
    "member by number": (lambda w: w.mixed.member(5), IndexError, ("index is 5", "adapters 0 to 1")),
    "member by name": (lambda w: w.mixed.member("a"), IndexError, ("no names, got 'a'", "names=[...]")),
    "at by number": (lambda w: w.mixed.at(5), IndexError, ("index is 5",)),
    "one config for places": (lambda w: w.mixed.places(lora()), TypeError, ("graft.places([config, ...])",)),
    # -- rows ---------------------------------------------------------------------------------------------------
    "3 rows of 4": (
        lambda w: w.graft(route(w.many, ROWS[:3]), X),
        ValueError,
        ("route: rows has 3, the inputs have 4", "one index for each row"),
    ),
    "3 rows of 4, known kind": (
        lambda w: [w.graft(route(w.many, rows), X[:, None].expand(4, 3, 3)) for rows in (ROWS, ROWS[:3])],
        ValueError,
        ("rows has 3, the inputs have 4",),
    ),
    "3 rows of 4, compiled": (
        lambda w: torch.vmap(lambda x: w.graft(route(w.many, ROWS[:3]), x))(torch.randn(2, 4, 3, 3)),
        ValueError,
        ("rows has 3, and its leading axis 4: is there one index for each row of the inputs?",),
    ),
    "rows as a range": (lambda w: route(w.many, range(2)), TypeError, ("rows is of type range", "torch.tensor(rows)")),
    "None for a row": (
        lambda w: route(w.many, [0, None]),
        TypeError,
        ("rows has None, expected -1", "graft.rows(names)"),
    ),
    "no tokens": (lambda w: w.graft.look(X, tokens=0), ValueError, ("tokens is 0", "number of tokens")),
    "mode by name": (lambda w: w.graft.in_mode("train"), TypeError, ("training is 'train'", "True for training")),
    "module for params": (
        lambda w: merge(w.graft, torchgraft.AdapterModule(w.graft, w.params)),
        TypeError,
        ("is of type AdapterModule", "module.params"),
    ),
    "module saved": (
        lambda w: adapters.save_adapter(torchgraft.AdapterModule(w.graft, w.params), "x"),
        TypeError,
        ("save_adapter(m.graft, path, params=m.params)",),
    ),
    "from_pretrained swapped": (
        lambda w: adapters.PeftModel.from_pretrained("folder", w.model),
        TypeError,
        ("is of type str", "swapped"),
    ),
    "one row": (lambda w: route(w.many, 1), TypeError, ("torch.full((batch,), 1)",)),
    "names for rows": (
        lambda w: route(w.many, ["a", "b"]),
        TypeError,
        ("rows has names, expected numbers", "graft.rows(names)"),
    ),
    "rows of floats": (lambda w: route(w.many, ROWS.float()), ValueError, ("torch.float32", "rows.long()")),
    "mask for rows": (lambda w: route(w.many, ROWS.bool()), ValueError, ("torch.where(mask, 0, -1)",)),
    "route swapped": (lambda w: route(ROWS, w.many), TypeError, ("route(stacked, rows)",)),
    "route of a list": (lambda w: route([w.params], ROWS), TypeError, ("route(stack(trees), rows)",)),
    "members as a list": (lambda w: route(w.many, ROWS, members=[0]), TypeError, ("torch.tensor(members)",)),
    # -- grafts -------------------------------------------------------------------------------------------------
    "merge of a model": (
        lambda w: merge(w.injected, w.params),
        TypeError,
        ("graft is of type Sequential", "graft = bind(model, config)", "merge_adapter(model)"),
    ),
    "merge swapped": (lambda w: merge(w.params, w.graft), TypeError, ("merge(graft, params, ...)",)),
    "merge of a stack": (lambda w: merge(w.graft, w.many), ValueError, ("give one, unstack(many)[i]",)),
    "merge of several ranks": (lambda w: merge(w.mixed, w.padded), TypeError, ("graft.unstack(many)[i]", "merge")),
    "seed for a generator": (lambda w: w.graft.init(0), TypeError, ("torch.Generator().manual_seed(0)",)),
    "dtype for a device": (lambda w: w.graft.init(device=torch.half), TypeError, ("init: device is torch.float16",)),
    "list for kwargs": (lambda w: functional_call(w.graft, w.params, (), [X]), TypeError, ("kwargs is of type list",)),
    "parameters of a graft": (lambda w: w.graft.parameters(), AttributeError, ("graft.init(generator)", "each call")),
    "eval of a graft": (lambda w: w.graft.eval(), AttributeError, ("graft.model.eval(...), which every call sees",)),
    "method of the model": (lambda w: w.graft.forward(X), AttributeError, ("graft.view(params).forward",)),
    "function as a method": (lambda w: w.graft.merge(w.params), AttributeError, ("torchgraft.functional.merge",)),
    "loss for a function": (
        lambda w: value_and_grad(w.graft(w.params, X).sum()),
        TypeError,
        ("f is of type Tensor", "value_and_grad(loss)(params, x), not value_and_grad(loss(params, x))"),
    ),
    "grad of a loss": (lambda w: grad(w.graft(w.params, X).sum()), TypeError, ("expected a function",)),
    # -- files --------------------------------------------------------------------------------------------------
    "file for a directory": (
        lambda w: load_adapter(w.model, w.saved() / "adapter_model.safetensors"),
        NotADirectoryError,
        ("adapter_model.safetensors: is a file, expected a directory: give its own, '", "style'"),
    ),
    "config file for a directory": (
        lambda w: adapters.load_config(w.saved() / "adapter_config.json"),
        NotADirectoryError,
        ("is a file, expected a directory",),
    ),
    "load swapped": (
        lambda w: load_adapter(w.saved(), w.model),
        TypeError,
        ("are the arguments swapped? load_adapter(model, path)",),
    ),
    "several directories": (
        lambda w: load_adapter(w.model, [w.saved()]),
        TypeError,
        ("path is of type list, expected one directory",),
    ),
    "several names": (lambda w: load_adapter(w.model, w.saved(), ["a"]), ValueError, ("takes one name", "type list")),
    "load into several ranks": (
        lambda w: load_adapter(w.mixed, w.saved()),
        TypeError,
        ("load_adapter(graft.member(i), path), then graft.stack(trees)",),
    ),
    "load without a name": (
        lambda w: load_adapter(w.named, w.saved()),
        ValueError,
        ("adapter_name is 'default'", "load_adapter(graft, path, 'style')"),
    ),
    "save of a stack": (
        lambda w: save_adapter(w.graft, w.folder, params=w.many),
        ValueError,
        ("a stack of 2 adapters", "unstack(many)[i]"),
    ),
    "save of routed rows": (
        lambda w: save_adapter(w.graft, w.folder, params=route(w.many, ROWS)),
        TypeError,
        ("a routed stack", "unstack(many)[i]"),
    ),
    "save of a list": (lambda w: save_adapter(w.graft, w.folder, params=[w.params]), TypeError, ("of type list",)),
    "save without a name": (
        lambda w: save_adapter(w.named, w.folder, params=w.trees),
        ValueError,
        ("adapter_name is 'default'", "save_adapter(graft, path, 'style', params=params)"),
    ),
    "save of parameters by position": (
        lambda w: save_adapter(w.graft, w.params, w.folder),
        TypeError,
        ("save_adapter(graft, path, params=params)",),
    ),
    "save swapped": (lambda w: save_adapter(w.folder, w.injected), TypeError, ("save_adapter(model, path)",)),
    "save of a model's tree": (
        lambda w: save_adapter(w.model, w.folder, params=w.params),
        TypeError,
        ("params go with a graft", "save_adapter(bind(model, config), path, params=params)"),
    ),
    # -- in place -----------------------------------------------------------------------------------------------
    "typo in set_adapter": (lambda w: set_adapter(w.injected, "defualt"), ValueError, ("did you mean 'default'?",)),
    "typo in a string of merge_adapter": (
        lambda w: merge_adapter(w.injected, "defualt"),
        ValueError,
        ("no adapter 'defualt'; it has ['default']; did you mean 'default'?",),
    ),
    "weights for names": (lambda w: set_adapter(w.injected, {"default": 0.5}), TypeError, ("a list of names",)),
    "names for a name": (
        lambda w: extract_params(w.injected, ["default"]),
        TypeError,
        ("expected one name, a string",),
    ),
    "path for a state dict": (
        lambda w: adapters.set_peft_model_state_dict(w.injected, "style"),
        TypeError,
        ("state_dict is of type str, expected a dict of tensors", "load_adapter(model, path)"),
    ),
    "tree for a state dict": (
        lambda w: adapters.set_peft_model_state_dict(w.injected, w.params),
        TypeError,
        ("'0' is of type dict, expected a tensor", "params=tree"),
    ),
    "deleting several": (lambda w: adapters.delete_adapter(w.injected, ["a"]), TypeError, ("expected one name",)),
    # -- names of the packages ----------------------------------------------------------------------------------
    "name of the front door": (lambda w: torchgraft.LoRAConfig, AttributeError, ("did you mean 'LoraConfig'?",)),
    "name of the adapters": (lambda w: adapters.LoRAConfig, AttributeError, ("did you mean 'LoraConfig'?",)),
    "a name of PEFT's": (
        lambda w: adapters.prepare_model_for_kbit_trainig,
        AttributeError,
        ("did you mean 'prepare_model_for_kbit_training'?",),
    ),
}


@pytest.mark.parametrize("mistake", TABLE)
def test_a_mistake_is_an_error_that_says_what_to_write_instead(mistake, tmp_path):
    world = World(tmp_path)
    before = [copy.deepcopy(model.state_dict()) for model in (world.model, world.injected)]
    make, error, words = TABLE[mistake]
    with pytest.raises(error) as caught:
        make(world)
    said = str(caught.value.args[0])
    assert not [part for part in words if part not in said], said
    for model, state in zip((world.model, world.injected), before, strict=True):
        after = model.state_dict()
        assert after.keys() == state.keys() and all(torch.equal(after[name], state[name]) for name in state)


def test_what_errors_advise_is_right():
    world = World(None)
    torch.testing.assert_close(world.graft(route(stack([world.params]), torch.zeros(4).long()), X), world.model(X))
    own = world.mixed.unstack(world.padded)[0]
    torch.testing.assert_close(world.mixed.member(0)(own, X), world.mixed.at(0)(world.mixed.pad(own), X))
    ours = LoraConfig.from_dict(THEIRS.to_dict())
    assert (ours.r, list(ours.target_modules)) == (4, ["0"])
    graft = adapters.extract_graft(world.injected)
    torch.testing.assert_close(graft(extract_params(world.injected), X), world.injected(X))
    assert list(bind(adapters.unload(world.injected), lora()).sites[""]) == ["0", "2"]
    merge_adapter(inject_adapter_in_model(lora(), mlp()), "default")


def test_a_part_without_adapters_of_a_model_that_has_some_is_bound():
    model = inject_adapter_in_model(LoraConfig(target_modules=["0"]), mlp())
    graft = bind(model, LoraConfig(target_modules=["2"]))
    torch.testing.assert_close(graft(graft.init(), X), model(X))


def test_a_name_that_matches_nothing_beside_others_is_a_warning_with_a_proposal():
    with pytest.warns(RuntimeWarning, match=r"\['c_porj'\] match no module of the model.*did you mean 'c_proj'\?"):
        bind(Attention(), LoraConfig(target_modules=["c_attn", "c_porj"]))


def test_a_config_is_copied_pickled_and_given_private_attributes():
    config = lora()
    config._note = 1
    config.r = 5
    assert copy.deepcopy(config) == config and dataclasses.replace(config, r=5) == config
