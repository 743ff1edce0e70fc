"""
Evaluation: runs benchmarks of tasks/ on checkpoints, per language, and writes what was scored and how.

python eval.py --model out/mini/final --tasks mini --data out/mini/data --out out/my-eval
python eval.py --model out/mini/final --tasks mini --data out/mini/data --out out/my-eval --baseline out/mini/eval/sft

OUT holds results.json ({"results": {task: {language or "all": {metric: value, metric_stderr, n}}}}), samples_<task>.jsonl,
table.md and report.html; with several models OUT/<model's folder name> each, and one table.md and report.html of all in OUT.
--baseline takes result folders of earlier evaluations; their samples are what win rates are judged against, under the folder's
name.

A module of tasks/ serves the benchmarks named in its TASKS by four functions:

    read(task, cfg)                     -> items: dicts with id, language, question (what the languages share), and the rest
    run(task, model, chat, items, cfg)  -> a sample for each item: what the model said or scored; on all ranks together
    finish(task, samples, cfg, device)  -> the samples, judged; the model is gone by then (a module may lack it)
    summarise(task, samples, baselines, cfg) -> {language or "all": {metric: value, metric_stderr: value, "n": n}}

and SETTINGS, the flags that its samples depend on. Every sample is on the disk, in OUT.unfinished/, with a key that knows the
model's weights, the item and these flags: killed and run again, only the rest is computed.
"""

import hashlib
import json
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

import common
import eval_page
from chat import Chat
from checkpoint import find
from common import atomic_dir, die, init_distributed, parse_config, print0
from model import load
from rows import RowWriter, read_jsonl, write_rows
from run import files_fingerprint
from tasks import mini

TASKS = {name: module for module in (mini,) for name in module.TASKS}


@dataclass
class Config:
    model: list[str] = field(default_factory=lambda: ["out/mini/online-3"])  # checkpoint; several: one after another
    tasks: list[str] = field(default_factory=lambda: ["mini"])  # which benchmarks
    data: str = "out/mini/data"  # folder with the benchmarks' files (benchmarks.py), or: hub
    languages: list[str] = field(default_factory=list)  # only these (default: all that a benchmark has)
    out: str = "out/mini/eval/online-3"  # folder to write; with several models OUT/<model's folder name>
    baseline: list[str] = field(default_factory=list)  # result folders to judge win rates against
    reward_model: str = ""  # also report the mean reward of the answers
    limit: int = 0  # rows per language at most; 0: all
    items_at_once: int = 4096  # computed between two writes; a kill costs at most so many
    resume: str = "auto"  # auto: go on where the same command stopped; never: start over


def key_of(model, task, item, cfg):
    """What a sample depends on, as a name: weights, benchmark, item, flags."""
    settings = {name: getattr(cfg, name) for name in TASKS[task].SETTINGS}
    return hashlib.sha256(json.dumps([model, task, item, settings], sort_keys=True).encode("utf-8")).hexdigest()[:32]


def samples_of(cfg, task, items, path, fingerprint, work, device):
    """A sample for each item, in order: those that `work` holds, and the rest from the model, which is loaded if needed."""
    file, names = work / f"samples_{task}.jsonl", [key_of(fingerprint, task, item, cfg) for item in items]
    writer = RowWriter(file)
    known = {row["key"]: row["sample"] for row, _ in read_jsonl(file)}
    common.barrier()
    todo = [(name, item) for name, item in zip(names, items) if name not in known]
    if todo:
        model, chat = load(path, device=device), Chat(path)
    for begin in range(0, len(todo), cfg.items_at_once):
        part = todo[begin:begin + cfg.items_at_once]
        made = TASKS[task].run(task, model, chat, [item for _, item in part], cfg)
        rows = [{"key": name, "sample": sample} for (name, _), sample in zip(part, made)]
        writer.add(rows)
        known |= {row["key"]: row["sample"] for row in rows}
    return [known[name] for name in names]


def evaluate(cfg, path, out, items, device):
    """All tasks of one checkpoint -> {task: table}; the folder appears when they are complete."""
    begin, results, samples = time.time(), {}, {}
    work, fingerprint = out.with_name(out.name + ".unfinished"), files_fingerprint(find(path))
    if common.is_main():
        if cfg.resume == "never":
            shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True, exist_ok=True)
    common.barrier()
    for task in cfg.tasks:
        samples[task] = samples_of(cfg, task, items[task], path, fingerprint, work, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with atomic_dir(out) as folder:
        for task in cfg.tasks:
            baselines = {Path(b).name: [row for row, _ in read_jsonl(Path(b) / f"samples_{task}.jsonl")] for b in cfg.baseline}
            if finish := getattr(TASKS[task], "finish", None):
                samples[task] = finish(task, samples[task], cfg, device)
            results[task] = TASKS[task].summarise(task, samples[task], baselines, cfg)
            if common.is_main():
                write_rows(folder / f"samples_{task}.jsonl", samples[task])
        if common.is_main():
            report = {"model": path, "fingerprint": fingerprint, "commit": common.git_commit(), "hardware": common.hardware(),
                      "seconds": round(time.time() - begin, 2), "results": results}
            (folder / "results.json").write_text(json.dumps(report, ensure_ascii=False, indent=1), encoding="utf-8")
    if common.is_main():
        shutil.rmtree(work)
    for task, table in results.items():
        overall = table["all"]
        metrics = " | ".join(f"{k} {v:.3f}" for k, v in overall.items()
                             if isinstance(v, float) and not k.endswith("_stderr"))
        print0(f"{Path(path).name}, {task}: {metrics} | n {overall['n']} | {time.time() - begin:.1f} s")
    return results


def main(cfg):
    device = init_distributed()
    if unknown := [t for t in cfg.tasks if t not in TASKS]:
        die(f"unknown task {unknown[0]!r}; known: {' '.join(TASKS)}")
    names = [Path(path).name for path in cfg.model]
    if twin := next((name for n, name in enumerate(names) if name in names[:n]), None):
        die(f"two models are called {twin!r}: their results would have one folder; evaluate them one by one")
    items = {task: TASKS[task].read(task, cfg) for task in cfg.tasks}  # what is missing is said before anything is computed
    folders = {name: Path(cfg.out) / name if len(names) > 1 else Path(cfg.out) for name in names}
    for path, name in zip(cfg.model, names):
        evaluate(cfg, path, folders[name], items, device)
    if common.is_main():
        eval_page.write(Path(cfg.out), folders)


if __name__ == "__main__":
    main(parse_config(Config))
