"""What numbers are measured on and among: distinct captions, classes, measured images, evaluations; and in which parts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm.clip.model import CLIP
from ldm.data.samples import Batch
from ldm.errors import ConfigError, StorageError
from ldm.evaluation.collected import Collected
from ldm.evaluation.metric import all_metrics
from ldm.evaluation.metrics import contrastive
from ldm.evaluation.runner import measure, receipt
from ldm.evaluation.subject import Options, Subject
from ldm.evaluation.sweep import counted
from ldm.formats import save
from tests.evaluation.subjects import numbers, opened, tiny_clip
from tests.tiny import TOKENIZER, tiny_model


def test_a_repeated_caption_is_one_of_the_captions_among_which_images_are_found(subject: Subject) -> None:
    made, (network,) = subject.generated(), subject.networks
    assert network.captions is not None
    names = list(dict.fromkeys(made.captions))
    assert len(names) < len(made)
    cosine = made.features["own"] @ network.captions(names).T
    found = numbers(subject, "recall_by_embedding")["recall_by_embedding@1"]
    own = torch.tensor([names.index(caption) for caption in made.captions])
    assert found.estimate.value == pytest.approx(float((cosine.argmax(1) == own).double().mean()))
    assert found.parameters == {"k": 1, "captions": len(names)}


def test_captions_are_encoded_in_parts(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    (network,) = subject.networks
    assert network.captions is not None
    texts = [f"caption {i}" for i in range(7)]
    expected = network.captions(texts)
    sizes: list[int] = []
    monkeypatch.setattr("ldm.evaluation.networks.clip.CAPTIONS", 3)
    encode = CLIP.encode_text

    def measured(clip: CLIP, tokens: Tensor) -> Tensor:
        sizes.append(len(tokens))
        return encode(clip, tokens)

    monkeypatch.setattr(CLIP, "encode_text", measured)
    torch.testing.assert_close(network.captions(texts), expected)
    assert sizes == [3, 3, 1]


def test_reconstructions_are_compared_with_the_measured_images_alone(folder: Path) -> None:
    subject = opened(folder, images=20)
    (found,) = all_metrics()["rfid"].run(subject)
    conditions = receipt(subject, "vae", found).conditions
    assert (conditions.n, conditions.reference, conditions.reference_n) == (20, None, None)


def test_receipts_of_the_tiny_decoder_have_the_hash_of_its_weights_too(folder: Path) -> None:
    weights: list[dict[str, str]] = []
    for seed in range(2):
        model = tiny_model(tiny_decoder={"widths": [8], "blocks": 1, "patch": 2})
        assert model.tiny_decoder is not None
        torch.nn.init.normal_(next(model.tiny_decoder.parameters()), generator=torch.Generator().manual_seed(seed))
        save(model, folder / "with_tiny_decoder.safetensors")
        subject = opened(folder, "with_tiny_decoder.safetensors")
        weights.append({name: receipt(subject, "vae", each).weights for name, each in numbers(subject, "psnr").items()})
    first, second = weights
    assert first["psnr"] == second["psnr"]
    assert first["psnr_tiny_decoder"] != second["psnr_tiny_decoder"]


def test_other_labels_give_another_hash_of_the_data() -> None:
    image, hashes = torch.zeros(2, 3, 4, 4), set()
    for labels in ([0, 1], [1, 0]):
        collected = Collected((), reduce=False)
        collected.add(image, ["a", "b"], {"label": torch.tensor(labels)})
        hashes.add(collected.fingerprint)
    assert len(hashes) == 2


@pytest.mark.parametrize(("guidance_scale", "rows"), [(1.0, 1), (3.0, 2)])
def test_evaluations_of_the_network_are_counted(subject: Subject, guidance_scale: float, rows: int) -> None:
    assert subject.pipe is not None
    settings = {"guidance_scale": guidance_scale, "num_inference_steps": 4}
    with counted(subject.pipe.model.denoiser) as found:
        subject.generate(["a", "b"], 0, {**settings, "sampler": "heun"})
    assert sum(found) == 2 * rows * 7


def test_shares_among_five_of_fewer_classes_are_left_out(folder: Path) -> None:
    found = numbers(opened(folder, "clip.safetensors", classes=("red", "green", "blue")), "zero_shot")
    assert found.keys() == {"zero_shot@1"}


def test_a_template_without_a_place_for_the_class_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"the template 'a photo' has no \{\}"):
        Options(templates=("{}", "a photo"))


def test_images_are_compared_with_captions_in_parts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {name: numbers(opened(folder, "clip.safetensors"), name) for name in ("zero_shot", "calibration")}
    monkeypatch.setattr(contrastive, "CHUNK", 7)
    for name, values in expected.items():
        found = numbers(opened(folder, "clip.safetensors"), name)
        assert found.keys() == values.keys()
        for key, number in found.items():
            for end in ("value", "low", "high"):
                assert getattr(number.estimate, end) == pytest.approx(getattr(values[key].estimate, end), rel=1e-4)


def test_missing_captions_leave_metrics_out_but_unreadable_data_end_an_evaluation(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches, metrics = list(subject.measured()), [all_metrics()[name] for name in ("retrieval", "psnr")]
    without = [{name: each for name, each in batch.items() if name != "text"} for batch in batches]
    monkeypatch.setattr(Subject, "measured", lambda self: iter(without))
    clip = tiny_clip(), TOKENIZER
    with pytest.warns(UserWarning, match="the metric retrieval is left out: the evaluation of CLIP needs captions"):
        found = measure(replace(subject, clip=clip), metrics)
    assert {each.conditions.metric for each in found} == {"psnr"}

    def unreadable(self: Subject) -> Iterator[Batch]:
        raise StorageError("the shard val.tar cannot be read (connection reset).")

    monkeypatch.setattr(Subject, "measured", unreadable)
    with pytest.raises(StorageError, match=r"val\.tar"):
        measure(replace(subject, clip=clip, _reconstructed={}), metrics)
