"""
chrF and chrF++ against numbers recorded from sacrebleu 2.6.0, and properties that need no second implementation.

The recorded numbers: CHRF(word_order=0 or 2).sentence_score(hypothesis, references).score, and corpus_score's.
"""

import random

import numpy as np
import pytest

from tasks.flores import chrf, chrf_score, chrf_stats, corpus_chrf

RECORDED = [  # what is tested, hypothesis, references, chrF, chrF++
    ("en", "The cat sat on the mat.", ["The cat is sitting on the mat."], 49.6485170311433, 54.2551855194941),
    ("en, two-sided punctuation", "He said: \"(hello) world!\"",
     ["He said, \"hello (world)!\""], 46.17798209129478, 42.07396275894727),
    ("en, quote at the start", "\"quoted text and 'more",
     ["quoted \"text and more"], 59.794981545762546, 59.8745039032534),
    ("en, lone punctuation", "yes ! no ?", ["yes! no?"], 100.0, 100.0),
    ("en, double punctuation", "wait... what?!", ["wait.. what?"], 81.04780175200585, 63.93423896993241),
    ("en, case is kept", "HELLO World", ["hello world"], 18.76984126984127, 14.077380952380953),
    ("ar", "ثلاثة وستون كتابا في المكتبة.", ["ثلاثة وستين كتابًا في المكتبة"], 67.54394880481837, 60.898552568247986),
    ("ar, own punctuation stays", "كيف حالك؟ بخير، شكرا", ["كيف حالك ؟ بخير ، شكرا"], 100.0, 79.57474226804122),
    ("he", "שבע מאות תשעים ושש", ["שבע מאות תשעים ושבע"], 86.23786658208323, 82.39982114903086),
    ("he, vowel points", "שָׁלוֹם עולם", ["שלום עולם"], 43.6661372229349, 39.146989483341585),
    ("fa, zero-width non-joiner", "می\u200cخواهم به خانه بروم",
     ["میخواهم به خانه بروم"], 87.79484819590509, 83.56483986881516),
    ("hi", "एक सौ बीस रुपये।", ["एक सौ बाईस रुपये ।"], 58.664326379244905, 52.52466005845835),
    ("zh", "七百八十二公里，很远。", ["七百八十三公里，非常远。"], 28.967457453765768, 24.829249246084945),
    ("zh-Hant", "請用中文數字寫出。", ["请用中文数字写出。"], 19.742063492063487, 16.92176870748299),
    ("ja", "今日は良い天気ですね", ["今日はとても良い天気です"], 45.3545034322207, 38.87528865618917),
    ("ko", "오백사십육 킬로그램", ["오백 사십육킬로그램"], 100.0, 75.0),
    ("th, combining vowels", "ที่นี่อากาศดีมาก", ["ที่นี่อากาศดี มากๆ"], 94.32494159160917, 80.84994993566501),
    ("el", "Καλημέρα κόσμε; ναι·", ["Καλημέρα, κόσμε; ναι"], 75.8991566712155, 68.11322375450838),
    ("ru", "двадцать один день назад", ["двадцать дней назад"], 53.220812248954715, 47.73130294295399),
    ("vi, composed against decomposed", "ba trăm mười bảy",
     ["ba tra\u0306m mu\u031bo\u031bi ba\u0309y"], 18.352752462821705, 16.91805627764278),
    ("emoji outside the BMP", "ok 👍🏽 great", ["ok 👍 great"], 51.288586244692155, 46.8247099879585),
    ("empty hypothesis", "", ["abc"], 0.0, 0.0),
    ("empty reference", "abc", [""], 0.0, 0.0),
    ("both empty", "", [""], 0.0, 0.0),
    ("only white space", " \xa0\u3000", ["abc"], 0.0, 0.0),
    ("one character", "a", ["a"], 100.0, 100.0),
    ("one character against a word", "a", ["abc"], 38.46153846153846, 19.23076923076923),
    ("shorter than the orders", "ab", ["ab"], 100.0, 100.0),
    ("reference shorter than the orders", "abcdefgh", ["abc"], 65.56603773584906, 49.17452830188679),
    ("nothing in common", "abc", ["xyz"], 0.0, 0.0),
    ("NBSP and U+3000 are white space", "100\xa0km\u3000away", ["100 km away"], 100.0, 100.0),
    ("line separators are white space", "a\u2028b\x1cc\x85d", ["a b c d"], 100.0, 100.0),
    ("U+200B and U+FEFF are not", "ab\u200bcd \ufeffef", ["ab cd ef"], 24.886877828054292, 18.66515837104072),
    ("several references", "the cat sat",
     ["a dog ran", "the cat sat down", "the cat"], 83.4542337114218, 84.5453669813138),
    ("several references, one empty", "the cat sat", ["", "the cat sits"], 61.034534424114085, 60.39409888435875),
    ("several references, the first longer", "zwanzig Tage",
     ["vor einundzwanzig Tagen", "zwanzig Tag"], 97.27748649210861, 79.2250775726534),
]
SEGMENTS = {name: (hypothesis, references) for name, hypothesis, references, _, _ in RECORDED}




def close(expected):
    return pytest.approx(expected, rel=0, abs=1e-11)  # of 100: the order of two additions and no more


@pytest.mark.parametrize("name, hypothesis, references, expected_chrf, expected_chrfpp", RECORDED)
def test_segments_as_sacrebleu(name, hypothesis, references, expected_chrf, expected_chrfpp):
    assert chrf(hypothesis, references, word_order=0) == close(expected_chrf)
    assert chrf(hypothesis, references) == close(expected_chrfpp)


def corpus(*names):
    return [SEGMENTS[name][0] for name in names], [SEGMENTS[name][1] for name in names]


@pytest.mark.parametrize("word_order, expected", [(0, 57.88752643530288), (1, 56.89428276843383),
                                                  (2, 54.53187852355021)])
def test_corpus_as_sacrebleu(word_order, expected):
    hypotheses, references = corpus("en", "ar", "hi", "zh", "ko", "empty hypothesis", "empty reference")
    assert corpus_chrf(hypotheses, references, word_order) == close(expected)


@pytest.mark.parametrize("word_order, expected", [(0, 68.51376827555316), (1, 67.44531495064973),
                                                  (2, 64.99524231517432)])
def test_corpus_with_ragged_references_as_sacrebleu(word_order, expected):
    hypotheses, references = corpus("several references", "several references, one empty",
                                    "several references, the first longer", "ja")
    assert corpus_chrf(hypotheses, references, word_order) == close(expected)
    padded = [refs + [None] * (3 - len(refs)) for refs in references]
    assert corpus_chrf(hypotheses, padded, word_order) == close(expected)


def test_tied_references_keep_the_first():
    """Both references score 0, but they bring different n-gram totals to the corpus; recorded from sacrebleu."""
    hypotheses = ["abcdef", "hello you"]
    assert corpus_chrf(hypotheses, [["x", "stuvwxyz"], "hello me"]) == close(36.28421796433368)
    assert corpus_chrf(hypotheses, [["stuvwxyz", "x"], "hello me"]) == close(20.45364497739316)


def test_by_hand():
    # abc against abd: of 3, 2, 1 n-grams on either side 2, 1, 0 match, so P = R = F = (2/3 + 1/2 + 0) / 3
    assert chrf("abc", "abd", word_order=0) == close(100 * (2 / 3 + 1 / 2 + 0) / 3)
    assert chrf_stats("abc", "abd", word_order=0).tolist()[:4] == [[3, 3, 2], [2, 2, 1], [1, 1, 0], [0, 0, 0]]
    # a against ab: order 1 is the only one both have, P = 1, R = 1/2, F = 5PR / (4P + R)
    assert chrf("a", "ab", word_order=0) == close(100 * 5 * 0.5 / 4.5)
    # n-grams are counted, not only seen: one of the three a's of the hypothesis matches. P = 1/3, R = 1
    assert chrf("a a a", "a", word_order=0) == close(100 * 5 * (1 / 3) / (4 / 3 + 1))


def random_text(rng):
    return "".join(rng.choice("ab cd. (é中文ا한\u00a0") for _ in range(rng.randrange(25)))


@pytest.fixture
def rows():
    rng = random.Random(0)
    rows = [(random_text(rng), [random_text(rng) for _ in range(rng.randint(1, 3))]) for _ in range(60)]
    return [(refs[0][:6] + hypothesis, refs) for hypothesis, refs in rows]


@pytest.mark.parametrize("word_order", [0, 1, 2])
def test_statistics_add_up(rows, word_order):
    stats = np.stack([chrf_stats(hypothesis, refs, word_order) for hypothesis, refs in rows])
    assert stats.shape == (len(rows), 6 + word_order, 3) and stats.dtype == np.int64
    assert (stats[..., 2] <= stats[..., :2].min(axis=-1)).all() and (stats >= 0).all()
    resample = np.random.default_rng(0).integers(0, len(rows), len(rows))
    direct = corpus_chrf([rows[i][0] for i in resample], [rows[i][1] for i in resample], word_order)
    assert chrf_score(stats[resample].sum(axis=0)) == direct
    assert chrf_score(stats[3]) == chrf(*rows[3], word_order) == corpus_chrf([rows[3][0]], [rows[3][1]], word_order)


def test_bounds_identity_and_the_best_reference(rows):
    for hypothesis, refs in rows:
        score = chrf(hypothesis, refs)
        assert 0 <= score <= 100
        assert score == max(chrf(hypothesis, ref) for ref in refs)
        assert chrf(hypothesis, hypothesis) == (close(100) if hypothesis.split() else 0)


def test_white_space_only_parts_words(rows):
    for hypothesis, refs in rows:
        spaced = " \u3000\n".join(["", *hypothesis.split(), ""])
        assert chrf(spaced, refs) == chrf(hypothesis, refs)
        assert chrf("".join(hypothesis.split()), refs, word_order=0) == chrf(hypothesis, refs, word_order=0)


def test_repeating_a_corpus_changes_nothing(rows):
    hypotheses, references = zip(*rows)
    assert corpus_chrf(hypotheses * 3, references * 3) == close(corpus_chrf(hypotheses, references))
    assert corpus_chrf(hypotheses[::-1], references[::-1]) == corpus_chrf(hypotheses, references)


def test_callers_own_their_statistics():
    first = chrf_stats("the cat sat", "the cat sat down")
    first += 7  # must not reach what is kept of the reference
    assert chrf_stats("the cat sat", "the cat sat down").tolist() == (first - 7).tolist()


def test_a_string_is_one_reference():
    assert chrf("abc", "abc") == chrf("abc", ["abc"]) == 100
    assert corpus_chrf(["abc", "x"], ["abc", ["x", "y"]]) == 100


def test_errors_say_what_was_wrong():
    with pytest.raises(ValueError, match="no reference for the hypothesis 'abc'"):
        chrf("abc", [None])
    with pytest.raises(ValueError, match="2 hypotheses but references for 1 segments"):
        corpus_chrf(["a", "b"], [["a", "b"]])
    with pytest.raises(ValueError, match="0 hypotheses"):
        corpus_chrf([], [])
