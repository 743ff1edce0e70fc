"""
Rows in, batches out: the 23 languages, JSONL rows and their checks, mixtures, loss masks, padding and packing.

A row of data is one JSON object a line (the table is in README.md). Everything that can be wrong with a line is said
with its file and line number. Order is a pure function of (seed, step), so a run can be repeated or continued exactly.
"""

import json
import random
from dataclasses import dataclass

import torch

from common import atomic_file, die, print0

# ---------------------------------------------------------------------------------------------------------------------
# languages: Aya Expanse's 23, Chinese in both scripts. code -> (English name, family)

LANGUAGES = {
    "ar": ("Arabic", "Semitic"), "cs": ("Czech", "Slavic"), "de": ("German", "Germanic"), "el": ("Greek", "Hellenic"),
    "en": ("English", "Germanic"), "es": ("Spanish", "Romance"), "fa": ("Persian", "Iranian"),
    "fr": ("French", "Romance"), "he": ("Hebrew", "Semitic"), "hi": ("Hindi", "Indo-Aryan"),
    "id": ("Indonesian", "Austronesian"), "it": ("Italian", "Romance"), "ja": ("Japanese", "Japonic"),
    "ko": ("Korean", "Koreanic"), "nl": ("Dutch", "Germanic"), "pl": ("Polish", "Slavic"),
    "pt": ("Portuguese", "Romance"), "ro": ("Romanian", "Romance"), "ru": ("Russian", "Slavic"),
    "tr": ("Turkish", "Turkic"), "uk": ("Ukrainian", "Slavic"), "vi": ("Vietnamese", "Austroasiatic"),
    "zh": ("Chinese (simplified)", "Sinitic"), "zh-Hant": ("Chinese (traditional)", "Sinitic")}

# One teacher is trained per cluster of related languages; every cluster shares English, Spanish and French, as in Aya
# Expanse. The paper's exact clusters are not published: these keep families and scripts together and are ours.
SHARED = ["en", "es", "fr"]
CLUSTERS = {"western": ["de", "nl", "it", "pt", "ro"] + SHARED, "eastern": ["cs", "pl", "ru", "uk", "el"] + SHARED,
            "mideast": ["ar", "he", "fa", "tr", "hi"] + SHARED,
            "asian": ["zh", "zh-Hant", "ja", "ko", "vi", "id"] + SHARED}

# ---------------------------------------------------------------------------------------------------------------------
# rows

ROLES = ("system", "user", "assistant")
FIELDS = {"prompts": ("id", "language", "prompt"), "sft": ("language", "prompt", "completion"),
          "preferences": ("language", "prompt", "chosen", "rejected"),
          "completions": ("id", "language", "prompt", "completion")}


def check_row(row, kind, where):
    """Refuses a row with a missing, empty or ill-typed field or an unknown language; `where` is file:line."""
    if not isinstance(row, dict):
        die(f"{where}: a row is one JSON object, got {type(row).__name__}")
    if row.get("language") not in tuple(LANGUAGES):  # a tuple: what cannot be hashed is refused as well
        die(f"{where}: unknown language {row.get('language')!r}; known: {' '.join(LANGUAGES)}")
    fields = FIELDS[kind]
    if kind == "sft" and "messages" in row:
        fields = ("language", "messages")
    elif kind == "sft" and "text" in row:
        fields = ("language", "text")
    for name in fields:
        value = row.get(name)
        if value is None:
            die(f"{where}: the row has no {name!r}; {kind} rows have {', '.join(fields)}")
        if name == "messages" or (name == "prompt" and isinstance(value, list)):
            good = isinstance(value, list) and value and all(
                isinstance(m, dict) and m.get("role") in ROLES and isinstance(m.get("content"), str)
                and (m["content"].strip() or m["role"] == "system") for m in value)
            if not good or (name == "messages" and value[-1]["role"] != "assistant"):
                die(f"{where}: {name!r} must be a list of messages with a role (system, user, assistant) and a content "
                    "that is not empty" + (", the last one the assistant's" if name == "messages" else ""))
        elif not isinstance(value, str):
            die(f"{where}: {name!r} must be a string, got {type(value).__name__}")
        elif not value.strip() and not (kind == "completions" and name == "completion"):  # a model may say nothing
            die(f"{where}: {name!r} is empty; remove the row")
    if kind == "preferences" and row["chosen"].strip() == row["rejected"].strip():
        die(f"{where}: chosen and rejected are the same text; remove the row")


def read_jsonl(path):
    """Yields (row, "file:line") for every line of a UTF-8 JSONL file; blank lines are errors, as any other non-JSON."""
    try:
        with open(path, "rb") as f:
            for number, line in enumerate(f, 1):
                try:
                    row = json.loads(line.decode("utf-8"))
                    if b"\\ud" in line.lower():
                        json.dumps(row, ensure_ascii=False).encode("utf-8")
                except json.JSONDecodeError as e:
                    die(f"{path}:{number} is not JSON ({e.msg}); each line must be one JSON object")
                except UnicodeDecodeError as e:
                    die(f"{path}:{number} is not UTF-8 (byte {e.start} of the line): "
                        "convert it, e.g. with iconv -t utf-8")
                except UnicodeEncodeError:
                    die(f"{path}:{number} holds half of a character (a \\ud... escape without its other half); "
                        "mend the row")
                yield row, f"{path}:{number}"
    except FileNotFoundError:
        die(f"{path} not found")
    except OSError as e:
        die(f"{path} cannot be read: {e.strerror}")


def read_rows(path, kind):
    """All rows of a file, each checked. kind: prompts, sft, preferences or completions."""
    rows = []
    for row, where in read_jsonl(path):
        check_row(row, kind, where)
        rows.append(row)
    if not rows:
        die(f"{path} holds no rows")
    return rows


def write_rows(path, rows):
    """One JSON object a line, UTF-8, written beside and renamed. Returns how many rows."""
    with atomic_file(path) as f:
        for row in rows:
            f.write(json.dumps(row, ensure_ascii=False) + "\n")
    return len(rows)


def read_mixture(specs, kind, seed):
    """
    Files with optional weights, `a.jsonl:0.85 b.jsonl:0.15`: shares of the mixture. The first file is taken whole and
    the others are repeated or thinned (by seed) to reach their share. Without weights: all rows of all files.
    """
    parts = []
    for spec in specs:
        path, colon, weight = spec.rpartition(":")
        try:
            path, weight = (path, float(weight)) if colon else (spec, None)
        except ValueError:
            path, weight = spec, None  # a colon that belongs to the path
        if weight is not None and weight <= 0:
            die(f"{spec}: a weight must be above 0")
        parts.append((read_rows(path, kind), weight))
    if all(w is None for _, w in parts):
        return [row for rows, _ in parts for row in rows]
    if any(w is None for _, w in parts):
        die("give every file a weight, or none of them")
    rng, out = random.Random(seed), list(parts[0][0])
    for rows, weight in parts[1:]:
        wanted = round(len(parts[0][0]) * weight / parts[0][1])
        whole, rest = divmod(wanted, len(rows))
        out += rows * whole + rng.sample(rows, rest)
    return out


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


def encode_pairs(chat, rows, max_tokens):
    """
    Preference rows -> [(chosen, rejected) examples] and the length of each pair's longer side. A pair with a side over
    max_tokens is dropped; how many were, per language, is printed.
    """
    pairs = [(encode_row(chat, r["prompt"], r["chosen"]), encode_row(chat, r["prompt"], r["rejected"])) for r in rows]
    longer = [max(pair, key=lambda e: len(e.ids)) for pair in pairs]
    kept, dropped = drop_long(longer, max_tokens, [r["language"] for r in rows])
    if dropped:
        print0(f"dropped {sum(dropped.values())} pairs longer than {max_tokens} tokens: {dropped}")
    return [pairs[i] for i in kept], [len(longer[i].ids) for i in kept]


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
    The same examples end to end in one row, without padding: ids (1, T), loss_mask (1, T), doc_start (1, T) int32.
    Attention stays inside a document because doc_start says where each token's document begins.
    """
    ids, mask, start = [], [], []
    for e in examples:
        start += [len(ids)] * len(e.ids)
        ids += e.ids
        mask += e.mask
    return (torch.tensor([ids], device=device), torch.tensor([mask], device=device),
            torch.tensor([start], dtype=torch.int32, device=device))


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
