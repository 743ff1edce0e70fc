"""
A run's results as one page to look at: every stage, every language, every claim, and what the models really wrote.

The page is one HTML file with its CSS and SVG inside: no network, no script, readable on a phone, by day and night.
What results.json lacks is left out of the page.

python report.py --run out/mini     # reads results.json and eval/<stage>/samples_mini.jsonl, writes report.html
"""

import json
import math
from dataclasses import dataclass
from html import escape
from pathlib import Path

from common import atomic_file, die, parse_config
from data import CLUSTERS, LANGUAGES, SHARED, read_jsonl


@dataclass
class Config:
    run: str = "out/mini"  # folder of a run: results.json is read from it, report.html is written to it


RIGHT_TO_LEFT = ("ar", "fa", "he")
OPEN_FIRST = ("ar", "hi", "ja", "he", "de", "fa")  # languages whose samples are unfolded when the page loads
ABOUT = {"base": "pretraining stand-in", "teacher": "one cluster's specialist", "sft": "on the arbitrage data",
         "sft-single": "control: one teacher's data", "offline-dpo": "best/worst of the teachers",
         "online-1": "best/worst of its own", "online-2": "again"}


# ---------------------------------------------------------------------------------------------------------------------
# markup, numbers, names

class Html(str):
    """Markup that is safe as it stands. Every other string is text, and h() escapes it."""


def safe(text):
    """Text for a page: markup escaped, and control characters shown by their pictures."""
    return escape(str(text)).translate({c: 0x2400 + c for c in range(32) if chr(c) not in "\n\t"})


def h(tag, *children, **attributes):
    """h("p", "a < b", class_="x") -> <p class="x">a &lt; b</p>. Lists are flattened, a None is left out."""
    def inner(child):
        if isinstance(child, (list, tuple)):
            return "".join(map(inner, child))
        return "" if child is None else child if isinstance(child, Html) else safe(child)
    shown = [f' {k.rstrip("_").replace("_", "-")}="{safe(v)}"' for k, v in attributes.items() if v is not None]
    return Html(f"<{tag}{''.join(shown)}>{inner(children)}</{tag}>")


def number(tree, *path):
    """The finite number at tree[a][b][c], else None: what is missing, null or NaN is not drawn."""
    for key in path:
        try:
            tree = tree[key]
        except (KeyError, IndexError, TypeError):
            return None
    return tree if isinstance(tree, (int, float)) and math.isfinite(tree) else None


def win_rate(tree, *path):
    """The [mean, low, high] at a path, else None."""
    values = [number(tree, *path, i) for i in range(3)]
    return None if None in values else values


def percent(value, digits=1):
    return "–" if value is None else f"{100 * value:.{digits}f}%"


def plain(value, digits=2):
    return "–" if value is None else f"{value:.{digits}f}".replace("-", "−")


def duration(s):
    return "–" if s is None else f"{s:.0f} s" if s < 100 else f"{s / 60:.1f} min" if s < 6000 else f"{s / 3600:.1f} h"


def win_text(win):
    return [percent(win[0]), " ", h("small", f"{100 * win[1]:.1f}–{100 * win[2]:.1f}")] if win else "–"


def points(before, after):
    """The change in percentage points, green or red; None if either is missing."""
    change = None if None in (before, after) else round(100 * (after - before), 1)
    side = "good" if change and change > 0 else "bad" if change else None
    return None if change is None else [" ", h("small", f"{change:+.1f}".replace("-", "−"), class_=side)]


def name_of(code):
    return LANGUAGES.get(code, (code,))[0]


def colour_of(teacher):
    """A CSS colour for each cluster's teacher; teachers of other pools share the last one."""
    names, name = list(CLUSTERS), teacher.removeprefix("teacher-")
    return f"var(--t{names.index(name) if name in names else len(names)})"


def families(codes):
    """Languages by the teacher that owns them: [(title, colour or None, codes)]; nobody is left out."""
    groups = [("Shared", None, SHARED), ("Others", None, [c for c in codes if c not in LANGUAGES])]
    groups[1:1] = [(t.capitalize(), colour_of(t), [c for c in own if c not in SHARED]) for t, own in CLUSTERS.items()]
    return [(title, colour, here) for title, colour, own in groups if (here := [c for c in own if c in codes])]


# ---------------------------------------------------------------------------------------------------------------------
# charts: rows of label | SVG | value. Horizontal positions are percentages, so text keeps its size at every width

class Axis:
    """A horizontal scale from low to high with five ticks, the one in the middle strong if it means something."""

    def __init__(self, low=0.0, high=1.0, middle="grid", show=lambda v: percent(v, 0)):
        self.low, self.high, self.show = low, high, show
        self.ticks = {low + (high - low) * i / 4: middle if i == 2 else "grid" for i in range(5)}  # value: CSS class

    def x(self, value):
        return f"{100 * (min(max(value, self.low), self.high) - self.low) / (self.high - self.low):.2f}%"

    def line(self, a, b, class_, y="50%", y2=None, style=None):
        return h("line", x1=self.x(a), x2=self.x(b), y1=y, y2=y2 or y, class_=class_, style=style)

    def dot(self, value, class_, style=None):
        return h("circle", cx=self.x(value), cy="50%", r=5, class_=class_, style=style) if value is not None else None

    def bar(self, a, b, colour, class_=None):
        return h("rect", x=self.x(a), width=self.x(self.low + b - a), y="50%", height=14, transform="translate(0 -7)",
                 class_=class_, style=f"color:{colour}")

    def change(self, a, b):
        """A dumbbell from before to after, or as much of it as is known."""
        line = self.line(a, b, "rise" if b >= a else "fall") if None not in (a, b) else None
        return [line, self.dot(a, "before"), self.dot(b, "after")]

    def row(self, label, marks, value, note=None, say=None, height=26):
        """`say` is the drawing in words: its tooltip, and its name for who cannot see it."""
        say = f"{label}: {say or value}"
        grid = [self.line(t, t, class_, "0", "100%") for t, class_ in self.ticks.items()]
        return h("div", h("div", label, note and h("small", note), class_="label"),
                 h("svg", h("title", say), grid, marks, role="img", aria_label=say, height=height),
                 h("div", value, class_="value"), class_="row" if marks else "row empty")

    def ruler(self, title=None, colour=None):
        """The numbers of the ticks, and a heading for the rows below."""
        texts = [h("text", self.show(t), x=self.x(t), y=14) for t in self.ticks]
        return h("div", h("div", colour and h("i", style=f"background:{colour}"), title, class_="label"),
                 h("svg", texts, height=20, aria_hidden="true"), class_="row ruler")


def zoomed(values):
    """An axis up to 100 % that starts at a multiple of 20 % below the smallest value."""
    return Axis(low=min(0.8, math.floor(5 * min(values, default=0)) / 5))


def figure(title, caption, *parts):
    caption = h("figcaption", h("h3", title), h("p", caption))
    return h("figure", caption, h("div", parts), role="group", aria_label=title)


def by_family(axis, codes, row):
    """The rows of all languages, each family under its own ruler; two columns where there is room."""
    return h("div", [h("div", axis.ruler(title, colour), [row(c) for c in codes if c in own], class_="group")
                     for title, colour, own in families(codes)], class_="columns")


def key(*items):
    """A legend of (CSS class or colour of a mark, what it means)."""
    marks = [h("i", style=f"background:{m}") if m.startswith("var") else h("i", class_=m) for m, _ in items]
    return h("p", [h("span", mark, text) for mark, (_, text) in zip(marks, items)], class_="key")


def table(caption, head, rows):
    """The first cell of each row is its header. A cell (text, shade) is tinted by shade in [0, 1]."""
    def cell(c):
        return h("td", c[0], style=f"--shade:{60 * c[1]:.0f}%") if isinstance(c, tuple) else h("td", c)
    rows = [h("tr", h("th", row[0], scope="row"), [cell(c) for c in row[1:]]) for row in rows]
    head = h("tr", [h("th", c, scope="col") for c in head])
    return h("div", h("table", h("caption", caption), h("thead", head), h("tbody", rows)), class_="scroll",
             tabindex=0, role="region", aria_label=caption)


# ---------------------------------------------------------------------------------------------------------------------
# the parts of the page, top to bottom; None or empty where there is nothing to show

def headline(results, codes, base, sft, final):
    """Title, one sentence with the gain, and three numbers to remember."""
    first, last = (percent(number(s, "exact_match"), 0) for s in (base, final))
    scores = [f"{percent(number(s, 'exact_match'))} for {s['name']}" for s in (base, sft, final) if s]
    title = f"From {first} to {last} right, in {len(codes)} languages" if final else "The recipe, step by step"
    sentence = f"Exact match on held-out prompts: {', '.join(dict.fromkeys(scores))}."
    win, preset = win_rate(final, "win_rate", "sft"), results.get("preset", "mini")
    routed, best = (number(results, "arbitrage", "accuracy", k) for k in ("routed", "best_single"))
    tiles = [win and (percent(win[0]), ["of pairs won against SFT ", win_text(win)[2]]),
             routed and (percent(routed), f"of the routed answers are right; the best teacher's: {percent(best)}"),
             (duration(number(results, "seconds")), f"on {results.get('hardware', 'unnamed hardware')}")]
    return h("header", h("p", f"nanoaya, preset {preset}", class_="eyebrow"), h("h1", title),
             h("p", sentence, class_="lead") if final else None,
             h("p", h("b", "Toy results: a 1 M-parameter model."), " They show what each step of the recipe does, not "
               "how good Aya Expanse is.", class_="toy") if preset in ("mini", "smoke") else None,
             h("div", [h("p", h("b", big), h("small", small)) for big, small in filter(None, tiles)], class_="tiles"))


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


def duels(title, caption, named_wins):
    """Win rates [(label, [mean, low, high] or None)]: one half in the middle, as wide as the widest interval needs."""
    far = max([0.1] + [abs(v - 0.5) for _, win in named_wins if win for v in win])
    far = min(0.5, math.ceil(10 * far - 1e-9) / 10)
    axis, rows = Axis(0.5 - far, 0.5 + far, middle="mark"), []
    for label, win in named_wins:
        side = "better" if win and win[1] > 0.5 else "worse" if win and win[2] < 0.5 else "even"
        marks = win and [axis.line(win[1], win[2], f"interval {side}"), axis.dot(win[0], side)]
        say = "{:.3f}, 95 % interval from {:.3f} to {:.3f}".format(*win) if win else "not judged"
        rows.append(axis.row(label, marks, win_text(win), say=say, height=44))
    return figure(title, caption, axis.ruler(), rows) if any(win for _, win in named_wins) else None


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
    found = {f"round {r.get('round', '?')}": r for r in results.get("rounds") or []}
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


def quote(text, code, class_):
    """What a person or a model wrote: isolated from the text around it, its language and direction declared."""
    text = text[-1].get("content", "") if isinstance(text, list) and text else str(text)  # chat messages: the last one
    text = text if len(text) <= 300 else f"{text[:300]}… ({len(text)} characters)"
    return h("p", text or "(empty)", class_=class_, lang={"zh": "zh-Hans"}.get(code, code), dir="auto")


def samples_of(code, pairs, names):
    """Prompts of one language whose answers changed: two mended and one broken, or what there is of either."""
    kinds = {(False, True): [], (True, False): [], (True, True): [], (False, False): []}  # right before, right after
    for old, new in pairs:
        kinds[bool(old.get("correct")), bool(new.get("correct"))].append((old, new))
    mended, broken, both, neither = kinds.values()
    cards, right, wrong = [], h("b", "✓ right", class_="good"), h("b", "✗ wrong", class_="bad")
    for pair in (mended[:2] + broken[:1] + mended[2:] + broken[1:])[:3]:
        answers = [h("div", h("h4", name, " ", right if row.get("correct") else wrong),
                     quote(row.get("completion", ""), code, "text")) for name, row in zip(names, pair)]
        answers.append(h("div", h("h4", "reference"), quote(pair[1].get("reference", ""), code, "text")))
        cards.append(h("article", quote(pair[1].get("prompt", ""), code, "prompt"), h("div", answers, class_="answers"),
                       dir="rtl" if code in RIGHT_TO_LEFT else None))
    count = (f"{len(pairs)} prompts: {len(mended)} mended, {len(broken)} broken, {len(both)} right in both, "
             f"{len(neither)} in neither")
    return h("details", h("summary", h("b", name_of(code)), " ", h("small", count)),
             cards or h("p", "No answer changed sides."), open="" if code in OPEN_FIRST else None)


def side_by_side(samples, names):
    """The same prompts, answered by two stages."""
    old, new = ({(r["language"], r.get("id")): r for r in samples.get(name) or [] if r.get("language")} for name in names)
    both = [key for key in new if key in old and names[0] != names[1]]
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
    codes = [c for _, _, group in families(sorted(seen)) for c in group]
    wins = [(s["name"], win_rate(s, "win_rate", "sft")) for s in stages]
    sections = [  # title, lead, parts
        ("Step by step", None, trunk and h("div", staircase(stages, trunk), duels(
            "Win rate against SFT", "Judged with the reference, a tie is half a win.", wins), class_="pair")),
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
    body = [h("section", h("h2", title), lead and h("p", lead, class_="lead"), parts) for title, lead, parts in sections
            if (any(parts) if isinstance(parts, list) else parts)]
    footer = " · ".join(f"{field} {results[field]}" for field in ("commit", "hardware", "seed") if field in results)
    return "<!doctype html>\n" + h("html", h("head", HEAD, h("title", f"nanoaya: {results.get('preset', 'a')} run")), h(
        "body", headline(results, codes, base, sft, final), h("main", body), h("footer", footer)), lang="en")


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


# The policy forbids the page to load anything, whatever a completion may hold.
HEAD = Html("""<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>
:root{color-scheme:light dark;--bg:#faf9f6;--card:#fff;--ink:#1c1e24;--muted:#5b616e;--rule:#dedad0;--grid:#e8e5dd;
--accent:#4b3bc4;--good:#12703c;--bad:#b3261e;--t0:#2b7bba;--t1:#c2447f;--t2:#b8730a;--t3:#3d8c40;--t4:#7d7f87}
@media(prefers-color-scheme:dark){:root{--bg:#14151a;--card:#1c1e25;--ink:#eceae4;--muted:#a3a8b4;--rule:#353842;
--grid:#2b2e37;--accent:#a598ff;--good:#5fce8f;--bad:#ff8f86;--t0:#66b2ec;--t1:#ee86b4;--t2:#e6ac4c;--t3:#7cc47f}}
*{box-sizing:border-box}h1,h2,h3,h4,p,figure,ul{margin:0}
body{margin:0 auto;max-width:68rem;padding:2.5rem 1.25rem 3rem;background:var(--bg);color:var(--ink);line-height:1.5;
font-family:system-ui,"Segoe UI","Noto Sans","Noto Sans Arabic","Noto Sans Hebrew","Noto Sans Devanagari",sans-serif}
:lang(ja){font-family:"Hiragino Sans","Yu Gothic","Noto Sans CJK JP",sans-serif}
:lang(ko){font-family:"Apple SD Gothic Neo","Malgun Gothic","Noto Sans CJK KR",sans-serif}
:lang(zh-Hans){font-family:"PingFang SC","Microsoft YaHei","Noto Sans CJK SC",sans-serif}
:lang(zh-Hant){font-family:"PingFang TC","Microsoft JhengHei","Noto Sans CJK TC",sans-serif}
h1,h2{font-family:"Iowan Old Style","Palatino Linotype",Palatino,"Noto Serif",Georgia,serif;line-height:1.1;
text-wrap:balance}h1{font-size:clamp(2.1rem,6vw,3.6rem)}h2{font-size:1.7rem;margin-bottom:.6rem}h3{font-size:1rem}
h4{font-size:.75rem;color:var(--muted);font-weight:500}.lead{max-width:46rem;margin-bottom:1.4rem}
header .lead{font-size:1.15rem;margin:.9rem 0 1.2rem}
section,footer{margin-top:2.5rem;border-top:1px solid var(--rule);padding-top:1.8rem}
small,figcaption p,.key,footer,caption,.eyebrow{color:var(--muted);font-size:.8rem}.good{color:var(--good)}
.bad{color:var(--bad)}
.toy{border-left:4px solid var(--accent);background:var(--card);padding:.7rem 1rem;margin-bottom:1.5rem;
max-width:46rem}
figure+figure{margin-top:2rem}figcaption,.key{margin-bottom:.5rem}
.tiles,.pair,.trio,.answers{display:grid;gap:1.2rem 2.2rem;grid-template-columns:repeat(3,1fr)}
.tiles b{display:block;font-size:1.75rem;line-height:1.2}.pair{grid-template-columns:5fr 3fr}
.pair>figure,.trio>figure{display:grid;grid-template-rows:subgrid;grid-row:span 2;gap:0;margin:0}
.columns{columns:2;column-gap:3rem}.group{break-inside:avoid;padding-bottom:1rem}
.row{display:grid;grid-template-columns:9.6rem minmax(0,1fr) 5.2rem;gap:.9rem;align-items:center;font-size:.9rem;
line-height:1.2}.trio .row{grid-template-columns:4.6rem minmax(0,1fr) 4.8rem}.row svg{width:100%;overflow:visible}
.pair figure+figure .row{grid-template-columns:minmax(0,1fr) 5.2rem}.pair figure+figure .label{display:none}
.label{overflow-wrap:anywhere}.label small{display:block;font-size:.74rem}.value{white-space:nowrap}
svg[height="44"]+.value small{display:block}.value,.tiles b,table{font-variant-numeric:tabular-nums}
.ruler .label{font-size:.8rem;font-weight:600}
i{display:inline-block;width:.7rem;height:.7rem;border-radius:2px;margin-right:.4rem}
.key span{margin-right:1.1rem;white-space:nowrap}text{fill:var(--muted);font-size:11px;text-anchor:middle}
.trio text:nth-child(even){display:none}.grid{stroke:var(--grid)}.mark{stroke:var(--ink);stroke-dasharray:3 3}
.area{fill:var(--accent);opacity:.09}.trunk{stroke:var(--accent);stroke-width:3;stroke-linecap:round}
.branch{stroke-width:1.5;stroke-dasharray:2 3}.rise{stroke:var(--accent);stroke-width:3}
.fall{stroke:var(--bad);stroke-width:3}.interval{stroke-width:7;stroke-linecap:round;opacity:.45}
circle{stroke:var(--bg);stroke-width:2;fill:var(--accent)}.final{r:8px}
circle.before,circle.ring{fill:var(--bg);stroke:var(--muted)}circle.ring{stroke:var(--t2)}
rect[style]{fill:currentColor}.outline{stroke:currentColor;fill-opacity:.15}.better{stroke:var(--accent)}
.worse{stroke:var(--bad);fill:var(--bad)}.even{stroke:var(--muted);fill:var(--muted)}
circle.better,circle.worse,circle.even{stroke:var(--bg);r:4.5px}
i.before,i.after,i.ring{border-radius:50%;border:2px solid var(--muted)}
i.after{background:var(--accent);border-color:var(--accent)}i.ring{border-color:var(--t2)}
.claims{list-style:none;padding:0}
.claims li{display:grid;grid-template-columns:1.4rem 1fr auto;gap:.6rem;border-bottom:1px solid var(--grid);
padding:.45rem 0}details{border-top:1px solid var(--grid);padding:.6rem 0}summary{cursor:pointer}
article{background:var(--card);border:1px solid var(--grid);border-radius:8px;padding:.8rem 1rem;margin:.7rem 0}
.answers{gap:.8rem;margin-top:.5rem}article p{unicode-bidi:isolate;white-space:pre-wrap;overflow-wrap:anywhere}
.prompt{color:var(--muted)}.text{font-size:1.1rem}.scroll{overflow-x:auto;margin-top:1rem}
table{border-collapse:collapse;font-size:.85rem;width:100%}
th,td{padding:.35rem .45rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--grid)}th{font-weight:500}
th:first-child{text-align:left;position:sticky;left:0;background:var(--bg)}caption{text-align:left;padding:.4rem 0}
td[style]{background:color-mix(in srgb,var(--accent) var(--shade),transparent)}
@media(max-width:46rem){.tiles,.pair,.trio,.answers{grid-template-columns:1fr}.columns{columns:1}
.row,.columns .row,.trio .row,.pair figure+figure .row{grid-template-columns:6.6rem minmax(0,1fr) 5rem;gap:.6rem;
font-size:.85rem}.pair figure+figure .label{display:block}
.pair .label small,.pair .empty,text:nth-child(even){display:none}.claims li{grid-template-columns:1rem 1fr}
.claims li b+span+b{grid-column:2}}
</style>""")

if __name__ == "__main__":
    main(parse_config(Config))
