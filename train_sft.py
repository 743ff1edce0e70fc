"""
Supervised fine-tuning: the next token of the completion, with the prompt as context.

The recipe uses it three times: for the base model (a stand-in for pretraining), for the teachers of each language
cluster, and for the student on the completions that arbitrage chose (Aya Expanse: https://arxiv.org/abs/2412.04261).

python train_sft.py --model out/mini/base --data out/mini/arbitrage/sft.jsonl --out out/my-sft         # one process
torchrun --nproc_per_node=8 train_sft.py --model DIR --data a.jsonl:0.9 b.jsonl:0.1 --out DIR        # 8 GPUs, FSDP
"""

import time
from dataclasses import dataclass, field

import torch

import common
import optim
from chat import Chat
from common import die, parse_config, print0
from data import batch_order, document_sums, fingerprint, pack_batch, read_items, token_order
from model import Config as ModelConfig
from model import Transformer, load
from run import Run, RunConfig, files_fingerprint, prepared
from sharding import accumulate


@dataclass
class Config(RunConfig):
    model: str = "out/mini/base"  # checkpoint to start from, or "new" for random weights
    tokenizer: str = "out/mini/tokenizer"  # only for --model new: folder with the tokenizer
    hidden_size: int = 128  # only for --model new
    layers: int = 4  # only for --model new
    heads: int = 4  # only for --model new
    kv_heads: int = 2  # only for --model new
    intermediate_size: int = 384  # only for --model new
    init_std: float = 0.06  # only for --model new: spread of the random weights
    data: list[str] = field(default_factory=lambda: ["out/mini/arbitrage/sft.jsonl"])  # files, each may end in :weight
    languages: list[str] = field(default_factory=list)  # train only on these languages (default: all)
    out: str = "out/mini/sft-run"  # checkpoint folder to write
    batch_size: int = 64  # rows per optimizer step, over all ranks
    batch_tokens: int = 0  # tokens per optimizer step instead of --batch_size rows
    max_tokens: int = 512  # longer rows are dropped, and counted
    epochs: float = 1.0  # passes over the data
    max_steps: int = 0  # optimizer steps; 0: from --epochs
    lr: float = 1e-3  # peak learning rate
    warmup_steps: int = 10  # linear warm-up
    min_lr: float = 0.1  # floor of the cosine, as a share of --lr
    weight_decay: float = 0.05  # AdamW, matrices only
    clip: float = 1.0  # largest gradient norm
    seed: int = 0  # of the order of the data (and of new weights)


def sft_loss(token_logps, loss_mask, tokens):
    """
    Negative log-likelihood per trained token: token_logps (B, T - 1), loss_mask (B, T) -> scalar. `tokens` counts the
    trained tokens of the WHOLE batch (all micro-batches and ranks), so the sum over micro-batches is the batch's mean
    and the gradient does not depend on how the batch is cut.
    """
    return -(token_logps * loss_mask[:, 1:]).sum() / tokens


def main(cfg):
    # 1) model and tokenizer
    device = common.init_distributed()
    common.seed_everything(cfg.seed)
    source = cfg.tokenizer if cfg.model == "new" else cfg.model
    chat = Chat(source)
    if cfg.model == "new":
        config = ModelConfig(
            vocab_size=chat.vocab_size, hidden_size=cfg.hidden_size, intermediate_size=cfg.intermediate_size,
            num_hidden_layers=cfg.layers, num_attention_heads=cfg.heads, num_key_value_heads=cfg.kv_heads,
            bos_token_id=chat.bos, eos_token_id=chat.end, pad_token_id=chat.pad, logit_scale=1.0,
            initializer_range=cfg.init_std)
        model, identity = prepared(cfg)(Transformer(config).init_weights(cfg.seed).to(device)), {}
    else:
        model = load(cfg.model, torch.float32, "cpu" if cfg.cpu_offload else device, prepared(cfg))
        identity = {"model": files_fingerprint(model.source)}

    # 2) data: what does not fit is counted, never cut
    items = read_items(cfg.data, "sft", chat, cfg.max_tokens, cfg.seed,
                       lambda row: not cfg.languages or row["language"] in cfg.languages)
    if not items:
        die(f"no rows left to train on in {' '.join(cfg.data)}")
    lengths = [len(item) for item in items]
    per_step = cfg.batch_tokens / (sum(lengths) / len(items)) if cfg.batch_tokens else cfg.batch_size
    max_steps = cfg.max_steps or max(1, round(cfg.epochs * len(items) / per_step))
    order = (token_order(lengths, cfg.batch_tokens, max_steps, cfg.seed) if cfg.batch_tokens else
             batch_order(lengths, cfg.batch_size, max_steps, cfg.seed))
    print0(f"{len(items)} rows, {max_steps} steps of {cfg.batch_tokens or cfg.batch_size} "
           f"{'tokens' if cfg.batch_tokens else 'rows'}, "
           f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")

    # 3) train
    optimizer = optim.make_optimizer(model, cfg.weight_decay)
    with Run(cfg, device, source, identity | {"data": fingerprint(items)}) as run:
        begin, models = time.time(), {"policy": model}
        run.restore(models, optimizer)
        for batch, mine in run.batches(order, lengths):
            tokens = sum(items[i].trained for i in batch)  # trained tokens of all ranks: every rank sees the order
            for rows in accumulate(model, mine, cfg.reduce_every):
                micro = [items[i] for i in rows]
                examples = [item.sides[0] for item in micro]
                ids, mask, doc_start = pack_batch(examples, device)
                logps = model.token_logps(ids, mask, doc_start)
                sft_loss(logps, mask, tokens).backward()
                trained = torch.tensor([item.trained for item in micro])
                run.meter.add(micro, loss=(-document_sums(logps.detach(), examples), trained))
            run.meter.check()  # a NaN ends here, with the row's name
            lr = optim.cosine_lr(run.step, max_steps, cfg.lr, cfg.warmup_steps, cfg.min_lr)
            batch = [items[i] for i in batch]
            norm = optim.optimizer_step(model, optimizer, lr, cfg.clip, batch)
            run.end_step(models, optimizer, max_steps, batch, norm, lr)

        # 4) save
        run.finish(model)
    print0(f"saved {cfg.out} after {max_steps} steps in {time.time() - begin:.1f} s")


if __name__ == "__main__":
    main(parse_config(Config))
