"""
The transformer against Hugging Face's, and checkpoint folders: what they hold, what is refused, what survives a kill.

    python -m pytest tests/test_model.py

tests/fixtures/ holds two checkpoints that transformers 5.23.0 wrote and what it computed with them (make_cohere.py
beside them says how, and how the other direction was checked). `test_a_mutant_is_seen` and the test behind it break the
architecture in nine ways and demand that the comparison notices each.
"""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import checkpoint
import model as model_file
import tiny
from cache import KVCache
from generate import generate
from model import Config, LayerNorm, Transformer, load, save

FIXTURES = Path(__file__).resolve().parent / "fixtures"
NAMES = ("cohere_mha", "cohere_gqa")


@pytest.fixture
def gqa():
    return load(FIXTURES / "cohere_gqa")


@pytest.fixture
def copy(tmp_path):
    """A copy of a fixture that a test may break: copy(name) -> folder."""
    return lambda name="cohere_gqa": Path(shutil.copytree(FIXTURES / name, tmp_path / name))


def worst(model, expected):
    """The largest difference to transformers, as a share of each output's largest value."""
    return max(((out - expected[name]).abs().max() / expected[name].abs().max()).item()
               for name, out in tiny.outputs(model, expected["ids"]).items())


def refusal(call, *words):
    """The call must end with one line that holds all the words."""
    with pytest.raises(SystemExit) as e:
        call()
    line = str(e.value)
    assert line.startswith("error: ") and "\n" not in line, line
    for word in words:
        assert str(word) in line, f"{word!r} not in: {line}"


# --- the numbers ---

@pytest.mark.parametrize("dtype, suffix, close", [(torch.float32, "", 1e-5), (torch.float64, ".float64", 1e-12)])
@pytest.mark.parametrize("name", NAMES)
def test_equals_transformers(name, dtype, suffix, close):
    expected = load_file(FIXTURES / name / "expected.safetensors")
    found = tiny.outputs(load(FIXTURES / name, dtype), expected["ids"])
    assert found.keys() == {key for key in expected if "." not in key} - {"ids", "greedy"}
    for key, out in found.items():  # a share of an output's largest value (layers 100, logits 2)
        true = expected[key + suffix]
        assert out.dtype == true.dtype == dtype and (out - true).abs().max() < close * true.abs().max().clamp(min=1), key


@pytest.mark.parametrize("name", NAMES)
def test_greedy_equals_transformers(name):
    expected = load_file(FIXTURES / name / "expected.safetensors")
    row, tokens = expected["ids"][0].tolist(), expected["greedy"].tolist()
    assert generate(load(FIXTURES / name), [row[:3], row[:8], row], 12) == [[t] for t in tokens]


def rotate_halves(q, k, cos, sin, interleaved, in_place):
    """Llama's RoPE: pairs (i, i + D / 2) instead of (2 i, 2 i + 1)."""
    def one(x):
        a, b = x.chunk(2, -1)
        c, s = cos[..., None, :], sin[..., None, :]
        return torch.cat([a * c - b * s, b * c + a * s], -1)
    return one(q), one(k)


def heads_in_turn(q, k, v, **options):
    """Query head h reads key head h % Hkv instead of h // G."""
    G = q.shape[2] // k.shape[2]
    return plain_attention(q, k.repeat(1, 1, G, 1), v.repeat(1, 1, G, 1), **options)


plain_attention, plain_layernorm = model_file.attention, model_file.layernorm
MUTANTS = {
    "RoPE of halves": ("rope", rotate_halves),
    "no RoPE": ("rope", lambda q, k, cos, sin, interleaved, in_place: (q, k)),
    "key heads in turn": ("attention", heads_in_turn),
    "scores not scaled": ("attention", lambda q, k, v, **o: plain_attention(q, k, v, **o | {"scale": 1.0})),
    "gate and up swapped": ("swiglu", lambda gate, up: F.silu(up) * gate),
    "RMSNorm": ("layernorm", lambda x, w, eps: x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * w),
    "norm without weight": ("layernorm", lambda x, w, eps: plain_layernorm(x, torch.ones_like(w), eps)),
    "another eps": ("layernorm", lambda x, w, eps: plain_layernorm(x, w, 10 * eps))}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_is_seen(mutant, gqa, monkeypatch):
    expected = load_file(FIXTURES / "cohere_gqa" / "expected.safetensors")
    assert worst(gqa, expected) < 1e-5
    monkeypatch.setattr(model_file, *MUTANTS[mutant])
    assert worst(gqa, expected) > 1e-3


def test_a_sequential_block_is_seen(gqa, monkeypatch):
    expected = load_file(FIXTURES / "cohere_gqa" / "expected.safetensors")

    def sequential(self, x, cos, sin, doc_start=None, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, doc_start, cache)
        return x + self.mlp(self.input_layernorm(x))

    monkeypatch.setattr(model_file.Block, "forward", sequential)
    assert worst(gqa, expected) > 1e-3


def test_per_head_norm_by_hand():
    norm = LayerNorm((2, 4), 0.0)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([[1.0, 1, 1, 1], [2, 0, 1, -1]]))
    x = torch.tensor([3.0, 1, 3, 1]).expand(1, 1, 2, 4)  # mean 2, deviation 1: normalised 1, -1, 1, -1
    assert torch.allclose(norm(x)[0, 0], torch.tensor([[1.0, -1, 1, -1], [2, 0, 1, 1]]))


def test_token_logps_are_the_logits_log_softmax(gqa):
    ids = torch.randint(0, 41, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.rand((3, 9), generator=torch.Generator().manual_seed(2)) < 0.5
    mask[2] = False  # a row without a trained token
    expected = gqa(ids)[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0] * mask[:, 1:]
    found = gqa.token_logps(ids, mask)
    assert found.dtype == torch.float32 and found.shape == (3, 8)
    assert torch.allclose(found, expected, atol=1e-5) and (found[~mask[:, 1:]] == 0).all()

    weights = torch.linspace(-1, 2, 24).view(3, 8)  # every position's gradient counts differently
    grads = [torch.autograd.grad((x * weights).sum(), gqa.parameters()) for x in (found, expected)]
    for (name, _), a, b in zip(gqa.named_parameters(), *grads):
        assert torch.allclose(a, b, atol=1e-4, rtol=1e-4), name


def test_nothing_trained_is_zero_and_has_a_gradient(gqa):
    found = gqa.token_logps(torch.ones((2, 5), dtype=torch.int64), torch.zeros((2, 5), dtype=torch.bool))
    found.sum().backward()
    assert found.tolist() == [[0.0] * 4] * 2
    assert all(p.grad is None or (p.grad == 0).all() for p in gqa.parameters())


# --- padding, packing, cache: the same numbers whatever stands beside a row ---

ROWS = [[5, 9, 30, 12, 8], [5, 40, 11], [5, 17, 17, 33, 21, 8, 10, 39]]


def alone(model, row):
    return model(torch.tensor([row]))[0]


def test_right_padded_rows_equal_single_rows(gqa):
    T = max(map(len, ROWS))
    for pad in (0, 33):  # whatever stands behind a row
        batch = gqa(torch.tensor([row + [pad] * (T - len(row)) for row in ROWS]))
        for row, logits in zip(ROWS, batch):
            assert torch.allclose(logits[:len(row)], alone(gqa, row), atol=1e-5)


def test_packed_rows_equal_single_rows(gqa):
    starts = [sum(map(len, ROWS[:i])) for i in range(len(ROWS))]
    doc_start = torch.tensor([[s for s, row in zip(starts, ROWS) for _ in row]], dtype=torch.int32)
    ids = torch.tensor([sum(ROWS, [])])
    packed = gqa(ids, doc_start=doc_start)[0]
    for start, row in zip(starts, ROWS):
        assert torch.allclose(packed[start:start + len(row)], alone(gqa, row), atol=1e-5)
    assert not torch.allclose(gqa(ids)[0, 5:], packed[5:], atol=1e-2)  # doc_start is what keeps documents apart
    mask = torch.ones_like(ids, dtype=torch.bool)
    logps = gqa.token_logps(ids, mask, doc_start)[0, starts[2]:]
    assert torch.allclose(logps, gqa.token_logps(torch.tensor(ROWS[2:]), mask[:, :8])[0], atol=1e-5)


def step(model, cache, tokens):
    """One token more in the first slots -> logits (n, V)."""
    cache.begin_step(len(tokens))
    logits = model.logits(model.hidden(torch.tensor(tokens)[:, None], cache=cache)[:, 0])
    cache.length[:len(tokens)] += 1
    return logits


def test_packed_prompts_then_single_tokens_equal_forward(gqa):
    """All but the last three tokens of each row are read together, in slots 2, 0 and 1; the rest one at a time."""
    cache, slots = KVCache(gqa.cfg, 4, max(map(len, ROWS)), torch.float32, "cpu"), [2, 0, 1]
    lengths = [max(1, len(row) - 3) for row in ROWS]
    ids = sum((row[:n] for row, n in zip(ROWS, lengths)), [])
    doc_start = torch.tensor([0, lengths[0], sum(lengths[:2])], dtype=torch.int32).repeat_interleave(torch.tensor(lengths))
    cache.begin_fill(lengths, [[slot] for slot in slots])
    packed = gqa.logits(gqa.hidden(torch.tensor([ids]), doc_start=doc_start[None], cache=cache))[0].split(lengths)
    expected = [alone(gqa, row) for row in ROWS]
    for found, row, n in zip(packed, expected, lengths):
        assert torch.allclose(found, row[:n], atol=1e-5)
    assert cache.length.tolist() == [lengths[slots.index(slot)] for slot in range(3)] + [0]
    for _ in range(3):
        at = [cache.length[slot].item() for slot in range(3)]
        logits = step(gqa, cache, [ROWS[slots.index(slot)][min(n, len(ROWS[slots.index(slot)]) - 1)] for slot, n in enumerate(at)])
        for slot, n in enumerate(at):
            row = expected[slots.index(slot)]
            assert n >= len(row) or torch.allclose(logits[slot], row[n], atol=1e-5)


def test_samples_share_a_prompt(gqa):
    cache = KVCache(gqa.cfg, 3, 8, torch.float32, "cpu")
    cache.begin_fill([4], [[2, 0, 1]])
    gqa.hidden(torch.tensor([[5, 40, 11, 7]]), cache=cache)
    found = step(gqa, cache, [8, 9, 10])
    for slot, token in enumerate((8, 9, 10)):
        assert torch.allclose(found[slot], alone(gqa, [5, 40, 11, 7, token])[-1], atol=1e-5)
    assert torch.allclose(step(gqa, cache, [3])[0], alone(gqa, [5, 40, 11, 7, 8, 3])[-1], atol=1e-5)


def test_positions_are_relative(gqa):
    ids = torch.tensor([ROWS[2]])
    moved = gqa.hidden(ids, positions=torch.arange(100, 108))
    assert torch.allclose(moved, gqa.hidden(ids), atol=1e-3)
    assert not torch.allclose(gqa.hidden(ids, positions=2 * torch.arange(8)), moved, atol=1e-2)


# --- config.json ---

def edit(folder, **changes):
    """Changes keys of config.json; None removes one."""
    raw = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))
    return folder


def test_both_spellings_of_the_rope_base(copy):
    folder, ids = copy(), torch.tensor([ROWS[2]])
    expected = load(folder)(ids)
    old = edit(folder, rope_parameters=None, rope_theta=4e6)  # transformers 4, and every aya checkpoint on the hub
    assert Config.from_json(old / "config.json").rope_theta == 4e6 and torch.equal(load(old)(ids), expected)
    both = edit(folder, rope_parameters={"rope_type": "default", "rope_theta": 4e6}, rope_theta=1e4)
    assert Config.from_json(both / "config.json").rope_theta == 4e6  # transformers 5 reads rope_parameters
    neither = edit(folder, rope_parameters=None, rope_theta=None)
    assert Config.from_json(neither / "config.json").rope_theta == 500000.0  # CohereConfig.default_theta
    assert not torch.equal(load(neither)(ids), expected)


def test_aya_expanse_8b_config(tmp_path):
    """The keys of CohereLabs/aya-expanse-8b's config.json, in the hub's (old) spelling."""
    (tmp_path / "config.json").write_text(json.dumps({
        "architectures": ["CohereForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 5,
        "eos_token_id": 255001, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 14336, "layer_norm_eps": 1e-05, "logit_scale": 0.125, "max_position_embeddings": 8192,
        "model_type": "cohere", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "pad_token_id": 0, "rope_theta": 10000, "torch_dtype": "float16", "transformers_version": "4.44.0",
        "use_cache": True, "use_qk_norm": False, "vocab_size": 256000}))
    cfg = Config.from_json(tmp_path / "config.json")
    assert (cfg.head_dim, cfg.logit_scale, cfg.num_key_value_heads) == (128, 0.125, 8)
    with torch.device("meta"):
        assert sum(p.numel() for p in Transformer(cfg).parameters()) == 8_028_033_024  # = the hub's 16.06 GB in 2 bytes


def test_absent_key_value_heads_means_all_heads(copy):
    assert Config.from_json(edit(copy("cohere_mha"), num_key_value_heads=None) / "config.json").num_key_value_heads == 3


@pytest.mark.parametrize("changes, words", [
    ({"model_type": "gpt2"}, ["model_type 'gpt2'", "cohere2", "llama"]),
    ({"model_type": None}, ["model_type None"]),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ["RoPE"]),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, ["RoPE"]),
    ({"attention_bias": True}, ["attention_bias"]),
    ({"mlp_bias": True}, ["mlp_bias"]), ({"use_parallel_block": False}, ["use_parallel_block"]),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, ["RoPE", "yarn"]),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["low_freq_factor"]),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, ["RoPE"]),
    ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
    ({"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}, ["auto_map", "code"]),
    ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
    ({"vocab_size": None}, ["vocab_size"]),
    ({"is_causal": False}, ["is_causal"]), ({"is_causal": 0}, ["is_causal"]), ({"per_layer_config": {"0": {}}}, ["per_layer"]),
    ({"model_type": []}, ["model_type []"]), ({"rope_parameters": "x"}, ["RoPE", "'x'"]),
    ({"hidden_size": "24"}, ["hidden_size is '24'", "whole number"]), ({"num_hidden_layers": 2.5}, ["num_hidden_layers"]),
    ({"num_attention_heads": 0}, ["num_attention_heads is 0"]), ({"vocab_size": True}, ["vocab_size is True"]),
    ({"num_key_value_heads": 3}, ["num_attention_heads 4", "num_key_value_heads 3"]), ({"head_dim": 5}, ["head_dim 5"]),
    ({"head_dim": 0}, ["head_dim is 0"]), ({"layer_norm_eps": "1e-5"}, ["layer_norm_eps is '1e-5'"]),
    ({"logit_scale": -1}, ["logit_scale is -1", "above 0"]), ({"tie_word_embeddings": "false"}, ["tie_word_embeddings"]),
    ({"eos_token_id": [1, "x"]}, ["eos_token_id"]), ({"bos_token_id": 1.5}, ["bos_token_id is 1.5", "token id"]),
    ({"architectures": "CohereForCausalLM"}, ["architectures"]), ({"architectures": [1]}, ["architectures"]),
    ({"layer_types": ["sliding_attention"] * 3}, ["layer_types"]), ({"layer_types": 1}, ["layer_types 1"]),
    ({"hidden_act": "gelu"}, ["hidden_act 'gelu'"])])
def test_other_architectures_are_refused(copy, changes, words):
    folder = edit(copy(), **changes)
    refusal(lambda: load(folder), folder / "config.json", *words)


def test_config_that_cannot_be_read(copy, tmp_path):
    refusal(lambda: load(tmp_path / "nowhere"), tmp_path / "nowhere", "not found")
    folder = copy()
    (folder / "config.json").write_text('{"model_type": "cohere",\n "vocab_size": }')
    refusal(lambda: load(folder), f"{folder / 'config.json'}:2", "not JSON")
    (folder / "config.json").unlink()
    refusal(lambda: load(folder), folder / "config.json", "not found")


# --- damaged and foreign folders ---

def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def poison(name, value):
    def change(tensors):
        tensors[name].view(-1)[-1] = value
    return change


@pytest.mark.parametrize("change, words", [
    (lambda t: t.pop("model.layers.1.self_attn.k_norm.weight"), ["model.layers.1.self_attn.k_norm.weight", "missing"]),
    (lambda t: t.update({"model.layers.7.mlp.up_proj.weight": torch.ones(2)}),
     ["model.layers.7.mlp.up_proj.weight", "not part"]),
    (lambda t: t.update({"model.norm.weight": torch.ones(25)}), ["model.norm.weight", "(25,)", "(24,)"]),
    (lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.ones(24, 13)}),
     ["model.layers.0.mlp.up_proj.weight", "(24, 13)", "(13, 24)"]),
    (poison("model.layers.2.mlp.down_proj.weight", float("nan")), ["model.layers.2.mlp.down_proj.weight", "NaN"]),
    (poison("model.embed_tokens.weight", float("inf")), ["model.embed_tokens.weight", "infinity"]),
    (lambda t: t.clear(), ["model.embed_tokens.weight", "missing"])])
def test_wrong_tensors_are_refused(copy, change, words):
    folder = copy()
    change_tensors(folder, change)
    refusal(lambda: load(folder), folder, *words)


def test_a_stored_tied_head_is_no_surplus(copy):
    folder, ids = copy(), torch.tensor([ROWS[0]])
    expected = load(folder)(ids)
    change_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert torch.equal(load(folder)(ids), expected)


def test_a_stored_tied_head_that_differs_is_refused(copy, monkeypatch):
    folder = copy()

    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["lm_head.weight"][-1, -1] += 1
    change_tensors(folder, change)
    for chunk in (1 << 24, 100):  # bytes that are compared at a time
        monkeypatch.setattr(checkpoint, "CHUNK", chunk)
        refusal(lambda: load(folder), folder, "lm_head.weight", "tie_word_embeddings")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_file(copy, share):
    folder = copy("cohere_mha")
    shard = folder / "model-00003-of-00005.safetensors"
    shard.write_bytes(shard.read_bytes()[:int(share * shard.stat().st_size)])
    refusal(lambda: load(folder), shard, "damaged or unfinished")


def test_missing_shard(copy):
    folder = copy("cohere_mha")
    (folder / "model-00002-of-00005.safetensors").unlink()
    refusal(lambda: load(folder), "model-00002-of-00005.safetensors")


@pytest.mark.parametrize("text", ['{"weight_map": {', '{"metadata": {}}', "[]"])
def test_damaged_index(copy, text):
    folder = copy("cohere_mha")
    (folder / "model.safetensors.index.json").write_text(text)
    refusal(lambda: load(folder), folder / "model.safetensors.index.json")


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", ".."])
def test_index_may_not_point_outside(copy, shard):
    folder = copy("cohere_mha")
    index = folder / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    raw["weight_map"]["model.norm.weight"] = shard
    index.write_text(json.dumps(raw))
    shutil.copyfile(FIXTURES / "cohere_gqa" / "model.safetensors", folder.parent / "model.safetensors")  # it would load
    refusal(lambda: load(folder), index if shard != ".." else folder, shard)


def test_one_file_goes_before_an_index(copy):
    """As in transformers: an index that an older save left behind is not looked at."""
    folder = copy()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"model.norm.weight": "model-9-of-9.safetensors"}}')
    assert torch.equal(load(folder).model.norm.weight, load(FIXTURES / "cohere_gqa").model.norm.weight)


def test_names_from_files_do_not_break_the_line(copy):
    folder = copy()
    change_tensors(folder, lambda t: t.update({"two\nlines": torch.ones(2)}))
    refusal(lambda: load(folder), "two lines", "not part")


class Bomb:
    def __reduce__(self):
        return exec, ("raise RuntimeError('unpickled')",)


def test_pickles_are_not_read(copy):
    folder = copy()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    refusal(lambda: load(folder), folder, "no model.safetensors")


# --- saving ---

@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_bit_for_bit(tmp_path, name):
    model, out = load(FIXTURES / name), tmp_path / "out"
    save(model, out, source=FIXTURES / name)
    again = load(out)
    assert again.cfg == model.cfg
    for key, p in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], p), key
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "generation_config.json", "model.safetensors"]
    assert load_file(out / "model.safetensors").keys() == model.state_dict().keys()  # the tied head is stored once
    raw = json.loads((out / "config.json").read_text())
    assert raw["rope_theta"] == raw["rope_parameters"]["rope_theta"] == model.cfg.rope_theta  # both spellings
    assert raw["architectures"] == ["CohereForCausalLM"] and raw["tie_word_embeddings"] is True


def test_all_files_of_the_tokenizer_travel(copy, tmp_path):
    folder, files = copy(), ["tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "chat_template.jinja",
                             "additional_chat_templates/tool_use.jinja", "generation_config.json"]
    (folder / "additional_chat_templates").mkdir()
    for name in files:
        (folder / name).write_text(f"{name} שלום", encoding="utf-8")
    (folder / "notes.md").write_text("stays", encoding="utf-8")
    save(load(folder), tmp_path / "out")
    for name in files:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    assert not (tmp_path / "out" / "notes.md").exists()


def test_dtypes(tmp_path, gqa):
    save(gqa, tmp_path / "half", dtype=torch.bfloat16)
    half = load(tmp_path / "half")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert torch.equal(half.model.norm.weight, gqa.model.norm.weight.bfloat16())
    assert {p.dtype for p in load(tmp_path / "half", dtype=torch.float32).parameters()} == {torch.float32}
    assert next(gqa.parameters()).dtype == torch.float32  # saving does not cast the model itself
    ids = torch.tensor([ROWS[2]])
    assert (half(ids).float() - gqa(ids)).abs().max() < 0.1
    assert half.token_logps(ids, torch.ones_like(ids, dtype=torch.bool)).dtype == torch.float32


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_save_leaves_no_folder(tmp_path, gqa, monkeypatch, error):
    out = tmp_path / "out"

    def half_written(folder, table, whole):
        (folder / "model.safetensors").write_bytes(b"half")
        raise error

    with monkeypatch.context() as m:
        m.setattr(checkpoint, "write_weights", half_written)
        with pytest.raises((SystemExit, KeyboardInterrupt)):
            save(gqa, out)
    assert not out.exists()

    save(gqa, out)
    other = Transformer(gqa.cfg).init_weights(7)
    with monkeypatch.context() as m:
        m.setattr(checkpoint, "write_weights", half_written)
        with pytest.raises((SystemExit, KeyboardInterrupt)):
            save(other, out)
    assert torch.equal(load(out).model.norm.weight, gqa.model.norm.weight)  # the older one is whole
    save(other, out)  # and a later save works, whatever the kill left
    assert torch.equal(load(out).model.embed_tokens.weight, other.model.embed_tokens.weight)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_initial_weights_depend_on_the_seed_alone():
    cfg = Config(vocab_size=50, hidden_size=16, num_attention_heads=4, use_qk_norm=True, initializer_range=0.5)
    torch.manual_seed(1)
    a = Transformer(cfg).init_weights(3)
    torch.manual_seed(2)
    b, c = Transformer(cfg).init_weights(3), Transformer(cfg).init_weights(4)
    for (name, x), y, z in zip(a.named_parameters(), b.parameters(), c.parameters()):
        assert torch.equal(x, y), name
        if "norm" in name:
            assert (x == 1).all(), name
        else:
            assert not torch.equal(x, z) and 0.4 < x.std() < 0.6 and x.mean().abs() < 0.1, name
