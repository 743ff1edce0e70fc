"""
FLORES-200: the same 1012 sentences (--split dev: 997) in every language, translated into English and out of it. NLLB team
2022, https://arxiv.org/abs/2207.04672.

--data holds flores200_dataset (devtest/<code>.devtest, a sentence a line), FLORES+ (openlanguagedata/flores_plus: devtest/
<code>.jsonl or .parquet, where Chinese is cmn_Hans) or facebook/flores (columns sentence, or sentence_<code>). A sample is a
direction and a sentence; its language is the one that is not English.

    chrfpp_to_en, chrfpp_from_en  corpus chrF++ as sacrebleu computes it; its interval and standard error draw sentences. "all"
                                  is the mean over the languages, and draws each sentence in all languages at once. Traditional
                                  Chinese stands on its own but is not in "all": the mean is over 22 languages, as Aya Expanse's
    xcomet_to_en, xcomet_from_en  mean xCOMET, of --xcomet FOLDER (tasks/xcomet.py) or of --xcomet_scores FILE, rows with the
                                  samples' ids and a score
"""

import math
from pathlib import Path

import numpy as np

from benchmarks import find_file, folder_of, need, read_table, wanted
from common import die, gather_list, rank, world
from languages import LANGUAGES
from rows import read_jsonl
from stats import clustered_interval, clustered_stderr, stderr
from tasks.chrf import chrf, chrf_score, chrf_scores, chrf_stats, corpus_chrf  # noqa: F401  their public place
from tasks.replies import go_on, reply

TASKS = ("flores",)
SETTINGS = ("max_new_tokens",)
FOLDERS = ("flores200_dataset", "flores_plus", "flores_plus_dataset", "flores200", "flores")
MAX_NEW_TOKENS = 512  # the longest sentences of devtest take some 200 tokens in a script that a vocabulary knows badly
RESAMPLES = 1000

CODES = {"ar": "arb_Arab", "cs": "ces_Latn", "de": "deu_Latn", "el": "ell_Grek", "en": "eng_Latn", "es": "spa_Latn",
         "fa": "pes_Arab", "fr": "fra_Latn", "he": "heb_Hebr", "hi": "hin_Deva", "id": "ind_Latn", "it": "ita_Latn",
         "ja": "jpn_Jpan", "ko": "kor_Hang", "nl": "nld_Latn", "pl": "pol_Latn", "pt": "por_Latn", "ro": "ron_Latn",
         "ru": "rus_Cyrl", "tr": "tur_Latn", "uk": "ukr_Cyrl", "vi": "vie_Latn", "zh": "zho_Hans cmn_Hans",
         "zh-Hant": "zho_Hant cmn_Hant"}  # of several, the first that is there
DIRECTIONS = ("to_en", "from_en")


# ---------------------------------------------------------------------------------------------------------------------
# files and prompts

def folder(data):
    """The folder of FLORES in whichever edition is there."""
    if data == "hub":
        return folder_of(data, "openlanguagedata/flores_plus")
    found = [p for p in (Path(data), *sorted(Path(data).glob("*")), *sorted(Path(data).glob("*/*"))) if p.is_dir()]
    names = {p.name.casefold().replace("-", "_"): p for p in reversed(found)}
    return next((names[name] for name in FOLDERS if name in names), None) or folder_of(data, "facebook/flores200_dataset")


def sentences(where, language, split):
    """The split's sentences in a language, in order."""
    for code in CODES[language].split():
        path = find_file(where, f"**/{split}/{code}.{split}", f"**/{split}/{code}.jsonl", f"**/{split}/{code}.parquet",
                         f"**/{code}/{split}*.parquet", f"**/{code}/{split}*.jsonl")
        column = "sentence"
        if path is None and (path := find_file(where, f"**/all/{split}*.parquet", f"**/all/{split}*.jsonl")):
            column = f"sentence_{code}"
        if path is None:
            continue
        rows = read_table(path)  # <code>.devtest is plain text: its column is called text
        if "id" in (rows or [{}])[0] and path.suffix != f".{split}":
            rows = sorted(rows, key=lambda row: int(row["id"]))  # what is parallel has the same id
        need(rows, [("text", column)], path)
        return [str(row.get("text") if row.get("text") is not None else row[column]).strip() for row in rows]
    die(f"{where} has no {split} sentences in {language} ({CODES[language]})")


def prompt(source, target, sentence):
    """Our wording; languages by their English names."""
    names = [LANGUAGES[language][0] for language in (source, target)]
    return f"Translate this sentence from {names[0]} into {names[1]}. Reply with the translation only.\n\n{sentence}"


def plain_prompt(item):
    """For a model without a chat template, as lm-evaluation-harness asks in its Iberian FLORES tasks."""
    pair = (item["language"], "en") if item["direction"] == "to_en" else ("en", item["language"])
    source, target = (LANGUAGES[language][0] for language in pair)
    return f"{source} sentence: {item['source']}\n{target} sentence:"


# ---------------------------------------------------------------------------------------------------------------------
# what eval.py calls (its docstring says how)

def read(task, cfg):
    if cfg.split not in ("devtest", "dev"):
        die(f"--split {cfg.split}: FLORES has devtest and dev")
    where, items = folder(cfg.data), []
    english = sentences(where, "en", cfg.split)
    for language in wanted(cfg.languages, [language for language in CODES if language != "en"], "flores"):
        theirs = sentences(where, language, cfg.split)
        if len(theirs) != len(english):
            die(f"{where}: {cfg.split} has {len(theirs)} sentences in {language} but {len(english)} in en, so they are not "
                "parallel")
        for direction in DIRECTIONS:
            for n, (mine, en) in enumerate(zip(theirs[:cfg.limit or None], english)):
                source, reference = (mine, en) if direction == "to_en" else (en, mine)
                pair = (language, "en") if direction == "to_en" else ("en", language)
                items.append({"id": f"flores-{cfg.split}-{'-'.join(pair)}-{n}", "language": language, "direction": direction,
                              "question": str(n), "source": source, "reference": reference,
                              "prompt": prompt(*pair, source)})
    if cfg.xcomet_scores:
        scores_of(items, cfg.xcomet_scores)  # what it lacks is said before anything is computed
    return items


def run(task, model, chat, items, cfg):
    limit = cfg.max_new_tokens or MAX_NEW_TOKENS
    if chat.template is not None:
        made = reply(model, chat, items, limit)
    else:
        made = go_on(model, chat, [item | {"prompt": plain_prompt(item)} for item in items], limit, lambda item: ("\n",))
    samples = [item | {"completion": m["completion"].strip(), "ended": m["ended"]} for item, m in zip(items, made)]
    # counted here, by all ranks, and kept: a corpus' score and its resamples are then sums of these
    mine = [(n, chrf_stats(samples[n]["completion"], samples[n]["reference"]).tolist())
            for n in range(rank(), len(samples), world())]
    for n, stats in gather_list(mine):
        samples[n]["chrfpp_stats"] = stats
    return samples


def scores_of(rows, path):
    """The scores of a file for rows with an id, in their order; dies where one has none."""
    known = {row.get("id"): row.get("score") for row, _ in read_jsonl(path)}
    for row in rows:
        if not isinstance(known.get(row["id"]), (int, float)) or not math.isfinite(known[row["id"]]):
            die(f"{path} has no score of {row['id']!r}: it needs a row with id and score for every sample")
    return [float(known[row["id"]]) for row in rows]


def finish(task, samples, baselines, cfg, device):
    """xCOMET, if it is asked for."""
    if cfg.xcomet_scores:
        scores = scores_of(samples, cfg.xcomet_scores)
    elif cfg.xcomet:
        from tasks import xcomet  # only now: it is large, and most evaluations do without
        scores = xcomet.score(cfg.xcomet, [{"src": s["source"], "mt": s["completion"], "ref": s["reference"]} for s in samples],
                              device)
    else:
        return samples
    return [s | {"xcomet": score} for s, score in zip(samples, scores)]


def corpus(samples, questions, weights):
    """One direction in one language: samples -> its corpus chrF++, and those of the resamples (weights @ statistics)."""
    stats = np.zeros((len(questions), len(samples[0]["chrfpp_stats"]), 3))
    for s in samples:
        stats[questions[s["question"]]] = s["chrfpp_stats"]
    whole = chrf_score([[int(n) for n in order] for order in stats.sum(0)])
    return whole, chrf_scores((weights @ stats.reshape(len(stats), -1)).reshape(-1, *stats.shape[1:]))


def summarise(task, samples, baselines, cfg):
    if not samples:
        return {"all": {"n": 0}}
    questions = {q: n for n, q in enumerate(sorted({s["question"] for s in samples}, key=int))}
    size = len(questions)
    drawn = np.random.default_rng(0).integers(size, size=(RESAMPLES, size))
    weights = np.stack([np.bincount(row, minlength=size) for row in drawn]).astype(float)  # how often each sentence is drawn
    languages = list(dict.fromkeys(s["language"] for s in samples))
    averaged = [language for language in languages if language != "zh-Hant" or languages == ["zh-Hant"]]
    table = {language: {"n": sum(language in ("all", s["language"]) for s in samples)} for language in ["all", *languages]}
    table["all"]["n"] = sum(s["language"] in averaged for s in samples)
    table["all"]["languages"] = len(averaged)
    for direction in DIRECTIONS:
        at = {language: [s for s in samples if (s["language"], s["direction"]) == (language, direction)]
              for language in languages}
        found = {language: corpus(rows, questions, weights) for language, rows in at.items()}
        found["all"] = tuple(np.mean([found[language][part] for language in averaged], axis=0) for part in (0, 1))
        for language, (whole, resamples) in found.items():
            low, high = np.percentile(resamples, [2.5, 97.5])
            table[language] |= {f"chrfpp_{direction}": float(whole), f"chrfpp_{direction}_stderr": float(resamples.std(ddof=1)),
                                f"chrfpp_{direction}_interval": [float(low), float(high)]}
        if all("xcomet" in s for s in samples):
            at["all"] = [s for language in averaged for s in at[language]]
            for language, rows in at.items():
                values, clusters = [s["xcomet"] for s in rows], [s["question"] for s in rows]
                mean, low, high = clustered_interval(values, clusters)
                error = clustered_stderr(values, clusters) if language == "all" else stderr(values)
                table[language] |= {f"xcomet_{direction}": mean, f"xcomet_{direction}_stderr": error,
                                    f"xcomet_{direction}_interval": [low, high]}
    for language in table:
        rows = [s for s in samples if s["language"] in (averaged if language == "all" else [language])]
        table[language]["cut_off"] = sum(not s["ended"] for s in rows) / len(rows)
    return table
