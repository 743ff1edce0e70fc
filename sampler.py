"""
The engine of sampling: slots with a KV cache, filled with packed prompts, advanced together one token at a time.

A slot that is done is free for the next prompt at once, so one long answer does not hold up the others (continuous
batching; Yu et al. 2022, "Orca", OSDI). generate.py decides what waits and what is done; here is what runs on the device.

Every token is drawn by inverse transform from one uniform number, a hash of (seed, prompt, sample, how many tokens were
drawn before), so batch, order, slots and ranks do not change it.
"""

import itertools

import torch

from cache import KVCache
from kernels import sample

# splitmix64 (Steele et al. 2014) in int64: the same bits as in uint64, and its constants as int64 says them
GOLDEN, MIX1, MIX2 = 0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)  # sizes of a step that get a CUDA graph


def uniforms(seed, prompts, samples, position):
    """
    One uniform number in [0, 1) for each (prompt, sample) at this position: a hash of the four numbers. prompts, samples
    (n,), position (n,) or a number: int64; seed: below 2**64 -> (n,) float64.
    """
    prompts, samples = torch.as_tensor(prompts), torch.as_tensor(samples)
    shifted = lambda z, n: (z >> n) & ((1 << (64 - n)) - 1)  # without the sign
    z = torch.zeros_like(prompts)
    for part in (seed - 2**64 if seed >= 2**63 else seed, prompts, samples, position):
        z = (z ^ part) + GOLDEN
        z = (z ^ shifted(z, 30)) * MIX1
        z = (z ^ shifted(z, 27)) * MIX2
        z = z ^ shifted(z, 31)
    return shifted(z, 11).double() * 2.0 ** -53


class Sampler:
    """
    `slots` sequences of up to `capacity` tokens under one model, seed and set of settings. Slots 0 .. used - 1 take part
    in a step, free ones among them for nothing. add() and step() return (slots, ids, log-probs) as lists.
    """

    def __init__(self, model, slots, capacity, temperature=0.0, top_p=1.0, min_p=0.0, seed=0, vocab_size=None):
        weight = next(model.parameters())
        self.model, self.device = model, weight.device
        self.cache = KVCache(model.cfg, slots, capacity, weight.dtype, weight.device)
        self.settings = min(vocab_size or model.cfg.vocab_size, model.cfg.vocab_size), temperature, top_p, min_p
        self.seed, self.graphs, self.pool = seed, {}, None
        self.lengths, self.used = [0] * slots, 0  # of every slot, 0: free; as the device's cache.length
        ints = lambda: torch.zeros(slots, dtype=torch.int64, device=self.device)
        # of every slot: newest id, what names it in the draws, tokens drawn, and 1 if it is in use
        self.token, self.prompt, self.number, self.drawn, self.alive = (ints() for _ in range(5))
        self.logp = torch.zeros(slots, device=self.device)

    @property
    def free(self):
        return [slot for slot, n in enumerate(self.lengths) if not n]

    def draw(self, hidden, prompt, number, drawn):
        """hidden (n, C) of the last tokens -> ids and log-probs (n,)."""
        u = uniforms(self.seed, prompt, number, drawn) if self.settings[1] > 0 else None
        return sample(self.model.logits(hidden, exact=True), u, *self.settings)

    @torch.no_grad()
    def add(self, prompts):
        """
        prompts: [(ids, key, sample numbers)]: each is read once, in one packed row with the others, takes a free slot for
        every sample, and its samples' first tokens are drawn.
        """
        free, slots, lengths = iter(self.free), [], [len(ids) for ids, _, _ in prompts]
        for _, _, numbers in prompts:
            slots.append([next(free) for _ in numbers])
        on_device = lambda x: torch.tensor(x, device=self.device)
        starts = [0, *itertools.accumulate(lengths[:-1])]
        doc_start = torch.tensor(starts, dtype=torch.int32).repeat_interleave(torch.tensor(lengths))[None].to(self.device)
        self.cache.begin_fill(lengths, slots)
        hidden = self.model.hidden(on_device([[t for ids, _, _ in prompts for t in ids]]),
                                   doc_start=doc_start if len(prompts) > 1 else None, cache=self.cache)[0]
        last = on_device([start + n - 1 for start, n, own in zip(starts, lengths, slots) for _ in own])
        where = on_device([slot for own in slots for slot in own])
        prompt = on_device([key for _, key, numbers in prompts for _ in numbers])
        number = on_device([number for _, _, numbers in prompts for number in numbers])
        token, logp = self.draw(hidden[last], prompt, number, torch.zeros_like(prompt))
        for kept, new in ((self.token, token), (self.prompt, prompt), (self.number, number), (self.drawn, 1), (self.alive, 1)):
            kept[where] = new
        for own, n in zip(slots, lengths):
            for slot in own:
                self.lengths[slot] = n
        self.used = max(slot for slot, n in enumerate(self.lengths) if n) + 1
        return where.tolist(), token.tolist(), logp.tolist()

    def advance(self, n, longest=None):
        """One token more in the slots 0 .. n - 1, on the device alone: what a CUDA graph replays."""
        self.cache.begin_step(n, longest)
        hidden = self.model.hidden(self.token[:n, None], cache=self.cache)[:, 0]
        token, logp = self.draw(hidden, self.prompt[:n], self.number[:n], self.drawn[:n])
        self.token[:n], self.logp[:n] = token, logp
        self.drawn[:n] += self.alive[:n]
        self.cache.length[:n] += self.alive[:n].int()

    @torch.no_grad()
    def step(self):
        """The next token of every slot in use."""
        live = [slot for slot in range(self.used) if self.lengths[slot]]
        if self.device.type == "cuda":
            self.replay(min(n for n in (*BUCKETS, self.cache.slots) if self.used <= n <= self.cache.slots))
        else:
            self.advance(self.used, max(self.lengths) + 1)
        for slot in live:
            self.lengths[slot] += 1
        ids, logps = self.token[:self.used].tolist(), self.logp[:self.used].tolist()
        return live, [ids[slot] for slot in live], [logps[slot] for slot in live]

    def replay(self, n):
        """advance(n) as a CUDA graph, recorded once for each n: hundreds of launches cost one."""
        if n not in self.graphs:
            state = self.token, self.logp, self.drawn, self.cache.length
            before = [x.clone() for x in state]
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # kernels are compiled and workspaces allocated before the recording
                self.advance(n)
            torch.cuda.current_stream().wait_stream(side)
            for x, kept in zip(state, before):  # what it wrote to the cache, the replay writes again
                x.copy_(kept)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):  # one memory for all: what a graph leaves is in fixed tensors
                self.advance(n)
            self.graphs[n] = graph
            self.pool = graph.pool()
        self.graphs[n].replay()

    def release(self, slots):
        """These slots are free again."""
        for slot in slots:
            self.lengths[slot] = 0
        where = torch.tensor(slots, dtype=torch.int64, device=self.device)
        self.alive[where], self.cache.length[where] = 0, 0
        while self.used and not self.lengths[self.used - 1]:
            self.used -= 1

    def close_up(self):
        """
        Moves the last sequences into free slots, so that a step has no row for nothing. Returns {slot: its new one}.
        """
        live = [slot for slot in range(self.used) if self.lengths[slot]]
        gaps = [slot for slot in range(len(live)) if not self.lengths[slot]]
        moves = dict(zip(live[len(live) - len(gaps):], gaps))
        if moves:
            sources, targets = (torch.tensor(list(x), device=self.device) for x in (moves, moves.values()))
            longest = max(self.lengths)
            for x in (*self.cache.k, *self.cache.v):  # what no sequence fills yet is not worth a copy
                x[targets, :, :longest] = x[sources, :, :longest]
            for x in (self.cache.length, self.token, self.prompt, self.number, self.drawn, self.alive):
                x[targets] = x[sources]
            for slot, gap in moves.items():
                self.lengths[gap] = self.lengths[slot]
            self.release(list(moves))
        return moves
