"""One decode step of Falcon-7B's shape with random weights: time, share of its floor, host syncs.

A step embeds one token for each of three passes, runs all layers, computes logits, draws, and
advances tokens and positions on the device, as the engine's own does. The domain is an adapter,
whose passes share the base's weights, or a full fine-tune: a second weight set, each product of
which is one launch with the base's (kernels/grouped_linear.py).

Largest memory, at 256 sequences of 200 tokens in bf16: both weight sets 27.7 GB, K and V of room
for 320 tokens 2.0 GB, logits 0.2 GB.
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
from steer_engine.checkpoint import Checkpoint, ModuleKind, linear_shape
from steer_engine.config import FalconConfig
from steer_engine.guidance import Guidance
from steer_engine.kv_cache import KVCache
from steer_engine.loader import ModelLoader
from steer_engine.lora import LoraAdapter, LoraWeights
from steer_engine.model import FalconModel

BLOCK_SIZE, LORA_RANK, SEED = 64, 16, 5
BATCH_SIZES, SEQ_LEN = (1, 8, 64, 256), 200
DECODE_STEP = "decode step"
LORA, TWO_SETS, PLAIN = "LoRA", "two sets", "plain"
PASSES_OF_SETS = {LORA: (3,), TWO_SETS: (2, 1), PLAIN: (1,)}  # passes that a weight set serves
GOAL_SHARES = {1: 0.9, 8: 0.9, 256: 0.75}  # of the floor, by sequences


class RandomCheckpoint(Checkpoint):
    """What ModelLoader reads of a checkpoint, made where it is needed; no files, so no checks."""

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
    config: FalconConfig, device: torch.device, dtype: torch.dtype, backend: str, domain: str
) -> FalconModel:
    """Random weights. domain: LORA, one weight set for all passes, or TWO_SETS."""
    torch.manual_seed(0)
    base = RandomCheckpoint(config, device, dtype)
    if domain == TWO_SETS:
        own = RandomCheckpoint(config, device, dtype)
    else:
        own = RandomAdapter(Path(), config, {}, None, device)
    loader = ModelLoader(base, own, backend, dtype, device)
    return loader.load(max_model_len=4096)


def count_weights(config: FalconConfig) -> tuple[int, int]:
    """Of the body and of the head, in one set."""
    layer = sum(math.prod(linear_shape(kind, config)) for kind in ModuleKind)
    return config.num_layers * layer, config.vocab_size * config.hidden_size


def floor_us(
    config: FalconConfig, domain: str, num_seqs: int, seq_len: int, ceilings: Ceilings
) -> float:
    """KERNELS.md 6, in bf16:

        sum over weight sets of (cost of the body + cost of the head) + keys and values

    A cost is the weights' bytes, read once, or the products, whichever takes longer. The body sees
    a row for each pass, the head one for each sequence: a set's passes may be combined in front of
    it. What an adapter adds is left out.

    domain: of PASSES_OF_SETS.
    """

    def cost_s(num_weights: int, num_rows: int) -> float:
        products = 2 * num_weights * num_rows
        return max(2 * num_weights / ceilings.bytes_per_s, products / ceilings.flops_per_s)

    body, head = count_weights(config)
    passes_of_sets = PASSES_OF_SETS[domain]
    weights_s = sum(cost_s(body, n * num_seqs) + cost_s(head, num_seqs) for n in passes_of_sets)
    bytes_per_key = 4 * config.num_layers * config.num_kv_heads * config.head_dim
    kv_bytes = sum(passes_of_sets) * num_seqs * seq_len * bytes_per_key
    return 1e6 * (weights_s + kv_bytes / ceilings.bytes_per_s)


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
    domain: str,
    num_seqs: int,
    seq_len: int,
    ceilings: Ceilings,
    backend: str,
    *,
    folds: bool,
) -> None:
    require(backend)
    step = Step(model, num_seqs, seq_len, backend, folds=folds)
    name = f"B={num_seqs}, L={seq_len}, {domain}, {'folded head' if folds else 'three heads'}"
    report.check(f"no host syncs in a decode step, {backend}, {name}", check_no_syncs, step)
    report.check(f"captured decode step, {backend}, {name}", check_graph_of_step, step)
    least = floor_us(model.config, domain, num_seqs, seq_len, ceilings)

    def call() -> None:
        step.reset()  # the same length each time
        step()

    for use_graph in (True, False):
        kind = f"{backend}, {'graph' if use_graph else 'single launches'}"
        record(
            report, DECODE_STEP, kind, name, lambda: [call], least, use_graph=use_graph,
            # The goal is that of the step as the engine runs it, replayed.
            goal_share=GOAL_SHARES.get(num_seqs) if use_graph else None,
            domain=domain, num_seqs=num_seqs, seq_len=seq_len,
            tokens_per_s_at_floor=round(num_seqs / least * 1e6),
        )  # fmt: skip


def time_steps(
    report: Report,
    device: torch.device,
    domain: str,
    ceilings: Ceilings,
    config: FalconConfig,
    *,
    backend: str = "triton",
    dtype: torch.dtype = torch.bfloat16,
    batch_sizes: tuple[int, ...] = BATCH_SIZES,
    seq_len: int = SEQ_LEN,
) -> str:
    """Every batch size of one domain. Returns the most memory that was taken."""
    require(backend)
    # With two sets the domain's head has two rows per sequence anyway: those of domain and
    # negative, or hi and lo of both combined (steer_engine/head.py).
    folds = (False,) if domain == TWO_SETS else (True, False)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    model = make_model(config, device, dtype, backend, domain)
    for num_seqs in batch_sizes:
        for is_folded in folds:
            time_step(report, model, domain, num_seqs, seq_len, ceilings, backend, folds=is_folded)
    peak_bytes = torch.cuda.max_memory_allocated(device) if on_gpu else model.num_bytes
    return f"{peak_bytes / 2**30:.1f} GiB at most, weights {model.num_bytes / 2**30:.1f} GiB"
