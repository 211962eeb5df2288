"""bench/gpu_check.py without a GPU: its checks at small sizes on the CPU, for the reference and in
Triton's interpreter, and its report, so that the script cannot rot until the next GPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "tests/kernels")]
import gpu_check  # noqa: E402
import gpu_hf  # noqa: E402
import gpu_ops  # noqa: E402
import gpu_sampler  # noqa: E402
import gpu_step  # noqa: E402
import gpu_times  # noqa: E402
from checkpoints import FALCON_7B  # noqa: E402
from gpu_report import NotThereError, Report, format_time  # noqa: E402
from triton_interpreter import interpreted  # noqa: E402

from steer_engine.config import FalconConfig  # noqa: E402

CPU = torch.device("cpu")
TINY_FALCON = {
    "model_type": "falcon",
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "vocab_size": 97,
    "multi_query": True,
    "parallel_attn": True,
    "new_decoder_architecture": False,
    "alibi": False,
    "bias": False,
}


@pytest.fixture
def report(tmp_path) -> Report:
    return Report(tmp_path / "gpu_test.json", CPU)


def outcomes(report: Report) -> dict[str, int]:
    counts: dict[str, int] = {}
    for check in json.loads(report.path.read_text())["checks"]:
        counts[check["outcome"]] = counts.get(check["outcome"], 0) + 1
    return counts


def test_all_sampler_checks_pass_for_the_reference(report):
    gpu_check.check_bits(report, CPU, (1, 2, 97), [1, 2, 9], ["reference"])
    gpu_check.check_graphs(report, CPU, (97,), ["reference"], num_seqs=16)
    assert outcomes(report) == {"passed": 15}, report.content["checks"]


def test_frequencies_are_those_of_the_masses():
    logits = gpu_sampler.small_row()
    detail = gpu_sampler.check_frequencies("reference", CPU, logits, num_seqs=500, num_steps=8)
    assert detail.startswith("4000 draws of 50")


def test_a_wrong_token_a_frozen_step_and_wrong_frequencies_are_noticed(monkeypatch):
    case = gpu_sampler.mixed_case(8, 97)
    expected = gpu_sampler.expect(case)
    expected[0][5] = (expected[0][5] + 1) % 97
    with pytest.raises(AssertionError, match=r"token_ids of 1 of 8 rows.*first row 5"):
        gpu_sampler.check_bitwise("reference", CPU, case, expected, [8])

    prepare = gpu_sampler.prepare

    def prepare_frozen(*arguments):
        """As a graph that has captured the step as a number."""
        prepared = prepare(*arguments)
        return prepared._replace(steps=prepared.steps.clone())

    monkeypatch.setattr(gpu_sampler, "prepare", prepare_frozen)
    with pytest.raises(AssertionError, match="20 replays drew 1 tokens"):
        gpu_sampler.check_graph("reference", CPU, 97)
    with pytest.raises(AssertionError, match="chi-square"):
        gpu_sampler.check_frequencies("reference", CPU, gpu_sampler.small_row(), 100, 20)


def test_all_checks_of_ops_pass_for_the_reference():
    batches = (1, 2, 5, 17)
    gpu_ops.check_layer_norm("reference", CPU, 100, batches)
    gpu_ops.check_linear("reference", CPU, 65, 33, batches, gelu_columns=20)
    gpu_ops.check_linear(
        "reference", CPU, 65, 33, batches, accumulate=True, out_dtype=torch.float32
    )
    gpu_ops.check_grouped_linear("reference", CPU, 65, 33, ((1, 1), (3, 20)), gelu_columns=20)
    for dtype in (torch.float32, torch.bfloat16):
        # No batches: the bits of the reference's products may depend on where a row lies.
        call = ("reference", CPU, "grouped", dtype, (1, 7, 8, 30))
        gpu_ops.check_mqa_decode(*call)
        gpu_ops.check_paged_attention(*call)


def test_rows_that_depend_on_their_batch_are_noticed():
    def run(rows: torch.Tensor) -> torch.Tensor:
        return rows[:, None] + (len(rows) == 3)

    with pytest.raises(AssertionError, match=r"rows \[0, 1, 2\] differ in a batch of 3"):
        gpu_ops.check_rows(run, (1, 3, 8), CPU, "op")


@interpreted
def test_the_checks_pass_for_triton_in_the_interpreter():
    case = gpu_sampler.mixed_case(16, 97)
    expected = gpu_sampler.expect(case)
    gpu_sampler.check_bitwise("triton", CPU, case.rows(slice(0, 2)), expected_rows(expected), [2])
    gpu_sampler.check_slots("triton", CPU, case.rows(slice(0, 2)), expected_rows(expected))
    gpu_sampler.check_graph("triton", CPU, 97, num_replays=3)
    gpu_ops.check_layer_norm("triton", CPU, 100, (1, 3))
    gpu_ops.check_linear("triton", CPU, 65, 33, (1, 3), gelu_columns=20)
    gpu_ops.check_grouped_linear(
        "triton", CPU, 65, 33, ((1, 2),), accumulate=True, out_dtype=torch.float32
    )
    gpu_ops.check_mqa_decode("triton", CPU, "grouped", torch.float32, (1, 8), (1,))
    gpu_ops.check_paged_attention("triton", CPU, "grouped", torch.float32, (1, 8), (1,))


@interpreted
def test_the_timed_forms_of_a_grouped_linear_compute_the_same():
    x, out = torch.randn(6, 40).bfloat16(), torch.empty(6, 33)
    pair = torch.randn(2, 33, 40).bfloat16().unbind()
    epilogue = {"gelu_columns": 20, "accumulate": False}
    results = {}
    for kind, make in gpu_times.grouped_makers(x, [pair], out, epilogue).items():
        for call in make():
            call()
        results[kind] = out.clone()
    two, one, cublas = results.values()
    assert torch.equal(one, two)
    torch.testing.assert_close(cublas, one, rtol=2**-6, atol=2**-6)


def expected_rows(expected: list[torch.Tensor]) -> list[torch.Tensor]:
    return [output[:2] for output in expected]


@pytest.mark.parametrize(
    ("domain", "folds"),
    [(gpu_step.LORA, True), (gpu_step.LORA, False), (gpu_step.TWO_SETS, False)],
)
@torch.inference_mode()
def test_a_step_of_the_models_shape_draws_and_advances(domain, folds):
    config = FalconConfig.from_dict(TINY_FALCON)
    model = gpu_step.make_model(config, CPU, torch.float32, "reference", domain)
    step = gpu_step.Step(model, num_seqs=2, seq_len=70, backend="reference", folds=folds)
    step.cache.k.normal_(generator=torch.Generator().manual_seed(0))
    first = [step().tolist() for _ in range(4)]
    assert step.rows.batch.seq_lens.tolist() == [74] * 6
    assert len({tuple(tokens) for tokens in first}) > 1
    assert all(0 <= token < 97 for tokens in first for token in tokens)


def test_a_full_fine_tunes_model_has_two_weight_sets_and_runs_them_as_groups(monkeypatch):
    config = FalconConfig.from_dict(TINY_FALCON)
    model = gpu_step.make_model(config, CPU, torch.float32, "reference", gpu_step.TWO_SETS)
    assert model.num_bytes == 2 * 4 * sum(gpu_step.count_weights(config))
    boundaries, grouped_linear = [], model.ops.grouped_linear

    def note(x, weights, boundary, *rest, **named):
        boundaries.append((boundary, len(x)))
        return grouped_linear(x, weights, boundary, *rest, **named)

    monkeypatch.setattr(model.ops, "grouped_linear", note)
    gpu_step.Step(model, num_seqs=3, seq_len=70, backend="reference", folds=False)()
    # Two products per layer and the head: domain and negative of three sequences, then the base's.
    assert boundaries == [(6, 9)] * (2 * config.num_layers + 1)


def test_the_floors_are_those_of_the_specification():
    """KERNELS.md 6, in ms, at its ceilings of 3.0 TB/s and 798 TFLOP/s and 200 tokens."""
    config, ceilings = FalconConfig.from_dict(FALCON_7B), gpu_times.Ceilings(3.0e12, 798e12)
    specified = {
        gpu_step.TWO_SETS: {1: 9.23, 8: 9.24, 64: 9.33, 256: 13.7, 1000: 52.9},
        gpu_step.LORA: {1: 4.62, 8: 4.63, 64: 4.72, 256: 13.4, 1000: 52.2},
    }
    for domain, floors in specified.items():
        for num_seqs, floor_ms in floors.items():
            floor_us = gpu_step.floor_us(config, domain, num_seqs, 200, ceilings)
            num_decimals = 2 if floor_ms < 10 else 1
            assert round(floor_us / 1e3, num_decimals) == floor_ms, (domain, num_seqs)


def test_falcon_7b_counts_as_many_weights_as_the_specification_says():
    body, head = gpu_step.count_weights(FalconConfig.from_dict(FALCON_7B))
    assert round(body / 1e9, 3) == 6.626 and round(head / 1e6, 1) == 295.5


def run_once(calls, use_graph=True):
    """In place of time_replays: every call that would be timed runs once, on the CPU."""
    for call in calls:
        call()
    return gpu_times.Times(2.0, 1.0, 3.0)


def time_tiny_steps(report, monkeypatch, domain: str, ceilings) -> str:
    monkeypatch.setattr(gpu_times, "time_replays", run_once)
    for name in ("check_no_syncs", "check_graph_of_step"):  # of CUDA alone
        monkeypatch.setattr(gpu_step, name, lambda step: None)
    return gpu_step.time_steps(
        report, CPU, domain, ceilings, FalconConfig.from_dict(TINY_FALCON),
        backend="reference", dtype=torch.float32, batch_sizes=(1, 2), seq_len=70,
    )  # fmt: skip


@pytest.mark.parametrize("domain", [gpu_step.LORA, gpu_step.TWO_SETS])
def test_steps_are_timed_against_their_floor_and_goal(domain, report, monkeypatch):
    config, ceilings = FalconConfig.from_dict(TINY_FALCON), gpu_times.Ceilings(1e12, 1e15)
    floor_us = gpu_step.floor_us(config, domain, 1, 70, ceilings)
    # A step of 2 us, as run_once says, takes 1 / 0.95 of this floor, and then 1 / 0.85.
    for share, is_met in ((0.95, True), (0.85, False)):
        scaled = gpu_times.Ceilings(*(c * floor_us / (2.0 * share) for c in ceilings))
        report.content["times"].clear()
        detail = time_tiny_steps(report, monkeypatch, domain, scaled)
        assert detail.startswith("0.0 GiB at most")
        times = report.content["times"]
        goals = [
            (t["num_seqs"], t["share_of_floor"], t["meets_goal"])
            for t in times
            if "meets_goal" in t
        ]
        heads = ["folded head", "three heads"] if domain == gpu_step.LORA else ["three heads"]
        # Replays of one sequence; single launches and two sequences have no goal.
        assert goals == [(1, share, is_met)] * len(heads)
        assert len(times) == 4 * len(heads)
        assert [t["size"] for t in times[::2]] == [
            f"B={b}, L=70, {domain}, {head}" for b in (1, 2) for head in heads
        ]
        assert f"goal 0.90 {'met' if is_met else 'missed'}" in format_time(times[0])
    assert outcomes(report) == {"passed": 8 * len(heads)}


def test_hugging_faces_steps_are_timed_and_compared_with_the_engines(report, monkeypatch):
    monkeypatch.setattr(gpu_hf, "NUM_STEPS", 3)
    ceilings = gpu_times.Ceilings(1e12, 1e15)
    for domain in (gpu_step.LORA, gpu_step.TWO_SETS):
        time_tiny_steps(report, monkeypatch, domain, ceilings)
    num_ours = len(report.content["times"])
    gpu_hf.time_hf(
        report, CPU, ceilings, TINY_FALCON, dtype=torch.float32, batch_sizes=(1, 3), seq_len=70
    )
    assert report.num_failed == 0, report.content["checks"]
    theirs = report.content["times"][num_ours:]
    assert [(t["num_seqs"], t["implementation"]) for t in theirs] == [
        (num_seqs, name) for num_seqs in (1, 3) for name in gpu_hf.VERSIONS
    ]
    for entry in theirs:
        # The engine's step takes 2 us, as run_once says; three sequences it has not timed.
        speedup = pytest.approx(entry["median_us"] / 2.0, abs=0.02)
        is_timed = entry["num_seqs"] == 1
        expected = {gpu_step.LORA: speedup, gpu_step.TWO_SETS: speedup} if is_timed else {}
        assert entry["engine_is_faster"] == expected
        assert ("x (two sets)" in format_time(entry)) == is_timed


def test_hugging_faces_captured_loop_draws_what_its_launched_one_does():
    models = gpu_hf.Models.build(TINY_FALCON, CPU, torch.float32)
    groups = gpu_hf.two_model_groups(models.domain, models.base, is_stacked=True)
    variant, guidance = gpu_hf.Variant(layout="stacked"), gpu_hf.Guidance.recommended()
    prompts, negatives = [[5, 6, 7], [8, 9]], [[1, 2, 3, 4, 5, 6, 7], [4, 8, 9]]
    num_captures = 0

    def capture(launch):
        """As on a GPU: it runs once before, and again with other tokens and positions."""
        nonlocal num_captures
        num_captures += 1
        launch()
        return launch

    drawn = [
        gpu_hf.HfBaseline(groups, variant, guidance, how).generate(
            prompts, negatives, num_new=8, top_p=0.9, greedy=True
        )
        for how in (None, capture)
    ]
    assert num_captures == len(groups) == 2
    assert torch.equal(*drawn) and drawn[0].unique().numel() > 2


def test_times_go_to_the_report_with_their_floors(report, monkeypatch):
    """At sizes of a few rows."""
    small = {
        "time_replays": run_once,
        "ROTATED_BYTES": 1,
        "SAMPLER_BATCHES": (1,),
        "VOCAB_SIZE": 97,
        "HIDDEN": 48,
        "LINEARS": {
            "up_qkv": (48, 60, 40, False, torch.bfloat16),
            "head": (48, 97, 0, True, torch.float32),
        },
        "LINEAR_ROWS": (3,),
        "GROUPED_ROWS": (2,),
        "ATTENTION_SIZES": ((2, 70),),
    }
    for name, value in small.items():
        monkeypatch.setattr(gpu_times, name, value)
    ceilings = gpu_times.Ceilings(1e12, 1e15)
    for function in (
        gpu_times.time_sampler,
        gpu_times.time_layer_norm,
        gpu_times.time_linear,
        gpu_times.time_grouped_linear,
        gpu_times.time_attention,
    ):
        function(report, CPU, ceilings)
    content = json.loads(report.path.read_text())
    assert content["checks"] == [], content["checks"]
    times = {(entry["op"], entry["implementation"]) for entry in content["times"]}
    assert times == {
        ("guided_sample", "torch sort chain"),
        ("layer_norm", "torch"),
        ("linear", "cuBLAS + epilogue"),
        ("grouped_linear", "cuBLAS + epilogue, twice"),
        ("mqa_decode", "torch SDPA, no pages"),
    }
    assert all(entry["share_of_floor"] >= 0 for entry in content["times"])


def test_the_report_notes_failures_and_what_is_not_there_and_goes_on(report):
    def fail() -> None:
        raise ValueError("broken")

    def lack() -> None:
        raise NotThereError("no such GPU")

    report.check("good", lambda: "detail")
    report.check("bad", fail)
    report.check("absent", lack)
    report.check("triton", gpu_sampler.check_graph, "cuda", CPU, 97)
    assert outcomes(report) == {"passed": 1, "failed": 1, "not there": 2}
    assert report.num_failed == 1
    checks = json.loads(report.path.read_text())["checks"]
    assert "ValueError at test_gpu_check.py:" in checks[1]["detail"]


def test_what_would_begin_after_the_deadline_is_skipped(tmp_path):
    report = Report(tmp_path / "gpu_late.json", CPU, deadline_s=-1)
    report.check("late", pytest.fail, "must not run")
    assert outcomes(report) == {"skipped": 1}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_script_says_so_in_one_line_and_exits_with_2():
    command = [sys.executable, ROOT / "bench/gpu_check.py"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout.count("\n") == 1 and not done.stderr
    assert "no CUDA GPU" in done.stdout


def test_the_script_finds_the_package_in_a_checkout_that_is_not_installed():
    program = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)]; "
        f"sys.path[:] = [p for p in sys.path if p != {str(ROOT)!r}] + [{str(ROOT / 'bench')!r}]; "
        "import gpu_check; gpu_check.make_importable(); "
        "from steer_engine.kernels import reference; from steer_engine import ops; "
        "print(reference.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT / "bench"
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == ROOT / "kernels/reference/__init__.py"
