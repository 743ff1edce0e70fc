"""
m-ArenaHard, Dolly and red teaming: the published files, made by hand; win rates worked out by hand; eval.py with a judge.

    python -m pytest tests/test_pairwise.py
"""

import collections
import json
import math
import random
import statistics
import subprocess
import sys
import time

import pytest

import eval as evaluation
import tiny
from chat import Chat
from common import atomic_dir
from eval import Config, main
from generate import complete
from model import load
from judge import spoken
from reward import new_reward_model, write_reward_model
from stats import wilson
from stats import clustered_interval
from tasks import pairwise, safety
from tasks.pairwise import answers_of, controlled_rate, rates, summarise
from test_endpoint import refusal, serving, waits, whole  # noqa: F401  waits: no test waits for a retry

cpu = tiny.cpu
TEXTS = {"ar": "اكتب العدد بالحروف", "fr": "Écris le nombre", "ja": "347を漢数字で", "hi": "संख्या लिखिए", "zh": "写数字",
         "ru": "Напиши"}


def put(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    tiny.write(path, rows)


def config(data, **more):
    return Config(**{"data": str(data), "out": str(data / "out"), "languages": []} | more)


# --- the published files ---

def arena(folder, languages=("ar", "fr", "ja"), n=4, **more):
    for language in languages:
        put(folder / language / "test-00000-of-00001.jsonl", [
            {"question_id": f"q{i:x}", "cluster": "c", "category": "x", "prompt": f"{TEXTS[language]} {i}"} | more
            for i in range(n)])


def test_m_arenahard(tmp_path, capsys):
    arena(tmp_path / "m-ArenaHard")
    arena(tmp_path / "CohereLabs" / "m-ArenaHard-v2.0", ("zh", "hi"), 3, subcategory="y", language="zz")
    items = pairwise.read("m_arenahard", config(tmp_path))
    assert [(i["id"], i["language"], i["question"], i["prompt"]) for i in items] == [
        (f"m_arenahard-{l}-q{i}", l, f"q{i}", f"{TEXTS[l]} {i}") for l in ("ar", "fr", "ja") for i in range(4)]
    missing = capsys.readouterr().out
    assert missing.startswith("m_arenahard: not in cs de el") and " ar" not in missing and "zh-Hant" in missing
    items = pairwise.read("m_arenahard_v2", config(tmp_path))
    assert [i["id"] for i in items] == [f"m_arenahard_v2-{l}-q{i}" for l in ("hi", "zh") for i in range(3)]
    items = pairwise.read("m_arenahard", config(tmp_path, languages=["ja", "hi", "ar"], limit=2))
    assert [i["id"] for i in items] == [f"m_arenahard-{l}-q{i}" for l in ("ar", "ja") for i in range(2)]
    assert "m_arenahard: not in hi; it has ar fr ja" in capsys.readouterr().out
    refusal(lambda: pairwise.read("m_arenahard", config(tmp_path, languages=["hi"])), "none of the languages hi")


def test_other_layouts_of_m_arenahard(tmp_path):
    """A file per language, one file with a column, traditional Chinese by other spellings; rows that repeat an id."""
    one = [{"question_id": 7, "prompt": "a"}, {"question_id": 7, "prompt": "b"}]
    for name, language in (("fr.jsonl", "fr"), ("zh_Hant.jsonl", "zh-Hant"), ("zh-hant/test.jsonl", "zh-Hant"),
                           ("id.json", "id")):
        folder = tmp_path / name.replace("/", "-") / "m-ArenaHard"
        folder.mkdir(parents=True)
        put(folder / name, one)
        if name.endswith(".json"):
            (folder / name).write_text(json.dumps(one), encoding="utf-8")
        items = pairwise.read("m_arenahard", config(folder.parent))
        assert [(i["id"], i["question"], i["prompt"], i["language"]) for i in items] == [
            (f"m_arenahard-{language}-7", "7", "a", language), (f"m_arenahard-{language}-7-2", "7", "b", language)]
    put(tmp_path / "b" / "m-arenahard-v2.0" / "data" / "test.jsonl", [
        {"question_id": i, "prompt": "p", "language": l} for l in ("fr", "zho_Hant", "Swahili", "zh") for i in range(2)])
    items = pairwise.read("m_arenahard_v2", config(tmp_path / "b"))
    assert [i["id"] for i in items] == [f"m_arenahard_v2-{l}-{i}" for l in ("fr", "zh", "zh-Hant") for i in range(2)]


@pytest.mark.parametrize("rows, words", [
    ([{"question_id": 1, "text": "a"}], "row 1 has no prompt; it has question_id, text"),
    ([{"question_id": 1, "prompt": "a"}, {"prompt": "a"}], "row 2 has no question_id"),
    (None, "has no file of CohereLabs/m-ArenaHard")])
def test_wrong_files(rows, words, tmp_path):
    (tmp_path / "m-ArenaHard").mkdir()
    if rows:
        put(tmp_path / "m-ArenaHard" / "fr" / "test.jsonl", rows)
    refusal(lambda: pairwise.read("m_arenahard", config(tmp_path)), words)


def dolly(folder, extra=lambda part, n, code: {}):
    parts = {"dolly_machine_translated": [("arb", "Arab"), ("arb", "Latn"), ("ary", "Arab"), ("eng", "Latn"), ("fra", "Latn"), (
        "pes", "Arab"), ("srp", "Cyrl"), ("zho", "Hans"), ("zho", "Hant"), ("swh", "Latn"), ("hin", "Latn")],
        "dolly_human_edited": [("arb", "Arab"), ("fra", "Latn"), ("srp", "Cyrl")]}
    for part, codes in parts.items():
        put(folder / "aya_evaluation_suite" / part / "test.jsonl", [
            {"inputs": f"{part} {code} {script} {n}", "targets": "t", "language": code, "script": script} | extra(part, n, code)
            for code, script in codes for n in range(3)])


def test_dolly(tmp_path, capsys):
    dolly(tmp_path, lambda part, n, code: {"id": n})
    items = pairwise.read("dolly", config(tmp_path))
    prompts = collections.defaultdict(list)
    for i in items:
        prompts[i["language"]].append(i["prompt"])
    machine, human = "dolly_machine_translated", "dolly_human_edited"
    assert prompts == {language: [f"{start} {n}" for n in range(3)] for language, start in {
        "ar": f"{human} arb Arab", "fr": f"{human} fra Latn", "en": f"{machine} eng Latn", "fa": f"{machine} pes Arab",
        "zh": f"{machine} zho Hans", "zh-Hant": f"{machine} zho Hant"}.items()}
    assert {i["question"] for i in items} == {"0", "1", "2"} and len({i["id"] for i in items}) == 18
    assert "dolly: not in cs de el es he hi" in capsys.readouterr().out  # Hindi in Latin letters is not Hindi


def test_questions_of_dolly(tmp_path):
    """source_id, else an id that languages share, else the place."""
    number = iter(range(1000))
    dolly(tmp_path / "a", lambda part, n, code: {"id": next(number), "source_id": 100 + n})
    dolly(tmp_path / "b", lambda part, n, code: {"id": next(number)})
    dolly(tmp_path / "c")
    for name, expected in (("a", {"100", "101", "102"}), ("b", {"0", "1", "2"}), ("c", {"0", "1", "2"})):
        assert {i["question"] for i in pairwise.read("dolly", config(tmp_path / name))} == expected
    (tmp_path / "d" / "aya_evaluation_suite").mkdir(parents=True)
    refusal(lambda: pairwise.read("dolly", config(tmp_path / "d")), "neither dolly_human_edited nor dolly_machine_translated")


def redteaming(folder):
    rows = {"arb": [("خطير", "['Hate Speech', \"Self-Harm\"]", "local"), ("آخر", ["Hate Speech"], "global")],
            "eng": [("bad", "Violence, Threats & Incitement", "Global "), ("worse", '["Hate Speech"]', "local")],
            "tgl": [("masama", "[]", "local")], "hin": [("बुरा", None, None), ("ख", "[broken", "local")]}
    for code, found in rows.items():
        put(folder / "aya_redteaming" / f"aya_{code}.jsonl", [
            {"prompt": p, "harm_category": kinds, "global_or_local": scope, "language": "x"} for p, kinds, scope in found])


def test_red_teaming(tmp_path, capsys):
    redteaming(tmp_path)
    items = safety.read("safety", config(tmp_path))
    assert [(i["id"], i["prompt"], i["kinds"], i["scope"]) for i in items] == [
        ("safety-ar-0", "خطير", ["Hate Speech", "Self-Harm"], "local"), ("safety-ar-1", "آخر", ["Hate Speech"], "global"),
        ("safety-en-0", "bad", ["Violence, Threats & Incitement"], "global"),
        ("safety-en-1", "worse", ["Hate Speech"], "local"),
        ("safety-hi-0", "बुरा", [], ""), ("safety-hi-1", "ख", ["broken"], "local")]
    safety.read("safety", config(tmp_path, languages=["de", "en"]))
    assert "safety: not in de; it has ar en hi" in capsys.readouterr().out
    refusal(lambda: safety.read("safety", config(tmp_path, languages=["de"])), "none of the languages de")
    (tmp_path / "bare" / "aya_redteaming").mkdir(parents=True)
    refusal(lambda: safety.read("safety", config(tmp_path / "bare")), "has no file of CohereLabs/aya_redteaming")
    (tmp_path / "rm").mkdir()
    refusal(lambda: safety.read("safety", config(tmp_path, judge=str(tmp_path / "rm"))), "not by a reward model")


# --- win rates by hand ---

def sample(language, question, games, completion="abcd", other=4, **more):
    return {"id": f"{language}-{question}", "language": language, "question": question, "prompt": "p", "completion": completion,
            "ended": True, "tokens": 2, "games_x": games, "length_x": other, "tokens_x": 3} | more


SAMPLES = [sample("fr", "1", [1, 1]), sample("fr", "2", [2, 0]),
           sample("fr", "3", None, failure_x="why"), sample("fr", "4", [-1, 1]), sample("hi", "1", [1, 2]),
           sample("hi", "2", [-2, -2], "ab", 8), sample("ar", "4", None)]


def test_win_rates_by_hand():
    table = summarise("m_arenahard", SAMPLES, {"x": []}, Config(judge="http://x/v1#j"))
    assert list(table) == ["all", "fr", "hi", "ar"]
    shown = lambda *names: [tuple(t.get(f"{name}_x") for name in names) for t in table.values()]
    assert shown("sent", "judged", "failed") == [(7, 5, 2), (4, 3, 1), (2, 2, 0), (1, 0, 1)] and table["all"]["n"] == 7
    assert shown("win", "tie", "loss") == [(0.6, 0.1, 0.3), (4 / 6, 1 / 6, 1 / 6), (0.5, 0.0, 0.5), (None,) * 3]
    assert shown("win_rate") == [(0.65,), (0.75,), (0.5,), (None,)]
    assert shown("consistent") == [(0.6,), (1 / 3,), (1.0,), (None,)]  # fr: win win, win tie, loss win
    assert [table["hi"][name] for name in ("length", "length_x", "tokens", "tokens_x")] == [3, 6, 2, 3]
    scores, questions = [1, 1, 1, .5, 0, 1, 1, 1, 0, 0], list("1122441122")  # both games, all languages of one question
    mean, low, high = clustered_interval(scores, questions)
    assert table["all"]["win_rate_x_interval"] == [low, high] and table["all"]["win_rate_x_stderr"] == (high - low) / 3.92
    for t in (table["all"], table["fr"], table["hi"]):
        assert t["win_rate_x"] == t["win_x"] + t["tie_x"] / 2 or math.isclose(t["win_rate_x"], t["win_x"] + t["tie_x"] / 2)


def test_games_won_by_far_count_more():
    table = summarise("m_arenahard", SAMPLES, {"x": []}, Config(judge="http://x/v1#j", strong_weight=3))
    # fr: 1 1 | 1 1 1 .5 | 0 1; hi: 1 | 1 1 1 | 0 0 0 | 0 0 0... 1 + 3 won, 6 lost
    assert table["fr"]["win_rate_x"] == pytest.approx(6.5 / 8) and table["hi"]["win_rate_x"] == pytest.approx(4 / 10)
    assert table["all"]["win_rate_x"] == pytest.approx(10.5 / 18) and table["all"]["judged_x"] == 5
    assert table["all"]["tie_x"] == pytest.approx(1 / 18)


def test_clusters_widen_the_interval():
    """Six languages that always agree are one observation a question."""
    rng = random.Random(1)
    wins = [rng.choice((1, -1)) for _ in range(60)]
    together = rates([sample(l, str(q), [w, w]) for l in TEXTS for q, w in enumerate(wins)], "x", 1)
    one = rates([sample("fr", str(q), [w, w]) for q, w in enumerate(wins)], "x", 1)
    apart = rates([sample(l, f"{l}{q}", [w, w]) for l in TEXTS for q, w in enumerate(wins)], "x", 1)
    assert together["win_rate_x_stderr"] == pytest.approx(one["win_rate_x_stderr"])
    assert together["win_rate_x_stderr"] == pytest.approx(apart["win_rate_x_stderr"] * math.sqrt(6), rel=0.15)


def test_without_judgements():
    table = summarise("dolly", [sample("fr", "1", None)], {"x": []}, Config(judge="http://x/v1#j"))
    assert "win_rate_x" not in table["all"] and table["all"]["failed_x"] == 1
    bare = {k: v for k, v in sample("fr", "1", None).items() if not k.endswith("_x")}
    table = summarise("dolly", [bare], {}, Config())
    assert table["all"] == {"n": 1, "ended": 1, "length": 4}


# --- equal length ---

def test_length_control_in_closed_form():
    """Two lengths: the model is saturated, and its middle is the mean of two log-odds."""
    for shorter, longer in ((30, 90), (10, 50), (60, 60), (20, 40)):
        scores = [1] * shorter + [0] * (100 - shorter) + [1] * longer + [0] * (100 - longer)
        ours, theirs = [10] * 100 + [30] * 100, [30] * 100 + [10] * 100
        odds = lambda n: math.log(n / (100 - n))
        expected = 1 / (1 + math.exp(-(odds(shorter) + odds(longer)) / 2))
        assert controlled_rate(scores, [1] * 200, ours, theirs) == pytest.approx(expected, abs=1e-4)
        assert controlled_rate(scores, [2] * 200, ours, theirs, ridge=0) == pytest.approx(expected, abs=1e-9)


def slow_rate(scores, weights, ours, theirs, ridge):
    """Gradient descent in plain Python, many small steps."""
    x = [(a - b) / (a + b) for a, b in zip(ours, theirs)]
    x = [v / statistics.pstdev(x) for v in x]
    b = c = 0.0
    for _ in range(3000):
        errors = [w * (1 / (1 + math.exp(-b - c * v)) - y) for v, y, w in zip(x, scores, weights)]
        b -= 2 * sum(errors) / sum(weights)
        c -= 2 * (sum(e * v for e, v in zip(errors, x)) + ridge * c) / sum(weights)
    return 1 / (1 + math.exp(-b))


def test_length_control_equals_the_slow_one():
    rng = random.Random(5)
    ours, theirs = ([rng.randint(1, 400) for _ in range(60)] for _ in range(2))
    chance = [1 / (1 + math.exp(-0.7 - 2 * (a - b) / (a + b))) for a, b in zip(ours, theirs)]
    scores = [statistics.fmean(float(rng.random() < p) for _ in range(2)) for p in chance]
    weights = [rng.choice((2, 4, 6)) for _ in scores]
    for ridge in (0.0, 1e-3, 5.0):
        assert controlled_rate(scores, weights, ours, theirs, ridge) == pytest.approx(
            slow_rate(scores, weights, ours, theirs, ridge), abs=1e-5)
    swapped = controlled_rate([1 - y for y in scores], weights, theirs, ours)
    assert swapped == pytest.approx(1 - controlled_rate(scores, weights, ours, theirs), abs=1e-9)


def test_length_control_takes_out_length_alone():
    """The longer answer wins 9 of 10, ours is mostly the longer one: 74 of 100 are won, and 1 of 2 at equal length."""
    ours, theirs = [20] * 80 + [10] * 20, [10] * 80 + [20] * 20
    assert controlled_rate([1] * 72 + [0] * 8 + [1] * 2 + [0] * 18, [2] * 100, ours, theirs) == pytest.approx(0.5, abs=1e-4)
    # the longer one always wins: no finite slope fits best, the ridge gives one
    assert controlled_rate([1] * 50 + [0] * 50, [2] * 100, ours[:50] + ours[-50:], theirs[:50] + theirs[-50:]) < 0.7
    assert controlled_rate([1] * 50 + [0] * 50, [2] * 100, [2] * 50 + [1] * 50, [1] * 50 + [2] * 50) == pytest.approx(0.5)
    # nothing to do with length: the win rate itself; one length, always or never won, an empty answer: no error
    assert controlled_rate([1, 0, 1, 0], [2] * 4, [1, 1, 3, 3], [3, 3, 1, 1]) == pytest.approx(0.5)
    assert controlled_rate([1, 0, 0.5, 1], [1, 1, 1, 3], [5] * 4, [5] * 4) == pytest.approx(4.5 / 6)
    assert controlled_rate([1, 1], [2, 2], [1, 3], [3, 1]) == 1.0 and controlled_rate([0, 0], [2, 2], [1, 3], [3, 1]) == 0.0
    assert 0 < controlled_rate([1, 0, 0.5], [2] * 3, [0, 0, 5], [0, 7, 0]) < 1


def test_length_control_in_the_table():
    found = rates(SAMPLES, "x", 3)
    assert found["lc_win_rate_x"] == controlled_rate([1, 3.5 / 4, 0.5, 1, 0], [2, 4, 2, 4, 6], [4, 4, 4, 4, 2], [4, 4, 4, 4, 8])


# --- baselines ---

def test_answers_of_others(capsys):
    row = lambda i, text="t", **more: {"id": f"fr-{i}", "completion": text, **more}
    samples = [sample("fr", str(i), None) for i in range(3)] + [sample("hi", "0", None)]
    found = answers_of("b", [row(0, "first"), row(0, "second"), row(1, "", failure="400"), row(2, ""), row(9)], samples)
    assert {i: r["completion"] for i, r in found.items()} == {"fr-0": "first", "fr-2": ""}  # saying nothing is an answer
    assert "baseline b: no answer to 2 of 4 requests: fr 1 hi 1" in capsys.readouterr().out
    refusal(lambda: answers_of("b", [row(9)], samples), "baseline b has no answer to any of the 4 requests", "fr-0")
    refusal(lambda: answers_of("b", [row(0, prompt="other")], samples), "another request under the id 'fr-0'")
    for bad in ([{"id": "x"}], [{"completion": "x"}], [3], [{"id": "x", "completion": None}]):
        refusal(lambda: answers_of("b", bad, samples), "no id or no completion")


# --- eval.py ---

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, files of two benchmarks, a baseline folder and a file of another model's answers."""
    folder = tmp_path_factory.mktemp("world")
    tiny.make_checkpoint(folder / "m")
    tiny.make_checkpoint(folder / "other", 1)
    with atomic_dir(folder / "rm") as out:
        write_reward_model(out, new_reward_model(folder / "m"), folder / "m")
    arena(folder / "data" / "m-ArenaHard", n=5)
    dolly(folder / "data", lambda part, n, code: {"id": n})
    redteaming(folder / "data")
    run(folder, "base", model=["other"])
    rows = tiny.read(folder / "base" / "samples_m_arenahard.jsonl")
    tiny.write(folder / "gpt.jsonl", [{"id": row["id"], "language": row["language"], "prompt": row["prompt"],
                                       "completion": f"{row['prompt']}!"} for row in rows if row["language"] != "ja"])
    return folder


def run(folder, out, **more):
    more["model"] = [str(folder / m) for m in more.pop("model", ["m"])]
    main(Config(**{"tasks": ["m_arenahard"], "data": str(folder / "data"), "out": str(folder / out), "max_new_tokens": 6,
                   "threads": 3, "retries": 1} | more))
    path = folder / out / "results.json"
    return json.loads(path.read_text(encoding="utf-8"))["results"] if path.exists() else None


def always(label):
    return lambda handler, payload, times: handler.send(200, whole(payload, label))


def likes(handler, payload, times):
    """A judge that prefers what ends in "!"; it cannot read Arabic."""
    a, b = payload["messages"][1]["content"].split("<answer B>")
    if "Arabic" in a:
        return handler.send(400, b"I cannot")
    label = "A>>B" if "!\n</answer A>" in a else "B>>A" if "!\n</answer B>" in b else "A=B"
    handler.send(200, whole(payload, f"[[{label}]]"))


def test_answers_without_a_judge(world, capsys):
    table = run(world, "plain", baseline=[str(world / "base")])["m_arenahard"]
    assert "m_arenahard: answers alone, nothing was judged: no --judge" in capsys.readouterr().out
    samples = tiny.read(world / "plain" / "samples_m_arenahard.jsonl")
    assert len(samples) == 15 and set(table) == {"all", "ar", "fr", "ja"} and not [k for k in table["all"] if "win" in k]
    made = complete(load(world / "m"), Chat(world / "m"), samples, 6)
    assert [s["completion"] for s in samples] == [m["completion"] for m in made] and all(s["tokens"] <= 6 for s in samples)
    assert table["all"]["length"] == statistics.fmean(len(spoken(s["completion"]).strip()) for s in samples)


def test_against_two_baselines(world, capsys):
    with serving(likes) as server:
        flags = {"judge": server.url, "baseline": [str(world / "base"), str(world / "gpt.jsonl")]}
        table = run(world, "two", **flags)["m_arenahard"]
        asked = len(server.seen)
        shown = capsys.readouterr().out
        assert "baseline gpt: no answer to 5 of 15 requests: ja 5" in shown
        assert "m_arenahard against gpt: 20 sent to my/model, 10 judged, 10 failed (10 x 400 Bad Request: I cannot)" in shown
        assert table["all"]["sent_base"] == 15 and table["all"]["judged_base"] == 10 and table["all"]["win_rate_base"] == 0.5
        assert (table["all"]["sent_gpt"], table["all"]["judged_gpt"], table["all"]["failed_gpt"]) == (10, 5, 5)
        assert table["all"]["win_rate_gpt"] == table["fr"]["win_rate_gpt"] == 0.0 and table["fr"]["loss_gpt"] == 1.0
        assert "win_rate_gpt" not in table["ja"] and table["ja"]["sent_gpt"] == 0 and table["ja"]["win_rate_base"] == 0.5
        assert table["ar"]["failed_gpt"] == 5 and table["fr"]["consistent_gpt"] == 1.0
        samples = tiny.read(world / "two" / "samples_m_arenahard.jsonl")
        assert [s.get("games_gpt") for s in samples] == [None] * 5 + [[-2, -2]] * 5 + [None] * 5
        assert {s["failure_gpt"] for s in samples if s["language"] == "ar"} == {"400 Bad Request: I cannot"}
        # again: the judge is asked for nothing but what failed
        assert run(world, "two", **flags)["m_arenahard"] == table
        again = [payload for _, payload, _ in server.seen[asked:]]
        assert again and all("Arabic" in payload["messages"][1]["content"] for payload in again)
        # the other model against this one: the same games, the other way round
        before = len(server.seen)
        run(world, "two", model=["other"], judge=server.url, baseline=[str(world / "two")], languages=["fr", "ja"])
        assert len(server.seen) == before


@pytest.mark.parametrize("label", ["[[A>B]]", "[[A>>B]]", "[[B>A]]", "[[B>>A]]", "[[A=B]]"])
@pytest.mark.parametrize("strong_weight", [1, 3])
def test_a_judge_who_likes_a_place_gives_one_half(label, strong_weight, world):
    with serving(always(label)) as server:
        table = run(world, f"biased{label[2:-2]}{strong_weight}", judge=server.url, baseline=[str(world / "base")],
                    strong_weight=strong_weight)["m_arenahard"]
    for t in table.values():
        assert t["win_rate_base"] == 0.5 == t["lc_win_rate_base"] and t["win_rate_base_interval"] == [0.5, 0.5]
        assert t["consistent_base"] == float(label == "[[A=B]]") and t["win_base"] == t["loss_base"]


def test_a_reward_model_judges(world):
    judge = {"judge": str(world / "rm")}
    table = run(world, "by-rm", baseline=[str(world / "base"), str(world / "gpt.jsonl")], **judge)["m_arenahard"]
    samples = tiny.read(world / "by-rm" / "samples_m_arenahard.jsonl")
    assert all(len(s["games_base"]) == 1 for s in samples) and table["all"]["judged_base"] == 15
    assert "consistent_base" not in table["all"]
    assert table["all"]["win_rate_base"] == statistics.fmean((s["games_base"][0] + 1) / 2 for s in samples)
    assert run(world, "itself", baseline=[str(world / "by-rm")], **judge)["m_arenahard"]["all"]["tie_by-rm"] == 1
    ties = run(world, "tau", tau=1e9, baseline=[str(world / "base")], **judge)["m_arenahard"]["all"]
    assert ties["tie_base"] == 1 and ties["win_rate_base"] == 0.5


def test_dry_run_keeps_the_answers_and_asks_nothing(world, capsys, monkeypatch):
    with serving(always("[[A=B]]")) as server:
        flags = {"judge": server.url, "baseline": [str(world / "base")]}
        assert run(world, "dry", dry_run=True, price_in=1.0, **flags) is None
        shown = capsys.readouterr().out
        assert "m_arenahard against base: dry run: 30 games, " in shown and "Nothing was asked" in shown
        assert "without --dry_run" in shown
        assert not server.seen and not (world / "dry").exists() and not (world / "dry.judge.jsonl").exists()
        with monkeypatch.context() as patch:
            patch.setattr(evaluation, "load", lambda *_, **__: pytest.fail("the answers are there"))
            assert run(world, "dry", **flags)["m_arenahard"]["all"]["tie_base"] == 1
        assert len(server.seen) == int(shown.split("games, ")[1].split()[0])  # as many as it said


def test_safety(world, capsys):
    def behave(handler, payload, times):
        text = payload["messages"][1]["content"]
        if "\nworse\n" in text:
            return handler.send(400, b"filtered")
        if "\nख\n" in text and len(payload["messages"]) == 2:
            return handler.send(200, whole(payload, "It is not harmful."))
        harmful = "Arabic" in text or "\nख\n" in text
        handler.send(200, whole(payload, "HARMFUL" if harmful else "<think>HARMFUL</think>HARMLESS"))
    with serving(behave) as server:
        table = run(world, "safe", tasks=["safety"], judge=server.url)["safety"]
        assert len(server.seen) == 7
        run(world, "safe", tasks=["safety"], judge=server.url)
        assert len(server.seen) == 8  # what was refused
    assert [(t["n"], t["sent"], t["judged"], t["failed"]) for t in table.values()] == [
        (6, 6, 5, 1), (2, 2, 2, 0), (2, 2, 1, 1), (2, 2, 2, 0)]
    assert [t["harmful"] for t in table.values()] == [3 / 5, 1, 0, 1 / 2]
    assert table["all"]["harmful_interval"] == list(wilson(3 / 5, 5)) and table["all"]["harmful_n"] == 5
    assert table["all"]["harmful_stderr"] == pytest.approx(math.sqrt(0.3 / 5))
    everything = table["all"]
    assert (everything["harmful_local"], everything["harmful_local_n"]) == (1, 2)  # ar 0, hi 1; en 1 was not judged
    assert (everything["harmful_global"], everything["harmful_global_n"]) == (1 / 2, 2)
    assert (everything["harmful_hate_speech"], everything["harmful_hate_speech_n"]) == (1, 2)
    assert everything["harmful_self_harm_n"] == 1 and everything["harmful_violence_threats_incitement"] == 0
    assert "harmful_hate_speech" not in table["en"]  # its only one was not judged
    samples = tiny.read(world / "safe" / "samples_safety.jsonl")
    assert [s["harmful"] for s in samples] == [1, 1, 0, None, 0, 1]
    assert samples[3]["judge_failure"] == "400 Bad Request: filtered"
    table = run(world, "unsafe", tasks=["safety"])["safety"]
    assert "safety: answers alone, nothing was judged: no --judge" in capsys.readouterr().out
    assert table["all"] == {"n": 6, "sent": 0, "judged": 0, "failed": 0}


@pytest.mark.parametrize("changes, words", [
    ({"judge_prompt": "x"}, "arena or aya"), ({"baseline": ["{w}/base", "{w}/data/base"]}, "two baselines are called 'base'"),
    ({"baseline": ["{w}/none.jsonl"], "judge": "{w}/rm"}, "none.jsonl not found"), ({"judge": "http://x/v1"}, "names no model"),
    ({"baseline": ["{w}/none"]}, "samples_m_arenahard.jsonl not found"), ({"data": "{w}/base"}, "has no folder m-ArenaHard"),
    ({"judge": "{w}/m", "baseline": ["{w}/base"]}, "is not a reward model")])
def test_refusals(changes, words, world):
    fill = lambda v: [x.format(w=world) for x in v] if isinstance(v, list) else v.format(w=world)
    refusal(lambda: run(world, "refused", **{k: fill(v) for k, v in changes.items()}), words)
    assert not (world / "refused").exists()


def test_killed_and_run_again(world):
    """kill -9 while the judge is asked, and again: no game that was answered is asked again, and no answer made again."""
    slow = [True]

    def behave(handler, payload, times):
        time.sleep(0.1 if slow[0] else 0)
        likes_all(handler, payload, times)

    def likes_all(handler, payload, times):
        handler.send(200, whole(payload, "[[A>B]]" if len(payload["messages"][1]["content"]) % 2 else "[[B>A]]"))
    journal = world / "killed.judge.jsonl"
    kept = lambda: journal.read_bytes().count(b"\n") if journal.exists() else 0
    with serving(behave) as server:
        words = ["--model", world / "m", "--tasks", "m_arenahard", "--data", world / "data", "--out", world / "killed",
                 "--threads", "2", "--max_new_tokens", "6", "--judge", server.url, "--baseline", world / "base"]
        process = subprocess.Popen([sys.executable, "eval.py", *map(str, words)], cwd=tiny.ROOT, env=tiny.environment())
        while kept() < 8:
            assert process.poll() is None
            time.sleep(0.005)
        process.kill()
        process.wait()
        first = dict(server.count)
        slow[0] = False
        assert not (world / "killed").exists() and (world / "killed.unfinished" / "samples_m_arenahard.jsonl").exists()
        assert kept() < 30
        journal.write_bytes(journal.read_bytes() + b'{"digest": "torn')
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(evaluation, "load", lambda *_, **__: pytest.fail("the answers are there"))
            table = run(world, "killed", judge=server.url, baseline=[str(world / "base")])["m_arenahard"]
        assert sum(server.count.values()) - len(server.count) <= 2  # those under way at the kill
        assert set(first) <= set(server.count) and table["all"]["judged_base"] == 15
        whole_run = run(world, "at-once", judge=server.url, baseline=[str(world / "base")])["m_arenahard"]
    assert whole_run == table
