"""
The two norms of today's transformers, over the last axis of x, with h the normalised row:

    LayerNorm without a bias (Cohere)    h = (x - mean(x)) / sqrt(var(x) + eps)    y = h * weight
    RMSNorm (Llama and most others)      h = x / sqrt(mean(x^2) + eps)             y = h * weight

Ba et al. 2016, https://arxiv.org/abs/1607.06450; Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467. var is the mean
of squares, divided by C and not by C - 1. Everything is fp32 with one rounding at the end, but for one detail in which
families differ in 16 bits: Llama's RMSNorm rounds h BEFORE the product with the weight as well; Gemma's, which stores
weight - 1, does not. A weight (H, C) instead of (C,) norms each of H heads with its own (Command R+'s q and k).

Memory traffic in passes over one (tokens, C) tensor; about 8 FLOPs an element forward, so memory is all that counts.
LayerNorm's definition below, op by op, makes 14 passes forward: a read and a write each to convert, subtract the mean,
square, scale, weight and convert back, and a read for either mean. Fused: forward reads x and writes y; backward reads
dy and x and writes dx, and PROGRAMS rows of dweight.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ._triton import opaque, tl, triton, use_triton

PROGRAMS = 264  # of the backward: two for each of an H100's 132 multiprocessors; each keeps rows of dweight
STAGES = 2  # of the backward's loop over tiles
ELEMENTS = 1024  # a tile holds one row, or as many short ones (heads) as make this many elements
KINDS = ("layer", "rms", "rms+1")


def layernorm_reference(x, weight, eps):
    """The definition, fp32 inside (fp64 for fp64). x: (..., C), weight: (C,) or (H, C) -> (..., C) in x's dtype."""
    acc = torch.promote_types(x.dtype, torch.float32)
    centred = x.to(acc) - x.to(acc).mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return (centred * rstd * weight.to(acc)).to(x.dtype)


def rmsnorm_reference(x, weight, eps, plus_one=False):
    """The definition, fp32 inside; plus_one: Gemma's form. x: (..., C), weight: (C,) -> (..., C) in x's dtype."""
    acc = torch.promote_types(x.dtype, torch.float32)
    h = x.to(acc) * torch.rsqrt(x.to(acc).square().mean(-1, keepdim=True) + eps)
    return (h * (1 + weight.to(acc))).to(x.dtype) if plus_one else weight * h.to(x.dtype)


@triton.jit
def _norm_forward(
    x_ptr, w_ptr, y_ptr, mean_ptr, rstd_ptr, N, eps, MEAN: tl.constexpr, ROUND: tl.constexpr, ONE: tl.constexpr,
    HEADS: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    inside = (row < N) & (col < C)
    x = tl.load(x_ptr + row * C + col, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + (row % HEADS) * C + col, mask=inside, other=0.0).to(tl.float32) + ONE
    if MEAN:  # the rows are in registers: two exact passes cost no more traffic than one
        mean = tl.sum(x, axis=1, keep_dims=True) / C
        x = tl.where(inside, x - mean, 0.0)
        tl.store(mean_ptr + row, mean, mask=row < N)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1, keep_dims=True) / C + eps)
    h = x * rstd
    if ROUND:
        h = h.to(y_ptr.dtype.element_ty).to(tl.float32)
    tl.store(y_ptr + row * C + col, h * w, mask=inside)
    tl.store(rstd_ptr + row, rstd, mask=row < N)


@triton.jit
def _norm_backward(
    dy_ptr, x_ptr, w_ptr, mean_ptr, rstd_ptr, dx_ptr, dw_ptr, N, MEAN: tl.constexpr, ROUND: tl.constexpr,
    ONE: tl.constexpr, HEADS: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    # with d = dy w:   dx = rstd (d - mean(d) - h mean(d h)), without mean(d) in RMSNorm;   dweight = sum over rows of dy h
    first = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    # this program's tiles are one in num_programs, and so far apart that a line of a tile always meets the same head
    w = tl.load(w_ptr + (first % HEADS) * C + col, mask=col < C, other=0.0).to(tl.float32) + ONE
    dw = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    # in stages: the next tiles are on their way while this one's sums are waited for
    for tile in tl.range(tl.program_id(0), tl.cdiv(N, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = first + (tile - tl.program_id(0)).to(tl.int64) * ROWS
        inside = (row < N) & (col < C)
        x = tl.load(x_ptr + row * C + col, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * C + col, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < N, other=0.0)
        if MEAN:
            x = tl.where(inside, x - tl.load(mean_ptr + row, mask=row < N, other=0.0), 0.0)
        h = x * rstd
        d = dy * w
        dx = d - h * (tl.sum(d * h, axis=1, keep_dims=True) / C)
        if MEAN:
            dx -= tl.sum(d, axis=1, keep_dims=True) / C
        tl.store(dx_ptr + row * C + col, rstd * dx, mask=inside)
        if ROUND:
            h = h.to(dx_ptr.dtype.element_ty).to(tl.float32)
        dw += dy * h
    tl.store(dw_ptr + first * C + col, dw, mask=col < C)


def _options(x, weight, kind):
    """Constants of both kernels: what the norm is, and the shape of a tile."""
    C, BLOCK = x.shape[-1], triton.next_power_of_2(x.shape[-1])
    ROWS = max(1, ELEMENTS // BLOCK)
    return dict(MEAN=kind == "layer", ROUND=kind == "rms", ONE=float(kind == "rms+1"), HEADS=weight.numel() // C, C=C,
                BLOCK=BLOCK, ROWS=ROWS, num_warps=max(1, min(8, BLOCK * ROWS // 256)))  # fmt: skip


def _stats(x):
    """(2, rows) fp32: means, and 1 / deviations."""
    return torch.empty((2, x.numel() // x.shape[-1]), dtype=torch.float32, device=x.device)


@opaque(lambda x, weight, eps, kind: (torch.empty_like(x), _stats(x)))
def _forward(x: Tensor, weight: Tensor, eps: float, kind: str) -> tuple[Tensor, Tensor]:
    y, stats, options = torch.empty_like(x), _stats(x), _options(x, weight, kind)
    N = stats.shape[1]
    _norm_forward[(triton.cdiv(N, options["ROWS"]),)](x, weight, y, stats[0], stats[1], N, eps, **options)
    return y, stats


@opaque(lambda dy, x, weight, stats, kind: (torch.empty_like(x), torch.empty_like(weight)))
def _backward(dy: Tensor, x: Tensor, weight: Tensor, stats: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    dx, N, options = torch.empty_like(x), stats.shape[1], _options(x, weight, kind)
    ROWS, HEADS = options["ROWS"], options["HEADS"]
    step = HEADS // math.gcd(HEADS, ROWS)  # programs in whole steps: see the kernel on heads
    programs = triton.cdiv(min(PROGRAMS, triton.cdiv(N, ROWS)), step) * step
    dw = torch.empty((programs * ROWS // HEADS, *weight.shape), dtype=torch.float32, device=x.device)
    _norm_backward[(programs,)](dy, x, weight, stats[0], stats[1], dx, dw, N, STAGES=STAGES, **options)
    return dx, dw.sum(0).to(weight.dtype)


class _Norm(torch.autograd.Function):
    """Saves x, weight and two fp32 numbers a row; dweight is summed in a fixed order: the same bits every time."""

    @staticmethod
    def forward(ctx, x, weight, eps, kind):
        x, weight = x.contiguous(), weight.contiguous()
        y, stats = _forward(x, weight, eps, kind)
        ctx.save_for_backward(x, weight, stats)
        ctx.kind = kind
        return y

    @staticmethod
    def backward(ctx, dy):
        return *_backward(dy.contiguous(), *ctx.saved_tensors, ctx.kind), None, None


def _checked(x, weight):
    if weight.shape != x.shape[-weight.dim():]:
        raise ValueError(f"weight {tuple(weight.shape)} must be x's last axis (or two), x is {tuple(x.shape)}")


def layernorm(x, weight, eps):
    """(x - mean) / sqrt(var + eps) * weight over the last axis. x: (..., C), weight: (C,), or (H, C) for x (..., H, C).

    Returns x's dtype.
    """
    _checked(x, weight)
    if use_triton(x):
        return _Norm.apply(x, weight, eps, "layer")
    acc = torch.promote_types(x.dtype, torch.float32)
    if weight.dim() == 1:
        return F.layer_norm(x.to(acc), weight.shape, weight.to(acc), None, eps).to(x.dtype)
    return (F.layer_norm(x.to(acc), weight.shape[-1:], None, None, eps) * weight.to(acc)).to(x.dtype)


def rmsnorm(x, weight, eps, plus_one=False):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; plus_one: Gemma's form, (1 + weight). Returns x's dtype."""
    _checked(x, weight)
    if use_triton(x):
        return _Norm.apply(x, weight, eps, "rms+1" if plus_one else "rms")
    acc = torch.promote_types(x.dtype, torch.float32)
    h = F.rms_norm(x.to(acc), x.shape[-1:], None, eps)
    return (h * (1 + weight.to(acc))).to(x.dtype) if plus_one else weight * h.to(x.dtype)
