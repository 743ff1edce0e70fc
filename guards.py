"""
What a reward model does not see: completions that must never be trained on, whatever their reward.

    truncated     it did not end by itself
    empty         it says nothing
    language      it is in another language than its prompt, by the n-gram identifier of mini/langid.py
    script        its letters are of another script: Latin in an Arabic answer, Cyrillic in a Polish one
    repeated      it runs in a loop
    copied        it is the prompt again, or begins with all of it
    role_tokens   it spells a chat template's tokens: the model went on to write the next turn

`flags` names those that a completion row fails; arbitrage.py and the online rounds of train_dpo.py drop such rows and
count them, per teacher and language. A guard that suits some data badly is left out by name: --guards truncated empty.
"""

import re
import unicodedata
from collections import Counter

from languages import SCRIPTS
from mini.langid import LanguageModel

GUARDS = ("truncated", "empty", "language", "script", "repeated", "copied", "role_tokens")
ROLE_TOKENS = re.compile(r"<\|[\w /-]{2,40}\|>|</?s>|<(?:start|end)_of_turn>|\[/?INST\]|<</?SYS>>|<(?:BOS|EOS|PAD|EOP)_TOKEN>")
CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]+`|https?://\S+", re.DOTALL)


def prose(text):
    """The text without code and addresses, which are in no language."""
    return CODE.sub(" ", text)


def wrong_language(text, language):
    """Is this text surely not in `language`?"""
    scores = LanguageModel.shipped().scores(text)
    return max(scores.values()) - scores[language] > 12.0  # nats


def wrong_script(text, language):
    """Is most of its letters, or a tenth in a script that is not Latin, foreign to `language`?"""
    seen = Counter(unicodedata.name(c, "?").split(" ")[0] for c in text if c.isalpha())
    own = sum(seen[s] for s in SCRIPTS.get(language, ("LATIN",)))
    return own < 0.5 * seen.total() or seen.total() - own - seen["LATIN"] * (language in SCRIPTS) > 0.1 * seen.total()


def repeated(text):
    """Does it end in a loop, or say most of what it says more than once?"""
    text = text.strip()
    for unit in range(1, min(200, len(text) // 4) + 1):
        times = max(4, -(-24 // unit))
        if text.endswith(text[-unit:] * times):
            return True
    grams = [text[i:i + 10] for i in range(len(text) - 9)]
    return len(grams) > 50 and len(set(grams)) < 0.5 * len(grams)


def copied(text, prompt):
    squeeze = lambda s: " ".join(s.split()).casefold()
    said = prompt if isinstance(prompt, str) else next((m["content"] for m in reversed(prompt) if m["role"] == "user"), "")
    text, said = squeeze(text), squeeze(said)
    return bool(said) and (text == said or (len(said) >= 20 and text.startswith(said)))


def flags(row):
    """A completion row (prompt, completion, language, and `ended`, True if it lacks) -> names of GUARDS that it fails."""
    text = row["completion"]
    found = [] if row.get("ended", True) else ["truncated"]
    if not text.strip():
        return [*found, "empty"]
    words = prose(text)
    checks = {"language": wrong_language(words, row["language"]), "script": wrong_script(words, row["language"]),
              "repeated": repeated(text), "copied": copied(text, row["prompt"]),
              "role_tokens": bool(ROLE_TOKENS.search(text))}
    return found + [name for name, failed in checks.items() if failed]


def distinct_n(texts, n=2):
    """
    Share of different n-grams among all n-grams of the texts, [0, 1] (Li et al. 2016, arXiv 1510.03055): falls when a
    policy says the same to everything. Words, or characters where a text has no spaces.
    """
    seen, total = set(), 0
    for text in texts:
        words = text.split() if " " in text.strip() else list(text.strip())
        grams = list(zip(*(words[i:] for i in range(n))))
        seen.update(grams)
        total += len(grams)
    return len(seen) / total if total else 0.0
