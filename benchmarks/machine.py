"""What a timing depends on: processor, threads, system and versions."""

import os
import platform
from pathlib import Path
from typing import Any

import torch

from steerclear.evaluate.run import installed


def facts() -> dict[str, Any]:
    """``machine`` and ``versions`` of a result file."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    machine = {
        "processor": named,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": device,
        "system": platform.platform(),
    }
    return {
        "machine": machine,
        "versions": {name: installed(name) for name in ("steerclear", "torch", "numba", "numpy")},
    }
