"""
`merge.py --weights search`: the weights of a linear merge, chosen by what the merge can do in every language.

1. Every model alone is scored in every language: the table shows what an average over languages would hide.
2. Start: the better of uniform weights and of a softmax over the models' mean scores (LM-Cocktail, arXiv 2311.13534,
   with a temperature of one standard deviation of these means: ours).
3. Coordinate moves on the simplex: one weight up or down by 0.3, then 0.1, then 0.03, all scaled back to sum 1; a move
   that raises the objective is kept. Cohere searches the same space with CMA-ES (arXiv 2412.04144); this is its
   smallest version.
4. With --base: lambda in 0.25, 0.5, 0.75, 1.25 towards or past the merge (WiSE-FT, arXiv 2109.01903; WARP, 2406.16768).

The objective is the mean over languages + `--worst` times the worst language's change against uniform weights. A score
is the mean log-probability of a token of the rows' completions; or, with --reward_model, the mean reward of greedy
answers to the rows' prompts, which is compared between merges on the same prompts, never between languages. Choices are
made on --dev; what they are worth is read on --held_out, beside uniform weights and the best model alone. Memory: one
model and a few chunks (and the reward model), as every candidate is merged straight into the model's parameters.
"""

import math
import statistics
from dataclasses import dataclass

import torch

import merge_stream
from chat import Chat
from common import die, init_distributed
from data import drop_long, encode_row, pad_batch, read_rows, token_batches
from generate import complete
from model import load
from reward import load_reward_model
from reward import score as reward_score

STEPS = (0.3, 0.1, 0.03)  # of a weight, before it is scaled back
LAMBDAS = (0.25, 0.5, 0.75, 1.25)  # beside 1
BATCH_TOKENS = 8192  # of a forward, padding included
MAX_TOKENS = 4096  # longer rows are not scored, and counted


@dataclass
class Point:
    """One tried merge. weights (K,) sum to 1; scores: language -> score on --dev."""
    weights: tuple
    lam: float
    scores: dict
    worst: tuple = ("", 0.0)  # the language that lost most against uniform weights, and how much it gained (< 0: lost)
    objective: float = 0.0

    @property
    def mean(self):
        return statistics.fmean(self.scores.values())


@torch.no_grad()
def logp_scores(model, chat, rows):
    """SFT rows -> {language: mean log-probability of a trained token, in nats}."""
    examples = [encode_row(chat, r["prompt"], r["completion"]) for r in rows]
    kept, dropped = drop_long(examples, MAX_TOKENS, [r["language"] for r in rows])
    if dropped:
        print(f"not scored, longer than {MAX_TOKENS} tokens: {dropped}")
    device = next(model.parameters()).device
    total, tokens = dict.fromkeys((rows[i]["language"] for i in kept), 0.0), {}
    for batch in token_batches([len(examples[i].ids) for i in kept], BATCH_TOKENS):
        batch = [kept[i] for i in batch]
        ids, mask = pad_batch([examples[i] for i in batch], chat.pad, device)
        for i, logp in zip(batch, model.token_logps(ids, mask).sum(1).tolist()):
            language = rows[i]["language"]
            total[language] += logp
            tokens[language] = tokens.get(language, 0) + sum(examples[i].mask)
    return {language: total[language] / tokens[language] for language in sorted(total)}


def reward_scores(model, chat, rows, reward_model, reward_chat, max_new_tokens):
    """Prompt rows -> {language: mean reward of the greedy answers}."""
    done = complete(model, chat, rows, max_new_tokens)
    rewards, of = reward_score(reward_model, reward_chat, [(r["prompt"], r["completion"]) for r in done]), {}
    for row, reward in zip(done, rewards):
        of.setdefault(row["language"], []).append(reward)
    return {language: statistics.fmean(of[language]) for language in sorted(of)}


def softmax_of(scores):
    """Mean score of each of K models -> weights (K,): softmax(score / their standard deviation); uniform if equal."""
    spread = statistics.pstdev(scores)
    powers = [math.exp((s - max(scores)) / spread) if spread else 1.0 for s in scores]
    return tuple(p / sum(powers) for p in powers)


def moves(weights, step):
    """The neighbours of a point of the simplex: each weight up and down by step, never below 0, scaled back to sum 1."""
    for i in range(len(weights)):
        for by in (step, -step):
            w = [max(0.0, x + by * (i == j)) for j, x in enumerate(weights)]
            if sum(w) > 0:
                yield tuple(x / sum(w) for x in w)


def climb(start, evaluate, spent):
    """
    start: Point; evaluate(weights) -> Point; spent() -> may no further point be evaluated? Coordinate moves with
    falling steps, each accepted if it raises the objective, until none does. Returns the best Point.
    """
    best = start
    for step in STEPS:
        moved = True
        while moved:
            moved = False
            for i in range(2 * len(best.weights)):
                neighbours = list(moves(best.weights, step))
                if i >= len(neighbours) or spent():
                    break
                point = evaluate(neighbours[i])
                if point.objective > best.objective:
                    best, moved = point, True
    return best


def search(plan, cfg):
    """
    plan: merge_stream.Plan of a linear merge; cfg: merge.py's. Returns {"weights", "lam", "score", "parents", "tried",
    "held_out", ...}: what was chosen, and every point that was tried.
    """
    # 1) rows, model, scores
    kind = "prompts" if cfg.reward_model else "sft"
    dev, held_out = read_rows(cfg.dev, kind), read_rows(cfg.held_out, kind)
    for row, path in [(r, p) for rows, p in ((dev, cfg.dev), (held_out, cfg.held_out)) for r in rows]:
        if kind == "sft" and "completion" not in row:
            die(f"{path}: --weights search scores rows with a prompt and a completion; there is one without")
    if both := {str(r["prompt"]) for r in dev} & {str(r["prompt"]) for r in held_out}:
        die(f"{cfg.dev} and {cfg.held_out} share {len(both)} prompts, the first is {min(both)!r}: what has chosen cannot "
            "tell how good the choice is; split them")
    device, K = init_distributed(), len(plan.parents)
    model, chat = load(cfg.models[0], plan.dtype, device), Chat(cfg.models[0])
    parameters = {name: p.detach().view(-1) for name, p in model.named_parameters()}
    if cfg.reward_model:
        arbiter = load_reward_model(cfg.reward_model, device=device), Chat(cfg.reward_model)

    def sink(name, begin, chunk):
        if name in parameters:  # all but tables of RoPE, which some folders store and no model reads
            parameters[name][begin:begin + len(chunk)].copy_(chunk)

    def score(weights, lam, rows):
        plan.weights, plan.lam = [[w] for w in weights], lam
        merge_stream.merge(plan, sink, cfg.threads, with_stats=False)
        if cfg.reward_model:
            return reward_scores(model, chat, rows, *arbiter, cfg.max_new_tokens)
        return logp_scores(model, chat, rows)

    # 2) every model alone, then the two starts
    tried = {}

    def evaluate(weights, lam=1.0):
        key = tuple(round(w, 6) for w in weights), lam
        if key not in tried:
            point = tried[key] = Point(weights, lam, score(weights, lam, dev))
            even = next(iter(tried.values())).scores  # uniform weights are tried first
            language = min(even, key=lambda l: point.scores[l] - even[l])
            point.worst = language, point.scores[language] - even[language]
            point.objective = point.mean + cfg.worst * point.worst[1]
            print(f"tried {len(tried):3d} | weights {' '.join(f'{w:.3f}' for w in weights)} | lambda {lam:.2f} | mean "
                  f"{point.mean:.5f} | worst change {point.worst[1]:+.5f} {language} | objective {point.objective:.5f}",
                  flush=True)
        return tried[key]

    even = evaluate((1 / K,) * K)
    alone = [evaluate(tuple(float(i == j) for j in range(K))) for i in range(K)] if K > 1 else [even]
    print("\n" + score_table(plan.keys, [p.scores for p in alone]) + "\n")
    start = max(even, evaluate(softmax_of([p.mean for p in alone])), key=lambda p: p.objective)

    # 3) moves, and how far from the base
    climb(start, evaluate, lambda: len(tried) >= cfg.tries)
    best = max(tried.values(), key=lambda p: p.objective)
    if plan.base:
        for lam in LAMBDAS:
            evaluate(best.weights, lam)
        best = max(tried.values(), key=lambda p: p.objective)
    else:
        print("lambda stays 1: without --base there is nothing to go back to")

    # 4) what it is worth: rows that chose nothing
    parent = max(range(K), key=lambda i: alone[i].mean)
    shown = {"uniform": even, f"best model ({plan.keys[parent]})": alone[parent], "chosen": best}
    found = {name: score(p.weights, p.lam, held_out) for name, p in shown.items()}
    print("\nheld out:\n" + score_table(list(found), list(found.values())))
    change = {l: found["chosen"][l] - found["uniform"][l] for l in found["chosen"]}
    worst = min(change, key=change.get)
    print(f"chosen against uniform on held-out rows: mean {statistics.fmean(change.values()):+.5f}, worst language "
          f"{worst} {change[worst]:+.5f}\n")
    return {"weights": list(best.weights), "lam": best.lam,
            "score": "mean reward of greedy answers" if cfg.reward_model else "mean log-probability of a token, nats",
            "dev": cfg.dev, "dev_rows": len(dev), "held_out_file": cfg.held_out, "held_out_rows": len(held_out),
            "parents": {key: p.scores for key, p in zip(plan.keys, alone)}, "held_out": found,
            "tried": [{"weights": list(p.weights), "lam": p.lam, "mean": p.mean, "worst_language": p.worst[0],
                       "worst_change": p.worst[1], "objective": p.objective, "scores": p.scores}
                      for p in tried.values()]}


def score_table(names, scores):
    """Languages down, models across, the best of each row marked; last the mean over languages."""
    rows = [(language, [s[language] for s in scores]) for language in scores[0]]
    rows.append(("mean", [statistics.fmean(s.values()) for s in scores]))
    width = max(10, *map(len, names)) + 1
    lines = [f"{'language':<9}" + "".join(f"{name:>{width}} " for name in names)]
    for language, values in rows:
        lines.append(f"{language:<9}" + "".join(f"{v:>{width}.4f}{'*' if v == max(values) else ' '}" for v in values))
    return "\n".join(lines)
