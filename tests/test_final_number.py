"""
The number that a reply ends with (tasks/final_number.py), by a table of hand-made replies, right and wrong, and properties.

    python -m pytest tests/test_final_number.py
"""

import random
from decimal import Decimal

import pytest

from tasks.final_number import ANSWER_WORDS, canonical, final_number, plain

NBSP, NARROW, THIN = "\xa0", "\u202f", "\u2009"
CASES = [  # language, reply, the number (None: there is none)
    # where it stands
    ("en", "3 + 4 = 7, and 7 x 6 = 42.\nAnswer: 42", "42"), ("en", "**Answer: 42**", "42"), ("en", "**Answer:** 42.", "42"),
    ("en", "Answer:\n\n$$\n42\n$$", "42"), ("en", "### Answer: 42\nI hope that helps with all 3 parts!", "42"),
    ("en", "FINAL ANSWER: 42", "42"), ("en", "Answer: 12 + 30 = 42", "42"), ("en", "Answer: x = 42 (6 rows of 7)", "42"),
    ("en", "Answer: In 5 days she earns **100** dollars, or 20 a day", "100"), ("en", "Answer: she has 42", "42"),
    ("en", "Answer: 42 apples, 6 for each of the 7", "42"), ("en", "Answer: 3\nNo, that is wrong.\nAnswer: 4", "4"),
    ("en", "Answer: 7\nAnswer: see above", "7"), ("en", "<think>Answer: 3</think>\nAnswer: 4", "4"),
    ("en", "So the final answer is **18**.", "18"), ("en", "Answer: see below.\nThat is it.", None),
    ("en", "Answer:\nRoger has 5 balls.\nThat makes 5 + 6 = 11", "11"), ("en", "She has many apples.", None), ("en", "", None),
    ("en", "He bought 3 apples.\nThat is all.", None), ("de", "Eine Antwort: 5\nAnswer: 6", "6"),
    ("de", "Beantwortung: 5\nAlso 6", "6"), ("fr", "Réponse finale : 42 euros", "42"), ("fr", "Re\u0301ponse : 42", "42"),
    ("he", "התשובה: 42 שקלים", "42"), ("ja", "答えは：42個", "42"), ("zh", "解答：\n1+2=3\n所以是 5", "5"), ("zh", "答案是：42", "42"),
    # LaTeX
    ("en", "That makes \\boxed{1{,}200}.", "1200"), ("en", "\\[ \\boxed{\\$42} \\]", "42"),
    ("en", "\\boxed{\\text{42 apples}}", "42"),
    ("en", "Answer: $\\boxed{42}$", "42"), ("en", "Answer: 41\nNo: \\boxed{42}", "42"), ("en", "\\boxed{41}\nAnswer: 42", "42"),
    ("en", "Answer: 5\\,000", "5000"), ("en", "Answer: $\\frac{3}{4}$", "3/4"), ("en", "\\boxed{\\mathbf{7}}", "7"),
    ("en", "Answer: 1.2 \\times 10^3", "1.2 \\times 10^3"),
    # marks
    ("en", "Answer: 1,234.5", "1234.5"), ("en", "Answer: 1,234,567", "1234567"), ("en", "Answer: 1.234", "1.234"),
    ("en", "Answer: $1,250.00", "1250"), ("en", "Answer: 12,5", "12.5"), ("en", "Answer: 12.0", "12"),
    ("en", "Answer: .5", "0.5"),
    ("de", "Antwort: 1.234,5", "1234.5"), ("de", "Antwort: 20.000 $", "20000"), ("de", "Antwort: 1,234", "1.234"),
    ("de", "Antwort: 0,500 kg", "0.5"),
    ("de", "Antwort: 0.500 kg", "0.5"), ("en", "Answer: 0,500", "0.5"), ("de", "Antwort: 1.234.567,8", "1234567.8"), ("de", "Antwort: 12,345.67", "12345.67"),
    ("de", "Antwort: 12.5", "12.5"), ("de", "Antwort: 1'234 Franken", "1234"), ("de", "Antwort: 1’234.50", "1234.5"),
    ("es", "Respuesta: 1.234", "1234"), ("es", "Respuesta: 1,234", "1234"), ("es", "Respuesta: 12,50 €", "12.5"),
    ("fr", f"Réponse{NBSP}: 12{NARROW}345{NBSP}€", "12345"), ("fr", "Réponse : 1 234,5", "1234.5"),
    ("ru", f"Ответ: 12{NBSP}345 рублей", "12345"), ("ru", "Ответ: 3,5 часа", "3.5"), ("cs", "Odpověď: 1 234,50 Kč", "1234.5"),
    ("pl", f"Odpowiedź: 10{THIN}000 zł", "10000"), ("pt", "Resposta: R$ 1.500,00", "1500"), ("tr", "Cevap: 1.500 TL", "1500"),
    ("vi", "Đáp án cuối cùng: 1.000 đồng", "1000"), ("el", "Απάντηση: 1.234 ευρώ", "1234"), ("id", "Jawaban: Rp2.500", "2500"),
    ("it", "Risposta: 1.000", "1000"), ("nl", "Antwoord: € 1.250,75", "1250.75"), ("uk", "Відповідь: 7 яблук", "7"),
    ("en", "Answer: 12.03.2024", "12.03.2024"), ("en", "Answer: 1,234.567.890", "1,234.567.890"),
    ("en", "Answer: 12,34", "12.34"),
    # scripts
    ("ar", "السعر ٣ × ٤ = ١٢\nالإجابة: ١٢ ريالًا", "12"), ("ar", "الإجابة النهائية: ١٬٢٣٤٫٥", "1234.5"),
    ("ar", "الإجابة: ٥\u061c", "5"),
    ("ar", "\u200fالإجابة: \u200e-٥", "-5"), ("fa", "پاسخ: ۱٬۲۳۴٫۵ تومان", "1234.5"), ("fa", "جواب: ۴۲", "42"),
    ("hi", "उत्तर: १,२३,४५६ रुपये", "123456"), ("hi", "उत्तर: ₹1,23,456.50", "123456.5"), ("bn", "উত্তর: ১২৩", "123"),
    ("te", "సమాధానం: ౪౨", "42"), ("th", "คำตอบ: ๑,๒๓๔ บาท", "1234"), ("ja", "答え：１，２３４円", "1234"),
    ("ja", "答え: 1億2000万円", "120000000"), ("ja", "答え：－５", "-5"), ("ja", "十二個です。", None), ("zh", "答案：1.2万元", "12000"),
    ("zh", "答案：３万５千", "35000"), ("zh", "答案: 5千克", "5"), ("zh-Hant", "答案：３／４", "3/4"), ("ko", "정답: 3만 2천 원", "32000"),
    ("ko", "답: 12,000원", "12000"), ("sw", "Jibu: 42", "42"), ("ro", "Răspuns: 1.000 lei", "1000"),
    # signs, units, and what is more than a number
    ("en", "Answer: -5", "-5"), ("en", "Answer: \u22125", "-5"), ("en", "Answer: -$5.50", "-5.5"), ("en", "Answer: $-5", "-5"),
    ("en", "Answer: +5", "5"), ("en", "Answer: 42%", "42"), ("en", "Answer: 42 km/h", "42"), ("en", "Answer: £42", "42"),
    ("en", "Answer: 42nd", "42"), ("en", "Answer: 5-3", "5-3"), ("en", "Answer: 10\u201315", "10-15"),
    ("en", "Answer: 10:30", "10:30"),
    ("en", "Answer: 3 1/2", "3 1/2"), ("en", "Answer: 2½", "2½"), ("en", "Answer: ½", "½"), ("en", "Answer: 3/1", "3/1"),
    ("en", "Answer: 1e3", "1e3"), ("en", "Answer: 2024-11-27", "2024-11-27"), ("en", "Answer: -0", "0")]


@pytest.mark.parametrize("language, reply, number", CASES)
def test_table(language, reply, number):
    assert final_number(reply, language)[0] == number


def test_the_table_is_wide():
    assert len(CASES) >= 60 and len({language for language, _, _ in CASES}) >= 20


def test_where_it_was():
    assert final_number("Answer: 4", "en") == ("4", "answer") and final_number("\\boxed{4}", "en") == ("4", "boxed")
    assert final_number("It is 4.", "en") == ("4", "last line") and final_number("It is.", "en") == (None, "nothing")
    # a reply that was cut off has no last line, but it may have an answer
    assert final_number("First, 3 + 4 = 7", "en", ended=False) == (None, "nothing")
    assert final_number("Answer: 4\nBecause 3 +", "en", ended=False) == ("4", "answer")
    assert final_number("Réponse : 4", "de")[1] == "last line" and final_number("Answer: 4", "fr")[1] == "answer"


@pytest.mark.parametrize("language", ANSWER_WORDS)
def test_every_language_reads_its_own_numbers_in_all_digits(language):
    rng, zeros = random.Random(language), [ord(c) for c in "0٠۰०০౦๐０"]
    comma = language in "cs de el es fr id it nl pl pt ro ru tr uk vi".split()
    for _ in range(40):
        number = rng.randrange(-10**rng.randint(1, 9), 10**rng.randint(1, 9))
        cents = rng.choice(["", f"{rng.randrange(100):02}"])
        text = f"{number:,}" + (f".{cents}" if cents else "")
        text = text.translate(str.maketrans(",.", ".,")) if comma else text
        zero = rng.choice(zeros)
        text = "".join(chr(zero + int(c)) if c.isdecimal() else c for c in text)
        word = ANSWER_WORDS[language].split("|")[-1].split(")")[-1].removeprefix("ה?")
        expected = Decimal(f"{number}.{cents or 0}")
        assert final_number(f"1 + 1 = 2\n{word}: {text}", language) == (canonical(expected), "answer"), text


def test_canonical():
    assert [canonical(x) for x in (12, Decimal("12.0"), Decimal("1E+3"), Decimal("-0.0"), Decimal("0.50"), 100)] == [
        "12", "12", "1000", "0", "0.5", "100"]
    assert plain("１２：３０ \\$5 1{,}5") == "12:30 $5 1,5"


def test_long_replies_take_linear_time():
    for text in ("1" * 20000, "1," * 20000, "Answer: " * 5000, "**1" * 5000, "\\boxed{" * 500,
                 "1 " * 20000, "= 1" * 5000, "答" * 20000):
        for language in ("en", "zh", "fr"):
            final_number(text, language)
