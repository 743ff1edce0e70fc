"""
Watching a policy while it is trained on a reward: is it better, or has it found what the reward model overlooks?

The same prompts are answered before the first online round of train_dpo.py and behind each one:

    reward      mean over the greedy answers: what training climbs, so it says nothing by itself
    win_rate    a judge, a second reward model that training never sees, prefers the greedy answer to the SFT model's
    kl          KL(policy || SFT) of a whole completion, in nats: how far the policy has gone for it
    length, language, distinct_2, guard/NAME    what a policy that hacks a reward does first

Where the reward rises and the judge falls beyond noise, the reward model is being hacked (Gao et al. 2023,
https://arxiv.org/abs/2210.10760). What was measured lies in OUT/watch-N.json, with the answers: read them.

The SFT model and the judge are in memory only while they are asked.
"""

import contextlib
import dataclasses
import gc
import hashlib
import json
import random
import statistics

import torch

import reward
import stats
from chat import Chat
from checkpoint import find
from common import all_sum, atomic_file, barrier, die, gather_list, is_main, print0, rank, world
from data import Example, document_sums, pack_batch, read_rows, split_batch
from generate import generate, key_of
from guards import GUARDS, distinct_n, flags
from model import load
from run import files_fingerprint, prepared, weights_fingerprint
from sharding import unsharded

SHOWN = {"reward": "reward {:.2f} -> {:.2f}", "win_rate": "judge {:.1f} -> {:.1f} % of SFT",
         "length": "length {:.1f} -> {:.1f}", "kl": "KL to SFT {:.2f} -> {:.2f}",
         "language": "language {:.0f} -> {:.0f} %", "distinct_2": "distinct-2 {:.2f} -> {:.2f}"}
PERCENT = ("win_rate", "language")


# --- what is asked, and of whom ---

def pick(rows, number, seed):
    """`number` of the prompt rows, in order: languages take turns to give their last rows, `seed` says which begins."""
    left = {}
    for i, row in enumerate(rows):
        left.setdefault(row["language"], []).append(i)
    turns, taken = random.Random(seed).sample(sorted(left), len(left)), []
    while len(taken) < min(number, len(rows)):
        taken += [left[language].pop() for language in turns if left[language]]
    return [rows[i] for i in sorted(taken[:number])]


def check(cfg):
    """Refuses flags that do not go together."""
    if cfg.on_hacking not in ("warn", "stop", "ignore"):
        die(f"--on_hacking is warn, stop or ignore, got {cfg.on_hacking!r}")
    if cfg.judge and not cfg.watch:
        die("--judge reads the answers to watched prompts: give --watch more than 0")
    if cfg.on_hacking == "stop" and not cfg.judge:
        die("--on_hacking stop needs a --judge: the reward alone cannot say that it is hacked")


def watched(cfg, prompts, identity, wanted):
    """
    -> (the prompts to watch, what the run depends on for their sake). identity: digests of "model" and "reward model".
    """
    if not cfg.watch:
        return [], {}
    if cfg.watch_prompts:
        prompts = [row for row in read_rows(cfg.watch_prompts, "prompts") if wanted(row)]
    rows = pick(prompts, cfg.watch, cfg.seed)
    if not rows:
        die(f"{cfg.watch_prompts} holds no prompt of the languages asked for")
    digest, sft = hashlib.sha256(json.dumps(rows).encode()).hexdigest(), identity["model"]
    if cfg.sft and cfg.sft != cfg.model:
        sft = files_fingerprint(find(cfg.sft))
        if Chat(cfg.sft).tokenizer.get_vocab() != Chat(cfg.model).tokenizer.get_vocab():
            die(f"--sft {cfg.sft} has another tokenizer than --model {cfg.model}: their log-probs cannot be compared")
    judge = files_fingerprint(find(cfg.judge)) if cfg.judge else ""
    if judge == identity["reward model"]:
        die(f"--judge {cfg.judge} is the reward model that training climbs: it cannot judge it, give another one")
    return rows, {"watched prompts": digest, "SFT model": sft, "judge": judge}


def briefly(make, use):
    """use(make()), of a model that takes no memory before and behind it."""
    found = use(make())
    gc.collect()  # FSDP's hooks and parts point at each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found


# --- measuring ---

def answers(model, chat, rows, max_new_tokens, temperature=0.0, seed=0):
    """One answer to each prompt row -> lists of token ids, what ends the turn included, on every rank."""
    mine = range(rank(), len(rows), world())
    with unsharded(model):
        made = generate(model, [chat.prompt_ids(rows[i]["prompt"]) for i in mine], max_new_tokens, temperature,
                        seed=seed, stop_ids=chat.stop_ids, vocab_size=chat.vocab_size,
                        prompt_keys=[key_of(f"watch {rows[i]['id']}") for i in mine])  # not the draws of training
    found = dict(gather_list([(i, ids) for i, (ids,) in zip(mine, made)]))
    return [found[i] for i in range(len(rows))]


@torch.no_grad()
def sequence_logps(model, cfg, prompts, completions, device):
    """
    Lists of token ids -> (n,) float64: each completion's summed log-prob, by the packed forward that trains, in parts
    that depend on the lengths only: equal models give equal numbers, to the bit.
    """
    examples = [Example(p + c, [False] * len(p) + [True] * len(c)) for p, c in zip(prompts, completions)]
    found, lengths = torch.zeros(len(examples), dtype=torch.float64), [len(e.ids) for e in examples]
    # one code path: a model that is here briefly is not worth compiling, so the policy is not run compiled either
    with torch.compiler.set_stance("force_eager") if cfg.compile else contextlib.nullcontext():
        for micro in split_batch(lengths, range(len(examples)), world(), cfg.micro_batch_tokens,
                                 cfg.micro_batch_size)[rank()]:
            part = [examples[i] for i in micro]
            ids, mask, doc_start = pack_batch(part, device)
            logps = document_sums(model.token_logps(ids, mask, doc_start), part)
            found[micro] = logps.double().cpu()
    return all_sum(found)


def kl(log_ratios):
    """
    log pi(y) - log pi_sft(y) of samples y ~ pi, at temperature 1 and uncut -> (KL(pi || pi_sft), its standard error):
    the plain mean, which is unbiased and may come out below 0 where the KL is small. Of completions that end at
    --max_new_tokens at the latest.
    """
    return statistics.fmean(log_ratios), stderr(log_ratios)


def stderr(values):
    """Standard error of the mean; None of one value, which does not say."""
    return stats.stderr(values) if len(values) > 1 else None


def win(mine, theirs, my_text, their_text):
    """1 where the judge prefers my answer, 0 where it prefers theirs, half for equal rewards, or texts."""
    return 0.5 if mine == theirs or my_text == their_text else float(mine > theirs)


def summary(rows):
    """Watched rows -> {name: number}; win rates only where a judge was asked."""
    share = lambda *names: statistics.fmean(bool(set(names) & set(r["flags"])) for r in rows)
    mean_kl, kl_stderr = kl([r["log_ratio"] for r in rows])
    found = {"reward": statistics.fmean(r["reward"] for r in rows)}
    if "win" in rows[0]:
        wins = [r["win"] for r in rows]
        found |= {"win_rate": statistics.fmean(wins), "win_rate_stderr": stderr(wins)}
    return found | {"length": statistics.fmean(r["tokens"] for r in rows), "kl": mean_kl, "kl_stderr": kl_stderr,
                    "language": 1 - share("language", "script"),
                    "distinct_2": distinct_n([r["completion"] for r in rows], 2),
                    **{f"guard/{name}": share(name) for name in GUARDS}}


def hacking(before, after):
    """
    Did the mean reward rise from `before` to `after` (rows of the same prompts) while the judge's verdict on them fell
    by more than noise? Paired and one-sided, at 5 %: mean change of the win score + 1.645 standard errors < 0.
    """
    if "win" not in before[0] or len(before) < 2:
        return False
    change = [b["win"] - a["win"] for a, b in zip(before, after, strict=True)]
    rises = statistics.fmean(r["reward"] for r in after) > statistics.fmean(r["reward"] for r in before)
    return rises and statistics.fmean(change) + 1.645 * stderr(change) < 0


def line(before, after):
    """Two summaries -> `reward 1.23 -> 1.40 | ...`."""
    scale = lambda name: 100 if name in PERCENT else 1
    return " | ".join(text.format(before[name] * scale(name), after[name] * scale(name))
                      for name, text in SHOWN.items() if name in before)


class Watch:
    """The watched prompts of a run. `arbiter`: (reward model, its Chat), which train_dpo.py holds anyway."""

    def __init__(self, cfg, run, chat, rows, arbiter, device, place):
        self.cfg, self.run, self.chat, self.rows, self.arbiter = cfg, run, chat, rows, arbiter
        self.device, self.place = device, place

    def read(self, n, key=None):
        """What was measured behind round n (0: before the first), if it is there, and of the weights `key`."""
        found = None
        if is_main():  # one rank reads for all
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                kept = json.loads((self.run.folder / f"watch-{n}.json").read_text(encoding="utf-8"))
                if key in (None, kept["weights"]) and len(kept["rows"]) == len(self.rows):
                    found = kept["rows"]
        return gather_list([found] if is_main() else [])[0]

    def measure(self, n, policy):
        """The rows of watch-N.json; what an earlier life of the run has measured is not measured again."""
        cfg, chat, run = self.cfg, self.chat, self.run
        weights = weights_fingerprint(policy) if n else run.identity["model"]
        if rows := self.read(n, weights):
            return rows
        first = n and (self.read(0) or self.lost(0))  # holds the SFT model's answers
        prompts = [chat.prompt_ids(row["prompt"]) for row in self.rows]
        greedy = answers(policy, chat, self.rows, cfg.max_new_tokens)
        sampled = answers(policy, chat, self.rows, cfg.max_new_tokens, 1.0, cfg.seed)
        logps = lambda model: sequence_logps(model, cfg, prompts, sampled, self.device)
        own, is_sft = logps(policy), not n and run.identity["SFT model"] == run.identity["model"]

        def ask_sft(model):
            return logps(model), cfg.judge and not first and answers(model, chat, self.rows, cfg.max_new_tokens)

        shard = prepared(dataclasses.replace(cfg, compile=False))  # as the policy is: the same numbers
        theirs, sft = (own, greedy) if is_sft else briefly(
            lambda: load(cfg.sft or cfg.model, torch.float32, self.place, shard).requires_grad_(False), ask_sft)
        if not (own - theirs).isfinite().all():
            die(f"a log-prob of a watched answer is not a number: check the checkpoints {cfg.model} and {cfg.sft}")
        rows = [{k: row[k] for k in ("id", "language", "prompt")} | {
            "completion": chat.decode(ids), "ended": ids[-1] in chat.stop_ids, "tokens": len(ids), "log_ratio": ratio}
            for row, ids, ratio in zip(self.rows, greedy, (own - theirs).tolist(), strict=True)]
        asked = lambda rows, name="completion": [(row["prompt"], row[name]) for row in rows]
        rewards = reward.score(*self.arbiter, asked(rows))
        rows = [row | {"flags": flags(row), "reward": r} for row, r in zip(rows, rewards)]
        if cfg.judge:
            known = first or [row | {"sft": chat.decode(ids)} for row, ids in zip(rows, sft)]
            pairs = asked(rows) + ([] if first else asked(known, "sft"))
            said = briefly(lambda: reward.load_reward_model(cfg.judge, device=self.device),
                           lambda judge: reward.score(judge, Chat(cfg.judge), pairs))
            theirs = [row["sft_judge"] for row in first] if first else said[len(rows):]
            rows = [row | {"sft": k["sft"], "judge": mine, "sft_judge": their,
                           "win": win(mine, their, row["completion"], k["sft"])}
                    for row, k, mine, their in zip(rows, known, said, theirs)]
        if is_main():
            with atomic_file(run.folder / f"watch-{n}.json") as f:
                json.dump({"weights": weights, "rows": rows}, f, ensure_ascii=False, indent=1)
        barrier()
        return rows

    def lost(self, n):
        die(f"{self.run.folder / f'watch-{n}.json'} is missing or damaged, and the weights that it was measured with "
            "are gone: put it back, or start over with --resume never")

    def after(self, n, policy):
        """Behind round n: measures, logs, warns. Is the run to stop here, with the round undone?"""
        before = n and (self.read(n - 1) or self.lost(n - 1))
        rows = self.measure(n, policy)
        if not n:
            return False
        hacked = ["over this round"] if hacking(before, rows) else []
        if n > 1 and hacking(self.read(0) or self.lost(0), rows):
            hacked.append("since the start")
        a, b = summary(before), summary(rows)
        self.run.log.write({"round": n, "watch": {name: [a[name], b[name]] for name in b}, "hacking": hacked})
        print0(f"round {n} | {line(a, b)}")
        if not hacked or self.cfg.on_hacking == "ignore":
            return False
        stop = self.cfg.on_hacking == "stop"
        print0(f"reward hacking: {' and '.join(hacked)} the reward rose while the judge's win rate fell by more than "
               f"noise; compare the answers in watch-{n - 1}.json and watch-{n}.json"
               + (f". --on_hacking stop: round {n} is undone, {self.cfg.out} holds the policy before it" if stop else ""))
        return stop
