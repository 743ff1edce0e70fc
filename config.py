"""
config.json of a checkpoint folder: which family of models it is, its numbers, and what they mean.

A family is a handful of flags of one transformer (model.py); a model of it is numbers. Files on the hub are in the
spelling of transformers 4, newer ones in that of 5, and both are read. What a file says that would change the numbers
and is not understood is refused by name: a model that runs and is slightly wrong is the worst outcome.

Source: transformers 5.23's configuration classes, whose defaults these are for keys that a file lacks.
"""

import dataclasses
import json
import typing
from dataclasses import dataclass, field

from checkpoint import read_json
from common import die

@dataclass(frozen=True)
class Family:
    """What all models of one `model_type` share and config.json does not say."""
    name: str  # of the architecture: CohereForCausalLM
    parallel: bool = False  # x + attention(norm(x)) + mlp(norm(x)); else one after the other, each with its norm
    norm: str = "rms"  # "layer": LayerNorm; "rms": RMSNorm; "rms+1": RMSNorm whose weight is stored minus 1
    post_norms: bool = False  # a norm behind attention and one behind the MLP as well: four in a block
    interleaved: bool = False  # RoPE turns the pairs (2i, 2i + 1); else (i, i + D/2)
    rope_in_full: bool = True  # False: only windowed layers have positions, those that see everything have none
    full_every: int = 0  # where there is a window, every so many layers one sees everything (0: none does)
    qkv_bias: bool = False
    qk_norm: str = ""  # "rms": one weight (D,) for all heads; "head": LayerNorm, one per head, if config.use_qk_norm
    gelu: bool = False  # the MLP's gate is gelu (its tanh form) instead of silu
    embed_scale: bool = False  # embeddings times sqrt(C)
    defaults: dict = field(default_factory=dict)  # what transformers takes for a key that config.json lacks


IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
QWEN = {"sliding_window": 4096, "layer_norm_eps": 1e-6, "num_key_value_heads": 32, "max_position_embeddings": 32768,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
FAMILIES = {
    "cohere": Family("Cohere", parallel=True, norm="layer", interleaved=True, qk_norm="head", defaults={
        "rope_theta": 500000.0, "logit_scale": 0.0625, "use_qk_norm": False, "tie_word_embeddings": True}),
    "cohere2": Family("Cohere2", parallel=True, norm="layer", interleaved=True, rope_in_full=False, full_every=4,
                      defaults={"logit_scale": 0.0625, "tie_word_embeddings": True, "sliding_window": 4096}),
    "llama": Family("Llama", defaults={"layer_norm_eps": 1e-6, "max_position_embeddings": 2048, **IDS}),
    "mistral": Family("Mistral", defaults={
        "layer_norm_eps": 1e-6, "num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072,
        **IDS}),
    "qwen2": Family("Qwen2", qkv_bias=True, defaults=QWEN),
    "qwen3": Family("Qwen3", qk_norm="rms", defaults={**QWEN, "head_dim": 128}),
    "gemma2": Family("Gemma2", norm="rms+1", post_norms=True, full_every=2, gelu=True, embed_scale=True, defaults={
        "layer_norm_eps": 1e-6, "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096,
        "tie_word_embeddings": True, "query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0, "bos_token_id": 2, "eos_token_id": 1})}

# Keys that change the numbers where their family has them, and the one value of theirs that is understood here.
ONLY = {"attention_bias": False, "mlp_bias": False, "partial_rotary_factor": 1, "use_bidirectional_attention": False,
        "is_causal": True, "per_layer_config": {}}
COHERE_ONLY = {"use_parallel_block": True, "use_gated_activation": True, "position_embedding_type": "rope_gptj",
               "rotary_pct": 1}
NEEDED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
SOME = ("sliding_window", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "logit_scale",
        "use_qk_norm")  # keys that mean something in some families only: those that have a default for them
NULL = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "bos_token_id", "eos_token_id",
        "pad_token_id")  # null means "none"; of other keys, "the default"
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def fits(key, value, kinds):
    """May this field of Config, of these types, hold this value?"""
    if value is None or bool in kinds:
        return type(value) in kinds
    if key == "eos_token_id" and isinstance(value, list):
        return all(type(i) is int for i in value)
    if type(value) not in (int, float) or not abs(value) < 2**63:  # NaN neither
        return False
    if key.endswith("_token_id"):
        return type(value) is int
    most = 10_000 if key == "num_hidden_layers" else 2**31
    return value > 0 and (float in kinds or type(value) is int and value < most)


def refuse_what_is_not_here(raw, family, path):
    """Ends with one line if a config.json asks for something that would change the numbers, or lacks a size."""
    act, only = ("hidden_activation", "gelu_pytorch_tanh") if family.gelu else ("hidden_act", "silu")
    for key, good in ({act: only} | ONLY | (COHERE_ONLY if family.parallel else {})).items():
        ignored = key == "attention_bias" and family.name in ("Qwen2", "Mistral")  # transformers' code has no such key
        if not ignored and raw.get(key, good) != good and (raw[key] is not None or key == "is_causal"):
            die(f"{path}: {key} {raw[key]!r} would change the numbers and is not supported (only {good!r} is)")
    if raw.get("auto_map"):
        die(f"{path}: auto_map {raw['auto_map']}: models with code of their own are not supported; if theirs is plainly "
            f"{family.name}'s, remove the key")
    if raw.get("quantization_config"):
        die(f"{path}: quantization_config: quantised weights are not supported; give the plain bfloat16 version")
    if missing := [key for key in NEEDED if raw.get(key) is None]:
        die(f"{path} has no {missing[0]}")


def read_rope(raw, path):
    """RoPE in either spelling -> (theta or None, Llama 3.1's scaling or None)."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        die(f"{path}: RoPE scaling {rope!r} is no object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3") or rope.get("partial_rotary_factor", 1) != 1 or any(
            isinstance(v, dict) for v in rope.values()):
        die(f"{path}: RoPE scaling {rope} would change the numbers and is not supported (only Llama 3's is)")
    if kind == "default":
        return rope.get("rope_theta"), None
    scaling = {key: rope.get(key) for key in LLAMA3}
    length = "original_max_position_embeddings"  # transformers takes the outer one of two, or the length of today
    scaling[length] = raw.get(length) or (scaling[length] if length in rope else raw.get("max_position_embeddings"))
    if bad := [key for key in LLAMA3 if not fits(key, scaling[key], (float,))]:
        die(f"{path}: llama3 RoPE scaling has {bad[0]} {scaling[bad[0]]!r}, which is no number above 0")
    if scaling["high_freq_factor"] < scaling["low_freq_factor"]:
        die(f"{path}: llama3 RoPE scaling has a high_freq_factor below its low_freq_factor")
    return rope.get("rope_theta"), scaling


def read_layer_types(raw, cfg, path):
    """Per layer "sliding_attention" or "full_attention", as the file says or its family has it; None without a window."""
    family, n, types = cfg.family, cfg.num_hidden_layers, raw.get("layer_types")
    if cfg.sliding_window is None:
        if not family.rope_in_full:
            die(f"{path}: sliding_window {raw.get('sliding_window')!r}: without a window this family has no positions")
        own = ["full_attention"] * n
    else:
        first = raw.get("max_window_layers", 28) if cfg.model_type.startswith("qwen") else 0
        every = (raw.get("sliding_window_pattern") if cfg.model_type == "cohere2" else None) or family.full_every
        if type(first) is not int or type(every) is not int:
            die(f"{path}: max_window_layers and sliding_window_pattern must be whole numbers")
        own = ["sliding_attention" if i >= first and not (every and (i + 1) % every == 0) else "full_attention"
               for i in range(n)]
    types = types or own
    known = ["full_attention"] + ["sliding_attention"] * (cfg.sliding_window is not None)
    if not isinstance(types, list) or len(types) != n or any(t not in known for t in types) or (
            cfg.model_type == "mistral" and types != own):
        die(f"{path}: layer_types {types!r} is not supported for {n} layers of {cfg.model_type} with sliding_window "
            f"{cfg.sliding_window}")
    return types if cfg.sliding_window is not None else None


@dataclass
class Config:
    """config.json, in Hugging Face's words. Values of a model are read from its folder; these defaults are tiny."""
    model_type: str = "cohere"  # a key of FAMILIES
    vocab_size: int = 4096  # V
    hidden_size: int = 128  # C
    num_hidden_layers: int = 4
    num_attention_heads: int = 4  # H
    num_key_value_heads: int = 2  # Hkv: each key/value head serves H / Hkv query heads
    head_dim: int | None = None  # D; None: C / H
    intermediate_size: int = 384  # width of the MLP
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # Llama 3.1's: factor, low_freq_factor, high_freq_factor, and the length before it
    layer_norm_eps: float = 1e-5  # "rms_norm_eps" in the files of families with RMSNorm
    logit_scale: float = 1.0  # Aya Expanse 8B: 0.125, 32B: 0.0625
    use_qk_norm: bool = False  # Cohere: per-head LayerNorm of q and k before RoPE (Command R+)
    tie_word_embeddings: bool = True  # the head is the embedding matrix
    sliding_window: int | None = None  # a windowed layer's query sees this many tokens, itself included
    layer_types: list | None = None  # per layer "sliding_attention" or "full_attention"; None: all full
    query_pre_attn_scalar: float | None = None  # scores are divided by its square root; None: by that of D
    attn_logit_softcapping: float | None = None  # c: a score s becomes c tanh(s / c)
    final_logit_softcapping: float | None = None  # the same for logits
    max_position_embeddings: int = 8192
    bos_token_id: int | None = 5
    eos_token_id: int | list | None = 255001  # end of turn: what a chat completion ends with
    pad_token_id: int | None = 0
    initializer_range: float = 0.02
    raw: dict = field(default_factory=dict, repr=False, compare=False)  # config.json as it was read

    def __post_init__(self):
        if self.head_dim is None and type(self.hidden_size) is type(self.num_attention_heads) is int:  # else see check()
            self.head_dim = self.hidden_size // max(1, self.num_attention_heads)

    @property
    def family(self):
        return FAMILIES[self.model_type]

    def check(self, path):
        """Ends with one line unless every number is of the right kind and there is a model of them."""
        for key, hint in typing.get_type_hints(Config).items():
            value, kinds = getattr(self, key), typing.get_args(hint) or (hint,)
            if key not in ("raw", "rope_scaling", "layer_types", "model_type") and not fits(key, value, kinds):
                die(f"{path}: {key} is {value!r}, which is no " + (
                    "true or false" if bool in kinds else "token id" if key.endswith("_token_id") else
                    "number above 0" if float in kinds else "whole number above 0 that a model could have"))
        if self.num_attention_heads % self.num_key_value_heads:
            die(f"{path}: num_attention_heads {self.num_attention_heads} must be a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}")
        if self.head_dim % 2:
            die(f"{path}: head_dim {self.head_dim} is odd, and RoPE turns pairs")
        return self

    def window(self, layer):
        """How many tokens this layer's queries see, or None: all."""
        return self.sliding_window if self.layer_types and self.layer_types[layer] == "sliding_attention" else None

    @staticmethod
    def from_json(path):
        """
        Reads a Hugging Face config.json, in transformers 4's spelling (rope_theta, sliding_window_pattern) or 5's
        (rope_parameters, layer_types). What would change the numbers and is not understood is refused by its name.
        """
        return Config.from_dict(read_json(path), path)

    @staticmethod
    def from_dict(raw, path="config.json"):
        family = FAMILIES.get(raw.get("model_type") if isinstance(raw.get("model_type"), str) else None)
        if family is None:
            die(f"{path}: model_type {raw.get('model_type')!r} is not supported; what is: {', '.join(FAMILIES)}")
        refuse_what_is_not_here(raw, family, path)

        # 1) what the file says, else what transformers would take
        values = {"num_key_value_heads": raw["num_attention_heads"], "tie_word_embeddings": False} | family.defaults
        for f in dataclasses.fields(Config):
            key = "rms_norm_eps" if f.name == "layer_norm_eps" and family.norm != "layer" else f.name
            known = f.name not in ("raw", "layer_types", "rope_scaling") and not (
                f.name in SOME and f.name not in family.defaults)
            if known and key in raw and (raw[key] is not None or key in NULL):
                values[f.name] = raw[key]
        if raw.get("num_key_value_heads", 0) is None:  # written as null: as many as heads; not written: the default
            values["num_key_value_heads"] = raw["num_attention_heads"]
        if raw["model_type"].startswith("qwen") and raw.get("use_sliding_window") is not True:
            values["sliding_window"] = None

        # 2) RoPE, 3) which layers see a window only
        theta, values["rope_scaling"] = read_rope(raw, path)
        values["rope_theta"] = theta or values.get("rope_theta", Config.rope_theta)
        cfg = Config(raw=raw, **values | {"model_type": raw["model_type"]}).check(path)
        cfg.layer_types = read_layer_types(raw, cfg, path)
        return cfg

    def to_json(self, architecture=None, dtype=None, **extra):
        """
        The text of a config.json that transformers reads: the one this model came from, changed where the model was,
        with RoPE in both spellings; or one from these fields. dtype: what the weights are stored in.
        """
        family = self.family
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("raw", "rope_scaling")}
        if self.raw:
            before = Config.from_dict(self.raw)
            own = {k: v for k, v in own.items() if v != getattr(before, k)}
        else:
            own = {k: v for k, v in own.items() if (v is not None or k in family.defaults or k.endswith("_id")) and not (
                k in SOME and k not in family.defaults or k == "layer_types" and self.model_type == "mistral")}
            if "query_pre_attn_scalar" in own:
                own["query_pre_attn_scalar"] = self.query_pre_attn_scalar or self.head_dim
            own |= {"architectures": [f"{family.name}ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
                    "use_cache": True}
            own |= {"hidden_activation": "gelu_pytorch_tanh"} if family.gelu else {"hidden_act": "silu"}
            own |= {"use_sliding_window": self.sliding_window is not None} if "qwen" in self.model_type else {}
        if "layer_norm_eps" in own and family.norm != "layer":
            own["rms_norm_eps"] = own.pop("layer_norm_eps")
        values = {k: v for k, v in self.raw.items() if not k.startswith("rope_")} | own
        scaling = {"rope_type": "llama3", **self.rope_scaling} if self.rope_scaling else None
        values |= {"rope_theta": self.rope_theta,
                   "rope_parameters": {"rope_theta": self.rope_theta, **(scaling or {"rope_type": "default"})}}
        values |= ({"rope_scaling": scaling} if scaling else {}) | extra
        if architecture:
            values["architectures"] = [architecture]
        if dtype:
            values |= {k: str(dtype).removeprefix("torch.") for k in ("dtype", "torch_dtype") if k in values} or {
                "torch_dtype": str(dtype).removeprefix("torch.")}
        return json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False)
