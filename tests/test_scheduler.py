"""Continuous batching: who runs when, which rows a forward gets, and what waits."""

from __future__ import annotations

from collections import Counter

import helpers
import numpy as np
import pytest
import torch

from steer_engine import Guidance, SamplingParams
from steer_engine.guidance import PassKind

FIXED = {"ignore_eos": True}


class Forwards:
    """Records the batches that an engine's model gets."""

    def __init__(self, engine):
        self.batches = []
        forward = engine.model.forward

        def recording(batch, kv_cache):
            # Copies: the next step advances a decode step's tensors in place.
            copies = [t.clone() if isinstance(t, torch.Tensor) else t for t in batch]
            self.batches.append(type(batch)(*copies))
            return forward(batch, kv_cache)

        engine.model.forward = recording

    @property
    def sizes(self) -> list[int]:
        return [batch.input_ids.shape[0] for batch in self.batches]


def queue(engine, items) -> None:
    for item in items:
        prompts = {kind: list(item.prompt) for kind in (PassKind.DOMAIN, PassKind.BASE)}
        prompts[PassKind.NEGATIVE] = list(item.negative)
        engine.scheduler.waiting.append(
            engine.make_sequence(
                item.stream_id, item.stream_id, prompts, item.guidance, item.sampling
            )
        )


def sampling(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, **FIXED)


def test_a_finished_sequences_place_is_filled_at_once(make_engine, make_item):
    engine = make_engine(max_num_seqs=3)
    lengths = [5, 1, 2, 7, 1, 1, 3, 4, 2]
    queue(engine, [make_item(i, [5, 6 + i], sampling=sampling(n)) for i, n in enumerate(lengths)])
    num_running, finished_at = [], {}
    decode_rows = engine.scheduler.decode_rows

    def counting():
        num_running.append(len(engine.scheduler.running))
        return decode_rows()

    engine.scheduler.decode_rows = counting
    while engine.scheduler.num_queued:
        for sequence in engine.step(0):
            finished_at[sequence.key] = len(num_running)
    # Three places, first come first served, by hand:
    #   step      1 2 3 4 5 6 7 8 9
    #   place A   0 0 0 0 0 7 7 7 7
    #   place B   1 3 3 3 3 3 3 3
    #   place C   2 2 4 5 6 6 6 8 8
    assert finished_at == {0: 5, 1: 1, 2: 2, 3: 8, 4: 3, 5: 4, 6: 7, 7: 9, 8: 9}
    assert num_running == [3] * 8 + [2]
    assert engine.kv_cache.num_free_blocks == engine.kv_cache.num_blocks


def test_rows_are_stacked_domain_negative_base(make_engine, make_item):
    engine = make_engine()
    queue(engine, [make_item(i, [10 + i], [20 + i]) for i in range(3)])
    engine.scheduler.admit()
    engine.scheduler.start(engine.scheduler.next_prefill(512).complete)
    rows = engine.scheduler.decode_rows()
    assert rows.batch.input_ids.tolist() == [10, 11, 12, 20, 21, 22, 10, 11, 12]
    assert rows.batch.num_domain_tokens == 6
    assert rows.passes == [PassKind.DOMAIN, PassKind.NEGATIVE, PassKind.BASE]
    assert rows.logit_rows.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


@pytest.mark.parametrize(
    ("guidance", "num_rows"),
    [
        (Guidance.none(), 1),
        (Guidance.contrastive(0.3), 2),
        (Guidance.cfg(1.5), 2),
        (Guidance.steer(0.0, 0.3), 2),
        (Guidance.steer(0.2, 1.0), 2),  # as printed, 1 - eta = 0
        (Guidance.steer(0.2, 0.3), 3),
        (Guidance(0.0, 1.0, 0.0), 1),
        (Guidance(0.0, 1.0, 0.0, alpha=0.1), 2),  # the cut reads the domain logits
        (Guidance(0.0, 0.0, 1.0), 1),
    ],
)
def test_a_pass_of_weight_zero_is_not_run(make_engine, guidance, num_rows):
    engine = make_engine()
    forwards = Forwards(engine)
    engine.generate(
        [[5], [6], [7]],
        negative_prompts=[[8], [9], [10]],
        guidance=guidance,
        sampling=sampling(4),
    )
    assert forwards.sizes == [3 * num_rows] * 4


def test_sequences_with_different_passes_share_a_batch_and_run_only_their_own(
    make_engine, make_item
):
    engine = make_engine()
    forwards = Forwards(engine)
    guidances = [Guidance.none(), Guidance.steer(0.2, 0.3), Guidance.contrastive(0.1)]
    queue(engine, [make_item(i, [5 + i], [9], guidance=g) for i, g in enumerate(guidances)])
    engine.step(0)
    assert forwards.sizes == [1 + 3 + 2]
    assert forwards.batches[0].num_domain_tokens == 3 + 1


def test_the_instruction_is_prefilled_once_per_weight_set(make_engine):
    """Domain, base and (here without examples) negative pass of 30 sequences read one prompt."""
    engine = make_engine(max_num_seqs=4)
    forwards = Forwards(engine)
    prompt = helpers.random_prompts(2, longest=150)[1]
    engine.generate(
        [prompt] * 30,
        negative_prompts=[prompt] * 30,
        guidance=Guidance.steer(0.2, 0.3),
        sampling=sampling(3),
    )
    seen = Counter()
    for batch in forwards.batches:
        for row, position in enumerate(batch.positions.tolist()):
            if position < len(prompt) - 1:
                seen[position, row < batch.num_domain_tokens] += 1
    assert len(seen) == 2 * (len(prompt) - 1)
    assert set(seen.values()) == {1}
    assert sum(forwards.sizes) == 2 * (len(prompt) - 1) + 30 * 3 * 3


def test_a_shared_prefix_is_prefilled_once_and_what_differs_behind_it_is_not_lost(make_engine):
    engine = make_engine(max_num_seqs=4)
    forwards = Forwards(engine)
    front = helpers.random_prompts(2, longest=140)[1]
    prompts = [[*front, 10 + i, 20 + i, 30 + i] for i in range(4)]
    engine.generate(prompts, sampling=sampling(2))
    # Two whole blocks of 64 are shared; 140 - 128 + 2 tokens of the others are not.
    num_prefilled = (140 + 2) + 3 * (140 - 128 + 2)
    assert sum(forwards.sizes) == num_prefilled + 4 * 2


@pytest.mark.parametrize("max_prefill_tokens", [1, 7, 64, 512])
def test_prefill_is_cut_into_forwards_of_at_most_max_prefill_tokens(
    make_engine, max_prefill_tokens
):
    engine = make_engine(max_prefill_tokens=max_prefill_tokens)
    forwards = Forwards(engine)
    prompts = [p for p in helpers.random_prompts(4, longest=40) if len(p) > 1]
    engine.generate(prompts, guidance=Guidance.contrastive(0.2), sampling=sampling(1))
    num_tokens = sum(2 * (len(p) - 1) for p in prompts)
    *prefills, decode_step = forwards.sizes
    assert decode_step == 2 * len(prompts)
    full, rest = divmod(num_tokens, max_prefill_tokens)
    assert prefills == [max_prefill_tokens] * full + [rest] * (rest > 0)


def test_decoding_waits_for_no_more_than_one_forward_of_prompts(make_engine, make_item):
    engine = make_engine(max_num_seqs=3, max_prefill_tokens=16)
    plain = {"guidance": Guidance.none(), "sampling": sampling(12)}
    queue(engine, [make_item(0, [5, 6], **plain)])
    engine.step(0)
    queue(engine, [make_item(i, [7 + i] * 41, **plain) for i in (1, 2)])
    forwards = Forwards(engine)
    num_running = []
    for _ in range(6):
        engine.step(0)
        num_running.append(len(engine.scheduler.running))
    # 40 tokens of each prompt, the second's behind the first's: 16, 16, 8 + 8, 16, 16.
    assert num_running == [1, 1, 2, 2, 3, 3]
    assert forwards.sizes == [16, 1, 16, 1, 16, 2, 16, 2, 16, 3, 3]


def test_prompts_that_nothing_waits_for_run_to_their_end(make_engine, make_item):
    engine = make_engine(max_prefill_tokens=16)
    plain = {"guidance": Guidance.none(), "sampling": sampling(2)}
    queue(engine, [make_item(i, [7 + i] * 41, **plain) for i in (1, 2)])
    forwards = Forwards(engine)
    engine.step(0)
    assert forwards.sizes == [16] * 5 + [2]


def test_every_token_is_written_to_its_own_slot(make_engine):
    engine = make_engine(max_num_seqs=3)
    forwards = Forwards(engine)
    engine.generate(
        helpers.random_prompts(3, longest=100),
        guidance=Guidance.contrastive(0.2),
        sampling=sampling(5),
    )
    slots = np.concatenate([batch.slot_mapping.numpy() for batch in forwards.batches])
    assert len(set(slots.tolist())) == len(slots)
    for batch in forwards.batches:
        tables = batch.block_tables[batch.table_ids.long()]
        blocks = tables.gather(1, batch.positions[:, None].long() // 64)[:, 0]
        assert torch.equal(batch.slot_mapping, blocks.long() * 64 + batch.positions.long() % 64)
        assert torch.equal(batch.seq_lens, batch.positions + 1)


def test_sequences_that_do_not_fit_wait_their_turn(make_engine, make_item):
    """Room for 4 blocks; each sequence needs 1, 3 or 2, and nobody overtakes."""
    engine = make_engine(num_blocks=4, max_num_seqs=8)
    assert engine.kv_cache.num_blocks == 4
    plain = {"guidance": Guidance.none(), "sampling": sampling(2)}
    lengths = [60, 60, 150, 100, 60, 150]
    queue(engine, [make_item(i, [20 + i] * n, **plain) for i, n in enumerate(lengths)])
    ran = []
    while engine.scheduler.num_queued:
        engine.step(0)
        ran.append([s.key for s in engine.scheduler.running])
    assert ran == [[0, 1], [], [2], [], [3, 4], [], [5], []]
    assert engine.kv_cache.num_free_blocks == 4


def test_a_sequence_whose_last_pass_does_not_fit_takes_nothing(make_engine, make_item):
    engine = make_engine(num_blocks=5)
    three_passes = make_item(0, [5] * 60, [6] * 60, Guidance.steer(0.2, 0.3), sampling(3))
    queue(engine, [three_passes, make_item(1, [7] * 60, [8] * 60, sampling=sampling(3))])
    engine.scheduler.admit()
    assert [s.key for s in engine.scheduler.waiting] == [1]
    assert engine.kv_cache.num_free_blocks == 2
    # Nor can anybody find what the refused passes would have written.
    assert not any(7 in key.token_ids for key in engine.kv_cache._entries)


def test_the_last_drawn_token_takes_no_slot(make_engine, make_item):
    engine = make_engine(num_blocks=1)
    plain = Guidance.none()
    engine.make_sequence(0, 0, {PassKind.DOMAIN: [5] * 60}, plain, sampling(5))
    engine.generate([[5] * 60], sampling=sampling(5))
    with pytest.raises(RuntimeError, match="needs 2 KV-cache blocks of 64 tokens, the cache has 1"):
        engine.generate([[5] * 60], sampling=sampling(6))


def test_reset_drops_everything(make_engine, make_item):
    engine = make_engine(max_num_seqs=2)
    queue(engine, [make_item(i, [5] * 70) for i in range(5)])
    engine.step(0)
    engine.scheduler.reset()
    assert not engine.scheduler.num_queued
    assert engine.kv_cache.num_free_blocks == engine.kv_cache.num_blocks
    assert not engine.kv_cache._entries
