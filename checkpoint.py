"""
Checkpoint folders as the Hugging Face libraries write them, on disk: read and written one tensor at a time.

A folder holds config.json, model.safetensors (or several shards and model.safetensors.index.json) and the tokenizer's
files. A safetensors file is 8 bytes of length, that many bytes of JSON (name -> dtype, shape, place), then the tensors'
bytes; so a reader can go straight to any row of any tensor, and a writer knows the whole header before it has a single
tensor. Nothing is ever unpickled. Format: https://huggingface.co/docs/safetensors
"""

import json
import math
import os
import re
import shutil
import struct
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from common import barrier, die, is_main

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
CHUNK = 1 << 24  # bytes read at once: what a load needs beside the model
SHARD = 5 * 10**9  # bytes of tensors in one file, Hugging Face's habit
CARRIED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
           "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja",
           "generation_config.json")  # files that travel with the weights
INDEX = "model.safetensors.index.json"


def find(name):
    """
    A local folder, or a hub name such as "CohereLabs/aya-expanse-8b", which huggingface_hub fetches into its cache ->
    Path. Ends with one line if neither works. On several ranks the first one of each machine fetches.
    """
    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", str(name)) or str(name).split("/")[0] in ("out", "."):
        die(f"checkpoint {name} not found: give a folder, a hub name such as CohereLabs/aya-expanse-8b, or make the "
            "miniature's with `python recipe.py`")
    import huggingface_hub
    local_rank, folder = int(os.environ.get("LOCAL_RANK", 0)), None
    for turn in range(2):  # the first rank of a machine, then the others, who find everything in the cache
        if turn == min(local_rank, 1):
            try:
                folder = huggingface_hub.snapshot_download(str(name), allow_patterns=[
                    "*.json", "model*.safetensors", "*.jinja", "tokenizer.model", "merges.txt"])
            except Exception as e:  # many kinds: offline, no such model, a licence to accept, a broken connection
                reason = (str(e).strip() or type(e).__name__).splitlines()[0]
                die(f"{name} is no folder here and could not be fetched from the hub ({reason}); on a machine with a "
                    f"network run `hf download {name} --local-dir DIR` (and `hf auth login` if the model asks for it), "
                    "then give DIR")
        barrier()
    return Path(folder)


def read_json(path):
    """The object in a UTF-8 JSON file."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        die(f"{path} not found: a checkpoint is a folder with config.json and model.safetensors")
    except json.JSONDecodeError as e:
        die(f"{path}:{e.lineno} is not JSON: {e.msg}; copy it again")
    except (OSError, ValueError, RecursionError) as e:
        die(f"{path} cannot be read ({e}); copy it again")
    return value if isinstance(value, dict) else die(f"{path} holds no JSON object; copy it again")


def finite(x):
    """No NaN, no infinity. Any of them shows in the sum, which is many times as fast to look at."""
    return math.isfinite(x.sum().item()) or bool(x.isfinite().all())


class Checkpoint:
    """
    A folder's config.json and the headers of its safetensors files: `table` name -> (shape, torch.dtype), `file` name
    -> file name. A tensor's bytes are read when it is asked for. Ends with one line if the folder is damaged.
    """

    def __init__(self, folder):
        self.folder, self.table, self.file, self.begin, self.path, where = Path(folder), {}, {}, {}, {}, {}
        if not self.folder.is_dir():
            die(f"checkpoint {folder} not found: give a local folder (`hf download NAME --local-dir DIR` fetches one)")
        self.config, index = read_json(self.folder / "config.json"), self.folder / INDEX
        if (self.folder / "model.safetensors").exists():
            pass  # it goes before an index, in transformers too
        elif index.exists():
            where = read_json(index).get("weight_map")
            if not where or not isinstance(where, dict):
                die(f"{index} is damaged: it has no weight_map; copy it again")
            for name, file in where.items():
                if not re.fullmatch(r"[^/\\:]+\.safetensors", str(file)):
                    die(f"{index}: tensor {name} lies in {file!r}, which is no safetensors file of this folder")
        else:
            others = sorted(p.name for suffix in ("bin", "pt", "pth", "gguf") for p in self.folder.glob(f"*.{suffix}"))
            die(f"{self.folder} holds no model.safetensors" + (f" but {others[0]}" if others else ", it is missing") + ": weights are "
                "read as safetensors only, nothing is unpickled; convert it, or fetch the safetensors version")
        for file in sorted(set(where.values())) or ["model.safetensors"]:
            for name, entry in self._header(file).items():
                if entry["dtype"] not in DTYPES:
                    die(f"{self.folder / file}: tensor {name} is stored as {entry['dtype']}, which is not read here; "
                        "convert it to bfloat16")
                if where and where.get(name) != file:
                    die(f"{self.folder / file}: tensor {name} is surplus, in the index it is "
                        f"{where.get(name, 'nowhere')}; copy the folder again")
                self.table[name], self.file[name] = (tuple(entry["shape"]), DTYPES[entry["dtype"]]), file
                self.begin[name], self.path[name] = entry["data_offsets"][0], str(self.folder / file)
        for name in sorted(where.keys() - self.table.keys()):
            die(f"{self.folder / where[name]}: tensor {name} of the index is missing; copy the folder again")

    def _header(self, file):
        """name -> {"dtype", "shape", "data_offsets": [begin, end] in the file}, after safetensors has checked it all."""
        try:
            with safe_open(self.folder / file, framework="pt"):  # lengths, overlaps, holes, truncation
                pass
            with open(self.folder / file, "rb") as f:
                size, = struct.unpack("<Q", f.read(8))
                header = json.loads(f.read(size))
        except (SafetensorError, OSError) as e:
            die(f"{self.folder / file} cannot be read ({e}): missing, damaged or unfinished; copy it again")
        header.pop("__metadata__", None)
        for entry in header.values():
            entry["data_offsets"] = [8 + size + offset for offset in entry["data_offsets"]]
        return header

    def architectures(self):
        """config.json's list of class names; often one, empty if it has none."""
        names = self.config.get("architectures") or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            die(f"{self.folder / 'config.json'}: architectures {names!r} is no list of names")
        return names

    def read_into(self, name, out, row=0):
        """
        Reads rows row .. row + len(out) of a tensor straight into `out`, of any dtype and on any device, CHUNK bytes at
        a time: no second copy of the tensor exists. Ends with one line on NaN or infinity.
        """
        shape, dtype = self.table[name]
        flat, per_row = out.detach().view(-1), math.prod(shape[1:])
        direct = out.device.type == "cpu" and out.dtype == dtype
        step = CHUNK // dtype.itemsize
        buffer = None if direct else torch.empty(min(step, flat.numel()), dtype=dtype)
        for i in range(0, flat.numel(), step):
            to = flat[i:i + step]
            chunk = to if direct else buffer[:to.numel()]
            self.pread(name, chunk, row * per_row + i)
            if not direct:
                to.copy_(chunk)
            if dtype.is_floating_point and not finite(to):
                if finite(chunk):
                    die(f"{self.folder / self.file[name]}: tensor {name} holds values too large for {out.dtype}; "
                        "load it as bfloat16 or float32")
                self.not_finite(name)

    def not_finite(self, name):
        die(f"{self.folder / self.file[name]}: tensor {name} holds NaN or infinity: the checkpoint is broken; leave it "
            "out")

    def same(self, name, other):
        """Do two tensors hold the same bytes? Read chunk by chunk: either may be 4 GB."""
        (shape, dtype), step = self.table[name], CHUNK // self.table[name][1].itemsize
        n, chunks = math.prod(shape), torch.empty(2, step, dtype=dtype)
        if self.table[other] != (shape, dtype):
            return False
        for i in range(0, n, step):
            a, b = (chunk[:n - i] for chunk in chunks)
            self.pread(name, a, i)
            self.pread(other, b, i)
            if not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
                return False
        return True

    def pread(self, name, out, begin=0):
        """
        Fills `out`, a contiguous 1-D CPU tensor of the stored dtype, with the tensor's elements from `begin` on. Several
        threads may read at once. No mapping: mapped pages would count as this process's memory.
        """
        view, at = memoryview(out.view(torch.uint8).numpy()), self.begin[name] + begin * out.dtype.itemsize
        fd = os.open(self.path[name], os.O_RDONLY)
        try:
            while view:  # a read may be cut short, a file must not be
                n = os.preadv(fd, [view], at)
                if not n:
                    die(f"{self.folder / self.file[name]} ends inside tensor {name}: it has changed; copy it again")
                view, at = view[n:], at + n
        except OSError as e:
            die(f"{self.folder / self.file[name]} cannot be read ({e.strerror}) inside tensor {name}; copy it again")
        finally:
            os.close(fd)


def safetensors_header(table):
    """table: name -> (shape, dtype), in the order in which the data will follow -> 8 bytes of length and the JSON."""
    header, at, codes = {"__metadata__": {"format": "pt"}}, 0, {dtype: code for code, dtype in DTYPES.items()}
    for name, (shape, dtype) in table.items():
        end = at + math.prod(shape) * dtype.itemsize
        header[name], at = {"dtype": codes[dtype], "shape": shape, "data_offsets": [at, end]}, end
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
    return struct.pack("<Q", len(text)) + text


def write_index(folder, table, file):
    """The index of a sharded checkpoint: what makes its files one. file: name -> file name."""
    total = sum(math.prod(shape) * dtype.itemsize for shape, dtype in table.values())
    index = {"metadata": {"total_size": total}, "weight_map": {name: file[name] for name in table}}
    (Path(folder) / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def write_weights(folder, table, whole, limit=SHARD):
    """
    Writes model.safetensors, or shards of at most `limit` bytes and their index, into an existing folder. table: name
    -> (shape, dtype); whole(name): the tensor, asked for once each, in order, on all ranks (it may be a collective).
    """
    names = sorted(table, key=lambda name: -table[name][1].itemsize)  # the widest first: every tensor is aligned
    shards, size = [[]], 0
    for name in names:
        n = math.prod(table[name][0]) * table[name][1].itemsize
        if shards[-1] and size + n > limit:
            shards, size = shards + [[]], 0
        shards[-1].append(name)
        size += n
    file = {name: "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            for i, shard in enumerate(shards, 1) for name in shard}
    for shard in shards:
        with open(Path(folder) / file[shard[0]] if is_main() else os.devnull, "wb") as f:
            f.write(safetensors_header({name: table[name] for name in shard}))
            for name in shard:
                tensor = whole(name)
                if is_main():
                    tensor = tensor.detach().to(device="cpu", dtype=table[name][1]).contiguous()
                    f.write(tensor.view(-1).view(torch.uint8).numpy())
    if is_main() and len(shards) > 1:
        write_index(folder, table, file)


def carry(source, folder):
    """Copies the tokenizer's files, the chat template and generation_config.json, byte for byte."""
    source = find(source)
    for path in (path for pattern in CARRIED for path in source.glob(pattern)):
        to = Path(folder) / path.relative_to(source)
        to.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, to)
