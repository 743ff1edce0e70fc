"""The page of a pool: whole, escaped, its numbers the report's, at home on any number of teachers and languages."""

import copy
import functools
import json
import random
import re

import pytest

import pool_page
from languages import CLUSTERS, LANGUAGES
from pages import ROWS, Page

TEACHERS = [f"teacher-{c}" for c in CLUSTERS]
EVIL = '<script>alert(1)</script>"\' onload=x </p></td>&amp;\u202eRTL\x00\x07\x85\ud800'
NOT_WORDS = r"None|False|True|nan(?!oaya)|inf(?!o)|\{\}|\[\]"  # what Python writes where a value was not looked at


def synthetic_report(teachers=TEACHERS, codes=tuple(LANGUAGES), seed=0):
    """Made-up numbers of the shape that arbitrage.py writes; nothing here was measured."""
    rng = random.Random(seed)
    fields = ("dropped", "truncated", "empty", "language", "script", "repeated", "copied", "role_tokens")

    def rewards():
        middle = rng.gauss(0, 0.5)
        return {"mean": rng.gauss(0, 1), "spread": rng.uniform(0.5, 1.5), "n": 180,
                "quantiles": [middle + d for d in (-1.7, -0.6, 0, 0.5, 1.3)]}

    def share():
        weights = [rng.uniform(0, 1) ** 3 + 1e-3 for _ in teachers]
        return {t: w / sum(weights) for t, w in zip(teachers, weights)}

    def router(answers, only=None):
        win = rng.uniform(0.4, 0.7)
        return {"reward": rng.gauss(0, 1), "win_rate": [win, win - 0.02, win + 0.02], "completions": 2952 * answers,
                "tokens": 35101 * answers, "routed": 2950,
                "share": {c: {only: 1.0} if only else share() for c in codes}}

    def check(c):
        right = rng.uniform(0.6, 0.95)
        return {"accuracy": right, "low": right - 0.04, "high": right + 0.04, "n": 120, "trusted": c != "he",
                "mean": rng.gauss(0, 1), "spread": rng.uniform(0.5, 2), "length_correlation": rng.uniform(-0.5, 0.5),
                "agreement": rng.uniform(0.5, 1)}

    routers = {"reward": router(len(teachers)), "fixed": router(1), "learned": router(1), "random": router(1),
               "single": router(1, teachers[0]), "oracle": router(len(teachers))}
    return {
        "router": "reward", "pairs_from": "best_worst", "prompts": 4392, "duplicates": 3, "routed": 4380, "pairs": 4100,
        "languages": {c: {"prompts": 183, "routed": 180, "pairs": rng.randint(100, 180)} for c in codes},
        "teachers": {t: {"model": f"out/mini/{t}", "completions": 4392, "failed": i, "tokens": 51234 + i, "stopped": ""}
                     for i, t in enumerate(teachers)},
        "arbiter": "out/mini/rm", "judge": "", "forced": ["he"], "audit": {c: check(c) for c in ("all", *codes)},
        "guards": {t: {c: {"n": 183} | {f: rng.randint(0, 12) for f in fields} for c in ("all", *codes)}
                   for t in teachers},
        "rewards": {t: {c: rewards() for c in ("all", *codes)} for t in teachers},
        "routers": routers | {f"teacher {t}": router(1, t) for t in teachers},
        "compared": {"prompts": 2952, "baseline": teachers[0], "judged_by": "out/mini/rm", "held_out": True},
        "seconds": 61.2, "commit": "abc1234", "hardware": "2 x AMD EPYC, torch 2.13.0", "seed": 0}


def synthetic_samples(teachers=TEACHERS, codes=tuple(LANGUAGES), seed=1):
    rng, samples = random.Random(seed), []
    for code in codes:
        prompt, right, wrong = ROWS.get(code, ROWS["en"])
        for i in range(2):
            rewards = [rng.gauss(0, 1) for _ in teachers]
            samples.append({
                "id": f"{code}-{i}", "language": code,
                "prompt": prompt if i else [{"role": "user", "content": "Hello"}, {"role": "user", "content": prompt}],
                "candidates": [{"teacher": t, "sample": 0, "completion": wrong if j else right, "reward": reward,
                                "flags": ["language"] if j == 2 else []}
                               for j, (t, reward) in enumerate(zip(teachers, rewards))],
                "chosen": 0, "rejected": 1 if len(teachers) > 1 else None})
    return samples


def words(html):
    """The page's text on one line, without its stylesheet."""
    return re.sub(r"\s+", " ", "".join(text for text, path in Page(html).texts if "style" not in path))


def cells(html, caption):
    """{first cell: texts of the others} of the table whose caption begins like this, its head under None."""
    found = next(t for t in re.findall(r"<table>.*?</table>", html, re.S) if f"<caption>{caption}" in t)
    rows = [[words(c) for c in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S)]
            for row in re.findall(r"<tr>(.*?)</tr>", found, re.S)]
    assert len({row[0] for row in rows}) == len(rows) and "all" not in [row[0] for row in rows]  # no language
    return {None: rows[0][1:]} | {row[0]: row[1:] for row in rows[1:]}


@pytest.fixture(scope="module")
def report():
    return synthetic_report()


@pytest.fixture(scope="module")
def html(report):
    return pool_page.page(report, synthetic_samples())


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def test_whole_and_without_a_network(html, page):
    assert html.startswith("<!doctype html>\n<html lang=\"en\">")
    assert not re.search(r"(?i)https?:|//[a-z]|url\(|@import|\bsrc=|\bhref=|<script|<link|<img|<iframe", html)
    assert page.find("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"].startswith("default-src 'none'")
    assert page.find("meta", name="viewport") and "prefers-color-scheme:dark" in html
    assert 50_000 < len(html.encode()) < 300_000
    assert page.text("h2").split("\n") == [
        "Can the Arbiter be trusted?", "Who answers what", "What a router is worth", "Rewards",
        "What the guards stopped", "What they wrote", "All numbers"]
    assert not re.search(NOT_WORDS, words(html))


def test_charts_speak_and_stay_on_the_paper(page):
    drawings = [a for a in page.find("svg") if a.get("aria-hidden") != "true"]
    assert len(drawings) == 25 + 6 + 6 + 4 + 4  # audit; win rate and cost of six routers; teachers alone; boxes
    assert all(a["role"] == "img" and a["aria-label"] and "viewbox" not in a for a in drawings)
    for a in page.find("circle") + page.find("rect") + page.find("line"):
        for field in ("cx", "x", "width", "x1", "x2"):
            assert field not in a or 0 <= float(a[field].removesuffix("%")) <= 100


def test_headline(html, page, report):
    assert page.text("h1").replace("\n", "") == "4 teachers, 23 languages: the Arbiter chooses"
    header = re.sub(r"\s+", " ", page.text("header"))
    for part in ("4,392 prompts, 3 duplicates left out.", "4,380 of 4,392 prompts got an answer", "4,100 pairs",
                 "the best answer of the pool against the worst", "highest reward is kept",
                 f"{100 * report['routers']['reward']['win_rate'][0]:.1f}%"):
        assert part in header, part
    assert "Given up" not in header
    for part in ("Arbiter out/mini/rm", "commit abc1234", "seed 0", "2 x AMD EPYC", "61 s"):
        assert part in page.text("footer"), part
    other = copy.deepcopy(report) | {"router": "fixed", "pairs_from": "translation"}
    other["teachers"]["teacher-asian"] |= {"stopped": "20 of 20 answers cut off", "completions": 1}
    text = words(pool_page.page(other, []))
    assert "the language chooses" in text and "the chosen answer against a translation" in text
    assert "Given up: teacher-asian; answers kept: 1. Why: 20 of 20 answers cut off" in text


def test_intervals_are_drawn():
    """Of the audit, from 0 to 100 %, and green or red only where all of it is on one side of 50 %."""
    for low, high, side in ((0.41, 0.49, "worse"), (0.46, 0.54, "even"), (0.51, 0.61, "better")):
        page = Page(pool_page.page({"audit": {"de": {"accuracy": (low + high) / 2, "low": low, "high": high}}}, []))
        line, = page.find("line", class_=f"interval {side}")
        assert (line["x1"], line["x2"]) == (f"{100 * low:.2f}%", f"{100 * high:.2f}%")
        assert [a["cx"] for a in page.find("circle", class_=side)] == [f"{50 * (low + high):.2f}%"]


def test_audit_in_words_and_numbers(html, report):
    text = words(html)
    assert "Not surely better than a coin, so not trusted: Hebrew." in text
    assert "Routed by its rewards all the same: Hebrew." in text
    assert text.count("not trusted, routed all the same") == 1
    rows = cells(html, "With length")
    assert len(rows) == 1 + 25 and rows["Hebrew"][3] == "no, but routed" and rows["German"][3] == "yes"
    for code, row in report["audit"].items():
        shown = rows["all languages" if code == "all" else LANGUAGES[code][0]]
        minus = lambda v: f"{v:.2f}".replace("-", "−")
        assert shown[:3] == [f"{100 * row['accuracy']:.1f}%", f"{100 * row['low']:.1f}–{100 * row['high']:.1f}", "120"]
        assert shown[4:] == [minus(row["mean"]), minus(row["spread"]), minus(row["length_correlation"]),
                             f"{100 * row['agreement']:.1f}%"]
    worst = max((c for c in report["audit"] if c != "all"), key=lambda c: abs(report["audit"][c]["length_correlation"]))
    assert f"go together most in {LANGUAGES[worst][0]} (correlation" in text
    for row in (alone := copy.deepcopy(report))["audit"].values():
        del row["agreement"]
    assert "agreement" not in words(pool_page.page(alone, []))  # no second judge, no column


def test_who_answers_what(html, report):
    heat = [t for t in re.findall(r"<table>.*?</table>", html, re.S) if "<caption>Of the prompts in a language" in t]
    assert len(heat) == 6 and html.index(heat[0]) < html.index("<details")  # the used one is open, five are folded
    for table, router in zip(heat, ("reward", "fixed", "learned", "random", "single", "oracle")):
        rows, share = cells(table, "Of the prompts"), report["routers"][router]["share"]
        for code in LANGUAGES:
            assert rows[LANGUAGES[code][0]] == [f"{100 * share[code][t]:.0f}%" for t in rows[None]]
        for i, t in enumerate(rows[None]):
            assert rows["mean"][i] == f"{100 * sum(row[t] for row in share.values()) / 24:.0f}%"
    shades = re.findall(r"--shade:(\d+)%\">(\d+)%", heat[0])
    assert len(shades) == 25 * 4 and all(abs(int(shade) - int(text) / 2) <= 1 for shade, text in shades)
    mine = {"de": {"teacher-asian": 0.25, "another": 0.75}}  # of all that was routed, not only of what was compared
    whole = pool_page.page(report | {"share": mine}, [])
    assert cells(whole, "Of the prompts") == {None: ["teacher-asian", "another"], "German": ["25%", "75%"],
                                              "mean": ["25%", "75%"]}
    assert whole.count("<caption>Of the prompts in a language") == 6
    assert "Never chosen: teacher-eastern, teacher-mideast, teacher-asian." in words(html)  # by router single


def test_routers_are_compared(html, report):
    rows, text = cells(html, "Every router"), words(html)
    assert len(rows) == 1 + 10 and list(rows)[-1] in ("reward (used)", "oracle")
    for router, row in report["routers"].items():
        label = {"reward": "reward (used)"}.get(router, router)
        shown = rows[f"{label[8:]} alone" if label.startswith("teacher ") else label]
        win = [100 * v for v in row["win_rate"]]
        assert shown == [f"{row['reward']:.3f}".replace("-", "−"), "{:.1f}% {:.1f}–{:.1f}".format(*win),
                         f"{row['completions']:,}", f"{row['tokens']:,}", "2,950"]
    cost = [report["routers"][r]["completions"] for r in re.findall(r"(reward|fixed|learned|random|single|oracle)(?: "
            r"\(used\))?<small>", html)]
    assert len(cost) == 6 and cost == sorted(cost)
    assert "Compared on 2,952 prompts; fixed, single and learned were fitted on others." in text
    assert "Win rate against teacher-western" in text
    assert "; judged by the Arbiter itself" in text  # in the headline
    assert "The judge is out/mini/rm, the Arbiter itself" in text and "biased by construction" in text
    other = copy.deepcopy(report)
    other["compared"] |= {"judged_by": "out/other-rm", "held_out": False}
    text = words(pool_page.page(other, []))
    assert "biased by construction" not in text and "judged by the Arbiter itself" not in text
    assert "The judge is out/other-rm." in text
    assert "that flatters them" in text
    other["compared"] |= {"fitted_on": 1234}
    assert "were fitted on 1,234 others" in words(pool_page.page(other, []))


def test_boxes_and_medians(html, page, report):
    assert "compare only within a prompt" in words(html)
    quantiles = {t: report["rewards"][t]["all"]["quantiles"] for t in TEACHERS}
    far = max(abs(v) for q in quantiles.values() for v in q)
    order = sorted(TEACHERS, key=lambda t: -quantiles[t][2])
    place = lambda v: f"{50 + 50 * v / far:.2f}%"
    assert [(a["x1"], a["x2"]) for a in page.find("line", class_="whisker")] == [
        (place(quantiles[t][0]), place(quantiles[t][4])) for t in order]
    boxes = [a for a in page.find("rect") if re.search(r"--t\d", a["style"])]
    for a, t in zip(boxes, order, strict=True):
        left, width = (float(a[k][:-1]) for k in ("x", "width"))
        assert [left, left + width] == pytest.approx([50 + 50 * quantiles[t][i] / far for i in (1, 3)], abs=0.02)
    medians = cells(html, "Median")
    for code in LANGUAGES:
        for t, shown in zip(medians[None], medians[LANGUAGES[code][0]], strict=True):
            assert shown == f"{report['rewards'][t][code]['quantiles'][2]:.2f}".replace("-", "−")
    for t, shown in list(cells(html, "Every teacher's".replace("'", "&#x27;")).items())[1:]:
        row = report["rewards"][t]["all"]
        assert shown == [f"{row['mean']:.3f}".replace("-", "−"), f"{row['spread']:.3f}", "180"]


def test_guards_are_counted(html, report):
    def shown(n, of):
        return f"{n} {100 * n / of:.1f}%" if n else "0"

    fields = ("dropped", "truncated", "empty", "language", "script", "repeated", "copied", "role_tokens")
    each = cells(html, "Answers that each guard stops;")
    assert each[None] == ["answers", "dropped", "cut off", "empty", "wrong language", "wrong script", "in a loop",
                          "copies the prompt", "chat tokens"]
    for t in TEACHERS:
        assert each[t] == ["183", *[shown(report["guards"][t]["all"][f], 183) for f in fields]]
    together, dropped = cells(html, "Answers that each guard stops, all"), cells(html, "Dropped")
    for code, (label, _) in LANGUAGES.items():
        sums = [sum(report["guards"][t][code][f] for t in TEACHERS) for f in fields]
        assert together[label] == ["732", *[shown(n, 4 * 183) for n in sums]]
        assert dropped[label] == [shown(report["guards"][t][code]["dropped"], 183) for t in TEACHERS]
    new = copy.deepcopy(report)
    for row in new["guards"].values():
        del row["all"]  # then it is added up
        row["de"]["rude"] = 1  # a guard that this page does not know
        del row["de"]["copied"], row["fr"]["dropped"]  # not named: none
    rows = cells(pool_page.page(new, []), "Answers that each guard stops;")
    assert cells(pool_page.page(new, []), "Dropped")["French"] == ["0"] * 4
    assert rows["teacher-asian"][0] == f"{24 * 183:,}"
    assert rows[None][-1] == "rude" and rows["teacher-asian"][-1][:2] == "1 "


def test_samples_side_by_side(html, page):
    cards = re.findall(r"<article.*?</article>", html, re.S)
    assert len(cards) == 48 and len(page.find("details", open="")) == 3
    for text in map(words, cards):
        assert text.count("✓ chosen") == text.count("✗ rejected") == 1
        assert text.index("✓ chosen") < text.index("✗ rejected") < text.index("stopped by a guard: wrong language")
        assert "Hello" not in text  # of a conversation the last message
    for row in synthetic_samples():
        for candidate in row["candidates"]:
            reward = f"{candidate['reward']:.2f}".replace("-", "−")
            assert any(ROWS[row["language"]][0] in text and f" reward {reward}" in text for text in map(words, cards))
    assert sum('<article dir="rtl">' in text for text in cards) == 2 * 3  # Arabic, Persian, Hebrew
    quotes = [a for a in page.find("p") if a.get("lang")]
    assert len(quotes) == 48 * 5 and all(a["dir"] == "auto" for a in quotes)
    assert {a["lang"] for a in quotes} == (set(LANGUAGES) | {"zh-Hans"}) - {"zh"}


def test_long_and_short_samples():
    many = [f"t{i}" for i in range(30)]
    row = synthetic_samples(many, ["de"])[0] | {"chosen": 17, "rejected": 29}
    row["candidates"][17]["completion"] = "x" * 5000
    text = words(pool_page.page({}, [row] * 9))
    assert text.count("✓ chosen") == text.count("✗ rejected") == 3 and text.count("and 24 more answers") == 3
    assert text.count("x" * 300 + "… (5000 characters)") == 3 and "x" * 301 not in text
    order = re.findall(r"(t\d+) (?:. \w+ )?reward", text)
    assert len(order) == 3 * 6
    others = sorted((i for i in range(30) if i not in (17, 29)), key=lambda i: -row["candidates"][i]["reward"])
    assert order[:6] == ["t17", "t29", *[f"t{i}" for i in others[:4]]]


def poisoned(tree):
    """A copy in which every key that is a name, and every string, is hostile."""
    if isinstance(tree, dict):
        return {(k + EVIL if k.startswith("teacher") and k != "teachers" and k != "teacher" else k):
                v if k in ("router", "language") else poisoned(v) for k, v in tree.items()}
    return [poisoned(v) for v in tree] if isinstance(tree, list) else tree + EVIL if isinstance(tree, str) else tree


def test_nothing_breaks_out(report):
    bad, samples = poisoned(report), poisoned(synthetic_samples())
    bad["router"] = EVIL
    for part in ("audit", "languages"):
        bad[part][EVIL] = bad[part]["he"]
    bad["forced"] = [EVIL]
    bad["routers"] |= {EVIL: bad["routers"]["fixed"], f"teacher {EVIL}": bad["routers"]["single"]}
    for t in bad["guards"]:
        bad["guards"][t][EVIL] = bad["guards"][t]["he"] | {EVIL: 3}
        bad["rewards"][t][EVIL] = bad["rewards"][t]["he"]
    for row in bad["routers"].values():
        row["share"][EVIL] = {EVIL: 1.0}
    samples.append(samples[0] | {"language": EVIL, "id": EVIL, "chosen": EVIL})
    html = pool_page.page(bad, samples)
    page = Page(html)
    html.encode("utf-8")  # half surrogates are gone
    assert "<script" not in html.lower() and not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", html)
    assert {name for _, attrs, _ in page.elements for name in attrs} <= {
        "aria-hidden", "aria-label", "charset", "class", "content", "cx", "cy", "dir", "height", "http-equiv", "lang",
        "name", "open", "r", "role", "scope", "style", "tabindex", "transform", "width", "x", "x1", "x2", "y", "y1",
        "y2"}
    for tag in ("h1", "header", "th", "td", "bdi", "article", "svg", "figcaption", "footer", "summary", "caption"):
        assert tag == "caption" or "<script>alert(1)</script>" in page.text(tag), tag  # shown, as text
    assert {tag for tag, _, _ in page.elements} == {tag for tag, _, _ in Page(pool_page.page(
        report | {"teachers": {t: {"stopped": "x"} for t in TEACHERS}}, synthetic_samples())).elements}


def test_what_is_missing_is_left_out(report):
    sections = {"audit": "Can the Arbiter", "rewards": "Rewards", "guards": "What the guards", "routers": "Who answers"}
    samples = synthetic_samples()[:6]
    for key in report:
        for damaged in ({k: v for k, v in report.items() if k != key}, report | {key: None}):
            page = Page(pool_page.page(damaged, samples))
            for part, title in sections.items():
                assert (title in page.text("h2")) == (part != key or part == "audit"), (key, title)  # forced is left
        Page(pool_page.page({key: report[key]}, []))
    for empty in ({}, {key: None for key in report}, {key: {} for key in report if isinstance(report[key], dict)}):
        for samples in ([], None):
            page = Page(pool_page.page(empty, samples))
            assert page.text("h1") == "A pool of teachers" and not page.find("section") and not page.find("svg")


def test_every_key_may_be_missing_or_broken():
    some = (TEACHERS[:2], ("he", "sw"))
    whole, samples = synthetic_report(*some), synthetic_samples(*some)
    rng = random.Random(0)

    def places(tree, path=()):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
        return [p for k, v in items for p in [path + (k,), *places(v, path + (k,))]]

    for path in rng.sample([p for p in places({"report": whole, "samples": samples}) if len(p) > 1], 150):
        for new in (None, rng.choice([float("nan"), float("inf"), {}, [], "", 7])):
            both = copy.deepcopy({"report": whole, "samples": samples})
            parent = functools.reduce(lambda tree, key: tree[key], path[:-1], both)
            old, parent[path[-1]] = parent[path[-1]], new
            html = pool_page.page(both["report"], both["samples"])
            Page(html)
            if new is None or isinstance(old, (int, float)):
                assert not re.search(NOT_WORDS, words(html)), (path, new)


def test_nothing_where_something_was():
    some = (TEACHERS[:2], ("he", "sw"))
    report, samples = synthetic_report(*some), synthetic_samples(*some)
    for t in some[0]:
        report["rewards"][t]["all"]["quantiles"] = [0.0] * 5  # teachers that never differ
    report["routers"]["reward"]["share"]["he"] = None
    for k in ("win_rate", "completions"):
        report["routers"]["learned"][k] = None
    report["audit"]["sw"]["low"] = None
    for c in samples[0]["candidates"]:
        c |= {"flags": [None], "reward": None, "completion": None}
    html = pool_page.page(report, samples)
    assert list(cells(html, "Of the prompts")) == [None, "sw", "mean"]
    assert cells(html, "Every router")["learned"][1:3] == ["–", "–"] and cells(html, "With length")["sw"][1] == "–"
    card = words(re.search(r"<article.*?</article>", html, re.S)[0])
    assert card.count("(empty)") == card.count("reward –") == 2 and "guard" not in card
    assert {a["cx"] for a in Page(html).find("circle", class_="even")} >= {"50.00%"}
    assert not re.search(NOT_WORDS, words(html))


@pytest.mark.parametrize("n,codes", [(1, ["de"]), (2, ["sw", "xx"]), (30, list(LANGUAGES))])
def test_few_and_many(n, codes):
    teachers = [f"CohereLabs/aya-expanse-8b with a very long name, number {i}" for i in range(n)]
    report = synthetic_report(teachers, codes)
    html = pool_page.page(report, synthetic_samples(teachers, codes))
    page = Page(html)
    assert page.text("h1").startswith("1 teacher," if n == 1 else f"{n} teachers,")
    spoken = len({c[:2] for c in codes})
    assert f", {spoken} language{'s' * (n > 1)}: " in page.text("h1").replace("\n", "")
    assert all(t in page.text("table") and t in page.text("figure") for t in teachers)
    assert all(LANGUAGES.get(c, (c,))[0] in page.text("table") for c in codes)
    tables = [i for i, (tag, _, _) in enumerate(page.elements) if tag == "table"]
    assert tables and all(page.elements[i - 1][1].get("class") == "scroll" for i in tables)  # wide ones scroll
    assert len(html.encode()) < 1_200_000


def test_a_report_that_went_through_a_file(report):
    samples = synthetic_samples()
    assert pool_page.page(*json.loads(json.dumps([report, samples]))) == pool_page.page(report, samples)
