"""How a fine-tune is done: one definition of its settings for Python and the command line."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..config import FalconConfig
from ..errors import check_number
from ..machine import EngineConfig
from ..options import Option


@dataclass(frozen=True)
class FinetuneConfig:
    """How an adapter is trained.

    rank, alpha and the adapted modules (all four linear ones) are the paper's. The other defaults
    are ours, for some hundreds to some ten thousands of short texts and a model of Falcon-7B's
    size; the embedded tiny model wants a learning rate about ten times as high.

    Attributes:
        rank, alpha: of LoRA; the update is alpha / rank * B A.
        dropout: share of an adapter's inputs that is dropped in training.
        learning_rate: the highest; it rises over the first tenth and falls as a cosine to 0.
        weight_decay: AdamW's.
        epochs: how often every example is seen.
        patience: stop after so many epochs in a row without a new best; 0: never.
        batch_size: examples per update.
        held_out_share: of the distinct texts.
        max_model_len: longest prompt plus text in tokens; None: the model's context.
        seed: of the split, the order, the adapter's start and dropout.
        device: as EngineConfig's.
        dtype: of the frozen base, "float32", "bfloat16" or "auto" (bf16 on a GPU that has it); the
            adapter and its optimizer are fp32.
    Raises: ValueError naming the field that is out of range.
    """

    rank: int = 64
    alpha: int = 16
    dropout: float = 0.1
    learning_rate: float = 2e-4
    weight_decay: float = 0.01
    epochs: int = 5
    patience: int = 0
    batch_size: int = 16
    held_out_share: float = 0.05
    max_model_len: int | None = None
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self):
        for name in ("rank", "alpha", "epochs", "batch_size"):
            check_number(name, getattr(self, name), low=1, is_int=True)
        for name in ("patience", "seed"):
            check_number(name, getattr(self, name), low=0, is_int=True)
        check_number("learning_rate", self.learning_rate, low=0.0, low_is_open=True)
        check_number("weight_decay", self.weight_decay, low=0.0)
        check_number("dropout", self.dropout, low=0.0, high=0.9)
        check_number("held_out_share", self.held_out_share, low=0.0, high=0.9, low_is_open=True)

    def resolve(self, model: FalconConfig) -> FinetuneConfig:
        """The same without "auto" and None. Raises ValueError if it does not fit the machine."""
        machine = EngineConfig(
            device=self.device, dtype=self.dtype, max_model_len=self.max_model_len
        ).resolve(model)
        dtype = machine.dtype
        # On a CPU the gain is small and the frozen weights' rounding is for nothing.
        if self.dtype == "auto" and machine.device == "cpu":
            dtype = "float32"
        return replace(
            self, device=machine.device, dtype=dtype, max_model_len=machine.max_model_len
        )


_defaults = FinetuneConfig()
FINETUNE_OPTIONS = (
    Option("base", str, None, "Directory of the base model's checkpoint.", "required"),
    Option(
        "train", str, None, "File of real examples: .jsonl, .csv, .parquet or .txt.", "required"
    ),
    Option("output", str, None, "Directory to write the adapter to.", "required"),
    Option(
        "prompt", str, None, "The instruction that texts answer which have no prompt of their own."
    ),
    Option("resume", bool, True, "Go on with an unfinished fine-tune that the directory holds."),
    Option("rank", int, _defaults.rank, "LoRA's rank r; the default is the paper's."),
    Option("alpha", int, _defaults.alpha, "LoRA's alpha; the default is the paper's."),
    Option(
        "dropout",
        float,
        _defaults.dropout,
        "Share of the adapter's inputs that is dropped in training.",
    ),
    Option(
        "learning_rate",
        float,
        _defaults.learning_rate,
        "Highest learning rate; tiny models want about 2e-3.",
    ),
    Option("weight_decay", float, _defaults.weight_decay, "AdamW's weight decay."),
    Option("epochs", int, _defaults.epochs, "How often every example is seen."),
    Option(
        "patience",
        int,
        _defaults.patience,
        "Stop after so many epochs without a lower held-out loss; 0: never.",
    ),
    Option("batch_size", int, _defaults.batch_size, "Examples per update."),
    Option(
        "held_out_share",
        float,
        _defaults.held_out_share,
        "Share of the texts kept from training, to measure the loss on.",
    ),
    Option(
        "max_model_len", int, None, "Longest prompt plus text in tokens.", "the model's context"
    ),
    Option("seed", int, _defaults.seed, "Seed of every random choice."),
    Option("device", str, _defaults.device, "Where to train: auto, cpu, cuda or cuda:N."),
    Option("dtype", str, _defaults.dtype, "Precision of the base: auto, float32 or bfloat16."),
    Option("progress", bool, True, "Show progress and losses."),
)
