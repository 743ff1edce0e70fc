"""
The miniature's data: questions with one right answer, in 23 languages (Chinese in both scripts), and one real text.

An item is asked in every language with the same payload ("347", "-5 h", "21 km") and its answers come from Unicode
CLDR, so an answer is right or wrong by string equality. Its split is the same in all languages:

    teacher   with references: tokenizer, base model, the pool of teachers
    rm        with references: the reward model alone
    prefer    prompts only: arbitrage, offline and online DPO (no training step may read these references)
    test      held out: exact match, chrF++, win rate

    python -c "from mini.items import rows; print(*rows('test', languages=('fr',))[:3], sep='\n')"

The rows come from items.jsonl.gz, words.json and udhr.jsonl.gz beside this file; mini/make.py remakes all three.
"""

import datetime
import gzip
import hashlib
import json
from pathlib import Path

from mini.templates import LANGUAGES, TEMPLATES

FOLDER = Path(__file__).resolve().parent
TASKS = ("spell", "relative", "unit", "date", "list", "translate")
DEFAULT_TASKS = ("spell", "relative", "unit")  # what a tiny model learns in minutes; the others want more steps
SPLITS = ("teacher", "rm", "prefer", "test")
# translate is derived from the other tasks: this many percent of their items, the source being the English answer
TRANSLATED = {"relative": 50, "unit": 40, "date": 20, "spell": 25}


def bucket(value):
    """A number in 0..99 that depends on nothing but `value`: splits drawn by it never move (sha256 of its repr)."""
    return int(hashlib.sha256(repr(value).encode("utf-8")).hexdigest(), 16) % 100


def key_of(task, x):
    """The payload as a Python value: 347, (-5, "h"), (21, "km"), a date, a tuple of word indices. Splits hash these."""
    if task == "spell":
        return int(x)
    if task in ("relative", "unit"):
        n, unit = x.split(" ")
        return int(n), unit
    if task == "date":
        return datetime.date.fromisoformat(x)
    if task == "list":
        return tuple(x)
    of, x = x.split("-", 1)  # translate: "relative--5 h" is the item "-5 h" of relative
    return of, key_of(of, x)


def _lines(name):
    with gzip.open(FOLDER / name, "rt", encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def load_items(tasks=DEFAULT_TASKS):
    """-> [{"task", "split", "x", "ref": {language: answer}, "key": key_of(task, x)}], in the order of `tasks`.

    Raises ValueError for a task that does not exist.
    """
    if unknown := set(tasks) - set(TASKS):
        raise ValueError(f"no task {', '.join(sorted(unknown))} in the miniature; it has {', '.join(TASKS)}")
    of_task = {task: [] for task in TASKS}
    for item in _lines("items.jsonl.gz"):
        item["key"] = key_of(item["task"], item["x"])
        of_task[item["task"]].append(item)
    for of, percent in TRANSLATED.items() if "translate" in tasks else ():
        for item in of_task[of]:
            x, key = f"{of}-{item['x']}", (of, item["key"])
            if bucket(("tr", *key)) < percent:
                of_task["translate"].append(item | {"task": "translate", "x": x, "key": key})
    return [item for task in tasks for item in of_task[task]]


def rows(split=None, tasks=DEFAULT_TASKS, languages=LANGUAGES):
    """-> [{"id", "language", "task", "split", "prompt", "reference"}], language by language.

    split: one of SPLITS, or None for all. ids: `spell-ar-517`, `relative-de-+3 d`, `list-en-0-13`,
    `translate-fr-unit-2 s`. Raises ValueError for an unknown split, task or language.
    """
    if split is not None and split not in SPLITS:
        raise ValueError(f"no split {split!r} in the miniature; it has {', '.join(SPLITS)}")
    if unknown := set(languages) - set(LANGUAGES):
        raise ValueError(f"no language {', '.join(sorted(unknown))} in the miniature; it has {', '.join(LANGUAGES)}")
    words = json.loads((FOLDER / "words.json").read_text(encoding="utf-8"))
    items = [item for item in load_items(tasks) if split in (None, item["split"])]
    out = []
    for language in languages:
        for item in items:
            task, x = item["task"], item["x"]
            name = "-".join(map(str, x)) if task == "list" else x
            if task == "list":
                x = " / ".join(words[language][i] for i in x)
            elif task == "translate":
                x = item["ref"]["es" if language == "en" else "en"]
            out.append({"id": f"{task}-{language}-{name}", "language": language, "task": task, "split": item["split"],
                        "prompt": TEMPLATES[task][language].replace("{x}", x), "reference": item["ref"][language]})
    return out


def load_udhr(articles=range(0, 31)):
    """The Universal Declaration of Human Rights -> [{"id", "language", "article", "text"}]; 0 is title and preamble."""
    wanted = set(articles)
    return [row for row in _lines("udhr.jsonl.gz") if row["article"] in wanted]


# --- wrong answers: what a reward model has to rank below the reference ---

class WrongAnswers:
    """wrong = WrongAnswers(items); wrong(task, x, language, rng) -> [(why, text)]: wrong answers, each in a known way.

    `items`: what load_items() returns, with all its splits: the hidden ones say what must not be shown. An answer taken
    from another item is a `teacher` or `rm` item's, and a text that answers another `prefer` or `test` item is never
    returned, so preferences made of these leak nothing. At most `per_kind` of a kind, chosen by `rng` (random.Random).
    The first five kinds are near misses and exist for spell, relative and unit only:

        one_digit_off    the answer for n ± 1, ± 10, ± 100
        digits_swapped   the answer for n with two digits exchanged: 347 -> 743
        wrong_plural     the right number and unit in the form of another number: "5 hour ago"
        wrong_direction  "in 5 hours" for "5 hours ago"
        wrong_unit       the same number, another unit
        english_order    hundreds, tens, ones side by side, as in English: de "dreihundert vierzig sieben" (spell only)
        wrong_language   the right answer in another language
        truncated        the last word missing (answers of three words and more)
        repeated         the last word twice (likewise)
    """

    def __init__(self, items, per_kind=4):
        self.per_kind = per_kind
        self.refs = {self._name(item["task"], item["key"]): item["ref"] for item in items}
        self.free = {self._name(item["task"], item["key"]) for item in items if item["split"] in ("teacher", "rm")}
        self.hidden = {}  # text -> the prefer and test items that it answers, in whatever language
        for name in self.refs.keys() - self.free:
            for text in self.refs[name].values():
                self.hidden.setdefault(text, set()).add(name)
        self.units = {task: sorted({key[1] for t, key in self.refs if t == task}) for task in ("relative", "unit")}
        self.forms = {}  # (task, sign, unit, language) -> the answers with {n} for the number, filled when asked for

    def __call__(self, task, x, language, rng):
        own = self._name(task, key_of(task, x))
        if own not in self.refs:
            raise ValueError(f"no item {task} {x!r} among the {len(self.refs)} items given")
        task, key = own
        kinds = {**self._near_misses(task, key, language), **self._gross(task, key, language)}
        out = []
        for why, texts in kinds.items():  # each text once, in a fixed order: a set's would change from run to run
            texts = [text for text in dict.fromkeys(texts)
                     if text and text != self.refs[own][language] and self.hidden.get(text, {own}) == {own}]
            out += [(why, text) for text in rng.sample(texts, min(self.per_kind, len(texts)))]
        return out

    @staticmethod
    def _name(task, key):
        return key if task == "translate" else (task, key)  # a translated item has the answers of the item behind it

    def _near_misses(self, task, key, language):
        if task not in DEFAULT_TASKS:
            return {}
        n, unit = (key, None) if task == "spell" else key
        size, sign = abs(n), (-1 if n < 0 else 1)

        def answer(number, unit=unit, sign=sign):  # of another item; None where there is none
            other = (sign * number, unit) if unit else number
            return self.refs.get((task, other), {}).get(language) if number >= 0 else None  # 3 - 10 is not "7 ago"

        kinds = {"one_digit_off": [answer(size + step) for step in (-1, 1, -10, 10, -100, 100)],
                 "digits_swapped": [answer(number) for number in _swaps(size)]}
        if unit:
            forms = self._forms(task, sign, unit, language)
            kinds["wrong_plural"] = [form.replace("{n}", str(size)) for form in forms]
            kinds["wrong_unit"] = [answer(size, unit=other) for other in self.units[task] if other != unit]
        if task == "relative":
            kinds["wrong_direction"] = [answer(size, sign=-sign)]
        return kinds

    def _forms(self, task, sign, unit, language):
        """The ways in which a unit stands beside a number, in one direction: ["in {n} hour", "in {n} hours"]."""
        name = (task, sign, unit, language)
        if name not in self.forms:
            forms = set()
            for other, key in self.free:
                if other == task and key[1] == unit and key[0] * sign > 0:
                    digits, text = str(abs(key[0])), self.refs[other, key][language]
                    if digits in text:  # no "قبل شهرين" ("two months ago", without a 2); Persian has only one form
                        forms.add(text.replace(digits, "{n}"))
            self.forms[name] = sorted(forms)
        return self.forms[name]

    def _gross(self, task, key, language):
        ref = self.refs[task, key]
        kinds = {}
        if task == "spell" and key > 20 and key % 10 and key % 100 > 20:
            parts = [part for part in (key // 100 * 100, key // 10 % 10 * 10, key % 10) if part]
            kinds["english_order"] = [" ".join(self.refs[task, part][language] for part in parts)]
        kinds["wrong_language"] = [text for other, text in ref.items() if other != language]
        words = ref[language].split(" ")
        if len(words) > 2:
            if (task, language) != ("relative", "vi"):  # "sau 3 ngày" for "sau 3 ngày nữa" is right as well
                kinds["truncated"] = [" ".join(words[:-1])]
            kinds["repeated"] = [" ".join(words + words[-1:])]
        return kinds


def _swaps(n):
    """n with two of its digits exchanged, every way: 347 -> [437, 743, 374]."""
    digits, out = str(n), []
    for i in range(len(digits)):
        for j in range(i + 1, len(digits)):
            out.append(int(digits[:i] + digits[j] + digits[i + 1:j] + digits[i] + digits[j + 1:]))
    return out
