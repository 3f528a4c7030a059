"""Ripple's CUDA launchers, called on the host."""

import ctypes
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from linear_vit.kernels.layout import empty_like
from linear_vit.kernels.ripple.stages import FUSED_STAGES, level_shapes
from tests.cuda_host.emulator import ELEMENT_TYPES, Emulator, View, structure, view

_Ripple = structure(
    "RippleArguments",
    "i element axis stride; l batch rows cols channels; view x z out dx dz;"
    "p weight pair_weight dweight dpair_weight; l num_splits; p workspace",
)

_LEVELS = FUSED_STAGES + 1


def _numbered(prefix: str, count: int) -> str:
    return " ".join(f"{prefix}{i}" for i in range(count))


# The header's arrays, element by element: level0, level1, ...
_Stages = structure(
    "RippleStagesArguments",
    f"i element num_stages {_numbered('axes', FUSED_STAGES)}; l batch rows cols channels;"
    f"view {_numbered('level', _LEVELS)} {_numbered('gradient', _LEVELS)} out;"
    f"p {_numbered('weight', FUSED_STAGES)} {_numbered('pair_weight', FUSED_STAGES)}"
    f" {_numbered('dweight', FUSED_STAGES)} {_numbered('dpair_weight', FUSED_STAGES)};"
    "l multiprocessors num_splits; p workspace",
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
        self, dout: Tensor, x: Tensor, weight: Tensor, axis: int, wanted: int = -1
    ) -> list[Any]:
        dx, dweight = gradients = self._gradients(wanted, (x, "dx"), (weight, "weights"))
        arguments = self._ripple(
            x, axis, 2, x[..., 0].numel(), out=view(dout), dx=_view(dx),
            weight=weight.data_ptr(), dweight=_data(dweight),
        )  # fmt: skip
        self.launch("ripple_backward", arguments)
        return gradients

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
        wanted: int = -1,
    ) -> list[Any]:
        named = ((z, "dz"), (x, "dx"), (weight, "weights"), (lateral_weight, "weights"))
        dz, dx, dweight, dlateral_weight = gradients = self._gradients(wanted, *named)
        arguments = self._ripple(
            x, axis, 1, x[..., 0].numel(), z=view(z), out=view(dout), dx=_view(dx),
            dz=_view(dz), weight=lateral_weight.data_ptr(), pair_weight=weight.data_ptr(),
            dweight=_data(dlateral_weight), dpair_weight=_data(dweight),
        )  # fmt: skip
        self.launch("ripple_backward", arguments)
        return gradients

    def _gradients(self, wanted: int, *named: tuple[Tensor, str]) -> list[Any]:
        """Memory for those asked for: the inputs', watched under the names."""
        return [
            self.empty_like(x, name) if wanted >> i & 1 else None
            for i, (x, name) in enumerate(named)
        ]

    # -- a pyramid

    def _stages(self, x: Tensor, axes: Sequence[int], **lists: Any) -> _Stages:
        """Arguments with each list of tensors or of axes in its array."""
        batch, rows, cols, channels = x.shape
        arguments = _Stages(
            element=ELEMENT_TYPES[x.dtype], num_stages=len(axes), batch=batch, rows=rows, cols=cols,
            channels=channels, multiprocessors=self.multiprocessors, num_splits=1,
        )  # fmt: skip
        for name, values in (*lists.items(), ("axes", axes)):
            for i, value in enumerate(values):
                if name in ("level", "gradient"):
                    value = _view(value)
                elif not isinstance(value, int):
                    value = _data(value)
                setattr(arguments, f"{name}{i}", value)
        return arguments

    def _give_workspace(self, arguments: _Stages, expand: bool) -> Tensor:
        if self.num_splits is not None:
            arguments.num_splits = self.num_splits
        else:
            function = self.library.ripple_stages_num_splits
            function.restype = ctypes.c_int64
            arguments.num_splits = function(ctypes.byref(arguments), ctypes.c_int32(expand))
        size = arguments.num_splits * arguments.num_stages * 11 * arguments.channels
        workspace = self.floats(size, name="workspace")
        arguments.workspace = workspace.data_ptr()
        return workspace

    def ripple_pool_stages(
        self, x: Tensor, weights: Sequence[Tensor], axes: Sequence[int]
    ) -> list[Tensor]:
        shapes = level_shapes(x.shape, axes)[1:]
        levels = [self.output(empty_like(x, shape), "levels") for shape in shapes]
        self.launch("ripple_pool_stages", self._stages(x, axes, level=[x, *levels], weight=weights))
        return levels

    def ripple_pool_stages_backward(
        self,
        dlevels: Sequence[Tensor],
        levels: Sequence[Tensor],
        weights: Sequence[Tensor],
        axes: Sequence[int],
        wanted: int = -1,
    ) -> list[Any]:
        of_weights = [(w, "weights") for w in weights]
        dx, *dweights = gradients = self._gradients(wanted, (levels[0], "dx"), *of_weights)
        arguments = self._stages(
            levels[0], axes, level=levels, gradient=[dx, *dlevels], weight=weights,
            dweight=dweights,
        )  # fmt: skip
        workspace = self._give_workspace(arguments, expand=False)
        self.launch("ripple_pool_stages_backward", arguments)
        del workspace
        return gradients

    def ripple_expand_stages(
        self,
        z: Tensor,
        levels: Sequence[Tensor],
        weights: Sequence[Tensor],
        lateral_weights: Sequence[Tensor],
        axes: Sequence[int],
    ) -> Tensor:
        out = self.empty_like(levels[0], "out")
        arguments = self._stages(
            levels[0], axes, level=[*levels, z], weight=lateral_weights, pair_weight=weights
        )
        arguments.out = view(out)
        self.launch("ripple_expand_stages", arguments)
        return out

    def ripple_expand_stages_backward(
        self,
        dout: Tensor,
        z: Tensor,
        levels: Sequence[Tensor],
        weights: Sequence[Tensor],
        lateral_weights: Sequence[Tensor],
        axes: Sequence[int],
        wanted: int = -1,
    ) -> list[Any]:
        of_weights = [(w, "weights") for w in (*weights, *lateral_weights)]
        of_levels, count = [(x, "dlevels") for x in levels], len(axes)
        dz, *rest = gradients = self._gradients(wanted, (z, "dz"), *of_levels, *of_weights)
        dlevels, dweights, dlaterals = (rest[i * count : (i + 1) * count] for i in range(3))
        arguments = self._stages(
            levels[0], axes, level=[*levels, z], gradient=[*dlevels, dz], weight=lateral_weights,
            pair_weight=weights, dweight=dlaterals, dpair_weight=dweights,
        )  # fmt: skip
        arguments.out = view(dout)
        workspace = self._give_workspace(arguments, expand=True)
        self.launch("ripple_expand_stages_backward", arguments)
        del workspace
        return gradients


def _view(x: Tensor | None) -> View:
    return View() if x is None else view(x)


def _data(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
