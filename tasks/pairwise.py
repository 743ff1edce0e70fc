"""
Open questions, and whose answer is better: m-ArenaHard, its second version, and Dolly.

    m_arenahard     CohereLabs/m-ArenaHard: 500 hard requests in each language, the same ones, translated
    m_arenahard_v2  CohereLabs/m-ArenaHard-v2.0: 498 others
    dolly           CohereLabs/aya_evaluation_suite: 200 requests; dolly_human_edited where it has the language (ar es fr
                    hi ru), dolly_machine_translated otherwise, as Aya is evaluated

The model answers greedily under its chat template. --judge then compares the answers with every --baseline (judge.py):

    win_rate_X     won games, ties half: win_X + tie_X / 2, of games in which the judge of baseline X could be read
    win_X, tie_X, loss_X   shares of those games. A pair is two games, or one for a reward model; a game that is won by far
                   counts --strong_weight times
    lc_win_rate_X  the win rate that a logistic model expects for two answers of one length (controlled_rate())
    consistent_X   share of the pairs of two games in which both have the same winner: how little the place decides
    sent_X, judged_X, failed_X   pairs; what is not judged is in no rate
    length, length_X   mean length in characters, of both sides of the sent pairs; tokens, tokens_X: where they are known

Languages share the questions: intervals draw questions with replacement, with all their games in all languages.
"""

import statistics
from collections import Counter

import numpy as np

import judge
from benchmarks import find_file, folder_of, limited, need, read_table, wanted
from common import die, print0
from generate import complete
from languages import LANGUAGES, SCRIPTS, code_of
from stats import clustered_interval

TASKS = ("m_arenahard", "m_arenahard_v2", "dolly")
SETTINGS = ("max_new_tokens",)
MAX_NEW_TOKENS = 1024  # of an answer
REPOSITORIES = {"m_arenahard": "CohereLabs/m-ArenaHard", "m_arenahard_v2": "CohereLabs/m-ArenaHard-v2.0",
                "dolly": "CohereLabs/aya_evaluation_suite"}
KINDS = ("jsonl", "parquet", "json", "csv", "tsv")  # of files, the first that is there

# ---------------------------------------------------------------------------------------------------------------------
# the published files


def find_table(folder, *names):
    """The first file like <name>.<kind>, names before kinds; None if there is none."""
    return find_file(folder, *(f"**/{name}.{kind}" for name in names for kind in KINDS))


def arena_rows(folder):
    """{language: rows with question and prompt}: files in a folder per language, <language>.jsonl, or one with a column."""
    found = {}
    for language in LANGUAGES:
        spellings = dict.fromkeys((language, language.replace("-", "_"), language.replace("-", "").lower(), language.lower()))
        path = find_table(folder, *(f"{s}/test*" for s in spellings), *spellings, *(f"test[._-]{s}" for s in spellings))
        if path:
            found[language] = need(read_table(path), ["question_id", "prompt"], path)
    if not found and (path := find_table(folder, "test*")):
        for row in need(read_table(path), ["question_id", "prompt", "language"], path):
            if language := code_of(row["language"]):
                found.setdefault(language, []).append(row)
    return {language: [{"question": str(row["question_id"]), "prompt": row["prompt"]} for row in rows]
            for language, rows in found.items()}


def dolly_rows(folder):
    """
    {language: rows with question and prompt}. What languages share is source_id; revisions without it number the rows of
    every language alike, or all rows through: then it is the place in the language's rows.
    """
    found = {}
    for part in ("dolly_machine_translated", "dolly_human_edited"):  # the second takes the place of the first
        path, by_language = find_table(folder, f"{part}/test*", part), {}
        for row in need(read_table(path), ["inputs", "language"], path) if path else ():
            language = code_of(f"{row['language']}-{row.get('script') or ''}") or code_of(row["language"])
            if language and not (row.get("script") == "Latn" and language in SCRIPTS):  # romanised Arabic, Hindi, ...
                by_language.setdefault(language, []).append(row)
        seen = Counter(row.get("id") for rows in by_language.values() for row in rows)
        for language, rows in by_language.items():
            name = lambda n, row: row.get("source_id") if row.get("source_id") is not None else (
                row["id"] if seen[row.get("id")] > 1 and row.get("id") is not None else n)
            found[language] = [{"question": str(name(n, row)), "prompt": row["inputs"]} for n, row in enumerate(rows)]
    return found


def read(task, cfg):
    judge.check(cfg)
    folder = folder_of(cfg.data, REPOSITORIES[task])
    found = dolly_rows(folder) if task == "dolly" else arena_rows(folder)
    if not found:
        die(f"{folder} has no file of {REPOSITORIES[task]}: <language>/test*.jsonl or .parquet" if task != "dolly" else
            f"{folder} has neither dolly_human_edited nor dolly_machine_translated: test*.jsonl or .parquet")
    known = [language for language in LANGUAGES if language in found]
    if not cfg.languages and len(known) < len(LANGUAGES):
        print0(f"{task}: not in {' '.join(language for language in LANGUAGES if language not in found)}")
    items, seen = [], Counter()
    for language in wanted(cfg.languages, known, task):
        for row in found[language]:
            name = f"{task}-{language}-{row['question']}"
            seen[name] += 1
            items.append({"id": name + f"-{seen[name]}" * (seen[name] > 1), "language": language} | row)
    if not items:
        die(f"{task} has none of the languages {' '.join(cfg.languages)}")
    return limited(items, cfg.limit)


# ---------------------------------------------------------------------------------------------------------------------
# answers and verdicts

def run(task, model, chat, items, cfg):
    made = complete(model, chat, items, cfg.max_new_tokens or MAX_NEW_TOKENS)
    return [item | {key: m[key] for key in ("completion", "ended", "tokens")} for item, m in zip(items, made)]


def answers_of(name, rows, samples):
    """A baseline's rows -> {id: row} of its answers to these samples. What is missing, or answers another prompt, is named."""
    found = {}
    for row in rows:
        if not isinstance(row, dict) or not isinstance(row.get("completion"), str) or "id" not in row:
            die(f"baseline {name}: a row has no id or no completion; completion rows are what generate.py writes")
        if "failure" not in row:
            found.setdefault(row["id"], row)  # of several samples the first
    found = {s["id"]: found[s["id"]] for s in samples if s["id"] in found}
    if not found:
        die(f"baseline {name} has no answer to any of the {len(samples)} requests, as {samples[0]['id']!r}; ids and requests "
            "are in the samples of this evaluation: generate.py --prompts samples_<task>.jsonl")
    if other := [s["id"] for s in samples if s["id"] in found and found[s["id"]].get("prompt", s["prompt"]) != s["prompt"]]:
        die(f"baseline {name} answers another request under the id {other[0]!r}: it is of another version of the files")
    lost = Counter(s["language"] for s in samples if s["id"] not in found)
    if lost:
        print0(f"baseline {name}: no answer to {lost.total()} of {len(samples)} requests: "
               + " ".join(f"{language} {n}" for language, n in lost.items()))
    return found


def finish(task, samples, baselines, cfg, device):
    """Adds games_X (margins of the answer over X's, one a game) or failure_X, and what summarise() needs of X's answer."""
    if not cfg.judge or not baselines:
        print0(f"{task}: answers alone, nothing was judged: no --{'baseline' if cfg.judge else 'judge'}")
        return samples
    for name, rows in baselines.items():
        theirs = answers_of(name, rows, samples)
        pairs = [(s, theirs[s["id"]]) for s in samples if s["id"] in theirs]
        cases = [(s["language"], s["prompt"], s["completion"], other["completion"]) for s, other in pairs]
        found = judge.compare(cfg, cases, device, f"{task} against {name}")
        for (s, other), (games, why) in zip(pairs, found or ()):
            s[f"games_{name}"] = games
            s[f"length_{name}"], s[f"tokens_{name}"] = length(other), other.get("tokens")
            if why:
                s[f"failure_{name}"] = why
    return samples


def length(row):
    """Of an answer, in characters: what the judge saw of it."""
    return len(judge.spoken(row["completion"]).strip())


# ---------------------------------------------------------------------------------------------------------------------
# rates

def battles(games, strong_weight):
    """Margins -> the scores they count as: 1, 0.5 or 0, of a game won or lost by far so many times."""
    return [(np.sign(m) + 1) / 2 for m in games for _ in range(strong_weight if abs(m) == 2 else 1)]


def controlled_rate(scores, weights, ours, theirs, ridge=1e-3, steps=100):
    """
    The win rate at equal length: logit P(win) = b + c x, x = (ours - theirs) / (ours + theirs) in units of its standard
    deviation, fitted to scores (n,) in 0..1 with weights (n,) by Newton's steps; -> sigmoid(b). The lengths (n,) are of any
    unit. `ridge` c^2 / 2 is added to the loss: c stays finite where length alone tells who won.
    Style control of Arena-Hard-Auto (lmarena.ai/blog/2024/style-control), for the length alone.
    """
    y, w = np.asarray(scores, float), np.asarray(weights, float)
    a, b = np.asarray(ours, float), np.asarray(theirs, float)
    x, mean = (a - b) / np.maximum(a + b, 1), float((w * y).sum() / w.sum())
    if mean in (0.0, 1.0) or x.std() < 1e-12:  # nothing to tell apart: b is infinite, or any length is as good
        return mean
    features, penalty = np.stack([np.ones_like(x), x / x.std()], 1), np.array([0.0, ridge])
    loss = lambda beta: (w * (np.logaddexp(0, features @ beta) - y * (features @ beta))).sum() + (penalty * beta**2).sum() / 2
    beta = np.zeros(2)
    for _ in range(steps):
        p = 1 / (1 + np.exp(-features @ beta))
        gradient = features.T @ (w * (p - y)) + penalty * beta
        hessian = (features.T * (w * p * (1 - p))) @ features + np.diag(penalty)
        step = np.linalg.lstsq(hessian, gradient, rcond=None)[0]
        size = 1.0
        while size > 1e-6 and loss(beta - size * step) > loss(beta):  # a full step may go too far
            size /= 2
        beta = beta - size * step
        if np.abs(size * step).max() < 1e-10:
            break
    return float(1 / (1 + np.exp(-beta[0])))


def rates(samples, name, strong_weight):
    """Samples of one language, or of all -> the metrics against the baseline `name`, as the head of this file lists them."""
    sent = [s for s in samples if f"games_{name}" in s]
    judged = [s for s in sent if s[f"games_{name}"] is not None]
    row = {f"sent_{name}": len(sent), f"judged_{name}": len(judged), f"failed_{name}": len(sent) - len(judged)}
    if sent:
        row |= {"length": statistics.fmean(map(length, sent)), f"length_{name}": statistics.fmean(
            s[f"length_{name}"] for s in sent)}
        if all(s.get("tokens") is not None and s[f"tokens_{name}"] is not None for s in sent):
            row |= {"tokens": statistics.fmean(s["tokens"] for s in sent), f"tokens_{name}": statistics.fmean(
                s[f"tokens_{name}"] for s in sent)}
    if not judged:
        return row
    scores = [battles(s[f"games_{name}"], strong_weight) for s in judged]
    flat = [(score, s["question"]) for s, of_pair in zip(judged, scores) for score in of_pair]
    mean, low, high = clustered_interval(*map(list, zip(*flat)))
    row |= {f"win_rate_{name}": mean, f"win_rate_{name}_stderr": (high - low) / 3.92, f"win_rate_{name}_interval": [low, high]}
    row |= {f"{what}_{name}": statistics.fmean(score == value for score, _ in flat)
            for what, value in (("win", 1), ("tie", 0.5), ("loss", 0))}
    row[f"lc_win_rate_{name}"] = controlled_rate([statistics.fmean(s) for s in scores], [len(s) for s in scores],
                                                 [length(s) for s in judged], [s[f"length_{name}"] for s in judged])
    if twice := [s[f"games_{name}"] for s in judged if len(s[f"games_{name}"]) == 2]:
        row[f"consistent_{name}"] = statistics.fmean(np.sign(first) == np.sign(second) for first, second in twice)
    return row


def summarise(task, samples, baselines, cfg):
    table = {}
    for language in ["all", *dict.fromkeys(s["language"] for s in samples)]:
        at = [s for s in samples if language in ("all", s["language"])]
        table[language] = {"n": len(at), "ended": statistics.fmean(s["ended"] for s in at)}
        for name in baselines if cfg.judge else ():
            table[language] |= rates(at, name, cfg.strong_weight)
        table[language].setdefault("length", statistics.fmean(map(length, at)))
    return table
