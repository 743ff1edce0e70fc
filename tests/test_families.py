"""
Every family of models against transformers, on the tiny checkpoints that it wrote (fixtures/make_families.py says how),
and what the shared code must do for all of them. The mutants at the end break one flag each.

    python -m pytest tests/test_families.py
"""

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import checkpoint
import tiny
from cache import KVCache
import model as model_file
from checkpoint import Checkpoint
from config import Config
from generate import generate
from model import Transformer, load, save
from reward import load_reward_model

HERE = Path(__file__).resolve().parent / "fixtures" / "families"
REWARD = sorted(p.name for p in HERE.iterdir() if p.name.endswith("_rm"))
CAUSAL = sorted(p.name for p in HERE.iterdir() if not p.name.endswith("_rm"))
CLOSE = {torch.float32: 3e-5, torch.float64: 1e-12}  # of an output's largest value


def recorded(name):
    return load_file(HERE / name / "expected.safetensors")


def difference(model, expected):
    """The largest difference to transformers over all layers, the final norm and the logits, relative to each."""
    suffix = ".float64" if model.head.dtype == torch.float64 else ""
    expected = {key.removesuffix(suffix): x for key, x in expected.items()
                if key.endswith(".float64") == bool(suffix) or key == "ids"}
    seen = tiny.outputs(model, expected["ids"])
    assert seen.keys() == expected.keys() - {"ids", "greedy"}
    return max(((out - expected[key]).abs().max() / expected[key].abs().max()).item() for key, out in seen.items())


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("name", CAUSAL)
def test_every_layer_equals_transformers(name, dtype):
    assert difference(load(HERE / name, dtype), recorded(name)) < CLOSE[dtype]


@pytest.mark.parametrize("name", CAUSAL)
def test_greedy_equals_transformers_alone_and_batched(name):
    expected, model = recorded(name), load(HERE / name)
    row, tokens = expected["ids"][0].tolist(), expected["greedy"].tolist()
    prompts = [row[:3], row[:9], row]  # windows are 5 or 6 tokens long
    assert generate(model, prompts, 12) == [[t] for t in tokens]
    assert [generate(model, [p], 12)[0] for p in prompts] == [[t] for t in tokens]


@pytest.mark.parametrize("name", CAUSAL)
def test_padded_packed_and_cached_rows_equal_single_rows(name):
    model, (a, b, c) = load(HERE / name, torch.float64), recorded(name)["ids"].tolist()
    rows = [a, b[:7], c[:12]]
    alone = [model(torch.tensor([row]))[0] for row in rows]
    padded = model(torch.tensor([row + [3] * (19 - len(row)) for row in rows]))
    starts = torch.tensor([[0] * 19 + [19] * 7 + [26] * 12], dtype=torch.int32)
    packed = model(torch.tensor([sum(rows, [])]), doc_start=starts)[0].split([19, 7, 12])
    cache = KVCache(model.cfg, 1, 19, torch.float64, "cpu")
    cache.begin_fill([8], [[0]])
    parts = [model.hidden(torch.tensor([a[:8]]), cache=cache)]
    for t in a[8:]:
        cache.begin_step(1)
        parts.append(model.hidden(torch.tensor([[t]]), cache=cache))
        cache.length += 1
    for row, single, pad, pack in zip(rows, alone, padded, packed):
        assert torch.allclose(pad[:len(row)], single, atol=1e-9) and torch.allclose(pack, single, atol=1e-9)
    assert torch.allclose(model.logits(torch.cat(parts, 1))[0], alone[0], atol=1e-9)


@pytest.mark.parametrize("name", ["gemma2", "qwen2_window", "llama"])
def test_token_logps_are_the_logits_log_softmax(name):
    model, ids = load(HERE / name), recorded(name)["ids"]
    mask = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.6
    expected = model(ids)[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0] * mask[:, 1:]
    found, weights = model.token_logps(ids, mask), torch.linspace(-1, 2, 54).view(3, 18)
    assert torch.allclose(found, expected, atol=1e-4)
    grads = [torch.autograd.grad((x * weights).sum(), list(model.parameters())) for x in (found, expected)]
    for (key, _), x, y in zip(model.named_parameters(), *grads):
        assert torch.allclose(x, y, atol=1e-4 * y.abs().max().item() + 1e-6), key


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("name", CAUSAL)
def test_saved_and_loaded_bit_for_bit(name, sharded, tmp_path, monkeypatch):
    if sharded:
        monkeypatch.setattr(checkpoint.write_weights, "__defaults__", (5000,))
    model = load(HERE / name)
    save(model, tmp_path / "out")
    again = load(tmp_path / "out")
    assert again.cfg == model.cfg and again.cfg.raw["architectures"] == model.cfg.raw["architectures"]
    for key, p in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], p), key
    files = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert "generation_config.json" in files and ("model.safetensors.index.json" in files) == sharded
    if sharded:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text(encoding="utf-8"))
        assert len(set(index["weight_map"].values())) > 1
        assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in model.parameters())
        biggest = max(4 * p.numel() for p in model.parameters())
        assert all((tmp_path / "out" / f).stat().st_size < 5000 + biggest for f in files if f.endswith("safetensors"))


@pytest.mark.parametrize("name", CAUSAL)
def test_a_config_made_of_fields_alone_is_written_and_read_again(name, tmp_path):
    cfg = dataclasses.replace(load(HERE / name).cfg, raw={})
    model = Transformer(cfg).init_weights(3)
    save(model, tmp_path / "out")
    assert load(tmp_path / "out").cfg == cfg
    ids = recorded(name)["ids"]
    assert torch.equal(load(tmp_path / "out")(ids), model(ids))


def test_old_spelling_of_cohere2(tmp_path):
    """As Command R7B's file on the hub: transformers 4's keys, and some that transformers ignores."""
    shutil.copytree(HERE / "cohere2", tmp_path / "old")
    raw = json.loads((tmp_path / "old" / "config.json").read_text(encoding="utf-8"))
    rope = raw.pop("rope_parameters")
    del raw["layer_types"], raw["dtype"]
    raw |= {"rope_theta": rope["rope_theta"], "torch_dtype": "float32", "sliding_window_pattern": 4, "layer_switch": 4,
            "order_of_interleaved_layers": "local_attn_first", "position_embedding_type": "rope_gptj",
            "rotary_pct": 1.0, "use_parallel_block": True, "use_gated_activation": True, "use_embedding_sharing": True,
            "cache_implementation": "hybrid"}
    (tmp_path / "old" / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    assert difference(load(tmp_path / "old"), recorded("cohere2")) < CLOSE[torch.float32]
    save(load(tmp_path / "old"), tmp_path / "new")
    assert difference(load(tmp_path / "new"), recorded("cohere2")) < CLOSE[torch.float32]


def changed(name, folder, **changes):
    """A copy of a fixture with keys of config.json changed; `...` removes one."""
    shutil.copytree(HERE / name, folder)
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8")) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}), encoding="utf-8")
    return folder


def test_a_pattern_of_windows_is_cohere2s_alone(tmp_path):
    """Other families' configurations in transformers have no such key."""
    folder = changed("gemma2", tmp_path / "pattern", sliding_window_pattern=3, layer_types=...)
    assert difference(load(folder), recorded("gemma2")) < CLOSE[torch.float32]


@pytest.mark.parametrize("key, before", [("rope_parameters", 48), ("original_max_position_embeddings", 32)])
def test_the_outer_length_of_llama3_scaling_goes_first(tmp_path, key, before):
    rope = json.loads((HERE / "llama" / "config.json").read_text(encoding="utf-8"))["rope_parameters"]
    changes = {key: rope if key == "rope_parameters" else before}
    cfg = load(changed("llama", tmp_path / "llama", **changes)).cfg
    assert cfg.rope_scaling["original_max_position_embeddings"] == before


@pytest.mark.parametrize("name, changes, words", [
    ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": "8", "low_freq_factor": 1,
                                   "high_freq_factor": 4}}, "factor '8'"),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8, "low_freq_factor": 4,
                                   "high_freq_factor": 1}}, "high_freq_factor below"),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": -1}}, "rope_theta is -1"),
    ("cohere2", {"sliding_window": None}, "no positions"), ("cohere2", {"sliding_window": 0}, "sliding_window is 0"),
    ("gemma2", {"sliding_window": None}, "layer_types"), ("gemma2", {"attn_logit_softcapping": 0}, "attn_logit_softcapping"),
    ("qwen2_window", {"use_sliding_window": False}, "layer_types"), ("mistral", {"layer_types": ["chunked"] * 2}, "layer_types"),
    ("llama_tied", {"layer_types": ["linear_attention"] * 2}, "layer_types"),
    ("qwen2_window", {"max_window_layers": "1"}, "max_window_layers"), ("qwen3", {"attention_bias": True}, "attention_bias")])
def test_what_would_change_the_numbers_is_refused(tmp_path, name, changes, words):
    with pytest.raises(SystemExit) as e:
        load(changed(name, tmp_path / name, **changes))
    assert words in str(e.value) and "config.json" in str(e.value) and "\n" not in str(e.value)


def test_key_value_heads_that_are_null_or_absent(tmp_path):
    for value, heads in ((None, 4), (..., 32)):
        raw = changed("qwen3", tmp_path / str(heads), num_key_value_heads=value, num_attention_heads=heads) / "config.json"
        assert Config.from_json(raw).num_key_value_heads == heads


def test_a_config_without_ids_is_written_without_ids(tmp_path):
    for kind in ("cohere", "gemma2"):
        cfg = Config(model_type=kind, vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, head_dim=8,
                     num_key_value_heads=1, intermediate_size=8, sliding_window=4 if kind == "gemma2" else None,
                     layer_types=["sliding_attention", "full_attention"] if kind == "gemma2" else None,
                     bos_token_id=None, eos_token_id=None, pad_token_id=None)
        save(Transformer(cfg).init_weights(), tmp_path / kind)
        again = load(tmp_path / kind).cfg
        assert (again.bos_token_id, again.eos_token_id, again.pad_token_id) == (None, None, None)
        assert (again.query_pre_attn_scalar or 8) == 8


# --- reward models

@pytest.mark.parametrize("name", REWARD)
def test_rewards_equal_transformers(name):
    expected, model = recorded(name), load_reward_model(HERE / name)
    with torch.no_grad():
        exact = load_reward_model(HERE / name, torch.float64)(expected["ids"], expected["lengths"])
    assert torch.allclose(exact, expected["scores.float64"], atol=1e-12)
    ids, lengths = expected["ids"], expected["lengths"]
    with torch.no_grad():
        found = model(ids, lengths)
        assert torch.allclose(found, expected["scores"], atol=1e-4) and found.dtype == torch.float32
        ids[torch.arange(19) >= lengths[:, None]] = 9  # whatever stands behind a row
        assert torch.allclose(model(ids, lengths), found, atol=1e-5)
        for row, n, score in zip(ids, lengths, found):
            assert torch.allclose(model(row[None, :n], n[None]), score[None], atol=1e-5)
    assert (ids[2, 11] == 0) and not torch.allclose(  # the last row ends with the pad token: read one token earlier
        F.linear(model.hidden(ids[2:, :12])[:, 11], model.score.weight)[:, 0], found[2:], atol=1e-3)


def test_a_classifier_with_two_labels_is_refused(tmp_path):
    shutil.copytree(HERE / "llama_rm", tmp_path / "two")
    raw = json.loads((tmp_path / "two" / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "two" / "config.json").write_text(json.dumps(raw | {"id2label": {"0": "a", "1": "b"}}),
                                                  encoding="utf-8")
    with pytest.raises(SystemExit, match="2 labels"):
        load_reward_model(tmp_path / "two")


# --- reading

def test_every_dtype_arrives_and_so_do_rows_from_the_middle():
    stored = Checkpoint(HERE / "mistral")
    files = sorted(set(stored.file.values()))
    assert len(files) > 1
    expected = {key: x for file in files for key, x in load_file(HERE / "mistral" / file).items()}
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for key, p in load(HERE / "mistral", dtype).state_dict().items():
            assert torch.equal(p, expected[key].to(dtype)), key
    name = "model.layers.0.mlp.up_proj.weight"  # rows in the middle, as a rank reads them
    out = torch.empty(4, 24)
    stored.read_into(name, out, 5)
    assert torch.equal(out, expected[name][5:9])


PEAK = """
import sys, torch
sys.path.insert(0, {root!r})
from model import load
def status(key):
    with open("/proc/self/status", encoding="utf-8") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(key))
torch.ones(300, 300) @ torch.ones(300, 300)
with open("/proc/self/clear_refs", "w", encoding="utf-8") as f:
    f.write("5")  # the peak starts again here
before = status("VmRSS")
model = load({folder!r}, torch.{dtype})
print(status("VmHWM") - before, sum(p.numel() * p.element_size() for p in model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads a process's peak memory as Linux tells it")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loading_needs_the_model_and_no_second_copy_of_a_tensor(tmp_path, dtype):
    """One tensor is nearly all of the model: a copy of it, in either dtype, would show."""
    cfg = Config(vocab_size=300_000, hidden_size=256, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
    with torch.device("meta"):
        model = Transformer(cfg)
    model.to(torch.bfloat16).to_empty(device="cpu")
    for p in model.parameters():
        torch.nn.init.ones_(p)
    save(model, tmp_path / "one")
    code = PEAK.format(root=str(HERE.parents[2]), folder=str(tmp_path / "one"), dtype=dtype)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    peak, size = map(int, done.stdout.split())
    assert size < peak < size + 60e6, f"{peak / 1e6:.0f} MB for a model of {size / 1e6:.0f} MB"


RANK = """
import sys
sys.path.insert(0, {root!r})
import torch
import checkpoint, common, sharding
from model import load, save
common.init_distributed()
plain = checkpoint.Checkpoint.pread
def count(self, name, chunk, begin=0):
    asked.append(chunk.numel() * chunk.element_size())
    return plain(self, name, chunk, begin)
checkpoint.Checkpoint.pread = count
for name in {names!r}:
    asked = []
    model = load({folder!r} + "/" + name, torch.float32, wrap=sharding.wrap)
    own = sum(p.to_local().numel() * 4 for p in model.parameters())
    assert sum(asked) == own, (name, sum(asked), own)
    share = own / sum(p.numel() * 4 for p in model.parameters())
    assert share < 0.6, share
    save(model, {out!r} + "/" + name)
"""


def test_two_ranks_read_their_own_rows_and_save_the_same_file(tmp_path):
    code, names = tmp_path / "rank.py", ["mistral", "gemma2", "qwen2"]  # a head of its own; tied, 43 rows; biases
    code.write_text(RANK.format(root=str(HERE.parents[2]), folder=str(HERE), out=str(tmp_path), names=names),
                    encoding="utf-8")
    tiny.jobs(tmp_path / "jobs.json", {2: [["", code]]})
    for name in names:
        again, model = load(tmp_path / name), load(HERE / name)
        assert again.cfg == model.cfg
        for key, p in model.state_dict().items():
            assert torch.equal(again.state_dict()[key], p), key


def test_values_too_large_for_the_dtype_are_refused(tmp_path):
    shutil.copytree(HERE / "qwen2", tmp_path / "big")
    tensors = load_file(tmp_path / "big" / "model.safetensors")
    tensors["model.norm.weight"][0] = 1e30
    save_file(tensors, tmp_path / "big" / "model.safetensors")
    with pytest.raises(SystemExit, match="model.norm.weight holds values too large for torch.float16"):
        load(tmp_path / "big", torch.float16)
    load(tmp_path / "big", torch.bfloat16)


def test_hub_names(tmp_path, monkeypatch):
    import huggingface_hub
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **k: asked.append(name) or HERE / "llama")
    assert load("someone/tiny-llama").cfg.model_type == "llama" and asked == ["someone/tiny-llama"]

    def offline(name, **k):
        raise OSError("no network\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(SystemExit) as e:
        load("someone/tiny-llama")
    assert "no network" in str(e.value) and "--local-dir" in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(SystemExit, match="out/nothing not found"):
        load("out/nothing")


# --- mutants: (checkpoint whose record notices it, how the architecture is broken)

def family(**flags):
    return lambda cfg, m: m.setattr(Config, "family", dataclasses.replace(cfg.family, **flags))


def field(**values):
    return lambda cfg, m: [setattr(cfg, k, v) for k, v in values.items()]


MUTANTS = {
    "interleaved pairs": ("llama", family(interleaved=True)), "RoPE of halves": ("cohere2", family(interleaved=False)),
    "no llama3 scaling": ("llama", field(rope_scaling=None)),
    "RoPE in full layers": ("cohere2", family(rope_in_full=True)),
    "sequential block": ("cohere2", lambda cfg, m: m.setattr(
        model_file.Block, "forward", lambda self, x, cos, sin, *o: (y := x + self.self_attn(
            self.input_layernorm(x), cos, sin, *o)) + self.mlp(self.input_layernorm(y)))),
    "window off by one": ("mistral", field(sliding_window=6)), "no window": ("qwen2_window", field(layer_types=None)),
    "window in other layers": ("gemma2", field(layer_types=["full_attention", "sliding_attention", "full_attention"])),
    "no attention cap": ("gemma2", field(attn_logit_softcapping=None)),
    "no final cap": ("gemma2", field(final_logit_softcapping=None)),
    "scale of D": ("gemma2", field(query_pre_attn_scalar=None)),
    "embeddings not scaled": ("gemma2", family(embed_scale=False)), "weight + 1 forgotten": ("gemma2", family(norm="rms")),
    "silu for gelu": ("gemma2", family(gelu=False)),
    "post norms forgotten": ("gemma2", lambda cfg, m: m.setattr(
        model_file.Block, "forward", lambda self, x, cos, sin, *o: (y := x + self.self_attn(
            self.input_layernorm(x), cos, sin, *o)) + self.mlp(self.pre_feedforward_layernorm(y)))),
    "tied head": ("llama", lambda cfg, m: m.setattr(Transformer, "head", property(
        lambda self: self.model.embed_tokens.weight))),
    "LayerNorm": ("mistral", lambda cfg, m: m.setattr(model_file, "rmsnorm", lambda x, w, eps, one: model_file.layernorm(
        x, w, eps))),
    "no qkv bias": ("qwen2", lambda cfg, m: m.setattr(F, "linear", lambda x, w, b=None: x @ w.T)),
    "norm of q after RoPE": ("qwen3", lambda cfg, m: m.setattr(model_file.RMSNorm, "forward", lambda self, x: x if (
        x.ndim == 4) else model_file.rmsnorm(x, self.weight, self.eps, self.plus_one)))}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_is_seen(mutant, monkeypatch):
    name, change = MUTANTS[mutant]
    expected, stored = recorded(name), load(HERE / name)
    assert difference(stored, expected) < CLOSE[torch.float32]
    cfg = dataclasses.replace(stored.cfg)
    change(cfg, monkeypatch)
    broken = Transformer(cfg)
    broken.load_state_dict(stored.state_dict(), strict=False)
    assert not difference(broken, expected) < 1e-3 and math.isfinite(broken(expected["ids"]).sum().item())
