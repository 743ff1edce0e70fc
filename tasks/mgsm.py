"""
MGSM: 250 grade-school problems whose answer is a whole number, translated from GSM8K. Shi et al. 2022,
https://arxiv.org/abs/2210.03057. It has 7 of our languages, and bn, sw, te and th, which run if --languages names them.

    mgsm             for chat models: an instruction in the language, through the model's chat template, no examples; the
                     answer stands on the last line behind the language's word for it (tasks/final_number.py finds it)
    mgsm_native_cot  as lm-evaluation-harness 0.4.13 has it, character for character: a text to go on with, reasoning
    mgsm_direct      in the language or the bare answer, --shots N solved examples in front (drawn as there, seed 1234)

--data holds juletxara/mgsm (DIR/mgsm: parquet, jsonl or tsv) or a clone of google-research/url-nlp (mgsm_<l>.tsv, without
header, and exemplars.py).

The figures: exact_match (mgsm), no_answer: share of replies without a number, no_answer_line: share where it was not where it
was asked for, cut_off: share that had not ended after --max_new_tokens. The harness' tasks give exact_match by each of its two
filters, and the share that a filter found nothing in (_invalid).
"""

import ast
import random
import re
import string

from benchmarks import find_file, folder_of, need, read_table, wanted
from common import die
from languages import LANGUAGES
from stats import table_of
from tasks.final_number import canonical, final_number
from tasks.replies import go_on, reply

TASKS = ("mgsm", "mgsm_native_cot", "mgsm_direct")
SETTINGS = ("max_new_tokens",)
REPOSITORY = "juletxara/mgsm"
MAX_NEW_TOKENS = {"mgsm": 1024, "mgsm_native_cot": 256, "mgsm_direct": 256}  # 256: lm-evaluation-harness' own

INSTRUCTIONS = {  # ours; each asks for the first of the language's ANSWER_WORDS
    "bn": "নিচের অঙ্কটি ধাপে ধাপে সমাধান করো। শেষ লাইনে \"উত্তর:\" লিখে তার পরে শুধু চূড়ান্ত সংখ্যাটি লেখো।",
    "de": "Löse die folgende Rechenaufgabe und zeige die Rechenschritte. Schreibe in die letzte Zeile „Antwort:“ und dahinter "
          "nur die gesuchte Zahl.",
    "en": "Solve the maths problem below and show your steps. On the last line, write \"Answer:\" and after it only the final "
          "number.",
    "es": "Resuelve el siguiente problema de matemáticas mostrando los pasos. En la última línea escribe «Respuesta:» y, a "
          "continuación, solo el número final.",
    "fr": "Résous le problème de mathématiques ci-dessous en montrant les étapes. Sur la dernière ligne, écris « Réponse : » "
          "puis uniquement le nombre final.",
    "ja": "次の算数の問題を、途中の計算を示しながら解いてください。最後の行には「答え:」と書き、その後に最終的な数だけを書いてください。",
    "ru": "Реши задачу, показав ход решения по шагам. В последней строке напиши «Ответ:» и после него только итоговое число.",
    "sw": "Tatua swali la hisabati lifuatalo ukionyesha hatua zako. Kwenye mstari wa mwisho andika \"Jibu:\" kisha nambari ya "
          "mwisho pekee.",
    "te": "కింది గణిత సమస్యను దశలవారీగా పరిష్కరించండి. చివరి పంక్తిలో \"సమాధానం:\" అని రాసి, "
          "దాని తర్వాత తుది సంఖ్యను మాత్రమే రాయండి.",
    "th": "จงแก้โจทย์คณิตศาสตร์ต่อไปนี้โดยแสดงวิธีทำทีละขั้น ในบรรทัดสุดท้ายให้เขียน \"คำตอบ:\" "
          "ตามด้วยตัวเลขคำตอบสุดท้ายเท่านั้น",
    "zh": "请解答下面的数学题，并写出每一步的计算过程。最后一行请写“答案:”，后面只写最终的数字。"}

# ---------------------------------------------------------------------------------------------------------------------
# lm-evaluation-harness: tasks/mgsm/*/*.yaml. What looks wrong there is wrong here too, and marked (!)

HARNESS = {  # question, step-by-step answer, direct answer, what stands in front of the number
    "bn": ("প্রশ্ন:", "ধাপে ধাপে উত্তর:", "Answer:", r"The answer is (\-?[0-9\.\,]+)"),  # (!) an English pattern
    "de": ("Frage:", "Schritt-für-Schritt-Antwort:", "Antwort:", r"Die Antwort lautet (\-?[0-9\.\,]+)"),
    "en": ("Question:", "Step-by-Step Answer:", "Answer:", r"The answer is (\-?[0-9\.\,]+)"),
    "es": ("Pregunta:", "Respuesta paso a paso:", "Respuesta:", r"La respuesta es (\-?[0-9\.\,]+)"),
    "fr": ("Question :", "Réponse étape par étape :", "Réponse :", r"La réponse est (\-?[0-9\.\,]+)"),
    "ja": ("問題：", "ステップごとの答え:", "Answer:", r"答えは(\-?[0-9\.\,]+)です。"),
    "ru": ("Задача:", "Пошаговоерешение:", "Answer:", r"Ответ — (\-?[0-9\.\,]+)"),  # (!) two words without their space
    "sw": ("Swali:", "Jibu la Hatua kwa Hatua:", "Answer:", r"Jibu ni (\-?[0-9\.\,]+)"),
    "te": ("ప్రశ్న:", "దశలవారీగా సమాధానం:", "Answer:", r"సమాధానం (\-?[0-9\.\,]+)"),
    "th": ("โจทย์:", "คำตอบทีละขั้นตอน:", "Answer:", r"คำตอบคือ (\-?[0-9\.\,]+)"),
    "zh": ("问题：", "逐步解答:", "Answer:", r"答案是 (\-?[0-9\.\,]+)。")}
FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
INVALID = "[invalid]"


def harness_prompt(task, language, question, examples):
    """The text that the model goes on with. `examples`: rows with question, answer and answer_number, from the train split."""
    question_word, steps, direct, _ = HARNESS[language]
    answer_word = steps if task == "mgsm_native_cot" else direct
    shots = ""
    for row in examples:
        if task == "mgsm_native_cot":
            # (!) cuts the label and one character more. The published zh and ja answers have a full-width colon and no space
            # behind it, so their first letter goes; ru's label is one character longer there, so a space too many stays
            target, delimiter = row["answer"][len(steps) + 1:], " "
        else:
            target, delimiter = str(row["answer_number"]), ""
        shots += f"{row['question']}\n{answer_word}" + (f"{delimiter}{target}\n\n" if target else "")
    return f"{shots}{question_word} {question}\n{answer_word}"


def harness_stops(language):
    """Strings that end a completion, besides the tokens that do; each cuts at its first place."""
    return (HARNESS[language][0], "</s>", "<|im_end|>")


def strict(language, text):
    """What the language's phrase introduces, its first place."""
    found = re.search(HARNESS[language][3], text)
    return found[1] if found else INVALID


def flexible(text):
    """The last thing that looks like a number (or like two dots)."""
    found = FLEXIBLE.findall(text)
    return next(part for part in found[-1] if part) if found else INVALID


def harness_match(answer, gold):
    """exact_match with ignore_case and ignore_punctuation: (!) -5 is 5, 19.0 is 190."""
    bare = str.maketrans("", "", string.punctuation)
    return answer.lower().translate(bare) == gold.lower().translate(bare)


def filtered(task, language, text):
    """{filter: what it leaves of a completion}"""
    first = {"strict_match": strict(language, text)} if task == "mgsm_native_cot" else {"remove_whitespace": text.strip()}
    return first | {"flexible_extract": flexible(text)}


# ---------------------------------------------------------------------------------------------------------------------
# files

def whole_number(text, where):
    """"1,250" -> 1250; the published answers are whole numbers with thousands commas, or (parquet) ints."""
    try:
        return int(str(text).replace(",", ""))
    except ValueError:
        die(f"{where}: the answer {text!r} is no whole number")


def problems(folder, language):
    """-> [{"question", "answer_number"}]"""
    path = find_file(folder, f"**/mgsm_{language}.tsv", *patterns(language, "test"), f"**/mgsm_{language}.jsonl")
    if path is None:
        die(f"{folder} has no MGSM in {language}: neither mgsm_{language}.tsv nor {language}/test-*.parquet or .jsonl")
    if path.suffix == ".tsv":
        rows = read_table(path, ("question", "answer_number"))
        rows = rows[1:] if rows and rows[0]["question"] == "question" else rows  # the published files have no header
    else:
        rows = need(read_table(path), ("question", "answer_number"), path)
    return [{"question": row["question"], "answer_number": whole_number(row["answer_number"], f"{path}: row {n}")}
            for n, row in enumerate(rows, 1)]


def patterns(language, split):
    return (f"**/{language}/{split}*.parquet", f"**/{language}/*{split}*.parquet", f"**/{language}/{split}/*.parquet",
            f"**/{language}/{split}*.jsonl")


def solved(folder, language):
    """The 8 solved examples -> [{"question", "answer", "answer_number"}], from the train split or from exemplars.py."""
    columns = ("question", "answer", "answer_number")
    if path := find_file(folder, *patterns(language, "train"), f"**/mgsm_{language}_train.jsonl"):
        return need(read_table(path), columns, path)
    path = find_file(folder, "**/exemplars.py")
    if path is None:
        die(f"{folder} has no solved examples in {language}: neither {language}/train-*.parquet or .jsonl nor exemplars.py")
    names = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and node.targets[0].id in ("EXEMPLAR_NUMBER_ANSWERS", "MGSM_EXEMPLARS"):
            names[node.targets[0].id] = ast.literal_eval(node.value)
    numbers, found = names.get("EXEMPLAR_NUMBER_ANSWERS", []), names.get("MGSM_EXEMPLARS", {}).get(language)
    if not found or len(numbers) != len(found):
        die(f"{path} has no solved examples in {language} (MGSM_EXEMPLARS, EXEMPLAR_NUMBER_ANSWERS)")
    return [dict(zip(columns, (row["q"], row["a"], number))) for row, number in zip(found.values(), numbers)]


# ---------------------------------------------------------------------------------------------------------------------
# what eval.py calls (its docstring says how)

def languages_of(cfg):
    """Ours that MGSM has; of its others, those that are asked for."""
    others = [language for language in cfg.languages if language in HARNESS and language not in LANGUAGES]
    ours = [language for language in cfg.languages if language not in others]
    known = [language for language in HARNESS if language in LANGUAGES]
    return (wanted(ours, known, "mgsm") if ours or not others else []) + others


def read(task, cfg):
    folder, items = folder_of(cfg.data, REPOSITORY), []
    shots = 0 if task == "mgsm" else max(cfg.shots, 0)  # the chat variant asks without examples; so does lm-eval by default
    for language in languages_of(cfg):
        rows, draw = problems(folder, language), random.Random(1234)  # lm-evaluation-harness: one generator a language
        train = solved(folder, language) if shots else []
        if shots > len(train):
            die(f"--shots {shots}: {folder} has {len(train)} solved examples in {language}")
        for number, row in enumerate(rows[:cfg.limit or None]):
            examples = draw.sample(train, shots)  # for every question anew, and in an order that is drawn too
            prompt = (f"{INSTRUCTIONS[language]}\n\n{row['question']}" if task == "mgsm" else
                      harness_prompt(task, language, row["question"], examples))
            items.append({"id": f"{task}-{language}-{number}", "language": language, "question": str(number),
                          "prompt": prompt, "reference": canonical(row["answer_number"])})
    return items


def run(task, model, chat, items, cfg):
    limit = cfg.max_new_tokens or MAX_NEW_TOKENS[task]
    if task == "mgsm":
        if chat.template is None:
            die(f"{chat.folder} has no chat template: mgsm is for chat models; a base model takes mgsm_native_cot")
        return [item | judged(made, item) for item, made in zip(items, reply(model, chat, items, limit))]
    made = go_on(model, chat, items, limit, lambda item: harness_stops(item["language"]))
    return [item | harness_judged(task, said, item) for item, said in zip(items, made)]


def judged(made, item):
    """A completion row -> what mgsm says of it."""
    answer, where = final_number(made["completion"], item["language"], made["ended"])
    return {"completion": made["completion"], "ended": made["ended"], "answer": answer, "where": where,
            "correct": answer == item["reference"]}


def harness_judged(task, made, item):
    answers = filtered(task, item["language"], made["completion"])
    return {"completion": made["completion"], "ended": made["ended"], "answers": answers,
            "correct": {name: harness_match(answer, item["reference"]) for name, answer in answers.items()}}


def summarise(task, samples, baselines, cfg):
    rows = []
    for s in samples:
        row = {"language": s["language"], "question": s["question"], "cut_off": not s["ended"]}
        if task == "mgsm":
            row |= {"exact_match": s["correct"], "no_answer": s["answer"] is None, "no_answer_line": s["where"] != "answer"}
        else:
            row |= s["correct"] | {f"{name}_invalid": answer == INVALID for name, answer in s["answers"].items()
                                   if name != "remove_whitespace"}  # it takes whatever was said
        rows.append(row)
    return table_of(rows, [name for name in rows[0] if name not in ("language", "question")] if rows else [])
