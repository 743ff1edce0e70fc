"""The five operations worth fusing in a Cohere Command transformer, one file each, each opening with its definition."""

from .attention import attention
from .layernorm import layernorm, rmsnorm
from .rope import rope
from .swiglu import swiglu
from .token_logps import token_logps

__all__ = ["attention", "layernorm", "rmsnorm", "rope", "swiglu", "token_logps"]
