"""
Multiple choice beside lm-evaluation-harness's hf backend: tokens computed, CPU time, memory, and the largest difference of any
log-likelihood, in one run on the same weights and texts.

    python -m venv peer && peer/bin/pip install torch==2.13.0 transformers==5.23.0 lm-eval==0.4.13 accelerate
    python bench/eval.py --peer peer/bin/python

The rows are invented and shaped as Global-MMLU: of every subject five examples and some questions with four letters, the
question about 80 tokens. Tokens computed are positions that went through the model, padding
included. A side is a process of its own; its seconds include tokenising, not loading. Memory is what the process held at most
beyond what it held when model and libraries were loaded. lm-eval computes the four letters of a question in one forward too.
"""

import json
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # in place of bench/, whose eval.py would hide ours
from bench._lm_eval import peak  # noqa: E402
from chat import Chat, train_tokenizer  # noqa: E402
from common import atomic_file, die, git_commit, hardware, parse_config, print0  # noqa: E402
from config import Config as ModelConfig  # noqa: E402
from likelihood import score_texts  # noqa: E402
from model import Transformer, load, save  # noqa: E402
from tasks.choice import asked, examples_for  # noqa: E402

BOS = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<BOS_TOKEN>", "type_id": 0}},
                                                {"Sequence": {"id": "A", "type_id": 0}}],
       "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
       "special_tokens": {"<BOS_TOKEN>": {"id": "<BOS_TOKEN>", "ids": [5], "tokens": ["<BOS_TOKEN>"]}}}


@dataclass
class Config:
    peer: str = ""  # Python with lm-eval; without it only ours is measured
    work: str = "out/bench-eval"  # where the checkpoint and the texts go
    subjects: int = 4  # of the invented exam
    questions: int = 25  # of each subject; Global-MMLU has 246 on average
    shots: int = 5  # examples in front of each
    hidden: int = 128  # the model: width
    layers: int = 4  # the model: blocks
    vocab: int = 8192  # the model: rows of its embedding; 64 times the width, as in Aya Expanse 8B
    batch_tokens: int = 2048  # ours: tokens computed at once
    batch_size: int = 8  # lm-eval's rows at once
    repeats: int = 3  # of each side; the least CPU time counts
    threads: int = 1  # of every process
    results: str = "bench/results/eval"  # .json and .md are written
    job: str = ""  # internal: one measurement of ours, described by this file


def invent(cfg):
    """-> (test rows, dev rows) of made-up words, subjects one after another."""
    rng = random.Random(0)
    words = ["".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(1, 4))) for _ in range(900)]
    def row(subject, kind):
        text = lambda low, high: " ".join(rng.choice(words) for _ in range(rng.randint(low, high)))
        return {"subject": subject, "kind": kind, "question": text(10, 60).capitalize() + "?", "answer": rng.choice("ABCD"),
                **{f"option_{x}": text(1, 8) for x in "abcd"}}
    make = lambda kind, n: [row(f"subject {s}", kind) for s in range(cfg.subjects) for _ in range(n)]
    return make("test", cfg.questions), make("dev", cfg.shots)


def prepare(cfg):
    """The checkpoint, and pairs.jsonl: [context, continuation] a line."""
    work = Path(cfg.work)
    shutil.rmtree(work, ignore_errors=True)
    (work / "model").mkdir(parents=True)
    test, dev = invent(cfg)
    texts = [asked(row) for row in test + dev]
    train_tokenizer(texts, 2000, work / "model")
    path = work / "model" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"post_processor": BOS}), encoding="utf-8")
    chat = Chat(work / "model")
    model = Transformer(ModelConfig(
        model_type="cohere", vocab_size=max(cfg.vocab, chat.vocab_size), hidden_size=cfg.hidden,
        intermediate_size=4 * cfg.hidden, num_hidden_layers=cfg.layers, num_attention_heads=cfg.hidden // 16,
        num_key_value_heads=cfg.hidden // 32, logit_scale=0.5, rope_theta=10000.0, max_position_embeddings=4096,
        initializer_range=0.1, bos_token_id=chat.bos, eos_token_id=chat.end, pad_token_id=chat.pad)).init_weights(0)
    save(model, work / "model", source=work / "model")
    examples = examples_for("global_mmlu", test, dev, cfg.shots, "invented")
    with open(work / "pairs.jsonl", "w", encoding="utf-8") as f:
        for row, block in zip(test, examples):
            for letter in "ABCD":
                f.write(json.dumps([block + asked(row), f" {letter}"]) + "\n")


def measure(job):
    """Ours, in a process of its own: what bench/_lm_eval.py measures."""
    torch.set_num_threads(job["threads"])
    model, chat, count = load(job["model"]), Chat(job["model"]), Counter()
    pairs = [json.loads(line) for line in Path(job["pairs"]).read_text(encoding="utf-8").splitlines()]
    before, cpu, wall = peak(), time.process_time(), time.perf_counter()
    found = score_texts(model, chat, pairs, job["batch_tokens"], count)
    measured = {"version": "", "tokens": count["computed"], "asked": count["asked"], "cpu_s": time.process_time() - cpu,
                "wall_s": time.perf_counter() - wall, "before_gb": before, "peak_gb": peak(), "scores": found}
    Path(job["to"]).write_text(json.dumps(measured), encoding="utf-8")


def run_side(cfg, side, **settings):
    """One measurement of ours or lm-eval's in a subprocess."""
    work = Path(cfg.work).resolve()
    job = {"model": str(work / "model"), "pairs": str(work / "pairs.jsonl"), "to": str(work / f"{side}.json"),
           "threads": cfg.threads, "batch_tokens": cfg.batch_tokens, "batch_size": cfg.batch_size, **settings}
    (work / "job.json").write_text(json.dumps(job), encoding="utf-8")
    own = side == "nanoaya"
    command = [sys.executable, str(ROOT / "bench" / "eval.py"), "--job"] if own else [
        cfg.peer, str(ROOT / "bench" / "_lm_eval.py")]
    done = subprocess.run([*command, str(work / "job.json")], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        die(f"{side} failed: {(done.stdout + done.stderr).strip().splitlines()[-1]}")
    return json.loads((work / f"{side}.json").read_text(encoding="utf-8"))


def compare(a, b):
    """(log-likelihood, greedy) of four letters a question, twice -> largest difference; flags, and choices, that differ."""
    chosen = lambda scores: [max(range(4), key=lambda k: scores[i + k][0]) for i in range(0, len(scores), 4)]
    return (max(abs(x - y) for (x, _), (y, _) in zip(a, b)), sum(x != y for (_, x), (_, y) in zip(a, b)),
            sum(x != y for x, y in zip(chosen(a), chosen(b))))


def main(cfg):
    if cfg.job:
        return measure(json.loads(Path(cfg.job).read_text(encoding="utf-8")))
    prepare(cfg)
    sides, runs = ["nanoaya"] + ["lm-eval"] * bool(cfg.peer), {}
    for _ in range(cfg.repeats):  # they take turns, so that a busy minute meets both
        for side in sides:
            runs.setdefault(side, []).append(run_side(cfg, side))
    report = {"command": f"python bench/eval.py{' --peer PYTHON' if cfg.peer else ''}", "commit": git_commit(),
              "hardware": hardware(), "config": {k: v for k, v in vars(cfg).items() if k not in ("peer", "work", "job")}}
    lines = [f"| side | tokens computed | CPU s, least of {cfg.repeats} (median) | memory beyond the model, GB |",
             "|---|---|---|---|"]
    for side, found in runs.items():
        cpu = [run["cpu_s"] for run in found]
        report[side] = {"version": found[0]["version"], "tokens": found[0]["tokens"], "cpu_s": cpu,
                        "wall_s": [run["wall_s"] for run in found],
                        "memory_gb": statistics.median(run["peak_gb"] - run["before_gb"] for run in found)}
        lines.append(f"| {side} {found[0]['version']} | {found[0]['tokens']:,} | {min(cpu):.2f} "
                     f"({statistics.median(cpu):.2f}) | {report[side]['memory_gb']:.3f} |")
    ours = runs["nanoaya"][0]
    small = compare(ours["scores"], run_side(cfg, "nanoaya", batch_tokens=300)["scores"])
    lines += ["", f"{len(ours['scores']):,} log-likelihoods of {len(ours['scores']) // 4} questions; one by one they are "
              f"{ours['asked']:,} tokens. With --batch_tokens 300 the largest difference to these is {small[0]:.1e}, "
              f"{small[2]} choices differ."]
    if cfg.peer:
        worst, greedy, chosen = compare(ours["scores"], runs["lm-eval"][0]["scores"])
        report |= {"difference": worst, "greedy_differ": greedy, "choices_differ": chosen,
                   "tokens_ratio": runs["lm-eval"][0]["tokens"] / ours["tokens"],
                   "cpu_ratio": min(report["lm-eval"]["cpu_s"]) / min(report["nanoaya"]["cpu_s"])}
        lines += ["", f"lm-eval computes {report['tokens_ratio']:.2f} times as many tokens and takes "
                  f"{report['cpu_ratio']:.2f} times the CPU time. Largest difference of a log-likelihood: {worst:.1e}; "
                  f"greedy flags that differ: {greedy}; choices that differ: {chosen}."]
    head = [f"# Multiple choice beside lm-eval\n\n`{report['command']}`, commit {report['commit']}, {report['hardware']}, "
            f"{cfg.threads} thread(s), float32, on a machine that others used too: seconds are rough.\n\n{cfg.subjects} "
            f"subjects, {cfg.questions} questions each, {cfg.shots} examples; model: width {cfg.hidden}, {cfg.layers} blocks, "
            f"vocabulary {cfg.vocab:,}; "
            f"lm-eval's batch_size {cfg.batch_size}, ours --batch_tokens {cfg.batch_tokens}.\n"]
    for suffix, text in ((".json", json.dumps(report, indent=1)), (".md", "\n".join(head + lines))):
        with atomic_file(Path(f"{cfg.results}{suffix}")) as f:
            f.write(text + "\n")
    print0("\n".join(lines))


if __name__ == "__main__":
    main(parse_config(Config))
