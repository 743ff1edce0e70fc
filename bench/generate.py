"""
Tokens a second of generate() beside transformers' generate: same weights, same prompts, same threads, in one run.

    python -m venv peer && peer/bin/pip install -r requirements.txt transformers==5.23.0
    peer/bin/python bench/generate.py                         # CPU, float32, 10 M parameters, some minutes
    peer/bin/python bench/generate.py --vocab 256000 --hidden 4096 --mlp 14336 --heads 32 --kv_heads 8 --layers 32 \\
        --prompt 64 1024 --new 512                            # a GPU: the shape of aya-expanse-8b, random weights

equal: prompts and answers are all the same length; only the step counts. mixed: lengths of prompts are log-uniform, and an
answer ends at any of some stop ids, whose number makes a mean of about a third of --new: what real answers do. Theirs
runs batch by batch, prompts sorted by length, padded on the left, until the last row of a batch has ended; each of its
caches in --caches is tried, the best one is in the table. Tokens behind a row's end and padding are not counted.

The bound: weights, once a step, and each sequence's keys and values, once a token, at the speed at which this machine
copies memory, if every step had as many rows as there are places. Greedy answers are compared token for token.
"""

import dataclasses
import json
import math
import random
import shlex
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import bench.kernels  # noqa: E402
from common import atomic_file, die, git_commit, hardware, parse_config, print0  # noqa: E402
from config import Config as ModelConfig  # noqa: E402
from generate import generate  # noqa: E402
from model import Transformer  # noqa: E402


@dataclass
class Config:
    batches: list[int] = field(default_factory=lambda: [1, 16, 64])  # sequences at a time
    mixes: list[str] = field(default_factory=lambda: ["equal", "mixed"])  # of lengths
    caches: list[str] = field(default_factory=lambda: ["static", "dynamic"])  # of transformers; or "static uncompiled"; none: ours alone
    rounds: int = 4  # prompts, as a multiple of the batch
    repeats: int = 3  # of every measurement, in turns; the median counts
    prompt: list[int] = field(default_factory=lambda: [16, 128])  # shortest and longest prompt, in tokens
    new: int = 256  # longest answer
    temperature: float = 1.0  # of the samples
    top_p: float = 1.0  # likewise
    threads: int = 1  # of the CPU
    vocab: int = 8192  # the model: words
    hidden: int = 256  # the model: width
    mlp: int = 1024  # the model: width of the MLP
    layers: int = 8  # the model: blocks
    heads: int = 8  # the model: heads
    kv_heads: int = 4  # the model: key/value heads
    results: str = "bench/results/generate"  # .json and .md are written; "": nothing is
    seed: int = 0


def make_model(cfg, device):
    config = ModelConfig(
        model_type="cohere", vocab_size=cfg.vocab, hidden_size=cfg.hidden, intermediate_size=cfg.mlp,
        num_hidden_layers=cfg.layers, num_attention_heads=cfg.heads, num_key_value_heads=cfg.kv_heads, logit_scale=0.0625,
        rope_theta=10000.0, max_position_embeddings=cfg.prompt[1] + cfg.new, bos_token_id=5, eos_token_id=6,
        pad_token_id=0, initializer_range=0.02)
    torch.manual_seed(cfg.seed)
    with torch.device(device), torch.no_grad():
        model = Transformer(config)
        model = model.bfloat16() if device == "cuda" else model
        for p in model.parameters():
            if p.ndim >= 2:
                p.normal_(0, config.initializer_range)
    return model.requires_grad_(False)


def make_prompts(cfg, mix, batch):
    rng = random.Random(f"{cfg.seed} {mix}")
    low, high = cfg.prompt
    length = lambda: high if mix == "equal" else round(math.exp(rng.uniform(math.log(low), math.log(high))))
    return [[rng.randrange(8, cfg.vocab) for _ in range(length())] for _ in range(cfg.rounds * batch)]


def ended(ids, stops):
    """How many of these are the answer."""
    return next((n for n, t in enumerate(ids, 1) if t in stops), len(ids))


def ours(cfg, model, prompts, batch, stops, greedy=False):
    made = generate(model, prompts, cfg.new, 0.0 if greedy else cfg.temperature, cfg.top_p, stop_ids=stops, batch_size=batch,
                    seed=cfg.seed)
    return [row[0] for row in made]


def theirs(cfg, peer, prompts, batch, stops, cache, greedy=False):
    """transformers' generate, batch after batch."""
    order, made = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), [None] * len(prompts)
    settings = {"do_sample": False} if greedy else {"do_sample": True, "temperature": cfg.temperature, "top_p": cfg.top_p,
                                                    "top_k": 0}
    for first in range(0, len(order), batch):
        rows = order[first:first + batch]
        longest = max(len(prompts[i]) for i in rows)
        ids = torch.tensor([[0] * (longest - len(prompts[i])) + prompts[i] for i in rows], device=peer.device)
        mask = torch.tensor([[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in rows], device=peer.device)
        out = peer.generate(ids, attention_mask=mask, max_new_tokens=cfg.new, eos_token_id=sorted(stops) or None,
                            pad_token_id=0, cache_implementation=None if cache == "dynamic" else cache.split()[0],
                            disable_compile=cache.endswith("uncompiled"), **settings)
        for i, row in zip(rows, out[:, longest:].tolist()):
            made[i] = row[:ended(row, stops)]
    return made


def bound(model, prompts, answers, batch, copy):
    """Seconds at least: bytes of weights and of keys and values, at `copy` bytes/s (of which half are read)."""
    cfg, size = model.cfg, next(model.parameters()).element_size()
    weights = size * sum(p.numel() for p in model.parameters())
    token = 2 * size * cfg.num_hidden_layers * cfg.num_key_value_heads * cfg.head_dim
    read = sum(token * (n * len(p) + n * (n + 1) / 2) for p, n in zip(prompts, map(len, answers)))
    return (weights * math.ceil(sum(map(len, answers)) / batch) + read) / copy


def main(cfg):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(cfg.threads)
    bench.kernels.CFG = bench.kernels.Config()
    model, peer, versions = make_model(cfg, device), None, {"torch": torch.__version__}
    if cfg.caches:
        try:
            import transformers
        except ImportError:
            die("transformers is not installed; --caches without values times ours alone")
        versions["transformers"] = transformers.__version__
        settings = json.loads(model.cfg.to_json(None, next(model.parameters()).dtype))
        with torch.device(device):
            peer = transformers.AutoModelForCausalLM.from_config(
                transformers.CohereConfig(**settings), dtype=next(model.parameters()).dtype, attn_implementation="sdpa")
        peer.load_state_dict(model.state_dict(), strict=False, assign=True)  # the same memory
        peer.tie_weights()
        peer.eval()
    copy = bench.kernels.ceilings()[0]
    few = make_prompts(cfg, "mixed", 2)
    same = not peer or [ours(cfg, model, few, 8, (), True), theirs(cfg, peer, few, 8, (), "dynamic", True)]
    share = 1.0 if not peer else statistics.fmean(a == b for a, b in zip(*same))
    rows = []
    for mix in cfg.mixes:
        for batch in cfg.batches:
            prompts = make_prompts(cfg, mix, batch)
            stops = set(range(8, 8 + round(3 * cfg.vocab / cfg.new))) if mix == "mixed" else set()
            calls = {"nanoaya": lambda: ours(cfg, model, prompts, batch, stops)} | {
                f"transformers, {cache} cache": lambda cache=cache: theirs(cfg, peer, prompts, batch, stops, cache)
                for cache in cfg.caches}
            found = {who: [] for who in calls}
            for turn in range(cfg.repeats + 1):  # the first is not counted: kernels are compiled, graphs recorded
                for who, call in calls.items():
                    begin = time.perf_counter(), time.process_time()
                    answers = call()
                    if device == "cuda":
                        torch.cuda.synchronize()
                    wall, cpu = time.perf_counter() - begin[0], time.process_time() - begin[1]
                    tokens = sum(map(len, answers))
                    run = {"wall_s": wall, "cpu_s": cpu, "tokens": tokens, "bound_s": bound(model, prompts, answers, batch, copy)}
                    print0(mix, batch, who, f"{tokens} tokens, {wall:.2f} s, {tokens / wall:.0f} tokens/s")
                    if turn:
                        found[who].append(run)
            rows += [{"mix": mix, "batch": batch, "who": who, "runs": runs} for who, runs in found.items()]
    about = {"hardware": hardware(), "versions": versions, "commit": git_commit(), "copy_bytes_per_s": copy,
             "parameters": sum(p.numel() for p in model.parameters()), "greedy_equal": share, "config": vars(cfg),
             "command": shlex.join(["python", "bench/generate.py"] + [
                 word for name, value in dataclasses.asdict(cfg).items() if value != getattr(Config(), name) and name != "results"
                 for word in (f"--{name}", *map(str, value if isinstance(value, list) else [value]))])}
    report(cfg, about, rows)


def report(cfg, about, rows):
    """The table, on the terminal and in files."""
    median = lambda row, f: statistics.median(f(run) for run in row["runs"])
    lines = [f"{about['parameters'] / 1e6:.1f} M parameters (Cohere: {cfg.vocab} words, width {cfg.hidden}, {cfg.layers} blocks), "
             f"random weights; {about['hardware']}, threads: {cfg.threads}; "
             + ", ".join(f"{k} {v}" for k, v in about["versions"].items()) + f"; commit {about['commit']}; medians of "
             f"{cfg.repeats} runs; prompts of {cfg.prompt[0]} to {cfg.prompt[1]} tokens (equal: {cfg.prompt[1]}), answers of up "
             f"to {cfg.new}; {100 * about['greedy_equal']:.0f} % of greedy answers the same; `{about['command']}`", "",
             "| lengths | batch | who | tokens/s | times theirs | of the bandwidth bound |", "|---" * 6 + "|"]
    for mix in cfg.mixes:
        for batch in cfg.batches:
            here = [row for row in rows if (row["mix"], row["batch"]) == (mix, batch)]
            rate = {row["who"]: median(row, lambda run: run["tokens"] / run["wall_s"]) for row in here}
            best = max((r for who, r in rate.items() if who != "nanoaya"), default=None)
            for row in here:
                times = f"{rate['nanoaya'] / best:.2f}" if best and row["who"] == "nanoaya" else "-"
                share = 100 * median(row, lambda run: run["bound_s"] / run["wall_s"])
                lines.append(f"| {mix} | {batch} | {row['who']} | {rate[row['who']]:.0f} | {times} | {share:.0f} % |")
    print0("\n".join(lines))
    if cfg.results:
        with atomic_file(f"{cfg.results}.json") as f:
            json.dump(about | {"rows": rows}, f)
        with atomic_file(f"{cfg.results}.md") as f:
            f.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(parse_config(Config))
