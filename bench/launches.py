"""
What tune.py and tests/test_compile.py share: the kernels' operations at the shapes of aya-expanse-8b, their launches
caught, and what a kernel compiled to.

No GPU is needed. triton ships the assembler and disassembler; operations run on meta tensors (shapes without data) with
a driver that only says "sm_90", so each kernel is compiled for the very arguments of its launch. What this cannot show:
wrong results, races, time.
"""

import contextlib
import importlib
import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
N, C, FFN, H, HKV, D = 8192, 4096, 14336, 32, 8, 128  # tokens in the batch; the rest is aya-expanse-8b's
SHARED_LIMIT = {90: 232_448, 80: 166_912}  # bytes a block, by architecture; the compiler itself does not check
FUNCTIONS = {"swiglu": "_SwiGLU", "rope": "_Rope", "layernorm": "_Norm", "token_logps": "_TokenLogps",
             "attention": "_Attention"}  # fmt: skip


def file_of(op):
    return importlib.import_module(f"kernels.{op}")  # kernels.rope is the function, so the module goes by its full name


def launch_for_meta_tensors():
    """Ops of torch.library launch nothing for tensors without data, so their functions take their places."""
    for op in [*FUNCTIONS, "decode", "sample"]:
        for key, value in list(vars(file_of(op)).items()):
            if hasattr(value, "_init_fn"):
                setattr(file_of(op), key, value._init_fn)


def pretend(arch):
    """From now on triton compiles for this GPU, there or not: 90 or 80. Nothing can be launched."""

    class Driver:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", arch, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device=None: 0)
        get_active_torch_device = staticmethod(lambda: torch.device("meta"))

    triton.runtime.driver.set_active(Driver())
    file_of("attention").has_tma = lambda: arch >= 90


@contextlib.contextmanager
def caught(instead):
    """Inside, instead(launch, name, args, options) takes the place of launch(*args, **options) of the kernel `name`."""
    launch = triton.JITFunction.run
    triton.JITFunction.run = lambda kernel, *args, **options: instead(
        partial(launch, kernel), kernel.__name__, args, options)  # fmt: skip
    try:
        yield
    finally:
        triton.JITFunction.run = launch


def compiled_to(kernel, arch):
    """What launch(..., warmup=True) returned, as numbers: registers, spilled bytes, shared memory, instructions."""
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "k.ptx"), Path(folder, "k.cubin")
        ptx.write_text(kernel.asm["ptx"], encoding="utf-8")
        cubin.write_bytes(kernel.asm["cubin"])
        assemble = [get_ptxas(arch).path, "-v", f"--gpu-name=sm_{arch}{'a' * (arch >= 90)}", ptx, "-o", os.devnull]
        report = subprocess.run(assemble, capture_output=True, text=True).stderr
        tools = Path(triton.__file__).parent / "backends/nvidia/bin"
        sass = subprocess.run([tools / "nvdisasm", "-c", cubin], capture_output=True, text=True).stdout
    count = lambda pattern: len(re.findall(pattern, sass))  # noqa: E731
    limit = SHARED_LIMIT.get(arch) or torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    return dict(
        registers=int(re.findall(r"Used (\d+) registers", report)[-1]),
        spills=sum(int(n) for n in re.findall(r"(\d+) bytes spill", report)), serialised="C7512" in report,
        shared=kernel.metadata.shared, fits=kernel.metadata.shared <= limit,
        wgmma=count(r"\bHGMMA"), mma=count(r"\bHMMA"), tma=count(r"\bUTMALDG"),
        wide_loads=count(r"\bLDG(?:STS)?\.E(?:\.\w+)*?\.128"), loads=count(r"\bLDG(?:STS)?\."),  # STS: by way of shared memory
        wide_stores=count(r"\bSTG\.E\.128"), stores=count(r"\bSTG\."),
    )  # fmt: skip


def inputs(op, device="meta", *, dtype=torch.bfloat16, width=D, document=None, softcap=None, kind="layer", heads=False,
           interleaved=True):  # fmt: skip
    """
    Arguments of op's autograd.Function, or of what decode and sample launch. document: length of packed documents
    (decode: rows are padded; sample: the distribution is cut); width: of a head; kind: of norm; heads: a norm for each head, with its own weight.
    """
    torch.manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, device=device, dtype=dtype, requires_grad=op not in ("decode", "sample"))  # noqa: E731
    if op == "swiglu":
        return randn(N, FFN), randn(N, FFN)
    if op == "rope":
        angles = torch.randn(N, width // 2, device=device)
        return randn(1, N, H, width), randn(1, N, HKV, width), angles.cos(), angles.sin(), interleaved
    if op == "layernorm":
        shape = (H, width) if heads else (C,)
        return randn(N, *shape), randn(*shape), 1e-5, kind
    if op == "token_logps":  # one slice of the vocabulary
        return randn(N, C), randn(16_384, C), torch.randint(16_384, (N,), device=device), 2.0**-4, softcap
    if op == "decode":  # a cache, 64 rows
        cache, ints = randn(2, 64, HKV, 4096, width).transpose(2, 3), partial(torch.full, (64,), dtype=torch.int32, device=device)
        first, length = (ints(0), None) if document else (None, ints(3001))
        return randn(64, 1, H, width), *cache, first, length, width**-0.5, softcap or 0.0
    if op == "sample":  # fp32 logits of 64 rows
        logits, u = torch.randn(64, 256_000, device=device), torch.rand(64, dtype=torch.float64, device=device)
        return logits, u, 255_029, 1.0, *((0.9, 0.05) if document else (1.0, 0.0))
    doc_start = (torch.arange(N, dtype=torch.int32, device=device) // document * document)[None] if document else None
    q, k, v = (randn(1, N, n, width) for n in (H, HKV, HKV))
    return q, k, v, doc_start, None, softcap, width**-0.5


def run(op, *args):
    """The operation by its kernels, forward and, in training, backward. Returns outputs and gradients."""
    if op == "decode":
        return [file_of(op)._decode(*args)]
    if op == "sample":
        return list(file_of(op)._sample(*args))
    out = getattr(file_of(op), FUNCTIONS[op]).apply(*args)
    out = out if isinstance(out, tuple) else (out,)
    leaves = [x for x in args if isinstance(x, torch.Tensor) and x.requires_grad]
    return [*out, *torch.autograd.grad(out, leaves, [torch.randn_like(x) for x in out])]
