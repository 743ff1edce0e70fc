"""
One model on many GPUs: FSDP2 (Zhao et al. 2023, arXiv 2304.11277), which torch calls fully_shard.

Every rank keeps 1/N of each block's weights, gradients and optimizer state. A block's weights are gathered just before
it runs and dropped after; its gradients are summed over the ranks in the backward pass and each rank keeps its part. So
a training script reads as if there were one process: its loss is a share of the whole batch's, gradients add up.

    wrap(model)          shards it; on one process in float32 there is nothing to do
    accumulate(model, micro_batches)   gradients travel once a step, behind the last micro-batch
    unsharded(model)     whole weights on every rank for a while: sampling
"""

import contextlib

import torch
import torch.distributed as dist

from common import backend, world


def fsdp_modules(model):
    """The parts that come and go as one: every block, and the root with embedding, final norm and head."""
    if not dist.is_initialized():
        return []
    from torch.distributed.fsdp import FSDPModule
    return [m for m in model.modules() if isinstance(m, FSDPModule)]


def wrap(model, param_dtype=torch.float32, cpu_offload=False, compile_blocks=False):
    """
    Shards a model over the ranks: each block is a group, and the tied embedding, final norm and head are the root's (a
    tied tensor must not be split over two). Weights, gradients and optimizer state stay as they are, float32 in
    training; matmuls see a copy in `param_dtype`, and gradients are summed in float32. `cpu_offload`: shards live in the
    CPU's memory. `compile_blocks`: torch.compile, block by block. One process in float32: nothing is sharded.
    """
    if compile_blocks:
        for block in model.model.layers:
            block.compile(dynamic=True)  # packed rows have another length in every micro-batch
    if world() == 1 and param_dtype == torch.float32 and not cpu_offload:
        return model
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
    cuda = torch.cuda.is_available()
    if not dist.is_initialized():  # one process: bfloat16 matmuls over float32 weights, by the same code
        dist.init_process_group(backend(), store=dist.HashStore(), rank=0, world_size=1)
    options = {
        "mesh": dist.init_device_mesh("cuda" if cuda else "cpu", (world(),)),
        # inputs are not cast: the rotation's cos and sin stay in float32
        "mp_policy": MixedPrecisionPolicy(param_dtype, torch.float32, cast_forward_inputs=False),
        "offload_policy": CPUOffloadPolicy(pin_memory=cuda) if cpu_offload else OffloadPolicy(),
        "reshard_after_forward": True}  # the root too (not the default): no stale weights after a no_grad pass
    for block in model.model.layers:
        fully_shard(block, **options)
    fully_shard(model, **options)
    for part in fsdp_modules(model) if world() > 1 else ():  # a plain sum: losses are shares of the batch's already
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # else a scaled sum, which gloo lacks
    return model


def accumulate(model, micro_batches, every=False):
    """
    Yields the micro-batches of one optimizer step. Gradients are summed over the ranks behind the last one only; until
    then each rank holds whole float32 gradients. `every`: after each micro-batch, for models whose gradients do not fit.
    """
    for n, micro in enumerate(micro_batches, 1):
        for part in fsdp_modules(model)[:1]:  # the root: it tells the others
            part.set_requires_gradient_sync(every or n == len(micro_batches))
        yield micro


@contextlib.contextmanager
def unsharded(model):
    """
    Full weights on every rank for a while: sampling runs different numbers of forwards on different ranks, and sharded
    forwards that do not match would wait for each other forever. Weights must not be updated inside. A model that was
    never wrapped (a teacher, a reward model) is whole on every rank already.
    """
    parts = fsdp_modules(model)
    compiled = any(part._compiled_call_impl for part in model.modules())  # a cache would use up its recompilations
    with torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext():
        if not parts:
            yield model
            return
        model._get_fsdp_state()._lazy_init()  # sampling enters at the blocks: the first to run would make itself the root
        for m in parts:
            m.set_reshard_after_forward(False, recurse=False)
            m.unshard()
        try:
            yield model
        finally:
            reshard(model, parts)


def reshard(model, parts):
    """The end of unsharded()."""
    for m in parts:
        m.reshard()
        m.set_reshard_after_forward(True, recurse=False)
    # the next backward would prefetch what ran before it, here: another layer, or none, on every rank
    model._get_fsdp_state()._comm_ctx.post_forward_order.clear()


def local(t):
    """A tensor's part on this rank."""
    return t.to_local() if hasattr(t, "to_local") else t


def first_row(t):
    """The row of the whole tensor at which this rank's part begins: equal runs, the last ranks may have fewer or none."""
    return -(-t.shape[0] // t.device_mesh.size()) * t.device_mesh.get_local_rank() if hasattr(t, "to_local") else 0


def whole(t):
    """The whole tensor on every rank; a collective."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t
