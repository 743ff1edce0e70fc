"""
Causal grouped-query attention over packed documents: softmax(q k^T scale) v, where query i sees key j if

    doc_start[i] <= j <= i      and, with a window, i - j < window

doc_start is one int32 a token, the first position of its document, so packed sequences need no list of lengths, no copy
to the host and no recompilation. Only tiles where some query sees some key are visited, and masked where not all do.
Dao et al. 2022, "FlashAttention", https://arxiv.org/abs/2205.14135: the scores stay on chip, and of each row only its
log-sum-exp is saved.

FLOPs for S visible (query, key) pairs: 4 S H D forward (two matmuls), 10 S H D backward (five; seven are done, since dq
has a kernel of its own: no atomics, so gradients are the same bits every time, and no fp32 copy of dq).
Memory traffic: eager writes the (B, H, T, T) scores and reads them back to scale, mask, normalise and multiply; fused
reads q, k and v and writes the output, and each tile of k and v is read once by every tile of queries that sees it.
A key head's gradient sums over the G = H / Hkv query heads that share it: one program loops over them.
"""

import torch
from torch import Tensor

from ._attention_cpu import attention_cpu, visible
from ._triton import TensorDescriptor, has_tma, opaque, recorded, tl, triton, use_triton
from .decode import decode

# Tiles for an H100 or H200, and below for an A100 (no descriptors, fewer registers to spare): (queries, keys, warps,
# stages), by the bytes of one head's row: 256 is D = 128 in 16 bits. Nothing is tuned at start-up; bench/tune.py tries
# others. In fp32 each product is three of TF32 (tf32x3 below): nearly exact, slow, rarely needed.
TILES = {
    "forward": {128: (128, 64, 8, 3), 256: (128, 64, 8, 3), 512: (128, 32, 8, 2), 1024: (32, 32, 4, 1)},
    "dq": {128: (128, 64, 8, 2), 256: (128, 64, 8, 3), 512: (128, 32, 8, 2), 1024: (32, 32, 4, 1)},
    "dkdv": {128: (64, 128, 8, 2), 256: (32, 64, 4, 2), 512: (16, 64, 8, 2), 1024: (16, 32, 4, 1)},
}
TILES_SM80 = {
    "forward": {128: (128, 32, 8, 3), 256: (128, 32, 8, 3), 512: (32, 32, 4, 1), 1024: (32, 32, 4, 1)},
    "dq": {128: (128, 32, 8, 2), 256: (128, 32, 8, 2), 512: (32, 32, 4, 1), 1024: (32, 32, 4, 1)},
    "dkdv": {128: (32, 64, 8, 2), 256: (32, 64, 8, 2), 512: (16, 32, 4, 1), 1024: (16, 32, 4, 1)},
}


def attention_reference(q, k, v, doc_start=None, window=None, softcap=None, scale=None):
    """The definition, fp32 inside (fp64 for fp64). A query that sees no key at all gets zeros."""
    Tq, Tk, G = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    acc = torch.promote_types(q.dtype, torch.float32)
    k, v = (x.to(acc).repeat_interleave(G, dim=2) for x in (k, v))  # query head h reads key head h // G
    scores = torch.einsum("bihd,bjhd->bhij", q.to(acc), k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)  # Gemma 2, https://arxiv.org/abs/2408.00118
    mask = visible(Tq, Tk, doc_start, window, q.device)
    probs = scores.masked_fill(~mask, torch.finfo(acc).min).softmax(-1) * mask
    return torch.einsum("bhij,bjhd->bihd", probs, v).to(q.dtype)


# --- The kernels. A program owns a tile of queries (forward, dq) or of keys (dk and dv) and walks the other axis twice:
# --- over tiles where all see all, without a mask, then over those at the edges (a document's start, the diagonal).
# --- Query m sits at position m + Tk - Tq; first[m] is the first key it sees, by doc_start and window together.
# --- What a query does not see is masked, and must not reach it by way of 0 * NaN in a matmul either.

LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x * LOG2E), and the hardware has exp2


@triton.jit
def _at(x, b, h, t0, BLOCK: tl.constexpr, D: tl.constexpr):
    """Addresses of these rows, and whether they are there. x is (pointer, strides of B and T, T)."""
    t = t0 + tl.arange(0, BLOCK)[:, None]
    return x[0] + b.to(tl.int64) * x[1] + t.to(tl.int64) * x[2] + h * D + tl.arange(0, D)[None, :], t < x[3]


@triton.jit
def _load(x, b, h, t0, BLOCK: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr):
    """Rows t0 .. t0 + BLOCK of head h of a (B, T, H * D): (BLOCK, D), with zeros past T. With TMA x is a descriptor."""
    if TMA:
        return tl.reshape(x.load([b, t0, h * D]), (BLOCK, D))
    else:
        at, inside = _at(x, b, h, t0, BLOCK, D)
        return tl.load(at, mask=inside, other=0.0)


@triton.jit
def _store(x, b, h, t0, tile, TMA: tl.constexpr):
    """The reverse: what lies past T is dropped."""
    if TMA:
        x.store([b, t0, h * tile.shape[1]], tl.reshape(tile.to(x.dtype), (1, tile.shape[0], tile.shape[1])))
    else:
        at, inside = _at(x, b, h, t0, tile.shape[0], tile.shape[1])
        tl.store(at, tile, mask=inside)


@triton.jit
def _finite(x):
    """NaN and infinity become 0."""
    x32 = x.to(tl.float32)
    return tl.where(x32 * 0.0 == 0.0, x32, 0.0).to(x.dtype)


@triton.jit
def _score(qk, scale, SOFTCAP: tl.constexpr):
    """The score times LOG2E, and its slope d score / d (qk * scale)."""
    x = qk * scale
    if SOFTCAP > 0:
        t = 2.0 * tl.sigmoid(x * (2.0 / SOFTCAP)) - 1.0  # tanh(x / SOFTCAP)
        return t * (SOFTCAP * LOG2E), 1.0 - t * t
    else:
        return x * LOG2E, 1.0


@triton.jit
def _key_range(m0, m, Tq, shift, first, HAS_FIRST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Some of the queries m0 .. m0 + BM see keys lo .. hi; all see all of inner .. outer, a whole number of tiles."""
    lo, inner = 0, 0
    if HAS_FIRST:
        lo = tl.min(tl.where(m < Tq, first, Tq + shift), 0)
        inner = lo + tl.cdiv(tl.max(first, 0) - lo, BN) * BN
    hi = tl.minimum(m0 + BM, Tq) + shift
    outer = inner + tl.maximum(m0 + shift + 1 - inner, 0) // BN * BN
    return lo, tl.minimum(inner, hi), tl.minimum(outer, hi), hi


@triton.jit
def _step_over(x, inner, outer):
    """Counts through the tiles at the edges: those before inner, then those from outer on."""
    return x + tl.where(x < inner, 0, outer - inner)


@triton.jit
def _attention_forward(
    q_rows, k_rows, v_rows, out_rows, lse_ptr, first_ptr, Tq, Tk, H, scale,
    G: tl.constexpr, D: tl.constexpr, HAS_FIRST: tl.constexpr, SOFTCAP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    m0 = (tl.num_programs(1) - 1 - tl.program_id(1)) * BM  # the longest rows start first
    b, h = tl.program_id(0) // H, tl.program_id(0) % H
    m = m0 + tl.arange(0, BM)
    q = _load(q_rows, b, h, m0, BM, D, TMA)
    first = tl.load(first_ptr + b.to(tl.int64) * Tq + m, mask=m < Tq, other=0) if HAS_FIRST else m
    lo, inner, outer, hi = _key_range(m0, m, Tq, Tk - Tq, first, HAS_FIRST, BM, BN)
    acc, total = tl.zeros((BM, D), dtype=tl.float32), tl.zeros((BM,), dtype=tl.float32)
    top = tl.full((BM,), -1e30, dtype=tl.float32)  # below any score, yet finite: else inf - inf before the first key
    for edge in tl.static_range(2):
        for x in tl.range(lo if edge else inner, hi - (outer - inner) if edge else outer, BN):
            j0 = _step_over(x, inner, outer) if edge else x
            j = j0 + tl.arange(0, BN)
            k, v = _load(k_rows, b, h // G, j0, BN, D, TMA), _load(v_rows, b, h // G, j0, BN, D, TMA)
            s, _ = _score(tl.dot(q, tl.trans(k), input_precision="tf32x3"), scale, SOFTCAP)
            if edge:
                sees = j[None, :] <= m[:, None] + (Tk - Tq)
                if HAS_FIRST:
                    sees &= j[None, :] >= first[:, None]
                    s += tl.sum(v.to(tl.float32) * 0.0, 1)[None, :]  # NaN in v goes to those who see it, by the score
                    v = _finite(v)
                s = tl.where(sees, s, -float("inf"))
            new_top = tl.maximum(top, tl.max(s, 1))
            p = tl.exp2(s - new_top[:, None])
            rescale = tl.exp2(top - new_top)
            total = total * rescale + tl.sum(p, 1)
            acc = acc * rescale[:, None] + tl.dot(p.to(v.dtype), v, input_precision="tf32x3")
            top = new_top
    nothing = total == 0.0  # a query that saw no key: zeros, and a log-sum-exp that makes its weights 0 in the backward
    _store(out_rows, b, h, m0, acc / tl.where(nothing, 1.0, total)[:, None], TMA)
    row = tl.program_id(0).to(tl.int64) * Tq + m  # of (B, H, Tq)
    tl.store(lse_ptr + row, tl.where(nothing, float("inf"), top + tl.log2(total)), mask=m < Tq)


# Backward, with P = exp(S - lse) recomputed from the saved log-sum-exp, dO the gradient of the output O:
#   dV = P^T dO    dP = dO V^T    dS = P * (dP - delta), delta = rowsum(dO * O)    dQ = dS K scale    dK = dS^T Q scale


@triton.jit
def _attention_dq(
    q_rows, k_rows, v_rows, out_rows, dout_rows, dq_rows, lse_ptr, delta_ptr, first_ptr, Tq, Tk, H, scale,
    G: tl.constexpr, D: tl.constexpr, HAS_FIRST: tl.constexpr, SOFTCAP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    m0 = (tl.num_programs(1) - 1 - tl.program_id(1)) * BM
    b, h = tl.program_id(0) // H, tl.program_id(0) % H
    m = m0 + tl.arange(0, BM)
    row = tl.program_id(0).to(tl.int64) * Tq + m  # of lse and delta, (B, H, Tq)
    q = _load(q_rows, b, h, m0, BM, D, TMA)
    out, dout = _load(out_rows, b, h, m0, BM, D, TMA), _load(dout_rows, b, h, m0, BM, D, TMA)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    tl.store(delta_ptr + row, delta, mask=m < Tq)  # for the kernel of dk and dv, which runs next
    lse = tl.load(lse_ptr + row, mask=m < Tq, other=float("inf"))
    first = tl.load(first_ptr + b.to(tl.int64) * Tq + m, mask=m < Tq, other=0) if HAS_FIRST else m
    lo, inner, outer, hi = _key_range(m0, m, Tq, Tk - Tq, first, HAS_FIRST, BM, BN)
    dq = tl.zeros((BM, D), dtype=tl.float32)
    for edge in tl.static_range(2):
        for x in tl.range(lo if edge else inner, hi - (outer - inner) if edge else outer, BN):
            j0 = _step_over(x, inner, outer) if edge else x
            j = j0 + tl.arange(0, BN)
            k, v = _load(k_rows, b, h // G, j0, BN, D, TMA), _load(v_rows, b, h // G, j0, BN, D, TMA)
            s, slope = _score(tl.dot(q, tl.trans(k), input_precision="tf32x3"), scale, SOFTCAP)
            dp = tl.dot(dout, tl.trans(v), input_precision="tf32x3")
            ds = tl.exp2(s - lse[:, None]) * (dp - delta[:, None]) * slope
            if edge:
                sees = j[None, :] <= m[:, None] + (Tk - Tq)
                if HAS_FIRST:
                    sees &= j[None, :] >= first[:, None]
                    k = _finite(k)
                ds = tl.where(sees, ds, 0.0)
            dq += tl.dot(ds.to(k.dtype), k, input_precision="tf32x3")
    _store(dq_rows, b, h, m0, dq * scale, TMA)


@triton.jit
def _attention_dkdv(
    q_rows, k_rows, v_rows, dout_rows, dk_rows, dv_rows, lse_ptr, delta_ptr, end_ptr, Tq, Tk, H, scale,
    G: tl.constexpr, D: tl.constexpr, HAS_FIRST: tl.constexpr, SOFTCAP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    n0, Hkv, shift = tl.program_id(1) * BN, H // G, Tk - Tq
    b, h_kv = tl.program_id(0) // Hkv, tl.program_id(0) % Hkv
    j = n0 + tl.arange(0, BN)
    k, v = _load(k_rows, b, h_kv, n0, BN, D, TMA), _load(v_rows, b, h_kv, n0, BN, D, TMA)
    # queries lo .. hi see some of these keys; all of inner .. outer, a whole number of tiles, see all of them
    lo, hi, last, end = tl.maximum(n0 - shift, 0), Tq, Tq, j
    if HAS_FIRST:  # key j is seen by queries j - shift .. end[j]
        end = tl.load(end_ptr + b.to(tl.int64) * Tk + j, mask=j < Tk, other=0)
        hi, last = tl.max(end, 0), tl.min(end, 0)
    inner = tl.minimum(lo + tl.cdiv(tl.maximum(n0 + BN - 1 - shift - lo, 0), BM) * BM, hi)
    outer = inner + tl.maximum(last - inner, 0) // BM * BM
    dk, dv = tl.zeros((BN, D), dtype=tl.float32), tl.zeros((BN, D), dtype=tl.float32)
    for g in range(G):
        h = h_kv * G + g
        row = (b.to(tl.int64) * H + h) * Tq
        for edge in tl.static_range(2):
            stop = hi - (outer - inner) if edge else outer
            # the few tiles at the edges are not prefetched: that would cost registers, of which dk and dv take most
            for x in tl.range(lo if edge else inner, stop, BM, num_stages=1 if edge else None):
                m0 = _step_over(x, inner, outer) if edge else x
                m = m0 + tl.arange(0, BM)
                q, dout = _load(q_rows, b, h, m0, BM, D, TMA), _load(dout_rows, b, h, m0, BM, D, TMA)
                lse = tl.load(lse_ptr + row + m, mask=m < Tq, other=float("inf"))
                delta = tl.load(delta_ptr + row + m, mask=m < Tq, other=0.0)
                s, slope = _score(tl.dot(k, tl.trans(q), input_precision="tf32x3"), scale, SOFTCAP)  # S^T: (BN, BM)
                p = tl.exp2(s - lse[None, :])
                dp = tl.dot(v, tl.trans(dout), input_precision="tf32x3")
                ds = p * (dp - delta[None, :]) * slope
                if edge:
                    sees = j[:, None] <= m[None, :] + shift
                    if HAS_FIRST:
                        sees &= m[None, :] < end[:, None]
                        p += delta[None, :] * 0.0  # NaN in dout goes to the values it should, though not by the matmul
                        q, dout = _finite(q), _finite(dout)
                    p, ds = tl.where(sees, p, 0.0), tl.where(sees, ds, 0.0)
                dv += tl.dot(p.to(dout.dtype), dout, input_precision="tf32x3")
                dk += tl.dot(ds.to(q.dtype), q, input_precision="tf32x3")
    _store(dk_rows, b, h_kv, n0, dk * scale, TMA)
    _store(dv_rows, b, h_kv, n0, dv, TMA)


def _tiles(kernel, D, dtype):
    return (TILES if has_tma() else TILES_SM80)[kernel][max(D * dtype.itemsize, 128)]


def _joined(x):
    """(B, T, H, D) as (B, T, H * D), rows in one piece and 16-byte aligned as descriptors need, copied if need be."""
    x = x.flatten(2)
    steps = [step * x.element_size() for step in x.stride()[:2]]
    aligned = x.stride(2) == 1 and x.data_ptr() % 16 == 0 and all(step > 0 and step % 16 == 0 for step in steps)
    return x if aligned else x.clone(memory_format=torch.contiguous_format)


def _boxes(rows, *tensors):
    """
    What the kernels read and write `rows` rows of one head at a time by: descriptors, which Hopper's copy engine (TMA)
    follows; without it, pointers and strides.
    """
    D, joined = tensors[0].shape[3], [_joined(x) for x in tensors]
    if not has_tma():
        return [(x, x.stride(0), x.stride(1), x.shape[1]) for x in joined]
    return [TensorDescriptor(x, list(x.shape), list(x.stride()), [1, rows, D]) for x in joined]


def _first_key(doc_start, window, Tq, Tk, batch, device):
    """(B, Tq) int32, the first key each query sees, or None if that is key 0 for all."""
    first = None if doc_start is None else doc_start[:, -Tq:]
    if window is not None:
        oldest = torch.arange(Tk - Tq, Tk, device=device) - (window - 1)
        first = oldest.clamp(min=0).expand(batch, Tq) if first is None else torch.maximum(first, oldest)
    return None if first is None else first.to(torch.int32).contiguous()


@opaque(lambda q, *_: (q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)))
def _forward(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    (B, Tq, H, D), (_, Tk, Hkv, _), out = q.shape, k.shape, q.new_empty(q.shape)
    lse = q.new_empty((B, H, Tq), dtype=torch.float32)
    BM, BN, num_warps, num_stages = _tiles("forward", D, q.dtype)
    _attention_forward[(B * H, triton.cdiv(Tq, BM))](
        *_boxes(BM, q), *_boxes(BN, k, v), *_boxes(BM, out), lse, first, Tq, Tk, H, scale, G=H // Hkv, D=D,
        HAS_FIRST=first is not None, SOFTCAP=softcap, BM=BM, BN=BN, TMA=has_tma(), num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return out, lse


@opaque(lambda dout, q, k, v, *_: tuple(x.new_empty(x.shape) for x in (q, k, v)))
def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, first: Tensor | None, scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (B, Tq, H, D), (_, Tk, Hkv, _), delta, end = q.shape, k.shape, torch.empty_like(lse), None
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    if first is not None:  # queries are sorted by their first key, so those that see key j end at end[j]
        keys = torch.arange(Tk, dtype=torch.int32, device=q.device).expand(B, Tk).contiguous()
        end = torch.searchsorted(first, keys, right=True, out_int32=True)
    options = dict(G=H // Hkv, D=D, HAS_FIRST=first is not None, SOFTCAP=softcap)
    BM, BN, num_warps, num_stages = _tiles("dq", D, q.dtype)
    _attention_dq[(B * H, triton.cdiv(Tq, BM))](
        *_boxes(BM, q), *_boxes(BN, k, v), *_boxes(BM, out, dout, dq), lse, delta, first, Tq, Tk, H, scale,
        **options, BM=BM, BN=BN, TMA=has_tma(), num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    BM, BN, num_warps, num_stages = _tiles("dkdv", D, q.dtype)
    _attention_dkdv[(B * Hkv, triton.cdiv(Tk, BN))](
        *_boxes(BM, q), *_boxes(BN, k, v), *_boxes(BM, dout), *_boxes(BN, dk, dv), lse, delta, end, Tq, Tk,
        H, scale, **options, BM=BM, BN=BN, TMA=has_tma(), num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return dq, dk, dv


class _Attention(torch.autograd.Function):
    """Saves q, k, v, the output and one fp32 log-sum-exp a query and head."""

    @staticmethod
    def forward(ctx, q, k, v, doc_start, window, softcap, scale):
        first = _first_key(doc_start, window, q.shape[1], k.shape[1], q.shape[0], q.device)
        ctx.options = scale, softcap or 0.0
        out, lse = _forward(q, k, v, first, *ctx.options)
        ctx.save_for_backward(q, k, v, out, lse, first)
        return out

    @staticmethod
    def backward(ctx, dout):
        return *_backward(dout, *ctx.saved_tensors, *ctx.options), None, None, None, None


def attention(q, k, v, doc_start=None, window=None, softcap=None, scale=None):
    """Causal attention. q: (B, Tq, H, D); k, v: (B, Tk, Hkv, D), H a multiple of Hkv. Returns (B, Tq, H, D).

    The queries are the last Tq of the Tk positions: Tq == Tk trains, Tq < Tk decodes with a cache. doc_start (B, Tq) or
    (B, Tk) int32 holds the first position of each token's document and never decreases along a row; a query before its
    own doc_start (padding on the left) gets zeros. window keeps the last `window` keys of each query, itself included;
    softcap bounds the scores by softcap * tanh(score / softcap); scale defaults to D ** -0.5. NaN stays in its
    document. On CUDA, D must be a power of two from 16 to 256.
    """
    (B, Tq, H, D), (_, Tk, Hkv, _) = q.shape, k.shape
    if H % Hkv or Tq > Tk or k.shape != v.shape or k.shape[0] != B or k.shape[3] != D:
        raise ValueError(f"q {tuple(q.shape)} does not fit k {tuple(k.shape)} and v {tuple(v.shape)}")
    scale = D**-0.5 if scale is None else scale
    if not use_triton(q):
        return attention_cpu(q, k, v, doc_start, window, softcap, scale)
    if D not in (16, 32, 64, 128, 256):
        raise ValueError(f"the attention kernel needs D in 16, 32, 64, 128, 256, not {D}")
    if Tq == 1 and not recorded(q, k, v):
        return decode(q, k, v, _first_key(doc_start, window, 1, Tk, B, q.device), softcap, scale)
    return _Attention.apply(q, k, v, doc_start, window, softcap, scale)
