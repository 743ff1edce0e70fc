"""
What arbitrage did, as numbers: who answered what, which router would have been worth it, what the guards refused.

Routers are compared where all can be: on prompts that every teacher (of the language) answered, and that `fixed`, `single` and
`learned` were not fitted on. Reward means are only as good as the reward model; a judge, a second reward model, gives the win
rates if there is one. Without one the Arbiter judges its own choice, and the page says so.
"""

import numpy as np

from routers import ROUTERS, Picks, best_slot


def completed(table):
    """(P,) bool: every teacher that was asked anything in the prompt's language was asked this, and they are several."""
    asked, out = table.asked(), np.zeros(len(table.ids), bool)
    for language in dict.fromkeys(table.languages.tolist()):
        at = table.languages == language
        out[at] = (asked[at] == asked[at].any(0)).all(1)
    return out & (asked.sum(1) > 1)


def split(table, sample):
    """
    -> (fit, test), (P,) bool, of completed prompts: those of the sample and the others; if there are no others (they were
    sent to one teacher each), every second one of the sample to fit and the rest to test.
    """
    complete = completed(table)
    fit, test = complete & sample, complete & ~sample
    if not fit.any() or not test.any():
        place = np.arange(len(complete))
        for language in dict.fromkeys(table.languages.tolist()):
            at = np.flatnonzero(complete & (table.languages == language))
            place[at] = np.arange(len(at))
        fit, test = complete & (place % 2 == 0), complete & (place % 2 == 1)
    return fit, test


def interval(values):
    """(n,) -> [mean, low, high], a 95 % normal interval over prompts."""
    mean, width = float(values.mean()), 1.96 * float(values.std()) / np.sqrt(len(values))
    return [mean, mean - width, mean + width]


def shares(table, slots, rows):
    """{language: {teacher: share of the routed prompts}} of slots (P,) on the prompts `rows` (P,) bool."""
    out = {}
    for language in dict.fromkeys(table.languages.tolist()):
        of = slots[rows & (slots >= 0) & (table.languages == language)]
        if len(of):
            number = np.bincount(table.owner[of], minlength=len(table.teachers))
            out[language] = {table.teachers[t]: float(number[t] / len(of)) for t in np.flatnonzero(number)}
    return out


def costs(table, asked):
    """(P, S) bool of completions that are paid for -> (how many, their tokens or None if some are not known)"""
    tokens = table.tokens[asked]
    return int(asked.sum()), None if (tokens < 0).any() else int(tokens.sum())


def choices(table, picks, prompt_of):
    """
    {router or "teacher NAME": (slots, paid)}: (P,) the slot it keeps for each prompt, -1 for none, and (P, S) bool which
    completions it has to pay for.
    """
    languages, asked, found = table.languages.tolist(), table.asked(), {"reward": (best_slot(table), table.there)}
    for name in ROUTERS[1:]:
        teacher = picks.pick(name, table.ids, languages, asked, prompt_of)
        found[name] = best_slot(table, teacher), table.there & (table.owner == teacher[:, None])
    for t, name in enumerate(table.teachers):
        found[f"teacher {name}"] = best_slot(table, np.full(len(table.ids), t)), table.there & (table.owner == t)
    return found


def compare(table, picks, test, prompt_of):
    """Routers and single teachers on the prompts `test`: -> (report.json's "routers", the teacher they are held against)."""
    found, rows, baseline = choices(table, picks, prompt_of), np.arange(len(table.ids)), table.teachers[picks.single]
    judge = table.scores if np.isnan(table.judged).all() else table.judged
    of = lambda slots: np.where(slots >= 0, np.nan_to_num(judge[rows, slots], nan=-np.inf), -np.inf)  # no answer loses
    base, out = of(found[f"teacher {baseline}"][0]), {}
    for name, (slots, paid) in found.items():
        mine, routed = of(slots), test & (slots >= 0)
        completions, tokens = costs(table, paid & test[:, None])
        out[name] = {"reward": float(table.scores[rows, slots][routed].mean()) if routed.any() else None,
                     "win_rate": interval(((mine > base) + 0.5 * (mine == base))[test]), "routed": int(routed.sum()),
                     "completions": completions, "tokens": tokens, "share": shares(table, slots, test)}
    return out, baseline


def reward_spread(table):
    """{teacher: {language or "all": mean and spread of its rewards, n, quantiles of its advantage}}"""
    owner_advantage, out = table.advantage(), {}
    for t, teacher in enumerate(table.teachers):
        out[teacher] = {}
        for language in ["all", *dict.fromkeys(table.languages.tolist())]:
            rows = np.ones(len(table.ids), bool) if language == "all" else table.languages == language
            rewards = table.rewards[rows][:, table.owner == t]
            rewards, ahead = rewards[~np.isnan(rewards)], owner_advantage[rows, t]
            ahead = ahead[~np.isnan(ahead)]
            if len(rewards):
                out[teacher][language] = {
                    "mean": float(rewards.mean()), "spread": float(rewards.std()), "n": len(rewards),
                    "quantiles": np.quantile(ahead, [0.05, 0.25, 0.5, 0.75, 0.95]).tolist()}
    return out


def refused(counts):
    """{(teacher, language): Counter} -> {teacher: {language or "all": {"n", "dropped", guard: ...}}}"""
    out = {}
    for (teacher, language), count in counts.items():
        of = out.setdefault(teacher, {"all": {}})
        of[language] = dict(count)
        for key, n in count.items():
            of["all"][key] = of["all"].get(key, 0) + n
    return out


def summary(cfg, table, counts, picks, sample, chosen, paired, prompt_of):
    """
    report.json, but for what only the script knows (audit, time, who was given up). chosen (P,): the slots that the router
    kept, -1: none; paired (P,) bool.
    """
    guards, number = refused(counts), {}
    arbiter = "whoever gave the rewards in " + " ".join(cfg.completions) if cfg.completions else cfg.reward_model
    judged_by = arbiter if np.isnan(table.judged).all() else cfg.judge or "the judge_reward in these rows"
    for language in dict.fromkeys(table.languages.tolist()):
        at = table.languages == language
        number[language] = {"prompts": int(at.sum()), "routed": int((chosen[at] >= 0).sum()), "pairs": int(paired[at].sum())}
    teachers = {}
    for t, name in enumerate(table.teachers):
        completions, tokens = costs(table, table.there & (table.owner == t))
        teachers[name] = {"completions": completions, "failed": guards.get(name, {"all": {}})["all"].get("failed", 0),
                          "tokens": tokens}
    report = {"router": cfg.router, "pairs_from": "contrast" if cfg.contrast else "best_worst", "prompts": len(table.ids),
              "routed": int((chosen >= 0).sum()), "pairs": int(paired.sum()), "languages": number, "teachers": teachers,
              "arbiter": arbiter, "judge": "" if cfg.completions else cfg.judge, "guards": guards, "rewards": reward_spread(table),
              "unusable": sum(of["all"].get("dropped", 0) for of in guards.values()),
              "share": shares(table, chosen, np.ones(len(table.ids), bool))}
    fit, test = split(table, sample)
    if test.any() and not np.isnan(table.advantage()[fit]).all():
        picks = Picks(picks.teachers, picks.given, picks.seed)  # not those that were used: they may have seen `test`
        picks.fit(table, fit, prompt_of)
        report["routers"], baseline = compare(table, picks, test, prompt_of)
        report["compared"] = {"prompts": int(test.sum()), "fitted_on": int(fit.sum()), "baseline": baseline,
                              "judged_by": judged_by, "router_losses": picks.losses}
    return report


def samples_of(table, files, chosen, pair_of, each=3):
    """
    A few prompts of every language with all that was said to them, for the page: those where the pool disagrees most come
    first. pair_of(rows): (chosen, rejected) row or None.
    """
    spread = np.array([np.ptp(row[~np.isnan(row)]) if (~np.isnan(row)).any() else -1.0 for row in table.rewards])
    out = []
    for language in dict.fromkeys(table.languages.tolist()):
        at = np.flatnonzero((table.languages == language) & table.there.any(1))
        for p in at[np.argsort(-spread[at], kind="stable")][:each]:
            slots = np.flatnonzero(table.there[p]).tolist()
            rows = [files[table.file[p, s]][table.row[p, s]] for s in slots]
            pair = pair_of(rows)
            fields = ("teacher", "sample", "completion", "reward", "flags")
            out.append({"id": rows[0]["id"], "language": language, "prompt": rows[0]["prompt"],
                        "candidates": [{key: row.get(key) for key in fields} for row in rows],
                        "chosen": slots.index(chosen[p]) if chosen[p] >= 0 else None,
                        "rejected": next((i for i, row in enumerate(rows) if pair and row is pair[1]), None)})
    return out
