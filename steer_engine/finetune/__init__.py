"""The domain model, learnt as a PEFT LoRA adapter from real examples (extra `train`)."""

from .config import FINETUNE_OPTIONS, FinetuneConfig
from .data import TrainingExample
from .record import FinetuneRecord
from .run import finetune

__all__ = ["FINETUNE_OPTIONS", "FinetuneConfig", "FinetuneRecord", "TrainingExample", "finetune"]
