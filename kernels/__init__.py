"""Linear attention and the baseline operations, each in several interchangeable implementations.

``kernels.backends(op, device)`` lists them and says why one can't be used here; ``backend=NAME``
takes one, ``backend=None`` the fastest usable. Importing this package imports no Triton and
compiles nothing.
"""

from kernels.backends import (
    BACKENDS,
    OPERATIONS,
    backends,
    default_backend,
    implementation,
    is_timeable,
)
from kernels.linear_attention import (
    linear_attention,
    linear_attention_apply,
    linear_attention_packed,
    linear_attention_state,
)
from kernels.ripple import (
    ripple_expand,
    ripple_expand_stages,
    ripple_pool,
    ripple_pool_stages,
)
from kernels.softmax_attention import softmax_attention, softmax_attention_packed

__all__ = [
    "BACKENDS",
    "OPERATIONS",
    "backends",
    "default_backend",
    "implementation",
    "is_timeable",
    "linear_attention",
    "linear_attention_apply",
    "linear_attention_packed",
    "linear_attention_state",
    "ripple_expand",
    "ripple_expand_stages",
    "ripple_pool",
    "ripple_pool_stages",
    "softmax_attention",
    "softmax_attention_packed",
]
