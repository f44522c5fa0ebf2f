"""Numbers of metrics on a tiny model against their formulas, and the receipts of these numbers."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio

from ldm.data.shards import Sample, write_shard
from ldm.errors import DataError
from ldm.evaluation.lpips import BACKBONE
from ldm.evaluation.metric import all_metrics
from ldm.evaluation.opening import Request, open_subject
from ldm.evaluation.receipt import Conditions
from ldm.evaluation.runner import receipt
from ldm.evaluation.subject import Subject
from ldm.formats import native
from ldm.formats.native import save_module
from tests.data.pictures import encoded, noise_picture
from tests.evaluation.subjects import data_of, numbers, opened, tiny_clip
from tests.evaluation.test_distances import by_loops, by_scipy
from tests.tiny import TOKENIZER


def values(subject: Subject, name: str) -> dict[str, float]:
    return {metric: each.estimate.value for metric, each in numbers(subject, name).items()}


def request(folder: Path, overrides: list[str] | None = None, **fields: Any) -> Subject:
    """Open the tiny model with some fields of the request replaced."""
    features = {"features": [f"own={folder / 'clip.safetensors'}"], **fields}
    given = {each.partition("=")[0]: each for each in (*data_of(folder), *(overrides or []))}
    settings = {"num_inference_steps": 2, "guidance_scale": 1.0, "sampler": None}
    model = str(folder / "model.safetensors")
    return open_subject(
        Request(str(folder / "tiny.yaml"), [*given.values()], model=model, settings=settings, **features)
    )


def write_clip(folder: Path, seed: int) -> Path:
    clip, path = tiny_clip(seed), folder / "clip.safetensors"
    save_module(path, native.CLIP, clip, clip.config, TOKENIZER, {})
    return path


def originals_and_reconstructions(subject: Subject) -> tuple[Tensor, Tensor]:
    assert subject.first_stage is not None
    image = torch.cat([batch["image"] for batch in subject.measured()])
    with torch.no_grad():
        return image, subject.first_stage.decode(subject.first_stage.encode(image).mode).clamp(-1, 1)


def test_numbers_of_generated_images_are_those_of_their_features(subject: Subject) -> None:
    made = subject.generated()
    x, y = made.features["own"].double(), subject.true("val").features["own"].double()
    assert values(subject, "fid") == pytest.approx({"fid": by_scipy(x.numpy(), y.numpy())}, rel=1e-4)
    cube = lambda a, b: float((a @ b / len(a) + 1) ** 3)  # noqa: E731
    assert values(subject, "kid") == pytest.approx({"kid": by_loops(x, y, cube)}, rel=1e-4, abs=1e-7)
    gauss = lambda a, b: float(torch.exp(-(a - b).square().sum() / (2 * 10**2)))  # noqa: E731
    assert values(subject, "cmmd") == pytest.approx({"cmmd": 1000 * by_loops(x, y, gauss)}, rel=1e-3, abs=1e-6)


def test_the_clip_score_is_that_of_cosines_above_0(folder: Path, tmp_path: Path) -> None:
    subject = request(folder, features=[f"own={write_clip(tmp_path, seed=2)}"])
    made, network = subject.generated(), subject.networks[0]
    assert network.captions is not None
    cosines = F.cosine_similarity(made.features["own"], network.captions(made.captions))
    assert cosines.min() < 0 < cosines.max()
    assert values(subject, "clip_score") == pytest.approx({"clip_score": 100 * cosines.clamp(min=0).mean().item()})


def test_the_diversity_is_the_mean_of_pairs_of_images_of_one_caption(folder: Path) -> None:
    subject = opened(folder, repeats=(2, 3), seed=5)
    assert subject.pipe is not None
    captions = subject.generated().captions
    distances = []
    for number, caption in enumerate((captions[0], captions[-1])):
        first = 5 + 3 * number
        made = [
            subject.pipe(caption, seed=first + i, output_type="pt", progress=False, **subject.settings)
            for i in range(3)
        ]
        features = subject.networks[0](torch.cat(made) * 2 - 1)
        distances += [1 - F.cosine_similarity(a, b, dim=0) for a, b in itertools.combinations(features.double(), 2)]
    assert values(subject, "diversity") == pytest.approx({"diversity": float(np.mean(distances))}, rel=1e-3)


def test_numbers_of_reconstructions_are_those_of_decoded_modes(subject: Subject) -> None:
    image, made = originals_and_reconstructions(subject)
    expected = peak_signal_noise_ratio(made, image, data_range=2.0, reduction="none", dim=(1, 2, 3)).mean()
    assert values(subject, "psnr")["psnr"] == pytest.approx(expected.item(), rel=1e-4)
    x, y = (subject.networks[0](each).double().numpy() for each in (made, image))
    assert values(subject, "rfid") == pytest.approx({"rfid": by_scipy(x, y)}, rel=1e-3)


@pytest.mark.slow
def test_lpips_is_the_mean_over_the_images(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With random weights of AlexNet, on images of 32 pixels; those of 16 are too small for it."""
    from lpips import LPIPS
    from torchvision.models import alexnet

    (tmp_path / "checkpoints").mkdir()
    torch.save(alexnet(weights=None).state_dict(), tmp_path / "checkpoints" / BACKBONE)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    overrides = [*data_of(folder), "data.size=32"]
    subject = open_subject(Request(str(folder / "tiny.yaml"), overrides, model=str(folder / "model.safetensors")))
    image, made = originals_and_reconstructions(subject)
    with torch.no_grad():
        expected = LPIPS(net="alex", verbose=False).eval()(image, made).mean()
    assert values(subject, "lpips") == pytest.approx({"lpips": expected.item()}, rel=1e-4)
    with pytest.raises(DataError, match="LPIPS needs images of at least 31 pixels, and these have 16"):
        numbers(opened(folder), "lpips")


def test_zero_shot_classification_chooses_the_nearest_caption(folder: Path) -> None:
    subject = opened(folder, "clip.safetensors")
    assert subject.clip is not None
    clip, tokenizer = subject.clip
    batches = list(subject.measured())
    captions = [caption for batch in batches for caption in batch["text"]]
    classes = sorted(set(captions))
    with torch.no_grad():
        cosines = (
            torch.cat([clip.encode_image(batch["image"]) for batch in batches]) @ clip.encode_text(tokenizer(classes)).T
        )
    hits = [classes[int(row.argmax())] == caption for row, caption in zip(cosines, captions, strict=True)]
    assert values(subject, "zero_shot")["zero_shot@1"] == pytest.approx(np.mean(hits))


# Receipts


def conditions(subject: Subject, name: str) -> Conditions:
    return receipt(subject, all_metrics()[name].part, next(iter(numbers(subject, name).values()))).conditions


def differing(first: Subject, second: Subject, name: str) -> set[str]:
    """The fields in which the receipts of a number differ; of mappings, their names."""
    found = conditions(first, name).differences(conditions(second, name))
    return {each.partition(".")[0] for each in found}


def test_receipts_record_what_a_number_depends_on(folder: Path, tmp_path: Path) -> None:
    plain = opened(folder)
    assert differing(plain, opened(folder), "fid") == set()
    assert differing(plain, opened(folder, seed=1), "fid") == {"seed"}
    assert differing(plain, opened(folder, images=22), "fid") == {"n"}
    assert differing(plain, opened(folder, reference="train"), "fid") == {"reference", "reference_n"}
    compiled = dataclasses.replace(plain, compiled={"backend": "inductor"})
    assert differing(plain, compiled, "psnr") == {"backend"}
    half = opened(folder)
    assert half.pipe is not None
    half.pipe.to("cpu", torch.bfloat16)
    assert differing(plain, half, "psnr") == {"dtype"}
    more_steps = opened(folder)
    more_steps.settings = {**more_steps.settings, "num_inference_steps": 3}
    assert differing(plain, more_steps, "fid") == {"steps"}

    network = request(folder, features=[f"own={write_clip(tmp_path, seed=1)}"])
    assert differing(plain, network, "fid") == {"network_hash"}

    write_shard(
        tmp_path / "val.tar",
        [
            Sample(f"{i}", f"caption {i}", encoded(noise_picture(i + 100, 4, 4).resize((16, 16))), "png", {"label": 0})
            for i in range(24)
        ],
    )
    data = request(folder, overrides=[f"data.val={tmp_path / 'val.tar'}"])
    assert differing(plain, data, "psnr") == {"data"}
    assert differing(plain, data, "fid") == {"data", "reference"}
