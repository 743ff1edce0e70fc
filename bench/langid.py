"""
The identifier of mini/langid.py and the guards `language` and `script` of guards.py on text that they have not read.

    pip download --no-deps django==5.2.19
    python bench/langid.py --django django-5.2.19-py3-none-any.whl

Two sources. The UDHR's articles 25 to 30, whole and in pieces of so many characters: other sentences, but the register
that the identifier was fitted on. The translations of Django's user interface (BSD licence, not shipped): others' text,
mostly labels of a few words. Its strings are halved by a hash of the English one: the
guards' thresholds were chosen on the first half, every number below is of the second. Strings equal to the English one
or marked fuzzy are left out; placeholders and tags are cut.

Without --django there are only the rows of the UDHR.
"""

import ast
import hashlib
import random
import re
import statistics
import sys
import time
import zipfile
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # in place of bench/, whose mini.py would hide mini/
import guards  # noqa: E402
from common import atomic_file, die, git_commit, hardware, parse_config  # noqa: E402
from languages import LANGUAGES  # noqa: E402
from mini.items import load_udhr  # noqa: E402
from mini.langid import LanguageModel, normal  # noqa: E402

LOCALES = {"zh_Hans": "zh", "zh_Hant": "zh-Hant"}
PIECES = (20, 50, 100)
CHARACTERS = (1, 10, 20, 50, 100, 10**9)  # buckets of Django's strings
LETTERS = (guards.ENOUGH, 50, 100, 200, 10**9)  # buckets of what the guards judge
CLOSEST = {"ar": "fa", "cs": "pl", "de": "nl", "el": "en", "en": "fr", "es": "pt", "fa": "ar", "fr": "es", "he": "ar",
           "hi": "en", "id": "en", "it": "es", "ja": "zh-Hant", "ko": "en", "nl": "de", "pl": "cs", "pt": "es",
           "ro": "it", "ru": "uk", "tr": "en", "uk": "ru", "vi": "en", "zh": "zh-Hant", "zh-Hant": "zh"}


@dataclass
class Config:
    django: str = ""  # Django's wheel, or a folder that holds its locale folders
    seed: int = 0  # of the wrong languages that are drawn
    results: str = "bench/results/langid.md"  # is written


def entries(po):
    """The text of a .po file -> {keyword: string} of each entry that is not fuzzy or obsolete."""
    for block in re.split(r"\n\s*\n", po):
        if re.search(r"^#(,.*fuzzy|~)", block, re.MULTILINE):
            continue
        entry, key = defaultdict(str), None
        for line in block.splitlines():
            if found := re.match(r'(?:(msg\w+(?:\[\d\])?)\s+)?(".*")$', line):
                key = found[1] or key
                entry[key] += ast.literal_eval(found[2])
        if entry["msgid"]:  # the header has none
            yield entry


def django(path):
    """[(language, text)] of the second half of Django's strings, each text once; dies if `path` holds none."""
    path = Path(path)
    if path.is_dir():
        files = {p.as_posix(): p.read_bytes() for p in path.rglob("django.po")}
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as z:
            files = {name: z.read(name) for name in z.namelist() if name.endswith("/django.po")}
    else:
        die(f"--django {path}: not a wheel or a folder: pip download --no-deps django==5.2.19")
    found = {}
    for name, content in sorted(files.items()):
        locale = re.search(r"locale/(\w+)/LC_MESSAGES/django\.po$", name)
        language = locale and LOCALES.get(locale[1], locale[1])
        for entry in entries(content.decode("utf-8")) if language in LANGUAGES else ():
            if int(hashlib.sha256(entry["msgid"].encode("utf-8")).hexdigest(), 16) % 2 == 0:
                continue
            for key, text in entry.items():
                if key.startswith("msgid" if language == "en" else "msgstr"):
                    if language == "en" or text not in (entry.get("msgid"), entry.get("msgid_plural")):
                        text = " ".join(re.sub(r"%\(\w+\)[sd]|%[sd]|\{[\w.]*\}|<[^>]*>|&\w+;", " ", text).split())
                        if any(map(str.isalpha, text)):
                            found[language, text] = True
    return list(found) or die(f"--django {path}: no locale/*/LC_MESSAGES/django.po in it")


def udhr(n=None):
    """[(language, text)] of articles 25 to 30, whole or in pieces of n characters, the last at least half as long."""
    rows = [(r["language"], r["text"]) for r in load_udhr(range(25, 31))]
    return rows if n is None else [(language, text[i:i + n]) for language, text in rows
                                   for i in range(0, len(text), n) if len(text[i:i + n].strip()) >= n / 2]


def buckets(items, size, edges):
    """{"10 to 19": [items of that size]}, in order, empty ones left out."""
    found = {}
    for low, high in zip(edges, edges[1:]):
        at = [item for item in items if low <= size(item) < high]
        found |= {f"{low} to {high - 1}" if high < 10**9 else f"{low} and more": at} if at else {}
    return found


def percent(values):
    values = list(values)
    return f"{100 * statistics.fmean(values):.2f}" if values else ""


def accuracy(sources, identify):
    """{name: [(language, text)]} -> lines: accuracy by source; by language and source, with what it is taken for."""
    seen = {name: [(language, identify(text)) for language, text in items] for name, items in sources.items()}
    lines = ["| text | texts | right, % |", "|---|---|---|"]
    lines += [f"| {name} | {len(pairs):,} | {percent(a == b for a, b in pairs)} |" for name, pairs in seen.items()]
    lines += ["", f"| right, % | {' | '.join(sources)} | most often taken for |", "|---" * (len(sources) + 2) + "|"]
    for language in LANGUAGES:
        cells = [percent(a == b for a, b in pairs if a == language).split(".")[0] for pairs in seen.values()]
        wrong = Counter(b for pairs in seen.values() for a, b in pairs if a == language != b).most_common(2)
        lines.append(f"| {language} | {' | '.join(cells)} | {', '.join(f'{b} ({n})' for b, n in wrong)} |")
    return lines


def guarded(items, seed):
    """Lines: how often right text is flagged, and text that should be in a drawn language or in the closest one."""
    rng = random.Random(seed)
    rows = []
    for language, text in items:
        words = guards.prose(normal(text))
        other = rng.choice([l for l in LANGUAGES if l != language])
        either = lambda l: guards.wrong_language(words, l) or guards.wrong_script(words, l)
        rows.append((guards.letters(words).total(), guards.wrong_language(words, language),
                     guards.wrong_script(words, language), guards.repeated(normal(text)) or guards.role_tokens(text),
                     guards.wrong_language(words, other), either(other), either(CLOSEST[language])))
    lines = ["| letters | texts | false: language, % | script | repeated, role_tokens | found: language, % | "
             "language or script | the same, closest language |", "|---|---|---|---|---|---|---|---|"]
    short = {f"under {guards.ENOUGH}": [r for r in rows if r[0] < guards.ENOUGH]}
    judged = {"all from there on": [r for r in rows if r[0] >= guards.ENOUGH]}
    for name, at in (short | buckets(rows, lambda r: r[0], LETTERS) | judged).items():
        lines.append(f"| {name} | {len(at):,} | {' | '.join(percent(r[k] for r in at) for k in range(1, 7))} |")
    return lines


def speed(model):
    """Milliseconds for a text of 500 characters whose words the model has not seen: median over the languages."""
    spent = []
    for language, text in udhr(500):
        model._word.cache_clear()
        begin = time.perf_counter()
        model.scores(text)
        spent.append(1000 * (time.perf_counter() - begin))
    return statistics.median(spent)


def main():
    cfg = parse_config(Config)
    begin = time.perf_counter()
    model = LanguageModel.shipped()
    fitted = time.perf_counter() - begin
    pieces = {f"UDHR, {n}": udhr(n) for n in PIECES} | {"UDHR, articles": udhr()}
    strings = django(cfg.django) if cfg.django else []
    sources = pieces | {f"Django, {k}": v for k, v in buckets(strings, lambda i: len(i[1]), CHARACTERS).items()}
    command = "python bench/langid.py" + " --django WHEEL" * bool(cfg.django)
    lines = [f"`{command}`, commit {git_commit()}, {hardware()}; fitted in {fitted:.1f} s, {speed(model):.1f} ms "
             "for 500 characters of unseen words", "",
             "The identifier, by length in characters (Chinese and Japanese say in 10 what others say in 25):", "",
             *accuracy(sources, model.identify), "",
             "The guards, by length in letters (Latin ones; a Chinese character is 3); texts of fewer letters than "
             f"{guards.ENOUGH} are not judged.", "`false`: texts in the right language that are flagged. `found`: "
             "texts whose row claims another language, drawn at random or the closest."]
    articles = [item for n in (*PIECES, None) for item in udhr(n)]
    for name, items in {"UDHR, pieces and articles": articles, "Django": strings}.items():
        lines += ["", f"{name}:", "", *guarded(items, cfg.seed)] if items else []
    print(*lines, sep="\n")
    with atomic_file(cfg.results) as f:
        f.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
