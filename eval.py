"""
Evaluation: runs benchmarks of tasks/ on checkpoints, per language, and writes what was scored and how.

python eval.py --model out/mini/final --tasks mini --data out/mini/data --out out/my-eval
python eval.py --model out/mini/final --tasks mini --data out/mini/data --out out/my-eval --baseline out/mini/eval/sft

OUT holds results.json ({"results": {task: {language or "all": {metric: value, metric_stderr, n}}}}), samples_<task>.jsonl,
table.md and report.html; with several models OUT/<model's folder name> each, and one table.md and report.html of all in OUT.
--baseline takes result folders of earlier evaluations, or .jsonl files of completion rows (as generate.py writes them, with the
samples' ids): what win rates are judged against, under the folder's or file's name. Where exact answers do not decide, --judge
names who does (judge.py).

A module of tasks/ serves the benchmarks named in its TASKS by four functions:

    read(task, cfg)                     -> items: dicts with id, language, question (what the languages share), and the rest
    run(task, model, chat, items, cfg)  -> a sample for each item: what the model said or scored; on all ranks together
    finish(task, samples, baselines, cfg, device) -> the samples, judged; the model is gone by then (a module may lack it)
    summarise(task, samples, baselines, cfg) -> {language or "all": {metric: value, metric_stderr: value, "n": n}}

and SETTINGS, the flags that its samples depend on. Every sample is on the disk, in OUT.unfinished/, with a key that knows the
model's weights, the item and these flags: killed and run again, only the rest is computed.
"""

import functools
import hashlib
import json
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

import common
import eval_page
from chat import Chat
from checkpoint import find
from common import atomic_dir, atomic_file, die, init_distributed, parse_config, print0
from model import load
from rows import RowWriter, read_jsonl, write_rows
from run import files_fingerprint
from tasks import choice, flores, mgsm, mini, pairwise, safety

TASKS = {name: module for module in (choice, mgsm, flores, mini, pairwise, safety) for name in module.TASKS}


@dataclass
class Config:
    model: list[str] = field(default_factory=lambda: ["out/mini/online-3"])  # checkpoint; several: one after another
    tasks: list[str] = field(default_factory=lambda: ["mini"])  # which benchmarks
    data: str = "out/mini/data"  # folder with the benchmarks' files (benchmarks.py), or: hub
    languages: list[str] = field(default_factory=list)  # only these (default: all that a benchmark has)
    out: str = "out/mini/eval/online-3"  # folder to write; with several models OUT/<model's folder name>
    baseline: list[str] = field(default_factory=list)  # result folders or .jsonl of completions to judge win rates against
    reward_model: str = ""  # also report the mean reward of the answers
    limit: int = 0  # rows per language at most; 0: all
    shots: int = -1  # worked examples in front of a question, where a benchmark has any; -1: as many as is usual
    batch_tokens: int = 8192  # multiple choice: tokens computed at once; changes no result
    split: str = "devtest"  # FLORES: or dev
    max_new_tokens: int = 0  # longest answer, in tokens; 0: the benchmark's own
    xcomet: str = ""  # FLORES: folder of an xCOMET model, which scores the translations too
    xcomet_scores: str = ""  # FLORES: or a file of its scores, rows with id and score
    items_at_once: int = 4096  # computed between two writes; a kill costs at most so many
    judge: str = ""  # who compares answers: http(s)://host:port/v1#model, or a reward model's folder; "": nobody
    judge_prompt: str = "arena"  # arena: own answer first, five verdicts; aya: two lines, three verdicts
    judge_tokens: int = 4096  # longest reply of the judge, in tokens
    judge_tokenizer: str = ""  # folder of the judge's tokenizer: --dry_run counts with it instead of estimating
    tau: float = 0.0  # a reward model's two rewards that are no further apart are a tie
    strong_weight: int = 1  # a game that is won by far ([[A>>B]]) counts so many times; Arena-Hard: 3
    dry_run: bool = False  # count the judge's calls, tokens and cost, and ask nothing; the answers are kept for the run itself
    price_in: float = 0.0  # of a million tokens that the judge reads
    price_out: float = 0.0  # of a million tokens that the judge writes
    threads: int = 16  # judge: requests at once
    timeout: float = 600.0  # judge: seconds for a response
    retries: int = 6  # judge: further tries of a request that failed, after longer and longer waits
    resume: str = "auto"  # auto: go on where the same command stopped; never: start over


def key_of(model, task, item, cfg):
    """What a sample depends on, as a name: weights, benchmark, item, flags."""
    settings = {name: getattr(cfg, name) for name in TASKS[task].SETTINGS}
    return hashlib.sha256(json.dumps([model, task, item, settings], sort_keys=True).encode("utf-8")).hexdigest()[:32]


def samples_of(cfg, task, items, loaded, fingerprint, work):
    """A sample for each item, in order: those that `work` holds, and the rest from the model; loaded() -> (model, its Chat)."""
    file, names = work / f"samples_{task}.jsonl", [key_of(fingerprint, task, item, cfg) for item in items]
    writer = RowWriter(file)
    known = {row["key"]: row["sample"] for row, _ in read_jsonl(file)}
    common.barrier()
    todo = [(name, item) for name, item in zip(names, items) if name not in known]
    for begin in range(0, len(todo), cfg.items_at_once):
        part = todo[begin:begin + cfg.items_at_once]
        made = TASKS[task].run(task, *loaded(), [item for _, item in part], cfg)
        rows = [{"key": name, "sample": sample} for (name, _), sample in zip(part, made)]
        writer.add(rows)
        known |= {row["key"]: row["sample"] for row in rows}
    return [known[name] for name in names]


def read_baselines(cfg, task):
    """--baseline -> {name: rows with id and completion}, for one task. A .jsonl may hold several tasks' rows."""
    files = {Path(b).name.removesuffix(".jsonl"): Path(b) if b.endswith(".jsonl") else Path(b) / f"samples_{task}.jsonl"
             for b in cfg.baseline}
    return {name: [row for row, _ in read_jsonl(file)] for name, file in files.items()}


def evaluate(cfg, path, out, items, device):
    """All tasks of one checkpoint -> {task: table}; the folder appears when they are complete."""
    begin, results, samples = time.time(), {}, {}
    work, fingerprint = out.with_name(out.name + ".unfinished"), files_fingerprint(find(path))
    if common.is_main():
        if cfg.resume == "never":
            shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True, exist_ok=True)
    common.barrier()
    loaded = functools.cache(lambda: (load(path, device=device), Chat(path)))  # only if something is left to compute
    for task in cfg.tasks:
        samples[task] = samples_of(cfg, task, items[task], loaded, fingerprint, work)
    del loaded  # the judge may need its memory
    if device.type == "cuda":
        torch.cuda.empty_cache()
    for task in cfg.tasks:
        baselines = read_baselines(cfg, task)
        if finish := getattr(TASKS[task], "finish", None):
            samples[task] = finish(task, samples[task], baselines, cfg, device)
        if not cfg.dry_run:
            results[task] = TASKS[task].summarise(task, samples[task], baselines, cfg)
    if cfg.dry_run:
        return print0(f"{Path(path).name}: the answers wait in {work}: the same command without --dry_run goes on with them")
    with atomic_dir(out) as folder:
        if common.is_main():
            for task in cfg.tasks:
                write_rows(folder / f"samples_{task}.jsonl", samples[task])
            report = {"model": path, "fingerprint": fingerprint, "commit": common.git_commit(), "hardware": common.hardware(),
                      "seconds": round(time.time() - begin, 2), "config": asdict(cfg), "results": results}
            with atomic_file(folder / "results.json") as f:
                json.dump(report, f, ensure_ascii=False, indent=1)
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
    names_of = [Path(b).name.removesuffix(".jsonl") for b in cfg.baseline]
    if twin := next((name for n, name in enumerate(names_of) if name in names_of[:n]), None):
        die(f"two baselines are called {twin!r}: their win rates would have one name; rename one")
    items = {task: TASKS[task].read(task, cfg) for task in cfg.tasks}  # what is missing is said before anything is computed
    for task in cfg.tasks:
        read_baselines(cfg, task)
    folders = {name: Path(cfg.out) / name if len(names) > 1 else Path(cfg.out) for name in names}
    for path, name in zip(cfg.model, names):
        evaluate(cfg, path, folders[name], items, device)
    if common.is_main() and not cfg.dry_run:
        eval_page.write(Path(cfg.out), folders)
        print(f"{' '.join(cfg.tasks)} of {' '.join(names)}: results, samples, table and page are in {cfg.out}")


if __name__ == "__main__":
    main(parse_config(Config))
