"""
The three training scripts: losses against hand-computed numbers, gradients that do not depend on how a batch is cut,
runs that repeat bit for bit, online rounds, and the errors a user meets.

    python -m pytest tests/test_training.py

Mutants that these tests catch. test_wrong_sft_*: mask not shifted, divided by rows, by the micro-batch's own tokens,
mean of row means, prompt trained, sign. test_wrong_dpo_*: sides swapped, beta left out, reference ignored or swapped,
beta on the wrong side of the sigmoid, IPO's square. test_sequence_logps_*: mean instead of sum, end of turn left out.
test_gradients_*, tried in the scripts themselves: loss not multiplied by the number of ranks, tokens counted on one
rank only, a mean over the micro-batch, ranks that read the same rows. test_online_*: the first policy as the reference
of every round, cut-off samples in pairs, rounds that repeat prompts.
"""

import json
import math
import random
import statistics
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import common
import merge
import optim
import tiny
import train_dpo
import train_rm
import train_sft
from common import parse_config
from chat import Chat
from data import Item, encode_row, encode_sft
from generate import generate
from model import load
from reward import load_reward_model, score
from train_dpo import dpo_loss, seq_logps
from train_sft import sft_loss

cpu = tiny.cpu
SCRIPTS = {"sft": train_sft, "rm": train_rm, "dpo": train_dpo}
WORDS = "one two three four five six seven trois cent quarante ثلاثمائة 三百 words".split()
FLAT = ["--warmup_steps", 0, "--weight_decay", 0, "--lr", 1e-3]


def run(name, *flags):
    """A script's main() in this process."""
    SCRIPTS[name].main(parse_config(SCRIPTS[name].Config, [str(f) for f in flags]))


def steps(folder):
    """The lines of the steps, but for what the clock says."""
    return [{k: v for k, v in row.items() if k != "speed"} for row in tiny.read(Path(folder) / "log.jsonl")
            if "step" in row]


def text(rng, longest=9):
    return " ".join(rng.choices(WORDS, k=rng.randint(1, longest)))


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Rows of very unequal lengths, a base model that has learnt to end its answers, and a reward model."""
    torch.set_num_threads(1)
    here, rng = tmp_path_factory.mktemp("training"), random.Random(1)
    tiny.make_checkpoint(here / "new")
    tiny.write(here / "prompts.jsonl", [
        {"id": f"q{i}", "language": ("en", "fr")[i % 2], "prompt": WORDS[i % 13] + text(rng, 2)} for i in range(9)])
    tiny.write(here / "short.jsonl", [
        {"language": "en", "prompt": text(rng), "completion": text(rng, 1)} for _ in range(64)])
    user, assistant = ({"role": role, "content": text(rng)} for role in ("user", "assistant"))
    tiny.write(here / "sft.jsonl", [
        *({"language": "en", "prompt": text(rng), "completion": text(rng)} for _ in range(8)),
        {"language": "ar", "messages": [user, assistant, {"role": "user", "content": text(rng)}, assistant]},
        {"language": "ja", "text": "三百四十七 " + text(rng)},
        {"language": "fr", "prompt": [{"role": "system", "content": "s"}, user], "completion": "c"}])
    tiny.write(here / "pairs.jsonl", [
        {"language": ("en", "fr", "ar")[i % 3], "prompt": text(rng), "chosen": text(rng) + " a",
         "rejected": text(rng) + " b", "chosen_reward": i / 4, "rejected_reward": 0.0} for i in range(11)])
    run("sft", "--model", here / "new", "--data", here / "short.jsonl", "--out", here / "base", "--max_steps", 60,
        "--batch_size", 32, "--lr", 1e-2, "--log_every", 1000)
    run("rm", "--model", here / "base", "--pairs", here / "pairs.jsonl", "--out", here / "rm", "--max_steps", 2,
        "--batch_size", 11)
    return here


def inputs(here, name):
    files = ["--data", here / "sft.jsonl"] if name == "sft" else ["--pairs", here / "pairs.jsonl"]
    return ["--model", here / "base", *files]


def rows(here, name):
    """(chat, model, examples): one Example a row for SFT, (chosen, rejected) for the others."""
    chat, model = Chat(here / "base"), load(here / "base")
    if name == "sft":
        return chat, model, [encode_sft(chat, r) for r in tiny.read(here / "sft.jsonl")]
    return chat, model, [tuple(encode_row(chat, r["prompt"], r[side]) for side in ("chosen", "rejected"))
                         for r in tiny.read(here / "pairs.jsonl")]


def logps_alone(model, example):
    """Log-probs of an example's trained tokens, from the full logits of this row alone: a list of 0-d tensors."""
    logp = model(torch.tensor([example.ids]))[0].log_softmax(-1)
    return [logp[t - 1, token] for t, token in enumerate(example.ids) if example.mask[t]]


# --- losses by hand ---

LOGPS = torch.tensor([[-1.0, -2.0, -4.0], [-8.0, -16.0, -32.0]])  # of tokens 1, 2, 3
MASK = torch.tensor([[False, False, True, True], [False, False, False, True]])


def test_sft_loss_by_hand():
    assert sft_loss(LOGPS, MASK, 3).item() == pytest.approx((2 + 4 + 32) / 3)
    # two micro-batches of a batch of three tokens add up to the same
    parts = sft_loss(LOGPS[:1], MASK[:1], 3) + sft_loss(LOGPS[1:], MASK[1:], 3)
    assert parts.item() == pytest.approx((2 + 4 + 32) / 3)
    logps = LOGPS.clone().requires_grad_()
    sft_loss(logps, MASK, 3).backward()
    assert torch.allclose(logps.grad, torch.tensor([[0.0, -1, -1], [0, 0, -1]]) / 3)


@pytest.mark.parametrize("wrong", [
    lambda l, m, n: -(l * m[:, :-1]).sum() / n,  # mask not shifted
    lambda l, m, n: -(l * m[:, 1:]).sum() / len(l),  # per row
    lambda l, m, n: -(l * m[:, 1:]).sum() / m[:, 1:].sum(),  # the micro-batch's own tokens
    lambda l, m, n: -((l * m[:, 1:]).sum(1) / m[:, 1:].sum(1)).mean(),  # mean of row means
    lambda l, m, n: -l.sum() / n,  # the prompt is trained
    lambda l, m, n: (l * m[:, 1:]).sum() / n])  # the sign
def test_wrong_sft_losses_are_seen(wrong, monkeypatch):
    monkeypatch.setitem(globals(), "sft_loss", wrong)
    with pytest.raises(AssertionError):
        test_sft_loss_by_hand()


def test_dpo_loss_by_hand():
    policy = torch.tensor([[-3.0, -9.0], [-20.0, -4.0], [-7.0, -7.0]], requires_grad=True)  # chosen, rejected
    ref = torch.tensor([[-5.0, -8.0], [-20.0, -24.0], [-7.0, -7.0]])
    loss, chosen, rejected = dpo_loss(*policy.unbind(1), *ref.unbind(1), beta=0.1)
    # log-ratios 2 and -1: 0.1 * 3 = 0.3;  0 and 20: -2;  0 and 0: 0
    expected = [math.log(1 + math.exp(-0.3)), math.log(1 + math.exp(2)), math.log(2)]
    assert loss.tolist() == pytest.approx(expected, rel=1e-6)
    assert chosen.tolist() == pytest.approx([0.2, 0.0, 0.0]) and rejected.tolist() == pytest.approx([-0.1, 2.0, 0.0])
    assert loss.shape == chosen.shape == (3,) and not chosen.requires_grad and not rejected.requires_grad
    loss.sum().backward()  # d loss / d chosen = -beta sigmoid(-beta margin)
    slope = [0.1 / (1 + math.exp(0.3)), 0.1 / (1 + math.exp(-2)), 0.05]
    assert policy.grad[:, 0].tolist() == pytest.approx([-s for s in slope])
    assert policy.grad[:, 1].tolist() == pytest.approx(slope)
    huge = dpo_loss(torch.tensor([-1e4]), torch.tensor([0.0]), torch.tensor([0.0]), torch.tensor([0.0]), 1.0)[0]
    assert huge.item() == 1e4  # log(sigmoid()) would be infinite


@pytest.mark.parametrize("wrong", [
    lambda pc, pr, rc, rr, beta: dpo(pr, pc, rr, rc, beta),  # sides swapped
    lambda pc, pr, rc, rr, beta: dpo(pc, pr, rc, rr, 1.0),  # beta left out
    lambda pc, pr, rc, rr, beta: dpo(pc, pr, 0 * rc, 0 * rr, beta),  # reference ignored
    lambda pc, pr, rc, rr, beta: dpo(pc, pr, rr, rc, beta),  # references swapped
    lambda pc, pr, rc, rr, beta: (-beta * F.logsigmoid(pc - rc - pr + rr), *dpo(pc, pr, rc, rr, beta)[1:]),
    lambda pc, pr, rc, rr, beta: ((0.5 - beta * (pc - rc - pr + rr)) ** 2, *dpo(pc, pr, rc, rr, beta)[1:])])  # IPO
def test_wrong_dpo_losses_are_seen(wrong, monkeypatch):
    monkeypatch.setitem(globals(), "dpo_loss", wrong)
    with pytest.raises(AssertionError):
        test_dpo_loss_by_hand()


dpo = dpo_loss


def test_sequence_logps_are_sums_over_the_completion(here):
    """Rows of unequal lengths in one padded batch against each row alone, its tokens one by one."""
    chat, model, pairs = rows(here, "dpo")
    examples = [e for pair in pairs for e in pair]
    found = torch.cat(seq_logps(model, [Item((e, e), "en", "") for e in examples], "cpu"))[:len(examples)]
    each = [[x.item() for x in logps_alone(model, e)] for e in examples]
    assert found.tolist() == pytest.approx([sum(x) for x in each], abs=1e-4)
    for row, (e, logps) in enumerate(zip(examples, each)):
        assert len(logps) == sum(e.mask) and e.ids[-1] == chat.end and e.mask[-1]
        for wrong in (sum(logps) / len(logps), sum(logps[:-1]), sum(logps[1:])):  # mean; last or first token lost
            assert len(logps) == 1 or abs(found[row].item() - wrong) > 1e-3


# --- what a script does in its first steps, computed anew ---

def test_first_sft_step_is_the_mean_over_trained_tokens(here, tmp_path):
    run("sft", *inputs(here, "sft"), "--out", tmp_path / "out", "--batch_size", 11, "--micro_batch_size", 3,
        "--max_steps", 1)
    _, model, examples = rows(here, "sft")
    logps = [logps_alone(model, e) for e in examples]
    trained = sum(map(len, logps))
    loss = -sum(x for row in logps for x in row) / trained
    found, = steps(tmp_path / "out")
    assert found["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert found["tokens"] == sum(len(e.ids) for e in examples)
    grads = torch.autograd.grad(loss, model.parameters())
    assert found["grad_norm"] == pytest.approx(math.sqrt(sum(g.square().sum().item() for g in grads)), rel=1e-4)


def test_first_rm_step(here, tmp_path):
    """Before training the head is 0 and the reward is mean + smallest log-prob of the completion."""
    run("rm", *inputs(here, "rm"), "--out", tmp_path / "out", "--batch_size", 11, "--micro_batch_size", 4,
        "--max_steps", 1, "--lm_weight", 0.25)
    _, model, pairs = rows(here, "rm")
    each = [[[x.item() for x in logps_alone(model, e)] for e in pair] for pair in pairs]
    margins = [statistics.fmean(c) + min(c) - statistics.fmean(r) - min(r) for c, r in each]
    found, = steps(tmp_path / "out")
    assert found["rewards/margins"] == pytest.approx(statistics.fmean(margins), abs=1e-5)
    assert found["rewards/accuracies"] == pytest.approx(sum(m > 0 for m in margins) / 11)
    nll = -sum(sum(c) for c, _ in each) / sum(len(c) for c, _ in each)
    assert found["nll"] == pytest.approx(nll, abs=1e-5)
    assert found["loss"] == pytest.approx(statistics.fmean(math.log(1 + math.exp(-m)) for m in margins), abs=1e-5)


def test_first_dpo_steps(here, tmp_path):
    """Step 1: policy == reference. Step 2: what the policy after one step (another run saved it) gives."""
    flags = [*inputs(here, "dpo"), "--batch_size", 11, "--micro_batch_size", 4, "--beta", 0.2, *FLAT]
    run("dpo", *flags, "--out", tmp_path / "one", "--max_steps", 1)
    run("dpo", *flags, "--out", tmp_path / "two", "--max_steps", 2)
    first, second = steps(tmp_path / "two")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert abs(first["rewards/margins"]) < 1e-5 and abs(first["rewards/chosen"]) < 1e-5

    _, reference, pairs = rows(here, "dpo")
    policy, losses, ratios = load(tmp_path / "one"), [], []
    for pair in pairs:
        ratio = [0.2 * (sum(logps_alone(policy, e)) - sum(logps_alone(reference, e))).item() for e in pair]
        ratios.append(ratio)
        losses.append(math.log(1 + math.exp(ratio[1] - ratio[0])))
    assert second["loss"] == pytest.approx(statistics.fmean(losses), abs=1e-4) and second["loss"] < math.log(2) - 0.01
    assert second["rewards/chosen"] == pytest.approx(statistics.fmean(c for c, _ in ratios), abs=1e-4)
    assert second["rewards/rejected"] == pytest.approx(statistics.fmean(r for _, r in ratios), abs=1e-4)
    assert second["rewards/margins"] == pytest.approx(second["rewards/chosen"] - second["rewards/rejected"], abs=1e-6)
    assert second["rewards/accuracies"] == pytest.approx(sum(c > r for c, r in ratios) / 11)
    chosen = statistics.fmean(sum(x.item() for x in logps_alone(policy, c)) for c, _ in pairs)
    assert second["logps/chosen"] == pytest.approx(chosen, abs=1e-3)


@pytest.mark.parametrize("name", SCRIPTS)
def test_training_learns_its_rows(here, tmp_path, name):
    run(name, *inputs(here, name), "--out", tmp_path / "out", "--batch_size", 11, "--max_steps", 12, "--lr", 3e-3,
        "--warmup_steps", 0)
    log = steps(tmp_path / "out")
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]
    if name != "sft":
        assert log[-1]["rewards/accuracies"] == 1


# --- one batch, cut in any way, gives one gradient ---

# ranks x micro-batches: (ranks, micro-batch size); 1x3 is cut 3 + 3 + 2
CUTS = {"1x1": (1, 8), "1x3": (1, 3), "1x4": (1, 2), "2x1": (2, 4), "2x2": (2, 2), "4x1": (4, 2)}
# the same numbers by other means: (ranks, micro-batch size, flags)
MEANS = {"recompute": (1, 8, ["--activation_checkpointing"]), "recompute-2": (2, 2, ["--activation_checkpointing"]),
         "offload": (1, 8, ["--cpu_offload"]), "offload-2": (2, 2, ["--cpu_offload"]), "every": (2, 1, ["--reduce_every"]),
         "few": (4, 1, ["--micro_batch_tokens", 1])}  # some micro-batches are empty
BFLOAT16 = {"bf16": (1, 8), "bf16-2": (2, 2)}


@pytest.fixture(scope="module")
def cuts(here):
    """
    Every script under every cut, three steps of 8 rows: folder name-cut, gradients beside it as name-cut.step; and the
    commands of others() on one and on two ranks.
    """
    def flags(name, cut, micro, *more):
        return [*inputs(here, name), "--out", here / f"{name}-{cut}", "--batch_size", 8, "--micro_batch_size", micro,
                "--max_steps", 3, *FLAT, *more]

    for cut, (ranks, micro) in CUTS.items():
        if ranks == 1:
            for name in SCRIPTS:
                tiny.keep_gradients(here / f"{name}-{cut}")
                run(name, *flags(name, cut, micro))
    optim.optimizer_step = optim.optimizer_step.plain
    todo = {ranks: [[here / f"{name}-{cut}", f"train_{name}.py", *flags(name, cut, micro)]
                    for cut, (r, micro) in CUTS.items() if r == ranks for name in SCRIPTS] for ranks in (1, 2, 4)}
    todo[1] = [["", *words] for words in others(here, "one")]
    for how, (ranks, micro, more) in MEANS.items():
        todo[ranks] += [[here / f"dpo-{how}", "train_dpo.py", *flags("dpo", how, micro, *more)]]
    for how, (ranks, micro) in BFLOAT16.items():
        todo[ranks] += [[here / f"{name}-{how}", f"train_{name}.py", *flags(name, how, micro, "--param_dtype", "bfloat16",
                                                                        "--save_dtype", "bfloat16")]
                        for name in ("rm", "dpo")]
    todo[2] += [["", *words] for words in others(here, "two")]
    tiny.jobs(here / "jobs.json", todo)
    return here


@pytest.mark.parametrize("name, cut", [*((name, cut) for name in SCRIPTS for cut in CUTS if cut != "1x1"),
                                       *(("dpo", how) for how in MEANS)])
def test_gradients_do_not_depend_on_the_cut(cuts, name, cut):
    for step in (1, 2, 3):
        expected, found = load_file(cuts / f"{name}-1x1.{step}"), load_file(cuts / f"{name}-{cut}.{step}")
        assert expected.keys() == found.keys()
        largest = max(g.abs().max() for g in expected.values())
        for key, g in expected.items():
            # float32 rounding is 1e-6; after the first step Adam has turned it into slightly different weights
            assert (found[key] - g).abs().max() < (3e-6 if step == 1 else 1e-4) * largest, (key, step)
    logs = [steps(cuts / f"{name}-{c}") for c in ("1x1", cut)]
    for a, b in zip(*logs, strict=True):
        assert a.keys() == b.keys()
        if name == "dpo" and a["step"] == 1:  # one code path, the same cut: policy == reference to the bit
            assert a["rewards/margins"] == b["rewards/margins"] == 0 == b["rewards/accuracies"]
        assert b == pytest.approx(a, rel=1e-4, abs=1e-5)
    expected, found = (load_file(cuts / f"{name}-{c}" / "model.safetensors") for c in ("1x1", cut))
    for key, p in expected.items():
        assert found[key].shape == p.shape and (found[key] - p).abs().max() < 1e-4, key


def test_compiled_blocks_give_the_same_gradients(cuts, tmp_path, monkeypatch):
    """
    --compile, with the compiler's front half alone, and one of the two blocks: the back half takes minutes on a CPU, and a
    block ten seconds.
    """
    plain, compiled = torch.nn.Module.compile, []

    def front_half(block, **options):
        compiled.append(options)
        if len(compiled) == 1:
            plain(block, backend="aot_eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", front_half)
    tiny.keep_gradients(tmp_path / "compiled")
    try:
        run("sft", *inputs(cuts, "sft"), "--out", tmp_path / "out", "--batch_size", 8, "--max_steps", 2, *FLAT, "--compile")
    finally:
        optim.optimizer_step = optim.optimizer_step.plain
    assert compiled == [{"dynamic": True}] * 2
    for step in (1, 2):
        expected, found = load_file(cuts / f"sft-1x1.{step}"), load_file(tmp_path / f"compiled.{step}")
        assert all((found[key] - g).abs().max() < 1e-5 for key, g in expected.items())


@pytest.mark.parametrize("name", ["rm", "dpo"])
def test_bfloat16_matmuls_over_float32_weights(cuts, name):
    """One rank and two agree as far as bfloat16 goes, both are near float32, and what is summed and stored is float32."""
    exact = load_file(cuts / f"{name}-1x1.1")
    both = [load_file(cuts / f"{name}-{how}.1") for how in BFLOAT16]
    for found in both:
        assert found.keys() == exact.keys() and all(g.dtype == torch.float32 for g in found.values())
        norm = lambda grads: math.sqrt(sum(g.square().sum().item() for g in grads.values()))
        away = {key: found[key] - g for key, g in exact.items()}
        assert 1e-4 < norm(away) / norm(exact) < 0.05, norm(away) / norm(exact)
    for how in BFLOAT16:
        log, plain = steps(cuts / f"{name}-{how}"), steps(cuts / f"{name}-1x1")
        assert [row["loss"] for row in log] == pytest.approx([row["loss"] for row in plain], rel=0.05)
        if name == "dpo":
            assert log[0]["rewards/margins"] == 0 and log[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
        saved = load_file(cuts / f"{name}-{how}" / "model.safetensors")
        assert all(p.dtype == torch.bfloat16 for p in saved.values())
        start = load_file(cuts / "base" / "model.safetensors")
        moved = [not torch.equal(p, start[key].bfloat16()) for key, p in saved.items() if key in start]
        assert sum(moved) > len(moved) / 2


def test_gradients_differ_between_batches(cuts):
    """So that the test above cannot pass by comparing nothing."""
    for name in SCRIPTS:
        a, b = load_file(cuts / f"{name}-1x1.1"), load_file(cuts / f"{name}-1x1.2")
        assert all((g - b[key]).abs().max() > 1e-4 for key, g in a.items() if key not in ("logp_weight",))


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("budget", [400, 1])
def test_a_budget_of_tokens_cuts_the_batch(cuts, tmp_path, name, budget):
    """Micro-batches of at most 400 tokens (120 of SFT's short rows); and of 1, which is one row alone each."""
    budget = 120 if name == "sft" and budget > 1 else budget
    tiny.keep_gradients(tmp_path / "cut")
    try:
        run(name, *inputs(cuts, name), "--out", tmp_path / "out", "--batch_size", 8, "--micro_batch_tokens", budget,
            "--max_steps", 3, *FLAT)
    finally:
        optim.optimizer_step = optim.optimizer_step.plain
    expected, found = load_file(cuts / f"{name}-1x1.1"), load_file(tmp_path / "cut.1")
    largest = max(g.abs().max() for g in expected.values())
    for key, g in expected.items():
        assert (found[key] - g).abs().max() < 3e-6 * largest, key
    for a, b in zip(steps(cuts / f"{name}-1x1"), steps(tmp_path / "out"), strict=True):
        if name == "dpo" and a["step"] == 1:
            assert a["rewards/margins"] == b["rewards/margins"] == 0  # in the same cut the reference is the same bits
        assert b == pytest.approx(a, rel=1e-4, abs=1e-5)
    counts = [row["speed"]["micro_batches"] for row in tiny.read(tmp_path / "out" / "log.jsonl") if "step" in row]
    assert counts == [8] * 3 if budget == 1 else all(1 < n < 8 for n in counts)


@pytest.mark.parametrize("name", SCRIPTS)
def test_same_seed_same_bytes(cuts, tmp_path, name):
    flags = [*inputs(cuts, name), "--batch_size", 8, "--micro_batch_size", 8, "--max_steps", 3, *FLAT]
    run(name, *flags, "--out", tmp_path / "again")
    run(name, *flags, "--out", tmp_path / "other", "--seed", 1)
    once, again, other = ((folder / "model.safetensors").read_bytes() for folder in
                          (cuts / f"{name}-1x1", tmp_path / "again", tmp_path / "other"))
    assert once == again != other


# --- scripts as a user starts them ---

def others(here, out):
    """Commands that sample or score, to be run on one and on two ranks: [script, *flags]."""
    return [
        ["train_dpo.py", "--model", here / "base", "--prompts", here / "prompts.jsonl", "--reward_model", here / "rm",
         "--rounds", 3, "--samples", 4, "--temperature", 0.6, "--max_new_tokens", 24, "--out", here / f"online-{out}",
         "--guards", "truncated", "empty",
         "--batch_size", 4, "--max_steps", 2, *FLAT],
        ["train_sft.py", "--model", "new", "--tokenizer", here / "new", "--hidden_size", 16, "--layers", 2,
         "--heads", 2, "--kv_heads", 1, "--intermediate_size", 24, "--languages", "en", "fr",
         "--data", f"{here / 'sft.jsonl'}:0.5", f"{here / 'short.jsonl'}:0.5", "--out", here / f"fresh-{out}",
         "--batch_size", 4, "--max_steps", 2, *FLAT],
        ["generate.py", "--model", here / "base", "--prompts", here / "prompts.jsonl", "--samples", 3,
         "--temperature", 1.0, "--max_new_tokens", 24, "--out", here / f"generated-{out}.jsonl"],
        ["reward.py", "--model", here / "rm", "--rows", here / "pairs.jsonl", "--audit",
         "--out", here / f"audit-{out}.json"],
        ["arbitrage.py", "--prompts", here / "prompts.jsonl", "--teachers", here / "base", here / "sft-1x1",
         "--reward_model", here / "rm", "--samples", 2, "--temperature", 1.0, "--max_new_tokens", 24,
         "--out", here / f"arbitrage-{out}"]]


def test_two_ranks_sample_and_score_as_one(cuts):
    assert tiny.read(cuts / "generated-two.jsonl") == tiny.read(cuts / "generated-one.jsonl")
    audits = [json.loads((cuts / f"audit-{n}.json").read_text()) for n in ("one", "two")]
    for language, line in audits[0].items():
        assert audits[1][language] == pytest.approx(line, abs=1e-4)
    for name in ("sft", "pairs", "completions"):
        one, two = (tiny.read(cuts / f"arbitrage-{n}" / f"{name}.jsonl") for n in ("one", "two"))
        assert len(one) == len(two) > 0
        for a, b in zip(one, two):
            assert a.keys() == b.keys() and {"reward", "chosen_reward"} & a.keys()
            for key, value in a.items():
                assert b[key] == (pytest.approx(value, abs=1e-4) if "reward" in key else value)


def test_a_fresh_model_on_two_ranks(cuts):
    one, two = (load(cuts / f"fresh-{n}") for n in ("one", "two"))
    assert one.cfg == two.cfg and one.cfg.hidden_size == 16
    assert one.cfg.vocab_size == Chat(cuts / "fresh-two").vocab_size
    for (key, a), b in zip(one.state_dict().items(), two.state_dict().values()):
        assert (a - b).abs().max() < 1e-5, key


@pytest.mark.parametrize("ranks", ["one", "two"])
def test_online_rounds(cuts, ranks):
    out, K = cuts / f"online-{ranks}", 4
    prompts = {r["id"]: r for r in tiny.read(cuts / "prompts.jsonl")}
    base, rm, chat, asked, dropped = load(cuts / "base"), load_reward_model(cuts / "rm"), Chat(cuts / "rm"), [], 0
    for number in (1, 2, 3):
        done, pairs = tiny.read(out / f"completions-{number}.jsonl"), tiny.read(out / f"pairs-{number}.jsonl")
        greedy, sampled = [r for r in done if r["sample"] == "greedy"], [r for r in done if r["sample"] != "greedy"]
        ids = list(dict.fromkeys(r["id"] for r in sampled))
        assert len(ids) == 3 and [r["id"] for r in greedy] == ids
        assert [(r["id"], r["sample"]) for r in sampled] == [(i, k) for i in ids for k in range(K)]
        asked += ids
        assert all(r["prompt"] == prompts[r["id"]]["prompt"] and r["teacher"] == "policy" for r in done)
        rewards = score(rm, chat, [(r["prompt"], r["completion"]) for r in done])
        assert [r["reward"] for r in done] == pytest.approx(rewards, abs=1e-3)
        expected = []
        for i in ids:  # best against worst of what ended and says something: a text of control characters does not
            assert all(("truncated" in r["flags"]) == (not r["ended"]) for r in sampled)
            assert all(r["completion"].strip() or "empty" in r["flags"] for r in sampled)
            group = sorted(r["reward"] for r in sampled if r["id"] == i and not {"truncated", "empty"} & set(r["flags"]))
            if len(group) > 1 and group[0] < group[-1]:
                expected.append((i, group[-1], group[0]))
            else:
                dropped += 1
        assert [(p["id"], p["chosen_reward"], p["rejected_reward"]) for p in pairs] == expected
        text_of = {(r["id"], r["reward"]): r["completion"].strip() for r in sampled}
        for p in pairs:
            assert p["chosen"].strip() == text_of[p["id"], p["chosen_reward"]]
            assert p["rejected"].strip() == text_of[p["id"], p["rejected_reward"]]
            assert p["prompt"] == prompts[p["id"]]["prompt"] and p["language"] == prompts[p["id"]]["language"]
        if number == 1:  # the first round samples the model it was given
            first = generate(base, [chat.prompt_ids(prompts[i]["prompt"]) for i in ids], 24, stop_ids={chat.end},
                             vocab_size=chat.vocab_size)
            assert [r["completion"] for r in greedy] == [chat.decode(x[0]) for x in first]
    assert sorted(asked) == sorted(prompts)  # every round asks fresh prompts
    assert dropped  # the fixture holds a tie, else the test shows less than it says
    log = tiny.read(out / "log.jsonl")
    log = [row for row in log if "step" in row or "argv" in row]
    assert [(row.get("round"), row.get("step")) for row in log] == [(None, None), *((r, s) for r in (1, 2, 3) for s in (1, 2))]
    for first in log[1::2]:  # the reference is the policy at the start of each round
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-7) and first["rewards/margins"] == 0
    assert all(abs(second["rewards/margins"]) > 1e-4 for second in log[2::2])


@pytest.mark.parametrize("name", SCRIPTS)
def test_command_line(cuts, tmp_path, name):
    done = tiny.script(f"train_{name}.py", *inputs(cuts, name), "--out", tmp_path / "out", "--batch_size", 8,
                       "--micro_batch_size=8", "--max-steps", 3, *FLAT, "--log_every", 2)
    lines = done.stdout.splitlines()
    assert [line[:14] for line in lines if line.startswith("step ")] == [f"step 000{i}/0003" for i in (1, 2, 3)]
    assert lines[-1].startswith(f"saved {tmp_path / 'out'}") and done.stderr == ""
    for a, b in zip(steps(tmp_path / "out"), steps(cuts / f"{name}-1x1"), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
    files = {p.name for p in (tmp_path / "out").iterdir()}
    files = {f for f in files if not f.startswith("reference-")}
    assert files == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "log.jsonl"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    (load_reward_model if name == "rm" else load)(tmp_path / "out")


def test_torchrun(here, tmp_path):
    done = tiny.script("train_dpo.py", *inputs(here, "dpo"), "--out", tmp_path / "out", "--batch_size", 4,
                       "--max_steps", 2, ranks=2)
    assert done.stdout.count("step 0001/0002") == 1 and done.stdout.count("saved ") == 1  # rank 0 alone speaks
    assert "Warning" not in done.stderr.replace("FutureWarning", "")
    assert tiny.read(tmp_path / "out" / "log.jsonl")[0]["ranks"] == 2
    load(tmp_path / "out")


KEYS = {"sft": {"loss", "grad_norm", "lr"},
        "rm": {"loss", "nll", "rewards/accuracies", "rewards/margins", "grad_norm", "lr"},
        "dpo": {"loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected", "logps/chosen",
                "logps/rejected", "grad_norm", "lr"}}
HEADER = {"argv", "config", "commit", "torch", "python", "device", "hardware", "ranks", "threads", "seed"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_log(cuts, name):
    for cut in ("1x1", "2x2", "4x1"):
        first, *rest, languages = tiny.read(cuts / f"{name}-{cut}" / "log.jsonl")
        assert HEADER <= first.keys()
        assert first["ranks"] == CUTS[cut][0] and first["seed"] == 0 and first["torch"] == torch.__version__
        assert parse_config(SCRIPTS[name].Config, []).__dict__.keys() == first["config"].keys()
        assert first["config"]["batch_size"] == 8 and first["config"]["lr"] == 1e-3
        assert [row["step"] for row in rest] == [1, 2, 3]
        for row in rest:
            speed = row.pop("speed")
            assert speed.keys() == {"seconds", "tokens_per_second", "tflops", "micro_batches", "balance", "peak_gb"}
            assert speed["tokens_per_second"] == pytest.approx(row["tokens"] / speed["seconds"])
            assert 0 < speed["balance"] <= 1 and speed["micro_batches"] >= 8 // CUTS[cut][0] // CUTS[cut][1]
            assert row.keys() == KEYS[name] | {"step", "tokens"}
            assert all(math.isfinite(v) for v in row.values())
        each = languages["languages"]  # of the three steps, since there was no line before
        assert sum(each[language]["n"] for language in each) == 3 * 8 and {"en", "ar", "fr"} <= each.keys()
        if name != "sft":
            for key in ("loss", "rewards/margins"):
                mean = sum(line["n"] * line[key] for line in each.values()) / 24
                assert mean == pytest.approx(statistics.fmean(row[key] for row in rest), abs=1e-5)
    assert Path(tiny.read(cuts / f"{name}-2x2" / "log.jsonl")[0]["argv"][0]).name == f"train_{name}.py"


# --- which rows are trained ---

def test_long_rows_are_dropped_counted_and_printed(here, tmp_path, capsys):
    _, _, examples = rows(here, "sft")
    lengths, languages = [len(e.ids) for e in examples], [r["language"] for r in tiny.read(here / "sft.jsonl")]
    limit = sorted(lengths)[6]
    lost = {}
    for n, language in zip(lengths, languages):
        if n > limit:
            lost[language] = lost.get(language, 0) + 1
    run("sft", *inputs(here, "sft"), "--out", tmp_path / "sft", "--batch_size", 4, "--max_tokens", limit)
    out = capsys.readouterr().out
    kept = sum(n <= limit for n in lengths)
    assert f"dropped {len(lengths) - kept} rows longer than {limit} tokens: {lost}" in out and f"{kept} rows, " in out

    for name in ("rm", "dpo"):  # a pair goes if either side is too long
        _, _, pairs = rows(here, name)
        longer = sorted(max(len(e.ids) for e in pair) for pair in pairs)
        run(name, *inputs(here, name), "--out", tmp_path / name, "--batch_size", 2, "--max_tokens", longer[4])
        out = capsys.readouterr().out
        kept = sum(n <= longer[4] for n in longer)
        assert f"dropped {11 - kept} pairs longer than {longer[4]} tokens: " in out and f"{kept} pairs, " in out
        assert all(row["tokens"] <= 4 * longer[4] for row in steps(tmp_path / name))
    for name in SCRIPTS:
        with pytest.raises(SystemExit, match="error: no (rows|pairs) "):
            run(name, *inputs(here, name), "--out", tmp_path / "none", "--max_tokens", 3)
    assert not (tmp_path / "none").exists()


def test_languages_margin_and_epochs_choose_rows(here, tmp_path, capsys):
    run("sft", *inputs(here, "sft"), "--out", tmp_path / "a", "--languages", "fr", "ja", "--batch_size", 2,
        "--epochs", 3)
    assert "2 rows, 3 steps of 2 rows, 0.02 M parameters" in capsys.readouterr().out
    run("dpo", *inputs(here, "dpo"), "--out", tmp_path / "b", "--languages", "ar", "--batch_size", 3)
    assert "3 pairs, 1 steps of 3, beta 0.1" in capsys.readouterr().out
    run("dpo", *inputs(here, "dpo"), "--out", tmp_path / "c", "--margin", 1.25, "--batch_size", 5, "--epochs", 2)
    assert "5 pairs, 2 steps of 5" in capsys.readouterr().out  # rewards 0, 0.25, ... 2.5: five lie above 1.25
    log = steps(tmp_path / "a")
    _, _, examples = rows(here, "sft")
    assert all(row["tokens"] == len(examples[9].ids) + len(examples[10].ids) for row in log)


# --- errors ---

GOOD = {"sft": {"language": "en", "prompt": "p", "completion": "c"},
        "dpo": {"language": "en", "prompt": "p", "chosen": "c", "rejected": "r"}}


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_checkpoints_of_one_run_are_kept(here, tmp_path, name, monkeypatch):
    """--keep 50 75: the weights as they were after half and three quarters of the steps, as whole folders."""
    plain, seen = optim.optimizer_step, []

    def step(model, *rest):
        norm = plain(model, *rest)
        seen.append({n: p.detach().clone() for n, p in model.named_parameters()})
        return norm

    monkeypatch.setattr(optim, "optimizer_step", step)
    run(name, *inputs(here, name), "--out", tmp_path / "out", "--max_steps", 8, "--keep", 50, 75, *FLAT)
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_dir()) == ["at-50", "at-75"]
    for folder, number in (("at-50", 4), ("at-75", 6), (".", 8)):
        model = load(tmp_path / "out" / folder)
        assert all(torch.equal(p, seen[number - 1][n]) for n, p in model.named_parameters()), folder
        assert Chat(tmp_path / "out" / folder).vocab_size == model.cfg.vocab_size
    merge.main(merge.Config(models=[str(tmp_path / "out" / f) for f in ("at-50", "at-75", "")], out=str(tmp_path / "m")))
    mean = {n: (seen[3][n].double() + seen[5][n].double() + seen[7][n].double()) / 3 for n in seen[0]}
    assert all(torch.equal(p, mean[n].float()) for n, p in load(tmp_path / "m").named_parameters())
    with pytest.raises(SystemExit, match="--keep 100"):
        run(name, *inputs(here, name), "--out", tmp_path / "no", "--max_steps", 2, "--keep", 100)


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("bad, words", [
    ("{", "is not JSON"), ('{"prompt": "p"}', "unknown language None"), ("[]", "one JSON object"),
    ('{"language": "en", "prompt": "p"}', "the row has no 'c"), ("", "is not JSON"),
    ('{"language": "en", "prompt": [], "completion": "c", "chosen": "c", "rejected": "r"}', "'prompt' must be"),
    ('{"language": "en", "prompt": "p", "completion": " ", "chosen": "c", "rejected": "c"}', "")])
def test_bad_rows_are_named(here, tmp_path, name, bad, words):
    good = json.dumps(GOOD["sft" if name == "sft" else "dpo"]) + "\n"
    path, flag = tmp_path / "rows.jsonl", "--data" if name == "sft" else "--pairs"
    path.write_text(good * 2 + bad + "\n" + good)
    with pytest.raises(SystemExit) as e:
        run(name, "--model", here / "base", flag, path, "--out", tmp_path / "out")
    line = str(e.value)
    assert line.startswith(f"error: {path}:3") and words in line and "\n" not in line
    assert not (tmp_path / "out").exists()


def test_an_error_is_one_line_and_exit_status_1(here, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"language": "en", "prompt": "p", "chosen": "c"}\n')
    flags = ["--model", here / "base", "--pairs", path, "--out", tmp_path / "out"]
    done = tiny.script("train_dpo.py", *flags, check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == (f"error: {path}:1: the row has no 'rejected'; preferences rows have language, prompt, "
                           "chosen, rejected\n")


@pytest.mark.parametrize("name, flags, words", [
    ("sft", ["--model", "{here}/none"], "none"), ("rm", ["--model", "{here}/none"], "none"),
    ("dpo", ["--model", "{here}/none"], "none"), ("dpo", ["--model", "{here}/rm"], "is not a causal language model"),
    ("sft", ["--data", "{here}/none.jsonl"], "none.jsonl not found"),
    ("sft", ["--data", "{here}/sft.jsonl:0.5", "{here}/short.jsonl"], "every file a weight"),
    ("sft", ["--data", "{here}/sft.jsonl:0"], "a weight must be above 0"),
    ("sft", ["--languages", "de"], "no rows left"), ("dpo", ["--languages", "de"], "no pairs"),
    ("dpo", ["--prompts", "{here}/prompts.jsonl"], "not both"),
    ("sft", ["--lr", "1e30", "--max_steps", "4"], "the loss of every row"),
    ("rm", ["--lr", "1e30", "--max_steps", "4"], "the loss of every row"),
    ("dpo", ["--lr", "1e30", "--max_steps", "4"], "the loss of every row"),
    ("sft", ["--max_step", "4"], "unknown argument '--max_step'")])
def test_errors(here, tmp_path, name, flags, words):
    with pytest.raises(SystemExit) as e:
        run(name, *inputs(here, name), "--out", tmp_path / "out", "--warmup_steps", 0,
            *(f.format(here=here) for f in flags))
    assert words in str(e.value) and "\n" not in str(e.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags, words", [
    (["--reward_model", "{here}/base"], "is not a reward model"), (["--reward_model", "{here}/none"], "none not found"),
    (["--rounds", "10"], "9 prompts of the languages asked for, too few for 10 rounds"),
    (["--languages", "de"], "0 prompts"),
    (["--samples", "1"], "every prompt was a tie"), (["--temperature", "0"], "every prompt was a tie"),
    (["--margin", "1000"], "every prompt was a tie"), (["--max_new_tokens", "1"], "every prompt was a tie")])
def test_online_errors(here, tmp_path, flags, words):
    with pytest.raises(SystemExit) as e:
        run("dpo", "--model", here / "base", "--prompts", here / "prompts.jsonl", "--reward_model", here / "rm",
            "--samples", 3, "--max_new_tokens", 16, "--out", tmp_path / "out", *(f.format(here=here) for f in flags))
    assert words in str(e.value) and "\n" not in str(e.value) and not (tmp_path / "out").exists()


def test_without_inputs_the_miniature_is_made_first(tmp_path, monkeypatch):
    """On a fresh clone `torchrun train_dpo.py` has nothing to train on."""
    called = []

    def recipe(words, **options):
        called.append((words, options))
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_dpo.subprocess, "run", recipe)
    with pytest.raises(KeyboardInterrupt):
        run("dpo")
    (words, options), = called
    assert words[1:] == ["recipe.py", "--until", "sft"] and Path(options["cwd"]) == tiny.ROOT
    assert "RANK" not in options["env"]
