"""Softmax attention in CUDA C++: ``cuda.cu`` (the kernels) and ``cuda.cpp`` (the operators).

Importing this loads the extension, and builds it the first time.
"""

from kernels import extension
from kernels.softmax_attention.operators import attach

extension.load("cuda", "softmax_attention")

softmax_attention = attach("cuda")
