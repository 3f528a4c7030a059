"""Ripple's CUDA launchers, called on the host."""

from typing import Any

from torch import Tensor

from kernels.layout import empty_like
from tests.cuda_host.emulator import ELEMENT_TYPES, Emulator, structure, view

_Ripple = structure(
    "RippleArguments",
    "i element axis stride; l batch rows cols channels; view x z out dx dz;"
    "p weight pair_weight dweight dpair_weight; l num_splits; p workspace",
)


class RippleOperators(Emulator):
    """The operators of kernels/ripple/cuda.cpp."""

    room = "ripple"

    def _ripple(self, x: Tensor, axis: int, stride: int, tokens: int, **fields: Any) -> _Ripple:
        batch, rows, cols, channels = x.shape
        splits = self.splits(self.library.ripple_num_splits, tokens, channels)
        workspace = self.floats(splits * 11 * channels)
        return _Ripple(
            element=ELEMENT_TYPES[x.dtype], axis=axis, stride=stride, batch=batch, rows=rows,
            cols=cols, channels=channels, x=view(x), num_splits=splits,
            workspace=workspace.data_ptr(), **fields,
        )  # fmt: skip

    def ripple_pool(self, x: Tensor, weight: Tensor, axis: int) -> Tensor:
        shape = list(x.shape)
        shape[axis + 1] = (shape[axis + 1] + 1) // 2
        out = self.output(empty_like(x, tuple(shape)))
        arguments = self._ripple(x, axis, 2, 1, out=view(out), weight=weight.data_ptr())
        self.launch("ripple_forward", arguments)
        return out

    def ripple_pool_backward(
        self, dout: Tensor, x: Tensor, weight: Tensor, axis: int
    ) -> tuple[Tensor, Tensor]:
        dx, dweight = self.empty_like(x), self.empty_like(weight)
        arguments = self._ripple(
            x, axis, 2, dout[..., 0].numel(), out=view(dout), dx=view(dx),
            weight=weight.data_ptr(), dweight=dweight.data_ptr(),
        )  # fmt: skip
        self.launch("ripple_backward", arguments)
        return dx, dweight

    def ripple_expand(
        self, z: Tensor, x: Tensor, weight: Tensor, lateral_weight: Tensor, axis: int
    ) -> Tensor:
        out = self.empty_like(x)
        arguments = self._ripple(
            x, axis, 1, 1, z=view(z), out=view(out), weight=lateral_weight.data_ptr(),
            pair_weight=weight.data_ptr(),
        )  # fmt: skip
        self.launch("ripple_forward", arguments)
        return out

    def ripple_expand_backward(
        self,
        dout: Tensor,
        z: Tensor,
        x: Tensor,
        weight: Tensor,
        lateral_weight: Tensor,
        axis: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dz, dx = self.empty_like(z), self.empty_like(x)
        dweight, dlateral_weight = self.empty_like(weight), self.empty_like(lateral_weight)
        arguments = self._ripple(
            x, axis, 1, dout[..., 0].numel(), z=view(z), out=view(dout), dx=view(dx),
            dz=view(dz), weight=lateral_weight.data_ptr(), pair_weight=weight.data_ptr(),
            dweight=dlateral_weight.data_ptr(), dpair_weight=dweight.data_ptr(),
        )  # fmt: skip
        self.launch("ripple_backward", arguments)
        return dz, dx, dweight, dlateral_weight
