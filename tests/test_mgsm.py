"""
MGSM: prompts, filters and scores equal lm-evaluation-harness 0.4.13's, recorded on invented rows (fixtures/make_mgsm.py); the
chat variant; files in every published layout; and eval.py end to end on a tiny checkpoint.

    python -m pytest tests/test_mgsm.py
"""

import json
from pathlib import Path

import pytest

import tiny
from chat import Chat
from eval import Config, main
from generate import complete, generate
from model import load
from tasks import mgsm
from tasks.final_number import ANSWER_WORDS, final_number
from tasks.replies import text_ids

cpu = tiny.cpu
RECORDED = json.loads((Path(__file__).parent / "fixtures" / "mgsm.json").read_text(encoding="utf-8"))
ALL = list(RECORDED["rows"])
HARNESS_TASKS = {"mgsm_native_cot": "native_cot", "mgsm_direct": "direct"}


def write_files(folder, layout, languages=ALL):
    """The recorded rows as url-nlp ("tsv"), juletxara as jsonl ("jsonl"), or the tsv files of old with a header ("head")."""
    for language in languages:
        rows = RECORDED["rows"][language]
        if layout == "jsonl":
            (folder / language).mkdir(parents=True, exist_ok=True)
            for split in ("train", "test"):
                tiny.write(folder / language / f"{split}.jsonl", rows[split])
        else:
            folder.mkdir(parents=True, exist_ok=True)
            lines = [f"{r['question']}\t{r['answer_number']:,}\n" for r in rows["test"]]
            head = ["question\tanswer\n"] if layout == "head" else []
            (folder / f"mgsm_{language}.tsv").write_text("".join(head + lines), encoding="utf-8")
    if layout != "jsonl":
        numbers = [r["answer_number"] for r in RECORDED["rows"]["en"]["train"]]
        solved = {language: {str(n): {"q": r["question"], "a": r["answer"]} for n, r in enumerate(
            RECORDED["rows"][language]["train"], 1)} for language in languages}
        (folder / "exemplars.py").write_text(
            f'"""Prompts."""\nEXEMPLAR_NUMBER_ANSWERS = {numbers}\n\nMGSM_EXEMPLARS = {solved!r}\n', encoding="utf-8")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    here = tmp_path_factory.mktemp("mgsm")
    write_files(here / "tsv" / "url-nlp" / "mgsm", "tsv")
    write_files(here / "jsonl" / "juletxara" / "mgsm", "jsonl")
    write_files(here / "head" / "MGSM", "head", ["de", "zh"])
    return here


# --- lm-evaluation-harness ---

@pytest.mark.parametrize("task", HARNESS_TASKS)
@pytest.mark.parametrize("layout", ["tsv", "jsonl"])
def test_prompts_are_the_harness_own(data, task, layout):
    seen = 0
    for shots in (0, 3, 8):
        items = mgsm.read(task, Config(data=str(data / layout), shots=shots, languages=ALL))
        for language, recorded in RECORDED["tasks"][HARNESS_TASKS[task]].items():
            mine = [item["prompt"] for item in items if item["language"] == language]
            if str(shots) in recorded["prompts"]:
                assert mine == recorded["prompts"][str(shots)]
                seen += len(mine)
            assert list(mgsm.harness_stops(language)) == recorded["until"][:3]
    assert seen == 5 * (11 + 11 + 2)


def test_limit_draws_the_same_examples(data):
    whole, part = (mgsm.read("mgsm_direct", Config(data=str(data / "tsv"), shots=3, limit=n)) for n in (0, 2))
    assert [i for i in whole if i["question"] in ("0", "1")] == part and len(part) == 14


@pytest.mark.parametrize("task", HARNESS_TASKS)
def test_filters_and_scores_are_the_harness_own(task):
    names = {"strict-match": "strict_match", "flexible-extract": "flexible_extract", "remove_whitespace": "remove_whitespace"}
    outcomes = set()
    for language, recorded in RECORDED["tasks"][HARNESS_TASKS[task]].items():
        for row in recorded["answers"]:
            made = {"completion": row["completion"], "ended": True}
            mine = mgsm.harness_judged(task, made, {"language": language, "reference": str(row["gold"])})
            assert {names[k]: v for k, (v, _) in row["filters"].items()} == mine["answers"]
            assert {names[k]: bool(v) for k, (_, v) in row["filters"].items()} == mine["correct"]
            outcomes |= {(k, v) for k, v in mine["correct"].items()} | {a == mgsm.INVALID for a in mine["answers"].values()}
    assert len(outcomes) == 6


# --- the chat variant ---

def test_instructions_ask_for_the_answer_word():
    for language, text in mgsm.INSTRUCTIONS.items():
        reply = {"ja": "答え", "sw": "Jibu", "zh": "答案"}.get(language, ANSWER_WORDS[language].split("|")[0])
        assert f"{reply}:" in text or f"{reply} :" in text, language
        assert final_number(f"2 + 2 = 4\n{reply}: 12", language) == ("12", "answer")
    assert mgsm.INSTRUCTIONS.keys() == mgsm.HARNESS.keys()


def test_chat_items(data):
    items = mgsm.read("mgsm", Config(data=str(data / "tsv")))
    assert list(dict.fromkeys(i["language"] for i in items)) == ["de", "en", "es", "fr", "ja", "ru", "zh"]  # no bn, sw, te, th
    first = next(i for i in items if i["language"] == "de")
    assert first == {"id": "mgsm-de-0", "language": "de", "question": "0", "reference": "12",
                     "prompt": f'{mgsm.INSTRUCTIONS["de"]}\n\nIda hat 12 Äpfel ("0")?'}
    assert [i["reference"] for i in items[:5]] == ["12", "1250", "7", "190", "36"]  # written with a thousands comma
    two = mgsm.read("mgsm", Config(data=str(data / "tsv"), languages=["th", "fr"], limit=1))
    assert [i["language"] for i in two] == ["fr", "th"]
    assert {i["language"] for i in mgsm.read("mgsm", Config(data=str(data / "tsv"), languages=["te"]))} == {"te"}
    assert len(mgsm.read("mgsm", Config(data=str(data / "head"), languages=["de", "zh"]))) == 10


def test_summary_by_hand():
    def row(language, question, reply, ended=True):
        item = {"language": language, "question": question, "reference": "1250"}
        return item | mgsm.judged({"completion": reply, "ended": ended}, item)
    samples = [row("de", "0", "Antwort: 1.250 €"), row("de", "1", "Das sind 1.250"), row("de", "2", "Keine Ahnung"),
               row("de", "3", "10 + 20", ended=False), row("fr", "0", "Réponse : 1,250"), row("fr", "1", "\\boxed{1250}")]
    table = mgsm.summarise("mgsm", samples, {}, None)
    pick = lambda language: [table[language][k] for k in ("n", "exact_match", "no_answer", "no_answer_line", "cut_off")]
    assert pick("de") == [4, 1 / 2, 1 / 2, 3 / 4, 1 / 4] and pick("fr") == [2, 1 / 2, 0, 1 / 2, 0]
    assert pick("all") == [6, 1 / 2, 1 / 3, 4 / 6, 1 / 6]
    assert table["de"]["exact_match_stderr"] == pytest.approx((1 / 3) ** 0.5 / 2)
    judged = lambda text: mgsm.harness_judged("mgsm_native_cot", {"completion": text, "ended": True},
                                              {"language": "de", "reference": "5"})
    table = mgsm.summarise("mgsm_native_cot", [{"language": "de", "question": str(n)} | judged(text) for n, text in enumerate(
        ["Die Antwort lautet 5.", "also 5", "nichts", "Die Antwort lautet 6"])], {}, None)["all"]
    assert [table[k] for k in ("strict_match", "flexible_extract", "strict_match_invalid", "flexible_extract_invalid")] == [
        1 / 4, 1 / 2, 1 / 2, 1 / 4]


# --- what is refused, in one line ---

@pytest.mark.parametrize("flags, words", [
    ({"languages": ["xx"]}, "unknown language 'xx'"), ({"data": "none"}, "no folder"), ({"data": "head"}, "no MGSM in en"),
    ({"shots": 9, "task": "mgsm_direct"}, "has 8 solved examples"),
    ({"data": "bad"}, "row 2: the answer 'x1' is no whole number"), ({"data": "column"}, "row 1 has no answer_number"),
    ({"data": "bare", "shots": 1, "task": "mgsm_direct"}, "no solved examples in de")])
def test_refusals(data, flags, words):
    for name, rows in (("bad", [("a", "1"), ("b", "x1")]), ("bare", [("a", "1")])):
        (data / name / "mgsm").mkdir(parents=True, exist_ok=True)
        (data / name / "mgsm" / "mgsm_de.tsv").write_text("".join(f"{q}\t{a}\n" for q, a in rows), encoding="utf-8")
    (data / "column" / "mgsm" / "de").mkdir(parents=True, exist_ok=True)
    tiny.write(data / "column" / "mgsm" / "de" / "test.jsonl", [{"question": "a", "answer": None}])
    flags = {"languages": ["de"] if flags.get("data") in ("bad", "bare", "column") else []} | flags
    task = flags.pop("task", "mgsm")
    with pytest.raises(SystemExit) as e:
        mgsm.read(task, Config(**flags | {"data": str(data / flags.get("data", "tsv"))}))
    assert words in str(e.value) and "\n" not in str(e.value)


# --- a tiny checkpoint, end to end ---

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "one"
    tiny.make_checkpoint(folder, 3, initializer_range=0.6)
    return folder


def settings(checkpoint, data, out, **more):
    return Config(**{"model": [str(checkpoint)], "tasks": list(mgsm.TASKS), "data": str(data / "tsv"), "out": str(out),
                     "languages": ["de", "zh"], "max_new_tokens": 12} | more)


def test_the_model_says_what_it_would_say_alone(checkpoint, data, tmp_path):
    main(settings(checkpoint, data, tmp_path / "out"))
    model, chat = load(checkpoint), Chat(checkpoint)
    samples = {task: tiny.read(tmp_path / "out" / f"samples_{task}.jsonl") for task in mgsm.TASKS}
    for task, rows in samples.items():
        items = mgsm.read(task, settings(checkpoint, data, tmp_path))
        assert [{k: s[k] for k in item} for s, item in zip(rows, items, strict=True)] == items
        for s in rows[::3]:
            if task == "mgsm":
                text = complete(model, chat, [s], 12)[0]["completion"]
            else:
                ids = chat.tokenizer.encode(s["prompt"]).ids
                text = chat.decode(generate(model, [ids], 12, stop_ids=chat.stop_ids, vocab_size=chat.vocab_size)[0][0])
                for stop in mgsm.harness_stops(s["language"]):
                    text = text.split(stop)[0]
            assert s["completion"] == text
    assert len({s["completion"] for s in samples["mgsm"]}) > 3
    table = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))["results"]
    assert table["mgsm"]["all"]["n"] == 10 and table["mgsm_direct"]["zh"]["n"] == 5
    assert table["mgsm"]["all"]["exact_match"] == sum(s["correct"] for s in samples["mgsm"]) / 10


def test_any_grouping_and_two_ranks_give_the_same(checkpoint, data, tmp_path):
    main(settings(checkpoint, data, tmp_path / "whole"))
    main(settings(checkpoint, data, tmp_path / "parts", items_at_once=3))
    flags = ["--model", checkpoint, "--tasks", *mgsm.TASKS, "--data", data / "tsv", "--languages", "de", "zh",
             "--max_new_tokens", 12, "--out", tmp_path / "ranks"]
    tiny.jobs(tmp_path / "jobs.json", {2: [["", "eval.py", *flags]]})
    for task in mgsm.TASKS:
        whole = (tmp_path / "whole" / f"samples_{task}.jsonl").read_bytes()
        assert whole == (tmp_path / "parts" / f"samples_{task}.jsonl").read_bytes()
        assert whole == (tmp_path / "ranks" / f"samples_{task}.jsonl").read_bytes()


def test_killed_and_gone_on(checkpoint, data, tmp_path, monkeypatch):
    main(settings(checkpoint, data, tmp_path / "whole"))
    plain, calls = mgsm.reply, []

    def dies(model, chat, rows, limit):
        calls.append(len(rows))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(model, chat, rows, limit)

    monkeypatch.setattr(mgsm, "reply", dies)
    with pytest.raises(KeyboardInterrupt):
        main(settings(checkpoint, data, tmp_path / "out", items_at_once=4))
    assert not (tmp_path / "out").exists()
    main(settings(checkpoint, data, tmp_path / "out", items_at_once=4))
    assert calls == [4, 4, 2, 2]  # the first eight are not asked again
    for task in mgsm.TASKS:
        name = f"samples_{task}.jsonl"
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_texts_that_go_on(checkpoint):
    chat = Chat(checkpoint)
    ids = text_ids(chat, "three hundred forty", 100)
    assert ids == chat.tokenizer.encode("three hundred forty").ids and text_ids(chat, "three hundred forty", 3) == ids[-3:]
    assert text_ids(chat, "<BOS_TOKEN>three", 100).count(chat.bos) == 1


def test_a_base_model_is_told_its_task(checkpoint, data, tmp_path):
    tiny.make_checkpoint(tmp_path / "base")
    path = tmp_path / "base" / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("chat_template")
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(SystemExit, match="takes mgsm_native_cot"):
        main(settings(tmp_path / "base", data, tmp_path / "out", tasks=["mgsm"]))
    main(settings(tmp_path / "base", data, tmp_path / "out", tasks=["mgsm_direct"]))
    with pytest.raises(SystemExit, match="no room for"):
        main(settings(tmp_path / "base", data, tmp_path / "out2", tasks=["mgsm_direct"], max_new_tokens=10**6))
