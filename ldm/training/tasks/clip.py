"""Stage 2: training of the CLIP."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ldm.clip.loss import CLIPLossConfig, CrossEntropyConfig
from ldm.clip.model import CLIPConfig
from ldm.clip.retrieval import recall_at_k
from ldm.clip.tokenizer import Tokenizer, TokenizerConfig
from ldm.config import config_field
from ldm.data.samples import captions_of
from ldm.data.stream import EvaluationLoader
from ldm.errors import ConfigError
from ldm.formats import native
from ldm.formats.checkpoint import Checkpoint
from ldm.image_output import Images
from ldm.training.config import TrainConfig
from ldm.training.tasks.task import (
    IMAGE_ENCODER,
    TEXT_ENCODER,
    Export,
    Features,
    OptimizerSpec,
    Preview,
    Splits,
    Step,
    Task,
    TrainLoss,
    on_device,
)

if TYPE_CHECKING:
    from ldm.training.experiment import Experiment
    from ldm.training.handoff import Handoff

PREVIEW = 8
"""Number of captions that are shown with the images nearest to them."""


@dataclass(frozen=True)
class CLIPStage:
    """Stage 2: tokenizer and CLIP, and their training or the source that they are loaded from."""

    tokenizer: TokenizerConfig = config_field(help="tokenizer of the captions")
    model: CLIPConfig = config_field(help="text and image towers of the CLIP")
    loss: CLIPLossConfig = config_field(CrossEntropyConfig(), "contrastive loss", changeable=True)
    train: TrainConfig | None = config_field(None, "training of the stage; null = it is not trained")
    checkpoint: str | None = config_field(
        None,
        "source of a CLIP or a text encoder that is used without training: a file, folder or hub id, of SD or of CLIP",
        changeable=True,
        path=True,
    )

    def __post_init__(self) -> None:
        if self.train is not None and self.model.image is None:
            raise ConfigError(
                "model.image is missing, and a CLIP is trained with both towers; add it, or set train to null."
            )


class CLIPTask(Task):
    """Contrastive training on the images and captions of a batch; the batches of all devices count as one."""

    stage = "clip"
    title = "CLIP"
    result = Path("clip/final.safetensors")
    monitor = "text_to_image_R@1"
    higher_is_better = True
    one_size = True

    def __init__(self, config: CLIPStage, tokenizer: Tokenizer):
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.clip = config.model.build()
        self.loss = config.loss.build()
        self.features = Features(self.clip, config.loss.features)

    @classmethod
    def build(cls, experiment: Experiment, handoff: Handoff) -> CLIPTask:
        assert experiment.clip is not None
        return cls(experiment.clip, handoff.tokenizer(experiment.clip.tokenizer))

    @classmethod
    def outline(cls, experiment: Experiment, captions: Sequence[str]) -> CLIPTask:
        assert experiment.clip is not None
        return cls(experiment.clip, experiment.clip.tokenizer.build(captions))

    @classmethod
    def parts_of(cls, source: Checkpoint) -> Sequence[str]:
        return source.encoders()

    @property
    def trainable_module(self) -> nn.Module:
        return self.clip

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        return {"text tower": self.clip.text, "image tower": self.clip.image}

    @property
    def parts(self) -> Mapping[str, str]:
        return {TEXT_ENCODER: "text", IMAGE_ENCODER: "image"}

    def optimizers(self) -> Sequence[OptimizerSpec]:
        return [OptimizerSpec("loss", (self.clip, self.loss))]

    @property
    def called_modules(self) -> Sequence[nn.Module]:
        return [self.clip.text, self.clip.image]

    def losses(self, batch: Mapping[str, Any], step: Step) -> Iterator[TrainLoss]:
        distinct = len(set(batch["key"])) if step.number == 0 else len(batch["key"])
        if distinct < len(batch["key"]):  # an image counts as one that a copy of its caption does not describe
            warnings.warn(
                f"a batch of stage clip has {len(batch['key'])} samples, but there are only {distinct} to train on, so that it "
                f"contains some of them twice; lower clip.train.batch_size to at most {distinct}.",
                stacklevel=2,
            )
        image, text, scale = self.clip(batch["image"], self._tokens(batch))
        loss = self.loss(image, text, scale, step.rank, step.world_size, **self.features.argument)
        yield TrainLoss(loss, {"logit_scale": self.clip.logit_scale.detach().exp()})

    def after_step(self) -> None:
        self.clip.clamp_logit_scale()

    def evaluate(self, batch: Mapping[str, Any], step: Step) -> Mapping[str, Tensor]:
        """Return the features of captions and images, ``[b embed_dim]`` each."""
        return {
            "text": self.clip.encode_text(self._tokens(batch)),
            "image": self.clip.encode_image(batch["image"]),
        }

    def metrics(self, results: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the retrieval recall over the split."""
        return recall_at_k(results["text"], results["image"])

    def previews(self, splits: Splits, step: Step) -> Mapping[str, Preview]:
        """Return captions of the validation split, each with the three nearest images of a batch."""
        assert self.config.train is not None
        batch = next(iter(EvaluationLoader(splits("val"), self.config.train.batch_size)))
        results = self.evaluate(on_device(batch, self.device), step)
        nearest = (results["text"][:PREVIEW] @ results["image"].T).topk(min(3, len(results["image"])), dim=1)
        indices = nearest.indices.cpu()
        captions = [caption for caption in batch["text"][:PREVIEW] for _ in range(indices.shape[1])]
        images = Images.of((batch["image"][indices.flatten()] + 1) / 2)
        return {"nearest": images.grid(columns=indices.shape[1], captions=captions)}

    def export(self) -> Export:
        return Export(native.CLIP, self.clip, self.config.model, self.tokenizer)

    def _tokens(self, batch: Mapping[str, Any]) -> Tensor:
        return self.tokenizer(captions_of(batch, "stage clip"), longest=True).to(self.device)
