"""
merge.py against numbers worked out by hand, a second implementation in numpy float64, invariances, broken inputs and
kills. Run: python -m pytest tests/test_merge.py
"""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import merge  # noqa: E402

CONFIG = {"model_type": "cohere", "architectures": ["CohereForCausalLM"], "vocab_size": 37, "hidden_size": 12,
          "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 20,
          "layer_norm_eps": 1e-5, "rope_theta": 10000.0, "logit_scale": 0.125, "torch_dtype": "bfloat16"}
TOKENIZER = {"version": "1.0", "padding": None, "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2},
                                                          "merges": ["a b"]}}
SHAPES = {"model.embed_tokens.weight": (37, 12), "model.layers.0.self_attn.q_proj.weight": (12, 12),
          "model.layers.0.mlp.up_proj.weight": (20, 12), "model.layers.0.input_layernorm.weight": (12,),
          "model.layers.1.mlp.down_proj.weight": (12, 20), "model.norm.weight": (12,)}
METHODS = {"linear": {}, "slerp": {"t": 0.3}, "ties": {"density": 0.5}, "dare_ties": {"density": 0.5}}


def state(seed, dtype=torch.bfloat16, step=0.0, base=None):
    """Random tensors of SHAPES; with base: base + N(0, step)."""
    g = torch.Generator().manual_seed(seed)
    noise = {name: torch.randn(shape, generator=g) for name, shape in SHAPES.items()}
    return {name: (x * 0.1 if base is None else base[name].float() + step * x).to(dtype) for name, x in noise.items()}


def write(folder, tensors, shards=1, config=None, tokenizer=TOKENIZER, remove=()):
    """A checkpoint folder as Hugging Face's libraries write it."""
    folder.mkdir(parents=True)
    config = {k: v for k, v in {**CONFIG, **(config or {})}.items() if k not in remove}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    if tokenizer:
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names, weight_map = list(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        weight_map |= {name: file for name in names[i::shards]}
        save_file({name: tensors[name] for name in names[i::shards]}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def read(folder):
    return {name: x for file in sorted(Path(folder).glob("*.safetensors")) for name, x in load_file(file).items()}


def run(out, models, **settings):
    """merge.main in this process -> the tensors that were written."""
    merge.main(merge.Config(models=[str(m) for m in models], out=str(out),
                            **{k: str(v) if k == "base" else v for k, v in settings.items()}))
    return read(out)


def refused(match, out, models, **settings):
    """The merge ends with one line that holds every word of `match`, and leaves nothing behind."""
    before = sorted(os.listdir(out.parent))
    with pytest.raises(SystemExit) as e:
        run(out, models, **settings)
    message = str(e.value)
    assert message.startswith("error: ") and "\n" not in message, message
    for word in match.split("|"):
        assert word in message, message
    assert sorted(os.listdir(out.parent)) == before


@pytest.fixture(autouse=True)
def threads():
    """merge.main takes one thread; the tests of other files get theirs back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def family(tmp_path):
    """A base and three models fine-tuned from it, bf16, the second one in three shards."""
    base = state(0)
    write(tmp_path / "base", base, shards=2)
    for i, (name, shards) in enumerate([("a", 2), ("b", 3), ("c", 1)]):
        write(tmp_path / name, state(i + 1, step=0.02, base=base), shards=shards)
    return tmp_path


# ---------------------------------------------------------------------------------------------------------------------
# a second implementation, in numpy float64, from the formulas of the papers

def np_linear(xs, ws, normalize=True):
    total = sum(w * x for x, w in zip(xs, ws))
    return total / sum(ws) if normalize else total


def np_slerp(a, b, t):
    u, v = a.ravel() / np.linalg.norm(a), b.ravel() / np.linalg.norm(b)
    dot = float(np.clip(u @ v, -1, 1))
    if abs(dot) > 0.9995:
        return (1 - t) * a + t * b
    omega = math.acos(dot)
    return (math.sin((1 - t) * omega) * a + math.sin(t * omega) * b) / math.sin(omega)


def np_trim(delta, density):
    if not delta.size:
        return delta
    least = np.sort(np.abs(delta).astype(np.float32).ravel())[::-1][max(1, int(density * delta.size)) - 1]
    return np.where(np.abs(delta).astype(np.float32) >= least, delta, 0.0)


def np_elect(deltas, ws, normalize=True):
    """Element by element, as one reads it in the paper."""
    out = np.zeros(deltas[0].size)
    for j in range(out.size):
        terms = [(w * d.ravel()[j], w) for d, w in zip(deltas, ws)]
        sign = 1 if sum(x for x, _ in terms) >= 0 else -1
        agree = [(x, w) for x, w in terms if x * sign > 0]
        divisor = sum(w for _, w in agree) if normalize else 1
        out[j] = sum(x for x, _ in agree) / (divisor or 1)
    return out.reshape(deltas[0].shape)


def np_ties(base, xs, ws, density, lam=1.0, normalize=True):
    return base + lam * np_elect([np_trim(x - base, density) for x in xs], ws, normalize)


def np_dare_ties(base, xs, ws, masks, density, lam=1.0, normalize=True):
    return base + lam * np_elect([(x - base) * m / density for x, m in zip(xs, masks)], ws, normalize)


def mask(seed, model, name, shape, density):
    return (torch.rand(shape, generator=merge.mask_generator(seed, model, name)) < density).numpy()


def rounded_once(got, want, dtype):
    """got is the float64 value rounded to dtype, up to the error of the arithmetic: 2e-6 in fp32, 1e-12 in fp64."""
    want = torch.from_numpy(want)
    slack = (2e-6 if dtype.itemsize == 2 else 1e-12) * want.abs().max() if want.numel() else 0.0
    right = (got >= (want - slack).to(dtype)) & (got <= (want + slack).to(dtype))
    assert right.all(), f"{(~right).sum()} of {right.numel()}, largest error {(got.double() - want).abs().max()}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("method,settings", [("slerp", {})] + [
    (method, settings) for method in ("linear", "ties", "dare_ties") for settings in (
        {"weights": [1.0, 1.0, 1.0]}, {"weights": [0.5, 0.3, 0.2]}, {"weights": [2.0, -0.5, 1.0]},
        {"weights": [1.0, 1.0, 1.0], "normalize": False}, {"weights": [1.0, -1.0, 0.5], "normalize": False})], ids=str)
def test_every_method_against_numpy(tmp_path, monkeypatch, method, settings, dtype):
    """Whole merges of odd shapes, many chunks a tensor, against float64; the written value is the rounded one."""
    monkeypatch.setattr(merge, "CHUNK", 64)
    base = state(0, dtype)
    states = [state(i, dtype, 0.02, base) for i in (1, 2, 3)]
    if method == "slerp":
        states = [states[0], state(9, dtype)]  # far enough apart for an angle
    folders = [write(tmp_path / f"m{i}", s) for i, s in enumerate(states)]
    write(tmp_path / "base", base)
    lam = {} if method in ("linear", "slerp") else {"lam": 0.7, "seed": 5}
    got = run(tmp_path / "out", folders, method=method, base=tmp_path / "base", **METHODS[method], **settings, **lam)
    assert got.keys() == base.keys()
    for name, x in got.items():
        xs, b = [s[name].double().numpy() for s in states], base[name].double().numpy()
        w, normalize = settings.get("weights"), settings.get("normalize", True)
        if method == "linear":
            want = np_linear(xs, w, normalize)
        elif method == "slerp":
            want = np_slerp(*xs, 0.3)
        elif method == "ties":
            want = np_ties(b, xs, w, 0.5, 0.7, normalize)
        else:
            masks = [mask(5, f"m{i}", name, b.shape, 0.5) for i in range(3)]
            want = np_dare_ties(b, xs, w, masks, 0.5, 0.7, normalize)
        assert x.dtype == dtype and x.shape == base[name].shape
        rounded_once(x, want, dtype)


# ---------------------------------------------------------------------------------------------------------------------
# numbers worked out by hand

def t(*values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype)


def test_linear_by_hand():
    assert merge.linear([t(1.0, 2.0), t(3.0, 6.0)], [1, 3]).tolist() == [2.5, 5.0]
    assert merge.linear([t(1.0, 2.0), t(3.0, 6.0)], [1, 3], normalize=False).tolist() == [10.0, 20.0]
    assert merge.linear([t(1.0), t(7.0)], [2, -1]).tolist() == [-5.0]
    assert merge.linear([t(1.0), t(math.nan)], [2, 0]).tolist() == [1.0]
    out = merge.linear([t(1.0, dtype=torch.bfloat16), t(1.0078125, dtype=torch.bfloat16)], [1, 1])
    assert out.dtype == torch.float32 and out.item() == 1.00390625  # between two bf16 numbers: not rounded yet


def test_linear_rounds_once():
    """The mean of three bf16 numbers is the correctly rounded one; multiplying by 1/3 in bf16 misses a quarter."""
    g = torch.Generator().manual_seed(0)
    xs = [(torch.randn(200_000, generator=g) * 0.02).to(torch.bfloat16) for _ in range(3)]
    right = (sum(x.double() for x in xs) / 3).to(torch.bfloat16)
    assert torch.equal(merge.linear(xs, [1, 1, 1]).to(torch.bfloat16), right)
    assert (sum(x * (1 / 3) for x in xs) != right).float().mean() > 0.1


def test_slerp_by_hand():
    root = math.sqrt(0.5)
    torch.testing.assert_close(merge.slerp(t(1.0, 0.0), t(0.0, 1.0), 0.5), t(root, root))
    torch.testing.assert_close(merge.slerp(t(1.0, 0.0), t(0.0, 1.0), 1 / 3), t(math.sqrt(3) / 2, 0.5))
    # lengths are left as they are: |a| 1, |b| 3, orthogonal, halfway -> (1, 3) / sqrt(2), of length sqrt(5)
    out = merge.slerp(t(1.0, 0.0), t(0.0, 3.0), 0.5)
    torch.testing.assert_close(out, t(root, 3 * root))
    assert out.norm().item() == pytest.approx(math.sqrt(5))
    assert merge.slerp(t(2.0, 0.0), t(4.0, 0.0), 0.25).tolist() == [2.5, 0.0]  # parallel: lerp
    assert merge.slerp(t(1.0, 0.0), t(-1.0, 0.0), 0.25).tolist() == [0.5, 0.0]  # antipodal: lerp too
    assert merge.slerp(t(0.0, 0.0), t(2.0, 4.0), 0.5).tolist() == [1.0, 2.0]  # no angle: lerp
    whole = merge.slerp(t([1.0, 2.0], [3.0, 4.0]), t([0.0, 1.0], [-1.0, 0.5]), 0.4)  # a matrix is one vector
    torch.testing.assert_close(whole.flatten(), merge.slerp(t(1.0, 2.0, 3.0, 4.0), t(0.0, 1.0, -1.0, 0.5), 0.4))
    for cosine, lerp in ((0.9996, True), (0.9994, False)):  # the border
        a, b = t(1.0, 0.0, dtype=torch.float64), t(cosine, math.sqrt(1 - cosine ** 2), dtype=torch.float64) * 2
        assert (merge.slerp(a, b, 0.5) == 0.5 * a + 0.5 * b).all().item() == lerp


def test_slerp_ends():
    a, b = t(-0.0, 0.3, 1.7), t(2.0, -0.1, -0.0)
    for x, y in ((merge.slerp(a, b, 0.0), a), (merge.slerp(a, b, 1.0), b)):
        assert torch.equal(x.view(torch.int32), y.view(torch.int32))


def test_ties_by_hand():
    """
    Deltas (4, -3, 1, 2), (-1, -2, 5, -2), (3, 1, -2, -1); half of each is kept: (4, -3, 0, 0), (0, -2, 5, -2) as the
    two 2s tie, (3, 0, -2, 0). Signs + - + -; means over those that agree: 3.5, -2.5, 5, -2.
    """
    base = t(10.0, 20.0, 30.0, 40.0)
    xs = [base + t(4.0, -3.0, 1.0, 2.0), base + t(-1.0, -2.0, 5.0, -2.0), base + t(3.0, 1.0, -2.0, -1.0)]
    assert merge.ties(base, xs, [1, 1, 1], 0.5).tolist() == [13.5, 17.5, 35.0, 38.0]
    assert merge.ties(base, xs, [1, 1, 1], 0.5, lam=2.0).tolist() == [17.0, 15.0, 40.0, 36.0]
    assert merge.ties(base, xs, [1, 1, 1], 0.5, normalize=False).tolist() == [17.0, 15.0, 35.0, 38.0]
    # weights 1 1 3: the third outvotes the second on the third element (5 - 6 < 0); first: (4 + 9) / 4
    assert merge.ties(base, xs, [1, 1, 3], 0.5).tolist() == [13.25, 17.5, 28.0, 38.0]
    # density 1 keeps all: sums 6, -4, 4, -1; means 7/2, -5/2, (1 + 5)/2, (-2 - 1)/2
    assert merge.ties(base, xs, [1, 1, 1], 1.0).tolist() == [13.5, 17.5, 33.0, 38.5]


def test_ties_elects_by_mass_not_votes_and_plus_on_zero():
    base = t(0.0, 0.0)
    xs = [t(-5.0, 2.0), t(2.0, -2.0), t(2.0, 0.0)]
    assert merge.ties(base, xs, [1, 1, 1], 1.0).tolist() == [-5.0, 2.0]  # two of three vote +, the mass is -; 0 is +


def test_ties_keeps_the_largest_always_one():
    base, x = torch.zeros(10), torch.arange(1.0, 11.0)
    for density, kept in ((0.01, 1), (0.1, 1), (0.25, 2), (0.5, 5), (1.0, 10)):
        assert (merge.ties(base, [x], [1.0], density) != 0).sum() == kept
    tied = t(1.0, 1.0, 1.0, 2.0)
    assert merge.ties(torch.zeros(4), [tied], [1.0], 0.5).tolist() == tied.tolist()  # all that tie with the k-th stay


def test_trim_threshold_is_the_kth_magnitude():
    """Exactly, over chunks, on dense ties (bf16), tiny, huge and zero values, for every k."""
    g = torch.Generator().manual_seed(1)
    for x in (torch.randn(5000, generator=g), torch.randn(5000, generator=g).to(torch.bfloat16).float(),
              torch.randn(300, generator=g) * 1e-42, torch.randn(300, generator=g) * 1e38, torch.zeros(50),
              torch.cat([torch.zeros(40), torch.ones(3)]), t(-3.0)):
        ordered = x.abs().sort(descending=True).values
        for k in {1, min(2, len(x)), max(1, len(x) // 3), max(1, len(x) // 2), max(1, len(x) - 1), len(x)}:
            density = (k + 0.5) / len(x) if k < len(x) else 1.0
            assert merge.trim_threshold(lambda: x.split(997), density) == ordered[k - 1].item()
    assert merge.trim_threshold(lambda: [torch.zeros(0)], 0.5) == 0.0


def test_dare_by_hand():
    g = merge.mask_generator(0, "a", "w")
    delta = torch.arange(1.0, 9.0)
    out = merge.dare(delta, 0.25, g)
    kept = torch.from_numpy(mask(0, "a", "w", (8,), 0.25))
    assert out.tolist() == [d * 4 if k else 0.0 for d, k in zip(delta.tolist(), kept.tolist())]
    assert merge.dare(delta, 1.0, g).tolist() == delta.tolist()


def test_dare_ties_has_no_second_trim():
    """Density 1 drops nothing: all deltas count, small ones too."""
    base, xs = torch.zeros(4), [t(1.0, 2.0, 3.0, -4.0), t(3.0, 2.0, -1.0, -2.0)]
    gs = [merge.mask_generator(0, m, "w") for m in "ab"]
    assert merge.dare_ties(base, xs, [1, 1], 1.0, gs).tolist() == [2.0, 2.0, 3.0, -3.0]


# ---------------------------------------------------------------------------------------------------------------------
# DARE's chance

def test_dare_keeps_the_stated_share_and_is_unbiased():
    """n draws: keep rate within 5 standard errors of density, mean of the output within 5 of the delta's."""
    n = 400_000
    for density in (0.1, 0.3, 0.53, 0.9):
        out = merge.dare(torch.ones(n), density, merge.mask_generator(7, "m", f"w{density}"))
        rate = (out != 0).double().mean().item()
        error = math.sqrt(density * (1 - density) / n)
        assert abs(rate - density) < 5 * error
        assert abs(out.double().mean().item() - 1) < 5 * error / density
        assert set(out.unique().tolist()) == {0.0, t(1.0).div(density).item()}  # 1 / density, not a ratio of norms
    few = torch.stack([merge.dare(t(1.0, -2.0), 0.5, merge.mask_generator(s, "m", "w")) for s in range(4000)])
    assert (few.mean(0) - t(1.0, -2.0)).abs().max() < 0.16  # small tensors too: 5 standard errors of the larger


def test_dare_masks_are_independent():
    n = 100_000
    masks = {key: torch.from_numpy(mask(*key, (n,), 0.5)) for key in
             [(0, "a", "w"), (1, "a", "w"), (0, "b", "w"), (0, "a", "v")]}
    keys = list(masks)
    for i, x in enumerate(keys):
        for y in keys[:i]:
            assert abs((masks[x] == masks[y]).float().mean().item() - 0.5) < 0.01, (x, y)
    # weights that were made with manual_seed(7) are not correlated with the masks of seed 7
    made = torch.rand(n, generator=torch.Generator().manual_seed(7))
    assert abs(np.corrcoef(made, mask(7, "a", "w", (n,), 0.5))[0, 1]) < 0.02


def test_dare_mask_depends_on_seed_model_and_tensor_only(family, monkeypatch):
    """Not on order, chunks, other models or where the folders lie."""
    base = dict(method="dare_ties", base=family / "base", density=0.5)
    one = run(family / "o1", [family / "a", family / "b"], weights=[1.0, 2.0], **base)

    def same(other, equal=True):
        assert equal == all(torch.equal(one[k], other[k]) for k in one)

    same(run(family / "o2", [family / "b", family / "a"], weights=[2.0, 1.0], **base))
    same(run(family / "o3", [family / "a", family / "b", family / "c"], weights=[1.0, 2.0, 0.0], **base))
    (family / "deep").mkdir()
    (family / "deep" / "a").symlink_to(family / "a")
    same(run(family / "o4", [family / "deep" / "a", family / "b"], weights=[1.0, 2.0], **base))
    same(run(family / "o5", [family / "a", family / "b"], weights=[1.0, 2.0], seed=1, **base), equal=False)
    monkeypatch.setattr(merge, "CHUNK", 7)
    same(run(family / "o6", [family / "a", family / "b"], weights=[1.0, 2.0], **base))


def test_mask_names():
    assert merge.mask_names(["out/a", "./out/b/"]) == ["a", "b"]
    assert merge.mask_names(["/x/ar/final", "/x/fr/final"]) == ["ar/final", "fr/final"]
    assert merge.mask_names(["out/a", "out/a"]) == ["a", "a"]


# ---------------------------------------------------------------------------------------------------------------------
# invariances

def same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape
        assert torch.equal(a[name].flatten().view(torch.uint8), b[name].flatten().view(torch.uint8)), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("weights", [[], [0.1, 0.2], [3.0, -1.0], [1e-3, 1e3]], ids=str)
def test_merged_with_itself_is_itself(tmp_path, dtype, weights):
    tensors = state(0, dtype)
    tensors["model.norm.weight"][:4] = torch.tensor(
        [-0.0, 0.0, torch.finfo(dtype).max, torch.finfo(dtype).tiny / 4], dtype=dtype)
    a, b = write(tmp_path / "a", tensors), write(tmp_path / "b", tensors, shards=3)
    same_bits(run(tmp_path / "o1", [a, b], weights=weights), tensors)
    same_bits(run(tmp_path / "o2", [a, a], weights=weights), tensors)
    same_bits(run(tmp_path / "o3", [a, b], method="slerp", t=0.3), tensors)
    for method in ("ties", "dare_ties"):  # no delta: the base
        same_bits(run(tmp_path / method, [a, b], method=method, base=b, weights=weights), tensors)


def test_ends_and_single_models(family):
    a, b = read(family / "a"), read(family / "b")
    same_bits(run(family / "t0", [family / "a", family / "b"], method="slerp", t=0.0), a)
    same_bits(run(family / "t1", [family / "a", family / "b"], method="slerp", t=1.0), b)
    same_bits(run(family / "w1", [family / "a", family / "b"], weights=[0.0, 2.0]), b)
    same_bits(run(family / "one", [family / "b"]), b)
    one = run(family / "all", [family / "b"], method="ties", base=family / "base", density=1.0)
    same_bits(one, b)  # base + (b - base), rounded back
    same_bits(run(family / "lam", [family / "b"], method="ties", base=family / "base", lam=0.0), read(family / "base"))


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties"])
def test_order_of_models_does_not_matter(family, method):
    names, weights = ["a", "b", "c"], {"a": 1.0, "b": 2.0, "c": 0.5}
    outs = []
    for i, order in enumerate((["a", "b", "c"], ["c", "a", "b"], ["b", "a", "c"])):
        outs.append(run(family / f"o{i}", [family / n for n in order], method=method, base=family / "base",
                        weights=[weights[n] for n in order], **METHODS[method]))
    for other in outs[1:]:
        for name in outs[0]:
            torch.testing.assert_close(outs[0][name].float(), other[name].float(), rtol=2 ** -7, atol=1e-6)
            assert (outs[0][name] != other[name]).float().mean() < 0.01


@pytest.mark.parametrize("method", METHODS)
def test_chunks_and_shards_do_not_matter(family, monkeypatch, method):
    models = [family / "a", family / "b"]
    settings = dict(method=method, base=family / "base", **METHODS[method])
    one = run(family / "o1", models, **settings)
    monkeypatch.setattr(merge, "CHUNK", 5)
    same_bits(run(family / "o2", models, **settings), one)
    for name, shards in (("a", 1), ("b", 2), ("base", 3)):
        write(family / "again" / name, read(family / name), shards=shards)
    again = family / "again"
    same_bits(run(family / "o3", [again / "a", again / "b"], **{**settings, "base": again / "base"}), one)
    assert sorted(p.name for p in (family / "o1").glob("model*")) == [
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    assert [p.name for p in (family / "o3").glob("model*")] == ["model.safetensors"]  # the first model's layout


def test_odd_shapes_and_mixed_dtypes(tmp_path):
    """0-d, one element, empty, and an odd number of bf16 before fp32; integers that agree are copied."""
    def make(seed, wide):
        g = torch.Generator().manual_seed(seed)
        return {"model.a": torch.randn(3, generator=g).to(torch.bfloat16), "model.b": torch.randn(3, 1, generator=g),
                "model.c": torch.randn((), generator=g).to(torch.float16), "model.d": torch.zeros(0, 4),
                "model.e": torch.randn(1, generator=g).to(wide), "model.ids": torch.arange(5),
                "model.flag": torch.tensor([True, False, True])}

    xs = [make(0, torch.bfloat16), make(1, torch.float16), make(2, torch.float32)]
    folders = [write(tmp_path / str(i), x) for i, x in enumerate(xs)]
    for method in ("linear", "ties", "dare_ties"):
        got = run(tmp_path / method, folders[:2], method=method, base=folders[2], density=1.0)
        for name, x in got.items():
            assert x.dtype == xs[0][name].dtype and x.shape == xs[0][name].shape
            a, b, base = (s[name].double().numpy() for s in xs)
            if x.is_floating_point():
                want = np_linear([a, b], [1, 1]) if method == "linear" else np_ties(base, [a, b], [1, 1], 1.0)
                rounded_once(x, np.asarray(want), x.dtype)
            else:
                assert torch.equal(x, xs[0][name])
    slerped = run(tmp_path / "slerp", folders[:2], method="slerp")
    assert slerped["model.c"].shape == () and slerped["model.d"].shape == (0, 4)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_output_dtype(family, dtype):
    got = run(family / "out", [family / "a", family / "b"], dtype=dtype)
    a, b = read(family / "a"), read(family / "b")
    for name, x in got.items():
        assert x.dtype == getattr(torch, dtype)
        assert torch.equal(x, ((a[name].float() + b[name].float()) / 2).to(x.dtype))
    assert json.loads((family / "out" / "config.json").read_text()) == {**CONFIG, "torch_dtype": dtype}


# ---------------------------------------------------------------------------------------------------------------------
# the folder

def test_what_is_carried_and_reported(family):
    run(family / "out", [family / "a", family / "b", family / "c"], method="ties", base=family / "base", density=0.5,
        weights=[1.0, 1.0, 2.0])
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (family / "out" / name).read_bytes() == (family / "a" / name).read_bytes()
    index = json.loads((family / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == json.loads((family / "a" / "model.safetensors.index.json").read_text())["weight_map"]
    assert index["metadata"]["total_size"] == 2 * sum(math.prod(s) for s in SHAPES.values())
    report = json.loads((family / "out" / "merge_report.json").read_text())
    assert report["method"] == "ties" and report["delta_to"] == "base" and report["cosine_of"] == "deltas"
    assert report["settings"] == {"weights": [1.0, 1.0, 2.0], "density": 0.5, "lam": 1.0, "normalize": True}
    assert report["groups"].keys() == {"embedding", "attention", "mlp", "norm"}
    base, xs = read(family / "base"), [read(family / n) for n in "abc"]
    names = [n for n in SHAPES if "mlp" in n]
    flat = [np.concatenate([(x[n].double() - base[n].double()).flatten().numpy() for n in names]) for x in xs]
    mlp = report["groups"]["mlp"]
    assert mlp["parameters"] == flat[0].size
    np.testing.assert_allclose(mlp["delta_norm"], [np.linalg.norm(d) for d in flat], rtol=1e-5)
    np.testing.assert_allclose(mlp["cosine"], np.corrcoef(flat) * 0 + [[
        a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in flat] for a in flat], atol=1e-5)
    np.testing.assert_allclose(mlp["unchanged"], [(d == 0).mean() for d in flat])


def test_report_without_a_base_and_without_a_delta(family):
    got = run(family / "out", [family / "a", family / "b"])
    report = json.loads((family / "out" / "merge_report.json").read_text())
    assert report["delta_to"] == "result" and report["cosine_of"] == "weights"
    assert report["settings"] == {"weights": [1.0, 1.0], "normalize": True}
    a, b, out = (torch.cat([x[n].double().flatten() for n in SHAPES if n.endswith("norm.weight")])
                 for x in (read(family / "a"), read(family / "b"), got))
    norm = report["groups"]["norm"]
    exact = (a + b) / 2  # the report looks at the result before it is rounded
    np.testing.assert_allclose(norm["delta_norm"], [(a - exact).norm(), (b - exact).norm()], rtol=1e-4)
    assert norm["cosine"][0][1] == pytest.approx((a @ b / a.norm() / b.norm()).item(), abs=1e-5)
    run(family / "still", [family / "base"], base=family / "base")
    report = json.loads((family / "still" / "merge_report.json").read_text())  # 0 / 0 is null, never NaN
    assert report["groups"]["norm"]["cosine"] == [[None]] and report["groups"]["norm"]["unchanged"] == [1.0]


def test_header_is_as_the_format_says(family):
    """Little-endian length, JSON padded to 8, data without holes and aligned, a file exactly as long as it says."""
    a = read(family / "a")
    mixed = write(family / "mixed", {"model.a": torch.ones(3, dtype=torch.bfloat16), "model.b": torch.ones(2), **a})
    run(family / "out", [mixed])
    raw = (family / "out" / "model.safetensors").read_bytes()
    n = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:8 + n])
    assert n % 8 == 0 and header.pop("__metadata__") == {"format": "pt"}
    at = 0
    for entry in header.values():
        assert entry["data_offsets"][0] == at and at % {"BF16": 2, "F32": 4}[entry["dtype"]] == 0
        at = entry["data_offsets"][1]
    assert len(raw) == 8 + n + at


def test_tied_head_stored_twice(family):
    """Some folders hold lm_head.weight beside a tied embedding: taken if it is the same, refused if it is not."""
    c = read(family / "c")
    twice = write(family / "twice", {**c, "lm_head.weight": c["model.embed_tokens.weight"].clone()})
    got = run(family / "out", [twice, family / "a"])
    assert got.keys() == SHAPES.keys()
    other = write(family / "other", {**c, "lm_head.weight": c["model.embed_tokens.weight"] + 1})
    refused("other|lm_head.weight|differs", family / "out2", [other, family / "a"])
    untied = [write(family / f"u{i}", {**c, "lm_head.weight": torch.ones(37, 12) * i},
                    config={"tie_word_embeddings": False}) for i in (1, 3)]
    assert run(family / "out3", untied)["lm_head.weight"].unique().tolist() == [2.0]


# ---------------------------------------------------------------------------------------------------------------------
# refusals

@pytest.mark.parametrize("match,settings", [
    ("--method|'mean'|linear slerp", dict(method="mean")), ("--dtype|'fp8'", dict(dtype="fp8")),
    ("--weights|3 values for 2", dict(weights=[1.0, 2.0, 3.0])), ("sum to zero", dict(weights=[1.0, -1.0])),
    ("sum to zero", dict(weights=[0.0, 0.0])), ("sum to zero", dict(weights=[0.1 + 0.2, -0.3])),
    ("sum to zero", dict(weights=[1.0, -1.0], method="ties", base="base")),
    ("finite", dict(weights=[1.0, math.nan])), ("finite", dict(method="slerp", t=math.inf)),
    ("--density 0|(0, 1]", dict(density=0.0)), ("--density 1.5", dict(method="ties", base="base", density=1.5)),
    ("--density", dict(density=math.nan)), ("--density -0.2", dict(method="dare_ties", base="base", density=-0.2)),
    ("ties|--base", dict(method="ties")), ("dare_ties|--base", dict(method="dare_ties")),
    ("slerp|--t", dict(method="slerp", weights=[1.0, 2.0]))], ids=str)
def test_settings_refused(family, match, settings):
    if "base" in settings:
        settings = {**settings, "base": family / "base"}
    refused(match, family / "out", [family / "a", family / "b"], **settings)


def test_counts_of_models_refused(family):
    refused("slerp|3", family / "out", [family / n for n in "abc"], method="slerp")
    refused("slerp|1", family / "out", [family / "a"], method="slerp")
    refused("--models", family / "out", [])
    assert run(family / "out", [family / "a", family / "b"], method="slerp", weights=[1.0, 1.0])  # equal: says nothing


@pytest.mark.parametrize("key,value", [
    ("logit_scale", 0.0625), ("rope_theta", 4e6), ("layer_norm_eps", 1e-6), ("tie_word_embeddings", False),
    ("hidden_size", 24), ("num_hidden_layers", 3), ("num_attention_heads", 6), ("num_key_value_heads", 3),
    ("vocab_size", 38), ("use_qk_norm", True), ("attention_bias", True), ("head_dim", 8),
    ("model_type", "llama"), ("architectures", ["CohereForRewardModel"]), ("something_new", 3),
    ("rope_scaling", {"type": "linear", "factor": 2.0}), ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4})])
def test_configs_that_compute_other_things_refused(family, key, value):
    """Weights alike, function unlike: the parent, or the base, is refused and both values are shown."""
    extra = {"something_new": 2} if key == "something_new" else {}
    one = write(family / "x", read(family / "a"), config=extra)
    other = write(family / "y", read(family / "a"), config={key: value})
    shown = "rope_parameters" if key.startswith("rope") else key
    refused(f"config.json|{shown}|{one}|{other}", family / "out", [one, other])
    refused(f"config.json|{shown}", family / "out", [one], base=other)


@pytest.mark.parametrize("key", ["logit_scale", "rope_theta", "layer_norm_eps"])
def test_config_key_missing_on_one_side_refused(family, key):
    """An absent key means a default, and defaults differ between versions of transformers."""
    other = write(family / "y", read(family / "a"), remove=[key])
    refused(f"config.json|{'rope_parameters' if 'rope' in key else key}", family / "out", [family / "a", other])


def test_spellings_of_config_that_mean_the_same(family):
    new = write(family / "new", read(family / "a"), remove=["rope_theta", "torch_dtype"], config={
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000}, "dtype": "bfloat16", "use_qk_norm": False,
        "transformers_version": "5.0", "tie_word_embeddings": True, "head_dim": 4, "attention_bias": False,
        "rope_scaling": None, "eos_token_id": 7, "max_position_embeddings": 131072, "use_cache": False})
    both = write(family / "both", read(family / "a"), config={"rope_parameters": {"rope_theta": 10000.0}})
    assert run(family / "out", [family / "a", new, both])
    linear = [write(family / f"s{i}", read(family / "a"), config=c) for i, c in enumerate((
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}))]
    assert run(family / "out2", linear)


def test_tokenizers(family):
    a = read(family / "a")

    def with_tokenizer(name, **changes):
        model = {**TOKENIZER["model"], **changes.pop("model", {})}
        return write(family / name, a, tokenizer={**TOKENIZER, **changes, "model": model})

    for i, changes in enumerate(({"model": {"vocab": {"a": 1, "b": 0, "ab": 2}}}, {"model": {"merges": []}},
                                 {"added_tokens": [{"id": 3, "content": "<x>"}]}, {"normalizer": {"type": "NFC"}})):
        other = with_tokenizer(f"t{i}", **changes)
        part = next(iter(changes.get("model", changes)))
        refused(f"tokenizer.json|{part}", family / "out", [family / "a", other])
    same = with_tokenizer("same", padding={"length": 3}, truncation={"max_length": 3}, model={"merges": [["a", "b"]]})
    assert run(family / "out", [family / "a", same])
    none = write(family / "none", a, tokenizer=None)
    assert run(family / "out2", [family / "a", none])


def test_tensors_that_do_not_fit_refused(family):
    a = read(family / "a")
    norm = "model.norm.weight"
    refused(f"less|{norm}|missing", family / "out",
            [family / "a", write(family / "less", {k: v for k, v in a.items() if k != norm})])
    refused("model.layers.9.x|missing|more", family / "out",
            [family / "a", write(family / "more", {**a, "model.layers.9.x": torch.ones(2)})])
    refused(f"wide|{norm}|[12]|[13]", family / "out",
            [family / "a", write(family / "wide", {**a, norm: torch.ones(13)})])
    turned = {**a, "model.layers.1.mlp.down_proj.weight": torch.ones(20, 12)}  # as many numbers
    refused("turned|[12, 20]|[20, 12]", family / "out", [family / "a", write(family / "turned", turned)])
    refused(f"ints|{norm}|int64", family / "out",
            [family / "a", write(family / "ints", {**a, norm: torch.ones(12, dtype=torch.int64)})])
    refused(f"fp8|{norm}|F8", family / "out",
            [family / "a", write(family / "fp8", {**a, norm: torch.ones(12).to(torch.float8_e4m3fn)})])
    refused(f"{norm}|less", family / "out", [family / "a"], base=family / "less")  # the base is looked at as well
    ids = [write(family / f"ids{i}", {**a, "model.ids": torch.arange(3) + i}) for i in (0, 1)]
    refused("ids1|model.ids|integers", family / "out", ids)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", METHODS)
def test_values_that_are_not_finite_refused(family, method, bad, monkeypatch):
    """In any model, weight 0 and the base included; also in the last chunk."""
    monkeypatch.setattr(merge, "CHUNK", 50)
    a = read(family / "a")
    a["model.layers.0.mlp.up_proj.weight"][19, 11] = bad
    broken = write(family / "broken", a)
    settings = dict(method=method, base=family / "base", **METHODS[method])
    refused("broken: |up_proj|NaN or infinity", family / "out", [family / "c", broken], **settings)
    refused("broken: ", family / "out", [family / "c", family / "b"], **{**settings, "base": broken})
    if method == "linear":
        refused("broken: ", family / "out", [family / "c", broken], weights=[1.0, 0.0])


def test_large_values_are_not_infinite(tmp_path):
    """Finite numbers whose sum is not."""
    tensors = {"model.w": torch.full((300,), 3e38, dtype=torch.bfloat16)}
    same_bits(run(tmp_path / "out", [write(tmp_path / "a", tensors)]), tensors)


def test_overflow_of_the_output_refused(tmp_path):
    big = write(tmp_path / "big", {"model.w": torch.full((3,), 1e5)})
    refused("model.w|float16", tmp_path / "out", [big, big], dtype="float16")
    refused("model.w|float32", tmp_path / "out", [big], weights=[1e38], normalize=False)


def test_broken_folders_refused(family):
    out, good = family / "out", family / "a"
    refused("nowhere|not found|hf download", out, [good, family / "nowhere"])
    index, shard = "model.safetensors.index.json", "model-00001-of-00002.safetensors"

    def broken(name, change):
        folder = write(family / name, read(good), shards=2)
        change(folder)
        return folder

    def edit_index(**changes):
        def change(folder):
            value = json.loads((folder / index).read_text())
            value["weight_map"].update(changes)
            (folder / index).write_text(json.dumps(value))
        return change

    def cut(n):
        return lambda folder: (folder / shard).write_bytes((folder / shard).read_bytes()[:n])

    for i, (match, change) in enumerate((
            (f"{shard}|unfinished", cut(-1)), (f"{shard}|unfinished", cut(100)), (f"{shard}|unfinished", cut(0)),
            (f"{shard}|unfinished", lambda f: (f / shard).write_bytes((f / shard).read_bytes() + b"\0")),
            (f"{shard}|missing", lambda f: (f / shard).unlink()),
            (f"{index}|model.norm.weight|'../a/{shard}'", edit_index(**{"model.norm.weight": f"../a/{shard}"})),
            (f"{index}|'/etc/x.safetensors'", edit_index(**{"model.norm.weight": "/etc/x.safetensors"})),
            (f"{index}|'pytorch_model.bin'", edit_index(**{"model.norm.weight": "pytorch_model.bin"})),
            (f"{index}|3", edit_index(**{"model.norm.weight": 3})),
            ("model.ghost|missing", edit_index(**{"model.ghost": shard})),
            ("model.norm.weight|surplus", edit_index(**{"model.norm.weight": shard})),
            (f"{index}|weight_map", lambda f: (f / index).write_text("{}")),
            (f"{index}|weight_map", lambda f: (f / index).write_text('{"weight_map": ["model.norm.weight"]}')),
            (index, lambda f: (f / index).write_text("{")), ("config.json", lambda f: (f / "config.json").unlink()),
            ("config.json|object", lambda f: (f / "config.json").write_text("[]")),
            ("model.safetensors|missing", lambda f: (f / index).unlink()))):
        refused(match, out, [good, broken(f"broken{i}", change)])
        assert not (family / "etc").exists()


def test_existing_output(family):
    run(family / "out", [family / "a", family / "b"])
    before = read(family / "out")
    refused("out|exists|--overwrite", family / "out", [family / "b", family / "c"])
    after = run(family / "out", [family / "b", family / "c"], overwrite=True)
    assert any(not torch.equal(before[n], after[n]) for n in before)
    assert sorted(p.name for p in family.iterdir()) == ["a", "b", "base", "c", "out"]
    refused("exists", family / "c", [family / "a", family / "b"], overwrite=True)  # no merge: not ours to replace
    refused("one of the models", family / "a", [family / "a", family / "b"], overwrite=True)
    refused("one of the models", family / "b" / ".." / "a", [family / "a", family / "b"], overwrite=True)
    refused("one of the models", family, [family / "a", family / "b"], overwrite=True)
    refused("exists", family / "out", [family / "a", write(family / "bad", {"model.w": torch.ones(1)})])
    same_bits(read(family / "out"), after)


# ---------------------------------------------------------------------------------------------------------------------
# as a program

def command(*args, **kwargs):
    return subprocess.run([sys.executable, str(ROOT / "merge.py"), *map(str, args)], capture_output=True, text=True,
                          timeout=120, **kwargs)


@pytest.mark.parametrize("method", ["linear", "dare_ties"])
def test_command_line(family, method):
    flags = ["--weights", 1, 2, "--normalize", "true", "--density", 0.5, "--lam", "0.5", "--seed", 3]
    done = command("--method", method, "--models", family / "a", family / "b", *flags, "--base", family / "base",
                   "--dtype", "float32", "--out", family / "new" / "out")
    assert done.returncode == 0, done.stderr
    assert f"{method} of 2 models" in done.stdout and "embedding" in done.stdout
    assert ("--density has no effect" in done.stdout) == (method == "linear")
    same_bits(read(family / "new" / "out"), run(
        family / "here", [family / "a", family / "b"], method=method, dtype="float32", weights=[1.0, 2.0], density=0.5,
        lam=0.5, seed=3, base=family / "base"))


def test_command_line_error(family):
    done = command("--models", family / "a", family / "b", "--weights", 1, -1, "--out", family / "out")
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import merge
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
whole, n = merge.merge_tensor, [0]
def counted(*args, **kwargs):
    n[0] += 1
    if n[0] == {after}:
        {how}
    yield from whole(*args, **kwargs)
merge.merge_tensor = counted
merge.main(merge.parse_config(merge.Config))
"""


@pytest.mark.parametrize("how,after,leaves_nothing", [
    ("os.kill(os.getpid(), signal.SIGKILL)", 1, False), ("os.kill(os.getpid(), signal.SIGKILL)", 4, False),
    ("os.kill(os.getpid(), signal.SIGINT)", 3, True), ("raise OSError(28, 'No space left on device')", 6, True)])
def test_interrupted_between_tensors(family, how, after, leaves_nothing):
    """No folder of that name, nothing beside it that looks whole; run again, it finishes."""
    args = ["--models", family / "a", family / "b", "--out", family / "out"]
    done = subprocess.run([sys.executable, "-c", KILLED.format(root=str(ROOT), after=after, how=how), *map(str, args)],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and not (family / "out").exists()
    if "28" in how:
        assert done.stderr.startswith("error: ") and "No space left" in done.stderr and done.stderr.count("\n") == 1
    left = [p for p in family.iterdir() if p.name not in ("a", "b", "c", "base")]
    assert all(p.name.startswith(".out") and not (p / "config.json").exists() for p in left)
    assert not (left and leaves_nothing)
    again = run(family / "out", [family / "a", family / "b"])
    assert sorted(p.name for p in family.iterdir()) == ["a", "b", "base", "c", "out"]
    same_bits(again, run(family / "other", [family / "a", family / "b"]))


def test_memory_is_a_few_of_the_largest_tensors(tmp_path):
    """
    TIES of three models and a base of 4 tensors of 32 MB: resident are the pages of one tensor of each of the four,
    which the system may drop, and besides them less than 48 MB, far from the 67 MB of one tensor in fp32.
    """
    n = 16 << 20
    for i in range(4):
        x = torch.randn(n // 8, generator=torch.Generator().manual_seed(i)).to(torch.bfloat16).repeat(8)
        write(tmp_path / str(i), {f"model.layers.{j}.w": x.clone() for j in range(4)})
    probe = """
import sys, threading, time
sys.path.insert(0, {root!r})
import merge
def now(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status", encoding="utf-8") if line.startswith(key)) * 1024
peak = {{}}
def watch():
    while True:
        for key in ("RssAnon", "VmRSS"):
            peak[key] = max(peak.get(key, 0), now(key))
        time.sleep(0.002)
start = {{key: now(key) for key in ("RssAnon", "VmRSS")}}
threading.Thread(target=watch, daemon=True).start()
merge.main(merge.parse_config(merge.Config))
print(*(peak[key] - start[key] for key in ("RssAnon", "VmRSS")))
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    done = subprocess.run([sys.executable, "-c", probe.format(root=str(ROOT)), "--method", "ties", "--models",
                           *(str(tmp_path / str(i)) for i in range(3)), "--base", str(tmp_path / "3"), "--density",
                           "0.5", "--out", str(tmp_path / "out")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    anonymous, resident = map(int, done.stdout.splitlines()[-1].split())
    assert anonymous < 48e6, f"{anonymous / 1e6:.0f} MB"
    assert resident < 4 * 2 * n + 48e6, f"{resident / 1e6:.0f} MB"
