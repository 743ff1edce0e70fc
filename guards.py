"""
What a reward model does not see: completions that must never be trained on, whatever their reward.

    truncated     it did not end by itself
    empty         it says nothing
    language      it is surely in another language than its prompt, by the n-gram identifier of mini/langid.py
    script        its letters are of another script: mostly Latin in an Arabic answer, some Cyrillic in a Polish one
    repeated      it runs in a loop, at its end or before
    copied        it is the prompt again, or begins with all of it
    role_tokens   it spells a chat template's tokens: the model went on to write the next turn

`flags` names those that a completion row fails; arbitrage.py and the online rounds of train_dpo.py drop such rows and
count them, per teacher and language. A guard that suits some data badly is left out by name: --guards truncated empty.

A guard that errs takes good answers from some languages more often than from others, so each is conservative: code,
addresses and quotations are in no language, and short texts are not judged. bench/langid.py measures how it errs.
"""

import functools
import re
import unicodedata
from collections import Counter

import numpy as np

import common
from languages import LANGUAGES, SCRIPTS
from mini.langid import LanguageModel, normal, plain

GUARDS = ("truncated", "empty", "language", "script", "repeated", "copied", "role_tokens")
REJECTED_GUARDS = ("truncated", "empty")  # what may not even be rejected: preferences should teach not to do the rest

# A character of these scripts says about as much as so many Latin ones: lengths below are in "letters", Latin ones.
WEIGHT = {"CJK": 3, "HIRAGANA": 2, "KATAKANA": 2, "KATAKANA-HIRAGANA": 2, "HANGUL": 2.5, "DEVANAGARI": 1.5,
          "ARABIC": 1.25, "HEBREW": 1.25}
ENOUGH = 30  # letters: a shorter text may be a name or a title, and its language and script are not judged
SURE, SURE_PER_LETTER = 10.0, 0.25  # nats by which another language must be likelier; a longer text holds more names
OWN, FOREIGN = 0.4, 0.1  # least share of letters in the own script; most in scripts that are neither that nor Latin
READ, JUDGED = 1000, 25_000  # characters at each end of a text that the identifier reads; that any guard reads

# A loop: so many times a unit of letters over so many letters in all. Tables, code and rules of dashes repeat lawfully.
LOOP, LONG_LOOP, TIMES, TIMES_LONG = 60, 400, 5, 3  # a unit of LOOP letters and more is a sentence: three times will do
AGAIN = 0.5  # share of the places in a text whose next 30 letters it has said before

# No pattern can take more than linear time: each repetition is bounded, or stops where the next match would begin.
BLOCK = re.compile(r"```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)", re.DOTALL)
VERBATIM = re.compile(BLOCK.pattern + r"|``.{1,300}?``|`[^`\n]+`", re.DOTALL)
NO_PROSE = re.compile(VERBATIM.pattern + r"|\$\$[^$]{1,1000}\$\$|\\[A-Za-z]+|</?[A-Za-z][^<>\n]{0,200}>"
                  r"|https?://[!-~]+|(?<![\w.-])[A-Za-z0-9.-]*[A-Za-z0-9][/_@.=][A-Za-z0-9][!-~]*",  # a@b.c, x_y, f.py
                  re.DOTALL | re.ASCII)
QUOTED = re.compile("|".join(rf"{a}[^{a}{b}\n]{{1,120}}{b}" for a, b in [
    ('"', '"'), ("“", "”"), ("„", "“"), ("„", "”"), ("«", "»"), ("»", "«"), ("‘", "’"), ("「", "」"), ("『", "』"),
    ("《", "》"), (r"\(", r"\)"), ("（", "）"), (r"\*", r"\*")]))
TABLE = re.compile(r"^[ \t]*\|.*$", re.MULTILINE)
LINK = re.compile(r"https?://[!-~]+")
NUMBERED = re.compile(r"^[ \t]*\d+[.)](?=\s)", re.MULTILINE)

# Cohere, Llama 3, ChatML, Zephyr, Phi <|...|>; Gemma; Mistral and Llama 2; Aya; then role lines that no answer writes
ROLE_TOKENS = re.compile(r"<\|[A-Za-z][\w-]{1,40}\|>|<(?:start|end)_of_turn>|\[/?INST\]|<</?SYS>>|</s>"
                         r"|<(?:BOS|EOS|PAD|EOP|UNK|MASK)_TOKEN>|<(?:bos|eos)>|\[(?:/?AVAILABLE_TOOLS|TOOL_CALLS)\]"
                         r"|^###? (?:Instruction|Response|Human|Assistant|User): ?$|^### (?:Human|Assistant|User): "
                         r"|\n\nHuman: [^\n]+\n\nAssistant:", re.MULTILINE | re.ASCII)
STRUCK = re.compile(r"<s>[^<>\n]{1,300}</s>")  # struck out, in HTML


# ---------------------------------------------------------------------------------------------------------------------
# text without what is in no language

def ends(text, n):
    """The first and the last n characters."""
    return text if len(text) <= 2 * n else text[:n] + " " + text[-n:]


def judged(text):
    """What the guards read of a text: NFKC, and both ends of a very long one."""
    return ends(normal(ends(text, JUDGED)), JUDGED)


def prose(text):
    """An NFKC text without code, addresses, tags, numbers and, if enough is left then, without quotations."""
    text = re.sub(r"\d+", " ", NO_PROSE.sub(" ", text))
    rest = QUOTED.sub(" ", text)
    return rest if letters(rest).total() >= min(ENOUGH, 0.5 * letters(text).total()) else text


@functools.lru_cache(maxsize=None)
def script(char):
    """The script of a letter, as languages.SCRIPTS names it; "" of all else, also of marks and of modifier letters."""
    name = unicodedata.name(char, "").split(" ")[0] if char.isalpha() else ""
    return {"IDEOGRAPHIC": "CJK", "BOPOMOFO": "CJK", "MODIFIER": ""}.get(name, name)


def letters(text):
    """Counter {script: letters of it}, weighted."""
    seen = Counter()
    for char, n in Counter(text).items():
        if of := script(char):
            seen[of] += n * WEIGHT.get(of, 1)
    return seen


def per_character(text):
    """Letters that a character of the text stands for, 1 to 3: what lengths in letters are divided by."""
    return max(1.0, letters(text).total() / max(1, sum(map(str.isalpha, text))))


# ---------------------------------------------------------------------------------------------------------------------
# the guards

def wrong_language(words, language):
    """
    Is this prose surely not in `language`? Latin letters are not read if enough are of its own script: an answer in
    Hindi names English products. Each word counts once. Languages that the identifier does not know are not judged.
    """
    own, seen = SCRIPTS.get(language, ("LATIN",)), letters(words)
    if sum(seen[s] for s in own) >= OWN * seen.total() and "LATIN" not in own:
        words = "".join(" " if script(c) == "LATIN" else c for c in words)
    words = " ".join(dict.fromkeys(ends(words, READ).split()))
    scores, n = LanguageModel.shipped().scores(words), letters(words).total()
    return language in scores and n >= ENOUGH and max(scores.values()) - scores[language] > SURE + SURE_PER_LETTER * n


def wrong_script(words, language):
    """Is most of this prose in scripts that are not `language`'s, or a tenth in one that is not Latin either?"""
    seen, own = letters(words), SCRIPTS.get(language, ("LATIN",))
    if language not in LANGUAGES or seen.total() < ENOUGH:
        return False
    at_home = sum(seen[s] for s in own)
    foreign = seen.total() - at_home - (seen["LATIN"] if language in SCRIPTS else 0)
    return at_home < OWN * seen.total() or foreign > max(FOREIGN * seen.total(), 8)


def loops(text, *rules):
    """
    Does `text` hold a loop: a unit of at least `letters`, TIMES times in a row, over `least` characters in all, for one
    of the rules (least, letters)? It may begin anywhere and break off within its unit.

    A period of a text is a distance at which its short n-grams come again: those that occur most are tried, in linear
    time.
    """
    n, last, distances = min(12, max(4, rules[0][0] // 5)), {}, Counter()
    for i, gram in enumerate(map("".join, zip(*(text[k:] for k in range(n))))):
        if gram in last:
            distances[i - last[gram]] += 1
        last[gram] = i
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    for period, _ in distances.most_common(50):
        differ = np.flatnonzero(codes[period:] != codes[:-period])
        begins, until = np.append(0, differ + 1), np.append(differ, len(codes) - period)
        for least, letters_ in rules:
            times = TIMES if period < least else TIMES_LONG
            for at in begins[until - begins >= max(least - period, (times - 1) * period)]:
                if sum(map(str.isalpha, text[at:at + period])) >= letters_:
                    return True
    return False


def repeated(text):
    """Does it say something over and over, or say most of what it says more than once?"""
    text = re.sub(r"[ \t]+", " ", text).strip()
    told = NUMBERED.sub("1.", TABLE.sub("", BLOCK.sub("", text)))  # a loop may count
    told = LINK.sub(lambda m: m[0][-15:], told)  # links to one site begin alike
    scale = per_character(told)
    strict, lax = (int(LOOP / scale), 1), (int(LONG_LOOP / scale), 0)
    if loops(told, strict, lax) or (told != text and loops(text, lax)):
        return True
    n = int(30 / scale)
    grams = Counter(told[i:i + n] for i in range(len(told) - n + 1))
    return grams.total() > 8 * n and len(grams) < (1 - AGAIN) * grams.total()


def copied(text, prompt):
    """Is it the prompt's last turn, or does it begin with all of it? Case, spaces and punctuation do not count."""
    said = prompt
    if not isinstance(prompt, str):
        said = next((m["content"] for m in reversed(prompt) if m["role"] == "user"), "")
    if letters(said).total() < 25 and not (said.rstrip().endswith(("?", "？", "؟")) and len(said) >= 8):
        return False  # "Hello" may be answered by "Hello! ..."
    said = judged(said)
    numbers = [re.findall(r"\d+", s) for s in (text, said)]  # plain() reads them all as 0
    text, said = (plain(s.casefold()).replace("ı", "i") for s in (text, said))  # Turkish: I is a capital ı, or English
    return bool(said) and numbers[0][:len(numbers[1])] == numbers[1] and (
        text == said or (len(said) >= 12 and text.startswith(said) and not text[len(said):len(said) + 1].isalpha()))


def role_tokens(text, prompt=""):
    """Does it spell a template's tokens outside code? Those that the prompt spells too are what it talks about."""
    text = STRUCK.sub(" ", VERBATIM.sub(" ", text))
    prompt = judged(prompt)
    return any(m[0].strip() not in prompt for m in ROLE_TOKENS.finditer(text))


def empty(text):
    """Nothing but spaces and characters without a width (unassigned ones are of a later Unicode: new emoji)."""
    return all(unicodedata.category(c) in ("Zs", "Zl", "Zp", "Cc", "Cf", "Cs") for c in text)


def flags(row):
    """
    A completion row (prompt: a string or messages, completion, language, and `ended`, True if it lacks) -> the names of
    GUARDS that it fails, in their order. Raises KeyError if the row has no prompt, completion or language.
    """
    text, prompt = row["completion"], row["prompt"]
    found = [] if row.get("ended", True) else ["truncated"]
    if empty(text):
        return [*found, "empty"]
    text = judged(text)
    words = prose(text)
    asked = prompt if isinstance(prompt, str) else "\n".join(str(m["content"]) for m in prompt)
    checks = {"language": wrong_language(words, row["language"]), "script": wrong_script(words, row["language"]),
              "repeated": repeated(text), "copied": copied(text, prompt), "role_tokens": role_tokens(text, asked)}
    return found + [name for name, failed in checks.items() if failed]


def all_flags(rows):
    """flags() of completion rows, in order; ranks share the work."""
    mine = [(i, flags(rows[i])) for i in range(common.rank(), len(rows), common.world())]
    return [names for _, names in sorted(common.gather_list(mine))]


def distinct_n(texts, n=2):
    """
    Share of different n-grams among all n-grams of the texts, [0, 1] (Li et al. 2016, arXiv 1510.03055): falls when a
    policy says the same to everything. Of words, or of characters where a text has no spaces between words. 0 of none.
    """
    seen, total = set(), 0
    for text in texts:
        scripts = letters(text)
        unspaced = sum(scripts[s] for s in SCRIPTS["ja"]) > 0.5 * scripts.total()
        words = list("".join(text.split())) if unspaced else text.split()
        grams = list(zip(*(words[i:] for i in range(n))))
        seen.update(grams)
        total += len(grams)
    return len(seen) / total if total else 0.0
