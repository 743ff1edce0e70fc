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


def documents(q, k, v, starts, lengths, window, softcap, scale):
    """Packed documents become the rows of padded batches, one for each power of two of the length."""
    (B, T), outs, order = q.shape[:2], [], []
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    size = lengths.clamp(min=2).sub(1).log2().floor()
    for s in size.unique():
        start, length = starts[size == s, None], lengths[size == s, None]
        offset = torch.arange(int(length.max()), device=q.device)
        index = start + torch.minimum(offset, length - 1)  # (documents, longest); the last token fills up
        rows = [x.index_select(0, index.flatten()).view(*index.shape, *x.shape[1:]) for x in (q, k, v)]
        outs.append(dense(*rows, None, window, softcap, scale)[offset < length])
        order.append(index[offset < length])
    return torch.cat(outs).index_select(0, torch.cat(order).argsort()).view(B, T, *q.shape[1:])


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
