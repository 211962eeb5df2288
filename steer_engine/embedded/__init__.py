"""The embedded tiny Falcon pair and its real examples; see MODEL_CARD.md beside this file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..engine import Engine
from ..guidance import Guidance
from ..sampling import SamplingParams

HERE = Path(__file__).parent
BASE, DOMAIN, REAL = HERE / "base", HERE / "domain", HERE / "astronomy-questions.jsonl"
PROMPT = "Generate a research question about astronomy:"
# The recommended weights flatten the distribution; a model this small needs it sharper, and the
# plausibility cut keeps out word pieces that the domain model itself finds unlikely.
SAMPLING = SamplingParams(temperature=0.7, top_p=0.9, max_tokens=48, stop=("?",))
ALPHA = 0.02
GUIDANCE = replace(Guidance.recommended(), alpha=ALPHA)

# What the demo shows beside STEER: one pass each.
COMPARED = {
    "base model alone": Guidance(domain=0.0, base=1.0),
    "domain model alone": Guidance(alpha=ALPHA),
}


def load_pair(**settings) -> Engine:
    """The embedded base model with its domain adapter. settings: as Engine.from_pretrained."""
    return Engine.from_pretrained(BASE, DOMAIN, **settings)


def demo_request() -> dict[str, Any]:
    """Arguments of Engine.generate_dataset for the demo, without size and output."""
    return {
        "prompt": PROMPT,
        "real": str(REAL),
        "guidance": GUIDANCE,
        "sampling": SAMPLING,
    }
