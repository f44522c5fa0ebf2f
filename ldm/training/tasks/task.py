"""Interface of a training task: a plain module, without optimizers, devices or files, that the engine drives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, cast

import torch
from PIL import Image
from torch import Tensor, nn

from ldm.clip.tokenizer import Tokenizer
from ldm.data.samples import Batch, Samples
from ldm.errors import ConfigError, unknown
from ldm.formats.checkpoint import TINY_DECODER, Checkpoint
from ldm.vae import FirstStage

if TYPE_CHECKING:
    from ldm.data.teacher import Teacher
    from ldm.training.experiment import Experiment
    from ldm.training.handoff import Handoff

Preview = Image.Image | list[Image.Image]
"""An image, or the frames of an animation."""

Splits = Callable[[str], Samples]
"""Function that opens a split of the data by its name."""

FIRST_STAGE, TEXT_ENCODER, IMAGE_ENCODER, DENOISER = "first_stage", "text_encoder", "image_encoder", "denoiser"
"""Names of the parts of a :class:`ldm.formats.checkpoint.Checkpoint`."""

PART_SECTIONS = {
    FIRST_STAGE: "vae.model",
    TEXT_ENCODER: "clip.model.text",
    IMAGE_ENCODER: "clip.model.image",
    DENOISER: "denoiser.model",
    TINY_DECODER: "decoder.model",
}
"""Config section that describes each part."""


@dataclass(frozen=True)
class Step:
    """Everything that a task may depend on besides the batch.

    Args:
        number: optimizer steps completed so far.
        seed: seed of the experiment.
        generator: CPU generator of this step; a resumed run draws the same numbers. :mod:`ldm.nn.ranks` draws those of the rows
            of a batch from it, so that they do not depend on the number of ranks.
        rank, world_size: rank of this process, and number of processes.
        of_all_ranks: generator of the numbers that all ranks draw alike; None = ``generator``, if that is the same on all ranks.
    """

    number: int
    seed: int
    generator: torch.Generator
    rank: int = 0
    world_size: int = 1
    of_all_ranks: torch.Generator | None = None


class TrainLoss(NamedTuple):
    """Loss to minimize, and metrics to log with it; of those by noise level, values and noise levels ``[b]`` of the samples."""

    value: Tensor
    metrics: Mapping[str, Tensor | float] = MappingProxyType({})
    by_noise_level: Mapping[str, tuple[Tensor, Tensor]] = MappingProxyType({})


@dataclass(frozen=True)
class OptimizerSpec:
    """Declaration of an optimizer.

    Args:
        name: name of its loss in the metrics.
        modules: modules whose trainable parameters it optimizes.
        start: first step at which it is active.
    """

    name: str
    modules: tuple[nn.Module, ...]
    start: int = 0


@dataclass(frozen=True)
class Export:
    """Contents of the file of a finished stage: weights, the config that builds them, and the tokenizer of its text encoder."""

    format: str
    module: nn.Module
    config: Any
    tokenizer: Tokenizer | None = None


class Task(nn.Module):
    """Training task of one stage.

    Class attributes: ``stage``, its name and config section; ``title``, its name in reports; ``result``, its result file in the
    run folder; ``monitor``, the validation metric that selects the best checkpoint; ``higher_is_better``; ``one_size``, whether
    its networks take images of one size only, so that they are trained without aspect buckets; ``needs_images``, whether it uses
    the images themselves if latents are cached; ``image_towers``, frozen networks of its losses that are read from files of
    their own, by the config field that names the file: checkpoints hold their fingerprints, but not their weights.
    """

    stage: ClassVar[str]
    title: ClassVar[str]
    result: ClassVar[Path]
    monitor: ClassVar[str]
    higher_is_better: ClassVar[bool]
    one_size: ClassVar[bool] = False
    needs_images: bool = True
    image_towers: Mapping[str, nn.Module] = MappingProxyType({})

    @classmethod
    def build(cls, experiment: Experiment, handoff: Handoff) -> Task:
        """Build the task with new weights, or those of the preceding stages where it uses them."""
        raise NotImplementedError

    @classmethod
    def outline(cls, experiment: Experiment, captions: Sequence[str]) -> Task:
        """Build the task without weights or files, for counting; called under ``torch.device("meta")``.

        Args:
            experiment: the experiment.
            captions: captions for a tokenizer that is trained, such as those of the data.
        """
        raise NotImplementedError

    @classmethod
    def parts_of(cls, source: Checkpoint) -> Sequence[str]:
        """Return the names of the parts of ``source`` that are results of this stage."""
        raise NotImplementedError

    @property
    def trainable_module(self) -> nn.Module:
        """Network whose trainable parameters are optimized and averaged (EMA)."""
        raise NotImplementedError

    @property
    def parts(self) -> Mapping[str, str]:
        """Parts of a checkpoint that :attr:`trainable_module` consists of, and the prefix of each in its state."""
        raise NotImplementedError

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """Networks of the stage, trained and frozen, by names to show."""
        raise NotImplementedError

    @property
    def frozen_first_stage(self) -> FirstStage | None:
        """First stage whose latents may be cached, since the stage does not train it; None if there is none."""
        return None

    @property
    def teacher(self) -> Teacher | None:
        """Frozen network whose features of the images its loss reads, and which may be cached; None if there is none."""
        return None

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def optimizers(self) -> Sequence[OptimizerSpec]:
        """Declare the optimizers, one for each loss of a step."""
        raise NotImplementedError

    @property
    def called_modules(self) -> Sequence[nn.Module]:
        """Modules that a training step calls as such, rather than one of their methods or parts.

        They are what ``trainer.compile`` compiles and the strategy ``fsdp2`` shards.
        """
        raise NotImplementedError

    def compile_networks(self) -> None:
        """Compile :attr:`called_modules`, in place."""
        for network in self.called_modules:
            network.compile()

    @property
    def leaves_out_parameters(self) -> bool:
        """True if a loss may leave out parameters that are trained, for which DDP then has to look in each step.

        They are those of other optimizers, or of outputs that the loss does not read.
        """
        return len(self.optimizers()) > 1

    @property
    def unsharded(self) -> Sequence[nn.Parameter]:
        """Parameters within :attr:`called_modules` that a step uses directly, so that each rank keeps all of their values."""
        return ()

    def check_batch_size(self, size: int) -> None:
        """Check that the task can be trained on batches of ``size`` samples, those of all devices together.

        Raises:
            TrainingError: it cannot.
        """

    def losses(self, batch: Mapping[str, Any], step: Step) -> Iterator[TrainLoss]:
        """Yield the loss of each active optimizer, in the order of :meth:`optimizers`.

        Between two losses the engine runs the backward pass and, if gradients are not accumulated further, the optimizer step.
        Parameters of the other optimizers do not require gradients while a loss is computed.
        """
        raise NotImplementedError

    def after_step(self) -> None:
        """Adjust parameters after an optimizer step, before they are averaged."""

    def evaluate(self, batch: Mapping[str, Any], step: Step) -> Mapping[str, Tensor]:
        """Return named results of a validation batch; the engine concatenates each over batches and ranks (dimension 0)."""
        raise NotImplementedError

    def metrics(self, results: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the validation metrics for the concatenated results of :meth:`evaluate`."""
        raise NotImplementedError

    def previews(self, splits: Splits, step: Step) -> Mapping[str, Preview]:
        """Return named images that show the state of the training; called with averaged weights, on all ranks."""
        raise NotImplementedError

    def try_previews(self, splits: Splits, step: Step) -> None:
        """Begin to make the previews, as far as their settings and data can be checked by it; called in evaluation mode."""
        self.previews(splits, step)

    def check_annotations(self, sets: Sequence[Samples]) -> None:
        """Check the annotations of all samples of the training and the validation set (if there is one).

        Called before the first step, since one that does not fit the config would end the training when it is read.

        Raises:
            DataError: one does not fit.
        """

    def finish(self, splits: Splits) -> None:
        """Measure what the result needs besides trained weights; called once after the last step, as :meth:`export` is."""

    def export(self) -> Export:
        """Return what the next stage or a pipeline needs; called with averaged weights, on all ranks."""
        raise NotImplementedError


def on_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch with its tensors on ``device``; lists of captions and keys are unchanged."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


class Features:
    """Outputs of submodules, captured during the forward passes of a network for a loss that reads them.

    Args:
        network: network to observe.
        names: names of its submodules, such as ``encoder.mid``; if empty, nothing is captured.

    Raises:
        ConfigError: the network has no submodule of that name.
    """

    def __init__(self, network: nn.Module, names: Sequence[str]):
        self.outputs: dict[str, Any] = {}
        self.modules: dict[str, nn.Module] = {}
        modules = dict(network.named_modules())
        for name in names:
            if name not in modules:
                raise ConfigError(unknown("feature", name, modules))
            self.modules[name] = modules[name]
            modules[name].register_forward_hook(partial(self._capture, name))
        self.argument = {"features": self.outputs} if names else {}  # keyword argument of the loss

    def channels(self) -> Sequence[int]:
        """Return the channels of the outputs, which are feature maps ``[b c h w]``.

        Raises:
            ConfigError: one is not a feature map.
        """
        for name, module in self.modules.items():
            if not isinstance(getattr(module, "out_channels", None), int):
                raise ConfigError(
                    f"feature is {name!r}, whose output is no feature map; name a convolution or a block of a U-Net, such as "
                    "middle.0."
                )
        return [int(cast(Any, module).out_channels) for module in self.modules.values()]

    def _capture(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        self.outputs[name] = output
