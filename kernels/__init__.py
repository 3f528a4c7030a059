"""Linear attention and the baseline operations, each in several interchangeable implementations.

``kernels.backends(op, device)`` lists them and says why one can't be used here; ``backend=NAME``
takes one, ``backend=None`` the fastest usable. ``kernels.register`` adds one. Importing this
package imports no Triton and compiles nothing.
"""

import linear_vit
from linear_vit.kernels.backends import backends, default_backend, implementation, is_timeable
from linear_vit.kernels.linear_attention import (
    linear_attention,
    linear_attention_apply,
    linear_attention_packed,
    linear_attention_state,
)
from linear_vit.kernels.linear_attention.sharded import linear_attention_sharded
from linear_vit.kernels.registry import (
    BACKENDS,
    OPERATIONS,
    add_operation,
    backend_rows,
    operations,
    register,
)
from linear_vit.kernels.ripple import (
    ripple_expand,
    ripple_expand_stages,
    ripple_pool,
    ripple_pool_stages,
)
from linear_vit.kernels.softmax_attention import softmax_attention, softmax_attention_packed
from linear_vit.kernels.softmax_attention.sharded import softmax_attention_sharded

__all__ = [
    "BACKENDS",
    "OPERATIONS",
    "add_operation",
    "backend_rows",
    "backends",
    "default_backend",
    "implementation",
    "is_timeable",
    "linear_attention",
    "linear_attention_apply",
    "linear_attention_packed",
    "linear_attention_sharded",
    "linear_attention_state",
    "operations",
    "register",
    "ripple_expand",
    "ripple_expand_stages",
    "ripple_pool",
    "ripple_pool_stages",
    "softmax_attention",
    "softmax_attention_packed",
    "softmax_attention_sharded",
]

if __name__ == "kernels":  # imported from a checkout's root
    linear_vit.answer_to_short_name("kernels")
