"""
Attention of ONE new token a row over a cache of keys and values: what every step of sampling runs in every layer.

A query attends to its T keys as in attention.py, but there is no tile of queries to share a load of the keys: each key
and value is read once and used for the G query heads of its group, 4 G FLOPs for 4 bytes in 16 bits, so the time is that
of reading the cache. Two things then decide. The G heads of a group go through the same loads (one program a key head,
not one a query head), as the rows of one small matmul. And where rows times key heads are fewer than the GPU's
multiprocessors, the keys are split as well, each program does a run of them, and a second kernel joins the runs:

    o = sum_s exp(m_s - m) acc_s / sum_s exp(m_s - m) l_s        m = max_s m_s

with m_s the largest score of run s, l_s and acc_s the sums of exp(score - m_s) and of exp(score - m_s) v. Dao et al.
2023, "Flash-Decoding", https://pytorch.org/blog/flash-decoding/. Without a gradient: sampling needs none.

Memory traffic: eager repeats k and v G times (a read and G writes) and reads them again; here one read, and S (D + 2)
fp32 numbers a head. FLOPs: 4 H D T a row.
"""

import torch
from torch import Tensor

from ._attention_cpu import decode_cpu
from ._triton import opaque, tl, triton, use_triton

PROGRAMS = 264  # wanted at once: two for each of an H100's 132 multiprocessors
BLOCK_BYTES = 16384  # of a tile of keys: 64 keys of D = 128 in 16 bits
NUM_WARPS, NUM_STAGES = 4, 3
LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x * LOG2E), and the hardware has exp2


@triton.jit
def _decode_run(
    q_ptr, k_ptr, v_ptr, acc_ptr, top_ptr, total_ptr, first_ptr, length_ptr, Tk, stride_b, stride_t, stride_h, scale,
    G: tl.constexpr, D: tl.constexpr, HKV: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_LENGTH: tl.constexpr,
    SOFTCAP: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    b, h_kv = (tl.program_id(0) // HKV).to(tl.int64), tl.program_id(0) % HKV
    first = tl.load(first_ptr + b) if HAS_FIRST else 0
    end = tl.minimum(tl.load(length_ptr + b), Tk) if HAS_LENGTH else Tk
    begin = (first // BN + tl.program_id(1)) * BN  # tiles that nothing sees are not read
    g, d = tl.arange(0, ROWS), tl.arange(0, D)[None, :]
    head = b * HKV * G + h_kv * G + g[:, None]  # this group's query heads; ROWS - G lines of the tile are idle
    q = tl.load(q_ptr + head * D + d, mask=g[:, None] < G, other=0.0)
    acc, total = tl.zeros((ROWS, D), dtype=tl.float32), tl.zeros((ROWS,), dtype=tl.float32)
    top = tl.full((ROWS,), -1e30, dtype=tl.float32)  # below any score, yet finite: else inf - inf before the first key
    for j0 in range(begin, end, tl.num_programs(1) * BN):
        j = j0 + tl.arange(0, BN)
        sees = (j >= first) & (j < end)
        at = b * stride_b + j[:, None].to(tl.int64) * stride_t + h_kv.to(tl.int64) * stride_h + d
        k = tl.load(k_ptr + at, mask=sees[:, None], other=0.0)  # what is not seen is not read: its NaN reaches nobody
        v = tl.load(v_ptr + at, mask=sees[:, None], other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale
        if SOFTCAP > 0:
            s = SOFTCAP * (2.0 * tl.sigmoid(s * (2.0 / SOFTCAP)) - 1.0)  # tanh
        s = tl.where(sees[None, :], s * LOG2E, -float("inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        p, rescale = tl.exp2(s - new_top[:, None]), tl.exp2(top - new_top)
        total = total * rescale + tl.sum(p, 1)
        acc = acc * rescale[:, None] + tl.dot(p.to(v.dtype), v, input_precision="tf32x3")
        top = new_top
    line = head * tl.num_programs(1) + tl.program_id(1)  # of (B, H, runs)
    tl.store(acc_ptr + line * D + d, acc, mask=g[:, None] < G)
    line = (b * HKV * G + h_kv * G + g) * tl.num_programs(1) + tl.program_id(1)
    tl.store(top_ptr + line, top, mask=g < G)
    tl.store(total_ptr + line, total, mask=g < G)


@triton.jit
def _decode_join(acc_ptr, top_ptr, total_ptr, out_ptr, runs, D: tl.constexpr, RUNS: tl.constexpr):
    s, d, head = tl.arange(0, RUNS), tl.arange(0, D), tl.program_id(0).to(tl.int64)
    top = tl.load(top_ptr + head * runs + s, mask=s < runs, other=-1e30)
    weight = tl.exp2(top - tl.max(top, 0))
    total = tl.sum(weight * tl.load(total_ptr + head * runs + s, mask=s < runs, other=0.0), 0)
    acc = tl.load(acc_ptr + (head * runs + s[:, None]) * D + d[None, :], mask=s[:, None] < runs, other=0.0)
    out = tl.sum(acc * weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)  # a query that saw no key gets zeros
    tl.store(out_ptr + head * D + d, out)


@opaque(lambda q, *_: q.new_empty(q.shape))
def _decode(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, length: Tensor | None, scale: float, softcap: float
) -> Tensor:
    (B, _, H, D), (_, Tk, Hkv, _) = q.shape, k.shape
    q, out = q.contiguous(), q.new_empty(q.shape)
    if k.stride() != v.stride() or k.stride(3) != 1:
        k, v = k.contiguous(), v.contiguous()
    BN = max(16, BLOCK_BYTES // (D * k.element_size()))
    runs = min(triton.cdiv(Tk, BN), triton.cdiv(PROGRAMS, B * Hkv))
    acc = torch.empty((B, H, runs, D), dtype=torch.float32, device=q.device)
    top, total = (torch.empty((B, H, runs), dtype=torch.float32, device=q.device) for _ in range(2))
    _decode_run[(B * Hkv, runs)](
        q, k, v, acc, top, total, first, length, Tk, k.stride(0), k.stride(1), k.stride(2), scale, G=H // Hkv, D=D, HKV=Hkv,
        HAS_FIRST=first is not None, HAS_LENGTH=length is not None, SOFTCAP=softcap,
        ROWS=max(16, triton.next_power_of_2(H // Hkv)), BN=BN, num_warps=NUM_WARPS, num_stages=NUM_STAGES,
    )  # fmt: skip
    _decode_join[(B * H,)](acc, top, total, out, runs, D=D, RUNS=triton.next_power_of_2(runs), num_warps=NUM_WARPS)
    return out


def decode(q, k, v, first=None, softcap=None, scale=None, length=None):
    """Attention of each row's newest query over the keys of its row; nothing is recorded for a gradient.

    q: (B, 1, H, D); k, v: (B, Tk, Hkv, D), any stride between rows, positions and heads (slices of a cache); first: (B,)
    or (B, 1) int32, the first key that each row sees, or None for key 0; length: (B,) int32, how many of the Tk
    positions are filled, or None for all: what lies behind them is not read. Returns (B, 1, H, D); a row that sees no key
    gets zeros; the definition of a row is attention_reference in attention.py. In a ring, where position p lies at
    p % Tk, keys stand in any order, which attention does not mind.
    """
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if use_triton(q):
        return _decode(q, k, v, first, length, scale, softcap or 0.0)
    return decode_cpu(q, k, v, first, length, softcap, scale)
