"""Files of checkpoints: written to the end or not at all, and read with their checksums."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO

from ldm.errors import TrainingError, first_line
from ldm.formats.training_checkpoint import resume_points


class CheckpointFiles(CheckpointIO):
    """Single files, written without a copy in memory or in another folder, as Lightning's own plugin would make."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint and wait until it is on the disk.

        Raises:
            TrainingError: it cannot be written, for instance because the disk is full; nothing of it is left.
        """
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:  # torch.save raises a RuntimeError in consequence of an OSError
            path.unlink(missing_ok=True)
            cause = error if isinstance(error, OSError) else error.__context__
            reason = cause.strerror if isinstance(cause, OSError) else first_line(error)
            good = resume_points(path.parent)
            go_on = f"run the same command to resume from {good[0]}" if good else "run the same command again"
            raise TrainingError(
                f"the checkpoint of step {checkpoint['completed_steps']} cannot be written to {path.parent} ({reason}); "
                f"free some space there and {go_on}."
            ) from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint, memory-mapped."""
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return content

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a checkpoint."""
        Path(path).unlink(missing_ok=True)
