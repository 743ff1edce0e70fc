"""
The numbers of a pool, by hand: who is compared with whom, on which prompts, at what cost.

    python -m pytest tests/test_pool_report.py

Mutants that these tests catch: ties that count as losses; costs of prompts that are not compared; prompts that one
teacher answered compared; routers fitted on what they are compared on; the dullest prompts shown first.
"""

import tiny  # first: it finds the repository

import numpy as np
import pytest

import pool_report
from pool_report import compare, completed, costs, interval, refused, reward_spread, samples_of, shares, split
from routers import Picks, best_slot
from test_routers import completion, completions, fitted, table_of

cpu = tiny.cpu


def small(tmp_path, judge=False, **change):
    """Two teachers; x is best on a and b, which are fitted on; y on c, x on d. change: {"id teacher": fields}."""
    rewards = {"a": (3.0, 1.0), "b": (3.0, 2.0), "c": (1.0, 2.0), "d": (5.0, 0.0)}
    judged = {"a": (1.0, 0.0), "b": (1.0, 0.0), "c": (9.0, 1.0), "d": (0.5, 0.75)}
    rows = [completion(i, "en", t, rewards[i][k], **({"judge_reward": judged[i][k]} if judge else {}))
        | change.get(i + t, {})
            for i in "abcd" for k, t in enumerate("xy")]
    return table_of(tmp_path, [row for row in rows if row["id"]])


def compared(table, test="cd"):
    return compare(table, fitted(table, "ab"), np.isin(table.ids, list(test)), lambda p: f"prompt {table.ids[p]}")


def test_routers_compared_by_the_arbiter(tmp_path):
    found, baseline = compared(small(tmp_path)[0])
    assert baseline == "x" and list(found) == ["reward", "fixed", "learned", "random", "single", "teacher x",
        "teacher y"]
    width = 1.96 * 0.25 / 2 ** 0.5  # of 1 (c: y's 2 beats x's 1) and 0.5 (d: the same answer)
    assert found["reward"] == {"reward": 3.5, "win_rate": pytest.approx([0.75, 0.75 - width, 0.75 + width]),
        "routed": 2,
                               "completions": 4, "tokens": 20, "share": {"en": {"x": 0.5, "y": 0.5}}}
    for name in ("fixed", "single", "teacher x"):
        assert found[name] == {"reward": 3.0, "win_rate": [0.5, 0.5, 0.5], "routed": 2, "completions": 2, "tokens": 10,
                               "share": {"en": {"x": 1.0}}}
    assert found["teacher y"]["reward"] == 1.0 and found["teacher y"]["win_rate"][0] == 0.5  # c won, d lost
    assert (found["random"]["completions"], found["random"]["routed"]) == (2, 2)


def test_routers_compared_by_a_judge(tmp_path):
    """The judge prefers x on c (9 to 1) and y on d, whatever the Arbiter says; rewards stay the Arbiter's."""
    found, _ = compared(small(tmp_path, judge=True)[0])
    assert (found["reward"]["reward"], found["reward"]["win_rate"][0]) == (3.5, 0.25)  # c: y loses; d: x is x
    assert found["teacher y"]["win_rate"][0] == 0.5 and found["single"]["win_rate"][0] == 0.5
    found, _ = compared(small(tmp_path, judge=True, cy={"judge_reward": None})[0], "c")
    assert found["teacher y"]["win_rate"][0] == 0.0  # no verdict is a loss


def test_what_is_refused_or_of_unknown_cost_is_compared_as_such(tmp_path):
    table, *_ = small(tmp_path, cy={"flags": ["language"]}, dx={"tokens": None})
    found, _ = compared(table)
    assert found["teacher y"] == {"reward": 0.0, "win_rate": pytest.approx([0, 0, 0]), "routed": 1, "completions": 2,
        "tokens": 10,
                                  "share": {"en": {"y": 1.0}}}
    assert found["reward"]["reward"] == 3.0 and found["reward"]["tokens"] is None
    assert found["teacher x"]["tokens"] is None
    found, _ = compared(table, "c")
    assert found["teacher y"]["reward"] is None and found["teacher y"]["share"] == {}
    assert found["teacher x"]["tokens"] == 5


def test_completed_and_split(tmp_path):
    there = {"a": "xy", "b": "x", "c": "xy", "d": "yx", "e": "x", "f": "x", "g": "xyz", "h": "xyz", "i": "xy"}
    languages = dict(zip("abcdefghi", "en en en en fr fr de de de".split()))
    table, *_ = table_of(tmp_path, [completion(i, languages[i], t, 1.0) for i in there for t in there[i]])
    assert "".join(i for i, c in zip(table.ids, completed(table)) if c) == "acdgh"  # fr: only x; i: without z
    parts = lambda sample: ["".join(np.array(table.ids)[part]) for part in split(table,
        np.isin(table.ids, list(sample)))]
    assert parts("abg") == ["ag", "cdh"]
    assert parts("abcdefghi") == parts("") == parts("bi") == ["adg", "ch"]  # every second one of a language


def test_interval_shares_costs_and_refused(tmp_path):
    assert interval(np.array([0.0, 1.0, 1.0, 0.0])) == pytest.approx([0.5, 0.01, 0.99])
    table, counts, _ = table_of(tmp_path, completions())
    slots = best_slot(table)
    assert shares(table, slots, np.ones(8, bool)) == {
        "en": {"north": 0.5, "south": 0.5}, "fr": {"north": pytest.approx(2 / 3), "south": pytest.approx(1 / 3)},
        "ja": {"west": 1.0}}
    assert shares(table, slots, np.isin(table.ids, ["a", "h"])) == {"en": {"south": 1.0}}
    assert costs(table, table.there) == (24, 120) and costs(table, np.zeros((8, 3), bool)) == (0, 0)
    table.tokens[0, 0] = -1
    assert costs(table, table.there) == (24, None)
    assert refused(counts)["north"] == {"all": {"n": 8, "truncated": 2, "dropped": 2}, "en": {"n": 2}, "fr": {"n": 3},
                                        "ja": {"n": 3, "truncated": 2, "dropped": 2}}


def test_reward_spread(tmp_path):
    found = reward_spread(small(tmp_path)[0])
    # x: rewards 3 3 1 5 about 3; advantages 1, 1/2, -1/2, 5/2
    assert found["x"]["all"] == found["x"]["en"]
    assert found["x"]["en"]["mean"] == 3.0 and found["x"]["en"]["spread"] == pytest.approx(2 ** 0.5)
    assert found["x"]["en"]["n"] == 4
    assert found["x"]["en"]["quantiles"] == pytest.approx(np.quantile([1.0, 0.5, -0.5, 2.5],
        [0.05, 0.25, 0.5, 0.75, 0.95]))
    assert found["x"]["en"]["quantiles"][2] == 0.75
    found = reward_spread(small(tmp_path / "2", dy={"flags": ["truncated"]})[0])
    assert found["y"]["en"]["n"] == 3 and found["y"]["en"]["mean"] == pytest.approx(5 / 3)


class Settings:
    router, contrast, reward_model, judge, completions = "reward", [], "out/rm", "", []


def test_summary(tmp_path):
    table, counts, _ = small(tmp_path, judge=True, dy={"failure": "503", "flags": ["empty"]},
        ay={"flags": ["language"]})
    ask = lambda sample: pool_report.summary(Settings, table, counts, Picks(["x", "y"]),
        np.isin(table.ids, list(sample)),
                                             best_slot(table), np.array([True, True, False, False]),
                                             lambda p: "a prompt")
    report = ask("ab")
    assert report["languages"] == {"en": {"prompts": 4, "routed": 4, "pairs": 2}} and report["pairs"] == 2
    assert report["teachers"] == {"x": {"completions": 4, "failed": 0, "tokens": 20},
        "y": {"completions": 4, "failed": 1, "tokens": 20}}
    assert (report["prompts"], report["routed"], report["unusable"], report["pairs_from"]) == (4, 4, 2, "best_worst")
    assert report["guards"]["y"]["en"] == {"n": 4, "empty": 1, "language": 1, "failed": 1, "dropped": 2}
    assert report["share"] == {"en": {"x": 0.75, "y": 0.25}} and report["arbiter"] == "out/rm"
    assert {k: report["compared"][k] for k in ("prompts", "fitted_on", "baseline", "judged_by")} == {
        "prompts": 2, "fitted_on": 2, "baseline": "x", "judged_by": "the judge_reward in these rows"}
    assert len(report["compared"]["router_losses"]) == 2 and report["routers"]["teacher y"]["routed"] == 1
    assert ask("abcd")["compared"]["prompts"] == 2  # a and c to fit, b and d to test
    alone, counts, _ = table_of(tmp_path / "2", [completion("a", "en", "x", 1.0)])
    report = pool_report.summary(Settings, alone, counts, Picks(["x"]), np.ones(1, bool), best_slot(alone),
        np.zeros(1, bool), None)
    assert "routers" not in report and "compared" not in report


def test_a_summary_where_nothing_that_is_fitted_on_was_answered(tmp_path):
    rows = [completion(i, "en", t, None if i == "a" else 1.0) for i in "ab" for t in "xy"]
    table, counts, _ = table_of(tmp_path, rows)
    report = pool_report.summary(Settings, table, counts, Picks(["x", "y"]), np.array([True, False]), best_slot(table),
                                 np.zeros(2, bool), lambda p: "a prompt")
    assert report["routed"] == 1 and "routers" not in report


def test_samples_for_the_page(tmp_path):
    """Those where the pool disagrees most come first; what nobody answered is not shown."""
    rows = [completion(f"p{i}", "en", t, float(i * (t == "x")), tokens=None) for i in (1, 3, 2, 0) for t in "xy"]
    rows += [completion("q", "fr", "x", 1.0)]
    table, _, files = table_of(tmp_path, rows, ids=["p1", "p3", "p2", "p0", "q", "r"],
        languages=["en"] * 4 + ["fr"] * 2)
    found = samples_of(table, files, best_slot(table), lambda rows: rows[:2] if rows[0]["id"] in ("p1", "p3") else None, each=2)
    assert [s["id"] for s in found] == ["p3", "p2", "q"]
    assert found[0] == {"id": "p3", "language": "en", "prompt": "prompt p3", "chosen": 0, "rejected": 1, "candidates": [
        {"teacher": "x", "sample": 0, "completion": "x p3", "reward": 3.0, "flags": []},
        {"teacher": "y", "sample": 0, "completion": "y p3", "reward": 0.0, "flags": []}]}
    assert found[1]["rejected"] is None and len(found[2]["candidates"]) == 1
