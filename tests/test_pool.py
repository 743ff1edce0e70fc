"""
The pool: who the teachers are, what each is asked, and that nothing is asked or scored twice whatever happens.

    python -m pytest tests/test_pool.py

The teachers are servers of test_endpoint.py and files; rewards count pluses. Kills, full disks, memory:
test_pool_faults.py.
"""

import collections
import contextlib
import http.server
import json
import shutil
from pathlib import Path

import tiny  # first: it finds the repository

import pytest
import torch
from safetensors.torch import load_file, save_file

import teachers
from arbitrage import Config, main
from chat import Chat
from generate import complete
from model import load
from teachers import TRANSLATE, Teacher, read_pool
from test_arbitrage import cheap, made, refusal  # noqa: F401  made: a fixture
from test_endpoint import refusal as one_line, serving, waits, whole  # noqa: F401  a fixture: nobody waits for a retry

cpu = tiny.cpu


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    cheap(monkeypatch)


def says(text):
    """A server's behaviour: text(payload) is the answer, None a refusal."""
    def behave(handler, payload, times):
        found = text(payload)
        handler.send(*((400, b'{"message": "not that"}') if found is None else (200, whole(payload, found))))
    return behave


def asked(server):
    """[the last turn of each request], in the order of the prompts' names."""
    return sorted(payload["messages"][-1]["content"] for _, payload, _ in server.seen)


def lines(path, *rows):
    return tiny.write(path, rows)


def prompts(path, n=6, languages=("de", "ar")):
    return lines(path, *({"id": f"q{i}", "language": languages[i % len(languages)], "prompt": f"Frage {i}"}
        for i in range(n)))


def config(made, here, *rows, **settings):
    """A run of a pool that is given line by line."""
    return Config(**{"prompts": prompts(here / "prompts.jsonl"), "pool": lines(here / "pool.jsonl", *rows),
        "out": str(here / "out"),
                     "reward_model": str(made / "rm-north"), "guards": ["empty"], "threads": 1, "retries": 1}
                     | settings)


def rows_of(here, name="completions", out="out"):
    return tiny.read(here / out / f"{name}.jsonl")


def report_of(here, out="out"):
    return json.loads((here / out / "report.json").read_text(encoding="utf-8"))


# --- who is in it ---

def test_a_pool_file(tmp_path):
    template = tmp_path / "t.jinja"
    template.write_text("x", encoding="utf-8")
    rows = [{"model": "Org/aya-8b", "languages": ["de", "zh-Hant"], "samples": 4, "temperature": 1, "top_p": 0.9,
        "min_p": 0.1},
            {"name": "q", "model": "http://h/v1#qwen/7b", "system": "In {language}.", "max_new_tokens": 5,
            "stop": ["\n\n", "。"]},
            {"model": "http://h/v1#qwen/7b", "translator": "http://h/v1#nmt"},
            {"model": "out/base/", "template": str(template)},
            {"model": "dir/nllb.jsonl"}]
    cfg = Config(pool=lines(tmp_path / "p.jsonl", *rows), samples=2, temperature=0.5, max_new_tokens=7)
    ours = {"samples": 2, "temperature": 0.5, "max_new_tokens": 7}
    assert read_pool(cfg) == [
        Teacher("aya-8b", "Org/aya-8b", ("de", "zh-Hant"), 4, 1, 0.9, 0.1, 7),
        Teacher("q", "http://h/v1#qwen/7b", samples=2, temperature=0.5, max_new_tokens=5, stop=("\n\n", "。"),
        system="In {language}."),
        Teacher("qwen/7b", "http://h/v1#qwen/7b", translator="http://h/v1#nmt", **ours),
        Teacher("base", "out/base/", template=str(template), **ours), Teacher("nllb", "dir/nllb.jsonl", **ours)]
    assert [t.from_file for t in read_pool(cfg)] == [False] * 4 + [True]
    assert [t.name for t in read_pool(Config(teachers=["a/b", "http://h/v1#m"]))] == ["b", "m"]
    speaks = [(t.name, t.speaks("de"), t.speaks("en")) for t in read_pool(cfg)[:3]]
    assert speaks == [("aya-8b", True, False), ("q", True, True), ("qwen/7b", True,
        False)]  # the last: it would translate English


@pytest.mark.parametrize("row, words", [
    ([], 'a teacher is an object with a "model"'), ({"name": "x"}, 'an object with a "model"'),
    ({"model": ""}, 'with a "model"'),
    ({"model": 3}, 'with a "model"'),
    ({"model": "m", "temprature": 1}, "a teacher has no 'temprature'; it has name, model, languages"),
    ({"model": "m", "samples": "4"}, "'samples' cannot be '4'"), ({"model": "m", "samples": 4.0},
    "'samples' cannot be 4.0"),
    ({"model": "m", "samples": True}, "'samples' cannot be True"), ({"model": "m", "top_p": "x"},
    "'top_p' cannot be 'x'"),
    ({"model": "m", "temperature": None}, "'temperature' cannot be None"), ({"model": "m", "stop": "x"},
    "'stop' cannot be 'x'"),
    ({"model": "m", "stop": [1]}, "'stop' cannot be [1]"), ({"model": "m", "system": ["x"]},
    "'system' cannot be ['x']"),
    ({"model": "m", "name": 7}, "'name' cannot be 7"), ({"model": "m", "languages": ["German"]},
    "unknown language 'German'"),
    ({"model": "m", "template": "none.jinja"}, "the template none.jinja of m is no file"),
    ({"model": "m.jsonl", "system": "x"}, "m is a file of completions"), ({"model": "m.jsonl", "translator": "x"},
    "a file of completions"),
    ({"model": "other/first"}, "two teachers are called 'first' (a/first and other/first)")])
def test_pool_files_that_are_refused(row, words, tmp_path):
    path = lines(tmp_path / "p.jsonl", {"model": "a/first"}, row)
    one_line(lambda: read_pool(Config(pool=path)), f"{path}:2", words)


def test_pools_that_are_refused(tmp_path):
    path = lines(tmp_path / "p.jsonl")
    one_line(lambda: read_pool(Config(pool=path)), f"{path} names no teacher")
    one_line(lambda: read_pool(Config(teachers=["a/x", "b/x/"])), "--teachers: two teachers are called 'x'")
    one_line(lambda: read_pool(Config(pool=lines(tmp_path / "p.jsonl", {"model": "m", "top_p": 2.0}))),
        "0 < top_p <= 1")
    (tmp_path / "t.jinja").write_text("x", encoding="utf-8")
    for model in ("http://h/v1#m", "m.jsonl"):
        one_line(lambda: read_pool(Config(pool=lines(tmp_path / "p.jsonl", {"model": model,
            "template": str(tmp_path / "t.jinja")}))),
                 "is no checkpoint")


# --- what is asked ---

def test_every_teacher_has_settings_of_its_own(made, tmp_path):
    with serving(says(lambda p: "+ yes")) as server:
        cfg = config(made, tmp_path, {"name": "plain", "model": server.url},
                     {"name": "own", "model": server.url, "languages": ["ar"], "samples": 2, "temperature": 0.5,
                     "top_p": 0.9,
                      "min_p": 0.1, "max_new_tokens": 5, "stop": ["x"], "system": "Answer in {language}, {name}."},
                      seed=4)
        main(cfg)
    plain, own = ([p for _, p, _ in server.seen if ("min_p" in p) == mine] for mine in (False, True))
    assert len(plain) == 6 and all((p["temperature"], p["top_p"], p["max_tokens"], len(p["messages"]))
        == (0.0, 1.0, 48, 1) for p in plain)
    assert "stop" not in plain[0]
    assert len(own) == 6 and {p["messages"][1]["content"] for p in own} == {"Frage 1", "Frage 3", "Frage 5"}
    for p in own:
        assert (p["temperature"], p["top_p"], p["min_p"], p["max_tokens"], p["stop"]) == (0.5, 0.9, 0.1, 5, ["x"])
        assert p["messages"][0] == {"role": "system", "content": "Answer in Arabic, {name}."}
    rows = rows_of(tmp_path)
    assert [(r["id"], r["teacher"], r["sample"]) for r in rows[:4]] == [("q0", "plain", 0), ("q1", "plain", 0),
        ("q1", "own", 0), ("q1", "own", 1)]
    assert {r["prompt"] for r in rows} == {f"Frage {i}"
        for i in range(6)}  # as it stands in the file, whatever was asked


def test_a_system_turn_takes_the_place_of_the_prompts_own():
    teacher, row = Teacher("x", "m", system="In {language}."), {"language": "zh", "prompt": "问"}
    assert teachers.conversation(teacher, row) == [{"role": "system", "content": "In Chinese (simplified)."},
        {"role": "user", "content": "问"}]
    turns = [{"role": "system", "content": "own"}, {"role": "user", "content": "a"}]
    assert teachers.conversation(teacher, row | {"prompt": turns})[0]["content"] == "In Chinese (simplified)."
    assert teachers.conversation(teacher, row | {"prompt": turns})[1:] == turns[1:]
    assert teachers.conversation(Teacher("x", "m"), row | {"prompt": turns}) == turns


def test_a_checkpoint_with_a_template_and_stop_strings(made, tmp_path):
    config_file = json.loads((made / "north" / "tokenizer_config.json").read_text(encoding="utf-8"))
    template = tmp_path / "t.jinja"
    template.write_text(config_file["chat_template"].replace("|USER_TOKEN|>", "|USER_TOKEN|>Please: "),
        encoding="utf-8")
    settings = {"model": str(made / "north"), "max_new_tokens": 12, "temperature": 1.0}
    main(config(made, tmp_path, {**settings, "name": "a"}, {**settings, "name": "b", "template": str(template),
        "stop": ["e", "t"]}))
    rows, asked = rows_of(tmp_path), tiny.read(tmp_path / "prompts.jsonl")
    said = lambda rows: [(r["id"], r["completion"], r["ended"]) for r in rows]
    model = load(made / "north")
    assert said(r for r in rows if r["teacher"] == "a") == said(complete(model, Chat(made / "north"), asked, 12, 1.0))
    expected = said(complete(model, Chat(made / "north", template), asked, 12, 1.0, stop=["e", "t"]))
    assert said(r for r in rows if r["teacher"] == "b") == expected and any(ended for *_, ended in expected)
    assert expected != said(complete(model, Chat(made / "north"), asked, 12, 1.0, stop=["e", "t"]))


def test_a_file_of_completions_is_a_teacher(made, tmp_path):
    row = {"language": "de", "prompt": "in its own words"}
    stored = [row | {"id": "q0", "completion": "+ a", "tokens": 3, "teacher": "someone"},
        row | {"id": "q2", "completion": "b", "ended": False},
              row | {"id": "q0", "completion": "++ c"}, row | {"id": "unasked", "completion": "d"}]
    path = lines(tmp_path / "nllb.jsonl", *stored)
    main(config(made, tmp_path, {"model": path, "languages": ["de"], "samples": 2}, {"name": "all", "model": path},
        completions_at_once=3))
    mine = [r for r in rows_of(tmp_path) if r["teacher"] == "nllb"]
    assert [(r["id"], r["sample"], r["completion"], r["ended"], r["tokens"], r["reward"]) for r in mine] == [
        ("q0", 0, "+ a", True, 3, 1.0), ("q0", 1, "++ c", True, None, 2.0), ("q2", 0, "b", False, None, 0.0),
        ("q2", 1, "", False, 0, None),
        ("q4", 0, "", False, 0, None), ("q4", 1, "", False, 0, None)]
    assert mine[0]["prompt"] == "Frage 0" and "failure" not in mine[0]
    assert mine[3]["failure"] == f"{path} has no such completion"
    report = report_of(tmp_path)
    assert report["teachers"]["nllb"] == {"completions": 6, "failed": 3, "tokens": None, "model": path, "stopped": ""}
    lines(Path(path), stored[0] | {"id": None})
    refusal(f"{path}:1: the row has no 'id'", **vars(config(made, tmp_path, {"model": path},
        out=str(tmp_path / "other"))))


# --- translated answers ---

def language_of(text):
    """What the translator is asked: (language, text) of TRANSLATE."""
    head, _, text = text.partition("\n\n")
    name = head.partition(" into ")[2].partition(". Keep")[0]
    assert TRANSLATE.format(language=name, text=text) == f"{head}\n\n{text}"
    return name, text


def test_a_translated_teacher(made, tmp_path):
    rows = [{"id": "a", "language": "de", "prompt": "Hallo"}, {"id": "b", "language": "zh-Hant", "prompt": "你好",
        "english": "Hello"},
            {"id": "c", "language": "ar", "prompt": [{"role": "user", "content": "مرحبا"}]},
            {"id": "d", "language": "en", "prompt": "Hi"}]
    with serving(says(lambda p: f"<A {p['messages'][-1]['content']} {p['seed'] % 10}>")) as answering, serving(says(
            lambda p: "<{}: {}>".format(*language_of(p["messages"][-1]["content"])))) as translating:
        row = {"name": "t", "model": answering.url, "translator": translating.url, "system": "Speak {language}.",
            "samples": 2,
               "temperature": 0.7, "stop": ["x"]}
        main(config(made, tmp_path, row, {"name": "direct", "model": answering.url},
            prompts=lines(tmp_path / "p.jsonl", *rows)))
    mine = [r for r in rows_of(tmp_path) if r["teacher"] == "t"]
    assert [(r["id"], r["sample"], r["language"], r["prompt"]) for r in mine] == [
        (r["id"], k, r["language"], r["prompt"]) for r in rows[:3] for k in (0, 1)]  # English is not translated
    for r, name, english in zip(mine[::2], ("German", "Chinese (traditional)", "Arabic"),
            ("<English: Hallo>", "Hello", "<English: مرحبا>")):
        assert r["completion"].startswith(f"<{name}: <A {english} ") and r["completion"] == f"<{name}: {r['english']}>"
        assert (r["ended"], r["tokens"]) == (True, 14 if english == "Hello" else 21)  # what each step generated
    of_t = [p for _, p, _ in answering.seen if len(p["messages"]) == 2]
    assert len(of_t) == 6 and {p["messages"][0]["content"] for p in of_t} == {"Speak English."}
    assert all(p["temperature"] == 0.7 and p["stop"] == ["x"] for p in of_t) and len({p["seed"] for p in of_t}) == 6
    assert len(translating.seen) == 2 + 6  # two prompts, not the one that is English already; six answers
    assert all((p["temperature"], len(p["messages"])) == (0.0, 1) and "stop" not in p for _, p, _ in translating.seen)


def test_translation_steps_that_give_nothing(made, tmp_path):
    """The English prompt, the answer, the translation: empty, refused or cut off."""
    nothing = {"Frage 0": "", "Frage 1": None}
    answers = {"[Frage 2]": "", "[Frage 3]": None}
    def translate(p):
        language, text = language_of(p["messages"][-1]["content"])
        return nothing.get(text, f"[{text}]") if language == "English" else " " if "[Frage 4]" in text else f"({text})"
    with serving(says(lambda p: answers.get(p["messages"][-1]["content"],
            "A " + p["messages"][-1]["content"]))) as answering, serving(
            says(translate)) as translating:
        main(config(made, tmp_path, {"name": "t", "model": answering.url, "translator": translating.url}))
    found = {r["id"]: (r["completion"], r.get("failure", ""), r["ended"], r["reward"]) for r in rows_of(tmp_path)}
    refused = "400 Bad Request: not that"
    assert found == {"q0": ("", "a step said nothing", False, None), "q1": ("", refused, False, None),
                     "q2": ("", "a step said nothing", False, None), "q3": ("", refused, False, None),
                     "q4": ("", "a step said nothing", False, None), "q5": ("(A [Frage 5])", "", True, 0.0)}
    assert "-" in asked(answering) and report_of(tmp_path)["teachers"]["t"]["failed"] == 5


# --- teachers that fail ---

def test_asks_that_fail_and_teachers_that_are_gone(made, tmp_path, capsys):
    """A refused prompt is a failure; no server, a refused key, a server that dies: given up, later asked again."""
    def dying(handler, payload, times):
        handler.send(200, whole(payload, "+++"))
        if len(handler.server.seen) == 2:
            handler.close_connection = True
            handler.server.socket.close()
    with serving(says(lambda p: "+")) as gone:
        pass
    with serving(says(lambda p: None if "3" in p["messages"][-1]["content"] else "++")) as good, serving(
            lambda handler, payload, times: handler.send(401, b"{}")) as closed, serving(dying) as server:
        rows = [{"name": name, "model": url} for name, url in (
            ("none", gone.url), ("closed", closed.url), ("dying", server.url), ("good", good.url))] + [
            {"name": "north", "model": str(made / "north"), "max_new_tokens": 3}]
        cfg = config(made, tmp_path, *rows)
        main(cfg)
        out, report = capsys.readouterr().out, report_of(tmp_path)
        stopped = {name: t["stopped"] for name, t in report["teachers"].items()}
        assert "no server there" in stopped["none"] and "401 Unauthorized" in stopped["closed"]
        assert "no server there" in stopped["dying"]
        assert stopped["good"] == stopped["north"] == "" and report["routed"] == 6
        assert [(r["id"], r["completion"], r.get("failure")) for r in rows_of(tmp_path) if r["teacher"] == "good"
            and not r["reward"]] == [
            ("q3", "", "400 Bad Request: not that")]
        for name in ("none", "closed", "dying"):
            assert f"{name} is given up, the others go on" in out and f"{name} was given up (" in out
            assert report["teachers"][name]["completions"] == 0
        assert [p.name.split("-")[0] for p in (tmp_path / "out.unfinished").glob("*.journal")] == ["dying"]
        assert (tmp_path / "out.unfinished").exists() and report["teachers"]["good"]["completions"] == 6

        # the same command, two of the three still away; one address was put right: it had said nothing
        before = len(good.seen)
        with serving(says(lambda p: "++++")) as again:
            lines(tmp_path / "pool.jsonl", {"name": "none", "model": again.url}, *rows[1:])
            main(cfg)
            assert len(again.seen) == 6 and len(good.seen) == before
        assert {r["id"]: r["teacher"] for r in rows_of(tmp_path, "sft")} == {f"q{i}": "none" for i in range(6)}
        assert (tmp_path / "out.unfinished").exists() and "stopped" in report_of(tmp_path)["teachers"]["closed"]


def test_a_server_that_comes_back_is_asked_for_the_rest(made, tmp_path, monkeypatch):
    """Killed after seven answers of ten, the last three of its second part are all that it is asked for."""
    alive = [7]
    def behave(handler, payload, times):
        if not alive[0]:
            handler.server.socket.close()
            return handler.raw(b"")
        alive[0] -= 1
        handler.send(200, whole(payload, "+"))
    with serving(behave) as server:
        port = server.server_address[1]
        other = lines(tmp_path / "other.jsonl", {"id": "q0", "language": "de", "prompt": "x", "completion": "y"})
        cfg = config(made, tmp_path, {"name": "s", "model": server.url}, {"model": other},
            prompts=prompts(tmp_path / "p.jsonl", 10),
                     completions_at_once=4, retries=6)
        main(cfg)
        first = asked(server)[:7]
        assert report_of(tmp_path)["teachers"]["s"]["completions"] == 4
        assert report_of(tmp_path)["teachers"]["s"]["stopped"]
        assert list((tmp_path / "out.unfinished").glob("s-*.1.journal"))
    with serving_at(port, says(lambda p: "++")) as server:
        main(cfg)
        assert set(asked(server)).isdisjoint(first) and len(server.seen) == 3
        assert not (tmp_path / "out.unfinished").exists() and report_of(tmp_path)["teachers"]["s"]["completions"] == 10
        main(cfg)
        assert len(server.seen) == 3
    assert [r["completion"] for r in rows_of(tmp_path) if r["teacher"] == "s"] == ["+"] * 7 + ["++"] * 3


@contextlib.contextmanager
def serving_at(port, behave):
    """serving() at an address that another server has left."""
    plain = http.server.ThreadingHTTPServer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(http.server, "ThreadingHTTPServer", lambda address, handler: plain((address[0], port), handler))
        manager = serving(behave)
        server = manager.__enter__()
    try:
        yield server
    finally:
        manager.__exit__(None, None, None)


def test_damaged_checkpoints(made, tmp_path, capsys):
    """What shows at once is refused before anybody is asked; what shows in the weights ends that teacher alone."""
    for name in ("cut", "nan", "torn"):
        shutil.copytree(made / "south", tmp_path / name)
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    tensors = load_file(tmp_path / "nan" / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, tmp_path / "nan" / "model.safetensors")
    (tmp_path / "torn" / "tokenizer.json").write_text("{", encoding="utf-8")
    with serving(says(lambda p: "+")) as server:
        rows = [{"name": name, "model": str(tmp_path / name), "max_new_tokens": 3} for name in ("nan", "torn")]
        cfg = config(made, tmp_path, *rows, {"name": "good", "model": server.url})
        refusal("model.safetensors cannot be read", **vars(cfg) | {"pool": lines(
            tmp_path / "cut.jsonl", {"model": str(tmp_path / "cut")}, {"name": "good", "model": server.url})})
        assert not server.seen
        main(cfg)
        stopped = {name: t["stopped"] for name, t in report_of(tmp_path)["teachers"].items()}
        assert "holds NaN" in stopped["nan"] and "tokenizer.json is damaged" in stopped["torn"] and not stopped["good"]
        for name in ("nan", "torn"):  # copied again: the same command takes them in
            shutil.copytree(made / "south", tmp_path / name, dirs_exist_ok=True)
        main(cfg)
        assert len(server.seen) == 6 and not any(t["stopped"] for t in report_of(tmp_path)["teachers"].values())
    assert collections.Counter(r["teacher"] for r in rows_of(tmp_path)) == {"nan": 6, "torn": 6, "good": 6}
    assert not (tmp_path / "out.unfinished").exists()


def test_nobody_answers(made, tmp_path):
    with serving() as server:
        pass
    for router in ("reward", "fixed", "random"):
        refusal("every teacher was given up: s (", "no server there", **vars(config(made, tmp_path,
            {"name": "s", "model": server.url},
                router=router, out=str(tmp_path / router))))


@pytest.mark.parametrize("router", ["fixed", "learned", "random"])
def test_routers_that_pick_go_on_without_a_teacher(router, made, tmp_path):
    """It dies after the first prompt of the sample; later it is back: no prompt is skipped, or has two teachers."""
    with serving(says(lambda p: "+")) as good, serving(lambda handler, payload, times: handler.send(
            *((200, whole(payload, "+++")) if len(bad.seen) in bad.alive else (401, b"{}")))) as bad:
        bad.alive = {1}
        cfg = config(made, tmp_path, {"name": "good", "model": good.url}, {"name": "bad", "model": bad.url},
            router=router, scored=2, completions_at_once=1,
                     prompts=prompts(tmp_path / "p.jsonl", 12))
        main(cfg)
        rows = rows_of(tmp_path)
        count = collections.Counter(r["teacher"] for r in rows)
        assert count["bad"] == 1 and (count["good"] == 12 or router == "random")
        assert len(report_of(tmp_path)["languages"]) == 2
        bad.alive, before = range(1000), len(good.seen)
        main(cfg)
        assert len(good.seen) == before and not (tmp_path / "out.unfinished").exists()
    count = collections.Counter(r["id"] for r in rows_of(tmp_path))
    sample = () if router == "random" else ("q0", "q1", "q2", "q3")
    assert count == {f"q{i}": 2 if f"q{i}" in sample else 1 for i in range(12)}
    assert len(rows_of(tmp_path, "sft")) == 12
