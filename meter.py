"""
What a training step is seen to do: every row's loss and rewards, averaged over the batch and per language, and how many
floating-point operations a second the model got out of the machine.
"""

import math
import re
import statistics

import torch

from common import all_sum, die, gather_list, world

# Peak of dense bfloat16 matmuls, FLOP/s, by a part of the name that torch gives the GPU: the vendor's data sheets.
PEAK = {"H200 NVL": 835e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "GH200": 989e12,
        "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}


def peak_flops():
    """Of one GPU, or None if it is not in the table (a CPU never is)."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((flops for part, flops in PEAK.items() if re.search(rf"\b{part}\b", name)), None)


def training_flops(cfg, lengths, trained):
    """
    Forward and backward of documents of these lengths with `trained` predicted tokens in all: 6 a weight and token
    (Kaplan et al. 2020, arXiv 2001.08361), 12 a head width and visible (query, key) pair, 6 C V a predicted token. What
    activation checkpointing computes twice counts once, as model FLOPs utilisation has it (Chowdhery et al. 2022, arXiv
    2204.02311); so does a causal mask: what is not seen is not counted.
    """
    C, D, H, Hkv = cfg.hidden_size, cfg.head_dim, cfg.num_attention_heads, cfg.num_key_value_heads
    block = C * D * (2 * H + 2 * Hkv) + 3 * C * cfg.intermediate_size
    total = 6 * cfg.num_hidden_layers * block * sum(lengths) + 6 * C * cfg.vocab_size * trained
    windows = [cfg.window(layer) for layer in range(cfg.num_hidden_layers)]
    for window in set(windows):
        pairs = 0
        for n in lengths:
            w = min(n, window or n)
            pairs += w * (w + 1) // 2 + (n - w) * w
        total += windows.count(window) * 12 * H * D * pairs
    return total


class Meter:
    """
    Rows of one optimizer step and what they gave: add() once a micro-batch (it keeps tensors and waits for nothing),
    check() before the weights change, means() after.
    """

    def __init__(self):
        self.rows, self.values, self.languages = [], [], {}

    def add(self, items, **values):
        """items of this micro-batch; values: name -> (rows,) tensor, or a pair (sums, counts) whose mean is sum / count."""
        self.rows += items
        self.names = list(values)
        pairs = [v if isinstance(v, tuple) else (v, torch.ones_like(v)) for v in values.values()]
        self.values.append(torch.stack([torch.as_tensor(x).detach().double().to(pairs[0][0].device)
                                        for pair in pairs for x in pair]))

    def check(self):
        """Ends the program, on all ranks, if a row gave NaN or infinity, and names it: nothing has been updated yet."""
        self.table = torch.cat(self.values, 1).cpu()  # (2 x names, rows)
        broken = [item.where for item, fine in zip(self.rows, self.table.isfinite().all(0).tolist()) if not fine]
        count, rows = all_sum(torch.tensor([float(len(broken)), float(len(self.rows))])).tolist()
        if count:
            broken = gather_list(broken)
            if count == rows and count > 1:
                die(f"the loss of every row ({broken[0]}, ...) is not a number: nothing was updated; the steps before have "
                    "ruined the weights: lower --lr")
            broken = list(dict.fromkeys(broken))
            more = f" and {len(broken) - 8} more" if len(broken) > 8 else ""
            die(f"the loss of {', '.join(broken[:8])}{more} is not a number: nothing was updated; mend or remove the row")

    def means(self):
        """name -> mean over all rows of all ranks. The rows are then forgotten, but for their language's sums."""
        for item, column in zip(self.rows, self.table.T.tolist()):
            sums = self.languages.setdefault(item.language, [0] + [0.0] * len(column))
            self.languages[item.language] = [sums[0] + 1, *(a + b for a, b in zip(sums[1:], column))]
        total = all_sum(self.table.sum(1)).tolist()
        self.rows, self.values = [], []
        return {name: s / n if n else math.nan for name, s, n in zip(self.names, total[::2], total[1::2])}

    def sums(self):
        """language -> [rows, and of each name the sum and the count] since the last per_language(), over all ranks."""
        found = {}
        for language, sums in gather_list(sorted(self.languages.items())):
            found[language] = [a + b for a, b in zip(found.get(language, [0] * len(sums)), sums)]
        return found

    def per_language(self):
        """language -> {"n": rows, name: mean} since the last call, over all ranks."""
        found, self.languages = self.sums(), {}
        return {language: {"n": n, **{name: s / c for name, s, c in zip(self.names, sums[::2], sums[1::2]) if c}}
                for language, (n, *sums) in sorted(found.items())}


def speed(cfg, items, micro_batches, seconds, peak):
    """
    What the log says of a step over all ranks: items of the whole batch (all sides trained alike), micro_batches:
    per rank, lists of tokens. mfu: share of all GPUs' peak; balance: mean load of a rank as a share of the largest.
    """
    lengths = [len(side.ids) for item in items for side in item.sides]
    flops = training_flops(cfg, lengths, sum(int(side.mask.sum()) for item in items for side in item.sides)) / seconds
    loads = [sum(rank) for rank in micro_batches]
    found = {"seconds": seconds, "tokens_per_second": sum(lengths) / seconds, "tflops": flops / 1e12,
             "micro_batches": len(micro_batches[0]), "balance": statistics.fmean(loads) / max(loads)}
    return found | ({"mfu": flops / (peak * world())} if peak else {})
