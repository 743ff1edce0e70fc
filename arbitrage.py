"""
Multilingual arbitrage (Odumakinde et al. 2024, https://arxiv.org/abs/2408.14960): no teacher is best in every language,
so a pool of teachers answers every prompt and a reward model, the Arbiter, keeps the best answer.

    sft.jsonl     the routed completion of each prompt: what the student is fine-tuned on
    pairs.jsonl   best against worst of the pool, ties dropped: what offline DPO trains on
    report.json   share of each teacher per language, mean reward of each teacher and of each router

Routers: `reward` keeps the highest reward (the recipe's); `fixed` takes, per language, the teacher with the highest
mean reward on the first --fixed_on prompts; `single` takes the one teacher with the highest mean reward overall;
`random` draws one per prompt. Rewards are compared only within a prompt, except for those means, which compare teachers
on the same prompts.

python arbitrage.py --prompts out/mini/data/arbitrage.jsonl --teachers out/mini/teacher-*/ --out out/my-arbitrage
python arbitrage.py --completions out/mini/arbitrage/completions.jsonl --router random --out out/my-random
"""

import json
import random
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import asking
import common
from chat import Chat
from common import die, parse_config, print0
from data import read_rows, write_rows
from generate import complete
from model import load
from reward import best_against_worst, load_reward_model, preference_row, score, usable

ROUTERS = ("reward", "fixed", "single", "random")


@dataclass
class Config:
    prompts: str = "out/mini/data/arbitrage.jsonl"  # rows with id, language, prompt
    teachers: list[str] = field(default_factory=lambda: [f"out/mini/teacher-{c}" for c in (
        "western", "eastern", "mideast", "asian")])  # the pool: folders, or http(s)://host:port/v1#model (asking.py)
    reward_model: str = "out/mini/rm"  # the Arbiter
    completions: str = ""  # route these completions, sampled and scored before, instead of asking the teachers
    router: str = "reward"  # reward, fixed, single or random
    out: str = "out/mini/arbitrage-run"  # folder to write
    samples: int = 1  # completions per teacher and prompt
    temperature: float = 0.0  # of the samples; 0: greedy
    max_new_tokens: int = 48  # longest completion; a completion that is cut off is never routed
    margin: float = 0.0  # best and worst must be further apart than this to make a pair
    fixed_on: int = 50  # router fixed: prompts per language that choose the teacher
    seed: int = 0


def ask(cfg, rows, device):
    """Every teacher answers every prompt, one teacher in memory at a time: -> completion rows with rewards."""
    done = []
    for teacher in cfg.teachers:
        begin, name = time.time(), teacher.partition("#")[2] if "://" in teacher else Path(teacher).name
        if "://" in teacher:
            done += asking.complete(teacher, rows, asking.journal_of(cfg.out), cfg.max_new_tokens, cfg.temperature,
                                    samples=cfg.samples, seed=cfg.seed)
        else:
            done += complete(load(teacher, device=device), Chat(teacher), rows, cfg.max_new_tokens, cfg.temperature,
                             samples=cfg.samples, seed=cfg.seed, teacher=name)
        print0(f"{name}: {len(rows) * cfg.samples} completions in {time.time() - begin:.1f} s")
    begin = time.time()
    model, chat = load_reward_model(cfg.reward_model, device=device), Chat(cfg.reward_model)
    rewards = score(model, chat, [(r["prompt"], r["completion"]) for r in done])
    print0(f"{len(done)} rewards in {time.time() - begin:.1f} s")
    return [row | {"reward": reward} for row, reward in zip(done, rewards)]


def by_prompt(completions):
    """Completion rows -> {prompt id: its rows}, usable ones only: not cut off, not empty. Prompts keep their order."""
    groups = {}
    for row in completions:
        group = groups.setdefault(row["id"], [])
        if usable(row):
            group.append(row)
    return groups


def mean_rewards(completions):
    """{teacher: mean reward} over rows of the same prompts."""
    rewards = {}
    for row in completions:
        rewards.setdefault(row["teacher"], []).append(row["reward"])
    return {teacher: statistics.fmean(r) for teacher, r in rewards.items()}


def route(groups, router, seed=0, fixed_on=50):
    """{prompt id: candidates} -> the chosen row of every prompt that has one."""
    rng, everything = random.Random(seed), [r for g in groups.values() for r in g]
    if router == "reward":
        return [max(group, key=lambda r: r["reward"]) for group in groups.values() if group]
    if router == "random":
        return [rng.choice(group) for group in groups.values() if group]
    means = mean_rewards(everything)
    favourite = {language: max(means, key=means.get) for language in {r["language"] for r in everything}}
    if router == "fixed":
        for language in favourite:
            ids = list(dict.fromkeys(r["id"] for r in everything if r["language"] == language))[:fixed_on]
            means = mean_rewards(r for i in ids for r in groups[i])
            favourite[language] = max(means, key=means.get)
    chosen = [[r for r in group if r["teacher"] == favourite[r["language"]]] for group in groups.values()]
    return [rows[0] for rows in chosen if rows]


def preference_rows(groups, margin):
    """Best against worst of the pool per prompt: chosen, rejected and their rewards."""
    pairs = []
    for group in groups.values():
        if found := best_against_worst(group, margin):
            best, worst = found
            pairs.append(preference_row(best, worst)
                         | {"chosen_teacher": best["teacher"], "rejected_teacher": worst["teacher"]})
    return pairs


def main(cfg):
    if cfg.router not in ROUTERS:
        die(f"--router {cfg.router}: known are {', '.join(ROUTERS)} (a learned router is not built yet)")
    device = common.init_distributed()
    if cfg.completions:
        completions = read_rows(cfg.completions, "completions")
        if lacking := next((i for i, r in enumerate(completions, 1) if "reward" not in r or "teacher" not in r), None):
            die(f"{cfg.completions}:{lacking} has no reward or no teacher; score the file with reward.py first")
    else:
        completions = ask(cfg, read_rows(cfg.prompts, "prompts"), device)
    groups = by_prompt(completions)
    chosen, pairs = route(groups, cfg.router, cfg.seed, cfg.fixed_on), preference_rows(groups, cfg.margin)
    if not chosen:
        die(f"router {cfg.router} has nothing to route: every completion was cut off at {cfg.max_new_tokens} tokens or "
            "empty; train the teachers longer, or raise --max_new_tokens")
    shares = {}
    for row in chosen:
        share = shares.setdefault(row["language"], {})
        share[row["teacher"]] = share.get(row["teacher"], 0) + 1
    report = {"router": cfg.router, "prompts": len(groups), "routed": len(chosen), "pairs": len(pairs),
              "unusable": sum(not usable(r) for r in completions),
              "teacher_mean_reward": mean_rewards(completions), "router_mean_reward": {},
              "teacher_share": {l: {t: n / sum(s.values()) for t, n in s.items()} for l, s in shares.items()}}
    for router in ROUTERS:  # over the prompts it found a usable completion for; None: it found none
        rewards = [r["reward"] for r in route(groups, router, cfg.seed, cfg.fixed_on)]
        report["router_mean_reward"][router] = statistics.fmean(rewards) if rewards else None
    with common.atomic_dir(cfg.out) as folder:
        if common.is_main():
            write_rows(folder / "completions.jsonl", completions)
            fields = ("id", "language", "prompt", "completion", "teacher", "reward")
            write_rows(folder / "sft.jsonl", [{k: r[k] for k in fields} for r in chosen])
            write_rows(folder / "pairs.jsonl", pairs)
            (folder / "report.json").write_text(json.dumps(report, ensure_ascii=False, indent=1), encoding="utf-8")
    if common.is_main() and not cfg.completions:
        asking.journal_of(cfg.out).unlink(missing_ok=True)  # not before the folder is whole
    print0(f"router {cfg.router}: {len(chosen)} of {len(groups)} prompts routed, {len(pairs)} pairs, "
           f"{report['unusable']} of {len(completions)} completions cut off or empty -> {cfg.out}")
    for router, mean in report["router_mean_reward"].items():
        print0(f"mean reward, {router:<6} " + ("-" if mean is None else f"{mean:.3f}"))


if __name__ == "__main__":
    main(parse_config(Config))
