"""
A merge of any size in the memory of a few chunks: what merge.py and its weight search run.

A tensor is cut into spans, spans into chunks. Threads take spans; for each chunk they read every model's bytes with
pread into buffers of their own, compute, and hand the result to `sink(name, begin, chunk)`, so that reads, arithmetic
and writes of different chunks overlap. Nothing is ever as large as a tensor (the embedding of aya-expanse-32b: 4.2 GB).
What SLERP and TIES must know of a whole tensor takes one or two passes over it first; tensors are taken in groups of
GROUP elements, so that a pass finds in the page cache what the pass before it has read.
"""

import functools
import math
import os
import re
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

import merge_methods as methods
from checkpoint import Checkpoint, finite
from common import die

CHUNK = 1 << 17  # elements computed at once: smaller, and Python costs more than arithmetic; larger, and caches miss
SPAN = 1 << 22  # elements of one tensor that a thread takes at once
GROUP = 1 << 25  # elements of tensors that are read a second time before the next ones are read a first time


@dataclass
class Plan:
    """What to merge and how: the settings of merge.py, parsed. Weights and t: a list of numbers over the depth."""
    method: str
    parents: list[Checkpoint]  # K models
    weights: list[list[float]]  # of each model
    keys: list[str]  # of each model: its name, for DARE's masks
    base: Checkpoint | None = None
    t: list[float] = field(default_factory=lambda: [0.5])
    density: float = 0.2
    lam: float = 1.0
    seed: int = 0
    normalize: bool = True
    trim: str = "tensor"  # TIES: the k largest of each tensor, or of the whole model
    dtype: torch.dtype | None = None  # of the output; None: what the first model stores

    @property
    def stored(self):
        """All that is read, the base first."""
        return [*([self.base] if self.base else []), *self.parents]

    def table(self):
        """name -> (shape, dtype) of the output."""
        return {name: (shape, self.dtype if self.dtype and dtype.is_floating_point else dtype)
                for name, (shape, dtype) in self.parents[0].table.items()}

    def layer(self, name):
        """The number of the layer that a tensor belongs to, or None."""
        found = re.search(r"\blayers\.(\d+)\.", name)
        return int(found[1]) if found else None

    @functools.cached_property
    def layers(self):
        return 1 + max((self.layer(name) or 0 for name in self.parents[0].table), default=0)

    def at(self, layer):
        """Weights of the K models and t at this depth."""
        return ([methods.gradient(w, layer, self.layers) for w in self.weights],
                methods.gradient(self.t, layer, self.layers))


# ---------------------------------------------------------------------------------------------------------------------
# statistics: what a person wants to know before trusting a merge

class Stats:
    """
    Sums over a group of tensors. The deltas are to the base, or without one to the merge itself. A tensor comes as the
    inner products of `rows`: its origin (the base, or without one the first model) and what the models differ from it
    by; with a base also counts. All else follows from these few numbers, so that it costs one small matrix product.
    """

    def __init__(self, K, has_base):
        self.K, self.has_base, self.n, self.size = K, has_base, 0, 0.0
        self.gram, self.weights = torch.zeros(K, K).double(), torch.zeros(K, K).double()
        self.counts = torch.zeros(K + 2).double()  # elements that each model left alone, conflicts, rounded away

    @staticmethod
    def measure(rows, y, out, has_base):
        """
        Of one chunk: (inner products (R, R), counts (K + 2,)), fp64. rows (R, n): the base and the models, or the
        models alone, and what is left there afterwards are differences; y: merged; out: y as it is stored.
        """
        origin, deltas = rows[0], rows[1:]
        K = len(rows) - has_base
        counts = torch.zeros(K + 2).double()
        if has_base and out.dtype != y.dtype:
            counts[-1] = (y - origin).sign_().abs_().sum() - (out.to(y.dtype) - origin).sign_().abs_().sum()
        deltas -= origin
        gram = (rows @ rows.T).double()
        if has_base:
            signs = deltas.sign()
            ones = torch.ones(K, dtype=signs.dtype)
            one_way = (ones @ signs).abs_()
            moved = signs.abs_()
            counts[:K] = origin.numel() - moved.sum(1).double()
            counts[-2] = (ones @ moved).sub_(one_way).clamp_(max=1).sum()  # some +, some -
        return gram, counts

    def add(self, n, gram, counts, coefficients):
        """One tensor of n elements. coefficients (K,): what the models' values were multiplied with in the merge."""
        self.n, self.counts = self.n + n, self.counts + counts
        if self.has_base:
            self.size, self.gram = self.size + gram[0, 0].item(), self.gram + gram[1:, 1:]
            return
        of = torch.eye(self.K).double()  # each model as a combination of the rows: the first one, and the differences
        of[:, 0] = 1.0
        merged = torch.tensor(coefficients).double() @ of
        if abs(merged[0] - 1) < 1e-12:
            merged[0] = 1.0  # weights that sum to one up to rounding: nothing of the first model in model - merge
        self.size += (merged @ gram @ merged).item()
        self.gram += (of - merged) @ gram @ (of - merged).T
        self.weights += of @ gram @ of.T

    def as_dict(self):
        inner = self.gram if self.has_base else self.weights  # of the deltas; without a base of the models themselves
        lengths = inner.diag().clamp(min=0).sqrt()
        cosine = (inner / torch.outer(lengths, lengths)).tolist()  # 0 / 0 for a model that did not move: null
        report = {"parameters": self.n, "norm": math.sqrt(max(0.0, self.size)),
                  "delta_norm": self.gram.diag().clamp(min=0).sqrt().tolist(),
                  "cosine": [[c if math.isfinite(c) else None for c in row] for row in cosine]}
        if self.has_base:
            *unchanged, conflicts, rounded = (self.counts / max(1, self.n)).tolist()
            report |= {"unchanged": unchanged, "sign_conflicts": conflicts, "rounded_away": rounded}
        return report


def group_of(name):
    groups = ("embed", "embedding"), ("attn", "attention"), ("mlp", "mlp"), ("norm", "norm"), ("head", "head")
    return next((group for part, group in groups if part in name), "other")


# ---------------------------------------------------------------------------------------------------------------------
# one span: what a thread does

local = threading.local()  # buffers of each thread, used again for every chunk


def buffer(key, *shape, dtype):
    """A tensor of this thread; what it held under this key before is overwritten."""
    found = vars(local).setdefault("buffers", {})
    if (key, shape, dtype) not in found:
        found[key, shape, dtype] = torch.empty(shape, dtype=dtype)
    return found[key, shape, dtype]


def inputs(plan, name, begin, end):
    """
    Yields (place, rows) of a span, chunk by chunk. rows (R, n): what the base, if there is one, and the K models hold
    there, in fp32 where all are stored in 16 bits and in fp64 otherwise.
    """
    kinds = [stored.table[name][1] for stored in plan.stored]
    work = torch.float32 if all(kind.itemsize == 2 for kind in kinds) else torch.float64
    rows = buffer("rows", len(kinds), CHUNK, dtype=work)
    for at in range(begin, end, CHUNK):
        n = min(CHUNK, end - at)
        for row, stored, kind in zip(rows, plan.stored, kinds):
            raw = buffer("raw", CHUNK, dtype=kind)[:n]
            stored.pread(name, raw, at)
            row[:n].copy_(raw)
        yield at, rows[:, :n]


def scan_dots(plan, name, begin, end, _):
    """slerp: the three inner products of the span."""
    return sum((methods.dots(*rows[-2:]) for _, rows in inputs(plan, name, begin, end)), torch.zeros(3).double())


def scan_coarse(plan, name, begin, end, _):
    """ties: a histogram of each model's delta, (K, 65536)."""
    return histograms(plan, name, begin, end, methods.COARSE, lambda i, delta, out: methods.coarse_bins(delta, out))


def scan_fine(plan, name, begin, end, high):
    """ties: of each model's delta inside its bin, (K, 32768)."""
    return histograms(plan, name, begin, end, methods.FINE, lambda i, delta, out: methods.fine_bins(delta, high[i]))


def histograms(plan, name, begin, end, size, bins):
    """Histograms of each model's bins(i, delta, out) over a span: (K, size) int64."""
    K = len(plan.parents)
    many, held = buffer("bins", K, 8 * CHUNK, dtype=torch.int32), [0] * K
    counts = torch.zeros(K, size, dtype=torch.int64)
    for at, rows in inputs(plan, name, begin, end):
        for i, delta in enumerate(rows[1:].sub_(rows[0])):
            room = many[i, held[i]:held[i] + len(delta)]
            found = bins(i, delta, room)
            if found is not room:
                room[:len(found)] = found
            held[i] += len(found)
            if held[i] + CHUNK > many.shape[1] or at + len(delta) == end:
                # many chunks at once: a histogram is as large as a chunk
                counts[i] += torch.bincount(many[i, :held[i]], minlength=size)
                held[i] = 0
    return counts


def merge_span(plan, name, begin, end, known, sink, dtype, with_stats):
    """
    Merges elements begin .. end of one tensor and hands them to the sink. known: the tensor's dots (slerp) or
    thresholds (ties). Returns what Stats.measure found, added up.
    """
    (weights, t), has_base, found = plan.at(plan.layer(name)), plan.base is not None, None
    # NaN and infinity reach the result from wherever they are, but from a model of weight 0, or a base only compared with
    past = 0 in (*weights, t, 1 - t) or has_base and plan.method in ("linear", "slerp")
    for at, rows in inputs(plan, name, begin, end):
        x, base = rows[has_base:], rows[0]
        if plan.method == "linear":
            y = methods.linear(x, weights, plan.normalize)
        elif plan.method == "slerp":
            y = methods.slerp(*x, t, known)
        elif plan.method == "ties":
            y = methods.ties(base, x, weights, plan.density, plan.lam, plan.normalize, known)
        else:
            masks = [methods.mask(plan.seed, key, name, at, at + len(base), plan.density) for key in plan.keys]
            y = methods.dare_ties(base, x, weights, plan.density, masks, plan.lam, plan.normalize)
        if plan.method == "slerp" or plan.method == "linear" and plan.normalize:  # equal parents come back bit for bit
            y = x[0].clone() if all(torch.equal(v.view(torch.uint8), x[0].view(torch.uint8)) for v in x[1:]) else y
        if plan.method == "linear" and plan.lam != 1 and has_base:
            y = methods.towards(base, y, plan.lam)
        out = y.to(dtype)
        if not finite(out) or past and not finite(rows):
            refuse(plan, name, rows, dtype)
        sink(name, at, out)
        if with_stats:
            parts = Stats.measure(rows, y, out, has_base)
            found = parts if found is None else tuple(a.add_(b) for a, b in zip(found, parts))
    return found


def refuse(plan, name, rows, dtype):
    """Says whose fault it is that a merged chunk holds NaN or infinity."""
    for row, stored in zip(rows, plan.stored):
        if not finite(row):
            stored.not_finite(name)
    die(f"tensor {name}: merged values overflow {dtype}; choose smaller --weights or --lam, or --dtype float32")


def copy_span(plan, name, begin, end, sink):
    """Integers and booleans have no average: they must be equal, and are copied."""
    for at in range(begin, end, CHUNK):
        first = torch.empty(min(CHUNK, end - at), dtype=plan.parents[0].table[name][1])
        plan.parents[0].pread(name, first, at)
        for stored in plan.stored:
            other = torch.empty(len(first), dtype=stored.table[name][1])
            stored.pread(name, other, at)
            if not torch.equal(first, other):
                die(f"{stored.folder}: tensor {name} holds integers unlike {plan.parents[0].folder}'s: make them "
                    "equal, they have no average")
        sink(name, at, first)


# ---------------------------------------------------------------------------------------------------------------------
# the whole model

def spans(plan, names):
    """(name, begin, end) of every span, in order."""
    for name in names:
        n = math.prod(plan.parents[0].table[name][0])
        yield from ((name, begin, min(n, begin + SPAN)) for begin in range(0, n, SPAN))


def groups(plan, names):
    """Runs of tensors that together hold at least GROUP elements."""
    run, size = [], 0
    for name in names:
        run, size = [*run, name], size + math.prod(plan.parents[0].table[name][0])
        if size >= GROUP:
            yield run
            run, size = [], 0
    if run:
        yield run


def scan(pool, plan, names, function, unit, known=None):
    """
    One pass: `function` over all spans, in threads. Yields (unit, total) where a run of tensors with the same
    unit(name) ends, so that a histogram needs no memory once it is complete. known: unit -> what the function must
    know.
    """
    jobs = list(spans(plan, names))
    work = lambda job: function(plan, *job, known[unit(job[0])] if known else None)
    here, total = None, None
    for (name, *_), part in zip(jobs, pool.map(work, jobs)):
        if unit(name) != here and total is not None:
            yield here, total
            total = None
        here, total = unit(name), part if total is None else total.add_(part)
    if total is not None:
        yield here, total


def thresholds(pool, plan, names, unit):
    """
    TIES step 1 in two passes: name -> the K magnitudes from which on a delta is kept; one for each model and
    unit(name), which is a tensor or the whole model.
    """
    size, bins, least = Counter(), {}, {}
    for name in names:
        size[unit(name)] += math.prod(plan.parents[0].table[name][0])
    for u, counts in scan(pool, plan, names, scan_coarse, unit):
        bins[u] = [methods.find_bin(row, methods.kept(size[u], plan.density)) for row in counts]
    for u, counts in scan(pool, plan, names, scan_fine, unit, {u: [high for high, _ in b] for u, b in bins.items()}):
        least[u] = [methods.magnitude(high, row, k) for (high, k), row in zip(bins[u], counts)]
    return {name: least.get(unit(name)) for name in names}


def merge(plan, sink, threads=0, with_stats=True, bar=None):
    """
    Calls sink(name, begin, chunk) for every chunk of every tensor of plan.table(), in threads: tensors in order, a
    tensor's chunks in any. chunk: 1-D, of the output's dtype. Returns {group of tensors: Stats}; bar.update(bytes).
    Raises SystemExit, with one line, on NaN, infinity, overflow of the output's dtype, and integers that differ.
    """
    table, before, stats, K = plan.table(), torch.get_num_threads(), {}, len(plan.parents)
    floats = [name for name in table if table[name][1].is_floating_point]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    pool = ThreadPoolExecutor(threads or min(8, cores), initializer=torch.set_num_threads, initargs=(1,))
    # glibc's malloc keeps freed blocks up to the size of the largest one it has seen freed (32 MB at most): without this
    # the memory of every temporary would go back to the system, and come again page by page
    torch.empty(31 << 20, dtype=torch.uint8)
    try:
        if plan.method == "ties" and plan.trim == "model":
            whole = thresholds(pool, plan, floats, lambda name: "model")
        for names in groups(plan, table):
            part, known = [name for name in names if name in floats], {}
            if plan.method == "slerp":
                known = dict(scan(pool, plan, part, scan_dots, lambda name: name))
            elif plan.method == "ties":
                known = whole if plan.trim == "model" else thresholds(pool, plan, part, lambda name: name)

            def work(job):
                if not table[job[0]][1].is_floating_point:
                    return copy_span(plan, *job, sink)
                return merge_span(plan, *job, known.get(job[0]), sink, table[job[0]][1], with_stats)

            jobs = list(spans(plan, names))
            for (name, begin, end), found in zip(jobs, pool.map(work, jobs)):
                if bar is not None:
                    bar.update((end - begin) * table[name][1].itemsize)
                for group in (group_of(name), "all") if found is not None else ():
                    stats.setdefault(group, Stats(K, plan.base is not None)).add(
                        end - begin, *found, coefficients(plan, name, known.get(name)))
    finally:  # also where one failed: what has not begun is not begun
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)
    return stats


def coefficients(plan, name, known):
    """What linear and slerp multiply the K models with in this tensor; of no use to the others."""
    weights, t = plan.at(plan.layer(name))
    if plan.method == "slerp":
        return methods.slerp_weights(known, t)
    return [w / sum(weights) for w in weights] if plan.normalize else weights
