"""
The memory plan against what PyTorch does: shards, averages and gradients of real models, on one process and on two
ranks; what autograd keeps of models that run through the Triton kernels; and the peak of whole steps through the real
FSDP, at an 8B model's width, on tensors that have sizes but no data.

    python -m pytest tests/test_plan.py
"""

import dataclasses
import importlib
import json
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common
import optim
import sharding
import tiny
from bench import plan
from config import Config
from data import Example, pack_batch
from model import Transformer
from test_kernels_in_model import OPS, use_kernels

# not even over two ranks
SMALL = Config(vocab_size=97, hidden_size=26, num_hidden_layers=3, num_attention_heads=3, num_key_value_heads=1,
               head_dim=6, intermediate_size=33)
WIDE, SHORT, ONE = (Config(**plan.MODELS["8b"] | {"num_hidden_layers": layers}) for layers in (3, 2, 1))
UNTIED = Config(model_type="llama", vocab_size=64_000, hidden_size=1024, num_hidden_layers=2, num_attention_heads=16,
                num_key_value_heads=8, head_dim=128, intermediate_size=2048, tie_word_embeddings=False)
FEW_WORDS = dataclasses.replace(UNTIED, vocab_size=1000, hidden_size=4096, intermediate_size=4096)

# (model, ranks, settings): at each of them others of the terms decide
STEPS = [
    (WIDE, 8, dict(micro_batch_tokens=16384, micro_batches=1, activation_checkpointing=False)),
    (WIDE, 8, dict(micro_batch_tokens=2048, micro_batches=2)),
    (WIDE, 8, dict(micro_batch_tokens=16384, micro_batches=2, reduce_every=True)),
    (SHORT, 12, dict(micro_batch_tokens=256, micro_batches=3)),
    (SHORT, 2, dict(micro_batch_tokens=4096, micro_batches=1, live_reference=True)),
    (ONE, 1, dict(micro_batch_tokens=4096, micro_batches=1)),
    (SHORT, 1, dict(micro_batch_tokens=4096, micro_batches=2, reduce_every=True)),
    (UNTIED, 8, dict(micro_batch_tokens=16384, micro_batches=1, activation_checkpointing=False)),
    (FEW_WORDS, 8, dict(micro_batch_tokens=16384, micro_batches=2, activation_checkpointing=False))]


# ---------------------------------------------------------------------------------------------------------------------
# weights, averages, gradients


def test_published_sizes():
    sizes = {name: plan.parameters(plan.read_model(name)[1]) for name in plan.MODELS}
    assert round(sizes["8b"] / 1e9, 2) == 8.03 and round(sizes["32b"] / 1e9, 1) == 32.3
    assert sizes["8b"] == 8_028_033_024  # half of the bytes of the published files


def step(model):
    """One optimizer step, as the training scripts take it."""
    optimizer = optim.make_optimizer(model, 0.1)
    ids, mask, doc_start = pack_batch([Example([5] * 9, [True] * 9)])
    model.token_logps(ids, mask, doc_start).sum().backward()
    found = {"weights": size_of(model.parameters()), "gradients": size_of(p.grad for p in model.parameters())}
    optim.optimizer_step(model, optimizer, 1e-3, 1.0)
    return found | {"averages": size_of(t for p in model.parameters() for t in optimizer.state[p][:2])}


def size_of(tensors):
    return sum(sharding.local(t).numel() * t.element_size() for t in tensors)


def planned(ranks, rank):
    rest = plan.at_rest(SMALL, ranks, rank)
    return {"weights": rest, "gradients": rest, "averages": plan.averages(SMALL, ranks, rank)}


def test_one_process_holds_what_is_planned():
    model = Transformer(SMALL).init_weights()
    assert plan.parameters(SMALL) == sum(p.numel() for p in model.parameters())
    assert step(model) == planned(1, 0)


def test_two_ranks_hold_what_is_planned(two_ranks):
    for rank, found in enumerate(two_ranks):
        assert found["held"] == planned(2, rank)
        block, root = plan.groups(SMALL, 2)
        assert found["whole"] == plan.FP32 * (3 * block.whole + root.whole)  # behind a micro-batch that is not the last
        assert found["gathered"] == plan.BF16 * (root.padded + block.padded)  # inside the second block's forward
    first, second = planned(2, 0)["weights"], planned(2, 1)["weights"]
    assert first > second and first + second == 4 * plan.parameters(SMALL)


def test_rows_are_dealt_out():
    for rows in (1, 2, 7, 8, 97):
        for ranks in (1, 2, 3, 8, 64):
            shards = [plan.shard_numbers((rows, 5), ranks, rank) for rank in range(ranks)]
            chunks = torch.empty(rows, 5).chunk(ranks)  # of which there may be fewer
            assert shards == [chunk.numel() for chunk in chunks] + [0] * (ranks - len(chunks))


# ---------------------------------------------------------------------------------------------------------------------
# activations

TINY = dict(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            head_dim=16, intermediate_size=40)
SHAPES = {  # family, then what is special: (dtype, sizes)
    "cohere": (torch.float32, {}),
    "cohere, 16 bits": (torch.bfloat16, dict(vocab_size=160, hidden_size=48, num_hidden_layers=3, num_attention_heads=4,
                                             num_key_value_heads=2, head_dim=32, intermediate_size=24)),
    "cohere, q and k normed": (torch.bfloat16, dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=4,
                                                    head_dim=32, intermediate_size=72, use_qk_norm=True)),
    "llama": (torch.float32, dict(tie_word_embeddings=False)),
    "qwen3": (torch.float32, dict(num_hidden_layers=1)),
    "gemma2": (torch.float32, dict(num_hidden_layers=1, final_logit_softcapping=9.0))}


def kept(model, ids, mask, doc_start):
    """Bytes that autograd keeps between forward and backward, each storage once, weights not counted."""
    found = {}

    def pack(t):
        found[t.untyped_storage()._cdata] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model.token_logps(ids, mask, doc_start)
    for p in model.parameters():
        found.pop(p.untyped_storage()._cdata, None)
    return sum(t.untyped_storage().nbytes() for t in found.values())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's: log of 0, in the interpreter
@pytest.mark.parametrize("name", SHAPES)
def test_what_autograd_keeps_is_planned(name, triton_device, monkeypatch):
    dtype, sizes = SHAPES[name]
    cfg = Config(model_type=name.split(",")[0], **TINY | sizes)
    use_kernels(monkeypatch)
    model = Transformer(cfg).init_weights().to(triton_device, dtype)
    rows = [Example([3] * n, [False] * (n // 3) + [True] * (n - n // 3)) for n in (9, 14, 2)]
    ids, mask, doc_start = pack_batch(rows, triton_device)
    for model.recompute in (False, True):
        expected = plan.activations(cfg, ids.numel(), int(mask.sum()), model.recompute, dtype.itemsize)
        assert kept(model, ids, mask, doc_start) == expected, model.recompute


# ---------------------------------------------------------------------------------------------------------------------
# whole steps


class Peak(TorchDispatchMode):
    """The most bytes that all tensors made under it took at once, in each moment of a step."""

    def __init__(self, words):
        super().__init__()
        self.words, self.alive, self.moment, self.peaks = words, {}, "", {}

    def now(self):
        return sum(s.nbytes() for ref in list(self.alive.values()) if (s := ref()) is not None)

    def begin(self, moment):
        self.moment = moment

    def note(self, t):
        storage = sharding.local(t).untyped_storage()
        key = storage._cdata
        if key not in self.alive:
            self.alive[key] = weakref.ref(storage, lambda _: self.alive.pop(key, None))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.add.Tensor and args[0].shape == self.words:
            function = torch.ops.aten.add_.Tensor  # autograd sums a tied tensor's gradients in place if nobody watches
        out = function(*args, **kwargs or {})
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.note(t)
        if function.namespace in ("aten", "nanoaya", "fsdp"):  # what FSDP does to storages is seen at the next of these
            self.peaks[self.moment] = max(self.peaks.get(self.moment, 0), self.now())
        return out


def pretend_kernels(patch):
    """
    The kernels' ops return tensors without data. The head's slices are made by the plain function instead of the op, so
    that its buffers are seen; its kernels do nothing, its matmuls only make their result, as cuBLAS does.
    """
    for op in OPS:
        patch.setattr(importlib.import_module(f"kernels.{op}"), "use_triton", lambda x: True)
    head = importlib.import_module("kernels.token_logps")
    patch.setattr(head, "_matmul_fp32", lambda a, b: torch.empty(a.shape[0], b.shape[1]))
    for name in ("_forward", "_backward"):
        patch.setattr(head, name, getattr(head, name)._init_fn)
    nothing = type("Nothing", (), {"__getitem__": lambda self, grid: lambda *args, **options: None})()
    for name in ("_fold_slice", "_slice_gradient"):
        patch.setattr(head, name, nothing)


def begins(peak, moment, module, args, out):
    out.register_hook(lambda grad: peak.begin(moment))


def measured_step(cfg, ranks, flags):
    """{moment: peak bytes of rank 0} of a step's micro-batches, with the weights and the averages there already."""
    import torch.distributed as dist
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore
    T = flags.micro_batch_tokens
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    mesh = dist.init_device_mesh("cpu", (ranks,))
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(), Peak((cfg.vocab_size, cfg.hidden_size)) as peak:
        patch.setattr(dist, "init_device_mesh", lambda *args: mesh)  # reads its ranks, which would have no data here
        patch.setattr(torch.Tensor, "nonzero", lambda mask, as_tuple: (  # all are trained
            torch.zeros(mask.numel(), dtype=torch.int64), torch.arange(mask.numel())))
        pretend_kernels(patch)
        models = [sharding.wrap(Transformer(cfg), torch.bfloat16) for _ in range(1 + flags.live_reference)]
        optimizer = optim.make_optimizer(models[0], 0.0)
        for model in models:
            model.requires_grad_(model is models[0]).recompute = flags.activation_checkpointing
        for p in models[0].parameters():
            optimizer.averages(p)
        for p in (p for model in models for p in model.parameters()):
            peak.note(p)
        # a moment begins when the gradient of a module's output is there
        for module, moment in ((models[0].model.norm, "blocks"), (models[0].model.embed_tokens, "embedding")):
            module.register_forward_hook(partial(begins, peak, moment))
        ids, mask = torch.zeros(1, T, dtype=torch.int64), torch.ones(1, T, dtype=torch.bool)
        doc_start = torch.zeros(1, T, dtype=torch.int32)
        for _ in sharding.accumulate(models[0], range(flags.micro_batches), flags.reduce_every):
            peak.begin("forward")
            with torch.no_grad():
                for model in models[1:]:
                    model.token_logps(ids, mask, doc_start)
            loss = models[0].token_logps(ids, mask, doc_start).sum()
            peak.begin("head")
            loss.backward()
        del loss
        peak.peaks["update"] = peak.now()
    dist.destroy_process_group()
    return peak.peaks


@pytest.mark.parametrize("n", range(len(STEPS)))
def test_the_moments_of_a_step_are_planned(n, two_ranks):
    cfg, ranks, flags = STEPS[n]
    found, expected = two_ranks[n % 2]["peaks"][n // 2], plan.peaks(cfg, ranks, plan.Config(**flags))
    assert found.pop("forward") < max(found.values())  # is not planned
    for moment in ("head", "blocks", "embedding", "update"):
        assert expected[moment]["total"] == pytest.approx(found[moment], rel=1e-3), moment
    assert plan.peak(cfg, ranks, plan.Config(**flags))["total"] == pytest.approx(max(found.values()), rel=3e-4)


def ranks_main(out):
    """One of two ranks: what it holds of a real model; then, without the other, its half of STEPS."""
    torch.set_num_threads(1)
    common.init_distributed()
    rank, found = common.rank(), {"held": step(sharding.wrap(Transformer(SMALL).init_weights()))}
    model = sharding.wrap(Transformer(SMALL).init_weights(), torch.bfloat16)
    groups = [part._get_fsdp_state()._fsdp_param_group.fsdp_params for part in sharding.fsdp_modules(model)]

    def look(*_):
        found["gathered"] = sum(t.untyped_storage().nbytes() for g in groups for p in g for t in p.all_gather_outputs)

    model.model.layers[1].mlp.register_forward_hook(look)
    ids, mask, doc_start = pack_batch([Example([5] * 9, [True] * 9)])
    for micro in sharding.accumulate(model, range(2)):
        model.token_logps(ids, mask, doc_start).sum().backward()
        if micro == 0:
            found["whole"] = size_of(p.unsharded_accumulated_grad for g in groups for p in g)
    common.barrier()
    torch.distributed.destroy_process_group()
    found["peaks"] = [measured_step(cfg, ranks, plan.Config(**flags)) for cfg, ranks, flags in STEPS[rank::2]]
    (Path(out) / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    out, tests = tmp_path_factory.mktemp("ranks"), str(Path(__file__).parent)
    code = out / "rank.py"
    code.write_text(f"import sys\nsys.path[:0] = [{str(tiny.ROOT)!r}, {tests!r}]\nimport test_plan\n"
                    f"test_plan.ranks_main({str(out)!r})\n", encoding="utf-8")
    tiny.script(code, ranks=2)
    return [json.loads((out / f"{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]


# ---------------------------------------------------------------------------------------------------------------------
# settings and tables


def total(cfg=WIDE, ranks=8, **flags):
    return plan.peak(cfg, ranks, plan.Config(**flags))["total"]


def test_offloaded_shards_are_not_the_gpus():
    flags = plan.Config(micro_batches=1, live_reference=True)
    away = dataclasses.replace(flags, cpu_offload=True)
    here, rest = plan.peaks(WIDE, 8, flags), plan.at_rest(WIDE, 8)
    for name, parts in plan.peaks(WIDE, 8, away).items():
        assert parts["weights"] == parts["optimizer"] == parts["reference"] == parts["gradients"] == 0
        assert name == "update" or parts["gathered"] + parts["in flight"] > 0
        assert parts["total"] <= here[name]["total"] - 4 * rest
    assert plan.in_cpu(WIDE, 8, away) == 5 * rest and plan.in_cpu(WIDE, 8, flags) == 0
    root = plan.groups(WIDE, 1)[1]  # one process: a buffer and the sum, before that goes to the CPU
    assert plan.peaks(WIDE, 1, away)["embedding"]["in flight"] == 2 * plan.FP32 * root.whole
    # whole gradients stay on the GPU
    many = plan.Config(micro_batches=2, cpu_offload=True)
    assert plan.peak(WIDE, 8, many)["gradients"] > 0.5 * 4 * plan.parameters(WIDE)


def test_settings_only_help():
    assert total(activation_checkpointing=False) > total()
    assert total(micro_batches=1) < total(micro_batches=2) <= total(micro_batches=3) == total(micro_batches=9)
    assert total(reduce_every=True, micro_batches=4) < total(micro_batches=4)
    assert total(reduce_every=True, micro_batches=1) == total(micro_batches=1)
    assert total(live_reference=True) == total() + plan.at_rest(WIDE, 8)
    assert total(ranks=16) < total(ranks=8)


def test_the_committed_tables_are_what_the_script_writes(tmp_path, capsys):
    plan.main(plan.Config(out=str(tmp_path / "plan.md")))
    written = (tmp_path / "plan.md").read_text(encoding="utf-8")
    assert written == capsys.readouterr().out
    assert written == (tiny.ROOT / "bench" / "results" / "plan.md").read_text(encoding="utf-8")
    assert "not measured on GPUs" in written


def test_a_folder_and_marks(tmp_path, capsys):
    cfg = Config(**plan.MODELS["8b"])
    (tmp_path / "config.json").write_text(cfg.to_json(), encoding="utf-8")
    assert plan.read_model(str(tmp_path))[1] == cfg
    outputs, words = [], ["--gpus", "8", "64", "--no-activation_checkpointing", "--model"]
    for model in ("8b", str(tmp_path)):
        plan.main(common.parse_config(plan.Config, [*words, model]))
        outputs.append(capsys.readouterr().out.replace(str(tmp_path), "aya-expanse-8b"))
    assert outputs[0] == outputs[1]
    assert [plan.marked(n * plan.GB, "x") for n in (1, 80, 81, 141, 142)] == ["**x**", "**x**", "x", "x", "(x)"]
    for bad in (["--micro_batches", "0"], ["--micro_batch_tokens", "0"], ["--gpus", "0"], ["--model", "nowhere"]):
        with pytest.raises(SystemExit):
            plan.main(common.parse_config(plan.Config, bad))
