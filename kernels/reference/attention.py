"""Rotary embedding, KV-cache writes and paged attention, in plain PyTorch.

A prefill calls rotary_and_store for all its tokens, then paged_attention: a token reads keys that
others of the same call wrote. A decode step calls mqa_decode, which does both: each row is the
last token of a table of its own, so it reads no key that another row writes.

qkv: [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim], laid out all q, all k, all v.
k_cache, v_cache: [num_blocks, block_size, num_kv_heads, head_dim], one layer's pages.
"""

from __future__ import annotations

import torch

MAX_ROWS_AT_ONCE = 256  # bounds the memory of gathered keys; rows are independent


def rotary_and_store(
    qkv: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    num_heads: int,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
) -> None:
    """Rotate q and k in place by their positions, then write k and v to their cache slots.

    (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), x1 and x2 the halves of head_dim, in fp32.

    Args:
        cos, sin: [max_model_len, head_dim / 2] fp32; None: no rotation (alibi).
        positions: [num_tokens] int32.
        slot_mapping: [num_tokens] int64, block * block_size + offset; -1: do not store.
    Source: RoPE, Su et al. 2021 (arXiv:2104.09864), half-split form.
    """
    head_dim = k_cache.shape[-1]
    heads = qkv.view(qkv.shape[0], -1, head_dim)
    num_kv_heads = (heads.shape[1] - num_heads) // 2
    if cos is not None:
        rotated = heads[:, : num_heads + num_kv_heads]
        x1, x2 = rotated.float().chunk(2, dim=-1)
        c, s = cos[positions.long()][:, None], sin[positions.long()][:, None]
        rotated.copy_(torch.cat((x1 * c - x2 * s, x2 * c + x1 * s), dim=-1))
    is_stored = slot_mapping >= 0
    slots = slot_mapping[is_stored]
    k_cache.view(-1, num_kv_heads, head_dim)[slots] = heads[is_stored, num_heads:-num_kv_heads]
    v_cache.view(-1, num_kv_heads, head_dim)[slots] = heads[is_stored, -num_kv_heads:]


def paged_attention(
    qkv: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    table_ids: torch.Tensor,
    seq_lens: torch.Tensor,
    alibi: torch.Tensor | None,
    num_heads: int,
    scale: float,
    out: torch.Tensor,
) -> torch.Tensor:
    """out = softmax(scale * q K^T + alibi) V for every row.

    A row is one query token; its keys are 0 .. seq_lens[row] - 1 of its table. Decode rows and
    prefill rows are alike: a prefilled token sees as many keys as its position plus one.

    Args:
        block_tables: [num_tables, max_blocks] int32.
        table_ids: [num_tokens] int32, each row's table.
        seq_lens: [num_tokens] int32, how many keys each row sees.
        alibi: [num_heads, max_model_len] fp32, added per key position; None: no bias.
        out: [num_tokens, num_heads * head_dim], dtype of qkv; may be the columns of q.
    Returns: out. Slots at or beyond a row's seq_len are never used; a row of seq_len 0 gives zeros.
    Source: PagedAttention, Kwon et al. 2023 (arXiv:2309.06180); multi-query, Shazeer 2019
        (arXiv:1911.02150).
    """
    block_size, num_kv_heads, head_dim = k_cache.shape[1:]
    num_queries = num_heads // num_kv_heads
    q = qkv[:, : num_heads * head_dim].view(-1, num_kv_heads, num_queries, head_dim).float()
    num_blocks = (seq_lens + block_size - 1) // block_size
    # Rows with equally many blocks go together, so longer neighbours do not change a row's shapes.
    for count in num_blocks.unique().tolist():
        all_rows = (num_blocks == count).nonzero()[:, 0]
        for rows in all_rows.split(MAX_ROWS_AT_ONCE):
            if count == 0:
                out[rows] = 0
                continue
            blocks = block_tables[table_ids[rows].long(), :count].long()
            key_positions = torch.arange(count * block_size, device=qkv.device)
            is_visible = key_positions < seq_lens[rows, None]
            # [rows, num_kv_heads, num_keys, head_dim]; unused slots may hold NaN, which masking
            # alone would not keep out of the product with V.
            k, v = (
                torch.where(is_visible[:, :, None, None], cache[blocks].flatten(1, 2), 0)
                .transpose(1, 2)
                .float()
                for cache in (k_cache, v_cache)
            )
            scores = (q[rows] @ k.transpose(2, 3)) * scale
            if alibi is not None:
                bias = alibi[:, : count * block_size]
                bias = torch.nn.functional.pad(bias, (0, count * block_size - bias.shape[1]))
                scores = scores + bias.view(num_kv_heads, num_queries, -1)
            scores = scores.masked_fill(~is_visible[:, None, None], -torch.inf)
            out[rows] = (scores.softmax(dim=-1) @ v).flatten(1).to(out.dtype)
    return out


def mqa_decode(
    qkv: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    table_ids: torch.Tensor,
    seq_lens: torch.Tensor,
    alibi: torch.Tensor | None,
    num_heads: int,
    scale: float,
    out: torch.Tensor,
) -> torch.Tensor:
    """Rotary, KV write and attention of a decode step: one new token per table.

    Row r is the token at position seq_lens[r] - 1 of table table_ids[r], where its K and V go; it
    sees all keys up to its own. Tables of different rows share no block that a row writes to.

    Args: as in rotary_and_store and paged_attention. seq_lens 0 is a row without a sequence:
        nothing is stored for it, and it gives zeros.
    Returns: out. qkv holds anything afterwards.
    """
    positions, slot_mapping = last_slots(block_tables, table_ids, seq_lens, k_cache.shape[1])
    rotary_and_store(qkv, cos, sin, positions, slot_mapping, num_heads, k_cache, v_cache)
    return paged_attention(
        qkv, k_cache, v_cache, block_tables, table_ids, seq_lens, alibi, num_heads, scale, out
    )


def last_slots(
    block_tables: torch.Tensor, table_ids: torch.Tensor, seq_lens: torch.Tensor, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where mqa_decode's rows stand: positions [num_rows] int32 and slot_mapping [num_rows] int64,
    0 and -1 for a row without a sequence.
    """
    positions = (seq_lens - 1).clamp(min=0)
    blocks = block_tables[table_ids.long(), (positions // block_size).long()].long()
    slots = blocks * block_size + positions % block_size
    return positions, torch.where(seq_lens > 0, slots, -1)
