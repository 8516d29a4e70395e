"""Names that a UNet's modules have in the original implementation of latent diffusion, as in files for SDXL."""

from __future__ import annotations

import re
from collections.abc import Collection

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_PART = re.compile(
    r"(?P<side>down|up)_blocks\.(?P<block>\d+)\.(?P<kind>resnets|attentions|downsamplers|upsamplers)\.\d+"
)


def original_names(names: Collection[str]) -> dict[str, str]:
    """Return the original name of each module of a diffusers UNet; modules that are none of a UNet's are left out.

    The original counts the parts of all blocks of a side in one row, `input_blocks.0` being the first convolution, and
    names what a part is made of by its place: the residual block is 0, an attention 1, what changes the size comes
    after them. How many parts a block has is read from the names, so they must be those of the whole model.

    Sources: CompVis latent-diffusion `ldm/modules/diffusionmodules/openaimodel.py` (`UNetModel`); diffusers
    `models/unets/unet_2d_condition.py`, `loaders/lora_conversion_utils.py`.

    Args:
        names: The names of the model's modules.

    >>> names = ["conv_in", "down_blocks.0.resnets.0.conv1", "down_blocks.0.downsamplers.0.conv"]
    >>> list(original_names(names).values())
    ['input_blocks.0.0', 'input_blocks.1.0.in_layers.2', 'input_blocks.2.0.op']
    """
    places = _OUTSIDE | _places(names)
    found = {}
    for name in names:
        start = next((one for one in _starts(name) if one in places), None)
        if start is not None:
            found[name] = ".".join(filter(None, [places[start], _inside(start, name[len(start) + 1 :])]))
    return found


def _starts(name: str) -> list[str]:
    """Return the name and those of the modules around it, the innermost first."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), 0, -1)]


def _inside(start: str, rest: str) -> str:
    """Return the name that a module has within its part of a block."""
    if ".resnets." in start:
        head, dot, tail = rest.partition(".")
        return _RESNET.get(head, head) + dot + tail
    return "op" if ".downsamplers." in start and rest == "conv" else rest


def _places(names: Collection[str]) -> dict[str, str]:
    """Return the place of each part of the blocks on both sides."""
    blocks: dict[tuple[str, int], dict[str, set[str]]] = {}
    for match in filter(None, map(_PART.match, names)):
        kinds = blocks.setdefault((match["side"], int(match["block"])), {})
        kinds.setdefault(match["kind"], set()).add(match[0])
    places, count = {}, {"down": 1, "up": 0}  # the first convolution comes before the blocks that go down
    for (side, block), kinds in sorted(blocks.items()):
        start, row = f"{side}_blocks.{block}", "input_blocks" if side == "down" else "output_blocks"
        resnets, attentions = len(kinds.get("resnets", ())), len(kinds.get("attentions", ()))
        for index in range(resnets):
            places[f"{start}.resnets.{index}"] = f"{row}.{count[side] + index}.0"
            places[f"{start}.attentions.{index}"] = f"{row}.{count[side] + index}.1"
        count[side] += resnets
        if "downsamplers" in kinds:
            places[f"{start}.downsamplers.0"] = f"{row}.{count[side]}.0"
            count[side] += 1
        places[f"{start}.upsamplers.0"] = f"{row}.{count[side] - 1}.{2 if attentions else 1}"
    return places
