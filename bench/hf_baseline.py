"""Hugging Face peers of the engine on the same checkpoints, written as a user in good faith would.

Plain sampling is `model.generate`. STEER is the loop that transformers has no class for: a KV cache
for every forward, all sequences in one left-padded batch, combined logits, transformers' own top-p
warper, one multinomial draw. A `Variant` names the choices such a user has; the bench measures them
and compares the engine with the fastest.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch
from checkpoints import Checkpoints

from steer_engine import Guidance
from steer_engine.guidance import PassKind

MODES = ("plain", "steer_full", "steer_lora")
PAD_ID = 0
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Variant:
    """One way to write the baseline.

    attention: "sdpa" or "eager".
    compiled: decode by torch.compile with frozen weights and a static cache; prefill stays eager.
    layout: "generate" is transformers' own loop (plain mode only). "separate" has one forward and
        one cache per pass; "stacked" puts the passes that share weights into one left-padded batch,
        which reads the weights once and pads the short prompts to the long ones.
    lora: "merged" adds the adapter to a copy of the base; "switched" turns one model's adapter on
        and off; "mixed" is PEFT's batch with an adapter per row, one forward for all passes.
    """

    dtype: str = "float32"
    attention: str = "sdpa"
    compiled: bool = False
    layout: str = "separate"
    lora: str = "merged"

    def label(self, mode: str) -> str:
        parts = [self.dtype, self.attention, "compiled" if self.compiled else "eager", self.layout]
        if mode == "steer_lora":
            parts.append(self.lora)
        return " ".join(parts)

    def describe(self) -> dict:
        return asdict(self)


def candidates(mode: str, dtypes: tuple[str, ...], *, with_compiled: bool) -> list[Variant]:
    """The variants worth measuring: each choice is varied alone, not all of them together."""
    layouts = ("generate", "separate") if mode == "plain" else ("separate", "stacked")
    found = []
    for dtype in dtypes:
        first = Variant(dtype)
        found += [replace(first, layout=layout) for layout in layouts]
        found.append(replace(first, attention="eager", layout=layouts[0]))
        if mode == "steer_lora":
            found.append(replace(first, lora="switched"))
            found.append(replace(first, lora="mixed", layout="stacked"))
        if with_compiled:
            found.append(replace(first, compiled=True))
            if mode != "plain":
                found.append(replace(first, compiled=True, layout="stacked"))
    return found


class Group(NamedTuple):
    """Passes that run as one left-padded batch of one model, in row order."""

    model: torch.nn.Module
    kinds: tuple[PassKind, ...]
    adapter: str = "as it is"  # "on", "off": switch it before the forward; "mixed": by row


class CachedForward:
    """One group's forward with its own KV cache over left-padded rows."""

    def __init__(self, group: Group, *, compiled: bool):
        self.group = group
        self._compiled = compiled
        self._decode_forward = group.model.forward
        if compiled:
            # Read when the graph is compiled, in the first decode step.
            torch._inductor.config.freezing = True
            self._decode_forward = torch.compile(group.model.forward, dynamic=False)
        self._static_caches: dict[tuple[int, int], object] = {}

    def prefill(self, prompts: list[list[int]], num_new: int) -> torch.Tensor:
        """Start all rows; returns the logits behind each prompt, [num_rows, vocab_size]."""
        longest = max(map(len, prompts))
        input_ids = torch.full((len(prompts), longest), PAD_ID)
        mask = torch.zeros((len(prompts), longest + num_new), dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            input_ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) : longest] = 1
        self._mask, self._length = mask, longest
        self._cache = self._new_cache(len(prompts), longest + num_new)
        positions = (mask[:, :longest].cumsum(dim=1) - 1).clamp(min=0)
        self._positions = positions[:, -1:]
        return self._run(self.group.model.forward, input_ids, mask[:, :longest], positions)

    def decode(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Append one token to every row, [num_rows]; returns the next logits."""
        self._mask[:, self._length] = 1
        self._length += 1
        self._positions = self._positions + 1
        if self._compiled:
            # A mask of four dimensions and full length goes to the attention as it is, so that the
            # graph's shapes stay.
            mask = self._mask[:, None, None, :].bool()
        else:
            mask = self._mask[:, : self._length]
        return self._run(self._decode_forward, token_ids[:, None], mask, self._positions)

    def _run(self, forward, input_ids, mask, positions) -> torch.Tensor:
        arguments = {
            "input_ids": input_ids,
            "attention_mask": mask,
            "position_ids": positions,
            "past_key_values": self._cache,
            "use_cache": True,
            "logits_to_keep": 1,
        }
        with self._adapter(len(input_ids), arguments):
            return forward(**arguments).logits[:, -1].float()

    def _adapter(self, num_rows: int, arguments: dict):
        model, adapter = self.group.model, self.group.adapter
        if adapter == "mixed":
            per_pass = num_rows // len(self.group.kinds)
            arguments["adapter_names"] = [
                "__base__" if kind is PassKind.BASE else "default"
                for kind in self.group.kinds
                for _ in range(per_pass)
            ]
        return model.disable_adapter() if adapter == "off" else contextlib.nullcontext()

    def _new_cache(self, num_rows: int, max_len: int):
        from transformers import DynamicCache, StaticCache

        if not self._compiled:
            return DynamicCache(config=self.group.model.config)
        key = (num_rows, max_len)
        if key not in self._static_caches:
            # Kept: compiled code is bound to the cache's addresses.
            config = self.group.model.config
            self._static_caches[key] = StaticCache(config=config, max_cache_len=max_len)
        self._static_caches[key].reset()
        return self._static_caches[key]


class HfBaseline:
    """A loaded variant: generates with transformers what the engine generates."""

    def __init__(self, paths: Checkpoints, mode: str, variant: Variant, guidance: Guidance):
        self.variant, self.guidance = variant, guidance
        self._num_passes = 1 if mode == "plain" else len(PassKind)
        self.groups = load_groups(paths, mode, variant)
        self._forwards = [CachedForward(g, compiled=variant.compiled) for g in self.groups]
        self._warper = None

    @torch.inference_mode()
    def generate(
        self,
        prompts: list[list[int]],
        negatives: list[list[int]] | None,
        *,
        num_new: int,
        top_p: float,
        greedy: bool = False,
    ) -> torch.Tensor:
        """Exactly num_new tokens per prompt: [num_seqs, num_new]."""
        if self.variant.layout == "generate":
            return self._transformers_generate(prompts, num_new, top_p, greedy)
        drawn = []
        logits = self.prefill(prompts, negatives, num_new)
        for step in range(num_new):
            token_ids = self._draw(logits, top_p, greedy)
            drawn.append(token_ids)
            if step + 1 < num_new:
                logits = [
                    part
                    for forward in self._forwards
                    for part in forward.decode(token_ids.repeat(len(forward.group.kinds))).chunk(
                        len(forward.group.kinds)
                    )
                ]
        return torch.stack(drawn, dim=1)

    @torch.inference_mode()
    def prefill(self, prompts, negatives, num_new: int) -> list[torch.Tensor]:
        """Logits behind the prompts, one tensor [num_seqs, vocab_size] per pass in self.kinds."""
        texts = {PassKind.DOMAIN: prompts, PassKind.BASE: prompts, PassKind.NEGATIVE: negatives}
        return [
            part
            for forward in self._forwards
            for part in forward.prefill(
                [text for kind in forward.group.kinds for text in texts[kind]], num_new
            ).chunk(len(forward.group.kinds))
        ]

    @property
    def kinds(self) -> list[PassKind]:
        """The passes in the order of prefill's result."""
        return [kind for group in self.groups for kind in group.kinds]

    def combine(self, logits: list[torch.Tensor]) -> torch.Tensor:
        """The guidance's sum over the passes, [num_seqs, vocab_size]."""
        if self._num_passes == 1:
            return logits[0]
        pairs = zip(self.kinds, logits, strict=True)
        return sum(self.guidance.weights[kind] * part for kind, part in pairs)

    def _draw(self, logits: list[torch.Tensor], top_p: float, greedy: bool) -> torch.Tensor:
        from transformers import TopPLogitsWarper

        combined = self.combine(logits)
        if greedy:
            return combined.argmax(dim=-1)
        if self._warper is None:
            self._warper = TopPLogitsWarper(top_p)
        probs = self._warper(None, combined).softmax(dim=-1)
        return torch.multinomial(probs, 1)[:, 0]

    def _transformers_generate(self, prompts, num_new, top_p, greedy) -> torch.Tensor:
        """transformers' own loop; prompts of one length, so no padding is needed."""
        input_ids = torch.tensor(prompts)
        settings = {"do_sample": False} if greedy else {"do_sample": True, "top_p": top_p}
        result = self.groups[0].model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=num_new,
            min_new_tokens=num_new,
            pad_token_id=PAD_ID,
            top_k=0,
            **settings,
        )
        return result[:, input_ids.shape[1] :]


def load_groups(paths: Checkpoints, mode: str, variant: Variant) -> list[Group]:
    """Load the models of a mode and say which passes run together."""
    base_kind, own_kinds = (PassKind.BASE,), (PassKind.DOMAIN, PassKind.NEGATIVE)
    base = load_model(paths.base, variant)
    if mode == "plain":
        return [Group(base, (PassKind.DOMAIN,))]
    is_stacked = variant.layout == "stacked"
    if mode == "steer_full" or variant.lora == "merged":
        if mode == "steer_full":
            domain = load_model(paths.finetune, variant)
        else:
            domain = load_adapter(load_model(paths.base, variant), paths).merge_and_unload()
        split = [own_kinds] if is_stacked else [(kind,) for kind in own_kinds]
        return [*(Group(domain, kinds) for kinds in split), Group(base, base_kind)]
    adapted = load_adapter(base, paths)
    if variant.lora == "mixed":
        return [Group(adapted, own_kinds + base_kind, "mixed")]
    split = [own_kinds] if is_stacked else [(kind,) for kind in own_kinds]
    return [*(Group(adapted, kinds, "on") for kinds in split), Group(adapted, base_kind, "off")]


def load_model(directory, variant: Variant):
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=DTYPES[variant.dtype], attn_implementation=variant.attention
    ).eval()


def load_adapter(model, paths: Checkpoints):
    from peft import PeftModel

    # Without a network: the adapter's folder is all there is.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return PeftModel.from_pretrained(model, str(paths.adapter)).eval()
