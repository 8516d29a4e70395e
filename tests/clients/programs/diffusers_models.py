"""diffusers' models: adapters added, loaded, weighted, fused, swapped and deleted."""

import tempfile

from side import OURS, finish, randomise, record

# isort: split
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def unet():
    """A UNet with adapters on its attentions and on convolutions."""
    model = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=8, attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )  # fmt: skip
    inputs = {"sample": noise(2, 4, 8, 8), "timestep": torch.tensor(3), "encoder_hidden_states": noise(2, 5, 8)}
    return model, inputs, [*ATTENTION, "conv1"], "cross_attention_kwargs"


def sd3():
    model = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=4, num_attention_heads=2,
        joint_attention_dim=8, caption_projection_dim=8, pooled_projection_dim=8, out_channels=4, pos_embed_max_size=8,
    )  # fmt: skip
    inputs = {
        "hidden_states": noise(2, 4, 8, 8), "encoder_hidden_states": noise(2, 5, 8),
        "pooled_projections": noise(2, 8), "timestep": torch.tensor([3.0, 4.0]),
    }  # fmt: skip
    return model, inputs, ATTENTION, "joint_attention_kwargs"


def flux():
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    inputs = {
        "hidden_states": noise(2, 6, 4), "encoder_hidden_states": noise(2, 5, 8), "pooled_projections": noise(2, 8),
        "timestep": torch.tensor([0.3, 0.4]), "img_ids": noise(6, 3), "txt_ids": torch.zeros(5, 3),
    }  # fmt: skip
    return model, inputs, ATTENTION, "joint_attention_kwargs"


def run(make):
    def fresh():
        torch.manual_seed(0)
        return make()[0].eval()

    def output(**more):
        with torch.no_grad():
            return model(**inputs, **more).sample

    name = make.__name__
    _, inputs, targets, kwargs = make()
    model = fresh()
    base = output()
    state = model.state_dict()
    record(f"{name}.base", base)
    states = {}
    for rank, adapter in ((2, "style"), (3, "task")):
        model.add_adapter(LoraConfig(r=rank, lora_alpha=4, target_modules=targets), adapter)
        assert model.active_adapters() == [adapter]
        if adapter == "style":
            torch.testing.assert_close(output(), base)
        randomise(model)
        state_dict = get_peft_model_state_dict(model, adapter_name=adapter)
        states[adapter] = {key: tensor.clone() for key, tensor in state_dict.items()}
        record(f"{name}.{adapter}", output())
    model(**inputs).sample.square().sum().backward()
    grads = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
    assert all(".task." in key for key in grads)
    record(f"{name}.grads", torch.cat([grads[key].flatten() for key in sorted(grads)]))
    record(f"{name}.scaled", output(**{kwargs: {"scale": 0.5}}))

    model.set_adapters(["style", "task"], [0.7, -0.5])
    weighted = output()
    record(f"{name}.weighted", weighted)
    scaled = output(**{kwargs: {"scale": 0.5}})
    record(f"{name}.weighted and scaled", scaled)
    torch.testing.assert_close(output(), weighted)
    model.disable_lora()
    torch.testing.assert_close(output(), base)
    model.enable_lora()
    torch.testing.assert_close(output(), weighted)
    model.fuse_lora(safe_fusing=True)
    torch.testing.assert_close(output(), weighted, rtol=1e-4, atol=1e-4)
    model.unfuse_lora()
    torch.testing.assert_close(output(), weighted, rtol=1e-4, atol=1e-4)
    model.fuse_lora(lora_scale=0.5, adapter_names=["style"])
    if OURS:  # in PEFT the adapter that is not fused counts for nothing now
        torch.testing.assert_close(output(), scaled, rtol=1e-4, atol=1e-4)
    model.unfuse_lora()
    record(f"{name}.unfused", output())
    model.set_adapters("style")
    record(f"{name}.style again", output())
    if make is unet:
        model.set_adapters(["style"], [{"down": 0.5, "mid": 0.2, "up": {"block_0": 1.5}}])
        record(f"{name}.by block", output())

    with tempfile.TemporaryDirectory() as folder:
        model.set_adapters(["style"], [1.0])
        model.save_lora_adapter(folder, "style")
        style = output()
        model.delete_adapters("style")
        record(f"{name}.after style", output())
        model.delete_adapters("task")
        model.load_lora_adapter(folder, prefix=None, adapter_name="again", use_safetensors=True)
        torch.testing.assert_close(output(), style)
    model.unload_lora()
    assert model.state_dict().keys() == state.keys()
    torch.testing.assert_close(output(), base, rtol=1e-4, atol=1e-4)

    alone = {}
    for adapter, tensors in states.items():
        model = fresh()
        model.load_lora_adapter(dict(tensors), prefix=None, adapter_name="default")
        alone[adapter] = output()
        record(f"{name}.{adapter} loaded", alone[adapter])  # of a scaling factor of 1, for no one gives another
    model = fresh()
    model.enable_lora_hotswap(target_rank=4)
    model.load_lora_adapter(dict(states["style"]), prefix=None, adapter_name="default")
    torch.testing.assert_close(output(), alone["style"])
    for adapter in ("task", "style"):
        model.load_lora_adapter(dict(states[adapter]), prefix=None, adapter_name="default", hotswap=True)
        torch.testing.assert_close(output(), alone[adapter])


if __name__ == "__main__":
    for make in (unet, sd3, flux):
        run(make)
    finish()
