"""
Can preference training help? Best of K by the reward model beside greedy, on an online round's own samples.

If the sample that the reward model likes best is not right more often than greedy decoding, DPO on its choices has
nothing true to learn: mend the reward model, not DPO. The references read here are never read by training.

python -m mini.best_of_k --completions out/mini/online-1-*/completions-1.jsonl
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
    best_of_k, worst_of_k and oracle are shares of right answers; reward_greedy, reward_mean and reward_best are
    rewards.
    """
    groups = {}
    for row in completions:
        right = float(normal(row["completion"]) == references[row["id"]])
        groups.setdefault(row["id"], []).append((row["sample"], row["reward"], right))
    columns = {k: [] for k in ("greedy", "sample", "best_of_k", "worst_of_k", "oracle",
                               "reward_greedy", "reward_mean", "reward_best")}
    for group in groups.values():
        greedy = [(reward, right) for sample, reward, right in group if sample == "greedy"]
        sampled = [(reward, right) for sample, reward, right in group if sample != "greedy"]
        by_reward = lambda s: s[0]
        best, worst = max(sampled, key=by_reward), min(sampled, key=by_reward)
        found = {"sample": statistics.fmean(right for _, right in sampled), "best_of_k": best[1],
                 "worst_of_k": worst[1], "oracle": max(right for _, right in sampled),
                 "reward_mean": statistics.fmean(reward for reward, _ in sampled), "reward_best": best[0]}
        if greedy:
            found["reward_greedy"], found["greedy"] = greedy[0]
        for name, value in found.items():
            columns[name].append(value)
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
