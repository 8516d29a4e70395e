"""The PEFT that a client's program runs on: torchgraft under its name, where there is no other, or the real one.

A program is run as `python PROGRAM ours|real FILE`. It imports this module first and its client after that, and hands
over what it computed with `record`, which is in the file when the program ends well.
"""

import sys

from without_peft import hide_peft

OURS = sys.argv[1:2] == ["ours"]
if OURS:
    hide_peft()

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

if OURS:
    from torchgraft.adapters import as_peft

    ALIAS = as_peft()

torch.set_num_threads(1)
torch.manual_seed(0)
_RECORDED: dict[str, torch.Tensor] = {}


def record(name, value):
    """Keep a tensor, or numbers, under a new name."""
    assert name not in _RECORDED, name
    _RECORDED[name] = torch.as_tensor(value).detach().clone().contiguous()


def finish():
    """Write what was recorded; the last line of a program."""
    save_file(_RECORDED, sys.argv[2])


def randomise(model, scale=0.3):
    """Give all that is trained other values, in the order of names, so that an adapter shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
