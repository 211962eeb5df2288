"""What gpu_check.py found, written to its file after every entry: a time-out loses nothing."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


class NotThereError(Exception):
    """A backend, tool or size that this machine does not have; the message says why."""


class Report:
    """Checks and times of one run.

    deadline_s: entries that would begin later are noted as skipped.
    """

    def __init__(self, path: Path, device: torch.device, deadline_s: float = float("inf")):
        self.path, self.device = path, device
        self._started_at, self._deadline_s = time.monotonic(), deadline_s
        self.content = {"machine": describe_machine(device), "checks": [], "times": []}
        self.save()

    def elapsed_s(self) -> float:
        return time.monotonic() - self._started_at

    def check(self, name: str, function: Callable, *arguments, **named) -> None:
        """Run a check; it passes if it returns, with what it returns as detail."""
        started_at = time.monotonic()
        if self.elapsed_s() > self._deadline_s:
            outcome, detail = "skipped", "out of time"
        else:
            try:
                outcome, detail = "passed", function(*arguments, **named)
            except NotThereError as error:
                outcome, detail = "not there", str(error)
            except Exception as error:  # one broken part must not hide the others
                last = traceback.extract_tb(error.__traceback__)[-1]
                where = f"{Path(last.filename).name}:{last.lineno}"
                outcome, detail = "failed", f"{type(error).__name__} at {where}: {error}"
        seconds = round(time.monotonic() - started_at, 2)
        entry = {"name": name, "outcome": outcome, "detail": detail, "seconds": seconds}
        self.content["checks"].append(entry)
        print(f"{outcome:9} {name} ({seconds} s) {str(detail or '')[:300]}", flush=True)
        self.save()

    def time(self, entry: dict) -> None:
        self.content["times"].append(entry)
        print(format_time(entry), flush=True)
        self.save()

    def save(self) -> None:
        self.content["elapsed_s"] = round(self.elapsed_s(), 1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.content, indent=1) + "\n")
        temporary.replace(self.path)

    @property
    def num_failed(self) -> int:
        return sum(check["outcome"] == "failed" for check in self.content["checks"])


def format_time(entry: dict) -> str:
    """One line of the table."""
    floor, share = entry.get("floor_us"), entry.get("share_of_floor")
    against = f"floor {floor:9.1f} us, share {share:5.2f}" if floor else ""
    if "meets_goal" in entry:
        against += f", goal {entry['goal_share']:.2f} {'met' if entry['meets_goal'] else 'missed'}"
    for domain, speedup in entry.get("engine_is_faster", {}).items():
        against += f", engine {speedup:.1f}x ({domain})"
    if "against" in entry:
        against += f", {entry['share_of_it']:.2f} of {entry['against']}"
    return (
        f"{entry['op']:14} {entry['implementation']:27} {entry['size']:35} "
        f"{entry['median_us']:10.1f} us ({entry['p20_us']:.1f} to {entry['p80_us']:.1f}) {against}"
    )


def describe_machine(device: torch.device) -> dict:
    """Device, driver, versions, commit."""
    machine = {
        "device": device.type,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "flashinfer": version_of("flashinfer"),
        "commit": run_quietly(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]),
        "is_changed": bool(run_quietly(["git", "-C", str(ROOT), "status", "--porcelain", "-uno"])),
        "cores": len(os.sched_getaffinity(0)),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit"]
        machine |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "num_processors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "l2_mib": properties.L2_cache_size / 2**20,
            "driver_clock_power": run_quietly([*query, "--format=csv,noheader"]),
            "cuda": torch.version.cuda,
        }
    return machine


def version_of(package: str) -> str | None:
    try:
        return __import__(package).__version__
    except Exception:  # not installed, or broken: not there either way
        return None


def run_quietly(command: list[str]) -> str:
    """A command's output, or "" where it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
