"""
The miniature's own benchmark: held-out items, one right answer each, in every language.

    exact_match     share of answers equal to the reference (Unicode NFC, spaces trimmed)
    chrfpp          corpus chrF++ against the reference (tasks/flores.py)
    language_match  share of answers that a character n-gram model takes for the language asked for: language confusion
    minimal_pairs   share of items whose reference is likelier than a near miss (zero-shot discrimination, as in XCOPA)
    reward          mean reward of the answers by a reward model (if eval.py is given one): to watch, never to judge
    win_rate        against another model: exact match decides, then chrF++; equal is half. The judge is the reference,
                    never the reward model that training climbs, so reward hacking would show.

Items are shared by the languages, so intervals resample items, not rows (clustered bootstrap).
"""

import functools
import random
import unicodedata
from collections import Counter
from pathlib import Path

import torch

from benchmarks import limited
from common import die
from data import encode_row, pad_batch
from generate import complete
from mini.items import DEFAULT_TASKS, WrongAnswers, load_items
from mini.langid import LanguageModel
from reward import score, scorer
from rows import read_rows
from stats import clustered_interval
from tasks.flores import chrf, corpus_chrf


SIDE_ROWS = 40  # rows per language for what is only watched, not judged: minimal pairs and the reward
FILE = "test.jsonl"  # in the data folder: rows with id, language, task, prompt, reference


def item_of(row):
    """The id without its language: what the languages share. spell-ar-517 -> spell 517."""
    return row["id"].replace(f"{row['task']}-{row['language']}-", f"{row['task']} ", 1)


def normal(text):
    return unicodedata.normalize("NFC", text).strip()


def judge(a, b, reference):
    """1.0 if answer `a` beats `b`, 0.0 if it loses, 0.5 for a tie. Reads nothing but the texts and the reference."""
    a, b, reference = normal(a), normal(b), normal(reference)
    right = (a == reference, b == reference)
    if right[0] != right[1]:
        return float(right[0])
    if right[0] or a == b:
        return 0.5
    score = chrf(a, [reference]), chrf(b, [reference])
    return 0.5 if score[0] == score[1] else float(score[0] > score[1])


def win_scores(mine, theirs):
    """Samples of two models -> the judge's verdict on each of `mine`; None where the other model was not asked."""
    other = {s["id"]: s["completion"] for s in theirs}
    return [judge(s["completion"], other[s["id"]], s["reference"]) if s["id"] in other else None for s in mine]


def answer(model, chat, rows, seed=0):
    """Greedy answers: rows -> sample rows with completion, correct and the item."""
    made = complete(model, chat, rows, max_new_tokens=48, seed=seed)
    return [{"id": r["id"], "item": item_of(r), "language": r["language"], "task": r["task"], "prompt": r["prompt"],
             "reference": r["reference"], "completion": m["completion"], "ended": m["ended"],
             "correct": normal(m["completion"]) == normal(r["reference"])} for r, m in zip(rows, made)]


def side_rows(rows):
    """Indices of the first SIDE_ROWS rows of every language."""
    asked, found = Counter(), []
    for i, row in enumerate(rows):
        if row["task"] not in DEFAULT_TASKS:
            continue  # dates, lists and translations have no near misses
        asked[row["language"]] += 1
        if asked[row["language"]] <= SIDE_ROWS:
            found.append(i)
    return found


@functools.cache
def shipped_wrong_answers():
    """Read once, not once a model: eval.py runs many in one process."""
    return WrongAnswers(load_items())


@torch.no_grad()
def minimal_pairs(model, chat, rows, batch_size=128):
    """
    One near miss per row (a plural form, direction, unit or digit that is wrong), and 1.0 where the model gives the
    reference a higher mean log-prob per token: -> list of floats (None where the item has no near miss, or is not
    "watched": behind the first SIDE_ROWS rows of a language).
    """
    wrong, device = shipped_wrong_answers(), next(model.parameters()).device
    found, jobs = [None] * len(rows), []
    for i, row in enumerate(rows):
        if not row["watched"]:
            continue
        x = item_of(row).split(" ", 1)[1]
        near = [(why, text) for why, text in wrong(row["task"], x, row["language"], random.Random(row["id"]))
                if why in ("wrong_plural", "wrong_direction", "one_digit_off", "wrong_unit")]
        if near:
            jobs.append((i, encode_row(chat, row["prompt"], row["reference"]),
                         encode_row(chat, row["prompt"], near[0][1])))
    jobs.sort(key=lambda job: len(job[1].ids))
    for begin in range(0, len(jobs), batch_size):
        batch = jobs[begin:begin + batch_size]
        ids, mask = pad_batch([j[1] for j in batch] + [j[2] for j in batch], chat.pad, device)
        mean = model.token_logps(ids, mask).sum(1) / mask.sum(1)
        right, wrong_one = mean.chunk(2)
        for (i, _, _), better in zip(batch, (right > wrong_one).tolist()):
            found[i] = float(better)
    return found


def per_language(samples, baselines, identify):
    """
    samples, {name: samples of another model}, text -> language -> {language or "all": {metric: value, ...}}. Standard errors are of the
    clustered bootstrap's interval (a quarter of its width).
    """
    for s in samples:
        s["language_seen"] = identify(s["completion"])
    for name, other in baselines.items():
        for s, score in zip(samples, win_scores(samples, other)):
            s[f"win_rate_{name}"] = score
    table = {}
    for language in ["all", *dict.fromkeys(s["language"] for s in samples)]:
        at = [s for s in samples if language in ("all", s["language"])]
        columns = {"exact_match": [float(s["correct"]) for s in at],
                   "language_match": [float(s["language_seen"] == s["language"]) for s in at],
                   "minimal_pairs": [s["minimal_pair"] for s in at], "reward": [s.get("reward") for s in at]}
        columns |= {f"win_rate_{name}": [s[f"win_rate_{name}"] for s in at] for name in baselines}
        row = {"n": len(at), "chrfpp": corpus_chrf([s["completion"] for s in at], [[s["reference"]] for s in at])}
        for metric, values in columns.items():
            kept = [(v, s["item"]) for v, s in zip(values, at) if v is not None]
            if kept:
                mean, low, high = clustered_interval([v for v, _ in kept], [c for _, c in kept])
                row |= {metric: mean, f"{metric}_stderr": (high - low) / 3.92, f"{metric}_interval": [low, high]}
        table[language] = row
    return table


# ---------------------------------------------------------------------------------------------------------------------
# what eval.py calls (its docstring says how)

TASKS = ("mini",)
SETTINGS = ()


def read(task, cfg):
    rows = limited(read_rows(Path(cfg.data) / FILE, "prompts"), cfg.limit)
    rows = [row for row in rows if not cfg.languages or row["language"] in cfg.languages]
    for row in rows:
        if lost := [key for key in ("task", "reference") if key not in row]:
            die(f"the row {row['id']!r} has no {lost[0]!r}: {FILE} needs id, language, task, prompt and reference")
    watched = set(side_rows(rows))
    return [row | {"watched": i in watched} for i, row in enumerate(rows)]


def run(task, model, chat, items, cfg):
    samples = answer(model, chat, items)
    for sample, pair in zip(samples, minimal_pairs(model, chat, items)):
        sample["minimal_pair"] = pair
    return samples


def finish(task, samples, baselines, cfg, device):
    """The mean reward of the answers, to be watched beside the win rate."""
    if cfg.reward_model:
        model, chat = scorer(cfg.reward_model, device)
        at = side_rows(samples)
        for i, reward in zip(at, score(model, chat, [(samples[i]["prompt"], samples[i]["completion"]) for i in at])):
            samples[i]["reward"] = reward
    return samples


def summarise(task, samples, baselines, cfg):
    return per_language(samples, baselines, LanguageModel.shipped().identify)
