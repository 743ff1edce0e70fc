"""
Log-likelihoods of continuations: how probable a model finds a text behind a context. Multiple choice is scored with them.

What requests have in common is computed once. The inputs are sorted; an input that begins another one is read with it (four
letters behind one question: one input), and inputs that begin alike form a group: its stem (five examples of Global-MMLU's
subject) goes through the model once, its rows' rest (the questions) reads the stem's keys and values. Two passes:

    stems   of many groups, packed one behind the other; keys and values are kept
    rests   padded on the right, with the own stem's keys and values in front, padded on the left

so nothing but rounding depends on what is in a batch. The head runs where a continuation's token is predicted, in fp32:
(B, T, V) would be 4 GB for 8 rows of Aya. Texts become ids as in lm-evaluation-harness 0.4.13, and so do its numbers.
Sharing a prefix's keys and values: Juravsky et al. 2024 ("Hydragen"), https://arxiv.org/abs/2402.05099.
"""

from collections import Counter

import numpy as np
import torch

import common
from common import die
from data import Example, pack_batch, token_batches

AT_ONCE = 256  # texts that are tokenised together
SPLIT = 4  # tokens that a row must save to be cut off its stem: the rest is padded, and its keys are gathered
KEPT = 8  # in a batch of rests, so many tokens of stems weigh as much as one computed token
LOGITS = 2**26  # logits at once: 256 MB


# ---------------------------------------------------------------------------------------------------------------------
# texts

def first_id(chat):
    """What stands in front of a text that nothing stands in front of: BOS, or EOS where there is none (as in Qwen)."""
    if chat.bos is None and "eos_token" not in chat.names:
        die(f"{chat.folder}: the tokenizer has neither a BOS nor an EOS, so nothing can stand in front of a text")
    return chat.tokenizer.token_to_id(chat.names["eos_token"]) if chat.bos is None else chat.bos


def encode(chat, texts, special=True):
    """
    Texts -> {text: ids} as transformers' tokenizer makes them, with what it puts in front (a BOS, in Aya's); a text that
    begins with the BOS's text gets no second one. Unlike Chat.encode, control tokens spelled out are control tokens.
    """
    bos, found = chat.tokenizer.decode([first_id(chat)], skip_special_tokens=False), {}
    for framed in (True, False):
        part = [t for t in dict.fromkeys(texts) if framed == (special and not t.startswith(bos))]
        found |= {t: e.ids for t, e in zip(part, chat.tokenizer.encode_batch_fast(part, add_special_tokens=framed))}
    return found


def encode_pairs(chat, pairs):
    """
    [(context, continuation)] -> [(ids, ids)]. White space at the context's end goes to the continuation, whose ids are what
    the whole has behind as many ids as the context alone has; scored are context + continuation, even where the whole is
    tokenised otherwise at the border.
    """
    out = []
    for begin in range(0, len(pairs), AT_ONCE):
        part = pairs[begin:begin + AT_ONCE]
        ends = [len(context.rstrip()) for context, _ in part]
        heads = encode(chat, [context[:end] for (context, _), end in zip(part, ends)])
        whole = encode(chat, [context + continuation for context, continuation in part if context])
        alone = encode(chat, [continuation for context, continuation in part if not context], special=False)
        for (context, continuation), end in zip(part, ends):
            if context:
                head = heads[context[:end]]
                head, tail = head or [first_id(chat)], whole[context + continuation][len(head):]
            else:
                head, tail = [first_id(chat)], alone[continuation]
                tail = tail[1:] if tail[:1] == head else tail  # it says BOS itself
            if not tail:
                die(f"nothing to score: {continuation!r} has no token of its own behind {context[-40:]!r}")
            out.append((head, tail))
    return out


def score_texts(model, chat, pairs, batch_tokens, count=None):
    """
    [(context, continuation)] -> [(sum of log-probs, whether greedy decoding would say it)]. Each rank tokenises and scores
    one stretch of the list, of about as many characters as the others', and all get all. `count`: see loglikelihoods().
    """
    sizes = np.cumsum([0] + [len(context) + len(continuation) for context, continuation in pairs])
    owner = sizes[:-1] * common.world() // max(1, sizes[-1])
    mine = [pair for pair, rank in zip(pairs, owner) if rank == common.rank()]
    return common.gather_list(loglikelihoods(model, encode_pairs(chat, mine), batch_tokens, count))


# ---------------------------------------------------------------------------------------------------------------------
# what is computed once

def shared(a, b):
    """How many ids two arrays begin with in common."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n


def distinct(inputs):
    """
    Lists of ids -> (rows, owner): those that no other one begins with, as sorted arrays, and of each input the row that
    begins with it. Big-endian bytes sort as the numbers do; from the end on, what an input begins comes before it.
    """
    names, rows, owner = [np.array(ids, dtype=">u4").tobytes() for ids in inputs], [], {}
    for name in sorted(set(names), reverse=True):
        if not rows or not rows[-1].startswith(name):
            rows.append(name)
        owner[name] = len(rows) - 1
    return [np.frombuffer(row, dtype=">u4").astype(np.int64) for row in rows], [owner[name] for name in names]


def grouped(rows):
    """
    Sorted rows -> [(length of the stem, rows' numbers)], every row once, so that the most tokens are saved: dynamic
    programming over where the last group begins. A row alone is all stem.
    """
    n, start = len(rows), np.arange(len(rows))
    best, begin = np.zeros(n + 1, dtype=np.int64), np.zeros(n + 1, dtype=np.int64)  # of the first j rows
    stem = np.zeros(n, dtype=np.int64)  # of the group that begins at i and ends before j
    for j in range(1, n + 1):
        if j > 1:
            stem[:j - 1] = np.minimum(stem[:j - 1], shared(rows[j - 2], rows[j - 1]))
        stem[j - 1] = len(rows[j - 1])
        more = j - 1 - start[:j]
        saved = best[:j] + more * stem[:j] - SPLIT * np.where(more > 0, more + 1, 0)
        begin[j] = saved.argmax()
        best[j] = saved[begin[j]]
    groups, end = [], n
    while end:
        i = int(begin[end])
        groups.append((shared(rows[i], rows[end - 1]), range(i, end)))  # sorted: first and last share the least
        end = i
    return groups


def packs(groups, batch_tokens):
    """Groups whose stems go through the model together: the longest first, up to batch_tokens, or one alone."""
    pack, tokens = [], 0
    for group in sorted(groups, key=lambda group: -group[0]):
        if pack and tokens + group[0] > batch_tokens:
            yield pack
            pack, tokens = [], 0
        pack.append(group)
        tokens += group[0]
    if pack:
        yield pack


class Prefixes:
    """
    A cache for model.hidden(): keeps keys and values of a packed row of stems, (T, Hkv, D) a layer, and once `at` (B, P) is
    set, puts those of the tokens it names in front of each of B rows.
    """

    decoding = False

    def __init__(self):
        self.kept, self.at = {}, None

    def fill(self, layer, k, v):
        """k, v (1, T, Hkv, D) or (B, S, Hkv, D) -> what attention reads: the same, or (B, P + S, Hkv, D)."""
        if self.at is None:
            self.kept[layer] = k[0], v[0]
            return k, v
        return tuple(torch.cat([kept[self.at], new], dim=1) for kept, new in zip(self.kept[layer], (k, v)))


# ---------------------------------------------------------------------------------------------------------------------
# what is computed

def exact_logits(model, hidden):
    """(n, C) -> (n, V) fp32, never rounded to 16 bits: rounded, log-probs of two choices would tie now and then."""
    if hidden.is_cuda:
        return model.logits(hidden, exact=True)
    logits, cap = hidden.float() @ model.head.float().T * model.cfg.logit_scale, model.cfg.final_logit_softcapping
    return logits if cap is None else cap * torch.tanh(logits / cap)


class Scores:
    """Sums of log-probs and greedy flags of so many requests, gathered token by token."""

    def __init__(self, n):
        self.sums, self.greedy = np.zeros(n), np.ones(n, dtype=bool)

    def add(self, model, hidden, wanted):
        """hidden (n, C); wanted: [(place in hidden, id that follows there, request)], a place any number of times."""
        if not wanted:
            return
        place, target, request = (np.array(column) for column in zip(*wanted))
        places, row = np.unique(place, return_inverse=True)
        step = max(1, LOGITS // model.cfg.vocab_size)
        for begin in range(0, len(places), step):
            part = torch.from_numpy(places[begin:begin + step]).to(hidden.device)
            logits = exact_logits(model, hidden[part])
            here = np.flatnonzero((row >= begin) & (row < begin + step))
            i, ids = (torch.from_numpy(x[here]).to(hidden.device) for x in (row - begin, target))
            logps = logits[i, ids] - logits.logsumexp(-1)[i]
            np.add.at(self.sums, request[here], logps.double().cpu().numpy())
            np.logical_and.at(self.greedy, request[here], (logits.argmax(-1)[i] == ids).cpu().numpy())


def run_stems(model, pack, rows, wanted, scores):
    """One pass over the stems of these groups, packed -> (their keys and values, where each stem begins)."""
    stems, cache = [rows[members[0]][:length] for length, members in pack], Prefixes()
    device = next(model.parameters()).device
    ids, _, start = pack_batch([Example(stem, np.zeros(len(stem), dtype=bool)) for stem in stems], device)
    begins = np.cumsum([0] + [len(stem) for stem in stems])
    hidden = model.hidden(ids, doc_start=start, cache=cache)[0]
    scores.add(model, hidden, [(begin + at, target, request) for begin, (length, members) in zip(begins, pack)
                               for m in members for at, target, request in wanted[m] if at < length])
    return cache, begins


def run_rests(model, batch, cache, rows, wanted, scores):
    """batch: [(row's number, where its stem begins in the cache, the stem's length)] -> tokens computed, with padding."""
    number, begin, length = map(np.array, zip(*batch))
    rests = [rows[r][n:] for r, _, n in batch]
    S, P, device = max(map(len, rests)), length.max(), next(model.parameters()).device
    ids = np.zeros((len(batch), S), dtype=np.int64)
    for i, rest in enumerate(rests):
        ids[i, :len(rest)] = rest
    left = P - length[:, None]  # places in front of each stem, which nobody sees
    at = np.maximum(begin[:, None] - left + np.arange(P), 0)
    ids, positions, cache.at = (torch.from_numpy(x).to(device) for x in (ids, length[:, None] + np.arange(S), at))
    start = torch.from_numpy(left.astype(np.int32)).to(device).expand(-1, S).contiguous() if left.any() else None
    hidden = model.hidden(ids, positions, start, cache).flatten(0, 1)
    scores.add(model, hidden, [(i * S + at - n, target, request) for i, (r, _, n) in enumerate(batch)
                               for at, target, request in wanted[r] if at >= n])
    return ids.numel()


@torch.no_grad()
def loglikelihoods(model, requests, batch_tokens=8192, count=None):
    """
    [(context ids, continuation ids)], neither empty -> [(sum of log p(continuation | context), whether each of its tokens is
    the likeliest one)], on this rank alone. Contexts are cut on the left to the model's length. batch_tokens: computed at
    once, at most, or one row. `count`: a Counter that gets the tokens computed (with padding), and asked (without sharing or
    padding), and how many contexts were cut.
    """
    limit, inputs, scores = model.cfg.max_position_embeddings, [], Scores(len(requests))
    count = Counter() if count is None else count
    for context, continuation in requests:
        if len(continuation) > limit:
            die(f"a continuation has {len(continuation)} tokens, this model reads {limit}")
        whole = context + continuation
        inputs.append(whole[-(limit + 1):-1])
        count["cut"] += len(whole) > limit + 1
        count["asked"] += len(inputs[-1])
    if not requests:
        return []
    rows, owner = distinct(inputs)
    wanted = [[] for _ in rows]  # of each row: (place, id that follows there, request)
    for r, ((_, continuation), ids) in enumerate(zip(requests, inputs)):
        wanted[owner[r]] += [(len(ids) - len(continuation) + n, target, r) for n, target in enumerate(continuation)]
    bar = common.progress(None, "scoring", len(rows))
    for pack in packs(grouped(rows), batch_tokens):
        cache, begins = run_stems(model, pack, rows, wanted, scores)
        count["computed"] += int(begins[-1])
        rests = [(m, begin, length) for begin, (length, members) in zip(begins, pack) if len(members) > 1 for m in members]
        costs = [len(rows[m]) - length + length // KEPT for m, _, length in rests]
        for batch in list(token_batches(costs, batch_tokens))[::-1]:  # the largest first: if memory is short, it shows
            count["computed"] += run_rests(model, [rests[i] for i in batch], cache, rows, wanted, scores)
        bar.update(sum(len(members) for _, members in pack))
    if not np.isfinite(scores.sums).all():
        die("scoring: log-probs are not numbers; check the checkpoint")
    return [(float(total), bool(greedy)) for total, greedy in zip(scores.sums, scores.greedy)]
