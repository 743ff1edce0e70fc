"""
xCOMET's network by hand: the encoder XLM-RoBERTa-XL (a pre-norm BERT with learned positions), attention over its layers, the
estimator of the score and the tagger of errors. tasks/xcomet.py makes a score of what it gives.

B rows, T tokens, C hidden_size, N layers. Parameter names are the published ones, so weights load without a table of names.
Sources: Goyal et al. 2021, arXiv 2105.00572 (the encoder); Rei et al. 2022, https://aclanthology.org/2022.wmt-1.60 (layerwise
attention, estimator and tagger); transformers' XLMRobertaXLModel and unbabel-comet 2.2.7 for every detail.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import Embedding, Linear

SEVERITIES = ("minor", "major", "critical")  # labels 1, 2, 3 of the tagger; 0 is "no error"


@dataclass
class Sizes:
    """The encoder's config.json, and below it what hparams.yaml says of the heads."""
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int  # rows of the position table; the first pad_token_id + 1 stand for no token
    type_vocab_size: int
    pad_token_id: int
    bos_token_id: int
    eos_token_id: int
    layer_norm_eps: float
    word_layer: int  # which hidden state the tagger reads: 0 the embeddings, N the last, normed one
    hidden_sizes: list  # widths of the estimator

    @property
    def longest(self):
        """Tokens of a joint row: 512."""
        return self.max_position_embeddings - 2


class Norm(nn.LayerNorm):
    """LayerNorm of an fp32 input, in fp32, whatever its own weights are stored in."""

    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)


def tree(**modules):
    """Modules under names of their own: the published names are four deep where one class is enough."""
    return nn.ModuleDict(modules)


class Layer(nn.Module):
    """Attention, then the MLP, each behind its own norm (pre-norm). The residual stream stays fp32 where weights are bf16."""

    def __init__(self, cfg):
        super().__init__()
        C, self.heads = cfg.hidden_size, cfg.num_attention_heads
        self.attention = tree(self=tree(query=Linear(C, C), key=Linear(C, C), value=Linear(C, C)),
                              output=tree(dense=Linear(C, C)), self_attn_layer_norm=Norm(C, cfg.layer_norm_eps))
        self.intermediate = tree(dense=Linear(C, cfg.intermediate_size))
        self.output = tree(dense=Linear(cfg.intermediate_size, C))
        self.LayerNorm = Norm(C, cfg.layer_norm_eps)

    def forward(self, x, mask):  # x (B, T, C) fp32, mask (B, 1, 1, T) bool: the tokens to look at
        dtype = self.output["dense"].weight.dtype
        h = self.attention["self_attn_layer_norm"](x).to(dtype)
        q, k, v = (self.attention["self"][name](h).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, T, C / heads)
                   for name in ("query", "key", "value"))
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        x = x + self.attention["output"]["dense"](a).float()
        h = F.gelu(self.intermediate["dense"](self.LayerNorm(x).to(dtype)))  # the exact gelu, not its tanh form
        return x + self.output["dense"](h).float()


class Encoder(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        C, self.pad = cfg.hidden_size, cfg.pad_token_id
        self.embeddings = tree(word_embeddings=Embedding(cfg.vocab_size, C), token_type_embeddings=Embedding(
            cfg.type_vocab_size, C), position_embeddings=Embedding(cfg.max_position_embeddings, C))
        self.encoder = tree(layer=nn.ModuleList(Layer(cfg) for _ in range(cfg.num_hidden_layers)),
                            LayerNorm=Norm(C, cfg.layer_norm_eps))

    def states(self, ids):
        """ids (B, T), right-padded -> yields N + 1 hidden states (B, T, C) fp32: the embeddings, then every layer's output,
        the last one only after the final norm."""
        mask = ids != self.pad
        position = torch.where(mask, mask.cumsum(1) + self.pad, self.pad)  # fairseq's: the first token has pad + 1
        x = (self.embeddings["word_embeddings"](ids).float() + self.embeddings["position_embeddings"](position).float()
             + self.embeddings["token_type_embeddings"].weight[0].float())
        for layer in self.encoder["layer"]:
            yield x
            x = layer(x, mask[:, None, None])
        yield self.encoder["LayerNorm"](x)


class XComet(nn.Module):
    """Encoder, layerwise attention, estimator, tagger. `source`, `stored`: as in model.Transformer."""

    source, stored, has_head = None, torch.float32, False

    def __init__(self, cfg):
        super().__init__()
        self.cfg, C = cfg, cfg.hidden_size
        self.encoder = tree(model=Encoder(cfg))
        self.layerwise_attention = nn.Module()
        self.layerwise_attention.scalar_parameters = nn.ParameterList(torch.zeros(1) for _ in range(cfg.num_hidden_layers + 1))
        self.layerwise_attention.gamma = nn.Parameter(torch.ones(1))
        widths, ff = [C, *cfg.hidden_sizes], []
        for a, b in zip(widths, widths[1:]):
            ff += [Linear(a, b), nn.Tanh(), nn.Identity()]  # where training has dropout: it takes a number in the names
        self.estimator = tree(ff=nn.Sequential(*ff, Linear(widths[-1], 1)))
        self.hidden2tag = Linear(C, 1 + len(SEVERITIES))

    def heads_in_fp32(self):
        for head in (self.layerwise_attention, self.estimator, self.hidden2tag):
            head.float()
        return self

    def forward(self, ids):
        """ids (B, T) -> (scores (B,), probabilities of "no error", minor, major, critical (B, T, 4)), fp32."""
        first = []  # every hidden state of the token <s>, which stands for the sentence
        for k, x in enumerate(self.encoder["model"].states(ids)):
            first.append(x[:, 0])
            if k == self.cfg.word_layer:
                words = x
        # Softmax, whatever hparams.yaml says. It says sparsemax, but a bug (unbabel-comet issue 195) let the models be
        # trained with softmax; 2.2.5 began to obey the file and scores moved by up to 10 % (issue 244). Since then the files
        # on the hub say "sparsemax_patch", which unbabel-comet takes for softmax as well.
        mix = torch.cat(list(self.layerwise_attention.scalar_parameters)).softmax(0)  # (N + 1,)
        sentence = self.layerwise_attention.gamma * torch.einsum("n,nbc->bc", mix, torch.stack(first))
        return self.estimator["ff"](sentence).squeeze(-1), self.hidden2tag(words).softmax(-1)


def empty(cfg):
    with torch.device("meta"):
        return XComet(cfg)
