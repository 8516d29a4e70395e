"""Rows with two axes: each token with an adapter of its own, where the model has its tokens, or an error."""

import re

import optree
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from torchgraft.adapters import AdaLoraConfig, IA3Config, LoHaConfig, LoraConfig, OFTConfig, VeraConfig
from torchgraft.functional import bind, route, stack, unstack, value_and_grad

METHODS = {
    "lora": lambda targets: LoraConfig(r=2, target_modules=targets),
    "dora": lambda targets: LoraConfig(r=2, target_modules=targets, use_dora=True),
    "bias": lambda targets: LoraConfig(r=2, target_modules=targets, lora_bias=True),
    "ia3": lambda targets: IA3Config(target_modules=targets, feedforward_modules=[]),
    "adalora": lambda targets: AdaLoraConfig(target_r=2, init_r=2, total_step=9, target_modules=targets),
    "oft": lambda targets: OFTConfig(oft_block_size=2, target_modules=targets),
    "vera": lambda targets: VeraConfig(r=4, target_modules=targets),
    "loha": lambda targets: LoHaConfig(r=2, target_modules=targets),
}
F64 = {"rtol": 1e-10, "atol": 1e-10}


def several(graft, count=3, scale=0.3):
    generator = torch.Generator().manual_seed(0)
    return [
        optree.tree_map(lambda t: t + scale * torch.randn(t.shape, generator=generator, dtype=t.dtype), graft.init())
        for _ in range(count)
    ]


def made(model, method="lora", targets=("proj",)):
    graft = bind(model, METHODS[method](list(targets)))
    trees = several(graft)
    return graft, trees, stack(trees)


def each_alone(graft, trees, x, rows):
    """The outputs of a model that works token by token, each token from a call with its adapter alone."""
    outputs = torch.stack([*(graft(tree, x) for tree in trees), graft.model(x)])
    return outputs[rows, torch.arange(len(x))[:, None], torch.arange(x.shape[1])]


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()


X = torch.randn(3, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
ROWS = torch.randint(-1, 3, (3, 7), generator=torch.Generator().manual_seed(2))


# -- packed sequences -------------------------------------------------------------------------------------------------


def llama(attention="sdpa"):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        vocab_size=31,
        attn_implementation=attention,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config).double().eval()


def packed(*rows):
    """Lengths of the documents of each row, as position ids and as a mask that keeps them apart."""
    documents = torch.stack([torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)]) for lengths in rows])
    positions = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in rows])
    length = documents.shape[1]
    sees = (documents[:, :, None] == documents[:, None]) & torch.ones(length, length, dtype=torch.bool).tril()
    mask = torch.zeros(sees.shape, dtype=torch.float64).masked_fill(~sees, torch.finfo(torch.float64).min)
    return positions, mask.unsqueeze(1)


LENGTHS = ([4, 5, 2], [3, 3, 5])
TENANTS = ([1, -1, 2], [0, 2, 1])
TARGETS = ["embed_tokens", "q_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "lm_head"]


def per_token(tenants=TENANTS, lengths=LENGTHS):
    return torch.tensor(
        [
            [i for i, n in zip(row, sizes, strict=True) for _ in range(n)]
            for row, sizes in zip(tenants, lengths, strict=True)
        ]
    )


def documents(model, trees, ids):
    """Each document's logits alone, with its own adapter: `model(tree or None, ids)`."""
    rows = []
    for row, (tenants, lengths) in enumerate(zip(TENANTS, LENGTHS, strict=True)):
        parts = ids[row].split(lengths)
        each = [
            model(None if i < 0 else trees[i], input_ids=part[None]).logits[0]
            for i, part in zip(tenants, parts, strict=True)
        ]
        rows.append(torch.cat(each))
    return torch.stack(rows)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", ["lora", "dora", "oft"])
def test_packed_documents_are_each_alone_with_its_own_adapter(method, attention):
    targets = TARGETS if method == "lora" else TARGETS[1:-1]
    graft, trees, many = made(llama(attention), method, targets)
    ids = torch.randint(31, (2, 11))
    positions, mask = packed(*LENGTHS)
    inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": mask}

    def alone(tree, **inputs):
        return graft.model(**inputs) if tree is None else graft(tree, **inputs)

    y = graft(route(many, per_token()), **inputs).logits
    expected = documents(alone, trees, ids)
    torch.testing.assert_close(y, expected, **F64)
    torch.testing.assert_close(graft.view(route(many, per_token()))(**inputs).logits, y, **F64)
    seed = torch.randn_like(y)
    _, grads = value_and_grad(lambda many: (graft(route(many, per_token()), **inputs).logits * seed).sum())(many)
    _, each = value_and_grad(lambda many: (documents(alone, unstack(many), ids) * seed).sum())(many)
    torch.testing.assert_close(grads, each, **F64)


def test_one_packed_row():
    graft, trees, many = made(llama(), "lora", TARGETS)
    ids = torch.randint(31, (1, 11))
    positions, mask = packed(LENGTHS[0])
    y = graft(
        route(many, per_token(TENANTS[:1], LENGTHS[:1])), input_ids=ids, position_ids=positions, attention_mask=mask
    )
    expected = [
        (graft.model if i < 0 else graft.view(trees[i]))(input_ids=part[None]).logits[0]
        for i, part in zip(TENANTS[0], ids[0].split(LENGTHS[0]), strict=True)
    ]
    torch.testing.assert_close(y.logits[0], torch.cat(expected), **F64)


def test_a_prompt_and_its_answer_with_adapters_of_their_own():
    """A causal model without a mask: the prompt is as with its adapter alone, and what follows sees it."""
    graft, trees, many = made(llama(), "lora", TARGETS)
    ids = torch.randint(31, (2, 9))
    rows = torch.tensor([[0] * 5 + [1] * 4, [2] * 5 + [-1] * 4])
    y = graft(route(many, rows), input_ids=ids).logits
    for row, first in enumerate((0, 2)):
        torch.testing.assert_close(y[row, :5], graft(trees[first], input_ids=ids).logits[row, :5], **F64)
    # With keys and values of the prompt from its own adapter, the rest is a call with the other one.
    cache = graft(trees[0], input_ids=ids[:1, :5], use_cache=True).past_key_values
    rest = graft(trees[1], input_ids=ids[:1, 5:], cache=cache, use_cache=True).logits
    torch.testing.assert_close(y[:1, 5:], rest, **F64)


def test_steps_with_a_cache_give_the_rows_of_their_own_tokens():
    graft, _, many = made(llama(), "lora", TARGETS)
    ids, rows = torch.randint(31, (2, 9)), torch.randint(-1, 3, (2, 9))
    whole = graft(route(many, rows), input_ids=ids).logits
    first = graft(route(many, rows[:, :5]), input_ids=ids[:, :5], use_cache=True)
    rest = {"input_ids": ids[:, 5:], "cache": first.past_key_values, "use_cache": True}
    with pytest.raises(ValueError, match="rows has 2 x 9, the inputs have 2 x 4"):
        graft(route(many, rows), **rest)
    y = graft(route(many, rows[:, 5:]), **rest).logits
    torch.testing.assert_close(torch.cat([first.logits, y], 1), whole, **F64)
    before = graft(route(many, rows[:, :8]), input_ids=ids[:, :8], use_cache=True).past_key_values
    last = {"input_ids": ids[:, 8:], "cache": before, "use_cache": True}
    torch.testing.assert_close(graft(route(many, rows[:, 8:]), **last).logits, whole[:, 8:], **F64)


# Eager attention of this model in float64 gives NaN by itself for padding on the left.
@pytest.mark.parametrize(("side", "attention"), [("left", "sdpa"), ("right", "sdpa"), ("right", "eager")])
def test_padding_is_no_token(side, attention):
    """A row whose padding sees and is seen as no token is: its documents are as without padding."""
    graft, _, many = made(llama(attention), "lora", TARGETS)
    ids, mask, rows = torch.randint(31, (2, 9)), torch.ones(2, 9, dtype=torch.long), torch.randint(-1, 3, (2, 9))
    kept = [slice(2, None), slice(3, None)] if side == "left" else [slice(7), slice(6)]
    for row, part in enumerate(kept):
        mask[row] = 0
        mask[row, part] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for _ in range(2):
        y = graft(route(many, rows), input_ids=ids, attention_mask=mask, position_ids=positions).logits
        for row, part in enumerate(kept):
            alone = graft(route(many, rows[row : row + 1, part]), input_ids=ids[row : row + 1, part]).logits
            torch.testing.assert_close(y[row, part], alone[0], **F64)


class Encoder(nn.Module):
    """Attention that looks both ways, where a mask lets it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.v, self.proj = (nn.Linear(6, 6).double() for _ in range(3))

    def forward(self, x, mask=None):
        y = F.scaled_dot_product_attention(self.q(x), x, self.v(x), mask)
        return self.proj(x + y)


def test_attention_both_ways_is_followed_where_a_mask_keeps_documents_apart():
    graft, trees, many = made(Encoder(), "lora", ["q", "v", "proj"])

    def both(x, lengths):
        documents = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])
        mask = (documents[:, None] == documents).expand(len(x), -1, -1)
        rows = torch.stack([documents, (documents + 1) % 3 - 1, 2 - documents])[: len(x)]
        y = graft(route(many, rows), x, mask)
        for row in range(len(x)):
            for part, z in zip(x[row].split(lengths), y[row].split(lengths), strict=True):
                i = int(rows[row][(x[row] == part[0]).all(1)][0])
                alone = graft(trees[i], part[None]) if i >= 0 else graft.model(part[None])
                torch.testing.assert_close(z, alone[0], **F64)

    both(X, [3, 2, 2])
    both(X[:, :6], [1, 4, 1])
    for lengths in ([3, 4], [2, 3, 2], [1, 6]):
        both(X, lengths)
    with pytest.raises(ValueError, match=r"proj: its input.*does not follow the 7 tokens.*mixes tokens"):
        graft(route(many, ROWS), X)
    y = graft(route(many, torch.ones_like(ROWS), batch_dim=0, tokens_dim=1), X)
    torch.testing.assert_close(y, graft(trees[1], X), **F64)


# -- token by token ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_token_has_its_own_adapter(method):
    graft, _, many = made(mlp(), method, ["0", "2"])
    leaves = optree.tree_map(lambda t: t.clone().requires_grad_(), many)
    expected = each_alone(graft, unstack(leaves), X, ROWS)
    flat, seed = optree.tree_leaves(leaves), torch.randn_like(expected)
    grads = torch.autograd.grad((expected * seed).sum(), flat, materialize_grads=True)
    for rows in (ROWS, ROWS.int(), ROWS.tolist()):
        y = graft(route(leaves, rows), X)
        torch.testing.assert_close(y, expected, **F64)
        torch.testing.assert_close(torch.autograd.grad((y * seed).sum(), flat), grads, **F64)
    assert torch.equal(y[ROWS < 0], graft.model(X)[ROWS < 0])
    given = torch.func.grad(lambda many: (graft(route(many, ROWS), X) * seed).sum())(many)
    torch.testing.assert_close(optree.tree_leaves(given), list(grads), **F64)
    torch.testing.assert_close(graft.view(route(many, ROWS))(X), expected.detach(), **F64)


@pytest.mark.parametrize(
    "rows", [[[0] * 7] * 3, [[1, 1, 2, 2, 0, 0, -1]] * 3, [[-1] * 7] * 3, [[2, 0, 1, 0, 2, 1, 0]] * 3]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_rows_in_any_precision(rows, dtype):
    graft, trees, many = made(mlp().to(dtype), "lora", ["0", "2"])
    x, rows = X.to(dtype), torch.tensor(rows)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 5e-2}
    y = graft(route(many, rows), x)
    torch.testing.assert_close(y, each_alone(graft, trees, x, rows), **tolerance)
    assert torch.equal(y[rows < 0], graft.model(x)[rows < 0])


def test_stacks_of_different_ranks_and_named_adapters():
    model, configs = mlp(), [LoraConfig(r=r, target_modules=targets) for r, targets in ((2, ["0"]), (4, ["0", "2"]))]
    graft = bind(model, configs)
    trees = [several(graft.member(i), 1)[0] for i in range(2)]
    outputs = torch.stack([*(graft.member(i)(tree, X) for i, tree in enumerate(trees)), model(X)])
    rows = ROWS.clamp(max=1)
    expected = outputs[rows, torch.arange(3)[:, None], torch.arange(7)]
    torch.testing.assert_close(graft(route(graft.stack(trees), rows), X), expected, **F64)

    graft = bind(model, {name: METHODS[name](["0", "2"]) for name in ("lora", "oft", "ia3")})
    trees = several(graft)
    many = stack(trees)
    other = ROWS.flip(1)
    y = graft({"lora": route(many["lora"], ROWS), "oft": route(many["oft"], other), "ia3": trees[1]["ia3"]}, X)
    for i in range(3):
        for j in range(7):
            on = {"lora": ROWS[i, j], "oft": other[i, j], "ia3": torch.tensor(1)}
            alone = graft({name: trees[k][name] for name, k in on.items() if k >= 0}, X[i : i + 1, j : j + 1])
            torch.testing.assert_close(y[i, j], alone[0, 0], **F64)
    with pytest.raises(ValueError, match=r"routed over rows of 7 and of 1 tokens in one call; give each of them rows"):
        graft({"lora": route(many["lora"], ROWS), "oft": route(many["oft"], ROWS[:, 0])}, X)


def test_nothing_of_a_broken_token_or_adapter_reaches_another():
    graft, _, many = made(mlp(), "lora", ["0", "2"])
    x, rows = X.clone(), torch.tensor([[0, 1, 1, 2, -1, 1, 2]] * 3)
    x[0, 0] = torch.nan
    many = optree.tree_map(lambda t: t.clone(), many)
    for leaf in optree.tree_leaves(many):
        leaf[2] = torch.inf
    leaves = optree.tree_map(lambda t: t.clone().requires_grad_(), many)
    y = graft(route(leaves, rows), x)
    broken = rows == 2
    broken[0, 0] = True
    assert y[~broken].isfinite().all() and not y[broken].isfinite().all(-1).any()
    grads = torch.autograd.grad(y[rows == 1].sum(), optree.tree_leaves(leaves))
    assert all(gradient[1].isfinite().all() for gradient in grads)


def test_rows_written_to_are_what_the_next_call_uses():
    graft, trees, many = made(mlp(), "lora", ["0", "2"])
    rows = ROWS.clone()
    routed = route(many, rows)
    view = graft.view(routed)
    assert repr(routed) == "Routed(3 adapters, 3 rows of 7 tokens)"
    for values in (ROWS, ROWS.flip(1), ROWS.roll(1, 0)):
        rows.copy_(values)
        for call in (lambda: graft(routed, X), lambda: view(X)):
            torch.testing.assert_close(call(), each_alone(graft, trees, X, values), **F64)
    rows[1, 3] = 9
    with pytest.raises(ValueError, match=r"rows\[1, 3\] is 9, expected an index of one of the 3 adapters"):
        graft(routed, X)


# -- where tokens are -------------------------------------------------------------------------------------------------


class Around(nn.Module):
    """A linear layer with something before and something after it, under one that is at the input."""

    def __init__(self, before=lambda x: x, after=lambda y: y):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.proj, self.before, self.after = nn.Linear(6, 6), nn.Linear(6, 6), before, after
        self.double()

    def forward(self, x):
        y = self.first(x)
        return self.after(self.proj(self.before(y).clone()).view_as(self.before(y)))


FOLLOWED = {
    "as it is": (lambda x: x, lambda y: y),
    "tokens first": (lambda x: x.transpose(0, 1), lambda y: y.transpose(0, 1)),
    "flattened": (lambda x: x.flatten(0, 1), lambda y: y.view(-1, 7, 6)),
    "flattened, tokens first": (
        lambda x: x.transpose(0, 1).flatten(0, 1),
        lambda y: y.view(7, -1, 6).transpose(0, 1),
    ),
    "packed into one row": (lambda x: x.flatten(0, 1)[None], lambda y: y.view(-1, 7, 6)),
    "behind another axis": (lambda x: x[:, None].repeat(1, 2, 1, 1), lambda y: y.sum(1) / 2),
    "before another axis": (lambda x: x[:, :, None].repeat(1, 1, 7, 1), lambda y: y.mean(2)),
}


@pytest.mark.parametrize("method", ["lora", "oft"])
@pytest.mark.parametrize("size", [3, 1])
@pytest.mark.parametrize("way", FOLLOWED)
def test_tokens_are_found_wherever_the_model_puts_them(way, size, method):
    graft, trees, many = made(Around(*FOLLOWED[way]), method, ["first", "proj"])
    x, rows = X[:size], ROWS[:size]
    y = graft(route(many, rows), x)
    torch.testing.assert_close(y, each_alone(graft, trees, x, rows), **F64)
    torch.testing.assert_close(graft(route(many, rows, check=True), x), y)


def swapped(x):
    return torch.cat([x[:, :4].unflatten(1, (2, 2)).flip(2).flatten(1, 2), x[:, 4:]], 1)


def by_values(x):
    return x.gather(1, x[..., :1].argsort(1).expand_as(x))


ASTRAY = {
    "reversed": lambda x: x.flip(1),
    "sorted": by_values,
    "neighbours exchanged": swapped,
    "shifted": lambda x: F.pad(x, (0, 0, 1, 0))[:, :-1],
    "rolled": lambda x: x.roll(1, 1),
    "first dropped": lambda x: x[:, 1:],
    "last alone": lambda x: x[:, -1:],
    "a class token before": lambda x: torch.cat([torch.ones_like(x[:, :1]), x], 1),
    "mean": lambda x: x - x.mean(1, keepdim=True),
    "neighbours": lambda x: x + x.roll(-1, 1),
    "shuffled": lambda x: x[:, torch.randperm(x.shape[1])],
    "transposed": lambda x: x[:, :6].transpose(1, 2),
    "one of all": lambda x: x[:, :1].expand_as(x),
    "latent queries": lambda x: F.scaled_dot_product_attention(torch.ones_like(x).cumsum(1), x, x),
    "reversed, flattened": lambda x: x.flip(1).flatten(0, 1),
    "reversed, tokens first": lambda x: x.transpose(0, 1).flip(0),
    "causal, then neighbours exchanged": lambda x: swapped(x.cumsum(1)),
    "causal, then reversed": lambda x: x.cumsum(1).flip(1),
}


@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize("way", ASTRAY)
def test_tokens_that_cannot_be_followed_are_an_error(way, check):
    graft, _, many = made(Around(ASTRAY[way]), "lora", ["first", "proj"])
    words = r"proj: its input, of . axes, does not follow the 7 tokens.*batch_dim=0, tokens_dim=1"
    words = "proj: .* its input does not follow them" if way == "shuffled" else words
    for run in (
        lambda: graft(route(many, ROWS, check=check), X),
        lambda: graft.view(route(many, ROWS[:1], check=check))(X[:1]),
        lambda: torch.func.grad(lambda many: graft(route(many, ROWS, check=check), X).sum())(many),
    ):
        with pytest.raises(ValueError, match=words):
            run()


def test_positions_that_decide_about_tokens_are_looked_at_in_each_call():
    class Sorted(nn.Module):
        """Takes its tokens in the order of their positions."""

        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(6, 6).double()

        def forward(self, x, positions):
            return self.proj(x.gather(1, positions.argsort(1)[..., None].expand_as(x)))

    graft, trees, many = made(Sorted())
    order = torch.arange(7).expand(3, 7)
    y = graft(route(many, ROWS), X, order)
    torch.testing.assert_close(y[0, 0], graft(trees[ROWS[0, 0]], X, order)[0, 0] if ROWS[0, 0] >= 0 else y[0, 0])
    with pytest.raises(ValueError, match="does not follow the 7 tokens"):
        graft(route(many, ROWS), X, order.flip(1))


def to_the_right(x, count):
    """Move the first tokens of each row to its end, `count` of them at the front becoming the last."""
    place = (torch.arange(x.shape[1]) + count[:, None]) % x.shape[1]
    return x.gather(1, place[..., None].expand_as(x))


class Padded(nn.Module):
    """Turns padding at the end of a row into padding at its front."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(6, 6).double()

    def forward(self, x, given):
        lengths = given if given.ndim == 1 else given.sum(1)
        return self.proj(to_the_right(x, lengths))


@pytest.mark.parametrize("argument", ["mask", "lengths"])
def test_a_look_ahead_refuses_what_other_inputs_decide(argument):
    graft, _, _ = made(Padded())
    given = torch.ones(3, 7, dtype=torch.long) if argument == "mask" else torch.tensor([7, 7, 7])
    with pytest.raises(ValueError, match="look: where the tokens of this sample are is decided by a mask or another"):
        graft.look(X, given, tokens=7)


@pytest.mark.parametrize("argument", ["mask", "lengths"])
def test_what_decides_about_tokens_and_was_alike_is_looked_at_again(argument):
    graft, trees, many = made(Padded())
    lengths = torch.tensor([7, 7, 7])
    mask = torch.ones(3, 7, dtype=torch.long)
    y = graft(route(many, ROWS), X, mask if argument == "mask" else lengths)
    torch.testing.assert_close(y, each_alone(Whole(graft), trees, X, ROWS), **F64)
    one = lengths.clone(), mask.clone()
    one[0][1], one[1][1, 4:] = 4, 0
    with pytest.raises(ValueError, match="does not follow the 7 tokens"):
        graft(route(many, ROWS), X, one[argument == "mask"])
    for row, count in ((1, 4), (0, 5), (2, 6)):
        lengths[row], mask[row, count:] = count, 0
    with pytest.raises(ValueError, match="does not follow the 7 tokens"):
        graft(route(many, ROWS), X, mask if argument == "mask" else lengths)


class Whole:
    """A graft of a model that also takes lengths, with those of full rows."""

    def __init__(self, graft):
        self.graft = graft

    def __call__(self, tree, x):
        return self.graft(tree, x, torch.full((len(x),), x.shape[1]))

    def model(self, x):
        return self.graft.model(x, torch.full((len(x),), x.shape[1]))


def test_lengths_that_decide_nothing_about_tokens_are_looked_at_once():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj, self.runs = nn.Linear(6, 6).double(), 0

        def forward(self, x, lengths):
            runs.append(len(x))
            return self.proj(x) * (torch.arange(x.shape[1]) < lengths[:, None])[..., None]

    runs = []
    graft, _, many = made(Pooled())
    graft(route(many, ROWS), X, torch.tensor([7, 7, 7]))
    runs.clear()
    graft(route(many, ROWS.flip(1)), X, torch.tensor([7, 3, 5]))
    assert runs == [3]


def test_shared_positions_are_no_tokens():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.places = nn.Embedding(7, 4), nn.Embedding(9, 4)
            self.double()

        def forward(self, ids):
            return self.words(ids) + self.places(torch.arange(ids.shape[1])[None])

    ids = torch.randint(7, (3, 7), generator=torch.Generator().manual_seed(0))
    graft, trees, many = made(Model(), "lora", ["words"])
    torch.testing.assert_close(graft(route(many, ROWS), ids), each_alone(graft, trees, ids, ROWS), **F64)
    graft, _, many = made(Model(), "lora", ["words", "places"])
    with pytest.raises(ValueError, match="places: its input, of 2 axes, does not follow the 7 tokens"):
        graft(route(many, ROWS), ids)


def test_a_vision_transformer_has_no_tokens_in_its_inputs():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=8, patch_size=4)).eval()
    graft, _, many = made(model, "lora", ["query"] if hasattr(model, "encoder") else ["q_proj"])
    with pytest.raises(ValueError, match=r"rows has 2 x 5, the inputs have 2 x 3"):
        graft(route(many, torch.zeros(2, 5, dtype=torch.long)), pixel_values=torch.randn(2, 3, 8, 8))


# -- said, compiled, refused ------------------------------------------------------------------------------------------


def test_declared_axes():
    graft, trees, many = made(Around(), "lora", ["first", "proj"])
    expected = each_alone(graft, trees, X, ROWS)
    for axes in ({"batch_dim": 0, "tokens_dim": 1}, {"batch_dim": -3, "tokens_dim": -2}, {"tokens_dim": 1}):
        routed = route(many, ROWS, **axes)
        assert f"tokens_dim={axes['tokens_dim']}" in repr(routed)
        torch.testing.assert_close(graft(routed, X), expected, **F64)
    alike = torch.ones_like(X)
    torch.testing.assert_close(graft(routed, alike), each_alone(graft, trees, alike, ROWS), **F64)
    first, flat = made(Around(*FOLLOWED["tokens first"])), made(Around(*FOLLOWED["flattened"]))
    for (graft, _, many), axes in ((first, (1, 0)), (flat, (0, 0))):
        y = graft(route(many, ROWS, batch_dim={"proj": axes[0]}, tokens_dim={"proj": axes[1]}), X)
        torch.testing.assert_close(y, graft(route(many, ROWS), X), **F64)
    words = "proj: its input has shape (3, 7, 6), and route(..., batch_dim=1, tokens_dim=0) asks for 3 rows of 7 tokens"
    graft, _, many = made(Around())
    with pytest.raises(ValueError, match=r"proj: its input has shape \(3, 6, 6\).*it is not known where these are"):
        graft(route(many, ROWS[:, :6], tokens_dim=2), X[:, :6])
    with pytest.raises(ValueError, match=re.escape(words)):
        graft(route(many, ROWS, batch_dim=1, tokens_dim=0), X)
    with pytest.raises(KeyError, match="tokens_dim names 'nothing', which is no adapted module of this call"):
        graft(route(many, ROWS, batch_dim=0, tokens_dim={"nothing": 0}), X)
    with pytest.raises(TypeError, match="tokens_dim is '1', expected an axis, or axes by path"):
        route(many, ROWS, tokens_dim="1")


@pytest.mark.slow
@pytest.mark.parametrize("looked", [True, False])
def test_a_compiled_call_knows_what_a_look_saw(looked):
    graft, trees, many = made(mlp(), "lora", ["0", "2"])
    torch._dynamo.reset()
    f = torch.compile(lambda many, rows, x: graft(route(many, rows), x), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"0: its input has shape \(3, 7, 6\).*3 rows of 7 tokens.*graft\.look"):
        f(many, ROWS, X)
    torch._dynamo.reset()
    if looked:
        graft.look(X[:2, :5], tokens=5)
    else:
        graft(route(many, ROWS), X)
    torch.testing.assert_close(f(many, ROWS, X), each_alone(graft, trees, X, ROWS), **F64)
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(f(many, ROWS.flip(1), X), each_alone(graft, trees, X, ROWS.flip(1)), **F64)


def test_a_vmapped_call_knows_what_an_earlier_one_saw():
    graft, trees, many = made(mlp(), "lora", ["0", "2"])
    several = torch.stack([X, X.flip(0)])
    with pytest.raises(ValueError, match="0: its input has shape .* routes 3 rows of 7 tokens, and it is not known"):
        torch.vmap(lambda x: graft(route(many, ROWS), x))(several)
    graft(route(many, ROWS), X)
    y = torch.vmap(lambda x: graft(route(many, ROWS), x))(several)
    torch.testing.assert_close(y, torch.stack([each_alone(graft, trees, x, ROWS) for x in several]), **F64)
    rows = torch.stack([ROWS, ROWS.flip(1)])
    y = torch.vmap(lambda rows: graft(route(many, rows), X))(rows)
    torch.testing.assert_close(y, torch.stack([each_alone(graft, trees, X, each) for each in rows]), **F64)


def test_known_kinds_take_other_sizes():
    graft, trees, many = made(mlp(), "lora", ["0", "2"])
    for size, tokens in ((3, 7), (2, 6), (3, 2), (1, 5), (3, 1)):
        x, rows = X[:size, :tokens], ROWS[:size, :tokens]
        torch.testing.assert_close(graft(route(many, rows), x), each_alone(graft, trees, x, rows), **F64)


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (nn.Sequential(nn.Conv1d(7, 7, 3, padding=1)), X),
        (nn.Sequential(nn.MultiheadAttention(6, 2, batch_first=True, dtype=torch.float64)), X),
    ],
)
def test_kinds_that_do_not_work_token_by_token(model, x):
    graft = bind(model, LoraConfig(r=2, target_modules=["0"]))
    kind = "conv1d" if isinstance(model[0], nn.Conv1d) else "attention"
    words = rf"0: it is a site of kind '{kind}', which does not work token by token.*rows of shape \(batch,\)"
    with pytest.raises(RuntimeError, match=words):
        graft(route(stack(several(graft)), ROWS), x)


def test_replaced_tensors_are_not_routed_by_tokens():
    graft = bind(mlp(), LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"]))
    with pytest.raises(RuntimeError, match=r"2: an adapter replaces tensors of this Linear.*token by token"):
        graft(route(stack(several(graft)), ROWS), X)


@pytest.mark.parametrize(
    ("rows", "error", "words"),
    [
        (ROWS[:, :6], ValueError, "rows has 3 x 6, the inputs have 3 x 7; give an index for each token"),
        (ROWS[:2], ValueError, "rows has 2 x 7, the inputs have 3 x 7"),
        (ROWS[:, :1], ValueError, "rows has 3 x 1, the inputs have 3 x 7"),
        (ROWS.double(), ValueError, "rows has shape (3, 7) and dtype torch.float64, expected one long index"),
        (ROWS[None], ValueError, "rows has shape (1, 3, 7) and dtype torch.int64, expected one long index"),
        (ROWS[:, :0], ValueError, "route: rows is empty"),
        ([[0, 1], [0]], TypeError, "route: rows is a list that is no tensor"),
        (ROWS + 2, ValueError, "expected an index of one of the 3 adapters in the stack"),
    ],
)
def test_bad_rows(rows, error, words):
    graft, _, many = made(mlp(), "lora", ["0", "2"])
    with pytest.raises(error, match=re.escape(words)):
        graft(route(many, rows), X)


def test_tokens_that_are_all_alike_show_nothing():
    graft, _, many = made(mlp(), "lora", ["0", "2"])
    with pytest.raises(ValueError, match=r"no tensor of the inputs has 3 rows of 7 tokens among which two differ"):
        graft(route(many, ROWS), torch.ones_like(X))
