"""
Routers, on tables small enough to route by eye. The report's numbers: test_pool_report.py.

    python -m pytest tests/test_routers.py

Mutants that these tests catch: 1- to 3-grams; refused answers worth 0; samples numbered in another order; draws without
the seed; a stored router's teachers not put in order; values not divided by their deviation; teachers that were not
asked part of the loss; the last weights kept, not the best; what may be rejected judged by what may be chosen.
"""

import collections
import math
import random
import zlib

import tiny  # first: it finds the repository

import numpy as np
import pytest
import torch

import routers
from routers import Learned, Picks, best_slot, features, make_table
from rows import RowsOnDisk

GUARDS = ["truncated", "empty", "language"]
#        id    language  {teacher: reward}; cut off, empty and in another language: below
TABLE = [("a", "en", {"north": 1.0, "south": 3.0, "west": 2.0}),
         ("b", "en", {"north": 5.0, "south": 4.0, "west": 0.0}),
         ("c", "fr", {"north": -1.0, "south": -3.0, "west": -2.0}),
         ("d", "fr", {"north": 2.0, "south": 2.0, "west": 2.0}),  # a tie: the first teacher is routed
         ("e", "fr", {"north": -9.0, "south": 9.0, "west": 1.0}),
         ("f", "ja", {"north": 50.0, "south": 1.0, "west": 1.5}),
         ("g", "ja", {"north": 0.0, "south": None, "west": 0.5}),
         ("h", "ja", {"north": 7.0, "south": 7.0, "west": 7.0})]
FLAGS = {("f", "north"): ["truncated"], ("g", "south"): ["empty"], ("h", "north"): ["truncated"],
         ("h", "south"): ["language"], ("h", "west"): ["truncated", "language"]}
TEACHERS = ["north", "south", "west"]


def completion(i, language, teacher, reward, sample=0, flags=(), **more):
    return {"id": i, "language": language, "prompt": f"prompt {i}", "completion": ""
        if reward is None else f"{teacher} {i}",
            "teacher": teacher, "sample": sample, "flags": list(flags), "reward": reward, "tokens": 5} | more


def completions():
    """The table as arbitrage would have written it, teacher by teacher."""
    return [completion(i, language, t, rewards[t], flags=FLAGS.get((i, t), ())) for t in TEACHERS
            for i, language, rewards in TABLE]


def table_of(tmp_path, *files, guards=GUARDS, **given):
    """make_table() of lists of rows, each in a file of its own -> (table, counts, files)."""
    made = []
    for rows in files:
        tmp_path.mkdir(exist_ok=True)
        made.append(RowsOnDisk(tiny.write(tmp_path / f"rows-{len(list(tmp_path.iterdir()))}.jsonl", rows)))
    return *make_table(made, guards, **given), made


def names(table, slots):
    """{id: teacher} of slots (P,)."""
    return {i: table.teachers[table.owner[s]] for i, s in zip(table.ids, slots) if s >= 0}


def refusal(function, *words):
    with pytest.raises(SystemExit) as e:
        function()
    line = str(e.value)
    assert line.startswith("error: ") and "\n" not in line and all(w in line for w in words), line


# --- the table ---

def content(table):
    """{(id, teacher): [(reward, may, tokens), ...]}, whatever the order of prompts and slots."""
    return {(i, t): [(None if np.isnan(x) else float(x), bool(a), int(n)) for x, a, n in zip(
        *(column[p, (table.owner == k) & table.there[p]] for column in (table.scores, table.may, table.tokens)))]
        for p, i in enumerate(table.ids) for k, t in enumerate(table.teachers)}


def test_a_table(tmp_path):
    table, counts, files = table_of(tmp_path, completions())
    assert table.ids == list("abcdefgh") and table.teachers == TEACHERS and table.owner.tolist() == [0, 1, 2]
    assert table.languages.tolist() == ["en", "en", "fr", "fr", "fr", "ja", "ja", "ja"] and table.there.all()
    assert table.scores[4].tolist() == [-9.0, 9.0, 1.0] and np.isnan(table.scores[6,
        1]) and np.isnan(table.judged).all()
    assert [(i, t) for i, row in zip(table.ids, table.may) for t, may in zip(TEACHERS, row) if not may] == list(FLAGS)
    for p, s in np.ndindex(8, 3):
        row = files[table.file[p, s]][table.row[p, s]]
        assert (row["id"], row["teacher"]) == (table.ids[p], TEACHERS[s])
    assert counts["north", "ja"] == {"n": 3, "truncated": 2, "dropped": 2} and counts["south", "fr"] == {"n": 3}
    assert counts["south", "ja"] == {"n": 3, "empty": 1, "language": 1, "dropped": 2}


def test_the_order_of_rows_and_files_changes_nothing(tmp_path):
    """Samples stand as they come; prompts and teachers in the order that is given, or as they come."""
    rows = [completion(f"p{i}", "en", t, 10.0 * i + k, k, tokens=k) for i in range(4) for t in "xyz"
        for k in range("xyz".index(t) + 1)]
    expected = content(table_of(tmp_path / "1", rows)[0])
    assert expected["p2", "z"] == [(20.0, True, 0), (21.0, True, 1), (22.0, True, 2)]
    mixed = sorted(rows, key=lambda row: (row["sample"], zlib.crc32(f"{row['id']}{row['teacher']}".encode())))
    table, counts, _ = table_of(tmp_path / "2", mixed[:5], mixed[5:11], mixed[11:], teachers=list("zxy"),
        ids=["p3", "p1", "p0", "p2"])
    assert content(table) == expected and counts["z", "en"]["n"] == 12
    assert table.ids == ["p3", "p1", "p0", "p2"] and table.teachers == list("zxy") and table.owner.tolist() == [0, 0,
        0, 1, 2, 2]
    assert set(table.file.ravel().tolist()) == {0, 1, 2}
    table, *_ = table_of(tmp_path / "3", mixed)
    assert table.ids == list(dict.fromkeys(r["id"] for r in mixed)) and content(table) == expected
    unnumbered = [{k: v for k, v in row.items() if k != "sample"} for row in rows]
    assert content(table_of(tmp_path / "4", unnumbered)[0]) == expected


def test_missing_rows_failures_and_null_rewards(tmp_path):
    rows = [completion("a", "en", "x", 1.0), completion("a", "en", "x", 2.0, 1), completion("b", "en", "x", None),
            completion("c", "en", "y", None, failure="503", flags=["truncated", "empty"], tokens=None),
            completion("c", "en", "x", 4.0, failure="a reward in spite of it")]
    table, counts, _ = table_of(tmp_path, rows, ids=list("abcd"), teachers=["x", "y", "z"],
        languages=["en", "en", "en", "ja"])
    assert table.owner.tolist() == [0, 0, 1] and table.languages.tolist() == ["en", "en", "en", "ja"]
    assert table.there.tolist() == [[True, True, False], [True, False, False], [True, False, True], [False] * 3]
    assert table.may.tolist() == [[True, True, False]] + [[False] * 3] * 3
    assert table.tokens.tolist() == [[5, 5, -1], [5, -1, -1], [5, -1, -1], [-1] * 3]
    assert table.file[1].tolist() == [0, -1, -1] and np.isnan(table.scores[1:]).all()
    assert table.asked().tolist() == [[True, False, False]] * 2 + [[True, True, False], [False] * 3]
    assert counts["y", "en"] == {"n": 1, "truncated": 1, "empty": 1, "dropped": 1, "failed": 1}
    assert counts["x", "en"] == {"n": 4, "dropped": 2, "failed": 1}
    assert best_slot(table).tolist() == [1, -1, -1, -1]


def test_rows_without_flags_are_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(routers, "flags", lambda row: ["language"] * (row["completion"] == "y b"))
    rows = [{k: v for k, v in completion(i, "en", t, 1.0).items() if k != "flags"} for i in "ab" for t in "xy"]
    assert table_of(tmp_path / "1", rows)[0].may.tolist() == [[True, True], [True, False]]
    assert table_of(tmp_path / "2", rows, guards=["empty"])[0].may.all()


@pytest.mark.parametrize("change, words", [
    ({"prompt": "another"}, "the id 'a' has another prompt or language"), ({"language": "fr"},
    "the id 'a' has another prompt"),
    ({"reward": "1"}, "numbers or null"), ({"reward": float("nan")}, "numbers or null"),
    ({"teacher": ["x"]}, "a teacher is a name"),
    ({"reward": float("-inf")}, "numbers or null"), ({"judge_reward": True}, "numbers or null"),
    ({"language": "xx"}, "unknown language 'xx'"), ({"id": None}, "the row has no 'id'"),
    ({"completion": 3}, "must be a string")])
def test_rows_that_are_refused(change, words, tmp_path):
    rows = [completion("a", "en", "x", 1.0), completion("b", "en", "x", 1.0)]
    refusal(lambda: table_of(tmp_path, rows, [completion("b", "en", "y", 1.0),
        completion("a", "en", "y", 1.0) | change]),
            "rows-1.jsonl:2", words)


@pytest.mark.parametrize("key", ["reward", "teacher"])
def test_rows_without_a_reward_or_teacher(key, tmp_path):
    rows = completions()
    del rows[4][key]
    refusal(lambda: table_of(tmp_path, rows), "rows-0.jsonl:5 has no reward or no teacher")


# --- what a teacher is worth ---

def test_value_and_advantage(tmp_path):
    """
    Known rewards, and their squares about the prompt's mean: a 1 3 -> 1 + 1; b 6 0 -> 9 + 9; c 2 -> 0; e 4 -> 0: 20 in
    6 rewards. Who is refused (b, x) or silent (c, x) gets the worst answer's reward less that deviation.
    """
    rows = [completion("a", "en", "x", 1.0), completion("a", "en", "y", 3.0),
            completion("b", "en", "x", 6.0, flags=["truncated"]), completion("b", "en", "y", 0.0),
            completion("c", "en", "x", None, failure="no"), completion("c", "en", "y", 2.0),
            completion("d", "en", "x", None), completion("d", "en", "y", None), completion("e", "en", "x", 4.0)]
    table, s, nan = table_of(tmp_path, rows)[0], math.sqrt(20 / 6), math.nan
    assert table.value() == pytest.approx(np.array([[1, 3], [-s, 0], [2 - s, 2], [nan, nan], [4, nan]]), nan_ok=True)
    assert table.advantage() == pytest.approx(np.array([[-1, 1], [-s / 2, s / 2], [-s / 2, s / 2], [nan, nan],
        [0, nan]]), nan_ok=True)


def test_the_best_of_several_samples_counts(tmp_path):
    rows = [completion("a", "en", "x", r, k, f) for k, (r, f) in enumerate([(1.0, ()), (9.0, ["truncated"]),
        (3.0, ())])]
    table, *_ = table_of(tmp_path, rows + [completion("a", "en", "y", 2.0)])
    assert table.value().tolist() == [[3.0, 2.0]] and best_slot(table).tolist() == [2]
    assert best_slot(table, [1]).tolist() == [3] and best_slot(table, [-1]).tolist() == [-1]
    assert table.rewards == pytest.approx(np.array([[1.0, math.nan, 3.0, 2.0]]), nan_ok=True)


def test_reward_takes_the_best_of_each_prompt(tmp_path):
    table, *_ = table_of(tmp_path, completions())
    assert names(table, best_slot(table)) == {
        "a": "south", "b": "north", "c": "north", "d": "north", "e": "south", "f": "west", "g": "west"}
    assert best_slot(table, [0] * 8).tolist() == [0, 0, 0, 0, 0, -1, 0, -1]


# --- picks ---

def fitted(table, rows=None, **given):
    picks = Picks(table.teachers, **given)
    picks.fit(table, np.isin(table.ids, list(rows or table.ids)), lambda p: f"prompt {table.ids[p]}")
    return picks


def test_fixed_and_single_take_the_highest_mean_advantage(tmp_path):
    table, *_ = table_of(tmp_path, completions())
    # en: north -1 + 2, south 1 + 1, west 0 - 3; fr (e decides): south; ja: nothing of south in g and h
    picks = fitted(table)
    assert (picks.fixed["en"], picks.fixed["fr"], picks.fixed["ja"], picks.single) == (1, 1, 2, 1)
    assert picks.fixed["de"] == 1  # a language that the sample lacks: the best overall
    picks = fitted(table, "acf")  # one prompt of each language
    assert (picks.fixed["en"], picks.fixed["fr"], picks.fixed["ja"]) == (1, 0, 2)
    picks = fitted(table, given={"en": 2, "zh": 0})
    assert (picks.fixed["en"], picks.fixed["zh"], picks.fixed["fr"]) == (2, 0, 1)
    able = np.array([[True] * 3, [True, False, True], [False, False, True], [False] * 3, [True, False, False]])
    languages = ["en", "fr", "fr", "fr", "ja"]
    assert picks.pick("fixed", list("12345"), languages, able).tolist() == [2, 0, 2, -1, 0]
    # who is single but cannot: the language's own teacher, then the first who can
    assert picks.pick("single", list("12345"), ["en", "en", "fr", "fr", "ja"], able).tolist() == [1, 2, 2, -1, 0]


def test_a_teacher_that_refuses_is_worth_less_than_any_that_answers(tmp_path):
    """x is best where it answers, which is rarely; y always answers, badly."""
    rows = [completion(f"p{i}", "en", "x", 1.0 if i == 0 else None) for i in range(9)]
    rows += [completion(f"p{i}", "en", "y", 0.9 - i) for i in range(9)]
    assert fitted(table_of(tmp_path, rows)[0]).single == 1
    assert fitted(table_of(tmp_path / "2", rows)[0], ["p0"]).single == 0


def test_a_sample_without_rewards_is_refused(tmp_path):
    table, *_ = table_of(tmp_path, [completion("a", "en", t, None) for t in "xy"] + [completion("b", "en", "x", 1.0)])
    refusal(lambda: fitted(table, "a"), "no completion of the scored sample may be routed")


def test_random_depends_on_seed_and_id_only_and_is_uniform():
    ids, able = [f"q{i}" for i in range(3000)], np.array([[True, True, False, True], [False, True, False, True],
        [False] * 4] * 1000)
    picks = Picks(list("wxyz"), seed=3)
    found = picks.pick("random", ids, ["en"] * 3000, able)
    assert found[::-1].tolist() == picks.pick("random", ids[::-1], ["fr"] * 3000, able[::-1]).tolist()
    assert picks.pick("random", ids[7:8], ["en"], able[7:8]) == found[7]
    assert found.tolist() == Picks(list("abcd"), {"en": 2}, 3).pick("random", ids, ["en"] * 3000, able).tolist()
    for row, pool in ((0, {0, 1, 3}), (1, {1, 3}), (2, {-1})):
        count = collections.Counter(found[row::3].tolist())
        assert count.keys() == pool and all(abs(n - 1000 / len(pool)) < 4 * (1000 / len(pool)) ** 0.5
            for n in count.values())
    other = Picks(list("wxyz"), seed=4).pick("random", ids, ["en"] * 3000, able)
    assert 0.3 < (other[1::3] == found[1::3]).mean() < 0.7


# --- the learned router ---

WORDS = {"en": ("three hundred", "kilometres"), "ar": ("ثلاثمائة", "كيلومتر"), "zh": ("三百", "公里"),
    "ru": ("триста", "километров"),
         "hi": ("तीन सौ", "किलोमीटर")}


def noise(rng, language):
    letters = {"en": "abcdefghij", "ar": "ابتثجحخدذر", "zh": "的一是不了人我在有他", "ru": "абвгдежзик",
        "hi": "कखगघचछजझटठ"}[language]
    return " ".join("".join(rng.choices(letters, k=rng.randint(2, 6))) for _ in range(4))


def asked(n, seed):
    """Prompts in five scripts about a number in words (kind 0) or a unit (kind 1) -> (prompts, languages, kinds)."""
    rng, made = random.Random(seed), []
    for i in range(n):
        language, kind = list(WORDS)[i % 5], rng.randrange(2)
        words = f"{noise(rng, language)} {WORDS[language][kind]} {noise(rng, language)}"
        made.append((words if i % 3 else [{"role": "system", "content": WORDS[language][1 - kind]},
            {"role": "user", "content": words}],
                     language, kind))
    return zip(*made)


def test_learned_reads_a_rule_in_the_prompt():
    prompts, languages, kinds = asked(200, 1)
    value = np.array([[1.0 - k, k, 0.4] for k in kinds])
    model = Learned(list("xyz"))
    alone, whole = model.fit(prompts, languages, value)
    prompts, languages, kinds = asked(100, 2)
    able = np.ones((100, 3), bool)
    assert (model.pick(prompts.__getitem__, languages, able) == np.array(kinds)).mean() > 0.95 and whole < alone / 2
    able[:, 0] = False
    assert 0 not in model.pick(prompts.__getitem__, languages, able)


@pytest.mark.parametrize("seed", range(3))
def test_learned_is_fixed_where_prompts_tell_nothing(seed):
    """Another teacher is best in every language, most of the time; the prompts are random letters."""
    rng, languages = random.Random(seed), [list(WORDS)[i % 5] for i in range(200)]
    best = {language: i % 3 for i, language in enumerate(WORDS)}
    value = np.array([[(t == best[l]) + rng.gauss(0, 0.5) for t in range(3)] for l in languages])
    model = Learned(list("xyz"))
    alone, whole = model.fit([noise(rng, l) for l in languages], languages, value, seed=seed)
    assert 0 < whole <= alone  # what was learnt by heart is thrown away
    prompts = [noise(rng, l) for l in languages]
    assert model.pick(prompts.__getitem__, languages, np.ones((200, 3), bool)).tolist() == [best[l] for l in languages]


def test_fits_are_repeated_exactly_and_kept(tmp_path):
    prompts, languages, kinds = asked(60, 1)
    value, one, two, other = np.array([[1.0 - k, k] for k in kinds]), Learned(["x", "y"]), Learned(["x",
        "y"]), Learned(["x", "y"])
    assert one.fit(prompts, languages, value) == two.fit(prompts, languages, value * 1000 - 7)  # of any scale
    other.fit(prompts, languages, value, seed=1)
    assert torch.equal(one.bag.weight, two.bag.weight) and torch.equal(one.bias, two.bias)
    assert not torch.equal(one.bag.weight, other.bag.weight)
    one.save(tmp_path / "router.safetensors")
    able = np.ones((60, 2), bool)
    picks = one.pick(prompts.__getitem__, languages, able)
    assert 0 < picks.mean() < 1
    for teachers in (["x", "y"], ["y", "x"]):
        again = Picks(teachers, learned=str(tmp_path / "router.safetensors"))
        found = again.pick("learned", [""] * 60, languages, able, prompts.__getitem__)
        assert [teachers[t] for t in found] == ["xy"[t] for t in picks]
    for teachers in (["x"], ["x", "z"], ["x", "y", "z"]):
        refusal(lambda: Picks(teachers, learned=str(tmp_path / "router.safetensors")),
            "was fitted for the teachers x, y, not for")
    (tmp_path / "router.safetensors").write_bytes(b"no")
    for name in ("router.safetensors", "none.safetensors"):
        refusal(lambda: Picks(["x", "y"], learned=str(tmp_path / name)), name, "cannot be read")


def test_the_loss():
    """
    Values 1 and -1: their deviation is 1, the target softmax(4, -4), 1 / (1 + e^-8) for the better one; before any step
    p is 1/2, so the KL divergence is log 2 less the target's entropy. A teacher that was not asked is no part of it.
    """
    p = 1 / (1 + math.exp(-8))
    expected = math.log(2) + p * math.log(p) + (1 - p) * math.log(1 - p)
    prompts, languages = ["a b", "c", "d", "e", "f"], ["en", "fr", "ja", "en", "ar"]
    value = np.array([[1.0, -1.0]] * 3 + [[-1.0, 1.0]] * 2)
    assert Learned(["x", "y"]).fit(prompts, languages, value, epochs=0) == pytest.approx((expected, expected), rel=1e-5)
    with_third = np.concatenate([value, np.full((5, 1), np.nan)], 1)
    assert Learned(["x", "y", "z"]).fit(prompts, languages, with_third, epochs=0) == pytest.approx((expected,
        expected), rel=1e-5)
    q = 1 / (1 + math.exp(-2))  # sharpness 1
    expected = math.log(2) + q * math.log(q) + (1 - q) * math.log(1 - q)
    assert Learned(["x", "y"]).fit(prompts, languages, value, 1.0, epochs=0)[0] == pytest.approx(expected, rel=1e-5)
    # half the prompts say one thing and half the other: no language's part can do better than 1/2, and fit() says so
    even = Learned(["x", "y"]).fit(["same"] * 40, ["en"] * 40, np.array([[1.0, -1.0], [-1.0, 1.0]] * 20))
    assert even[0] > 0.9 * (math.log(2) + p * math.log(p) + (1 - p) * math.log(1 - p))


def test_features_are_the_same_on_any_machine():
    grams = [" ", "a", " a", "a ", " a ", "w a"]
    assert features("A").tolist() == sorted(zlib.crc32(g.encode()) % 65536 for g in grams)
    assert features("A\n ").tolist() == features("a").tolist() == features([
        {"role": "system", "content": "not read"}, {"role": "user", "content": " a "},
        {"role": "assistant", "content": "b"}]).tolist()
    expected = {"é": [51, 32595, 36158, 40472, 53061, 54883], "三": [948, 5994, 41492, 42257, 48730, 53061],
                "عد": [5721, 9971, 15732, 22208, 30075, 31387, 32158, 53061, 56269, 58257],
                "Да": [10776, 11640, 16863, 18138, 25170, 25708, 41077, 47425, 53061, 60105],
                "न": [23429, 31412, 32177, 53061, 58987, 62133]}
    assert {text: features(text).tolist() for text in expected} == expected
    long = "x" * 500 + "middle" * 100 + "y" * 500
    assert features(long).tolist() == features("x" * 500 + "other" * 100 + "y" * 500).tolist()
    assert features(long).tolist() != features("x" * 1000).tolist()
    assert len(features("")) == 2  # " " and "  ": never none
