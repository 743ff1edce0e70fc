"""
Every kernel compiled for an H100 or H200 (sm_90) and an A100 (sm_80), at the shapes of aya-expanse-8b and at those of
other head widths, on a machine without a GPU.

    python tests/test_compile.py attention     # or rest, or sm_80; one JSON line a kernel: registers, spills, shared
                                               # memory, instructions

How that is done, and what it cannot show: bench/launches.py.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("attention", "rest", "sm_80")  # compiled side by side


def compile_part(part):
    """Runs operations forward and backward on meta tensors and prints what their kernels compiled to."""
    sys.path.insert(0, str(ROOT))
    import torch

    from bench.launches import caught, compiled_to, inputs, launch_for_meta_tensors, pretend, run

    arch = 80 if part == "sm_80" else 90
    pretend(arch)
    launch_for_meta_tensors()

    def compile_case(op, case="", args=None, **changes):
        def instead(launch, kernel, args, options):
            compiled = launch(*args, **options | {"warmup": True})
            print(json.dumps(dict(arch=arch, kernel=kernel, case=case) | compiled_to(compiled, arch)), flush=True)

        with caught(instead):
            run(op, *(args or inputs(op, **changes)))

    if part == "attention":
        compile_case("attention", "one document")
        compile_case("attention", "packed", document=1024)
        compile_case("attention", "D = 64", document=1024, width=64)
        compile_case("attention", "D = 256, cap", document=1024, width=256, softcap=50.0)
        return
    for op in ("swiglu", "rope", "layernorm", "token_logps"):
        compile_case(op)
    compile_case("decode", "cache")
    compile_case("decode", "padded", document=1024)
    compile_case("sample", "whole")
    compile_case("sample", "cut", document=1024)
    if part == "sm_80":
        return compile_case("attention", "packed", document=1024)
    compile_case("layernorm", "rms", kind="rms")
    compile_case("layernorm", "rms+1", kind="rms+1")
    compile_case("layernorm", "heads", heads=True)
    compile_case("rope", "halves", interleaved=False)
    compile_case("token_logps", "soft cap", softcap=30.0)
    compile_case("swiglu", "odd", [torch.empty(1003, dtype=torch.bfloat16, device="meta", requires_grad=True)] * 2)


def compiling(cache):
    """The environment of a process that compiles kernels, which here may be set to be interpreted."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return environment | {"TRITON_CACHE_DIR": str(cache), "TRITON_DEFAULT_FP_FUSION": "1"}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """{(arch, kernel, case): what it compiled to}, from processes of their own."""
    pytest.importorskip("triton")
    environment = compiling(tmp_path_factory.mktemp("triton"))
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
    for arch in (90, 80):
        assert launched == {kernel for a, kernel, _ in compiled if a == arch}


def test_no_kernel_spills_and_all_fit(compiled):
    # dk and dv keep two (64, 128) fp32 tiles in the registers of four warps, 296 bytes too many in packed rows (measured on
    # an H200, that is faster than eight warps and no spills); so has all of D = 256, where
    # triton 3.6's assembler spills in the forward and in dq as well (80 and 220 bytes), 3.9's does not
    few = {"_attention_dkdv": 296, "_attention_dq": 220, "_attention_forward": 80}
    for (arch, kernel, case), row in compiled.items():
        tight = arch == 90 and (kernel == "_attention_dkdv" or case == "D = 256, cap")
        assert row["spills"] <= (few.get(kernel, 0) if tight else 0), (arch, kernel, case, row)
        assert row["fits"], (arch, kernel, case, row)


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
    # (and of a sampled row its uniform number, the token's logit, and what is stored)
    narrow = {"_sample_kernel": (2, 2), "_norm_forward": (0, 2), "_norm_backward": (4, 0), "_fold_slice": (3, 2),
              "_slice_gradient": (3, 0), ("_rope_kernel", "halves"): (2, 2)}  # fmt: skip
    for (arch, kernel, case), row in compiled.items():
        if case != "odd" and not kernel.startswith(("_attention", "_decode")):
            loads, stores = narrow.get((kernel, case), narrow.get(kernel, (0, 0)))
            assert row["wide_loads"] > 0 and row["loads"] - row["wide_loads"] <= loads, (arch, kernel, case, row)
            assert row["stores"] - row["wide_stores"] <= stores, (arch, kernel, case, row)


def test_the_count_sees_narrow_loads(compiled):
    odd = compiled[90, "_swiglu_forward", "odd"]  # 1,003 elements: no vector of 8 is known to be inside
    assert odd["wide_loads"] == 0 and odd["loads"] > 2


def test_tune_compiles_candidates_without_a_gpu(tmp_path):
    pytest.importorskip("triton")
    command = [sys.executable, ROOT / "bench" / "tune.py", "--ops", "decode", "--values", "32768,4,5", "--arch",
               "sm_90", "--out", tmp_path / "tune"]  # fmt: skip
    done = subprocess.run(command, env=compiling(tmp_path), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    now, large = json.loads((tmp_path / "tune-sm_90.json").read_text(encoding="utf-8"))["rows"]
    assert now["current"] and now["fits"] and now["spills"] == 0 and 0 < now["registers"] <= 255
    assert large["choice"] == [32768, 4, 5] and not large["current"] and not large["fits"]  # 5 stages of k and v
    assert "s" not in now and "for kernels/" not in done.stdout  # what is not timed is no winner


if __name__ == "__main__":
    compile_part(sys.argv[1])
