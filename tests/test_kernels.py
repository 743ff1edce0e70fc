"""
The kernels against their definitions in fp64: values, every gradient, odd sizes, three dtypes; and mutants that fail.

Tolerance: no more than twice the error that plain PyTorch makes in the same dtype, plus one rounding of the largest
value. Without a GPU the kernels run in Triton's interpreter (conftest.py), which cannot show races, real shared memory,
or an int32 offset that overflows: test_compile.py compiles them, and the last test here needs a GPU.
"""

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import kernels

ROOT = Path(__file__).resolve().parent.parent
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
STEP = {torch.float32: 2e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # one rounding; in fp32, of tf32x3
PATHS = ["triton", "cpu"]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's: log of 0, NaN on purpose


def module(op):
    return importlib.import_module(f"kernels.{op}")  # kernels.rope is the function, so the module goes by its full name


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


def run(function, inputs, dtype, device):
    """Outputs and gradients, in fp64, of function on the inputs in dtype; the upstream gradient is random but fixed."""
    leaves = [x.to(device, dtype, copy=True).requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [randn(*out.shape, seed=i).to(device, dtype).to(out.dtype) for i, out in enumerate(outputs)]
    grads = torch.autograd.grad(outputs, leaves, upstream)
    for leaf, x in zip(leaves, inputs):
        assert torch.equal(leaf.detach().cpu(), x.to(dtype)), "an input was written to"
    return [x.detach().double().cpu() for x in (*outputs, *grads)]


def check(function, definition, eager, inputs, dtype, device):
    """function's outputs and gradients against definition in fp64, allowing twice the error of eager in dtype."""
    inputs = [x.to(dtype).double() for x in inputs]  # what dtype cannot hold is not the kernel's error
    exact = run(definition, inputs, torch.float64, "cpu")
    for i, (ours, plain, true) in enumerate(zip(*(run(f, inputs, dtype, device) for f in (function, eager)), exact)):
        assert ours.shape == true.shape
        largest = true.abs().max().clamp(min=1)  # inputs are about 1, so where the truth is 0, rounding is about 1e-7
        error, allowed = (ours - true).abs().max(), 2 * (plain - true).abs().max() + STEP[dtype] * largest
        assert error <= allowed, f"output or gradient {i}: error {error:.3g}, allowed {allowed:.3g}"


# --- A case of each operation: (function, definition, plain PyTorch, inputs). `file` is its module, or a mutant of it.


def swiglu_case(file, path, shape=(3, 5, 129)):
    function = file._SwiGLU.apply if path == "triton" else kernels.swiglu
    inputs = [3 * randn(*shape), randn(*shape, seed=1)]
    return function, module("swiglu").swiglu_reference, lambda g, u: F.silu(g) * u, inputs


def rope_case(file, path, B=2, T=5, H=3, Hkv=1, D=32, per_row=True, interleaved=True):
    angle = randn(*((B, T, D // 2) if per_row else (T, D // 2))) * 3
    cos, sin = angle.cos().float(), angle.sin().float()

    def table(q):
        return cos.to(q.device), sin.to(q.device)

    def both(rotate):
        return lambda q, k: (rotate(q, *table(q), interleaved), rotate(k, *table(q), interleaved))

    def plain(x, cos, sin, interleaved):
        cos, sin = cos.to(x.dtype).unsqueeze(-2), sin.to(x.dtype).unsqueeze(-2)
        if not interleaved:
            a, b = x[..., : D // 2], x[..., D // 2 :]
            return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)

    rope = file._Rope.apply if path == "triton" else kernels.rope
    inputs = [randn(B, T, H, D), randn(B, T, Hkv, D, seed=1)]
    return lambda q, k: rope(q, k, *table(q), interleaved), both(module("rope").rope_reference), both(plain), inputs


def layernorm_case(file, path, rows=13, C=129, heads=(), kind="layer"):
    ours = module("layernorm")
    plus_one = kind == "rms+1"
    calls = {
        "triton": lambda x, w: file._Norm.apply(x, w, 1e-5, kind),
        "cpu": lambda x, w: kernels.layernorm(x, w, 1e-5) if kind == "layer" else kernels.rmsnorm(x, w, 1e-5, plus_one),
    }

    def definition(x, w):
        return ours.layernorm_reference(x, w, 1e-5) if kind == "layer" else ours.rmsnorm_reference(x, w, 1e-5, plus_one)

    def plain(x, w):
        h = F.layer_norm(x, (C,), None, None, 1e-5) if kind == "layer" else F.rms_norm(x, (C,), None, 1e-5)
        return h * (w + plus_one)

    return calls[path], definition, plain, [2 * randn(rows, *heads, C) + 1, randn(*heads, C, seed=1)]


def starts(T, *lengths):
    """doc_start of one row packed with documents of these lengths, the last one cut or stretched to end at T."""
    firsts = torch.tensor([sum(lengths[:i]) for i in range(len(lengths))], dtype=torch.int32)
    return firsts[torch.searchsorted(firsts, torch.arange(T), right=True) - 1]


def attention_case(
    file, path, B=1, Tq=60, Tk=60, H=2, Hkv=1, D=16, docs=(), pad=0, window=None, softcap=None, scale=None
):
    doc_start = torch.stack([starts(Tk, *docs[i]) for i in range(B)]).clamp(min=pad) if docs else None

    def positional(q):
        return (None if docs == () else doc_start.to(q.device)), window, softcap, scale or D**-0.5

    def plain(q, k, v):  # in q's dtype throughout
        k, v = (x.repeat_interleave(H // Hkv, 2).transpose(1, 2) for x in (k, v))
        scores = q.transpose(1, 2) @ k.transpose(-1, -2) * (scale or D**-0.5)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        mask = module("attention").visible(Tq, Tk, positional(q)[0], window, q.device)
        return (scores.masked_fill(~mask, -1e4).softmax(-1) * mask @ v).transpose(1, 2)

    attend = file._Attention.apply if path == "triton" else kernels.attention
    inputs = [2 * randn(B, Tq, H, D), 2 * randn(B, Tk, Hkv, D, seed=1), randn(B, Tk, Hkv, D, seed=2)]
    calls = [lambda *qkv, f=f: f(*qkv, *positional(qkv[0])) for f in (attend, module("attention").attention_reference)]
    return *calls, plain, inputs


def token_logps_case(file, path, N=7, C=16, V=300, logit_scale=0.25, size=8.0, softcap=None):
    targets = torch.randint(V, (N,), generator=torch.Generator().manual_seed(N))
    targets[0], targets[-1] = V - 1, 0
    function = file._TokenLogps.apply if path == "triton" else kernels.token_logps

    def plain(h, w):
        logits = (h @ w.T).float() * logit_scale
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return logits.log_softmax(-1).gather(1, targets.to(h.device)[:, None]).squeeze(1)

    return (
        lambda h, w: function(h, w, targets.to(h.device), logit_scale, softcap),
        lambda h, w: module("token_logps").token_logps_reference(h, w, targets, logit_scale, softcap),
        plain,
        [size * randn(N, C), randn(V, C, seed=1)],
    )


@pytest.fixture
def small_tiles(monkeypatch):
    """Sizes at which a short input crosses every kind of boundary: tiles, slices of words, chunks, programs."""

    def shrink(op, file):
        if op == "attention":
            tiles = {"forward": (32, 16, 4, 1), "dq": (32, 16, 4, 1), "dkdv": (16, 32, 4, 1)}
            for table in ("TILES", "TILES_SM80"):
                monkeypatch.setattr(file, table, {name: dict.fromkeys((128, 256), t) for name, t in tiles.items()})
        if op == "decode":
            monkeypatch.setattr(file, "BLOCK_BYTES", 16)  # tiles of 16 keys
            monkeypatch.setattr(file, "PROGRAMS", 3)  # two or three tiles a run
        if op == "layernorm":
            monkeypatch.setattr(file, "PROGRAMS", 2)
            monkeypatch.setattr(file, "ELEMENTS", 512)
        if op == "token_logps":
            monkeypatch.setattr(file, "SLICE", 7 * 128)
            monkeypatch.setattr(file, "BLOCK", 64)
            monkeypatch.setattr(file._TokenLogpsCPU, "CHUNK", 5)
        if op == "sample":
            monkeypatch.setattr(file, "BLOCK", 64)
        return file

    return shrink


def test_interpreter_is_mended(triton_device):
    import triton
    import triton.language as tl

    @triton.jit
    def product(a_ptr, b_ptr, out_ptr, n, N: tl.constexpr):
        offsets = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
        acc = tl.zeros((N, N), dtype=tl.float32)
        for _ in range(0, n):
            acc += tl.dot(tl.load(a_ptr + offsets), tl.load(b_ptr + offsets))
        tl.store(out_ptr + offsets, acc.to(tl.bfloat16))

    a, b = (randn(16, 16, seed=s).bfloat16().to(triton_device) for s in (0, 1))
    out = torch.empty_like(a)
    product[(1,)](a, b, out, 2, N=16)
    assert torch.equal(out, (2 * (a.double() @ b.double())).bfloat16())  # rounded to nearest even, once


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (3, 127), (2, 5, 129), (2048,)])
def test_swiglu(triton_device, path, dtype, shape):
    check(*swiglu_case(module("swiglu"), path, shape), dtype, triton_device if path == "triton" else "cpu")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 2), (2, 5, 3, 1, 32), (1, 7, 4, 2, 128)])
@pytest.mark.parametrize("per_row, interleaved", [(True, True), (False, True), (True, False)])
def test_rope(triton_device, path, dtype, sizes, per_row, interleaved):
    case = rope_case(module("rope"), path, *sizes, per_row=per_row, interleaved=interleaved)
    check(*case, dtype, triton_device if path == "triton" else "cpu")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, C, heads", [(1, 127, ()), (13, 129, ()), (3, 1024, ()), (3, 2048, ()), (7, 64, (6,))])
@pytest.mark.parametrize("kind", ["layer", "rms", "rms+1"])
def test_norms(triton_device, small_tiles, path, dtype, kind, rows, C, heads):
    case = layernorm_case(small_tiles("layernorm", module("layernorm")), path, rows, C, heads, kind)
    check(*case, dtype, triton_device if path == "triton" else "cpu")


@pytest.mark.parametrize("path", PATHS)
def test_rmsnorm_rounds_where_each_family_does(triton_device, path):
    """Llama: to 16 bits, then the product; Gemma: the product, then to 16 bits. Each by hand at one element."""
    norm = module("layernorm")._Norm.apply if path == "triton" else lambda x, w, eps, kind: kernels.rmsnorm(
        x, w, eps, kind == "rms+1")  # fmt: skip
    device = triton_device if path == "triton" else "cpu"
    x, w = torch.tensor([3.0, 1.0, 1.0]).bfloat16(), torch.tensor([1.0078125, 1.0, 1.0]).bfloat16()  # 1 + one bf16 step
    x_hat = 3 / (11 / 3) ** 0.5  # 1.5667
    once, twice = torch.tensor(x_hat * 1.0078125), torch.tensor(x_hat).bfloat16().float() * 1.0078125
    assert once.bfloat16() != twice.bfloat16()
    x, w = x.to(device), w.to(device)
    assert norm(x, w, 0.0, "rms")[0].cpu() == twice.bfloat16()
    assert norm(x, w - 1, 0.0, "rms+1")[0].cpu() == once.bfloat16()


ATTENTION = {
    "causal": {},
    "one token": dict(Tq=1, Tk=1),
    "groups": dict(Tq=35, Tk=35, H=6, Hkv=2),
    "decode": dict(B=2, Tq=1, Tk=70, H=4, Hkv=2),
    "last few": dict(B=2, Tq=37, docs=((20, 30, 10), (60,))),
    "documents": dict(B=2, docs=((1, 1, 1, 29, 12, 16), (60,)), D=32),
    "padded left": dict(docs=((60,),), pad=20),  # no query sees the first 20 keys, and the first 20 see nothing
    "window": dict(window=20, Tq=129, Tk=129, H=1),
    "all": dict(B=2, docs=((50, 10), (3, 57)), window=33, softcap=2.0, scale=0.4),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ATTENTION)
def test_attention(triton_device, small_tiles, path, name):
    case = attention_case(small_tiles("attention", module("attention")), path, **ATTENTION[name])
    check(*case, torch.float32, triton_device if path == "triton" else "cpu")


@pytest.mark.parametrize("name", ["groups", "last few", "documents", "all"])
def test_attention_without_descriptors(triton_device, small_tiles, monkeypatch, name):
    """As an A100 runs it: the same kernels read and write by pointers."""
    file = small_tiles("attention", module("attention"))
    monkeypatch.setattr(file, "has_tma", lambda: False)
    check(*attention_case(file, "triton", **ATTENTION[name]), torch.float32, triton_device)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["causal", "all"])
def test_attention_in_16_bits(triton_device, small_tiles, path, dtype, name):
    case = attention_case(small_tiles("attention", module("attention")), path, **ATTENTION[name])
    check(*case, dtype, triton_device if path == "triton" else "cpu")


def test_attention_with_its_real_tiles(triton_device):
    case = attention_case(module("attention"), "triton", Tq=300, Tk=300, H=1, docs=((129, 1, 127, 43),), D=128)
    check(*case, torch.bfloat16, triton_device)


def test_attention_of_long_rows_on_cpu():
    check(*attention_case(module("attention"), "cpu", Tq=257, Tk=257), torch.float32, "cpu")  # PyTorch's own SDPA


DECODE = {
    "one key": dict(Tk=1, H=1),
    "a short run": dict(B=2, Tk=17, H=2, Hkv=2),
    "groups of three": dict(Tk=70, H=6, Hkv=2, D=32),
    "padded left": dict(B=2, Tk=65, docs=((65,), (65,)), pad=40),
    "document, window": dict(B=2, Tk=60, docs=((50, 10), (3, 57)), window=33, softcap=2.0, scale=0.4),
}


def decode_case(file, path, **sizes):
    """As attention_case, with one query; what is compared is the output (there is no gradient)."""
    _, definition, plain, inputs = attention_case(module("attention"), path, Tq=1, **sizes)
    options = {key: sizes.get(key) for key in ("window", "softcap", "scale")}
    B, Tk = len(inputs[0]), inputs[1].shape[1]
    doc_start = torch.stack([starts(Tk, *sizes["docs"][i]) for i in range(B)]) if "docs" in sizes else None
    if doc_start is not None:
        doc_start = doc_start.clamp(min=sizes.get("pad", 0))
    first = module("attention")._first_key(doc_start, options["window"], 1, Tk, B, "cpu")

    def function(q, k, v):
        seen = None if first is None else first[:, 0].to(q.device)
        if path == "cpu":
            return file.decode(q, k, v, seen, options["softcap"], options["scale"])
        return file._decode(q, k, v, seen, None, options["scale"] or q.shape[3] ** -0.5, options["softcap"] or 0.0)

    return function, definition, plain, inputs


def check_decode(case, dtype, device):
    function, definition, plain, inputs = case
    inputs = [x.to(dtype).double() for x in inputs]
    true = definition(*inputs)
    ours, eager = (f(*(x.to(device, dtype) for x in inputs)).double().cpu() for f in (function, plain))
    largest = true.abs().max().clamp(min=1)
    assert (ours - true).abs().max() <= 2 * (eager - true).abs().max() + STEP[dtype] * largest


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", DECODE)
def test_decode(triton_device, small_tiles, path, dtype, name):
    case = decode_case(small_tiles("decode", module("decode")), path, **DECODE[name])
    check_decode(case, dtype, triton_device if path == "triton" else "cpu")


def lengths_case(file, path, Tk=70, H=6, Hkv=2, D=16, softcap=None):
    """Rows of a cache (B, Hkv, Tk, D) that are filled to different lengths: NaN behind them on a GPU, 0 on a CPU."""
    length = torch.tensor([Tk, 1, 33, 0, 17])
    q, k, v = (2 * randn(5, *shape, seed=s) for s, shape in enumerate(((1, H, D), (Hkv, Tk, D), (Hkv, Tk, D))))
    for b, n in enumerate(length):
        k[b, :, n:], v[b, :, n:] = (0.0, 0.0) if path == "cpu" else (float("nan"), float("nan"))

    def function(q, k, v):
        k, v, n = k.transpose(1, 2), v.transpose(1, 2), length.int().to(q.device)
        if path == "cpu":
            return file.decode(q, k, v, softcap=softcap, length=n)
        return file._decode(q, k, v, None, n, D**-0.5, softcap or 0.0)

    def by_row(attend):
        return lambda q, k, v: torch.cat([
            attend(q[b : b + 1], *(x[b : b + 1, :, :n].transpose(1, 2) for x in (k, v))) if n else torch.zeros_like(q[:1])
            for b, n in enumerate(length.tolist())])  # fmt: skip

    reference = lambda q, k, v: module("attention").attention_reference(q, k, v, softcap=softcap)  # noqa: E731
    return function, by_row(reference), by_row(reference), [q, k, v]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [{}, dict(Tk=64, H=4, Hkv=4, D=32), dict(softcap=2.0)])
def test_decode_of_rows_filled_to_different_lengths(triton_device, small_tiles, path, dtype, sizes):
    case = lengths_case(small_tiles("decode", module("decode")), path, **sizes)
    check_decode(case, dtype, triton_device if path == "triton" else "cpu")


def test_decode_reads_a_slice_of_a_cache_and_nothing_it_does_not_see(triton_device, small_tiles):
    file, nan = small_tiles("decode", module("decode")), float("nan")
    decode = lambda q, k, v, first: file._decode(q, k, v, first, None, 0.25, 0.0)  # noqa: E731
    cache = [torch.full((2, 50, 2, 16), nan, device=triton_device) for _ in range(2)]
    q, k, v = (randn(2, t, h, 16, seed=s).float().to(triton_device) for t, h, s in ((1, 4, 0), (23, 2, 1), (23, 2, 2)))
    for kept, x in zip(cache, (k, v)):
        kept[:, :40][:, 17:] = x
    first = torch.full((2,), 17, dtype=torch.int32, device=triton_device)
    expected = module("attention").attention_reference(q, k, v)
    assert torch.allclose(decode(q, cache[0][:, :40], cache[1][:, :40], first), expected, atol=1e-5)
    other = cache[1][:, :40].transpose(0, 1).contiguous().transpose(0, 1)  # v laid out unlike k
    assert torch.allclose(decode(q, cache[0][:, :40], other, first), expected, atol=1e-5)


def test_attention_of_one_query_goes_to_decode_unless_a_gradient_is_recorded(triton_device, monkeypatch):
    attention, calls = module("attention"), []
    monkeypatch.setattr(attention, "use_triton", lambda x: True)
    plain = attention.decode
    monkeypatch.setattr(attention, "decode", lambda *a: calls.append(1) or plain(*a))
    q, k = (randn(1, t, 1, 16).float().to(triton_device) for t in (1, 9))
    doc_start = torch.tensor([[0, 0, 2, 2, 2, 2, 2, 2, 2]], dtype=torch.int32, device=triton_device)
    found = attention.attention(q, k, k, doc_start, window=5)
    assert torch.allclose(found, attention.attention_reference(q, k, k, doc_start, window=5), atol=1e-5) and calls == [1]
    attention.attention(q.requires_grad_(), k, k).sum().backward()
    assert calls == [1] and q.grad is not None


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 16, 129), (7, 16, 300), (35, 8, 127)])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_token_logps(triton_device, small_tiles, path, dtype, sizes, softcap):
    case = token_logps_case(small_tiles("token_logps", module("token_logps")), path, *sizes, softcap=softcap)
    check(*case, dtype, triton_device if path == "triton" else "cpu")


@pytest.mark.parametrize("path", PATHS)
def test_token_logps_at_256k_words_and_large_logits(triton_device, monkeypatch, path):
    monkeypatch.setattr(module("token_logps"), "BLOCK", 2**16)
    case = token_logps_case(module("token_logps"), path, N=3, C=16, V=256_000, logit_scale=1.0, size=100.0)
    check(*case, torch.float32, triton_device if path == "triton" else "cpu")


def test_token_logps_keeps_or_recomputes_the_same(small_tiles):
    kept = run(token_logps_case(module("token_logps"), "cpu")[0], [randn(7, 16), randn(300, 16)], torch.float64, "cpu")
    small_tiles("token_logps", module("token_logps"))  # 7 rows no longer fit one chunk
    again = run(token_logps_case(module("token_logps"), "cpu")[0], [randn(7, 16), randn(300, 16)], torch.float64, "cpu")
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(kept, again))


# One word drawn a row: many rows of words, each with another u.
SAMPLE = {
    "greedy": dict(temperature=0.0),
    "greedy among equals": dict(temperature=0.0, ties=True),
    "temperature": dict(temperature=0.6),
    "top_p": dict(top_p=0.8),
    "min_p": dict(min_p=0.1),
    "both": dict(top_p=0.9, min_p=0.02, temperature=1.3),
    "equals at the edge": dict(top_p=0.6, ties=True),
    "one word has it all": dict(size=80.0, top_p=0.9),
    "all alike": dict(size=0.0, top_p=0.3),
    "a first block without a word": dict(empty=70, top_p=0.9),
    "greedy behind such a block": dict(empty=70, temperature=0.0),
    "whole blocks": dict(V=128, vocab=128, top_p=0.95),
    "a single word": dict(V=1, vocab=1, top_p=0.5, min_p=0.5),
}


def sample_inputs(n=20, V=150, vocab=137, temperature=1.0, top_p=1.0, min_p=0.0, size=3.0, ties=False, empty=0):
    """logits of V words, of which those from vocab on may not be drawn and the first `empty` have logit -inf."""
    logits = (size * randn(n, V)).float()
    logits = logits.round() if ties else logits
    logits[0, vocab - 1] = logits[0].max() + size / 3  # the likeliest word is the last one
    logits[1, V - 1] = logits[1].max() + size / 3  # and here it may not be drawn
    logits[2] = logits[2].clamp(min=-80, max=80) if size < 80 else logits[2].sign() * 80
    logits[:, :empty] = -torch.inf
    u = torch.linspace(0, 1, n, dtype=torch.float64)
    u[-1] = u[-2] = u[2] = 1 - 2**-53  # the largest that there is
    return logits, u, (vocab, temperature, top_p, min_p)


def drawable(logits, u, vocab, temperature, top_p, min_p):
    """(n, vocab) bool: the words that u may draw, one but for the rounding of u's share; word by word, in fp64."""
    out = torch.zeros(len(logits), vocab, dtype=torch.bool)
    for row, z in enumerate(logits.double()[:, :vocab]):
        if temperature == 0:
            out[row, (z == z.max()).nonzero()[0]] = True
            continue
        w = ((z - z.max()) / temperature).exp().tolist()
        mass, least = 0.0, 0.0
        for least in sorted(w, reverse=True):
            mass += least
            if mass >= top_p * sum(w) - 1e-9:
                break
        kept = [x if x >= max(least if top_p < 1 else 0.0, min_p) else 0.0 for x in w]
        before = 0.0
        for v, x in enumerate(kept):
            out[row, v] = x > 0 and before / sum(kept) - 1e-5 <= u[row] <= (before + x) / sum(kept) + 1e-5
            before += x
    return out


def check_sample(sample, sizes, device):
    logits, u, settings = sample_inputs(**sizes)
    token, logp = (x.cpu() for x in sample(logits.to(device), u.to(device), *settings))
    may = drawable(logits, u, *settings)
    assert may.any(1).all() and token.dtype == torch.int64 and (0 <= token).all() and (token < settings[0]).all()
    assert may.gather(1, token[:, None]).all(), f"rows {(~may.gather(1, token[:, None])[:, 0]).nonzero()[:, 0].tolist()}"
    expected = logits.double().log_softmax(-1).gather(1, token[:, None])[:, 0]
    assert torch.allclose(logp.double(), expected, rtol=1e-6, atol=1e-5) and logp.dtype == torch.float32


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", SAMPLE)
def test_sample(triton_device, small_tiles, path, name):
    file = small_tiles("sample", module("sample"))
    check_sample(file._sample if path == "triton" else kernels.sample, SAMPLE[name],
                 triton_device if path == "triton" else "cpu")  # fmt: skip


def test_sample_with_its_real_blocks(triton_device):
    check_sample(module("sample")._sample, dict(n=4, V=9000, vocab=8999, top_p=0.9, min_p=0.01), triton_device)


def test_greedy_sampling_needs_no_uniform_numbers(triton_device, small_tiles):
    file, (logits, _, settings) = small_tiles("sample", module("sample")), sample_inputs(temperature=0.0)
    check_sample(lambda z, u, *s: file._sample(z, None, *s), dict(temperature=0.0), triton_device)


def test_what_is_sampled_is_distributed_as_softmax_says(triton_device, small_tiles):
    file, n = small_tiles("sample", module("sample")), 400
    p = torch.tensor([0.3, 0.02, 0.0, 0.25, 0.05, 0.08, 0.2, 0.1], dtype=torch.float64)
    u = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(7)).to(triton_device)
    counts = file._sample(p.log().float().repeat(n, 1).to(triton_device), u, 7, 1.0, 1.0, 0.2)[0].cpu().bincount(minlength=8)

    def chi_square(p):
        assert not counts[p == 0].any()
        return ((counts - n * p)[p > 0] ** 2 / (n * p)[p > 0]).sum()

    kept = torch.tensor([1, 0, 0, 1, 0, 1, 1, 0]) * p  # the eighth may not be drawn, min_p cuts two
    limit = 3 + 6 * 6**0.5  # 3 degrees of freedom, of variance 6
    assert chi_square(kept / kept.sum()) < limit < chi_square(kept**1.6 / (kept**1.6).sum())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_nan_among_the_logits_is_told(triton_device, small_tiles, path, temperature):
    """By the log-prob of its row alone; the id is one of the words all the same."""
    file = small_tiles("sample", module("sample"))
    sample, device = (file._sample, triton_device) if path == "triton" else (kernels.sample, "cpu")
    logits, u, _ = sample_inputs(n=8)
    clean = sample(logits.to(device), u.to(device), 137, temperature, 0.9, 0.0)
    for v in (0, 70, 149):
        spoilt = logits.clone()
        spoilt[5, v], spoilt[7, ::2] = float("nan"), float("nan")  # not a whole block: the interpreter's argmax refuses it
        token, logp = (x.cpu() for x in sample(spoilt.to(device), u.to(device), 137, temperature, 0.9, 0.0))
        others = torch.ones(len(logits), dtype=torch.bool)
        others[[5, 7]] = False
        assert logp.isnan().tolist() == (~others).tolist() and (0 <= token).all() and (token < 137).all()
        assert torch.equal(token[others], clean[0].cpu()[others])


# --- Invariances


@pytest.mark.parametrize("path", PATHS)
def test_nan_stays_in_its_document(triton_device, small_tiles, path):
    attention = small_tiles("attention", module("attention"))
    function, _, _, inputs = attention_case(attention, path, docs=((20, 20, 20),), softcap=20.0)
    device = triton_device if path == "triton" else "cpu"
    clean = run(function, inputs, torch.float32, device)
    for bad, seen in [(0, 25), (1, 35), (2, 35)]:  # in q it spoils one row of the output; in k or v every later row too
        spoilt = [x.clone() for x in inputs]
        spoilt[bad][0, 25, 0, 3] = float("nan")
        spoilt[bad][0, 30, 0, 5] = float("inf")
        leaves = [x.to(device, torch.float32).requires_grad_() for x in spoilt]
        out = function(*leaves)
        grads = torch.autograd.grad(out, leaves, randn(*out.shape).to(device, torch.float32))
        assert out[0, seen].isnan().any(), "who sees a NaN must not hide it"
        for ours, expected in zip((out, *grads), clean):
            ours = ours.detach().double().cpu()
            for other in (slice(0, 20), slice(40, 60)):
                assert torch.allclose(ours[0, other], expected[0, other], atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_packed_documents_equal_separate_ones(triton_device, path):
    function, _, _, (q, k, v) = attention_case(module("attention"), path, docs=((1, 40, 19),))
    alone = attention_case(module("attention"), path)[0]
    device = triton_device if path == "triton" else "cpu"
    packed = run(function, [q, k, v], torch.float32, device)[0]
    for start, end in [(0, 1), (1, 41), (41, 60)]:
        one = run(alone, [x[:, start:end] for x in (q, k, v)], torch.float32, device)[0]
        assert torch.allclose(packed[:, start:end], one, atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_decoding_equals_the_whole_sequence(triton_device, path):
    whole, _, _, (q, k, v) = attention_case(module("attention"), path, H=4, Hkv=2, window=30)
    device = triton_device if path == "triton" else "cpu"
    last = attention_case(module("attention"), path, Tq=3, H=4, Hkv=2, window=30)[0]
    expected = run(whole, [q, k, v], torch.float32, device)[0][:, -3:]
    assert torch.allclose(run(last, [q[:, -3:], k, v], torch.float32, device)[0], expected, atol=1e-5)


def test_rope_scores_depend_on_distance_only():
    angle = torch.arange(20, dtype=torch.float64)[:, None] / 100 ** (torch.arange(8) / 8)
    x = randn(1, 1, 1, 16).expand(1, 20, 1, 16)
    q, k = kernels.rope(x, x.flip(-1), angle.cos(), angle.sin())
    scores = q[0, :, 0] @ k[0, :, 0].T
    assert torch.allclose(scores[5, 2], scores[15, 12]) and not torch.allclose(scores[5, 2], scores[15, 11])


OPS = {"swiglu": swiglu_case, "rope": rope_case, "layernorm": layernorm_case, "attention": attention_case,
       "token_logps": token_logps_case}  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("op", OPS)
def test_strided_inputs_and_repeatable_gradients(triton_device, small_tiles, path, op):
    """Slices of something larger give what contiguous inputs do; a second backward gives the same bits."""
    function, _, _, inputs = OPS[op](small_tiles(op, module(op)), path)
    device = triton_device if path == "triton" else "cpu"
    expected = run(function, inputs, torch.float32, device)
    for widen in (lambda x: x.repeat_interleave(2, 0)[::2], lambda x: torch.stack((x, -x), -1)[..., 0]):
        leaves = [widen(x.to(device, torch.float32)).requires_grad_() for x in inputs]
        assert not any(leaf.is_contiguous() for leaf in leaves if len(leaf) > 1)
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        upstream = [randn(*out.shape, seed=i).to(device, torch.float32) for i, out in enumerate(outputs)]
        once, twice = (torch.autograd.grad(outputs, leaves, upstream, retain_graph=True) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(once, twice))
        for ours, true in zip((*outputs, *once), expected):
            assert torch.allclose(ours.double().cpu(), true, atol=1e-5)


@pytest.mark.parametrize("op", OPS)
def test_gradients_of_the_cpu_path(small_tiles, op):
    function, definition, _, inputs = OPS[op](small_tiles(op, module(op)), "cpu", **dict(attention=dict(
        Tq=5, Tk=5, docs=((2, 3),), softcap=3.0, D=2), layernorm=dict(rows=3, C=7), swiglu=dict(shape=(2, 5)),
        rope=dict(T=2, D=4), token_logps=dict(C=4, V=9))[op])  # fmt: skip
    leaves = [x.clone().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(function, leaves)
    for ours, true in zip(run(function, inputs, torch.float64, "cpu"), run(definition, inputs, torch.float64, "cpu")):
        assert torch.allclose(ours, true, atol=1e-10)


def test_without_triton_the_cpu_paths_run():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, kernels\n"
        "x = torch.ones(2, 4, 2, 4)\n"
        "print(float(kernels.attention(x, x, x).sum()), float(kernels.swiglu(x, x).sum()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "64.0"


def test_the_page_on_triton_shows_the_kernel_that_it_is_about():
    """Line by line, but for comments and spaces: the docstring of kernels/__init__.py may not go stale."""

    def code(text):
        return [" ".join(line.split("#")[0].split()) for line in text.splitlines() if line.split("#")[0].strip()]

    source, page = code((ROOT / "kernels" / "swiglu.py").read_text(encoding="utf-8")), code(kernels.__doc__)
    start = source.index("def _swiglu_forward(gate_ptr, up_ptr, out_ptr, n, BLOCK: tl.constexpr):")
    for line in source[start : start + 6]:
        assert line in page


def test_wrong_shapes_are_named():
    x, w = torch.ones(2, 4, 6, 8), torch.ones(9)
    for call in (
        lambda: kernels.attention(x, x[:, :, :4], x[:, :, :4]),  # 6 query heads over 4 key heads
        lambda: kernels.attention(x, x[:, :2], x[:, :2]),  # more queries than keys
        lambda: kernels.rope(x, x, torch.ones(4, 8), torch.ones(4, 8)),  # D angles instead of D/2
        lambda: kernels.layernorm(x, w, 1e-5),
        lambda: kernels.swiglu(x, x[:1]),
        lambda: kernels.token_logps(torch.ones(3, 9), w[None].repeat(5, 1), torch.zeros(2, dtype=torch.int64)),
    ):
        with pytest.raises(ValueError, match=r"\(2|\(9|\(3"):
            call()


# --- Mutants: a kernel with one line broken must fail the check that the right one passes.

MUTANTS = [
    ("swiglu", "silu's slope without its second term", "s * (1.0 + g * (1.0 - s))", "s", {}),
    ("swiglu", "up's gradient from up", "dup_ptr + offset, d * g * s", "dup_ptr + offset, d * u * s", {}),
    ("swiglu", "gate and up swapped", "g * tl.sigmoid(g) * u", "u * tl.sigmoid(u) * g", {}),
    ("swiglu", "last elements not masked in", "mask = offset < n", "mask = offset < n - 1", {}),
    ("swiglu", "last block not launched", "triton.cdiv(n, BLOCK)", "n // BLOCK", {}),
    ("rope", "sign of the second half", "a * sin + b * cos", "a * sin - b * cos", {}),
    ("rope", "halves instead of interleaved pairs", "(BLOCK_H, D // 2, 2)))",
     "(BLOCK_H, 2, D // 2)).permute(0, 2, 1))", {}),
    ("rope", "interleaved pairs instead of halves", "    if INTERLEAVED:", "    if True:", dict(interleaved=False)),
    ("rope", "sign in the halves layout", "at, a * cos - b * sin", "at, a * cos + b * sin", dict(interleaved=False)),
    ("rope", "halves of half the width", "at + D // 2, mask", "at + D // 4, mask", dict(interleaved=False)),
    ("rope", "backward rotates forward", "ctx.interleaved, True)", "ctx.interleaved, False)", {}),
    ("rope", "one table for all rows", "0 if cos.dim() == 2 else T * (D // 2)", "0", {}),
    ("rope", "position off by one", "(token % T)", "((token + 1) % T)", {}),
    ("layernorm", "mean not subtracted", "tl.where(inside, x - mean, 0.0)", "x", {}),
    ("layernorm", "variance over C - 1", "keep_dims=True) / C + eps", "keep_dims=True) / (C - 1) + eps", {}),
    ("layernorm", "padding counted in the variance", "tl.where(inside, x - mean, 0.0)", "x - mean", {}),
    ("layernorm", "dx without mean(d h)", " - h * (tl.sum(d * h, axis=1, keep_dims=True) / C)", "", {}),
    ("layernorm", "dx without mean(d)", "dx -= tl.sum(d, axis=1, keep_dims=True) / C", "pass", {}),
    ("layernorm", "dweight of the last row only", "dw += dy * h", "dw = dy * h", {}),
    ("layernorm", "RMSNorm with mean(d)", "        if MEAN:\n            dx -=", "        if True:\n            dx -=",
     dict(kind="rms")),
    ("layernorm", "weight taken for weight - 1", 'float(kind == "rms+1")', "0.0", dict(kind="rms+1")),
    ("layernorm", "one head's weight for all", "(row % HEADS) * C", "0 * row", dict(C=64, heads=(6,))),
    ("layernorm", "dx of one head for all", "(first % HEADS) * C", "0 * first", dict(C=64, heads=(6,))),
    ("attention", "the diagonal is masked", "sees = j[None, :] <= m", "sees = j[None, :] < m", {}),
    ("attention", "queries taken for the first ones", "m[:, None] + (Tk - Tq)", "m[:, None]", dict(Tq=37)),
    ("attention", "documents see each other", "sees &= j[None, :] >= first[:, None]", "pass", dict(docs=((20, 40),))),
    ("attention", "dk, dv: document end off by one", "[None, :] < end", "[None, :] <= end", dict(docs=((20, 40),))),
    ("attention", "dk, dv: end found one early", "right=True", "right=False", dict(docs=((20, 40),))),
    ("attention", "window one key wider", "(window - 1)", "window", dict(window=20)),
    ("attention", "tiles at the edge counted wrong", "x < inner, 0", "x <= inner, 0", {}),
    ("attention", "heads of a group scattered", "h // G", "h % (H // G)", dict(H=4, Hkv=2)),
    ("attention", "no rescaling when the maximum grows", "acc * rescale[:, None]", "acc", {}),
    ("attention", "dS without delta", "(dp - delta[:, None])", "dp", {}),
    ("attention", "softcap without its slope", "1.0 - t * t", "1.0", dict(softcap=2.0)),
    ("attention", "dk not scaled", "dk * scale, TMA", "dk, TMA", {}),
    ("attention", "dk, dv of one head of the group", "for g in range(G):", "for g in range(1):", {}),
    ("decode", "runs not weighted", "weight = tl.exp2(top - tl.max(top, 0))", "weight = tl.exp2(top - top)", {}),
    ("decode", "the last key lost", "(j < end)", "(j < end - 1)", dict(Tk=5)),
    ("decode", "before the document", "(j >= first) & ", "", dict(docs=((50, 20),))),
    ("decode", "lengths passed over", "tl.minimum(tl.load(length_ptr + b), Tk) if HAS_LENGTH else Tk", "Tk", dict(lengths=True)),
    ("decode", "one key more than there is", "tl.load(length_ptr + b)", "tl.load(length_ptr + b) + 1", dict(lengths=True)),
    ("decode", "heads as in a cache of whole tokens", "h_kv.to(tl.int64) * stride_h", "h_kv.to(tl.int64) * D", dict(lengths=True)),
    ("decode", "a group's heads mixed", "h_kv * G + g[:, None]", "h_kv + g[:, None] * HKV", dict(H=4, Hkv=2)),
    ("decode", "no rescaling when the maximum grows", "acc * rescale[:, None]", "acc", {}),
    ("decode", "tiles done by nobody", "tl.num_programs(1) * BN", "tl.num_programs(1) * BN * 2", {}),
    ("decode", "tiles done by two", "tl.num_programs(1) * BN", "BN", {}),
    ("decode", "strides of a contiguous cache", "j[:, None].to(tl.int64) * stride_t", "j[:, None] * D", dict(Hkv=2, H=4)),
    ("sample", "the likeliest of all the words", 'z = tl.where(v < vocab, z, -float("inf"))', "pass", dict(temperature=0.0)),
    ("sample", "a place in the block", "v0 + tl.argmax(z, 0)", "tl.argmax(z, 0)", dict(temperature=0.0)),
    ("sample", "the last of equals", "here > best", "here >= best", dict(temperature=0.0, ties=True)),
    ("sample", "an empty block says NaN", "-1e30, 0, -1e30", '-float("inf"), 0, -float("inf")', dict(empty=70)),
    ("sample", "no rescaling when the maximum grows", "total * tl.exp(top - new_top)", "total", {}),
    ("sample", "nor of what may be drawn", "mass * tl.exp((best - new_best) * scale)", "mass", dict(top_p=0.8)),
    ("sample", "no temperature", "tl.exp((z - top) * scale)", "tl.exp(z - top)", dict(temperature=0.6)),
    ("sample", "words that may not be drawn", "tl.where(v < vocab, tl.exp((z - top) * scale), 0.0)",
     "tl.exp((z - top) * scale)", {}),
    ("sample", "no min_p", "least = min_p", "least = 0.0", dict(min_p=0.1)),
    ("sample", "top_p instead of min_p", "tl.maximum(least, bits.to(tl.float32, bitcast=True))",
     "bits.to(tl.float32, bitcast=True)", dict(top_p=0.99, min_p=0.1)),
    ("sample", "the word at the edge is cut", "keep = (w >= least)", "keep = (w > least)", dict(top_p=0.8)),
    ("sample", "a threshold of eight bits", "for step in range(16):", "for step in range(4):", dict(top_p=0.8)),
    ("sample", "top_p of 1", "top_p * mass", "top_p", dict(top_p=0.8)),
    ("sample", "each block from the start", "before + tl.cumsum(w, 0).to(tl.float64)", "tl.cumsum(w, 0).to(tl.float64)", {}),
    ("sample", "the last block that passes", "(found == V) & ", "", {}),
    ("sample", "u of what is cut too", "row) * kept", "row) * mass", dict(top_p=0.8)),
    ("sample", "one u for all rows", "tl.load(u_ptr + row)", "tl.load(u_ptr)", {}),
    ("sample", "log-prob among what may be drawn", "top + tl.log(total)", "best + tl.log(mass)", {}),
    ("token_logps", "target not relative to the slice", "(targets_ptr + row) - start", "(targets_ptr + row)", {}),
    ("token_logps", "slices not joined", "tl.exp(lse - high) + ", "", {}),
    ("token_logps", "words past the end counted", 'tl.where(col < V, z, -float("inf"))', "z", dict(size=0.5)),
    ("token_logps", "soft cap without its slope", "1.0 - (z / SOFTCAP) * (z / SOFTCAP)", "1.0", dict(softcap=5.0)),
    ("token_logps", "soft cap of half the width", "tl.sigmoid(z * (2.0 / SOFTCAP))", "tl.sigmoid(z * (1.0 / SOFTCAP))",
     dict(softcap=5.0)),
    ("token_logps", "target's logit not capped", "_cap(tl.load(logits_ptr + target) * logit_scale, SOFTCAP)",
     "tl.load(logits_ptr + target) * logit_scale", dict(softcap=5.0)),
    ("token_logps", "logit_scale missing in the gradient", "(g_ptr + row) * logit_scale", "(g_ptr + row)", {}),
    ("token_logps", "dhidden of the last slice only", "dhidden += ", "dhidden = ", {}),
    ("token_logps", "no rescaling when the maximum grows", "total * tl.exp(top - new_top)", "total", {}),
]  # fmt: skip


def check_op(op, file, sizes, device):
    if op == "sample":
        return check_sample(file._sample, sizes, device)
    if op == "decode" and sizes.get("lengths"):
        return check_decode(lengths_case(file, "triton"), torch.float32, device)
    if op == "decode":
        return check_decode(decode_case(file, "triton", **dict(Tk=70) | sizes), torch.float32, device)
    return check(*OPS[op](file, "triton", **sizes), torch.float32, device)


@pytest.mark.parametrize("op, name, right, wrong, sizes", MUTANTS, ids=[f"{m[0]}: {m[1]}" for m in MUTANTS])
def test_mutant_is_caught(triton_device, small_tiles, tmp_path, op, name, right, wrong, sizes):
    source = (ROOT / "kernels" / f"{op}.py").read_text()
    assert right in source, f"the mutant {name!r} no longer applies: {right!r} is gone"
    file = tmp_path / f"{op}.py"
    file.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location(f"kernels._mutant_{op}", file)
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    with pytest.raises((AssertionError, RuntimeError)):
        check_op(op, small_tiles(op, mutant), sizes, triton_device)


@pytest.mark.parametrize("op", [*OPS, "decode", "sample"])
def test_every_mutant_starts_from_a_kernel_that_passes(triton_device, small_tiles, op):
    for sizes in {str(m[4]): m[4] for m in MUTANTS if m[0] == op}.values():
        check_op(op, small_tiles(op, module(op)), sizes, triton_device)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="row offsets past 2**31 need 9 GB of GPU memory")
def test_token_logps_past_int32(triton_device, monkeypatch):
    monkeypatch.setattr(module("token_logps"), "SLICE", 2**40)
    hidden, weight = randn(8400, 16).cuda().bfloat16(), randn(256_000, 16).cuda().bfloat16()
    targets = torch.arange(8400, device="cuda") * 30
    whole = kernels.token_logps(hidden, weight, targets)
    assert torch.allclose(whole[-9:], kernels.token_logps(hidden[-9:], weight, targets[-9:]), atol=1e-4)
