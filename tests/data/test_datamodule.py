from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from ldm.data.config import ShardsData
from ldm.data.datamodule import DataModule, LatentSource
from ldm.data.stream import TrainStream
from tests.data.pictures import write_shards
from tests.data.test_latents import TinyFirstStage


class Recorder(L.LightningModule):
    """Trains one number and writes down what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[str]] = []
        self.validated: list[str] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        self.seen.append(batch["key"])
        return (self.weight - 1) ** 2

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.validated += batch["key"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class StopAt(L.Callback):
    """Ends a run as a crash would, right after a checkpoint."""

    def __init__(self, batches: int, path: Path):
        self.batches, self.path = batches, path

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.batches:
            trainer.save_checkpoint(self.path)
            raise RuntimeError("crash")


@pytest.fixture
def data(tmp_path: Path) -> ShardsData:
    write_shards(tmp_path / "shards", [7, 6])
    folder = str(tmp_path / "shards")
    return ShardsData(folder, val=folder, size=8, workers=0)


def trainer(*callbacks: L.Callback) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=list(callbacks),
        val_check_interval=5,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("stop", [1, 4, 5, 11])
def test_a_run_that_crashed_sees_the_batches_that_it_would_have_seen(
    tmp_path: Path, data: ShardsData, stop: int
) -> None:
    whole, crashed, resumed = Recorder(), Recorder(), Recorder()
    trainer().fit(whole, DataModule(data, 4, 0, 12))
    with pytest.raises(RuntimeError, match="crash"):
        trainer(StopAt(stop, tmp_path / "last.ckpt")).fit(crashed, DataModule(data, 4, 0, 12))
    second = trainer()
    second.fit(resumed, DataModule(data, 4, 0, 12), ckpt_path=tmp_path / "last.ckpt", weights_only=False)
    assert len(whole.seen) == 12
    assert crashed.seen + resumed.seen == whole.seen
    assert torch.equal(resumed.weight, whole.weight)
    assert second.global_step == 12


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_validation_sees_the_whole_split_in_order(data: ShardsData) -> None:
    module = Recorder()
    trainer().fit(module, DataModule(data, 4, 0, 5))
    assert module.validated == [f"{i:04d}" for i in range(13)]


def test_latents_take_the_place_of_pictures(tmp_path: Path, data: ShardsData) -> None:
    source = LatentSource(TinyFirstStage(), "mark", tmp_path / "latents")
    latents, pictures = DataModule(data, 4, 0, 5, latents=source), DataModule(data, 4, 0, 5)
    latents.prepare_data()
    assert source.first_stage.encoded == 26  # 13 of train, 13 of val
    for batch, expected in zip(latents.train_dataloader(), pictures.train_dataloader(), strict=True):
        assert batch["key"] == expected["key"]
        assert batch["mean"].shape == batch["std"].shape == (4, 2, 2, 2)
        assert "image" not in batch
    assert source.first_stage.encoded == 26


def test_a_run_can_begin_at_any_batch(data: ShardsData) -> None:
    whole = [batch["key"] for batch in DataModule(data, 4, 0, 9).train_dataloader()]
    rest = DataModule(data, 4, 0, 9, start_batch=6).train_dataloader()
    assert isinstance(rest, TrainStream)
    assert [batch["key"] for batch in rest] == whole[6:]
