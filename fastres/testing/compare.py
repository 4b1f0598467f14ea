"""Comparisons that decide parity: the 2x rule, and bit equality.

The 2x rule: per channel, the candidate's error against a float64 truth may be at most twice the
error that unfused torch makes in the same dtype, plus one rounding of the true value in that
dtype. The idea is that of flash-attention's tests. A kernel may add in another order than torch
and may keep an intermediate that torch rounds, but it may not be a worse approximation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastres.kernels import acc_dtype

#: Below this many values per channel torch's own error there is a matter of luck; it is then
#: taken relative to each channel's magnitude, from all channels together.
_FEW = 64

#: float64 has no more precise truth to be held against: allowed is the growth of rounding errors
#: over a sum of 1,024 terms, more than any case adds up in one chain, times the magnitude; for a
#: tensor as a whole at least 1, the size of parameters and of grad_out, as gradients can cancel.
_FLOAT64_TERMS = 1024


def assert_parity(
    candidate: Tensor,
    truth: Tensor,
    baselines: Sequence[Tensor],
    *,
    what: str,
    channel_dim: int = 1,
    magnitude: Tensor | None = None,
    pool: str = "",
    precision: torch.dtype | None = None,
) -> None:
    """Hold a result to the 2x rule, per channel.

    Args:
        candidate: any shape, any floating dtype.
        truth: float64, shape of `candidate`.
        baselines: results of unfused torch in the candidate's dtype; several valid ones (say, of
            both layouts) make torch's error less a matter of luck.
        what: name of the quantity, for the message.
        channel_dim: dimension of the channels; 1-d tensors have one value per channel.
        magnitude: float64, shape of `candidate`: the sum of absolute values of the terms behind
            each value; one rounding of it in the accumulation dtype is allowed on top, because
            contracted and reordered terms differ by that (fused multiply-add).
        pool: "" takes torch's error per channel; "channels" from all channels together, relative
            to each one's magnitude (so does "" where a channel has few values); "tensor" from
            all values together, and so the one rounding, which is then the largest value's.
        precision: the dtype whose rounding is allowed; the candidate's own by default. Sums that
            were formed in float32 stay so precise when they are handed over in float64.

    Raises:
        AssertionError: naming the worst channel. NaN and infinity must be where the truth, or
            torch in that dtype (which may overflow), has them.
    """
    _same_shape(candidate, truth, what)
    if candidate.numel() == 0:
        return
    dim = channel_dim if candidate.dim() > 1 else 0
    c, t, m = (
        _by_channel(v.to(torch.float64), dim)
        for v in (candidate, truth, truth if magnitude is None else magnitude)
    )
    others = [_by_channel(b.detach().to(torch.float64), dim) for b in baselines]
    _check_special(c, t, others, what)
    error, base = _error(c, t), _baseline_error(t, others, m, pool)
    dtype = precision or candidate.dtype
    allowed = 2 * base + _rounding(_peak(t).amax() if pool == "tensor" else t, dtype)
    if magnitude is not None:
        allowed = allowed + torch.finfo(acc_dtype(dtype)).eps * _finite(m)
    if dtype == torch.float64:
        size = _peak(m).amax().clamp_min(1) if pool == "tensor" else _peak(m)
        allowed = allowed + _FLOAT64_TERMS * torch.finfo(dtype).eps * size
    _report(error, allowed.expand_as(error), c, t, base, what)


def assert_same_bits(
    candidate: Tensor, expected: Tensor, *, what: str, signed_zeros: bool = True
) -> None:
    """Bit equality: same shape, dtype, values and signs of zero; NaN equals NaN.

    Args:
        candidate: any tensor.
        expected: shape and dtype of `candidate`.
        what: name of the quantity, for the message.
        signed_zeros: whether -0.0 differs from 0.0; a sum's zero has no sign of its own.

    Raises:
        AssertionError: with the first difference.
    """
    _same_shape(candidate, expected, what)
    if candidate.dtype != expected.dtype:
        raise AssertionError(f"{what} must be {expected.dtype}, got {candidate.dtype}")
    same = (candidate == expected) | (candidate.isnan() & expected.isnan())
    if signed_zeros and candidate.is_floating_point():
        same &= candidate.isnan() | (torch.signbit(candidate) == torch.signbit(expected))
    if not bool(same.all()):
        index = tuple((~same).nonzero()[0].tolist())
        raise AssertionError(
            f"{what} must have the same bits: at {index} got {candidate[index].item()!r}, "
            f"expected {expected[index].item()!r}; {int((~same).sum())} of {same.numel()} differ"
        )


# ---------------------------------------------------------------- parts


def _same_shape(candidate: Tensor, truth: Tensor, what: str) -> None:
    if candidate.shape != truth.shape:
        raise AssertionError(
            f"{what} must have shape {list(truth.shape)}, got {list(candidate.shape)}"
        )


def _by_channel(t: Tensor, dim: int) -> Tensor:
    """[C, values per channel]; a 0-d tensor is one channel of one value."""
    t = t.detach().cpu()
    return t.reshape(1, 1) if t.dim() == 0 else t.movedim(dim, 0).reshape(t.shape[dim], -1)


def _finite(t: Tensor) -> Tensor:
    return torch.nan_to_num(t.abs(), nan=0.0, posinf=0.0, neginf=0.0)


def _peak(t: Tensor) -> Tensor:
    """[C, 1], the largest finite magnitude of each channel."""
    return _finite(t).amax(1, keepdim=True)


def _error(a: Tensor, t: Tensor) -> Tensor:
    """|a - t| where both are finite, 0 elsewhere (`_check_special` looks after those)."""
    both = a.isfinite() & t.isfinite()
    return torch.where(both, (a - t).abs(), torch.zeros_like(t))


def _rounding(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Half a unit in the last place, at most: of a normal number, or of a subnormal."""
    info = torch.finfo(dtype)
    return _finite(t) * (info.eps / 2) + info.smallest_normal * (info.eps / 2)


def _baseline_error(t: Tensor, others: Sequence[Tensor], m: Tensor, pool: str) -> Tensor:
    """[C, 1]: torch's largest error per channel, over all baselines."""
    if not others:
        return torch.zeros_like(t[:, :1])
    base = torch.stack([_error(o, t) for o in others]).amax((0, 2)).unsqueeze(1)
    if pool == "tensor":
        return base.amax().expand_as(base)
    if not (pool or t.shape[1] < _FEW):
        return base
    # A channel that a ReLU closed nearly everywhere is small by its values, not by its terms.
    peak = _peak(m)
    peak = peak.clamp_min(peak.median()) if pool else peak
    relative = torch.where(peak > 0, base / peak, torch.zeros_like(base)).amax()
    return torch.maximum(base, relative * peak)


def _check_special(c: Tensor, t: Tensor, others: Sequence[Tensor], what: str) -> None:
    agreed = _alike(c, t)
    for other in others:
        agreed |= _alike(c, other)
    if not bool(agreed.all()):
        channel, place = (~agreed).nonzero()[0].tolist()
        raise AssertionError(
            f"{what}: channel {channel} has {c[channel, place].item()} where the truth is "
            f"{t[channel, place].item()}; NaN and infinity disagree at "
            f"{int((~agreed).sum())} of {c.numel()} values"
        )


def _alike(a: Tensor, b: Tensor) -> Tensor:
    """Both finite, both NaN, or the same infinity."""
    return (a.isfinite() & b.isfinite()) | (a.isnan() & b.isnan()) | (a == b)


def _report(error: Tensor, allowed: Tensor, c: Tensor, t: Tensor, base: Tensor, what: str) -> None:
    bad = error > allowed
    if not bool(bad.any()):
        return
    excess = torch.where(bad, error / allowed.clamp_min(1e-300), torch.zeros_like(error))
    channel, place = divmod(int(excess.argmax()), error.shape[1])
    raise AssertionError(
        f"{what}: channel {channel} is off by {error[channel, place].item():.3e}, allowed "
        f"{allowed[channel, place].item():.3e} (torch's error {base[channel].item():.3e}): got "
        f"{c[channel, place].item():.9g}, truth {t[channel, place].item():.9g}; "
        f"{int(bad.sum())} of {bad.numel()} values in {int(bad.any(1).sum())} of "
        f"{bad.shape[0]} channels"
    )
