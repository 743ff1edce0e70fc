"""
Every method of merge.py beside mergekit 0.1.5, and beside a plain copy of the same bytes, on the same files in one run.

    python -m venv mk && mk/bin/pip install torch==2.13.0 mergekit==0.1.5
    python bench/merge.py --mergekit mk/bin/mergekit-yaml

Three models of 0.5 B parameters and their base, bf16, four shards each: aya-expanse-8b with every width divided by
four, named as Llama, since mergekit 0.1.5 refuses Cohere models without q_norm. Each measurement is a whole process
with the files in the page cache: wall and CPU seconds and peak resident memory, imports included. The copy reads every
byte that the linear merge reads, and writes and fsyncs as many as that writes, with as many threads, in chunks of 1 MB;
beside it stand the seconds that the merge itself took, without imports. mergekit computes TIES and DARE-TIES in bf16
unless told otherwise, which elects wrong signs; both of its settings are timed.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import checkpoint  # noqa: E402
from common import atomic_dir, atomic_file, git_commit, hardware, parse_config, print0  # noqa: E402

HIDDEN, MLP, LAYERS, HEADS, KV, VOCAB = 1024, 3584, 32, 16, 4, 64_000
D = HIDDEN // HEADS
BLOCK = {"self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KV * D, HIDDEN), "self_attn.v_proj": (KV * D, HIDDEN),
         "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (MLP, HIDDEN), "mlp.up_proj": (MLP, HIDDEN),
         "mlp.down_proj": (HIDDEN, MLP), "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,)}
SHAPES = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)} | {
    f"model.layers.{i}.{name}.weight": shape for i in range(LAYERS) for name, shape in BLOCK.items()}
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": VOCAB, "hidden_size": HIDDEN,
          "intermediate_size": MLP, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV,
          "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16"}
# name: (our flags, mergekit's method, models, parameters, computed in)
RUNS = {"linear": ([], "linear", 3, {}, "bfloat16"), "slerp": (["--t", "0.5"], "slerp", 2, {"t": 0.5}, "bfloat16"),
        "ties": (["--density", "0.5"], "ties", 3, {"density": 0.5}, "bfloat16"),
        "ties, fp32": (["--density", "0.5"], "ties", 3, {"density": 0.5}, "float32"),
        "dare_ties": (["--density", "0.5"], "dare_ties", 3, {"density": 0.5}, "bfloat16"),
        "dare_ties, fp32": (["--density", "0.5"], "dare_ties", 3, {"density": 0.5}, "float32")}


@dataclass
class Config:
    work: str = "out/bench-merge"  # where the checkpoints and the merges go
    mergekit: str = ""  # mergekit-yaml of another virtual environment; without it only ours and the copy are timed
    runs: list[str] = field(default_factory=lambda: list(RUNS))  # which rows
    repeats: int = 3  # of ours and of the copy
    mergekit_repeats: int = 1  # of mergekit: minutes each
    results: str = "bench/results/merge"  # .json and .md are written


def make(work):
    """base, m0, m1, m2: N(0, 0.02) and that plus N(0, 0.002); norm weights 1."""
    for name in ("base", "m0", "m1", "m2"):
        if (work / name).exists():
            continue
        with atomic_dir(work / name) as folder:
            def tensor(key):
                at = list(SHAPES).index(key)
                draw = lambda seed: torch.randn(SHAPES[key], generator=torch.Generator().manual_seed(seed))
                x = torch.ones(SHAPES[key]) if "norm" in key else 0.02 * draw(at)
                return x if name == "base" else x + 0.002 * draw(10_000 * int(name[1]) + 1000 + at)
            checkpoint.write_weights(folder, {k: (s, torch.bfloat16) for k, s in SHAPES.items()}, tensor, limit=270 * 10**6)
            (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")


def measure(command, out, env=None):
    """Runs a command that writes the folder `out` -> wall and CPU seconds, peak resident GB; the folder goes."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()  # what earlier runs wrote is not written back during this one
    begin = time.perf_counter()
    peak = {"VmHWM": 0, "RssAnon": 0}
    with open(f"{out}.log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=subprocess.STDOUT,
                                   env=os.environ | (env or {}))
        while True:  # ru_maxrss would count this process too, from which the child was forked
            pid, status, used = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            with open(f"/proc/{process.pid}/status", encoding="utf-8") as f:
                for line in f:
                    if (key := line.split(":")[0]) in peak:
                        peak[key] = max(peak[key], int(line.split()[1]) * 1024)
            time.sleep(0.02)
    found = {"wall_s": time.perf_counter() - begin, "cpu_s": used.ru_utime + used.ru_stime,
             "peak_gb": peak["VmHWM"] / 1e9, "private_gb": peak["RssAnon"] / 1e9}
    if status:
        sys.exit(f"{' '.join(map(str, command))} failed:\n" + Path(f"{out}.log").read_text(encoding="utf-8")[-2000:])
    if (report := Path(out) / "merge_report.json").exists():
        found["streaming_s"] = json.loads(report.read_text(encoding="utf-8"))["streaming_seconds"]
    shutil.rmtree(out)
    return found


def copy(sources, target, threads):
    """Reads the files of all `sources`, and writes those of the first one to `target`, fsync included -> seconds."""
    def one(job):
        path, begin, to = job
        data, fd = bytearray(1 << 20), os.open(path, os.O_RDONLY)
        n = os.preadv(fd, [data], begin)
        os.close(fd)
        if to is not None:
            os.pwrite(to, memoryview(data)[:n], begin)

    shutil.rmtree(target, ignore_errors=True)  # of a run that was interrupted
    target.mkdir(parents=True)
    begin, jobs, open_files = time.perf_counter(), [], []
    for path in sorted(sources[0].glob("*.safetensors")):
        open_files.append(os.open(target / path.name, os.O_WRONLY | os.O_CREAT))
        for at in range(0, path.stat().st_size, 1 << 20):
            jobs += [(source / path.name, at, open_files[-1] if source == sources[0] else None) for source in sources]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, jobs))
    for fd in open_files:
        os.fsync(fd)
        os.close(fd)
    seconds = time.perf_counter() - begin
    shutil.rmtree(target)
    os.sync()
    return seconds


def mergekit_config(work, path, method, models, parameters, dtype):
    """The same merge for mergekit, as JSON, which is YAML."""
    names = [str((work / f"m{i}").resolve()) for i in range(models)]
    each = {} if method == "slerp" else {"weight": 1.0} | parameters
    config = {"merge_method": method, "dtype": dtype, "out_dtype": "bfloat16",
              "models": [{"model": name, "parameters": each} if each else {"model": name} for name in names]}
    if method == "slerp":
        config |= {"base_model": names[0], "parameters": parameters}
    elif method != "linear":
        config |= {"base_model": str((work / "base").resolve())}
    path.write_text(json.dumps(config), encoding="utf-8")


def main(cfg):
    work, found = Path(cfg.work), {}
    work.mkdir(parents=True, exist_ok=True)
    make(work)
    for path in work.glob("*/*.safetensors"):  # into the page cache
        with open(path, "rb", buffering=0) as f:
            while f.read(1 << 24):
                pass
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    threads = min(8, os.cpu_count())
    for turn in range(max(cfg.repeats, cfg.mergekit_repeats)):
        if turn < cfg.repeats:
            models = [work / f"m{i}" for i in range(3)]
            found.setdefault("copy", []).append(
                {"all_s": copy(models, work / "copied", threads), "one_s": copy(models[:1], work / "copied", threads)})
        for name in cfg.runs:
            flags, method, K, parameters, dtype = RUNS[name]
            base = ["--base", work / "base"] if method in ("ties", "dare_ties") else []
            if turn < cfg.repeats and dtype == "bfloat16":
                found.setdefault(f"nanoaya {name}", []).append(measure(
                    [sys.executable, Path(__file__).parents[1] / "merge.py", "--method", method, *flags, *base, "--models",
                     *(work / f"m{i}" for i in range(K)), "--out", work / "ours"], work / "ours"))
            if cfg.mergekit and turn < cfg.mergekit_repeats:
                mergekit_config(work, work / "mergekit.yaml", method, K, parameters, dtype)
                found.setdefault(f"mergekit {name}", []).append(measure(
                    [cfg.mergekit, work / "mergekit.yaml", work / "theirs", "--no-copy-tokenizer", "--no-write-model-card",
                     "--random-seed", "0", "--quiet"], work / "theirs", offline))
            print0(turn, name, {k: round(v, 2) for side in ("nanoaya", "mergekit") for k, v in
                                (found.get(f"{side} {name}") or [{}])[-1].items()})

    middle = lambda row, key: statistics.median(run[key] for run in found[row])
    about = {"parameters": sum(map(lambda s: torch.Size(s).numel(), SHAPES.values())), "repeats": cfg.repeats,
             "mergekit_repeats": cfg.mergekit_repeats, "commit": git_commit(), "torch": torch.__version__,
             "mergekit": "0.1.5", "hardware": hardware(), "threads": threads, "python": sys.version.split()[0]}
    lines = [f"base and models of {about['parameters'] / 1e9:.3f} B parameters, bf16, four shards; medians of {cfg.repeats} "
             f"(mergekit: {cfg.mergekit_repeats}); {about['hardware']}; torch {about['torch']}, mergekit 0.1.5; commit "
             f"{about['commit']}", "",
             "| | wall, s: nanoaya | mergekit | ratio | CPU, s: nanoaya | mergekit | peak, GB: nanoaya | mergekit | "
             "merge alone, s | / copy |", "|---" * 10 + "|"]
    for name in cfg.runs:
        ours, theirs = f"nanoaya {name.split(',')[0]}", f"mergekit {name}"
        if ours not in found:
            continue
        cell = lambda key, form: [format(middle(ours, key), form), format(middle(theirs, key), form) if theirs in found else "-"]
        wall, cpu, peak = cell("wall_s", ".1f"), cell("cpu_s", ".1f"), cell("peak_gb", ".2f")
        ratio = f"{middle(theirs, 'wall_s') / middle(ours, 'wall_s'):.1f}" if theirs in found else "-"
        alone = middle(ours, "streaming_s")
        lines.append(f"| {name} | {' | '.join(wall)} | {ratio} | {' | '.join(cpu)} | {' | '.join(peak)} | {alone:.2f} | "
                     f"{alone / middle('copy', 'all_s'):.2f} |")
    lines += ["", f"copy: reading three models and writing one {middle('copy', 'all_s'):.2f} s, reading and writing one "
                  f"{middle('copy', 'one_s'):.2f} s; fsync included in these and in the merges"]
    print0("\n".join(lines))
    with atomic_file(f"{cfg.results}.json") as f:
        json.dump(about | {"runs": found}, f, indent=1)
    with atomic_file(f"{cfg.results}.md") as f:
        f.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(parse_config(Config))
