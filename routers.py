"""
Routers: which teacher's completion of each prompt is kept (Odumakinde et al. 2024, https://arxiv.org/abs/2408.14960).

    reward    every teacher answers, the highest reward is kept: N completions paid for each one that is used
    fixed     one teacher per language: given, or the best one on a small scored sample
    single    one teacher for everything: the best one on the sample
    random    a draw per prompt
    learned   a small model reads the prompt and picks the teacher, so one completion is paid for; it is trained on the
              sample to match the distribution over teachers that their rewards give (KL divergence, as in the paper)

All but the first pick a teacher before it answers: if the guards then refuse the answer, the prompt has none. Rewards
compare only within a prompt, so a teacher is judged by its advantage: its reward minus the pool's mean on that prompt.
"""

import hashlib
import json
import math
import random
import zlib
from array import array
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from common import die
from guards import flags
from languages import LANGUAGES
from rows import check_row

ROUTERS = ("reward", "fixed", "learned", "random", "single")
BUCKETS = 1 << 16  # of the learned router's hashed n-grams
READ = 1000  # characters of a prompt that it reads


@dataclass
class Table:
    """
    What routing needs of every completion: P prompts x S slots. A slot is a sample of one of T teachers. No texts. Some 30
    bytes a slot, which is what the memory of a run grows by.
    """
    ids: list  # P
    languages: np.ndarray  # (P,) str
    teachers: list  # T names
    owner: np.ndarray  # (S,) int: the slot's teacher
    there: np.ndarray  # (P, S) bool: a completion was asked for
    may: np.ndarray  # (P, S) bool: it may be routed
    scores: np.ndarray  # (P, S) float64: the Arbiter's reward; NaN: none
    judged: np.ndarray  # (P, S) float64: a second reward model's; NaN: none
    tokens: np.ndarray  # (P, S) int32, -1: unknown
    file: np.ndarray  # (P, S) int16: the completion is row number `row` of this file; -1: none
    row: np.ndarray  # (P, S) int32

    def of_teachers(self, values, reduce):
        """(P, S) -> (P, T): np.max or np.any over each teacher's samples."""
        out = np.full((len(self.ids), len(self.teachers)), -np.inf if values.dtype == float else False)
        for t in set(self.owner.tolist()):
            out[:, t] = reduce(values[:, self.owner == t], axis=1)
        return out

    def asked(self):
        """(P, T) bool"""
        return self.of_teachers(self.there, np.any)

    @property
    def rewards(self):
        """(P, S) float64: of what may be routed; NaN elsewhere."""
        return np.where(self.may, self.scores, np.nan)

    def value(self):
        """
        (P, T) what it is worth to send a prompt to a teacher: the reward of the best of its samples that may be routed. If
        none may, it is worth less than the worst answer of the pool, by the standard deviation of rewards within a prompt.
        NaN: it was not asked, or nobody gave an answer that has a reward.
        """
        best = self.of_teachers(np.where(self.may, self.scores, -np.inf), np.max)
        known, scores = ~np.isnan(self.scores), np.nan_to_num(self.scores)
        mean = scores.sum(1, keepdims=True) / np.maximum(known.sum(1, keepdims=True), 1)
        deviation = float(np.sqrt((((scores - mean) * known) ** 2).sum() / max(known.sum(), 1)))
        refused = np.where(known, self.scores, np.inf).min(1, initial=np.inf, keepdims=True) - deviation
        return np.where(self.asked() & np.isfinite(refused), np.where(np.isinf(best), refused, best), np.nan)

    def advantage(self):
        """(P, T) value minus its mean over the teachers that were asked: comparable between prompts."""
        value = self.value()
        known = ~np.isnan(value)
        return value - np.where(known, value, 0).sum(1, keepdims=True) / np.maximum(known.sum(1, keepdims=True), 1)


def make_table(files, guards, teachers=None, ids=None, languages=()):
    """
    [RowsOnDisk] of completion rows with "reward" (null: none) and perhaps "judge_reward" -> (Table, counts). What fails one
    of `guards` may not be routed. counts: {(teacher, language): Counter of
    "n", "failed", "dropped" and each guard}. Prompts stand in the order of `ids`, in these `languages`, teachers in that of
    `teachers`; without, as they come.
    """
    number, teacher_of = ({name: i for i, name in enumerate(names or ())} for names in (ids, teachers))
    prompts, languages, counts = {}, dict(enumerate(languages)), {}
    columns = {name: array(kind) for name, kind in zip(
        ("p", "t", "may", "scores", "judged", "tokens", "file", "row"), "iibddihi")}
    for f, rows in enumerate(files):
        for n, (row, where) in enumerate(rows.scan()):
            check_row(row, "completions", where)
            if "reward" not in row or "teacher" not in row:
                die(f"{where} has no reward or no teacher; score the file with reward.py first")
            numbers = [row["reward"], row.get("judge_reward"), row.get("tokens")]
            if not isinstance(row["teacher"], str) or any(x is not None and not (
                    type(x) in (int, float) and math.isfinite(x)) for x in numbers):
                die(f"{where}: a teacher is a name; reward, judge_reward and tokens are numbers or null")
            p, t = number.setdefault(row["id"], len(number)), teacher_of.setdefault(row["teacher"], len(teacher_of))
            digest = hashlib.sha256(repr((row["language"], row["prompt"])).encode("utf-8")).digest()[:16]
            if prompts.setdefault(p, digest) != digest:
                die(f"{where}: the id {row['id']!r} has another prompt or language than in an earlier row")
            languages[p] = row["language"]
            failed = set(row["flags"] if "flags" in row else flags(row))
            answered = row["reward"] is not None and "failure" not in row
            usable, judged, tokens = answered and failed.isdisjoint(guards), row.get("judge_reward"), row.get("tokens")
            counts.setdefault((row["teacher"], row["language"]), Counter()).update(
                ["n", *failed] + ["dropped"] * (not usable) + ["failed"] * ("failure" in row))
            for name, value in zip(columns, (
                    p, t, usable, row["reward"] if answered else np.nan, np.nan if judged is None else judged,
                    -1 if tokens is None else tokens, f, n)):
                columns[name].append(value)
    at = {name: np.frombuffer(values, dtype=values.typecode) for name, values in columns.items()}
    T, p, t = max(1, len(teacher_of)), at["p"].astype(np.int64), at["t"]
    order = np.argsort(p * T + t, kind="stable")  # k: which sample of its teacher and prompt a row is, as they come
    _, first, size = np.unique((p * T + t)[order], return_index=True, return_counts=True)
    k = np.empty(len(p), np.int64)
    k[order] = np.arange(len(p)) - np.repeat(first, size)
    samples = [int(k[t == i].max(initial=-1)) + 1 for i in range(len(teacher_of))]
    P, S, s = len(number), sum(samples), np.cumsum([0, *samples])[t] + k
    empty = {"may": False, "scores": np.nan, "judged": np.nan, "tokens": np.int32(-1), "file": np.int16(-1),
             "row": np.int32(-1)}
    table = Table(list(number), np.array([languages.get(i, "") for i in range(P)]), list(teacher_of),
                  np.repeat(np.arange(len(samples)), samples), np.zeros((P, S), bool),
                  **{name: np.full((P, S), value) for name, value in empty.items()})
    table.there[p, s] = True
    for name in empty:
        getattr(table, name)[p, s] = at[name]
    return table, counts


# ---------------------------------------------------------------------------------------------------------------------
# choices

def best_slot(table, teacher=None):
    """
    (P,) the slot with the highest reward that may be routed, of all, or of the teacher given for each prompt ((P,) int, -1:
    nobody); -1: there is none.
    """
    rewards = np.where(table.may, table.scores, -np.inf)
    if teacher is not None:
        rewards = np.where(table.owner == np.asarray(teacher)[:, None], rewards, -np.inf)
    return np.where(np.isinf(rewards.max(1, initial=-np.inf)), -1, rewards.argmax(1) if rewards.size else -1)


# ---------------------------------------------------------------------------------------------------------------------
# the learned router

def features(prompt):
    """A prompt -> the buckets of its 1- to 4-grams of characters and its words, each once: array of int64."""
    text = prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in prompt if m["role"] == "user")
    text = " ".join(text.split()).casefold()
    text = f" {text if len(text) <= READ else text[:READ // 2] + text[-READ // 2:]} "
    grams = {text[i:i + n] for n in (1, 2, 3, 4) for i in range(len(text) - n + 1)} | {f"w {w}" for w in text.split()}
    return np.array(sorted({zlib.crc32(g.encode("utf-8", "replace")) % BUCKETS for g in grams}))


class Learned:
    """
    p(teacher | prompt) = softmax(b[language] + mean of w[n-gram] over the prompt's n-grams). The language's part alone is
    the router `fixed`; the n-grams add what the prompt is about, as far as that lowers the loss on held-out prompts.
    """

    def __init__(self, teachers):
        self.teachers, self.languages = teachers, list(LANGUAGES)
        self.bag = torch.nn.EmbeddingBag(BUCKETS, len(teachers), mode="mean")
        self.bias = torch.nn.Parameter(torch.zeros(len(self.languages), len(teachers)))
        torch.nn.init.zeros_(self.bag.weight)

    def save(self, path):
        """One safetensors file, with the teachers' and languages' names."""
        names = {"teachers": json.dumps(self.teachers), "languages": json.dumps(self.languages)}
        save_file({"ngrams": self.bag.weight.detach(), "languages": self.bias.detach()}, path, names)

    @staticmethod
    def load(path, teachers):
        """For a pool of the same teachers, in whatever order."""
        try:
            f = safe_open(path, "pt")
        except (OSError, SafetensorError) as e:
            die(f"{path} cannot be read as the file of a learned router ({e})")
        with f:
            names = {key: json.loads(value) for key, value in (f.metadata() or {}).items()}
            if sorted(names.get("teachers", [])) != sorted(teachers) or names["languages"] != list(LANGUAGES):
                die(f"{path} was fitted for the teachers {', '.join(names.get('teachers', ['?']))}, not for {', '.join(teachers)}")
            order, found = [names["teachers"].index(t) for t in teachers], Learned(teachers)
            with torch.no_grad():
                found.bag.weight.copy_(f.get_tensor("ngrams")[:, order])
                found.bias.copy_(f.get_tensor("languages")[:, order])
        return found

    def logits(self, grams, languages):
        """[features], [language] -> (B, T)"""
        offsets = torch.tensor(np.cumsum([0, *map(len, grams[:-1])]))
        which = torch.tensor([self.languages.index(language) for language in languages])
        return self.bag(torch.from_numpy(np.concatenate(grams)), offsets) + self.bias[which]

    @torch.no_grad()
    def pick(self, prompt_of, languages, able):
        """(P,) int: the likeliest teacher among those that are able, (P, T) bool. prompt_of(i): the prompt number i."""
        picks = np.zeros(len(languages), dtype=int)
        for at in np.array_split(np.arange(len(languages)), len(languages) // 1024 + 1):
            if len(at):
                logits = self.logits([features(prompt_of(i)) for i in at], [languages[i] for i in at]).numpy()
                picks[at] = np.where(able[at], logits, -np.inf).argmax(1)
        return picks

    def fit(self, prompts, languages, value, sharpness=4.0, epochs=60, lr=0.1, patience=5, seed=0):
        """
        value (P, T): Table.value() of prompts that all able teachers answered, NaN: not able. The target is
        softmax(sharpness * value / s), s the standard deviation of rewards within a prompt, whatever the reward model's
        scale. Minimises KL(target || p): first the languages' part, then all; a fifth of the prompts says when to stop.
        -> that loss on them, (of the languages' part alone, of the whole).
        """
        value, found = torch.from_numpy(value), []
        able = ~value.isnan()
        mean = value.nan_to_num().sum(1, keepdim=True) / able.sum(1, keepdim=True)
        spread = (((value - mean).nan_to_num() ** 2).sum() / able.sum()).sqrt().clamp(min=1e-12)
        target = (sharpness * (value - mean) / spread).masked_fill(~able, -torch.inf).softmax(1).float()
        grams, rng = [features(p) for p in prompts], random.Random(seed)
        order = rng.sample(range(len(prompts)), len(prompts))
        train, held_out = order[len(order) // 5:], order[:len(order) // 5] or order

        def loss(at):
            logits = self.logits([grams[i] for i in at], [languages[i] for i in at]).masked_fill(~able[at], -torch.inf)
            return F.kl_div(logits.log_softmax(1).masked_fill(~able[at], 0.0), target[at], reduction="batchmean")

        for parameters in ([self.bias], [self.bias, self.bag.weight]):
            optimizer, waited = torch.optim.Adam(parameters, lr), 0
            with torch.no_grad():
                best, kept = loss(held_out).item(), [p.clone() for p in parameters]
            for _ in range(epochs):
                rng.shuffle(train)
                for begin in range(0, len(train), 64):
                    optimizer.zero_grad()
                    loss(train[begin:begin + 64]).backward()
                    optimizer.step()
                with torch.no_grad():
                    now, waited = loss(held_out).item(), waited + 1
                    if now < best:
                        best, waited, kept = now, 0, [p.clone() for p in parameters]
                if waited == patience:
                    break
            with torch.no_grad():
                for p, value in zip(parameters, kept):
                    p.copy_(value)
            found.append(best)
        return tuple(found)


# ---------------------------------------------------------------------------------------------------------------------
# picks before anybody answers

class Picks:
    """Which teacher each prompt goes to, for the routers that pick one before it answers."""

    def __init__(self, teachers, given=None, seed=0, learned=""):
        """
        teachers: names. given: {language: teacher's number} of the router `fixed`, known beforehand; learned: the file of a
        Learned that was fitted before.
        """
        self.teachers, self.given, self.seed = teachers, given or {}, seed
        self.fixed, self.single, self.losses = dict(self.given), 0, None
        self.learned = Learned.load(learned, teachers) if learned else None

    def fit(self, table, sample, prompt_of):
        """
        From the prompts `sample` ((P,) bool) of a table, which all teachers answered: `fixed` and `single` take the highest
        mean advantage, `learned` is trained. A language that the sample lacks gets the best teacher overall.
        """
        advantage = table.advantage()

        def best(rows):
            known = ~np.isnan(advantage[rows])
            mean = np.where(known, advantage[rows], 0).sum(0) / np.maximum(known.sum(0), 1)
            return int(np.where(known.any(0), mean, -np.inf).argmax()) if known.any() else self.single
        if np.isnan(advantage[sample]).all():
            die("no completion of the scored sample may be routed, so no teacher can be picked: the guards' counts say why "
                "(--guards names what is refused); raise --max_new_tokens if most are truncated")
        self.single = best(sample)
        self.fixed = {l: best(sample & (table.languages == l)) for l in LANGUAGES} | self.given
        value, at = table.value(), np.flatnonzero(sample & ~np.isnan(advantage).all(1))
        self.learned = Learned(self.teachers)
        self.losses = self.learned.fit([prompt_of(i) for i in at], table.languages[at].tolist(), value[at], seed=self.seed)

    def pick(self, router, ids, languages, able, prompt_of=None):
        """
        (P,) int, -1: nobody can. able (P, T) bool: who may be asked; if that is not the one wanted, the language's best, or
        the first who may. `random` depends on seed and id only.
        """
        if router == "random":
            return np.array([random.Random(f"{self.seed} {i}").choice(np.flatnonzero(row).tolist()) if row.any() else -1
                             for i, row in zip(ids, able)], dtype=int)
        if router == "learned":
            picks = self.learned.pick(prompt_of, languages, able)
        else:
            first = [self.single if router == "single" else self.fixed.get(l, self.single) for l in languages]
            others = zip(first, (self.fixed.get(l, self.single) for l in languages), able.argmax(1).tolist())
            picks = np.array([next((t for t in wanted if row[t]), -1) for wanted, row in zip(others, able)], dtype=int)
        return np.where(able.any(1), picks, -1)
