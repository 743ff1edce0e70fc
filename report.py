"""
A run's results as one page to look at: every stage, every language, every claim, and what the models really wrote.

The page is one HTML file with its CSS and SVG inside: no network, no script, readable on a phone, by day and night.
What results.json lacks is left out of the page.

python report.py --run out/mini     # reads results.json and eval/<stage>/samples_mini.jsonl, writes report.html
"""

import json
from dataclasses import dataclass
from pathlib import Path

from charts import (OPEN_FIRST, Axis, by_family, card, colour_of, document, duels, duration, figure, h, in_order, key,
                    name_of, number, percent, plain, points, quote, table, tiles, win_rate, win_text, zoomed)
from common import atomic_file, die, parse_config
from data import read_jsonl


@dataclass
class Config:
    run: str = "out/mini"  # folder of a run: results.json is read from it, report.html is written to it


ABOUT = {"base": "pretraining stand-in", "teacher": "one cluster's specialist", "sft": "on the arbitrage data",
         "sft-single": "control: one teacher's data", "offline-dpo": "best/worst of the teachers",
         "online-1": "best/worst of its own", "online-2": "again"}


# ---------------------------------------------------------------------------------------------------------------------
# the parts of the page, top to bottom; None or empty where there is nothing to show

def headline(results, codes, base, sft, final):
    """Title, one sentence with the gain, and three numbers to remember."""
    first, last = (percent(number(s, "exact_match"), 0) for s in (base, final))
    scores = [f"{percent(number(s, 'exact_match'))} for {s['name']}" for s in (base, sft, final) if s]
    languages = len({c.split("-")[0] for c in codes})
    title = f"From {first} to {last} right, in {languages} languages" if final else "The recipe, step by step"
    sentence = f"Exact match on held-out prompts: {', '.join(dict.fromkeys(scores))}."
    win, preset = win_rate(final, "win_rate", "sft"), results.get("preset", "mini")
    routed, best = (number(results, "arbitrage", "accuracy", k) for k in ("routed", "best_single"))
    numbers = [win and (percent(win[0]), ["of pairs won against SFT, 95 % interval ", win_text(win)[2]]),
               routed and (percent(routed), f"of the routed answers are right; the best teacher's: {percent(best)}"),
               (duration(number(results, "seconds")), f"on {results.get('hardware', 'unnamed hardware')}")]
    return h("header", h("p", f"nanoaya, preset {preset}", class_="eyebrow"), h("h1", title),
             h("p", sentence, class_="lead") if final else None,
             h("p", h("b", "Toy results: a 1 M-parameter model."), " They show what each step of the recipe does, not "
               "how good Aya Expanse is.", class_="toy") if preset in ("mini", "smoke") else None,
             tiles(*numbers))


def staircase(stages, trunk):
    """The trunk of the recipe steps from score to score; teachers and controls branch off it."""
    axis, at, rows = Axis(), None, []
    for stage in stages:
        name, score = stage["name"], number(stage, "exact_match")
        down = score if stage in trunk else at  # the trunk comes into this row at `at` and leaves it at `down`
        marks = [h("rect", width=axis.x(v), y=y, height="50%", class_="area")
                 for v, y in ((at, "0"), (down, "50%")) if v is not None]
        if at is not None:
            marks += [axis.line(at, at, "trunk", "0", "50%"), axis.line(at, down, "trunk")]
        if down is not None and stage is not trunk[-1]:
            marks.append(axis.line(down, down, "trunk", "50%", "100%"))
        if stage in trunk:
            marks.append(axis.dot(score, "final" if stage is trunk[-1] else "after"))
        elif score is not None:
            colour = colour_of(name) if name.startswith("teacher") else "var(--muted)"
            marks += [axis.line(at, score, "branch", style=f"stroke:{colour}") if at is not None else None,
                      axis.dot(score, "side", style=f"fill:{colour}")]
        rows.append(axis.row(name, marks, [percent(score), points(at, score) if stage in trunk else None],
                             ABOUT.get(name.split("-")[0] if name[:8] == "teacher-" else name), percent(score), 44))
        at = down
    return figure("Exact match", "On held-out prompts, mean over languages. The line is the model; teachers and a "
                  "control branch off it.", axis.ruler(), rows)


def claims(results):
    signs = {True: ("✓", "good", "holds"), False: ("✗", "bad", "does not hold")}
    items = [(c, *signs.get(c.get("holds"), ("?", None, "not known"))) for c in results.get("claims") or []]
    return items and h("ul", [h("li", h("b", sign, class_=side, role="img", aria_label=word), h("span", c.get("claim")),
                                h("b", c.get("value"))) for c, sign, side, word in items], class_="claims")


def accuracy(arbitrage):
    """How often the chosen answer is right, by way of choosing."""
    scores, axis, grey = arbitrage.get("accuracy") or {}, Axis(), "var(--muted)"
    single = scores.get("single") or {"best teacher": scores.get("best_single")}
    bars = [(f"{t} alone", number(single, t), None, colour_of(t), None) for t in single]
    bars += [("random", number(scores, "random"), "any teacher", grey, None),
             ("routed", number(scores, "routed"), "by the reward model", "var(--accent)", None),
             ("oracle", number(scores, "oracle"), "by the reference", grey, "outline")]
    rows = [axis.row(label, axis.bar(0, value, colour, class_), percent(value), note, height=36)
            for label, value, note, colour, class_ in bars if value is not None]
    return rows and figure("How often the chosen answer is right", "One answer per prompt; the rows differ in who "
                           "chooses the teacher.", axis.ruler(), rows)


def shares(arbitrage):
    share, axis = arbitrage.get("teacher_share") or {}, Axis()
    teachers = sorted({t for row in share.values() for t in row}, key=lambda t: (colour_of(t), t))

    def row(code):
        parts = [number(share, code, t) or 0 for t in teachers]
        bars = [axis.bar(sum(parts[:i]), sum(parts[:i + 1]), colour_of(t)) for i, t in enumerate(teachers)]
        say = ", ".join(f"{t} {percent(part, 0)}" for t, part in zip(teachers, parts))
        return axis.row(name_of(code), bars, percent(max(parts), 0), say=say)

    return teachers and figure("Whose answers were chosen", "Each teacher's share; the number is the largest one.",
                               key(*[(colour_of(t), t) for t in teachers]), by_family(axis, share, row))


def per_language(before, after):
    """A dumbbell for each language, from one stage to another."""
    codes = (after or {}).get("per_language") or {}
    scores = {c: [number(s, "per_language", c, "exact_match") for s in (before, after)] for c in codes}
    scores = {c: pair for c, pair in scores.items() if None not in pair}
    axis, order = zoomed([v for pair in scores.values() for v in pair]), sorted(scores, key=lambda c: -scores[c][1])
    up, down = (sum(sign * (b - a) > 1e-9 for a, b in scores.values()) for sign in (1, -1))
    return figure(f"Exact match, {before['name']} → {after['name']}",
                  f"{up} languages better, {down} worse, {len(scores) - up - down} the same.",
                  key(("before", before["name"]), ("after", after["name"])), by_family(axis, order, lambda c: axis.row(
                      name_of(c), axis.change(*scores[c]), [percent(scores[c][1], 0), points(*scores[c])],
                      say=" to ".join(map(percent, scores[c]))))) if scores and before is not after else None


def rounds(results):
    """Reward beside judged win rate: where the first rises and the second does not, the model hacks the reward."""
    found = {f"round {i}": r for i, r in enumerate(results.get("rounds") or [], 1)}
    fields = ("reward_before", "reward_after", "greedy", "best_of_k", "oracle", "pairs")
    values = {label: [number(r, field) for field in fields] for label, r in found.items()}
    rewards = [v for row in values.values() for v in row[:2] if v is not None] or [0]
    pad = 0.1 * (max(rewards) - min(rewards)) or 1
    scale = Axis(min(rewards) - pad, max(rewards) + pad, show=plain)
    axis = zoomed([v for row in values.values() for v in row[2:5] if v is not None])
    return found and h("div", [
        figure("Reward", "What a round optimises: mean score by the reward model, before and after.", scale.ruler(), [
            scale.row(label, scale.change(a, b), [plain(b), " ", h("small", "from ", plain(a))], None,
                      f"from {plain(a)} to {plain(b)}", 44) for label, (a, b, *_) in values.items()]),
        duels("Judged win rate against SFT", "What has to rise with it: the judge knows the reference.",
              [(label, win_rate(r, "win_rate_sft")) for label, r in found.items()]),
        figure("Best of K beside greedy", "What there is to learn: the reward model picks one of K samples.",
               axis.ruler(), [axis.row(
                   label, [axis.dot(oracle, "ring"), axis.change(greedy, best)], [percent(best), points(greedy, best)],
                   f"{plain(pairs, 0)} pairs", f"greedy {percent(greedy)}, best of K {percent(best)}, "
                   f"oracle {percent(oracle)}", 44) for label, (_, _, greedy, best, oracle, pairs) in values.items()],
               key(("before", "greedy"), ("after", "best of K"), ("ring", "oracle")))], class_="trio")


def samples_of(code, pairs, names):
    """Prompts of one language whose answers changed sides: two mended and one broken, or what there is of either."""
    def answered(*right):
        return [pair for pair in pairs if [bool(row.get("correct")) for row in pair] == list(right)]

    mended, broken, both, neither = [answered(*right) for right in ((0, 1), (1, 0), (1, 1), (0, 0))]
    cards, right, wrong = [], h("b", "✓ right", class_="good"), h("b", "✗ wrong", class_="bad")
    for pair in (mended[:2] + broken[:1] + mended[2:] + broken[1:])[:3]:
        answers = [h("div", h("h4", name, " ", right if row.get("correct") else wrong),
                     quote(row.get("completion", ""), code, "text")) for name, row in zip(names, pair)]
        answers.append(h("div", h("h4", "reference"), quote(pair[1].get("reference", ""), code, "text")))
        cards.append(card(pair[1].get("prompt", ""), code, answers))
    count = (f"{len(pairs)} prompts: {len(mended)} mended, {len(broken)} broken, {len(both)} right in both, "
             f"{len(neither)} in neither")
    return h("details", h("summary", h("b", name_of(code)), " ", h("small", count)),
             cards or h("p", "No answer changed sides."), open="" if code in OPEN_FIRST else None)


def side_by_side(samples, names):
    """The same prompts, answered by two stages."""
    old, new = ({(r.get("language"), r.get("id")): r for r in samples.get(name) or []} for name in names)
    both = [key for key in new if key in old and key[0] and names[0] != names[1]]
    codes = sorted({code for code, _ in both}, key=lambda c: ([*OPEN_FIRST, c].index(c), name_of(c)))
    return [samples_of(c, [(old[k], new[k]) for k in both if k[0] == c], names) for c in codes]


def costs(stages, total):
    """Seconds of each stage; what the stages do not account for is evaluation and loading."""
    spent = {s["name"]: seconds for s in stages if (seconds := number(s, "seconds")) is not None}
    if spent and total and total > sum(spent.values()):
        spent["everything else"] = total - sum(spent.values())
    axis = Axis(high=max([1, *spent.values()]), show=duration)
    rows = [axis.row(name, axis.bar(0, s, "var(--accent)"), duration(s)) for name, s in spent.items()]
    return rows and figure("Time per stage", f"Wall time; {duration(total)} in all.", axis.ruler(), rows)


def tables(stages, codes, final):
    columns = [s for s in stages if s.get("per_language")]
    head = ["stage", "exact match", "chrF++", "wins against SFT", "wins against best teacher", "reward", "time"]
    rows = [[s["name"], percent(number(s, "exact_match")), plain(number(s, "chrfpp"), 1),
             win_text(win_rate(s, "win_rate", "sft")), win_text(win_rate(s, "win_rate", "best_teacher")),
             plain(number(s, "reward")), duration(number(s, "seconds"))] for s in stages]
    scores = {c: [number(s, "per_language", c, "exact_match") for s in columns] for c in codes}
    wide = [[name_of(c), *[(percent(v, 0), v or 0) for v in scores[c]],
             plain(number(final, "per_language", c, "chrfpp"), 1),
             percent(number(final, "per_language", c, "win_rate_sft"), 0)] for c in codes]
    return [rows and table("Every stage", head, rows), columns and table(
        "Exact match of every stage in every language; of the last stage also chrF++ and wins against SFT",
        ["language", *[s["name"] for s in columns], "chrF++", "wins"], wide)]


# ---------------------------------------------------------------------------------------------------------------------
# the page

def render(results, samples):
    """The page as a string. results: results.json; samples: {stage: rows of its samples_mini.jsonl}."""
    stages = [s for s in results.get("stages") or [] if s.get("name")]
    scored = [s for s in stages if number(s, "exact_match") is not None]
    trunk = [s for s in scored if not s["name"].startswith(("teacher", "sft-"))]
    base, final, arbitrage = trunk[0] if trunk else None, trunk[-1] if trunk else None, results.get("arbitrage") or {}
    sft = next((s for s in trunk if s["name"] == "sft"), base)
    names = (sft["name"], final["name"]) if trunk else (None, None)
    seen = {c for s in stages for c in s.get("per_language") or {}} | set(arbitrage.get("teacher_share") or {})
    seen |= {row["language"] for rows in samples.values() for row in rows if row.get("language")}
    codes = in_order(seen)
    wins = [(s["name"], win_rate(s, "win_rate", "sft")) for s in stages]
    sections = [  # title, lead, parts
        ("Step by step", None, trunk and h("div", staircase(stages, trunk), duels(
            "Win rate against SFT", "A tie is half a win; the bars are 95 % intervals.", wins), class_="pair")),
        ("What was claimed", "The claims that this run was to test.", claims(results)),
        ("Arbitrage", "Each teacher knows its own languages best. A reward model reads all their answers to a prompt "
         "and keeps the best one, whoever wrote it.", [accuracy(arbitrage), shares(arbitrage)]),
        ("Every language", None, per_language(sft, final)),
        ("Online rounds", "The model samples, the reward model ranks, DPO trains. Where the reward rises and "
         "the judged win rate does not, the model has learned to please the reward model.", rounds(results)),
        ("What they wrote", f"Prompts that {names[0]} got wrong and {names[1]} right, and the other way round: the "
         "first two mended and the first one broken, not the best.", side_by_side(samples, names)),
        ("What it cost", None, costs(stages, number(results, "seconds"))),
        ("All numbers", None, tables(stages, codes, final))]
    footer = " · ".join(f"{field} {results[field]}" for field in ("commit", "hardware", "seed") if field in results)
    return document(f"nanoaya: {results.get('preset', 'a')} run", headline(results, codes, base, sft, final), sections,
                    footer)


def main(cfg):
    path = Path(cfg.run) / "results.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        die(f"{path} not found: python recipe.py writes it")
    except ValueError as e:
        die(f"{path} is not JSON ({e}): python recipe.py writes it anew")
    samples = {file.parent.name: [row for row, _ in read_jsonl(file)]
               for file in sorted(Path(cfg.run).glob("eval/[!.]*/samples_mini.jsonl"))}
    with atomic_file(path.with_name("report.html"), "wb") as f:
        f.write(render(results, samples).encode("utf-8", "replace"))  # a model may write half a surrogate pair
    print(f"wrote {path.with_name('report.html')}")


if __name__ == "__main__":
    main(parse_config(Config))
