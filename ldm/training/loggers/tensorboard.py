"""Event files for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ldm.training.loggers.logger import LoggedRun, LoggerConfig


@dataclass(frozen=True)
class TensorBoardConfig(LoggerConfig, kind="tensorboard"):
    """Event files in ``tensorboard/`` of the stage."""

    def open(self, run: LoggedRun) -> TensorBoard:
        return TensorBoard(run)


class TensorBoard:
    """Logger of a :class:`TensorBoardConfig`; TensorBoard hides the rows after the step at which a session starts."""

    def __init__(self, run: LoggedRun):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.step + 1)

    def write(self, step: int, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()
