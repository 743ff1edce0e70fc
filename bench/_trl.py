"""
The peers' half of bench/train.py, run by the peer's interpreter: TRL's SFTTrainer and DPOTrainer, and a plain loop over a
transformers model with torch's AdamW. Nothing of nanoaya is imported here, but train.py imports Clock from here.

    PEER_PYTHON bench/_trl.py JOB.json      # train.py writes the job; the measurement goes where the job says
"""

import json
import os
import sys
import time
from pathlib import Path

import torch

# What a user may try. Every variant is TRL's trainer with other arguments; "attention" goes to the model. All have the
# same rows in every step as ours (the file is in the order in which ours trained it), but for those that end in "order".
PARTS = {"gradient_accumulation_steps": 4}
CPU = {"sdpa": {}, "eager attention": {"attention": "eager"}, "compile": {"torch_compile": True}, "4 micro-batches": PARTS,
       "4 micro-batches, eager attention": PARTS | {"attention": "eager"},
       "4 micro-batches, compile": PARTS | {"torch_compile": True}}
GPU = {"sdpa": {}, "sdpa, checkpointing": {"gradient_checkpointing": True}, "compile": {"torch_compile": True},
       "sdpa, bfloat16 weights": {"weights": "bfloat16"}, "Liger": {"use_liger_kernel": True},
       "flash": {"attention": "flash_attention_2"},
       "flash, checkpointing": {"attention": "flash_attention_2", "gradient_checkpointing": True}}
SFT_CPU = {"padding-free": {"padding_free": True, "max_length": None},
           "4 micro-batches, padding-free": PARTS | {"padding_free": True, "max_length": None}}
FLASH = {"attention": "flash_attention_2", "padding_free": True}
SFT_GPU = {"flash, padding-free": FLASH | {"max_length": None},
           "flash, padding-free, checkpointing": FLASH | {"max_length": None, "gradient_checkpointing": True},
           "flash, packed in its own order": FLASH | {"packing": True, "packing_strategy": "bfd"}}
SORTED = {"random order": {"train_sampling_strategy": "random"},
          "group_by_length order": {"train_sampling_strategy": "group_by_length", "remove_unused_columns": False}}
PLAIN = {"whole batch": {}, "4 micro-batches": {"parts": 4}}  # of the loop below


def variants(task, mix, cuda):
    """name -> arguments: what is tried of TRL for this task ("sft", "dpo") and mix of lengths ("equal", "mixed")."""
    found = (GPU if cuda else CPU) | ((SFT_GPU if cuda else SFT_CPU) if task == "sft" else {})
    return found | (SORTED if mix == "mixed" else {})


class Clock:
    """
    tick() behind every optimizer step; found(): seconds and CPU seconds (of all threads) between ticks, and memory. Step 0
    has no length: what came before is loading.
    """

    def __init__(self, warmup):
        self.warmup, self.wall, self.cpu = warmup, [], []

    def tick(self):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            if len(self.wall) + 1 == self.warmup:
                torch.cuda.reset_peak_memory_stats()  # loading and compiling are not a step's memory
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())
        self.memory = self.peak()

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
    """GFLOP a CPU second of the best float32 product: the machine as it is now. None on a GPU, whose peak is known."""
    if torch.cuda.is_available():
        return None
    a, b, best = torch.randn(size, size), torch.randn(size, size), 1e9
    for _ in range(repeats):
        begin = time.process_time()
        a @ b
        best = min(best, time.process_time() - begin)
    return 2 * size**3 / best / 1e9


# ---------------------------------------------------------------------------------------------------------------------
# TRL

def read(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def dataset(job):
    """The rows as conversations: TRL renders and tokenises them itself, with the folder's template."""
    from datasets import Dataset
    says = lambda role, text: [{"role": role, "content": text}]
    answers = ("completion",) if job["task"] == "sft" else ("chosen", "rejected")
    rows = [{"prompt": says("user", row["prompt"])} | {a: says("assistant", row[a]) for a in answers}
            for row in read(job["data"])]
    for row in rows:  # words are tokens; of pairs the longer side
        row["length"] = len(row["prompt"][0]["content"].split()) + max(len(row[a][0]["content"].split()) for a in answers)
    return Dataset.from_list(rows)


def trl(job):
    """-> losses per step, tokens per step, and what the clock saw."""
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
    cuda, task, more = torch.cuda.is_available(), job["task"], dict(job["variant"])
    rows, parts = dataset(job), more.get("gradient_accumulation_steps", 1)
    if more.get("train_sampling_strategy") != "group_by_length":
        rows = rows.remove_columns("length")
    init = {"attn_implementation": more.pop("attention", "sdpa"), "dtype": more.pop("weights", "float32")}
    arguments = {
        "output_dir": job["result"] + ".trainer", "model_init_kwargs": init, "per_device_train_batch_size": job["batch"] // parts,
        "max_steps": job["steps"], "learning_rate": job["lr"], "lr_scheduler_type": "constant", "weight_decay": 0.0,
        "adam_beta1": 0.9, "adam_beta2": 0.95, "max_grad_norm": 1.0, "optim": "adamw_torch_fused",
        "bf16": job["dtype"] == "bfloat16", "use_cpu": not cuda, "gradient_checkpointing": False,
        "train_sampling_strategy": "sequential", "dataloader_num_workers": 0, "dataloader_pin_memory": cuda,
        "logging_strategy": "no", "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "seed": 0,
        "max_length": job["max_tokens"]}
    if task == "dpo":
        arguments |= {"beta": job["beta"], "precompute_ref_log_probs": True,
                      "precompute_ref_batch_size": job["batch"]}
    config, kind = (SFTConfig, SFTTrainer) if task == "sft" else (DPOConfig, DPOTrainer)
    clock, losses, tokens, reference = Clock(job["warmup"]), [], [], []

    class Ticks(TrainerCallback):
        def on_step_end(self, *_, **__):
            clock.tick()

    if task == "dpo":
        precompute = kind._precompute_ref_logps

        def timed(*args):
            begin = time.perf_counter(), time.process_time()
            out = precompute(*args)
            reference[:] = time.perf_counter() - begin[0], time.process_time() - begin[1]
            return out
        kind._precompute_ref_logps = timed
    trainer = kind(job["model"], args=config(**arguments | more), train_dataset=rows, callbacks=[Ticks()],
                   processing_class=AutoTokenizer.from_pretrained(job["model"]))
    compute = trainer.compute_loss

    def recorded(model, inputs, *args, **kwargs):  # the trainer's own log rounds
        tokens.append(inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["position_ids"].numel())
        loss = compute(model, inputs, *args, **kwargs)
        losses.append(loss.detach())
        return loss
    trainer.compute_loss = recorded
    trainer.train()
    step = lambda values, mean: [sum(map(float, values[i:i + parts])) / (parts if mean else 1)
                                 for i in range(0, len(values), parts)]
    return clock.found() | {"loss": step(losses, task == "dpo"), "tokens": step(tokens, False), "reference_s": reference}


# ---------------------------------------------------------------------------------------------------------------------
# a plain loop

def plain(job):
    """What one writes by hand: padded batches, a forward of all rows (chosen and rejected together), the whole logits."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32, attn_implementation="sdpa").to(device)
    tokenizer, rows = AutoTokenizer.from_pretrained(job["model"]), read(job["data"])
    cast = torch.autocast(device, torch.bfloat16, enabled=job["dtype"] == "bfloat16")

    def encoded(row, side):
        turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]
        head = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=False)
        return tokenizer.apply_chat_template(turns, return_dict=False), len(head)

    def batch(rows, sides):
        """ids, attention_mask, labels (rows x sides, longest), padded on the right"""
        examples = [encoded(row, side) for side in sides for row in rows]
        ids = torch.zeros(len(examples), max(len(e[0]) for e in examples), dtype=torch.int64)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for i, (e, head) in enumerate(examples):
            ids[i, :len(e)], mask[i, :len(e)], labels[i, head:len(e)] = torch.tensor(e), 1, torch.tensor(e[head:])
        return ids.to(device), mask.to(device), labels.to(device)

    def sums(ids, mask, labels):
        with cast:
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        labels = labels[:, 1:]
        picked = logits.float().log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
        return (picked * (labels != -100)).sum(1).chunk(2)

    parts = job["variant"].get("parts", 1)
    size, sides = job["batch"] // parts, ("completion",) if job["task"] == "sft" else ("chosen", "rejected")
    batches = [batch(rows[i:i + size], sides) for i in range(0, job["steps"] * job["batch"], size)]
    reference, marks = [], (time.perf_counter(), time.process_time())
    if job["task"] == "dpo":
        with torch.no_grad():
            reference = [sums(*b) for b in batches]
    spent = [time.perf_counter() - marks[0], time.process_time() - marks[1]]
    optimizer = torch.optim.AdamW(model.parameters(), job["lr"], (0.9, 0.95), weight_decay=0.0, fused=True)
    model.train()
    clock, losses = Clock(job["warmup"]), []
    for first in range(0, len(batches), parts):
        total = 0.0
        trained = sum((labels[:, 1:] != -100).sum() for _, _, labels in batches[first:first + parts])
        for n, (ids, mask, labels) in enumerate(batches[first:first + parts], first):
            if job["task"] == "sft":
                with cast:
                    loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False,
                                 num_items_in_batch=trained).loss
            else:
                (chosen, rejected), (ref_chosen, ref_rejected) = sums(ids, mask, labels), reference[n]
                margin = (chosen - ref_chosen) - (rejected - ref_rejected)
                loss = -torch.nn.functional.logsigmoid(job["beta"] * margin).mean() / parts
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        clock.tick()
    tokens = [int(mask.sum()) for _, mask, _ in batches]
    return clock.found() | {"loss": losses, "reference_s": spent,
                            "tokens": [sum(tokens[i:i + parts]) for i in range(0, len(tokens), parts)]}


def versions():
    import accelerate
    import transformers
    import trl as package
    return {"torch": torch.__version__, "transformers": transformers.__version__, "trl": package.__version__,
            "accelerate": accelerate.__version__}


def main(path):
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    found = (trl if job["side"] == "TRL" else plain)(job) | {"versions": versions()}
    Path(job["result"]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
    main(sys.argv[1])
