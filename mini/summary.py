"""
Puts a finished run of the miniature together: results.json (for report.py and for comparing seeds) and table.md.

Win rates are judged here, from the samples that eval.py wrote: tasks/mini.py's judge reads the references and knows
nothing of the reward model. Intervals are 95 % bootstrap percentiles that resample items, since all languages share
them.

python -m mini.summary --run out/mini
"""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

from common import atomic_file, die, git_commit, hardware, parse_config
from data import read_jsonl, read_rows
from tasks.mini import clustered_interval, normal, win_scores

MERGED = ("sft", "offline-dpo", "online-1", "online-2", "online-3")  # stages that are merged from parts
ORDER = ("sft-single", "sft", "offline-dpo", "online-only", "online-1", "online-2", "online-3")


@dataclass
class Config:
    run: str = "out/mini"  # folder of a run
    preset: str = "mini"  # recorded in results.json
    seed: int = 0  # recorded in results.json


def win_rate(mine, theirs):
    """Samples of two models -> ([mean, low, high], {language: mean}) over the rows that both answered."""
    both = [(s, score) for s, score in zip(mine, win_scores(mine, theirs)) if score is not None]
    by_language = {}
    for s, score in both:
        by_language.setdefault(s["language"], []).append(score)
    return (list(clustered_interval([score for _, score in both], [s["item"] for s, _ in both])),
            {language: statistics.fmean(v) for language, v in by_language.items()})


def accuracy(samples, ids=None):
    return statistics.fmean(s["correct"] for s in samples if ids is None or s["id"] in ids)


def arbitrage_accuracy(run, references):
    """
    Share of right answers in the data of each router; of every single teacher; of random routing (its expectation); and
    of an oracle that sees the references.
    """
    right = lambda row: normal(row["completion"]) == references[row["id"]]
    teachers, prompts = {}, {}
    for row in read_rows(run / "arbitrage" / "completions.jsonl", "completions"):
        teachers.setdefault(row["teacher"], []).append(right(row))
        prompts.setdefault(row["id"], []).append(right(row))
    single = {teacher: statistics.fmean(found) for teacher, found in teachers.items()}
    routed = {name: statistics.fmean(map(right, read_rows(run / folder / "sft.jsonl", "completions")))
              for name, folder in (("routed", "arbitrage"), ("fixed", "arbitrage-fixed"))}
    return routed | {"random": statistics.fmean(map(statistics.fmean, prompts.values())),
                     "oracle": statistics.fmean(map(any, prompts.values())),
                     "single": single, "best_single": max(single.values())}


def merged_and_parts(samples):
    """{stage: (exact match of the merge, mean over its parts)}, on the rows that the parts were asked."""
    out = {}
    for name in MERGED:
        parts = [p for p in samples if p.startswith(f"{name}-") and p not in ORDER]
        if parts:
            ids = {s["id"] for s in samples[parts[0]]}
            out[name] = accuracy(samples[name], ids), statistics.fmean(accuracy(samples[p]) for p in parts)
    return out


def claims(stages, parts, arbitrage, rounds):
    """What the recipe says, held against this run: [{"claim", "value", "holds"}]."""
    em = {s["name"]: s["exact_match"] for s in stages}
    win = {s["name"]: s["win_rate"]["sft"] for s in stages}
    final = f"online-{len(rounds)}"
    routed, best_single, at_random = (arbitrage[k] for k in ("routed", "best_single", "random"))
    out = [("arbitrage data is more often right than the best single teacher's",
            f"{routed:.3f} against {best_single:.3f}", routed > best_single),
           ("arbitrage data is more often right than random routing's",
            f"{routed:.3f} against {at_random:.3f}", routed > at_random),
           ("SFT on it beats SFT on the best single teacher's data", f"{em['sft']:.3f} against {em['sft-single']:.3f}",
            em["sft"] > em["sft-single"]),
           ("offline DPO raises the win rate over SFT", f"{win['offline-dpo'][0]:.3f} [{win['offline-dpo'][1]:.3f}, "
            f"{win['offline-dpo'][2]:.3f}]", win["offline-dpo"][1] > 0.5),
           ("online DPO raises it further", f"{win[final][0]:.3f} after {win['offline-dpo'][0]:.3f}",
            win[final][0] > win["offline-dpo"][0]),
           ("the final model beats the SFT model (the interval excludes one half)",
            f"{win[final][0]:.3f} [{win[final][1]:.3f}, {win[final][2]:.3f}]", win[final][1] > 0.5)]
    if "online-only" in win:
        best = max(win["offline-dpo"][0], win["online-only"][0])
        out.append(("offline then online beats either alone", f"{win[final][0]:.3f} against offline "
                    f"{win['offline-dpo'][0]:.3f}, online {win['online-only'][0]:.3f}", win[final][0] > best))
    for name, (merged, mean) in parts.items():
        out.append((f"the merge beats the mean of its parts ({name})",
                    f"{merged:.3f} against {mean:.3f}", merged > mean))
    for r in rounds:
        out.append((f"best of K by the reward model is right more often than greedy (round {r['round']})",
                    f"{r['best_of_k']:.3f} against {r['greedy']:.3f}", r["best_of_k"] > r["greedy"]))
    return [{"claim": c, "value": v, "holds": bool(h)} for c, v, h in out]


def markdown(results):
    """The step-by-step table, the arbitrage table and the claims, as README shows them."""
    show = lambda w: f"{100 * w[0]:.1f} [{100 * w[1]:.1f}, {100 * w[2]:.1f}]"
    lines = ["| stage | exact match | chrF++ | win rate against SFT | win rate against the best teacher | seconds |",
             "|---|---|---|---|---|---|"]
    for s in results["stages"]:
        lines.append(f"| {s['name']} | {100 * s['exact_match']:.1f} | {s['chrfpp']:.1f} | "
                     f"{show(s['win_rate']['sft'])} | {show(s['win_rate']['best_teacher'])} | {s['seconds']:.0f} |")
    a = results["arbitrage"]["accuracy"]
    lines += ["", "| arbitrage data, share of right answers | |", "|---|---|",
              *(f"| {t} | {100 * v:.1f} |" for t, v in a["single"].items()),
              *(f"| {k} | {100 * a[v]:.1f} |" for k, v in (("random routing", "random"), ("fixed routing", "fixed"),
                ("**routed by the reward model**", "routed"), ("oracle", "oracle"))),
              "", "| online round | greedy | best of K by the reward model | oracle of K | "
                  "reward before | reward after | win rate against SFT after |",
              "|---|---|---|---|---|---|---|"]
    for r in results["rounds"]:
        lines.append(f"| {r['round']} | {100 * r['greedy']:.1f} | {100 * r['best_of_k']:.1f} | "
                     f"{100 * r['oracle']:.1f} | {r['reward_before']:.2f} | {r['reward_after']:.2f} | "
                     f"{show(r['win_rate_sft'])} |")
    lines += ["", "| claim | this run | holds |", "|---|---|---|",
              *(f"| {c['claim']} | {c['value']} | {'yes' if c['holds'] else '**no**'} |" for c in results["claims"])]
    languages = results["stages"][0]["per_language"]
    names = [s["name"] for s in results["stages"]]
    lines += ["", "| exact match | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for language in languages:
        cells = [f"{100 * s['per_language'][language]['exact_match']:.0f}" for s in results["stages"]]
        lines.append(f"| {language} | " + " | ".join(cells) + " |")
    return "\n".join(lines + [""])


def main(cfg):
    run = Path(cfg.run)
    samples = {p.parent.name: [row for row, _ in read_jsonl(p)] for p in sorted(run.glob("eval/*/samples_mini.jsonl"))}
    if lost := {"base", "sft", "sft-single", "offline-dpo"} - samples.keys():
        die(f"{run}/eval lacks {', '.join(sorted(lost))}: run `python recipe.py` to its end")
    table = {name: json.loads((run / "eval" / name / "results.json").read_text(encoding="utf-8"))["results"]["mini"]
             for name in samples}
    seconds = {p.stem: json.loads(p.read_text(encoding="utf-8"))["seconds"] for p in (run / "stages").glob("*.json")}
    references = {r["id"]: normal(r["reference"]) for r in read_rows(run / "data" / "references.jsonl", "prompts")}
    report = json.loads((run / "arbitrage" / "report.json").read_text(encoding="utf-8"))
    # "the best single teacher" is the one with the highest mean reward: the references may not choose
    best_teacher = max(report["teacher_mean_reward"], key=report["teacher_mean_reward"].get)
    audit = json.loads((run / "rm-audit.json").read_text(encoding="utf-8"))

    rounds = []
    for number in range(1, len(list(run.glob("online-?-best-of-k.json"))) + 1):
        found = json.loads((run / f"online-{number}-best-of-k.json").read_text(encoding="utf-8"))
        rounds.append({"round": number, **found})
    stages = []
    teachers = sorted(name for name in samples if name.startswith("teacher-"))
    for name in ["base", *teachers, *(n for n in ORDER if n in samples)]:
        sft, by_language = win_rate(samples[name], samples["sft"])
        best, _ = win_rate(samples[name], samples[best_teacher])
        overall = table[name]["all"]
        stages.append({
            "name": name, "exact_match": overall["exact_match"], "chrfpp": overall["chrfpp"],
            "win_rate": {"sft": sft, "best_teacher": best}, "reward": overall.get("reward"),
            "minimal_pairs": overall["minimal_pairs"], "language_match": overall["language_match"],
            "seconds": seconds.get("teachers" if name in teachers else name, 0.0), "n": overall["n"],
            "per_language": {l: {k: v for k, v in t.items() if not k.endswith(("_stderr", "_interval"))}
                             | {"win_rate_sft": by_language.get(l)} for l, t in table[name].items() if l != "all"}})
    for r in rounds:
        after = f"online-{r['round']}"
        stage, before = (next(s for s in stages if s["name"] == n) for n in
                         (after, f"online-{r['round'] - 1}" if r["round"] > 1 else "offline-dpo"))
        pairs = sum(1 for p in run.glob(f"{after}-*/pairs-1.jsonl") for _ in read_jsonl(p))
        r |= {"reward_before": before["reward"], "reward_after": stage["reward"],
              "win_rate_sft": stage["win_rate"]["sft"], "pairs": pairs}
    parts = merged_and_parts(samples)
    accuracies = arbitrage_accuracy(run, references)
    results = {"preset": cfg.preset, "seed": cfg.seed, "commit": git_commit(), "hardware": hardware(),
               "seconds": round(sum(seconds.values()), 1), "stage_seconds": seconds, "best_teacher": best_teacher,
               "stages": stages, "parts": parts, "arbiter_audit": audit, "rounds": rounds,
               "arbitrage": {"accuracy": accuracies, "teacher_share": report["share"]},
               "claims": claims(stages, parts, accuracies, rounds)}
    with atomic_file(run / "table.md") as f:
        f.write(markdown(results))
    with atomic_file(run / "results.json") as f:
        json.dump(results, f, ensure_ascii=False, indent=1)
    print(f"{run / 'results.json'}: final exact match {stages[-1]['exact_match']:.3f}, win rate against SFT "
          f"{stages[-1]['win_rate']['sft'][0]:.3f}")


if __name__ == "__main__":
    main(parse_config(Config))
