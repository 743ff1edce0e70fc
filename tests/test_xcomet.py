"""
tasks/xcomet.py against unbabel-comet 2.2.7 (fixtures/xcomet, recorded by fixtures/make_xcomet.py) and against the score rule
written a second time below; folders that are damaged, of something else, or half converted.

    python -m pytest tests/test_xcomet.py
"""

import itertools
import json
import math
import os
import random
import re
import runpy
import shutil
import sys
import weakref
from pathlib import Path

import tiny  # first: it finds the repository

import pytest
import torch
from safetensors.torch import load_file, save_file

from tasks import xcomet, xcomet_files
from test_common import killed_before

cpu = tiny.cpu
PUBLISHED = Path(__file__).parent / "fixtures" / "xcomet"
EXPECTED = json.loads((PUBLISHED / "expected.json").read_text(encoding="utf-8"))
FILES = ["checkpoints/model.ckpt", "config.json", "hparams.yaml", "tokenizer.json"]


def row(found):
    """The row of a recorded result; without a "full" score it was scored without a reference."""
    return dict(zip(("src", "mt", "ref"), EXPECTED["rows"][found["row"]][:3 if "full" in found else 2]))


ROWS = [row(found) for found in EXPECTED["last"]]


@pytest.fixture(autouse=True)
def forget():
    yield
    xcomet.scorer.cache_clear()


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    out = tmp_path_factory.mktemp("xcomet") / "converted"
    xcomet.convert(PUBLISHED, out)
    return out


@pytest.fixture
def copy(tmp_path):
    """A published folder that the test may break."""
    for name in FILES:
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(PUBLISHED / name, tmp_path / "copy" / name)
    return tmp_path / "copy"


def edit_json(path, **values):
    content = json.loads(path.read_text(encoding="utf-8")) | values
    path.write_text(json.dumps({k: v for k, v in content.items() if v != "gone"}), encoding="utf-8")


def edit_checkpoint(folder, change):
    path = folder / "checkpoints" / "model.ckpt"
    saved = torch.load(path, weights_only=True)
    torch.save(change(saved) or saved, path)


def refusal(work):
    with pytest.raises(SystemExit) as e:
        work()
    line, = str(e.value).splitlines()
    assert line.startswith("error: ")
    return line


# ---------------------------------------------------------------------------------------------------------------------
# the numbers

def same(found, expected):
    """parts() and what unbabel-comet said: scores to 4e-6 (they are as large as 4), MQM and spans the same."""
    for f, e in zip(found, expected, strict=True):
        assert f["score"] == pytest.approx(e["score"], abs=4e-6)
        assert f["mqm"] == pytest.approx(e["mqm"], abs=1e-6)
        assert [(s["start"], s["end"], s["severity"]) for s in f["spans"]] == [tuple(s[:3]) for s in e["spans"]]
        assert [s["confidence"] for s in f["spans"]] == pytest.approx([s[3] for s in e["spans"]], abs=4e-6)
        if "full" in e:
            assert [f[k] for k in ("src", "ref", "full")] == pytest.approx([e[k] for k in ("src", "ref", "full")], abs=4e-6)
        else:  # unbabel-comet has cut it at 1 already
            assert min(f["src"], 1) == pytest.approx(e["src"], abs=4e-6) and "ref" not in f and "full" not in f


def test_same_as_unbabel_comet(converted):
    same(xcomet.parts(converted, ROWS), EXPECTED["last"])
    same(xcomet.parts(PUBLISHED, ROWS), EXPECTED["last"])  # straight from the pickle
    assert xcomet.score(converted, ROWS) == [p["score"] for p in xcomet.parts(converted, ROWS)]


def test_the_tagger_may_read_any_layer(converted, tmp_path):
    shutil.copytree(converted, tmp_path / "middle")
    config = json.loads((converted / "config.json").read_text(encoding="utf-8"))
    edit_json(tmp_path / "middle" / "config.json", xcomet=config["xcomet"] | {"word_layer": 1})
    same(xcomet.parts(tmp_path / "middle", ROWS), EXPECTED["middle"])


def test_what_the_fixture_holds():
    """Scripts, cut rows, clipping, spans that are dropped: what the test above would be worth little without."""
    texts = "".join(text for row in EXPECTED["rows"] for text in row)
    for first, last in "ءي", "את", "अह", "กฮ", "一龥", "ぁゖ", "가힣", "ая", "αω":
        assert any(first <= c <= last for c in texts), first
    model, tokenizer = xcomet.load(PUBLISHED)
    encoded = {text: tokenizer.encode(text) for row in ROWS for text in row.values()}
    lengths = [[len(ids) for ids in xcomet.joint_rows(encoded, model.cfg, row)] for row in ROWS]
    assert max(map(max, lengths)) == model.cfg.longest == 60 and max(len(e.ids) for e in encoded.values()) == 58
    last = EXPECTED["last"]
    assert any(f["tags"][-1] != "0" for f in last) and any(f["src"] > 1 for f in last) and any(f["score"] < 0 for f in last)
    assert {"", "a", "。"} <= {r["mt"] for r in ROWS}


def rule(src, ref, full, tags):
    """The score rule, literally as the paper and unbabel-comet have it; tags: labels of the tokens of mt."""
    spans = re.findall(r"[123]+(?=0)", "".join(map(str, tags)))
    penalty = min(sum({"1": 1, "2": 5, "3": 10}[span[0]] for span in spans), 25)
    clip = lambda s: 1 if s > 1 else s
    return .12 * clip(src) + .33 * clip(ref) + .33 * clip(full) + .22 * (25 - penalty) / 25


def test_the_rule_against_a_second_implementation():
    rng = random.Random(0)
    for _ in range(300):
        tags = rng.choices(range(4), [3, 1, 1, 1], k=rng.randint(2, 9))
        offsets = [(i, i + 1) for i in range(len(tags))]
        sharp = torch.nn.functional.one_hot(torch.tensor(tags), 4).float()
        scores = [rng.uniform(-1, 2) for _ in range(3)]
        found = xcomet.combine(scores, [sharp] * 3, offsets)
        assert found["score"] == pytest.approx(rule(*scores, tags))
        assert xcomet.combine(scores[:1], [sharp], offsets)["score"] == pytest.approx(rule(*scores[:1] * 3, tags))


@pytest.mark.parametrize("tags,spans", [
    ([0, 1, 0], [(1, 2, "minor")]), ([0, 0, 0], []), ([0, 2, 2], []), ([3, 0], [(0, 1, "critical")]), ([1], []),
    ([0, 1, 3, 2, 0], [(1, 4, "minor")]), ([0, 3, 1, 0], [(1, 3, "critical")]),
    ([2, 0, 2, 0, 1], [(0, 1, "major"), (2, 3, "major")])])
def test_spans(tags, spans):
    sharp = torch.nn.functional.one_hot(torch.tensor(tags), 4) * 0.6 + 0.1
    found = xcomet.find_spans(sharp, [(i, i + 1) for i in range(len(tags))])
    assert [(s["start"], s["end"], s["severity"]) for s in found] == spans
    assert all(s["confidence"] == pytest.approx(0.7) for s in found)


def test_passes_are_weighted():
    """Tags: .1667 of the first pass, .3333 of the second, .5 of the third."""
    one = lambda bad: torch.tensor([(1 - bad, 0, bad, 0), (1.0, 0, 0, 0)])
    tag = lambda *bad: len(xcomet.combine([0.0] * 3, [one(b) for b in bad], [(0, 1), (1, 2)])["spans"])
    assert tag(1, 1, 0.02) == 1 and tag(1, 1, 0) == tag(0.98, 1, 0) == tag(0, 0, 0.98) == 0 and tag(0.02, 0, 1) == 1
    assert tag(0, 1, 0.35) == 1 and tag(0, 1, 0.32) == 0 and tag(1, 0, 0.68) == 1 and tag(1, 0, 0.65) == 0


def test_texts_of_spans(converted):
    for r, p in zip(ROWS, xcomet.parts(converted, ROWS)):
        assert all(s["text"] == r["mt"][s["start"]:s["end"]] for s in p["spans"])


def test_one_row_alone_is_the_same_in_any_batch(converted):
    rows = ROWS[::3]
    together = xcomet.score(converted, rows)
    for batch_tokens in (1, 150, 10**6):
        assert xcomet.score(converted, rows, batch_tokens=batch_tokens) == pytest.approx(together, abs=1e-5)
    shuffled = random.Random(0).sample(range(len(rows)), len(rows))
    found = xcomet.score(converted, [rows[i] for i in shuffled], batch_tokens=300)
    assert found == pytest.approx([together[i] for i in shuffled], abs=1e-5)
    assert xcomet.score(converted, []) == []


def test_nothing_is_read_behind_the_end_of_a_joint_row(converted):
    """"<pad>" in a text is no token of the joint row but still a token of mt: with many of them mt is the longer one, and
    unbabel-comet fails, or reads padding."""
    pads = {"src": "", "mt": "<pad>" * 9 + "a"}
    assert xcomet.score(converted, [pads, *ROWS])[0] == pytest.approx(xcomet.score(converted, [pads])[0], abs=1e-5)
    model, _ = xcomet.scorer(str(converted), "cpu")
    outputs = xcomet.run(model, [[0, 5, 2], [0, 5, 6, 2, 2, 7, 2], [0, 2]], 100, "cpu")
    assert [tags.shape for _, tags in outputs] == [(3, 4), (7, 4), (2, 4)]


def test_equal_rows_are_computed_once_and_none_is_no_reference(converted, monkeypatch):
    model, _ = xcomet.scorer(str(converted), "cpu")
    seen, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda ids: seen.append(len(ids)) or forward(ids))
    a = {"src": "Good morning", "mt": "Guten Tag"}
    found = xcomet.score(converted, [a, a | {"ref": None}, a | {"ref": "Guten Morgen", "id": 3}, a])
    assert sum(seen) == 4 and found[0] == found[1] == found[3] != found[2]


def test_one_model_in_memory(converted):
    assert xcomet.scorer(str(converted), "cpu") is xcomet.scorer(str(converted), "cpu")
    xcomet.scorer(str(PUBLISHED), "cpu")
    assert xcomet.scorer.cache_info().currsize == 1


def test_two_ranks(converted, tmp_path):
    program = tmp_path / "ranks.py"
    program.write_text(f"""
import json, sys
sys.path[:0] = [{str(tiny.ROOT)!r}]
import common
from tasks import xcomet
common.init_distributed()
rows = json.load(open({str(tmp_path / 'rows.json')!r}, encoding="utf-8"))
found = [xcomet.score({str(converted)!r}, part) for part in (rows, rows[:1], [])]
json.dump(found, open(f"{tmp_path}/found.{{common.rank()}}", "w", encoding="utf-8"))
""", encoding="utf-8")
    (tmp_path / "rows.json").write_text(json.dumps(ROWS[:40]), encoding="utf-8")
    tiny.jobs(tmp_path / "jobs.json", {2: [["", program]]})
    for rank in range(2):
        all_rows, one, none = json.loads((tmp_path / f"found.{rank}").read_text(encoding="utf-8"))
        assert all_rows == pytest.approx(xcomet.score(converted, ROWS[:40]), abs=1e-5)
        assert one == pytest.approx(all_rows[:1], abs=1e-5) and none == []


def test_bf16_is_near_and_the_heads_stay_fp32(converted, tmp_path):
    """What a GPU gets, computed on the CPU. How near the real model's scores are is not known here."""
    xcomet.convert(PUBLISHED, tmp_path / "half", bf16=True)
    stored = load_file(tmp_path / "half" / "model.safetensors")
    heads = dict.fromkeys(["layerwise_attention", "estimator", "hidden2tag"], torch.float32)
    assert {name.split(".")[0]: t.dtype for name, t in stored.items()} == {"encoder": torch.bfloat16, **heads}
    model, tokenizer = xcomet.load(converted, dtype=torch.bfloat16)
    again, _ = xcomet.load(tmp_path / "half", dtype=torch.bfloat16)
    for (name, p), (_, q) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert p.dtype == q.dtype == stored[name].dtype and torch.equal(p, q)
    exact, _ = xcomet.load(converted)
    ids = torch.tensor([tokenizer.encode(r["mt"]).ids[:8] for r in ROWS[:9] if len(r["mt"]) > 12])
    with torch.no_grad():
        (a, t), (b, u) = model(ids), exact(ids)
        states = list(model.encoder["model"].states(ids))
    assert a.dtype == t.dtype == torch.float32 and all(x.dtype == torch.float32 for x in states)
    assert any((x != x.bfloat16()).any() for x in states)  # nothing is rounded on its way from layer to layer
    assert 1e-5 < (a - b).abs().max() < 0.1 and (t - u).abs().max() < 0.05


# ---------------------------------------------------------------------------------------------------------------------
# files

def test_conversion(converted, tmp_path, capsys):
    assert sorted(p.name for p in converted.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert [p.name for p in converted.parent.iterdir()] == ["converted"]
    published = torch.load(PUBLISHED / FILES[0], weights_only=True)["state_dict"]
    stored = load_file(converted / "model.safetensors")
    assert all(torch.equal(t, published[name]) for name, t in stored.items())
    gone = {"layerwise_attention.dropout_mask", "layerwise_attention.dropout_fill", "wordloss.weight"}
    assert published.keys() - stored.keys() == gone
    with pytest.MonkeyPatch.context() as patch:  # as a user calls it, over an older conversion
        patch.setattr(sys, "argv", ["xcomet.py", "--convert", str(PUBLISHED), "--out", str(tmp_path / "out")])
        for _ in range(2):
            runpy.run_path(str(tiny.ROOT / "tasks" / "xcomet.py"), run_name="__main__")
    assert f"-> {tmp_path / 'out'}" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (converted / "model.safetensors").read_bytes()


def test_conversion_in_parts(converted, tmp_path, monkeypatch):
    monkeypatch.setattr(xcomet_files, "write_weights", lambda *a, plain=xcomet_files.write_weights: plain(*a, limit=30000))
    xcomet.convert(PUBLISHED, tmp_path / "parts")
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 2
    assert xcomet.score(tmp_path / "parts", ROWS[:9]) == xcomet.score(converted, ROWS[:9])


def test_conversion_holds_one_tensor_at_a_time(tmp_path, monkeypatch):
    """Beside the mapped checkpoint: the tensor that is being written, and the one before it."""
    alive, most, plain = [], [], xcomet_files.Published.read_into

    def counted(self, name, out, row=0):
        alive.append(weakref.ref(out))
        most.append(sum(x().nbytes for x in alive if x() is not None))
        plain(self, name, out, row)
    monkeypatch.setattr(xcomet_files.Published, "read_into", counted)
    xcomet.convert(PUBLISHED, tmp_path / "out")
    largest, second = sorted(t.nbytes for t in load_file(tmp_path / "out" / "model.safetensors").values())[:-3:-1]
    assert len(most) > 50 and max(most) <= largest + second


def test_killed_at_every_step_of_a_conversion(tmp_path):
    for n in itertools.count():
        out = tmp_path / str(n) / "out"
        killed = killed_before(n, lambda: xcomet.convert(PUBLISHED, out))
        if out.exists():
            assert xcomet.load(out)  # whole
        else:
            assert killed and "not found" in refusal(lambda: xcomet.load(out))
            xcomet.convert(PUBLISHED, out)
            assert [p.name for p in out.parent.iterdir()] == ["out"]
        if not killed:
            break
    assert n >= 6


def test_a_full_disk_leaves_nothing(tmp_path):
    with tiny.largest_file(30000):
        line = refusal(lambda: xcomet.convert(PUBLISHED, tmp_path / "out"))
    assert "cannot write" in line and not (tmp_path / "out").exists()


def test_conversion_overwrites_nothing_else(copy, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep", encoding="utf-8")
    for out in (tmp_path / "notes", copy, copy / "config.json"):
        assert "would be lost" in refusal(lambda: xcomet.convert(copy, out))
    assert (tmp_path / "notes" / "mine.txt").exists() and all((copy / name).exists() for name in FILES)


@pytest.mark.parametrize("name,fetch", list(zip(FILES, ["Unbabel/XCOMET-XL", "facebook/xlm-roberta-xl"] * 2)))
def test_what_is_missing_is_named(copy, name, fetch):
    (copy / name).unlink()
    line = refusal(lambda: xcomet.score(copy, ROWS))
    assert f"has no {name}" in line and f"hf download {fetch} " in line and str(copy) in line


def drop(name):
    return lambda saved: saved["state_dict"].pop(name).any() and None


def put(name, tensor):
    return lambda saved: saved["state_dict"].update({name: tensor})


def scale(name, by):
    return lambda saved: saved["state_dict"][name].mul_(by) is None


LAYER = "encoder.model.encoder.layer.1."


@pytest.mark.parametrize("change,said", [
    (drop("estimator.ff.3.bias"), "tensor estimator.ff.3.bias is missing"),
    (drop(LAYER + "LayerNorm.weight"), f"tensor {LAYER}LayerNorm.weight is missing"),
    (drop("layerwise_attention.scalar_parameters.3"), "tensor layerwise_attention.scalar_parameters.3 is missing"),
    (put("encoder.model.adapter", torch.ones(3)), "tensor encoder.model.adapter is not part of xCOMET"),
    (put("layerwise_attention.scalar_parameters.4", torch.ones(1)), "scalar_parameters.4 is not part of xCOMET"),
    (put(LAYER.replace("1", "3") + "LayerNorm.weight", torch.ones(24)), "has 4 layers"),
    (put("hidden2tag.weight", torch.ones(3, 24)), "tensor hidden2tag.weight has shape (3, 24)"),
    (put("hidden2tag.bias", torch.ones(4, dtype=torch.int8)), "tensor hidden2tag.bias holds torch.int8"),
    (put("hidden2tag.bias", torch.tensor([0, math.nan, 0, 0])), "tensor hidden2tag.bias holds NaN"),
    (put("estimator.ff.6.bias", torch.tensor([math.inf])), "tensor estimator.ff.6.bias holds NaN or infinity"),
    (lambda saved: saved["hyper_parameters"].update(word_layer=2), "with word_layer 2, but hparams.yaml above it says 3"),
    (lambda saved: saved["hyper_parameters"].update(hidden_sizes=[20]), "was saved with hidden_sizes [20]"),
    (lambda saved: saved["state_dict"], "has no state_dict of tensors"), (lambda saved: [1], "has no state_dict of tensors"),
    (lambda saved: {"state_dict": {"a": 1}}, "has no state_dict of tensors"),
    (lambda saved: {"state_dict": {}, "path": Path("x")}, "names the code pathlib.PosixPath, and nothing")])
def test_checkpoints_that_are_refused(copy, tmp_path, change, said):
    edit_checkpoint(copy, change)
    for work in (lambda: xcomet.score(copy, ROWS), lambda: xcomet.convert(copy, tmp_path / "out")):
        line = refusal(work)
        assert said in line and "model.ckpt" in line
    assert not (tmp_path / "out").exists()


def test_parts_that_are_no_weights_of_the_model_are_passed_over(copy):
    for name in ("encoder.model.embeddings.position_ids", "encoder.model.pooler.dense.weight"):
        edit_checkpoint(copy, put(name, torch.arange(9)))
    edit_checkpoint(copy, lambda saved: saved["hyper_parameters"].update(class_identifier="unified_metric"))  # its base class
    text = (copy / "hparams.yaml").read_text(encoding="utf-8")
    (copy / "hparams.yaml").write_text(text.replace("word_layer: 3\n", ""), encoding="utf-8")  # the checkpoint says it too
    same(xcomet.parts(copy, ROWS[:9]), EXPECTED["last"][:9])
    (copy / "hparams.yaml").write_text(text, encoding="utf-8")
    edit_checkpoint(copy, lambda saved: saved.pop("hyper_parameters") and None)  # hparams.yaml is enough
    xcomet.scorer.cache_clear()
    same(xcomet.parts(copy, ROWS[:9]), EXPECTED["last"][:9])


class Run:
    def __reduce__(self):
        return os.mkdir, (os.environ["XCOMET_TEST_RAN"],)


def test_a_pickle_runs_nothing(copy, tmp_path, monkeypatch):
    monkeypatch.setenv("XCOMET_TEST_RAN", str(tmp_path / "ran"))
    edit_checkpoint(copy, lambda saved: saved | {"callbacks": Run()})
    assert "names the code posix.mkdir" in refusal(lambda: xcomet.load(copy)) and not (tmp_path / "ran").exists()


def test_a_tokenizer_with_more_tokens_than_embeddings(copy):
    name = "encoder.model.embeddings.word_embeddings.weight"
    edit_checkpoint(copy, lambda saved: saved["state_dict"].update({name: saved["state_dict"][name][:200]}))
    edit_json(copy / "config.json", vocab_size=200)
    assert "tokenizer.json does not fit config.json" in refusal(lambda: xcomet.load(copy))


def test_damaged_files(copy, tmp_path):
    whole = (copy / FILES[0]).read_bytes()
    for damaged in (b"", b"PK", whole[:-100], whole[:len(whole) // 2], b"x" * 5000, b"\x80\x02}q\x00."):
        (copy / FILES[0]).write_bytes(damaged)
        assert "cannot be read as a checkpoint" in refusal(lambda: xcomet.load(copy))
    at = whole.index(torch.load(PUBLISHED / FILES[0], weights_only=True)["state_dict"]["hidden2tag.bias"].numpy().tobytes())
    (copy / FILES[0]).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])  # one bit: still a finite number
    assert "does not match its checksum" in refusal(lambda: xcomet.convert(copy, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    (copy / FILES[0]).write_bytes(whole)
    (copy / "tokenizer.json").write_text("{}", encoding="utf-8")
    assert "tokenizer.json cannot be read" in refusal(lambda: xcomet.convert(copy, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("values,said", [
    ({"model_type": "xlm-roberta"}, "model_type is 'xlm-roberta'"), ({"model_type": "gone"}, "model_type is None"),
    ({"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new'"), ({"is_decoder": True}, "is_decoder is True"),
    ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
    ({"num_hidden_layers": 2}, "word_layer is 3, but"), ({"num_hidden_layers": 4}, "has 3 layers, "),
    ({"num_hidden_layers": 10**6}, "no whole number"),
    ({"hidden_size": "gone"}, "hidden_size is None"), ({"hidden_size": 12}, "has shape"),
    ({"num_attention_heads": 5}, "multiple"), ({"layer_norm_eps": "x"}, "layer_norm_eps is 'x'"),
    ({"pad_token_id": 3}, "no room"),
    ({"vocab_size": 218}, "has shape"), ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
    ({"eos_token_id": 3}, "tokenizer.json does not fit config.json"), ({"type_vocab_size": True}, "type_vocab_size is True"),
    ({"pad_token_id": 0}, "tokenizer.json does not fit config.json")])
def test_configs_that_are_refused(copy, values, said):
    edit_json(copy / "config.json", **values)
    line = refusal(lambda: xcomet.load(copy))
    assert said in line and ("facebook/xlm-roberta-xl" in line or "config.json" in line)


@pytest.mark.parametrize("old,new,said", [
    ("word_layer: 3\n", "", "has no word_layer"),  # also gone from the checkpoint, below
    ("word_layer: 3", "word_layer: 9", "word_layer is 9, but"), ("word_layer: 3", "word_layer: three", "word_layer is 'three'"),
    ("- 20\n", "- 20\n- x\n", "hidden_sizes is [20, 'x', 12]"), ("- critical\n", "", "error_labels"),
    ("hidden_sizes:\n- 20\n- 12", "hidden_sizes:\n  a: 1", "hidden_sizes is None"),
    ("xcomet_metric", "regression_metric", "class_identifier is 'regression_metric'"),
    ("layer_norm: false", "layer_norm: true", "layer_norm is True"),
    ("activations: Tanh", "activations: ReLU", "activations is 'ReLU'"),
    ("final_activation: null", "final_activation: Sigmoid", "final_activation is 'Sigmoid'"),
    ("sent_layer: mix", "sent_layer: 3", "sent_layer is 3"),
    ("XLM-RoBERTa-XL", "XLM-RoBERTa", "encoder_model is 'XLM-RoBERTa'"),
    ("loss: mse", "loss mse", "is not `key: value`"), ("loss: mse", "word_layer: 3", "second time")])
def test_hparams_that_are_refused(copy, old, new, said):
    edit_checkpoint(copy, lambda saved: saved.pop("hyper_parameters") and None)
    text = (copy / "hparams.yaml").read_text(encoding="utf-8")
    assert old in text
    (copy / "hparams.yaml").write_text(text.replace(old, new), encoding="utf-8")
    line = refusal(lambda: xcomet.load(copy))
    assert said in line and "hparams.yaml" in line


def test_hparams(tmp_path):
    path = tmp_path / "hparams.yaml"
    path.write_text("---\n# said\na: 1  # one\nb: -2.5e-06\nc: true\nd: null\ne:\n- 1\n-  x y\nf: [1, 'two', 3.0]\ng: []\n"
                    "h: \"q: #\"\ni:\n  deep: 1\n  - 2\nj: a b\nk: ~\n\nl:\n  - 4\nm: .5\nn: 1.2.3\n", encoding="utf-8")
    assert xcomet_files.read_hparams(path) == {
        "a": 1, "b": -2.5e-06, "c": True, "d": None, "e": [1, "x y"], "f": [1, "two", 3.0], "g": [], "h": '"q:', "i": [2],
        "j": "a b", "k": None, "l": [4], "m": 0.5, "n": "1.2.3"}
    path.write_bytes(b"a: \xff")
    assert "cannot be read" in refusal(lambda: xcomet_files.read_hparams(path))


@pytest.mark.parametrize("what", ["sparsemax", "sparsemax_patch", "softmax"])
def test_always_softmax(copy, what):
    text = (copy / "hparams.yaml").read_text(encoding="utf-8")
    (copy / "hparams.yaml").write_text(text.replace("sparsemax_patch", what), encoding="utf-8")
    same(xcomet.parts(copy, ROWS[:9]), EXPECTED["last"][:9])


def test_converted_folders_that_are_damaged(converted, tmp_path):
    def broken(name, change):
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        shutil.copytree(converted, tmp_path / "x")
        change(tmp_path / "x" / name)
        return refusal(lambda: xcomet.score(tmp_path / "x", ROWS))

    def without(path):
        stored = load_file(path)
        del stored["hidden2tag.bias"]
        save_file(stored, path)
    cut = lambda path: path.write_bytes(path.read_bytes()[:-9])
    assert "tensor hidden2tag.bias is missing" in broken("model.safetensors", without)
    assert "cannot be read" in broken("model.safetensors", cut)
    for values in {"architectures": ["XLMRobertaXLForMaskedLM"]}, {"xcomet": "gone"}:
        assert "not that of a converted xCOMET" in broken("config.json", lambda p: edit_json(p, **values))
    assert "has no hparams.yaml" in broken("model.safetensors", Path.unlink)
    assert "tokenizer.json cannot be read" in broken("tokenizer.json", cut)
    assert "not found" in refusal(lambda: xcomet.score(tmp_path / "nowhere", ROWS))


@pytest.mark.parametrize("bad", [{}, {"src": "a"}, {"mt": "a"}, {"src": "a", "mt": None}, {"src": 1, "mt": "a"},
                                 {"src": "a", "mt": "b", "ref": ["c"]}])
def test_rows_that_are_refused(converted, bad):
    assert "row 2 must have texts" in refusal(lambda: xcomet.score(converted, [ROWS[0], bad]))


@pytest.mark.parametrize("score,tag", [(math.nan, 0.25), (math.inf, 0.25), (0.5, math.nan)])
def test_a_score_that_is_no_number(converted, monkeypatch, score, tag):
    model, _ = xcomet.scorer(str(converted), "cpu")
    monkeypatch.setattr(model, "forward", lambda ids: (torch.full((len(ids),), score), torch.full((*ids.shape, 4), tag)))
    assert "is not a number" in refusal(lambda: xcomet.score(converted, ROWS))


def test_half_a_surrogate_pair(converted):
    broken, mark = ({"src": "a", "mt": f"Guten {c} Morgen"} for c in ("\ud83d", "?"))
    assert xcomet.score(converted, [broken]) == xcomet.score(converted, [mark])
