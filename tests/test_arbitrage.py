"""
Arbitrage: which teacher answers which prompt, on rows small enough to route by eye.

    python -m pytest tests/test_arbitrage.py

`test_wrong_routers_are_seen` swaps routers and breaks what counts as usable: five mutants, each changes a known answer.
"""

import collections
import json

import pytest

import tiny
from arbitrage import ROUTERS, Config, by_prompt, main, mean_rewards, preference_rows, route
from common import atomic_dir
from chat import Chat
from generate import complete
from model import load
from reward import load_reward_model, new_reward_model, score, write_reward_model

cpu = tiny.cpu
#        id    language  {teacher: reward}; * cut off, "" empty
TABLE = [("a", "en", {"north": 1.0, "south": 3.0, "west": 2.0}),
         ("b", "en", {"north": 5.0, "south": 4.0, "west": 0.0}),
         ("c", "fr", {"north": -1.0, "south": -3.0, "west": -2.0}),
         ("d", "fr", {"north": 2.0, "south": 2.0, "west": 2.0}),  # a tie: no pair, the first teacher is routed
         ("e", "fr", {"north": -9.0, "south": 9.0, "west": 1.0}),
         ("f", "ja", {"north": 50.0, "south": 1.0, "west": 1.5}),  # north is cut off
         ("g", "ja", {"north": 0.0, "south": 99.0, "west": 0.5}),  # south says nothing
         ("h", "ja", {"north": 7.0, "south": 7.0, "west": 7.0})]  # all cut off
CUT_OFF = {("f", "north"), ("h", "north"), ("h", "south"), ("h", "west")}
EMPTY = {("g", "south")}


def completions():
    """The table as arbitrage would have written it: teacher by teacher."""
    return [{"id": i, "language": language, "prompt": f"prompt {i}", "teacher": t, "sample": 0, "reward": rewards[t],
             "completion": "  " if (i, t) in EMPTY else f"{t} {i}", "ended": (i, t) not in CUT_OFF}
            for t in ("north", "south", "west") for i, language, rewards in TABLE]


def chosen(router, **options):
    return {r["id"]: r["teacher"] for r in route(by_prompt(completions()), router, **options)}


def test_usable_completions():
    groups = by_prompt(completions())
    assert list(groups) == list("abcdefgh")
    assert {i: [r["teacher"] for r in rows] for i, rows in groups.items() if len(rows) < 3} == {
        "f": ["south", "west"], "g": ["north", "west"], "h": []}
    unmarked = [{k: v for k, v in row.items() if k != "ended"} for row in completions()]  # another sampler's rows
    assert len(by_prompt(unmarked)["h"]) == 3 and len(by_prompt(unmarked)["g"]) == 2


def test_reward_takes_the_best_of_each_prompt():
    assert chosen("reward") == {
        "a": "south", "b": "north", "c": "north", "d": "north", "e": "south", "f": "west", "g": "west"}


def test_fixed_takes_the_best_teacher_of_each_language():
    # en: north 6, south 7, west 2; fr: north -8, south 8, west 1; ja over usable rows: north 0, south 1, west 1
    assert mean_rewards([r for r in completions() if r["language"] == "fr"]) == pytest.approx(
        {"north": -8 / 3, "south": 8 / 3, "west": 1 / 3})
    found = chosen("fixed")
    assert {found[i] for i in "ab"} == {"south"} and {found[i] for i in "cde"} == {"south"}
    # chosen on the first prompt of each language alone: en a: south; fr c: north; ja f: west (north is cut off)
    assert chosen("fixed", fixed_on=1) == {
        "a": "south", "b": "south", "c": "north", "d": "north", "e": "north", "f": "west", "g": "west"}


def test_single_takes_one_teacher_for_everything():
    # usable rows: north 1+5-1+2-9+0 = -2 of 6; south 3+4-3+2+9+1 = 16 of 6; west 2+0-2+2+1+1.5+0.5 = 5 of 7
    assert mean_rewards(r for g in by_prompt(completions()).values() for r in g) == pytest.approx(
        {"north": -2 / 6, "south": 16 / 6, "west": 5 / 7})
    assert chosen("single") == {i: "south" for i in "abcdef"}  # g: south said nothing, so nobody answers


def test_random_draws_usable_teachers_by_seed():
    counts = {i: collections.Counter() for i in "abcdefg"}
    for seed in range(300):
        found = chosen("random", seed=seed)
        assert found.keys() == set("abcdefg") and found == chosen("random", seed=seed)
        for i, teacher in found.items():
            counts[i][teacher] += 1
    for i, count in counts.items():
        pool = {"f": {"south", "west"}, "g": {"north", "west"}}.get(i, {"north", "south", "west"})
        assert count.keys() == pool
        assert all(abs(n - 300 / len(pool)) < 5 * (300 / len(pool)) ** 0.5 for n in count.values())


@pytest.mark.parametrize("router", ROUTERS)
def test_cut_off_and_empty_completions_are_never_routed(router):
    for seed in range(30):
        for r in route(by_prompt(completions()), router, seed, 2):
            assert (r["id"], r["teacher"]) not in CUT_OFF | EMPTY


def test_pairs_are_the_best_against_the_worst():
    pairs = preference_rows(by_prompt(completions()), 0.0)
    fields = ("id", "chosen_teacher", "rejected_teacher", "chosen_reward", "rejected_reward")
    assert [tuple(p[f] for f in fields) for p in pairs] == [
        ("a", "south", "north", 3.0, 1.0), ("b", "north", "west", 5.0, 0.0), ("c", "north", "south", -1.0, -3.0),
        ("e", "south", "north", 9.0, -9.0), ("f", "west", "south", 1.5, 1.0), ("g", "west", "north", 0.5, 0.0)]
    assert pairs[0] == {
        "id": "a", "language": "en", "prompt": "prompt a", "chosen": "south a", "rejected": "north a",
        "chosen_reward": 3.0, "rejected_reward": 1.0, "chosen_teacher": "south", "rejected_teacher": "north"}
    assert [p["id"] for p in preference_rows(by_prompt(completions()), 2.0)] == ["b", "e"]  # further apart than 2
    same = [r | {"completion": f" {r['id']} " if r["teacher"] == "north" else r["id"]} for r in completions()]
    assert preference_rows(by_prompt(same), 0.0) == []  # texts that differ in spaces alone teach nothing


def takes_for(router, other, **changed):
    """route() that takes `other` where `router` is asked for."""
    return "route", lambda groups, name, **options: route_plain(
        groups, other if name == router else name, **options | (changed if name == router else {}))


def believes(**fields):
    """by_prompt() of rows that all hold these fields."""
    return "by_prompt", lambda rows: by_prompt_plain([r | fields for r in rows])


@pytest.mark.parametrize("name, wrong", [
    takes_for("reward", "single"), takes_for("fixed", "single"), takes_for("single", "fixed", fixed_on=1),
    believes(ended=True), believes(completion="never empty")])
def test_wrong_routers_are_seen(name, wrong, monkeypatch):
    monkeypatch.setitem(globals(), name, wrong)
    with pytest.raises(AssertionError):
        test_reward_takes_the_best_of_each_prompt()
        test_fixed_takes_the_best_teacher_of_each_language()
        test_single_takes_one_teacher_for_everything()


route_plain, by_prompt_plain = route, by_prompt


# --- the script ---

@pytest.mark.parametrize("router", ROUTERS)
def test_routing_a_file_of_completions(tmp_path, router, capsys):
    path = tiny.write(tmp_path / "completions.jsonl", completions())
    main(Config(completions=path, router=router, fixed_on=1, out=str(tmp_path / "out"), seed=3))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    sft = tiny.read(tmp_path / "out" / "sft.jsonl")
    expected = route(by_prompt(completions()), router, 3, 1)
    assert sft == [{k: r[k] for k in ("id", "language", "prompt", "completion", "teacher", "reward")} for r in expected]
    assert tiny.read(tmp_path / "out" / "completions.jsonl") == completions()
    assert tiny.read(tmp_path / "out" / "pairs.jsonl") == preference_rows(by_prompt(completions()), 0.0)

    assert (report["router"], report["prompts"], report["routed"], report["pairs"], report["unusable"]) == (
        router, 8, len(sft), 6, 5)
    for language, shares in report["teacher_share"].items():
        assert sum(shares.values()) == pytest.approx(1)
        of = [r["teacher"] for r in sft if r["language"] == language]
        assert shares == pytest.approx({t: of.count(t) / len(of) for t in of})
    assert report["teacher_share"].keys() == {r["language"] for r in sft}
    # south: 3+4-3+2+9+1+99+7, north: 1+5-1+2-9+50+0+7, west: 2+0-2+2+1+1.5+0.5+7, over all 8 prompts
    assert report["teacher_mean_reward"] == pytest.approx({"north": 55 / 8, "south": 122 / 8, "west": 12 / 8})
    # reward: 3 5 -1 2 9 1.5 0.5; fixed on one prompt: 3 4 -1 2 -9 1.5 0.5; single: south's 3 4 -3 2 9 1
    means = report["router_mean_reward"]
    assert means["reward"] == pytest.approx(20 / 7) and means["fixed"] == pytest.approx(1 / 7)
    assert means["single"] == pytest.approx(16 / 6) and means["random"] <= means["reward"]
    out = capsys.readouterr().out
    assert f"router {router}: {len(sft)} of 8 prompts routed, 6 pairs, 5 of 24 completions cut off or empty" in out
    assert "mean reward, reward 2.857" in out and "mean reward, single 2.667" in out


def refusal(words, **settings):
    with pytest.raises(SystemExit) as e:
        main(Config(**settings))
    assert words in str(e.value) and "\n" not in str(e.value)


def test_refusals(tmp_path):
    out = str(tmp_path / "out")
    rows = completions()
    del rows[4]["reward"]
    path = tiny.write(tmp_path / "rows.jsonl", rows)
    refusal(f"{path}:5 has no reward", completions=path, out=out)
    rows = completions()
    del rows[0]["teacher"]
    refusal(f"{path}:1 has no reward or no teacher", completions=tiny.write(path, rows), out=out)
    rows = completions()
    del rows[7]["id"]
    refusal(f"{path}:8: the row has no 'id'", completions=tiny.write(path, rows), out=out)
    refusal("--router best: known are reward, fixed, single, random", completions=path, router="best", out=out)
    refusal("none.jsonl not found", completions=str(tmp_path / "none.jsonl"), out=out)
    refusal("none.jsonl not found", prompts=str(tmp_path / "none.jsonl"), out=out)
    unusable = [r for r in completions() if r["id"] == "h"]
    refusal("nothing to route", completions=tiny.write(path, unusable), out=out)
    assert not (tmp_path / "out").exists()


def test_a_router_without_any_prompt_has_no_mean(tmp_path):
    """south has the best mean but nothing usable where `single` would need it: None, not a crash."""
    rows = [r for r in completions() if r["id"] == "g" and r["teacher"] == "south"] + [
        r for r in completions() if r["id"] in "ag" and r["teacher"] == "north"]
    path = tiny.write(tmp_path / "rows.jsonl", rows)
    main(Config(completions=path, router="reward", out=str(tmp_path / "out")))
    assert {r["id"]: r["teacher"] for r in tiny.read(tmp_path / "out" / "sft.jsonl")} == {"g": "north", "a": "north"}


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """Two teachers with different weights, their folders' names, and a reward model."""
    folder = tmp_path_factory.mktemp("arbitrage")
    for seed, name in enumerate(("north", "south")):
        tiny.make_checkpoint(folder / name, seed)
    model = new_reward_model(folder / "north")
    with atomic_dir(folder / "rm") as out:
        write_reward_model(out, model, folder / "north")
    tiny.write(folder / "prompts.jsonl", [{"id": f"q{i}", "language": ("hi", "ko")[i % 2], "prompt": p}
                                          for i, p in enumerate(["three", "trois cent", "347", "Write", "le nombre"])])
    return folder


def test_asking_teachers(pool, tmp_path):
    """The whole script, and its completions and rewards made anew; then routing its own completions again."""
    done = tiny.script(
        "arbitrage.py", "--prompts", pool / "prompts.jsonl", "--teachers", pool / "north", f"{pool / 'south'}/",
        "--reward_model", pool / "rm", "--max_new_tokens", 40, "--samples", 6, "--temperature", 2.0, "--seed", 5,
        "--out", tmp_path / "out")
    rows, prompts = tiny.read(tmp_path / "out" / "completions.jsonl"), tiny.read(pool / "prompts.jsonl")
    expected = [r for name in ("north", "south") for r in complete(
        load(pool / name), Chat(pool / name), prompts, 40, 2.0, samples=6, seed=5, teacher=name)]
    assert [{k: v for k, v in r.items() if k != "reward"} for r in rows] == expected
    pairs = [(r["prompt"], r["completion"]) for r in expected]
    rewards = score(load_reward_model(pool / "rm"), Chat(pool / "rm"), pairs)
    assert [r["reward"] for r in rows] == pytest.approx(rewards, abs=1e-3)

    sft = tiny.read(tmp_path / "out" / "sft.jsonl")
    assert sft and any(not r["ended"] for r in rows), "the test needs a completion that was cut off"
    for s in sft:
        usable = {r["completion"]: r["reward"] for r in rows
                  if r["id"] == s["id"] and r["ended"] and r["completion"].strip()}
        assert s["reward"] == max(usable.values()) == usable[s["completion"]]
    assert f"router reward: {len(sft)} of 5 prompts routed" in done.stdout

    again = Config(completions=str(tmp_path / "out" / "completions.jsonl"), out=str(tmp_path / "again"))
    main(again)
    for name in ("sft.jsonl", "pairs.jsonl", "completions.jsonl"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_a_missing_teacher(pool, tmp_path):
    refusal("none", prompts=str(pool / "prompts.jsonl"), teachers=[str(pool / "none")], out=str(tmp_path / "out"))
    refusal("is not a reward model", prompts=str(pool / "prompts.jsonl"), teachers=[str(pool / "north")],
            reward_model=str(pool / "north"), out=str(tmp_path / "out"), max_new_tokens=2)
    assert not (tmp_path / "out").exists()
