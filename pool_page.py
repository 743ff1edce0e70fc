"""
Arbitrage as one page to look at: who answers what, whether the Arbiter can be trusted with it, and what it costs.

arbitrage.py writes it as report.html, beside the report.json that holds the same numbers. One HTML file, no network, no
script (charts.py); whatever the report lacks is left out of the page.
"""

from charts import (OPEN_FIRST, Axis, branch, by_family, card, colour_of, count, document, duels, duration, figure, h,
                    in_order, listed, name, name_of, number, percent, plain, quote, table, text_of, tiles, win_rate,
                    win_text)

ROUTERS = {  # router: who chooses (the title), in a few words (a chart), in a sentence
    "reward": ("the Arbiter chooses", "all answer, best kept",
               "All teachers answer, and the answer with the highest reward is kept."),
    "fixed": ("the language chooses", "best of each language",
              "One teacher per language: the one with the highest mean reward on a few prompts that all answer."),
    "learned": ("a small model chooses", "guessed from the prompt",
                "A small model reads the prompt and names the teacher; no other one has to answer."),
    "random": ("chance chooses", "drawn by lot", "One teacher per prompt, drawn by lot."),
    "single": ("the best one stays", "one for everything",
               "One teacher for everything: the one with the highest mean reward."),
    "oracle": ("the oracle chooses", "an upper bound", "The best answer that the pool had to give: an upper bound.")}
PAIRS = {"best_worst": "the best answer of the pool against the worst",
         "contrast": "the answers of one teacher against those of another",
         "translation": "the chosen answer against a translation"}
GUARDS = {"truncated": "cut off", "empty": "empty", "language": "wrong language", "script": "wrong script",
          "repeated": "in a loop", "copied": "copies the prompt", "role_tokens": "chat tokens",  # guards.py
          "failed": "no answer"}
SAMPLES, ANSWERS = 3, 6  # most of a language's prompts, and of a prompt's answers, that are shown


# ---------------------------------------------------------------------------------------------------------------------
# what is in a report

def teachers_of(report):
    """The pool, in the order it was given; then who is only met further down."""
    found = list(branch(report, "teachers"))
    found += [t for part in ("rewards", "guards") for t in branch(report, part)]
    given = [branch(report, "share"), *[branch(report, "routers", r, "share") for r in branch(report, "routers")]]
    found += [t for share in given for language in share for t in branch(share, language)]
    return list(dict.fromkeys(found))


def languages_of(tree, *path):
    """The languages among the keys at a path, in order; "all" is none."""
    return in_order(code for code in branch(tree, *path) if code != "all")


def is_alone(router):
    """Is it one teacher for everything, rather than a way to choose?"""
    return router.startswith("teacher ")


def judge_of(report):
    """-> (who judged the routers, or None; is it the Arbiter, which judges its own choice?)"""
    judge = text_of(branch(report, "compared"), "judged_by") or text_of(report, "judge")
    return judge, bool(judge) and judge.rstrip("/") == (text_of(report, "arbiter") or "").rstrip("/")


def label_of(router, report):
    if is_alone(router):
        return f"{router.removeprefix('teacher ')} alone"
    return f"{router} (used)" if router == text_of(report, "router") else router


# ---------------------------------------------------------------------------------------------------------------------
# the parts of the page, top to bottom; None or empty where there is nothing to show

def headline(report):
    """Title, what happened in words, three numbers to remember, and the teachers that were given up."""
    router, teachers = text_of(report, "router"), teachers_of(report)
    who, _, how = ROUTERS.get(router, (f"router {router}" if router else None, "", None))
    spoken = len({c.split("-")[0] for c in languages_of(report, "languages")})  # Chinese is one, in two scripts
    title = [count(len(teachers), "teacher") if teachers else "A pool of teachers",
             f", {count(spoken, 'language')}" if spoken else None, f": {who}" if who else None]
    prompts, routed, pairs, twice = (number(report, k) for k in ("prompts", "routed", "pairs", "duplicates"))
    kind = PAIRS.get(text_of(report, "pairs_from"))
    words = [[count(prompts, "prompt"), f", {count(twice, 'duplicate')} left out" if twice else None, ". "]
             if prompts is not None else None,
             f"{how} " if how else None,
             f"{count(pairs, 'pair')} to learn preferences from{f': {kind}' if kind else ''}." if pairs is not None
             else None]
    win, baseline = win_rate(report, "routers", router, "win_rate"), text_of(branch(report, "compared"), "baseline")
    numbers = [prompts and routed is not None and (
                   count(routed), f"of {count(prompts, 'prompt')} got an answer that could be used"),
               win and (percent(win[0]), ["win rate against ", name(baseline or "the best single teacher"),
                                          ", 95 % interval ", win_text(win)[2],
                                          "; judged by the Arbiter itself" if judge_of(report)[1] else None]),
               pairs is not None and (count(pairs), "preference pairs")]
    given_up = [(t, why) for t in teachers if (why := text_of(branch(report, "teachers", t), "stopped"))]
    return h("header", h("p", "nanoaya, arbitrage", class_="eyebrow"), h("h1", title),
             h("p", words, class_="lead"),
             [h("p", h("b", "Given up: "), name(t), "; answers kept: ",
                count(number(report, "teachers", t, "completions")), ". Why: ", name(why), class_="toy")
              for t, why in given_up],
             tiles(*numbers))


def audit(report):
    """How often the Arbiter is right where that is known, and where it is trusted although it should not be."""
    found = branch(report, "audit")
    rates = {c: win_rate([number(found, c, k) for k in ("accuracy", "low", "high")]) for c in found}
    forced = report["forced"] if isinstance(report.get("forced"), list) else []
    forced = [c for c in forced if isinstance(c, str)]
    trusted = {c: {True: "yes", False: "no" + ", but routed" * (c in forced)}.get(number(found, c, "trusted"), "–")
               for c in found}
    doubted = [c for c in languages_of(found) if trusted[c][:2] == "no"]
    axis = Axis(middle="mark")

    def row(c):
        note = "not trusted" + ", routed all the same" * (c in forced) if c in doubted else None
        return axis.duel(name_of(c), rates[c], percent(number(found, c, "accuracy"), 0), note, 26)

    shown = in_order(c for c in rates if c != "all" and rates[c])
    everything = rates.get("all") and axis.duel("All languages", rates["all"], height=44)
    link = {c: v for c in languages_of(found) if (v := number(found, c, "length_correlation")) is not None}
    longest = max(link, key=lambda c: abs(link[c]), default=None)
    notes = [doubted and ["Not surely better than a coin, so not trusted: ", ", ".join(map(name_of, doubted)), ". "],
             forced and ["Routed by its rewards all the same: ", ", ".join(map(name_of, forced)), ". "],
             link and f"Reward and the length of the answer go together most in {name_of(longest)} (correlation "
             f"{plain(link[longest])}): near 1 the Arbiter pays for length, near −1 for brevity."]
    head = ["language", "right", "95 % interval", "pairs", "trusted", "mean reward", "spread", "with length"]
    judged = any(number(found, c, "agreement") is not None for c in found)
    rows = [[name_of(c) if c != "all" else "all languages", percent(number(found, c, "accuracy")),
             win_text(rates[c])[2] if rates[c] else "–", count(number(found, c, "n")),
             trusted[c], *[plain(number(found, c, k)) for k in ("mean", "spread", "length_correlation")],
             *[percent(number(found, c, "agreement"))] * judged]
            for c in (["all"] if "all" in found else []) + languages_of(found)]
    return [h("p", [n for n in notes if n], class_="lead") if any(notes) else None,
            (shown or everything) and figure(
                "How often the Arbiter is right", "Pairs of answers of which the better one is known; the line in the "
                "middle is a coin, 50 %, and the bars are 95 % intervals.",
                everything and h("div", axis.ruler(), everything), by_family(axis, shown, row) if shown else None),
            rows and table("With length: correlation of reward and length of the answer." + (
                " Agreement: how often the second judge prefers the same answer." * judged),
                head + ["agreement"] * judged, rows)]


def heat(caption, share, teachers):
    """Languages down, teachers across; the darker, the larger a share."""
    share = {c: row for c, row in share.items() if isinstance(row, dict)}
    chosen = [t for t in teachers if any(number(row, t) for row in share.values())]
    never = [t for t in teachers if t not in chosen]
    mean = {t: sum(number(row, t) or 0 for row in share.values()) / len(share) for t in chosen}

    def cells(row):
        return [(percent(value, 0), value) if (value := number(row, t)) else "·" for t in chosen]

    rows = [[name_of(c), *cells(share[c])] for c in in_order(share)] + [["mean", *cells(mean)]]
    return chosen and [h("div", table(caption, ["language", *chosen], rows), class_="heat"),
                       never and h("p", h("small", "Never chosen: ", listed(map(name, never)), "."))]


def shares(report):
    """The routing that was used; folded away, what the other routers would have done."""
    teachers, used = teachers_of(report), text_of(report, "router")
    caption = "Of the prompts in a language, the share that each teacher answers; a dot is none."
    tables = {r: heat(caption, branch(report, "routers", r, "share"), teachers) for r in branch(report, "routers")
              if r == used or not is_alone(r)}
    compared = tables.pop(used, None)  # on fewer prompts than were routed
    about = {r: h("small", ROUTERS[r][2]) for r in ROUTERS}
    return [heat(caption, branch(report, "share"), teachers) or compared,
            [h("details", h("summary", "Router ", h("b", r), " ", about.get(r)), part)
             for r, part in tables.items() if part]]


def comparison(report):
    """Every router's quality beside what it costs, from the cheapest to the dearest."""
    routers, compared = branch(report, "routers"), branch(report, "compared")
    wins, cost = ({r: f(routers, r, k) for r in routers} for f, k in ((win_rate, "win_rate"), (number, "completions")))
    far = float("inf")
    order = sorted(routers, key=lambda r: (cost[r] if cost[r] is not None else far, wins[r][0] if wins[r] else 0))
    ways, alone = [r for r in order if not is_alone(r)], [r for r in order if is_alone(r)]
    baseline = text_of(compared, "baseline") or "the best single teacher"
    axis = Axis(high=max([1] + [c for c in cost.values() if c is not None]), show=short)
    judge, own = judge_of(report)
    prompts, fitted = count(number(compared, "prompts"), "prompt"), number(compared, "fitted_on")
    held_out = True if fitted else number(compared, "held_out")
    words = [prompts != "–" and [f"Compared on {prompts}", {
                 True: f"; fixed, single and learned were fitted on {count(fitted) + ' ' if fitted else ''}others. ",
                 False: ", some of which fixed, single and learned were fitted on: that flatters them. "}.get(
                     held_out, ". ")],
             judge and ["The judge is ", name(judge), ". " if not own else [
                 ", the Arbiter itself. ", h("b", "So the win rate of the router reward is biased by construction"),
                 ": it keeps the answers that this judge likes best, whether or not they are better. Only a second "
                 "reward model or people can say by how much. "]]]
    label = lambda r: label_of(r, report)
    rows = [[label(r), plain(number(routers, r, "reward"), 3), win_text(wins[r]), count(cost[r]),
             count(number(routers, r, "tokens")), count(number(routers, r, "routed"))] for r in order]
    costs = [axis.row(label(r), None if cost[r] is None else axis.bar(0, cost[r], "var(--accent)"), count(cost[r]),
                      height=44) for r in ways]
    return rows and [
        h("p", [w for w in words if w], class_="lead") if any(words) else None,
        h("div", duels(f"Win rate against {baseline}", "A tie is half a win; the bars are 95 % intervals. Rows go from "
                       "the cheapest router to the dearest.",
                       [(label(r), wins[r], ROUTERS[r][1] if r in ROUTERS else None) for r in ways]),
          figure("Cost", "Completions that had to be paid for.", axis.ruler(), costs)
          if any(cost[r] is not None for r in ways) else None, class_="pair"),
        h("details", h("summary", h("b", "One teacher for everything"), " ", h("small", "each teacher alone")),
          duels(f"Win rate against {baseline}", "The same prompts, all answered by one teacher.",
                [(label(r), wins[r]) for r in alone])) if any(wins[r] for r in alone) else None,
        table("Every router: mean reward and win rate of its answers, and what they cost in completions and tokens",
              ["router", "reward", "win rate", "completions", "tokens", "prompts answered"], rows)]


def short(value):
    """The number of a tick: 4,392 -> "4.4k"."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def five(tree, *path):
    """The five quantiles at a path, else None."""
    values = [number(tree, *path, "quantiles", i) for i in range(5)]
    return None if None in values else values


def rewards(report):
    """Boxes: how far each teacher's answers are above or below the pool's on the same prompt."""
    found = branch(report, "rewards")
    boxes = {t: q for t in teachers_of(report) if (q := five(found, t, "all"))}
    far = max((abs(v) for q in boxes.values() for v in q), default=0) or 1
    axis, rows = Axis(-far, far, middle="mark", show=lambda v: plain(v, 1)), []
    for t, q in sorted(boxes.items(), key=lambda item: -item[1][2]):
        marks = [axis.line(q[0], q[4], "whisker"),
                 axis.bar(q[1], q[3], colour_of(t)), axis.dot(q[2], "even")]
        rows.append(axis.row(t, marks, plain(q[2]), None, "5, 25, 50, 75 and 95 % of the answers are below "
                             + ", ".join(map(plain, q)), 44))
    codes = in_order({c for t in found for c in languages_of(found, t)})
    teachers = [t for t in teachers_of(report) if t in found]

    def median(t, c):
        q = five(found, t, c)
        return (plain(q[2]), q[2] / far) if q else "–"

    numbers = [[t, plain(number(found, t, "all", "mean"), 3), plain(number(found, t, "all", "spread"), 3),
                count(number(found, t, "all", "n"))] for t in teachers]
    return numbers and [
        rows and figure("Above or below the pool", "An answer's reward minus the mean reward of the pool on the same "
                        "prompt. The dot is the median; half of the answers lie in the box, nine in ten on the line.",
                        axis.ruler(), rows),
        table("Every teacher's rewards, before the pool's mean is taken off", ["teacher", "mean", "spread", "answers"],
              numbers),
        codes and h("details", h("summary", h("b", "Every language")), h("div", table(
            "Median of the reward minus the pool's mean; the darker, the further above it", ["language", *teachers],
            [[name_of(c), *[median(t, c) for t in teachers]] for c in codes]), class_="heat"))]


def guards(report):
    """What was dropped before any reward was looked at."""
    found = branch(report, "guards")
    kinds = {k for t in found for c in branch(found, t) for k in branch(found, t, c)} - {"n", "dropped"}
    kinds = [k for k in GUARDS if k in kinds] + sorted(kinds - set(GUARDS))
    teachers = [t for t in teachers_of(report) if t in found]

    def add(kind, cells):
        """A field summed over (teacher, language)s; a guard not named where answers were counted stopped none."""
        values = [v for t, c in cells if (v := number(found, t, c, kind)) is not None]
        return sum(values) if values or kind != "n" and add("n", cells) else None

    def cell(cells, kind):
        value, of = add(kind, cells), add("n", cells)
        share = value / of if value and of else 0
        return ([count(value), " ", h("small", percent(share))] if share else count(value), share)

    codes = in_order({c for t in found for c in languages_of(found, t)})
    parts = {t: [(t, "all")] if "all" in branch(found, t) else [(t, c) for c in codes] for t in teachers}
    head = ["answers", "dropped", *[GUARDS.get(k, k) for k in kinds]]

    def row(label, cells):
        return [label, count(add("n", cells)), cell(cells, "dropped"), *[cell(cells, k) for k in kinds]]

    return teachers and [
        table("Answers that each guard stops; one answer can fail several", ["teacher", *head],
              [row(t, parts[t]) for t in teachers]),
        codes and h("details", h("summary", h("b", "Every language")),
                    table("Answers that each guard stops, all teachers together", ["language", *head],
                          [row(name_of(c), [(t, c) for t in teachers]) for c in codes]),
                    h("div", table("Dropped answers of each teacher", ["language", *teachers], [
                        [name_of(c), *[cell([(t, c)], "dropped") for t in teachers]] for c in codes]), class_="heat"))]


def answer(candidate, code, role):
    """One teacher's answer: what became of it, its reward, what the guards say, its text."""
    mark = {"chosen": h("b", "✓ chosen", class_="good"), "rejected": h("b", "✗ rejected", class_="bad")}.get(role)
    flags = candidate.get("flags") if isinstance(candidate.get("flags"), list) else []
    flags = [GUARDS.get(f, f) for f in flags if isinstance(f, str)]
    return h("div", h("h4", name(text_of(candidate, "teacher") or "?"), " ", mark, " reward ",
                      plain(number(candidate, "reward"))),
             h("p", "stopped by a guard: ", ", ".join(flags), class_="drop", dir="ltr") if flags else None,
             quote(candidate.get("completion"), code, "text"))


def sample(row, code):
    """A prompt and its answers: the chosen one, the rejected one, then the others from the highest reward down."""
    candidates = row.get("candidates") if isinstance(row.get("candidates"), list) else []
    roles = {row.get(role): role for role in ("rejected", "chosen") if isinstance(row.get(role), int)}
    order = sorted((i for i, c in enumerate(candidates) if isinstance(c, dict)), key=lambda i: (
        ["chosen", "rejected", None].index(roles.get(i)), -(number(candidates, i, "reward") or 0)))
    more = len(order) - ANSWERS
    return card(row.get("prompt"), code, [[answer(candidates[i], code, roles.get(i)) for i in order[:ANSWERS]],
                                          h("small", f"and {count(more, 'more answer')}") if more > 0 else None])


def side_by_side(samples):
    rows = {}
    for row in samples or []:
        if isinstance(row, dict):
            rows.setdefault(text_of(row, "language") or "", []).append(row)
    codes = sorted(rows, key=lambda c: ([*OPEN_FIRST, c].index(c), name_of(c)))
    return [h("details", h("summary", h("b", name_of(c) or "In a language that is not named"), " ", h(
                  "small", count(min(len(rows[c]), SAMPLES), "prompt"))),
              [sample(row, c or None) for row in rows[c][:SAMPLES]], open="" if c in codes[:3] else None)
            for c in codes]


def tables(report):
    """What was asked and what was made of it, by teacher and by language."""
    pool = branch(report, "teachers")
    rows = [[t, text_of(branch(pool, t), "model") or "–",
             *[count(number(pool, t, k)) for k in ("completions", "failed", "tokens")],
             "given up" if text_of(branch(pool, t), "stopped") else "whole"] for t in pool]
    codes = languages_of(report, "languages")
    counts = [[name_of(c), *[count(number(report, "languages", c, k)) for k in ("prompts", "routed", "pairs")]]
              for c in codes]
    return [rows and table("The pool", ["teacher", "model", "completions", "failed", "tokens", "answers"], rows),
            codes and table("The languages", ["language", "prompts", "routed", "pairs"], counts)]


# ---------------------------------------------------------------------------------------------------------------------
# the page

def page(report, samples):
    """report: what report.json holds; samples: prompts with the answers of the whole pool. -> the page as a string"""
    sections = [  # title, lead, parts
        ("Can the Arbiter be trusted?", "The Arbiter is the reward model that compares the teachers' answers. It is "
         "not equally good in every language, and where it only guesses, it routes at random.", audit(report)),
        ("Who answers what", "Every prompt goes to one teacher. Where a cell is dark, that teacher knows the language "
         "best, or the router believes so.", shares(report)),
        ("What a router is worth", "More answers to choose from can make a better choice, and they cost more: a router "
         "that asks one teacher per prompt is as cheap as that teacher alone.", comparison(report)),
        ("Rewards", "Rewards compare only within a prompt: an easy prompt gives every teacher a high one. So what is "
         "drawn is the distance to the other answers to the same prompt.", rewards(report)),
        ("What the guards stopped", "A reward model does not see every fault. An answer that is cut off, empty, in the "
         "wrong language or in a loop is dropped, whatever its reward.", guards(report)),
        ("What they wrote", f"The same prompt, answered by every teacher: of each language {SAMPLES} prompts, "
         "those on which the pool's rewards differ most.", side_by_side(samples)),
        ("All numbers", None, tables(report))]
    seconds, seed = number(report, "seconds"), number(report, "seed")
    facts = [f"{label} {value}".strip() for label, field in (
        ("Arbiter", "arbiter"), ("judge", "judge"), ("commit", "commit"), ("", "hardware"))
        if (value := text_of(report, field))]
    facts += [f"seed {seed}"] * (seed is not None) + [duration(seconds)] * (seconds is not None)
    return document("nanoaya: arbitrage", headline(report), sections, " · ".join(facts))
