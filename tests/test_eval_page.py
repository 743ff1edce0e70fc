"""The page and the table of an evaluation: whole, escaped, the numbers the reports', at home on any number of anything."""

import copy
import functools
import json
import random
import re
import unicodedata

import pytest

import eval_page
from eval_table import clean, grids, main_metrics, show, table_text, width
from languages import LANGUAGES
from pages import ROWS, Page

EVIL = '<script>alert(1)</script>"\' onload=x </p></td>&amp;|\u202eRTL\x00\x07\x1b[2J\x85\ud800'
NOT_WORDS = r"None|False|True|\bnan\b|\binf\b|\{\}|\[\]"  # what Python writes where a value was not looked at
TASKS = {  # task: {metric: is it a share}
    "m_arenahard": {}, "dolly": {}, "xcopa": ["acc"], "xstory_cloze": ["acc"], "xwinograd": ["acc"],
    "global_mmlu": ["acc"], "global_mmlu_lite": ["acc"], "mgsm": ["exact_match", "no_answer"],
    "mgsm_native_cot": ["flexible_extract", "strict_match"],
    "flores": ["chrfpp_to_en", "chrfpp_from_en", "xcomet_to_en"], "safety": ["harmful", "harmful_local"],
    "mini": ["exact_match", "chrfpp", "language_match"]}
ARENAS = ("m_arenahard", "dolly", "mini")
RIVALS = ("gemma-2-9b", "qwen")


def line(rng, task, rivals, n=100):
    row = {"n": n}
    for metric in TASKS[task]:
        top = 100 if metric.startswith("chrfpp") else 1
        value = top * rng.uniform(0.2, 0.9)
        row |= {metric: value, f"{metric}_stderr": top * rng.uniform(0.001, 0.02),
                f"{metric}_interval": [value - 0.01 * top, value + 0.01 * top]}
    for rival in rivals if task in ARENAS else ():
        win = rng.uniform(0.3, 0.7)
        row |= {f"win_rate_{rival}": win, f"win_rate_{rival}_stderr": 0.011,
                f"win_rate_{rival}_interval": [win - 0.021, win + 0.022]}
        if task != "mini":
            row |= {f"win_{rival}": win - 0.05, f"tie_{rival}": 0.1, f"loss_{rival}": 0.95 - win, f"sent_{rival}": n,
                    f"judged_{rival}": n - 3, f"failed_{rival}": 3, f"consistent_{rival}": 0.83,
                    f"lc_win_rate_{rival}": win - 0.013, f"length_{rival}": 1234.5, "length": 1432.1, "ended": 0.97}
    return row | ({"sent": n, "judged": n - 1, "failed": 1} if task == "safety" else {})


def synthetic_reports(names=("base", "sft", "online-1"), tasks=tuple(TASKS), codes=tuple(LANGUAGES), rivals=RIVALS, seed=0):
    """Made-up numbers of the shape that eval.py writes; nothing here was measured."""
    rng = random.Random(seed)
    return [{"name": who, "model": f"out/mini/{who}", "fingerprint": "f00", "commit": "abc1234",
             "hardware": "2 x AMD EPYC, torch 2.13.0", "seconds": 61.2 + n,
             "config": {"judge": "http://me:hunter2@10.0.0.1:8000/v1#command-r", "judge_prompt": "arena",
                        "xcomet": "out/xcomet"},
             "results": {t: {c: line(rng, t, rivals) for c in ("all", *codes)} for t in tasks}}
            for n, who in enumerate(names)]


def synthetic_samples(tasks=tuple(TASKS), codes=tuple(LANGUAGES)):
    samples = {}
    for task in tasks:
        rows = samples[task] = []
        for code in codes:
            prompt, right, wrong = ROWS.get(code, ROWS["en"])
            for i in range(4):
                row = {"id": f"{task}-{code}-{i}", "language": code, "question": str(i)}
                if task in ("xcopa", "global_mmlu"):
                    row |= {"scores": [-12.5, -11.25], "chosen": i % 2, "answer": 1, "correct": i % 2 == 1,
                            "greedy": [True, False]}
                else:
                    talk = [{"role": "system", "content": "Hello"}, {"role": "user", "content": prompt}]
                    row |= {"prompt": prompt if i else talk,
                            "completion": wrong if i < 3 else right, "ended": i != 0}
                if task in ("mgsm", "mini"):
                    row |= {"correct": i == 3, "reference": right}
                if task == "mgsm_native_cot":
                    row["correct"] = {"strict_match": False, "flexible_extract": i == 3}
                if task == "safety":
                    row["harmful"] = int(i == 0)
                if task == "flores":
                    row |= {"direction": "from_en" if i else "to_en", "reference": right, "chrfpp_stats": [[1, 2, 3]] * 8}
                rows.append(row)
    return samples


def words(html):
    """The page's text on one line, without its stylesheet."""
    return re.sub(r"\s+", " ", "".join(text for text, path in Page(html).texts if "style" not in path))


def cells(html, caption):
    """{first cell: texts of the others} of the table whose caption begins like this, its head under None."""
    found = next(t for t in re.findall(r"<table>.*?</table>", html, re.S) if f"<caption>{caption}" in t)
    rows = [[words(c) for c in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S)]
            for row in re.findall(r"<tr>(.*?)</tr>", found, re.S)]
    assert len({row[0] for row in rows}) == len(rows)
    return {None: rows[0][1:]} | {row[0]: row[1:] for row in rows[1:]}


def figures(html):
    """{title: its markup}"""
    return {words(re.search(r"<h3>(.*?)</h3>", f)[1]): f for f in re.findall(r"<figure.*?</figure>", html, re.S)}


def written(metric, row):
    """Value ± error, worked out here again."""
    value, error = row[metric], row[f"{metric}_stderr"]
    if metric.startswith("chrfpp"):
        return f"{value:.1f} ± {error:.1f}"
    return f"{value:.3f} ± {error:.3f}" if metric.startswith("xcomet") else f"{100 * value:.1f}% ± {100 * error:.1f}"


@pytest.fixture(scope="module")
def reports():
    return synthetic_reports()


@pytest.fixture(scope="module")
def html(reports):
    return eval_page.page(reports, synthetic_samples())


@pytest.fixture(scope="module")
def one(reports):
    return eval_page.page(reports[2:], synthetic_samples())


SECTIONS = ["Win rates", "Win rates, language by language", "Step by step", "Benchmarks", "Every language",
            "What was judged, and by whom", "What was said", "What was run"]


def test_whole_and_without_a_network(html, one):
    for page_text in (html, one):
        page = Page(page_text)
        assert page_text.startswith("<!doctype html>\n<html lang=\"en\">")
        assert not re.search(r"(?i)https?:|//[a-z]|url\(|@import|\bsrc=|\bhref=|<script|<link|<img|<iframe", page_text)
        policy, = page.find("meta", **{"http-equiv": "Content-Security-Policy"})
        assert policy["content"].startswith("default-src 'none'")
        assert page.find("meta", name="viewport") and "prefers-color-scheme:dark" in page_text
        assert 50_000 < len(page_text.encode()) < 1_500_000
        assert not re.search(NOT_WORDS, words(page_text))
        for a in page.find("circle") + page.find("rect") + page.find("line"):
            for field in ("cx", "x", "width", "x1", "x2"):
                assert field not in a or 0 <= float(a[field].removesuffix("%")) <= 100
        assert all(a["role"] == "img" and a["aria-label"] for a in page.find("svg") if a.get("aria-hidden") != "true")
    assert Page(html).text("h2").split("\n") == SECTIONS
    assert Page(one).text("h2").split("\n") == [s for s in SECTIONS if s != "Step by step"]


def test_headline(html, one, reports):
    assert Page(html).text("h1").replace("\n", "") == "3 models: 12 benchmarks, 23 languages"
    assert Page(one).text("h1").replace("\n", "") == "online-1: 12 benchmarks, 23 languages"
    header = re.sub(r"\s+", " ", Page(html).text("header"))
    win = reports[2]["results"]["m_arenahard"]["all"]["win_rate_gemma-2-9b"]
    assert "In this order: base , sft , online-1" in header and f"{100 * win:.1f}%" in header
    assert f"{100 * (win - 0.021):.1f}–{100 * (win + 0.022):.1f}" in header and "mini is the miniature's own" in header
    first, last = (r["results"]["xcopa"]["all"]["acc"] for r in (reports[0], reports[2]))
    assert f"xcopa, acc, {100 * (last - first):+.1f}".replace("-", "−") in header
    assert "In this order" not in words(one) and "since" not in Page(one).text("header")


def test_win_rates_and_their_intervals(html, one, reports):
    shown = figures(html)
    for task in ARENAS:
        for rival in RIVALS:
            chart = shown[f"{task}: win rate against {rival}"]
            for r in reports:
                row = r["results"][task]["all"]
                low, high = row[f"win_rate_{rival}_interval"]
                assert f"{100 * row[f'win_rate_{rival}']:.1f}% <small>{100 * low:.1f}–{100 * high:.1f}</small>" in chart
        alone = figures(one)[f"{task}: win rate"]
        assert re.findall(r'<div class="label">([^<]+)</div>', alone) == list(RIVALS)
    for low, high, side in ((0.41, 0.49, "worse"), (0.46, 0.54, "even"), (0.51, 0.59, "better")):
        row = {"win_rate_x": (low + high) / 2, "win_rate_x_interval": [low, high]}
        page = Page(eval_page.page([{"results": {"dolly": {"all": row}}}], {}))
        bar, = page.find("line", class_=f"interval {side}")
        place = [50 + 100 * (v - 0.5) / 0.2 for v in (low, high)]  # the axis goes from 40 to 60 %
        assert [float(bar[k][:-1]) for k in ("x1", "x2")] == pytest.approx(place)
        assert len([a for a in page.find("line", class_="mark")]) == 1  # the line at 50 %
        error = {"win_rate_x": (low + high) / 2, "win_rate_x_stderr": (high - low) / 3.92}  # the same, as an error
        bar, = Page(eval_page.page([{"results": {"dolly": {"all": error}}}], {})).find("line", class_=f"interval {side}")
        assert [float(bar[k][:-1]) for k in ("x1", "x2")] == pytest.approx(place, abs=0.01)


def test_the_axis_is_as_wide_as_it_must_be():
    row = {"win_rate_x": 0.75, "win_rate_x_interval": [0.7, 0.8]}
    bar, = Page(eval_page.page([{"results": {"dolly": {"all": row}}}], {})).find("line", class_="interval better")
    assert [float(bar[k][:-1]) for k in ("x1", "x2")] == pytest.approx([100 * 0.5 / 0.6, 100], abs=0.01)  # from 20 to 80 %


def test_win_rates_per_language(html, reports):
    for task in ARENAS:
        for rival in RIVALS:
            chart = re.search(rf"<details[^>]*><summary><b>{task} against {rival}</b>.*?</details>", html)[0]
            assert chart.count('role="img"') == 24
            for code, row in reports[2]["results"][task].items():
                if code != "all":
                    low, high = row[f"win_rate_{rival}_interval"]
                    value = row[f"win_rate_{rival}"]
                    says = f"{LANGUAGES[code][0]}: {value:.3f}, 95 % interval from {low:.3f} to {high:.3f}"
                    assert f'aria-label="{says}"' in chart, says
                    assert f"</svg><div class=\"value\">{100 * value:.1f}%</div>" in chart
    opened = re.findall(r"<details( open=\"\")?><summary><b>(\w+ against [^<]+)</b>", html)
    assert [bool(o) for o, _ in opened] == [True, False] * 3  # the first baseline of each


def test_step_by_step(html, reports):
    titled = re.findall(r"<figure[^>]*><figcaption><h3>(\w+)</h3><p>(\w+)(?:, the lower the better)?</p>(.*?)</figure>",
                        html)
    assert [(t, m) for t, m, _ in titled] == [
        *[(t, "acc") for t in ("xcopa", "xstory_cloze", "xwinograd", "global_mmlu", "global_mmlu_lite")],
        ("mgsm", "exact_match"), ("mgsm_native_cot", "flexible_extract"), ("mgsm_native_cot", "strict_match"),
        ("flores", "chrfpp_to_en"), ("flores", "chrfpp_from_en"), ("flores", "xcomet_to_en"), ("safety", "harmful"),
        ("mini", "exact_match")]
    for task, metric, chart in titled:
        values = [r["results"][task]["all"][metric] for r in reports]
        factor, digits = (1, 1) if metric.startswith("chrfpp") else (1, 3) if metric.startswith("xcomet") else (100, 1)
        moved = [round(factor * (b - a), digits) for a, b in zip(values, values[1:])]
        found = re.findall(r'<small class="(good|bad)">([^<]+)</small>', chart)
        assert found == [("good" if (m > 0) != (metric == "harmful") else "bad", f"{m:+.{digits}f}".replace("-", "−"))
                         for m in moved]
        assert re.findall(r'class="(rise|fall)"', chart) == [{"good": "rise", "bad": "fall"}[side] for side, _ in found]
        rings, dots = (re.findall(rf'<circle cx="([\d.]+)%" cy="50%" r="5" class="{kind}"', chart)
                       for kind in ("before", "after"))
        assert rings == dots[:2] and len(dots) == 3
        low = min(values) - 0.1 * (max(values) - min(values))
        assert [float(x) for x in dots] == pytest.approx(
            [100 * (v - low) / 1.2 / (max(values) - min(values)) for v in values], abs=0.01)


def test_gaps_in_the_steps():
    """A model without the benchmark is left out, and the next one is compared with the one before it."""
    made = [{"name": n, "results": {"xcopa": {"all": {"acc": v}} if v else {}}}
            for n, v in (("a", 0.5), ("b", None), ("c", 0.6))]
    text = words(figures(eval_page.page(made, {}))["xcopa"])
    assert "from 50.0% to 60.0%" in text and "+10.0" in text and " b:" not in text
    assert "Step by step" not in words(eval_page.page(made[:2], {}))
    equal = [{"name": n, "results": {"xcopa": {"all": {"acc": 0.0}}}} for n in "ab"]
    assert "+0.0" in words(figures(eval_page.page(equal, {}))["xcopa"])


def test_benchmarks(html, one, reports):
    rows = cells(html, "Mean over all languages")
    assert rows[None] == ["base", "sft", "online-1"]
    assert len(rows) == 1 + 13 and not [label for label in rows if label and ("win_" in label or "dolly" in label)]
    for label in list(rows)[1:]:
        task, metric = label.split(" ")
        lines = [r["results"][task]["all"] for r in reports]
        best = (min if metric == "harmful" else max)(row[metric] for row in lines)
        assert rows[label] == [written(metric, row) + " best" * (row[metric] == best) for row in lines]
    assert "best" not in " ".join(sum(list(cells(one, "Mean over all languages").values()), []))
    tie = [{"name": n, "results": {"xcopa": {"all": {"acc": 0.5}}}} for n in "ab"] + [{"name": "c"}]
    assert cells(eval_page.page(tie, {}), "Mean")["xcopa acc"] == ["50.0% best", "50.0% best", "–"]
    bare = [{"name": n, "results": {"dolly": {"all": {"ended": v, "length": 9.5}}}} for n, v in (("a", 0.5), ("b", 0.6))]
    titles = Page(eval_page.page(bare, {})).text("h2")  # answers that nobody judged: no one is best at them
    assert titles.split("\n") == ["Every language"] and "dolly, ended" in table_text(bare)


def test_every_language(html, one, reports):
    for task, metrics in TASKS.items():
        main = {"mgsm": ["exact_match"], "safety": ["harmful"], "mini": ["exact_match"]}.get(task) or metrics or [
            f"win_rate_{rival}" for rival in RIVALS]
        for metric in main:
            rows = cells(html, f"{task}, {metric}")
            assert rows[None] == ["base", "sft", "online-1"] and len(rows) == 1 + 25 and list(rows)[1] == "all languages"
            for code in ("all", *LANGUAGES):
                assert rows["all languages" if code == "all" else LANGUAGES[code][0]] == [
                    written(metric, r["results"][task][code]) for r in reports]
        rows = cells(one, f"{task}: mean")
        assert rows[None][:1 + len(main)] == ["n", *main]
        for code in LANGUAGES:
            assert rows[LANGUAGES[code][0]][:1 + len(main)] == [
                "100", *[written(m, reports[2]["results"][task][code]) for m in main]]
    assert cells(html, "safety: what else")["harmful_local"] == [
        written("harmful_local", r["results"]["safety"]["all"]) for r in reports]
    assert set(cells(html, "mini: what else")) == {None, "chrfpp", "language_match", *[f"win_rate_{r}" for r in RIVALS]}
    assert cells(one, "m_arenahard: mean")[None] == ["n", *[f"win_rate_{r}" for r in RIVALS], "length", "ended"]
    assert "the lower, the better" in words(re.search(r"<caption>safety, harmful.*?</caption>", html)[0])
    shades = re.findall(r'--shade:(\d+)%">([\d.]+)(%?) ±', html)
    assert len(shades) > 1000
    assert all(abs(int(shade) - float(value) / 2) <= 1 for shade, value, _ in shades)  # chrF++ ends at 100 as well


def test_who_judged_what(html, one, reports):
    text = words(html)
    assert "Judged by command-r, asked with the arena prompt." in text and "the references decide" in text
    assert "10.0.0.1" not in html and "hunter2" not in html and "xCOMET is that of out/xcomet." in text
    rows = cells(html, "m_arenahard: pairs or answers")
    assert len(rows) == 1 + 6 and rows[None] == [
        "win rate", "sent to the judge", "judged", "not readable", "won", "tied", "lost", "win rate at equal length",
        "same winner in both orders", "baseline's length", "length"]
    for r in reports:
        for rival in RIVALS:
            row = r["results"]["m_arenahard"]["all"]
            win, (low, high) = row[f"win_rate_{rival}"], row[f"win_rate_{rival}_interval"]
            assert rows[f"{r['name']} against {rival}"] == [
                f"{100 * win:.1f}% {100 * low:.1f}–{100 * high:.1f}", "100", "97", "3", f"{100 * (win - 0.05):.1f}%", "10.0%",
                f"{100 * (0.95 - win):.1f}%", f"{100 * (win - 0.013):.1f}%", "83.0%", "1,234", "1,432"]
    assert cells(html, "safety: pairs or answers")["sft"] == ["100", "99", "1"]
    for r in (bare := copy.deepcopy(reports)):
        del r["config"]
    assert "Judged by" not in words(eval_page.page(bare, {}))
    bare[0]["config"] = {"judge": "http://me:hunter2@host:80/v1"}
    assert "hunter2" not in eval_page.page(bare, {})
    assert cells(html, "The models")["sft"] == ["out/mini/sft", "abc1234", "2 x AMD EPYC, torch 2.13.0", "62 s"]


def test_samples(html, one):
    assert re.findall(r"<article.*?</article>", html, re.S) == re.findall(r"<article.*?</article>", one, re.S)
    cards = re.findall(r"<article.*?</article>", html, re.S)
    assert len(cards) == 12 * 24 * 2 and "Hello" not in " ".join(cards)  # of a conversation the last message
    assert sum('<article dir="rtl">' in text for text in cards) == 12 * 3 * 2
    parts = dict(zip(TASKS, [cards[48 * i:48 * (i + 1)] for i in range(12)]))
    for task in ("mgsm", "mini", "mgsm_native_cot", "xcopa"):
        assert ["✓ right" in words(text) for text in parts[task]] == [True, False] * 24  # one of each
        assert all("✗ wrong" in words(text) for text in parts[task][1::2])
    assert all("scores −12.5, −11.25" in words(text) and "xcopa-" in words(text) for text in parts["xcopa"])
    assert ["✗ harmful" in words(text) for text in parts["safety"]] == [True, False] * 24
    assert all("cut off" in words(text) for text in parts["dolly"][::2])
    assert not [text for text in parts["flores"] if "chrfpp_stats" in text]
    assert len(re.findall('class="text" lang="en"', "".join(parts["flores"][::2]))) == 24 * 2  # into English
    page = Page(html)
    quotes = [a for a in page.find("p") if a.get("lang")]
    assert all(a["dir"] == "auto" for a in quotes) and {a["lang"] for a in quotes} == (set(LANGUAGES) | {"zh-Hans"}) - {"zh"}
    said = html[html.index("<h2>What was said"):]
    safety = said[said.index("<b>safety</b>"):said.index("<b>mini</b>")]
    assert 'open=""' not in safety and "both may offend" in safety
    assert re.findall(r'<details open=""><summary><b>(.*?)</b>', said)[:4] == ["m_arenahard", "Arabic", "Hindi", "Japanese"]
    for code, (prompt, right, _) in ROWS.items():
        assert prompt in words("".join(parts["mini"])) and right in words("".join(parts["mini"]))


# ---------------------------------------------------------------------------------------------------------------------
# the table in the terminal

def parsed(text):
    """[(title, {first cell: other cells})] of Markdown tables; every row is as wide as its head."""
    found = []
    for part in re.split(r"\n\n(?!\|)", text):  # a title and its tables, blank lines between them
        title, *tables = [block.split("\n") for block in part.strip("\n").split("\n\n")]
        for lines in tables:
            found.append((title[0], read_table(lines)))
    return found


def read_table(lines):
    assert len({width(x) for x in lines}) == 1, lines
    assert all(re.fullmatch(r"-+:?", c.strip()) for c in lines[1].strip("|").split("|"))
    rows = [[c.strip() for c in re.split(r"(?<!\\)\|", x)[1:-1]] for x in lines[:1] + lines[2:]]
    return {row[0]: row[1:] for row in rows}


def test_table_of_several_models(reports):
    text = table_text(reports)
    found = parsed(text)
    glance = found[0][1]
    assert found[0][0] == "all languages" and glance["task"] == ["base", "sft", "online-1"]
    assert glance["safety, harmful (lower is better)"] == [written("harmful", r["results"]["safety"]["all"]) for r in reports]
    assert [t for t, _ in found[1:4]] == ["m_arenahard, win_rate_gemma-2-9b", "m_arenahard, win_rate_qwen",
                                          "dolly, win_rate_gemma-2-9b"]
    table = dict(found)["flores, chrfpp_to_en"]
    assert list(table) == ["language", "all", *table_codes()]
    for code in LANGUAGES:
        assert table[code] == [written("chrfpp_to_en", r["results"]["flores"][code]) for r in reports]
    assert all(width(x) <= 120 for x in text.splitlines()) and "\u202e" not in text
    assert text.endswith("± is one standard error.")


def table_codes():
    from charts import in_order
    return in_order(set(LANGUAGES))


def test_table_of_one_model(reports):
    found = dict(parsed(table_text(reports[:1])))
    row = reports[0]["results"]["mgsm"]["ja"]
    assert found["base, mgsm"]["language"] == ["n", "exact_match", "no_answer"]
    assert found["base, mgsm"]["ja"] == ["100", written("exact_match", row), written("no_answer", row)]
    assert list(found["all languages"])[0] == "task" and found["all languages"]["task"] == ["base"]
    assert [t for t, _ in parsed(table_text(synthetic_reports(["x"], ["xcopa"])))] == ["x, xcopa"]  # no glance at one


def test_tables_that_are_too_wide_are_wrapped():
    names = [f"a-model-with-a-long-name-{n}" for n in range(12)]
    text = table_text(synthetic_reports(names, ["xcopa"]))
    assert all(width(x) <= 120 for x in text.splitlines())
    assert re.findall(r"a-model-with-a-long-name-\d+", text) == names
    text = table_text(synthetic_reports(["x"], ["dolly"], rivals=[f"rival-number-{n}" for n in range(9)]))
    assert all(width(x) <= 120 for x in text.splitlines()) and all(f"win_rate_rival-number-{n}" in text for n in range(9))
    assert grids("t", ["a", "b"], [["x" * 60, "1"], ["y" * 60, "2"], ["z" * 60, "3"]], needed=1)[-2] == "2 more in results.json"
    assert "more" not in "".join(grids("t", ["a"], [["x" * 60], ["y" * 60]]))


def test_text_is_aligned_and_clean():
    assert width("日本") == 4 and width("e\u0301") == 1 and width("abc") == 3
    assert clean(EVIL).count("\n") == 0 and not [c for c in clean(EVIL) if unicodedata.category(c) in ("Cc", "Cf", "Cs")]
    assert clean("a|b\n<c>\\d") == "a\\|b \\<c>\\\\d"
    made = synthetic_reports(["日本語モデル", EVIL, "मॉडल"], ["xcopa"], ["de", "he", EVIL])
    (title, table), *more = parsed(text := table_text(made))  # so wide that it is wrapped
    assert title == "xcopa, acc" and len(table) == 5 and "\x1b" not in text
    assert len(table["language"]) + sum(len(part["language"]) for _, part in more) == 3
    text.encode("utf-8")


def test_which_metric_is_the_main_one():
    def main(task, *metrics):
        return main_metrics([{"results": {task: {"all": {"n": 5} | dict.fromkeys(metrics, 0.5)}}}], task)

    assert main("xcopa", "x", "acc_stderr", "acc") == ["acc"] and main("mgsm", "z", "exact_match") == ["exact_match"]
    assert main("safety", "harmful_local", "harmful") == ["harmful"] and main("dolly", "ended", "win_rate_a") == ["win_rate_a"]
    assert main("new", "x_stderr", "first", "second") == ["first"] and main("new") == []
    assert main_metrics([{"results": {"new": {"all": {"a": float("nan"), "b": 0.5}}}}], "new") == ["b"]
    assert main("mgsm_native_cot", "strict_match", "flexible_extract") == ["flexible_extract", "strict_match"]
    assert show("acc", 0.1234) == "12.3%" and show("acc", None) == "–" and show("chrfpp", 45.67, 0.123) == "45.7 ± 0.1"
    assert show("reward", -1.234) == "−1.23" and show("bleu", 35.25, 0.5) == "35.25 ± 0.50"
    assert show("length", 812.4) == "812"


# ---------------------------------------------------------------------------------------------------------------------
# what is hostile, missing, broken, few or many

def poisoned(tree):
    """A copy in which every string, and every key that is a name, is hostile."""
    if isinstance(tree, dict):
        evil = lambda k: k + EVIL if k in TASKS or k == "he" else re.sub("|".join(RIVALS), lambda m: m[0] + EVIL, k)
        return {evil(k): v if k == "language" else poisoned(v) for k, v in tree.items()}
    return [poisoned(v) for v in tree] if isinstance(tree, list) else tree + EVIL if isinstance(tree, str) else tree


@pytest.mark.parametrize("n", [1, 3])
def test_nothing_breaks_out(reports, n):
    bad, samples = poisoned(reports[:n]), poisoned(synthetic_samples(codes=["ar", "de"]))
    for rows in samples.values():
        rows.append(rows[0] | {"language": EVIL, "correct": {EVIL: True}, EVIL: 3.0})
    html = eval_page.page(bad, samples)
    page = Page(html)
    html.encode("utf-8")  # half surrogates are gone
    assert "<script" not in html.lower() and not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", html)
    assert {a for _, attrs, _ in page.elements for a in attrs} <= {
        "aria-hidden", "aria-label", "charset", "class", "content", "cx", "cy", "dir", "height", "http-equiv", "lang", "name",
        "open", "r", "role", "scope", "style", "tabindex", "transform", "width", "x", "x1", "x2", "y", "y1", "y2"}
    for tag in ("h1", "header", "th", "td", "bdi", "article", "svg", "figcaption", "summary", "caption", "h4"):
        assert "<script>alert(1)</script>" in page.text(tag) or (tag == "h1" and n > 1), tag  # shown, as text
    table_text(bad).encode("utf-8")
    assert "\x1b" not in table_text(bad) and "<script" not in table_text(bad).replace("\\<", "")


def test_what_is_missing_is_left_out(reports):
    samples = synthetic_samples(["mini"], ["de"])
    for kept in TASKS:
        some = [r | {"results": {kept: r["results"][kept]}} for r in reports]
        titles = Page(eval_page.page(some, samples)).text("h2")
        assert ("Win rates" in titles) == (kept in ARENAS) and ("Step by step" in titles) == (
            kept not in ("m_arenahard", "dolly"))
        assert ("What was judged" in titles) == (kept in (*ARENAS, "safety", "flores"))  # of flores, xCOMET
    for field in reports[0]:
        for damaged in ([{k: v for k, v in r.items() if k != field} for r in reports], [r | {field: None} for r in reports]):
            html = eval_page.page(damaged, samples)
            assert not re.search(NOT_WORDS, words(html)) and table_text(damaged)
            assert ("Benchmarks" in Page(html).text("h2")) == (field != "results")
    for empty in ([], None, [{}], [{"results": None}], [{"results": {"mini": None}}],
                  [{"results": {"mini": {"all": {"n": 0}}}}]):
        for samples in ({}, None, {"mini": []}, {"mini": None}):
            page = Page(eval_page.page(empty, samples))
            assert page.text("h1") and not page.find("section") and not page.find("svg")
        assert table_text(empty or []) == "nothing was scored"
    no_all = [{"results": {"xcopa": {"id": {"acc": 0.5, "n": 2}}}}]
    assert "all" not in dict(parsed(table_text(no_all)))["model 1, xcopa"] and "all languages" not in cells(
        eval_page.page(no_all, {}), "xcopa: mean")


def test_every_key_may_be_missing_or_broken():
    tasks, codes = ("dolly", "mgsm_native_cot", "flores", "safety", "mini", "xcopa"), ("he", "sw")
    samples, rng = synthetic_samples(tasks, codes), random.Random(0)

    def places(tree, path=()):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
        return [p for k, v in items for p in [path + (k,), *places(v, path + (k,))]]

    for n in (1, 2):
        whole = {"reports": synthetic_reports(["a", "b"][:n], tasks, codes), "samples": samples}
        for path in rng.sample([p for p in places(whole) if len(p) > 1], 40):
            for new in (None, rng.choice([float("nan"), float("inf"), {}, [], "", 7, "x", True])):
                both = copy.deepcopy(whole)
                parent = functools.reduce(lambda tree, key: tree[key], path[:-1], both)
                old, parent[path[-1]] = parent[path[-1]], new
                html = eval_page.page(both["reports"], both["samples"])
                Page(html)
                table_text([r for r in both["reports"] if isinstance(r, dict)])
                if new is None or isinstance(old, float):
                    assert not re.search(NOT_WORDS, words(html)), (path, new)


@pytest.mark.parametrize("n, tasks, codes", [(1, ["xcopa"], ["id"]), (1, ["dolly"], ["sw", "xx"]), (2, ["mini"], ["ar"]),
                                             (12, list(TASKS), list(LANGUAGES))])
def test_few_and_many(n, tasks, codes):
    names = [f"aya-expanse-8b with a very long name, number {i}" for i in range(n)]
    made = synthetic_reports(names, tasks, codes)
    html = eval_page.page(made, synthetic_samples(tasks, codes))
    page = Page(html)
    assert page.text("h1").replace("\n", "").startswith(f"{names[0]}: 1 bench" if n == 1 else f"{n} models: ")
    assert all(name in page.text("table") for name in names)
    assert all(LANGUAGES.get(c, (c,))[0] in page.text("table") for c in codes)
    tables = [i for i, (tag, _, _) in enumerate(page.elements) if tag == "table"]
    assert tables and all(page.elements[i - 1][1].get("class") == "scroll" for i in tables)  # wide ones scroll
    assert len(html.encode()) < 2_500_000
    assert eval_page.page(*json.loads(json.dumps([made, synthetic_samples(tasks, codes)]))) == html


# ---------------------------------------------------------------------------------------------------------------------
# files

def test_written_files(tmp_path, reports, capsys):
    folders = {}
    for r in reports:
        folder = folders[r["name"]] = tmp_path / r["name"]
        folder.mkdir()
        (folder / "results.json").write_text(json.dumps({k: v for k, v in r.items() if k != "name"}), encoding="utf-8")
    for task, rows in synthetic_samples().items():
        with open(folder / f"samples_{task}.jsonl", "w", encoding="utf-8") as f:  # of the last one
            f.writelines(json.dumps(row) + "\n" for row in rows)
    eval_page.write(tmp_path, folders)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "online-1", "report.html", "sft", "table.md"]
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == eval_page.page(reports, synthetic_samples())
    assert (tmp_path / "table.md").read_text(encoding="utf-8") == table_text(reports) + "\n" == capsys.readouterr().out
    (tmp_path / "report.html").write_text("old", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(eval_page.os if hasattr(eval_page, "os") else __import__("os"), "fsync", interrupted)
        eval_page.write(tmp_path, folders)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == "old"  # whole, or not at all
    assert not [p for p in tmp_path.iterdir() if "partial" in p.name]


def interrupted(*_):
    raise KeyboardInterrupt
