"""
How much memory does a training step take on each GPU? Computed from the shapes, not measured on GPUs.

    python bench/plan.py                                  # aya-expanse-8b and aya-expanse-32b on 1 to 64 GPUs
    python bench/plan.py --model 8b --gpus 8 --no-activation_checkpointing --micro_batch_tokens 4096
    python bench/plan.py --model DIR --reduce_every       # any checkpoint folder: its config.json is read

The numbers are those of train_sft.py and train_dpo.py with bfloat16 matmuls, which is their default on a GPU. Both
take the same: DPO packs both sides of its pairs into the micro-batch's tokens and reads the reference's log-probs from
a file. Only --live_reference adds a second model's shards. A step has a few moments at which memory may be at its peak;
each is a sum of the parts below, and the tables show the largest.

What comes on top: the CUDA context, NCCL's and cuBLAS's buffers, and what the allocator cannot use between its blocks.
So a total just below a GPU's memory does not fit. Online DPO also keeps the reward model, whole, on every GPU and
samples with whole weights. A row longer than --micro_batch_tokens makes a larger micro-batch. Not for --compile.

tests/test_plan.py holds the parts against what PyTorch does: shards, averages, gradients and saved tensors of small
models byte by byte, and the peak of whole steps at an 8B model's width, through the real FSDP, on tensors without data.
"""

import dataclasses
import importlib
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import atomic_file, die, parse_config, print0  # noqa: E402
from config import Config as ModelConfig  # noqa: E402
from model import Transformer  # noqa: E402
from run import RunConfig  # noqa: E402

slices = importlib.import_module("kernels.token_logps")._slices  # `kernels.token_logps` is the function
GB = 10**9
LIMITS = (80 * GB, 141 * GB)  # an H100's and an H200's memory, as they are sold
FP32, BF16 = 4, 2  # bytes of a number: of weights at rest, of sums of gradients, of averages; of what matmuls see
MODELS = {  # as published
    "8b": dict(model_type="cohere", vocab_size=256_000, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
               num_key_value_heads=8, intermediate_size=14336, rope_theta=10_000.0, logit_scale=0.125),
    "32b": dict(model_type="cohere", vocab_size=256_000, hidden_size=8192, num_hidden_layers=40, num_attention_heads=64,
                num_key_value_heads=8, intermediate_size=24576, rope_theta=4_000_000.0, logit_scale=0.0625)}


@dataclass
class Config:
    model: list[str] = field(default_factory=lambda: ["8b", "32b"])  # aya-expanse-8b, -32b, or checkpoint folders
    gpus: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32, 64])  # numbers of GPUs (ranks)
    micro_batch_tokens: int = RunConfig.micro_batch_tokens  # tokens per forward on one GPU
    micro_batches: int = 4  # of one GPU per step; with 1 no whole gradients are held
    activation_checkpointing: bool = True  # as in the training scripts, whose default is --no-activation_checkpointing
    reduce_every: bool = False  # as in the training scripts
    cpu_offload: bool = False  # as in the training scripts
    live_reference: bool = False  # as in train_dpo.py
    out: str = ""  # markdown file to write (default: none)


FLAGS = ("activation_checkpointing", "reduce_every", "cpu_offload", "live_reference")
SETTINGS = [(), (0,), (1,), (0, 1), (0, 2), (0, 1, 2), (0, 1, 3)]  # of the second table: which of FLAGS are on

# ---------------------------------------------------------------------------------------------------------------------
# weights


@dataclass
class Group:
    """What FSDP gathers and reduces as one (sharding.wrap): a block, or the root with the rest. Numbers, not bytes."""
    whole: int  # all of it
    shard: int  # one rank's part
    padded: int  # in a collective, in which every rank's part is as long as the fullest one's


def shard_numbers(shape, ranks, rank=0):
    """
    Numbers of a tensor that one rank holds. FSDP deals rows: every rank gets ceil(rows / ranks), the last ones fewer or
    none. Rank 0 is one of the fullest: its memory is the one to plan for.
    """
    each = math.ceil(shape[0] / ranks)
    return max(0, min(each, shape[0] - each * rank)) * math.prod(shape[1:])


def groups(cfg, ranks, rank=0):
    """
    The groups of a model: (one block, the root with embedding, final norm and a head of its own if there is one). The
    shapes are those of model.py, read from a model of one block that has no data.
    """
    with torch.device("meta"):
        model = Transformer(dataclasses.replace(cfg, num_hidden_layers=1))
    found = []
    for inside in (True, False):
        shapes = [tuple(p.shape) for name, p in model.named_parameters() if name.startswith("model.layers.") == inside]
        found.append(Group(sum(map(math.prod, shapes)), sum(shard_numbers(s, ranks, rank) for s in shapes),
                           sum(ranks * shard_numbers(s, ranks) for s in shapes)))
    return found


def parameters(cfg):
    """How many numbers the model has."""
    block, root = groups(cfg, 1)
    return cfg.num_hidden_layers * block.whole + root.whole


def at_rest(cfg, ranks, rank=0):
    """Bytes of one rank's shards in float32: of the weights, or of gradients that were reduced, or of one average."""
    block, root = groups(cfg, ranks, rank)
    return FP32 * (cfg.num_hidden_layers * block.shard + root.shard)


def averages(cfg, ranks, rank=0):
    """Bytes of AdamW's two averages (optim.py), float32 shards like the weights."""
    return 2 * at_rest(cfg, ranks, rank)


# ---------------------------------------------------------------------------------------------------------------------
# activations: what autograd keeps from the forward pass for the backward pass


def kept_input(cfg, tokens, size=BF16):
    """Bytes of a block's input (tokens, C): the block's norm keeps it, or torch.utils.checkpoint does."""
    return tokens * cfg.hidden_size * size


def kept_inside(cfg, tokens, size=BF16):
    """
    Bytes kept of one block beside its input: without activation checkpointing of every block, with it of the one whose
    backward pass is running. What each autograd.Function in kernels/ saves, once where two save the same tensor.
    """
    C, D, F, family = cfg.hidden_size, cfg.head_dim, cfg.intermediate_size, cfg.family
    H, Hkv, stats = cfg.num_attention_heads, cfg.num_key_value_heads, 2 * FP32  # of a norm's row: mean, 1 / deviation
    numbers = C  # the norm's output, which the projections keep as their input
    numbers += (2 * H + 2 * Hkv) * D  # q and k, rotated, and v; attention's output, which o_proj keeps too
    numbers += (4 if family.gelu else 3) * F  # gate, up and their product, which down_proj keeps; gelu is not fused
    other = stats + FP32 * H  # and attention's log-sum-exp of every head
    if family.qk_norm == "rms" or family.qk_norm == "head" and cfg.use_qk_norm:
        numbers, other = numbers + (H + Hkv) * D, other + (H + Hkv) * stats  # q and k before their norm
    if not family.parallel:
        numbers, other = numbers + 2 * C, other + stats  # x between the halves and its norm's output
    if family.post_norms:
        numbers, other = numbers + 2 * C, other + 2 * stats  # what the norms behind both halves are given
    return tokens * (numbers * size + other)


def kept_throughout(cfg, tokens):
    """Bytes that all blocks share, kept until the last backward: RoPE's cos and sin in fp32, ids, doc_start."""
    return tokens * (2 * FP32 * (cfg.head_dim // 2) + 8 + 4)


def kept_by_head(cfg, tokens, trained, size=BF16):
    """
    Bytes kept behind the last block: its output, by the final norm; the trained rows, copied for the head, with fp32
    log-sum-exps and integers that say which they are (Transformer.selected_logps).
    """
    row = cfg.hidden_size * size
    return tokens * (row + 2 * FP32) + trained * (row + FP32 + 8 + 8 + 16)


def activations(cfg, tokens, trained, checkpointing, size=BF16):
    """Bytes that autograd keeps between the forward and the backward pass of one micro-batch."""
    block = kept_input(cfg, tokens, size) + (0 if checkpointing else kept_inside(cfg, tokens, size))
    return cfg.num_hidden_layers * block + kept_by_head(cfg, tokens, trained, size) + kept_throughout(cfg, tokens)


def flowing(cfg, tokens, size=BF16):
    """Bytes of gradients of activations at SwiGLU's backward: of the block's output, and of gate and up, made there."""
    return tokens * (cfg.hidden_size + 2 * cfg.intermediate_size) * size


def head_buffers(cfg, trained, size=BF16):
    """
    Bytes that the backward of kernels/token_logps.py needs while it runs: the fp32 gradient of the trained rows, and
    either a slice of logits in fp32 with its gradient, or the latter and an fp32 product that is added to the rows'.
    """
    rows = trained * cfg.hidden_size * FP32
    logits = trained * slices(trained, cfg.vocab_size)[0][1]
    return rows + max(logits * (FP32 + size), logits * size + rows)


# ---------------------------------------------------------------------------------------------------------------------
# moments of a step

PARTS = {  # what the table's columns are
    "weights": "this GPU's shards, float32",
    "gathered": "whole 16-bit weights that FSDP holds: the root's all the time, a block's and the next one's",
    "gradients": "what is held from micro-batch to micro-batch: float32 shards, or whole float32 ones",
    "in flight": "gradients that are being made, in 16 bits, and float32 buffers in which they are summed",
    "optimizer": "shards of two averages, float32",
    "activations": "what the backward pass needs again, and gradients of it",
    "logits": "slices of logits, and of their gradients, in the head's backward",
    "reference": "shards of the second model, float32"}


def micro_batches(flags):
    """
    The kinds of micro-batches of a step: (gradients that a rank holds before it, what is held of a group's when its
    backward is through). sharding.accumulate: with --reduce_every they are reduced each time, else behind the last one.
    """
    if flags.reduce_every or flags.micro_batches == 1:
        return [("none", "shard"), ("shard", "shard")][:flags.micro_batches]
    middle = [("whole", "whole")] if flags.micro_batches > 2 else []
    return [("none", "whole"), *middle, ("whole", "shard")]


def moments(cfg, ranks, flags):
    """
    The moments at which a step may need the most memory: (name, {part: bytes}), in the order of the backward pass, from
    the head on. A block's weights are gathered in 16 bits, and with them the next block's while this one computes. Its
    gradients appear in 16 bits; when it is through they go into a float32 buffer that is summed over the ranks, and
    that buffer is kept until the next block is through. Or, before the last micro-batch, they join whole float32 ones.
    """
    L, C, tokens = cfg.num_hidden_layers, cfg.hidden_size, flags.micro_batch_tokens
    block, root = groups(cfg, ranks)
    on_gpu = 0 if flags.cpu_offload else 1  # shards, averages and reduced gradients: here, or in the CPU's memory
    shards = at_rest(cfg, ranks) * on_gpu
    always = {"weights": shards, "optimizer": 2 * shards, "reference": shards if flags.live_reference else 0}
    held = {"none": lambda group: 0, "shard": lambda group: FP32 * group.shard * on_gpu,
            "whole": lambda group: FP32 * group.whole}
    x, inside, shared = kept_input(cfg, tokens), kept_inside(cfg, tokens), kept_throughout(cfg, tokens)
    each = x if flags.activation_checkpointing else x + inside
    # at q_proj's backward: its input and its output's gradient; of that input, the gradients' sum so far and one more;
    # the gradient of the block's output
    at_q = 4 * x + tokens * cfg.num_attention_heads * cfg.head_dim * BF16
    words = BF16 * cfg.vocab_size * C  # the head's weight gradient; tied, it waits for that of the embedding

    def moment(name, **parts):
        return name, {part: (always | parts).get(part.replace(" ", "_"), 0) for part in PARTS}

    for before, after in micro_batches(flags):

        def gradients(done, root_done=False):
            """What is held between micro-batches, when the first `done` blocks of the backward pass are through."""
            return (done * held[after](block) + (L - done) * held[before](block)
                    + held[after if root_done else before](root))

        def handed_over(group):
            """While a group's gradients are summed over the ranks: (in flight, is it counted as done already?)."""
            if after == "whole":
                return []
            buffer = FP32 * group.padded
            return [(buffer + (0 if before == "whole" else BF16 * group.whole), False),
                    # the sum then joins the shard that there is, or goes to the CPU
                    (buffer + (FP32 * group.shard if before == "shard" or not on_gpu else 0),
                     True)]

        # 1) the head; one process copies weights when they are needed and prefetches nothing
        yield moment("head", gathered=BF16 * (root.padded + (block.padded if ranks > 1 else 0)), gradients=gradients(0),
                     in_flight=words, logits=head_buffers(cfg, tokens),
                     activations=L * each + kept_by_head(cfg, tokens, tokens) + shared)

        # 2) the blocks, last to first
        for done in range(L):
            kept = (L - 1 - done) * each + x + shared  # by the blocks still to come, and this one's input
            next_block = BF16 * block.padded if ranks > 1 and done < L - 1 else 0
            here = {"gathered": BF16 * (root.padded + block.padded) + next_block, "gradients": gradients(done)}
            flight = words + (FP32 * block.padded if done and after == "shard" else 0)  # the previous block's buffer
            # the backward of gate and up, behind that of down_proj
            yield moment("blocks", **here, in_flight=flight + BF16 * C * cfg.intermediate_size,
                         activations=kept + inside + flowing(cfg, tokens))
            # that of q_proj, the last matmul: now all the block's gradients are there; then they leave
            yield moment("blocks", **here, in_flight=flight + BF16 * block.whole, activations=kept + at_q)
            for in_flight, through in handed_over(block):
                yield moment("blocks", gathered=BF16 * root.padded + next_block, gradients=gradients(done + through),
                             in_flight=words + in_flight, activations=kept)

        # 3) the embedding: its second gradient, then the root's leave
        yield moment("embedding", gathered=BF16 * root.padded, gradients=gradients(L), activations=x,
                     in_flight=2 * words + (FP32 * block.padded if after == "shard" else 0))
        for in_flight, through in handed_over(root):
            yield moment("embedding", gradients=gradients(L, through), in_flight=in_flight)

    yield moment("update", gradients=shards)


def peaks(cfg, ranks, flags):
    """{moment: {part: bytes, "total": their sum}}, of each name's largest moment."""
    found = {}
    for name, parts in moments(cfg, ranks, flags):
        total = sum(parts.values())
        if total > found.get(name, {"total": -1})["total"]:
            found[name] = parts | {"total": total}
    return found


def peak(cfg, ranks, flags):
    """{part: bytes, "total": their sum} at the largest moment."""
    return max(peaks(cfg, ranks, flags).values(), key=lambda parts: parts["total"])


def in_cpu(cfg, ranks, flags):
    """Bytes of the CPU's memory that one GPU's process takes with --cpu_offload: shards of all that is at rest."""
    return at_rest(cfg, ranks) * (4 + flags.live_reference) if flags.cpu_offload else 0


# ---------------------------------------------------------------------------------------------------------------------
# tables


def read_model(name):
    """(what to call it, its config.json)."""
    if name in MODELS:
        return f"aya-expanse-{name}", ModelConfig(**MODELS[name])
    return name, ModelConfig.from_json(Path(name) / "config.json")


def shown(flags):
    """The settings that are on, as flags."""
    return " ".join(f"`--{flag}`" for flag in FLAGS if getattr(flags, flag)) or "no flags"


def marked(total, text):
    """A total in the tables: **fits the smaller limit**, fits the larger, (fits neither)."""
    return f"**{text}**" if total <= LIMITS[0] else text if total <= LIMITS[1] else f"({text})"


def by_part(cfg, flags):
    """Lines of the table: a GPU's memory at its peak by part, and the totals of each kind of moment."""
    names = list(peaks(cfg, 1, flags))
    columns = (*PARTS, "total", *(f"at: {name}" for name in names), *["CPU memory"] * flags.cpu_offload)
    lines = [f"| GPUs | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for ranks in flags.gpus:
        found, parts = peaks(cfg, ranks, flags), peak(cfg, ranks, flags)
        cells = [f"{parts[part] / GB:.1f}" for part in PARTS] + [marked(parts["total"], f"{parts['total'] / GB:.1f}")]
        cells += [f"{found[name]['total'] / GB:.1f}" for name in names]
        cells += [f"{in_cpu(cfg, ranks, flags) / GB:.1f}"] * flags.cpu_offload
        lines.append(f"| {ranks} | {' | '.join(cells)} |")
    return lines


def by_setting(cfg, flags):
    """Lines of the table: totals, a line for each setting, a column for each number of GPUs."""
    columns = ["1 GPU" if ranks == 1 else f"{ranks} GPUs" for ranks in flags.gpus]
    lines = [f"| setting | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for setting in SETTINGS:
        here = dataclasses.replace(flags, **{flag: n in setting for n, flag in enumerate(FLAGS)})
        totals = [peak(cfg, ranks, here)["total"] for ranks in flags.gpus]
        lines.append(f"| {shown(here)} | {' | '.join(marked(total, f'{total / GB:.1f}') for total in totals)} |")
    offload = dataclasses.replace(flags, cpu_offload=True, live_reference=False)
    cells = [f"{in_cpu(cfg, ranks, offload) / GB:.1f}" for ranks in flags.gpus]
    return lines + [f"| CPU memory of one GPU's process with `--cpu_offload` | {' | '.join(cells)} |"]


def main(flags):
    if bad := [key for key in ("micro_batch_tokens", "micro_batches") if getattr(flags, key) < 1]:
        die(f"--{bad[0]} must be above 0")
    if min(flags.gpus) < 1:
        die("--gpus are numbers above 0")
    small, large = (limit // GB for limit in LIMITS)
    batches = f"{flags.micro_batches} micro-batch{'es' * (flags.micro_batches > 1)}"
    lines = [
        f"Peak memory of one GPU in GB (10^9 bytes) with {flags.micro_batch_tokens:,} tokens a micro-batch, {batches} "
        "of each GPU a step. Computed from the shapes by `bench/plan.py`, **not measured on GPUs**. "
        f"**Bold** is within {small} GB, (in brackets) beyond {large} GB. The CUDA context, NCCL's and cuBLAS's "
        "buffers and fragmentation come on top: a total just below a limit does not fit. SFT and DPO take the same, "
        "but for `--live_reference` (DPO).", "", *(f"- {part}: {what}" for part, what in PARTS.items())]
    for name in flags.model:
        title, cfg = read_model(name)
        logits = head_buffers(cfg, flags.micro_batch_tokens) / GB
        lines += [
            "", f"## {title}, {parameters(cfg) / 1e9:.2f} B parameters", "",
            f"By part, {shown(flags)}. On the right the totals of the moments of a step; the parts are those of the "
            f"largest. The head's slices of logits take {logits:.1f} GB, at their moment only.", "",
            *by_part(cfg, flags), "",
            "Totals of other settings:", "", *by_setting(cfg, flags)]
    print0("\n".join(lines))
    if flags.out:
        with atomic_file(flags.out) as f:
            f.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(parse_config(Config))
