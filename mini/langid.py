"""
Which of the 23 languages is this? A character n-gram model of each, fitted on the shipped text when first used.

A word's probability in a language is that of its characters, each given up to three before it: Witten-Bell smoothing
mixes the orders, P(c | h) = (n(hc) + T(h) P(c | h without its first)) / (n(h) + T(h)), T(h) being how many different
characters followed h. It is a real likelihood: unlike naive Bayes over overlapping n-grams it counts each character
once, so a difference of scores says how sure a verdict is. bench/langid.py measures it on text that it has not read.

Short answers that two languages share (Chinese numbers in both scripts and in Japanese) nobody can tell apart.
"""

import functools
import itertools
import re
import unicodedata
from collections import Counter

import numpy as np

from mini.items import load_udhr, rows

ORDER = 4  # a character and the three before it
# The alphabets of 10,000 characters of text are incomplete, above all in Chinese; the old national encodings know them.
CHARSETS = {"ar": "iso8859_6", "cs": "iso8859_2", "de": "iso8859_15", "el": "iso8859_7", "es": "iso8859_15",
            "fa": "cp1256", "fr": "iso8859_15", "he": "iso8859_8", "it": "iso8859_15", "ja": "shift_jis",
            "ko": "euc_kr", "nl": "iso8859_15", "pl": "iso8859_2", "pt": "iso8859_15", "ro": "iso8859_16",
            "ru": "koi8_r", "tr": "iso8859_9", "uk": "koi8_u", "vi": "cp1258", "zh": "gb2312", "zh-Hant": "big5"}
UNSEEN, OUTSIDE = -8.3, -14.3  # log-probability of a character never seen, in the language's encoding and outside it


class _Plain(dict):
    """str.translate table: letters and marks stay, digits become 0, optional vowel signs go, the rest is a space."""

    def __missing__(self, code):
        char = chr(code)
        kind = unicodedata.category(char)
        optional = 0x591 <= code <= 0x5C7 or 0x64B <= code <= 0x652 or code in (0x640, 0x670, 0x307)
        self[code] = "" if optional else char if kind[0] in "LM" or code == 0x200C else "0" if kind == "Nd" else " "
        return self[code]


_PLAIN = _Plain()


def normal(text):
    """NFKC of the words, 500 characters at a time: CPython sorts the marks on a letter in quadratic time."""
    return re.sub(r"\S{1,500}", lambda m: unicodedata.normalize("NFKC", m[0]), text)


def plain(text):
    """
    Lower-cased NFKC letters and "0" for every number, one space between words: what is written in several ways is one.
    Niqqud, harakat and tatweel go, and the dot that lower() leaves behind a Turkish capital I; \\u200c joins Persian.
    """
    text = normal(text).lower().translate(_PLAIN)
    return " ".join(re.sub("0+", "0", text).split())


def _grams(word):
    """Per character of " word " behind the first: the n-grams that end with it, the longest first."""
    word = f" {word} "
    return [[word[i - n:i + 1] for n in range(min(ORDER - 1, i), -1, -1)] for i in range(1, len(word))]


def _encodes(charset, char):
    try:
        return bool(char.encode(charset))
    except UnicodeEncodeError:
        return False


class LanguageModel:
    """
    LanguageModel(prose, answers, ...): each an iterable of (language, text) and a register of its own, so that 600
    numbers in words do not drown the prose. A text is as likely in a language as in its registers together.
    """

    def __init__(self, *registers):
        words = {}
        for k, texts in enumerate(registers):
            for language, text in texts:
                words.setdefault((language, k), Counter()).update(plain(text).split())
        self.columns = list(words)
        counts = []  # of n-grams, per column
        for column in words.values():
            counts.append(Counter())
            for word, n in column.items():
                for gram in itertools.chain(*_grams(word)):
                    counts[-1][gram] += n
        self.row = {gram: i for i, gram in enumerate(sorted(set().union(*counts), key=len))}
        n = np.zeros((len(self.row), len(self.columns)), np.float32)
        for k, column in enumerate(counts):
            n[[self.row[gram] for gram in column], k] = list(column.values())
        self.context = {}
        parent = np.array([self.context.setdefault(gram[:-1], len(self.context)) for gram in self.row])
        total, types = np.zeros((2, len(self.context), len(self.columns)), np.float32)
        np.add.at(total, parent, n)
        np.add.at(types, parent, (n > 0).astype(np.float32))
        back_off = np.where(total > 0, types / np.maximum(total + types, 1), 1)
        self.back_off = np.log(back_off)  # [contexts, columns]
        self.logp = np.empty_like(n)  # [n-grams, columns]: of the last character, given those before it
        length = np.array([len(gram) for gram in self.row])
        grams = list(self.row)
        for k in range(1, length.max() + 1):
            at = np.flatnonzero(length == k)
            shorter = np.stack([self._unseen(grams[i]) if k == 1 else self.logp[self.row[grams[i][1:]]] for i in at])
            h = parent[at]
            self.logp[at] = np.log(n[at] / np.maximum(total[h] + types[h], 1) + back_off[h] * np.exp(shorter))

    @functools.lru_cache(maxsize=20_000)
    def _unseen(self, char):
        """[columns]: log-probability of a character before any text was read."""
        fits = {charset: _encodes(charset, char) for charset in {"ascii", *CHARSETS.values()}}
        return np.array([UNSEEN if fits[CHARSETS.get(l, "ascii")] else OUTSIDE for l, _ in self.columns], np.float32)

    @functools.lru_cache(maxsize=20_000)
    def _word(self, word):
        """[columns]: log-probability of a word: of each character, by the longest n-gram that some language has."""
        total = np.zeros(len(self.columns))
        for grams in _grams(word):
            for gram in grams:  # the longest first
                if gram in self.row:
                    total += self.logp[self.row[gram]]
                    break
                if gram[:-1] in self.context:
                    total += self.back_off[self.context[gram[:-1]]]
            else:
                total += self._unseen(grams[-1])
        return total

    def scores(self, text):
        """{language: log-likelihood of the text, in nats}: differences say how sure a verdict is. Empty text: all 0."""
        total = sum(map(self._word, plain(text).split()), np.zeros(len(self.columns)))
        found = {}
        for (language, _), score in zip(self.columns, total.tolist()):
            found[language] = float(np.logaddexp(found.get(language, -np.inf), score))
        return found

    def identify(self, text):
        """The likeliest language of a text; None for an empty one. Of a tie, the one that was fitted first."""
        return self._identify(text) if text.strip() else None

    @functools.lru_cache(maxsize=100_000)
    def _identify(self, text):
        scores = self.scores(text)
        return max(scores, key=scores.get)

    @staticmethod
    @functools.cache
    def shipped():
        """Fitted on UDHR articles 0-24 and the answers of the split `teacher`."""
        return LanguageModel([(r["language"], r["text"]) for r in load_udhr(range(0, 25))],
                             [(r["language"], r["reference"]) for r in rows("teacher")])
