"""
The optimizer's side of a training step: the learning rate, AdamW, clipping. On several ranks a parameter is a shard
(sharding.py), its gradient and its two averages are shards of the same kind, and nothing here knows the difference.
"""

import math

import torch
from torch.optim.adamw import adamw

from common import die
from sharding import whole


def cosine_lr(step, max_steps, peak, warmup=0, floor=0.0):
    """Learning rate of 0-based `step`: linear warm-up over `warmup` steps, then cosine from `peak` to floor * peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, max_steps - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


class AdamW:
    """
    Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv 1711.05101): torch's own fused update and the same
    numbers as torch.optim.AdamW. That class is not used because its first call imports the compiler, three seconds on a
    CPU, and a recipe in miniature is many short commands.
    """

    def __init__(self, groups, betas, eps=1e-8):
        """groups: [{"params": [...], "weight_decay": float}], as torch.optim has them."""
        self.param_groups, self.betas, self.eps, self.lr = groups, betas, eps, 0.0
        self.state = {}  # parameter -> (mean of the gradient, mean of its square, step count), made at the first step

    def averages(self, p):
        """The state of one parameter; zeros before its first step."""
        if p not in self.state:
            self.state[p] = torch.zeros_like(p), torch.zeros_like(p), torch.zeros((), device=p.device)
        return self.state[p]

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            means, squares, steps = map(list, zip(*map(self.averages, params))) if params else ([], [], [])
            adamw(params, [p.grad for p in params], means, squares, [], steps, fused=True, amsgrad=False,
                  maximize=False, beta1=self.betas[0], beta2=self.betas[1], lr=self.lr,
                  weight_decay=group["weight_decay"], eps=self.eps)

    def zero_grad(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None


def make_optimizer(model, weight_decay, betas=(0.9, 0.95)):
    """AdamW; matrices decay, norm weights do not. Built after sharding.wrap(), so that it sees the shards."""
    params = [(p, p.ndim >= 2 and "norm" not in name) for name, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": [p for p, matrix in params if matrix], "weight_decay": weight_decay},  # q_norm, k_norm: (H, D)
              {"params": [p for p, matrix in params if not matrix], "weight_decay": 0.0}]
    return AdamW([g for g in groups if g["params"]], betas)


def optimizer_step(model, optimizer, lr, max_norm, items=()):
    """
    Clips the global gradient norm (max_norm 0: does not), sets the learning rate, steps. Returns the norm before clipping;
    on NaN or infinity the program ends before any weight has changed, and names the batch's `items` (as data.py has them).
    """
    norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm or math.inf)).item()
    if not math.isfinite(norm):
        rows = ", ".join(item.where for item in items[:8]) + (f" and {len(items) - 8} more" if len(items) > 8 else "")
        die(f"the gradient norm is {norm}: nothing was updated; lower --lr, or look for a broken row"
            + (f" among {rows}" if items else " in the data"))
    optimizer.lr = lr
    optimizer.step()
    optimizer.zero_grad()
    return norm
