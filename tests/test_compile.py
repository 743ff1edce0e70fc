"""
Every kernel compiled for an H100 or H200 (sm_90) and an A100 (sm_80), at the shapes of aya-expanse-8b and at those of
other head widths, on a machine without a GPU.

    python tests/test_compile.py attention     # or rest, or sm_80; one JSON line a kernel: registers, spills, shared
                                               # memory, instructions

triton ships the assembler and disassembler. The operations run on meta tensors with a driver that only says "sm_90", so
each kernel is compiled for the very arguments of its launch. What this cannot show: wrong results, races, time.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED_LIMIT = {90: 232_448, 80: 166_912}  # bytes a block; the compiler itself does not check
PARTS = ("attention", "rest", "sm_80")  # compiled side by side


def compile_part(part):
    """Runs operations forward and backward on meta tensors and prints what their kernels compiled to."""
    arch = 80 if part == "sm_80" else 90
    sys.path.insert(0, str(ROOT))
    import importlib

    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas

    class Driver:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", arch, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device=None: 0)
        get_active_torch_device = staticmethod(lambda: torch.device("meta"))

    triton.runtime.driver.set_active(Driver())
    tools, launch, name = Path(triton.__file__).parent / "backends/nvidia/bin", triton.JITFunction.run, ""

    def instead_of_launching(kernel, *args, grid, warmup, **options):
        compiled = launch(kernel, *args, grid=grid, warmup=True, **options)
        with tempfile.TemporaryDirectory() as folder:
            ptx, cubin = Path(folder, "k.ptx"), Path(folder, "k.cubin")
            ptx.write_text(compiled.asm["ptx"])
            cubin.write_bytes(compiled.asm["cubin"])
            assemble = [get_ptxas(arch).path, "-v", f"--gpu-name=sm_{arch}{'a' * (arch == 90)}", ptx, "-o", os.devnull]
            report = subprocess.run(assemble, capture_output=True, text=True).stderr
            sass = subprocess.run([tools / "nvdisasm", "-c", cubin], capture_output=True, text=True).stdout
        count = lambda pattern: len(re.findall(pattern, sass))  # noqa: E731
        print(json.dumps(dict(
            arch=arch, kernel=kernel.__name__, case=name, registers=int(re.findall(r"Used (\d+) registers", report)[-1]),
            spills=sum(int(n) for n in re.findall(r"(\d+) bytes spill", report)), serialised="C7512" in report,
            shared=compiled.metadata.shared, wgmma=count(r"\bHGMMA"), mma=count(r"\bHMMA"), tma=count(r"\bUTMALDG"),
            wide_loads=count(r"\bLDG\.E\.128"), loads=count(r"\bLDG\."),
            wide_stores=count(r"\bSTG\.E\.128"), stores=count(r"\bSTG\."),
        )), flush=True)  # fmt: skip

    triton.JITFunction.run = instead_of_launching

    def meta(*shape, dtype=torch.bfloat16):
        return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)

    for op in [*FUNCTIONS, "decode"]:  # ops of torch.library launch nothing for meta tensors: their functions do
        file = importlib.import_module(f"kernels.{op}")
        for key, value in list(vars(file).items()):
            if hasattr(value, "_init_fn"):
                setattr(file, key, value._init_fn)

    def both_ways(op, *args):
        out = getattr(importlib.import_module(f"kernels.{op}"), FUNCTIONS[op]).apply(*args)
        out = out if isinstance(out, tuple) else (out,)
        torch.autograd.backward(out, [torch.empty_like(x) for x in out])

    N, C, ffn, H, Hkv, D = 8192, 4096, 14336, 32, 8, 128
    q, k, v, angles = meta(1, N, H, D), meta(1, N, Hkv, D), meta(1, N, Hkv, D), meta(N, D // 2, dtype=torch.float32)
    doc_start = meta(1, N, dtype=torch.int32)
    importlib.import_module("kernels.token_logps").SLICE = N * 16_384
    if part == "attention":
        for name, first in [("one document", None), ("packed", doc_start)]:
            both_ways("attention", q, k, v, first, None, None, D**-0.5)
        for name, width, dtype, cap in [("D = 64", 64, torch.bfloat16, None), ("D = 256, cap", 256, torch.bfloat16, 50.0)]:
            args = [meta(1, N, heads, width, dtype=dtype) for heads in (H, Hkv, Hkv)]
            both_ways("attention", *args, doc_start, None, cap, width**-0.5)
        return
    name = ""
    both_ways("swiglu", meta(N, ffn), meta(N, ffn))
    both_ways("rope", q, k, angles.detach(), angles.detach(), True)
    both_ways("layernorm", meta(N, C), meta(C), 1e-5, "layer")
    both_ways("token_logps", meta(N, C), meta(16_384, C), meta(N, dtype=torch.int64), 0.0625, None)
    cache = meta(2, 64, 4096, Hkv, D).detach()
    decode = importlib.import_module("kernels.decode").decode
    for name, first in [("cache", None), ("padded", meta(64, 1, dtype=torch.int32))]:
        decode(meta(64, 1, H, D).detach(), cache[0, :, :3001], cache[1, :, :3001], first)
    if part == "sm_80":
        name, importlib.import_module("kernels.attention").has_tma = "packed", lambda: False
        return both_ways("attention", q, k, v, doc_start, None, None, D**-0.5)
    name = "rms"
    both_ways("layernorm", meta(N, C), meta(C), 1e-5, "rms")
    name = "rms+1"
    both_ways("layernorm", meta(N, C), meta(C), 1e-5, "rms+1")
    name = "heads"
    both_ways("layernorm", meta(N, H, D), meta(H, D), 1e-5, "layer")
    name = "halves"
    both_ways("rope", q, k, angles.detach(), angles.detach(), False)
    name = "soft cap"
    both_ways("token_logps", meta(N, C), meta(16_384, C), meta(N, dtype=torch.int64), 1.0, 30.0)
    name = "odd"
    both_ways("swiglu", meta(1003), meta(1003))


FUNCTIONS = {"swiglu": "_SwiGLU", "rope": "_Rope", "layernorm": "_Norm", "token_logps": "_TokenLogps",
             "attention": "_Attention"}  # fmt: skip


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """{(arch, kernel, case): what it compiled to}, from processes of their own: here triton may be set to interpret."""
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "TRITON_DEFAULT_FP_FUSION": "1"}
    files = {part: open(tmp_path_factory.mktemp("compile") / part, "w+", encoding="utf-8") for part in PARTS}
    running = [subprocess.Popen([sys.executable, __file__, part], env=environment, stdout=file, stderr=subprocess.PIPE,
                                text=True) for part, file in files.items()]
    rows = []
    for process, file in zip(running, files.values()):
        stderr = process.communicate(timeout=540)[1]
        assert process.returncode == 0, stderr[-3000:]
        file.seek(0)
        rows += [json.loads(line) for line in file if line.startswith("{")]
    return {(row["arch"], row["kernel"], row["case"]): row for row in rows}


def test_every_kernel_is_compiled(compiled):
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "kernels").glob("*.py"))
    launched = set(re.findall(r"^ +(_\w+)\[.*\]\(", text, re.MULTILINE))
    for arch in SHARED_LIMIT:
        assert launched == {kernel for a, kernel, _ in compiled if a == arch}


def test_no_kernel_spills_and_all_fit(compiled):
    # dk and dv keep two (128, 128) fp32 tiles in registers, and have a few bytes too many; so has all of D = 256
    few = {"_attention_dkdv": 112, "_attention_dq": 64}
    for (arch, kernel, case), row in compiled.items():
        tight = arch == 90 and (kernel == "_attention_dkdv" or case == "D = 256, cap")
        assert row["spills"] <= (few.get(kernel, 0) if tight else 0), (arch, kernel, case, row)
        assert row["shared"] <= SHARED_LIMIT[arch], (arch, kernel, case, row)


def test_matmuls_run_on_tensor_cores(compiled):
    attention = {key: row for key, row in compiled.items() if key[1].startswith("_attention")}
    assert len(attention) == 15  # forward, dq, dkdv; on sm_90 one document, packed, D = 64, D = 256; on sm_80 packed
    for key, row in attention.items():
        if key[0] == 90:  # Hopper's own instructions, and its copy engine
            assert row["wgmma"] > 0 and row["mma"] == 0 and not row["serialised"], (key, row)
            assert row["tma"] > 0, (key, row)
        else:
            assert row["mma"] > 0, (key, row)
    for key, row in compiled.items():
        if key[1] == "_decode_run":  # a group's heads are too few rows for wgmma
            assert row["mma"] > 0, (key, row)


def test_elementwise_kernels_move_128_bits_at_a_time(compiled):
    # (loads, stores) that may be narrower: a row's mean and rstd; its lse, target, picked logit or upstream gradient
    # and in the layout of halves k's two: 8 heads of 64 elements are 4 for each of 128 threads
    narrow = {"_norm_forward": (0, 2), "_norm_backward": (2, 0), "_fold_slice": (3, 2),
              "_slice_gradient": (3, 0), ("_rope_kernel", "halves"): (2, 2)}  # fmt: skip
    for (arch, kernel, case), row in compiled.items():
        if case != "odd" and not kernel.startswith(("_attention", "_decode")):
            loads, stores = narrow.get((kernel, case), narrow.get(kernel, (0, 0)))
            assert row["wide_loads"] > 0 and row["loads"] - row["wide_loads"] <= loads, (arch, kernel, case, row)
            assert row["stores"] - row["wide_stores"] <= stores, (arch, kernel, case, row)


def test_the_count_sees_narrow_loads(compiled):
    odd = compiled[90, "_swiglu_forward", "odd"]  # 1,003 elements: no vector of 8 is known to be inside
    assert odd["wide_loads"] == 0 and odd["loads"] > 2


if __name__ == "__main__":
    compile_part(sys.argv[1])
