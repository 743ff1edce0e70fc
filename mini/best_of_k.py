"""
Can preference training help? Best of K by the reward model beside greedy, on an online round's own samples.

If the sample that the reward model likes best is not right more often than greedy decoding, DPO on its choices has
nothing true to learn: mend the reward model, not DPO. The references read here are never read by training.

python -m mini.best_of_k --completions out/mini/online-1-west/completions-1.jsonl out/mini/online-1-east/completions-1.jsonl
"""

import json
import statistics
from dataclasses import dataclass, field

from common import atomic_file, parse_config, print0
from data import read_jsonl, read_rows
from tasks.mini import normal


@dataclass
class Config:
    completions: list[str] = field(default_factory=list)  # completion files of a round: reward and sample in every row
    references: str = "out/mini/data/references.jsonl"  # right answers, by id
    out: str = ""  # write the numbers there as JSON


def measure(completions, references):
    """
    Completion rows (sample "greedy" or a number), {id: reference} -> means over prompts: greedy, sample (a random one),
    best_of_k, worst_of_k and oracle are shares of right answers; reward_greedy, reward_mean and reward_best are rewards.
    """
    groups = {}
    for row in completions:
        groups.setdefault((row["id"]), []).append((row["sample"], normal(row["completion"]) == references[row["id"]], row["reward"]))
    columns = {k: [] for k in ("greedy", "sample", "best_of_k", "worst_of_k", "oracle", "reward_greedy", "reward_mean", "reward_best")}
    for group in groups.values():
        sampled = [(reward, right) for sample, right, reward in group if sample != "greedy"]
        greedy = [(reward, right) for sample, right, reward in group if sample == "greedy"]
        for name, value in (("sample", statistics.fmean(right for _, right in sampled)),
                            ("best_of_k", max(sampled, key=lambda s: s[0])[1]), ("worst_of_k", min(sampled, key=lambda s: s[0])[1]),
                            ("oracle", any(right for _, right in sampled)), ("reward_mean", statistics.fmean(r for r, _ in sampled)),
                            ("reward_best", max(r for r, _ in sampled)), *((("greedy", greedy[0][1]), ("reward_greedy", greedy[0][0]))
                                                                          if greedy else ())):
            columns[name].append(float(value))
    return {name: statistics.fmean(values) for name, values in columns.items() if values} | {"prompts": len(groups)}


def main(cfg):
    references = {r["id"]: normal(r["reference"]) for r in read_rows(cfg.references, "prompts")}
    found = measure([row for path in cfg.completions for row, _ in read_jsonl(path)], references)
    if cfg.out:
        with atomic_file(cfg.out) as f:
            json.dump(found, f, indent=1)
    print0(" | ".join(f"{k} {v:.3f}" for k, v in found.items() if k != "prompts") + f" | {found['prompts']} prompts")


if __name__ == "__main__":
    main(parse_config(Config))
