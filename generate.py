"""
Sampling: many prompts, K samples each, and the same samples whatever the batch; or, without --prompts, a chat in the
terminal.

--batch_size sequences are in flight. The K samples of a prompt share its prefill; as sequences end, waiting prompts take
their places (sampler.py). Each token is drawn from one uniform number that depends only on (seed, prompt, sample,
position), so neither batch size nor order nor the number of ranks changes what is drawn.

python generate.py --model out/mini/final                                   # a chat; any checkpoint with a chat template
python generate.py --model out/mini/final --prompts out/mini/data/test.jsonl --out out/my-completions.jsonl
python generate.py --model out/mini/final --prompts out/mini/data/test.jsonl --out k.jsonl --samples 8 --temperature 0.8
"""

import contextlib
import hashlib
import math
import sys
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import torch

import common
from asking import check_sampling, complete_file
from cache import slot_bytes
from chat import Chat
from common import die, init_distributed, parse_config, print0
from data import read_rows, write_rows
from endpoint import is_endpoint
from model import load
from sampler import Sampler
from sharding import unsharded

REFILL = 16  # free places are filled when they are this share of all: 1/16
PREFILL = 8192  # tokens of prompts that are read in one pass


@dataclass
class Config:
    model: str = "out/mini/final"  # checkpoint folder, or http(s)://host:port/v1#model (asking.py)
    prompts: str | None = None  # file of rows with id, language, prompt; without it: a chat in the terminal
    languages: list[str] = field(default_factory=list)  # answer only prompts in these languages (default: all)
    out: str = "out/mini/completions.jsonl"  # one row a completion: id, language, prompt, completion, teacher, sample
    max_new_tokens: int = 256  # longest completion, in tokens
    temperature: float = 0.0  # 0: the most likely token each time (greedy)
    top_p: float = 1.0  # keep the most likely tokens that hold this much probability
    min_p: float = 0.0  # drop tokens less likely than this share of the likeliest one's probability
    stop: list[str] = field(default_factory=list)  # strings that end a completion, which ends before them
    samples: int = 1  # completions per prompt
    seed: int = 0  # of the draws
    batch_size: int = 256  # rows in flight
    threads: int = 16  # endpoint: requests at once
    timeout: float = 600.0  # endpoint: seconds for a response
    retries: int = 6  # endpoint: further tries of a request that failed, after longer and longer waits


class Stop:
    """
    When a completion has ended: an id of `stop_ids`, which is then its last one, or a string of `strings` in its text, as
    `decode` (ids -> text) has it. Only the newest ids are decoded: each gives a byte or more, or is a control token, of
    which more than eight inside a stop string delay the stop, not the cut.
    """

    def __init__(self, stop_ids=(), strings=(), decode=None):
        self.ids, self.strings, self.decode = frozenset(stop_ids), [s for s in strings if s], decode
        self.tail = max((len(s.encode("utf-8")) for s in self.strings), default=0) + 8

    def __call__(self, ids):
        if ids[-1] in self.ids:
            return True
        return bool(self.strings) and any(s in self.decode(ids[-self.tail:]) for s in self.strings)

    def cut(self, text):
        """The text before the first stop string, and whether there was one."""
        ends = [text.index(s) for s in self.strings if s in text]
        return (text[:min(ends)], True) if ends else (text, False)


def slots_that_fit(model, wanted, capacity):
    """On a GPU, as many sequences as half of the free memory holds keys and values of: prompts need some beside."""
    weight = next(model.parameters())
    if not weight.is_cuda:
        return wanted
    return max(1, min(wanted, torch.cuda.mem_get_info()[0] // 2 // slot_bytes(model.cfg, capacity, weight.dtype)))


def sampling(model, prompts, max_new_tokens, temperature, top_p, samples, stop, seed, prompt_keys, batch_size, vocab_size,
             min_p):
    """
    Yields (prompt, sample, id, log-prob, was it the last) token by token, completions in no order: waiting prompts take the
    slots of those that have ended.
    """
    keys = range(len(prompts)) if prompt_keys is None else prompt_keys
    capacity = max(map(len, prompts)) + max_new_tokens
    slots = slots_that_fit(model, min(batch_size, samples * len(prompts)), capacity)
    engine = Sampler(model, slots, capacity, temperature, top_p, min_p, seed, vocab_size)
    # what waits: prompts in order, their samples in parts that fit; and of every slot, what it works on
    waiting = deque((i, range(first, min(first + slots, samples))) for i in range(len(prompts))
                    for first in range(0, samples, slots))
    work, made = {}, {}
    while waiting or work:
        places, jobs, tokens = slots - len(work), [], 0
        if not work or places >= max(1, slots // REFILL):  # not for every place: a pass reads all weights
            while waiting and len(waiting[0][1]) <= places and (not jobs or tokens + len(prompts[waiting[0][0]]) <= PREFILL):
                i, numbers = waiting.popleft()
                jobs.append((i, numbers))
                places, tokens = places - len(numbers), tokens + len(prompts[i])
        if jobs:
            found = engine.add([(prompts[i], keys[i], numbers) for i, numbers in jobs])
            work |= dict(zip(found[0], ((i, k) for i, numbers in jobs for k in numbers)))
        else:
            found = engine.step()
        ended = []
        for slot, token, logp in zip(*found):
            i, k = work[slot]
            if not math.isfinite(logp):
                die(f"sampling: the logits of prompt {i + 1} of {len(prompts)} are not numbers; check the checkpoint")
            ids = made.setdefault((i, k), [])
            ids.append(token)
            over = stop(ids) or len(ids) == max_new_tokens
            if over:
                ended.append(slot)
                del work[slot], made[i, k]
            yield i, k, token, logp, over
        if ended:
            engine.release(ended)
        if not waiting and len(work) < 0.75 * engine.used:  # not at every step: to move a sequence costs a copy
            moves = engine.close_up()
            work = {moves.get(slot, slot): what for slot, what in work.items()}


def generate(model, prompts, max_new_tokens, temperature=0.0, top_p=1.0, samples=1, stop_ids=(), seed=0,
             prompt_keys=None, batch_size=256, vocab_size=None, min_p=0.0, stop=None, logps=False):
    """
    prompts: list of lists of token ids -> for each prompt a list of `samples` lists of new ids (what ends a completion is
    part of it). `prompt_keys`: a number per prompt that names it in the draws (default: its place); `vocab_size`: ids from
    here on are never drawn (embeddings are often padded past the tokenizer); `stop`: a Stop, instead of `stop_ids`.
    `logps`: returns the model's log-prob of each id too, a second list of the same shape, at temperature 1 and uncut: what
    token_logps says of the completion.
    """
    check_sampling(temperature, top_p, min_p, samples, max_new_tokens, batch_size)
    if empty := next((i for i, ids in enumerate(prompts, 1) if not ids), None):
        die(f"sampling: prompt {empty} of {len(prompts)} has no token at all")
    made, scores = ([[[] for _ in range(samples)] for _ in prompts] for _ in range(2))
    if prompts:
        bar = common.progress(None, "sampling", len(prompts) * samples)
        for i, k, token, logp, last in sampling(model, prompts, max_new_tokens, temperature, top_p, samples,
                                                 stop or Stop(stop_ids), seed, prompt_keys, batch_size, vocab_size, min_p):
            made[i][k].append(token)
            scores[i][k].append(logp)
            bar.update(last)
    return (made, scores) if logps else made


def key_of(name):
    """A row's id as the number that names it in the draws: 64 bits of its SHA-256."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8")).digest()[:8], "big", signed=True)


def share(model, chat, rows, max_new_tokens, temperature=0.0, top_p=1.0, samples=1, seed=0, batch_size=256, teacher="",
          min_p=0.0, stop=()):
    """complete()'s part on this rank: [(place in `rows`, sample, completion row)]."""
    place, stop = range(common.rank(), len(rows), common.world()), Stop(chat.stop_ids, stop, chat.decode)
    with unsharded(model):
        made = generate(model, [chat.prompt_ids(rows[i]["prompt"]) for i in place], max_new_tokens, temperature, top_p,
                        samples, (), seed, [key_of(rows[i]["id"]) for i in place], batch_size, chat.vocab_size, min_p, stop)
    done = []
    for i, completions in zip(place, made):
        for k, ids in enumerate(completions):
            text, stopped = stop.cut(chat.decode(ids))
            done.append((i, k, {
                "id": rows[i]["id"], "language": rows[i]["language"], "prompt": rows[i]["prompt"], "completion": text,
                "teacher": teacher, "sample": k, "ended": ids[-1] in stop.ids or stopped, "tokens": len(ids)}))
    return done


def complete(model, chat, rows, *settings, **more):
    """
    Rows with id, language, prompt -> completion rows (`samples` for each prompt, in order), split over the ranks. What is
    drawn depends on seed, id and sample only. Settings: those of share(). `stop`: strings; a completion ends before the
    first of them. `tokens` counts what was generated, the end of turn included.
    """
    done = common.gather_list(share(model, chat, rows, *settings, **more))
    return [row for _, _, row in sorted(done, key=lambda part: part[:2])]


# ---------------------------------------------------------------------------------------------------------------------
# a chat in the terminal

def stream(model, prompt, max_new_tokens, temperature=0.0, top_p=1.0, stop_ids=(), seed=0, vocab_size=None, min_p=0.0):
    """What generate() returns for one prompt, a list of token ids, but each new id is yielded as it is drawn."""
    for _, _, token, _, _ in sampling(model, [prompt], max_new_tokens, temperature, top_p, 1, Stop(stop_ids), seed, None, 1,
                                      vocab_size, min_p):
        yield token


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
                    chat.vocab_size, cfg.min_p)
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
    if is_endpoint(cfg.model):
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
                    cfg.batch_size, Path(cfg.model).name, cfg.min_p, cfg.stop)
    cut_off = sum(not row["ended"] for row in done)
    if common.is_main():
        write_rows(cfg.out, done)
    print0(f"{len(done)} completions of {len(rows)} prompts -> {cfg.out}"
           + (f" ({cut_off} cut off at {cfg.max_new_tokens} tokens)" if cut_off else ""))


if __name__ == "__main__":
    main(parse_config(Config))
