"""
FLORES: corpus chrF++ equal to sacrebleu 2.6.0's (fixtures/make_mgsm.py recorded it), intervals against slow resamples, files in
every published layout, and eval.py end to end on a tiny checkpoint. tests/test_chrf.py has the metric itself.

    python -m pytest tests/test_flores.py
"""

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import tiny
from chat import Chat
from eval import Config, main
from generate import complete
from languages import LANGUAGES
from model import load
from stats import stderr
from tasks import flores
from tasks.chrf import chrf_score, chrf_scores
from tasks.flores import chrf, chrf_stats, corpus_chrf

cpu = tiny.cpu
RECORDED = json.loads((Path(__file__).parent / "fixtures" / "mgsm.json").read_text(encoding="utf-8"))
WORDS = {"en": "one two three", "de": "eins zwei drei", "ar": "واحد اثنان ثلاثة", "zh": "一二三", "zh-Hant": "壹貳參",
         "hi": "एक दो तीन"}
N = 5


def sentence(language, n, split="devtest"):
    return f"{WORDS[language]} {split} {n}."


def write_files(folder, layout, languages=WORDS, rows=N):
    """Invented sentences as flores200_dataset, flores_plus or facebook/flores (rows shuffled), for both splits."""
    for split in ("devtest", "dev"):
        everything = [{"id": n + 1} for n in range(rows)]
        for language in languages:
            code = flores.CODES[language].split()[-1 if layout == "flores_plus" else 0]
            texts = [sentence(language, n, split) for n in range(rows)]
            path = folder / layout / (code if layout == "flores" else split)
            path.mkdir(parents=True, exist_ok=True)
            if layout == "flores200_dataset":
                (path / f"{code}.{split}").write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
            elif layout == "flores_plus":
                tiny.write(path / f"{code}.jsonl", [{"id": n, "text": text} for n, text in enumerate(texts)][::-1])
            elif layout == "flores":
                tiny.write(path / f"{split}.jsonl", [{"id": n, "sentence": text} for n, text in enumerate(texts)])
            for row, text in zip(everything, texts):
                row[f"sentence_{code}"] = text
        if layout == "flores_all":
            (folder / "flores" / "all").mkdir(parents=True, exist_ok=True)
            tiny.write(folder / "flores" / "all" / f"{split}.jsonl", everything)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("flores"), "flores200_dataset")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "one"
    tiny.make_checkpoint(folder, 3, initializer_range=0.6)
    return folder


def settings(checkpoint, data, out, **more):
    return Config(**{"model": [str(checkpoint)], "tasks": ["flores"], "data": str(data), "out": str(out), "max_new_tokens": 10,
                     "languages": [language for language in WORDS if language != "en"]} | more)


# --- files and prompts ---

@pytest.mark.parametrize("layout", ["flores200_dataset", "flores_plus", "flores", "flores_all"])
@pytest.mark.parametrize("split", ["devtest", "dev"])
def test_layouts(tmp_path, layout, split):
    write_files(tmp_path, layout)
    items = flores.read("flores", settings("m", tmp_path, "o", split=split))
    assert len(items) == 2 * 5 * N and len({i["id"] for i in items}) == len(items)
    for i in items:
        n, pair = int(i["question"]), (i["language"], "en")
        source, target = pair if i["direction"] == "to_en" else pair[::-1]
        assert (i["source"], i["reference"]) == (sentence(source, n, split), sentence(target, n, split))
        assert i["id"] == f"flores-{split}-{source}-{target}-{n}"
        assert i["prompt"] == (f"Translate this sentence from {LANGUAGES[source][0]} into {LANGUAGES[target][0]}. "
                               f"Reply with the translation only.\n\n{i['source']}")


def test_all_pairs_and_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "WORDS", {language: language for language in LANGUAGES})
    write_files(tmp_path, "flores200_dataset", LANGUAGES, 3)
    items = flores.read("flores", Config(data=str(tmp_path), limit=2))
    assert len(items) == 23 * 2 * 2 and {i["question"] for i in items} == {"0", "1"}
    assert {i["language"] for i in items} == LANGUAGES.keys() - {"en"} and flores.CODES.keys() == LANGUAGES.keys()


def test_lines_are_sentences_whatever_is_in_them(tmp_path):
    folder = tmp_path / "flores200_dataset" / "devtest"
    folder.mkdir(parents=True)
    for code, lines in (
            ("eng_Latn", ['He said "a\tb"', "two\u2028lines", "three"]), ("deu_Latn", ['"Eins', "zwei\x85", " drei "])):
        (folder / f"{code}.devtest").write_text("\r\n".join(lines) + "\r\n", encoding="utf-8", newline="")
    items = flores.read("flores", Config(data=str(tmp_path), languages=["de"]))
    assert [i["source"] for i in items[:3]] == ['"Eins', "zwei", "drei"] and items[1]["reference"] == "two\u2028lines"


@pytest.mark.parametrize("change, words", [
    ({"data": "none"}, "is no folder"), ({"split": "test"}, "devtest and dev"),
    ({"languages": ["xx"]}, "unknown language 'xx'"),
    ({"languages": ["cs"]}, "no devtest sentences in cs (ces_Latn)"), ({"data": "empty"}, "has no folder flores200_dataset"),
    ({"data": "short"}, "4 sentences in de but 5 in en"), ({"data": "column"}, "row 1 has no text or sentence"),
    ({"xcomet_scores": "lack.jsonl"}, "no score of 'flores-devtest-de-en-3'"),
    ({"xcomet_scores": "nan.jsonl"}, "no score of 'flores-devtest-de-en-0'"),
    ({"xcomet_scores": "gone.jsonl"}, "gone.jsonl")])
def test_refusals(tmp_path, change, words):
    write_files(tmp_path / "full", "flores200_dataset")
    write_files(tmp_path / "short", "flores200_dataset")
    write_files(tmp_path / "short", "flores200_dataset", ["de"], 4)
    write_files(tmp_path / "column", "flores_plus")
    tiny.write(tmp_path / "column" / "flores_plus" / "devtest" / "deu_Latn.jsonl", [{"id": n, "x": ""} for n in range(N)])
    (tmp_path / "empty").mkdir()
    tiny.write(tmp_path / "lack.jsonl", [{"id": f"flores-devtest-de-en-{n}", "score": 0.5} for n in range(3)])
    tiny.write(tmp_path / "nan.jsonl", [{"id": f"flores-devtest-de-en-{n}", "score": float("nan")} for n in range(5)])
    change = {"data": "full", "languages": ["de"]} | change
    for key in change.keys() & {"data", "xcomet_scores"}:
        change[key] = str(tmp_path / change[key])
    with pytest.raises(SystemExit) as e:
        flores.read("flores", Config(**change))
    assert words in str(e.value) and "\n" not in str(e.value)


# --- scores ---

def test_corpus_chrf_is_sacrebleus():
    for name, score in RECORDED["corpus"].items():
        order, size = map(int, name.split())
        pairs = RECORDED["pairs"][:size]
        assert corpus_chrf([h for h, _ in pairs], [r for _, r in pairs], order) == pytest.approx(score, abs=1e-10)


def samples_of(pairs, language="de", direction="to_en", **more):
    return [{"language": language, "direction": direction, "question": str(n), "completion": h, "reference": r, "ended": True,
             "chrfpp_stats": chrf_stats(h, r).tolist()} | more for n, (h, r) in enumerate(pairs)]


def test_many_scores_at_once():
    stats = np.stack([chrf_stats(h, r) for h, r in RECORDED["pairs"]])
    assert chrf_scores(stats) == pytest.approx([chrf_score(s) for s in stats], abs=1e-11)
    assert chrf_scores(stats[:, :6].reshape(6, 11, 6, 3)).shape == (6, 11)
    assert chrf_scores(np.zeros((2, 8, 3))).tolist() == [0, 0]


def test_summary_equals_the_slow_one():
    """Corpus scores are sacrebleu's; intervals are those of resamples drawn sentence by sentence and counted anew."""
    pairs = [list(map(tuple, RECORDED["pairs"][k:k + 12])) for k in (0, 12, 24, 36, 48, 54)]
    parts = {("de", "to_en"): pairs[0], ("de", "from_en"): pairs[1], ("hi", "to_en"): pairs[2], ("hi", "from_en"): pairs[3],
             ("zh-Hant", "to_en"): pairs[4], ("zh-Hant", "from_en"): pairs[5]}
    samples = [s for (language, direction), found in parts.items() for s in samples_of(found, language, direction)]
    samples[0]["ended"] = False
    table = flores.summarise("flores", samples[::-1], {}, None)
    score = lambda pairs: corpus_chrf([h for h, _ in pairs], [r for _, r in pairs])
    for (language, direction), found in parts.items():
        assert table[language][f"chrfpp_{direction}"] == pytest.approx(score(found), abs=1e-10)
    rng = np.random.default_rng(9)
    for direction in flores.DIRECTIONS:
        two = [score(parts[language, direction]) for language in ("de", "hi")]
        assert table["all"][f"chrfpp_{direction}"] == pytest.approx(sum(two) / 2)  # Traditional Chinese is not in it
        drawn = rng.integers(12, size=(300, 12))
        slow = {language: np.array([score([parts[language, direction][i] for i in row]) for row in drawn])
                for language in ("de", "hi", "zh-Hant")}
        slow["all"] = (slow["de"] + slow["hi"]) / 2  # the same sentences in both
        for language, found in slow.items():
            error = table[language][f"chrfpp_{direction}_stderr"]
            assert error == pytest.approx(found.std(ddof=1), rel=0.2)
            ends = np.percentile(found, [2.5, 97.5])
            assert table[language][f"chrfpp_{direction}_interval"] == pytest.approx(ends, abs=error)
    assert [table[k]["n"] for k in ("all", "de", "zh-Hant")] == [48, 24, 24] and table["all"]["languages"] == 2
    assert table["de"]["cut_off"] == 1 / 24 and table["all"]["cut_off"] == 1 / 48
    assert flores.summarise("flores", samples, {}, None) == table and "xcomet_to_en" not in table["all"]


def test_only_traditional_chinese_is_averaged_over_itself():
    samples = [s for d in flores.DIRECTIONS for s in samples_of(RECORDED["pairs"][:3], "zh-Hant", d)]
    table = flores.summarise("flores", samples, {}, None)
    assert table["all"]["chrfpp_to_en"] == table["zh-Hant"]["chrfpp_to_en"] and table["all"]["n"] == 6


# --- xCOMET ---

def test_xcomet_from_a_file_and_from_a_model(tmp_path, data, monkeypatch):
    items = flores.read("flores", settings("m", data, "o", languages=["de", "hi"]))
    samples = [i | {"completion": i["reference"][: k % 4 * 5], "ended": True} for k, i in enumerate(items)]
    for s in samples:
        s["chrfpp_stats"] = chrf_stats(s["completion"], s["reference"]).tolist()
    value = {s["id"]: k / 100 for k, s in enumerate(samples)}
    tiny.write(tmp_path / "scores.jsonl", [{"id": i, "score": v} for i, v in reversed(value.items())])
    cfg = settings("m", data, "o", languages=["de", "hi"], xcomet_scores=str(tmp_path / "scores.jsonl"))
    flores.read("flores", cfg)  # all of them are there
    done = flores.finish("flores", samples, {}, cfg, "cpu")
    assert [s["xcomet"] for s in done] == list(value.values())
    table = flores.summarise("flores", done, {}, cfg)
    own = [s["xcomet"] for s in done if (s["language"], s["direction"]) == ("hi", "from_en")]
    assert table["hi"]["xcomet_from_en"] == pytest.approx(sum(own) / N)
    assert table["hi"]["xcomet_from_en_stderr"] == pytest.approx(stderr(own))
    assert table["all"]["xcomet_to_en"] == pytest.approx(
        (table["de"]["xcomet_to_en"] + table["hi"]["xcomet_to_en"]) / 2)

    seen = []

    def score(folder, rows, device):
        seen.extend([folder, device, *rows])
        return [len(row["mt"]) / 100 for row in rows]

    fake = types.ModuleType("tasks.xcomet")
    fake.score = score
    monkeypatch.setitem(sys.modules, "tasks.xcomet", fake)
    monkeypatch.setattr("tasks.xcomet", fake, raising=False)
    done = flores.finish("flores", samples, {}, settings("m", data, "o", xcomet="XL"), "cuda")
    assert [s["xcomet"] for s in done] == [len(s["completion"]) / 100 for s in samples]
    assert seen[:3] == ["XL", "cuda", {"src": samples[0]["source"], "mt": "", "ref": samples[0]["reference"]}]
    assert flores.finish("flores", samples, {}, settings("m", data, "o"), "cpu") is samples


def test_the_built_in_xcomet(tmp_path, data):
    """The tiny model of test_xcomet.py; each row's score is its own, whatever stands beside it."""
    from tasks import xcomet
    folder = str(Path(__file__).parent / "fixtures" / "xcomet")
    samples = [i | {"completion": i["reference"][::-1]} for i in
               flores.read("flores", settings("m", data, "o", languages=["de"]))][:4]
    done = flores.finish("flores", samples, {}, settings("m", data, "o", xcomet=folder), "cpu")
    alone = [xcomet.score(folder, [{"src": s["source"], "mt": s["completion"], "ref": s["reference"]}])[0] for s in samples]
    assert [s["xcomet"] for s in done] == pytest.approx(alone, abs=1e-5) and len(set(alone)) > 1


# --- a tiny checkpoint, end to end ---

def test_end_to_end(checkpoint, data, tmp_path):
    main(settings(checkpoint, data, tmp_path / "out"))
    samples = tiny.read(tmp_path / "out" / "samples_flores.jsonl")
    items = flores.read("flores", settings(checkpoint, data, tmp_path))
    assert [{k: s[k] for k in item} for s, item in zip(samples, items, strict=True)] == items
    assert not all(s["ended"] for s in samples)  # 10 tokens are too few
    assert flores.CODES["zh"] == "zho_Hans cmn_Hans" and flores.CODES["zh-Hant"] == "zho_Hant cmn_Hant"
    model, chat = load(checkpoint), Chat(checkpoint)
    for s in samples[::4]:
        assert s["completion"] == complete(model, chat, [s], 10)[0]["completion"].strip()
        assert s["chrfpp_stats"] == chrf_stats(s["completion"], s["reference"]).tolist()
    assert len({s["completion"] for s in samples}) > 5
    table = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))["results"]["flores"]
    assert list(table) == ["all", "de", "ar", "zh", "zh-Hant", "hi"] or set(table) == {"all", *WORDS} - {"en"}
    at = [s for s in samples if (s["language"], s["direction"]) == ("hi", "to_en")]
    whole = corpus_chrf([s["completion"] for s in at], [s["reference"] for s in at])
    assert table["hi"]["chrfpp_to_en"] == pytest.approx(whole)


def test_any_grouping_two_ranks_and_a_kill_give_the_same(checkpoint, data, tmp_path, monkeypatch):
    main(settings(checkpoint, data, tmp_path / "whole"))
    main(settings(checkpoint, data, tmp_path / "parts", items_at_once=7))
    tiny.jobs(tmp_path / "jobs.json", {2: [["", "eval.py", "--model", checkpoint, "--tasks", "flores", "--data", data,
                                           "--languages", *(x for x in WORDS if x != "en"), "--max_new_tokens", 10,
                                           "--out", tmp_path / "ranks"]]})
    plain, calls = flores.reply, []

    def dies(model, chat, rows, limit):
        calls.append(len(rows))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(model, chat, rows, limit)

    monkeypatch.setattr(flores, "reply", dies)
    with pytest.raises(KeyboardInterrupt):
        main(settings(checkpoint, data, tmp_path / "killed", items_at_once=20))
    main(settings(checkpoint, data, tmp_path / "killed", items_at_once=20))
    assert calls == [20, 20, 10, 10]
    whole = (tmp_path / "whole" / "samples_flores.jsonl").read_bytes()
    for name in ("parts", "ranks", "killed"):
        assert whole == (tmp_path / name / "samples_flores.jsonl").read_bytes(), name


def test_a_base_model_goes_on_with_a_text(data, tmp_path, monkeypatch):
    tiny.make_checkpoint(tmp_path / "base")
    path = tmp_path / "base" / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("chat_template")
    path.write_text(json.dumps(config), encoding="utf-8")
    seen, plain = [], flores.go_on

    def watched(model, chat, rows, limit, stop):
        seen.extend((row["prompt"], stop(row)) for row in rows)
        return plain(model, chat, rows, limit, stop)

    monkeypatch.setattr(flores, "go_on", watched)
    main(settings(tmp_path / "base", data, tmp_path / "out", languages=["de"], limit=1))
    assert seen == [("German sentence: eins zwei drei devtest 0.\nEnglish sentence:", ("\n",)),
                    ("English sentence: one two three devtest 0.\nGerman sentence:", ("\n",))]
    assert all("\n" not in s["completion"] for s in tiny.read(tmp_path / "out" / "samples_flores.jsonl"))


def test_names_that_others_import():
    assert chrf("a", ["a"]) == corpus_chrf(["a"], [["a"]]) == 100
