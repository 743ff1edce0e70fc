"""
Direct Preference Optimization (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290), offline and online.

Offline: pairs that arbitrage made, the best against the worst completion of the pool of teachers. Online: each round
samples --samples completions per prompt from the current policy on fresh prompts, the reward model picks the best and
the worst, ties are dropped, and the policy at the start of the round is the reference. Aya Expanse runs the first once
and the second three times. Both go through the same loop below: an online round only makes its own pairs first.

python train_dpo.py --model out/mini/sft --pairs out/mini/arbitrage/pairs.jsonl --out out/my-dpo
torchrun --nproc_per_node=8 train_dpo.py --model DIR --prompts F.jsonl --reward_model DIR --rounds 3 --out DIR

What to watch: `margins` and `accuracies` rise. The *chosen* log-probability may well fall while training works: DPO
raises the difference, not the chosen one. `reward` of the reward model rising while the judged win rate does not is
reward hacking: look at both.
"""

import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

import common
from chat import Chat
from common import die, parse_config, print0
from data import batch_order, encode_pairs, pad_batch, read_mixture, read_rows, write_rows
from generate import complete
from model import keep_checkpoints, load, write_checkpoint
from reward import best_against_worst, load_reward_model, preference_row, score, usable


@dataclass
class Config:
    model: str = "out/mini/sft"  # policy to start from; also the reference
    pairs: list[str] = field(default_factory=list)  # offline: preference files, each with optional :weight
    prompts: str = ""  # online: prompt rows, cut into --rounds parts
    reward_model: str = "out/mini/rm"  # online: the Arbiter that ranks the samples
    rounds: int = 1  # online rounds; the reference is the policy at the start of each
    samples: int = 8  # online: completions per prompt (K)
    temperature: float = 0.8  # online: of the samples
    max_new_tokens: int = 48  # online: longest sample
    margin: float = 0.0  # drop pairs whose rewards are no further apart
    languages: list[str] = field(default_factory=list)  # train only on these languages (default: all)
    out: str = "out/mini/dpo-run"  # checkpoint folder to write
    beta: float = 0.1  # strength of the pull to the reference: larger stays closer (Eq. 7)
    batch_size: int = 64  # pairs per optimizer step, over all ranks
    micro_batch_size: int = 64  # pairs per forward on one rank
    max_tokens: int = 512  # pairs with a longer side are dropped, and counted
    epochs: float = 1.0  # passes over the pairs (of each round)
    max_steps: int = 0  # optimizer steps (of each round); 0: from --epochs
    lr: float = 1e-4  # peak learning rate
    warmup_steps: int = 5  # linear warm-up
    min_lr: float = 0.1  # floor of the cosine, as a share of --lr
    weight_decay: float = 0.0  # AdamW, matrices only
    clip: float = 1.0  # largest gradient norm
    keep: list[int] = field(default_factory=list)  # percents of the (last round's) steps: also keep OUT/at-50 ...
    seed: int = 0  # of the order of the data and of the samples
    log_every: int = 20  # steps between lines on the console


def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
    """
    All inputs (B,): log-probabilities *summed* over the completion's tokens, end of turn included. Returns the loss and
    the implicit rewards of chosen and rejected, (B,) each. Where policy == reference, the loss is log 2.
    """
    chosen_logratio = policy_chosen - ref_chosen  # log pi(y_w|x) / pi_ref(y_w|x)
    rejected_logratio = policy_rejected - ref_rejected
    loss = -F.logsigmoid(beta * (chosen_logratio - rejected_logratio))  # Eq. 7
    return loss, beta * chosen_logratio.detach(), beta * rejected_logratio.detach()


def seq_logps(model, examples, pad, device):
    """Summed completion log-probs (B,) of examples: the one code path of policy and reference, so that they agree."""
    ids, mask = pad_batch(examples, pad, device)
    return model.token_logps(ids, mask).sum(1)


@torch.no_grad()
def reference_logps(model, pairs, pad, device, batch_size):
    """
    [(chosen, rejected) examples] -> [(log-prob, log-prob)] floats under the model as it is now. Computed once, before a
    stage: the reference then needs no memory while the policy trains. Split over the ranks.
    """
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0].ids))[common.rank()::common.world()]
    found = []
    with common.unsharded(model):
        for begin in range(0, len(order), batch_size):
            batch = order[begin:begin + batch_size]
            both = seq_logps(model, [pairs[i][0] for i in batch] + [pairs[i][1] for i in batch], pad, device)
            chosen, rejected = both.chunk(2)
            found += zip(batch, chosen.tolist(), rejected.tolist())
    return [(c, r) for _, c, r in sorted(common.gather_list(found))]


def online_pairs(cfg, policy, chat, reward_model, reward_chat, rows, seed):
    """
    K samples of the current policy for each prompt, scored: -> (completion rows with rewards, preference rows of best
    against worst). Samples cut off before their end of turn are not eligible, equal rewards make no pair.
    """
    done = complete(policy, chat, rows, cfg.max_new_tokens, cfg.temperature, samples=cfg.samples, seed=seed,
                    teacher="policy")
    greedy = complete(policy, chat, rows, cfg.max_new_tokens, teacher="policy")  # reported: best of K beside greedy
    done += [row | {"sample": "greedy"} for row in greedy]
    rewards = score(reward_model, reward_chat, [(r["prompt"], r["completion"]) for r in done])
    done = [row | {"reward": reward} for row, reward in zip(done, rewards)]
    pairs = []
    for begin in range(0, len(rows) * cfg.samples, cfg.samples):
        if found := best_against_worst(filter(usable, done[begin:begin + cfg.samples]), cfg.margin):
            pairs.append(preference_row(*found))
    return done, pairs


def make_miniature(cfg):
    """On a fresh clone the default inputs do not exist yet: makes the miniature up to the SFT model, and says so."""
    needed = [p for p in (cfg.model, cfg.reward_model if cfg.prompts else "", *cfg.pairs) if p.startswith("out/mini/")]
    if all(Path(p.rpartition(":")[0] or p).exists() for p in needed):
        return
    if common.is_main():
        print(f"{' '.join(needed)}: making what is missing of the miniature first (python recipe.py --until sft)",
              flush=True)
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        subprocess.run([sys.executable, "recipe.py", "--until", "sft"], cwd=Path(__file__).parent, check=True,
                       env=environment)
    common.barrier()


def main(cfg):
    # 1) policy; without flags this is the miniature's offline stage
    if not cfg.pairs and not cfg.prompts:
        cfg.pairs = ["out/mini/arbitrage/pairs.jsonl"]
    if cfg.pairs and cfg.prompts:
        die("give --pairs (offline) or --prompts (online), not both")
    device = common.init_distributed()
    common.seed_everything(cfg.seed)
    make_miniature(cfg)
    chat, policy = Chat(cfg.model), load(cfg.model, device=device, wrap=common.wrap)
    if cfg.batch_size % common.world():
        die(f"--batch_size {cfg.batch_size} must be a multiple of the {common.world()} ranks")

    # 2) where pairs come from: files once, or the policy's own samples in every round
    keep_language = lambda r: not cfg.languages or r["language"] in cfg.languages
    if cfg.prompts:
        prompts = [r for r in read_rows(cfg.prompts, "prompts") if keep_language(r)]
        if len(prompts) < cfg.rounds:
            die(f"{cfg.prompts} holds {len(prompts)} prompts of the languages asked for, "
                f"too few for {cfg.rounds} rounds")
        reward_model, reward_chat = load_reward_model(cfg.reward_model, device=device), Chat(cfg.reward_model)
    begin = time.time()
    with common.atomic_dir(cfg.out) as folder:
        for round_number in range(1, cfg.rounds + 1 if cfg.prompts else 2):
            if cfg.prompts:
                fresh = prompts[round_number - 1::cfg.rounds]
                done, rows = online_pairs(cfg, policy, chat, reward_model, reward_chat, fresh, cfg.seed + round_number)
                if common.is_main():
                    write_rows(folder / f"completions-{round_number}.jsonl", done)
                    write_rows(folder / f"pairs-{round_number}.jsonl", rows)
                greedy = statistics.fmean(r["reward"] for r in done if r["sample"] == "greedy")
                mean = statistics.fmean(r["reward"] for r in done if r["sample"] != "greedy")
                print0(f"round {round_number}: {cfg.samples} samples of {len(fresh)} prompts, "
                       f"reward {mean:.3f} (greedy {greedy:.3f}), {len(rows)} pairs")
            else:
                rows = [r for r in read_mixture(cfg.pairs, "preferences", cfg.seed) if keep_language(r)]
                if cfg.margin:
                    rows = [r for r in rows
                            if r.get("chosen_reward", cfg.margin + 1) - r.get("rejected_reward", 0) > cfg.margin]
            pairs, lengths = encode_pairs(chat, rows, cfg.max_tokens)
            if not pairs:
                die(f"no pairs to train on (round {round_number}): every prompt was a tie, or the files hold none")

            # 3) train against the policy as it is now
            max_steps = cfg.max_steps or max(1, round(cfg.epochs * len(pairs) / cfg.batch_size))
            print0(f"{len(pairs)} pairs, {max_steps} steps of {cfg.batch_size}, beta {cfg.beta}")
            ref = reference_logps(policy, pairs, chat.pad, device, cfg.micro_batch_size)
            optimizer = common.make_optimizer(policy, cfg.weight_decay)
            log = common.Log(folder, cfg, device, max_steps, cfg.log_every, append=round_number > 1)
            for step, batch in enumerate(batch_order(lengths, cfg.batch_size, max_steps, cfg.seed + round_number)):
                mine = batch[common.rank()::common.world()]
                totals = torch.zeros(6, dtype=torch.float64)
                for m in range(0, len(mine), cfg.micro_batch_size):
                    micro = mine[m:m + cfg.micro_batch_size]
                    examples = [pairs[i][0] for i in micro] + [pairs[i][1] for i in micro]
                    chosen, rejected = seq_logps(policy, examples, chat.pad, device).chunk(2)  # one forward for both
                    ref_chosen, ref_rejected = torch.tensor([ref[i] for i in micro], device=device).unbind(1)
                    loss, chosen_reward, rejected_reward = dpo_loss(
                        chosen, rejected, ref_chosen, ref_rejected, cfg.beta)
                    loss = loss.sum() / cfg.batch_size  # this share of the mean over the batch's pairs
                    (loss * common.world()).backward()  # FSDP averages gradients over ranks
                    totals += torch.stack([t.detach().sum() for t in (
                        loss * cfg.batch_size, chosen_reward > rejected_reward, chosen_reward, rejected_reward, chosen,
                        rejected)]).double().cpu() / cfg.batch_size
                lr = common.cosine_lr(step, max_steps, cfg.lr, cfg.warmup_steps, cfg.min_lr)
                norm = common.optimizer_step(policy, optimizer, lr, cfg.clip)
                if round_number == cfg.rounds or cfg.pairs:
                    keep_checkpoints(folder, cfg.keep, step + 1, max_steps, policy, cfg.model)
                # everything below is only logging
                loss, accuracy, r_chosen, r_rejected, logp_chosen, logp_rejected = common.all_sum(totals).tolist()
                log.step(step + 1, 2 * sum(lengths[i] for i in batch), **{
                    "loss": loss, "rewards/accuracies": accuracy, "rewards/margins": r_chosen - r_rejected,
                    "rewards/chosen": r_chosen, "rewards/rejected": r_rejected, "logps/chosen": logp_chosen,
                    "logps/rejected": logp_rejected, "grad_norm": norm, "lr": lr})
            log.close()

        # 4) save
        write_checkpoint(folder, policy, cfg.model)
    print0(f"saved {cfg.out} in {time.time() - begin:.1f} s")


if __name__ == "__main__":
    main(parse_config(Config))
