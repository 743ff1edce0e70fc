"""Triton where it is installed; else a stand-in, so that the kernel files import and their CPU paths run."""

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
