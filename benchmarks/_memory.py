"""Bytes: what autograd keeps, the most that a call has at once, and the most that a process had."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor


def saved_bytes(forward: Callable[[], Tensor], own: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps for the backward, each storage once, without parameters and buffers."""
    known = {tensor.untyped_storage().data_ptr() for tensor in own}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        dense = (tensor._indices(), tensor._values()) if tensor.layout == torch.sparse_coo else (tensor,)
        for part in dense:
            storage = part.untyped_storage()
            if storage.data_ptr() not in known:
                kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
        total = sum(kept.values())
    del loss
    return total


def peak_bytes(run: Callable[[], object]) -> int:
    """The most memory that a call on the CPU holds at once, over what was there before: the allocator's own record."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def most_mb() -> float:
    """The most RAM that this process had, on Linux; what `getrusage` says begins with its parent's."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None, "/proc/self/status has no VmHWM"
    return int(found[1]) / 1024
