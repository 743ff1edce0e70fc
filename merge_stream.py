"""
A merge of any size in the memory of a few chunks: what merge.py and its weight search run.

A tensor is cut into spans, spans into chunks. Threads take spans; for each chunk they read every model's bytes with
pread into buffers of their own, compute, and hand the result to `sink(name, begin, chunk)`, so that reads, arithmetic
and writes of different chunks overlap. Nothing is ever as large as a tensor (the embedding of aya-expanse-32b: 4.2 GB).
What SLERP and TIES must know of a whole tensor takes a pass or two over it first; tensors are taken in groups of
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

import numpy as np
import torch

import merge_methods as methods
from checkpoint import Checkpoint, finite
from common import die

CHUNK = 1 << 19  # elements computed at once: smaller, and Python costs more than arithmetic; larger, and caches miss
SPAN = 1 << 20  # elements of one tensor that a thread takes at once
SAMPLE, RUN = 1 << 19, 1 << 16  # elements of a tensor that guess where a threshold lies; as many are read at once
LOOK = 4  # of a tensor's spans, the first and every 4th after it are looked at for the report: exact up to SPAN elements
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
    by; with a base also counts. All else follows from these few numbers, so that it costs one small matrix product. Of
    large tensors one span in LOOK is measured and stands for the others.
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
        origin, deltas, K = rows[0], rows[1:], len(rows) - has_base
        counts = torch.zeros(K + 2).double()
        if has_base and out.dtype != y.dtype:
            differs = lambda z: np.count_nonzero(z.numpy() != origin.numpy())  # numpy: counting is several times faster
            counts[-1] = differs(y) - differs(out.to(y.dtype))
        deltas -= origin
        if has_base:
            d = deltas.numpy()
            counts[:K] = torch.from_numpy(d.shape[1] - np.count_nonzero(d != 0, axis=1))
            most, least = functools.reduce(np.maximum, d), functools.reduce(np.minimum, d)
            counts[-2] = np.count_nonzero((most > 0) & (least < 0))
        return (rows @ rows.T).double(), counts

    def add(self, n, gram, counts, coefficients):
        """What stands for n elements of one tensor. coefficients (K,): what the models' values were multiplied with in the merge."""
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
        report = {"parameters": round(self.n), "norm": math.sqrt(max(0.0, self.size)),
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


class Histogram:
    """Counts of many chunks' bins: (size,) int64. A histogram is as large as a chunk, so bins are collected first."""

    def __init__(self, key, size):
        self.bins, self.held = buffer(f"bins {key}", SPAN, dtype=torch.int32), 0
        self.counts = torch.zeros(size, dtype=torch.int64)

    def add(self, bins):
        """At most CHUNK of them."""
        if self.held + len(bins) > len(self.bins):
            self.total()
        self.bins[self.held:self.held + len(bins)] = bins
        self.held += len(bins)

    def total(self):
        self.counts += torch.bincount(self.bins[:self.held], minlength=len(self.counts))
        self.held = 0
        return self.counts


def scan_coarse(plan, name, begin, end, every):
    """ties: a histogram of each model's delta, (K, 65536), of every 1st, 2nd ... run of RUN elements."""
    found = [Histogram(i, methods.COARSE) for i in range(len(plan.parents))]
    for run in range(begin, end, every * RUN):
        for _, rows in inputs(plan, name, run, min(end, run + RUN)):
            for delta, histogram in zip(rows[1:].sub_(rows[0]), found):
                histogram.add(methods.coarse_bins(delta))
    return torch.stack([histogram.total() for histogram in found])


def scan_bracket(plan, name, begin, end, low):
    """ties: of each model's delta how many lie above its bracket, and the histogram inside: (K, 1 + WIDE * FINE)."""
    found, above = [Histogram(i, methods.WIDE * methods.FINE) for i in range(len(low))], [0] * len(low)
    for _, rows in inputs(plan, name, begin, end):
        for i, delta in enumerate(rows[1:].sub_(rows[0])):
            inside, more = methods.bracket_bins(delta, low[i])
            found[i].add(inside)
            above[i] += more
    return torch.cat([torch.tensor(above)[:, None], torch.stack([histogram.total() for histogram in found])], 1)


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

def spans(plan, names, step):
    """(name, begin, end) of every span of `step` elements, in order."""
    for name in names:
        n = math.prod(plan.parents[0].table[name][0])
        yield from ((name, begin, min(n, begin + step)) for begin in range(0, n, step))


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
    jobs = list(spans(plan, names, 4 * SPAN))  # histograms are large: fewer of them to add up
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
    TIES step 1: name -> the K magnitudes from which on a delta is kept; one for each model and unit(name), a tensor or
    the whole model. A histogram of a sample (SAMPLE elements or more) tells about where they lie; a pass over
    all elements counts exactly, and shows if the guess was wrong; then the sample is everything.
    """
    size, least = Counter(), {}
    for name in names:
        size[unit(name)] += math.prod(plan.parents[0].table[name][0])
    every = {u: max(1, min(16, n // SAMPLE)) for u, n in size.items()}
    while names:
        low = {}
        for u, counts in scan(pool, plan, names, scan_coarse, unit, every):
            k = max(1, round(methods.kept(size[u], plan.density) * int(counts[0].sum()) / size[u]))
            low[u] = [methods.bracket(row, k) for row in counts]
        for u, counts in scan(pool, plan, names, scan_bracket, unit, low):
            k = methods.kept(size[u], plan.density)
            least[u] = [methods.magnitude(l, row[1:], int(row[0]), k) for l, row in zip(low[u], counts)]
        names = [name for name in names if None in least.get(unit(name), ())]
        every = dict.fromkeys(every, 1)
    return {name: least[unit(name)] for name in plan.parents[0].table if unit(name) in least}


def merge(plan, sink, threads=0, with_stats=True, bar=None):
    """
    Calls sink(name, begin, chunk) for every chunk of every tensor of plan.table(), in threads: tensors in order, a
    tensor's chunks in any. chunk: 1-D, of the output's dtype. Returns {group of tensors: Stats}; bar.update(bytes).
    Raises SystemExit, with one line, on NaN, infinity, overflow of the output's dtype, and integers that differ.
    """
    table, before, stats, K = plan.table(), torch.get_num_threads(), {}, len(plan.parents)
    floats = {name: None for name in table if table[name][1].is_floating_point}  # a set in order
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    pool = ThreadPoolExecutor(threads or min(8, cores), initializer=torch.set_num_threads, initargs=(1,))
    # glibc's malloc keeps freed blocks up to the size of the largest one it has seen freed (32 MB at most): without this
    # the memory of every temporary would go back to the system, and come again page by page
    torch.empty(31 << 20, dtype=torch.uint8)
    try:
        if plan.method == "ties" and plan.trim == "model":
            whole = thresholds(pool, plan, list(floats), lambda name: "model")
        for names in groups(plan, table):
            part, known = [name for name in names if name in floats], {}
            if plan.method == "slerp":
                known = dict(scan(pool, plan, part, scan_dots, lambda name: name))
            elif plan.method == "ties":
                known = whole if plan.trim == "model" else thresholds(pool, plan, part, lambda name: name)

            def work(job):
                if not table[job[0]][1].is_floating_point:
                    return copy_span(plan, *job, sink)
                look = with_stats and job[1] // SPAN % LOOK == 0
                return merge_span(plan, *job, known.get(job[0]), sink, table[job[0]][1], look)

            jobs = list(spans(plan, names, SPAN))
            for (name, begin, end), found in zip(jobs, pool.map(work, jobs)):
                if bar is not None:
                    bar.update((end - begin) * table[name][1].itemsize)
                if found is not None:
                    size = math.prod(table[name][0])
                    seen = sum(min(SPAN, size - at) for at in range(0, size, SPAN * LOOK))
                    n, gram, counts = ((end - begin) * size / seen, *(part * (size / seen) for part in found))
                    for group in (group_of(name), "all"):
                        stats.setdefault(group, Stats(K, plan.base is not None)).add(
                            n, gram, counts, coefficients(plan, name, known.get(name)))
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
