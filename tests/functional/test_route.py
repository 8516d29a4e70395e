"""Rows of one batch with adapters of their own: where the rows are, which way is taken, what bad input gets."""

import re
import threading

import hypothesis.strategies as st
import optree
import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from torch import nn
from torch.utils.checkpoint import checkpoint

from torchgraft.adapters import IA3Config, LoraConfig, OFTConfig
from torchgraft.adapters._methods.shared.low_rank import add_routed, choose
from torchgraft.functional import PerAdapter, bind, functional_call, merge, route, stack, unstack, value_and_grad
from torchgraft.functional._rows import Rows

METHODS = {
    "lora": lambda targets: LoraConfig(r=2, target_modules=targets),
    "oft": lambda targets: OFTConfig(oft_block_size=2, target_modules=targets),
}


def several(graft, count=3, scale=0.3):
    generator = torch.Generator().manual_seed(0)
    return [
        optree.tree_map(lambda t: t + scale * torch.randn(t.shape, generator=generator, dtype=t.dtype), graft.init())
        for _ in range(count)
    ]


def mlp(dtype=torch.float64):
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def looped(graft, trees, x, rows, dim=0):
    outputs = [graft(trees[i], x) if i >= 0 else graft.model(x) for i in rows]
    return torch.stack([y.select(dim, row) for row, y in enumerate(outputs)], dim)


# -- values of rows ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@given(st.data(), st.integers(1, 4), st.integers(1, 7), st.sampled_from(["lora", "oft"]))
@settings(max_examples=40)
def test_any_rows(data, count, size, method):
    torch.manual_seed(0)
    graft = bind(mlp(), METHODS[method](["0", "2"]))
    trees = several(graft, count)
    rows = data.draw(st.lists(st.integers(-1, count - 1), min_size=size, max_size=size))
    x = torch.randn(size, data.draw(st.integers(1, 3)), 4, dtype=torch.float64)
    y = graft(route(stack(trees), torch.tensor(rows)), x)
    torch.testing.assert_close(y, looped(graft, trees, x, rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_written_to_after_route_are_read_again(dtype):
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)
    graft = bind(model, LoraConfig(r=4, target_modules=["0", "2"]))
    trees, x, rows = several(graft), torch.randn(4, 4, dtype=dtype), torch.tensor([0, 1, 1, 2])
    routed = route(stack(trees), rows)
    graft(routed, x)
    rows.copy_(torch.tensor([2, -1, 0, 2]))
    torch.testing.assert_close(graft(routed, x), looped(graft, trees, x, rows.tolist()))


def test_a_broken_adapter_spoils_only_its_own_rows():
    graft = bind(mlp(torch.float32), LoraConfig(r=4, target_modules=["0", "2"]))
    trees = several(graft)
    trees[0] = optree.tree_map(lambda t: torch.full_like(t, torch.nan), trees[0])
    x = torch.randn(6, 4)
    for rows in ([1, -1, 2, 1, 0, -1], [-1, 1, 0, 2, -1, 2], [0, 0, -1, -1, 1, 1]):
        y = graft(route(stack(trees), torch.tensor(rows)), x)
        assert [bool(row.isnan().any()) for row in y] == [i == 0 for i in rows]


def test_named_adapters_plain_routed_and_absent():
    model = mlp()
    configs = {
        "a": LoraConfig(r=2, target_modules=["0", "2"]),
        "b": OFTConfig(oft_block_size=2, target_modules=["0"]),
        "c": IA3Config(target_modules=["0", "2"]),
    }
    graft = bind(model, configs)
    trees, x = several(graft, 3), torch.randn(5, 4, dtype=torch.float64)
    many = stack(trees)
    rows = {"a": [0, 1, -1, 2, 1], "b": [2, -1, -1, 0, 0], "c": [1, 1, 1, -1, 0]}
    for routed in (["a"], ["b"], ["a", "b"], ["b", "c"], ["a", "b", "c"]):
        params = {name: route(many[name], torch.tensor(rows[name])) for name in routed}
        for plain in [name for name in configs if name not in routed]:
            both = {**params, plain: trees[0][plain]}
            expected = torch.stack(
                [
                    graft({plain: trees[0][plain], **{n: trees[rows[n][i]][n] for n in routed if rows[n][i] >= 0}}, x)[
                        i
                    ]
                    for i in range(5)
                ]
            )
            torch.testing.assert_close(graft(both, x), expected)
            torch.testing.assert_close(graft.view(both)(x), expected)
    together = graft(route(many, torch.tensor(rows["a"])), x)
    alone = graft({name: route(many[name], torch.tensor(rows["a"])) for name in configs}, x)
    torch.testing.assert_close(together, alone)
    with pytest.raises(ValueError, match=r"0: adapters are routed over \[3, 5\] rows in one call"):
        graft(
            {"a": route(many["a"], batch_dim=0), "b": route(many["b"], torch.tensor(rows["b"]), batch_dim=0)},
            torch.cat([x] * 3),
        )


def test_base_as_data():
    graft = bind(mlp(), LoraConfig(r=2, target_modules=["0", "2"]))
    trees, x, rows = several(graft), torch.randn(4, 4, dtype=torch.float64), [2, 0, -1, 1]
    base = {"0.weight": torch.randn(6, 4, dtype=torch.float64)}
    y = functional_call(graft, (base, route(stack(trees), torch.tensor(rows))), (x,))
    plain = [functional_call(graft, (base, trees[i]), (x,)) for i in (2, 0, 1)]
    torch.testing.assert_close(y[[0, 1, 3]], torch.stack([plain[0][0], plain[1][1], plain[2][3]]))


def test_threads_route_side_by_side():
    graft = bind(mlp(), LoraConfig(r=2, target_modules=["0", "2"]))
    trees, x, wrong = several(graft), torch.randn(4, 3, 4, dtype=torch.float64), []
    many = stack(trees)

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(20):
            rows = torch.randint(-1, 3, (4,), generator=generator)
            expected = looped(graft, trees, x, rows.tolist())
            if not torch.allclose(graft(route(many, rows), x), expected):
                wrong.append(rows)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# -- which way is taken --------------------------------------------------------------------------------------------

WAYS = {
    "in order": ([0, 1, 2], 1, torch.float32, "equal groups"),
    "one adapter": ([1, 1, 1, 1], 1, torch.float32, "equal groups"),
    "base alone": ([-1, -1], 1, torch.float32, "equal groups"),
    "many tokens": ([2, 0, 0, 1], 32, torch.float32, "equal groups"),
    "few tokens": ([2, 0, 1, 0, 2, 1], 2, torch.float32, "padded groups"),
    "few tokens, an empty slot": ([2, 0, 0, 1, 2], 2, torch.float64, "padded groups"),
    "few tokens, some of the base": ([2, -1, 0, -1], 2, torch.float32, "padded groups"),
    "uneven": ([2, 0, 0, 0, 0, 1], 2, torch.float32, "grouped product"),
    "uneven, some of the base": ([2, -1, 0, 0, 0, 0, -1], 2, torch.float32, "grouped product"),
    "uneven, float64": ([2, 0, 0, 0, -1, 1], 2, torch.float64, "segments"),
}


@pytest.mark.parametrize("case", WAYS)
@pytest.mark.parametrize("per_adapter", [False, True])
def test_every_way_is_the_loop(case, per_adapter):
    values, tokens, dtype, way = WAYS[case]
    a, b = torch.randn(3, 4, 8, dtype=dtype), torch.randn(3, 12, 4, dtype=dtype)
    x, y = torch.randn(len(values), tokens, 8, dtype=dtype), torch.randn(len(values), tokens, 12, dtype=dtype)
    rows = Rows(torch.tensor(values), 3)
    assert choose(rows, x, a, b) == way
    scales = torch.tensor([1.0, 2.0, 3.0], dtype=dtype) if per_adapter else torch.full((3,), 2.0, dtype=dtype)
    leaves = [t.requires_grad_() for t in (x, y, a, b)]
    given = add_routed(y, x, a, b, PerAdapter(scales) if per_adapter else 2.0, rows)
    expected = torch.stack(
        [y[i] + (scales[v] * x[i] @ a[v].mT @ b[v].mT if v >= 0 else 0) for i, v in enumerate(values)]
    )
    torch.testing.assert_close(given, expected)
    seed = torch.randn_like(given)
    grads = [torch.autograd.grad((out * seed).sum(), leaves, materialize_grads=True) for out in (given, expected)]
    torch.testing.assert_close(*grads)


def test_ways_without_values_or_alignment():
    a, b, x = torch.randn(3, 3, 8), torch.randn(3, 12, 3), torch.randn(6, 8)
    rows = Rows(torch.tensor([2, 0, 0, 0, -1, 1]), 3)
    assert choose(rows, x, a, b) == "segments", "rank 3 is no whole number of 16 bytes"
    ways = []
    torch.vmap(lambda i: ways.append(choose(Rows(i, 3), x, a, b)) or i)(torch.tensor([[2, 0, 0, 0, -1, 1]]))
    assert ways == ["equal groups"], "values of a vmapped index cannot be read"


# -- where the rows are --------------------------------------------------------------------------------------------


class Folding(nn.Module):
    """Rearranges rows before and after a site as windows, sequence-first layers, beams and packers do."""

    def __init__(self, fold):
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 3)
        self.fold = fold

    def forward(self, x):
        there, back = FOLDS[self.fold]
        return self.outer(back(self.inner(there(x)).tanh(), x))


FOLDS = {
    "none": (lambda x: x, lambda y, x: y),
    "sequence first": (lambda x: x.transpose(0, 1), lambda y, x: y.transpose(0, 1)),
    "tokens": (lambda x: x.flatten(0, 1), lambda y, x: y.view(x.shape)),
    "packed": (lambda x: x.flatten(0, 1)[None], lambda y, x: y.view(x.shape)),
    "windows": (lambda x: x.unflatten(1, (2, -1)).flatten(0, 1), lambda y, x: y.unflatten(0, (-1, 2)).flatten(1, 2)),
    "twice": (lambda x: torch.cat([x, x * 2]), lambda y, x: sum(y.chunk(2))),
    "tokens, sequence first": (
        lambda x: x.transpose(0, 1).flatten(0, 1),
        lambda y, x: y.view(x.shape[1], x.shape[0], -1).transpose(0, 1),
    ),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fold", FOLDS)
@pytest.mark.parametrize("identical", [False, True])
def test_rows_are_found_wherever_the_model_puts_them(fold, method, identical):
    graft = bind(Folding(fold).double(), METHODS[method](["inner", "outer"]))
    trees = several(graft)
    many = stack(trees)
    for size, length in ((4, 4), (4, 8), (2, 6), (1, 6), (4, 6)):
        x = torch.randn(1 if identical else size, length, 4, dtype=torch.float64).expand(size, -1, -1)
        rows = torch.arange(size) % 4 - 1
        y = graft(route(many, rows), x)
        torch.testing.assert_close(y, looped(graft, trees, x, rows.tolist()))
        torch.testing.assert_close(graft.view(route(many, rows))(x), y)


def test_parts_are_found_too():
    graft = bind(Folding("sequence first").double(), LoraConfig(r=2, target_modules=["inner", "outer"]))
    trees, x = several(graft), torch.randn(6, 6, 4, dtype=torch.float64)
    expected = looped(graft, trees, x, [0, 0, 1, 1, 2, 2])
    torch.testing.assert_close(graft(route(stack(trees)), x), expected)


def test_shared_positions():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.places, self.head = nn.Embedding(7, 4), nn.Embedding(9, 4), nn.Linear(4, 3)

        def forward(self, ids):
            places = torch.arange(ids.shape[1])[None]
            return self.head(self.words(ids) + self.places(places))

    graft = bind(Model().double(), LoraConfig(r=2, target_modules=["words", "places", "head"]))
    trees, ids = several(graft), torch.randint(7, (4, 5))
    rows = [2, -1, 0, 2]
    y = graft(route(stack(trees), torch.tensor(rows)), ids)
    torch.testing.assert_close(y, looped(graft, trees, ids, rows))


@pytest.mark.slow
def test_a_compiled_call_knows_what_an_earlier_one_saw():
    graft = bind(Folding("sequence first"), LoraConfig(r=2, target_modules=["inner", "outer"]))
    trees, x, rows = several(graft), torch.randn(4, 8, 4), torch.tensor([2, 0, -1, 1])
    f = torch.compile(lambda rows: graft(route(stack(trees), rows), x), fullgraph=True, backend="aot_eager")
    words = r"(?s)inner: its input has shape \(8, 4, 4\).*along axis 0 or axis 1.*call the graft once.*batch_dim=0"
    with pytest.raises(Exception, match=words):
        f(rows)
    y = graft(route(stack(trees), rows), x)
    torch._dynamo.reset()
    torch.testing.assert_close(f(rows), y)


def test_a_declared_axis():
    graft = bind(mlp(), LoraConfig(r=2, target_modules=["0", "2"]))
    trees, x, rows = several(graft), torch.randn(4, 4, 4, dtype=torch.float64), [2, 0, -1, 1]
    for axis in (0, 1, -2):
        y = graft(route(stack(trees), torch.tensor(rows), batch_dim=axis), x)
        torch.testing.assert_close(y, looped(graft, trees, x, rows, dim=axis))
    words = "0: its input has shape (3, 4, 4), and route(..., batch_dim=0) asks for 4 rows, or a multiple, along axis 0"
    with pytest.raises(ValueError, match=re.escape(words)):
        graft(route(stack(trees), torch.tensor(rows), batch_dim=0), x[:3])


class Experts(nn.Module):
    """Picks rows by their values."""

    def __init__(self):
        super().__init__()
        self.expert = nn.Linear(4, 4)

    def forward(self, x):
        picked = x[:, 0] > 0
        return x.index_put((picked,), self.expert(x[picked]))


def test_rows_that_cannot_be_found_are_an_error():
    graft = bind(Experts().double(), LoraConfig(r=2, target_modules=["expert"]))
    many, x = stack(several(graft)), torch.ones(4, 4, dtype=torch.float64)
    x[1:, 0] = -1
    x[3] = 0.5
    with pytest.raises(ValueError, match=r"expert: its input has shape \(2, 4\) where.*its input does not follow them"):
        graft(route(many, torch.tensor([0, 1, 2, 0])), x)
    graft = bind(mlp(), LoraConfig(r=2, target_modules=["0", "2"]))
    with pytest.raises(ValueError, match=r"no tensor of its inputs has 2 rows.*Give rows one index for each row"):
        graft(route(stack(several(graft)), torch.tensor([0, 1])), torch.randn(3, 4, dtype=torch.float64))
    routed = route(stack(several(graft)), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"0: its input has shape \(2, 4\).*along axis 0.*, and it is not known"):
        torch.vmap(lambda x: graft(routed, x))(torch.randn(2, 2, 4, dtype=torch.float64))


def test_looking_leaves_no_trace():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.norm, self.calls = nn.Linear(4, 4), nn.BatchNorm1d(4), []
            self.drop = nn.Dropout(0.5)

        def forward(self, x, cache):
            cache.append(x.shape)
            self.calls.append(self.training)
            return self.norm(self.inner(self.drop(x)).transpose(1, 2))

    model, cache = Model(), []
    model.norm.eval()
    graft = bind(model, LoraConfig(r=2, target_modules=["inner"]))
    many, x = stack(several(graft)), torch.randn(4, 8, 4)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(3)
    y = graft(route(many, torch.tensor([0, 1, 2, 0]), batch_dim=0), x, [])
    torch.manual_seed(3)
    torch.testing.assert_close(graft(route(many, torch.tensor([0, 1, 2, 0])), x, cache), y)
    assert cache == [x.shape] and model.calls == [] and model.training and not model.norm.training
    torch.testing.assert_close(dict(model.state_dict()), state)


# -- real models ---------------------------------------------------------------------------------------------------


def llama(**settings):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        vocab_size=31,
        eos_token_id=None,
        **settings,
    )
    return transformers.LlamaForCausalLM(config).double()


def adapted_llama(method="lora", count=3):
    graft = bind(llama().eval(), METHODS[method](["q_proj", "v_proj", "down_proj"]))
    return graft, several(graft, count, 1.0 if method == "lora" else 0.3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(4, 7), (4, 4), (4, 8)])
@pytest.mark.parametrize("masked", [False, True])
def test_a_transformer_with_attention_masks(method, shape, masked):
    graft, trees = adapted_llama(method)
    ids, rows = torch.randint(31, shape), [2, -1, 0, 2]
    mask = torch.ones_like(ids)
    mask[1, :2] = mask[3, :1] = 0
    inputs = {"input_ids": ids, "use_cache": False} | ({"attention_mask": mask} if masked else {})
    y = graft(route(stack(trees), torch.tensor(rows)), **inputs).logits
    plain = [graft(trees[i], **inputs).logits if i >= 0 else graft.model(**inputs).logits for i in rows]
    torch.testing.assert_close(y, torch.stack([own[row] for row, own in enumerate(plain)]))


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("length", [4, 5])
def test_generation_row_by_row(length, beams):
    graft, trees = adapted_llama()
    ids, rows = torch.randint(31, (4, length)), [2, -1, 0, 2]
    how = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "pad_token_id": 0, "use_cache": True}
    own = graft.view(route(stack(trees), torch.tensor(rows))).generate(ids, **how)
    for row, i in enumerate(rows):
        model = graft.view(trees[i]) if i >= 0 else graft.model
        assert torch.equal(own[row], model.generate(ids[row : row + 1], **how)[0])
    assert len({tuple(o[length:].tolist()) for o in own}) > 1
    same = ids[:1].expand(4, -1)
    own = graft.view(route(stack(trees), torch.tensor(rows))).generate(same, **how)
    assert torch.equal(own[0], own[3]) and not torch.equal(own[0], own[1])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("method", METHODS)
def test_training_with_checkpointing_and_compile(method):
    graft, trees = adapted_llama(method)
    ids, rows = torch.randint(31, (4, 8)), torch.tensor([2, -1, 0, 2])
    many = stack(trees)

    def losses(many, rows):
        logits = graft(route(many, rows), input_ids=ids, use_cache=False).logits
        return F.cross_entropy(logits.transpose(1, 2), ids, reduction="none").mean(1)

    def one(tree):
        logits = graft(tree, input_ids=ids, use_cache=False).logits
        return F.cross_entropy(logits.transpose(1, 2), ids, reduction="none").mean(1)

    _, grads = value_and_grad(lambda many: losses(many, rows).sum())(many)
    picked = {0: [2], 1: [], 2: [0, 3]}
    for i, own in enumerate(unstack(grads)):
        _, expected = value_and_grad(lambda tree, i=i: one(tree)[picked[i]].sum())(trees[i])
        torch.testing.assert_close(own, expected)
    torch.testing.assert_close(torch.func.grad(lambda many: losses(many, rows).sum())(many), grads)
    torch._dynamo.reset()
    f = torch.compile(losses, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(f(many, rows), losses(many, rows))
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(f(many, rows.flip(0)), losses(many, rows.flip(0)))
    graft.model.gradient_checkpointing_enable({"use_reentrant": False})
    graft.model.train()
    _, again = value_and_grad(lambda many: losses(many, rows).sum())(many)
    torch.testing.assert_close(again, grads)


def test_checkpointing_of_a_plain_module():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp()

        def forward(self, x):
            return checkpoint(self.body, x, use_reentrant=False)

    for method in METHODS.values():
        graft = bind(Model(), method(["body.0", "body.2"]))
        trees, x = several(graft), torch.randn(4, 4, dtype=torch.float64)
        many = optree.tree_map(lambda t: t.requires_grad_(), stack(trees))
        sums = [graft(route(many, torch.tensor(rows)), x).square().sum() for rows in ([0, 1, 2, 2], [2, -1, 2, 0])]
        sum(sums).backward()
        plain = bind(mlp().requires_grad_(False), method(["0", "2"]))
        plain.model.load_state_dict(graft.model.body.state_dict())
        flat = {path.removeprefix("body."): leaves for path, leaves in many.items()}
        total = sum(plain(route(flat, torch.tensor(rows)), x).square().sum() for rows in ([0, 1, 2, 2], [2, -1, 2, 0]))
        leaves = optree.tree_leaves(many)
        torch.testing.assert_close([leaf.grad for leaf in leaves], list(torch.autograd.grad(total, leaves)))


@pytest.mark.parametrize("method", METHODS)
def test_dropout_is_on_in_training_and_differs_by_row(method):
    config = {
        "lora": LoraConfig(r=2, lora_dropout=0.5, target_modules=["0"]),
        "oft": OFTConfig(oft_block_size=2, module_dropout=0.5, target_modules=["0"]),
    }[method]
    graft = bind(nn.Sequential(nn.Linear(8, 8)), config)
    trees, x = several(graft, 2), torch.randn(1, 8).expand(16, -1)
    routed = route(stack(trees), torch.arange(16) % 2)
    assert len({tuple(row.tolist()) for row in graft(routed, x)}) > 8
    graft.model.eval()
    torch.testing.assert_close(graft(routed, x)[::2], graft(trees[0], x)[::2])


def test_models_that_read_a_weight():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(4, 5, 8)
    graft = bind(model, LoraConfig(r=2, target_modules=["linear1", "linear2"]))
    trees, rows = several(graft), [2, -1, 0, 2]
    with torch.no_grad():
        y = graft(route(stack(trees), torch.tensor(rows)), x)
        torch.testing.assert_close(y, looped(graft, trees, x, rows), rtol=1e-4, atol=1e-5)
    graft = bind(model, LoraConfig(r=2, target_modules=["out_proj"]))
    with pytest.raises(RuntimeError, match=r"self_attn\.out_proj: the model reads the weight of this module instead"):
        graft(route(stack(several(graft)), torch.tensor(rows)), x)
    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=16,
        d_kv=4,
        d_ff=24,
        num_layers=1,
        num_heads=4,
        vocab_size=31,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    t5 = transformers.T5ForConditionalGeneration(config).eval()
    graft = bind(t5, LoraConfig(r=2, target_modules=["q", "wo"]))
    trees, ids = several(graft), torch.randint(31, (4, 6))
    with pytest.raises(ValueError, match=r"rows meet in the output 'loss'.*mixed=\['loss'\]"):
        graft(route(stack(trees), torch.tensor(rows)), input_ids=ids, labels=ids)
    y = graft(route(stack(trees), torch.tensor(rows), mixed=["loss"]), input_ids=ids, labels=ids).logits
    plain = [graft(trees[i], input_ids=ids, labels=ids) if i >= 0 else t5(input_ids=ids, labels=ids) for i in rows]
    torch.testing.assert_close(y, torch.stack([own.logits[row] for row, own in enumerate(plain)]), rtol=1e-3, atol=1e-4)


# -- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "error", "words"),
    [
        ("01", TypeError, "route: rows is of type str, expected a tensor: torch.tensor(rows)"),
        (torch.zeros(2), ValueError, "route: rows has shape (2,) and dtype torch.float32, expected one long index"),
        (torch.zeros(2, 1, 1, dtype=torch.long), ValueError, "route: rows has shape (2, 1, 1) and dtype torch.int64"),
        (torch.zeros(0, dtype=torch.long), ValueError, "route: rows is empty, expected one index for each row"),
        (torch.tensor([0, 3]), ValueError, "route: rows[1] is 3, expected an index of one of the 3 adapters"),
        (torch.tensor([-2, 3]), ValueError, "route: rows[0] is -2, expected an index of one of the 3 adapters"),
    ],
)
def test_bad_rows(rows, error, words):
    graft = bind(mlp(), LoraConfig(r=2, target_modules=["0", "2"]))
    with pytest.raises(error, match=re.escape(words)):
        route(stack(several(graft)), rows)


def test_bad_stacks():
    graft = bind(mlp(), LoraConfig(r=2, target_modules=["0", "2"]))
    many, x, rows = stack(several(graft)), torch.randn(2, 4, dtype=torch.float64), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"params\['0'\]\['lora_A'\] has shape \(2, 4\), expected \(2, 2, 4\)"):
        graft(route(several(graft)[0], rows), x)
    with pytest.raises(KeyError, match=r"params lacks site '2'"):
        graft(route({"0": many["0"]}, rows), x)
    with pytest.raises(ValueError, match="route: the stacked tree has no leaves with a leading axis"):
        route({}, rows)
    with pytest.raises(TypeError, match="route: got a NoneType among the stacked tree's leaves"):
        route({"0": {"lora_A": None}}, rows)
    with pytest.raises(TypeError, match=r"merge: got a routed stack, expected the tree of one adapter"):
        merge(graft, route(many, rows))
    with pytest.raises(KeyError, match="params has unknown adapter '0'"):
        bind(mlp(), {"a": LoraConfig(r=2, target_modules=["0"])})(route(many, rows), x)


@pytest.mark.slow
def test_compiled_rows_out_of_range_are_an_error():
    graft = bind(mlp(torch.float32), LoraConfig(r=2, target_modules=["0", "2"]))
    many, x = stack(several(graft)), torch.randn(2, 4)
    f = torch.compile(lambda rows: graft(route(many, rows), x), fullgraph=True, backend="aot_eager")
    graft.look(x)
    f(torch.tensor([0, 1]))
    with pytest.raises(RuntimeError, match="a row's index is outside of -1 to 2, the 3 adapters in the stack"):
        f(torch.tensor([0, -2]))
