"""
Arbitrage: the script from its flags to its files. Asking and scoring: test_pool.py; routing: test_routers.py.

    python -m pytest tests/test_arbitrage.py
"""

import dataclasses
import json
import random
import unicodedata

import tiny  # first: it finds the repository

import numpy as np
import pytest

import arbitrage
import pool
import reward
from arbitrage import Config, main
from chat import Chat
from common import atomic_dir
from generate import complete
from model import load
from pool import read_prompts, sample_of
from reward import load_reward_model, new_reward_model, score, write_reward_model
from routers import ROUTERS
from test_endpoint import read, refusal as one_line, serving, waits, whole  # noqa: F401  waits: a fixture
from test_routers import TEACHERS, completion, completions

cpu = tiny.cpu


def route(tmp_path, rows, **settings):
    """Routes completion rows -> (rows of sft.jsonl, of pairs.jsonl, report.json)."""
    tmp_path.mkdir(exist_ok=True)
    path = tiny.write(tmp_path / "completions.jsonl", rows)
    main(Config(**{"completions": [path], "out": str(tmp_path / "out")} | settings))
    out = tmp_path / "out"
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return tiny.read(out / "sft.jsonl"), tiny.read(out / "pairs.jsonl"), report


def refusal(*words, **settings):
    return one_line(lambda: main(Config(**settings)), *words)


# --- routing completions that are there ---

# on a, c, d, f and g (half of each language, rounded up): en south 1; fr north 1; ja west, who alone is never refused
EXPECTED = {"reward": {"a": "south", "b": "north", "c": "north", "d": "north", "e": "south", "f": "west", "g": "west"},
            "fixed": {"a": "south", "b": "south", "c": "north", "d": "north", "e": "north", "f": "west", "g": "west"},
            "single": {i: "west" for i in "abcdefg"}}


@pytest.mark.parametrize("router", ROUTERS)
def test_routing_a_file_of_completions(router, tmp_path, capsys):
    sft, pairs, report = route(tmp_path, completions(), router=router, seed=3)
    assert tiny.read(tmp_path / "out" / "completions.jsonl") == sorted(completions(), key=lambda r: r["id"])
    assert [(p["id"], p["chosen_teacher"], p["rejected_teacher"], p["chosen_reward"], p["rejected_reward"])
        for p in pairs] == [
        ("a", "south", "north", 3.0, 1.0), ("b", "north", "west", 5.0, 0.0), ("c", "north", "south", -1.0, -3.0),
        ("e", "south", "north", 9.0, -9.0), ("f", "west", "south", 1.5, 1.0), ("g", "west", "north", 0.5, 0.0)]
    assert pairs[0] == {"id": "a", "language": "en", "prompt": "prompt a", "chosen": "south a", "rejected": "north a",
                        "chosen_reward": 3.0, "rejected_reward": 1.0, "chosen_teacher": "south",
                        "rejected_teacher": "north"}
    usable = {(r["id"], r["teacher"]): r for r in completions() if not r["flags"]}
    found, expected = {r["id"]: r["teacher"] for r in sft}, EXPECTED.get(router)
    if router == "random":
        drawn = {i: random.Random(f"3 {i}").choice(TEACHERS) for i in "abcdefgh"}
        expected = {i: t for i, t in drawn.items() if (i, t) in usable}
    assert found == (found if router == "learned" else expected) and len(found) > 4
    assert all(r == {k: usable[r["id"], r["teacher"]][k] for k in ("id", "language", "prompt", "completion",
        "teacher", "reward")}
               for r in sft)
    assert (report["router"], report["prompts"], report["routed"], report["pairs"], report["unusable"]) == (router, 8,
        len(sft), 6, 5)
    assert report["languages"]["ja"] == {"prompts": 3, "routed": sum(i in found for i in "fgh"), "pairs": 2}
    assert (report["compared"]["prompts"], report["compared"]["fitted_on"], report["compared"]["baseline"]) == (3, 5,
        "west")
    assert report["routers"]["reward"]["reward"] == 7.0
    assert report["routers"]["single"]["reward"] == 0.5  # b, e, and h for nobody
    out = capsys.readouterr().out
    assert f"router {router}: {len(sft)} of 8 prompts routed, 6 pairs, 5 of 24 completions refused" in out
    assert "reward                       reward   7.000" in out
    kept = tmp_path / "out" / "router.safetensors"
    assert kept.exists() == (router == "learned")
    if router == "learned":
        again, *_ = route(tmp_path / "2", completions(), router=router, learned=str(kept))
        assert again == sft
    assert not (tmp_path / "out.unfinished").exists() and not (tmp_path / "out" / "run.json").exists()


def test_given_teachers(tmp_path):
    sft, *_ = route(tmp_path, completions(), router="fixed", fixed=["en=west", "ja=north"])
    assert [(r["id"], r["teacher"]) for r in sft] == [("a", "west"), ("b", "west"), ("c", "north"), ("d", "north"),
        ("e", "north"),
                                                      ("g", "north")]
    alone = [r for r in completions() if r["teacher"] == "west"]  # no prompt that several answered, none is needed
    sft, *_ = route(tmp_path / "2", alone, router="fixed", fixed=["en=west", "fr=west", "ja=west"])
    assert len(sft) == 7


def test_several_files_are_routed_as_one(tmp_path):
    rows = [r for r in completions() if r["id"] != "d"]  # a tie
    whole, *_ = route(tmp_path / "1", rows)
    paths = [tiny.write(tmp_path / f"{n}.jsonl", rows[n::3][::-1]) for n in range(3)]
    main(Config(completions=paths, out=str(tmp_path / "out")))
    assert sorted(map(str, tiny.read(tmp_path / "out" / "sft.jsonl"))) == sorted(map(str, whole))


def test_pairs(tmp_path):
    assert [p["id"] for p in route(tmp_path / "1", completions(), margin=2.0)[1]] == ["b", "e"]  # further apart than 2
    same = [r | {"completion": f" {r['id']} " if r["teacher"] == "north" else r["id"]} for r in completions()]
    assert route(tmp_path / "2", same)[1] == []  # texts that differ in spaces alone teach nothing
    # another language is never chosen, but may be rejected; what is cut off is neither
    rows = [completion("a", "en", "w", 1.0), completion("a", "en", "x", 5.0, flags=["language"]),
            completion("a", "en", "y", 0.0, flags=["language"]), completion("a", "en", "z", -9.0, flags=["truncated"])]
    [pair] = route(tmp_path / "3", rows)[1]
    assert (pair["chosen_teacher"], pair["rejected_teacher"]) == ("w", "y")
    assert route(tmp_path / "4", rows, rejected_guards=["truncated", "language"])[1] == []
    [pair] = route(tmp_path / "5", rows, guards=["truncated"], rejected_guards=["empty"])[1]
    assert (pair["chosen_teacher"], pair["rejected_teacher"]) == ("x", "z")


def test_contrast(tmp_path):
    """The first teacher's best answer against the second's worst, if the Arbiter agrees; others do not matter."""
    rows = completions() + [completion("b", "en", "west", 0.5, 1), completion("b", "en", "north", -7.0, 1)]
    _, pairs, report = route(tmp_path, rows, contrast=["north", "west"])
    assert [(p["id"], p["chosen_reward"], p["rejected_reward"]) for p in pairs] == [("b", 5.0, 0.0), ("c", -1.0, -2.0)]
    assert all((p["chosen_teacher"], p["rejected_teacher"]) == ("north", "west") for p in pairs)
    assert report["pairs_from"] == "contrast" and report["pairs"] == 2


# --- prompts ---

SAME = [("de", "Straße  und Größe", "STRASSE und\n" + unicodedata.normalize("NFD", "größe ")),
        ("vi", "Tiếng Việt", unicodedata.normalize("NFD", " tiếng việt")),
        ("ko", "한국어", unicodedata.normalize("NFD", "한국어")),
        ("el", "ΟΔΟΣ", "οδος"), ("ru", "Ёлка", "ёлка"), ("ar", "مرحبا  بك", "مرحبا بك"),
        ("hi", "क़लम", unicodedata.normalize("NFD", "क़लम")), ("tr", "İZMİR", unicodedata.normalize("NFD", "İzmİr"))]


def test_prompts_that_say_the_same_are_left_out(tmp_path, capsys):
    rows = [{"id": f"{language}{k}", "language": language, "prompt": text} for k in (0, 1) for language, *texts in SAME
            for text in [texts[k]]]
    rows += [{"id": "nl", "language": "nl", "prompt": SAME[0][1]},  # another language asks anew
             {"id": "chat", "language": "de", "prompt": [{"role": "user", "content": SAME[0][1]}]},
             {"id": "again", "language": "de", "prompt": [{"role": "user", "content": SAME[0][1].upper()}]},
             {"id": "ß", "language": "de", "prompt": "Strase und Größe"}]
    path = tiny.write(tmp_path / "p.jsonl", rows)
    found, numbers, left_out = read_prompts(path, [])
    assert [found[n]["id"] for n in numbers] == [f"{language}0" for language, *_ in SAME] + ["nl", "chat",
        "ß"] and left_out == 9
    said = capsys.readouterr().out
    assert f"9 prompts say what an earlier one says and are left out, the first at {path}:9 (row 1)" in said
    assert [found[n]["id"] for n in read_prompts(path, ["ko", "nl"])[1]] == ["ko0", "nl"]


def test_prompts_that_are_refused(tmp_path):
    rows = [{"id": i, "language": "en", "prompt": p} for i, p in (("a", "x"), ("b", "y"), ("a", "z"))]
    path = tiny.write(tmp_path / "p.jsonl", rows)
    one_line(lambda: read_prompts(path, []), f"{path}:3: the id 'a' is that of row 1 as well")
    one_line(lambda: read_prompts(path, ["fr"]), "holds no prompt in fr")
    one_line(lambda: read_prompts(tiny.write(tmp_path / "p.jsonl", []), []), "holds no rows")
    one_line(lambda: read_prompts(tiny.write(tmp_path / "p.jsonl", [{"id": "a", "language": "en"}]), []), "p.jsonl:1",
        "'prompt'")


def test_the_sample_is_at_most_half_of_a_language():
    languages = np.array(["en", "fr", "en", "en", "de", "en", "en", "fr"])
    assert sample_of(languages, 50).tolist() == [True, True, True, True, True, False, False, False]
    assert sample_of(languages, 1).tolist() == [True, True, False, False, True, False, False, False]


# --- the whole script ---

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two teachers with different weights, a reward model and another, and prompts."""
    folder = tmp_path_factory.mktemp("arbitrage")
    for seed, name in enumerate(("north", "south")):
        tiny.make_checkpoint(folder / name, seed)
        with atomic_dir(folder / f"rm-{name}") as out:
            write_reward_model(out, new_reward_model(folder / name), folder / name)
    tiny.write(folder / "prompts.jsonl", [{"id": f"q{i}", "language": ("hi", "ko")[i % 2], "prompt": p}
                                          for i, p in enumerate(["three", "trois cent", "347", "Write", "le nombre"])])
    return folder


def asking(made, out, **settings):
    return {"prompts": str(made / "prompts.jsonl"), "teachers": [str(made / "north"), str(made / "south")],
        "out": str(out),
            "reward_model": str(made / "rm-north"), "max_new_tokens": 40, "samples": 4, "temperature": 2.0, "seed": 5,
            "guards": ["truncated", "empty"]} | settings


def words_of(settings):
    return [word for name, value in settings.items() for word in (f"--{name}",
        *(value if isinstance(value, list) else [value]))]


REPORT = {"router", "pairs_from", "prompts", "routed", "pairs", "languages", "teachers", "arbiter", "judge", "guards",
    "rewards",
          "unusable", "share", "routers", "compared", "duplicates", "audit", "forced", "seed", "seconds", "commit",
          "hardware"}


def test_asking_teachers(made, tmp_path):
    """The whole script, and its completions and rewards made anew; on two ranks; then its own completions routed."""
    one, two = (asking(made, tmp_path / name, judge=str(made / "rm-south")) for name in ("out", "two"))
    with serving() as server:
        picked = [asking(made, tmp_path / name, router="learned", teachers=[str(made / "north"), server.url])
            for name in ("picked", "picked-two")]
        tiny.jobs(tmp_path / "jobs.json", {1: [["", "arbitrage.py", *words_of(one)],
            ["", "arbitrage.py", *words_of(picked[0])]],
                                           2: [["", "arbitrage.py", *words_of(two)],
                                           ["", "arbitrage.py", *words_of(picked[1])]]})
        assert set(server.count.values()) == {2}  # rank 0 asks
    rows, prompts = tiny.read(tmp_path / "out" / "completions.jsonl"), tiny.read(made / "prompts.jsonl")
    expected = [r for name in ("north", "south") for r in complete(
        load(made / name), Chat(made / name), prompts, 40, 2.0, samples=4, seed=5, teacher=name)]
    said = lambda row: {k: v for k, v in row.items() if k not in ("flags", "reward", "judge_reward")}
    assert [said(r) for r in rows] == sorted(expected,
        key=lambda r: r["id"])  # prompt by prompt, then teacher by teacher
    for key, model in (("reward", "rm-north"), ("judge_reward", "rm-south")):
        rewards = score(load_reward_model(made / model), Chat(made / model),
            [(r["prompt"], r["completion"]) for r in rows])
        assert [r[key] for r in rows] == pytest.approx([x if r["completion"].strip() else None for r,
            x in zip(rows, rewards)], abs=1e-3)
    sft = tiny.read(tmp_path / "out" / "sft.jsonl")
    assert sft and any(not r["ended"] for r in rows), "the test needs a completion that was cut off"
    for s in sft:
        usable = {r["completion"]: r["reward"] for r in rows if r["id"] == s["id"] and r["ended"]
            and r["completion"].strip()}
        assert s["reward"] == max(usable.values()) == usable[s["completion"]]

    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert report.keys() == REPORT and report["teachers"].keys() == {"north", "south"}
    assert report["teachers"]["south"] == {"completions": 20, "failed": 0, "tokens": sum(
        r["tokens"] for r in rows if r["teacher"] == "south"), "model": str(made / "south"), "stopped": ""}
    assert report["compared"]["judged_by"] == str(made / "rm-south") and report["audit"] is None
    assert report["forced"] == []
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "completions.jsonl", "pairs.jsonl", "report.html", "report.json", "run.json", "sft.jsonl"]
    assert not list(tmp_path.glob("*.unfinished")) and not list(tmp_path.glob(".*"))

    for a, b in (("out", "two"), ("picked", "picked-two")):
        for name in ("completions", "sft", "pairs"):
            here, there = (read(tmp_path / folder / f"{name}.jsonl") for folder in (a, b))
            assert len(here) == len(there) > 0
            assert all(y == {k: pytest.approx(v, abs=1e-4) if "reward" in k else v for k, v in x.items()} for x,
                y in zip(here, there))
    asked = {i: {r["teacher"] for r in read(tmp_path / "picked" / "completions.jsonl") if r["id"] == i}
        for i in "q0 q1 q2 q3 q4".split()}
    assert [len(teachers) for teachers in asked.values()] == [2, 2, 2, 1,
        1]  # half of each language, rounded up, is the sample

    again = Config(completions=[str(tmp_path / "out" / "completions.jsonl")], guards=["truncated", "empty"],
        out=str(tmp_path / "again"))
    main(again)
    for name in ("sft.jsonl", "pairs.jsonl", "completions.jsonl"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    report = json.loads((tmp_path / "again" / "report.json").read_text(encoding="utf-8"))
    assert report.keys() == REPORT and report["compared"]["judged_by"] == "the judge_reward in these rows"


def cheap(monkeypatch):
    """Rewards and flags that are known: a completion is as good as its pluses are many."""
    def scored(model, chat, pairs, batch_tokens=0):
        return [float(c.count("+")) for _, c in pairs]
    monkeypatch.setattr(reward, "score", scored)
    monkeypatch.setattr(pool, "score", scored)
    monkeypatch.setattr(pool, "all_flags", lambda rows: [["empty"] * (not row["completion"].strip()) for row in rows])


def test_a_finished_run_is_not_paid_for_again(made, tmp_path, monkeypatch, capsys):
    cheap(monkeypatch)
    with serving() as server:
        settings = asking(made, tmp_path / "out", teachers=[server.url], samples=1)
        main(Config(**settings))
        before, asked = (tmp_path / "out" / "report.json").read_bytes(), len(server.seen)
        main(Config(**settings))
        said = capsys.readouterr().out
        assert f"{tmp_path / 'out'} is finished: --completions {tmp_path / 'out'}/completions.jsonl" in said
        for flag in ({"margin": 1.0}, {"rejected_guards": []}, {"guards": ["empty"]}):
            refusal("holds these answers already, written with other flags", **settings | flag)
        assert (tmp_path / "out" / "report.json").read_bytes() == before and len(server.seen) == asked == 5
        main(Config(**settings | {"resume": "never"}))
        assert len(server.seen) == 10
        main(Config(**settings | {"seed": 6}))  # other answers: the folder is written anew
        assert len(server.seen) == 15


def test_one_prompt_a_language(made, tmp_path, monkeypatch):
    """All of them are the sample: whoever is best is picked, not whoever is first."""
    cheap(monkeypatch)
    prompts = tiny.write(tmp_path / "p.jsonl", [{"id": "a", "language": "en", "prompt": "x"}])
    teachers = [tiny.write(tmp_path / f"{t}.jsonl", [{"id": "a", "language": "en", "prompt": "x",
        "completion": f"{t} {p}"}])
                for t, p in (("bad", "+"), ("good", "++"))]
    for router in ROUTERS:
        main(Config(**asking(made, tmp_path / router, prompts=prompts, teachers=teachers, router=router, samples=1)))
        [row] = tiny.read(tmp_path / router / "sft.jsonl")
        assert row["teacher"] == "good" or router == "random"


# --- the audit ---

def test_the_audit_comes_before_the_asks(made, tmp_path, monkeypatch, capsys):
    cheap(monkeypatch)
    prompts = tiny.write(tmp_path / "p.jsonl", [{"id": c, "language": c, "prompt": "x"}
        for c in ("de", "ar", "zh-Hant", "zh", "fr")])
    pair = lambda code, good: {"language": code, "prompt": "p", "chosen": "+ a" if good else "b",
        "rejected": "b" if good else "+ a"}
    audit = tiny.write(tmp_path / "audit.jsonl", [pair(code, n < good) for code, good in (
        ("deu_Latn", 6), ("arb_Arab", 4), ("zho_Hant", 3), ("zho_Hans", 6), ("kor_Hang", 0)) for n in range(6)])
    with serving(lambda handler, payload, times: handler.send(200, whole(payload, "+"))) as server:
        settings = asking(made, tmp_path / "out", prompts=prompts, teachers=[server.url], audit=[audit], samples=1)
        refusal("the Arbiter is no better than chance in ar zh-Hant (its interval holds 0.5)", "--force", **settings)
        assert not server.seen and not (tmp_path / "out").exists() and not list(tmp_path.rglob("*.jsonl"))[2:]
        refusal("in ar (its", **settings | {"languages": ["de", "ar"]})
        # the advice that the refusal gives can be taken: another reward model, other languages
        main(Config(**settings | {"languages": ["de", "zh"], "reward_model": str(made / "rm-south")}))
        assert len(server.seen) == 2
        main(Config(**settings | {"force": True, "out": str(tmp_path / "forced")}))
    report = json.loads((tmp_path / "forced" / "report.json").read_text(encoding="utf-8"))
    assert report["forced"] == ["ar", "zh-Hant"] and report["routed"] == 5
    assert {k: (t["accuracy"], t["trusted"]) for k, t in report["audit"].items()} == {
        "all": (19 / 30, False), "de": (1.0, True), "ar": (4 / 6, False), "zh-Hant": (0.5, False), "zh": (1.0, True),
        "ko": (0.0, False)}
    out = capsys.readouterr().out
    assert "no audit rows in fr: nothing says whether the Arbiter can be trusted there" in out
    assert "no better than chance" in out
    rows = tmp_path / "forced" / "completions.jsonl"
    refusal("no better than chance in ar zh-Hant", completions=[str(rows)], audit=[audit], out=str(tmp_path / "x"),
            reward_model=str(made / "rm-north"))


# --- refusals ---

@pytest.mark.parametrize("change, words", [
    ({"router": "best"}, "--router best: known are reward, fixed, learned, random, single"),
    ({"guards": ["empty", "rude"]}, "a guard 'rude': known are truncated"), ({"rejected_guards": ["x"]}, "a guard 'x'"),
    ({"scored": 0}, "--scored is at least 1, got 0"), ({"completions_at_once": 0},
    "--completions_at_once is at least 1"),
    ({"judge": "out/mini/rm", "reward_model": "out/mini/rm"}, "--judge is another reward model than --reward_model"),
    ({"fixed": ["en=north"]}, "--fixed and --learned are for the routers of these names, not for reward"),
    ({"learned": "x.safetensors", "router": "fixed"}, "--fixed and --learned are for the routers of these names"),
    ({"fixed": ["english=north"], "router": "fixed"},
    "--fixed english=north: give language=teacher, one of north, south, west"),
    ({"fixed": ["en=east"], "router": "fixed"}, "--fixed en=east"), ({"fixed": ["en"], "router": "fixed"},
    "--fixed en: give"),
    ({"contrast": ["north"]}, "--contrast north: give two teachers"), ({"contrast": ["north", "x"]},
    "--contrast north x"),
    ({"completions": ["none.jsonl"]}, "none.jsonl not found"), ({"audit": ["none.jsonl"]}, "none.jsonl not found"),
    ({"completions": [], "prompts": "none.jsonl"}, "none.jsonl not found"),
    ({"completions": [], "prompts": "", "teachers": ["none"]}, "checkpoint none not found"),
    ({"router": "learned", "learned": "none.safetensors"}, "none.safetensors cannot be read")])
def test_flags_that_are_refused(change, words, made, tmp_path):
    if change.get("prompts") == "":
        change = change | {"prompts": str(made / "prompts.jsonl")}
    settings = {"completions": [tiny.write(tmp_path / "rows.jsonl", completions())],
        "reward_model": str(made / "rm-north"),
                "teachers": [str(made / "north")], "out": str(tmp_path / "out")}
    refusal(words, **settings | change)
    assert not list(tmp_path.glob("out*"))


def test_nothing_to_route(made, tmp_path, monkeypatch):
    rows = [r for r in completions() if r["id"] == "h"]
    refusal("there is nothing to route, the guards refuse every completion: north truncated 1; south language 1; "
            "west language 1, truncated 1", completions=[tiny.write(tmp_path / "rows.jsonl", rows)], out=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    cheap(monkeypatch)
    with serving() as server:  # what is no reward model is refused before it costs anything
        refusal("is not a reward model", **asking(made, tmp_path / "out", teachers=[server.url],
            reward_model=str(made / "north")))
        refusal("is not a reward model", **asking(made, tmp_path / "out", teachers=[server.url],
            judge=str(made / "north")))
        refusal("--resume is auto or never, got 'maybe'", **asking(made, tmp_path / "out", teachers=[server.url],
            resume="maybe"))
        refusal("no teacher of the pool answers in hi ko", **asking(made, tmp_path / "out", pool=tiny.write(
            tmp_path / "pool.jsonl", [{"model": server.url, "languages": ["en"]}])))
        assert not server.seen


def test_flags_are_documented():
    """Every flag has a help text: its comment."""
    from common import _help_texts
    texts = _help_texts(Config)
    assert not [f.name for f in dataclasses.fields(Config) if not texts.get(f.name)]
    assert arbitrage.__doc__.count("--") > 5
