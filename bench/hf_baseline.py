"""Hugging Face peers of the engine on the same checkpoints, written as a user in good faith would.

Plain sampling is `model.generate`. STEER is the loop that transformers has no class for: a KV cache
for every forward, all sequences in one left-padded batch, combined logits, transformers' own top-p
warper, one multinomial draw. A `Variant` names the choices such a user has; the bench measures them
and compares the engine with the fastest.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch
from checkpoints import Checkpoints

from steer_engine import Guidance
from steer_engine.guidance import PassKind

MODES = ("plain", "steer_full", "steer_lora")
DOMAIN_KINDS, BASE_KINDS = (PassKind.DOMAIN, PassKind.NEGATIVE), (PassKind.BASE,)
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


Capture = Callable[[Callable[[], None]], Callable[[], None]]


class CachedForward:
    """One group's forward with its own KV cache over left-padded rows.

    capture: makes a replay of a launch, as a CUDA graph; decode steps are then replays, with a
        static cache. None: every operation is launched.
    """

    def __init__(self, group: Group, *, compiled: bool, capture: Capture | None = None):
        self.group = group
        self._compiled, self._capture = compiled, capture
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
        self._mask, self._length = mask.to(self._device), longest
        self._cache = self._new_cache(len(prompts), longest + num_new)
        positions = (self._mask[:, :longest].cumsum(dim=1) - 1).clamp(min=0)
        self._positions = positions[:, -1:].clone()
        self._replay = None
        input_ids = input_ids.to(self._device)
        return self._run(self.group.model.forward, input_ids, self._mask[:, :longest], positions)

    def begin(self, num_rows: int, length: int, num_new: int) -> None:
        """Start rows of `length` tokens with random keys, for decode steps that are only timed.

        Falcon with one K and one V head.
        """
        attention = self.group.model.transformer.h[0].self_attention
        shape = (num_rows, 1, length, attention.head_dim)
        mask = torch.zeros((num_rows, length + num_new), dtype=torch.int64, device=self._device)
        mask[:, :length] = 1
        self._mask, self._length = mask, length
        self._positions = torch.full((num_rows, 1), length - 1, device=self._device)
        self._cache = self._new_cache(num_rows, length + num_new)
        self._replay = None
        for layer in range(self.group.model.config.num_hidden_layers):
            k, v = torch.randn(2, *shape, device=self._device, dtype=self.group.model.dtype)
            self._cache.update(k, v, layer)

    def decode(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Append one token to every row, [num_rows]; returns the next logits."""
        self._mask[:, self._length] = 1
        self._length += 1
        self._positions += 1
        if self._capture is not None:
            return self._decode_by_replay(token_ids)
        # A mask of four dimensions and full length goes to the attention as it is, so that the
        # graph's shapes stay.
        mask = self._full_mask() if self._compiled else self._mask[:, : self._length]
        return self._run(self._decode_forward, token_ids[:, None], mask, self._positions)

    def _decode_by_replay(self, token_ids: torch.Tensor) -> torch.Tensor:
        """What changes from step to step lies in tensors that stay where they are."""
        if self._replay is None:
            self._input_ids = token_ids[:, None].clone()

            def launch() -> None:
                self._logits = self._run(
                    self._decode_forward, self._input_ids, self._full_mask(), self._positions
                )

            self._replay = self._capture(launch)
            for layer in self._cache.layers:  # a capture's warm-up has advanced them
                layer.cumulative_length.fill_(self._length - 1)
        self._input_ids.copy_(token_ids[:, None])
        self._replay()
        return self._logits

    def _full_mask(self) -> torch.Tensor:
        return self._mask[:, None, None, :].bool()

    @property
    def _device(self) -> torch.device:
        return self.group.model.device

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

        if not self._compiled and self._capture is None:
            return DynamicCache(config=self.group.model.config)
        key = (num_rows, max_len)
        if key not in self._static_caches:
            # Kept: compiled code is bound to the cache's addresses.
            config = self.group.model.config
            self._static_caches[key] = StaticCache(config=config, max_cache_len=max_len)
        self._static_caches[key].reset()
        return self._static_caches[key]


class HfBaseline:
    """A variant and its models: generates with transformers what the engine generates.

    capture: see CachedForward.
    """

    def __init__(
        self,
        groups: list[Group],
        variant: Variant,
        guidance: Guidance,
        capture: Capture | None = None,
    ):
        self.groups, self.variant, self.guidance = groups, variant, guidance
        self._forwards = [
            CachedForward(group, compiled=variant.compiled, capture=capture) for group in groups
        ]
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
            token_ids = self.draw(logits, top_p, greedy)
            drawn.append(token_ids)
            if step + 1 < num_new:
                logits = self.decode(token_ids)
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

    @torch.inference_mode()
    def begin(self, num_seqs: int, length: int, num_new: int) -> None:
        """In place of prefill, see CachedForward.begin."""
        for forward in self._forwards:
            forward.begin(num_seqs * len(forward.group.kinds), length, num_new)

    @torch.inference_mode()
    def decode(self, token_ids: torch.Tensor) -> list[torch.Tensor]:
        """Append a token to every sequence, [num_seqs]; logits as from prefill."""
        return [
            part
            for forward in self._forwards
            for part in forward.decode(token_ids.repeat(len(forward.group.kinds))).chunk(
                len(forward.group.kinds)
            )
        ]

    @property
    def kinds(self) -> list[PassKind]:
        """The passes in the order of prefill's result."""
        return [kind for group in self.groups for kind in group.kinds]

    def combine(self, logits: list[torch.Tensor]) -> torch.Tensor:
        """The guidance's sum over the passes, [num_seqs, vocab_size]."""
        if len(logits) == 1:
            return logits[0]
        pairs = zip(self.kinds, logits, strict=True)
        return sum(self.guidance.weights[kind] * part for kind, part in pairs)

    @torch.inference_mode()
    def draw(self, logits: list[torch.Tensor], top_p: float, greedy: bool) -> torch.Tensor:
        """A token per sequence, [num_seqs]."""
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
        input_ids = torch.tensor(prompts, device=self.groups[0].model.device)
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
    base = load_model(paths.base, variant)
    if mode == "plain":
        return [Group(base, (PassKind.DOMAIN,))]
    is_stacked = variant.layout == "stacked"
    if mode == "steer_full" or variant.lora == "merged":
        if mode == "steer_full":
            domain = load_model(paths.finetune, variant)
        else:
            domain = load_adapter(load_model(paths.base, variant), paths).merge_and_unload()
        return two_model_groups(domain, base, is_stacked=is_stacked)
    adapted = load_adapter(base, paths)
    if variant.lora == "mixed":
        return [Group(adapted, DOMAIN_KINDS + BASE_KINDS, "mixed")]
    split = [DOMAIN_KINDS] if is_stacked else [(kind,) for kind in DOMAIN_KINDS]
    return [*(Group(adapted, kinds, "on") for kinds in split), Group(adapted, BASE_KINDS, "off")]


def two_model_groups(domain, base, *, is_stacked: bool) -> list[Group]:
    """Domain and base as models of their own. is_stacked: domain and negative in one batch."""
    split = [DOMAIN_KINDS] if is_stacked else [(kind,) for kind in DOMAIN_KINDS]
    return [*(Group(domain, kinds) for kinds in split), Group(base, BASE_KINDS)]


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
