"""
The peers' half of bench/train.py, run by the peer's interpreter: TRL's SFTTrainer and DPOTrainer, and a plain loop over
a transformers model with torch's AdamW. Nothing of nanoaya is imported here; train.py imports Clock and the settings.

    PEER_PYTHON bench/_trl.py JOB.json      # train.py writes the job; the measurement goes where the job says
"""

import json
import os
import sys
import time
from pathlib import Path

import torch

# What a user of TRL may try: arguments of its trainer, but "attention" and "weights", which go to the model. All have
# the same rows in a step as ours (the file is in the order in which ours trained it), but for those called "... order".
FLASH, PARTS, CHECKPOINTING = {"attention": "flash_attention_2"}, {"gradient_accumulation_steps": 4}, {
    "gradient_checkpointing": True}
EAGER, COMPILE, PACKED = {"attention": "eager"}, {"torch_compile": True}, {"padding_free": True, "max_length": None}
CPU = {"sdpa": {}, "eager attention": EAGER, "compile": COMPILE, "4 micro-batches": PARTS,
       "4 micro-batches, eager attention": PARTS | EAGER, "4 micro-batches, compile": PARTS | COMPILE}
GPU = {"sdpa": {}, "sdpa, checkpointing": CHECKPOINTING, "compile": COMPILE, "4 micro-batches": PARTS,
       "Liger": {"use_liger_kernel": True}, "bfloat16 weights": {"weights": "bfloat16"},
       "flash": FLASH, "flash, checkpointing": FLASH | CHECKPOINTING, "flash, 4 micro-batches": FLASH | PARTS}
SFT_CPU = {"padding-free": PACKED, "4 micro-batches, padding-free": PARTS | PACKED}  # DPOTrainer ignores padding_free
SFT_GPU = {"flash, padding-free": FLASH | PACKED, "flash, padding-free, checkpointing": FLASH | PACKED | CHECKPOINTING,
           "flash, packed in bfd order": FLASH | {"packing": True, "packing_strategy": "bfd"}}
ORDERS = {"random order": {"train_sampling_strategy": "random"},
          "group_by_length order": {"train_sampling_strategy": "group_by_length", "remove_unused_columns": False}}
PLAIN = {"whole batch": {}, "4 micro-batches": {"parts": 4}}  # of the loop below


def variants(task, mix, cuda):
    """name -> arguments: what is tried of TRL for this task ("sft", "dpo") and mix of lengths ("equal", "mixed")."""
    mixed, sft = mix == "mixed", task == "sft"
    return (GPU if cuda else CPU) | (SFT_GPU if sft and cuda else SFT_CPU if sft and mixed else {}) | (
        ORDERS if mixed else {})


class Clock:
    """
    tick() behind every optimizer step; found(): wall and CPU seconds (of all threads) of the steps behind the first
    `warmup` ones, and memory.
    """

    def __init__(self, warmup):
        self.warmup, self.wall, self.cpu, self.memory = warmup, [], [], 0.0

    def tick(self):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())
        self.memory = self.peak()
        if torch.cuda.is_available() and len(self.wall) == self.warmup:
            torch.cuda.reset_peak_memory_stats()  # loading and compiling are not a step's memory

    @staticmethod
    def peak():
        """GB: allocated on the GPU, else the most that this process ever held resident, libraries included."""
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated() / 1e9
        with open("/proc/self/status", encoding="utf-8") as f:  # ru_maxrss counts the parent before exec too
            return next(int(line.split()[1]) for line in f if line.startswith("VmHWM")) * 1024 / 1e9

    def found(self):
        step = lambda marks: [b - a for a, b in zip(marks, marks[1:])][self.warmup - 1:]
        return {"wall_s": step(self.wall), "cpu_s": step(self.cpu), "peak_gb": self.memory,
                "matmul_gflops": matmul_rate(), "threads": torch.get_num_threads()}


def matmul_rate(size=1024, repeats=12):
    """GFLOP a CPU second of a float32 product, the best of some: the machine as it is now. None on a GPU."""
    if torch.cuda.is_available():
        return None
    a, b, best = torch.randn(size, size), torch.randn(size, size), 1e9
    for _ in range(repeats):
        begin = time.process_time()
        a @ b
        best = min(best, time.process_time() - begin)
    return 2 * size**3 / best / 1e9


def sums(values, parts):
    """Of every `parts` values: a step's micro-batches."""
    return [sum(map(float, values[i:i + parts])) for i in range(0, len(values), parts)]


def read(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


# ---------------------------------------------------------------------------------------------------------------------
# TRL

def dataset(job, with_lengths):
    """The rows as conversations: TRL renders and tokenises them itself, with the folder's template."""
    from datasets import Dataset
    says = lambda role, text: [{"role": role, "content": text}]
    answers, rows = ("completion",) if job["task"] == "sft" else ("chosen", "rejected"), []
    for row in read(job["data"]):
        rows.append({"prompt": says("user", row["prompt"])} | {a: says("assistant", row[a]) for a in answers})
        if with_lengths:  # words are tokens; of pairs the longer side
            rows[-1]["length"] = len(row["prompt"].split()) + max(len(row[a].split()) for a in answers)
    return Dataset.from_list(rows)


def arguments(job, variant):
    """For SFTConfig or DPOConfig."""
    cuda, parts = torch.cuda.is_available(), variant.get("gradient_accumulation_steps", 1)
    variant = dict(variant)
    init = {"attn_implementation": variant.pop("attention", "sdpa"), "dtype": variant.pop("weights", "float32")}
    found = {
        "output_dir": job["result"] + ".trainer", "model_init_kwargs": init, "max_steps": job["steps"], "seed": 0,
        "per_device_train_batch_size": job["batch"] // parts, "max_length": job["max_tokens"],
        "learning_rate": job["lr"], "lr_scheduler_type": "constant", "weight_decay": 0.0, "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused", "adam_beta1": 0.9, "adam_beta2": 0.95,
        "bf16": job["dtype"] == "bfloat16", "use_cpu": not cuda, "gradient_checkpointing": False,
        "train_sampling_strategy": "sequential", "dataloader_num_workers": 0, "dataloader_pin_memory": cuda,
        "logging_strategy": "no", "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    if job["task"] == "dpo":
        found |= {"beta": job["beta"], "precompute_ref_log_probs": True, "precompute_ref_batch_size": job["batch"]}
    return found | variant


def trl(job):
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
    sft, variant = job["task"] == "sft", job["variant"]
    config, kind = (SFTConfig, SFTTrainer) if sft else (DPOConfig, DPOTrainer)
    clock, losses, tokens, reference = Clock(job["warmup"]), [], [], []

    class Ticks(TrainerCallback):
        def on_step_end(self, *_, **__):
            clock.tick()

    if not sft:
        precompute = kind._precompute_ref_logps

        def timed(*args):
            begin = time.perf_counter(), time.process_time()
            out = precompute(*args)
            reference[:] = time.perf_counter() - begin[0], time.process_time() - begin[1]
            return out
        kind._precompute_ref_logps = timed
    rows = dataset(job, variant.get("train_sampling_strategy") == "group_by_length")
    trainer = kind(job["model"], args=config(**arguments(job, variant)), train_dataset=rows, callbacks=[Ticks()],
                   processing_class=AutoTokenizer.from_pretrained(job["model"]))
    compute = trainer.compute_loss

    def recorded(model, inputs, *args, **kwargs):  # the trainer's own log averages and rounds
        tokens.append(inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["position_ids"].numel())
        loss = compute(model, inputs, *args, **kwargs)
        losses.append(loss.detach())
        return loss
    trainer.compute_loss = recorded
    trainer.train()
    parts = variant.get("gradient_accumulation_steps", 1)  # SFT: shares of the step's mean; DPO: means
    return clock.found() | {"loss": [x if sft else x / parts for x in sums(losses, parts)],
                            "tokens": sums(tokens, parts), "reference_s": reference}


# ---------------------------------------------------------------------------------------------------------------------
# a plain loop

def plain(job):
    """What one writes by hand: padded batches, a forward of all rows (chosen with rejected), the whole logits."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    device, sft = "cuda" if torch.cuda.is_available() else "cpu", job["task"] == "sft"
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32, attn_implementation="sdpa")
    model, tokenizer, rows = model.to(device).train(), AutoTokenizer.from_pretrained(job["model"]), read(job["data"])
    cast = lambda: torch.autocast(device, torch.bfloat16, enabled=job["dtype"] == "bfloat16")

    def encoded(row, side):
        turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]
        head = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=False)
        return tokenizer.apply_chat_template(turns, return_dict=False), len(head)

    def batch(rows):
        """ids, attention mask and labels (sides x rows, longest), padded on the right"""
        examples = [encoded(row, side) for side in (("completion",) if sft else ("chosen", "rejected")) for row in rows]
        ids = torch.zeros(len(examples), max(len(e) for e, _ in examples), dtype=torch.int64)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for i, (e, head) in enumerate(examples):
            ids[i, :len(e)], mask[i, :len(e)], labels[i, head:len(e)] = torch.tensor(e), 1, torch.tensor(e[head:])
        return ids.to(device), mask.to(device), labels.to(device)

    def logps(ids, mask, labels):
        with cast():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        picked = logits.float().log_softmax(-1).gather(2, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
        return (picked * (labels[:, 1:] != -100)).sum(1).chunk(2)

    def share(n, trained):
        """The share of micro-batch n in its step's loss."""
        ids, mask, labels = batches[n]
        if sft:
            with cast():
                return model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False,
                             num_items_in_batch=trained).loss
        (chosen, rejected), (ref_chosen, ref_rejected) = logps(ids, mask, labels), reference[n]
        margin = (chosen - ref_chosen) - (rejected - ref_rejected)
        return -torch.nn.functional.logsigmoid(job["beta"] * margin).mean() / parts

    parts = job["variant"].get("parts", 1)
    size = job["batch"] // parts
    batches = [batch(rows[i:i + size]) for i in range(0, job["steps"] * job["batch"], size)]
    begin = time.perf_counter(), time.process_time()
    with torch.no_grad():
        reference = [] if sft else [logps(*b) for b in batches]
    spent = time.perf_counter() - begin[0], time.process_time() - begin[1]
    optimizer = torch.optim.AdamW(model.parameters(), job["lr"], (0.9, 0.95), weight_decay=0.0, fused=True)
    clock, losses = Clock(job["warmup"]), []
    for first in range(0, len(batches), parts):
        trained = sum((labels[:, 1:] != -100).sum() for _, _, labels in batches[first:first + parts])
        for n in range(first, first + parts):
            loss = share(n, trained)
            loss.backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.tick()
    return clock.found() | {"loss": sums(losses, parts), "tokens": sums([mask.sum() for _, mask, _ in batches], parts),
                            "reference_s": spent}


def versions():
    import accelerate
    import transformers
    import trl as package
    return {"torch": torch.__version__, "transformers": transformers.__version__, "trl": package.__version__,
            "accelerate": accelerate.__version__}


def main(path):
    """Writes losses and tokens of every step, the reference's seconds, and what the clock saw."""
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    found = (trl if job["side"] == "TRL" else plain)(job) | {"versions": versions()}
    Path(job["result"]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
    main(sys.argv[1])
