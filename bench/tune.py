"""
Which tiles? The kernels take theirs from fixed tables; this script is how a table's row is found. For each kernel that
has a choice it goes through candidates (the current choice first), compiles each, drops what does not compile, does not
fit in shared memory or spills much, times the rest, and prints the fastest as lines to paste into the kernel's file.

    python bench/tune.py                                    # on a GPU: everything, minutes a kernel, mostly compiling
    python bench/tune.py --ops forward dq dkdv --width 64 --document 0
    python bench/tune.py --ops dkdv --values 32,128,8,2 64,128,8,2     # these and the current choice only
    python bench/tune.py --ops dkdv --arch sm_90            # only compiles: registers, spills, shared memory; no GPU

Times are medians of single kernels, taken as in kernels.py, at the shapes of aya-expanse-8b. `error` is the largest
difference from what the current choice computes, as a share of the largest value: a tile that is fast and wrong is no
candidate. Without a GPU the table is in no order of speed: registers and spills are not time.
"""

import itertools
import json
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import triton

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import bench.kernels  # noqa: E402
from bench.launches import caught, compiled_to, file_of, inputs, launch_for_meta_tensors, pretend, run  # noqa: E402
from common import atomic_file, die, git_commit, hardware, parse_config, print0  # noqa: E402

WRONG = 2.0**-6  # error of a candidate from which on it is dropped: four roundings in bf16
ATTENTION = {"BM": (32, 64, 128), "BN": (32, 64, 128), "num_warps": (4, 8), "num_stages": (1, 2, 3)}
# what is chosen: the operation, its kernels, and the values to try: a row of TILES in attention.py, constants elsewhere
CHOICES = {
    "forward": ("attention", ["_attention_forward"], ATTENTION),
    "dq": ("attention", ["_attention_dq"], ATTENTION),
    "dkdv": ("attention", ["_attention_dkdv"], ATTENTION | {"BM": (16, 32, 64, 128)}),
    "decode": ("decode", ["_decode_run", "_decode_join"], {
        "BLOCK_BYTES": (8192, 16384, 32768), "NUM_WARPS": (2, 4, 8), "NUM_STAGES": (2, 3, 4)}),
    "token_logps": ("token_logps", ["_fold_slice", "_slice_gradient"], {
        "BLOCK": (1024, 2048, 4096, 8192), "NUM_WARPS": (4, 8, 16)}),
    "sample": ("sample", ["_sample_kernel"], {
        "BLOCK": (2048, 4096, 8192), "NUM_WARPS": (4, 8, 16), "STAGES": (1, 2, 3, 4)}),
    "swiglu": ("swiglu", ["_swiglu_forward", "_swiglu_backward"], {
        "BLOCK": (512, 1024, 2048, 4096), "NUM_WARPS": (2, 4, 8)}),
    "rope": ("rope", ["_rope_kernel"], {"NUM_WARPS": (1, 2, 4, 8)}),
    "layernorm": ("layernorm", ["_norm_backward"], {"PROGRAMS": (132, 264, 396, 528), "STAGES": (1, 2, 3)}),
}  # fmt: skip


@dataclass
class Config:
    ops: list[str] = field(default_factory=lambda: list(CHOICES))  # whose tiles
    values: list[str] = field(default_factory=list)  # candidates of the one op, as 64,128,8,2 (default: see CHOICES)
    arch: str = ""  # sm_90 or sm_80: compile only, without a GPU (default: this GPU, and time)
    width: int = 128  # of an attention head
    document: int = 1024  # length of the packed documents; 0: all tokens are one
    softcap: float = 0.0  # of attention scores and of logits; 0: none
    dtype: str = "bfloat16"  # of weights and activations
    spills: int = 128  # bytes; a candidate that spills more than these and than the current choice is not timed
    repeats: int = 20  # calls that are timed, after three that are not
    out: str = "bench/results/tune"  # -<GPU or architecture>.json; "": nothing is written


def chosen(op, cfg, new=None):
    """The choice that stands in the kernel's file, replaced by `new` if given; and the lines that say it there."""
    name, _, values = CHOICES[op]
    file = file_of(name)
    if name == "attention":
        row, key = (file.TILES if file.has_tma() else file.TILES_SM80)[op], max(cfg.width * dtype(cfg).itemsize, 128)
        row[key] = new or row[key]
        return row[key], f'"{op}": {row},'
    for constant, value in zip(values, new or ()):
        setattr(file, constant, value)
    now = tuple(getattr(file, constant) for constant in values)
    return now, "\n".join(f"{constant} = {value}" for constant, value in zip(values, now))


def dtype(cfg):
    return getattr(torch, cfg.dtype)


def candidates(op, cfg):
    """The current choice, then the others."""
    _, _, values = CHOICES[op]
    for text in cfg.values:
        if not text.replace(",", "").isdigit() or text.count(",") + 1 != len(values):
            die(f"--values {text}: {op} chooses {', '.join(values)}; say them as numbers joined by commas")
    given = [tuple(int(n) for n in text.split(",")) for text in cfg.values]
    first = chosen(op, cfg)[0]
    return [first] + [choice for choice in given or itertools.product(*values.values()) if choice != first]


def case(file, device, cfg):
    return inputs(file, device, dtype=dtype(cfg), width=cfg.width, document=cfg.document, softcap=cfg.softcap or None)


def compile_choice(op, cfg, arch):
    """Of the choice's kernels: the most registers and shared memory of any, the sum of what they spill."""
    file, kernels, _ = CHOICES[op]
    found = []

    def instead(launch, kernel, args, options):
        if kernel in kernels:
            found.append(compiled_to(launch(*args, **options | {"warmup": True}), arch))

    with caught(instead):
        run(file, *case(file, "meta", cfg))
    return {"registers": max(k["registers"] for k in found), "spills": sum(k["spills"] for k in found),
            "shared": max(k["shared"] for k in found), "fits": all(k["fits"] for k in found),
            "serialised": any(k["serialised"] for k in found)}  # fmt: skip


def time_choice(op, cfg):
    """Seconds of the choice's kernels together, and samples of what the operation computes by them."""
    file, kernels, _ = CHOICES[op]
    calls = []

    def instead(launch, kernel, args, options):
        if kernel in kernels:
            calls.append(partial(launch, *args, **options))
        return launch(*args, **options)

    with caught(instead):
        results = run(file, *case(file, "cuda", cfg))
    results = [bench.kernels.sample(x.detach()) for x in results]
    return sum(bench.kernels.seconds(call)[0] for call in calls), results


def tune(op, cfg, arch):
    """One dict for each candidate, the fastest first; untimed ones last, those that spill least first."""
    first, rows, exact = chosen(op, cfg)[0], [], None
    for choice in candidates(op, cfg):
        row = {"op": op, "choice": choice, "current": choice == first}
        chosen(op, cfg, choice)
        try:
            row |= compile_choice(op, cfg, arch)
            few = row["spills"] <= max(cfg.spills, (rows or [row])[0].get("spills", 0))
            if not cfg.arch and row["fits"] and few:
                row["s"], results = time_choice(op, cfg)
                exact = exact or results  # of the current choice, which is the first
                errors = [(a - b).abs().max() / b.abs().max() for a, b in zip(results, exact)]
                row["error"] = torch.stack(errors).max().item()  # NaN if any is
        except Exception as e:  # a shape that the compiler or this GPU refuses: said in the table
            row["failed"] = f"{type(e).__name__}: {e}".splitlines()[0][:160]
        rows.append(row)
        print0(line(row))
    chosen(op, cfg, first)
    return sorted(rows, key=lambda row: (row.get("s", 9), "failed" in row, not row.get("fits"), row.get("spills", 0)))


def line(row):
    time = f"{row['s'] * 1e6:9.1f} us, error {row['error']:.0e}" if "s" in row else "        - us"
    verdict = row.get("failed") or (
        f"{row['registers']:3} registers, {row['spills']:5} bytes spilt, {row['shared']:7} shared"
        + ", does not fit" * (not row["fits"]) + ", wgmma serialised" * row["serialised"])  # fmt: skip
    return f"{row['op']:<12}{str(row['choice']):<24}{time} | {verdict}" + " | CURRENT" * row["current"]


def main(cfg):
    if unknown := [op for op in cfg.ops if op not in CHOICES]:
        die(f"--ops {unknown[0]}: it is one of {', '.join(CHOICES)}")
    if cfg.values and len(cfg.ops) != 1:
        die("--values are for one op: name it with --ops")
    if not cfg.arch and not torch.cuda.is_available():
        die("there is no GPU to time on; --arch sm_90 (or sm_80) only compiles")
    if cfg.arch not in ("", "sm_90", "sm_80"):
        die(f"--arch {cfg.arch}: it is sm_90 or sm_80")
    if cfg.arch:
        arch = int(cfg.arch[3:])
        pretend(arch)
    else:
        arch = int("%d%d" % torch.cuda.get_device_capability())
    bench.kernels.CFG = bench.kernels.Config(repeats=cfg.repeats)
    launch_for_meta_tensors()
    name = cfg.arch or torch.cuda.get_device_name().replace(" ", "-")
    about = {"compiled_for": f"sm_{arch}", "hardware": hardware(), "torch": torch.__version__,
             "triton": triton.__version__, "commit": git_commit(), "config": vars(cfg)}  # fmt: skip
    rows = []
    for op in cfg.ops:
        print0(f"\n{op}: {', '.join(CHOICES[op][2])}")
        found = tune(op, cfg, arch)
        print0(f"\n{op}, " + ("fewest spills first; nothing was timed" if cfg.arch else "fastest first"))
        print0("\n".join(line(row) for row in found))
        right = [row for row in found if "s" in row and row["error"] <= WRONG]
        if right:
            print0(f"\nfor kernels/{CHOICES[op][0]}.py:\n{chosen(op, cfg, right[0]['choice'])[1]}")
        rows += found
        if cfg.out:  # after every op: a later one may be stopped
            with atomic_file(f"{cfg.out}-{name}.json") as f:
                json.dump(about | {"rows": rows}, f, indent=1)


if __name__ == "__main__":
    main(parse_config(Config))
