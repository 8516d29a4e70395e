"""Where rows are is proved: models that reorder, select, share or mix them are an error, and nothing crosses."""

import copy

import numpy as np
import optree
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from torchgraft.adapters import AdaLoraConfig, IA3Config, LoraConfig, OFTConfig, VeraConfig
from torchgraft.functional import bind, functional_call, route, stack

METHODS = {
    "lora": lambda targets: LoraConfig(r=2, target_modules=targets),
    "dora": lambda targets: LoraConfig(r=2, target_modules=targets, use_dora=True),
    "bias": lambda targets: LoraConfig(r=2, target_modules=targets, lora_bias=True),
    "ia3": lambda targets: IA3Config(target_modules=targets, feedforward_modules=[]),
    "adalora": lambda targets: AdaLoraConfig(target_r=2, init_r=2, total_step=9, target_modules=targets),
    "oft": lambda targets: OFTConfig(oft_block_size=2, target_modules=targets),
    "vera": lambda targets: VeraConfig(r=4, target_modules=targets),
}


def several(graft, count=3, scale=0.3):
    generator = torch.Generator().manual_seed(0)
    return [
        optree.tree_map(lambda t: t + scale * torch.randn(t.shape, generator=generator, dtype=t.dtype), graft.init())
        for _ in range(count)
    ]


def made(model, method="lora", targets=("proj",), count=4):
    graft = bind(model, METHODS[method](list(targets)))
    trees = several(graft, count)
    return graft, trees, stack(trees)


def looped(graft, trees, x, rows):
    return torch.stack([(graft(trees[i], x) if i >= 0 else graft.model(x))[row] for row, i in enumerate(rows)])


class Around(nn.Module):
    """A linear layer with something before and something after it."""

    def __init__(self, before=lambda x: x, after=lambda y, x: y, dim=6):
        super().__init__()
        torch.manual_seed(0)
        self.proj, self.before, self.after = nn.Linear(dim, dim), before, after

    def forward(self, x):
        return self.after(self.proj(self.before(x)), x)


def shuffled(x):
    return x[torch.randperm(len(x))]


def weighed(x):
    return x[torch.rand(len(x)).argsort()]


ASTRAY = {
    "sorted": Around(lambda x: x[x.sum(1).argsort()]),
    "sorted and back": Around(lambda x: x[x.sum(1).argsort()], lambda y, x: y[x.sum(1).argsort().argsort()]),
    "flipped": Around(lambda x: x.flip(0)),
    "flipped and back": Around(lambda x: x.flip(0), lambda y, x: y.flip(0)),
    "rolled": Around(lambda x: x.roll(1, 0)),
    "shuffled": Around(shuffled),
    "shuffled by weights": Around(weighed),
    "halves exchanged": Around(lambda x: torch.cat([x[len(x) // 2 :], x[: len(x) // 2]])),
    "selected": Around(lambda x: x[x[:, 0] > x[:, 0].median()], lambda y, x: x.sum() + y.sum(0)),
    "best": Around(lambda x: x[x.sum(1).topk(len(x) // 2).indices], lambda y, x: x + y.mean(0)),
    "row by row": Around(lambda x: x, lambda y, x: torch.stack(list(y))),
    "centred before": Around(lambda x: x - x.mean(0)),
    "centred": Around(after=lambda y, x: y - y.mean(0)),
    "normalised": Around(after=lambda y, x: y / y.norm()),
    "softmax over rows": Around(after=lambda y, x: y.softmax(0)),
    "cumulative": Around(after=lambda y, x: y.cumsum(0)),
    "neighbours": Around(after=lambda y, x: y + y.roll(1, 0)),
    "summed": Around(after=lambda y, x: y.sum()),
    "similarities": Around(after=lambda y, x: y @ y.mT),
    "first row only": Around(after=lambda y, x: y[:1].expand_as(y)),
}
del ASTRAY["row by row"]


class RowByRow(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(6, 6)

    def forward(self, x):
        return torch.stack([self.proj(row) for row in x])


class Table(nn.Module):
    """As Swin v2's position bias."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(2, 6)
        self.register_buffer("table", torch.randn(1, 6, 2))

    def forward(self, x):
        return x + self.proj(self.table).view(-1, 6)[torch.arange(6)].sum(0)


ASTRAY |= {
    "row by row": RowByRow(),
    "table": Table(),
    "batch norm": nn.Sequential(),
}
ASTRAY["batch norm"].add_module("proj", nn.Linear(6, 6))
ASTRAY["batch norm"].add_module("norm", nn.BatchNorm1d(6))


@pytest.mark.parametrize("method", ["lora", "ia3", "oft"])
@pytest.mark.parametrize("model", ASTRAY)
def test_rows_that_do_not_keep_apart_are_an_error(model, method):
    graft, _, many = made(copy.deepcopy(ASTRAY[model]), method)
    torch.manual_seed(1)
    x = torch.randn(4, 6)
    words = r"rows meet in the output|its input does not follow|an adapter for each row its input|is not called alike"
    for run in (
        lambda: graft(route(many, torch.arange(4)), x),
        lambda: graft.view(route(many, torch.tensor([0, 1, 1, 3])))(x),
        lambda: torch.func.grad(lambda many: graft(route(many, torch.arange(4)), x).sum())(many),
        lambda: graft(route(many), x.repeat(2, 1)),
    ):
        with pytest.raises((ValueError, RuntimeError), match=words):
            run()


# -- what is right ----------------------------------------------------------------------------------------------------


class StochasticDepth(nn.Module):
    """Dropout, noise and paths that are left out for some rows, in training."""

    def __init__(self):
        super().__init__()
        self.proj, self.drop = nn.Linear(6, 6), nn.Dropout(0.3)

    def forward(self, x):
        y = F.dropout(self.drop(self.proj(x)), 0.2, training=self.training)
        if self.training:
            y = y * x.new_empty(len(x), 1).bernoulli_(0.8) / 0.8 + 0.01 * torch.randn_like(y)
        return x + y


def test_randomness_of_training_hides_no_rows_and_is_left_as_it_was():
    graft, trees, many = made(StochasticDepth().train())
    x, rows = torch.randn(5, 6), torch.tensor([0, 2, 1, -1, 3])
    torch.manual_seed(7)
    y = graft(route(many, rows), x)
    torch.manual_seed(7)
    torch.testing.assert_close(y[1:2], graft(trees[2], x)[1:2])
    torch.manual_seed(7)
    torch.testing.assert_close(graft(route(many, rows), x), y)
    graft.model.eval()
    torch.testing.assert_close(graft(route(many, rows), x), looped(graft, trees, x, rows.tolist()))


def test_generators_of_the_model_stay_where_they_were():
    model = Around()
    model.noise = torch.Generator().manual_seed(3)
    model.after = lambda y, x: y + 0.1 * torch.randn(y.shape, generator=model.noise)
    graft, _, many = made(model)
    before = model.noise.get_state()
    with pytest.raises(ValueError, match="rows meet in the output"):
        graft(route(many), torch.randn(4, 6))
    assert torch.equal(model.noise.get_state(), before)
    assert graft(route(many, batch_dim=0), torch.randn(4, 6)).shape == (4, 6)


def test_equal_rows_nan_rows_and_two_rows():
    graft, trees, many = made(Around(lambda x: x.transpose(0, 1), lambda y, x: y.transpose(0, 1)))
    for x in (torch.ones(4, 4, 6), torch.randn(4, 4, 6), torch.randn(2, 2, 6), torch.randn(1, 4, 6)):
        rows = torch.arange(len(x)) % 4
        torch.testing.assert_close(graft(route(many, rows), x), looped(graft, trees, x, rows.tolist()))
    graft = bind(graft.model, METHODS["lora"](["proj"]))
    x = torch.full((4, 4, 6), torch.nan)
    x[2] = 1.0
    torch.testing.assert_close(
        graft(route(many, torch.arange(4)), x), looped(graft, trees, x, [0, 1, 2, 3]), equal_nan=True
    )


def test_known_kinds_take_other_sizes_and_what_does_not_fit_is_looked_at_again():
    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(6, 6)

        def forward(self, x):
            y = x[:, 0]
            for step in range(x.shape[1]):
                y = self.proj(x[:, step] + y)
            return y

    graft, trees, many = made(Steps())
    for size, length in ((4, 3), (4, 3), (3, 5), (5, 2)):
        x, rows = torch.randn(size, length, 6), torch.arange(size) % 4
        torch.testing.assert_close(graft(route(many, rows), x), looped(graft, trees, x, rows.tolist()))


def test_rows_that_are_picked_in_a_later_call_are_an_error():
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(6, 6)

        def forward(self, x):
            picked = x[:, 0] > 0
            return x.index_put((picked,), self.proj(x[picked]))

    graft, trees, many = made(Picky())
    x = torch.rand(8, 6) + 0.1
    rows = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    torch.testing.assert_close(graft(route(many, rows), x), looped(graft, trees, x, rows.tolist()))
    x[[0, 1, 2, 4], 0] *= -1
    with pytest.raises(ValueError, match=r"proj: its input has shape .* does not follow them"):
        graft(route(many, rows), x)


def test_conditional_calls_are_an_error():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(6, 6)

        def forward(self, x):
            return self.proj(x) if x.shape[0] < 4 else x

    graft, _, many = made(Sometimes())
    with pytest.raises(ValueError, match=r"proj: is not called alike for 3 and for 4 rows"):
        graft(route(many, torch.tensor([0, 1])), torch.randn(2, 6))


def test_checking_all_rows_sees_what_three_do_not():
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(6, 6)

        def forward(self, x):
            y = self.proj(x)
            return torch.cat([y[:4], y[4:].flip(0)])

    graft, _, many = made(Late())
    x, rows = torch.randn(6, 6), torch.tensor([0, 1, 2, 3, 0, 1])
    with pytest.raises(ValueError, match="rows meet in the output"):
        graft(route(many, rows, check=True), x)
    graft, trees, many = made(Around())
    torch.testing.assert_close(graft(route(many, rows, check=True), x), looped(graft, trees, x, rows.tolist()))


def test_declarations():
    graft, trees, many = made(Around(after=lambda y, x: {"y": y, "loss": y.mean(), "more": [y @ y.mT]}))
    x, rows = torch.randn(4, 6), torch.tensor([0, 1, -1, 3])
    for mixed in ([], ["loss"], ["more"]):
        with pytest.raises(ValueError, match=r"rows meet in the output '(loss|more\[0\])'.*mixed=\['"):
            graft(route(many, rows, mixed=mixed), x)
    routed = route(many, rows, mixed=["loss", "more"])
    torch.testing.assert_close(graft(routed, x)["y"][1], graft(trees[1], x)["y"][1])
    assert repr(routed) == "Routed(4 adapters, 4 rows, declared: mixed=('loss', 'more'))"
    with pytest.raises(ValueError, match="rows meet in the output 'loss'"):
        graft(route(many, rows), x)
    for declared in (0, {"proj": 0}):
        routed = route(many, rows, batch_dim=declared)
        torch.testing.assert_close(graft(routed, x)["y"][1], graft(trees[1], x)["y"][1])
        assert f"batch_dim={declared}" in repr(routed)
    with pytest.raises(KeyError, match="batch_dim names 'nothing', which is no adapted module of this call; there are"):
        graft(route(many, rows, batch_dim={"nothing": 0}), x)
    with pytest.raises(TypeError, match="batch_dim is '0', expected an axis, or axes by path"):
        route(many, rows, batch_dim="0")
    with pytest.raises(TypeError, match="mixed is 'loss', expected a list of names"):
        route(many, rows, mixed="loss")


def test_inputs_that_cannot_be_cut_or_copied():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(6, 6)

        def forward(self, x, sizes):
            return torch.stack([part.sum(0) for part in self.proj(x).split(sizes)])

    graft, trees, many = made(Packed())
    x = torch.randn(7, 6)
    with pytest.raises(ValueError, match=r"no tensor of its inputs has 3 rows.*graft\.look\(\*small_inputs"):
        graft(route(many, torch.tensor([0, 1, 2])), x, [2, 2, 3])

    parts = [torch.randn(size, 6) for size in (2, 2, 3)]
    order = [1, 0, 2, 2]
    other = torch.cat([parts[i] for i in order]), [len(parts[i]) for i in order]
    words = r"proj: its input has shape \(7, 6\).*does not follow them"
    with pytest.raises(ValueError, match=words):
        graft.look(torch.cat(parts), [2, 2, 3], rows=3, rearranged=other)

    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(6, 6)

        def forward(self, packed, sizes):
            padded = torch.nn.utils.rnn.pad_sequence(packed.split(sizes), batch_first=True)
            return self.proj(padded).sum(1)

    graft, trees, many = made(Padded())
    graft.look(torch.cat(parts), [2, 2, 3], rows=3, rearranged=other)
    y = graft(route(many, torch.tensor([2, 0, 1])), x, [1, 4, 2])
    torch.testing.assert_close(y[1], graft(trees[0], x, [1, 4, 2])[1])

    class Closed:
        def __deepcopy__(self, memo):
            raise TypeError("cannot be copied")

    model = Around()
    model.forward = lambda x, other: model.proj(x)
    graft, trees, many = made(model)
    x, rows = torch.randn(4, 6), torch.tensor([0, 1, 2, -1])
    with pytest.raises(ValueError, match=r"failed with TypeError: cannot be copied.*graft\.look.*batch_dim=0"):
        graft(route(many, rows), x, Closed())
    graft.look(torch.randn(3, 6), None)
    y = graft(route(many, rows, batch_dim=0), x, Closed())
    torch.testing.assert_close(y[1], graft(trees[1], x, None)[1])
    with pytest.raises(ValueError, match="look: the sample has 1 rows, expected at least 2"):
        graft.look(torch.randn(1, 6), None)


def test_a_graft_without_looks_knows_what_it_was_shown_and_runs_the_model_no_more_than_asked():
    runs = []

    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(6, 6)

        def forward(self, x, y=None):
            runs.append(len(x))
            return self.proj(x) if y is None else self.proj(x) + y

    graft, trees, many = made(Counted())
    kept, x = graft.without_looks(), torch.randn(4, 6)
    rows = torch.tensor([2, 0, 0, 1])
    with pytest.raises(ValueError, match=r"may not find out by itself.*call graft.look\(\*sample\), with arg"):
        kept(route(many, rows), x)
    kept.look(torch.randn(3, 6))
    runs.clear()
    y = kept(route(many, rows), x)
    assert runs == [4]
    torch.testing.assert_close(y, looped(graft, trees, x, rows))
    with pytest.raises(ValueError, match="nothing that look has seen was of its kind"):
        kept(route(many, rows), x, torch.randn(4, 6))
    with pytest.raises(ValueError, match="may not find out by itself"):
        kept.in_mode(training=True)(route(many, rows), x)


def test_base_tensors_of_another_precision_are_looked_with():
    graft, trees, many = made(Around())
    base = {name: tensor.double() for name, tensor in graft.model.state_dict().items()}
    x, rows = torch.randn(4, 6).double(), torch.tensor([0, 1, 2, -1])
    y = functional_call(graft, (base, route(many, rows)), (x,))
    torch.testing.assert_close(y[1], functional_call(graft, (base, trees[1]), (x,))[1])


# -- rows now ---------------------------------------------------------------------------------------------------------


def test_rows_written_to_in_any_way_are_what_the_next_call_uses():
    graft, trees, many = made(Around())
    x, buffer = torch.randn(4, 6), np.array([0, 0, 1, 1])
    routed = route(many, torch.from_numpy(buffer))
    view = graft.view(routed)
    shared = torch.tensor([0, 0, 1, 1]).share_memory_()
    data = torch.tensor([0, 0, 1, 1], dtype=torch.int32)
    other, third = route(many, shared), route(many, data)
    for values in ([0, 0, 1, 1], [2, -1, 1, 0], [3, 3, 3, 3], [-1, -1, -1, -1], [1, 0, 2, 2]):
        buffer[:] = values
        shared.numpy()[:] = values
        data.data.copy_(torch.tensor(values))
        expected = looped(graft, trees, x, values)
        for call in (lambda: graft(routed, x), lambda: view(x), lambda: graft(other, x), lambda: graft(third, x)):
            torch.testing.assert_close(call(), expected)
    buffer[0] = 9
    for call in (lambda: graft(routed, x), lambda: view(x)):
        with pytest.raises(ValueError, match=r"rows\[0\] is 9, expected an index of one of the 4 adapters"):
            call()


@pytest.mark.parametrize("method", METHODS)
def test_rows_made_in_inference_mode_serve_calls_in_and_out_of_it(method):
    graft, trees, many = made(Around(), method)
    x = torch.randn(6, 6)
    for values in ([1, -1, 0, 2, 0, 0], [0, 0, 1, 1, 2, 2], [3, 2, 1, 0, 3, 3]):
        with torch.inference_mode():
            routed = route(many, torch.tensor(values))
            y = graft(routed, x)
        torch.testing.assert_close(y.clone(), looped(graft, trees, x, values).detach())
        grads = torch.func.grad(lambda many, routed=routed: graft(route(many, routed.rows.index), x).sum())(many)
        leaves = optree.tree_map(lambda t: t.clone().requires_grad_(), many)
        graft(route(leaves, torch.tensor(values)), x).sum().backward()
        torch.testing.assert_close(optree.tree_map(lambda t: t.grad, leaves), grads)


# -- nothing crosses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", METHODS)
def test_a_broken_row_reaches_no_other_adapter(method, broken):
    graft, trees, many = made(Around(), method, count=3)
    for rows in ([0, 0, 1], [1, 0, -1, 2, 0], [-1, 1], [0, 0, 1, 1], [2, 2, 2, 0, -1, 0, 1, 1], [1, 1, 1, 1, -1, 0]):
        for tokens in (1, 24):
            x = torch.randn(len(rows), tokens, 6)
            x[0] = broken
            leaves = optree.tree_map(lambda t: t.clone().requires_grad_(), many)
            y = graft(route(leaves, torch.tensor(rows)), x)
            for row, i in enumerate(rows):
                if row and i >= 0:
                    torch.testing.assert_close(y[row], graft(trees[i], x[row : row + 1])[0])
            grads = torch.autograd.grad(y[1:].square().sum(), optree.tree_leaves(leaves), materialize_grads=True)
            for gradient in grads:
                for adapter in range(3):
                    if adapter != rows[0]:
                        assert gradient[adapter].isfinite().all(), (rows, tokens, adapter)


@pytest.mark.parametrize("method", METHODS)
def test_a_broken_adapter_reaches_no_other_row(method):
    graft, _, many = made(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), method, ["0", "1"], count=3)
    many = optree.tree_map(lambda t: t.clone(), many)
    for leaf in optree.tree_leaves(many):
        leaf[0] = float("nan")
    for rows in ([0, -1, 1], [1, 2, -1, -1, 0], [-1, 0, 1, 2, 2, 2, 0]):
        for tokens in (1, 24):
            x = torch.randn(len(rows), tokens, 6, requires_grad=True)
            leaves = optree.tree_map(lambda t: t.clone().requires_grad_(), many)
            y = graft(route(leaves, torch.tensor(rows)), x)
            own = [row for row, i in enumerate(rows) if i != 0]
            assert y[own].isfinite().all()
            into, *grads = torch.autograd.grad(
                y[own].square().sum(), [x, *optree.tree_leaves(leaves)], materialize_grads=True
            )
            assert into[own].isfinite().all()
            assert all(gradient[1:].isfinite().all() for gradient in grads)


# -- real models ------------------------------------------------------------------------------------------------------

SMALL = {"vocab_size": 50, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
SMALL |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 40}


def bart():
    torch.manual_seed(0)
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**SMALL)).eval()


def t5():
    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=50, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config).eval()


@pytest.mark.slow
@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize(("model", "targets"), [(bart, ["q_proj", "v_proj"]), (t5, ["q", "v", "wo"])])
def test_generation_of_encoder_decoder_models_at_every_length(model, targets, beams):
    graft, trees, many = made(model(), "lora", targets, count=2)
    rows = torch.tensor([1, 0])
    how = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams}
    for length in (1, 2, 7, 8):
        ids = torch.randint(3, 50, (2, length))
        expected = [graft.view(trees[i]).generate(ids, **how)[row] for row, i in enumerate(rows.tolist())]
        view = graft.view(route(many, rows))
        for _ in range(2):
            assert all(map(torch.equal, view.generate(ids, **how), expected)), length


def test_similarities_of_clip_are_declared_and_its_parts_are_called_alone():
    torch.manual_seed(0)
    part = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = transformers.CLIPConfig(
        text_config={**part, "vocab_size": 50, "max_position_embeddings": 16, "eos_token_id": 49},
        vision_config={**part, "image_size": 8, "patch_size": 4},
        projection_dim=8,
    )
    graft, trees, many = made(transformers.CLIPModel(config).eval(), "lora", ["q_proj", "v_proj"], count=2)
    ids, pixels, rows = torch.randint(48, (4, 6)), torch.randn(4, 3, 8, 8), torch.tensor([1, 0, 0, -1])
    inputs = {"input_ids": ids, "pixel_values": pixels}
    with pytest.raises(ValueError, match=r"rows meet in the output 'logits_per_(image|text)'"):
        graft(route(many, rows), **inputs)
    y = graft(route(many, rows, mixed=["logits_per_image", "logits_per_text"]), **inputs)
    torch.testing.assert_close(y.text_embeds[0], graft(trees[1], **inputs).text_embeds[0])
    view = graft.view(route(many, rows))
    found = view.get_image_features(pixel_values=pixels)
    for found, expected in (
        (view.get_image_features(pixel_values=pixels), graft.view(trees[1]).get_image_features(pixel_values=pixels)),
        (view.get_text_features(input_ids=ids), graft.view(trees[1]).get_text_features(input_ids=ids)),
    ):
        found, expected = (getattr(y, "pooler_output", y) for y in (found, expected))
        torch.testing.assert_close(found[0], expected[0])


def test_copies_of_a_routed_view():
    graft, trees, many = made(Around(lambda x: x.transpose(0, 1), lambda y, x: y.transpose(0, 1)))
    x, rows = torch.randn(4, 4, 6), torch.tensor([3, 0, -1, 1])
    twin = copy.deepcopy(graft.view(route(many, rows)))
    torch.testing.assert_close(twin(x), looped(graft, trees, x, rows.tolist()))


@pytest.mark.parametrize("length", [8, 9])
def test_generation_of_multimodal_models(length):
    torch.manual_seed(0)
    part = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**part, image_size=8, patch_size=4),
        text_config=transformers.LlamaConfig(**part, num_key_value_heads=2, vocab_size=60),
        image_token_index=55,
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
    )
    targets = ["q_proj", "v_proj", "linear_1"]
    graft, trees, many = made(transformers.LlavaForConditionalGeneration(config).eval(), "lora", targets, count=2)
    ids, rows = torch.randint(3, 50, (4, length)), [1, 0, 0, -1]
    ids[:, 1:5] = 55
    inputs = {"input_ids": ids, "pixel_values": torch.randn(4, 3, 8, 8)}
    routed = route(many, torch.tensor(rows))
    torch.testing.assert_close(graft(routed, **inputs).logits[1], graft(trees[0], **inputs).logits[1])
    how = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    y = graft.view(routed).generate(**inputs, **how)
    for row, i in enumerate(rows):
        model = graft.view(trees[i]) if i >= 0 else graft.model
        assert torch.equal(y[row], model.generate(**inputs, **how)[row])


def test_lists_with_an_entry_for_each_row():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(6, 6)

        def forward(self, x, more, layers):
            y = self.proj(x + torch.stack(list(more)).sum(1)) + sum(layers)
            return {"each": tuple(y), "halves": y.chunk(2, -1)}

    graft, trees, many = made(Listed())
    for size in (3, 4, 6):
        x, rows = torch.randn(size, 6), torch.arange(size) % 4
        given = x, [torch.randn(size, 6) for _ in range(size)], [torch.randn(6) for _ in range(2)]
        y = graft(route(many, rows), *given)
        for row, i in enumerate(rows.tolist()):
            expected = graft(trees[i], *given)
            torch.testing.assert_close(y["each"][row], expected["each"][row])
            torch.testing.assert_close(y["halves"][1][row], expected["halves"][1][row])
