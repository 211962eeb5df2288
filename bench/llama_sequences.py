"""What llama_baseline.py needs of llama.cpp's C interface: sequences that continue together, and
the sampler chain. Filling and reading is done through numpy, so that Python costs little.
"""

from __future__ import annotations

import ctypes
import sys

import llama_cpp
import numpy as np

# A split cache gives every sequence whole units of so many cells.
CACHE_UNIT = 256
SAMPLER_SEED = 0
LOG_LEVEL_ERROR = 4  # ggml_log_level, which llama-cpp-python does not name


class Sequences:
    """A llama_context in which num_seqs sequences continue together, each with its own cache."""

    def __init__(
        self,
        model,
        *,
        num_seqs: int,
        max_len: int,
        flash_attention: bool,
        unified_cache: bool,
        exact_cache: bool,
        threads: int,
    ):
        self.num_seqs = num_seqs
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        params = llama_cpp.llama_context_default_params()
        seq_len = max_len if unified_cache else -(-max_len // CACHE_UNIT) * CACHE_UNIT
        params.n_ctx = num_seqs * seq_len
        params.n_batch = num_seqs * max_len
        params.n_seq_max = num_seqs
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = unified_cache
        params.flash_attn_type = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
            if flash_attention
            else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        if exact_cache:
            params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        self.context = llama_cpp.llama_init_from_model(model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp made no context of {num_seqs} x {max_len} tokens")
        self._batch = Batch(params.n_batch)

    def prefill(self, texts: list[list[int]]) -> np.ndarray:
        """Start all sequences; returns the logits behind each text, [num_seqs, vocab_size]."""
        # False: forget the sequences, but do not write zeros over their cells.
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), False)
        lens = np.array([len(text) for text in texts])
        self._last_positions = lens - 1
        positions = np.concatenate([np.arange(length) for length in lens])
        seqs = np.repeat(np.arange(self.num_seqs), lens)
        return self._run(np.concatenate(texts), positions, seqs, lens.cumsum() - 1)

    def decode(self, token_ids: list[int]) -> np.ndarray:
        """Append one token to every sequence; returns the next logits."""
        self._last_positions += 1
        seqs = np.arange(self.num_seqs)
        return self._run(token_ids, self._last_positions, seqs, seqs)

    def _run(self, token_ids, positions, seqs, wanted) -> np.ndarray:
        batch = self._batch.fill(token_ids, positions, seqs, wanted)
        status = llama_cpp.llama_decode(self.context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode of {len(seqs)} tokens: status {status}")
        shape = (self.num_seqs, self.vocab_size)
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits(self.context), shape)


class Batch:
    """A llama_batch over numpy arrays, so that filling it is a few copies, not a loop."""

    def __init__(self, num_tokens: int):
        self._token_ids = np.zeros(num_tokens, dtype=np.int32)
        self._positions = np.zeros(num_tokens, dtype=np.int32)
        self._seqs = np.zeros(num_tokens, dtype=np.int32)
        self._wanted = np.zeros(num_tokens, dtype=np.int8)
        self._num_seqs_of_token = np.ones(num_tokens, dtype=np.int32)
        # A token's list of sequences is a pointer; all have one sequence.
        offsets = self._seqs.itemsize * np.arange(num_tokens, dtype=np.uintp)
        self._seqs_at = self._seqs.ctypes.data + offsets
        arrays = {
            "token": self._token_ids,
            "pos": self._positions,
            "n_seq_id": self._num_seqs_of_token,
            "seq_id": self._seqs_at,
            "logits": self._wanted,
        }
        self._batch = llama_cpp.llama_batch()
        for name, kind in llama_cpp.llama_batch._fields_:
            if name in arrays:
                setattr(self._batch, name, arrays[name].ctypes.data_as(kind))

    def fill(self, token_ids, positions, seqs, wanted):
        """The llama_batch of these tokens; wanted: indices of those whose logits are needed."""
        count = self._batch.n_tokens = len(token_ids)
        self._token_ids[:count] = token_ids
        self._positions[:count] = positions
        self._seqs[:count] = seqs
        self._wanted[:count] = 0
        self._wanted[wanted] = 1
        return self._batch


class Sampler:
    """llama.cpp's chain of top-p and a draw."""

    def __init__(self, top_p: float, vocab_size: int):
        self._chain = llama_cpp.llama_sampler_chain_init(
            llama_cpp.llama_sampler_chain_default_params()
        )
        for sampler in (
            llama_cpp.llama_sampler_init_top_p(top_p, 1),
            llama_cpp.llama_sampler_init_dist(SAMPLER_SEED),
        ):
            llama_cpp.llama_sampler_chain_add(self._chain, sampler)
        fields = [("id", np.int32), ("logit", np.float32), ("p", np.float32)]
        self._candidates = np.zeros(vocab_size, dtype=fields)
        self._ids = np.arange(vocab_size, dtype=np.int32)
        pointer = self._candidates.ctypes.data_as(llama_cpp.llama_token_data_p)
        self._array = llama_cpp.llama_token_data_array(pointer, vocab_size, -1, False)

    def sample_from(self, sequences: Sequences) -> list[int]:
        """Draw from the context's last logits; -1 is the last sequence's row."""
        return [
            llama_cpp.llama_sampler_sample(self._chain, sequences.context, row)
            for row in range(-sequences.num_seqs, 0)
        ]

    def sample(self, logits: np.ndarray) -> list[int]:
        """Draw from rows of logits, [num_seqs, vocab_size], that llama.cpp has not made."""
        return [self._sample_row(row) for row in logits]

    def _sample_row(self, row: np.ndarray) -> int:
        # The chain sorts and shortens its candidates.
        self._candidates["id"], self._candidates["logit"] = self._ids, row
        self._array.size, self._array.selected, self._array.sorted = len(row), -1, False
        llama_cpp.llama_sampler_apply(self._chain, ctypes.byref(self._array))
        return int(self._candidates["id"][self._array.selected])


@llama_cpp.llama_log_callback
def log_errors_alone(level, text, _):
    if level == LOG_LEVEL_ERROR:
        sys.stderr.write(text.decode(errors="replace"))


def load_model(path: str):
    """The model of a GGUF file; llama.cpp's chatter is dropped, its errors go to stderr."""
    llama_cpp.llama_log_set(log_errors_alone, None)
    model = llama_cpp.llama_model_load_from_file(
        path.encode(), llama_cpp.llama_model_default_params()
    )
    if not model:
        raise RuntimeError(f"llama.cpp does not load {path}")
    return model
