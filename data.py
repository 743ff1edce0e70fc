"""
Rows in, batches out: mixtures of files, loss masks, padding and packing.

Order is a pure function of (seed, step), so a run can be repeated or continued exactly.
"""

import hashlib
import heapq
import random
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from common import die, print0
from languages import CLUSTERS, LANGUAGES, SHARED  # noqa: F401  others take these and the next from here
from rows import (FIELDS, ROLES, append_rows, check_row, read_checked, read_finished, read_jsonl, read_rows,  # noqa: F401
                  write_rows)

# ---------------------------------------------------------------------------------------------------------------------
# mixtures

def read_mixture(specs, kind, seed, keep=None, make=None):
    """
    Files with optional weights, `a.jsonl:0.85 b.jsonl:0.15`: shares of the mixture's rows. The first file is taken whole
    and the others are repeated or thinned (by seed) to reach their share, which is printed. Without weights: all rows of
    all files. `keep`: row -> is it wanted? `make`: (row, "file:line") -> what the list holds in its place, or None to
    leave it out. Shares are those of what is left. Returns the list, file after file.
    """
    parts = []
    for spec in specs:
        path, colon, weight = spec.rpartition(":")
        try:
            path, weight = (path, float(weight)) if colon else (spec, None)
        except ValueError:
            path, weight = spec, None  # a colon that belongs to the path
        if weight is not None and not weight > 0:
            die(f"{spec}: a weight must be above 0")
        made = (row if make is None else make(row, where) for row, where in read_checked(path, kind)
                if keep is None or keep(row))  # one row at a time: a million of them as JSON would take gigabytes
        parts.append((path, weight, [m for m in made if m is not None]))
    weights = [weight for _, weight, _ in parts]
    if all(w is None for w in weights):
        return [row for _, _, rows in parts for row in rows]
    if None in weights:
        die("give every file a weight, or none of them")
    for path, _, rows in parts:
        if not rows:
            die(f"{path} has a weight, but no row of it is left")
    rng, out, (_, first_weight, first) = random.Random(seed), [], parts[0]
    for path, weight, rows in parts:
        wanted = round(len(first) * weight / first_weight)
        whole, rest = divmod(wanted, len(rows))
        out.append(rows * whole + rng.sample(rows, rest))
    total = sum(map(len, out))
    for (path, weight, rows), taken in zip(parts, out):
        print0(f"{path}: {len(taken)} of {total} rows, {100 * len(taken) / total:.1f} % "
               f"(asked for {100 * weight / sum(weights):.1f} %; {len(rows)} rows, each taken "
               f"{len(taken) / len(rows):.2f} times)")
    return [row for taken in out for row in taken]


# ---------------------------------------------------------------------------------------------------------------------
# examples and batches

@dataclass
class Example:
    ids: list  # token ids
    mask: list  # True where the token is trained; same length


def encode_row(chat, prompt, completion):
    """Prompt masked, completion and its end of turn trained."""
    head, tail = chat.prompt_ids(prompt), chat.completion_ids(completion)
    return Example(head + tail, [False] * len(head) + [True] * len(tail))


def encode_sft(chat, row):
    """{"prompt","completion"}, {"messages"} (every assistant turn is trained) or {"text"} (all of it, then EOS)."""
    if "text" in row:
        bos = [] if chat.bos is None else [chat.bos]
        text = [*chat.encode(row["text"]), *([] if chat.eos is None else [chat.eos])]
        return Example(bos + text, [False] * len(bos) + [True] * len(text))
    if "messages" not in row:
        return encode_row(chat, row["prompt"], row["completion"])
    return Example(*chat.messages_ids(row["messages"]))


def drop_long(examples, max_tokens, languages):
    """Indices of the examples that fit; what does not is counted per language and printed by the caller."""
    kept, dropped = [], {}
    for i, e in enumerate(examples):
        if len(e.ids) <= max_tokens:
            kept.append(i)
        else:
            dropped[languages[i]] = dropped.get(languages[i], 0) + 1
    return kept, dropped


@dataclass
class Item:
    """One row as it is trained: its documents (SFT: one; preferences: chosen, rejected), and where it came from."""
    sides: tuple
    language: str
    where: str  # "file:line"

    def __len__(self):
        """Tokens."""
        return sum(len(side.ids) for side in self.sides)

    @property
    def longest(self):
        """Tokens of the longest side."""
        return max(len(side.ids) for side in self.sides)

    @property
    def trained(self):
        """Trained tokens of the first side."""
        return int(np.count_nonzero(self.sides[0].mask))


def read_items(specs, kind, chat, max_tokens, seed, keep=None):
    """
    Files of SFT or preference rows, mixed as read_mixture says, tokenised -> [Item]. A row with a side of more than
    max_tokens is dropped, never cut; how many were, per language, is printed.
    """
    dropped = Counter()

    def make(row, where):
        examples = [encode_sft(chat, row)] if kind == "sft" else [
            encode_row(chat, row["prompt"], row[side]) for side in ("chosen", "rejected")]
        if max(len(e.ids) for e in examples) > max_tokens:
            dropped[row["language"]] += 1
            return None
        # arrays: a million rows as Python lists of numbers would take tens of gigabytes on every rank
        sides = tuple(Example(np.array(e.ids, dtype=np.int32), np.array(e.mask, dtype=bool)) for e in examples)
        return Item(sides, row["language"], where)

    items = read_mixture(specs, kind, seed, keep, make)
    if dropped:
        print0(f"dropped {dropped.total()} {'rows' if kind == 'sft' else 'pairs'} longer than {max_tokens} tokens: "
               f"{dict(dropped)}")
    return items


def fingerprint(items):
    """Hex digest of all token ids and masks, in order: what a run was trained on."""
    digest = hashlib.sha256()
    for item in items:
        for side in item.sides:
            digest.update(len(side.ids).to_bytes(8, "little") + side.ids.tobytes() + side.mask.tobytes())
    return digest.hexdigest()


def pad_batch(examples, pad, device=None):
    """Right-padded: ids (B, T) int64 and loss_mask (B, T) bool."""
    T = max(len(e.ids) for e in examples)
    ids = torch.full((len(examples), T), pad, dtype=torch.int64)
    mask = torch.zeros((len(examples), T), dtype=torch.bool)
    for i, e in enumerate(examples):
        ids[i, :len(e.ids)] = torch.tensor(e.ids)
        mask[i, :len(e.ids)] = torch.tensor(e.mask)
    return ids.to(device), mask.to(device)


def token_batches(lengths, batch_tokens):
    """
    Yields lists of row numbers, the shortest rows first. A batch has at most batch_tokens tokens, padding included, or
    is one row.
    """
    order, begin = sorted(range(len(lengths)), key=lengths.__getitem__), 0
    while begin < len(order):
        end = begin + 1
        while end < len(order) and (end + 1 - begin) * lengths[order[end]] <= batch_tokens:
            end += 1
        yield order[begin:end]
        begin = end


def pack_batch(examples, device=None):
    """
    Examples end to end in one row, without padding: ids (1, T), loss_mask (1, T), doc_start (1, T) int32. Attention stays
    inside a document because doc_start says where each token's document begins. Of no examples at all: two tokens that
    nobody trains, since every rank must run as many forwards as the others.
    """
    examples = examples or [Example([0, 0], [False, False])]
    lengths = np.array([len(e.ids) for e in examples])
    mask = np.concatenate([np.asarray(e.mask, dtype=bool) for e in examples])
    mask[lengths.cumsum() - lengths] = False  # a document's first token has no context: nothing predicts it
    ids = np.concatenate([np.asarray(e.ids, dtype=np.int64) for e in examples])
    start = np.repeat(lengths.cumsum() - lengths, lengths).astype(np.int32)
    return tuple(torch.from_numpy(x[None]).to(device, non_blocking=True) for x in (ids, mask, start))


def document_sums(token_logps, examples):
    """token_logps (1, T - 1) of pack_batch(examples) -> (documents,): each one's sum. Differentiable; no atomics."""
    if not examples:
        return token_logps.sum(1)[:0]
    lengths = torch.tensor([len(e.ids) for e in examples], device=token_logps.device)
    return torch.segment_reduce(F.pad(token_logps[0], (1, 0)), "sum", lengths=lengths)  # entry t now belongs to token t


def split_batch(lengths, batch, ranks, max_tokens, max_rows=0):
    """
    The rows of one optimizer step -> for each rank the same number of micro-batches, lists of row numbers. None has more
    than max_tokens tokens (unless it is one row) or, if given, max_rows rows; as few as possible, and evenly full: the
    longest rows are dealt first, each to the emptiest. Some are empty if there are fewer rows than micro-batches.
    """
    longest_first = sorted(range(len(batch)), key=lambda n: (-lengths[batch[n]], n))
    need = max(-(-sum(lengths[i] for i in batch) // max_tokens), -(-len(batch) // max_rows) if max_rows else 1)
    for each in range(min(-(-need // ranks), len(batch)), len(batch) + 1):
        count = ranks * each
        heap, found = [(0, n) for n in range(count)], [[] for _ in range(count)]
        for n in longest_first:
            tokens, where = heapq.heappop(heap)
            found[where].append(n)
            if not max_rows or len(found[where]) < max_rows:
                heapq.heappush(heap, (tokens + lengths[batch[n]], where))
        if all(len(f) < 2 or sum(lengths[batch[n]] for n in f) <= max_tokens for f in found):
            break
    return [[[batch[n] for n in sorted(f)] for f in found[rank::ranks]] for rank in range(ranks)]


def token_order(lengths, batch_tokens, max_steps, seed):
    """batch_order with a budget of tokens in place of a number of rows: each batch has at most that many, or one row."""
    rng, waiting = random.Random(seed), []
    for _ in range(max_steps):
        batch, tokens = [], 0
        while True:
            if not waiting:
                waiting = rng.sample(range(len(lengths)), len(lengths))
            tokens += lengths[waiting[-1]]
            if batch and (tokens > batch_tokens or waiting[-1] in batch):
                break
            batch.append(waiting.pop())
        yield batch


def batch_order(lengths, batch_size, max_steps, seed, window=16):
    """
    Yields `max_steps` lists of `batch_size` row numbers. Every epoch is a fresh permutation and no row is dropped at an
    epoch's end: at any step no row was seen more than once more than another. Rows of a window of batches are sorted by
    length before they are cut, so that a batch holds little padding. A pure function of its arguments.
    """
    rng, rest, batches = random.Random(seed), [], []
    for _ in range(max_steps):
        while not batches:
            epoch = list(range(len(lengths)))
            rng.shuffle(epoch)
            rows = rest + sorted(epoch, key=set(rest).__contains__)  # the batch over the seam holds no row twice
            begin, end = 0, batch_size if rest else batch_size * window  # and stands alone: epochs do not mix
            whole = len(rows) // batch_size * batch_size
            while begin < whole:
                part = sorted(rows[begin:min(end, whole)], key=lambda i: lengths[i])
                cut = [part[i:i + batch_size] for i in range(0, len(part), batch_size)]
                rng.shuffle(cut)
                batches += cut
                begin, end = end, end + batch_size * window
            rest = rows[whole:]
        yield batches.pop(0)
