"""
A whole model through its Triton kernels, which the other tests reach on a GPU only: the same losses and gradients as by
the CPU paths, in every family's way of calling them; under torch.compile without a graph break, under activation
checkpointing, and sharded by FSDP2. Without a GPU the kernels run in Triton's interpreter (conftest.py).

    python -m pytest tests/test_kernels_in_model.py
"""

import importlib
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import tiny
from config import Config
from generate import generate
from model import Transformer

OPS = ["attention", "decode", "layernorm", "rope", "sample", "swiglu", "token_logps"]
SIZES = dict(vocab_size=96, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
             intermediate_size=40, initializer_range=0.3)
WINDOWS = dict(num_hidden_layers=2, sliding_window=9, layer_types=["sliding_attention", "full_attention"])
FAMILIES = {
    "cohere": dict(use_qk_norm=True, logit_scale=0.5), "cohere2": dict(logit_scale=0.5, **WINDOWS),
    "llama": dict(tie_word_embeddings=False), "qwen3": dict(), "qwen2": dict(),
    "gemma2": dict(attn_logit_softcapping=5.0, final_logit_softcapping=9.0, query_pre_attn_scalar=8.0, **WINDOWS)}
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's: log of 0, in the interpreter


def use_kernels(patch):
    """From now on every tensor goes to Triton."""
    for op in OPS:
        patch.setattr(importlib.import_module(f"kernels.{op}"), "use_triton", lambda x: True)


def make(family, device="cpu"):
    model = Transformer(Config(model_type=family, **SIZES | FAMILIES[family])).init_weights(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1 or "norm" in name:
                p += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)))
    return model.to(device)


def batch(device="cpu"):
    """Two packed rows: documents of 1, 1, 10 and 5 tokens, and of 17, so some are longer than the window of 9."""
    ids = torch.randint(0, 96, (2, 17), generator=torch.Generator().manual_seed(1))
    doc_start = torch.tensor([[0] + [1] + [2] * 10 + [12] * 5, [0] * 17], dtype=torch.int32)
    mask = torch.rand((2, 17), generator=torch.Generator().manual_seed(2)) < 0.7
    return ids.to(device), mask.to(device), doc_start.to(device)


def loss_and_gradients(model, forward=None):
    ids, mask, doc_start = batch(next(model.parameters()).device)
    loss = -(forward or model)(ids, mask, doc_start).sum()
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def close(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a.cpu(), b.cpu(), atol=2e-5 * b.abs().max().item() + 1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_those_of_the_cpu_paths(triton_device, monkeypatch, family):
    expected = loss_and_gradients(make(family))
    use_kernels(monkeypatch)
    close(loss_and_gradients(make(family, triton_device)), expected)


def test_sampling_with_rotation_in_place(triton_device, monkeypatch):
    prompts = [[5, 9, 30], [7] * 12, [1, 2, 3, 4, 5, 6, 7]]
    expected = generate(make("cohere2"), prompts, 4)
    rotated, file = [], importlib.import_module("kernels.rope")
    plain = file._rotate_in_place
    monkeypatch.setattr(file, "_rotate_in_place", lambda *a: rotated.append(1) or plain(*a))
    use_kernels(monkeypatch)
    assert generate(make("cohere2", triton_device), prompts, 4) == expected and rotated


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("options", [{}, dict(temperature=1.0, top_p=0.9, min_p=0.02, samples=3, stop_ids=set(range(6)))])
def test_a_gpu_samples_what_the_cpu_samples(options):
    """Through graphs and the fused draw, with slots that are refilled; rounding may turn one draw in many thousand."""
    rng = random.Random(0)
    prompts = [[rng.randrange(60) for _ in range(n)] for n in (4, 1, 9, 4, 7, 2, 12, 5, 5, 3)]
    sizes = dict(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                 intermediate_size=48, logit_scale=0.7, initializer_range=0.4)
    on_cpu = Transformer(Config(**sizes)).init_weights(1)
    on_gpu = Transformer(Config(**sizes)).init_weights(1).cuda()
    for batch_size in (1, 3, 256):
        ids, logps = generate(on_gpu, prompts, 40, batch_size=batch_size, logps=True, seed=2, **options)
        expected, scores = generate(on_cpu, prompts, 40, batch_size=batch_size, logps=True, seed=2, **options)
        same = [a == b for row, other in zip(ids, expected) for a, b in zip(row, other)]
        assert np.mean(same) > 0.9, (batch_size, same)
        for a, b, x, y in zip(ids, expected, logps, scores):
            assert a != b or np.allclose(sum(x, []), sum(y, []), atol=1e-3)


def test_rope_writes_in_place_only_where_nothing_is_recorded(triton_device, monkeypatch):
    use_kernels(monkeypatch)
    rope = importlib.import_module("kernels.rope").rope
    q, k = (torch.randn(1, 5, heads, 16, device=triton_device) for heads in (4, 2))
    cos, sin = torch.randn(5, 8, device=triton_device), torch.randn(5, 8, device=triton_device)
    for interleaved in (True, False):
        expected = rope(q, k, cos, sin, interleaved)
        mine = q.clone(), k.clone()
        out = rope(*mine, cos, sin, interleaved, in_place=True)
        assert out[0] is mine[0] and all(torch.equal(a, b) for a, b in zip(out, expected))
        leaf = q.clone().requires_grad_()
        recorded = rope(leaf, k.clone(), cos, sin, interleaved, in_place=True)
        assert torch.equal(leaf, q) and torch.equal(recorded[0], expected[0])
        narrow = torch.stack((q, q), -1)[..., 0]  # not in one piece: somebody else's memory lies between
        assert torch.equal(rope(narrow, k.clone(), cos, sin, interleaved, in_place=True)[0], expected[0])
        assert torch.equal(narrow, q)


def test_under_activation_checkpointing(triton_device, monkeypatch):
    use_kernels(monkeypatch)
    model = make("cohere", triton_device)
    expected = loss_and_gradients(model)
    for block in model.model.layers:
        plain = block.forward
        block.forward = lambda *a, plain=plain: checkpoint(plain, *a, use_reentrant=False)
    close(loss_and_gradients(model), expected)


@pytest.mark.parametrize("family", ["cohere", "gemma2"])
def test_a_compiled_block_has_no_graph_break(triton_device, monkeypatch, family):
    """fullgraph: torch.compile raises where it would have to leave the graph."""
    use_kernels(monkeypatch)
    model = make(family, triton_device)
    expected = loss_and_gradients(model)
    block = model.model.layers[0]  # in Gemma 2, one with a window
    block.forward = torch.compile(block.forward, backend="aot_eager", fullgraph=True)
    close(loss_and_gradients(model), expected)
    torch._dynamo.reset()


def test_compiled_token_logps(triton_device, monkeypatch):
    use_kernels(monkeypatch)
    token_logps = importlib.import_module("kernels.token_logps").token_logps
    hidden, weight = torch.randn(7, 16, device=triton_device), torch.randn(40, 16, device=triton_device)
    targets = torch.arange(7, device=triton_device)
    expected, found = [], []
    for out, function in ((expected, token_logps), (found, torch.compile(token_logps, backend="aot_eager", fullgraph=True))):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        logps = function(*leaves, targets, 0.5, 4.0)
        out += [logps, *torch.autograd.grad(logps.sum(), leaves)]
    close(found, expected)
    torch._dynamo.reset()


def sharded(out):
    """One of two ranks."""
    import common
    import sharding
    from conftest import mend_interpreter
    if not torch.cuda.is_available():
        mend_interpreter()
    patch = pytest.MonkeyPatch()
    use_kernels(patch)
    common.init_distributed()
    model = sharding.wrap(make("cohere"))
    ids, mask, doc_start = batch()
    rows = slice(common.rank(), common.rank() + 1)
    loss = -model(ids[rows], mask[rows], doc_start[rows]).sum()  # gradients are summed over ranks
    loss.backward()
    found = [p.grad.full_tensor() for p in model.parameters()]
    total = common.all_sum(loss.item())
    if common.is_main():
        torch.save([torch.tensor(total), *found], out)


def test_sharded_over_two_ranks(triton_device, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("two ranks share this machine's CPU, in the interpreter")
    expected, code = loss_and_gradients(make("cohere")), tmp_path / "rank.py"
    code.write_text(f"import os, sys\nos.environ['TRITON_INTERPRET'] = '1'\nsys.path[:0] = [{str(tiny.ROOT)!r}, "
                    f"{str(Path(__file__).parent)!r}]\nimport test_kernels_in_model as t\nt.sharded({str(tmp_path / 'out')!r})\n",
                    encoding="utf-8")
    assert os.environ["TRITON_INTERPRET"] == "1"
    tiny.script(code, ranks=2)
    close(torch.load(tmp_path / "out", weights_only=True), expected)
