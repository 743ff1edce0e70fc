"""
The Cohere Command architecture by hand: Command R, Aya 23 and Aya Expanse are this file with other numbers in
config.json.

What differs from Llama, in the order of the code: LayerNorm that subtracts the mean and has no bias; attention and MLP
read the *same* normalised input and are added together (a parallel block); rotary positions on interleaved pairs; the
head is the embedding matrix (tied) and the logits are multiplied by `logit_scale`. Parameter names are Hugging Face's,
so a checkpoint folder loads here and in transformers without any conversion.

Shapes: B rows, T tokens, C hidden_size, H query heads, Hkv key/value heads, D head width, V vocabulary.
Sources: transformers' Cohere configuration and checkpoints; parallel block: Wang & Komatsuzaki 2021 (GPT-J);
RoPE: Su et al. 2021, arXiv 2104.09864; GQA: Ainslie et al. 2023, arXiv 2305.13245;
SwiGLU: Shazeer 2020, arXiv 2002.05202.
"""

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common import atomic_dir, die, full_state_dict, is_main
from kernels import attention, layernorm, rope, swiglu, token_logps


@dataclass
class Config:
    """config.json, in Hugging Face's words. Values of a model are read from its folder; these defaults are tiny."""
    vocab_size: int = 4096
    hidden_size: int = 128  # C
    num_hidden_layers: int = 4
    num_attention_heads: int = 4  # H
    num_key_value_heads: int = 2  # Hkv: each key/value head serves H / Hkv query heads
    intermediate_size: int = 384  # width of the SwiGLU
    rope_theta: float = 10000.0
    layer_norm_eps: float = 1e-5
    logit_scale: float = 0.0625  # Aya Expanse 8B: 0.125, 32B: 0.0625
    use_qk_norm: bool = False  # per-head LayerNorm of q and k before RoPE (Command R+)
    max_position_embeddings: int = 8192
    bos_token_id: int = 5
    eos_token_id: int = 255001  # end of turn: what a chat completion ends with
    pad_token_id: int = 0
    initializer_range: float = 0.02

    @property
    def head_dim(self):
        return self.hidden_size // self.num_attention_heads

    @staticmethod
    def from_json(path):
        """Reads a Hugging Face config.json, in transformers 4's spelling (rope_theta) or 5's (rope_parameters)."""
        path = Path(path)
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            die(f"{path} not found: a checkpoint is a folder with config.json and model.safetensors")
        except json.JSONDecodeError as e:
            die(f"{path}:{e.lineno} is not JSON: {e.msg}")
        if raw.get("model_type") != "cohere":
            die(f"{path}: model_type {raw.get('model_type')!r} is not supported; this is the Cohere architecture")
        parameters = raw.get("rope_parameters") or {}
        if raw.get("rope_scaling") or parameters.get("rope_type", "default") != "default":
            die(f"{path}: scaled RoPE would change the numbers and is not supported")
        if raw.get("attention_bias") or not raw.get("tie_word_embeddings", True):
            die(f"{path}: attention_bias and an untied head are not part of this architecture")
        if raw.get("hidden_act", "silu") != "silu":
            die(f"{path}: hidden_act {raw['hidden_act']!r} is not supported; the MLP is SwiGLU (silu)")
        known = {f.name for f in dataclasses.fields(Config)}
        values = {k: v for k, v in raw.items() if k in known and v is not None}
        if "rope_theta" in parameters:
            values["rope_theta"] = parameters["rope_theta"]
        values.setdefault("rope_theta", 500000.0)  # transformers' default for this architecture
        values.setdefault("num_key_value_heads", values.get("num_attention_heads"))
        return Config(**values)

    def to_json(self, architecture="CohereForCausalLM", **extra):
        """The text of a config.json that transformers reads: both spellings of the RoPE base."""
        values = dataclasses.asdict(self) | {
            "model_type": "cohere", "architectures": [architecture], "hidden_act": "silu", "attention_bias": False,
            "attention_dropout": 0.0, "tie_word_embeddings": True, "use_cache": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta}} | extra
        return json.dumps(values, indent=2, sort_keys=True)


class LayerNorm(nn.Module):
    """Mean and variance over the last axis, a weight, no bias; fp32 inside. A (H, D) weight normalises each head."""

    def __init__(self, shape, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(shape)), eps

    def forward(self, x):  # (..., C) or (..., H, D)
        if self.weight.ndim == 1:
            return layernorm(x, self.weight, self.eps)
        x_hat = layernorm(x.float(), torch.ones_like(self.weight[0], dtype=torch.float32), self.eps)
        return (x_hat * self.weight.float()).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        C, D = cfg.hidden_size, cfg.head_dim
        self.n_head, self.n_kv_head, self.head_dim = cfg.num_attention_heads, cfg.num_key_value_heads, D
        self.q_proj = nn.Linear(C, self.n_head * D, bias=False)
        self.k_proj = nn.Linear(C, self.n_kv_head * D, bias=False)
        self.v_proj = nn.Linear(C, self.n_kv_head * D, bias=False)
        self.o_proj = nn.Linear(self.n_head * D, C, bias=False)
        if cfg.use_qk_norm:
            self.q_norm = LayerNorm((self.n_head, D), cfg.layer_norm_eps)
            self.k_norm = LayerNorm((self.n_kv_head, D), cfg.layer_norm_eps)

    def forward(self, x, cos, sin, doc_start, cache, layer):  # x (B, T, C)
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.n_head, self.head_dim)
        k = self.k_proj(x).view(B, T, self.n_kv_head, self.head_dim)
        v = self.v_proj(x).view(B, T, self.n_kv_head, self.head_dim)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rope(q, k, cos, sin)
        if cache is not None:
            k, v = cache.append(layer, k, v)  # (B, all tokens so far, Hkv, D)
        return self.o_proj(attention(q, k, v, doc_start=doc_start).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.up_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.down_proj = nn.Linear(cfg.intermediate_size, cfg.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    """x + attention(norm(x)) + mlp(norm(x)): one norm, both branches side by side."""

    def __init__(self, cfg):
        super().__init__()
        self.input_layernorm = LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)
        self.self_attn = Attention(cfg)
        self.mlp = MLP(cfg)

    def forward(self, x, cos, sin, doc_start=None, cache=None, layer=None):
        h = self.input_layernorm(x)
        return x + self.self_attn(h, cos, sin, doc_start, cache, layer) + self.mlp(h)


class Backbone(nn.Module):
    """The part under the prefix `model.` in a checkpoint: embedding, blocks, final norm."""

    def __init__(self, cfg):
        super().__init__()
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.num_hidden_layers))
        self.norm = LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)


class KVCache:
    """Keys and values of every layer, preallocated: k, v (layers, B, T_max, Hkv, D); `length` tokens are filled."""

    def __init__(self, cfg, batch, max_tokens, dtype, device):
        shape = (cfg.num_hidden_layers, batch, max_tokens, cfg.num_key_value_heads, cfg.head_dim)
        self.k, self.v = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        self.length, self.layers = 0, cfg.num_hidden_layers

    def append(self, layer, k, v):
        """Stores (B, T, Hkv, D) behind what is there and returns all of it. The last layer of a pass moves `length`."""
        end = self.length + k.shape[1]
        self.k[layer, :, self.length:end], self.v[layer, :, self.length:end] = k, v
        if layer == self.layers - 1:
            self.length = end
        return self.k[layer, :, :end], self.v[layer, :, :end]

    def take(self, rows):
        """Keeps (or repeats) rows by this index tensor: finished rows leave, samples of one prompt share a prefill."""
        self.k, self.v = self.k[:, rows], self.v[:, rows]


class Transformer(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.model = Backbone(cfg)

    def init_weights(self, seed=0):
        """Normal(0, initializer_range) for every matrix, the same for a seed on any machine; norms stay 1."""
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.parameters():
                if p.ndim >= 2 and not (p == 1).all():
                    p.copy_(torch.randn(p.shape, generator=g) * self.cfg.initializer_range)
        return self

    def rope_tables(self, positions):
        """cos and sin (..., T, D/2) in fp32 of integer positions (..., T); frequency i: theta^(-2i/D), RoPE Eq. 15."""
        D = self.cfg.head_dim
        frequency = self.cfg.rope_theta ** (-torch.arange(0, D, 2, device=positions.device, dtype=torch.float32) / D)
        angle = positions[..., None].float() * frequency
        return angle.cos(), angle.sin()

    def hidden(self, ids, positions=None, doc_start=None, cache=None):
        """
        ids (B, T) int64 -> (B, T, C) after the final norm. `positions` (T,) or (B, T): defaults to 0..T-1, behind what
        the cache holds. `doc_start` (B, T) int32 (with a cache: (B, T_all)): first token of each token's document, for
        packed rows and left padding; positions then count from it.
        """
        past = cache.length if cache is not None else 0
        T = ids.shape[1]
        if positions is None:
            positions = torch.arange(past, past + T, device=ids.device)
            if doc_start is not None:
                positions = (positions - doc_start[:, past:past + T]).clamp(min=0)
        cos, sin = self.rope_tables(positions)
        x = self.model.embed_tokens(ids)
        for i, block in enumerate(self.model.layers):
            x = block(x, cos, sin, doc_start, cache, i)
        return self.model.norm(x)

    def logits(self, hidden):
        """(..., C) -> (..., V): the embedding matrix is the head; the scale is part of the architecture."""
        return hidden @ self.model.embed_tokens.weight.T * self.cfg.logit_scale

    def forward(self, ids, loss_mask=None, doc_start=None):
        """
        ids (B, T) -> logits (B, T, V). With a loss_mask, what token_logps returns instead: FSDP gathers weights around
        forward only, so training goes through this call.
        """
        if loss_mask is None:
            return self.logits(self.hidden(ids, doc_start=doc_start))
        return self.selected_logps(self.hidden(ids, doc_start=doc_start), ids, loss_mask)

    def token_logps(self, ids, loss_mask, doc_start=None):
        """(B, T - 1) fp32: log p(ids[:, t + 1]) where loss_mask[:, t + 1], else 0. Never holds (B, T, V)."""
        return self(ids, loss_mask, doc_start)

    def selected_logps(self, hidden, ids, loss_mask):
        """hidden (B, T, C): the head runs on the trained rows only, so prompts and padding cost no logits."""
        B, T = ids.shape
        b, t = loss_mask[:, 1:].nonzero(as_tuple=True)
        rows = b * (T - 1) + t
        trained = hidden[:, :-1].reshape(B * (T - 1), -1).index_select(0, rows)
        logps = token_logps(trained, self.model.embed_tokens.weight, ids[:, 1:].reshape(-1)[rows],
                            self.cfg.logit_scale)
        return torch.zeros((B, T - 1), dtype=logps.dtype, device=ids.device).index_put((b, t), logps)  # no view: FSDP


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints

CARRIED = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")  # files that travel with the weights


def read_weights(folder):
    """All tensors of a checkpoint folder, from model.safetensors or from the shards that its index names."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError):
            die(f"{index} is damaged: it must be JSON with a weight_map; copy it again")
    elif (folder / "model.safetensors").exists():
        names = ["model.safetensors"]
    else:
        die(f"{folder} holds no model.safetensors (weights are read as safetensors only)")
    tensors = {}
    for name in names:
        if Path(name).name != name:
            die(f"{index}: shard {name!r} lies outside the folder")
        try:
            tensors |= load_file(folder / name)
        except (SafetensorError, OSError) as e:
            die(f"{folder / name} cannot be read ({e}): the file is damaged or unfinished; copy or make it again")
    return tensors


def fill(module, tensors, folder):
    """Copies tensors into a module by name; any missing, surplus or misshapen tensor is refused by name."""
    own = dict(module.state_dict())
    tensors.pop("lm_head.weight", None)  # some folders store the tied head a second time
    for name in sorted(own.keys() | tensors.keys()):
        if name not in tensors or name not in own:
            die(f"{folder}: tensor {name} is {'missing' if name in own else 'not part of this architecture'}")
        if own[name].shape != tensors[name].shape:
            die(f"{folder}: tensor {name} has shape {tuple(tensors[name].shape)}, its config.json says "
                f"{tuple(own[name].shape)}")
        if not torch.isfinite(tensors[name]).all():
            die(f"{folder}: tensor {name} holds NaN or infinity")
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(tensors[name])


def load(path, dtype=None, device=None):
    """
    A Hugging Face checkpoint folder -> Transformer, ready to train or sample. dtype None: the dtype that is stored.
    Raises SystemExit with one line if the folder is missing, damaged or of another architecture.
    """
    path = Path(path)
    if not path.is_dir():
        die(f"checkpoint {path} not found: give a folder, or make the miniature's with `python recipe.py`")
    cfg = Config.from_json(path / "config.json")
    tensors = read_weights(path)
    model = Transformer(cfg).to(dtype=dtype or next((t.dtype for t in tensors.values()), None))
    fill(model, tensors, path)
    return model.to(device) if device else model


def write_checkpoint(folder, state, config_json, source=None):
    """Writes weights and config into an existing folder; `source`: the checkpoint whose tokenizer files are carried."""
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(config_json, encoding="utf-8")
    for name in CARRIED:
        if source and (Path(source) / name).exists():
            shutil.copyfile(Path(source) / name, folder / name)


def save(model, path, dtype=None, source=None):
    """Writes a folder that transformers, vLLM and load() read; it appears under its name only when it is complete."""
    with atomic_dir(path) as folder:
        state = full_state_dict(model)
        if is_main():
            write_checkpoint(folder, {k: v.to(dtype or v.dtype) for k, v in state.items()}, model.cfg.to_json(), source)
