"""
The transformer by hand, Cohere's Command architecture first: Command R, Aya 23 and Aya Expanse are this file with other
numbers in config.json. The families that people use as teachers and reward models (Command R7B and Tiny Aya, Llama 3,
Mistral, Qwen2, Qwen3, Gemma 2) are the same few modules with other flags: config.py lists them.

What Command does unlike Llama, in the order of the code: LayerNorm that subtracts the mean and has no bias; attention
and MLP read the *same* normalised input and are added together (a parallel block); rotary positions on interleaved
pairs; the head is the embedding matrix (tied) and the logits are multiplied by `logit_scale`. Parameter names are
Hugging Face's, so a checkpoint folder loads here and in transformers without any conversion.

Shapes: B rows, T tokens, C hidden_size, H query heads, Hkv key/value heads, D head width, V vocabulary.
Sources: transformers' configurations and checkpoints; parallel block: Wang & Komatsuzaki 2021 (GPT-J);
RoPE: Su et al. 2021, arXiv 2104.09864; GQA: Ainslie et al. 2023, arXiv 2305.13245; SwiGLU: Shazeer 2020, arXiv
2002.05202; RMSNorm: Zhang & Sennrich 2019, arXiv 1910.07467; soft caps, four norms: Gemma 2, arXiv 2408.00118.
"""

import math
from collections import Counter

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as checkpointed

import checkpoint
from checkpoint import Checkpoint
from common import atomic_dir, die, is_main
from config import LLAMA3, Config
from kernels import attention, decode, layernorm, rmsnorm, rope, swiglu, token_logps
from sharding import first_row, local, whole

# ---------------------------------------------------------------------------------------------------------------------
# modules

def rope_frequencies(cfg):
    """
    (D/2,) fp32: frequency i is theta^(-2i/D), RoPE Eq. 15. With Llama 3.1's scaling, wavelengths above the length it
    was pretrained on (over low_freq_factor) are stretched by `factor`, short ones stay, and those between are mixed.
    """
    frequency = 1.0 / cfg.rope_theta ** (torch.arange(0, cfg.head_dim, 2, dtype=torch.float32) / cfg.head_dim)
    if cfg.rope_scaling:
        factor, low, high, length = (cfg.rope_scaling[key] for key in LLAMA3)
        wavelength = 2 * math.pi / frequency
        keep = ((length / wavelength - low) / (high - low)).clamp(0, 1)  # 1: not scaled
        frequency = (1 - keep) * frequency / factor + keep * frequency
    return frequency


class Linear(nn.Linear):
    """nn.Linear without random weights: init_weights() or a checkpoint gives them. Drawing some that are thrown away costs
    time, and on the meta device a second and 70 MB for the part of torch that this imports."""

    def reset_parameters(self):
        pass


class Embedding(nn.Embedding):
    """nn.Embedding without random weights, as Linear."""

    def reset_parameters(self):
        pass


class LayerNorm(nn.Module):
    """Mean and variance over the last axis, a weight, no bias; fp32 inside. A (H, D) weight normalises each head."""

    def __init__(self, shape, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(shape)), eps

    def forward(self, x):  # (..., C) or (..., H, D)
        return layernorm(x, self.weight, self.eps)


class RMSNorm(nn.Module):
    """Root mean square over the last axis and a weight (C,), which Gemma stores minus 1; fp32 inside."""

    def __init__(self, shape, eps, plus_one=False):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(shape) if plus_one else torch.ones(shape)), eps
        self.plus_one = plus_one

    def forward(self, x):  # (..., C)
        return rmsnorm(x, self.weight, self.eps, self.plus_one)


def make_norm(cfg):
    kind = cfg.family.norm
    return (LayerNorm(cfg.hidden_size, cfg.layer_norm_eps) if kind == "layer" else
            RMSNorm(cfg.hidden_size, cfg.layer_norm_eps, kind == "rms+1"))


class Attention(nn.Module):
    def __init__(self, cfg, layer):
        super().__init__()
        C, D, family = cfg.hidden_size, cfg.head_dim, cfg.family
        self.n_head, self.n_kv_head, self.head_dim = cfg.num_attention_heads, cfg.num_key_value_heads, D
        self.q_proj = Linear(C, self.n_head * D, bias=family.qkv_bias)
        self.k_proj = Linear(C, self.n_kv_head * D, bias=family.qkv_bias)
        self.v_proj = Linear(C, self.n_kv_head * D, bias=family.qkv_bias)
        self.o_proj = Linear(self.n_head * D, C, bias=False)
        if family.qk_norm == "head" and cfg.use_qk_norm:
            self.q_norm = LayerNorm((self.n_head, D), cfg.layer_norm_eps)
            self.k_norm = LayerNorm((self.n_kv_head, D), cfg.layer_norm_eps)
        elif family.qk_norm == "rms":
            self.q_norm, self.k_norm = RMSNorm(D, cfg.layer_norm_eps), RMSNorm(D, cfg.layer_norm_eps)
        self.layer, self.window, self.interleaved = layer, cfg.window(layer), family.interleaved
        self.has_rope = family.rope_in_full or self.window is not None
        self.softcap, self.scale = cfg.attn_logit_softcapping, (cfg.query_pre_attn_scalar or D) ** -0.5

    def forward(self, x, cos, sin, doc_start, cache):  # x (B, T, C)
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.n_head, self.head_dim)
        k = self.k_proj(x).view(B, T, self.n_kv_head, self.head_dim)
        v = self.v_proj(x).view(B, T, self.n_kv_head, self.head_dim)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        if self.has_rope:
            q, k = rope(q, k, cos, sin, self.interleaved, in_place=True)
        options = {"softcap": self.softcap, "scale": self.scale}
        if cache is not None and cache.decoding:
            keys, values, length = cache.append(self.layer, k, v)
            out = decode(q, keys, values, length=length, **options)
        else:
            if cache is not None:
                k, v = cache.fill(self.layer, k, v)
            out = attention(q, k, v, doc_start=doc_start, window=self.window, **options)
        return self.o_proj(out.reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.gate_proj = Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.up_proj = Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.down_proj = Linear(cfg.intermediate_size, cfg.hidden_size, bias=False)
        self.gelu = cfg.family.gelu

    def forward(self, x):
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(F.gelu(gate, approximate="tanh") * up if self.gelu else swiglu(gate, up))


class Block(nn.Module):
    """Command: one norm, attention and MLP side by side. Elsewhere one behind the other, each with its own norm."""

    def __init__(self, cfg, layer):
        super().__init__()
        self.parallel, self.post_norms = cfg.family.parallel, cfg.family.post_norms
        self.input_layernorm = make_norm(cfg)
        self.self_attn = Attention(cfg, layer)
        self.mlp = MLP(cfg)
        if not self.parallel:
            self.post_attention_layernorm = make_norm(cfg)  # Gemma: of what attention returns; others: the MLP's input
        if self.post_norms:
            self.pre_feedforward_layernorm, self.post_feedforward_layernorm = make_norm(cfg), make_norm(cfg)

    def forward(self, x, cos, sin, doc_start=None, cache=None):  # x (B, T, C)
        h = self.input_layernorm(x)
        a = self.self_attn(h, cos, sin, doc_start, cache)
        if self.parallel:
            return x + a + self.mlp(h)
        if self.post_norms:
            x = x + self.post_attention_layernorm(a)
            return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        x = x + a
        return x + self.mlp(self.post_attention_layernorm(x))


class Backbone(nn.Module):
    """The part under the prefix `model.` in a checkpoint: embedding, blocks, final norm."""

    def __init__(self, cfg):
        super().__init__()
        self.embed_tokens = Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(Block(cfg, i) for i in range(cfg.num_hidden_layers))
        self.norm = make_norm(cfg)


class Transformer(nn.Module):
    """
    A causal language model. `source`: the folder it was loaded from, or None; `stored`: its dtype there. `recompute`:
    activation checkpointing (Chen et al. 2016, arXiv 1604.06174): a block's inside is computed again in the backward pass
    instead of kept.
    """

    source, stored, has_head, recompute = None, torch.float32, True, False

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.frequencies = cfg, {}
        self.model = Backbone(cfg)
        if not cfg.tie_word_embeddings:
            self.lm_head = Linear(cfg.hidden_size, cfg.vocab_size, bias=False)

    def init_weights(self, seed=0):
        """Normal(0, initializer_range) for every matrix, the same for a seed on any machine; biases 0, norms stay."""
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in self.named_parameters():
                if name.endswith("bias"):
                    p.zero_()
                elif p.ndim >= 2 and "norm" not in name:
                    p.copy_(torch.randn(p.shape, generator=g) * self.cfg.initializer_range)
        return self

    def rope_tables(self, positions):
        """cos and sin (..., T, D/2) of integer positions (..., T), in fp32 (fp64 in an fp64 model)."""
        acc = torch.promote_types(self.model.embed_tokens.weight.dtype, torch.float32)
        if (positions.device, acc) not in self.frequencies:  # kept: a CUDA graph may not wait for a copy from the CPU
            self.frequencies[positions.device, acc] = rope_frequencies(self.cfg).to(positions.device, acc)
        angle = positions[..., None].to(acc) * self.frequencies[positions.device, acc]
        return angle.cos(), angle.sin()

    def hidden(self, ids, positions=None, doc_start=None, cache=None):
        """
        ids (B, T) int64 -> (B, T, C) after the final norm. `positions` (T,) or (B, T): defaults to 0..T-1. `doc_start`
        (B, T) int32: first token of each token's document, for packed rows; positions then count from it. `cache`: a
        cache.KVCache of which begin_fill() or begin_step() was called; a step's position is the number of tokens before it;
        or a likelihood.Prefixes.
        """
        if positions is None and cache is not None and cache.decoding:
            positions = cache.length[:len(ids), None]
        elif positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)
            if doc_start is not None:
                positions = (positions - doc_start).clamp(min=0)
        cos, sin = self.rope_tables(positions)
        x = self.model.embed_tokens(ids)
        if self.cfg.family.embed_scale:  # rounded to x's dtype first, as Gemma was trained: 55.43 is 55.5 in bfloat16
            x = x * torch.tensor(self.cfg.hidden_size ** 0.5, dtype=torch.float32).to(x.dtype).item()
        for block in self.model.layers:
            if self.recompute and torch.is_grad_enabled():  # no dropout: there is no random state to keep
                x = checkpointed(block, x, cos, sin, doc_start, use_reentrant=False, preserve_rng_state=False)
            elif cache is not None:  # without FSDP's hooks and the compiler: weights are whole while sampling (unsharded)
                x = block.forward(x, cos, sin, doc_start, cache)
            else:
                x = block(x, cos, sin, doc_start, None)
        return self.model.norm(x)

    @property
    def head(self):
        """(V, C): a matrix of its own, or the embedding again."""
        return self.model.embed_tokens.weight if self.cfg.tie_word_embeddings else self.lm_head.weight

    def logits(self, hidden, exact=False):
        """
        (..., C) -> (..., V): the head, the family's scale, and Gemma's soft cap. `exact`: hidden (n, C) -> fp32, on a GPU
        not rounded to 16 bits on the way: what is sampled from, and the same numbers as token_logps.
        """
        cap = self.cfg.final_logit_softcapping
        if exact and hidden.is_cuda and hidden.dtype != torch.float32:
            logits = torch.mm(hidden, self.head.T, out_dtype=torch.float32) * self.cfg.logit_scale
        else:
            logits = hidden @ self.head.T * self.cfg.logit_scale
        return logits if cap is None else cap * torch.tanh(logits / cap)

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
        logps = token_logps(trained, self.head, ids[:, 1:].reshape(-1)[rows], self.cfg.logit_scale,
                            self.cfg.final_logit_softcapping)
        return torch.zeros((B, T - 1), dtype=logps.dtype, device=ids.device).index_put((b, t), logps)  # no view: FSDP


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints

def fill(model, stored, dtype=None, device=None, wrap=None, fresh=None):
    """
    Gives a model built on the meta device its weights from a Checkpoint, one tensor at a time, straight into `dtype`
    (None: the one that is stored) on `device`: memory is the model's and one chunk. `wrap`: applied to the model while
    it is still empty (sharding.wrap shards it); each rank then reads its own rows only. `fresh`: name -> number, of what
    the checkpoint lacks and starts as that number everywhere. Any other missing, surplus or misshapen tensor ends the
    program by name.
    """
    fresh = fresh or {}
    own = {name: tuple(p.shape) for name, p in model.named_parameters() if name not in fresh}
    table = {name: entry for name, entry in stored.table.items() if not name.endswith("rotary_emb.inv_freq")}
    if "lm_head.weight" in table and "lm_head.weight" not in own:  # some folders store a tied head a second time
        if model.has_head and "model.embed_tokens.weight" in table and not stored.same("lm_head.weight",
                                                                                       "model.embed_tokens.weight"):
            die(f"{stored.folder}: tensor lm_head.weight differs from the embedding, but config.json ties them; set "
                "tie_word_embeddings to false, or remove the tensor")
        del table["lm_head.weight"]
    for name in sorted(own.keys() | table.keys()):
        if name not in table or name not in own:
            die(f"{stored.folder}: tensor {name} is {'missing' if name in own else 'not part of this architecture'}")
        if own[name] != table[name][0]:
            die(f"{stored.folder / stored.file[name]}: tensor {name} has shape {table[name][0]}, its config.json says "
                f"{own[name]}")
        if not table[name][1].is_floating_point:
            die(f"{stored.folder / stored.file[name]}: tensor {name} holds {table[name][1]}: quantised weights are not "
                "supported")
    sizes = Counter()
    for shape, kind in table.values():
        sizes[kind] += math.prod(shape)
    stored_dtype = sizes.most_common(1)[0][0]
    model.to(dtype or stored_dtype)
    model = wrap(model) if wrap else model
    if any(hasattr(p, "to_local") for p in model.parameters()):  # FSDP's shards
        model.to_empty(device=device or "cpu")
    else:  # the same for plain ones: to_empty imports torch's compiler, a second and 70 MB
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device=device)))
    parameters = dict(model.named_parameters())
    for name in sorted(own, key=lambda name: (stored.file[name], stored.begin[name])):
        p = parameters[name].detach()
        if local(p).numel():
            stored.read_into(name, local(p), first_row(p))
    for name, number in fresh.items():
        local(parameters[name].detach()).fill_(number)
    model.source, model.stored = stored.folder, stored_dtype
    return model


def causal(path):
    """The Checkpoint of a causal language model: a folder or a hub name; other kinds of models are refused by name."""
    stored = Checkpoint(checkpoint.find(path))
    for name in stored.architectures():
        if not name.endswith("ForCausalLM"):
            die(f"{stored.folder}: {name} is not a causal language model; reward models are read by reward.py")
    return stored


def load(path, dtype=None, device=None, wrap=None):
    """
    A Hugging Face checkpoint folder, or a hub name -> Transformer, ready to train or sample. dtype None: the one that
    is stored; wrap: see fill(). Raises SystemExit with one line if the folder is missing, damaged or not understood.
    """
    stored = causal(path)
    cfg = Config.from_dict(stored.config, stored.folder / "config.json")
    with torch.device("meta"):
        model = Transformer(cfg)
    return fill(model, stored, dtype, device, wrap)


def write_checkpoint(folder, model, source=None, dtype=None, architecture=None, **extra):
    """
    Writes weights (5 GB a file), config.json and, from the checkpoint folder `source`, the tokenizer's files into an
    existing folder. Call on all ranks: sharded weights are gathered one tensor at a time.
    """
    state = model.state_dict()
    table = {name: (tuple(p.shape), dtype or p.dtype) for name, p in state.items()}
    checkpoint.write_weights(folder, table, lambda name: whole(state[name]))
    if is_main():
        stored = Counter(kind for _, kind in table.values()).most_common(1)[0][0]
        (folder / "config.json").write_text(model.cfg.to_json(architecture, stored, **extra), encoding="utf-8")
        if source:
            checkpoint.carry(source, folder)


def save(model, path, dtype=None, source=None):
    """
    Writes a folder that transformers, vLLM and load() read; it appears under its name only when it is complete. The
    tokenizer's files come from `source`, by default the folder that the model was loaded from.
    """
    with atomic_dir(path) as folder:
        write_checkpoint(folder, model, source or model.source, dtype)
