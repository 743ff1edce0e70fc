"""
Evaluation: runs benchmarks of tasks/ on a checkpoint, per language, and writes what was scored and how.

python eval.py --model out/mini/final --tasks mini --data out/mini/data --out out/my-eval
python eval.py --model out/mini/final --tasks mini --data out/mini/data --out out/my-eval --baseline out/mini/eval/sft

--baseline takes result folders of earlier evaluations; their samples are what win rates are judged against, under the
folder's name. OUT holds results.json ({"results": {task: {language or "all": {metric: value, metric_stderr, n}}}}) and
samples_<task>.jsonl.
"""

import json
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import common
from chat import Chat
from common import atomic_dir, die, init_distributed, parse_config, print0
from data import read_jsonl, read_rows, write_rows
from model import load
from reward import load_reward_model
from reward import score as reward_score
from tasks import mini

TASKS = {"mini": mini}


@dataclass
class Config:
    model: list[str] = field(default_factory=lambda: ["out/mini/online-3"])  # checkpoint; several: one after another
    tasks: list[str] = field(default_factory=lambda: ["mini"])  # which benchmarks
    data: str = "out/mini/data"  # folder with the benchmarks' files
    out: str = "out/mini/eval/online-3"  # folder to write; with several models OUT/<model's folder name>
    baseline: list[str] = field(default_factory=list)  # result folders to judge win rates against
    reward_model: str = ""  # also report the mean reward of the answers
    limit: int = 0  # rows per language at most; 0: all


def read_limited(path, limit):
    """Prompt rows of a benchmark file, at most `limit` per language (0: all)."""
    seen, rows = Counter(), []
    for row in read_rows(path, "prompts"):
        seen[row["language"]] += 1
        if not limit or seen[row["language"]] <= limit:
            rows.append(row)
    return rows


def evaluate(cfg, path, out, device, score):
    """All tasks of one checkpoint; the folder appears when they are complete."""
    model, chat = load(path, device=device), Chat(path)
    results, begin = {}, time.time()
    with atomic_dir(out) as folder:
        for task in cfg.tasks:
            baselines = {Path(b).name: [row for row, _ in read_jsonl(Path(b) / f"samples_{task}.jsonl")]
                         for b in cfg.baseline}
            rows = read_limited(Path(cfg.data) / TASKS[task].FILE, cfg.limit)
            samples, results[task] = TASKS[task].run(model, chat, rows, baselines, score)
            if common.is_main():
                write_rows(folder / f"samples_{task}.jsonl", samples)
        if common.is_main():
            report = {"model": path, "commit": common.git_commit(), "hardware": common.hardware(),
                      "seconds": round(time.time() - begin, 2), "results": results}
            (folder / "results.json").write_text(json.dumps(report, ensure_ascii=False, indent=1), encoding="utf-8")
    for task, table in results.items():
        overall = table["all"]
        metrics = " | ".join(f"{k} {v:.3f}" for k, v in overall.items()
                             if isinstance(v, float) and not k.endswith("_stderr"))
        print0(f"{Path(path).name}, {task}: {metrics} | n {overall['n']} | {time.time() - begin:.1f} s")


def main(cfg):
    device = init_distributed()
    if unknown := [t for t in cfg.tasks if t not in TASKS]:
        die(f"unknown task {unknown[0]!r}; known: {' '.join(TASKS)}")
    score = None
    if cfg.reward_model:
        arbiter, chat = load_reward_model(cfg.reward_model, device=device), Chat(cfg.reward_model)
        score = lambda pairs: reward_score(arbiter, chat, pairs)
    for path in cfg.model:
        evaluate(cfg, path, Path(cfg.out) / Path(path).name if len(cfg.model) > 1 else Path(cfg.out), device, score)


if __name__ == "__main__":
    main(parse_config(Config))
