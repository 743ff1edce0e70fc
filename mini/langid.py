"""
Which of the 23 languages is this? Naive Bayes over character n-grams, fitted on the shipped text when it is first used.

Good enough to notice an answer in the wrong language; short answers that two languages share (Chinese numbers in both
scripts and in Japanese) cannot be told apart by anybody. tests/test_eval.py says how often it is right.
"""

import functools
import math
from collections import Counter

from mini.items import load_udhr, rows


class LanguageModel:
    """Character 1- to 3-grams of lower-cased text padded with spaces, add-0.1 smoothing, equal priors."""

    def __init__(self, texts):
        """texts: iterable of (language, text)."""
        self.counts = {}
        for language, text in texts:
            self.counts.setdefault(language, Counter()).update(self.grams(text))
        vocabulary = len(set().union(*self.counts.values()))
        self.floor = {l: math.log(0.1 / (c.total() + 0.1 * vocabulary)) for l, c in self.counts.items()}
        self.gain = {l: {g: math.log((n + 0.1) / 0.1) for g, n in c.items()} for l, c in self.counts.items()}

    @staticmethod
    def grams(text):
        text = f" {text.lower().strip()} "
        return [text[i:i + n] for n in (1, 2, 3) for i in range(len(text) - n + 1)]

    def scores(self, text):
        """{language: log-likelihood of the text's n-grams, in nats}: differences say how sure a verdict is."""
        grams = self.grams(text)
        return {l: len(grams) * self.floor[l] + sum(gain.get(g, 0.0) for g in grams) for l, gain in self.gain.items()}

    def identify(self, text):
        """The likeliest language of a text; None for an empty one."""
        return self._identify(text) if text.strip() else None

    @functools.lru_cache(maxsize=100_000)
    def _identify(self, text):
        scores = self.scores(text)
        return max(scores, key=scores.get)

    @staticmethod
    @functools.cache
    def shipped():
        """Fitted on UDHR articles 0-24 and the answers of the split `teacher`."""
        return LanguageModel([(r["language"], r["text"]) for r in load_udhr(range(0, 25))]
                             + [(r["language"], r["reference"]) for r in rows("teacher")])
