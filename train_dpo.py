"""
Direct Preference Optimization (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290), offline and online.

Offline: pairs that arbitrage made, the best against the worst completion of the pool of teachers. Online: each round
samples --samples completions per prompt from the current policy on fresh prompts, the reward model picks the best and
the worst of those that pass the guards (guards.py), ties are dropped, and the policy at the start of the round is the
reference. Aya Expanse runs the first once and the second three times. Both go through the same loop below: an online
round only makes its own pairs first.

python train_dpo.py --model out/mini/sft --pairs out/mini/arbitrage/pairs.jsonl --out out/my-dpo
torchrun --nproc_per_node=8 train_dpo.py --model DIR --pairs pairs.jsonl:0.85 safety.jsonl:0.15 --out DIR
torchrun --nproc_per_node=8 train_dpo.py --model DIR --prompts F.jsonl --reward_model DIR --rounds 3 --out DIR

What to watch: `margins` and `accuracies` rise. The *chosen* log-probability may well fall while training works: DPO
raises the difference, not the chosen one. Every online round is watched (watch.py): `reward` rising while the win rate
by --judge falls is reward hacking. --on_hacking stop then ends the run with the policy as it was before that round.
"""

import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

import common
import optim
import watch
from chat import Chat
from common import die, parse_config, print0
from data import (append_rows, batch_order, document_sums, fingerprint, pack_batch, read_finished, read_items, read_rows,
                  write_rows)
from generate import complete
from guards import GUARDS, REJECTED_GUARDS, all_flags
from model import load
from reference import reference_logps
from reward import best_against_worst, load_reward_model, preference_row, score
from run import Run, RunConfig, files_fingerprint, prepared
from sharding import accumulate, local


@dataclass
class Config(RunConfig):
    model: str = "out/mini/sft"  # policy to start from; also the reference
    pairs: list[str] = field(default_factory=list)  # offline: preference files, each with optional :weight
    prompts: str = ""  # online: prompt rows, cut into --rounds parts
    reward_model: str = "out/mini/rm"  # online: the Arbiter that ranks the samples
    rounds: int = 1  # online rounds; the reference is the policy at the start of each
    samples: int = 8  # online: completions per prompt (K)
    temperature: float = 0.8  # online: of the samples
    max_new_tokens: int = 48  # online: longest sample
    prompts_at_once: int = 512  # online: prompts sampled between two writes; a kill costs at most so many
    guards: list[str] = field(default_factory=lambda: list(GUARDS))  # online: of guards.py; what one flags is never chosen
    rejected_guards: list[str] = field(default_factory=lambda: list(REJECTED_GUARDS))  # online: what is not even rejected
    sft: str = ""  # online: the model that KL and win rate refer to (default: --model)
    judge: str = ""  # online: a second reward model, which compares with --sft: is the first one hacked?
    watch: int = 128  # online: prompts watched behind every round, of --prompts, languages in turn (0: none)
    watch_prompts: str = ""  # online: file with other prompts to watch, which are not trained on
    on_hacking: str = "warn"  # online, reward rises and judge falls: warn, ignore, or stop (that round is undone)
    margin: float = 0.0  # drop pairs whose rewards are no further apart
    languages: list[str] = field(default_factory=list)  # train only on these languages (default: all)
    out: str = "out/mini/dpo-run"  # checkpoint folder to write
    beta: float = 0.1  # strength of the pull to the reference: larger stays closer (Eq. 7)
    live_reference: bool = False  # keep the reference model in memory instead of its log-probs on disk
    reference_cache: str = ""  # folder of reference log-probs that runs share, by content (default: in --out)
    batch_size: int = 64  # pairs per optimizer step, over all ranks
    max_tokens: int = 512  # pairs with a longer side are dropped, and counted
    epochs: float = 1.0  # passes over the pairs (of each round)
    max_steps: int = 0  # optimizer steps (of each round); 0: from --epochs
    lr: float = 1e-4  # peak learning rate
    warmup_steps: int = 5  # linear warm-up
    min_lr: float = 0.1  # floor of the cosine, as a share of --lr
    weight_decay: float = 0.0  # AdamW, matrices only
    clip: float = 1.0  # largest gradient norm
    seed: int = 0  # of the order of the data and of the samples


def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
    """
    All inputs (B,): log-probabilities *summed* over the completion's tokens, end of turn included. Returns the loss and
    the implicit rewards of chosen and rejected, (B,) each. Where policy == reference, the loss is log 2.
    """
    chosen_logratio = policy_chosen - ref_chosen  # log pi(y_w|x) / pi_ref(y_w|x)
    rejected_logratio = policy_rejected - ref_rejected
    loss = -F.logsigmoid(beta * (chosen_logratio - rejected_logratio))  # Eq. 7
    return loss, beta * chosen_logratio.detach(), beta * rejected_logratio.detach()


def seq_logps(model, items, device):
    """
    Summed completion log-probs of a micro-batch of pairs, chosen and rejected, (B,) each, in one forward: the one code path
    of policy and reference, so that they agree to the bit where the weights do.
    """
    examples = [item.sides[0] for item in items] + [item.sides[1] for item in items]
    ids, mask, doc_start = pack_batch(examples, device)
    return document_sums(model.token_logps(ids, mask, doc_start), examples).chunk(2)


def sample_round(cfg, run, policy, chat, reward_model, reward_chat, prompts, path):
    """
    K samples and a greedy answer of the current policy for each prompt, scored -> (completion rows with rewards and
    flags, preference rows of best against worst). What a guard flags is not chosen, equal rewards make no pair.
    --prompts_at_once prompts at a time are appended to `path`; a run that goes on asks for those that are missing.
    """
    kept, done, pairs = read_finished(path), [], []
    common.barrier()  # every rank has read it
    for first in range(0, len(prompts), cfg.prompts_at_once):
        rows = prompts[first:first + cfg.prompts_at_once]
        part = kept[len(done):len(done) + len(rows) * (cfg.samples + 1)]
        if len(part) < len(rows) * (cfg.samples + 1):
            part = complete(policy, chat, rows, cfg.max_new_tokens, cfg.temperature, samples=cfg.samples,
                            seed=cfg.seed + run.round, teacher="policy")
            greedy = complete(policy, chat, rows, cfg.max_new_tokens, teacher="policy")  # reported beside best of K
            part += [row | {"sample": "greedy"} for row in greedy]
            rewards = score(reward_model, reward_chat, [(r["prompt"], r["completion"]) for r in part])
            part = [row | {"reward": reward, "flags": found}
                    for row, reward, found in zip(part, rewards, all_flags(part))]
            if common.is_main():
                append_rows(path, part, after=len(done))
        done += part
        for begin in range(0, len(rows) * cfg.samples, cfg.samples):
            if found := best_against_worst(part[begin:begin + cfg.samples], None, cfg.margin, cfg.guards,
                                               cfg.rejected_guards):
                pairs.append(preference_row(*found))
        if run.should_stop():
            run.stop()
    return done, pairs


def report_samples(cfg, run, done, pairs):
    """Of a round's completion rows and pairs: one line on the console, one in the log."""
    sampled = [row for row in done if row["sample"] != "greedy"]
    flagged = Counter(name for row in sampled for name in row.get("flags", ()) if name in cfg.guards)
    found = {"reward": statistics.fmean(row["reward"] for row in sampled),
             "greedy": statistics.fmean(row["reward"] for row in done if row["sample"] == "greedy"),
             "n": len(sampled), "pairs": len(pairs), "flagged": {name: flagged[name] for name in cfg.guards}}
    print0(f"round {run.round}: {cfg.samples} samples of {len(sampled) // cfg.samples} prompts, reward "
           f"{found['reward']:.3f} (greedy {found['greedy']:.3f}), {len(pairs)} pairs; flagged: "
           + (", ".join(f"{name} {count}" for name, count in found["flagged"].items() if count) or "none"))
    run.log.write({"round": run.round, "samples": found})


def make_miniature(cfg):
    """On a fresh clone the default inputs do not exist yet: makes the miniature up to the SFT model, and says so."""
    online = (cfg.reward_model, cfg.sft) if cfg.prompts else ()
    needed = [p for p in (cfg.model, *online, *cfg.pairs) if p.startswith("out/mini/")]
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
    if unknown := [name for name in cfg.guards + cfg.rejected_guards if name not in GUARDS]:
        die(f"--guards knows no {' '.join(unknown)}; what there is: {' '.join(GUARDS)}")
    watch.check(cfg)
    device = common.init_distributed()
    common.seed_everything(cfg.seed)
    make_miniature(cfg)
    chat, place = Chat(cfg.model), "cpu" if cfg.cpu_offload else device
    policy = load(cfg.model, torch.float32, place, prepared(cfg))
    identity, models = {"model": files_fingerprint(policy.source)}, {"policy": policy}
    optimizer = optim.make_optimizer(policy, cfg.weight_decay)
    if cfg.live_reference:
        models["reference"] = load(cfg.model, torch.float32, place, prepared(cfg)).requires_grad_(False)

    # 2) where pairs come from: files once, or the policy's own samples in every round
    wanted = lambda row: not cfg.languages or row["language"] in cfg.languages
    apart = lambda row: row.get("chosen_reward", cfg.margin + 1) - row.get("rejected_reward", 0) > cfg.margin
    if cfg.prompts:
        prompts = [row for row in read_rows(cfg.prompts, "prompts") if wanted(row)]
        if len(prompts) < cfg.rounds:
            die(f"{cfg.prompts} holds {len(prompts)} prompts of the languages asked for, "
                f"too few for {cfg.rounds} rounds")
        reward_model, reward_chat = load_reward_model(cfg.reward_model, device=device), Chat(cfg.reward_model)
        identity |= {"prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
                     "reward model": files_fingerprint(reward_model.source)}
        watched, more = watch.watched(cfg, prompts, identity, wanted)
        identity |= more
    else:
        items = read_items(cfg.pairs, "preferences", chat, cfg.max_tokens, cfg.seed,
                           lambda row: wanted(row) and (not cfg.margin or apart(row)))
        identity["data"] = fingerprint(items)
    rounds = cfg.rounds if cfg.prompts else 1
    if not cfg.prompts and not items:
        die(f"no pairs left to train on in {' '.join(cfg.pairs)}")
    with Run(cfg, device, cfg.model, identity) as run:
        begin = time.time()
        run.restore(models, optimizer)
        watcher, undone, undo = None, False, run.states.folder / "before-the-round"
        if cfg.prompts and watched:
            watcher = watch.Watch(cfg, run, chat, watched, (reward_model, reward_chat), device, place)
        for round_number in range(run.round, rounds + 1):
            if cfg.prompts:
                fresh, pairs_path = prompts[round_number - 1::rounds], run.folder / f"pairs-{round_number}.jsonl"
                if run.step == 0:
                    if undone := watcher and watcher.after(round_number - 1, policy):
                        break
                    if cfg.on_hacking == "stop" and round_number > 1:
                        run.put_aside(policy, undo)
                    if run.should_stop():
                        run.stop()
                    done, rows = sample_round(cfg, run, policy, chat, reward_model, reward_chat, fresh,
                                              run.folder / f"completions-{round_number}.jsonl")
                    report_samples(cfg, run, done, rows)
                    if not rows:
                        die(f"no pairs to train on (round {round_number}): every prompt was a tie, or no two samples "
                            "passed --guards")
                    if common.is_main():
                        write_rows(pairs_path, rows)
                    common.barrier()
                items = read_items([str(pairs_path)], "preferences", chat, cfg.max_tokens, cfg.seed)
                if not items:
                    die(f"no pairs to train on (round {round_number}): all are longer than {cfg.max_tokens} tokens")
                made = fingerprint(items)
                if run.step and run.facts.get("pairs", made) != made:
                    die(f"{pairs_path} has changed since the round began: put it back, or start over with --resume "
                        "never")
                run.facts["pairs"] = made

            # 3) train against the policy as it is now
            lengths = [len(item) for item in items]
            max_steps = cfg.max_steps or max(1, round(cfg.epochs * len(items) / cfg.batch_size))
            print0(f"{len(items)} pairs, {max_steps} steps of {cfg.batch_size}, beta {cfg.beta}")
            order = list(batch_order([item.longest for item in items], cfg.batch_size, max_steps,
                                     cfg.seed + round_number))
            if not cfg.live_reference:
                ref = reference_logps(cfg, run, policy, items, lengths, order, lambda rows: seq_logps(policy, rows, device))
            elif run.step == 0:
                with torch.no_grad():
                    for r, p in zip(models["reference"].parameters(), policy.parameters(), strict=True):
                        local(r).copy_(local(p))
            for batch, mine in run.batches(order, lengths):
                batch = [items[i] for i in batch]
                for rows in accumulate(policy, mine, cfg.reduce_every):
                    micro = [items[i] for i in rows]
                    with torch.no_grad():
                        ref_chosen, ref_rejected = (seq_logps(models["reference"], micro, device) if cfg.live_reference
                                                    else ref[rows].to(device).unbind(1))
                    chosen, rejected = seq_logps(policy, micro, device)
                    loss, chosen_reward, rejected_reward = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, cfg.beta)
                    (loss.sum() / len(batch)).backward()  # this share of the mean over the batch's pairs
                    run.meter.add(micro, loss=loss, **{
                        "rewards/accuracies": (chosen_reward > rejected_reward).float(),
                        "rewards/margins": chosen_reward - rejected_reward, "rewards/chosen": chosen_reward,
                        "rewards/rejected": rejected_reward, "logps/chosen": chosen, "logps/rejected": rejected})
                run.meter.check()  # a NaN ends here, with the row's name
                lr = optim.cosine_lr(run.step, max_steps, cfg.lr, cfg.warmup_steps, cfg.min_lr)
                norm = optim.optimizer_step(policy, optimizer, lr, cfg.clip, batch)
                run.end_step(models, optimizer, max_steps, batch, norm, lr, keep=round_number == rounds)
            if round_number < rounds:
                run.next_round(models, optimizer)
        else:
            undone = watcher and watcher.after(rounds, policy)

        # 4) save
        if undone:
            optimizer.state, models = {}, {}
            policy = load(undo if undo.exists() else cfg.model, torch.float32, place, prepared(cfg))
        run.finish(policy)
    print0(f"saved {cfg.out} in {time.time() - begin:.1f} s")


if __name__ == "__main__":
    main(parse_config(Config))
