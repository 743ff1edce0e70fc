"""
The Arbiter: a reward model that reads a prompt and a completion and returns one number. Higher is better, and numbers
are compared only between completions of one prompt.

Ours is a Command transformer with a scalar head on every token of the completion; the reward is the mean of the head
over the completion, plus learned multiples of the mean and the smallest log-probability that its language-model head
gives to the completion's tokens. A head on the last token alone learns gross errors (wrong language, cut off) and stays
at chance on near misses; one wrong token in the middle is exactly what the smallest log-probability sees.

python reward.py --model out/mini/rm --rows completions.jsonl --out scored.jsonl     # adds "reward" to every row
python reward.py --model Skywork/Skywork-Reward-V2-Qwen3-0.6B --rows completions.jsonl --out scored.jsonl   # public ones
python reward.py --model out/mini/rm --rows pairs.jsonl --audit --out audit.json     # accuracy per language
"""

import dataclasses
import functools
import json
import math
import statistics
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

import common
from chat import Chat
from checkpoint import Checkpoint, find
from common import atomic_file, die, is_main, parse_config, print0
from config import Config as ModelConfig
from data import Example, encode_row, pad_batch, token_batches
from guards import GUARDS, REJECTED_GUARDS, flags
from languages import code_of
from model import Linear, Transformer, causal, fill, write_checkpoint
from rows import check_row, read_jsonl, read_rows, write_rows
from sharding import unsharded
from stats import wilson

ARCHITECTURE = "CohereForRewardModel"  # ours: transformers has no Cohere sequence classifier
CLASSIFIERS = [f"{name}ForSequenceClassification" for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2")]


@dataclass
class Config:
    model: str = "out/mini/rm"  # reward-model folder
    rows: str = "out/mini/completions.jsonl"  # completion rows to score, or preference rows with --audit
    out: str = "out/mini/scored.jsonl"  # the same rows with "reward"; with --audit the table as JSON
    audit: bool = False  # accuracy, mean and spread of rewards, and correlation with length, per language
    judge: str = ""  # --audit: a second reward model, whose agreement with the first is shown
    batch_tokens: int = 8192  # tokens per forward, padding included


class RewardModel(Transformer):
    """A Transformer (its own language-model head stays: it gives the log-probabilities) with a scalar head."""

    def __init__(self, cfg, response_token):
        super().__init__(cfg)
        self.response_token = response_token  # id of the assistant's role token: the completion follows its last one
        self.score = Linear(cfg.hidden_size, 1, bias=False)
        self.logp_weight = nn.Parameter(torch.ones(2))  # of the mean and of the smallest log-probability

    def completion_mask(self, ids, lengths):
        """(B, T) bool: True on the tokens of the last assistant turn, its end of turn included."""
        place = torch.arange(ids.shape[1], device=ids.device)
        header = torch.where(ids == self.response_token, place, -1)
        header = torch.where(place < lengths[:, None], header, -1).amax(1, keepdim=True)
        return (place > header) & (place < lengths[:, None])

    def forward(self, ids, lengths, with_logps=False, mask=None, doc_start=None):
        """
        ids (B, T) right-padded, lengths (B,) -> rewards (B,) fp32; with_logps also the completion's token log-probs
        (B, T - 1), 0 elsewhere, and its mask (B, T): what the language-model loss beside Bradley-Terry needs. Packed, as
        training does it: ids, mask and doc_start (1, T) from pack_batch, lengths of the documents -> one reward each.
        """
        hidden, segments = self.hidden(ids, doc_start=doc_start), lengths
        if mask is None:
            mask, segments = self.completion_mask(ids, lengths), torch.full_like(lengths, ids.shape[1])
        logps = self.selected_logps(hidden, ids, mask)  # (B, T - 1), 0 where not in the mask
        fold = lambda x, how: torch.segment_reduce(x.flatten(), how, lengths=segments)  # (B, T) -> one number a document
        count = fold(mask.float(), "sum").clamp(min=1)
        of_token = F.pad(logps, (1, 0))
        head = fold(self.score(hidden).squeeze(-1).float() * mask, "sum") / count
        reward = head + self.logp_weight[0] * fold(of_token, "sum") / count + self.logp_weight[1] * fold(of_token, "min")
        return (reward, logps, mask) if with_logps else reward

    def encode(self, chat, prompt, completion):
        """What the model reads of a conversation: up to the token that ends the answer."""
        return encode_row(chat, prompt, completion).ids


class Classifier(Transformer):
    """
    XForSequenceClassification with one label, as public reward models are: a linear head on one token of a whole
    conversation. It scores text under its own chat template.
    """

    has_head = False

    def __init__(self, cfg):
        super().__init__(dataclasses.replace(cfg, tie_word_embeddings=True))  # tied: no lm_head is made
        self.score = Linear(cfg.hidden_size, 1, bias=False)

    def encode(self, chat, prompt, completion):
        """What the model reads: the conversation, rendered and tokenised whole."""
        return chat.conversation_ids(prompt, completion)

    def forward(self, ids, lengths):
        """
        ids (B, T) right-padded, lengths (B,) -> rewards (B,) fp32. The head reads transformers' position: the last
        token that is not config.pad_token_id. Where pad is also what ends a turn, that is one token earlier than the
        end, and the model was trained so.
        """
        place = torch.arange(ids.shape[1], device=ids.device)
        read = place < lengths[:, None]
        if self.cfg.pad_token_id is not None:
            read = read & (ids != self.cfg.pad_token_id)
        last = torch.where(read, place, 0).amax(1)
        hidden = self.hidden(ids)[torch.arange(len(ids), device=ids.device), last]
        acc = torch.promote_types(hidden.dtype, torch.float32)
        return F.linear(hidden.to(acc), self.score.weight.to(acc)).squeeze(1)


def reward_model_of(path):
    """
    A folder that train_rm.py wrote -> (Checkpoint, Config, a function that makes a RewardModel); a folder or hub name of a
    transformers sequence classifier with one label -> the same of a Classifier. Anything else is refused by the name of its
    architecture. No weights are read.
    """
    stored = Checkpoint(find(path))
    where, architectures = stored.folder / "config.json", stored.architectures()
    if ARCHITECTURE in architectures:
        if "response_token_id" not in stored.config:
            die(f"{where} has no response_token_id, so no completion can be told from its prompt")
        make = lambda cfg: RewardModel(cfg, stored.config["response_token_id"])
    elif architectures and architectures[0] in CLASSIFIERS:
        labels = stored.config.get("id2label") or stored.config.get("num_labels") or 2  # transformers' order
        labels = len(labels) if isinstance(labels, (dict, list)) else labels
        if labels != 1:
            die(f"{where}: the classifier has {labels} labels; a reward model has one")
        make = Classifier
    else:
        die(f"{where}: architecture {', '.join(architectures) or None} is not a reward model that reward.py knows; "
            f"what is: {', '.join(CLASSIFIERS)} with one label, and {ARCHITECTURE} (from train_rm.py). Reward models "
            "with code of their own (ArmoRM, InternLM2, Eurus, PairRM, ...) are not run")
    return stored, ModelConfig.from_dict(stored.config, where), make


def load_reward_model(path, dtype=None, device=None):
    """What reward_model_of() knows, with its weights."""
    stored, cfg, make = reward_model_of(path)
    with torch.device("meta"):
        model = make(cfg)
    return fill(model, stored, dtype, device)


@functools.cache
def scorer(path, device):
    """A reward model and its Chat, loaded once in a process."""
    return load_reward_model(path, device=device), Chat(path)


def new_reward_model(path, dtype=None, device=None, wrap=None):
    """A reward model that starts from a causal checkpoint: its weights, and a head of zeros. Flags as model.load's."""
    stored, chat = causal(path), Chat(path)
    header = chat.prompt_ids("a")[-1]
    if header not in chat.control:
        die(f"{path}: an answer must begin behind a role token of its own, as in Aya's template, to be told from its "
            f"prompt; here it begins behind {chat.tokenizer.id_to_token(header)!r}")
    cfg = ModelConfig.from_dict(stored.config, stored.folder / "config.json")
    with torch.device("meta"):
        model = RewardModel(cfg, header)
    return fill(model, stored, dtype, device, wrap, fresh={"score.weight": 0.0, "logp_weight": 1.0})


def reward_config(model):
    """What write_checkpoint adds to config.json, so that load_reward_model knows the folder."""
    return {"architecture": ARCHITECTURE, "response_token_id": model.response_token}


def write_reward_model(folder, model, source):
    """The folder load_reward_model reads; call on all ranks, inside atomic_dir."""
    write_checkpoint(folder, model, source, **reward_config(model))


@torch.no_grad()
def score(model, chat, pairs, batch_tokens=8192):
    """
    [(prompt, completion)] -> list of rewards, in order; each (prompt, completion) is scored once and rows are batched
    by length. Split over the ranks.
    """
    device = next(model.parameters()).device
    unique = list(dict.fromkeys((json.dumps(p), c) for p, c in pairs))
    mine = [(key, model.encode(chat, json.loads(key[0]), key[1])) for key in unique[common.rank()::common.world()]]
    found = {}
    with unsharded(model):
        for batch in token_batches([len(ids) for _, ids in mine], batch_tokens):
            rows = [mine[i][1] for i in batch]
            ids, _ = pad_batch([Example(row, [False] * len(row)) for row in rows], chat.pad, device)
            rewards = model(ids, torch.tensor([len(row) for row in rows], device=device)).tolist()
            found |= {mine[i][0]: r for i, r in zip(batch, rewards)}
    found = dict(common.gather_list(list(found.items())))
    if broken := [c for (_, c), r in found.items() if not math.isfinite(r)]:
        die(f"the reward of {broken[0][:60]!r} is not a number: the reward model is damaged")
    return [found[json.dumps(p), c] for p, c in pairs]


def eligible(row, guards=GUARDS):
    """Has this completion row a reward, and does none of these guards flag it (row["flags"], or looked at now)?"""
    scored = row.get("reward") is not None and "failure" not in row
    return scored and not set(guards).intersection(row["flags"] if "flags" in row else flags(row))


def best_against_worst(rows, others=None, margin=0.0, guards=GUARDS, rejected_guards=REJECTED_GUARDS):
    """
    Completion rows of one prompt -> (best, worst) row, or None: the highest reward among those that pass `guards` against
    the lowest among those (of `others`, if they are given) that pass `rejected_guards`. A tie, or no more than `margin`,
    teaches noise, and so do texts that are the same.
    """
    best = [row for row in rows if eligible(row, guards)]
    worst = [row for row in (rows if others is None else others) if eligible(row, rejected_guards)]
    if not best or not worst:
        return None
    best, worst = max(best, key=lambda row: row["reward"]), min(worst, key=lambda row: row["reward"])
    same = best["completion"].strip() == worst["completion"].strip()
    return None if same or not best["reward"] - worst["reward"] > margin else (best, worst)


def preference_row(best, worst):
    """Two scored completion rows of one prompt -> a preference row with both rewards."""
    return {"id": best["id"], "language": best["language"], "prompt": best["prompt"],
            "chosen": best["completion"], "rejected": worst["completion"],
            "chosen_reward": best["reward"], "rejected_reward": worst["reward"]}


def read_audit(paths):
    """Preference rows of files whose languages may be written in other people's codes (M-RewardBench's: arb_Arab)."""
    rows = []
    for path in paths:
        for row, where in read_jsonl(path):
            if isinstance(row, dict):
                row = row | {"language": code_of(row.get("language")) or row.get("language")}
            check_row(row, "preferences", where)
            rows.append(row)
    return rows


def audit(rows, chosen, rejected, judge=None):
    """
    Preference rows and their rewards -> {language or "all": accuracy (ties half) with its 95 % interval, low and high;
    trusted: is it better than chance? mean and spread of the rewards; length_correlation, of reward and length in
    characters, within the pairs; n}. `judge`: (chosen, rejected) rewards of a second model; agreement is the share of
    pairs that both put in the same order.
    """
    table = {}
    for language in ["all", *dict.fromkeys(r["language"] for r in rows)]:
        at = [i for i, r in enumerate(rows) if language in ("all", r["language"])]
        rewards = [chosen[i] for i in at] + [rejected[i] for i in at]
        gaps = [chosen[i] - rejected[i] for i in at]
        longer = [len(rows[i]["chosen"]) - len(rows[i]["rejected"]) for i in at]
        # through the origin: which side of a pair comes first means nothing
        size = math.sqrt(sum(g * g for g in gaps) * sum(l * l for l in longer))
        accuracy = statistics.fmean((gap > 0) + 0.5 * (gap == 0) for gap in gaps)
        low, high = wilson(accuracy, len(at))
        table[language] = {
            "accuracy": accuracy, "low": low, "high": high, "trusted": low > 0.5, "mean": statistics.fmean(rewards),
            "spread": statistics.pstdev(rewards), "n": len(at),
            "length_correlation": sum(g * l for g, l in zip(gaps, longer)) / size if size else 0.0}
        if judge:
            sign = lambda x: (x > 0) - (x < 0)
            table[language]["agreement"] = statistics.fmean(
                sign(gap) == sign(judge[0][i] - judge[1][i]) for i, gap in zip(at, gaps))
    return table


def run_audit(rows, models, batch_tokens=8192):
    """audit() of preference rows by [(reward model, its Chat)], the Arbiter and perhaps a judge; prints the table."""
    both = []
    for model, chat in models:
        scores = score(model, chat, [(r["prompt"], r[side]) for side in ("chosen", "rejected") for r in rows], batch_tokens)
        both.append((scores[:len(rows)], scores[len(rows):]))
    table = audit(rows, *both[0], *both[1:])
    print0("language  accuracy  95 % interval   mean  spread  corr(length)  agreement      n")
    for language, t in table.items():
        agreement = f"{t['agreement']:.3f}" if "agreement" in t else "-"
        print0(f"{language:<9} {t['accuracy']:8.3f}  {t['low']:.3f} - {t['high']:.3f} {t['mean']:7.2f} {t['spread']:7.2f} "
               f"{t['length_correlation']:13.2f} {agreement:>10} {t['n']:6d}" + "  no better than chance" * (not t["trusted"]))
    return table


def main(cfg):
    device = common.init_distributed()
    model, chat = load_reward_model(cfg.model, device=device), Chat(cfg.model)
    rows = read_audit([cfg.rows]) if cfg.audit else read_rows(cfg.rows, "completions")
    if not cfg.audit:
        rewards = score(model, chat, [(r["prompt"], r["completion"]) for r in rows], cfg.batch_tokens)
        if is_main():
            write_rows(cfg.out, [row | {"reward": r} for row, r in zip(rows, rewards)])
        return print0(f"{len(rows)} rewards, mean {statistics.fmean(rewards):.3f} -> {cfg.out}")
    models = [(model, chat)] + ([(load_reward_model(cfg.judge, device=device), Chat(cfg.judge))] if cfg.judge else [])
    table = run_audit(rows, models, cfg.batch_tokens)
    if is_main():
        with atomic_file(cfg.out) as f:
            json.dump(table, f, ensure_ascii=False, indent=1)


if __name__ == "__main__":
    main(parse_config(Config))
