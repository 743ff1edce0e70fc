"""
meter.py: model FLOPs against torch's own counter and brute force, means over rows and languages, and rows that are named.

    python -m pytest tests/test_meter.py
"""

import math

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import meter
from data import Example, Item
from model import Config, Transformer

SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 40}


def item(n, language="en", where="rows.jsonl:1", trained=2):
    example = Example(np.full(n, 5), np.arange(n) >= n - trained)
    return Item((example,), language, where)


def test_flops_are_what_torch_counts():
    """
    Three rows of 16 tokens, all trained but the first. Torch counts scores that the causal mask throws away, and does not
    count addmm_, the gradient of the head's weight.
    """
    cfg = Config(**SIZES)
    model, ids = Transformer(cfg).init_weights(0), torch.randint(0, 96, (3, 16))
    with FlopCounterMode(display=False) as counter:
        model.token_logps(ids, torch.ones(3, 16, dtype=torch.bool)).sum().backward()
    found = meter.training_flops(cfg, [16] * 3, 3 * 15)
    pairs = lambda seen: 3 * 12 * 4 * 8 * 3 * seen  # rows, FLOPs a pair and head width, heads, width, layers
    assert counter.get_total_flops() == found - pairs(16 * 17 // 2) + pairs(16 * 16) - 2 * 32 * 96 * 45


@pytest.mark.parametrize("window", [None, 1, 5, 100])
def test_visible_pairs_by_brute_force(window):
    windows = [window, None]
    cfg = Config(**SIZES | {"num_hidden_layers": 2, "model_type": "cohere2", "sliding_window": window or 10 ** 6,
                            "layer_types": ["sliding_attention", "full_attention"]})
    assert [cfg.window(layer) or 10 ** 9 for layer in (0, 1)] == [window or 10 ** 6, 10 ** 9]
    lengths = [1, 4, 23]
    pairs = sum(1 for w in windows for n in lengths for i in range(n) for j in range(i + 1) if i - j < (w or n))
    linear = 6 * 2 * (32 * 8 * (2 * 4 + 2 * 2) + 3 * 32 * 40) * sum(lengths)
    assert meter.training_flops(cfg, lengths, 7) == linear + 12 * 4 * 8 * pairs + 6 * 32 * 96 * 7


def test_speed(monkeypatch):
    cfg, items = Config(**SIZES), [item(10), item(30)]
    found = meter.speed(cfg, items, [[10], [30]], 0.5, None)
    assert found.keys() == {"seconds", "tokens_per_second", "tflops", "micro_batches", "balance"}
    assert found["tokens_per_second"] == 80 and found["micro_batches"] == 1 and found["balance"] == pytest.approx(20 / 30)
    flops = meter.training_flops(cfg, [10, 30], 4)
    assert found["tflops"] == pytest.approx(flops / 0.5 / 1e12)
    monkeypatch.setattr(meter, "world", lambda: 8)
    assert meter.speed(cfg, items, [[10], [30]], 0.5, 1e9)["mfu"] == pytest.approx(flops / 0.5 / 8e9)


@pytest.mark.parametrize("name, peak", [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12),
                                        ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA RTX A1000", None), ("NVIDIA L40", None)])
def test_peaks(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert meter.peak_flops() == peak
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert meter.peak_flops() is None


def test_means_over_rows_micro_batches_and_languages():
    m = meter.Meter()
    m.add([item(3, "ar"), item(3, "hi")], loss=(torch.tensor([6.0, 2.0]), torch.tensor([3, 1])), margin=torch.tensor([1.0, 3.0]))
    m.add([], loss=(torch.zeros(0), torch.zeros(0)), margin=torch.zeros(0))  # a rank that had nothing left to do
    m.add([item(3, "ar")], loss=(torch.tensor([8.0]), torch.tensor([1])), margin=torch.tensor([-1.0]))
    m.check()
    assert m.means() == {"loss": 16 / 5, "margin": 1.0}  # the loss over tokens, the margin over rows
    m.add([item(3, "hi")], loss=(torch.tensor([4.0]), torch.tensor([1])), margin=torch.tensor([5.0]))
    m.check()
    assert m.means() == {"loss": 4.0, "margin": 5.0}  # of this step alone
    assert m.sums() == {"ar": [2, 14.0, 4.0, 0.0, 2.0], "hi": [2, 6.0, 2.0, 8.0, 2.0]}
    assert m.per_language() == {"ar": {"n": 2, "loss": 3.5, "margin": 0.0}, "hi": {"n": 2, "loss": 3.0, "margin": 4.0}}
    assert m.per_language() == {}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_that_are_no_numbers_are_named(bad):
    rows = [item(3, where=f"שורות.jsonl:{n}") for n in range(1, 31)]
    values = torch.ones(30)
    for wrong, said in (([4], "the loss of שורות.jsonl:5 is not a number"), (range(10), ":8 and 2 more is not a number"),
                        (range(30), "the loss of every row (שורות.jsonl:1, ...) is not a number")):
        m = meter.Meter()
        x = values.clone()
        x[list(wrong)] = bad
        m.add(rows, margin=values, loss=x)
        with pytest.raises(SystemExit) as e:
            m.check()
        assert said in str(e.value) and "nothing was updated" in str(e.value)
