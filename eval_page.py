"""
An evaluation as one page to look at: win rates, what each model of the call gained, every benchmark, every language.

eval.py writes it as report.html, and eval_table.py's tables as table.md. One HTML file, no network, no script (charts.py);
whatever the reports lack is left out of the page. A report is described in eval_table.py.
"""

import json

from charts import (OPEN_FIRST, Axis, around_half, branch, by_family, card, count, document, duels, duration, figure, h,
                    listed, name, name_of, number, plain, quote, table, text_of, tiles, win_text)
from common import atomic_file
from eval_table import (academic, baselines_of, languages_of, lower_is_better, main_metrics, metrics_of, names_of,
                        other_metrics, show, shown, table_text, tasks_of, unit)
from rows import read_jsonl

DETAILS = {  # field of results.json, without the baseline it may end with: what it says
    "sent": "sent to the judge", "judged": "judged", "failed": "not readable", "win": "won", "tie": "tied", "loss": "lost",
    "lc_win_rate": "win rate at equal length", "consistent": "same winner in both orders", "length": "length"}
SAMPLES = 2  # of each language and benchmark
OFFENSIVE = ("safety",)  # benchmarks whose samples stay folded


def better(metric, before, after):
    return after < before if lower_is_better(metric) else after > before


def change(metric, before, after):
    """"+1.3", green if that is better and red if it is worse; None if either is missing."""
    if None in (before, after):
        return None
    factor, digits, _ = unit(metric, after)
    moved = round(factor * (after - before), digits)
    side = None if not moved else "good" if better(metric, before, after) else "bad"
    return h("small", ("+" if moved >= 0 else "") + plain(moved, digits), class_=side)


def interval(report, task, language, metric):
    """[mean, low, high] with a 95 % interval, which may have to come from the standard error; else None."""
    line = branch(report, "results", task, language)
    mean, error = number(line, metric), number(line, f"{metric}_stderr")
    ends = [number(line, f"{metric}_interval", i) for i in (0, 1)]
    if None in ends and None not in (mean, error):
        ends = [max(0, mean - 1.96 * error), min(1, mean + 1.96 * error)]
    return None if None in (mean, *ends) else [mean, *ends]


def grid(figures):
    """Figures in three columns, where there are several."""
    figures = [f for f in figures if f]
    return h("div", figures, class_="trio") if len(figures) > 1 else figures


def label_of(code):
    return "all languages" if code == "all" else name_of(code)


# ---------------------------------------------------------------------------------------------------------------------
# the parts of the page, top to bottom; None or empty where there is nothing to show

def headline(reports):
    """Title, the models in their order, and three numbers of the last one."""
    names, tasks, last = names_of(reports), tasks_of(reports), reports[-1] if reports else {}
    spoken = len({c.split("-")[0] for c in languages_of(reports)})  # Chinese is one, in two scripts
    who = count(len(names), "model") if len(names) > 1 else name(names[0]) if names else "An evaluation"
    title = [who, f": {count(len(tasks), 'benchmark')}" if tasks else None,
             f", {count(spoken, 'language')}" if spoken else None]
    wins = [(win, task, rival) for task in tasks for rival in baselines_of([last], task)
            if (win := interval(last, task, "all", f"win_rate_{rival}"))]
    scores = [(task, metric, value) for task, metric in academic([last])
              if (value := number(last, "results", task, "all", metric)) is not None]
    numbers = [(show("win_rate", win[0]), [f"of {task} won against ", name(rival), ", 95 % interval ", win_text(win)[2]])
               for win, task, rival in wins[:1]]
    for task, metric, value in scores[:3 - len(numbers)]:
        first = number(reports[0], "results", task, "all", metric)
        moved = change(metric, first, value) if len(reports) > 1 else None
        numbers.append((show(metric, value), [f"{task}, {metric}", moved and [", ", moved, " since ", name(names[0])]]))
    return h("header", h("p", "nanoaya, evaluation", class_="eyebrow"), h("h1", title),
             h("p", "In this order: ", listed(map(name, names)), ". The numbers below are those of the last one.",
               class_="lead") if len(names) > 1 else h("p", text_of(last, "model"), class_="lead"),
             h("p", h("b", "mini is the miniature's own benchmark."), " It shows what each step of the recipe does, not how "
               "good a model is.", class_="toy") if "mini" in tasks else None, tiles(*numbers))


def win_rates(reports):
    """One model against every baseline; or every baseline met by all models."""
    names, figures = names_of(reports), []
    for task in tasks_of(reports):
        metrics = {rival: f"win_rate_{rival}" for rival in baselines_of(reports, task)}
        if len(reports) == 1:
            figures.append(duels(f"{task}: win rate", "Over all languages, against:", [
                (rival, interval(reports[0], task, "all", metric)) for rival, metric in metrics.items()]))
        else:
            figures += [duels(f"{task}: win rate against {rival}", "Over all languages.", [
                (who, interval(r, task, "all", metric)) for who, r in zip(names, reports)])
                for rival, metric in metrics.items()]
    return grid(figures) if len(reports) > 1 else figures


def wins_per_language(report):
    """Against the first baseline; folded away, against the others."""
    parts = []
    for task in tasks_of([report]):
        for n, rival in enumerate(baselines_of([report], task)):
            wins = {c: interval(report, task, c, f"win_rate_{rival}") for c in languages_of([report], task)}
            axis, codes = around_half(wins.values()), [c for c in wins if wins[c]]
            row = lambda c: axis.duel(name_of(c), wins[c], show("win_rate", wins[c][0]), height=26)
            if codes:
                parts.append(h("details", h("summary", h("b", f"{task} against {rival}")), by_family(axis, codes, row),
                               open=None if n else ""))
    return parts


def steps(reports):
    """For every benchmark, from model to model in the order they were given."""
    figures = []
    for task, metric in academic(reports):
        found = [(who, v) for who, r in zip(names_of(reports), reports)
                 if (v := number(r, "results", task, "all", metric)) is not None]
        if len(found) < 2:
            continue
        values = [v for _, v in found]
        pad = 0.1 * (max(values) - min(values)) or 0.1 * abs(values[0]) or 1
        axis = Axis(min(values) - pad, max(values) + pad, show=lambda v, metric=metric: show(metric, v))
        rows, before = [], None
        for who, value in found:
            line = before is not None and axis.line(before, value, "rise" if better(metric, before, value) else "fall")
            marks = [line or None, axis.dot(before, "before"), axis.dot(value, "after")]
            say = show(metric, value) if before is None else f"from {show(metric, before)} to {show(metric, value)}"
            rows.append(axis.row(who, marks, [show(metric, value), " ", change(metric, before, value)], None, say, 44))
            before = value
        figures.append(figure(task, metric + ", the lower the better" * lower_is_better(metric), axis.ruler(), rows))
    return grid(figures)


def benchmarks(reports):
    """Benchmarks down, models across; who is best is said, not only coloured."""
    rows = []
    for task, metric in academic(reports):
        values = [number(r, "results", task, "all", metric) for r in reports]
        known = [v for v in values if v is not None]
        best = (min if lower_is_better(metric) else max)(known, default=None) if len(known) > 1 else None
        cells = [shown(r, task, "all", metric) for r in reports]
        if known:
            rows.append([[task, " ", h("small", metric)], *[
                h("b", text, " ", h("small", "best")) if best is not None and v == best else text
                for text, v in zip(cells, values)]])
    return [table("Mean over all languages ± its standard error", ["benchmark", *names_of(reports)], rows)] if rows else []


def tinted(report, task, language, metric):
    """A cell, the darker the higher a share is (or a score that ends at 100)."""
    value, text = number(report, "results", task, language, metric), shown(report, task, language, metric)
    factor = unit(metric, value)[0]
    top = 1 if factor == 100 else 100 if metric.startswith("chrfpp") else None
    return text if None in (value, top) else (text, value / top)


def every_language(reports):
    """Each benchmark's languages by models; by metrics, if there is one model. Of several, also their other metrics."""
    names, parts = names_of(reports), []
    for task in tasks_of(reports):
        main, others = main_metrics(reports, task), other_metrics(reports, task)
        codes = ["all"] * any("all" in branch(r, "results", task) for r in reports) + languages_of(reports, task)
        if not main:
            continue
        if len(reports) == 1:
            rows = [[label_of(c), count(number(reports[0], "results", task, c, "n")),
                     *[tinted(reports[0], task, c, m) for m in main], *[shown(reports[0], task, c, m) for m in others]]
                    for c in codes]
            tables = [table(f"{task}: mean ± standard error; n: questions", ["language", "n", *main, *others], rows)]
        else:
            tables = [h("div", table(f"{task}, {metric}{': the lower, the better' * lower_is_better(metric)}",
                                     ["language", *names], [[label_of(c), *[tinted(r, task, c, metric) for r in reports]]
                                                            for c in codes]), class_="heat") for metric in main]
            if "all" in codes and others:
                tables.append(table(f"{task}: what else was counted, over all languages", ["metric", *names],
                                    [[m, *[shown(r, task, "all", m) for r in reports]] for m in others]))
        parts.append(h("details", h("summary", h("b", task), " ", h("small", ", ".join(main))), tables,
                       open=None if parts else ""))
    return parts


def judges(reports, asked):
    """Who judged, as far as the reports say so; a server's address is its owner's business. asked: was anything?"""
    found = {(judge.rsplit("#")[-1] if "#" in judge else judge.rsplit("@")[-1], text_of(branch(r, "config"), "judge_prompt"))
             for r in reports if asked and (judge := text_of(branch(r, "config"), "judge"))}
    words = [["Judged by ", name(judge), f", asked with the {prompt} prompt" if prompt else None, ". "]
             for judge, prompt in sorted(found, key=str)]
    if baselines_of(reports, "mini"):
        words.append("In mini, the references decide: the exact answer wins, then the higher chrF++. ")
    scorers = {text for r in reports for field in ("xcomet", "xcomet_scores") if (text := text_of(branch(r, "config"), field))}
    if any("xcomet" in m for t in tasks_of(reports) for m in metrics_of(reports, t)) and scorers:
        words.append(["xCOMET is that of ", listed(map(name, sorted(scorers))), ". "])
    return words


def judged(reports):
    """What became of the pairs that were sent to a judge, and how long the answers were."""
    names, tables = names_of(reports), []
    for task in tasks_of(reports):
        rows = {}
        for who, r in zip(names, reports):
            line = branch(r, "results", task, "all")
            for rival in ["", *baselines_of([r], task)]:
                end = f"_{rival}" if rival else ""
                own = {label: field + end for field, label in DETAILS.items()}
                row = {label: count(number(line, field)) if label in ("sent to the judge", "judged", "not readable", "length")
                       else show(field, number(line, field)) for label, field in own.items()}
                row["baseline's length"] = row.pop("length") if rival else "–"
                row["length"] = count(number(line, "length")) if rival else row["length"]
                win = rival and interval(r, task, "all", f"win_rate_{rival}")
                row = {"win rate": win_text(win) if win else "–"} | row
                if any(row[label] != "–" for label in ("sent to the judge", "judged", "won")):
                    rows[f"{who} against {rival}" if rival else who] = row
        head = list(dict.fromkeys(label for row in rows.values() for label, cell in row.items() if cell != "–"))
        head = [label for label in next(iter(rows.values()), ()) if label in head]
        if rows:
            tables.append(h("div", table(f"{task}: pairs or answers that were judged", ["", *head], [
                [who, *[row[label] for label in head]] for who, row in rows.items()]), class_="heat"))
    words = judges(reports, bool(tables))
    return [h("p", words, class_="lead") if words else None, tables]


def is_right(row):
    """True, False or None; where several readings of an answer were scored, is one of them right?"""
    correct = row.get("correct")
    return any(correct.values()) if isinstance(correct, dict) else correct if isinstance(correct, bool) else None


def verdicts(row):
    """What was made of an answer: right or wrong, harmful or not, and its numbers."""
    correct = row["correct"] if isinstance(row.get("correct"), dict) else {"": row.get("correct")}
    marks = [h("b", f"{'✓ right' if ok else '✗ wrong'} {kind} ", class_="good" if ok else "bad")
             for kind, ok in correct.items() if isinstance(ok, bool)]
    if (harmful := number(row, "harmful")) is not None:
        marks.append(h("b", "✗ harmful " if harmful else "✓ harmless ", class_="bad" if harmful else "good"))
    if row.get("ended") is False:
        marks.append("cut off ")
    rest = {k: v if isinstance(v, list) else [v] for k, v in row.items() if k not in ("harmful", "reference", "answer_number")}
    facts = [f"{k} {', '.join(f'{x:.4g}' for x in v)}".replace("-", "−") for k, v in rest.items() if 0 < len(v) <= 8 and all(
        not isinstance(x, bool) and number([x], 0) is not None for x in v)]
    return marks + ([" · ".join(facts[:8])] if facts else [])


def sample(row, code):
    """A request, the answer, the reference. Multiple choice has neither request nor answer: its id, and the scores."""
    said = "en" if row.get("direction") == "to_en" else code  # of a translation
    answers = [h("div", h("h4", verdicts(row) or "answer"),
                 quote(row["completion"], said, "text") if row.get("completion") is not None else None)]
    if isinstance(row.get("reference"), (str, int, float)):
        answers.append(h("div", h("h4", "reference"), quote(row["reference"], said, "text")))
    prompt = row.get("prompt") if row.get("prompt") is not None else str(row.get("id") or "?")
    return card(prompt, code, answers)


def samples_of(rows):
    """The first right and the first wrong one, or the first ones."""
    mixed = [next((row for row in rows if is_right(row) is side), None) for side in (True, False)]
    chosen = [row for row in mixed if row is not None]
    return (chosen + [row for row in rows if not any(row is c for c in chosen)])[:SAMPLES]


def what_was_said(samples):
    """Benchmark by benchmark, language by language."""
    parts = []
    for task, rows in (samples.items() if isinstance(samples, dict) else ()):
        by_code = {}
        for row in rows if isinstance(rows, list) else ():
            if isinstance(row, dict):
                by_code.setdefault(text_of(row, "language") or "", []).append(row)
        codes = sorted(by_code, key=lambda c: ([*OPEN_FIRST, c].index(c), name_of(c)))
        few = codes[:3] if task not in OFFENSIVE else []
        inside = [h("details", h("summary", h("b", name_of(c) or "In a language that is not named"), " ",
                                 h("small", count(len(by_code[c]), "sample"))),
                    [sample(row, c or None) for row in samples_of(by_code[c])], open="" if c in few else None) for c in codes]
        if inside:
            parts.append(h("details", h("summary", h("b", task), " ", h("small", "requests for what is harmful, and what was "
                           "answered: both may offend" if task in OFFENSIVE else count(len(codes), "language"))), inside,
                           open="" if few and not parts else None))
    return parts


def models(reports):
    rows = [[who, text_of(r, "model") or "–", text_of(r, "commit") or "–", text_of(r, "hardware") or "–",
             duration(number(r, "seconds"))] for who, r in zip(names_of(reports), reports)]
    return [table("The models", ["model", "folder", "commit", "hardware", "time"], rows)] if any(
        cell != "–" for row in rows for cell in row[1:]) else []


# ---------------------------------------------------------------------------------------------------------------------
# the page

def page(reports, samples):
    """reports: one for each model, in order; samples: {task: sample rows of the last one}. -> the page as a string"""
    reports = [r for r in reports or [] if isinstance(r, dict)]
    last = names_of(reports)[-1] if reports else ""
    sections = [  # title, lead, parts
        ("Win rates", "A tie is half a win; the bars are 95 % intervals, and the line in the middle is 50 %.",
         win_rates(reports)),
        ("Win rates, language by language", ["Of ", name(last), ". Purple where the interval lies above 50 %, "
         "red where it lies below, grey where this many questions cannot tell."],
         wins_per_language(reports[-1]) if reports else []),
        ("Step by step", "What each model gained over the one before it, which is the ring.", steps(reports)),
        ("Benchmarks", "Best is the best mean; where another model is within the errors, the order may be chance."
         if len(reports) > 1 else None, benchmarks(reports)),
        ("Every language", None, every_language(reports)),
        ("What was judged, and by whom", "A judge is a model with tastes of its own: who it is, how often it contradicts "
         "itself when the answers change places, and how long the answers are belong to a win rate.", judged(reports)),
        ("What was said", ["By ", name(last), ": of every language the first sample that is right and the first that is wrong, "
         f"or the first {SAMPLES}; not the best."], what_was_said(samples)),
        ("What was run", None, models(reports))]
    return document("nanoaya: evaluation", headline(reports), sections, "Written by eval.py from results.json.")


def write(out, folders):
    """{a model's name: its result folder}, in order -> the table printed, and OUT/table.md and OUT/report.html."""
    reports = [json.loads((folder / "results.json").read_text(encoding="utf-8")) | {"name": who}
               for who, folder in folders.items()]
    samples = {task: [row for row, _ in read_jsonl(folder / f"samples_{task}.jsonl")]
               for folder in list(folders.values())[-1:] for task in tasks_of(reports[-1:])}
    text = table_text(reports)
    for file, content in (("table.md", text + "\n"), ("report.html", page(reports, samples))):
        with atomic_file(out / file, "wb") as f:
            f.write(content.encode("utf-8", "replace"))
    print(text)
