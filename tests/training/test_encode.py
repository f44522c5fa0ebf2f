from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ldm.benchmarks.s3_server import s3_server
from ldm.cli.encode import encode
from ldm.data.bad_samples import Reason
from ldm.data.encoded import EncodedImages, crop_places
from ldm.data.encoding import Encoder
from ldm.data.samples import BatchIndices, StoredImages
from ldm.data.shards import Sample, write_shard
from ldm.data.stream import TrainStream
from ldm.errors import ConfigError, DataError
from ldm.training.engine import StageModule
from ldm.training.stages import build_module, data_of, train_stage
from ldm.training.tasks.task import Step
from tests.data.pictures import encoded, noise_picture
from tests.experiments import write_clip
from tests.tiny import TOKENIZER
from tests.training import encoding

AUGMENTED = ["data.crop=random", "data.flip=true", "data.encoded.crops=3"]
EXACT = ["data.encoded.latents=fp32", "data.encoded.text=fp32"]
REPA = ["denoiser.loss={kind: repa, hidden_width: 16}"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of an experiment of which the first two stages are trained."""
    return encoding.prepared(tmp_path_factory.mktemp("encoding"))


def loss(module: Any, batch: dict[str, Any]) -> float:
    """Return the training loss of a batch with a fixed noise, including dropped captions."""
    step = Step(0, 0, torch.Generator().manual_seed(3))
    with torch.no_grad():
        return float(next(iter(module.task.losses(batch, step))).value)


def sensitive(module: Any) -> None:
    """Give values to the weights that are 0 at first, so that the loss depends on latents and conditions."""
    module.task.eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in module.task.model.denoiser.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)


@pytest.mark.parametrize(
    ("types", "tolerance"),
    [(EXACT, 1e-6), ([], 1e-4), (["data.encoded.precision=bf16"], 1e-2), ([*EXACT, *REPA], 1e-6)],
)
def test_encoded_data_give_the_losses_of_live_encoding(
    trained: Path, tmp_path: Path, types: list[str], tolerance: float
) -> None:
    settings = [f"data.encoded.folder={tmp_path / 'encoded'}", *AUGMENTED, *types, "denoiser.conditioner.dropout=0.3"]
    encode(config=trained, overrides=settings)
    experiment = encoding.experiment(trained, *settings)
    module = build_module(experiment, "denoiser")
    sensitive(module)
    data = data_of(experiment, module)
    samples, images = data.samples("train"), experiment.data.open("train")
    assert isinstance(samples, EncodedImages)
    assert isinstance(images, StoredImages)
    variants = set()
    for number, batch in enumerate(TrainStream(samples, 8, 0, 6)):
        draw = TrainStream(images, 8, 0, 6)._order.draw(8 * number, 8)
        assert draw.jitter is not None
        crops = (3 * draw.jitter[:, 0]).astype(int)
        variants |= set(zip(crops.tolist(), (draw.jitter[:, 2] < 0.5).tolist(), strict=True))
        places = [crop_places(key, 3)[crop] for key, crop in zip(batch["key"], crops, strict=True)]
        live = images[BatchIndices(draw.index, np.c_[np.array(places), draw.jitter[:, 2]])]
        live["text"] = images.annotations(draw)["text"]
        for name in ("key", "text", "boxes"):
            assert batch[name] == live[name]
        assert "image" not in batch
        teacher = module.task.teacher
        assert (teacher is not None) == ("teacher" in batch) == (REPA[0] in types)
        if teacher is not None:  # the term is not in the losses below, of an evaluation
            torch.testing.assert_close(batch["teacher"], teacher.encode(live["image"]))
        batch = data.transfer_batch_to_device(batch, torch.device("cpu"), 0)
        assert loss(module, batch) == pytest.approx(loss(module, live), rel=tolerance)
    assert len(variants) == 6


def test_features_of_a_teacher_are_read_in_training_and_those_of_another_one_refused(
    trained: Path, tmp_path: Path
) -> None:
    encoded = [f"data.encoded.folder={tmp_path / 'encoded'}"]
    encode(config=trained, overrides=[*encoded, *REPA])

    def batch_of(*loss: str) -> tuple[Any, dict[str, Any]]:
        experiment = encoding.experiment(trained, *encoded, *loss)
        module = build_module(experiment, "denoiser")
        data = data_of(experiment, module)
        batch = next(iter(TrainStream(data.samples("train"), 8, 0, 1)))
        return module, data.transfer_batch_to_device(batch, torch.device("cpu"), 0)

    module, batch = batch_of(*REPA)
    module.task.train()
    aligned = loss(module, batch)
    assert loss(module, {**batch, "teacher": -batch["teacher"]}) != pytest.approx(aligned)
    assert "teacher" not in batch_of()[1]  # a loss that needs none can be trained on the same data
    with pytest.raises(DataError, match=r"do not fit the config: teacher is .* there"):
        batch_of(f"denoiser.loss={{kind: repa, checkpoint: {write_clip(tmp_path)}}}")


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of all files of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_an_interrupted_encoding_continues_with_the_same_bytes(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete, stopped = (f"data.encoded.folder={tmp_path / name}" for name in ("complete", "stopped"))
    encode(config=trained, overrides=[complete])
    assert sorted(contents(tmp_path / "complete")) == [
        "empty.safetensors",
        *(f"train/{name}" for name in ("000000.tar", "000001.tar", "000002.tar", "index.parquet")),
        *(f"val/{name}" for name in ("000000.tar", "index.parquet")),
    ]
    batches = []
    call = Encoder.__call__

    def interrupted(self: Encoder, batch: Any) -> Any:
        batches.append(len(batch))
        if len(batches) == 4:  # the second shard is incomplete
            raise KeyboardInterrupt
        return call(self, batch)

    monkeypatch.setattr(Encoder, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encode(config=trained, overrides=[stopped])
    assert sorted(contents(tmp_path / "stopped")) == ["train/000000.tar", "train/parts/000000.parquet"]
    encode(config=trained, overrides=[stopped])
    assert batches == [4, 4, 4, 4, 4, 4, 4, 1, 4, 1]  # the first shard is not encoded again
    assert contents(tmp_path / "stopped") == contents(tmp_path / "complete")
    # Left by a kill while the index was written, and after it.
    (tmp_path / "stopped" / "train" / ".index.parquet.abc").touch()
    (tmp_path / "stopped" / "train" / "parts").mkdir()
    encode(config=trained, overrides=[stopped])
    assert contents(tmp_path / "stopped") == contents(tmp_path / "complete")
    assert not (tmp_path / "stopped" / "train" / "parts").exists()
    assert len(batches) == 10


def test_captions_of_another_order_are_refused(trained: Path, tmp_path: Path) -> None:
    """Text states are stored in the order of the captions, which is that of their weights."""
    images = (encoded(noise_picture(i, height=20, width=20)) for i in range(4))
    samples = (
        Sample(f"{i}", f'{{"short": "car {i}", "long": "a car {i}"}}', each, "png") for i, each in enumerate(images)
    )
    write_shard(tmp_path / "json.tar", samples)
    common = [f"data.{split}={tmp_path / 'json.tar'}" for split in ("train", "val")]
    common.append(f"data.encoded.folder={tmp_path / 'encoded'}")

    def weights(text: str) -> list[str]:
        return [*common, f"data.captions={{format: json, weights: {{{text}}}}}"]

    encode(config=trained, overrides=weights("short: 1, long: 1"))
    for text, problem in (("short: 3, long: 1", None), ("long: 1, short: 1", "order of captions is")):
        experiment = encoding.experiment(trained, *weights(text))
        with pytest.raises(DataError, match=problem) if problem else nullcontext():
            data_of(experiment, build_module(experiment, "denoiser")).samples("train")


def test_samples_of_other_settings_are_refused(trained: Path, tmp_path: Path) -> None:
    folder = f"data.encoded.folder={tmp_path}"
    encode(config=trained, overrides=[folder])

    def refusal(*overrides: str) -> str:
        experiment = encoding.experiment(trained, folder, *overrides)
        with pytest.raises(DataError) as caught:
            data_of(experiment, build_module(experiment, "denoiser")).samples("train")
        return str(caught.value)

    assert "do not fit the config: size is [16, 16] there and [8, 8] here; encode the data" in refusal("data.size=8")
    assert "config: crops is 1 there and 4 here; flip is False there and True here;" in refusal(
        "data.crop=random", "data.flip=true"
    )
    assert "config: fit is crop there and pad here;" in refusal("data.fit=pad")
    assert "config: text is fp16 there and bf16 here;" in refusal("data.encoded.text=bf16")
    assert "config: precision is fp32 there and bf16 here;" in refusal("data.encoded.precision=bf16")
    assert "config: data is " in refusal(f"data.train={trained.parent / 'images' / '0.tar'}")
    assert "there are no encoded samples in" in refusal(f"data.encoded.folder={tmp_path / 'none'}")
    with pytest.raises(DataError, match=r"do not fit the config: shard_size is 8 there and 4 here"):
        encode(config=trained, overrides=[folder, "data.encoded.shard_size=4"])
    with pytest.raises(ConfigError, match=r"data\.captions shuffles or drops tags, .* set data\.encoded\.text to null"):
        encode(config=trained, overrides=[folder, "data.captions.shuffle_tags=true"])
    with pytest.raises(DataError, match=r"nothing can be written to https://host/set/train; give a local folder or"):
        encode(config=trained, overrides=["data.encoded.folder=https://host/set"])
    with pytest.raises(ConfigError, match=r"data\.encoded\.folder is null; name the folder or URL"):
        encode(config=trained)
    # Latents alone are used where the captions are encoded in training.
    experiment = encoding.experiment(trained, folder, "denoiser.conditioner.trainable=true")
    batch = next(iter(TrainStream(data_of(experiment, build_module(experiment, "denoiser")).samples("train"), 4, 0, 1)))
    assert sorted(batch) == ["boxes", "key", "label", "mean", "std", "text"]


def test_other_encoders_are_refused(trained: Path, tmp_path: Path) -> None:
    folder = f"data.encoded.folder={tmp_path}"
    encode(config=trained, overrides=[folder])
    experiment = encoding.experiment(trained, folder)

    def refusal(change: Callable[[StageModule], None]) -> str:
        module = build_module(experiment, "denoiser")
        change(module)
        with pytest.raises(DataError) as caught:
            data_of(experiment, module).samples("val")
        return str(caught.value)

    def other_tower(module: StageModule) -> None:
        torch.nn.init.zeros_(module.task.model.conditioner.tower.token_embedding.weight)

    def other_tokenizer(module: StageModule) -> None:
        module.task.model.conditioner.tokenizer = TOKENIZER

    assert "config: vae is " in refusal(lambda module: module.handoff.update({"vae": "another"}))
    assert "config: text_encoder is " in refusal(other_tower)
    assert "config: tokenizer of text_encoder is " in refusal(other_tokenizer)


def test_bad_samples_are_left_out_and_listed(trained: Path, tmp_path: Path) -> None:
    encoding.write_images(tmp_path / "shards" / "0.tar", 6)
    broken = [Sample("x", "broken", b"\x89PNG nothing", "png", {"label": 0, "boxes": b"[]"})]
    write_shard(tmp_path / "shards" / "1.tar", broken)
    settings = [f"data.encoded.folder={tmp_path / 'encoded'}", f"data.train={tmp_path / 'shards'}"]
    encode(config=trained, overrides=settings)
    experiment = encoding.experiment(trained, *settings)
    with pytest.warns(
        UserWarning, match=r"1 samples are skipped, the first of them 'x' in .*: the image cannot be read"
    ):
        samples = data_of(experiment, build_module(experiment, "denoiser")).samples("train")
    assert len(samples) == 6
    assert [(bad.key, bad.reason) for bad in samples.dropped] == [("x", Reason.UNKNOWN_FORMAT)]


@pytest.mark.slow
def test_an_encoding_that_is_killed_continues_with_the_same_bytes(trained: Path, tmp_path: Path) -> None:
    settings = [*AUGMENTED, "data.encoded.shard_size=4"]
    complete, killed = (tmp_path / name for name in ("complete", "killed"))
    encode(config=trained, overrides=[f"data.encoded.folder={complete}", *settings])
    process = encoding.started(trained, f"data.encoded.folder={killed}", *settings)
    while not (killed / "train" / "000001.tar").exists():
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert not (killed / "train" / "index.parquet").exists()
    encode(config=trained, overrides=[f"data.encoded.folder={killed}", *settings])
    assert contents(killed) == contents(complete)


@pytest.mark.slow
def test_a_denoiser_is_trained_on_a_bucket(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with s3_server() as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        import s3fs

        s3fs.S3FileSystem().mkdir("encoded")
        settings = [*AUGMENTED, f"data.shard_cache.folder={tmp_path / 'cache'}", f"run_dir={tmp_path / 'run'}"]
        shutil.copytree(trained.parent / "run", tmp_path / "run")
        losses = []
        for folder in ("s3://encoded/set", str(tmp_path / "local")):
            encode(config=trained, overrides=[*settings, f"data.encoded.folder={folder}"])
            experiment = encoding.experiment(trained, *settings, f"data.encoded.folder={folder}")
            module = build_module(experiment, "denoiser")
            data = data_of(experiment, module)
            stream = TrainStream(data.samples("train"), 8, 0, 2)
            batches = [data.transfer_batch_to_device(batch, torch.device("cpu"), 0) for batch in stream]
            losses.append([loss(module, batch) for batch in batches])
        assert losses[0] == losses[1]
        found = {path.partition("/set/")[2] for path in s3fs.S3FileSystem().find("encoded/set")}
        assert found == {*contents(tmp_path / "local")}
        train_stage(encoding.experiment(trained, *settings, "data.encoded.folder=s3://encoded/set"), "denoiser")


def test_encoded_sources_are_mixed_by_their_weights(trained: Path, tmp_path: Path) -> None:
    """A shard holds samples of one source, also where one has bad samples alone."""
    broken = [Sample(f"x{i}", "broken", b"\x89PNG nothing", "png", {"label": 0, "boxes": b"[]"}) for i in range(9)]
    write_shard(tmp_path / "bad.tar", broken)
    images = trained.parent / "images"
    first = [str(tmp_path / "bad.tar"), str(images / "0.tar")]
    mixture = [{"source": first, "weight": 1.5}, {"source": str(images / "1.tar"), "weight": 0.5}]
    settings = ["data.train=null", f"data.mixture={json.dumps(mixture)}", f"data.encoded.folder={tmp_path / 'encoded'}"]
    encode(config=trained, overrides=settings)
    experiment = encoding.experiment(trained, *settings)
    with pytest.warns(UserWarning, match=r"9 samples are skipped"):
        samples = data_of(experiment, build_module(experiment, "denoiser")).samples("train")
    assert samples.lengths == [0, 7, 4, 8, 2]
    assert [(source.files, source.weight) for source in samples.mixture] == [(3, 1.5), (2, 0.5)]
    keys = [key for batch in TrainStream(samples, 4, 0, 21) for key in batch["key"]]
    assert sum(int(key) < 11 for key in keys) == 63
    other = encoding.experiment(trained, *settings, f"data.mixture={json.dumps(mixture[::-1])}")
    data = data_of(other, build_module(other, "denoiser"))
    with pytest.raises(DataError, match=r"samples of each source is \[20, 10\] there and \[10, 20\] here"):
        data.samples("train")


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--engine=ray", "--encoders=2", "--device=cpu"], []])
def test_all_engines_write_the_same_bytes(trained: Path, tmp_path: Path, arguments: list[str]) -> None:
    """Two actors of a local Ray, and two ranks of torchrun."""
    for name, options, ranks in (("one", [], 1), ("two", arguments, 1 if arguments else 2)):
        encoding.encode(trained, f"data.encoded.folder={tmp_path / name}", *AUGMENTED, *options, ranks=ranks)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_images_in_buckets_are_encoded_in_their_shapes(trained: Path, tmp_path: Path) -> None:
    settings = [f"data.encoded.folder={tmp_path}", "data.size=32", "data.buckets={step: 8, max_aspect: 2.0}", *EXACT]
    encode(config=trained, overrides=settings)
    experiment = encoding.experiment(trained, *settings)
    module = build_module(experiment, "denoiser")
    sensitive(module)
    data, images = data_of(experiment, module), experiment.data.open("train")
    shapes = set()
    for draw in TrainStream(data.samples("train"), 4, 0, 8)._draws():
        batch = data.transfer_batch_to_device(data.samples("train")[draw], torch.device("cpu"), 0)
        shapes.add(tuple(2 * side for side in batch["mean"].shape[2:]))
        assert loss(module, batch) == pytest.approx(loss(module, images[draw]), rel=1e-6)
    assert shapes == {(32, 32), (24, 40)}
