"""Keys and values of what a model has read and said: sampling computes each token's once (model.py, sampler.py)."""

import torch


def sizes_of(cfg, capacity):
    """Tokens that a slot of this capacity holds in each layer: a sliding one keeps no more than its window."""
    return [min(capacity, cfg.window(layer) or capacity) for layer in range(cfg.num_hidden_layers)]


def slot_bytes(cfg, capacity, dtype):
    """Memory of one slot, in bytes."""
    return 2 * dtype.itemsize * cfg.num_key_value_heads * cfg.head_dim * sum(sizes_of(cfg, capacity))


class KVCache:
    """
    Keys and values of `slots` sequences in every layer, preallocated: (slots, Hkv, size, D) each, so that what a query
    reads is in one piece. size is `capacity` tokens, in a sliding layer no more than its window, as a ring: position p
    lies at p % size, and old tokens are overwritten as they go out of sight. `length` (slots,) int32: tokens so far.

    Two ways in, chosen by what the next pass through the model is: begin_fill() for whole packed prompts, begin_step() for
    one token in each of the first slots. Token ids, positions and slots are tensors: a CUDA graph can replay a step.
    """

    def __init__(self, cfg, slots, capacity, dtype, device):
        self.sizes = sizes_of(cfg, capacity)
        self.k, self.v = ([torch.zeros(slots, cfg.num_key_value_heads, size, cfg.head_dim, dtype=dtype, device=device)
                           for size in self.sizes] for _ in range(2))
        if self.k[0].device.type == "cpu":  # of keys a CPU multiplies faster what lies in memory as (Hkv, D, size)
            self.k = [k.view(slots, -1, cfg.head_dim, k.shape[2]).transpose(2, 3) for k in self.k]
        self.length, self.slots, self.capacity = torch.zeros(slots, dtype=torch.int32, device=device), slots, capacity

    def begin_fill(self, lengths, slots):
        """
        The next pass is over prompts of these lengths, one behind the other in one row; slots: of each prompt a list, all
        of which get its keys and values.
        """
        where, at, source, begin = [], [], [], 0
        for n, own in zip(lengths, slots):
            for slot in own:
                where.append(torch.full((n,), slot))
                at.append(torch.arange(n))
                source.append(torch.arange(begin, begin + n))
            begin += n
        left = torch.cat([torch.arange(n, 0, -1) for n, own in zip(lengths, slots) for _ in own])  # tokens up to the end
        where, at, source = (torch.cat(parts) for parts in (where, at, source))
        self.decoding, self.plan, device = False, {}, self.length.device
        for size in set(self.sizes):
            kept = left <= size  # the rest is out of sight already
            self.plan[size] = [x[kept].to(device) for x in (where, at % size, source)]
        ends = torch.tensor([(slot, n) for n, own in zip(lengths, slots) for slot in own], device=device)
        self.length[ends[:, 0]] = ends[:, 1].int()

    def fill(self, layer, k, v):
        """Stores k, v (1, T, Hkv, D) of the packed row -> what attention reads: the same."""
        where, at, source = self.plan[self.sizes[layer]]
        self.k[layer][where, :, at], self.v[layer][where, :, at] = k[0, source], v[0, source]
        return k, v

    def begin_step(self, n, longest=None):
        """
        The next pass is over one token in each of the slots 0 .. n - 1, of which none then has more than `longest` tokens
        (None: as many as there is room for).
        """
        self.decoding, self.n, self.longest = True, n, longest or self.capacity
        self.rows, length = torch.arange(n, device=self.length.device), self.length[:n]
        self.step = {size: (length % size, (length + 1).clamp(max=size)) for size in set(self.sizes)}

    def append(self, layer, k, v):
        """Stores k, v (n, 1, Hkv, D) -> what decode() reads: keys and values (n, tokens, Hkv, D), and how many are filled."""
        at, seen = self.step[self.sizes[layer]]
        end, out = min(self.longest, self.sizes[layer]), []
        for kept, new in ((self.k[layer], k), (self.v[layer], v)):
            kept[self.rows, :, at] = new[:, 0]
            out.append(kept[:self.n, :, :end].transpose(1, 2))
        return *out, seen
