"""
chrF and chrF++, the character n-gram F-scores of translation: Popović 2015, https://aclanthology.org/W15-3049, and
Popović 2017, https://aclanthology.org/W17-4770. They equal sacrebleu 2.6's (6 character orders, beta 2, case kept).

The task that uses it is tasks/flores.py, from where chrf and corpus_chrf can be imported too.

    chrf("the cat sat", ["the cat sat down"])                    # one segment, chrF++; word_order=0 gives chrF
    stats = np.stack([chrf_stats(h, refs) for h, refs in rows])  # (N, 8, 3)
    chrf_score(stats.sum(axis=0))                                # what corpus_chrf of the same rows returns
    chrf_score(stats[rng.integers(0, N, N)].sum(axis=0))         # one bootstrap resample, without counting anew
"""

from collections import Counter
from functools import lru_cache
import string

import numpy as np

CHAR_ORDER = 6  # longest character n-gram
BETA = 2  # recall counts beta**2 = 4 times as much as precision
ASCII_PUNCTUATION = frozenset(string.punctuation)  # Unicode punctuation stays on its word, as in sacrebleu


def split_words(text):
    """The words of a text, each with at most ONE ASCII punctuation mark cut off: the last character, else the first."""
    words = []
    for word in text.split():
        if len(word) > 1 and word[-1] in ASCII_PUNCTUATION:
            words += [word[:-1], word[-1]]
        elif len(word) > 1 and word[0] in ASCII_PUNCTUATION:
            words += [word[0], word[1:]]
        else:
            words.append(word)
    return tuple(words)


def count_ngrams(tokens, max_order):
    """All n-grams of a str or a tuple, n = 1..max_order, as slices with their counts: `len(gram)` is the order."""
    return Counter([tokens[i : i + n] for n in range(1, max_order + 1) for i in range(len(tokens) - n + 1)])


def profile(text, word_order):
    """What two texts are compared by: (order, length, n-gram counts) of the characters, then of the words."""
    chars, words = "".join(text.split()), split_words(text)  # split() also drops NBSP and U+3000, but not U+200B
    return (
        (CHAR_ORDER, len(chars), count_ngrams(chars, CHAR_ORDER)),
        (word_order, len(words), count_ngrams(words, word_order)),
    )


# A reference meets one hypothesis of every model, so its counts are kept, though not of a whole FLORES in 23 languages.
reference_profile = lru_cache(maxsize=2048)(profile)


def compare(hypothesis, reference):
    """Two profiles -> a list of (n_hypothesis, n_reference, n_match), one for each order, characters first."""
    rows = []
    for (order, hyp_length, hyp_counts), (_, ref_length, ref_counts) in zip(hypothesis, reference):
        matches = [0] * order
        for gram, count in hyp_counts.items():
            if gram in ref_counts:
                limit = ref_counts[gram]
                matches[len(gram) - 1] += count if count < limit else limit  # min() is slower
        for n, n_match in enumerate(matches, start=1):
            n_ref = max(ref_length - n + 1, 0)
            n_hyp = max(hyp_length - n + 1, 0) if n_ref else 0  # an order that the reference lacks counts for nothing
            rows.append((n_hyp, n_ref, n_match))
    return rows


def best_match(hypothesis, references, word_order):
    """`compare` with the reference that scores best, the first one on a tie."""
    references = [references] if isinstance(references, str) else [text for text in references if text is not None]
    if not references:
        raise ValueError(f"no reference for the hypothesis {hypothesis!r}: give a string or a list of them ('' is one)")
    own = profile(hypothesis, word_order)
    candidates = [compare(own, reference_profile(text, word_order)) for text in references]
    return candidates[0] if len(candidates) == 1 else max(candidates, key=chrf_score)  # max keeps the first of equals


def chrf_score(stats):
    """The F-score in [0, 100] of statistics (6 + word_order, 3), of one segment or summed over many.

    It is F of the precision and recall *averaged* over the orders that both sides have, not the mean of each order's F.
    """
    precision = recall = orders = 0
    for n_hyp, n_ref, n_match in stats.tolist() if isinstance(stats, np.ndarray) else stats:
        if n_hyp > 0 and n_ref > 0:
            precision, recall, orders = precision + n_match / n_hyp, recall + n_match / n_ref, orders + 1
    if precision == 0:  # then no n-gram matched and recall is 0 too: an empty text, also against an empty reference
        return 0.0
    precision, recall = precision / orders, recall / orders
    return 100 * (1 + BETA**2) * precision * recall / (BETA**2 * precision + recall)


def chrf_scores(stats):
    """What chrf_score says of each of many statistics: (..., orders, 3) -> (...) floats. For resamples by the thousand."""
    hyp, ref, match = np.moveaxis(np.asarray(stats, dtype=float), -1, 0)
    both = (hyp > 0) & (ref > 0)
    orders = np.maximum(both.sum(-1), 1)
    precision, recall = (np.divide(match, of, out=np.zeros_like(match), where=both).sum(-1) / orders for of in (hyp, ref))
    below = BETA**2 * precision + recall
    return 100 * np.divide((1 + BETA**2) * precision * recall, below, out=np.zeros_like(below), where=below > 0)


def chrf_stats(hypothesis, references, word_order=2):
    """Integer statistics of one segment, (6 + word_order, 3) int64: n-grams in the hypothesis, the reference, both.

    They add up: the score of a corpus is `chrf_score` of their sum. `references` is one string or several; of several,
    the statistics are those of the reference with the best F, the first one on a tie. None among them is passed over
    (sacrebleu's way to give some segments fewer references). Raises ValueError if no reference is left.
    """
    return np.array(best_match(hypothesis, references, word_order), dtype=np.int64)


def chrf(hypothesis, references, word_order=2):
    """chrF++ of one segment in [0, 100] against the best of its references; `word_order=0` gives chrF, 1 chrF+."""
    return chrf_score(best_match(hypothesis, references, word_order))


def corpus_chrf(hypotheses, references_per_segment, word_order=2):
    """chrF++ of a corpus in [0, 100]: statistics summed over segments, then one F (not a mean of segment scores).

    `references_per_segment[i]` is what segment i is compared with, a string or several: the transpose of sacrebleu's
    layout, which has one list per reference. Raises ValueError if the lengths differ or there is no segment.
    """
    if len(hypotheses) != len(references_per_segment) or not len(hypotheses):
        raise ValueError(
            f"{len(hypotheses)} hypotheses but references for {len(references_per_segment)} segments: give one string "
            "or list of references for each hypothesis, and at least one (sacrebleu's layout is the transpose)"
        )
    return chrf_score(sum(chrf_stats(h, refs, word_order) for h, refs in zip(hypotheses, references_per_segment)))
