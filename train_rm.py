"""
The reward model: a causal model with a scalar head, trained so that `chosen` scores above `rejected` (Bradley-Terry).

    loss = -log sigmoid(r(chosen) - r(rejected)) + lm_weight * NLL(chosen)

The second term keeps the language model inside the reward model: it makes the head generalise (GRM, Yang et al. 2024,
https://arxiv.org/abs/2406.10216), and the reward uses its log-probabilities (reward.py says how).

python train_rm.py --model out/mini/rm-base --pairs out/mini/rm-pairs/pairs.jsonl --out out/my-rm
torchrun --nproc_per_node=8 train_rm.py --model DIR --pairs F.jsonl --out DIR
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import common
from chat import Chat
from common import die, parse_config, print0
from data import batch_order, encode_pairs, pad_batch, read_rows
from reward import new_reward_model, write_reward_model


@dataclass
class Config:
    model: str = "out/mini/rm-base"  # causal checkpoint the reward model starts from
    pairs: str = "out/mini/rm-pairs/pairs.jsonl"  # preference rows
    out: str = "out/mini/rm-run"  # folder to write
    lm_weight: float = 0.3  # weight of the language-model loss on the chosen completion
    batch_size: int = 64  # pairs per optimizer step, over all ranks
    micro_batch_size: int = 64  # pairs per forward on one rank
    max_tokens: int = 512  # pairs with a longer side are dropped, and counted
    epochs: float = 1.0  # passes over the pairs
    max_steps: int = 0  # optimizer steps; 0: from --epochs
    lr: float = 1e-3  # peak learning rate
    warmup_steps: int = 10  # linear warm-up
    min_lr: float = 0.1  # floor of the cosine, as a share of --lr
    weight_decay: float = 0.05  # AdamW, matrices only
    clip: float = 1.0  # largest gradient norm
    seed: int = 0  # of the order of the data
    log_every: int = 20  # steps between lines on the console


def bradley_terry_loss(chosen_reward, rejected_reward):
    """(B,), (B,) -> (B,): -log P(chosen beats rejected), P = sigmoid of the difference (Bradley & Terry 1952)."""
    return -F.logsigmoid(chosen_reward - rejected_reward)


def main(cfg):
    # 1) model
    device = common.init_distributed()
    common.seed_everything(cfg.seed)
    chat = Chat(cfg.model)
    model = new_reward_model(cfg.model, device, wrap=common.wrap)

    # 2) pairs
    rows = read_rows(cfg.pairs, "preferences")
    pairs, lengths = encode_pairs(chat, rows, cfg.max_tokens)
    if not pairs:
        die(f"no pairs left to train on in {cfg.pairs}")
    if cfg.batch_size % common.world():
        die(f"--batch_size {cfg.batch_size} must be a multiple of the {common.world()} ranks")
    max_steps = cfg.max_steps or max(1, round(cfg.epochs * len(pairs) / cfg.batch_size))
    print0(f"{len(pairs)} pairs, {max_steps} steps of {cfg.batch_size}")

    # 3) train
    optimizer = common.make_optimizer(model, cfg.weight_decay)
    with common.atomic_dir(cfg.out) as folder:
        log = common.Log(folder, cfg, device, max_steps, cfg.log_every)
        begin = time.time()
        for step, batch in enumerate(batch_order(lengths, cfg.batch_size, max_steps, cfg.seed)):
            tokens = sum(sum(pairs[i][0].mask) for i in batch)  # chosen tokens of the whole batch, all ranks
            mine = batch[common.rank()::common.world()]
            totals = torch.zeros(4, dtype=torch.float64)  # loss, NLL, correct pairs, margin
            for m in range(0, len(mine), cfg.micro_batch_size):
                micro = [pairs[i] for i in mine[m:m + cfg.micro_batch_size]]
                both = [c for c, _ in micro] + [r for _, r in micro]  # chosen and rejected share one forward
                ids, _ = pad_batch(both, chat.pad, device)
                rewards, logps, _ = model(ids, torch.tensor([len(e.ids) for e in both], device=device), True)
                chosen, rejected = rewards.chunk(2)
                ranking = bradley_terry_loss(chosen, rejected).sum() / cfg.batch_size
                nll = -logps[:len(micro)].sum() / tokens
                loss = ranking + cfg.lm_weight * nll
                (loss * common.world()).backward()  # FSDP averages gradients over ranks; the loss is already a share
                margin = (chosen - rejected).detach()
                totals += torch.stack([ranking.detach(), nll.detach(), (margin > 0).sum() / cfg.batch_size,
                                       margin.sum() / cfg.batch_size]).double().cpu()
            lr = common.cosine_lr(step, max_steps, cfg.lr, cfg.warmup_steps, cfg.min_lr)
            norm = common.optimizer_step(model, optimizer, lr, cfg.clip)
            # everything below is only logging
            loss, nll, accuracy, margin = common.all_sum(totals).tolist()
            log.step(step + 1, 2 * sum(lengths[i] for i in batch), **{
                "loss": loss, "nll": nll, "rewards/accuracies": accuracy, "rewards/margins": margin, "grad_norm": norm,
                "lr": lr})
        log.close()

        # 4) save
        write_reward_model(Path(folder), model, cfg.model)
    print0(f"saved {cfg.out} after {max_steps} steps in {time.time() - begin:.1f} s")


if __name__ == "__main__":
    main(parse_config(Config))
