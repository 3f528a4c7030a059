"""TensorBoard: a run's curves, its model's graph, and pictures of what it predicts."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from linear_vit.training.config import DatasetInfo
from linear_vit.training.errors import notice

_CURVES = ("loss", "train_accuracy", "val_accuracy", "lr", "images_per_second", "seconds")


def open_board(out: Path, *, epochs_done: int = 0) -> Any:
    """A SummaryWriter, or None and one line saying why.

    Of a resumed run, what an earlier process logged beyond ``epochs_done`` is hidden.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except Exception as error:  # it pulls in protobuf, which can fail in more than one way
        reason = str(error) or type(error).__name__
        notice(f"no TensorBoard logs ({reason}): pip install tensorboard")
        return None
    return SummaryWriter(str(out), purge_step=epochs_done + 1 if epochs_done else None)


def add_curves(board: Any, entry: dict[str, Any]) -> None:
    """The scalars of an entry of a run record's ``epochs``."""
    for name in _CURVES:
        board.add_scalar(name, entry[name], entry["epoch"])


def add_graph(board: Any, model: nn.Module, image_shape: tuple[int, ...]) -> None:
    """The modules that one image (C, H, W) passes, in order, nested as in the model.

    Recorded from a forward pass: add_graph of the writer traces with torch.jit, which is deprecated
    and stumbles over the kernels' operators; torch.export takes seconds.
    """
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.graph_pb2 import GraphDef

    names = {module: name.replace(".", "/") for name, module in model.named_modules() if name}
    graph = GraphDef()
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
    board.file_writer.add_event(Event(graph_def=graph.SerializeToString()))


def add_predictions(
    board: Any,
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
    figure = Figure(figsize=(8, 8.5), layout="constrained")
    for number, axes in enumerate(figure.subplots(4, 4).flat):
        axes.axis("off")
        if number >= min(16, len(images)):
            continue
        pixels = images[number].permute(1, 2, 0).cpu().numpy()
        axes.imshow(pixels if info.channels == 3 else pixels[..., 0], cmap="gray")
        truth, guess = int(labels[number]), int(predicted[number])
        title = names[truth] if truth == guess else f"{names[guess]}\n(is {names[truth]})"
        axes.set_title(title, size=9, color="black" if truth == guess else "firebrick")
    board.add_figure("predictions on validation images", figure, epoch)
