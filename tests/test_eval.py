"""
Evaluation: the judge, the intervals, the miniature's metrics, the language identifier, and eval.py's files.

    python -m pytest tests/test_eval.py

Judge and intervals are checked against answers worked out by hand and against slow second implementations;
`test_wrong_judges_are_seen` and `test_an_interval_that_ignores_clusters_is_seen` show that they would notice.
"""

import collections
import json
import math
import random
import statistics
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from common import atomic_dir
from chat import Chat
from data import LANGUAGES
from eval import Config, main
from generate import complete
from mini.items import WrongAnswers, load_items, load_udhr
from mini.items import rows as item_rows
from mini.langid import LanguageModel
from model import load
from reward import load_reward_model, new_reward_model, score, write_reward_model
from tasks.flores import chrf, corpus_chrf
from stats import clustered_interval
from tasks.mini import item_of, judge, minimal_pairs, normal, per_language


cpu = tiny.cpu


def nfd(text):
    return unicodedata.normalize("NFD", text)


# --- the judge ---

FR, KO, HI = "trois cent quarante-sept mètres", "삼백사십칠", "तीन सौ सैंतालीस"
VI, AR = "bốn trăm hai mươi ba", "ثلاثمائة وسبعة"
JUDGED = [  # a, b, reference, verdict
    (FR, "trois cent", FR, 1.0), ("trois cent", FR, FR, 0.0),  # one is right
    (FR, FR, FR, 0.5), (FR, f"  {FR}\n", FR, 0.5),  # both are right, spaces around do not count
    (KO, nfd(KO), KO, 0.5), (nfd(KO), "삼백", KO, 1.0), ("삼백", nfd(KO), KO, 0.0), (HI, nfd(HI), nfd(HI), 0.5),
    (nfd(VI), "", VI, 1.0), (nfd(FR), FR.replace("è", "e"), FR, 1.0),
    ("trois cent quarante", "deux", FR, 1.0), ("deux", "trois cent quarante", FR, 0.0),  # both wrong: chrF++ decides
    ("삼백사십", "이백", KO, 1.0), ("सैंतालीस", "तीन सौ", HI, 1.0), ("مائة", "ثلاثمائة", AR, 0.0),
    ("deux", "deux", FR, 0.5), ("", "", FR, 0.5), ("", "三", KO, 0.5),  # equal, or equally far away
    ("trois cènt", nfd("trois cènt"), FR, 0.5),  # wrong in the same way, in two forms
    ("MÈTRES", "x", FR, 0.5),  # case counts: not one character n-gram in common
    ("trois  cent quarante-sept mètres", "trois cent quarante-sept metres", FR, 1.0)]  # neither is equal


@pytest.mark.parametrize("a, b, reference, verdict", JUDGED)
def test_judge(a, b, reference, verdict):
    assert judge(a, b, reference) == verdict
    assert judge(b, a, reference) == 1 - verdict


@pytest.mark.parametrize("wrong", [
    lambda a, b, r: float(a == r) if (a == r) != (b == r) else 0.5,  # chrF++ left out
    lambda a, b, r: 0.5 if a == b else float(chrf(a, [r]) > chrf(b, [r])),  # a tie is a loss
    lambda a, b, r: judge_plain(a, b, r) if a.strip() == a else 0.0,  # spaces count
    lambda a, b, r: judge_plain(nfd(a), b, r) if normal(a) != normal(r) else float(a == r)])  # NFC forgotten
def test_wrong_judges_are_seen(wrong, monkeypatch):
    monkeypatch.setitem(globals(), "judge", wrong)
    with pytest.raises(AssertionError):
        for case in JUDGED:
            test_judge(*case)


judge_plain = judge


# --- intervals ---

def slow_interval(values, clusters, draw, resamples):
    """One resample after another, rows listed one by one; `draw(n)` -> n cluster numbers. Percentiles by sorting."""
    names = sorted(set(clusters))
    means = []
    for _ in range(resamples):
        drawn = [v for number in draw(len(names)) for v, c in zip(values, clusters) if c == names[number]]
        means.append(sum(drawn) / len(drawn))
    means.sort()

    def percentile(p):
        place = p * (len(means) - 1)
        low = math.floor(place)
        return means[low] + (place - low) * (means[min(low + 1, len(means) - 1)] - means[low])

    return sum(values) / len(values), percentile(0.025), percentile(0.975)


def sample(seed=0, n=25):
    """Clusters of 1 to 6 rows whose values resemble each other."""
    rng = random.Random(seed)
    rows = []
    for item in range(n):
        level = rng.random()
        rows += [(float(rng.random() < level), f"item {item}") for _ in range(rng.randint(1, 6))]
    rng.shuffle(rows)
    return map(list, zip(*rows))


def test_interval_equals_the_slow_one():
    values, clusters = sample()
    rng = np.random.default_rng(7)
    expected = slow_interval(values, clusters, lambda n: rng.integers(n, size=n), 150)
    assert clustered_interval(values, clusters, seed=7, resamples=150) == pytest.approx(expected, abs=1e-12)


def test_interval_with_other_random_numbers():
    values, clusters = sample(3)
    rng = random.Random(1)
    expected = slow_interval(values, clusters, lambda n: rng.choices(range(n), k=n), 1500)
    found = clustered_interval(values, clusters)
    assert found[0] == pytest.approx(statistics.fmean(values))
    error = (expected[2] - expected[1]) / 3.92
    assert found == pytest.approx(expected, abs=error / 4)
    assert clustered_interval(values, clusters) == found  # the seed is fixed


def test_interval_of_independent_rows_is_the_normal_one():
    rng = random.Random(2)
    values = [rng.gauss(0.3, 1.0) for _ in range(400)]
    mean, low, high = clustered_interval(values, range(400))
    half = 1.96 * statistics.pstdev(values) / 20
    assert (mean - low, high - mean) == pytest.approx((half, half), rel=0.1)


def test_an_interval_that_ignores_clusters_is_seen():
    """Nine equal rows an item are one observation: the interval is that of the items, three times as wide as naive."""
    rng = random.Random(4)
    items = [float(rng.random() < 0.6) for _ in range(100)]
    values, clusters = [v for v in items for _ in range(9)], [i for i in range(100) for _ in range(9)]
    found, of_items = clustered_interval(values, clusters), clustered_interval(items, range(100))
    assert found == pytest.approx(of_items, abs=1e-12)
    naive = clustered_interval(values, range(900))
    assert (found[2] - found[1]) / (naive[2] - naive[1]) == pytest.approx(3, rel=0.15)
    assert clustered_interval([1.0, 1.0], ["a", "b"]) == (1.0, 1.0, 1.0)


# --- the metrics of a handful of samples, by hand ---

def sample_row(item, language, completion, reference):
    return {"id": f"spell-{language}-{item}", "item": f"spell {item}", "language": language, "task": "spell",
            "prompt": "p", "reference": reference, "completion": completion, "ended": True,
            "correct": normal(completion) == normal(reference)}


def test_metrics_by_hand():
    ours = [sample_row(1, "en", "one", "one"), sample_row(2, "en", "too", "two"), sample_row(1, "fr", "zéro", "un"),
            sample_row(2, "fr", "deux", "deux"), sample_row(3, "fr", "", "trois")]
    theirs = [sample_row(1, "en", "one", "one"), sample_row(2, "en", "two", "two"), sample_row(1, "fr", "d", "un"),
              sample_row(2, "fr", "x", "deux")]  # their third French answer is missing
    for s, pair in zip(ours, [1.0, 0.0, None, 1.0, None]):
        s["minimal_pair"] = pair
    table = per_language(ours, {"sft": theirs},
                         {"one": "en", "too": "en", "zéro": "fr", "deux": "fr"}.get)
    assert list(table) == ["all", "en", "fr"] and [t["n"] for t in table.values()] == [5, 2, 3]
    assert [t["exact_match"] for t in table.values()] == [2 / 5, 1 / 2, 1 / 3]
    assert [t["language_match"] for t in table.values()] == [4 / 5, 1, 2 / 3]  # an empty answer is in no language
    assert [t["minimal_pairs"] for t in table.values()] == [2 / 3, 1 / 2, 1]
    # en: a tie and a loss; fr: both wrong and equally far (0.5), a win, none to compare with
    assert [t["win_rate_sft"] for t in table.values()] == [2 / 4, 1 / 4, 3 / 4]
    assert [s["win_rate_sft"] for s in ours] == [0.5, 0.0, 0.5, 1.0, None]
    for language, t in table.items():
        at = [s for s in ours if language in ("all", s["language"])]
        assert t["chrfpp"] == corpus_chrf([s["completion"] for s in at], [s["reference"] for s in at])
        for metric in ("exact_match", "language_match", "minimal_pairs", "win_rate_sft"):
            low, high = t[f"{metric}_interval"]
            assert low <= t[metric] <= high and t[f"{metric}_stderr"] == pytest.approx((high - low) / 3.92)
    assert "reward" not in table["all"]
    # items are shared by languages: three clusters, of 2, 2 and 1 rows
    expected = clustered_interval([1.0, 0.0, 0.0, 1.0, 0.0], ["1", "2", "1", "2", "3"])
    assert (table["all"]["exact_match"], *table["all"]["exact_match_interval"]) == expected


def test_items_of_ids():
    for name, task, language, item in (
            ("spell-ar-517", "spell", "ar", "spell 517"), ("unit-zh-Hant-2 s", "unit", "zh-Hant", "unit 2 s"),
            ("relative-de--5 h", "relative", "de", "relative -5 h")):
        assert item_of({"id": name, "task": task, "language": language}) == item
    rows = item_rows("test", ("spell", "relative", "unit"))
    assert len({item_of(r) for r in rows}) * len(LANGUAGES) == len(rows)  # every item in every language


# --- minimal pairs ---

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models, a reward model, and a benchmark file: 7 items in three languages, of all tasks."""
    folder = tmp_path_factory.mktemp("eval")
    for seed, name in enumerate(("one", "two")):
        tiny.make_checkpoint(folder / name, seed)
    with atomic_dir(folder / "rm") as out:
        write_reward_model(out, new_reward_model(folder / "one"), folder / "one")
    wanted = {}
    for row in item_rows("test", ("spell", "relative", "unit", "date", "list", "translate"), ("fr", "ko", "ar")):
        wanted.setdefault((row["task"], row["language"]), []).append(row)
    rows = [row for (task, _), found in wanted.items() for row in found[:2 if task in ("spell", "unit") else 1]]
    (folder / "data").mkdir()
    tiny.write(folder / "data" / "test.jsonl", rows)
    return folder


@pytest.mark.parametrize("batch_size", [2, 128])
def test_minimal_pairs_one_by_one(folder, batch_size):
    model, chat, rows = load(folder / "one"), Chat(folder / "one"), tiny.read(folder / "data" / "test.jsonl")
    rows = [row | {"watched": row["task"] not in ("date", "list", "translate")} for row in rows]
    found = minimal_pairs(model, chat, rows, batch_size)
    wrong, seen = WrongAnswers(load_items()), collections.Counter()

    def mean_logp(row, answer):
        head, tail = chat.prompt_ids(row["prompt"]), chat.completion_ids(answer)
        logp = model(torch.tensor([head + tail]))[0].log_softmax(-1)
        return statistics.fmean(logp[len(head) + t - 1, token].item() for t, token in enumerate(tail))

    for row, outcome in zip(rows, found, strict=True):
        if row["task"] in ("date", "list", "translate"):
            assert outcome is None  # they have no near misses
            continue
        x = row["id"].removeprefix(f"{row['task']}-{row['language']}-")
        near = [text for why, text in wrong(row["task"], x, row["language"], random.Random(row["id"]))
                if why in ("one_digit_off", "wrong_plural", "wrong_direction", "wrong_unit")]
        assert near[0] != row["reference"]
        expected = float(mean_logp(row, row["reference"]) > mean_logp(row, near[0]))
        assert outcome == expected
        seen[outcome] += 1
    assert len(seen) == 2  # some are right and some are wrong, so the comparison above means something


# --- the language identifier ---

@pytest.fixture(scope="module")
def identify():
    return LanguageModel.shipped().identify


def test_identifier_on_held_out_answers(identify):
    """Measured: 99.8 % where every language that gives this answer counts as right, 92.6 % where one does."""
    speakers = collections.defaultdict(set)
    for row in item_rows():
        speakers[row["reference"].casefold()].add(row["language"])  # "21 minutos": Spanish and Portuguese; "8 meter"
    strict, fair = collections.defaultdict(list), collections.defaultdict(list)
    for row in item_rows("test"):
        seen = identify(row["reference"])
        strict[row["language"]].append(seen == row["language"])
        fair[row["language"]].append(seen in speakers[row["reference"].casefold()])
    assert statistics.fmean(x for found in strict.values() for x in found) > 0.90
    assert statistics.fmean(x for found in fair.values() for x in found) > 0.97
    for language, found in fair.items():  # measured: it 0.972, cs 0.981, all others 1
        assert statistics.fmean(found) > 0.96, language
    for language in ("ar", "el", "fa", "he", "hi", "ko", "vi", "zh"):
        assert statistics.fmean(strict[language]) == 1, language  # a script or diacritics of their own
    assert fair.keys() == LANGUAGES.keys()


def test_identifier_on_held_out_articles(identify):
    """Articles 25 to 30 of the Universal Declaration, which the identifier has not read, and their halves."""
    rows = load_udhr(range(25, 31))
    assert len(rows) == 6 * len(LANGUAGES)
    assert [r["id"] for r in rows if identify(r["text"]) != r["language"]] == []
    halves = [(r["language"], half) for r in rows for half in
              (r["text"][:len(r["text"]) // 2], r["text"][len(r["text"]) // 2:])]
    assert statistics.fmean(identify(text) == language for language, text in halves) > 0.99


def test_identifier_details(identify):
    assert identify("") is None and identify(" \n ") is None
    assert identify("thirty-six kilograms") == identify("THIRTY-SIX KILOGRAMS ") == "en"
    assert identify("\u1234\u1235") in LANGUAGES  # unknown characters: some answer, no error
    tiny_one = LanguageModel([("a", "xx"), ("b", "yy"), ("b", "zz")])
    assert (tiny_one.identify("x"), tiny_one.identify("y"), tiny_one.identify("z")) == ("a", "b", "b")


# --- eval.py ---

def results(path):
    return json.loads((Path(path) / "results.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def evaluated(folder):
    """Both models in one call of the script."""
    done = tiny.script("eval.py", "--model", folder / "one", folder / "two", "--tasks", "mini",
                       "--data", folder / "data", "--out", folder / "out")
    return done.stdout


def test_several_models_in_one_call(folder, evaluated):
    assert sorted(p.name for p in (folder / "out").iterdir()) == ["one", "report.html", "table.md", "two"]
    assert [line.split(",")[0] for line in evaluated.splitlines()[:2]] == ["one", "two"]
    table, last = (folder / "out" / "table.md").read_text(encoding="utf-8"), evaluated.splitlines()[-1]
    assert table in evaluated and last.startswith("mini of one two: results") and last.endswith(str(folder / "out"))
    page = (folder / "out" / "report.html").read_text(encoding="utf-8")
    for name in ("one", "two"):
        right = results(folder / "out" / name)["results"]["mini"]["ko"]
        shown = f"{100 * right['exact_match']:.1f}% ± {100 * right['exact_match_stderr']:.1f}"
        assert shown in page and shown in evaluated
    rows = tiny.read(folder / "data" / "test.jsonl")
    for name in ("one", "two"):
        out = folder / "out" / name
        assert sorted(p.name for p in out.iterdir()) == ["results.json", "samples_mini.jsonl"]
        assert results(out)["model"] == str(folder / name)
        samples = tiny.read(out / "samples_mini.jsonl")
        expected = complete(load(folder / name), Chat(folder / name), rows, 48)
        for sample, row, answer in zip(samples, rows, expected, strict=True):
            assert {k: sample[k] for k in ("id", "language", "task", "prompt", "reference")} == {
                k: row[k] for k in ("id", "language", "task", "prompt", "reference")}
            assert sample["completion"] == answer["completion"] and sample["ended"] == answer["ended"]
            assert sample["correct"] == (normal(answer["completion"]) == normal(row["reference"]))
    one, two = (tiny.read(folder / "out" / name / "samples_mini.jsonl") for name in ("one", "two"))
    assert [s["completion"] for s in one] != [s["completion"] for s in two]


def test_format_of_results(folder, evaluated):
    """DESIGN.md, section 3: task -> language -> metric, its standard error, n; an "all" beside the languages."""
    table = results(folder / "out" / "one")["results"]
    assert list(table) == ["mini"] and list(table["mini"]) == ["all", "fr", "ko", "ar"]
    for language, line in table["mini"].items():
        assert line["n"] == (24 if language == "all" else 8)
        metrics = {k for k in line if k != "n" and not k.endswith(("_stderr", "_interval"))}
        assert metrics >= {"exact_match", "chrfpp", "language_match", "minimal_pairs"}
        for metric in metrics:
            assert isinstance(line[metric], float) and math.isfinite(line[metric])
            assert metric == "chrfpp" or line[f"{metric}_stderr"] >= 0
    samples = tiny.read(folder / "out" / "one" / "samples_mini.jsonl")
    assert table["mini"]["all"]["exact_match"] == statistics.fmean(s["correct"] for s in samples)
    # the samples hold all that is needed to score them again
    again = [dict(s) for s in samples]
    assert per_language(again, {}, LanguageModel.shipped().identify) == table["mini"] and again == samples


def test_limit(folder):
    main(Config(model=[str(folder / "one")], data=str(folder / "data"), out=str(folder / "limited"), limit=3))
    assert sorted(p.name for p in (folder / "limited").iterdir()) == [
        "report.html", "results.json", "samples_mini.jsonl", "table.md"]
    samples = tiny.read(folder / "limited" / "samples_mini.jsonl")
    rows = tiny.read(folder / "data" / "test.jsonl")
    expected = [r["id"] for language in ("fr", "ko", "ar") for r in [r for r in rows if r["language"] == language][:3]]
    assert sorted(s["id"] for s in samples) == sorted(expected)
    assert {k: t["n"] for k, t in results(folder / "limited")["results"]["mini"].items()} == {
        "all": 9, "fr": 3, "ko": 3, "ar": 3}


def test_win_rates_against_baselines(folder, evaluated):
    """Against itself one half everywhere; against the other, what judge says; and the other way round the rest to 1."""
    for name, other in (("one", "two"), ("two", "one")):
        main(Config(model=[str(folder / name)], data=str(folder / "data"), out=str(folder / f"against-{name}"),
                    baseline=[str(folder / "out" / "one"), str(folder / "out" / "two")]))
        table = results(folder / f"against-{name}")["results"]["mini"]
        for line in table.values():
            assert line[f"win_rate_{name}"] == 0.5 and line[f"win_rate_{name}_interval"] == [0.5, 0.5]
        theirs = {s["id"]: s["completion"] for s in tiny.read(folder / "out" / other / "samples_mini.jsonl")}
        samples = tiny.read(folder / f"against-{name}" / "samples_mini.jsonl")
        verdicts = [judge(s["completion"], theirs[s["id"]], s["reference"]) for s in samples]
        assert [s[f"win_rate_{other}"] for s in samples] == verdicts
        assert table["all"][f"win_rate_{other}"] == pytest.approx(statistics.fmean(verdicts))
    a, b = (results(folder / f"against-{n}")["results"]["mini"] for n in ("one", "two"))
    for language in a:
        assert a[language]["win_rate_two"] + b[language]["win_rate_one"] == pytest.approx(1)
    assert a["all"]["win_rate_two"] != 0.5


def test_reward_is_reported(folder, evaluated):
    main(Config(model=[str(folder / "one")], data=str(folder / "data"), out=str(folder / "rewarded"),
                reward_model=str(folder / "rm")))
    samples = [s for s in tiny.read(folder / "rewarded" / "samples_mini.jsonl") if "reward" in s]
    expected = score(load_reward_model(folder / "rm"), Chat(folder / "rm"),
                     [(s["prompt"], s["completion"]) for s in samples])
    assert samples and [s["reward"] for s in samples] == pytest.approx(expected, abs=1e-4)
    assert results(folder / "rewarded")["results"]["mini"]["all"]["reward"] == pytest.approx(
        statistics.fmean(expected), abs=1e-4)


@pytest.mark.parametrize("changes, words", [
    ({"tasks": ["mini", "xcopa2"]}, "unknown task 'xcopa2'"), ({"model": ["{folder}/none"]}, "none not found"),
    ({"data": "{folder}/one"}, "test.jsonl not found"), ({"data": "{folder}/bare"}, "'fr1' has no 'reference'"),
    ({"baseline": ["{folder}/none"]}, "samples_mini.jsonl not found"),
    ({"reward_model": "{folder}/one"}, "is not a reward model")])
def test_refusals(folder, changes, words):
    (folder / "bare").mkdir(exist_ok=True)
    tiny.write(folder / "bare" / "test.jsonl", [{"id": "fr1", "language": "fr", "prompt": "x", "task": "spell"}])
    settings = {"model": ["{folder}/one"], "data": "{folder}/data", "out": "{folder}/refused"} | changes
    filled = {k: [x.format(folder=folder) for x in v] if isinstance(v, list) else v.format(folder=folder)
              for k, v in settings.items()}
    with pytest.raises(SystemExit) as e:
        main(Config(**filled))
    assert words in str(e.value) and "\n" not in str(e.value) and not (folder / "refused").exists()
