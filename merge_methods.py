"""
The mathematics of merging: tensors of one shape in, one out, nothing of files. Aya Expanse merges by the weighted
average (model soups, Wortsman et al. 2022, arXiv 2203.05482); SLERP (Shoemake 1985), TIES (Yadav et al. 2023, arXiv
2306.01708) and DARE-TIES (Yu et al. 2023, arXiv 2311.03099) are here to compare.

Everything is computed in fp32, or in fp64 where an input is wider than 16 bits, and returned unrounded: the caller
casts once. All of it is elementwise once a few numbers of the whole tensor are known (SLERP: three inner products;
TIES: one threshold a model), so a caller may pass the whole tensor, or chunks of it and these numbers.

Signs are multiplied with (`sign`, `clamp`) where one expects `torch.where`: on a CPU that is several times as fast.
"""

import hashlib
import math

import numpy as np
import torch


def widen(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def total(tensors):
    """The sum of K tensors, in a new one: for few models faster than torch's sum over a dimension."""
    return linear(tensors, [1.0] * len(tensors), normalize=False)


def linear(tensors, weights, normalize=True):
    """sum_i w_i x_i / sum_i w_i (model soups); normalize off: no division. A model of weight 0 is not looked at."""
    terms = [(x, w) for x, w in zip(tensors, weights, strict=True) if w != 0] or [(tensors[0], 0.0)]
    out = widen(terms[0][0]) * terms[0][1]
    for x, w in terms[1:]:
        out.add_(widen(x), alpha=w)
    return out.div_(sum(weights)) if normalize else out  # one division at the end: w_i / sum(w) would round as well


def towards(base, merged, lam):
    """theta_0 + lambda (merged - theta_0): less (lambda < 1) or more of what training changed (WiSE-FT, 2109.01903)."""
    base = widen(base)
    return base - (0.0 - lam * (merged - base))  # 0.0 - 0.0 is +0.0: a base of -0.0 that nothing moves stays as it is


# ---------------------------------------------------------------------------------------------------------------------
# SLERP

def dots(a, b):
    """a.a, a.b, b.b, as float64 (3,). Of a tensor: the sum over its chunks, which are added up in fp64."""
    a, b = widen(a).flatten(), widen(b).flatten()
    return torch.stack([a @ a, a @ b, b @ b]).double()


def slerp_weights(sums, t):
    """
    sums: dots() of two whole tensors -> what a and b are multiplied with: sin((1-t) W) / sin(W) and sin(t W) / sin(W),
    W the angle between them as flat vectors. Nearly parallel, or a zero vector (no angle): 1 - t and t.
    """
    aa, ab, bb = sums.tolist()
    cosine = ab / math.sqrt(aa) / math.sqrt(bb) if min(aa, bb) > 1e-16 else 1.0
    if not abs(cosine) <= 0.9995:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def slerp(a, b, t, sums=None):
    """Shoemake's formula, the lengths left as they are. sums: dots() of the whole tensors, where a and b are chunks."""
    return linear([a, b], slerp_weights(dots(a, b) if sums is None else sums, t), normalize=False)


# ---------------------------------------------------------------------------------------------------------------------
# TIES

COARSE, FINE, WIDE = 1 << 16, 1 << 15, 7  # bins of the coarse histogram; fine bins in each; coarse bins of a bracket


def coarse_bins(delta):
    """
    The upper 16 of the 31 bits of each |delta|: (n,) int32. As integers the bits of fp32 magnitudes have the order of
    the magnitudes; so a histogram of these, and a finer one of a few of its bins, find the k-th largest exactly, without
    sorting; and histograms of chunks, or of all tensors of a model, add up. delta, (n,), is overwritten.
    """
    return _bits(delta).bitwise_right_shift_(15)


def bracket_bins(delta, low):
    """
    What is left of the bits of those |delta| that lie in the WIDE coarse bins from `low` on: int32 below WIDE * FINE;
    and how many |delta| lie above these bins. delta, (n,), is overwritten.
    """
    bits = _bits(delta).numpy()  # numpy: far faster than torch where few elements are picked
    above = np.count_nonzero(bits > (low + WIDE) * FINE - 1)  # at most 2**31 - 1: fits
    bits -= low * FINE
    bits = bits.view(np.uint32)  # smaller ones wrap around and are large
    return torch.from_numpy(bits[bits < WIDE * FINE].view(np.int32)), above


def bracket(counts, k):
    """Where a bracket should begin so that the k-th largest is in it: counts, (65536,), may be those of a sample."""
    return max(0, min(find_bin(counts, k) - WIDE // 2, COARSE - WIDE))


def _bits(delta):
    return delta.float().abs_().view(torch.int32)


def find_bin(counts, k):
    """The highest bin such that it and those above hold k elements."""
    return len(counts) - 1 - int(counts.numpy()[::-1].cumsum().searchsorted(k))


def kept(n, density):
    """k of n elements, at least one."""
    return max(1, int(density * n))


def magnitude(low, counts, above, k):
    """
    The k-th largest of the magnitudes of which `above` lie above the bracket that begins at `low`, and counts,
    (WIDE * FINE,), in it. None if it is not one of these: the bracket was guessed wrong.
    """
    if not above < k <= above + int(counts.sum()):
        return None
    return torch.tensor(low * FINE + find_bin(counts, k - above), dtype=torch.int32).view(torch.float32).item()


def trim_threshold(x, density):
    """The k-th largest |x|, k = max(1, int(density * n)): as merge_stream.py finds it over many chunks."""
    if not x.numel():
        return 0.0
    k = kept(x.numel(), density)
    low = bracket(torch.bincount(coarse_bins(x.flatten().clone()), minlength=COARSE), k)
    inside, above = bracket_bins(x.flatten().clone(), low)
    return magnitude(low, torch.bincount(inside, minlength=WIDE * FINE), above, k)


def trim(delta, least):
    """TIES step 1, in place: 0 where |delta| < least; all that tie with the k-th stay. No rescaling."""
    below = float(np.nextafter(np.float32(least), np.float32(-1)))
    if delta.dtype == torch.float32:
        return torch.hardshrink(delta, below, out=delta)  # x where |x| > below, else 0
    return delta.mul_(torch.hardshrink(delta.float(), below).sign_().abs_())  # compared in fp32, as it was counted


def elect_and_merge(base, deltas, weights, lam=1.0, normalize=True):
    """
    TIES steps 2 and 3: elect the sign of sum_i w_i d_i per element (0 counts as +); tau = sum w_i d_i / sum w_i over
    the models whose w_i d_i has that sign, zeros never counting (normalize off: no division); theta_0 + lambda tau.
    With equal weights this is the paper's rule. Where nothing moved the base stays bit for bit.
    deltas: (K, *base.shape), overwritten.
    """
    terms = deltas
    if any(w != 1 for w in weights):
        terms.mul_(torch.tensor(weights, dtype=deltas.dtype).view(-1, *[1] * base.ndim))
    sign = total(terms).sign_().mul_(2).add_(1).sign_()  # -1 or 1
    agrees = terms.mul_(sign).clamp_(min=0)  # |w_i d_i| where it has the elected sign, else 0
    tau = total(agrees)
    if normalize:
        divisor = linear(agrees.sign_(), weights, normalize=False)
        tau /= divisor.add_(divisor.sign().abs_().sub_(1).abs_())  # 1 where it is 0: nobody agrees, or weights cancel
    tau.mul_(sign).mul_(-lam).add_(0.0)  # + 0.0 turns -0.0 into 0.0, which leaves a base of -0.0 as it is
    return torch.sub(base, tau, out=tau)


def ties(base, tensors, weights, density, lam=1.0, normalize=True, thresholds=None):
    """
    TIES (algorithm 1): keep each delta's largest `density` share, then elect and merge. tensors: K, or (K, *shape).
    thresholds: trim_threshold() of each model's whole delta, where base and tensors are chunks.
    """
    base, deltas = widen(base), difference(base, tensors)
    for i, d in enumerate(deltas):
        trim(d, thresholds[i] if thresholds else trim_threshold(d, density))
    return elect_and_merge(base, deltas, weights, lam, normalize)


def difference(base, tensors):
    """theta_i - theta_0 of K models: (K, *shape), in a new tensor."""
    tensors = tensors if isinstance(tensors, torch.Tensor) else torch.stack([widen(x) for x in tensors])
    return widen(tensors) - widen(base)


# ---------------------------------------------------------------------------------------------------------------------
# DARE

def mask(seed, model, tensor, begin, end, density):
    """
    Elements begin .. end of the 0/1 mask of a tensor, (end - begin,) fp32: each 1 with probability `density`, to
    2**-32. A function of its arguments alone. Philox (Salmon et al. 2011) is counter-based: draw number i needs no draw
    before it, so chunks and threads come out the same. The key is a hash: a raw seed would repeat draws that made the
    weights.
    """
    key = int.from_bytes(hashlib.sha256(f"{seed}\n{model}\n{tensor}".encode()).digest()[:16], "little")
    first = begin // 8 * 8  # one step of the counter makes eight draws of 32 bits
    draws = np.random.Philox(key=key, counter=first // 8).random_raw((end - first + 1) // 2).view(np.uint32)
    last = np.uint32(max(1, round(density * 2**32)) - 1)
    return torch.from_numpy((draws[begin - first:end - first] <= last).view(np.uint8)).float()


def dare(delta, density, kept):
    """DARE, in place: delta / density where `kept`, 0 or 1 with probability density = 1 - p, is 1; else 0. Unbiased."""
    return delta.mul_(kept).div_(density)


def dare_ties(base, tensors, weights, density, masks, lam=1.0, normalize=True):
    """DARE on each delta, then TIES' election and mean without a second trim. base and tensors may be chunks."""
    base, deltas = widen(base), difference(base, tensors)
    for d, kept in zip(deltas, masks, strict=True):
        dare(d, density, kept)
    return elect_and_merge(base, deltas, weights, lam, normalize)


# ---------------------------------------------------------------------------------------------------------------------

def gradient(values, layer, layers):
    """
    A setting that runs over the depth: `values` stand at even distances from the first layer to the last, linear in
    between; one value is the same everywhere. layer None, what lies outside the layers (embedding, final norm, head):
    the first value, as in mergekit.
    """
    at = 0.0 if layer is None or layers < 2 else layer * (len(values) - 1) / (layers - 1)
    i = int(at)
    return values[i] if at == i else values[i] + (values[i + 1] - values[i]) * (at - i)
