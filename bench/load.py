"""
Loading a checkpoint and one forward pass, beside transformers on the same files: seconds, and peak memory.

    python -m venv hf && hf/bin/pip install -r requirements.txt transformers==5.23.0
    hf/bin/python bench/load.py                         # a random model of 1.0 B parameters, Aya Expanse's shape narrowed
    hf/bin/python bench/load.py --model DIR             # or a real folder

Each measurement is a process of its own, after its imports; the two sides take turns and the files are in the page cache
for both. Memory is what came on top of the imports: `resident` counts transformers' mapped pages of the files too, which
the system may take back; `private` counts what it may not.
"""

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import checkpoint  # noqa: E402
from common import atomic_file, git_commit, hardware, parse_config, print0  # noqa: E402
from config import Config as ModelConfig  # noqa: E402
from model import Transformer, load, save  # noqa: E402

SHAPE = dict(model_type="cohere", vocab_size=64_000, hidden_size=2048, num_hidden_layers=16, num_attention_heads=16,
             num_key_value_heads=4, intermediate_size=7168, logit_scale=0.125, eos_token_id=2)  # aya-expanse-8b, narrowed
SIDES = ("nanoaya", "transformers")
SHOWN = {"load_s": "load, s", "load_resident_gb": "peak resident while loading, GB",
         "load_private_gb": "peak private while loading, GB", "forward_s": "forward, s",
         "all_resident_gb": "peak resident with the forward, GB", "all_private_gb": "peak private with the forward, GB"}


@dataclass
class Config:
    model: str = ""  # checkpoint folder (default: a random one is written to `work`, and kept)
    work: str = "out/bench-load"  # where the random checkpoint goes
    tokens: int = 128  # of the forward pass, one row
    repeats: int = 5  # of every measurement
    results: str = "bench/results/load"  # .json and .md are written
    side: str = ""  # internal: one measurement of this side, printed as JSON
    dtype: str = "bfloat16"  # internal: what it loads into


class Peak(threading.Thread):
    """Watches this process's memory every 2 ms, in bytes on top of what it held at the start."""

    def __init__(self):
        super().__init__(daemon=True)
        self.start_at, self.peak, self.done = self.now(), (0, 0), threading.Event()
        self.start()

    @staticmethod
    def now():
        with open("/proc/self/status", encoding="utf-8") as f:
            kb = {line.split(":")[0]: int(line.split()[1]) for line in f if line.startswith(("VmRSS", "RssAnon"))}
        return kb["VmRSS"] * 1024, kb["RssAnon"] * 1024

    def run(self):
        while not self.done.wait(0.002):
            self.look()

    def look(self):
        self.peak = tuple(max(most, x - x0) for most, x, x0 in zip(self.peak, self.now(), self.start_at))

    def gb(self):
        self.look()
        return [x / 1e9 for x in self.peak]


def measure(cfg):
    """One load and one forward of one side -> {"load_s": ..., ..., "logits": a few numbers to compare}."""
    dtype = getattr(torch, cfg.dtype)
    if cfg.side == "transformers":
        from transformers import AutoModelForCausalLM
    torch.ones(300, 300) @ torch.ones(300, 300)  # threads and their buffers are not the model's
    peak, begin = Peak(), time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(cfg.model, dtype=dtype) if cfg.side == "transformers" else load(
        cfg.model, dtype)
    found = {"load_s": time.perf_counter() - begin}
    found["load_resident_gb"], found["load_private_gb"] = peak.gb()
    words = model.config.vocab_size if cfg.side == "transformers" else model.cfg.vocab_size
    ids = torch.randint(0, words, (1, cfg.tokens), generator=torch.Generator().manual_seed(0))
    times = []
    with torch.no_grad():
        for _ in range(3):
            begin = time.perf_counter()
            logits = model(ids)
            times.append(time.perf_counter() - begin)
    logits = logits.logits if cfg.side == "transformers" else logits
    found["forward_s"] = statistics.median(times)
    found["all_resident_gb"], found["all_private_gb"] = peak.gb()
    peak.done.set()
    return found | {"logits": logits[0, -1, :8].tolist()}


def main(cfg):
    if cfg.side:
        return print(json.dumps(measure(cfg)))
    folder = cfg.model or f"{cfg.work}/random-1b"
    if not cfg.model and not Path(folder).exists():
        torch.set_default_dtype(torch.bfloat16)
        checkpoint.write_weights.__defaults__ = (5 * 10**8,)  # five shards, as an 8B model has
        save(Transformer(ModelConfig(**SHAPE)).init_weights(), folder)
        torch.set_default_dtype(torch.float32)
    for path in Path(folder).glob("*.safetensors"):  # into the page cache
        path.read_bytes()
    runs = {}
    for turn in range(cfg.repeats):
        for dtype in ("bfloat16", "float32"):
            for side in SIDES[::1 if turn % 2 else -1]:
                done = subprocess.run([sys.executable, __file__, "--side", side, "--dtype", dtype, "--model", folder,
                                       "--tokens", str(cfg.tokens)], capture_output=True, text=True, check=True)
                runs.setdefault((dtype, side), []).append(json.loads(done.stdout.splitlines()[-1]))
    import transformers
    about = {"model": folder, "bytes": sum(p.stat().st_size for p in Path(folder).glob("*.safetensors")),
             "tokens": cfg.tokens, "repeats": cfg.repeats, "commit": git_commit(), "torch": torch.__version__,
             "transformers": transformers.__version__, "hardware": hardware(), "threads": torch.get_num_threads(),
             "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"), "python": sys.version.split()[0]}
    lines = [f"{about['bytes'] / 1e9:.2f} GB of bfloat16 on disk, {cfg.tokens} tokens, medians of {cfg.repeats} (least to "
             f"most), {about['hardware']}, {about['threads']} threads, torch {about['torch']}, transformers "
             f"{about['transformers']}, commit {about['commit']}", "",
             "| loaded as | what | nanoaya | transformers | ratio |", "|---|---|---|---|---|"]
    for dtype in ("bfloat16", "float32"):
        ours, theirs = (runs[dtype, side] for side in SIDES)
        gap = max(abs(a - b) for a, b in zip(ours[0]["logits"], theirs[0]["logits"]))
        for key, name in SHOWN.items():
            values = [[run[key] for run in side] for side in (ours, theirs)]
            middle = [statistics.median(v) for v in values]
            cells = [f"{m:.2f} ({min(v):.2f} to {max(v):.2f})" for m, v in zip(middle, values)]
            lines.append(f"| {dtype} | {name} | {cells[0]} | {cells[1]} | {middle[1] / max(middle[0], 1e-9):.2f} |")
        lines.append(f"| {dtype} | largest difference of 8 logits (largest: "
                     f"{max(map(abs, theirs[0]['logits'])):.2f}) | {gap:.1e} | | |")
    print0("\n".join(lines))
    with atomic_file(f"{cfg.results}.json") as f:
        json.dump(about | {"runs": {" ".join(key): value for key, value in runs.items()}}, f, indent=1)
    with atomic_file(f"{cfg.results}.md") as f:
        f.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(parse_config(Config))
