"""Linear attention in CUDA C++: ``cuda.cu`` (the kernels) and ``cuda.cpp`` (the operators).

Importing this loads the extension, and builds it the first time.
"""

from kernels import extension
from kernels.linear_attention.operators import attach

extension.load("cuda", "linear_attention")

linear_attention, linear_attention_state, linear_attention_apply = attach("cuda")
