"""
SwiGLU, the gated activation of the feed-forward block: silu(gate) * up, with silu(x) = x * sigmoid(x).
Shazeer 2020, "GLU Variants Improve Transformer", https://arxiv.org/abs/2002.05202

Memory traffic in passes over one (tokens, F) tensor; about 5 FLOPs an element forward, so memory is all that counts:

              eager                                                            fused
    forward   silu: read 1, write 1; product: read 2, write 1            = 5   read 2, write 1 = 3
    backward  two products and silu's backward: read 2, write 1 each     = 9   read 3, write 2 = 5

Eager also keeps silu(gate) for its backward; here only gate and up are kept and the backward recomputes the sigmoid.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._triton import opaque, tl, triton, use_triton

BLOCK = 1024  # elements a program: two 128-bit loads of 16-bit elements a thread from each input
NUM_WARPS = 4


def swiglu_reference(gate, up):
    """The definition, fp32 inside (fp64 for fp64). gate, up: (..., F) -> (..., F) in gate's dtype."""
    acc = torch.promote_types(gate.dtype, torch.float32)
    g = gate.to(acc)
    return (g * torch.sigmoid(g) * up.to(acc)).to(gate.dtype)


@triton.jit
def _swiglu_forward(gate_ptr, up_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < n
    g = tl.load(gate_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offset, g * tl.sigmoid(g) * u, mask=mask)


@triton.jit
def _swiglu_backward(dout_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, n, BLOCK: tl.constexpr):
    # s = sigmoid(g), so silu = g s and, with s' = s (1 - s), silu' = s + g s (1 - s) = s (1 + g (1 - s))
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < n
    d = tl.load(dout_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(gate_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(dgate_ptr + offset, d * u * s * (1.0 + g * (1.0 - s)), mask=mask)
    tl.store(dup_ptr + offset, d * g * s, mask=mask)


@opaque(lambda gate, up: torch.empty_like(gate))
def _forward(gate: Tensor, up: Tensor) -> Tensor:
    out, n = torch.empty_like(gate), gate.numel()
    _swiglu_forward[(triton.cdiv(n, BLOCK),)](gate, up, out, n, BLOCK=BLOCK, num_warps=NUM_WARPS)
    return out


@opaque(lambda dout, gate, up: (torch.empty_like(gate), torch.empty_like(up)))
def _backward(dout: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup, n = torch.empty_like(gate), torch.empty_like(up), gate.numel()
    grid = (triton.cdiv(n, BLOCK),)
    _swiglu_backward[grid](dout, gate, up, dgate, dup, n, BLOCK=BLOCK, num_warps=NUM_WARPS)
    return dgate, dup


class _SwiGLU(torch.autograd.Function):
    """Saves the two inputs, nothing else, and never writes into them."""

    @staticmethod
    def forward(ctx, gate, up):
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return _forward(gate, up)

    @staticmethod
    def backward(ctx, dout):
        return _backward(dout.contiguous(), *ctx.saved_tensors)


def swiglu(gate, up):
    """silu(gate) * up, elementwise. gate, up: (..., F) of one shape and dtype. Returns (..., F) in that dtype."""
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"gate {tuple(gate.shape)} {gate.dtype} and up {tuple(up.shape)} {up.dtype} must match")
    if use_triton(gate):
        return _SwiGLU.apply(gate, up)
    return F.silu(gate) * up  # on one CPU thread faster than any autograd.Function that was tried
