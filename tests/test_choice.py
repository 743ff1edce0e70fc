"""
Multiple choice: log-likelihoods with shared prefixes, the prompts of each benchmark, files as they are published, and the same
numbers as lm-evaluation-harness.

    python -m pytest tests/test_choice.py

What is computed once is compared with one request after another through the plain model; prompts with texts written out by
hand; all of it with what lm-eval 0.4.13 recorded on the same rows and weights (fixtures/make_lmeval.py).
"""

import hashlib
import json
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

import benchmarks
import tiny
from chat import Chat
from config import Config as ModelConfig
from eval import Config, main
from likelihood import distinct, encode, encode_pairs, first_id, grouped, loglikelihoods, packs, shared
from model import Transformer, load
from stats import clustered_stderr, pooled_stderr, stderr
from tasks import choice

cpu = tiny.cpu
HERE = Path(__file__).resolve().parent / "fixtures"
DATA = HERE / "lmeval" / "data"
EXPECTED = json.loads((HERE / "lmeval" / "expected.json").read_text(encoding="utf-8"))


# --- what is computed once is what is computed one by one ---

SIZES = dict(vocab_size=60, hidden_size=24, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2, logit_scale=1.0,
             intermediate_size=36, initializer_range=0.2, bos_token_id=5, eos_token_id=7, pad_token_id=0,
             max_position_embeddings=64)
FAMILIES = {"cohere": {}, "cohere2": {"sliding_window": 7}, "mistral": {"sliding_window": 5},
            "gemma2": {"sliding_window": 6, "query_pre_attn_scalar": 6, "head_dim": 6}}  # cohere2: layer 4 has no positions


def make(family):
    return Transformer(ModelConfig.from_dict(SIZES | {"model_type": family} | FAMILIES[family], "x")).init_weights(1)


@torch.no_grad()
def one_by_one(model, requests):
    """[(log-likelihood, greedy)] through the plain model, a request at a time."""
    out = []
    for context, continuation in requests:
        ids = (context + continuation)[-(model.cfg.max_position_embeddings + 1):]
        logps = model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)[-len(continuation):]
        out.append((logps[range(len(continuation)), continuation].sum().item(), logps.argmax(-1).tolist() == continuation))
    return out


@torch.no_grad()
def requests_of(model, seed=0):
    """A subject's examples and questions, stories of their own, and what is odd; some continuations are the greedy ones."""
    rng, words = random.Random(seed), lambda low, high: [rng.randrange(8, 60) for _ in range(rng.randint(low, high))]
    requests, stem = [], [5] + words(20, 20)
    for _ in range(7):
        context = stem + words(1, 9)
        requests += [(context, [10 + k]) for k in range(4)]  # letters: one input
        requests += [(context, [11, 12, 13]), (context, [11, 14]), (context[:-1], [context[-1], 12])]  # they begin each other
    for _ in range(6):
        context = [5] + words(6, 14)
        requests += [(context, [20] + words(1, 6)) for _ in range(2)]
        greedy = model(torch.tensor([context]))[0, -1].argmax().item()
        more = model(torch.tensor([context + [greedy]]))[0, -1].argmax().item()
        requests += [(context, [greedy]), (context, [greedy, more]), (context, [greedy, 9])]
    requests += [([5], [9]), (stem[:1] + words(100, 100), [9, 8]), (words(64, 64), words(3, 3)), requests[0]]  # two cut
    rng.shuffle(requests)
    return requests


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_one_by_one(family):
    model = make(family)
    requests = requests_of(model)
    expected, asked = one_by_one(model, requests), sum(min(64, len(a + b) - 1) for a, b in requests)
    assert 0 < sum(greedy for _, greedy in expected) < len(expected)
    for batch_tokens in (1, 40, 100, 8192):
        count = Counter()
        found = loglikelihoods(model, requests, batch_tokens, count)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        assert max(abs(a - b) for (a, _), (b, _) in zip(found, expected)) < 1e-5
        assert count["asked"] == asked and count["computed"] < asked / 3 and count["cut"] == 2
    assert loglikelihoods(model, []) == []


def test_tokens_computed():
    """A subject: the stem once, each question once, however many letters are asked for."""
    model, count = make("cohere"), Counter()
    stem, questions = list(range(8, 38)), [[40 + q, 50] for q in range(8)]
    requests = [(stem + q, [letter]) for q in questions for letter in (10, 11, 12, 13)]
    loglikelihoods(model, requests, count=count)
    assert count == {"asked": 32 * 32, "computed": 30 + 8 * 2, "cut": 0}
    loglikelihoods(model, requests, 8, count := Counter())  # 4 questions of 2 + 30 // 8 tokens do not fit into 8
    assert count["computed"] == 30 + 8 * 2


def test_logits_in_parts(monkeypatch):
    """The head runs on no more rows at once than LOGITS allows, and only where a continuation is predicted."""
    import likelihood
    model = make("cohere2")
    requests = requests_of(model)
    expected, seen, plain = loglikelihoods(model, requests), [], likelihood.exact_logits
    monkeypatch.setattr(likelihood, "LOGITS", 3 * 60)
    monkeypatch.setattr(likelihood, "exact_logits", lambda m, h: seen.append(len(h)) or plain(m, h))
    found = loglikelihoods(model, requests)
    assert max(seen) == 3 and [a for a, _ in found] == pytest.approx([a for a, _ in expected], abs=1e-5)
    places = {tuple((a + b)[-65:][:-1][:n]) for a, b in requests
              for n in range(min(64, len(a + b) - 1) - len(b) + 1, min(64, len(a + b) - 1) + 1)}
    assert len(places) <= sum(seen) < 1.1 * len(places)  # what two rows share but no stem of theirs is there twice


def test_sixteen_bits_are_not_rounded_again():
    """bf16 logits near 8 are 1/32 apart: what is added up comes from fp32 ones."""
    model = make("cohere").bfloat16()
    requests = [([5, 9, 30], [k]) for k in range(60)]
    hidden = model.hidden(torch.tensor([[5, 9, 30]]))[0, -1:]
    expected = (hidden.float() @ model.head.float().T).log_softmax(-1)[0]
    found = torch.tensor([a for a, _ in loglikelihoods(model, requests)])
    assert (found - expected).abs().max() < 1e-5
    rounded = model.logits(hidden)[0].float().log_softmax(-1)
    assert (rounded - expected).abs().max() > 1e-3


def test_not_numbers():
    model = make("cohere")
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(SystemExit, match="not numbers"):
        loglikelihoods(model, [([5], [9])])
    with pytest.raises(SystemExit, match="has 65 tokens, this model reads 64"):
        loglikelihoods(make("cohere"), [([5], [9] * 65)])


def test_rows_and_groups():
    inputs = [[1, 2, 3], [1, 2], [1, 2, 3], [300, 2], [1, 2, 4], [2], [2, 70000]]
    rows, owner = distinct(inputs)
    assert [row.tolist() for row in rows] == [[300, 2], [2, 70000], [1, 2, 4], [1, 2, 3]]  # numbers, not their bytes, sort
    for ids, o in zip(inputs, owner):
        assert rows[o][:len(ids)].tolist() == ids
    assert shared(rows[2], rows[3]) == 2 and shared(rows[0], rows[1]) == 0 and shared(rows[0], rows[0]) == 2

    def saved(groups):
        return sum((len(m) - 1) * n - 4 * len(m) for n, m in groups if len(m) > 1)

    rng = random.Random(1)
    for _ in range(30):  # against all ways to cut a list into stretches
        rows, _ = distinct([[rng.choice((0, 0, 0, 0, 0, 0, 1)) for _ in range(rng.randint(9, 30))] for _ in range(7)])
        groups = grouped(rows)
        assert sorted(i for _, members in groups for i in members) == list(range(len(rows)))
        assert all(n == min(shared(rows[a], rows[b]) for a in members for b in members) for n, members in groups)
        best = 0
        for cuts in range(2 ** (len(rows) - 1)):
            edges = [0, *(i + 1 for i in range(len(rows) - 1) if cuts >> i & 1), len(rows)]
            best = max(best, saved([(shared(rows[a], rows[b - 1]), range(a, b)) for a, b in zip(edges, edges[1:])]))
        assert saved(groups) == best
        for limit in (1, 40, 1000):
            parts = list(packs(groups, limit))
            assert sorted(n for part in parts for n, _ in part) == sorted(n for n, _ in groups)
            assert all(len(part) == 1 or sum(n for n, _ in part) <= limit for part in parts)


# --- texts to ids ---

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The checkpoint that lm-eval evaluated."""
    folder = tmp_path_factory.mktemp("choice") / "model"
    shutil.copytree(HERE / "chat" / "aya", folder)
    tiny.make_checkpoint(folder, EXPECTED["seed"], tokenizer=False, **EXPECTED["sizes"])
    return folder


@pytest.fixture(scope="module")
def chat(folder):
    return Chat(folder)


def test_the_border(chat):
    plain = lambda text: chat.tokenizer.encode(text, add_special_tokens=False).ids
    pairs = [("The house ", "is old"), ("The house", " is old"), ("a\n\n", "b"), ("", "b"), ("  ", "b"), ("", "<BOS_TOKEN>b"),
             ("<BOS_TOKEN>a", " b"), ("<|USER_TOKEN|>", "b"), ("la", "st"), ("图书", "馆")]
    found = encode_pairs(chat, pairs)
    assert found[0] == found[1] == ([5, *plain("The house")], plain(" is old"))  # white space goes to the continuation
    assert found[2] == ([5, *plain("a")], plain("a\n\nb")[1:])
    assert found[3] == ([5], plain("b")) and found[4] == ([5], plain("  b"))
    assert found[5] == ([5], plain("b"))  # the BOS is there already
    assert found[6] == ([5, *plain("a")], plain(" b"))
    assert found[7][0] == [5, chat.tokenizer.token_to_id("<|USER_TOKEN|>")]  # not guarded, as in transformers
    assert found[8] == ([5, *plain("la")], plain("last")[len(plain("la")):])  # what the whole has behind as many ids
    assert encode_pairs(chat, pairs * 60)[-len(pairs):] == found  # more than are tokenised at once
    assert encode(chat, ["a"], special=False) == {"a": plain("a")}
    qwen = Chat(HERE / "chat" / "qwen")  # no BOS: EOS stands in front of nothing, nothing in front of a text
    assert first_id(qwen) == qwen.tokenizer.token_to_id(qwen.names["eos_token"]) and qwen.bos is None
    a, b = (qwen.tokenizer.encode(text).ids for text in ("a", " b"))
    assert encode_pairs(qwen, [("a", " b"), ("", " b"), (" ", "b")]) == [(a, b), ([first_id(qwen)], b), ([first_id(qwen)], b)]
    del qwen.names["eos_token"]
    with pytest.raises(SystemExit, match="neither a BOS nor an EOS"):
        encode_pairs(qwen, [("", "b")])
    with pytest.raises(SystemExit, match="nothing to score: ''"):
        encode_pairs(chat, [("The house", "")])


# --- prompts, by hand ---

def only(task, row, language):
    item = choice.MAKE[task](row, language, 3, "file: row 4")
    return [context + " ~" + c for context in item["contexts"] for c in item["choices"]], item["answer"], item["question"]


XCOPA = [("tr", "Kapı kilitliydi.", "cause", "İçeri girdi.", "Irmağa gitti.", 0,
          ["Kapı kilitliydi çünkü ~ i̇çeri girdi.", "Kapı kilitliydi çünkü ~ irmağa gitti."]),
         ("vi", " Trời mưa. ", "effect", "Đường ướt.", "Ông ấy cười.", "1",
          ["Trời mưa vì vậy ~ đường ướt.", "Trời mưa vì vậy ~ ông ấy cười."]),
         ("zh", "天黑了。", "effect", "他点灯。", "他出门。", 1, ["天黑了 所以 ~ 他点灯。", "天黑了 所以 ~ 他出门。"]),
         ("id", "ประตูปิด", "cause", "A b", "c", 0, ["ประตูปิ karena ~ a b", "ประตูปิ karena ~ c"]),  # a letter goes
         ("it", "Piove.", "cause", "È qui.", "L'acqua.", 0, ["Piove perché ~ è qui.", "Piove perché ~ l'acqua."])]


@pytest.mark.parametrize("language, premise, asked, a, b, label, expected", XCOPA, ids=[row[0] for row in XCOPA])
def test_xcopa(language, premise, asked, a, b, label, expected):
    row = {"premise": premise, "question": asked, "choice1": a, "choice2": b, "label": label}
    assert only("xcopa", row | {"idx": 8}, language) == (expected, int(label), "8")
    assert choice.xcopa(row | {"choice2": ""}, language, 0, "x") is None
    for column, value, words in (("question", "why", "'why' is none of cause effect"), ("label", 2, "answer 2 is none of 0 1")):
        with pytest.raises(SystemExit, match=f"file: row 4: the answer.*{words.split('answer ')[-1]}"):
            only("xcopa", row | {column: value}, language)


def test_xstory_cloze():
    ours = {f"input_sentence_{i}": f"ذهب {i}." for i in range(1, 5)} | {
        "story_id": "s7", "sentence_quiz1": "عاد.", "sentence_quiz2": "نام.", "answer_right_ending": 2}
    theirs = {f"InputSentence{i}": f"ذهب {i}." for i in range(1, 5)} | {
        "InputStoryid": "s7", "RandomFifthSentenceQuiz1": "عاد.", "RandomFifthSentenceQuiz2": "نام.", "AnswerRightEnding": "2"}
    told = "ذهب 1. ذهب 2. ذهب 3. ذهب 4. ~ "
    for row in (ours, theirs):
        assert only("xstory_cloze", row, "ar") == ([told + "عاد.", told + "نام."], 1, "s7")


def test_xwinograd():
    row = {"sentence": "太郎は次郎を_と呼んだ _ 。 ", "option1": "兄", "option2": "弟", "answer": "2"}
    assert only("xwinograd", row, "ja") == (["太郎は次郎を兄 ~ と呼んだ _ 。", "太郎は次郎を弟 ~ と呼んだ _ 。"], 1, "ja 3")
    assert only("xwinograd", row | {"answer": 1}, "ja")[1] == 0
    assert choice.xwinograd(row | {"sentence": "x"}, "ja", 0, "x") is None


def test_global_mmlu():
    row = {"question": " कौन सा? \n", "option_a": "घर", "option_b": "12", "option_c": None, "option_d": "", "answer": "C",
           "sample_id": "anatomy/test/0", "subject": "anatomy", "subject_category": "Medical"}
    said = "कौन सा?\nA. घर\nB. 12\nC. None\nD. \nAnswer:"
    assert only("global_mmlu", row, "hi") == ([f"{said} ~ {x}" for x in "ABCD"], 2, "anatomy/test/0")
    dev = [row | {"question": str(i), "answer": "ABCDA"[i % 5]} for i in range(6)]
    block = lambda i: f"{i}\nA. घर\nB. 12\nC. None\nD. \nAnswer: {'ABCDA'[i % 5]}\n\n"
    dev.insert(2, row | {"subject": "astronomy", "subject_category": "STEM", "question": "other"})
    first = "".join(map(block, range(5)))
    assert choice.examples_for("global_mmlu", [row, row], dev, 5, "hi") == [first, first]
    drawn = choice.examples_for("global_mmlu_lite", [row] * 3, dev, 2, "hi")
    rng = random.Random(1234)
    assert drawn == ["".join(map(block, rng.sample(range(6), 2))) for _ in range(3)]


def test_fewer_examples_are_said(capsys):
    row = {"question": "q", "answer": "A", "subject": "anatomy", "subject_category": "Medical"}
    for task, group in (("global_mmlu", "anatomy"), ("global_mmlu_lite", "Medical")):
        found = choice.examples_for(task, [row, row], [row, row], 5, "ar")
        assert [text.count("Answer: A\n\n") for text in found] == [2, 2]
        assert capsys.readouterr().out == f"{task}: ar: fewer than 5 examples: {group} 2\n"
    assert choice.examples_for("global_mmlu", [row], [], 5, "ar") == [""]


# --- the same numbers as lm-eval ---

TASKS = {"xcopa": "xcopa", "xstorycloze": "xstory_cloze", "xwinograd": "xwinograd"}
DIFFERENCE = 1e-4


def digest(what):
    return hashlib.sha256(json.dumps(what, ensure_ascii=False).encode("utf-8")).hexdigest()[:12]


def theirs(label, task, language):
    """lm-eval's tasks of a label in this language -> {name of one: what it recorded}."""
    found = {}
    for name, record in EXPECTED["tasks"].items():
        kind, rest = name.split(" ", 1)
        own, code = (rest.rsplit("_", 1) if kind == "zero" else (rest, rest.removeprefix("global_mmlu_full_")
                                                                 .removeprefix("global_mmlu_").split("_")[0]))
        if kind == label and code.replace("jp", "ja") == language and (kind != "zero" or TASKS[own] == task):
            found[rest] = record
    return found


@pytest.mark.parametrize("label, task, languages", [
    ("zero", "xcopa", "it tr vi zh id"), ("zero", "xstory_cloze", "ar en hi ru zh"), ("zero", "xwinograd", "en ja zh pt"),
    ("full", "global_mmlu", "hi tr"), ("lite", "global_mmlu_lite", "ar ja"), ("cut", "global_mmlu", "hi")])
def test_as_lm_eval(folder, chat, label, task, languages, capsys):
    cfg, model = Config(data=str(DATA), languages=languages.split(), batch_tokens=3000), load(folder)
    items = choice.read(task, cfg)
    if label == "cut":
        model.cfg.max_position_embeddings = 120
        items = [item for item in items if item["subject"] == "anatomy"]
    samples = choice.run(task, model, chat, items, cfg)
    assert ("cut on the left" in capsys.readouterr().out) == (label == "cut")
    table, worst, compared = choice.summarise(task, samples, {}, cfg), 0.0, 0
    for language in languages.split():
        groups = theirs(label, task, language)
        for name, record in groups.items():
            group = "" if label == "zero" else name.split(f"{language}_", 1)[1]
            mine = [i for i, item in enumerate(items) if item["language"] == language and (
                not group or item[choice.GROUPS[task]].lower().replace(" ", "_") == group)]
            requests = [(pair, score, greedy) for i in mine for pair, score, greedy in
                        zip(choice.pairs_of(items[i]), samples[i]["scores"], samples[i]["greedy"])]
            ids = encode_pairs(chat, [pair for pair, _, _ in requests])
            assert [r[1] for r in record["requests"]] == [digest(pair) for pair, _, _ in requests], name  # texts
            assert [r[2] for r in record["requests"]] == [digest(pair) for pair in ids], name  # token ids
            assert [r[4] for r in record["requests"]] == [greedy for _, _, greedy in requests], name
            worst = max([worst] + [abs(r[3] - score) for r, (_, score, _) in zip(record["requests"], requests)])
            assert record["acc"] == [samples[i]["correct"] for i in mine], name
            values = [float(samples[i]["correct"]) for i in mine]
            expected = EXPECTED["tables"][f"{label} {name}"]
            assert (sum(values) / len(values), stderr(values)) == pytest.approx((expected["acc"], expected["stderr"])), name
            compared += len(requests)
        whole = EXPECTED["tables"].get(f"lite global_mmlu_{language}") if label == "lite" else (
            expected if len(groups) == 1 else None)
        if whole:
            assert (table[language]["acc"], table[language]["acc_stderr"]) == pytest.approx((whole["acc"], whole["stderr"]))
    assert worst <= DIFFERENCE
    assert compared == len([pair for item in items for pair in choice.pairs_of(item)])


def test_greedy_as_in_lm_eval(folder):
    """Its rows hold nothing that a random model would say; these do."""
    found = loglikelihoods(load(folder), [(context, said) for context, said, _, _ in EXPECTED["greedy"]])
    assert [flag for _, flag in found] == [flag for *_, flag in EXPECTED["greedy"]] == [True, False] * 6
    assert [a for a, _ in found] == pytest.approx([a for _, _, a, _ in EXPECTED["greedy"]], abs=DIFFERENCE)


def test_a_tie_is_the_first_choice(folder, chat):
    """Equal texts are one input, so their sums are the same bits, whatever the batch."""
    for task, languages in (("xstory_cloze", ["ar", "zh", "en"]), ("xwinograd", ["en", "zh", "pt"])):
        for batch_tokens in (1, 8192):
            cfg = Config(data=str(DATA), languages=languages, batch_tokens=batch_tokens)
            ties = [s for s in choice.run(task, load(folder), chat, choice.read(task, cfg), cfg) if len(set(s["scores"])) == 1]
            assert len(ties) == len(languages) and not any(s["chosen"] for s in ties)


# --- standard errors ---

def test_standard_errors():
    row = lambda language, question, category, correct: {"language": language, "question": question, "correct": correct,
                                                         "subject": category + "!", "subject_category": category}
    samples = [row("ar", "1", "STEM", True), row("ar", "2", "STEM", False), row("ar", "3", "Other", True),
               row("hi", "1", "STEM", True), row("hi", "2", "STEM", True), row("hi", "3", "Other", False)]
    for task in ("global_mmlu", "global_mmlu_lite", "xcopa"):
        table = choice.summarise(task, [dict(s) for s in samples], {}, None)
        values = [1.0, 0.0, 1.0, 1.0, 1.0, 0.0]
        assert table["all"]["acc"] == pytest.approx(4 / 6) and table["ar"]["acc"] == pytest.approx(2 / 3)
        assert table["all"]["acc_stderr"] == clustered_stderr(values, list("123123"))
        if task == "xcopa":
            assert table["ar"]["acc_stderr"] == stderr(values[:3]) and "categories" not in table["ar"]
            assert table["all"]["acc_pooled_stderr"] == pooled_stderr([values[:3], values[3:]])
        else:  # [1, 0] and [1]: variance 1/2 with one degree of freedom, 3 values
            assert table["ar"]["acc_stderr"] == pytest.approx((0.5 / 3) ** 0.5)
            assert table["ar"]["categories"] == {"Other": {"acc": 1.0, "n": 1}, "STEM": {"acc": 0.5, "n": 2}}
            # over four groups of a language and category: 1/2 and 0, two degrees of freedom, 6 values
            assert table["all"]["acc_pooled_stderr"] == pytest.approx((0.5 / 2 / 6) ** 0.5)
    assert pooled_stderr([[1.0], [0.0]]) == 0.0
    assert choice.summarise("global_mmlu", [], {}, None) == {"all": {"n": 0, "acc_pooled_stderr": 0.0}}  # no such language


# --- files ---

def test_layouts(tmp_path, capsys):
    """Clones of different ages hold the same rows in other places; machine translations are not taken for them."""
    cfg = Config(data=str(tmp_path), languages=["tr"])
    source = (DATA / "xcopa" / "data" / "tr" / "test.tr.jsonl").read_text(encoding="utf-8")
    expected = choice.read("xcopa", Config(data=str(DATA), languages=["tr"]))
    assert len(expected) == 6 and {item["language"] for item in expected} == {"tr"}
    wrong = tmp_path / "xcopa" / "data-gmt" / "tr" / "test.tr.jsonl"
    wrong.parent.mkdir(parents=True)
    wrong.write_text(source.replace("git", "GIT"), encoding="utf-8")
    with pytest.raises(SystemExit, match="has no rows in tr: expected tr/test-"):
        choice.read("xcopa", cfg)
    for name in ("data/tr/test.tr.jsonl", "tr/test.jsonl", "test.tr.jsonl"):
        path = tmp_path / "xcopa" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
        assert choice.read("xcopa", cfg) == expected
        path.unlink()
    path.write_text(source, encoding="utf-8")
    assert choice.read("xcopa", Config(data=str(tmp_path))) == expected
    assert f"xcopa: {tmp_path / 'xcopa'} has no rows in id it vi zh" in capsys.readouterr().out
    lines = source.splitlines()
    empty = json.dumps(json.loads(lines[0]) | {"choice1": ""})
    path.write_text("\n".join([empty, *lines[1:]]), encoding="utf-8")
    assert [item["id"] for item in choice.read("xcopa", cfg)] == [f"xcopa-tr-{n}" for n in range(1, 6)]
    assert "xcopa: tr: 1 of 6 rows left out" in capsys.readouterr().out
    path.write_text("\n".join(line.replace("premise", "text") for line in lines), encoding="utf-8")
    with pytest.raises(SystemExit, match="row 1 has no premise"):
        choice.read("xcopa", cfg)


def test_codes_and_order(capsys):
    read = lambda task, **more: choice.read(task, Config(data=str(DATA), **more))
    items = read("xwinograd", limit=2)
    assert [item["id"] for item in items] == [f"xwinograd-{x}-{n}" for x in ("en", "ja", "pt", "zh") for n in (0, 1)]
    assert "has no rows in fr ru\nxwinograd: --limit 2 leaves out 12 of 20 rows\n" in capsys.readouterr().out
    items = read("global_mmlu", languages=["tr"])  # in the file subjects take turns; together they share examples
    assert [item["subject"] for item in items] == ["anatomy"] * 3 + ["astronomy"] * 3
    assert items[0]["examples"] is items[2]["examples"] and items[0]["examples"].count("Answer:") == 5
    assert "tr: 1 questions have an empty option" in capsys.readouterr().out
    assert [item["examples"].count("Answer:") for item in read("global_mmlu", languages=["tr"], shots=2)] == [2] * 6
    assert {item["examples"] for item in read("global_mmlu", languages=["tr"], shots=0)} == {""}
    assert {item["examples"] for item in read("xcopa", languages=["tr"], shots=3)} == {""}  # it has none
    whole, some = read("global_mmlu_lite", languages=["ar"]), read("global_mmlu_lite", languages=["ar"], limit=7)
    first = {f"global_mmlu_lite-ar-{n}" for n in range(7)}  # the file's first ones, with the examples that they have without it
    assert [item for item in whole if item["id"] in first] == some
    capsys.readouterr()
    assert read("xstory_cloze", languages=["tr"]) == []
    assert capsys.readouterr().out == "xstory_cloze: not in tr; it has ar en es hi id ru zh\n"
    with pytest.raises(SystemExit, match="has no folder Global-MMLU-Lite"):
        choice.read("global_mmlu_lite", Config(data=str(HERE / "chat")))


def test_dev_rows_are_needed(tmp_path):
    shutil.copytree(DATA / "Global-MMLU", tmp_path / "Global-MMLU")
    (tmp_path / "Global-MMLU" / "tr" / "dev.jsonl").unlink()
    with pytest.raises(SystemExit, match="has no dev rows in tr"):
        choice.read("global_mmlu", Config(data=str(tmp_path)))
    assert len(choice.read("global_mmlu", Config(data=str(tmp_path), shots=0))) == 12


def test_parquet(tmp_path, monkeypatch):
    """Read by whoever has pyarrow; here by a stand-in for benchmarks.read_table."""
    (tmp_path / "xcopa" / "tr").mkdir(parents=True)
    (tmp_path / "xcopa" / "tr" / "test-00000-of-00001.parquet").write_bytes(b"PAR1")
    rows = tiny.read(DATA / "xcopa" / "data" / "tr" / "test.tr.jsonl")
    monkeypatch.setattr(choice, "read_table", lambda path: rows if path.suffix == ".parquet" else benchmarks.read_table(path))
    assert choice.read("xcopa", Config(data=str(tmp_path))) == choice.read("xcopa", Config(data=str(DATA), languages=["tr"]))


# --- eval.py ---

def test_through_eval_on_two_ranks(folder, tmp_path):
    tasks = ["xcopa", "xwinograd", "global_mmlu"]
    main(Config(model=[str(folder)], tasks=tasks, data=str(DATA), out=str(tmp_path / "one"), batch_tokens=500))
    tiny.script("eval.py", "--model", folder, "--tasks", *tasks, "--data", DATA, "--out", tmp_path / "two", ranks=2)
    for task in tasks:
        a, b = (tiny.read(tmp_path / name / f"samples_{task}.jsonl") for name in ("one", "two"))
        assert len(a) == len(b) > 10
        for x, y in zip(a, b):
            assert x.pop("scores") == pytest.approx(y.pop("scores"), abs=1e-4)
            assert x == y and {"language", "question", "answer", "correct", "chosen", "prompt_hash"} <= x.keys()
            assert not {"examples", "contexts", "choices"} & x.keys()
    one, two = (json.loads((tmp_path / name / "results.json").read_text(encoding="utf-8"))["results"]
                for name in ("one", "two"))
    assert one == two and set(one["global_mmlu"]) == {"all", "hi", "tr"} and one["xcopa"]["all"]["n"] == 30
