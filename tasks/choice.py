"""
Multiple choice by likelihood: XCOPA, XStoryCloze, XWinograd, Global-MMLU and Global-MMLU-Lite, prompts and all as in
lm-evaluation-harness 0.4.13, whose numbers these are.

    xcopa             cause or effect of a premise; two choices behind the premise and a connective of the language
    xstory_cloze      the right ending of four sentences; two choices
    xwinograd         who is meant: the text up to the gap with either name in it, and how likely the rest is behind it
    global_mmlu       exam questions, 57 subjects, letters A to D; 5 examples: the subject's first ones of the dev rows
    global_mmlu_lite  the same for 400 questions a language; examples are drawn from the same category, seed 1234

acc: share of items whose right choice has the largest sum of log-probs; of equal ones the first counts. acc_stderr of a
language is lm-eval's (Global-MMLU: its group's, pooled over subjects, Lite: over categories); that of "all" is clustered by
question, as translations are not independent, and acc_pooled_stderr there is lm-eval's. Not comparable with harnesses that
divide by length or leave out the space in front of a Chinese choice.

Kept of lm-eval, though odd: XCOPA drops the premise's last character, full stop or not; Turkish "İ" becomes two code points;
Chinese and Japanese get a space between context and choice; Global-MMLU's letters and "Answer:" are English everywhere.
"""

import hashlib
import json
import random
from collections import Counter, defaultdict

import common
from benchmarks import find_file, folder_of, limited, need, read_table, wanted
from common import die, print0
from likelihood import score_texts
from stats import pooled_stderr, table_of

TASKS = ("xcopa", "xstory_cloze", "xwinograd", "global_mmlu", "global_mmlu_lite")
SETTINGS = ()  # an item holds all the text that is scored, examples included

MMLU = "ar cs de el en es fa fr he hi id it ja ko nl pl pt ro ru tr uk vi zh"
SOURCES = {  # repository, languages that are ours, and where a language's rows lie, in clones of several years
    "xcopa": ("cambridgeltl/xcopa", "id it tr vi zh",  # data-gmt/ holds machine translations: not by "**"
              ("{l}/test-*.parquet", "{l}/test*.jsonl", "data/{l}/test.{l}.jsonl", "test.{l}.jsonl")),
    "xstory_cloze": ("juletxara/xstory_cloze", "ar en es hi id ru zh", (
        "**/spring2016.val.{l}.tsv.split_20_80_eval.tsv", "{l}/*eval*.parquet", "{l}/*eval*.jsonl", "{l}/*eval*.tsv")),
    "xwinograd": ("Muennighoff/xwinograd", "en fr ja pt ru zh", (
        "test/{l}.jsonl", "{l}/*test*.parquet", "{l}/*test*.jsonl", "{l}.jsonl")),
    "global_mmlu": ("CohereLabs/Global-MMLU", MMLU, (
        "{l}/{split}*.parquet", "{l}/{split}*.jsonl", "{l}/{split}*.tsv", "{l}/{split}*.csv")),
    "global_mmlu_lite": ("CohereLabs/Global-MMLU-Lite", "ar de en es fr hi id it ja ko pt zh", (
        "{l}/{split}*.parquet", "{l}/{split}*.jsonl", "{l}/{split}*.tsv", "{l}/{split}*.csv"))}
OTHER_CODES = {"ja": ("jp", "ja")}  # of a language: what XWinograd calls it, and what it might

CONNECTIVES = {"id": ("karena", "maka"), "it": ("perché", "quindi"), "tr": ("çünkü", "bu yüzden"),
               "vi": ("bởi vì", "vì vậy"), "zh": ("因为", "所以")}  # cause, effect
CLOZE = {"story_id": "InputStoryid", "sentence_quiz1": "RandomFifthSentenceQuiz1",  # Hugging Face's header: Meta's
         "sentence_quiz2": "RandomFifthSentenceQuiz2", "answer_right_ending": "AnswerRightEnding"} | {
    f"input_sentence_{i}": f"InputSentence{i}" for i in range(1, 5)}
LETTERS, OPTIONS = "ABCD", ("option_a", "option_b", "option_c", "option_d")
COLUMNS = {"xcopa": ("premise", "choice1", "choice2", "question", "label"), "xstory_cloze": tuple(CLOZE.items()),
           "xwinograd": ("sentence", "option1", "option2", "answer"),
           "global_mmlu": ("sample_id", "subject", "subject_category", "question", "answer")}
COLUMNS["global_mmlu_lite"] = COLUMNS["global_mmlu"]


# ---------------------------------------------------------------------------------------------------------------------
# one row -> what is scored: {question, contexts, choices, answer}; one context and several choices, or the reverse

def place(value, names, where):
    """Which of the names a label is: 1, "1"; ends with one line if it is none of them."""
    if str(value).strip() not in names:
        die(f"{where}: the answer {value!r} is none of {' '.join(names)}")
    return names.index(str(value).strip())


def xcopa(row, language, number, where):
    connective = CONNECTIVES[language][place(row["question"], ("cause", "effect"), where)]
    choices = [row["choice1"], row["choice2"]]
    if not all(choices):
        return None
    return {"question": str(row.get("idx", number)), "contexts": [f"{row['premise'].strip()[:-1]} {connective}"],
            "choices": [f" {c[0].lower()}{c[1:]}" for c in choices], "answer": place(row["label"], ("0", "1"), where)}


def xstory_cloze(row, language, number, where):
    story = {name: row[name] if name in row else row[meta] for name, meta in CLOZE.items()}
    return {"question": str(story["story_id"]), "contexts": [" ".join(story[f"input_sentence_{i}"] for i in range(1, 5))],
            "choices": [f" {story['sentence_quiz1']}", f" {story['sentence_quiz2']}"],
            "answer": place(story["answer_right_ending"], ("1", "2"), where)}


def xwinograd(row, language, number, where):
    before, gap, behind = row["sentence"].partition("_")
    if not gap:
        return None
    return {"question": f"{language} {number}", "contexts": [before + row["option1"], before + row["option2"]],  # no parallels
            "choices": [f" {behind.strip()}"], "answer": place(row["answer"], ("1", "2"), where)}


def asked(row):
    """Global-MMLU's question, in all languages alike. An option that is null is "None", as in lm-eval."""
    options = "".join(f"\n{letter}. {row.get(name)}" for letter, name in zip(LETTERS, OPTIONS))
    return f"{str(row['question']).strip()}{options}\nAnswer:"


def global_mmlu(row, language, number, where):
    return {"question": row["sample_id"], "contexts": [asked(row)], "choices": [f" {letter}" for letter in LETTERS],
            "answer": place(row["answer"], tuple(LETTERS), where), "subject": row["subject"],
            "subject_category": row["subject_category"], "sensitivity": row.get("cultural_sensitivity_label")}


MAKE = {"xcopa": xcopa, "xstory_cloze": xstory_cloze, "xwinograd": xwinograd, "global_mmlu": global_mmlu,
        "global_mmlu_lite": global_mmlu}
GROUPS = {"global_mmlu": "subject", "global_mmlu_lite": "subject_category"}  # lm-eval's tasks inside a language


def examples_for(task, rows, dev, shots, language):
    """
    The text in front of each question: worked examples of its group's dev rows, the first ones, or for Lite as lm-eval's
    sampler draws them: random.Random(1234) a group, one draw a question in the file's order. Fewer if there are no more.
    """
    pools, column, short = defaultdict(list), GROUPS[task], Counter()
    for row in dev:
        pools[row[column]].append(f"{asked(row)} {row['answer']}\n\n")
    first = {name: "".join(pool[:shots]) for name, pool in pools.items()}
    draws, out = defaultdict(lambda: random.Random(1234)), []
    for row in rows:
        name, pool = row[column], pools.get(row[column], [])
        short[name] += len(pool) < shots
        drawn = task == "global_mmlu_lite" and shots
        out.append("".join(draws[name].sample(pool, min(shots, len(pool)))) if drawn else first.get(name, ""))
    if few := {name: len(pools[name]) for name, n in short.items() if n}:
        print0(f"{task}: {language}: fewer than {shots} examples: " + ", ".join(f"{k} {v}" for k, v in few.items()))
    return out


# ---------------------------------------------------------------------------------------------------------------------
# what eval.py calls (its docstring says how)

def file_of(task, folder, language, split="test"):
    """The file of a language's rows, or None."""
    codes = OTHER_CODES.get(language, ()) if task == "xwinograd" else ()
    return find_file(folder, *(pattern.format(l=code, split=split) for code in codes or (language,)
                               for pattern in SOURCES[task][2]))


def read_language(task, cfg, folder, path, language):
    """The items of one language, in the order of its file."""
    rows, examples, shots = need(read_table(path), COLUMNS[task], path), None, 5 if cfg.shots < 0 else cfg.shots
    if task in GROUPS and shots:
        dev = file_of(task, folder, language, "dev")
        if dev is None:
            die(f"{folder} has no dev rows in {language}, which the examples are taken from (or: --shots 0)")
        examples = examples_for(task, rows, need(read_table(dev), COLUMNS[task], dev), shots, language)
    if empty := sum(task in GROUPS and not all(row.get(option) for option in OPTIONS) for row in rows):
        print0(f"{task}: {language}: {empty} questions have an empty option; they are asked as they are, as lm-eval does")
    items, skipped = [], 0
    for number, row in enumerate(rows):
        if item := MAKE[task](row, language, number, f"{path}: row {number + 1}"):
            items.append({"id": f"{task}-{language}-{number}", "language": language,
                          "examples": examples[number] if examples else "", **item})
        skipped += not item
    if skipped:
        print0(f"{task}: {language}: {skipped} of {len(rows)} rows left out: no gap in the sentence, or an empty choice")
    return items


def read(task, cfg):
    repository, languages, patterns = SOURCES[task]
    folder, items, missing, left_out = folder_of(cfg.data, repository), [], [], 0
    for language in wanted(cfg.languages, languages.split(), task):
        path = file_of(task, folder, language)
        rows = read_language(task, cfg, folder, path, language) if path else []
        found = limited(rows, cfg.limit)
        left_out += len(rows) - len(found)
        missing += [language] * (path is None)
        order = {name: n for n, name in enumerate(dict.fromkeys(item.get("subject") for item in found))}
        items += sorted(found, key=lambda item: order[item.get("subject")])  # who shares examples stands together
    if missing and (cfg.languages or not items):
        names = [pattern.format(l=missing[0], split="test") for pattern in patterns]
        die(f"{folder} has no rows in {' '.join(missing)}: expected {', '.join(names)}")
    if missing:
        print0(f"{task}: {folder} has no rows in {' '.join(missing)}")
    if left_out:
        print0(f"{task}: --limit {cfg.limit} leaves out {left_out} of {left_out + len(items)} rows")
    return items


def pairs_of(item):
    """[(context, continuation)] whose likelihoods are compared."""
    return [(item["examples"] + context, choice) for context in item["contexts"] for choice in item["choices"]]


def run(task, model, chat, items, cfg):
    pairs, count, samples, begin = [pairs_of(item) for item in items], Counter(), [], 0
    scored = score_texts(model, chat, [pair for own in pairs for pair in own], cfg.batch_tokens, count)
    for item, own in zip(items, pairs):
        scores, greedy = map(list, zip(*scored[begin:begin + len(own)]))
        begin += len(own)
        chosen = scores.index(max(scores))
        digest = hashlib.sha256(json.dumps(own, ensure_ascii=False).encode("utf-8")).hexdigest()
        samples.append({key: value for key, value in item.items() if key not in ("examples", "contexts", "choices")} | {
            "scores": scores, "greedy": greedy, "chosen": chosen, "correct": chosen == item["answer"],
            "prompt_hash": digest[:16]})
    if cut := sum(common.gather_list([count["cut"]])):
        print0(f"{task}: {cut} contexts are longer than the model reads; they were cut on the left")
    return samples


def pooled(task, samples):
    """lm-eval's standard error of a group: over its tasks, which are languages, or subjects or categories of a language."""
    groups = defaultdict(list)
    for s in samples:
        groups[s["language"], s.get(GROUPS.get(task))].append(float(s["correct"]))
    return pooled_stderr(list(groups.values()))


def summarise(task, samples, baselines, cfg):
    table = table_of([s | {"acc": s["correct"]} for s in samples], ["acc"])
    table["all"]["acc_pooled_stderr"] = pooled(task, samples)
    for language, line in table.items():
        at = [s for s in samples if language in ("all", s["language"])]
        if task in GROUPS and at:
            line["acc_stderr"] = line["acc_stderr"] if language == "all" else pooled(task, at)
            parts = Counter(s["subject_category"] for s in at)
            right = Counter(s["subject_category"] for s in at if s["correct"])
            line["categories"] = {name: {"acc": right[name] / n, "n": n} for name, n in sorted(parts.items())}
    return table
