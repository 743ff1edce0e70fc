"""
Safety: how often does a model answer a harmful request harmfully?

    safety   CohereLabs/aya_redteaming: requests written by people in each language, Aya's ar en es fr hi ru among them, some
             of them harmful everywhere (global), some for those who know a culture (local). Ahmadian et al. 2024,
             https://arxiv.org/abs/2406.18682

The model answers greedily under its chat template; --judge, an endpoint, says of every answer whether it is harmful (judge.py,
words of our own). Metrics: harmful, the share of harmful answers among those that were judged, with its 95 % interval
(Wilson's: it holds near 0); harmful_global, harmful_local, and one per kind of harm, of which a request may have several; sent,
judged, failed. Lower is better, and a model that declines everything is at 0: look at win rates too.
"""

import ast
import re
import statistics

import judge
from benchmarks import folder_of, limited, need, read_table, wanted
from common import die, print0
from endpoint import is_endpoint
from languages import LANGUAGES, THREE_LETTERS
from stats import stderr, wilson
from tasks.pairwise import find_table, run  # noqa: F401  the same answers

TASKS = ("safety",)
SETTINGS = ("max_new_tokens",)
REPOSITORY = "CohereLabs/aya_redteaming"


def kinds_of(value):
    """harm_category: a list, or a string of one ('["Hate Speech", "Self-Harm"]'), or one name -> [name]."""
    if isinstance(value, str) and value.strip().startswith("["):
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            value = value.strip().strip("[]")
    return [str(v).strip() for v in (value if isinstance(value, (list, tuple)) else [value]) if v and str(v).strip()]


def metric_of(kind):
    """"Bullying & Harassment" -> "harmful_bullying_harassment"."""
    return "harmful_" + re.sub(r"\W+", "_", kind.lower()).strip("_")


def read(task, cfg):
    judge.check(cfg)
    if cfg.judge and not is_endpoint(cfg.judge):
        die(f"safety: harm is judged by an endpoint, http(s)://host:port/v1#model, not by a reward model ({cfg.judge})")
    folder, found = folder_of(cfg.data, REPOSITORY), {}
    for code, language in THREE_LETTERS.items():
        if language not in found and (path := find_table(folder, f"aya_{code}")):
            found[language] = rows = need(read_table(path), ["prompt"], path)
            if lost := [name for name in ("harm_category", "global_or_local") if not any(row.get(name) for row in rows)]:
                print0(f"{path}: no row has a {' or a '.join(lost)}")
    if not found:
        die(f"{folder} has no file of {REPOSITORY}: aya_eng.jsonl, aya_arb.jsonl, ...")
    known = [language for language in LANGUAGES if language in found]
    items = [{"id": f"safety-{language}-{n}", "question": f"{language}-{n}", "language": language, "prompt": row["prompt"],
              "kinds": kinds_of(row.get("harm_category")), "scope": str(row.get("global_or_local") or "").strip().lower()}
             for language in wanted(cfg.languages, known, task) for n, row in enumerate(found[language])]
    if not items:
        die(f"safety has none of the languages {' '.join(cfg.languages)}")
    return limited(items, cfg.limit)


def finish(task, samples, baselines, cfg, device):
    """Adds harmful: 1, 0, or None with the reason, judge_failure."""
    if not cfg.judge:
        print0(f"{task}: answers alone, nothing was judged: no --judge")
        return samples
    found = judge.judge(cfg, "safety", [(s["language"], s["prompt"], s["completion"]) for s in samples], task)
    for s, (harmful, why) in zip(samples, found or ()):
        s["harmful"] = harmful
        if why:
            s["judge_failure"] = why
    return samples


def rate(samples, metric):
    """{metric, metric_stderr, metric_interval, metric_n} over the samples that were judged; {} if none was."""
    values = [s["harmful"] for s in samples if s.get("harmful") is not None]
    if not values:
        return {}
    share = statistics.fmean(values)
    return {metric: share, f"{metric}_stderr": stderr(values), f"{metric}_interval": list(wilson(share, len(values))),
            f"{metric}_n": len(values)}


def summarise(task, samples, baselines, cfg):
    table = {}
    for language in ["all", *dict.fromkeys(s["language"] for s in samples)]:
        at = [s for s in samples if language in ("all", s["language"])]
        sent = [s for s in at if "harmful" in s]
        judged = sum(s["harmful"] is not None for s in sent)
        table[language] = {"n": len(at), "sent": len(sent), "judged": judged, "failed": len(sent) - judged}
        table[language] |= rate(at, "harmful")
        for scope in sorted({s["scope"] for s in at} - {""}):
            table[language] |= rate([s for s in at if s["scope"] == scope], f"harmful_{scope}")
        for kind in sorted({kind for s in at for kind in s["kinds"]}):
            table[language] |= rate([s for s in at if kind in s["kinds"]], metric_of(kind))
    return table
