"""
What eval.py's results say, for its page and for the terminal: which metric stands for a benchmark, how a number is written,
and the tables of languages down, models or metrics across.

A report is {"name", "model", "commit", "hardware", "seconds", "results": {task: {language or "all": {metric: value,
metric_stderr: value, metric_interval: [low, high], "n": n}}}}: what eval.py writes, and the model's name. All of it may be
missing.
"""

import math
import unicodedata

from charts import branch, in_order, number, plain, text_of

MAIN = {  # task: the metrics that stand for it, the main one first
    "flores": ("chrfpp_to_en", "chrfpp_from_en", "xcomet_to_en", "xcomet_from_en"), "safety": ("harmful",),
    "mgsm_native_cot": ("exact_match", "flexible_extract", "strict_match"),
    "mgsm_direct": ("exact_match", "flexible_extract", "remove_whitespace")}
USUAL = ("acc", "exact_match")  # of other tasks; then win rates, then whatever comes first
UNITS = {"chrfpp": 1, "xcomet": 3, "reward": 2, "length": 0, "tokens": 0}  # digits of metrics that are no shares
NO_SCORE = ("win_rate_", "ended", "length", "tokens")  # what needs a baseline, and what is neither good nor bad
LOWER = ("harmful", "no_answer", "cut_off", "loss_")  # the lower, the better
WIDTH = 120  # of a table in a terminal


# ---------------------------------------------------------------------------------------------------------------------
# what is in a report

def names_of(reports):
    return [text_of(r, "name") or (text_of(r, "model") or "").rstrip("/").split("/")[-1] or f"model {n}"
            for n, r in enumerate(reports, 1)]


def tasks_of(reports):
    return list(dict.fromkeys(task for r in reports for task in branch(r, "results")))


def languages_of(reports, *tasks):
    """The languages of these tasks, or of all; "all" is none."""
    return in_order({c for r in reports for t in tasks or branch(r, "results") for c in branch(r, "results", t) if c != "all"})


def metrics_of(reports, task):
    """The names of a task's metrics, which are its floats; counts are integers."""
    lines = [branch(r, "results", task, c) for r in reports for c in branch(r, "results", task)]
    return list(dict.fromkeys(metric for line in lines for metric, value in line.items() if isinstance(value, float)
                              and math.isfinite(value) and not metric.endswith("_stderr")))


def baselines_of(reports, task):
    return [m.removeprefix("win_rate_") for m in metrics_of(reports, task) if m.startswith("win_rate_")]


def main_metrics(reports, task):
    """The metrics that stand for a task, the main one first."""
    there = metrics_of(reports, task)
    return ([m for m in MAIN.get(task, USUAL) if m in there] or [f"win_rate_{name}" for name in baselines_of(reports, task)]
            or there[:1])


def academic(reports):
    """[(task, metric)] of scores that need no baseline."""
    return [(t, m) for t in tasks_of(reports) for m in main_metrics(reports, t) if not m.startswith(NO_SCORE)]


def other_metrics(reports, task):
    """The other metrics, without the details of win rates."""
    main, names = main_metrics(reports, task), baselines_of(reports, task)
    return [m for m in metrics_of(reports, task) if m not in main and not any(
        m.endswith(f"_{name}") and m != f"win_rate_{name}" for name in names)]


def lower_is_better(metric):
    return metric.startswith(LOWER) or metric.endswith("_invalid")


def unit(metric, value):
    """-> (factor, digits, sign) to write a metric with: a share in percent, others as they are."""
    digits = next((d for start, d in UNITS.items() if metric.startswith(start)), 2 if abs(value or 0) > 1 else None)
    return (100, 1, "%") if digits is None else (1, digits, "")


def show(metric, value, error=None):
    """"61.2%", or with a standard error "61.2% ± 1.1"; – for what is missing."""
    factor, digits, sign = unit(metric, value)
    if value is None:
        return "–"
    return plain(factor * value, digits) + sign + (f" ± {plain(factor * error, digits)}" if error is not None else "")


def shown(report, task, language, metric):
    """A metric with its standard error, as text."""
    line = branch(report, "results", task, language)
    return show(metric, number(line, metric), number(line, f"{metric}_stderr"))


# ---------------------------------------------------------------------------------------------------------------------
# tables of text, which are Markdown too

def clean(text):
    """A name on one line, without what moves a cursor, turns a line round or ends a cell."""
    text = "".join("\ufffd" if unicodedata.category(c).startswith("C") else c for c in " ".join(str(text).split()))
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "\\<")


def width(text):
    """In columns of a terminal."""
    return sum(0 if unicodedata.category(c) in ("Mn", "Me") else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def grids(title, first, columns, needed=None):
    """
    Columns of cells, the head on top -> lines of one table or, where they are too many, several, each beginning with the
    column `first`. Columns behind the first `needed` are shown only where they fit.
    """
    wide = lambda column: max(3, *map(width, column))  # room for --:
    parts, left = [], 0
    for n, column in enumerate(columns):
        if not parts or wide(column) + 3 > left:
            if parts and needed is not None and n >= needed:
                break
            parts.append([first])
            left = WIDTH - wide(first) - 4
        parts[-1].append(column)
        left -= wide(column) + 3
    lines, hidden = [title, ""], len(columns) - sum(len(part) - 1 for part in parts)
    for part in parts:
        sizes = [wide(column) for column in part]
        rows = [[cell + " " * (w - width(cell)) if i == 0 else " " * (w - width(cell)) + cell
                 for i, (cell, w) in enumerate(zip(row, sizes))] for row in zip(*part)]
        rows.insert(1, ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(sizes)])
        lines += ["| " + " | ".join(row) + " |" for row in rows] + [""]
    return lines + ([f"{hidden} more in results.json", ""] if hidden else [])


def heading(task, metric):
    return clean(task) + f", {clean(metric)}" + " (lower is better)" * lower_is_better(metric)


def table_text(reports):
    """Every task's languages by models, or by metrics if there is one model; in front of several tasks, all at a glance."""
    names, tasks, lines = [clean(name) for name in names_of(reports)], tasks_of(reports), []
    main = {task: main_metrics(reports, task) for task in tasks}
    cells = [(task, metric) for task in tasks for metric in main[task]
             if any(number(r, "results", task, "all", metric) is not None for r in reports)]
    if len(tasks) > 1 and cells:
        lines += grids("all languages", ["task", *[heading(*cell) for cell in cells]],
                       [[name, *[shown(r, task, "all", metric) for task, metric in cells]] for name, r in zip(names, reports)])
    for task in (task for task in tasks if main[task]):
        codes = ["all"] * any("all" in branch(r, "results", task) for r in reports) + languages_of(reports, task)
        first = ["language", *map(clean, codes)]
        if len(reports) == 1:
            count = lambda c: "–" if (n := number(reports[0], "results", task, c, "n")) is None else f"{n:.0f}"
            columns = [["n", *map(count, codes)]] + [[clean(m), *[shown(reports[0], task, c, m) for c in codes]]
                                                     for m in main[task] + other_metrics(reports, task)]
            lines += grids(f"{names[0]}, {clean(task)}", first, columns, needed=1 + len(main[task]))
        else:
            for metric in main[task]:
                columns = [[name, *[shown(r, task, c, metric) for c in codes]] for name, r in zip(names, reports)]
                lines += grids(heading(task, metric), first, columns)
    return "\n".join([*lines, "± is one standard error."] if lines else ["nothing was scored"])
