"""
Log-probability of each target token, straight from the hidden states:

    token_logps[n] = log_softmax(hidden @ weight.T * logit_scale)[n, targets[n]]

The (N, V) logits are never whole: 8,192 tokens at V = 256,000 would be 8.4 GB in fp32, before any gradient. The
vocabulary goes by in slices; a running log-sum-exp joins them (Milakov & Gimelshein 2018,
https://arxiv.org/abs/1805.02867). The backward then knows every row's log-sum-exp, so its slices are independent too:

    dlogits = g logit_scale (onehot(target) - exp(logit - lse))
    dhidden = dlogits @ weight,  dweight = dlogits.T @ hidden

Slices of the vocabulary rather than of the rows: each row of dweight is then the result of ONE matmul over all N, whose
accumulator is fp32, so no fp32 copy of the whole weight gradient (4.2 GB at 256,000 x 4,096) is held or re-read.

FLOPs: 2NCV forward, 6NCV backward (the logits again, dhidden, dweight). Memory: SLICE fp32 logits, their dlogits in
hidden's dtype and an fp32 dhidden, where eager holds logits, log-probs and their gradients whole. The matmuls are
cuBLAS; Triton does the passes between: one read of the logits forward; one read, and one write of dlogits, backward.

A soft cap c (Gemma 2, https://arxiv.org/abs/2408.00118) makes a logit z c tanh(z / c), whose slope is 1 - (logit / c)^2.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ._triton import opaque, tl, triton, use_triton

SLICE = 2**27  # logits held at once: 0.5 GB in fp32. 8,192 rows see 16,384 words at a time
BLOCK = 4096  # words a program handles in one go
NUM_WARPS = 8


def token_logps_reference(hidden, weight, targets, logit_scale=1.0, softcap=None):
    """The definition, fp32 inside (fp64 for fp64)."""
    acc = torch.promote_types(hidden.dtype, torch.float32)
    logits = hidden.to(acc) @ weight.to(acc).T * logit_scale  # (N, V)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


@triton.jit
def _cap(z, SOFTCAP: tl.constexpr):
    if SOFTCAP > 0:
        z = SOFTCAP * (2.0 * tl.sigmoid(z * (2.0 / SOFTCAP)) - 1.0)  # tanh
    return z


@triton.jit
def _fold_slice(
    logits_ptr, targets_ptr, lse_ptr, picked_ptr, start, V, logit_scale, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr
):
    # one row of a slice, words start .. start + V of the vocabulary, joins the row's log-sum-exp so far
    row = tl.program_id(0).to(tl.int64)  # int64: a row's offset passes 2**31 at 8,389 rows of 256,000
    logits_ptr += row * V
    top, total = -float("inf"), 0.0
    for v in range(0, V, BLOCK):
        col = v + tl.arange(0, BLOCK)
        z = _cap(tl.load(logits_ptr + col, mask=col < V, other=0.0) * logit_scale, SOFTCAP)
        z = tl.where(col < V, z, -float("inf"))
        new_top = tl.maximum(top, tl.max(z, axis=0))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(z - new_top), axis=0)
        top = new_top
    slice_lse = top + tl.log(total)
    lse = tl.load(lse_ptr + row)  # -inf before the first slice
    high = tl.maximum(lse, slice_lse)
    tl.store(lse_ptr + row, high + tl.log(tl.exp(lse - high) + tl.exp(slice_lse - high)))
    target = tl.load(targets_ptr + row) - start
    if (target >= 0) & (target < V):
        tl.store(picked_ptr + row, _cap(tl.load(logits_ptr + target) * logit_scale, SOFTCAP))


@triton.jit
def _slice_gradient(
    logits_ptr, targets_ptr, lse_ptr, g_ptr, dlogits_ptr, start, V, logit_scale, SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    lse, g = tl.load(lse_ptr + row), tl.load(g_ptr + row) * logit_scale
    target = tl.load(targets_ptr + row) - start
    for v in range(0, V, BLOCK):
        col = v + tl.arange(0, BLOCK)
        z = _cap(tl.load(logits_ptr + row * V + col, mask=col < V, other=0.0) * logit_scale, SOFTCAP)
        dz = g * (tl.where(col == target, 1.0, 0.0) - tl.exp(z - lse))
        if SOFTCAP > 0:
            dz *= 1.0 - (z / SOFTCAP) * (z / SOFTCAP)
        tl.store(dlogits_ptr + row * V + col, dz, mask=col < V)


def _matmul_fp32(a, b):
    """a @ b with an fp32 result: cuBLAS rounds nothing to 16 bits on the way out. A CPU lacks that, so it converts."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def _of_rows(hidden):
    """(N,) fp32."""
    return torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)


@opaque(lambda hidden, *_: (_of_rows(hidden), _of_rows(hidden)))
def _forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, logit_scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    N, V = len(hidden), len(weight)
    lse, picked = _of_rows(hidden).fill_(-torch.inf), _of_rows(hidden)
    for start, words in _slices(N, V):
        logits = _matmul_fp32(hidden, weight[start : start + words].T)
        _fold_slice[(N,)](
            logits, targets, lse, picked, start, words, logit_scale, SOFTCAP=softcap, BLOCK=BLOCK, num_warps=NUM_WARPS
        )
        del logits  # before the next slice is made, or two are held
    return picked - lse, lse


@opaque(lambda dlogps, hidden, weight, *rest: (
    torch.empty_like(hidden), torch.empty_like(weight) if rest[-1] else weight.new_empty(0)))  # fmt: skip
def _backward(
    dlogps: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, lse: Tensor, logit_scale: float, softcap: float,
    weight_too: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    N, V = len(hidden), len(weight)
    dhidden = torch.zeros_like(hidden, dtype=torch.float32)
    dweight = torch.empty_like(weight) if weight_too else weight.new_empty(0)  # an op must return a tensor
    for start, words in _slices(N, V):
        weight_slice = weight[start : start + words]
        logits = _matmul_fp32(hidden, weight_slice.T)
        dlogits = torch.empty_like(logits, dtype=hidden.dtype)
        _slice_gradient[(N,)](
            logits, targets, lse, dlogps, dlogits, start, words, logit_scale, SOFTCAP=softcap, BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )  # fmt: skip
        del logits
        dhidden += _matmul_fp32(dlogits, weight_slice)
        if weight_too:
            torch.mm(dlogits.T, hidden, out=dweight[start : start + words])
        del dlogits
    return dhidden.to(hidden.dtype), dweight


class _TokenLogps(torch.autograd.Function):
    """Saves hidden, weight, targets and one log-sum-exp a row; the backward computes the logits again."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, logit_scale, softcap):
        hidden, targets = hidden.contiguous(), targets.contiguous()
        logps, lse = _forward(hidden, weight, targets, logit_scale, softcap or 0.0)
        ctx.save_for_backward(hidden, weight, targets, lse)
        ctx.logit_scale, ctx.softcap = logit_scale, softcap or 0.0
        return logps

    @staticmethod
    def backward(ctx, dlogps):
        dhidden, dweight = _backward(
            dlogps.contiguous(), *ctx.saved_tensors, ctx.logit_scale, ctx.softcap, ctx.needs_input_grad[1]
        )
        return dhidden, dweight if ctx.needs_input_grad[1] else None, None, None, None


def _slices(N, V):
    """(start, words) of each slice of the vocabulary: a multiple of 128 words, for the matmuls, but at the end."""
    words = max(128, SLICE // max(N, 1) // 128 * 128)
    return [(start, min(words, V - start)) for start in range(0, V, words)]


class _TokenLogpsCPU(torch.autograd.Function):
    """Rows go by in chunks; if one chunk holds them all, its softmax is kept and the backward has no logits to redo."""

    CHUNK = 2048  # rows of logits held at once

    @staticmethod
    def forward(ctx, hidden, weight, targets, logit_scale):
        logps, kept = hidden.new_empty(len(hidden)), (None, None)
        for rows in _TokenLogpsCPU.chunks(hidden):
            logps[rows], kept = _TokenLogpsCPU.chunk(hidden[rows], weight, targets[rows], logit_scale)
        if len(hidden) > _TokenLogpsCPU.CHUNK:
            kept = (None, None)
        ctx.save_for_backward(hidden, weight, targets, *kept)
        ctx.logit_scale = logit_scale
        return logps

    @staticmethod
    def backward(ctx, dlogps):
        hidden, weight, targets, *kept = ctx.saved_tensors
        dhidden, dweight = torch.empty_like(hidden), torch.zeros_like(weight)
        for rows in _TokenLogpsCPU.chunks(hidden):
            h, t, g = hidden[rows], targets[rows], dlogps[rows, None] * ctx.logit_scale
            exps, total = kept if kept[0] is not None else _TokenLogpsCPU.chunk(h, weight, t, ctx.logit_scale)[1]
            # dlogits = g onehot - (g / total) exps: each part goes through the matmuls alone, the sum is never formed
            dhidden[rows] = torch.addcmul(g * weight[t], exps @ weight, -g / total)
            dweight.addmm_(exps.T, h * (-g / total)).index_add_(0, t, h * g)
        return dhidden, dweight, None, None

    @staticmethod
    def chunks(hidden):
        return [slice(i, i + _TokenLogpsCPU.CHUNK) for i in range(0, len(hidden), _TokenLogpsCPU.CHUNK)]

    @staticmethod
    def chunk(hidden, weight, targets, logit_scale):
        """The rows' log-probs, with exp(logit - the row's largest) (rows, V) and its sum (rows, 1)."""
        logits = (hidden * logit_scale) @ weight.T
        picked, top = logits.gather(1, targets[:, None]), logits.amax(-1, keepdim=True)
        exps = logits.sub_(top).exp_()
        total = exps.sum(-1, keepdim=True)
        return (picked - top - total.log()).squeeze(1), (exps, total)


def _capped_cpu(hidden, weight, targets, logit_scale, softcap):
    """The definition, CHUNK rows at a time; the backward computes each chunk's logits again."""
    rows = _TokenLogpsCPU.chunks(hidden) or [slice(0, 0)]
    return torch.cat([checkpoint(token_logps_reference, hidden[r], weight, targets[r], logit_scale, softcap,
                                 use_reentrant=False) for r in rows])  # fmt: skip


def token_logps(hidden, weight, targets, logit_scale=1.0, softcap=None):
    """Log-probability of targets (N,) int64 under hidden (N, C) and the head weight (V, C). Returns (N,) fp32.

    Gradients flow to hidden and weight, each in its own dtype. Drop positions that carry no loss before the call: here
    they would cost as much as the others. Targets must lie in [0, V); -100 and the like are the caller's to remove.
    """
    if hidden.dim() != 2 or targets.shape != hidden.shape[:1] or weight.shape[1:] != hidden.shape[1:]:
        raise ValueError(
            f"hidden must be (N, C), weight (V, C), targets (N,); got {tuple(hidden.shape)}, {tuple(weight.shape)}, "
            f"{tuple(targets.shape)}"
        )
    if use_triton(hidden):
        return _TokenLogps.apply(hidden, weight, targets, logit_scale, softcap)
    acc = torch.promote_types(hidden.dtype, torch.float32)
    if softcap is not None:
        return _capped_cpu(hidden.to(acc), weight.to(acc), targets, logit_scale, softcap)
    return _TokenLogpsCPU.apply(hidden.to(acc), weight.to(acc), targets, logit_scale)
