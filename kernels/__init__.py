"""
The operations worth fusing in a Cohere Command transformer, one file each, each opening with its definition.

How to read a Triton kernel, if you have never written one
-----------------------------------------------------------
A GPU computes far faster than it reads its memory: an H200 reads 4.3 TB/s and multiplies 790 TFLOP/s, about 370 FLOPs in
the time of one 16-bit number. Written op by op, silu(gate) * up reads gate, writes silu(gate), reads it again, reads up,
writes the product: 5 passes over memory for an operation that needs 3. A fused kernel reads the inputs once, keeps what is
between in registers, and writes the result. swiglu.py is the smallest example; read it first:

    @triton.jit
    def _swiglu_forward(gate_ptr, up_ptr, out_ptr, n, BLOCK: tl.constexpr):
        offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)      # which elements are mine
        mask = offset < n                                                         # the last program has fewer
        g = tl.load(gate_ptr + offset, mask=mask, other=0.0).to(tl.float32)       # memory -> registers
        u = tl.load(up_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + offset, g * tl.sigmoid(g) * u, mask=mask)              # registers -> memory

    _swiglu_forward[(triton.cdiv(n, BLOCK),)](gate, up, out, n, BLOCK=BLOCK, num_warps=4)

- The function is the work of ONE program. The launch says in square brackets how many there are; they run in any order, at
  the same time, and do not talk to each other. program_id says which one this is.
- A program works on whole blocks (vectors, matrices), not on single numbers: `g * tl.sigmoid(g) * u` is BLOCK products.
  Sizes of blocks are powers of two and constexpr: known when the kernel is compiled, once for each value.
- A tensor arrives as a pointer to its first element. `pointer + offsets` is a block of addresses; load and store take it,
  with a mask for what lies outside. Forgetting the mask reads somebody else's memory.
- num_warps: how many groups of 32 threads share a program's blocks. More of them hold more registers; too large a block
  for its warps "spills" to memory, which tests/test_compile.py would show.
- tl.dot is the tensor cores: matrix times matrix, accumulated in fp32. Sums over a block (tl.sum) stay inside a program. A
  sum over what several programs hold takes a second launch (decode.py) or one program that loops (attention.py's dk, dv).

Then, by difficulty: layernorm.py (a row is reduced; its backward has a sum over rows), rope.py (two layouts), token_logps.py
(a softmax over 256,000 words that are never there at once), decode.py and attention.py (a softmax whose row is never
there at once either: the running maximum and sum of FlashAttention). Each file: what it computes and the memory it moves,
the definition in plain PyTorch, kernels, an op of torch.library around the launch, the autograd.Function, and one public
function that takes Triton on CUDA and PyTorch elsewhere. tests/test_kernels.py breaks every kernel on purpose, line by line.
"""

from .attention import attention
from .decode import decode
from .layernorm import layernorm, rmsnorm
from .rope import rope
from .sample import sample
from .swiglu import swiglu
from .token_logps import token_logps

__all__ = ["attention", "decode", "layernorm", "rmsnorm", "rope", "sample", "swiglu", "token_logps"]
