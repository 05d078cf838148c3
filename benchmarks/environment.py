"""The environment of a measurement, which every recorded result contains (see README.md)."""

from __future__ import annotations

import platform
from datetime import date
from importlib import metadata
from pathlib import Path

import torch


def environment(device: torch.device) -> dict:
    """Date, hardware, threads and versions."""
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    packages = ("torch", "transformers", "lightning", "lskip")
    return {
        "date": date.today().isoformat(),
        "hardware": hardware,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in packages},
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
