"""The compiled library's ops: the installed one's, or those of STEER_TEST_LIBRARY, which
test_sanitizers.py sets.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import steer_engine

LIBRARY = Path(
    os.environ.get("STEER_TEST_LIBRARY", Path(next(iter(steer_engine.__path__))) / "_csrc.so")
)
if not LIBRARY.exists():
    pytest.skip(f"{LIBRARY} is not built", allow_module_level=True)
torch.ops.load_library(str(LIBRARY))
ops = torch.ops.steer_engine
BEST_ISA = ops.cpu_isa()
