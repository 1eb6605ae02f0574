"""Metrics as TensorBoard events (the extra ``tensorboard``)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError as error:
    raise ImportError("TensorBoard events need tensorboard: pip install 'innerloop[tensorboard]'") from error


class Events:
    """The events of a run.

    Args:
        run: folder that they go into. done: steps behind us; events of later ones, from before a crash, are hidden.
    """

    def __init__(self, run: Path, done: int) -> None:
        self._writer = SummaryWriter(str(run), purge_step=done + 1)

    def write(self, records: Iterable[dict[str, Any]]) -> None:
        """Records as in the metrics file: train/loss, train/accuracy and validation/accuracy (or mse) by step."""
        for record in records:
            if "validation" in record:
                validation = record["validation"]
                values = {f"validation/{validation['metric']}": validation["mean"]}
            else:
                values = {f"train/{name}": record[name] for name in ("loss", "accuracy")}
            step = record.get("validation", record)["step"]
            for tag, value in values.items():
                if value is not None:
                    self._writer.add_scalar(tag, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
