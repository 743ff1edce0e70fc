"""
The embedded dataset: right answers, no leaks, wrong answers that are wrong.

    python -m pytest tests/test_mini.py

The golden answers were looked at by eye and hold one example of every mend in mini/make.py. The last test remakes the
table with ICU where PyICU is installed.
"""

import gzip
import json
import os
import random
import re
import subprocess
import sys
import unicodedata
from collections import defaultdict
from pathlib import Path

import pytest

from mini.items import DEFAULT_TASKS, LANGUAGES, SPLITS, TASKS, WrongAnswers, bucket, load_items, load_udhr, rows
from mini.templates import TEMPLATES

MINI = Path(__file__).resolve().parents[1] / "mini"
NOT_LATIN = ("ar", "el", "fa", "he", "hi", "ja", "ko", "ru", "uk", "zh", "zh-Hant")
KINDS = {"one_digit_off", "digits_swapped", "wrong_plural", "wrong_direction", "wrong_unit", "english_order",
         "wrong_language", "truncated", "repeated"}
NEAR = KINDS - {"english_order", "wrong_language", "truncated", "repeated"}

GOLDEN = """
spell-ar-2 اثنان
spell-ar-12 اثنا عشر
spell-ar-11 أحد عشر
spell-ar-111 مائة وأحد عشر
spell-ar-347 ثلاثمائة وسبعة وأربعون
spell-ar-400 أربعمائة
spell-ar-605 ستمائة وخمسة
spell-ar-800 ثمانمائة
spell-ar-900 تسعمائة
spell-el-95 ενενήντα πέντε
spell-el-101 εκατόν ένα
spell-he-120 מאה ועשרים
spell-he-130 מאה ושלושים
spell-he-110 מאה ועשר
spell-he-347 שלוש מאות ארבעים ושבע
spell-ro-14 paisprezece
spell-ro-116 o sută șaisprezece
spell-ro-67 șaizeci și șapte
spell-zh-105 一百零五
spell-zh-Hant-0 零
spell-ja-0 零
spell-ko-0 영
spell-ko-347 삼백사십칠
spell-uk-5 п’ять
spell-it-21 ventuno
spell-de-347 dreihundertsiebenundvierzig
spell-nl-22 tweeëntwintig
spell-fr-347 trois cent quarante-sept
spell-hi-347 तीन सौ सैंतालीस
spell-fa-347 سیصد و چهل و هفت
spell-vi-605 sáu trăm lẻ năm
relative-he-+2 h בעוד שעתיים
relative-he--2 mo לפני חודשיים
relative-fr--5 h il y a 5 heures
relative-fa-+3 d ۳ روز دیگر
relative-ar--2 mo قبل شهرين
relative-ru-+21 min через 21 минуту
relative-ja-+21 min 21 分後
unit-ru-21 km 21 километр
unit-ru-22 h 22 часа
unit-fa-21 L ۲۱ لیتر
unit-he-22 h 22 שעות
unit-ko-2 km 2킬로미터
date-fa-2007-06-22 ۲۲ ژوئن ۲۰۰۷
date-de-2007-06-22 22. Juni 2007
list-en-12-8-16 June, February, and October
list-he-13-9 יולי ומרץ
translate-en-unit-36 kg 36 kilograms
translate-ja-relative-+34 yr 34 年後
"""


@pytest.fixture(scope="module")
def items():
    return load_items(TASKS)


@pytest.fixture(scope="module")
def made():
    return rows(tasks=TASKS)


def test_every_task_has_a_template_in_every_language():
    assert tuple(TEMPLATES) == TASKS
    for task, templates in TEMPLATES.items():
        assert tuple(templates) == LANGUAGES
        assert all(template.count("{x}") == 1 for template in templates.values()), task
        assert len(set(templates.values())) == len(LANGUAGES), f"two languages share their {task} template"


def test_counts_are_those_of_the_readme(items, made):
    readme = (MINI / "README.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| (\w+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", readme, re.M)
    assert [task for task, *_ in table] == list(TASKS)
    count = defaultdict(int)
    for row in made:
        count[row["task"], row["split"], row["language"]] += 1
    for task, *numbers in table:
        for split, number in zip(SPLITS, numbers):
            assert {count[task, split, language] for language in LANGUAGES} == {int(number)}, (task, split)
    assert len([item for item in items if item["task"] != "translate"]) == 3_515
    assert (len(rows()), len(made)) == (51_840, 105_528)
    assert [len(rows(split)) for split in SPLITS] == [32_328, 5_640, 8_784, 5_088]
    assert len(LANGUAGES) == 24


def test_golden_answers(made):
    golden = dict(re.findall(r"^(\S+(?: (?:km|kg|L|h|d|mo|min|yr))?) (.+)$", GOLDEN, re.M))  # id, answer
    assert len(golden) == len(GOLDEN.strip().splitlines())
    reference = {row["id"]: row["reference"] for row in made}
    assert {name: reference[name] for name in golden} == golden


def test_prompts_hold_the_payload(made):
    prompt = {row["id"]: row["prompt"] for row in made}
    assert prompt["spell-fr-347"] == "Écris le nombre 347 en toutes lettres."
    assert prompt["relative-ko--5 h"] == "지금을 기준으로 다음을 표현하세요: -5 h"
    assert prompt["list-fr-14-7"] == "Relie ces mots en une liste : août / janvier"
    assert prompt["translate-en-spell-466"] == "Translate into English: cuatrocientos sesenta y seis"
    assert prompt["translate-fr-unit-2 s"] == "Traduis en français : 2 seconds"
    assert not any("{" in text for text in prompt.values())


def test_one_answer_a_prompt_and_one_row_an_id(made):
    assert len({row["id"] for row in made}) == len(made)
    answers = defaultdict(set)
    for row in made:
        answers[row["prompt"]].add((row["language"], row["reference"]))  # over all languages: a prompt names its own
    assert [prompt for prompt, found in answers.items() if len(found) > 1] == []


def test_an_item_is_in_one_split_in_all_languages_and_no_answer_leaks(items, made):
    split_of, splits = {}, defaultdict(set)
    for row in made:
        item = row["id"].replace(f"-{row['language']}-", "-", 1)
        assert split_of.setdefault(item, row["split"]) == row["split"], item
        splits[row["task"], row["language"], row["reference"]].add(row["split"])
    assert [name for name, found in splits.items() if len(found) > 1] == []
    of = {(item["task"], item["key"]): item["split"] for item in items}
    assert all(item["split"] == of[item["key"]] for item in items if item["task"] == "translate")


def test_splits_are_the_hash_of_the_item(items):
    assert (bucket(("spell", 347)), bucket(("relative", (-5, "h")))) == (84, 65)  # from sha256sum and bc
    atoms = {(("spell", n)) for n in [*range(21), *range(30, 100, 10), *range(100, 1000, 100)]}
    for item in items:
        task, key = item["task"], item["key"]
        if task in DEFAULT_TASKS:
            atom = (task, key) in atoms if task == "spell" else abs(key[0]) <= 2
            r = bucket((task, key))
            expected = "teacher" if atom or r < 60 else "rm" if r < 72 else "prefer" if r < 90 else "test"
            assert item["split"] == expected, (task, key)


def test_scripts_and_stray_characters(items):
    for language in LANGUAGES:
        texts = [item["ref"][language] for item in items]
        assert all(text and text == unicodedata.normalize("NFC", text).strip() and "  " not in text for text in texts)
        for c in set().union(*texts):
            odd = unicodedata.category(c) in ("Cc", "Cf", "Zs") and c != " "
            assert not odd or language == "fa" and c == "\u200c", (language, c)  # U+200C: Persian spelling needs it
            assert language not in NOT_LATIN or "LATIN" not in unicodedata.name(c), (language, c)
            assert not c.isdigit() or c.isascii() == (language != "fa"), (language, c)
    assert not any("\u02bc" in item["ref"]["uk"] for item in items)


def test_udhr():
    text = {row["id"]: row["text"] for row in load_udhr()}
    assert list(text) == [f"udhr-{language}-{n}" for language in LANGUAGES for n in range(31)]
    assert text["udhr-fr-30"].startswith("Article 30\nAucune disposition de la présente Déclaration")
    assert text["udhr-ja-0"].startswith("『世界人権宣言』\n〈前文〉\n人類社会")
    assert not any("<" in t or "&" in t or not t.strip() for t in text.values())
    assert {row["article"] for row in load_udhr(range(25, 31))} == set(range(25, 31))
    assert len(load_udhr([1])) == 24


def test_size():
    data = [MINI / name for name in ("items.jsonl.gz", "words.json", "udhr.jsonl.gz")]
    assert sum(path.stat().st_size for path in data) < 500_000  # the README's "under 0.5 MB"
    assert all(path.read_bytes()[3:8] == bytes(5) for path in data if path.suffix == ".gz")  # no file name, no time


def test_errors_name_what_exists():
    for call, word in ((lambda: rows("dev"), "teacher"), (lambda: rows(languages=("xx",)), "zh-Hant"),
                       (lambda: rows(tasks=("spel",)), "spell")):
        with pytest.raises(ValueError, match=word):
            call()


# --- wrong answers ---

def wrong_of(items, split, tasks=DEFAULT_TASKS, per_kind=99):
    wrong, rng = WrongAnswers(items, per_kind), random.Random(0)
    for item in items:
        if item["split"] == split and item["task"] in tasks:
            for language in LANGUAGES:
                yield item, language, wrong(item["task"], item["x"], language, rng)


def test_wrong_answers_are_wrong_and_every_kind_occurs(items):
    seen, fewest = defaultdict(int), 99
    for item, language, answers in wrong_of(items, "rm"):
        assert all(text and text == text.strip() and text != item["ref"][language] for _, text in answers)
        assert len(set(answers)) == len(answers)
        for why, _ in answers:
            seen[item["task"], why] += 1
        fewest = min(fewest, sum(why in NEAR for why, _ in answers))
    assert {why for _, why in seen} == KINDS
    assert {why for task, why in seen if task == "relative"} == KINDS - {"english_order"}
    assert fewest >= 1  # every item has a near miss in every language


def test_wrong_answers_show_nothing_hidden(items):
    """Not even for a test item: what it returns is no other prefer or test item's answer, in whatever language."""
    hidden = defaultdict(set)
    for item in items:
        if item["split"] in ("prefer", "test"):
            name = item["key"] if item["task"] == "translate" else (item["task"], item["key"])
            for text in item["ref"].values():
                hidden[text].add(name)
    for split in ("rm", "test"):
        for item, language, answers in wrong_of(items, split, TASKS):
            name = item["key"] if item["task"] == "translate" else (item["task"], item["key"])
            assert all(hidden.get(text, set()) <= {name} for _, text in answers), (item["x"], language)


@pytest.mark.parametrize("task, x, language, expected", [
    ("spell", "764", "de", {("english_order", "siebenhundert sechzig vier"), ("wrong_language", "七百六十四")}),
    ("spell", "487", "de", {("digits_swapped", "siebenhundertvierundachtzig"),
                            ("one_digit_off", "vierhundertsiebenundneunzig")}),
    ("spell", "246", "fr", {("digits_swapped", "six cent quarante-deux"), ("truncated", "deux cent"),
                            ("repeated", "deux cent quarante-six quarante-six")}),
    ("relative", "-37 d", "ar", {("wrong_plural", "قبل 37 أيام"), ("wrong_direction", "خلال 37 يومًا"),
                                 ("wrong_unit", "قبل 37 ساعة"), ("truncated", "قبل 37")}),
    ("relative", "-29 min", "fa", {("wrong_unit", "۲۹ هفته پیش"), ("repeated", "۲۹ دقیقه پیش پیش")}),
    ("unit", "41 km", "ru", {("wrong_plural", "41 километра"), ("wrong_plural", "41 километров"),
                             ("wrong_unit", "41 литр"), ("digits_swapped", "14 километров"),
                             ("one_digit_off", "31 километр")}),
])
def test_wrong_answers_golden(items, task, x, language, expected):
    found = set(WrongAnswers(items, per_kind=99)(task, x, language, random.Random(0)))
    assert expected <= found, expected - found


def test_wrong_answers_skip_what_is_right_as_well(items):
    wrong = WrongAnswers(items, per_kind=99)
    assert "truncated" not in {why for why, _ in wrong("relative", "+38 h", "vi", random.Random(0))}
    assert "repeated" in {why for why, _ in wrong("relative", "+38 h", "vi", random.Random(0))}
    directions = {text.split(" ")[0] for why, text in wrong("relative", "+3 s", "de", random.Random(0))
                  if why == "one_digit_off"}
    assert directions == {"in"}  # 3 - 10 is not "7 seconds ago"


def test_wrong_plurals_keep_number_and_direction(items):
    for item, language, answers in wrong_of(items, "rm"):
        forms = [text for why, text in answers if why == "wrong_plural"]
        assert language not in ("fa", "id", "ja", "ko", "tr", "vi", "zh", "zh-Hant") or not forms  # these have one form
        n = str(abs(item["key"][0])) if forms else ""
        assert all(re.findall(r"\d+", text) == [n] for text in forms)
        if item["task"] == "relative" and language == "de":
            assert all(text.startswith("vor" if item["key"][0] < 0 else "in") for text in forms)


def test_wrong_answers_are_the_same_in_every_process():
    code = ("import random; from mini.items import *; wrong = WrongAnswers(load_items(), 2);"
            "print(ascii([wrong(*a, random.Random(0)) for a in (('spell', '487', 'he'), ('unit', '41 km', 'pl'))]))")
    shown = [subprocess.run([sys.executable, "-c", code], cwd=MINI.parent, capture_output=True, text=True, check=True,
                            env=os.environ | {"PYTHONHASHSEED": seed}).stdout for seed in "123"]
    assert shown[0] == shown[1] == shown[2] and "wrong_plural" in shown[0]


def test_wrong_answers_repeat_with_the_seed(items):
    one, two = WrongAnswers(items), WrongAnswers(items)
    drawn = [wrong("spell", "487", "de", random.Random(3)) for wrong in (one, one, two)]
    assert drawn[0] == drawn[1] == drawn[2] != one("spell", "487", "de", random.Random(4))
    count = defaultdict(int)
    for why, _ in drawn[0]:
        count[why] += 1
    assert max(count.values()) == 4
    with pytest.raises(ValueError, match="no item spell"):
        one("spell", "1000", "de", random.Random(0))


def test_remade_with_icu():
    pytest.importorskip("icu", reason="needs icukit-pyicu==78.3.1")
    from mini import make
    if make.icu.ICU_VERSION != make.ICU_VERSION:
        pytest.skip(f"PyICU here holds ICU {make.icu.ICU_VERSION}")
    words = {language: make.words_of(language) for language in LANGUAGES}
    assert words == json.loads((MINI / "words.json").read_text(encoding="utf-8"))
    with gzip.open(MINI / "items.jsonl.gz", "rt", encoding="utf-8") as f:
        assert [json.loads(line) for line in f] == list(make.make_items(words))
