"""
Attention where there is no Triton: PyTorch's own for long rows, else the definition in few passes. Packed documents
become the rows of padded batches, so that no score between two documents is computed.
"""

import torch
import torch.nn.functional as F


def visible(Tq, Tk, doc_start, window, device):
    """True where query i sees key j: (Tq, Tk), or (B, 1, Tq, Tk) with doc_start. Queries are the last Tq positions."""
    i = torch.arange(Tk - Tq, Tk, device=device)[:, None]
    j = torch.arange(Tk, device=device)
    mask = j <= i
    if window is not None:
        mask = mask & (i - j < window)
    if doc_start is not None:
        mask = (mask & (doc_start[:, -Tq:, None] <= j))[:, None]
    return mask


def dense(q, k, v, doc_start, window, softcap, scale):
    """The definition in few passes: the G query heads of a key head are stacked into the rows of one batched matmul."""
    (B, Tq, H, D), (_, Tk, Hkv, _), acc = q.shape, k.shape, torch.promote_types(q.dtype, torch.float32)
    G = H // Hkv
    q_rows = q.to(acc).transpose(1, 2).reshape(B * Hkv, G * Tq, D)
    k_cols = k.to(acc).permute(0, 2, 3, 1).reshape(B * Hkv, D, Tk)
    v_rows = v.to(acc).transpose(1, 2).reshape(B * Hkv, Tk, D)
    mask = visible(Tq, Tk, doc_start, window, q.device)
    bias = torch.zeros(mask.shape, dtype=acc, device=q.device).masked_fill_(~mask, torch.finfo(acc).min)
    if doc_start is None:
        bias = bias.repeat(G, 1)  # (G * Tq, Tk)
    else:
        bias = bias[:, :, None].expand(B, Hkv, G, Tq, Tk).reshape(B * Hkv, G * Tq, Tk)
    if softcap is None:
        scores = torch.baddbmm(bias, q_rows, k_cols, alpha=scale)
    else:
        scores = softcap * torch.tanh(torch.bmm(q_rows, k_cols) * (scale / softcap)) + bias
    out = torch.bmm(scores.softmax(-1), v_rows).view(B, H, Tq, D).transpose(1, 2)
    if doc_start is not None:  # a query that sees nothing (padding on the left)
        out = torch.where(mask.any(-1).transpose(1, 2)[..., None], out, 0)
    return out.to(q.dtype)


def decode_cpu(q, k, v, first, length, softcap, scale):
    """decode() in two batched matmuls; k and v laid out (B, Hkv, Tk, D) in memory are not copied."""
    (B, _, H, D), (_, Tk, Hkv, _), acc = q.shape, k.shape, torch.promote_types(q.dtype, torch.float32)
    k, v = k.to(acc).transpose(1, 2), v.to(acc).transpose(1, 2)
    scores = torch.matmul(q.to(acc).view(B, Hkv, H // Hkv, D), k.transpose(2, 3)).mul_(scale)  # (B, Hkv, G, Tk)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    j = torch.arange(Tk, device=q.device)
    unseen = j >= (Tk if length is None else length.view(B, 1))
    if first is not None:
        unseen = unseen | (j < first.view(B, 1))
    unseen = unseen.view(-1, 1, 1, Tk)
    probs = scores.masked_fill_(unseen, torch.finfo(acc).min).softmax(-1)
    if first is not None or length is not None and not length.all():
        probs = probs * ~unseen  # a row that sees nothing
    return torch.matmul(probs, v).view(B, 1, H, D).to(q.dtype)


class _Spread(torch.autograd.Function):
    """x.index_select(0, index). Copies that only fill up get no gradient, so its backward is a selection too, no sum."""

    @staticmethod
    def forward(ctx, x, index, back):
        ctx.save_for_backward(back)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, dx):
        return dx.index_select(0, ctx.saved_tensors[0]), None, None


def documents(q, k, v, starts, lengths, window, softcap, scale):
    """
    Packed documents become the rows of padded batches: those longer than half the longest, than a quarter of it, and so on.
    Behind its end a row repeats its last token: no query of the document sees the copies, and what they see is dropped.
    """
    (B, T), shapes, indices, back = q.shape[:2], [], [], starts.new_empty(q.shape[0] * q.shape[1])
    halvings, base = (lengths.max() / lengths).log2().floor(), 0
    for n in halvings.unique():
        start, length = starts[halvings == n, None], lengths[halvings == n, None]
        offset = torch.arange(int(length.max()), device=q.device)
        indices.append((start + torch.minimum(offset, length - 1)).flatten())
        shapes.append((len(start), len(offset)))
        there = (offset < length).flatten().nonzero().squeeze(1)
        back[indices[-1][there]] = base + there  # of each token, its place in all the batches
        base += len(indices[-1])
    index, sizes = torch.cat(indices), [len(i) for i in indices]
    parts = [_Spread.apply(x.flatten(0, 1), index, back).split(sizes) for x in (q, k, v)]
    outs = [dense(*(x.view(*shape, *x.shape[1:]) for x in rows), None, window, softcap, scale).flatten(0, 1)
            for shape, *rows in zip(shapes, *parts)]
    return torch.cat(outs).index_select(0, back).view(B, T, *q.shape[2:])


def attention_cpu(q, k, v, doc_start, window, softcap, scale):
    (B, Tq), Tk = q.shape[:2], k.shape[1]
    if doc_start is not None and Tq == Tk:
        first = (doc_start + Tk * torch.arange(B, device=q.device)[:, None]).flatten()  # in the flattened batch
        starts, lengths = first.unique_consecutive(return_counts=True)
        if torch.equal(starts, lengths.cumsum(0) - lengths):  # a document starts where its run of tokens does
            return documents(q, k, v, starts, lengths, window, softcap, scale)
    if doc_start is None and window is None and softcap is None and (Tq == 1 or Tq == Tk >= 256):
        # PyTorch's own: no (Tq, Tk) scores, but slower below 256 (measured: D = 32, fp32, one thread)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=Tq > 1, scale=scale, enable_gqa=True)
        return out.transpose(1, 2)
    return dense(q, k, v, doc_start, window, softcap, scale)
