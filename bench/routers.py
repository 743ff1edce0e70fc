"""
Routers in the miniature, on teachers that one language has several of: who routes how well, and at what cost?

The recipe's teachers are one per cluster of languages, so a fixed teacher per language is all there is to find. Here four
specialists share the languages by what they know: numbers in words (`spell`) or amounts and times (`unit`, `relative`), of the
western or the eastern half. Which one to ask can be read off the prompt. Right answers are counted against the references,
which no router reads.

python bench/routers.py --seeds 0 1 2   # trains up to the reward model for each seed (recipe.py --until rm), then the specialists
"""

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # instead of bench/, whose mini.py would hide the folder mini/
from common import atomic_file, git_commit, hardware, parse_config  # noqa: E402
from guards import GUARDS  # noqa: E402
from languages import CLUSTERS  # noqa: E402
from mini.items import rows as mini_rows  # noqa: E402
from pool import sample_of  # noqa: E402
from pool_report import choices, split  # noqa: E402
from routers import Picks, make_table  # noqa: E402
from rows import RowsOnDisk, read_rows, write_rows  # noqa: E402
from tasks.mini import normal  # noqa: E402


@dataclass
class Config:
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])  # of the base, the reward model and the specialists
    out: str = "out/bench-mini"  # runs of the recipe are at OUT-<seed>; what is finished there is not repeated
    scored: int = 60  # prompts per language that all four answer, for fixed and learned
    results: str = "bench/results/routers"  # .json and .md are written


HALVES = {"west": ("western", "eastern"), "east": ("mideast", "asian")}
SKILLS = {"numbers": ("spell",), "amounts": ("unit", "relative")}


def run(*words):
    subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=True)


def specialists(out, seed):
    """Trains the four, from the base of the run `out`: -> their folders."""
    folders = []
    for skill, tasks in SKILLS.items():
        data = out / "routers" / f"{skill}.jsonl"
        write_rows(data, [r for r in read_rows(out / "data" / "base.jsonl", "sft") if r["id"].split("-")[0] in tasks])
        for half, clusters in HALVES.items():
            folder = out / "routers" / f"{half}-{skill}"
            if not folder.exists():
                run("train_sft.py", "--model", out / "base", "--data", data, "--out", folder, "--seed", seed, "--max_steps", 150,
                    "--lr", "2e-3", "--languages", *dict.fromkeys(l for c in clusters for l in CLUSTERS[c]))
            folders.append(folder)
    return folders


def right_answers(path, scored, references, seed):
    """
    A run's completions -> {router: share of right answers}, and an oracle's, on the prompts that the routers were not fitted
    on: the same ones that report.json compares them on.
    """
    files = [RowsOnDisk(path)]
    table, _ = make_table(files, GUARDS)
    row_of = lambda p, s: files[table.file[p, s]][table.row[p, s]]
    right = np.array([[normal(row_of(p, s)["completion"]) == references[name] for s in range(len(table.owner))]
                      for p, name in enumerate(table.ids)])
    fit, test = split(table, sample_of(table.languages, scored))
    picks, prompt_of = Picks(table.teachers, seed=seed), lambda p: row_of(p, 0)["prompt"]
    picks.fit(table, fit, prompt_of)
    rows = np.arange(len(right))
    found = {name: float(((slots >= 0) & right[rows, slots])[test].mean())
             for name, (slots, _) in choices(table, picks, prompt_of).items()}
    return found | {"oracle": float(right.any(1)[test].mean())}


def main(cfg):
    runs = []
    references = {r["id"]: normal(r["reference"]) for r in mini_rows("prefer")}
    for seed in cfg.seeds:
        out = Path(f"{cfg.out}-{seed}")
        run("recipe.py", "--controls", "--seed", seed, "--out", out, "--until", "rm")
        teachers = specialists(out, seed)
        run("arbitrage.py", "--prompts", out / "data" / "arbitrage.jsonl", "--teachers", *teachers, "--reward_model", out / "rm",
            "--audit", out / "rm-pairs" / "audit.jsonl", "--scored", cfg.scored, "--seed", seed, "--out", out / "routers" / "out")
        report = json.loads((out / "routers" / "out" / "report.json").read_text(encoding="utf-8"))
        routers = {name: {key: r[key] for key in ("reward", "win_rate", "completions", "tokens", "routed")}
                   for name, r in report["routers"].items()}
        right = right_answers(out / "routers" / "out" / "completions.jsonl", cfg.scored, references, seed)
        runs.append({"seed": seed, "compared": report["compared"], "routers": routers, "right": right})
    spread = lambda values, digits=1, scale=100: f"{scale * statistics.fmean(values):.{digits}f} ± " + (
        f"{scale * statistics.stdev(values):.{digits}f}" if len(values) > 1 else "-")
    lines = ["| router | right answers, % | mean reward | win rate by the Arbiter, % | completions a prompt |", "|---|---|---|---|---|",
             f"| oracle (sees the references) | {spread([r['right']['oracle'] for r in runs])} | | | 4 |"]
    for name in runs[0]["routers"]:
        of = [r["routers"][name] for r in runs]
        lines.append(f"| {name} | {spread([r['right'][name] for r in runs])} | {spread([o['reward'] for o in of], 2, 1)} | "
                     f"{spread([o['win_rate'][0] for o in of])} | "
                     f"{statistics.fmean(o['completions'] / r['compared']['prompts'] for o, r in zip(of, runs)):.0f} |")
    lines += ["", f"Four specialists; {runs[0]['compared']['prompts']} prompts, {cfg.scored} others a language scored first; seeds "
              f"{' '.join(map(str, cfg.seeds))}; `python bench/routers.py --seeds {' '.join(map(str, cfg.seeds))}` at commit "
              f"{git_commit()}, {hardware()}."]
    with atomic_file(cfg.results + ".json") as f:
        json.dump(runs, f, indent=1)
    with atomic_file(cfg.results + ".md") as f:
        f.write("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main(parse_config(Config))
