"""Initialisations of LoRA against their equations and PEFT's numbers, as constants beside a base that stays."""

import copy
import re

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from torchgraft.adapters import LoraConfig
from torchgraft.adapters._calibration.initial import CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig, Statistics
from torchgraft.adapters._calibration.initial.loftq import NF4, loftq, quantise
from torchgraft.adapters._calibration.initial.spectral import randomised_svd
from torchgraft.functional import bind, merge, route, stack

SITES = ["first", "second"]
FROM_WEIGHT = ["pissa", "olora", "mica"]
PEFT_WARNS = "ignore:.*(corda_config|eva_config|fan_in_fan_out is set)"
pytestmark = pytest.mark.filterwarnings(PEFT_WARNS)


class Net(nn.Module):
    def __init__(self, kind="linear"):
        super().__init__()
        self.first = Conv1D(10, 12) if kind == "transposed" else nn.Linear(12, 10)
        self.second = Conv1D(8, 10) if kind == "transposed" else nn.Linear(10, 8, bias=False)

    def forward(self, x):
        return self.second(self.first(x).tanh())


def net(kind="linear", dtype=torch.float32):
    torch.manual_seed(0)
    model = Net(kind)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.to(dtype)


def config(name, **fields):
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": SITES, "init_lora_weights": name, **fields})


def everything(graft, tree, path):
    """`A` and `B` of a site, whether they are trained or not."""
    constants = graft.sites[""][path].constants
    return tree[path]["lora_A"], tree[path].get("lora_B", constants.lora_B)


def away(tree, scale=0.1):
    generator = torch.Generator().manual_seed(1)
    return {
        path: {leaf: t + scale * torch.randn(t.shape, generator=generator).to(t) for leaf, t in sorted(leaves.items())}
        for path, leaves in tree.items()
    }


@pytest.mark.parametrize(
    ("name", "kind"),  # PEFT decomposes a Conv1D's weight for OLoRA as it is stored, transposed, and fails
    [(name, "linear") for name in (*FROM_WEIGHT, "orthogonal")]
    + [(name, "transposed") for name in ("pissa", "mica", "orthogonal")],
)
@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, {"rank_pattern": {"second": 2}}], ids=str)
@pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA with rank_pattern")
def test_numbers_are_pefts(name, kind, fields):
    model = net(kind)
    graft = bind(model, config(name, **fields))
    tree = graft.init(torch.Generator().manual_seed(3))
    theirs = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=SITES, init_lora_weights=name, fan_in_fan_out=kind == "transposed", **fields
    )
    torch.manual_seed(3)
    other = peft.inject_adapter_in_model(theirs, copy.deepcopy(model))
    for path in SITES:
        layer, (a, b) = other.get_submodule(path), everything(graft, tree, path)
        expected_a, expected_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        torch.testing.assert_close(b @ a, expected_b @ expected_a, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(a.abs(), expected_a.abs(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(b.abs(), expected_b.abs(), rtol=1e-5, atol=1e-6)
    x = torch.randn(5, 12)
    moved = away(tree)
    with torch.no_grad():
        for path, leaves in moved.items():
            for leaf, value in leaves.items():
                getattr(other.get_submodule(path), leaf)["default"].weight.copy_(value)
    torch.testing.assert_close(graft(moved, x), other(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["pissa", "pissa_niter_4", "olora", "mica"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_identity_at_init_bit_for_bit(name, dtype):
    model = net(dtype=dtype)
    graft = bind(model, config(name))
    x = torch.randn(6, 12).to(dtype)
    assert torch.equal(graft(graft.init(), x), model(x))
    many = stack([graft.init(), graft.init()])
    assert torch.equal(graft(route(many, torch.tensor([1, 0, 0, 1, 1, 0])), x), model(x))


def test_orthogonal_factors_cancel_up_to_rounding():
    model = net(dtype=torch.float64)
    graft = bind(model, config("orthogonal"))
    x = torch.randn(6, 12, dtype=torch.float64)
    torch.testing.assert_close(graft(graft.init(), x), model(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_adds_what_training_changed_to_the_product(name):
    model = net(dtype=torch.float64)
    graft = bind(model, config(name))
    start, tree = graft.init(), away(graft.init())
    state = merge(graft, tree)
    for path in SITES:
        weight = model.get_submodule(path).weight
        change = tree[path]["lora_B"] @ tree[path]["lora_A"] - start[path]["lora_B"] @ start[path]["lora_A"]
        torch.testing.assert_close(state[f"{path}.weight"], weight + 1.5 * change, rtol=1e-12, atol=1e-12)


def test_pissa_starts_with_the_principal_part():
    model = net(dtype=torch.float64)
    graft = bind(model, config("pissa"))
    tree = graft.init()
    for path in SITES:
        weight = model.get_submodule(path).weight.detach()
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        principal = u[:, :4] @ s[:4].diag() @ vh[:4]
        torch.testing.assert_close(1.5 * tree[path]["lora_B"] @ tree[path]["lora_A"], principal)


def test_a_randomised_decomposition_is_torchs_and_the_same_in_every_process():
    matrix = torch.randn(9, 14, generator=torch.Generator().manual_seed(2))
    for given in (matrix, matrix.mT):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(given, q=3, niter=2)
        state = torch.random.get_rng_state()
        own = randomised_svd(given, 3, 2, torch.Generator().manual_seed(0))
        assert torch.equal(torch.random.get_rng_state(), state)
        torch.testing.assert_close(own[1], s)
        torch.testing.assert_close(own[0] @ own[1].diag() @ own[2], u @ s.diag() @ v.mT)
    first, second = (bind(net(), config("pissa_niter_2")).init() for _ in range(2))
    assert torch.equal(first["first"]["lora_A"], second["first"]["lora_A"])


def test_pissa_niter_approaches_pissa():
    exact, near = (bind(net(), config(name)).init()["first"] for name in ("pissa", "pissa_niter_60"))
    torch.testing.assert_close(near["lora_B"] @ near["lora_A"], exact["lora_B"] @ exact["lora_A"], rtol=0, atol=1e-4)


def test_mica_trains_a_alone():
    model = net(dtype=torch.float64)
    graft = bind(model, config("mica"))
    tree = graft.init()
    assert all(sorted(leaves) == ["lora_A"] and not leaves["lora_A"].any() for leaves in tree.values())
    b = graft.sites[""]["first"].constants.lora_B
    weight = model.first.weight.detach()
    u, s, _ = torch.linalg.svd(weight)
    torch.testing.assert_close(b.mT @ weight @ weight.mT @ b, s[-4:].square().diag())
    torch.testing.assert_close(b, u[:, -4:])
    moved = away(tree)
    torch.testing.assert_close(
        merge(graft, moved)["first.weight"], weight + 1.5 * b @ moved["first"]["lora_A"], rtol=1e-12, atol=1e-12
    )


def test_mica_of_an_embedding_is_pefts():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 6))
    ours = LoraConfig(r=3, target_modules=["0"], init_lora_weights="mica")
    graft = bind(model, ours)
    other = peft.inject_adapter_in_model(
        peft.LoraConfig(r=3, target_modules=["0"], init_lora_weights="mica"), copy.deepcopy(model)
    )
    assert list(graft.init()["0"]) == ["lora_embedding_A"]
    torch.testing.assert_close(
        graft.sites[""]["0"].constants.lora_embedding_B, other[0].lora_embedding_B["default"].detach()
    )


# -- together with other options -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pissa", "olora"])
@pytest.mark.parametrize(("dora", "dropout"), [(True, 0.0), (False, 0.4), (True, 0.4)])
def test_dora_and_dropout_are_pefts(name, dora, dropout):
    fields = {"use_dora": dora, "lora_dropout": dropout}
    model, x = net(), torch.randn(6, 12)
    theirs = peft.LoraConfig(r=4, lora_alpha=6, target_modules=SITES, init_lora_weights=name, **fields)
    graft = bind(model, config(name, **fields))
    other = peft.inject_adapter_in_model(theirs, copy.deepcopy(model))
    moved = away(graft.init())
    with torch.no_grad():
        for path, leaves in moved.items():
            for leaf, value in leaves.items():
                getattr(other.get_submodule(path), leaf)["default"].weight.copy_(value)
    outputs = []
    for f in (lambda x: graft(moved, x), other, lambda x: graft(route(stack([moved]), torch.zeros(6, dtype=int)), x)):
        torch.manual_seed(5)
        outputs.append(f(x))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-3, atol=1e-4)
    if not dropout:
        torch.testing.assert_close(outputs[2], outputs[1], rtol=1e-3, atol=1e-4)
    model.eval()
    twin = copy.deepcopy(model)
    twin.load_state_dict(merge(graft, moved))
    torch.testing.assert_close(graft(moved, x), twin(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(graft(graft.init(), x), model(x))
    rows = torch.tensor([0, -1, 0, -1, 0, 0])
    model.train()
    y = graft(route(stack([moved]), rows), x)
    assert torch.equal(y[rows < 0], model(x)[rows < 0])


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}], ids=str)
def test_a_stack_of_adapters_that_start_in_different_ways(fields):
    model, x = net(dtype=torch.float64), torch.randn(6, 12, dtype=torch.float64)
    kinds = [("pissa", 4), (True, 2), ("olora", 3), ("orthogonal", 2), ("loftq", 2), ("pissa_niter_2", 1)]
    members = [config(name, r=r, lora_alpha=r, **fields) for name, r in kinds]
    graft = bind(model, members)
    grafts = [bind(model, member) for member in members]
    trees = [away(one.init()) for one in grafts]
    many = graft.stack(trees)
    rows = torch.tensor([3, 1, 0, 2, 4, -1])
    y = graft(route(many, rows), x)
    for row, index in enumerate(rows.tolist()):
        expected = grafts[index](trees[index], x) if index >= 0 else model(x)
        torch.testing.assert_close(y[row], expected[row])
    alone = torch.vmap(lambda i, params: graft.at(i)(params, x))(torch.arange(len(kinds)), many)
    for own, one, tree in zip(alone, grafts, trees, strict=True):
        torch.testing.assert_close(own, one(tree, x))


def test_adapters_that_train_other_leaves_do_not_stack():
    words = "first: the configs train different leaves: ['lora_A'] and ['lora_A', 'lora_B']; bind them apart"
    with pytest.raises(ValueError, match=re.escape(words)):
        bind(net(), [config("mica"), config(True)])
    graft = bind(net(), [config("mica", r=r) for r in (2, 4)])
    assert {leaf: tuple(t.shape) for leaf, t in graft.init()["first"].items()} == {"lora_A": (2, 4, 12)}


# -- LoftQ -------------------------------------------------------------------------------------------------------------


def test_quantised_numbers():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 30, generator=generator)
    flat, given = weight.flatten(), quantise(weight, 4).flatten()
    levels = torch.tensor(NF4)
    for start in range(0, len(flat), 64):
        block = flat[start : start + 64]
        grid = levels * block.abs().max()
        nearest = grid[(block[:, None] - grid).abs().argmin(1)]
        torch.testing.assert_close(given[start : start + 64], nearest)
    whole = quantise(weight, 8) / (weight.abs().amax(1, keepdim=True) / 127)
    torch.testing.assert_close(whole, whole.round(), rtol=0, atol=1e-3)
    assert (quantise(weight, 8) - weight).abs().max() < (quantise(weight, 4) - weight).abs().max()
    assert not quantise(torch.zeros(3, 4), 4).any() and not quantise(torch.zeros(3, 4), 8).any()


@pytest.mark.parametrize("kind", ["linear", "transposed"])
@pytest.mark.parametrize("how", [{}, {"loftq_bits": 8}, {"loftq_iter": 3}], ids=str)
def test_loftqs_base_is_quantised_and_its_factors_restore_the_rest(how, kind):
    model = net(kind, torch.float64)
    before = copy.deepcopy(model.state_dict())
    graft = bind(model, config("loftq", lora_alpha=4, loftq_config=how))
    tree, x = graft.init(), torch.randn(5, 12, dtype=torch.float64)
    state = merge(graft, tree)
    for path in SITES:
        site = graft.sites[""][path]
        weight = site.canonical(before[f"{path}.weight"])
        quantised, a, b = loftq(weight, 4, how.get("loftq_bits", 4), how.get("loftq_iter", 1))
        torch.testing.assert_close(site.canonical(state[f"{path}.weight"]), quantised + b @ a, rtol=1e-12, atol=1e-12)
        left = torch.linalg.svdvals(weight - quantised)[4:].norm()
        torch.testing.assert_close((weight - quantised - b @ a).norm(), left)
    twin = copy.deepcopy(model)
    twin.load_state_dict(state)
    torch.testing.assert_close(graft(tree, x), twin(x), rtol=1e-12, atol=1e-12)
    rows = graft(route(stack([tree]), torch.tensor([0] * 4 + [-1])), x)
    torch.testing.assert_close(rows[:4], twin(x)[:4], rtol=1e-12, atol=1e-12)
    assert torch.equal(rows[4], model(x)[4])
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_loftq_says_when_its_factors_are_scaled():
    with pytest.warns(RuntimeWarning, match=re.escape("restore what quantising loses at 1; set lora_alpha to r")):
        bind(net(), config("loftq", lora_alpha=8))


# -- what cannot be ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("pissa", {"r": 9}, "r is 9 at second, whose weight is 8 x 10; 'pissa' needs r <= 8"),
        ("orthogonal", {"r": 3}, "r is 3 at first; 'orthogonal' needs an even r"),
        ("lora_ga", {"r": 6}, "'lora_ga' needs r <= 5"),
        ("corda", {}, "no statistics of first; use the config that fit_corda(model, config, batches) returns"),
        ("lora_ga", {}, "no statistics of first; use the config that fit_lora_ga(model, config, batches) returns"),
        (
            "corda",
            {"statistics": Statistics("corda", {"first": {"U": torch.ones(10, 3), "S": torch.ones(3)}})},
            "the statistics of first have U of shape (10, 3), expected (10, 4); call fit_corda again",
        ),
    ],
)
def test_what_does_not_fit_a_site(name, fields, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        bind(net(), config(name, **fields))


@pytest.mark.parametrize("name", ["pissa", "olora", "orthogonal", "mica", "loftq", "eva", "lora_ga"])
def test_kinds_of_module_that_an_initialisation_does_not_speak_of(name):
    words = f"init_lora_weights is {name!r}, which is for linear"
    with pytest.raises(ValueError, match=re.escape(words)):
        bind(nn.Sequential(nn.Conv2d(8, 8, 3)), config(name, target_modules=["0"]))


@pytest.mark.parametrize("name", ["eva", "lora_ga"])
def test_embeddings_start_as_plain_ones_where_peft_has_them_so(name):
    model = nn.Sequential(nn.Embedding(9, 6))
    with pytest.warns(RuntimeWarning, match="0 is an embedding, which starts as with True"):
        graft = bind(model, config(name, target_modules=["0"]))
    plain = bind(model, config(True, target_modules=["0"])).init(torch.Generator().manual_seed(0))
    given = graft.init(torch.Generator().manual_seed(0))
    assert all(torch.equal(given["0"][leaf], plain["0"][leaf]) for leaf in plain["0"])


def test_eva_without_statistics_starts_plain_and_says_so():
    graft = bind(net(), config("eva"))
    with pytest.warns(RuntimeWarning, match=re.escape("no statistics of 'first', 'second', which start as plain")):
        tree = graft.init(torch.Generator().manual_seed(0))
    assert not tree["first"]["lora_B"].any() and tree["first"]["lora_A"].any()


def test_weights_without_values():
    with torch.device("meta"):
        model = Net()
    with pytest.raises(ValueError, match="that of first is on the meta device; load the base first"):
        bind(model, config("pissa"))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"init_lora_weights": "pissa_niter_"}, "init_lora_weights is 'pissa_niter_', expected True,"),
        ({"init_lora_weights": "eva", "eva_config": {"rho": 0.5}}, "EvaConfig: rho is 0.5, expected a number of at"),
        ({"init_lora_weights": "eva", "eva_config": {"roh": 2}}, "eva_config is {'roh': 2}, expected a EvaConfig,"),
        ({"init_lora_weights": "corda", "corda_config": {"corda_method": "x"}}, "corda_method is 'x', expected 'ipm'"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 2}}, "loftq_bits is 2, expected 4 or 8"),
        ({"init_lora_weights": "lora_ga", "lora_ga_config": {"scale": 1}}, "LoraGAConfig: scale is 1, expected one of"),
        ({"statistics": Statistics("eva", {})}, "init_lora_weights is True, and statistics are for 'eva'"),
    ],
)
def test_bad_configs(fields, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        LoraConfig(**fields)


def test_a_config_of_another_initialisation_is_a_warning():
    with pytest.warns(UserWarning, match="eva_config has no effect, since init_lora_weights is True; set it to 'eva'"):
        LoraConfig(eva_config=EvaConfig())


def test_configs_in_json():
    own = EvaConfig(rho=1.5)
    fields = {"eva": own, "corda": CordaConfig(corda_method="kpm"), "lora_ga": LoraGAConfig(scale="unit")}
    for name, own in {**fields, "loftq": LoftQConfig(loftq_bits=8)}.items():
        statistics = None if name == "loftq" else Statistics(name, {})
        given = LoraConfig(init_lora_weights=name, statistics=statistics, **{f"{name}_config": own})
        saved = given.to_dict()
        assert isinstance(saved[f"{name}_config"], dict) and "statistics" not in saved
        again = LoraConfig.from_dict(saved)
        assert getattr(again, f"{name}_config") == own and again.statistics is None
        theirs = peft.LoraConfig(**{key: saved[key] for key in ("init_lora_weights", f"{name}_config", "r")})
        assert getattr(theirs, f"{name}_config") is not None
