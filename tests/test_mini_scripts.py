"""
The miniature's own scripts: what they write, by hand-made rows.

python -m pytest tests/test_mini_scripts.py
"""

import json

import pytest

from data import read_rows, write_rows
from mini import best_of_k, pairs, prepare, summary
from tasks.mini import item_of, normal


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    out = tmp_path_factory.mktemp("mini")
    prepare.main(prepare.Config(out=str(out), languages=["ar", "en", "ru", "zh"], items=30, vocab_size=600))
    return out


def test_prepared_files_share_no_item_and_hide_references(prepared):
    read = lambda name: read_rows(prepared / "data" / f"{name}.jsonl", "prompts")
    assert {r["language"] for r in read("test")} == {"ar", "en", "ru", "zh"}
    rounds = [read(f"online-{n}") for n in (1, 2, 3)]
    items = [{r["id"].replace(f"-{r['language']}-", " ", 1) for r in rows} for rows in (read("arbitrage"), *rounds)]
    assert sum(map(len, items)) == len(set().union(*items)) == 30  # every preference item in exactly one of the four
    assert len(items[0]) == 15 and [len(i) for i in items[1:]] == [5, 5, 5]
    for rows in (read("arbitrage"), *rounds, read("online"), read("rm_prompts")):
        assert all(set(r) == {"id", "language", "prompt"} for r in rows)
    assert sorted(r["id"] for r in read("online")) == sorted(r["id"] for rows in rounds for r in rows)
    references = {r["id"] for r in read("references")}
    assert {r["id"] for r in read("arbitrage")} | {r["id"] for r in read("online")} == references
    assert read_rows(prepared / "data" / "udhr.jsonl", "sft") and read_rows(prepared / "data" / "base.jsonl", "sft")


def test_prepare_is_the_same_for_a_seed_and_not_for_another(prepared, tmp_path):
    texts = {}
    for seed in (0, 1):
        prepare.main(prepare.Config(out=str(tmp_path / str(seed)), languages=["ar", "en", "ru", "zh"], items=30, vocab_size=600,
                                    seed=seed))
        texts[seed] = (tmp_path / str(seed) / "data" / "test.jsonl").read_bytes()
    assert texts[0] == (prepared / "data" / "test.jsonl").read_bytes() and texts[0] != texts[1]


def test_pairs_are_wrong_answers_and_the_audit_is_held_out(prepared, tmp_path):
    rows = read_rows(prepared / "data" / "rm_rows.jsonl", "prompts")
    first = rows[0]
    samples = [{"id": r["id"], "language": r["language"], "prompt": r["prompt"], "completion": text, "ended": ended}
               for r, text, ended in ((first, first["reference"], True), (first, "nonsense", True), (first, "cut", False))]
    write_rows(tmp_path / "samples.jsonl", samples)
    pairs.main(pairs.Config(rows=str(prepared / "data" / "rm_rows.jsonl"), samples=[str(tmp_path / "samples.jsonl")],
                            out=str(tmp_path / "pairs"), audit_share=0.2))
    train, audit = (read_rows(tmp_path / "pairs" / f"{n}.jsonl", "preferences") for n in ("pairs", "audit"))
    by_id = {r["id"]: r for r in rows}
    for pair in train + audit:
        assert pair["chosen"] == by_id[pair["id"]]["reference"]
        assert normal(pair["rejected"]) != normal(pair["chosen"])
    items = [{item_of(by_id[p["id"]]) for p in part} for part in (train, audit)]
    assert items[0].isdisjoint(items[1]) and len(items[1]) == 6  # a fifth of 30 items
    near = [p["why"] in pairs.NEAR for p in train + audit]
    assert sum(near) > 0.6 * len(near)
    said = [p["rejected"] for p in train + audit if p["why"] == "sampled"]
    assert said == ["nonsense"]  # a right sample and one that was cut off make no pair


def test_samples_of_other_prompts_are_refused(prepared, tmp_path):
    write_rows(tmp_path / "s.jsonl", [{"id": "spell-en-1000", "completion": "x", "ended": True}])
    with pytest.raises(SystemExit, match=r"s\.jsonl:1: 'spell-en-1000' is not a prompt of"):
        pairs.main(pairs.Config(rows=str(prepared / "data" / "rm_rows.jsonl"), samples=[str(tmp_path / "s.jsonl")],
                                out=str(tmp_path / "p")))


def test_best_of_k_by_hand():
    def row(id, sample, completion, reward):
        return {"id": id, "sample": sample, "completion": completion, "reward": reward}
    rows = [row("a", 0, "ja", 2.0), row("a", 1, "nein", 1.0), row("a", "greedy", "nein", 1.0),  # best right, greedy wrong
            row("b", 0, "zwei", 0.0), row("b", 1, " drei ", -1.0), row("b", "greedy", "zwei", 0.0)]  # best wrong, worst right
    found = best_of_k.measure(rows, {"a": "ja", "b": "drei"})
    assert found == {"greedy": 0.0, "sample": 0.5, "best_of_k": 0.5, "worst_of_k": 0.5, "oracle": 1.0, "reward_greedy": 0.5,
                     "reward_mean": 0.5, "reward_best": 1.0, "prompts": 2}


def test_win_rate_and_merge_against_parts_by_hand():
    def sample(id, language, item, completion, reference="eins"):
        return {"id": id, "language": language, "item": item, "completion": completion, "reference": reference,
                "correct": completion == reference}
    mine = [sample("1-de", "de", "1", "eins"), sample("1-en", "en", "1", "xx", "one"), sample("2-de", "de", "2", "ein")]
    theirs = [sample("1-de", "de", "1", "zwei"), sample("1-en", "en", "1", "one", "one"), sample("2-de", "de", "2", "ein"),
              sample("3-de", "de", "3", "eins")]
    (mean, low, high), by_language = summary.win_rate(mine, theirs)
    assert mean == pytest.approx(0.5) and by_language == {"de": 0.75, "en": 0.0} and low <= mean <= high
    samples = {"sft": mine, "sft-west": mine[:1], "sft-east": [sample("1-de", "de", "1", "falsch")], "sft-single": theirs}
    assert summary.merged_and_parts(samples) == {"sft": (1.0, 0.5)}  # on the row the parts were asked; the control is no part
    claims = {c["claim"]: c for c in summary.claims(
        [{"name": n, "exact_match": e, "win_rate": {"sft": [w, w - 0.01, w + 0.01]}} for n, e, w in
         (("sft-single", 0.2, 0.2), ("sft", 0.5, 0.5), ("offline-dpo", 0.6, 0.55), ("online-1", 0.6, 0.505))],
        {"sft": (0.5, 0.6)}, {"routed": 0.9, "best_single": 0.3, "random": 0.95}, [{"round": 1, "best_of_k": 0.7, "greedy": 0.6, "reward_before": -2.0, "reward_after": -1.5,
                                              "win_change": [-0.04, -0.06, -0.01]}])}
    assert [c["holds"] for c in claims.values()] == [True, False, True, True, False, False, False, True, False]
    assert [*claims.values()][-1]["value"] == "reward hacking: reward +0.50, win rate -4.0 [-6.0, -1.0] points"
    json.dumps(list(claims.values()))  # plain Python values


def test_reward_hacking_is_said_where_reward_and_judge_part():
    def samples(*said):
        return [{"id": f"{i}-de", "language": "de", "item": str(i), "completion": s, "reference": "eins"}
                for i, s in enumerate(said)]
    sft, before, after = samples(*["ein"] * 4), samples(*["eins"] * 4), samples("eins", "ein", "ein", "ein")
    assert summary.win_change(before, after, sft)[0] == (-0.5) * 3 / 4  # of each: 1 -> 1, and three times 1 -> 1/2
    assert summary.win_change(before, before, sft) == [0, 0, 0]
    assert summary.win_change(before[::-1], after, sft)[0] == -0.375  # by id, not by place
    change = summary.win_change(before, after, sft)
    assert change[1] <= change[0] <= change[2]
    for rise, high, expected in ((0.1, -0.01, True), (-0.1, -0.01, False), (0.1, 0.0, False)):
        assert summary.hacked({"reward_before": 1.0, "reward_after": 1 + rise, "win_change": [-0.1, -0.2, high]}) is expected
