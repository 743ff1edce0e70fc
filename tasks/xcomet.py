"""
xCOMET, the learned metric of translation: Guerreiro et al. 2023, arXiv 2310.10482. An encoder (XLM-RoBERTa-XL, Goyal et al.
2021, arXiv 2105.00572) reads the translation joined to its source, to a reference, and to both; each of the three passes
gives a score and tags every token of the translation as good or as part of a minor, major or critical error. What is
reported is a weighted mean of the three scores and of an MQM score that counts the tagged spans.

    score("XCOMET-XL", [{"src": "Good morning", "mt": "Guten Tag", "ref": "Guten Morgen"}], "cuda")    # [0.9...]; ref may lack

The weights are Unbabel's, published for research (CC-BY-NC-SA-4.0; log in and accept it first). Fetch them and, into the
same folder, two files of the encoder that they are a fine-tuning of, and convert once, to a folder that holds everything:

    hf download Unbabel/XCOMET-XL --local-dir XCOMET-XL-published                     # hparams.yaml, checkpoints/model.ckpt
    hf download facebook/xlm-roberta-xl config.json tokenizer.json --local-dir XCOMET-XL-published
    python -m tasks.xcomet --convert XCOMET-XL-published --out XCOMET-XL              # --bf16: half as large

XCOMET-XXL is the same with facebook/xlm-roberta-xxl: its sizes are in the files. tests/test_xcomet.py holds this file to what
unbabel-comet 2.2.7 computes with a tiny model of random weights. The real checkpoints (14 and 43 GB, gated) have NOT been run
through it, nor has bfloat16 been compared with float32 on them; nobody's system scores should rest on it before they have.

Known of the metric: long texts score lower (the joint row is cut at 512 tokens, and MQM counts errors per segment, however
long; unbabel-comet issue 239), so score sentence by sentence. A system's score is the mean of its segments'.
"""

import functools
import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn

import common
from checkpoint import INDEX, Checkpoint
from common import die, parse_config, print0
from data import token_batches
from model import fill
from tasks.xcomet_files import ARCHITECTURE, Published, convert, read_tokenizer, sizes
from tasks.xcomet_model import SEVERITIES, XComet, empty

POINTS = {"minor": 1, "major": 5, "critical": 10}  # MQM's penalty of one span; 25 points are as bad as it gets
WORST = 25
SCORE_WEIGHTS = (0.12, 0.33, 0.33)  # of [mt; src], [mt; ref] and [mt; src; ref]
MQM_WEIGHT = 0.22
TAG_WEIGHTS = (0.1667, 0.3333, 0.5)  # of the three passes' tag probabilities


@dataclass
class Config:
    convert: str  # folder with hparams.yaml, checkpoints/model.ckpt, config.json and tokenizer.json
    out: str  # the folder to write: model.safetensors in parts, config.json, tokenizer.json
    bf16: bool = False  # the encoder in bfloat16, which is what a GPU computes in; the heads stay float32


def load(folder, device="cpu", dtype=None):
    """A folder, converted or as published -> (XComet, Tokenizer). `dtype`: the encoder's, None for bf16 on a GPU and fp32
    elsewhere; the heads are fp32. Ends with one line if the folder is missing, damaged, or of something else."""
    folder = Path(folder)
    if not folder.is_dir():
        die(f"xCOMET folder {folder} not found; tasks/xcomet.py says at its top how to fetch and convert it")
    if (folder / "model.safetensors").exists() or (folder / INDEX).exists():
        stored, where = Checkpoint(folder), folder / "config.json"
        if stored.architectures() != [ARCHITECTURE] or not isinstance(stored.config.get("xcomet"), dict):
            die(f"{where} is not that of a converted xCOMET: `python -m tasks.xcomet --convert DIR --out {folder}` writes one")
        cfg = sizes(stored.config, stored.config["xcomet"], where, where)
    else:
        stored = Published(folder)
        cfg = stored.cfg
    tokenizer = read_tokenizer(folder, cfg)
    dtype = dtype or (torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32)
    return fill(empty(cfg), stored, dtype, device, wrap=XComet.heads_in_fp32).eval(), tokenizer


@functools.lru_cache(maxsize=1)  # one model in memory: the XL is 7 GB on a GPU
def scorer(folder, device):
    return load(folder, device)


def joint_rows(encoded, cfg, row):
    """Token ids of [mt; src], and where there is a reference of [mt; ref] and [mt; src; ref]: <s> A </s></s> B </s>."""
    part = {key: [i for i in encoded[row[key]].ids[1:-1] if i != cfg.pad_token_id] for key in row}  # "<pad>" in a text goes

    def join(*keys):
        ids = [cfg.bos_token_id, *part[keys[0]]]
        for key in keys[1:]:
            ids += [cfg.eos_token_id, cfg.eos_token_id, *part[key]]
        return [*ids, cfg.eos_token_id][:cfg.longest]
    return [join("mt", "src")] + ([join("mt", "ref"), join("mt", "src", "ref")] if "ref" in row else [])


def find_spans(probabilities, offsets):
    """
    Tag probabilities (T, 4) and [(begin, end)] of the tokens of mt, <s> and </s> among them, in characters -> the error spans.
    Neighbours are one span, whose severity is its first token's. One that is still open at the end is dropped, so an error on
    </s> counts nothing: that is unbabel-comet's rule, and published scores rest on it.
    """
    spans, span = [], None
    for p, (begin, end) in zip(probabilities.tolist(), offsets):
        label = max(range(len(p)), key=p.__getitem__)
        if label and span is None:
            span = {"start": begin, "end": end, "severity": SEVERITIES[label - 1], "confidence": [p[label]]}
        elif label:
            span["end"] = end
            span["confidence"].append(p[label])
        elif span:
            spans.append(span | {"confidence": sum(span["confidence"]) / len(span["confidence"])})
            span = None
    return spans


def combine(scores, tags, offsets):
    """What the one or three passes gave, (score, tag probabilities (T, 4)) each, -> the parts of a row's score."""
    with_ref = len(scores) == 3
    weights = SCORE_WEIGHTS if with_ref else [sum(SCORE_WEIGHTS)]
    n = min(len(offsets), *(len(t) for t in tags))
    mixed = sum(w * t[:n] for w, t in zip(TAG_WEIGHTS, tags)) if with_ref else tags[0][:n]
    spans = find_spans(mixed, offsets)
    mqm = 1 - min(WORST, sum(POINTS[span["severity"]] for span in spans)) / WORST
    total = sum(w * min(1.0, s) for w, s in zip(weights, scores)) + MQM_WEIGHT * mqm
    return {"score": total, **dict(zip(("src", "ref", "full"), scores)), "mqm": mqm, "spans": spans}


@torch.no_grad()
def run(model, rows, batch_tokens, device):
    """Lists of token ids -> [(score, tag probabilities (T, 4))], in order; they are batched by length."""
    outputs = [None] * len(rows)
    for batch in token_batches([len(ids) for ids in rows], batch_tokens):
        ids = [torch.tensor(rows[i]) for i in batch]
        ids = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=model.cfg.pad_token_id)
        scores, tags = model(ids.to(device))
        for i, s, t in zip(batch, scores.tolist(), tags.cpu()):
            outputs[i] = s, t[:len(rows[i])]
    return outputs


def parts(folder, rows, device="cpu", batch_tokens=8192):
    """
    Rows {"src", "mt", "ref"} -> for each, in order, {"score", "src", "ref", "full", "mqm", "spans"}: the score (1 is perfect,
    it may be negative), the three passes' own, not yet cut at 1 (src alone without a ref: quality estimation), MQM in [0, 1],
    and spans [{"start", "end" in characters of mt, "severity", "confidence", "text"}].

    Equal rows are computed once; rows are split over the ranks and every rank gets all. `batch_tokens`: of one forward, padding
    included. What else is in the batch changes a result by no more than rounding: 1e-6 in fp32 (in bf16 it has not been
    measured). Ends with one line if a row lacks a text, or the model gives what is no number.
    """
    model, tokenizer = scorer(str(folder), str(device))
    keys = []
    for n, row in enumerate(rows, 1):
        key = (row.get("src"), row.get("mt"), *([row["ref"]] if row.get("ref") is not None else []))
        if not all(isinstance(text, str) for text in key):
            die(f"xCOMET: row {n} must have texts src and mt, and ref or none: {str(row)[:100]}")
        keys.append(key)
    mine = [dict(zip(("src", "mt", "ref"), key)) for key in list(dict.fromkeys(keys))[common.rank()::common.world()]]
    texts = list(dict.fromkeys(text for row in mine for text in row.values()))
    # half a surrogate pair, which a model may write and no tokenizer reads, becomes "?": one character, so offsets stay
    encoded = dict(zip(texts, tokenizer.encode_batch([text.encode("utf-8", "replace").decode("utf-8") for text in texts])))
    joint = [joint_rows(encoded, model.cfg, row) for row in mine]
    outputs = iter(run(model, [ids for passes in joint for ids in passes], batch_tokens, device))
    found = []
    for row, passes in zip(mine, joint):
        scores, tags = zip(*itertools.islice(outputs, len(passes)))
        result = combine(scores, tags, encoded[row["mt"]].offsets)
        for span in result["spans"]:
            span["text"] = row["mt"][span["start"]:span["end"]]
        whole = all(map(math.isfinite, scores)) and all(t.isfinite().all() for t in tags)
        found.append((tuple(row.values()), result if whole else None))
    found = dict(common.gather_list(found))
    if broken := [key for key, result in found.items() if result is None]:  # every rank says so, none waits for another
        die(f"the xCOMET of {broken[0][1][:60]!r} is not a number: {folder} is damaged")
    return [found[key] for key in keys]


def score(folder, rows, device="cpu", batch_tokens=8192):
    """[xCOMET of each row]: parts() without the parts. A system's score is their mean."""
    return [result["score"] for result in parts(folder, rows, device, batch_tokens)]


def main(cfg):
    convert(cfg.convert, cfg.out, cfg.bf16)
    print0(f"{cfg.convert} -> {cfg.out}")


if __name__ == "__main__":
    main(parse_config(Config))
