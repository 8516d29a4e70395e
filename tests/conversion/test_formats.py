"""Round trips through other programs' forms, and those programs' own readers."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.arithmetic.oracle import Experts, Layers, adapter, assert_same, changes, lora
from torchgraft.adapters import (
    LoraConfig,
    detect_format,
    from_format,
    fuse_projections,
    join_experts,
    split_experts,
    split_projections,
    to_format,
)
from torchgraft.adapters._conversion.original_unet import original_names
from torchgraft.functional import UnsupportedConfig

PLAIN = ["up", "down", "conv", "grid"]
PATTERNS = {"rank_pattern": {"up": 5}, "alpha_pattern": {"down": 3.0}}


class Encoder(nn.Module):
    """Layers that AdapterHub has words for."""

    def __init__(self):
        super().__init__()
        self.layer = nn.ModuleList()
        for _ in range(2):
            attention = nn.ModuleDict({"self": nn.ModuleDict({"query": nn.Linear(4, 4), "value": nn.Linear(4, 4)})})
            self.layer.append(
                nn.ModuleDict({"attention": attention, "intermediate": nn.ModuleDict({"dense": nn.Linear(4, 6)})})
            )


@settings(max_examples=6, deadline=None)
@given(
    r=st.integers(1, 4),
    alpha=st.floats(0.1, 30),
    rs=st.booleans(),
    form=st.sampled_from(["peft", "diffusers", "kohya"]),
)
def test_round_trips_are_exact(r, alpha, rs, form):
    base = Layers().double()
    one = adapter(base, lora(r=r, lora_alpha=alpha, use_rslora=rs, target_modules=PLAIN, **PATTERNS))
    tensors, fields = to_format(*one, form)
    assert detect_format(tensors) == form
    back = from_format(tensors, modules=base, fields=fields)
    assert_same(changes(base, back), changes(base, one))


@pytest.mark.parametrize("alike", [True, False])
def test_adapterhub(alike):
    base = Encoder().double()
    fields = {} if alike else {"rank_pattern": {"query": 3}, "alpha_pattern": {"value": 1.5}}
    one = adapter(
        base, LoraConfig(r=2, lora_alpha=5, target_modules=["query", "value", "intermediate.dense"], **fields)
    )
    tensors, config = to_format(*one, "adapterhub", prefix="task")
    assert tensors["layer.1.attention.self.query.loras.task.lora_A"].shape == (2 if alike else 3, 4)
    assert config["config"]["attn_matrices"] == ["q", "v"] and config["config"]["intermediate_lora"]
    assert (config["config"]["r"], config["config"]["alpha"]) == ((2, 5) if alike else (3, 3))
    assert detect_format(tensors) == "adapterhub"
    assert_same(changes(base, from_format(tensors, fields=config)), changes(base, one))
    with pytest.raises(ValueError, match="do not tell their scaling factor; pass fields"):
        from_format(tensors)
    with pytest.raises(ValueError, match=r"prefix is 'other'.*adapters \['task'\]; name one"):
        from_format(tensors, fields=config, prefix="other")


class Unet(nn.Module):
    def __init__(self):
        super().__init__()
        attn = nn.ModuleDict(
            {"to_q": nn.Linear(4, 4), "to_k": nn.Linear(4, 4), "to_out": nn.ModuleList([nn.Linear(4, 4)])}
        )
        block = nn.ModuleDict({"attn1": attn})
        inner = nn.ModuleDict({"proj_in": nn.Conv2d(4, 4, 1), "transformer_blocks": nn.ModuleList([block])})
        outer = nn.ModuleDict({"attentions": nn.ModuleList([inner])})
        self.down_blocks = nn.ModuleList([outer])


UNET = ["to_q", "to_k", "to_out.0", "proj_in"]


def test_diffusers_reads_what_is_written_for_kohya():
    utils = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    state_dict_utils = pytest.importorskip("diffusers.utils.state_dict_utils")
    base = Unet().double()
    one = adapter(base, LoraConfig(r=2, lora_alpha=5, target_modules=UNET, alpha_pattern={"to_k": 3.0}))
    theirs, alphas = utils._convert_non_diffusers_lora_to_diffusers(dict(to_format(*one, "kohya").tensors))
    assert set(alphas.values()) == {5.0, 3.0}
    read = state_dict_utils.convert_unet_state_dict_to_peft(theirs)
    assert sorted(read) == sorted(to_format(*one, "diffusers").tensors)
    _, back = from_format(theirs)  # as they have it, with alphas beside
    assert all(torch.equal(back[path][leaf], t) for path, leaves in one[1].items() for leaf, t in leaves.items())


SDXL = dict(  # noqa: C408 - as it is passed
    sample_size=8, in_channels=4, out_channels=4, layers_per_block=2, block_out_channels=(8, 16, 16), norm_num_groups=4,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=8,
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2, 1),
    attention_head_dim=(1, 2, 2), use_linear_projection=True, addition_embed_type="text_time",
    addition_time_embed_dim=4, projection_class_embeddings_input_dim=32,
)  # fmt: skip


@pytest.fixture(scope="module")
def unet():
    models = pytest.importorskip("diffusers.models")
    return models.UNet2DConditionModel(**SDXL).double()


def test_an_sdxl_file_has_the_names_of_the_original_unet(unet):
    utils = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    names = [*UNET, "to_v", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv", "conv_shortcut"]
    names += ["time_emb_proj", "conv_in", "conv_out"]
    one = adapter(unet, LoraConfig(r=2, lora_alpha=5, target_modules=names))
    tensors = to_format(*one, "sdxl", modules=unet).tensors
    starts = {key.split(".")[0] for key in tensors}
    assert {"lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", "lora_unet_input_blocks_3_0_op"} <= starts
    assert {"lora_unet_middle_block_2_in_layers_2", "lora_unet_output_blocks_2_2_conv"} <= starts
    _, back = from_format(tensors, modules=unet)
    assert back.keys() == one[1].keys()
    assert all(torch.equal(back[path][leaf], t) for path, leaves in one[1].items() for leaf, t in leaves.items())
    mapped = utils._maybe_map_sgm_blocks_to_diffusers(dict(tensors), unet.config)
    theirs, _ = utils._convert_non_diffusers_lora_to_diffusers(mapped)
    _, read = from_format(theirs)
    assert read.keys() == back.keys()
    assert all(torch.equal(read[path][leaf], t) for path, leaves in back.items() for leaf, t in leaves.items())


def test_names_of_the_original_unet_are_each_modules_own(unet):
    names = [name for name, module in unet.named_modules() if next(module.parameters(recurse=False), None) is not None]
    found = original_names(names)
    assert len({*found.values()}) == len(found) == len(names)
    assert found["add_embedding.linear_2"] == "label_emb.0.2" and found["conv_norm_out"] == "out.0"


def test_sdxl_needs_the_unet():
    one = LoraConfig(r=1, target_modules=["q"]), {"q": {"lora_A": torch.ones(1, 2), "lora_B": torch.ones(2, 1)}}
    with pytest.raises(ValueError, match="'sdxl' needs all names of the UNet's modules; pass modules=model"):
        to_format(*one, "sdxl")
    with pytest.raises(ValueError, match="'q' is no part of a UNet that 'sdxl' has a name for; use 'kohya'"):
        to_format(*one, "sdxl", modules=["q", "conv_in"])


def test_diffusers_metadata_says_the_scaling_factor():
    base = Unet().double()
    one = adapter(base, LoraConfig(r=2, lora_alpha=5, use_rslora=True, target_modules=UNET, rank_pattern={"to_k": 1}))
    tensors = {key.replace("base_model.model.", "unet."): t for key, t in to_format(*one, "peft").tensors.items()}
    fields = {f"unet.{name}": value for name, value in one[0].to_dict().items()}
    back = from_format(tensors, fields=fields)
    assert_same(changes(base, back), changes(base, one))
    with pytest.raises(ValueError, match="has rank 2, and the config says 7"):
        from_format(tensors, fields={**fields, "unet.r": 7})


def test_diffusers_older_keys():
    a, b = torch.randn(2, 4), torch.randn(4, 2)
    for old, new in {
        "unet.mid.attn1.processor.to_out_lora": "mid.attn1.to_out.0",
        "unet.mid.attn1.to_q.lora": "mid.attn1.to_q",
        "text_encoder.layers.0.self_attn.to_q_lora": "layers.0.self_attn.q_proj",
        "text_encoder.layers.0.mlp.fc1.lora_linear_layer": "layers.0.mlp.fc1",
    }.items():
        config, tree = from_format({f"{old}.down.weight": a, f"{old}.up.weight": b})
        assert list(tree) == [new] and config.target_modules == {new} and config.lora_alpha == config.r == 2


def test_a_part_of_a_pipeline_is_chosen_by_its_prefix():
    one = LoraConfig(r=1, target_modules=["q"]), {"q": {"lora_A": torch.ones(1, 2), "lora_B": torch.ones(2, 1)}}
    both = {**to_format(*one, "kohya").tensors, **to_format(*one, "kohya", prefix="lora_te1").tensors}
    with pytest.raises(ValueError, match=r"several parts, \['lora_te1', 'lora_unet'\]; pass prefix"):
        from_format(both, modules=["q"])
    assert list(from_format(both, modules=["q"], prefix="lora_te1")[1]) == ["q"]
    with pytest.raises(ValueError, match=r"prefix is 'unet', and the keys are of"):
        from_format(both, modules=["q"], prefix="unet")


def test_names_that_underscores_hide():
    tensors = {"lora_unet_a_q.lora_down.weight": torch.ones(1, 2), "lora_unet_a_q.lora_up.weight": torch.ones(3, 1)}
    with pytest.raises(ValueError, match="does not tell where a name has dots; pass modules=model"):
        from_format(tensors)
    with pytest.raises(ValueError, match=r"may be any of \['a.q', 'a_q'\]"):
        from_format(tensors, modules=["a.q", "a_q"])
    with pytest.raises(ValueError, match="is of no module of these 1"):
        from_format(tensors, modules=["b"])
    twice = {path: {"lora_A": torch.ones(1, 2), "lora_B": torch.ones(2, 1)} for path in ("a.q", "a_q")}
    with pytest.raises(ValueError, match="a_q and another module both become lora_unet_a_q"):
        to_format(LoraConfig(r=1, target_modules=["q"]), twice, "kohya")


def test_what_has_no_form():
    base = Layers().double()
    with pytest.raises(UnsupportedConfig, match="table is adapted as embedding, for which this has no form"):
        to_format(*adapter(base, lora(target_modules=["table"])), "kohya")
    with pytest.raises(UnsupportedConfig, match="up has lora_B_bias, a bias of B"):
        to_format(*adapter(base, lora(target_modules=["up"], lora_bias=True)), "diffusers")
    with pytest.raises(UnsupportedConfig, match="down has bias, which is trained as a whole|down has weight"):
        to_format(*adapter(base, lora(target_modules=["up"], modules_to_save=["down"])), "diffusers")
    with pytest.raises(ValueError, match=r"form is 'onnx', expected one of \('peft'"):
        to_format(*adapter(base, lora()), "onnx")
    with pytest.raises(ValueError, match="look like none of peft, diffusers"):
        from_format({"weight": torch.ones(1)})
    tensors = {"lora_unet_q.lora_down.weight": torch.ones(1, 2), "lora_unet_q.dora_scale": torch.ones(2)}
    with pytest.raises(ValueError, match="'lora_unet_q.dora_scale' is no factor of a plain LoRA in kohya's form"):
        from_format(tensors, modules=["q"])


# -- fused and separate --------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, fused):
        super().__init__()
        sizes = {"q_proj": 6, "k_proj": 2, "v_proj": 2}
        if fused:
            self.qkv_proj = nn.Linear(5, 10)
        else:
            for name, size in sizes.items():
                setattr(self, name, nn.Linear(5, size))
        self.o_proj = nn.Linear(6, 5)


QKV = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
SIZES = {"q_proj": 6, "k_proj": 2, "v_proj": 2}


def joined(change):
    return torch.cat([change[f"0.{name}.weight"] for name in SIZES])


def test_fused_projections_are_the_separate_ones():
    apart, fused = (nn.Sequential(Attention(one)).double() for one in (False, True))
    config = LoraConfig(r=2, lora_alpha=5, target_modules=[*SIZES, "o_proj"], rank_pattern={"q_proj": 3})
    one = adapter(apart, config)
    new = fuse_projections(*one, QKV)
    assert new[0].rank_pattern or new[0].r == 7
    before, after = changes(apart, one), changes(fused, new)
    torch.testing.assert_close(after["0.qkv_proj.weight"], joined(before), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(after["0.o_proj.weight"], before["0.o_proj.weight"], rtol=1e-12, atol=1e-12)
    again = split_projections(*new, {"qkv_proj": SIZES})
    torch.testing.assert_close(joined(changes(apart, again)), joined(before), rtol=1e-12, atol=1e-12)


def test_fusing_what_was_split_gives_the_same_tensors():
    fused = nn.Sequential(Attention(True)).double()
    one = adapter(fused, LoraConfig(r=2, lora_alpha=5, target_modules=["qkv_proj"]))
    config, tree = fuse_projections(*split_projections(*one, {"qkv_proj": SIZES}), QKV)
    assert (config.r, config.lora_alpha) == (2, 5)
    assert all(torch.equal(tree["0.qkv_proj"][leaf], t) for leaf, t in one[1]["0.qkv_proj"].items())


def test_parts_without_an_adapter_need_their_sizes():
    apart, fused = (nn.Sequential(Attention(one)).double() for one in (False, True))
    one = adapter(apart, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    with pytest.raises(ValueError, match=r"0.qkv_proj has a part 'k_proj' that the adapter is not on.*sizes="):
        fuse_projections(*one, QKV)
    after = changes(fused, fuse_projections(*one, QKV, {"k_proj": 2}))
    torch.testing.assert_close(after["0.qkv_proj.weight"], joined(changes(apart, one)), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"0.q_proj has 6 outputs, and its parts \{'a': 5\} have 5"):
        split_projections(*one, {"q_proj": {"a": 5}})


def test_experts_apart_and_back():
    base = Experts().double()
    one = adapter(base, LoraConfig(r=2, lora_alpha=5, target_parameters=["weights"]))
    root = nn.ModuleDict({"experts": base})
    named = dataclasses.replace(one[0], target_parameters=["experts.weights"]), {"experts.weights": one[1]["weights"]}
    config, tree = split_experts(*named)
    assert sorted(tree) == [f"experts.{i}.weights" for i in range(3)] and config.r == 2 and config.lora_alpha == 5
    scaled = [config.lora_alpha / config.r * own["lora_B"] @ own["lora_A"] for own in tree.values()]
    change = changes(root, named)["experts.weights"]
    torch.testing.assert_close(change, torch.stack(scaled), rtol=1e-12, atol=1e-12)
    assert_same(changes(root, join_experts(config, tree)), changes(root, named))
    del tree["experts.1.weights"]
    with pytest.raises(ValueError, match=r"experts.weights lacks experts \[1\] of 3"):
        join_experts(config, tree)


def test_adapterhubs_names_of_layers():
    def role(path):
        one = {path: {"lora_A": torch.ones(1, 2), "lora_B": torch.ones(2, 1)}}
        return to_format(LoraConfig(r=1, target_modules=[path]), one, "adapterhub").fields["config"]

    assert role("model.layers.0.mlp.down_proj")["intermediate_lora"]  # as in its mixin_llama.py
    assert role("model.layers.0.mlp.up_proj")["output_lora"]
    assert role("encoder.layer.0.output.dense")["output_lora"]
    for path in ("encoder.layer.0.attention.output.dense", "model.layers.0.self_attn.o_proj", "lm_head"):
        with pytest.raises(UnsupportedConfig, match=f"{path} is none of the modules that AdapterHub's config has"):
            role(path)
