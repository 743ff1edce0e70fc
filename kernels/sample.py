"""
One token a row from fp32 logits, and its log-probability: temperature, min-p, top-p and the draw, in one launch.

    w_v = exp((z_v - max z) / T)        of the words v < vocab      (T -> 0: the likeliest word, no draw)
    kept: w_v >= min_p                                              min-p, Nguyen et al. 2024, arXiv 2407.01082
    kept: w_v >= t, t the largest with sum(w_v >= t) >= top_p sum(w)   top-p (nucleus), Holtzman et al. 2020, arXiv 1904.09751
    token: the first v whose running sum of kept w passes u * the sum of all kept     inverse transform, u uniform in [0, 1)
    logp:  z_token - log sum exp z       of the model itself: all words, temperature 1, nothing cut

Words as likely as the least likely one that top-p keeps are kept too: a tie is no reason to prefer small ids. To sort
256,000 words a row, as samplers commonly do, costs more than a layer; here the threshold t is searched for instead. A
positive fp32 number and its bits, read as an integer, are in the same order, so each pass over a row settles two more
bits of t: the mass above 3 thresholds at once, and the largest that still holds top_p stays.

Memory traffic: 3 reads of the logits without top-p, 19 with it (a row of 256,000 is 1 MB: it stays in the L2 cache).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._triton import opaque, tl, triton, use_triton

BLOCK = 4096  # words a program handles in one go
NUM_WARPS, STAGES = 16, 3


def sample_reference(logits, u, vocab, temperature, top_p, min_p):
    """The definition. logits (n, V), u (n,) in [0, 1) -> ids (n,) int64 and their log-probabilities (n,) fp32."""
    logits = logits.float()
    allowed = logits[:, :vocab]
    if temperature == 0:
        token = allowed.argmax(-1)
    else:
        w = ((allowed - allowed.amax(-1, keepdim=True)) / temperature).exp()
        if top_p < 1 or min_p > 0:
            ranked = w.sort(-1, descending=True).values
            mass = ranked.double().cumsum(-1)
            last = (mass < top_p * mass[:, -1:]).sum(-1, keepdim=True)  # so many are too few
            least = ranked.gather(1, last.clamp(max=w.shape[1] - 1)).clamp(min=min_p)
            w = torch.where(w >= least, w, 0.0)
        total = w.double().cumsum(-1)
        token = torch.searchsorted(total, u[:, None].to(total) * total[:, -1:], right=True).squeeze(1)
        token = token.clamp(max=vocab - 1)
    return token, logits.gather(1, token[:, None]).squeeze(1) - logits.logsumexp(-1)


@triton.jit
def _weights(z_ptr, v0, top, V, vocab, scale, BLOCK: tl.constexpr):
    """exp((z - top) * scale) of words v0 .. v0 + BLOCK; 0 from vocab on, which need not be a multiple of 16 as V is."""
    v = v0 + tl.arange(0, BLOCK)
    z = tl.load(z_ptr + v, mask=v < V, other=-float("inf"))
    return v, tl.where(v < vocab, tl.exp((z - top) * scale), 0.0)


@triton.jit
def _sample_kernel(
    z_ptr, u_ptr, token_ptr, logp_ptr, V, vocab, scale, top_p, min_p, GREEDY: tl.constexpr, TOP_P: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    z_ptr += row.to(tl.int64) * V
    # 1) the largest logit of the words that may be drawn, its first place; log sum exp of all words, and the sum of w
    best, token, top, total, mass = -1e30, 0, -1e30, 0.0, 0.0  # finite: a block of logits -inf would say inf - inf
    for v0 in tl.range(0, V, BLOCK, num_stages=STAGES):
        v = v0 + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + v, mask=v < V, other=-float("inf"))
        new_top = tl.maximum(top, tl.max(z, 0))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(z - new_top), 0)
        top = new_top
        z = tl.where(v < vocab, z, -float("inf"))
        here = tl.max(z, 0)
        token = tl.where(here > best, v0 + tl.argmax(z, 0), token)
        new_best = tl.maximum(best, here)
        mass = mass * tl.exp((best - new_best) * scale) + tl.sum(tl.exp((z - new_best) * scale), 0)
        best = new_best
    if not GREEDY:
        # 2) the least weight that is kept: its bits, two at a time from the highest on
        least = min_p
        if TOP_P:
            bits = 0
            for step in range(16):
                candidate = bits + (tl.arange(0, 4) << (30 - 2 * step))
                threshold = candidate.to(tl.float32, bitcast=True)
                above = tl.zeros((4, BLOCK), dtype=tl.float32)  # summed once a pass: a sum a block would wait for its threads
                for v0 in tl.range(0, vocab, BLOCK, num_stages=STAGES):
                    v, w = _weights(z_ptr, v0, best, V, vocab, scale, BLOCK)
                    above += tl.where(w[None, :] >= threshold[:, None], w[None, :], 0.0)
                # weights are at most 1, whose bits are 0x3F800000: beyond, there are no numbers to compare with
                good = (tl.sum(above, 1) >= top_p * mass) & (candidate >= bits) & (candidate <= 0x3F800000)
                bits = tl.max(tl.where(good, candidate, bits), 0)
            least = tl.maximum(least, bits.to(tl.float32, bitcast=True))
        # 3) the sum of what is kept, then the first word whose running sum passes u of it: in fp64, since among 256,000
        # words one weighs as much as fp32's rounding of the sum
        kept = tl.full((), 0.0, tl.float64)
        for v0 in tl.range(0, vocab, BLOCK, num_stages=STAGES):
            v, w = _weights(z_ptr, v0, best, V, vocab, scale, BLOCK)
            kept += tl.sum(tl.where(w >= least, w, 0.0), 0)
        target, before, found, last = tl.load(u_ptr + row) * kept, tl.full((), 0.0, tl.float64), V, 0
        for v0 in tl.range(0, vocab, BLOCK, num_stages=STAGES):
            v, w = _weights(z_ptr, v0, best, V, vocab, scale, BLOCK)
            keep = (w >= least) & (w > 0.0)
            w = tl.where(keep, w, 0.0)
            here = tl.sum(w, 0).to(tl.float64)
            if (found == V) & (before + here > target):
                passed = (before + tl.cumsum(w, 0).to(tl.float64) > target) & keep
                found = tl.min(tl.where(passed, v, V), 0)
            last = tl.maximum(last, tl.max(tl.where(keep, v, 0), 0))
            before += here
        token = tl.where(found < V, found, last)  # rounding may leave u's share just out of reach
    token = tl.minimum(token, vocab - 1)  # argmax among NaN is any place of a block, which may end beyond the row
    tl.store(token_ptr + row, token.to(tl.int64))
    tl.store(logp_ptr + row, tl.load(z_ptr + token) - (top + tl.log(total)))


def _outputs(logits):
    return (torch.empty(len(logits), dtype=torch.int64, device=logits.device),
            torch.empty(len(logits), dtype=torch.float32, device=logits.device))


@opaque(lambda logits, *_: _outputs(logits))
def _sample(
    logits: Tensor, u: Tensor | None, vocab: int, temperature: float, top_p: float, min_p: float
) -> tuple[Tensor, Tensor]:
    token, logp = _outputs(logits)
    _sample_kernel[(len(logits),)](
        logits, u, token, logp, logits.shape[1], vocab, 1.0 / (temperature or 1.0), top_p, min_p,
        GREEDY=temperature == 0, TOP_P=top_p < 1, BLOCK=BLOCK, STAGES=STAGES, num_warps=NUM_WARPS,
    )  # fmt: skip
    return token, logp


def _sample_cpu(logits, u, vocab, temperature, top_p, min_p):
    """
    The definition in fewer passes: sums of 64 words first, then the words of one block; one exp where T is 1; and to find
    top-p's threshold, the 64 likeliest words are sorted, all of them only if a row's 64 hold less than top_p.
    """
    n, V = logits.shape
    if temperature == 0:
        token = logits[:, :vocab].argmax(-1)
        return token, logits.gather(1, token[:, None]).squeeze(1) - logits.logsumexp(-1)
    top = logits.amax(-1, keepdim=True)
    w = F.pad(logits - top, (0, -V % 64), value=-torch.inf)
    lse = w.exp().sum(-1) if temperature != 1 else None
    w = (w.div_(temperature) if temperature != 1 else w).exp_()
    lse = (w.sum(-1) if lse is None else lse).log() + top[:, 0]
    w[:, vocab:] = 0
    if top_p < 1 or min_p > 0:
        ranked, mass = w.topk(min(64, vocab)).values, top_p * w.sum(-1, dtype=torch.float64, keepdim=True)
        if (ranked.sum(-1, dtype=torch.float64, keepdim=True) < mass).any():
            ranked = w.sort(-1, descending=True).values
        last = (ranked.double().cumsum(-1) < mass).sum(-1, keepdim=True).clamp(max=ranked.shape[1] - 1)
        w = torch.where(w >= torch.maximum(ranked.gather(1, last), ranked[:, :1] * min_p), w, 0.0)
    blocks = w.view(n, -1, 64)
    sums = blocks.sum(-1).double().cumsum(-1)
    total = sums[:, -1:].contiguous()
    target = torch.minimum(u[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))  # below the end, also rounded
    block = torch.searchsorted(sums, target, right=True).clamp(max=sums.shape[1] - 1)  # NaN is beyond all: its log-prob says so
    before = torch.where(block > 0, sums.gather(1, (block - 1).clamp(min=0)), 0.0)
    words = blocks[torch.arange(n), block[:, 0]].double()
    place = torch.searchsorted(words.cumsum(-1) + before, target, right=True)
    last = 63 - (words > 0).flip(-1).int().argmax(-1, keepdim=True)
    token = (block * 64 + torch.minimum(place, last)).squeeze(1).clamp(max=vocab - 1)
    return token, logits.gather(1, token[:, None]).squeeze(1) - lse


def sample(logits, u, vocab, temperature=0.0, top_p=1.0, min_p=0.0):
    """
    One word a row. logits (n, V); u (n,) fp64 in [0, 1), or None at temperature 0; ids from `vocab` on are never drawn.
    Returns ids (n,) int64 and log p of the whole distribution, (n,) fp32. Nothing is recorded for a gradient.
    """
    if use_triton(logits):
        return _sample(logits.float().contiguous(), u, vocab, temperature, top_p, min_p)
    return _sample_cpu(logits.float(), u, vocab, temperature, top_p, min_p)
