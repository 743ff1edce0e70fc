"""
Rotary position embedding, which turns pairs (a, b) of a head's elements by an angle for each position and pair:

    (a, b)  ->  (a cos - b sin,  a sin + b cos)

Su et al. 2021, "RoFormer", https://arxiv.org/abs/2104.09864, Eq. 34. Which elements are pairs is a layout: Cohere and
GPT-J INTERLEAVE, a = x[..., 0::2] and b = x[..., 1::2]; Llama and most others pair HALVES, a = x[..., :D/2] and
b = x[..., D/2:]. A model's weights are right for one of them only. A rotation's transpose is the rotation back, so the backward is the same
kernel with -sin and needs nothing of q and k.

Memory traffic in passes over q and k together: the definition below converts, takes four products of half the elements,
two sums, stacks and converts back, each with its own reads and writes; fused reads 1 and writes 1, and reads the fp32
table of cos and sin once a token. 3 FLOPs an element.
"""

import torch
from torch import Tensor

from ._triton import opaque, recorded, tl, triton, use_triton

NUM_WARPS = 4


def rope_reference(x, cos, sin, interleaved=True):
    """The definition, fp32 inside (fp64 for fp64). x: (B, T, H, D); cos, sin: (T, D/2) or (B, T, D/2)."""
    acc = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(acc).unsqueeze(-2), sin.to(acc).unsqueeze(-2)  # (..., T, 1, D/2): one angle for all heads
    if not interleaved:
        a, b = x.to(acc).chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)
    a, b = x[..., 0::2].to(acc), x[..., 1::2].to(acc)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x.dtype)


def _rope_cpu(x, cos, sin, interleaved):
    """Interleaved pairs as one complex product: a pair is the number a + ib, the rotation is cos + i sin."""
    if not interleaved:
        return rope_reference(x, cos, sin, interleaved)
    acc = torch.promote_types(x.dtype, torch.float32)
    pairs = torch.view_as_complex(x.to(acc).contiguous().unflatten(-1, (-1, 2)))  # (B, T, H, D/2)
    rotation = torch.complex(cos.to(acc), sin.to(acc)).unsqueeze(-2)
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)


@triton.jit
def _rotate_heads(
    x_ptr, out_ptr, cos, sin, H: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, INTERLEAVED: tl.constexpr
):
    head = tl.arange(0, BLOCK_H)[:, None]
    if INTERLEAVED:
        at = head * D + tl.arange(0, D)[None, :]
        x = tl.load(x_ptr + at, mask=head < H, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, (BLOCK_H, D // 2, 2)))  # whole rows are loaded, then split in registers
        y = tl.join(a * cos - b * sin, a * sin + b * cos)
        tl.store(out_ptr + at, tl.reshape(y, (BLOCK_H, D)), mask=head < H)
    else:
        at = head * D + tl.arange(0, D // 2)[None, :]
        a = tl.load(x_ptr + at, mask=head < H, other=0.0).to(tl.float32)
        b = tl.load(x_ptr + at + D // 2, mask=head < H, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, a * cos - b * sin, mask=head < H)
        tl.store(out_ptr + at + D // 2, a * sin + b * cos, mask=head < H)


@triton.jit
def _rope_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr, T, table_stride,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_HKV: tl.constexpr,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)  # one program rotates every head of q and of k at one position
    pair = tl.arange(0, D // 2)[None, :]
    row = (token // T) * table_stride + (token % T) * (D // 2) + pair
    cos, sin = tl.load(cos_ptr + row), tl.load(sin_ptr + row)
    if INVERSE:
        sin = -sin
    _rotate_heads(q_ptr + token * H * D, q_out_ptr + token * H * D, cos, sin, H, D, BLOCK_H, INTERLEAVED)
    _rotate_heads(k_ptr + token * HKV * D, k_out_ptr + token * HKV * D, cos, sin, HKV, D, BLOCK_HKV, INTERLEAVED)


def _launch(q, k, q_out, k_out, cos, sin, interleaved, inverse):
    (B, T, H, D), Hkv = q.shape, k.shape[2]
    table_stride = 0 if cos.dim() == 2 else T * (D // 2)  # (T, D/2) serves every row of the batch
    _rope_kernel[(B * T,)](
        q, k, q_out, k_out, cos, sin, T, table_stride, H=H, HKV=Hkv, D=D, BLOCK_H=triton.next_power_of_2(H),
        BLOCK_HKV=triton.next_power_of_2(Hkv), INTERLEAVED=interleaved, INVERSE=inverse, num_warps=NUM_WARPS,
    )  # fmt: skip


@opaque(lambda q, k, *_: (torch.empty_like(q), torch.empty_like(k)))
def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> tuple[Tensor, Tensor]:
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    _launch(q, k, q_out, k_out, cos, sin, interleaved, inverse)
    return q_out, k_out


@opaque(lambda *_: None, writes=("q", "k"))
def _rotate_in_place(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    _launch(q, k, q, k, cos, sin, interleaved, False)  # a program has read all it needs before it writes


class _Rope(torch.autograd.Function):
    """Saves the table only: the backward rotates the gradients back."""

    @staticmethod
    def forward(ctx, q, k, cos, sin, interleaved):
        cos, sin = cos.float().contiguous(), sin.float().contiguous()
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _rotate(q.contiguous(), k.contiguous(), cos, sin, interleaved, False)

    @staticmethod
    def backward(ctx, dq, dk):
        dq, dk = _rotate(dq.contiguous(), dk.contiguous(), *ctx.saved_tensors, ctx.interleaved, True)
        return dq, dk, None, None, None


def rope(q, k, cos, sin, interleaved=True, in_place=False):
    """Rotates q (B, T, H, D) and k (B, T, Hkv, D) by the angles whose fp32 cos and sin are (T, D/2) or (B, T, D/2).

    interleaved: pairs are (2i, 2i + 1), as in Cohere's models; else (i, i + D/2), as in Llama's and most others.
    in_place: q and k are the caller's own and may be overwritten, which is done where no gradient is recorded.

    Returns the rotated q and k in their own dtypes; no gradient flows to cos and sin. Other D than powers of two take
    PyTorch's ops on CUDA too.
    """
    D = q.shape[-1]
    if cos.shape != sin.shape or cos.shape[-2:] != (q.shape[1], D // 2) or k.shape[-1] != D or D % 2:
        raise ValueError(f"cos {tuple(cos.shape)} and sin must be (T, D/2) or (B, T, D/2) for q {tuple(q.shape)}")
    if use_triton(q) and D & (D - 1) == 0:
        if in_place and not recorded(q, k) and q.is_contiguous() and k.is_contiguous():
            _rotate_in_place(q, k, cos.float().contiguous(), sin.float().contiguous(), interleaved)
            return q, k
        return _Rope.apply(q, k, cos, sin, interleaved)
    return _rope_cpu(q, cos, sin, interleaved), _rope_cpu(k, cos, sin, interleaved)
