"""The report: well formed, escaped, whole without a network, tolerant of missing keys, written in one piece."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

import report
from common import parse_config
from data import CLUSTERS, LANGUAGES, SHARED, write_rows
from pages import ROWS, Page

ROOT = Path(report.__file__).parent
STAGES = ["base", "teacher-western", "teacher-eastern", "teacher-mideast", "teacher-asian", "sft-single", "sft",
          "offline-dpo", "online-1", "online-2", "online-3"]
TRUNK = {"base": 0.31, "sft": 0.70, "offline-dpo": 0.745, "online-1": 0.77, "online-2": 0.785, "online-3": 0.792}


def synthetic_results(seed=0):
    """Made-up numbers of the shape that recipe.py writes; nothing here was measured."""
    rng = random.Random(seed)

    def languages(name):
        own = CLUSTERS.get(name.removeprefix("teacher-"), [])
        level = {c: (0.86 if c in own else 0.3) if own else TRUNK.get(name, 0.52) for c in LANGUAGES}
        return {c: {"exact_match": min(1, max(0, rng.gauss(v, 0.05))), "chrfpp": 100 * v ** 0.4,
                    "win_rate_sft": rng.gauss(0.5, 0.04)} for c, v in level.items()}

    stages = []
    for name in STAGES:
        table = languages(name)
        mean = sum(row["exact_match"] for row in table.values()) / len(table)
        win = 0.5 + 0.6 * (mean - 0.70)
        stages.append({"name": name, "exact_match": mean, "chrfpp": 100 * mean ** 0.4, "reward": 4 * mean - 2.5,
                       "seconds": 93.1 if name == "base" else rng.uniform(15, 45), "per_language": table,
                       "win_rate": {"sft": [win, win - 0.021, win + 0.021],
                                    "best_teacher": [win + 0.1, win + 0.08, win + 0.12]}})
    teachers = [f"teacher-{c}" for c in CLUSTERS]
    share = {}
    for code in LANGUAGES:
        weights = [rng.uniform(0.5, 1.5) if code in SHARED else 12 if code in CLUSTERS[t[8:]] else rng.uniform(0, 1)
                   for t in teachers]
        share[code] = {t: w / sum(weights) for t, w in zip(teachers, weights)}
    rounds = [{"round": i, "reward_before": 0.3 + 0.25 * i, "reward_after": 0.55 + 0.25 * i, "greedy": 0.74 + 0.015 * i,
               "best_of_k": 0.80 + 0.01 * i, "oracle": 0.86 + 0.01 * i, "pairs": 2100 - 180 * i,
               "win_rate_sft": [0.54 + 0.01 * i, 0.52 + 0.01 * i, 0.56 + 0.01 * i]} for i in (1, 2, 3)]
    claims = [("arbitrage data is more often right than the best single teacher's", "0.87 against 0.66", True),
              ("offline, then online DPO each add win rate", "+2.7, +2.8 points", True),
              ("the merge beats the mean of its parts", "0.71 against 0.73", False)]
    return {"preset": "mini", "seed": 0, "commit": "abc1234", "hardware": "2 x AMD EPYC, torch 2.13.0",
            "seconds": 451.2, "stages": stages, "rounds": rounds,
            "claims": [dict(zip(("claim", "value", "holds"), claim)) for claim in claims],
            "arbitrage": {"teacher_share": share, "accuracy": {
                "routed": 0.87, "best_single": 0.66, "random": 0.49, "oracle": 0.92,
                "single": {t: v for t, v in zip(teachers, (0.66, 0.51, 0.47, 0.55))}}}}


def synthetic_samples(seed=1):
    rng, samples = random.Random(seed), {}
    for stage in ("base", "sft", "online-3"):
        samples[stage] = []
        for code, (prompt, right, wrong) in ROWS.items():
            for i in range(12):
                correct = rng.random() < TRUNK[stage]
                samples[stage].append({
                    "id": f"spell-{code}-{i}", "language": code, "task": "spell", "prompt": prompt, "reference": right,
                    "completion": right if correct else wrong, "correct": correct})
    return samples


@pytest.fixture(scope="module")
def html():
    return report.render(synthetic_results(), synthetic_samples())


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def test_whole_and_without_a_network(html, page):
    assert html.startswith("<!doctype html>\n<html lang=\"en\">")
    assert not re.search(r"(?i)https?:|//[a-z]|url\(|@import|\bsrc=|<script|<link|<img|<iframe", html)
    policy = page.find("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy and policy[0]["content"].startswith("default-src 'none'")
    assert page.find("meta", name="viewport") and page.find("meta", charset="utf-8")
    assert "prefers-color-scheme:dark" in html
    assert len(html.encode()) < 400_000


def test_colours_can_be_told_apart(html):
    """WCAG contrast against both backgrounds: 4.5 for text, 3 for marks; and of text on the darkest cell of the table."""
    def luminance(rgb):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(a, b):
        a, b = sorted((luminance(a), luminance(b)))
        return (b + 0.05) / (a + 0.05)

    light, dark = re.findall(r":root\{[^}]*\}", html)
    for block in (light, light + dark):
        colours = {name: tuple(int((h * 2 if len(h) == 3 else h)[i:i + 2], 16) / 255 for i in (0, 2, 4))
                   for name, h in re.findall(r"--(\w+):#(\w+)", block)}
        for ground in (colours["bg"], colours["card"]):
            assert min(contrast(colours[name], ground) for name in ("ink", "muted", "good", "bad", "accent")) >= 4.5
            assert min(contrast(colours[f"t{i}"], ground) for i in range(5)) >= 3
        tinted = [0.5 * a + 0.5 * b for a, b in zip(colours["accent"], colours["bg"])]
        assert contrast(colours["ink"], tinted) >= 4.5


def test_the_headline_is_the_gain(page):
    stages = synthetic_results()["stages"]
    first, last = (f"{100 * stage['exact_match']:.0f}%" for stage in (stages[0], stages[-1]))
    assert page.text("h1") == f"From {first} to {last} right, in 23 languages"
    assert "Toy results: a 1 M-parameter model." in page.text("header")
    win = stages[-1]["win_rate"]["sft"]
    assert f"{100 * win[0]:.1f}%" in page.text("header")
    assert f"{100 * win[1]:.1f}–{100 * win[2]:.1f}" in page.text("header")


def test_everything_that_was_measured_is_on_the_page(page):
    results, text = synthetic_results(), page.text()
    for stage in results["stages"]:
        assert text.count(stage["name"]) >= 4  # score, win rate, cost, table
        assert f"{100 * stage['exact_match']:.1f}%" in text and f"{stage['chrfpp']:.1f}" in text
    for name, _ in LANGUAGES.values():
        assert text.count(name) >= 3, f"{name} is missing from a chart"  # share, dumbbell, samples or table
    for claim in results["claims"]:
        assert claim["claim"] in text and claim["value"] in text
    assert text.count("✓\n") == 2 and text.count("✗\n") == 1
    assert "abc1234" in page.text("footer") and "seed 0" in page.text("footer") and "AMD EPYC" in page.text("footer")


def test_charts_speak_and_scale(page):
    drawings = [a for a in page.find("svg") if a.get("aria-hidden") != "true"]
    assert len(drawings) > 80
    for a in drawings:
        assert a["role"] == "img" and a["aria-label"] and "<" not in a["aria-label"]
        assert "width" not in a and "viewbox" not in a  # positions are percentages: text is never scaled
    assert len(page.find("line", class_="mark")) == 11 + 3  # one half, behind each judged stage and round
    for a in page.find("circle") + page.find("rect"):
        for key in ("cx", "x", "width"):
            assert key not in a or 0 <= float(a[key].removesuffix("%")) <= 100
    assert all(a.get("aria-label") for a in page.find("figure"))


def test_the_trunk_steps_to_every_score(page):
    scores = [s["exact_match"] for s in synthetic_results()["stages"] if s["name"] in TRUNK]
    trunk = page.find("line", class_="trunk")
    treads = [(a["x1"], a["x2"]) for a in trunk if a["y1"] == a["y2"] and a["x1"] != a["x2"]]
    assert treads == [(f"{100 * a:.2f}%", f"{100 * b:.2f}%") for a, b in zip(scores, scores[1:])]


def test_shares_fill_the_bar(page, html):
    bars = re.findall(r'<rect x="([\d.]+)%" width="([\d.]+)%"', html)
    shares = bars[7:7 + 24 * 4]  # after the seven bars of accuracy
    for row in zip(*[iter(shares)] * 4):
        assert sum(float(width) for _, width in row) == pytest.approx(100, abs=0.03)
        assert float(row[0][0]) == 0 and float(row[3][0]) + float(row[3][1]) == pytest.approx(100, abs=0.02)


def test_a_completion_cannot_break_out():
    evil = '<script>alert(1)</script>"\' onload=x </p>&amp;\u202eRTL\x00\x07\ud800'
    samples = {name: [{"id": evil, "language": "ar", "task": evil, "prompt": evil, "reference": evil,
                       "completion": evil + name, "correct": name == "online-3"}] for name in ("sft", "online-3")}
    results = synthetic_results()
    results["commit"] = results["hardware"] = results["preset"] = evil
    results["claims"] = [{"claim": evil, "value": evil, "holds": None}]
    for stage in results["stages"][1:3]:
        stage["name"] = stage["name"] + evil
    results["arbitrage"]["teacher_share"]["ar"][evil] = 0.2
    results["stages"][-1]["per_language"][evil] = {"exact_match": 0.5}
    html = report.render(results, samples)
    page = Page(html)
    assert "<script" not in html.lower() and "\x00" not in html and "\x07" not in html
    assert not any(name.startswith("on") for _, attrs, _ in page.elements for name in attrs)
    assert "<script>alert(1)</script>" in page.text("article")  # shown, as text


def test_samples_of_right_to_left_languages(page):
    mirrored = [a for a in page.find("article") if a.get("dir") == "rtl"]
    assert 3 <= len(mirrored) < len(page.find("article"))
    quotes = [a for a in page.find("p") if a.get("lang")]
    assert {a["lang"] for a in quotes} >= {"ar", "fa", "he", "zh-Hans", "zh-Hant", "ja"}
    assert all(a["dir"] == "auto" for a in quotes)


def test_languages_and_values_out_of_the_ordinary():
    """A language that is none of the 24 is drawn among the others; a value off the scale stays on the paper."""
    stages = [{"name": name, "exact_match": 1.7, "per_language": {"sw": {"exact_match": score}}}
              for name, score in (("sft", 0.4), ("online-1", 0.5))]
    page = Page(report.render({"stages": stages}, {}))
    assert "Others" in page.text("figure") and "sw" in page.text("figure")
    assert "100.00%" in [a["cx"] for a in page.find("circle")]


def test_samples_show_both_directions():
    def rows(outcomes):
        return [{"id": str(i), "language": "de", "prompt": f"prompt {i}", "reference": "r", "completion": f"{c} {i}",
                 "correct": c} for i, c in enumerate(outcomes)]
    before, after = [False] * 5 + [True] * 3, [True] * 4 + [False, True, False, False]
    samples = {"sft": rows(before), "online-3": rows(after)}
    page = Page(report.render({"stages": synthetic_results()["stages"]}, samples))
    assert "8 prompts: 4 mended, 2 broken, 1 right in both, 1 in neither" in page.text("summary")
    assert re.findall(r"prompt \d", page.text("article")) == ["prompt 0", "prompt 1", "prompt 6"]


def test_missing_and_broken_values_are_tolerated():
    assert "The recipe, step by step" in Page(report.render({}, {})).text("h1")
    whole = synthetic_results()
    samples = {stage: rows[:40] for stage, rows in synthetic_samples().items()}
    for key in whole:
        Page(report.render({k: v for k, v in whole.items() if k != key}, samples))
        Page(report.render({key: whole[key]}, {}))
    rng = random.Random(0)

    def damaged(tree):
        """A copy in which some keys are gone and some values null or NaN."""
        if isinstance(tree, dict):
            return {k: v if k == "seed" else damaged(v) for k, v in tree.items() if k == "name" or rng.random() > 0.05}
        if isinstance(tree, list):
            return [damaged(v) for v in tree]
        return rng.choice([None, float("nan")]) if not isinstance(tree, str) and rng.random() < 0.1 else tree
    for _ in range(25):
        html = report.render(damaged(whole), damaged(samples))
        Page(html)
        assert "nan" not in re.sub(r"<style>.*?</style>", "", html, flags=re.S).lower().replace("nanoaya", "")


def test_command_line(tmp_path, capsys):
    command = [sys.executable, "report.py", "--run", str(tmp_path)]
    missing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (missing.returncode, missing.stdout) == (1, "")
    assert missing.stderr == f"error: {tmp_path / 'results.json'} not found: python recipe.py writes it\n"

    (tmp_path / "results.json").write_text(json.dumps(synthetic_results()), encoding="utf-8")
    for stage, rows in synthetic_samples().items():
        write_rows(tmp_path / "eval" / stage / "samples_mini.jsonl", rows)
    cfg = parse_config(report.Config, command[2:])
    report.main(cfg)
    assert capsys.readouterr().out == f"wrote {tmp_path / 'report.html'}\n"
    written = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert written == report.render(synthetic_results(), synthetic_samples())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["eval", "report.html", "results.json"]

    for file, text, complaint in (("eval/sft/samples_mini.jsonl", "{", "samples_mini.jsonl:1 is not JSON"),
                                  ("results.json", "{", "results.json is not JSON")):
        (tmp_path / file).write_text(text)
        with pytest.raises(SystemExit, match=complaint):
            report.main(cfg)
        assert (tmp_path / "report.html").read_text(encoding="utf-8") == written


def test_written_beside_and_renamed(tmp_path, monkeypatch):
    (tmp_path / "results.json").write_text(json.dumps(synthetic_results()), encoding="utf-8")
    (tmp_path / "report.html").write_text("the last one")
    monkeypatch.setattr(report, "render", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report.main(report.Config(run=str(tmp_path)))
    assert (tmp_path / "report.html").read_text() == "the last one"
    assert len(list(tmp_path.iterdir())) == 2
