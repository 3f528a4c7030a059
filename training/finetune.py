"""Fine-tuning after a swap: a model begins with the weights of a run of another attention type."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from linear_vit import attention
from linear_vit.training.checkpoints import check_classes, load_checkpoint, load_weights
from linear_vit.training.config import MODELS, Config, build_model
from linear_vit.training.data.datasets import Dataset
from linear_vit.training.errors import UserError, first_line, notice


class Start:
    """A checkpoint to begin with.

    Attributes:
        path: of the checkpoint.
        config: of the run that it is of.
    """

    def __init__(self, path: Path) -> None:
        """Raises UserError where there is no checkpoint."""
        self.path = path
        self._content = load_checkpoint(path)
        self.config: Config = self._content["config"]

    def settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The checkpoint's settings, and those that were given before them.

        Warm-up stays in proportion where the epochs are others.
        """
        own = dataclasses.asdict(self.config)
        if "epochs" in given:
            del own["warmup_epochs"]
        return {**own, **given}

    def put_into(self, model: nn.Module, config: Config, data: Dataset) -> None:
        """Give a model of this configuration the checkpoint's weights, those that it can keep.

        Raises:
            UserError: the two differ in more than their attention, or in classes.
        """
        check_classes(self._content, data.class_names, self.path)
        old = build_model(self.config, data.info.classes)
        load_weights(old, self._content, self.path)
        try:
            done = attention.replace(
                old,
                config.attention_type,
                ripple_stages=config.ripple_stages,
                hydra_branches=config.hydra_branches,
            )
            model.load_state_dict(old.state_dict())
        except (ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[-1].strip() or first_line(error)
            raise UserError(f"{self.path} can't become this model: {reason}") from error
        notice(str(done))

    def check_resumed(self, record: Mapping[str, Any], out: Path) -> None:
        """UserError where the run that is gone on with began elsewhere."""
        began = record.get("init_from", {}).get("checkpoint")
        if record["epochs"] and began != str(self.path):
            raise UserError(
                f"the run in {out} began with {began or 'new weights'}, not with {self.path}: "
                "leave out --init_from to go on with it, or start another one with --out"
            )

    def facts(self, val_accuracy: float) -> dict[str, Any]:
        """What the run record says of where it began; the accuracy is that right after the swap."""
        return {
            "checkpoint": str(self.path),
            "model": self.config.model,
            "model_title": MODELS[self.config.model].title,
            "config": dataclasses.asdict(self.config),
            "val_accuracy": val_accuracy,
        }
