"""Guided sampling: the definition that every backend meets bit for bit.

A token is drawn from integer masses, so the result does not depend on the order of any sum: the
same logits give the same token on every backend, in every batch, for every split of the vocabulary.
Only multiplications and additions that round separately are used (no fused multiply-add), which
every target can reproduce.

For one sequence, with l_d, l_b, l_n the logits of the passes and w_d, w_b, w_n their weights:

    1  x_v = (w_d*l_d[v] + w_b*l_b[v] + w_n*l_n[v]) * (1/T), in fp32, left to right; a pass of
       weight 0 is left out
    2  masked: v with x_v NaN and, if alpha > 0, v whose l_d[v] is NaN or below
       max(l_d) + ln(alpha); x_v above 3e38 becomes 3e38
    3  q_v = integer(exp2((x_v - max x) * log2 e) * 2**40 + 0.5), 0 where masked
    4  top-k: the first k in the order (x descending, index ascending) stay
    5  top-p: of these the shortest prefix whose mass reaches ceil(top_p * Z) stays; Z is the sum of
       their q
    6  draw: with M the prefix's mass and r = mulhi64(64 random bits, M), the smallest kept index
       whose running mass in index order exceeds r

T = 0 is greedy: the lowest index among the largest x_v, with 1/T read as 1.
Source: STEER, O'Neill et al. 2023; top-p, Holtzman et al. 2020 (arXiv:1904.09751); alpha, the
    plausibility constraint of Li et al. 2023 (arXiv:2210.15097).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .philox import MASK_32, STREAM_TOKENS, random_bits

STATUS_NAN = 1  # a combined logit was NaN and was masked
STATUS_EMPTY = 2  # nothing was left to draw from: the token is the finite domain logits' argmax
STATUS_INF = 4  # a combined logit was above MAX_LOGIT and was clamped

MAX_LOGIT = 3e38
LOG2_E = 1.44269504
MASS_BITS = 40  # a token's mass is at most 2**40, so 2**16 tokens sum to at most 2**56
LOWEST_EXPONENT = -42.0  # below 2**-41 of the top token a mass rounds to 0

# 2**f on [-0.5, 0.5], relative error 2e-9 before rounding; each constant is an exact fp32 number.
EXP2_COEFFICIENTS = (
    1.0,
    0.6931471824645996,
    0.24022647738456726,
    0.055503323674201965,
    0.00961843691766262,
    0.0013398875016719103,
    0.00015353361959569156,
)


class Sampled(NamedTuple):
    """One drawn token per sequence.

    token_ids: [num_seqs] int64.
    logprobs: [num_seqs] fp32, under the final distribution (after top-p).
    status: [num_seqs] int32, a sum of STATUS_* bits; 0 means that every logit was usable.
    """

    token_ids: torch.Tensor
    logprobs: torch.Tensor
    status: torch.Tensor

    @classmethod
    def empty(cls, num_seqs: int, device: torch.device) -> Sampled:
        """Outputs for a kernel to write."""
        return cls(
            torch.empty(num_seqs, dtype=torch.int64, device=device),
            torch.empty(num_seqs, dtype=torch.float32, device=device),
            torch.empty(num_seqs, dtype=torch.int32, device=device),
        )


class SamplingTensors(NamedTuple):
    """Per-sequence parameters as kernels read them, computed here so that no backend rounds anew.

    inv_temperature: [num_seqs] fp32, 1/T, and 1 where T = 0.
    greedy: [num_seqs] bool, T = 0.
    log_alpha: [num_seqs] fp32, ln(alpha), -inf where alpha = 0.
    top_k: [num_seqs] int32, vocab_size where off.
    top_p_fixed: [num_seqs] int64, round(top_p * 2**32).
    """

    inv_temperature: torch.Tensor
    greedy: torch.Tensor
    log_alpha: torch.Tensor
    top_k: torch.Tensor
    top_p_fixed: torch.Tensor


class Nucleus(NamedTuple):
    """What the draw is made from, per sequence.

    masses: [num_seqs, vocab_size] int64, 0 outside the nucleus.
    total_mass: [num_seqs] int64, M.
    num_kept: [num_seqs] int32, tokens in the nucleus.
    greedy_ids: [num_seqs] int64, the first of the largest x.
    status: [num_seqs] int32, see Sampled.
    fallback_ids: [num_seqs] int64, for rows with nothing left.
    """

    masses: torch.Tensor
    total_mass: torch.Tensor
    num_kept: torch.Tensor
    greedy_ids: torch.Tensor
    status: torch.Tensor
    fallback_ids: torch.Tensor


def check_sampling_arguments(
    logits, weights, temperature, top_p, top_k, alpha, stream_ids=None, steps=None
) -> None:
    """Raise ValueError, naming the argument, if a shape, dtype or device does not match."""
    if logits.ndim != 3 or logits.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(
            "logits must be [num_passes, num_seqs, vocab_size] fp32 or bf16, "
            f"got {list(logits.shape)} {logits.dtype}"
        )
    num_passes, num_seqs, vocab_size = logits.shape
    if logits.stride(-1) != 1 and vocab_size > 1:
        raise ValueError(
            f"logits must be contiguous in the last dimension, got strides {logits.stride()}"
        )
    if not 1 <= num_passes <= 3 or vocab_size < 1:
        raise ValueError(
            f"logits must have 1 to 3 passes and a vocabulary, got {list(logits.shape)}"
        )
    expected = {
        "weights": (weights, torch.float32),
        "temperature": (temperature, torch.float32),
        "top_p": (top_p, torch.float32),
        "top_k": (top_k, torch.int32),
        "alpha": (alpha, torch.float32),
        "stream_ids": (stream_ids, torch.int64),
        "steps": (steps, torch.int32),
    }
    for name, (tensor, dtype) in expected.items():
        if tensor is None:
            continue
        shape = [num_passes, num_seqs] if name == "weights" else [num_seqs]
        if list(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != logits.device:
            raise ValueError(
                f"{name} must be {shape} {dtype} on {logits.device}, "
                f"got {list(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )


def prepare_parameters(temperature, top_p, top_k, alpha, vocab_size: int) -> SamplingTensors:
    """Turn the user's parameters, each [num_seqs], into what kernels read: SamplingTensors."""
    greedy = temperature == 0
    return SamplingTensors(
        inv_temperature=torch.where(greedy, 1.0, 1.0 / temperature),
        greedy=greedy,
        log_alpha=torch.log(alpha.double()).float(),
        top_k=torch.where((top_k <= 0) | (top_k > vocab_size), vocab_size, top_k),
        top_p_fixed=torch.round(top_p.double() * 2.0**32).long().clamp(1, 2**32),
    )


def signed_seed(seed: int) -> int:
    """A seed in [0, 2**64) as the int64 of the same bits, which is what kernels take."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed


def checked_parameters(
    logits,
    weights,
    temperature,
    top_p,
    top_k,
    alpha,
    stream_ids=None,
    steps=None,
    *,
    max_vocab_size: int | None = None,
) -> SamplingTensors:
    """check_sampling_arguments, a backend's own limit, and prepare_parameters."""
    check_sampling_arguments(logits, weights, temperature, top_p, top_k, alpha, stream_ids, steps)
    vocab_size = logits.shape[2]
    if max_vocab_size is not None and vocab_size > max_vocab_size:
        raise ValueError(f"vocab_size must be at most {max_vocab_size}, got {vocab_size}")
    return prepare_parameters(temperature, top_p, top_k, alpha, vocab_size)


def exp2_mass(t: torch.Tensor) -> torch.Tensor:
    """round(2**t * 2**40) as int64 for fp32 t <= 0, by a polynomial that all backends share."""
    usable = t > LOWEST_EXPONENT  # False for -inf and NaN
    t = torch.where(usable, t, 0.0)
    n = torch.round(t)
    f = t - n
    e = torch.full_like(f, EXP2_COEFFICIENTS[-1])
    for coefficient in EXP2_COEFFICIENTS[-2::-1]:
        e = e * f + coefficient  # two roundings: multiply, then add
    return torch.where(usable, (torch.ldexp(e, n + MASS_BITS) + 0.5).long(), 0)


def combine(logits, weights, inv_temperature) -> torch.Tensor:
    """Step 1 of the definition. Returns x: [num_seqs, vocab_size] fp32."""
    combined = torch.zeros(logits.shape[1:], dtype=torch.float32, device=logits.device)
    for pass_logits, weight in zip(logits, weights, strict=True):
        # A pass of weight 0 was not run: its logits may hold anything, NaN included.
        term = torch.where(weight[:, None] == 0, 0.0, pass_logits.float() * weight[:, None])
        combined = combined + term
    return combined * inv_temperature[:, None]


def nucleus(logits, weights, parameters: SamplingTensors) -> Nucleus:
    """Steps 1 to 5 of the definition; logits and weights as in guided_sample."""
    domain = logits[0].float()
    x = combine(logits, weights, parameters.inv_temperature)
    is_nan = torch.isnan(x)
    lowest = torch.finfo(torch.float32).min

    domain_max = torch.nan_to_num(domain, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    threshold = domain_max.amax(dim=1) + parameters.log_alpha
    is_cut = ~(domain >= threshold[:, None]) & torch.isfinite(parameters.log_alpha)[:, None]
    is_inf = x > MAX_LOGIT
    x = torch.where(is_nan | is_cut, -torch.inf, torch.clamp(x, max=MAX_LOGIT))

    x_max, greedy_ids = x.max(dim=1).values, first_argmax(x)
    masses = exp2_mass((x - x_max[:, None]) * LOG2_E)  # -inf - -inf is NaN: mass 0

    order = torch.sort(x, dim=1, descending=True, stable=True).indices
    rank = torch.arange(x.shape[1], device=x.device)
    in_order = masses.gather(1, order)
    in_order = torch.where(rank < parameters.top_k[:, None], in_order, 0)

    running = in_order.cumsum(dim=1)
    target = mass_target(running[:, -1], parameters.top_p_fixed)
    # A token stays if the tokens before it do not reach the target; the one that crosses it stays.
    in_order = torch.where(running - in_order < target[:, None], in_order, 0)
    masses = torch.zeros_like(masses).scatter_(1, order, in_order)

    total_mass = masses.sum(dim=1)
    finite_domain = torch.where(torch.isfinite(domain), domain, lowest)
    status = (
        is_nan.any(dim=1) * STATUS_NAN
        + (total_mass == 0) * STATUS_EMPTY
        + is_inf.any(dim=1) * STATUS_INF
    )
    return Nucleus(
        masses=masses,
        total_mass=total_mass,
        num_kept=(masses > 0).sum(dim=1).int(),
        greedy_ids=greedy_ids,
        status=status.int(),
        fallback_ids=first_argmax(finite_domain),
    )


def first_argmax(x: torch.Tensor) -> torch.Tensor:
    """The lowest index among the largest values of each row; torch.argmax may give another."""
    index = torch.arange(x.shape[1], device=x.device)
    is_max = x == x.amax(dim=1, keepdim=True)
    return torch.where(is_max, index, x.shape[1]).amin(dim=1).clamp(max=x.shape[1] - 1)


def mass_target(total: torch.Tensor, top_p_fixed: torch.Tensor) -> torch.Tensor:
    """max(1, ceil(total * top_p_fixed / 2**32)) without leaving 64 bits.

    total: int64, at most 2**60 (2**20 tokens).
    top_p_fixed: int64, at most 2**32.
    """
    low = (total & MASK_32) * top_p_fixed + MASK_32
    return ((total >> 32) * top_p_fixed + ((low >> 32) & MASK_32)).clamp(min=1)


def multiply_high(high: torch.Tensor, low: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """The upper 64 bits of (high * 2**32 + low) * mass. Words in int64; mass at most 2**60."""
    mass_high, mass_low = mass >> 32, mass & MASK_32
    middle = high * mass_low + ((low * mass_low >> 32) & MASK_32)
    carry = (low * mass_high + (middle & MASK_32)) >> 32
    return high * mass_high + ((middle >> 32) & MASK_32) + carry


def guided_probs(logits, weights, *, temperature, top_p, top_k, alpha) -> torch.Tensor:
    """The final distribution that guided_sample draws from: [num_seqs, vocab_size] fp32.

    Arguments and errors as in guided_sample. Greedy rows are one-hot; a row with nothing left is
    one-hot at its fallback token.
    """
    parameters = checked_parameters(logits, weights, temperature, top_p, top_k, alpha)
    kept = nucleus(logits, weights, parameters)
    probs = (kept.masses.double() / kept.total_mass.clamp(min=1)[:, None].double()).float()
    one_hot_ids = torch.where(kept.total_mass == 0, kept.fallback_ids, kept.greedy_ids)
    one_hot = torch.zeros_like(probs).scatter_(1, one_hot_ids[:, None], 1.0)
    is_one_hot = parameters.greedy | (kept.total_mass == 0)
    return torch.where(is_one_hot[:, None], one_hot, probs)


def guided_sample(
    logits, weights, *, temperature, top_p, top_k, alpha, seed, stream_ids, steps
) -> Sampled:
    """Combine the passes' logits and draw one token per sequence, as this module's head defines.

    Args:
        logits: [num_passes, num_seqs, vocab_size], fp32 or bf16; the first pass is the domain's.
        weights: [num_passes, num_seqs] fp32; a pass of weight 0 does not enter x.
        temperature: [num_seqs] fp32, at least 0; 0: greedy.
        top_p: [num_seqs] fp32 in (0, 1].
        top_k: [num_seqs] int32; 0 or less: off.
        alpha: [num_seqs] fp32 in [0, 1]; 0: off.
        seed: int in [0, 2**64).
        stream_ids: [num_seqs] int64, the sample's own number.
        steps: [num_seqs] int32, the position of the token in its sequence.
    Returns: Sampled. Same seed, stream, step and logits give the same token, whatever the rest of
        the batch. A row with a status returns a token in range and leaves its neighbours unchanged.
    Raises: ValueError if a shape, dtype or device does not match.
    """
    parameters = checked_parameters(
        logits, weights, temperature, top_p, top_k, alpha, stream_ids, steps
    )
    return draw(logits, weights, parameters, seed=seed, stream_ids=stream_ids, steps=steps)


def draw(
    logits: torch.Tensor,
    weights: torch.Tensor,
    parameters: SamplingTensors,
    *,
    seed: int,
    stream_ids: torch.Tensor,
    steps: torch.Tensor,
) -> Sampled:
    """guided_sample without its checks, for callers whose parameters last many steps."""
    kept = nucleus(logits, weights, parameters)
    high, low = random_bits(seed, stream_ids, steps.long(), STREAM_TOKENS)
    threshold = multiply_high(high, low, kept.total_mass)
    running = kept.masses.cumsum(dim=1)
    drawn = (running <= threshold[:, None]).sum(dim=1)

    is_empty = kept.total_mass == 0
    token_ids = torch.where(parameters.greedy, kept.greedy_ids, drawn)
    token_ids = torch.where(is_empty, kept.fallback_ids, token_ids)
    mass = kept.masses.gather(1, token_ids[:, None])[:, 0].double()
    logprobs = torch.log(mass / kept.total_mass.double()).float()
    logprobs = torch.where(parameters.greedy | is_empty, 0.0, logprobs)
    return Sampled(token_ids, logprobs, kept.status)
