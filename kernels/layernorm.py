"""
LayerNorm without a bias, the norm of Cohere's Command models: (x - mean) / sqrt(var + eps) * weight over the last axis.
Ba et al. 2016, https://arxiv.org/abs/1607.06450. The mean is subtracted (it is not RMSNorm), var is the mean of squares
(divided by C, not C - 1), and mean, var and the product with the weight are fp32 with one rounding at the end.

Memory traffic in passes over one (tokens, C) tensor; about 8 FLOPs an element forward, so memory is all that counts.
The definition below, op by op, makes 14 passes forward: a read and a write each to convert, subtract the mean, square,
scale, weight and convert back, and a read for either mean. Fused: forward reads x and writes y; backward reads dy and x
and writes dx, and PROGRAMS rows of dweight.

RMSNorm, at the end of the file, is what the other families have: x / sqrt(mean(x^2) + eps) * weight, no mean. Zhang &
Sennrich 2019, https://arxiv.org/abs/1910.07467. It comes in two forms, unlike in 16 bits only: Llama's rounds before
the product with the weight, Gemma's (which stores weight - 1) after it. It is PyTorch's own code for now: a teacher or
a reward model is run, not trained.
"""

import torch
import torch.nn.functional as F

from ._triton import tl, triton, use_triton

PROGRAMS = 264  # of the backward: two for each of an H100's 132 multiprocessors; each keeps a row of dweight
NUM_WARPS = 8


def layernorm_reference(x, weight, eps):
    """The definition, fp32 inside (fp64 for fp64). x: (..., C), weight: (C,) -> (..., C) in x's dtype."""
    acc = torch.promote_types(x.dtype, torch.float32)
    centred = x.to(acc) - x.to(acc).mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return (centred * rstd * weight.to(acc)).to(x.dtype)


def _layernorm_cpu(x, weight, eps):
    acc = torch.promote_types(x.dtype, torch.float32)
    return F.layer_norm(x.to(acc), weight.shape, weight.to(acc), None, eps).to(x.dtype)


@triton.jit
def _layernorm_forward(x_ptr, w_ptr, y_ptr, mean_ptr, rstd_ptr, eps, C: tl.constexpr, BLOCK: tl.constexpr):
    row, col = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = col < C
    x = tl.load(x_ptr + row * C + col, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + col, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=0) / C
    centred = tl.where(inside, x - mean, 0.0)  # the row is in registers: two exact passes cost no more traffic than one
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / C + eps)
    tl.store(y_ptr + row * C + col, centred * rstd * w, mask=inside)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def _layernorm_backward(
    dy_ptr, x_ptr, w_ptr, mean_ptr, rstd_ptr, dx_ptr, dw_ptr, N, C: tl.constexpr, BLOCK: tl.constexpr
):
    # with h = (x - mean) rstd and d = dy w:   dx = rstd (d - mean(d) - h mean(d h)),   dweight = sum over rows of dy h
    row, col = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = col < C
    w = tl.load(w_ptr + col, mask=inside, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK,), dtype=tl.float32)
    while row < N:  # this program's rows are one in num_programs
        x = tl.load(x_ptr + row * C + col, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * C + col, mask=inside, other=0.0).to(tl.float32)
        mean, rstd = tl.load(mean_ptr + row), tl.load(rstd_ptr + row)
        h = tl.where(inside, (x - mean) * rstd, 0.0)
        d = dy * w
        dx = rstd * (d - tl.sum(d, axis=0) / C - h * (tl.sum(d * h, axis=0) / C))
        tl.store(dx_ptr + row * C + col, dx, mask=inside)
        dw += dy * h
        row += tl.num_programs(0)
    tl.store(dw_ptr + tl.program_id(0) * C + col, dw, mask=inside)


class _LayerNorm(torch.autograd.Function):
    """Saves x, weight and two fp32 numbers a row; dweight is summed in a fixed order, so it is the same every time."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        C = x.shape[-1]
        x, weight = x.contiguous(), weight.contiguous()
        y = torch.empty_like(x)
        mean, rstd = torch.empty((2, x.numel() // C), dtype=torch.float32, device=x.device)
        _layernorm_forward[(len(mean),)](
            x, weight, y, mean, rstd, eps, C=C, BLOCK=triton.next_power_of_2(C), num_warps=NUM_WARPS
        )
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, mean, rstd = ctx.saved_tensors
        dy, dx, (N, C) = dy.contiguous(), torch.empty_like(x), (len(mean), x.shape[-1])
        dw = torch.empty((min(PROGRAMS, N), C), dtype=torch.float32, device=x.device)
        _layernorm_backward[(len(dw),)](
            dy, x, weight, mean, rstd, dx, dw, N, C=C, BLOCK=triton.next_power_of_2(C), num_warps=NUM_WARPS
        )
        return dx, dw.sum(0).to(weight.dtype), None


def layernorm(x, weight, eps):
    """(x - mean) / sqrt(var + eps) * weight over the last axis. x: (..., C), weight: (C,). Returns x's dtype."""
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight {tuple(weight.shape)} must be x's last axis, x is {tuple(x.shape)}")
    if use_triton(x):
        return _LayerNorm.apply(x, weight, eps)
    return _layernorm_cpu(x, weight, eps)


def rmsnorm(x, weight, eps, plus_one=False):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; plus_one: Gemma's form, (1 + weight). Returns x's dtype."""
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight {tuple(weight.shape)} must be x's last axis, x is {tuple(x.shape)}")
    acc = torch.promote_types(x.dtype, torch.float32)
    x_hat = F.rms_norm(x.to(acc), weight.shape, None, eps)
    return (x_hat * (1 + weight.to(acc))).to(x.dtype) if plus_one else weight * x_hat.to(x.dtype)
