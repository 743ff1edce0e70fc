"""
The miniature over several seeds: README's table of results, mean and spread.

python bench/mini.py --seeds 0 1 2  # runs recipe.py --controls for each seed, writes bench/results/mini.{json,md}
"""

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import atomic_file, parse_config  # noqa: E402


@dataclass
class Config:
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])  # one run of the recipe for each
    out: str = "out/bench-mini"  # runs are written to OUT-<seed>; finished ones are not repeated
    results: str = "bench/results/mini"  # .json and .md are appended


def spread(values, digits=1, scale=100):
    """Mean and sample standard deviation: "61.2 ± 0.8"."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{scale * statistics.fmean(values):.{digits}f} ± {scale * deviation:.{digits}f}"


def table(runs):
    """Runs' results.json -> markdown: stages, arbitrage, rounds, claims; every cell is mean ± deviation over seeds."""
    stages = [s["name"] for s in runs[0]["stages"]]
    at = lambda run, name: next(s for s in run["stages"] if s["name"] == name)
    lines = ["| stage | exact match | chrF++ | win rate against SFT | win rate against the best teacher | seconds |",
             "|---|---|---|---|---|---|"]
    for name in stages:
        s = [at(run, name) for run in runs]
        lines.append(f"| {name} | {spread([x['exact_match'] for x in s])} | "
                     f"{spread([x['chrfpp'] for x in s], scale=1)} | "
                     f"{spread([x['win_rate']['sft'][0] for x in s])} | "
                     f"{spread([x['win_rate']['best_teacher'][0] for x in s])} | "
                     f"{statistics.fmean(x['seconds'] for x in s):.0f} |")
    lines += ["", "| arbitrage data | right answers |", "|---|---|"]
    accuracies = [run["arbitrage"]["accuracy"] for run in runs]
    for name, key in (("best single teacher", "best_single"), ("random routing", "random"), ("fixed routing", "fixed"),
                      ("learned routing", "learned"), ("routed by the reward model", "routed"), ("oracle (sees the references)", "oracle")):
        lines.append(f"| {name} | {spread([a[key] for a in accuracies])} |")
    lines += ["",
              "| online round | greedy | best of 8 by the reward model | oracle of 8 | reward before | reward after |",
              "|---|---|---|---|---|---|"]
    for i in range(len(runs[0]["rounds"])):
        r = [run["rounds"][i] for run in runs]
        right = [spread([x[k] for x in r]) for k in ("greedy", "best_of_k", "oracle")]
        rewards = [spread([x[k] for x in r], 2, 1) for k in ("reward_before", "reward_after")]
        lines.append(f"| {i + 1} | " + " | ".join(right + rewards) + " |")
    lines += ["", "| claim | holds in | value, by seed |", "|---|---|---|"]
    for i, claim in enumerate(runs[0]["claims"]):
        held = [run["claims"][i] for run in runs]
        values = "; ".join(c["value"] for c in held)
        lines.append(f"| {claim['claim']} | {sum(c['holds'] for c in held)} of {len(runs)} | {values} |")
    seconds, seeds = (" / ".join(str(round(run[key])) for run in runs) for key in ("seconds", "seed"))
    lines += ["", f"Seconds, with the control: {seconds}; seeds {seeds}; {runs[0]['hardware']}; "
                  f"commit {runs[0]['commit']}."]
    return "\n".join(lines) + "\n"


def main(cfg):
    runs = []
    for seed in cfg.seeds:
        out = f"{cfg.out}-{seed}"
        subprocess.run([sys.executable, "recipe.py", "--controls", "--seed", str(seed), "--out", out],
                       cwd=Path(__file__).parent.parent, check=True)
        runs.append(json.loads((Path(out) / "results.json").read_text(encoding="utf-8")))
    with atomic_file(cfg.results + ".json") as f:
        json.dump(runs, f, ensure_ascii=False, indent=1)
    with atomic_file(cfg.results + ".md") as f:
        f.write(table(runs))
    print(table(runs))


if __name__ == "__main__":
    main(parse_config(Config))
