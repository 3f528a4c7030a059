"""TensorBoard: a run's curves, its model's graph, and pictures of what it predicts."""

import io
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from linear_vit.training.config import DatasetInfo
from linear_vit.training.errors import notice

_CURVES = ("loss", "train_accuracy", "val_accuracy", "lr", "images_per_second", "seconds")


def open_board(out: Path, *, epochs_done: int = 0) -> "Board | None":
    """The board of a run in its folder, or None and one line saying why.

    Of a resumed run, what an earlier process logged beyond ``epochs_done`` is hidden.
    """
    try:
        return Board(out, epochs_done)
    except Exception as error:  # tensorboard pulls in protobuf, which fails in more than one way
        reason = str(error) or type(error).__name__
        remedy = "" if isinstance(error, OSError) else ": pip install tensorboard"
        notice(f"no TensorBoard logs ({reason}){remedy}")
        return None


class Board:
    """An event file of a run. Where it can't be written, that is said once and the run goes on.

    torch's SummaryWriter writes in a thread, and a full disk ends that thread and then the run.
    """

    def __init__(self, out: Path, epochs_done: int = 0) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.graph_pb2 import GraphDef
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._graph, self._summary = Event, GraphDef, Summary
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        self._file = (out / name).open("ab")
        self._writer: Any = RecordWriter(self._file)
        self._add(file_version="brain.Event:2")
        if epochs_done:
            start = SessionLog(status=SessionLog.START)
            self._add(session_log=start, step=epochs_done + 1)

    def _add(self, **event: Any) -> None:
        if self._writer is None:
            return
        try:
            self._writer.write(self._event(wall_time=time.time(), **event).SerializeToString())
            self._writer.flush()
        except OSError as error:
            notice(f"no more TensorBoard logs in {self._file.name}: {error.strerror}")
            self.close()

    def close(self) -> None:
        self._writer = None
        with suppress(OSError):
            self._file.close()

    def add_curves(self, entry: dict[str, Any]) -> None:
        """The scalars of an entry of a run record's ``epochs``."""
        values = [self._summary.Value(tag=name, simple_value=entry[name]) for name in _CURVES]
        self._add(summary=self._summary(value=values), step=entry["epoch"])

    def add_graph(self, model: nn.Module, image_shape: tuple[int, ...]) -> None:
        """The modules that one image (C, H, W) passes, in order, nested as in the model.

        Recorded from a forward pass: torch's writer traces with torch.jit, which is deprecated and
        stumbles over the kernels' operators; torch.export takes seconds.
        """
        names = {module: name.replace(".", "/") for name, module in model.named_modules() if name}
        graph = self._graph()
        graph.node.add(name="image", op="Placeholder")

        def passed(module: nn.Module, _inputs: Any, output: Any) -> None:
            before = graph.node[-1].name
            node = graph.node.add(name=names[module], op=type(module).__name__, input=[before])
            text = f"{tuple(output.shape)} {module.extra_repr()}".strip()
            node.attr["output"].s = text.encode()

        leaves = [module for module in names if not list(module.children())]
        hooks = [module.register_forward_hook(passed) for module in leaves]
        was_training = model.training
        model.eval()  # else the pass draws from the stream of dropout
        with torch.inference_mode():
            model.forward(torch.zeros(1, *image_shape, device=next(model.parameters()).device))
        model.train(was_training)
        for hook in hooks:
            hook.remove()
        self._add(graph_def=graph.SerializeToString())

    def add_predictions(
        self,
        images: Tensor,
        labels: Tensor,
        predicted: Tensor,
        names: list[str],
        info: DatasetInfo,
        epoch: int,
    ) -> None:
        """A figure of up to 16 images (N, C, H, W), uint8, titled with what they were taken for."""
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            notice(f"no sample predictions in TensorBoard ({error}): pip install matplotlib")
            return
        figure = Figure(figsize=(8, 8.5), dpi=100, layout="constrained")
        for number, axes in enumerate(figure.subplots(4, 4).flat):
            axes.axis("off")
            if number >= min(16, len(images)):
                continue
            pixels = images[number].permute(1, 2, 0).cpu().numpy()
            axes.imshow(pixels if info.channels == 3 else pixels[..., 0], cmap="gray")
            truth, guess = int(labels[number]), int(predicted[number])
            guessed = names[guess] if guess >= 0 else "no number"
            title = names[truth] if truth == guess else f"{guessed}\n(is {names[truth]})"
            axes.set_title(title, size=9, color="black" if truth == guess else "firebrick")
        png = io.BytesIO()
        figure.savefig(png, format="png")
        picture = self._summary.Image(
            width=800, height=850, colorspace=4, encoded_image_string=png.getvalue()
        )
        value = self._summary.Value(tag="predictions on validation images", image=picture)
        self._add(summary=self._summary(value=[value]), step=epoch)
