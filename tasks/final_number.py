"""
The number that a reply ends with, as its writer meant it: "**Antwort:** 1.234,50 €" -> "1234.5".

    final_number("السعر ٣ × ٤ = ١٢\\nالإجابة: ١٢ ريالًا", "ar")  ->  ("12", "answer")
    final_number("That makes \\\\boxed{1{,}200}.", "en")         ->  ("1200", "boxed")
    final_number("Dafür braucht er 3/4 Liter.", "de")           ->  ("3/4", "last line")
    final_number("Je ne sais pas.", "fr")                       ->  (None, "nothing")

Digits may be of any script. What the marks between them mean is the language's business: "1.234" is 1234 in German and less
than two in English. Fractions, ratios, clock times and dates stay as they are written, so that they equal no number.
Numbers in words ("zwölf", "十二") are not read: they count as no answer.
"""

import re
import unicodedata
from decimal import Decimal

# What introduces the answer, as in the prompts of tasks/mgsm.py (the first of each) or as models say it anyway
ANSWER_WORDS = {
    "ar": "(?:ال)?إجابة|(?:ال)?جواب", "bn": "উত্তর", "cs": "Odpověď", "de": "Antwort|Ergebnis", "el": "Απάντηση",
    "en": "Answer", "es": "Respuesta", "fa": "پاسخ|جواب", "fr": "Réponse", "he": "ה?תשובה", "hi": "उत्तर", "id": "Jawaban",
    "it": "Risposta", "ja": "答え|こたえ|(?<![解回])答", "ko": "정답|답변|답", "nl": "Antwoord", "pl": "Odpowiedź", "pt": "Resposta",
    "ro": "Răspuns", "ru": "Ответ", "sw": "Jibu", "te": "సమాధానం", "th": "คำตอบ", "tr": "Cevap|Yanıt", "uk": "Відповідь",
    "vi": "Đáp án|Đáp số|Câu trả lời|Trả lời", "zh": "答案|(?<![解回])答", "zh-Hant": "答案|(?<![解回])答"}

DECIMAL_COMMA = set("cs de el es fr id it nl pl pt ro ru tr uk vi".split())  # the others, and Arabic script's ASCII: a point
EITHER = {"es"}  # Spain writes 1.234 and Mexico 1,234: three digits behind a single mark are thousands in both

MINUS = dict.fromkeys(map(ord, "\u2212\uff0d\u2010\u2011\u2012\u2013\ufe63"), "-")  # the minus sign, and what is typed for it
NARROW = dict.fromkeys(map(ord, "\xa0\u202f\u2009\u2007\u2008"), "\u202f")  # spaces that group digits
INVISIBLE = dict.fromkeys(map(ord, "\u200b\u200e\u200f\u061c\ufeff\u2060" + "".join(map(chr, (*range(0x202a, 0x202f),
                          *range(0x2066, 0x206a))))))  # marks of direction, and spaces without width
SAME = MINUS | NARROW | INVISIBLE | str.maketrans({
    "\uff0e": ".", "\uff0c": ",", "\uff1a": ":", "\uff0f": "/", "\u2044": "/", "\uff1d": "=", "\uff0a": "*", "\uff0b": "+",
    "\u066c": "'", "\u2019": "'", "\u02bc": "'", "\uff07": "'", "\uff04": "$", "\uff05": "%", "\u066a": "%"})

LATEX = [(re.compile(pattern), new) for pattern, new in (
    (r"\{([.,])\}", r"\1"), (r"\\[,;:! ]|(?<=\d)~(?=\d)", "\u202f"), (r"\\([$%#&_])", r"\1"),  # 1{,}234  1\,234  \$5
    (r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/\2"), (r"\\(?:text|mathbf|mathrm|textbf|mbox)\s*\{([^{}]*)\}", r" \1 "),
    (r"\\[()\[\]]", " "))]

LAST, LONGEST = 8, 1000  # how many answers of a reply that repeats itself, and characters of a line, are looked at
VULGAR = "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
CURRENCY = r"[$€£¥₹₽₩₪฿₫₺₴¢]"
EAST = {"ja", "ko", "zh", "zh-Hant"}
MYRIADS = {"百": 2, "백": 2, "千": 3, "천": 3, "万": 4, "萬": 4, "만": 4, "億": 8, "亿": 8, "억": 8}  # powers of ten: 3万5千
DIGITS = r"\d(?:(?:[.,'٫\u202f]|[ ](?=\d{3}(?!\d)))?\d)*"  # digits with single marks between them
UNITS = rf"[{''.join(MYRIADS)}]+(?![克米瓦卡])"  # 5千克 are 5 kilograms


def plain(text):
    """A text with ASCII digits and marks, without LaTeX's dressing; each script's decimal and grouping marks stay apart."""
    text = "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text.translate(SAME))
    for pattern, new in LATEX:
        text = pattern.sub(new, text)
    return text


def number_in(language):
    """The pattern of one number: sign, digits with marks, and what makes it more than a number (3/4, 10:30, 2½, 1e3)."""
    east = rf"(?:{DIGITS}{UNITS}\s?)+(?:{DIGITS})?|" if language in EAST else ""
    power = r"\s?(?:×|\\times)\s?10\s?\^\S+|[eE][-+]?\d+"
    return re.compile(rf"(?P<sign>(?<![\w)\]])[-+](?={CURRENCY}?\s?[\d.,]))?{CURRENCY}?\s?(?P<sign2>(?<=[$€£¥])-)?"
                      rf"(?P<body>{east}(?<![\d.,])[.,]\d+|{DIGITS})"
                      rf"(?P<more>(?:\s\d+)?\s?/\s?\d+|{power}|(?::\d+)+|\s?[{VULGAR}]|(?:-\d+)+)?|(?P<vulgar>[{VULGAR}])")


def grouped(parts):
    """Do the marks between these parts of digits group them: 1 234 567, or the Indian 12,34,567?"""
    head, *middle, last = parts
    return 1 <= len(head) <= 3 and len(last) == 3 and (
        all(len(p) == 3 for p in middle) or (len(head) <= 2 and all(len(p) == 2 for p in middle)))


def value(body, language):
    """Digits with marks -> a Decimal, or None where the marks make no number of them (12.03.2024)."""
    if any(c in MYRIADS for c in body):  # 1億2000万
        parts = re.findall(rf"([^{''.join(MYRIADS)}\s]+)([{''.join(MYRIADS)}]*)", body)
        found, powers = [value(digits, language) for digits, _ in parts], [sum(map(MYRIADS.get, units)) for _, units in parts]
        falls = all(a > b for a, b in zip(powers, powers[1:]))
        return sum(n.scaleb(power) for n, power in zip(found, powers)) if falls and None not in found else None
    marks = [c for c in body if not c.isdigit()]
    point = next((m for m in "٫" if m in marks), None)  # this one is always the decimal mark
    kinds = list(dict.fromkeys(m for m in marks if m in ".,"))
    if point is None and kinds:
        last = kinds[-1]
        head, _, tail = body.rpartition(last)
        if len(marks) > 1:
            point = last if marks.count(last) == 1 and marks[-1] == last else None
        else:  # one mark: three digits behind it may be thousands, other numbers of digits never are
            own = "," if language in DECIMAL_COMMA else "."
            thousands = len(tail) == 3 and 1 <= len(head) <= 3 and head[:1] != "0" and (last != own or language in EITHER)
            point = None if thousands else last
    whole, _, decimals = body.partition(point) if point else (body, "", "")
    parts = re.split(r"[^\d]", whole)
    used = {c for c in whole if not c.isdigit()}
    if (decimals and not decimals.isdigit()) or len(used) > 1 or (len(parts) > 1 and not grouped(parts)):
        return None
    return Decimal(f"{whole and ''.join(parts) or '0'}.{decimals or '0'}")


def canonical(number):
    """A Decimal or an int as text: -5, 1234, 0.5; 12.0 is 12."""
    text = format(Decimal(number), "f")
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text in ("-0", "") else text


def pick(text, language, alone=False):
    """
    The number of a line that is an answer: behind the last "=", in bold, at the start, or else the last one; or None.
    `alone`: only a number that no word comes before.
    """
    pattern = number_in(language)
    for sign in ("=", "≈"):
        if sign in text and pattern.search(tail := text.rpartition(sign)[2]):
            text = tail
    if bold := [b for b in re.findall(r"\*\*(.+?)\*\*", text) if pattern.search(b)]:
        text = bold[-1]
    found = list(pattern.finditer(text))
    if not found:
        return None
    first = not re.search(r"\w", text[:found[0].start()])
    if alone and not first:
        return None
    m = found[0] if first else found[-1]
    if m["vulgar"]:
        return m["vulgar"]
    sign = "-" if "-" in (m["sign"], m["sign2"]) else ""
    number = value(m["body"], language)
    if m["more"] or number is None:
        return sign + m["body"] + re.sub(r"\s*([/^])\s*", r"\1", m["more"] or "")
    return canonical(sign + str(number))


def boxed(text):
    """[(place, content)] of the last \\boxed{...}, braces inside them included."""
    found = []
    for m in list(re.finditer(r"\\f?boxed\s*\{", text))[-LAST:]:
        depth, end = 1, m.end()
        while end < min(len(text), m.end() + LONGEST) and depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        found.append((m.start(), text[m.end():end - (not depth)]))
    return found


def final_number(reply, language, ended=True):
    """
    -> (number as text, where it was). Where: "answer", behind the language's (or English's) answer word, or "boxed",
    whichever is last; else "last line", if the reply has `ended`; else None and "nothing".
    """
    text = unicodedata.normalize("NFC", reply.rpartition("</think>")[2])
    lines_of = lambda part: [line for line in part.split("\n") if line.strip(" *_\t\r\\[]()$`#-")]
    words, more = f"{ANSWER_WORDS.get(language, 'Answer')}|Answer", r"[是为為はが]?" if language in EAST else r"(?:\s[^\W\d]+){0,2}"
    border = "" if language in EAST else r"(?<![^\W\d_])"  # "Answer", not the end of a longer word
    marker = re.compile(rf"{border}(?:{words}){more}[\s*_»”」\"')]*[:：]", re.IGNORECASE)
    places = [(place, "boxed", content) for place, content in boxed(text)]
    places += [(m.start(), "answer", text[m.end():]) for m in list(marker.finditer(text))[-LAST:]]
    for _, where, rest in sorted(places, reverse=True):
        here, _, below = rest.partition("\n") if where == "answer" else (rest, "", "")
        for line, alone in [(here, False), *((line, True) for line in lines_of(below)[:1])]:  # the word may stand above it
            line = ([content for _, content in boxed(line[:LONGEST])] or [line])[-1]
            if number := pick(plain(line[:LONGEST]), language, alone):
                return number, where
    if ended and (lines := lines_of(text)) and (number := pick(plain(lines[-1][-LONGEST:]), language)):
        return number, "last line"
    return None, "nothing"
