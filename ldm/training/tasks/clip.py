"""Stage 2: training of the CLIP."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ldm.clip.gradient_cache import encode_in_chunks
from ldm.clip.loss import CLIPLossConfig, CrossEntropyConfig
from ldm.clip.model import CLIPConfig
from ldm.clip.retrieval import recall_at_k
from ldm.clip.token_choice import TokenChoiceConfig
from ldm.clip.tokenizer import Tokenizer, TokenizerConfig
from ldm.config import config_field
from ldm.data.samples import captions_of
from ldm.data.stream import EvaluationLoader
from ldm.errors import ConfigError, TrainingError
from ldm.formats import native, read
from ldm.formats.checkpoint import Checkpoint
from ldm.formats.training_checkpoint import resume_points
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
    gradient_cache: int | None = config_field(
        None,
        "samples that the towers encode at a time, while the loss compares all of a batch (gradient caching): less memory, "
        "about a third more computation; null = all",
        changeable=True,
    )
    freeze: Literal["image", "text"] | None = config_field(
        None, "tower that is not trained (locked tuning, LiT); a frozen text tower keeps its tokenizer"
    )
    frozen_source: str | None = config_field(
        None, "source of the weights of the frozen tower; null = train.init", path=True
    )
    patch_dropout: float = config_field(
        0.0, "share of the patches of an image that the image tower does not see in training (FLIP)", changeable=True
    )
    tokens: TokenChoiceConfig = config_field(
        TokenChoiceConfig(), "tokens of a caption that the text tower sees in training (CLIPA)", changeable=True
    )

    def __post_init__(self) -> None:
        if self.train is not None and self.model.image is None:
            raise ConfigError(
                "model.image is missing, and a CLIP is trained with both towers; add it, or set train to null."
            )
        if self.gradient_cache is not None and self.gradient_cache < 1:
            raise ConfigError(f"gradient_cache must be at least 1 or null, not {self.gradient_cache}.")
        if self.gradient_cache is not None and self.loss.features:
            raise ConfigError(
                f"the loss {self.loss.kind} reads features of a complete batch, which gradient_cache divides; set it to null."
            )
        if not 0 <= self.patch_dropout < 1:
            raise ConfigError(f"patch_dropout must be in [0, 1), not {self.patch_dropout}.")
        if self.freeze == "image" and self.patch_dropout:
            raise ConfigError(
                "patch_dropout changes the image tower, but freeze is image; set one of them to 0 or null."
            )
        if self.freeze and self.train is not None and (self.frozen_source or self.train.init) is None:
            raise ConfigError(
                f"freeze is {self.freeze}, but neither frozen_source nor train.init names that tower; give one."
            )
        if self.frozen_source is not None and not self.freeze:
            raise ConfigError(f"frozen_source is {self.frozen_source}, but freeze is null; set it to image or text.")


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
        self.clip.image.patch_dropout = config.patch_dropout
        if config.freeze:
            self.clip.get_submodule(config.freeze).requires_grad_(False)
        self.loss = config.loss.build()
        self.features = Features(self.clip, config.loss.features)

    @classmethod
    def build(cls, experiment: Experiment, handoff: Handoff) -> CLIPTask:
        config = experiment.clip
        assert config is not None
        if not config.freeze or resume_points(experiment.folder / cls.stage):
            return cls(config, handoff.tokenizer(config.tokenizer))
        assert config.train is not None
        source = read(config.frozen_source or config.train.init or "")
        own = config.freeze == "text"
        task = cls(config, handoff.tokenizer_of(source) if own else handoff.tokenizer(config.tokenizer))
        handoff.load_part(source, TEXT_ENCODER if own else IMAGE_ENCODER, task.clip.get_submodule(config.freeze))
        return task

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
        return [
            tower
            for name, tower in (("text", self.clip.text), ("image", self.clip.image))
            if name != self.config.freeze
        ]

    def check_batch_size(self, size: int) -> None:
        if size < 2:
            raise TrainingError(
                "the loss of stage clip compares the samples of a batch, but the batches have one; set clip.train.batch_size to "
                "at least 2."
            )

    def losses(self, batch: Mapping[str, Any], step: Step) -> Iterator[TrainLoss]:
        distinct = len(set(batch["key"])) if step.number == 0 else len(batch["key"])
        if distinct < len(batch["key"]):  # an image counts as one that a copy of its caption does not describe
            warnings.warn(
                f"a batch of stage clip has {len(batch['key'])} samples, but there are only {distinct} to train on, so that it "
                f"contains some of them twice; lower clip.train.batch_size to at most {distinct}.",
                stacklevel=2,
            )
        tokens = self._tokens(batch)
        own = self.tokenizer
        tokens = self.config.tokens.apply(tokens, own.eos_id, own.pad_id, own.context_length, step.generator)
        image = self._encoded("image", self.clip.encode_image, batch["image"])
        text = self._encoded("text", self.clip.encode_text, tokens.to(self.device))
        scale = self.clip.logit_scale.exp()
        loss = self.loss(image, text, scale, step.rank, step.world_size, **self.features.argument)
        yield TrainLoss(loss, {"logit_scale": self.clip.logit_scale.detach().exp()})

    def _encoded(self, tower: str, encode: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Return the features ``[b embed_dim]`` of a batch ``x``, without gradients if the tower is frozen."""
        with torch.no_grad() if tower == self.config.freeze else nullcontext():
            return encode_in_chunks(encode, x, self.config.gradient_cache)

    def after_step(self) -> None:
        self.clip.clamp_logit_scale()

    def evaluate(self, batch: Mapping[str, Any], step: Step) -> Mapping[str, Tensor]:
        """Return the features of captions and images, ``[b embed_dim]`` each."""
        return {
            "text": self._encoded("text", self.clip.encode_text, self._tokens(batch).to(self.device)),
            "image": self._encoded("image", self.clip.encode_image, batch["image"]),
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
        """Return the tokens ``[b n]`` of the captions of a batch, on the CPU."""
        return self.tokenizer(captions_of(batch, "stage clip"), longest=True)
