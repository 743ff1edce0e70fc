"""
Every kernel at the shapes of aya-expanse-8b (8,192 tokens, bf16) beside its peers in one run: time, GB/s or TFLOP/s, the
share of what this GPU copies or multiplies at best (measured first), peak memory, and the error against the definition.

    python bench/kernels.py                                  # on a GPU: writes bench/results/kernels-<GPU>.json and .md
    python bench/kernels.py --only attention token_logps
    python bench/kernels.py --tokens 128 --vocab 1000 --repeats 3 --out ""      # on a CPU: the CPU paths, and that it runs

Peers: `eager` is the definition in plain PyTorch, `compiled` the same under torch.compile, `sdpa-*` PyTorch's attention by
each of its backends, `flex` torch.compile'd flex_attention, `linear_cross_entropy` PyTorch's own where it has it, `liger`
where it is installed. Times are medians; on a GPU by CUDA events, behind a pause in which Python launches
the kernels (else a call of 50 us would show Python's time) and an overwriting of the L2 cache. FLOPs of
attention are counted as 2 matmuls forward and 5 backward of what is visible, whatever a kernel recomputes.
"""

import importlib
import json
import statistics
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import kernels  # noqa: E402
from common import atomic_file, git_commit, hardware, parse_config, print0  # noqa: E402

HEAD_START = 4_000_000  # clock cycles, 2 ms, that the GPU waits before a call: Python launches meanwhile, as in a model
C, FFN, H, HKV, D = 4096, 14336, 32, 8, 128  # of aya-expanse-8b


@dataclass
class Config:
    tokens: int = 8192  # packed tokens in the batch
    vocab: int = 256_000  # words of the head
    document: int = 1024  # length of the packed documents
    repeats: int = 20  # calls that are timed, after three that are not
    only: list[str] = field(default_factory=list)  # names of operations (default: all)
    dtype: str = "bfloat16"  # of weights and activations
    seed: int = 0  # of the inputs
    out: str = "bench/results/kernels"  # -<GPU>.json and .md; "": nothing is written


CFG = Config()


def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def randn(*shape, dtype=None):
    return torch.randn(*shape, device=device(), dtype=torch.float32).to(dtype or getattr(torch, CFG.dtype))


def seconds(call):
    """Median time of one call, and the peak memory it needs beside what there was before, in bytes (GPU only)."""
    for _ in range(3):
        call()
    if device() == "cpu":
        times = []
        for _ in range(CFG.repeats):
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
        return statistics.median(times), 0
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")  # larger than any L2
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    peak, events = torch.cuda.max_memory_allocated() - before, []
    for _ in range(CFG.repeats):
        torch.cuda._sleep(HEAD_START)
        flush.zero_()
        events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
        events[-1][0].record()
        call()
        events[-1][1].record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in events) / 1e3, peak


def ceilings():
    """What this machine copies and multiplies at best: bytes/s (read and written), FLOP/s in the dtype of the run."""
    n = 2**30 if device() == "cuda" else 2**26
    source, to = torch.empty(n, dtype=torch.int8, device=device()), torch.empty(n, dtype=torch.int8, device=device())
    size = 8192 if device() == "cuda" else 2048
    a, b = randn(size, size), randn(size, size)
    return 2 * n / seconds(lambda: to.copy_(source))[0], 2 * size**3 / seconds(lambda: a @ b)[0]


def compiled(function):
    return torch.compile(function, dynamic=False)


def sdpa(backend, q, k, v, mask=None):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(getattr(SDPBackend, backend)):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True).transpose(1, 2)


def flex(doc_start, T):
    """flex_attention under torch.compile, with the block mask of causal attention inside documents."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    first = doc_start[0] if doc_start is not None else None

    def sees(b, h, i, j):
        return (j <= i) if first is None else (j <= i) & (j >= first[i])

    block_mask, call = create_block_mask(sees, None, None, T, T, device=device()), torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: call(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=block_mask, enable_gqa=True).transpose(1, 2)


def operations():
    """name -> (inputs, {peer: function of them}, bytes forward, bytes backward, FLOPs forward, FLOPs backward)."""
    N, V, size = CFG.tokens, CFG.vocab, getattr(torch, CFG.dtype).itemsize
    reference = {op: importlib.import_module(f"kernels.{op}") for op in (
        "swiglu", "rope", "layernorm", "attention", "token_logps", "sample")}
    found = {}

    gated = reference["swiglu"].swiglu_reference
    found["swiglu"] = (lambda: [randn(N, FFN), randn(N, FFN)], {
        "nanoaya": lambda: kernels.swiglu, "eager": lambda: lambda g, u: F.silu(g) * u, "compiled": lambda: compiled(gated),
        "liger": lambda: importlib.import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction.apply},
        3 * N * FFN * size, 5 * N * FFN * size, 0, 0)

    angle = torch.arange(N, device=device())[:, None] / 10000 ** (torch.arange(0, D, 2, device=device()) / D)
    cos, sin, heads = angle.cos(), angle.sin(), (H + HKV) * D
    one = reference["rope"].rope_reference
    both = lambda q, k: (one(q, cos, sin), one(k, cos, sin))  # noqa: E731
    found["rope"] = (lambda: [randn(1, N, H, D), randn(1, N, HKV, D)], {
        "nanoaya": lambda: lambda q, k: kernels.rope(q, k, cos, sin), "eager": lambda: both, "compiled": lambda: compiled(both)},
        2 * N * heads * size + 4 * N * D, 2 * N * heads * size + 4 * N * D, 0, 0)

    for name, ours, plain, torchs in (
            ("layernorm", kernels.layernorm, reference["layernorm"].layernorm_reference, lambda x, w, eps: F.layer_norm(x, (C,), w, None, eps)),
            ("rmsnorm", kernels.rmsnorm, reference["layernorm"].rmsnorm_reference, lambda x, w, eps: F.rms_norm(x, (C,), w, eps))):
        found[name] = (lambda: [randn(N, C), randn(C)], {
            key: lambda f=f, wrap=wrap: wrap(partial(f, eps=1e-5)) for key, f, wrap in (
                ("nanoaya", ours, lambda f: f), ("eager", torchs, lambda f: f), ("compiled", plain, compiled))},
            2 * N * C * size, 3 * N * C * size, 0, 0)

    packed = (torch.arange(N, device=device()) // CFG.document * CFG.document).int()[None]
    for name, doc_start, length in (("attention", None, N), ("attention packed", packed, min(N, CFG.document))):
        pairs = N / length * length * (length + 1) / 2  # visible (query, key) pairs
        mask = None if doc_start is None else reference["attention"].visible(N, N, doc_start, None, device())
        peers = {"nanoaya": lambda d=doc_start: partial(kernels.attention, doc_start=d),
                 "eager": lambda d=doc_start: partial(reference["attention"].attention_reference, doc_start=d),
                 "flex": lambda d=doc_start: flex(d, N)}
        backends = ["CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"] if mask is None else [
            "EFFICIENT_ATTENTION"]  # the only one of them that takes a mask and does not hold all scores
        peers |= {f"sdpa-{b.split('_')[0].lower()}": lambda b=b, m=mask: lambda q, k, v: sdpa(b, q, k, v, m) for b in backends}
        found[name] = (lambda: [randn(1, N, heads, D) for heads in (H, HKV, HKV)], peers, 0, 0,
                       4 * pairs * H * D, 10 * pairs * H * D)

    targets = torch.randint(0, V, (N,), device=device())

    def whole(hidden, weight):
        return reference["token_logps"].token_logps_reference(hidden, weight, targets, 0.125)

    def cross_entropy(hidden, weight):
        return -F.linear_cross_entropy(hidden * 0.125, weight, targets, reduction="none")

    found["token_logps"] = (lambda: [randn(N, C), randn(V, C) * 0.02], {
        "nanoaya": lambda: lambda h, w: kernels.token_logps(h, w, targets, 0.125), "eager": lambda: whole,
        "compiled": lambda: compiled(whole), "linear_cross_entropy": lambda: F.linear_cross_entropy and cross_entropy},
        0, 0, 2 * N * V * C, 6 * N * V * C)

    rows, keys = (64, 2048) if device() == "cuda" else (4, 256)
    filled = torch.full((rows,), keys, dtype=torch.int32, device=device())
    found["decode"] = (lambda: [randn(rows, 1, H, D), *(randn(rows, HKV, keys, D).transpose(1, 2) for _ in range(2))], {
        "nanoaya": lambda: partial(kernels.decode, length=filled), "eager": lambda: reference["attention"].attention_reference,
        "sdpa": lambda: lambda q, k, v: F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), enable_gqa=True).transpose(1, 2)},
        2 * rows * keys * HKV * D * size, None, 0, 0)

    u = torch.rand(rows, dtype=torch.float64, device=device())
    for name, top_p in (("sample", 1.0), ("sample top-p", 0.9)):  # eager sorts, as samplers commonly do
        found[name] = (lambda: [randn(rows, V, dtype=torch.float32)], {
            who: lambda f=f, top_p=top_p: lambda logits: f(logits, u, V, 1.0, top_p, 0.0)[1]
            for who, f in (("nanoaya", kernels.sample), ("eager", reference["sample"].sample_reference))},
            4 * rows * V, None, 0, 0)
    return found


def sample(x, most=2**22):
    """At most this many of a tensor's elements, evenly spread, in fp64 on the CPU: a gradient of the head has a billion."""
    return x.flatten()[:: max(1, x.numel() // most)].double().cpu()


def measure(make_inputs, make_call, backward):
    """Forward, or forward and backward, of one peer -> seconds, bytes of memory, and samples of what it computes."""
    torch.manual_seed(CFG.seed)
    leaves = [x.requires_grad_(backward) for x in make_inputs()]
    call = make_call()
    outputs = call(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    results = [sample(x.detach()) for x in outputs]
    if not backward:
        with torch.no_grad():
            return *seconds(lambda: call(*leaves)), results
    upstream = [randn(*x.shape, dtype=x.dtype) for x in outputs]

    def both():
        out = call(*leaves)
        return torch.autograd.grad(out if isinstance(out, tuple) else (out,), leaves, upstream)

    results += [sample(x) for x in both()]
    return *seconds(both), results


def main(cfg):
    global CFG
    CFG = cfg
    torch.manual_seed(cfg.seed)
    copy, flops = ceilings()
    about = {"hardware": hardware(), "torch": torch.__version__, "commit": git_commit(), "dtype": cfg.dtype, "tokens": cfg.tokens,
             "vocab": cfg.vocab, "document": cfg.document, "repeats": cfg.repeats, "seed": cfg.seed,
             "triton": getattr(sys.modules.get("triton"), "__version__", None), "copy_bytes_per_s": copy, "matmul_flops": flops}
    lines = [f"{about['hardware']}, torch {about['torch']}, triton {about['triton']}, commit {about['commit']}; {cfg.tokens} tokens "
             f"in {cfg.dtype}, medians of {cfg.repeats}. Ceilings measured in the same run: {copy / 1e12:.2f} TB/s copied, "
             f"{flops / 1e12:.1f} TFLOP/s multiplied.", "",
             "| operation | pass | who | ms | rate | of the ceiling | memory, MB | largest error |", "|---|---|---|---|---|---|---|---|"]
    print0("\n".join(lines))
    rows = []
    for name, (inputs, peers, *costs) in operations().items():
        if cfg.only and name.split()[0] not in cfg.only:
            continue
        for direction in ("forward", "both") if costs[1] is not None else ("forward",):
            moved, work = (sum(costs[i:i + 1 + (direction == "both")]) for i in (0, 2))
            exact = None
            for who, make_call in sorted(peers.items(), key=lambda peer: peer[0] != "eager"):  # eager's results are the measure
                row = {"operation": name, "pass": direction, "who": who}
                try:
                    row["s"], row["memory"], results = measure(inputs, make_call, direction == "both")
                    exact = results if who == "eager" else exact
                    row["error"] = max(((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()
                                       for a, b in zip(results, exact)) if exact else None
                    row["rate"] = (moved or work) / row["s"]
                    row["share"] = row["rate"] / (copy if moved else flops)
                    unit = "TB/s" if moved else "TFLOP/s"
                    lines.append(f"| {name} | {direction} | {who} | {row['s'] * 1e3:.3f} | {row['rate'] / 1e12:.2f} {unit} | "
                                 f"{100 * row['share']:.0f} % | {row['memory'] / 1e6:.0f} | "
                                 + ("-" if exact is None else f"{row['error']:.1e}") + " |")
                except Exception as e:  # a peer that is not installed, not for this shape, or out of memory: said in the table
                    row["failed"] = f"{type(e).__name__}: {e}".splitlines()[0][:160]
                    lines.append(f"| {name} | {direction} | {who} | - | {row['failed'][:60].replace('|', '/')} | - | - | - |")
                print0(lines[-1])
                rows.append(row)
                if device() == "cuda":
                    torch.cuda.empty_cache()
    if any(row["who"] == "nanoaya" and "failed" in row for row in rows):
        raise SystemExit("error: a kernel of ours failed; see the table")
    if cfg.out:
        gpu = (torch.cuda.get_device_name() if device() == "cuda" else "cpu").replace(" ", "-")
        with atomic_file(f"{cfg.out}-{gpu}.json") as f:
            json.dump(about | {"rows": rows}, f, indent=1)
        with atomic_file(f"{cfg.out}-{gpu}.md") as f:
            f.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(parse_config(Config))
