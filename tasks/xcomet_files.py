"""
xCOMET's folders: as Unbabel publishes them (hparams.yaml and a pickle of tensors, with two files of the encoder beside them),
and the one of safetensors that convert() makes of it. tasks/xcomet.py says where the files come from.
"""

import json
import re
import shutil
import zipfile
from dataclasses import fields
from pathlib import Path

import torch
from tokenizers import Tokenizer

from checkpoint import finite, read_json, write_weights
from common import atomic_dir, die, is_main
from tasks.xcomet_model import SEVERITIES, Sizes, empty

ARCHITECTURE = "XCOMETMetric"


def scalar(text):
    """A YAML scalar, as far as hparams.yaml has them."""
    text = text.strip()
    if text[:1] in "'\"" and text[-1:] == text[:1] and len(text) > 1:
        return text[1:-1]
    for kind in (int, float):
        if re.fullmatch(r"[-+.\d][\d.eE+-]*", text):
            try:
                return kind(text)
            except ValueError:
                pass
    return {"true": True, "false": False, "null": None, "~": None, "": None, "[]": []}.get(text.lower(), text)


def read_hparams(path):
    """The top level of hparams.yaml: `key: scalar`, and lists of scalars, one to a line or in brackets. What is nested deeper
    is not read (nothing that is needed is), and any other line ends the program."""
    values, key = {}, None
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as e:
        die(f"{path} cannot be read ({e}): `hf download Unbabel/XCOMET-XL --local-dir {path.parent}`")
    for n, line in enumerate(lines, 1):
        line = re.sub(r"(^|\s)#.*", "", line).rstrip()
        if line in ("", "---", "..."):
            continue
        if found := re.fullmatch(r"([\w.-]+):(?:\s+(.+))?", line):
            key, value = found.groups()
            if key in values:
                die(f"{path}:{n} says {key} a second time")
            brackets = re.fullmatch(r"\[(.+)\]", value or "")
            values[key] = [scalar(v) for v in brackets[1].split(",")] if brackets else scalar(value or "")
        elif (found := re.fullmatch(r"\s*-\s+(.+)", line)) and key and (values[key] is None or isinstance(values[key], list)):
            values[key] = (values[key] or []) + [scalar(found[1])]
        elif not (key and line[0] == " "):
            die(f"{path}:{n} is not `key: value` or `- value`: {line[:60]!r}")
    return values


ONLY_CONFIG = {"model_type": "xlm-roberta-xl", "hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False}
ONLY_HPARAMS = {"class_identifier": "xcomet_metric", "encoder_model": "XLM-RoBERTa-XL", "sent_layer": "mix",
                "layer_norm": False, "activations": "Tanh", "final_activation": None}
NEEDED = ("word_layer", "hidden_sizes")
SAME = ("config.json and tokenizer.json must be those of the encoder that this xCOMET is made of: facebook/xlm-roberta-xl for "
        "XCOMET-XL, -xxl for XCOMET-XXL")


def sizes(config, hparams, where, hparams_path):
    """config.json's and hparams.yaml's values -> Sizes. Ends with one line on what is missing or would change the numbers."""
    for key in (*ONLY_HPARAMS, *NEEDED):
        if key not in hparams:
            die(f"{hparams_path} has no {key}: it is not xCOMET's, or not whole; fetch it again")
    for values, only, path in ((config, ONLY_CONFIG, where), (hparams, ONLY_HPARAMS, hparams_path)):
        for key, good in only.items():
            if values.get(key, good if key != "model_type" else None) != good:
                die(f"{path}: {key} is {values.get(key)!r}, which is not supported: xCOMET's is {good!r}")
    if hparams.get("error_labels", list(SEVERITIES)) != list(SEVERITIES):
        die(f"{hparams_path}: error_labels {hparams['error_labels']!r} are not {list(SEVERITIES)}")
    values = {}
    for f in fields(Sizes):
        path, value = (hparams_path, hparams[f.name]) if f.name in NEEDED else (where, config.get(f.name))
        whole = lambda v: type(v) is int and 0 <= v < (1000 if f.name == "num_hidden_layers" else 2**31)
        good = (isinstance(value, list) and value and all(whole(v) and v for v in value) if f.type is list else
                type(value) is float and 0 < value < 1 if f.type is float else
                whole(value) and (value > 0 or f.name == "word_layer" or f.name.endswith("token_id")))
        values[f.name] = value if good else die(f"{path}: {f.name} is {value!r}, which is no " + (
            "list of widths" if f.type is list else "small number" if f.type is float else "whole number"))
    cfg = Sizes(**values)
    if cfg.hidden_size % cfg.num_attention_heads:
        die(f"{where}: hidden_size {cfg.hidden_size} must be a multiple of num_attention_heads {cfg.num_attention_heads}")
    if cfg.longest < 8 or cfg.pad_token_id > 1:  # a row of `longest` tokens has positions pad + 1 .. pad + longest
        die(f"{where}: max_position_embeddings {cfg.max_position_embeddings} and pad_token_id {cfg.pad_token_id} leave no room "
            "for positions")
    if cfg.word_layer > cfg.num_hidden_layers:
        die(f"{hparams_path}: word_layer is {cfg.word_layer}, but {where} has {cfg.num_hidden_layers} layers: {SAME}")
    return cfg


# of training and of other versions of transformers: no part of what is computed
UNUSED = re.compile(r"layerwise_attention\.dropout_(mask|fill)|wordloss\.weight|"
                    r"encoder\.model\.(embeddings\.(position_ids|token_type_ids)|pooler\..*)")


class Published:
    """
    The folder as Unbabel publishes it, with the same face as checkpoint.Checkpoint. model.ckpt is a pickle, the only one in
    this project: torch reads it with weights_only, so it can make tensors and plain containers and nothing that runs. Its
    tensors are mapped, not read, until they are asked for.
    """

    def __init__(self, folder):
        self.folder, path = Path(folder), Path(folder) / "checkpoints" / "model.ckpt"
        for name in ("hparams.yaml", "checkpoints/model.ckpt", "config.json", "tokenizer.json"):
            if not (self.folder / name).is_file():
                what = ("facebook/xlm-roberta-xl config.json tokenizer.json" if name.endswith(".json") else "Unbabel/XCOMET-XL")
                die(f"{self.folder} has no {name}; `hf download {what} --local-dir {self.folder}` fetches it (-XXL and -xxl "
                    "for the larger one)")
        try:
            if not zipfile.is_zipfile(path):
                raise ValueError("it is no zip archive, or has no end")
            saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as e:  # unpickling what is damaged fails in any way there is
            code = re.search(r"GLOBAL (\S+)", str(e))
            reason = (f"it names the code {code[1]}, and nothing of a checkpoint is run here" if code else
                      (str(e).strip() or type(e).__name__).splitlines()[0][:200])
            die(f"{path} cannot be read as a checkpoint of tensors ({reason}); fetch it again")
        tensors = saved.get("state_dict") if isinstance(saved, dict) else None
        if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
            die(f"{path} has no state_dict of tensors: it is not what unbabel-comet saves")
        own, said = saved.get("hyper_parameters") or {}, read_hparams(self.folder / "hparams.yaml")
        # unbabel-comet takes the class from the file, and all else from what is saved in the checkpoint
        own = {key: own[key] for key in (*NEEDED, *ONLY_HPARAMS) if key in own and key != "class_identifier"}
        for key in own:
            if own[key] != said.get(key, own[key]):
                die(f"{path} was saved with {key} {own[key]!r}, but hparams.yaml above it says {said[key]!r}; fetch both again")
        hparams = own | said
        self.config = read_json(self.folder / "config.json")
        self.cfg = sizes(self.config, hparams, self.folder / "config.json", self.folder / "hparams.yaml")
        self.hparams = {key: hparams[key] for key in (*ONLY_HPARAMS, *NEEDED)}
        self.tensors = {name: t for name, t in tensors.items() if not UNUSED.fullmatch(name)}
        self.table = {name: (tuple(t.shape), t.dtype) for name, t in self.tensors.items()}
        self.file = dict.fromkeys(self.table, "checkpoints/model.ckpt")
        self.begin = {name: i for i, name in enumerate(self.table)}
        self.check(path)

    def check(self, path):
        """Every tensor of the model is there, in its shape, and no other."""
        layers = {int(n) for name in self.table for n in re.findall(r"^encoder\.model\.encoder\.layer\.(\d+)\.", name)}
        if len(layers) != self.cfg.num_hidden_layers:
            die(f"{path} has {len(layers)} layers, {self.folder / 'config.json'} says {self.cfg.num_hidden_layers}: {SAME}")
        own = {name: tuple(p.shape) for name, p in empty(self.cfg).named_parameters()}
        for name in sorted(own.keys() | self.table.keys()):
            if name not in self.table or name not in own:
                die(f"{path}: tensor {name} is {'missing' if name in own else 'not part of xCOMET'}")
            if own[name] != self.table[name][0]:
                die(f"{path}: tensor {name} has shape {self.table[name][0]}, config.json and hparams.yaml say {own[name]}")
            if not self.table[name][1].is_floating_point:
                die(f"{path}: tensor {name} holds {self.table[name][1]}, which are no weights")

    def read_into(self, name, out, row=0):
        out.copy_(self.tensors[name])
        if not finite(out):
            die(f"{self.folder / self.file[name]}: tensor {name} holds NaN or infinity, or what {out.dtype} cannot hold")


def is_encoder(name):
    return name.startswith("encoder.")


def convert(folder, out, bf16=False):
    """The published folder -> one of safetensors, 5 GB a part, which appears only when it is whole. Memory: the mapped
    checkpoint, which the system may drop again, and one tensor. Reads every byte against the archive's checksums first."""
    config = Path(out) / "config.json"
    if Path(out).exists() and not (config.is_file() and read_json(config).get("architectures") == [ARCHITECTURE]):
        die(f"--out {out} is there and is no converted xCOMET: give another name; what is there would be lost")
    stored = Published(folder)
    with zipfile.ZipFile(stored.folder / "checkpoints" / "model.ckpt") as archive:
        if bad := broken_member(archive):
            die(f"{archive.filename}: {bad} does not match its checksum: damaged; fetch it again")
    dtype = lambda name: torch.bfloat16 if bf16 and is_encoder(name) else torch.float32
    table = {name: (shape, dtype(name)) for name, (shape, _) in stored.table.items()}

    def whole(name):
        tensor = torch.empty(table[name][0], dtype=table[name][1])
        stored.read_into(name, tensor)
        return tensor
    with atomic_dir(out) as partial:
        if is_main():
            shutil.copyfile(stored.folder / "tokenizer.json", partial / "tokenizer.json")
            config = stored.config | {"architectures": [ARCHITECTURE], "xcomet": stored.hparams}
            (partial / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        read_tokenizer(partial if is_main() else stored.folder, stored.cfg)
        write_weights(partial, table, whole)


def broken_member(archive):
    """The first member of a zip archive that its checksum does not fit, or None."""
    try:
        return archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError) as e:
        return str(e)


def read_tokenizer(folder, cfg):
    """tokenizer.json, told to cut a text at `longest` - 2 tokens with its <s> and </s>, as unbabel-comet does."""
    path = Path(folder) / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as e:  # the library raises nothing narrower
        die(f"{path} cannot be read ({str(e).splitlines()[0]}); fetch it again from facebook/xlm-roberta-xl (-xxl)")
    tokenizer.no_padding()
    tokenizer.enable_truncation(cfg.longest - 2)
    special, size = [*tokenizer.encode("").ids, tokenizer.token_to_id("<pad>")], tokenizer.get_vocab_size()
    if special != [cfg.bos_token_id, cfg.eos_token_id, cfg.pad_token_id] or size > cfg.vocab_size:
        die(f"{path} does not fit config.json: <s>, </s> and <pad> are {special}, and there are {size} tokens; {SAME}")
    return tokenizer
