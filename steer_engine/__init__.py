"""A Falcon decoding engine for synthetic text data.

Decoding is steered away from the base model and from examples that exist already.
Start with `Engine.from_pretrained(...)` and `Engine.generate_dataset(...)`.
"""

from .dataset import Example, SyntheticDataset
from .engine import Completion, Engine
from .errors import CapacityError, CheckpointError, DataError, RunError, SteerError
from .generation import Convergence
from .guidance import Guidance
from .machine import EngineConfig
from .methods import Method
from .negatives import NegativePrompts
from .sampling import SamplingParams

__version__ = "0.1.0"

__all__ = [
    "CapacityError",
    "CheckpointError",
    "Completion",
    "Convergence",
    "DataError",
    "Engine",
    "EngineConfig",
    "Example",
    "Guidance",
    "Method",
    "NegativePrompts",
    "RunError",
    "SamplingParams",
    "SteerError",
    "SyntheticDataset",
]
