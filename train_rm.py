"""
The reward model: a causal model with a scalar head, trained so that `chosen` scores above `rejected` (Bradley-Terry).

    loss = -log sigmoid(r(chosen) - r(rejected)) + lm_weight * NLL(chosen)

The second term keeps the language model inside the reward model: it makes the head generalise (GRM, Yang et al. 2024,
https://arxiv.org/abs/2406.10216), and the reward uses its log-probabilities (reward.py says how).

python train_rm.py --model out/mini/rm-base --pairs out/mini/rm-pairs/pairs.jsonl --out out/my-rm
torchrun --nproc_per_node=8 train_rm.py --model DIR --pairs F.jsonl --out DIR
"""

import time
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

import common
import optim
from chat import Chat
from common import die, parse_config, print0
from data import batch_order, document_sums, fingerprint, pack_batch, read_items
from reward import new_reward_model, reward_config
from run import Run, RunConfig, files_fingerprint, prepared
from sharding import accumulate


@dataclass
class Config(RunConfig):
    model: str = "out/mini/rm-base"  # causal checkpoint the reward model starts from
    pairs: list[str] = field(default_factory=lambda: ["out/mini/rm-pairs/pairs.jsonl"])  # files, each may end in :weight
    out: str = "out/mini/rm-run"  # folder to write
    lm_weight: float = 0.3  # weight of the language-model loss on the chosen completion
    batch_size: int = 64  # pairs per optimizer step, over all ranks
    max_tokens: int = 512  # pairs with a longer side are dropped, and counted
    epochs: float = 1.0  # passes over the pairs
    max_steps: int = 0  # optimizer steps; 0: from --epochs
    lr: float = 1e-3  # peak learning rate
    warmup_steps: int = 10  # linear warm-up
    min_lr: float = 0.1  # floor of the cosine, as a share of --lr
    weight_decay: float = 0.05  # AdamW, matrices only
    clip: float = 1.0  # largest gradient norm
    seed: int = 0  # of the order of the data


def bradley_terry_loss(chosen_reward, rejected_reward):
    """(B,), (B,) -> (B,): -log P(chosen beats rejected), P = sigmoid of the difference (Bradley & Terry 1952)."""
    return -F.logsigmoid(chosen_reward - rejected_reward)


def main(cfg):
    # 1) model
    device = common.init_distributed()
    common.seed_everything(cfg.seed)
    chat = Chat(cfg.model)
    model = new_reward_model(cfg.model, torch.float32, "cpu" if cfg.cpu_offload else device, prepared(cfg))

    # 2) pairs
    items = read_items(cfg.pairs, "preferences", chat, cfg.max_tokens, cfg.seed)
    if not items:
        die(f"no pairs left to train on in {' '.join(cfg.pairs)}")
    lengths = [len(item) for item in items]
    max_steps = cfg.max_steps or max(1, round(cfg.epochs * len(items) / cfg.batch_size))
    order = batch_order([item.longest for item in items], cfg.batch_size, max_steps, cfg.seed)
    print0(f"{len(items)} pairs, {max_steps} steps of {cfg.batch_size}")

    # 3) train
    optimizer = optim.make_optimizer(model, cfg.weight_decay)
    identity = {"model": files_fingerprint(model.source), "data": fingerprint(items)}
    with Run(cfg, device, cfg.model, identity, **reward_config(model)) as run:
        begin, models = time.time(), {"policy": model}
        run.restore(models, optimizer)
        for batch, mine in run.batches(order, lengths):
            batch = [items[i] for i in batch]
            tokens = sum(item.trained for item in batch)  # chosen tokens of the whole batch, all ranks
            for rows in accumulate(model, mine, cfg.reduce_every):
                micro = [items[i] for i in rows]
                # chosen and rejected share one forward
                examples = [item.sides[0] for item in micro] + [item.sides[1] for item in micro]
                ids, mask, doc_start = pack_batch(examples, device)
                documents = torch.tensor([len(e.ids) for e in examples] or [2], device=device)
                rewards, logps, _ = model(ids, documents, True, mask, doc_start)
                chosen, rejected = rewards[:len(examples)].chunk(2)
                ranking = bradley_terry_loss(chosen, rejected)
                nll = -document_sums(logps, examples)[:len(micro)]  # of the chosen ones
                loss = ranking.sum() / len(batch) + cfg.lm_weight * nll.sum() / tokens
                loss.backward()
                margin, trained = chosen - rejected, torch.tensor([item.trained for item in micro])
                run.meter.add(micro, loss=ranking, nll=(nll, trained), **{"rewards/accuracies": (margin > 0).float(),
                                                                          "rewards/margins": margin})
            run.meter.check()  # a NaN ends here, with the row's name
            lr = optim.cosine_lr(run.step, max_steps, cfg.lr, cfg.warmup_steps, cfg.min_lr)
            norm = optim.optimizer_step(model, optimizer, lr, cfg.clip, batch)
            run.end_step(models, optimizer, max_steps, batch, norm, lr)

        # 4) save
        run.finish(model)
    print0(f"saved {cfg.out} after {max_steps} steps in {time.time() - begin:.1f} s")


if __name__ == "__main__":
    main(parse_config(Config))
