"""Triton where it is installed; else a stand-in, so that the kernel files import and their CPU paths run."""

import torch

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

    class _Absent:
        """Any attribute is itself again; as a decorator it returns the function: kernels are defined and never run."""

        def __getattr__(self, name):
            return self

        def __call__(self, function):
            return function

    triton = tl = TensorDescriptor = _Absent()


def use_triton(x):
    """Triton for CUDA tensors, the CPU path for everything else."""
    return x.is_cuda and HAS_TRITON


def has_tma():
    """Has the GPU the copy engine that follows descriptors (Hopper, sm_90, and later)? The interpreter plays one."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] >= 9


def recorded(*tensors):
    """Will autograd ask for a gradient of what is made of these?"""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def opaque(fake, writes=()):
    """
    Decorator: a function that launches kernels becomes an op of torch.library, "nanoaya::swiglu_forward" from _forward in
    swiglu.py. torch.compile calls an op as it is, instead of tracing into a launch (it knows the outputs by `fake`, the
    same function for tensors without data), so a compiled model has no graph break here. An op returns new tensors and
    writes to no argument, but for those named in `writes`.
    """

    def wrap(launch):
        name = f"nanoaya::{launch.__module__.rpartition('.')[2]}{launch.__name__}"
        op = torch.library.custom_op(name, launch, mutates_args=writes)
        op.register_fake(fake)
        return op

    return wrap
