"""How much memory is free for the KV cache."""

from __future__ import annotations

from pathlib import Path

import torch

CGROUP = Path("/sys/fs/cgroup")


def available_bytes(device: torch.device) -> int:
    """Bytes that can be allocated now: free device memory, or the machine's within its container's
    limit.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    values = {name: int(rest.split()[0]) * 1024 for name, rest in (li.split(":") for li in lines)}
    available = values["MemAvailable"]
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        if limit != "max":
            used = int((CGROUP / "memory.current").read_text())
            available = min(available, max(int(limit) - used, 0))
    except (OSError, ValueError):
        pass  # no container limit to read
    return available
