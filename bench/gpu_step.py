"""One decode step of Falcon-7B's shape with random weights: time, share of its floor, host syncs.

A step embeds one token for each of three passes, runs all layers, computes logits, draws, and
advances tokens and positions on the device, as the engine's own does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from gpu_report import Report
from gpu_sampler import plain_case, require
from gpu_times import Ceilings, record

from steer_engine import ops
from steer_engine.batch import ROW_ORDER, Batch, DecodeRows
from steer_engine.checkpoint import ModuleKind, linear_shape
from steer_engine.config import FalconConfig
from steer_engine.guidance import Guidance
from steer_engine.kv_cache import KVCache
from steer_engine.loader import ModelLoader
from steer_engine.lora import LoraAdapter, LoraWeights
from steer_engine.model import FalconModel

BLOCK_SIZE, LORA_RANK, SEED = 64, 16, 5


class RandomCheckpoint:
    """What ModelLoader reads, made where it is needed."""

    def __init__(self, config: FalconConfig, device: torch.device, dtype: torch.dtype):
        self.config, self._device, self._dtype = config, device, dtype

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self._device, dtype=self._dtype).mul_(0.02)

    def _norm(self) -> tuple[torch.Tensor, torch.Tensor]:
        size = self.config.hidden_size
        return torch.ones(size, device=self._device), torch.zeros(size, device=self._device)

    def read_embedding(self) -> torch.Tensor:
        return self._random(self.config.vocab_size, self.config.hidden_size)

    def read_untied_head(self) -> None:
        return None

    def read_linear(self, layer: int, kind: ModuleKind) -> torch.Tensor:
        return self._random(*linear_shape(kind, self.config))

    def read_linear_bias(self, layer: int, kind: ModuleKind) -> None:
        return None

    def read_norms(self, layer: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [self._norm()] * self.config.num_layer_norms

    def read_final_norm(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._norm()


@dataclass(frozen=True)
class RandomAdapter(LoraAdapter):
    """An adapter of rank LORA_RANK on every module."""

    device: torch.device

    def read(self, layer: int, kind: ModuleKind) -> LoraWeights:
        out_features, in_features = linear_shape(kind, self.config)
        a = torch.randn(LORA_RANK, in_features, device=self.device)
        return LoraWeights(
            0.02 * a, 0.02 * torch.randn(out_features, LORA_RANK, device=self.device)
        )


class Step:
    """One decode step of num_seqs sequences of seq_len tokens, three passes each.

    folds: combine the passes in front of the head, see steer_engine/head.py.
    """

    def __init__(
        self, model: FalconModel, num_seqs: int, seq_len: int, backend: str, *, folds: bool
    ):
        device, config = model.device, model.config
        num_rows = 3 * num_seqs
        per_row = -(-(seq_len + 64) // BLOCK_SIZE)  # room for the steps that are timed
        self.model, self.backend = model, backend
        self.cache = KVCache(config, num_rows * per_row, BLOCK_SIZE, model.dtype, device)
        for cache in (self.cache.k, self.cache.v):
            cache.normal_()
        blocks = torch.randperm(num_rows * per_row, device=device).int()
        rows = torch.arange(num_rows, device=device)
        batch = Batch(
            input_ids=rows % config.vocab_size,
            block_tables=blocks.view(num_rows, per_row),
            table_ids=rows.int(),
            seq_lens=torch.full_like(rows, seq_len).int(),
            num_domain_tokens=2 * num_seqs,
            block_size=BLOCK_SIZE,
            is_prefill=False,
        )
        logit_rows = rows.view(3, num_seqs)
        limits = torch.full_like(batch.seq_lens, per_row * BLOCK_SIZE)
        self.rows = DecodeRows(batch, logit_rows, list(ROW_ORDER), rows % num_seqs, limits)
        guidances = [Guidance(1.2, -0.2, -0.2)] * num_seqs
        self.head = model.head_rows(guidances, self.rows.passes, folds=folds)
        case = plain_case(torch.zeros(1, config.vocab_size), num_seqs, top_p=0.9)
        self.case = case.to(device)._replace(weights=self.head.weights)
        self._first_len = seq_len

    def reset(self) -> None:
        self.rows.batch.seq_lens.fill_(self._first_len)
        self.case.steps.zero_()

    def __call__(self) -> torch.Tensor:
        case, rows = self.case, self.rows
        residual = self.model.forward(rows.batch, self.cache)
        logits = self.model.compute_logits(residual, rows.logit_rows, self.head)
        sampled = ops.implementation(self.backend).draw(
            logits, case.weights, case.parameters, seed=SEED, stream_ids=case.stream_ids,
            steps=case.steps,
        )  # fmt: skip
        case.steps.add_(1)
        rows.advance(sampled.token_ids)
        return sampled.token_ids


def make_model(
    config: FalconConfig, device: torch.device, dtype: torch.dtype, backend: str
) -> FalconModel:
    """A LoRA domain on random weights: one weight set for all passes."""
    torch.manual_seed(0)
    base = RandomCheckpoint(config, device, dtype)
    adapter = RandomAdapter(Path(), config, {}, None, device)
    loader = ModelLoader(base, adapter, backend, dtype, device)
    return loader.load(max_model_len=4096)


def count_weights(config: FalconConfig) -> tuple[int, int]:
    """Of the body and of the head."""
    layer = sum(math.prod(linear_shape(kind, config)) for kind in ModuleKind)
    return config.num_layers * layer, config.vocab_size * config.hidden_size


def floor_us(config: FalconConfig, num_seqs: int, seq_len: int, ceilings: Ceilings) -> float:
    """KERNELS.md 6, one set: weights or products, whichever takes longer, and the keys."""
    body, head = count_weights(config)
    weights = body + head
    products = 2 * weights * 3 * num_seqs / ceilings.flops_per_s
    kv_bytes = (
        3 * num_seqs * seq_len * 4 * config.num_layers * config.num_kv_heads * config.head_dim
    )
    return 1e6 * (
        max(2 * weights / ceilings.bytes_per_s, products) + kv_bytes / ceilings.bytes_per_s
    )


@torch.inference_mode()
def check_no_syncs(step: Step, num_steps: int = 8) -> str:
    """No operation of a step makes the host wait for the device."""
    step.reset()
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(num_steps):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return f"{num_steps} steps"


@torch.inference_mode()
def check_graph_of_step(step: Step, num_steps: int = 8) -> str:
    """Replays of the captured step draw what single steps draw."""
    for _ in range(2):
        step()  # compiles, and lets buffers grow
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        token_ids = step()

    def replay() -> torch.Tensor:
        graph.replay()
        return token_ids

    def run(advance: Callable[[], torch.Tensor]) -> torch.Tensor:
        step.reset()
        step.rows.batch.input_ids.copy_(step.rows.row_seqs)
        return torch.stack([advance().clone() for _ in range(num_steps)])

    assert torch.equal(run(replay), run(step)), "replays draw other tokens"
    return f"{num_steps} steps of {len(step.case.steps)} sequences"


@torch.inference_mode()
def time_step(
    report: Report,
    model: FalconModel,
    num_seqs: int,
    seq_len: int,
    ceilings: Ceilings,
    backend: str,
    *,
    folds: bool,
) -> None:
    require(backend)
    step = Step(model, num_seqs, seq_len, backend, folds=folds)
    name = f"B={num_seqs}, L={seq_len}, LoRA, {'folded head' if folds else 'three heads'}"
    report.check(f"no host syncs in a decode step, {backend}, {name}", check_no_syncs, step)
    report.check(f"captured decode step, {backend}, {name}", check_graph_of_step, step)
    least = floor_us(model.config, num_seqs, seq_len, ceilings)
    rate = round(num_seqs / least * 1e6)

    def call() -> None:
        step.reset()  # the same length each time
        step()

    for use_graph in (True, False):
        kind = f"{backend}, {'graph' if use_graph else 'single launches'}"
        record(
            report, "decode step", kind, name, lambda: [call], least, use_graph=use_graph,
            tokens_per_s_at_floor=rate,
        )  # fmt: skip
