"""
Supervised fine-tuning: the next token of the completion, with the prompt as context.

The recipe uses it three times: for the base model (a stand-in for pretraining), for the teachers of each language
cluster, and for the student on the completions that arbitrage chose (Aya Expanse: https://arxiv.org/abs/2412.04261).

python train_sft.py --model out/mini/base --data out/mini/arbitrage/sft.jsonl --out out/my-sft         # one process
torchrun --nproc_per_node=8 train_sft.py --model DIR --data a.jsonl:0.9 b.jsonl:0.1 --out DIR        # 8 GPUs, FSDP
"""

import time
from dataclasses import dataclass, field

import common
from chat import Chat
from common import die, parse_config, print0
from data import batch_order, drop_long, encode_sft, pack_batch, pad_batch, read_mixture
from model import Config as ModelConfig
from model import Transformer, keep_checkpoints, load, write_checkpoint


@dataclass
class Config:
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
    micro_batch_size: int = 64  # rows per forward on one rank
    pack: bool = False  # put a micro-batch's rows end to end without padding
    max_tokens: int = 512  # longer rows are dropped, and counted
    epochs: float = 1.0  # passes over the data
    max_steps: int = 0  # optimizer steps; 0: from --epochs
    lr: float = 1e-3  # peak learning rate
    warmup_steps: int = 10  # linear warm-up
    min_lr: float = 0.1  # floor of the cosine, as a share of --lr
    weight_decay: float = 0.05  # AdamW, matrices only
    clip: float = 1.0  # largest gradient norm
    keep: list[int] = field(default_factory=list)  # percents of the steps: also keep OUT/at-50 ..., for merge.py
    seed: int = 0  # of the order of the data (and of new weights)
    log_every: int = 20  # steps between lines on the console


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
        model = common.wrap(Transformer(config).init_weights(cfg.seed).to(device))
    else:
        model = load(cfg.model, device=device, wrap=common.wrap)

    # 2) data: what does not fit is counted, never cut
    rows = [r for r in read_mixture(cfg.data, "sft", cfg.seed) if not cfg.languages or r["language"] in cfg.languages]
    examples = [encode_sft(chat, row) for row in rows]
    kept, dropped = drop_long(examples, cfg.max_tokens, [row["language"] for row in rows])
    examples = [examples[i] for i in kept]
    if dropped:
        print0(f"dropped {sum(dropped.values())} rows longer than {cfg.max_tokens} tokens: {dropped}")
    if not examples:
        die(f"no rows left to train on in {' '.join(cfg.data)}")
    if cfg.batch_size % common.world():
        die(f"--batch_size {cfg.batch_size} must be a multiple of the {common.world()} ranks")
    max_steps = cfg.max_steps or max(1, round(cfg.epochs * len(examples) / cfg.batch_size))
    print0(f"{len(examples)} rows, {max_steps} steps of {cfg.batch_size} rows = {common.world()} ranks x "
           f"{-(-cfg.batch_size // common.world() // cfg.micro_batch_size)} micro-batches, "
           f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")

    # 3) train
    optimizer = common.make_optimizer(model, cfg.weight_decay)
    with common.atomic_dir(cfg.out) as folder:
        log = common.Log(folder, cfg, device, max_steps, cfg.log_every)
        begin = time.time()
        lengths = [len(e.ids) for e in examples]
        for step, batch in enumerate(batch_order(lengths, cfg.batch_size, max_steps, cfg.seed)):
            tokens = sum(sum(examples[i].mask) for i in batch)  # trained tokens of all ranks: every rank sees the order
            mine = batch[common.rank()::common.world()]
            total = 0.0
            for m in range(0, len(mine), cfg.micro_batch_size):
                micro = [examples[i] for i in mine[m:m + cfg.micro_batch_size]]
                if cfg.pack:
                    ids, mask, doc_start = pack_batch(micro, device)
                else:
                    (ids, mask), doc_start = pad_batch(micro, chat.pad, device), None
                loss = sft_loss(model.token_logps(ids, mask, doc_start), mask, tokens)
                (loss * common.world()).backward()  # FSDP averages gradients over ranks; the loss is already a share
                total += loss.item()
            lr = common.cosine_lr(step, max_steps, cfg.lr, cfg.warmup_steps, cfg.min_lr)
            norm = common.optimizer_step(model, optimizer, lr, cfg.clip)
            keep_checkpoints(folder, cfg.keep, step + 1, max_steps, model, source)
            # everything below is only logging
            log.step(step + 1, sum(lengths[i] for i in batch), loss=common.all_sum(total), grad_norm=norm, lr=lr)
        log.close()

        # 4) save
        write_checkpoint(folder, model, source)
    print0(f"saved {cfg.out} after {max_steps} steps in {time.time() - begin:.1f} s")


if __name__ == "__main__":
    main(parse_config(Config))
