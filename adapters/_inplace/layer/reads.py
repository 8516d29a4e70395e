"""Who reads a layer's weight: a module's forward that computes with it, or anybody else.

A parent that reads `child.weight` instead of calling the child (Mamba's `dt_proj`) has to get the adapted weight, and
code outside of a forward sees the base's weight, as in PEFT. So the weight is adapted where a forward is in
progress and the code that reads it does more than to ask for its dtype, its device or its shape.
"""

from __future__ import annotations

import dis
import sys
from types import CodeType, FrameType

import torch
from torch import nn

_NAMES = """
    device dim dtype element_size is_contiguous is_cpu is_cuda is_floating_point is_meta is_quantized is_sparse itemsize
    layout ndim ndimension nelement numel shape size stride
"""
_FACTS = frozenset(_NAMES.split())
"""Attributes of a weight that an adapter does not change."""

_KNOWN: dict[tuple[int, int], tuple[CodeType, bool]] = {}
"""Whether an instruction's value is only asked for a fact, by the code's identity; hashing code takes long."""

_CALL = nn.Module._call_impl.__code__


def computes(depth: int) -> bool:
    """Return whether the code that reads an attribute, `depth` frames up, computes with it in a module's forward.

    Under `torch.compile` that is always so: what is asked for and not needed is not computed there.
    """
    if torch.compiler.is_compiling():
        return True
    frame: FrameType | None = sys._getframe(depth)
    assert frame is not None
    code, at = frame.f_code, frame.f_lasti
    known = _KNOWN.get((id(code), at))
    if known is None:
        known = _KNOWN[id(code), at] = code, asks_for_a_fact(code, at)
    if known[1]:
        return False
    while frame is not None:
        if frame.f_code is _CALL or frame.f_code.co_name == "forward":
            return True
        frame = frame.f_back
    return False


def asks_for_a_fact(code: CodeType, at: int) -> bool:
    """Return whether what an instruction of some code loads is only asked for a fact, as in `self.wo.weight.dtype`.

    Args:
        code: The code.
        at: Offset of the instruction.

    >>> def read(self):
    ...     return self.wo.weight.dtype, self.wo.weight + 1, self.wo.weight is None, isinstance(self.wo.weight, int)
    >>> loads = [one.offset for one in dis.get_instructions(read) if one.argval == "weight"]
    >>> [asks_for_a_fact(read.__code__, at) for at in loads]
    [True, False, True, True]
    """
    found = [one for one in dis.get_instructions(code) if one.opname not in ("CACHE", "EXTENDED_ARG")]
    index = next((i for i, one in enumerate(found) if one.offset == at), None)
    if index is None or index + 1 >= len(found):
        return False
    here, after = found[index], found[index + 1]
    if here.opname.startswith(("CALL", "PRECALL")):
        return any(one.argval == "hasattr" for one in found[max(index - 8, 0) : index])
    if after.opname in ("LOAD_ATTR", "LOAD_METHOD"):
        return after.argval in _FACTS
    if after.opname == "LOAD_CONST" and after.argval is None:
        return index + 2 < len(found) and found[index + 2].opname == "IS_OP"
    if after.opname.startswith("POP_JUMP") and "NONE" in after.opname:
        return True
    start = index
    while start > 0 and found[start].opname in ("LOAD_ATTR", "LOAD_METHOD"):
        start -= 1
    before = next((one for one in reversed(found[:start]) if one.opname != "PUSH_NULL"), None)
    return before is not None and before.opname in ("LOAD_GLOBAL", "LOAD_NAME") and before.argval == "isinstance"
