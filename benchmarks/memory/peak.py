"""Peak memory of tensors while a function runs."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler announces each start and end otherwise


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Bytes at the highest point of `work()`, above those that were there before it.

    On a GPU the allocator's own count. On a CPU the profiler's record of every allocation and release: what
    tensors and the workspaces of torch's own kernels take, but not what a library allocates by itself.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    return _highest(_changes(record))


def _changes(record: profile) -> list[int]:
    """Bytes of each allocation (positive) and release (negative), in order."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        record.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    memory = [event for event in events if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0]
    return [event["args"]["Bytes"] for event in sorted(memory, key=lambda event: event["ts"])]


def _highest(changes: list[int]) -> int:
    now = highest = 0
    for change in changes:
        now += change
        highest = max(highest, now)
    return highest


def resident_bytes(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """What stays between steps: weights, buffers and the optimizer's state."""
    state = [value for entry in optimizer.state.values() for value in entry.values()]
    tensors = [*module.parameters(), *module.buffers(), *(part for part in state if isinstance(part, torch.Tensor))]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
