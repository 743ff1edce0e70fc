"""
Sampling: batched, with a KV cache, and the same samples whatever the batch; or, without --prompts, a chat in the terminal.

Prompts of similar length share a batch; the K samples of a prompt share its prefill; rows that have ended leave the
batch. Each token is drawn by inverse transform from one uniform number that depends only on (seed, prompt, sample,
position), so neither batch size nor order nor the number of ranks changes what is drawn.

python generate.py --model out/mini/final                                   # a chat; any checkpoint with a chat template
python generate.py --model out/mini/final --prompts out/mini/data/test.jsonl --out out/my-completions.jsonl
python generate.py --model out/mini/final --prompts out/mini/data/test.jsonl --out k.jsonl --samples 8 --temperature 0.8
"""

import contextlib
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import common
from asking import complete_file
from chat import Chat
from common import die, init_distributed, parse_config, print0
from data import read_rows, write_rows
from model import KVCache, load
from sharding import unsharded


@dataclass
class Config:
    model: str = "out/mini/final"  # checkpoint folder, or http(s)://host:port/v1#model (asking.py)
    prompts: str | None = None  # file of rows with id, language, prompt; without it: a chat in the terminal
    languages: list[str] = field(default_factory=list)  # answer only prompts in these languages (default: all)
    out: str = "out/mini/completions.jsonl"  # one row a completion: id, language, prompt, completion, teacher, sample
    max_new_tokens: int = 256  # longest completion, in tokens
    temperature: float = 0.0  # 0: the most likely token each time (greedy)
    top_p: float = 1.0  # keep the most likely tokens that hold this much probability
    samples: int = 1  # completions per prompt
    seed: int = 0  # of the draws
    batch_size: int = 256  # rows in flight
    threads: int = 16  # endpoint: requests at once
    timeout: float = 600.0  # endpoint: seconds for a response
    retries: int = 6  # endpoint: further tries of a request that failed, after longer and longer waits


def uniforms(seed, prompts, samples, position):
    """
    One uniform number in [0, 1) for each (prompt, sample) at this position, by hashing the four numbers (splitmix64,
    Steele et al. 2014): prompts, samples (n,) int arrays -> (n,) float64.
    """
    with np.errstate(over="ignore"):
        z, seeds = np.uint64(0), np.full(len(prompts), seed & 0xFFFFFFFFFFFFFFFF, dtype=np.uint64)
        for part in (seeds, np.asarray(prompts), np.asarray(samples), np.full(len(prompts), position)):
            z = (z ^ part.astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) * 2.0 ** -53


def draw(logits, temperature, top_p, u):
    """logits (n, V), u (n,) uniform -> (n,) ids: greedy at temperature 0, else softmax(logits / T) cut to top_p."""
    if temperature == 0:
        return logits.argmax(-1)
    probs = (logits.float() / temperature).softmax(-1)
    if top_p < 1:  # nucleus (Holtzman et al. 2020): the smallest set of likeliest tokens that holds top_p
        ranked, order = probs.sort(dim=-1, descending=True, stable=True)
        ranked = torch.where(ranked.cumsum(-1) - ranked < top_p, ranked, 0.0)
        probs = torch.zeros_like(probs).scatter_(1, order, ranked)
    total = probs.double().cumsum(-1)
    target = u.to(total.device)[:, None] * total[:, -1:]
    return torch.searchsorted(total, target, right=True).squeeze(1).clamp(max=probs.shape[1] - 1)


@torch.no_grad()
def generate(model, prompts, max_new_tokens, temperature=0.0, top_p=1.0, samples=1, stop_ids=(), seed=0,
             prompt_keys=None, batch_size=256, vocab_size=None):
    """
    prompts: list of lists of token ids -> for each prompt a list of `samples` lists of new ids (a stop id ends a
    completion and is part of it). `prompt_keys`: a number per prompt that names it in the draws (default: its place);
    `vocab_size`: ids from here on are never drawn (embeddings are often padded past the tokenizer).
    """
    if temperature < 0 or not 0 < top_p <= 1 or samples < 1 or max_new_tokens < 1:
        die("sampling needs temperature >= 0, 0 < top_p <= 1, samples >= 1 and max_new_tokens >= 1; got "
            f"{temperature}, {top_p}, {samples} and {max_new_tokens}")
    device = next(model.parameters()).device
    keys = np.asarray(range(len(prompts)) if prompt_keys is None else prompt_keys)
    out = [[[] for _ in range(samples)] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    per_batch = max(1, batch_size // samples)
    stops = torch.tensor(sorted(stop_ids), device=device)
    for begin in common.progress(range(0, len(order), per_batch), "sampling"):
        chunk = order[begin:begin + per_batch]
        T = len(prompts[chunk[-1]])
        ids = torch.zeros((len(chunk), T), dtype=torch.int64)
        doc_start = torch.zeros((len(chunk), T + max_new_tokens), dtype=torch.int32)
        for r, i in enumerate(chunk):  # left padding: every row's last prompt token is in the last column
            pad = T - len(prompts[i])
            ids[r, pad:], doc_start[r, pad:] = torch.tensor(prompts[i]), pad
        ragged = bool(doc_start.any())
        ids, doc_start = ids.to(device), doc_start.to(device)
        cache = KVCache(model.cfg, len(chunk), T + max_new_tokens, next(model.parameters()).dtype, device)
        logits = model.logits(model.hidden(ids, doc_start=doc_start if ragged else None, cache=cache)[:, -1])
        # K samples of a prompt continue from one prefill
        rows = torch.arange(len(chunk), device=device).repeat_interleave(samples)
        logits, doc_start = logits[rows], doc_start[rows]
        cache.take(rows)
        place = [(i, k) for i in chunk for k in range(samples)]  # which completion each row belongs to
        live = torch.ones(len(place), dtype=torch.bool, device=device)  # rows that have not ended
        for position in range(max_new_tokens):
            if vocab_size is not None and vocab_size < logits.shape[1]:
                logits = logits[:, :vocab_size]
            u = None
            if temperature > 0:
                u = torch.from_numpy(uniforms(seed, [keys[i] for i, _ in place], [k for _, k in place], position))
            token = draw(logits, temperature, top_p, u)
            for (i, k), t in zip(place, token.tolist()):
                out[i][k].append(t)
            live &= ~torch.isin(token, stops)
            if position == max_new_tokens - 1 or not live.any():
                break
            if live.sum() < 0.75 * len(place):  # finished rows leave; not at every step: moving the cache costs a copy
                keep = live.nonzero().squeeze(1)
                place, token = [place[r] for r in keep.tolist()], token[keep]
                doc_start, live = doc_start[keep], live[keep]
                cache.take(keep)
            hidden = model.hidden(token[:, None], doc_start=doc_start if ragged else None, cache=cache)
            logits = model.logits(hidden[:, -1])
    return [[cut(c, stop_ids) for c in row] for row in out]


def cut(ids, stop_ids):
    """Ids up to and with the first stop id: a row that had ended may have stayed in the batch for a few steps."""
    return next((ids[:n + 1] for n, t in enumerate(ids) if t in stop_ids), ids)


def complete(model, chat, rows, max_new_tokens, temperature=0.0, top_p=1.0, samples=1, seed=0, batch_size=256,
             teacher="", first=0):
    """
    Rows with id, language, prompt -> completion rows (`samples` for each prompt, in order), split over the ranks. `first`:
    the place of rows[0] among all prompts, when they are sampled part by part: it names the prompt in the draws.
    """
    place = range(common.rank(), len(rows), common.world())
    with unsharded(model):
        made = generate(model, [chat.prompt_ids(rows[i]["prompt"]) for i in place], max_new_tokens, temperature, top_p,
                        samples, chat.stop_ids, seed, [first + i for i in place], batch_size, chat.vocab_size)
    done = [(i, k, chat.decode(ids), ids[-1] in chat.stop_ids) for i, completions in zip(place, made)
            for k, ids in enumerate(completions)]
    return [{"id": rows[i]["id"], "language": rows[i]["language"], "prompt": rows[i]["prompt"], "completion": text,
             "teacher": teacher, "sample": k, "ended": ended} for i, k, text, ended in sorted(common.gather_list(done))]


# ---------------------------------------------------------------------------------------------------------------------
# a chat in the terminal

@torch.no_grad()
def stream(model, prompt, max_new_tokens, temperature=0.0, top_p=1.0, stop_ids=(), seed=0, vocab_size=None):
    """What generate() returns for one prompt, a list of token ids, but each new id is yielded as it is drawn."""
    weight = next(model.parameters())
    cache = KVCache(model.cfg, 1, len(prompt) + max_new_tokens, weight.dtype, weight.device)
    ids = torch.tensor([prompt], device=weight.device)
    for position in range(max_new_tokens):
        logits = model.logits(model.hidden(ids, cache=cache)[:, -1])[:, :vocab_size]
        token = draw(logits, temperature, top_p, torch.from_numpy(uniforms(seed, [0], [0], position)))
        yield token.item()
        if token.item() in stop_ids:
            return
        ids = token[:, None]


def pieces(chat, ids):
    """Ids one by one -> their text piece by piece. A character of several tokens is held back until it is whole."""
    seen, shown = [], ""
    for i in ids:
        seen.append(i)
        text = chat.decode(seen)
        if not text.endswith("\ufffd"):
            yield text[len(shown):]
            shown = text
    yield chat.decode(seen)[len(shown):]


def answer(model, chat, messages, cfg, number):
    """Prints the answer to a conversation as it is made -> its text, or None if the template refuses the messages."""
    try:
        prompt = chat.prompt_ids(messages)
    except SystemExit as e:  # a template may know no system turn; the conversation before it goes on
        return print(e)
    if len(prompt) + cfg.max_new_tokens > model.cfg.max_position_embeddings:
        print(f"({len(prompt)} tokens so far; this model was made for {model.cfg.max_position_embeddings}: /reset)")
    said, ids = "", []
    tokens = stream(model, prompt, cfg.max_new_tokens, cfg.temperature, cfg.top_p, chat.stop_ids, cfg.seed + number,
                    chat.vocab_size)
    try:
        for piece in pieces(chat, (ids.append(i) or i for i in tokens)):
            print(piece, end="", flush=True)
            said += piece
        print("" if ids[-1] in chat.stop_ids else f"\n(cut off at {cfg.max_new_tokens} tokens: --max_new_tokens)")
    except KeyboardInterrupt:
        print("\n(stopped)")
    return said


def talk(model, chat, cfg):
    """Reads lines, streams answers, remembers both. Text goes out as the model wrote it: direction is the terminal's."""
    with contextlib.suppress(ImportError):  # not on Windows
        import readline  # noqa: F401  line editing and history in input()
    for file in (sys.stdin, sys.stdout):
        file.reconfigure(encoding="utf-8", errors="replace")
    help_text = "/system TEXT sets the system prompt, /reset forgets the conversation, Ctrl-C stops an answer, Ctrl-D ends"
    print(f"{cfg.model}: {help_text}")
    system, turns = [], []
    while True:
        try:
            text = input("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            return print()
        command, _, rest = text.partition(" ")
        if command == "/reset":
            turns = []
            print("(forgotten; the system prompt stays)" if system else "(forgotten)")
        elif command == "/system":
            system, turns = [{"role": "system", "content": rest}] if rest.strip() else [], []
            print("(a new conversation, with this system prompt)" if system else "(a new conversation, without one)")
        elif command.startswith("/"):
            print(help_text)
        elif text:
            asked = [*turns, {"role": "user", "content": text}]
            said = answer(model, chat, system + asked, cfg, len(turns))
            if said:  # an empty answer is not a turn that a template would accept again
                turns = [*asked, {"role": "assistant", "content": said}]


def main(cfg):
    if "://" in cfg.model:
        return complete_file(cfg)
    device = init_distributed()
    if cfg.prompts is None:
        if common.world() > 1:
            die("a chat runs in one process; give --prompts to sample on several ranks")
        return talk(load(cfg.model, device=device), Chat(cfg.model), cfg)
    rows = [r for r in read_rows(cfg.prompts, "prompts") if not cfg.languages or r["language"] in cfg.languages]
    if not rows:
        die(f"{cfg.prompts} holds no prompt in {' '.join(cfg.languages)}")
    model, chat = load(cfg.model, device=device), Chat(cfg.model)
    done = complete(model, chat, rows, cfg.max_new_tokens, cfg.temperature, cfg.top_p, cfg.samples, cfg.seed,
                    cfg.batch_size, Path(cfg.model).name)
    cut_off = sum(not row["ended"] for row in done)
    if common.is_main():
        write_rows(cfg.out, done)
    print0(f"{len(done)} completions of {len(rows)} prompts -> {cfg.out}"
           + (f" ({cut_off} cut off at {cfg.max_new_tokens} tokens)" if cut_off else ""))


if __name__ == "__main__":
    main(parse_config(Config))
