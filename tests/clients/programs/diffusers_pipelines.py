"""`load_lora_weights` of diffusers' pipelines: from keys of their own, and from those of kohya's scripts.

The oracle is the formula, `W + (alpha / r) up @ down`, in the weights of a copy.
"""

import copy
import tempfile

from side import OURS, finish, record

# isort: split
import diffusers
import torch
import transformers
from diffusers_models import flux, sd3, unet
from peft import get_peft_model_state_dict

ALPHA, RANK = 3.0, 2


def factors(out, into, seed, rank=RANK):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, into, generator=generator) * 0.3, torch.randn(out, rank, generator=generator) * 0.3


def kohya(model, prefix, targets):
    """A file as kohya's scripts write it, and the model with it in its weights."""
    file, merged = {}, copy.deepcopy(model)
    for seed, (path, module) in enumerate(sorted(model.named_modules())):
        if isinstance(module, torch.nn.Linear) and path.endswith(targets):
            down, up = factors(module.out_features, module.in_features, seed)
            name = f"{prefix}_{path.replace('.', '_')}"
            file |= {
                f"{name}.lora_down.weight": down,
                f"{name}.lora_up.weight": up,
                f"{name}.alpha": torch.tensor(ALPHA),
            }
            merged.get_submodule(path).weight.data += ALPHA / RANK * up @ down
    return file, merged


def close(value, wanted):
    torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def stable_diffusion():
    """A UNet, and with torchgraft a text encoder, whose loading transformers does, which PEFT 0.21 is too old for."""
    torch.manual_seed(0)
    model, inputs, _, _ = unet()
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=31,
        max_position_embeddings=8, projection_dim=8,
    )).eval()  # fmt: skip
    ids = torch.arange(5)[None]
    pipe = diffusers.StableDiffusionPipeline(
        vae=None, text_encoder=text, tokenizer=None, unet=model.eval(), safety_checker=None, feature_extractor=None,
        scheduler=diffusers.DDIMScheduler(), requires_safety_checker=False,
    )  # fmt: skip

    def outputs(model=model, text=text):
        return model(**inputs).sample, text(ids).last_hidden_state

    base = outputs()
    file, merged = kohya(model, "lora_unet", ("to_q", "to_k", "to_v", "to_out.0"))
    merged_text = text
    if OURS:
        more, merged_text = kohya(text, "lora_te_text_model", ("q_proj", "k_proj", "v_proj", "out_proj"))
        file |= more
    wanted = outputs(merged, merged_text)
    pipe.load_lora_weights(dict(file), adapter_name="kohya")
    found = outputs()
    close(found, wanted)
    record("stable diffusion.kohya", found[0])

    pipe.set_adapters("kohya", 0.5)
    half = outputs()
    record("stable diffusion.half", half[0])
    pipe.disable_lora()
    close(outputs(), base)
    pipe.enable_lora()
    close(outputs(), half)
    pipe.set_adapters("kohya")
    close(outputs(), wanted)
    components = ["unet", "text_encoder"] if OURS else ["unet"]
    pipe.fuse_lora(components=components, lora_scale=1.0)
    close(outputs(), wanted)
    pipe.unfuse_lora(components=components)
    close(outputs(), wanted)

    with tempfile.TemporaryDirectory() as folder:
        layers = {"unet_lora_layers": get_peft_model_state_dict(model, adapter_name="kohya")}
        metadata = {"unet_lora_adapter_metadata": model.peft_config["kohya"].to_dict()}
        if OURS:
            layers["text_encoder_lora_layers"] = get_peft_model_state_dict(text, adapter_name="kohya")
            metadata["text_encoder_lora_adapter_metadata"] = text.peft_config["kohya"].to_dict()
        pipe.save_lora_weights(folder, **layers, **metadata)
        pipe.load_lora_weights(folder, adapter_name="mine")
        assert set(pipe.get_list_adapters()["unet"]) == {"kohya", "mine"}
    close(outputs(), wanted)
    pipe.set_adapters("kohya")
    close(outputs(), wanted)
    pipe.set_adapters("mine")
    assert pipe.get_active_adapters() == ["mine"]
    close(outputs(), wanted)
    pipe.delete_adapters("kohya")
    close(outputs(), wanted)
    pipe.unload_lora_weights()
    close(outputs(), base)
    assert not [name for name in [*model.state_dict(), *text.state_dict()] if "lora" in name or "base_layer" in name]


@torch.no_grad()
def stable_diffusion_3():
    torch.manual_seed(0)
    model, inputs, targets, _ = sd3()
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=model.eval(), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None,
        tokenizer=None, text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    own, merged = {}, copy.deepcopy(model)
    for seed, (path, module) in enumerate(sorted(model.named_modules())):
        if isinstance(module, torch.nn.Linear) and path.endswith(tuple(targets)):
            down, up = factors(module.out_features, module.in_features, seed, 2 + seed % 2)
            own |= {f"transformer.{path}.lora_A.weight": down, f"transformer.{path}.lora_B.weight": up}
            merged.get_submodule(path).weight.data += up @ down
    pipe.load_lora_weights(own, adapter_name="mine")
    found = model(**inputs).sample
    close(found, merged(**inputs).sample)
    record("stable diffusion 3.own", found)


@torch.no_grad()
def black_forest():
    torch.manual_seed(0)
    model, inputs, _, _ = flux()
    pipe = diffusers.FluxPipeline(
        transformer=model.eval(), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None,
        tokenizer=None, text_encoder_2=None, tokenizer_2=None,
    )  # fmt: skip
    merged = copy.deepcopy(model)
    size = model.transformer_blocks[0].attn.to_q.in_features
    down, up = factors(3 * size, size, 1)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    file = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(ALPHA)}
    attention = merged.transformer_blocks[0].attn
    for module, rows in zip((attention.to_q, attention.to_k, attention.to_v), up.chunk(3), strict=True):
        module.weight.data += ALPHA / RANK * rows @ down
    pipe.load_lora_weights(dict(file), adapter_name="kohya")
    found = model(**inputs).sample
    close(found, merged(**inputs).sample)
    record("flux.kohya", found)
    pipe.unload_lora_weights()
    pipe.enable_lora_hotswap(target_rank=4)
    pipe.load_lora_weights(dict(file), adapter_name="kohya")
    file[f"{name}.lora_up.weight"] = -up
    pipe.load_lora_weights(dict(file), adapter_name="kohya", hotswap=True)
    record("flux.swapped", model(**inputs).sample)


stable_diffusion()
stable_diffusion_3()
black_forest()
finish()
