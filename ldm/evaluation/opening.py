"""Opening of a subject from the arguments that its receipts record."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ldm.devices import default_device, default_dtype
from ldm.errors import CheckpointError, DataError, unknown, warn
from ldm.evaluation.features import FeatureNetwork, open_network
from ldm.evaluation.networks.clip import clip_from, clip_network
from ldm.evaluation.subject import Options, Subject
from ldm.formats import find, read
from ldm.formats.checkpoint import CLIP_COMPONENTS, OTHERS, Checkpoint
from ldm.formats.ema_snapshots import write_model
from ldm.formats.native import build_on_meta, load_strictly
from ldm.formats.training_checkpoint import MODEL_STAGE, checkpoint_in, training_note
from ldm.load_options import Source
from ldm.pipeline import Pipeline
from ldm.training.experiment import Experiment, load_config
from ldm.training.handoff import result_file
from ldm.training.tasks import TASKS

HELD_OUT = ("val", "test")

MODEL = "model"
"""Name of what ``--model`` gives, which may be a complete model, or the result of any stage."""


@dataclass(frozen=True)
class Request:
    """Arguments of an evaluation, as values of JSON.

    Attributes:
        config, overrides: YAML of the experiment, and ``key=value`` changes of it.
        stage: the one stage to evaluate; None for all.
        model, checkpoint: what is evaluated instead of the results of the run; see ``tools/evaluate.py --help``.
        ema_length: length of the average of the weights, of a run with ``train.ema_snapshots``; None = as stored.
        split: evaluated split.
        train_every: the summary generates images for every n-th caption of the training set; None for a number of them.
        settings, further: sampling settings.
        compiled: arguments of ``Pipeline.compile``; empty for none.
        features: feature networks; none = ``own``, if there is one.
        metrics: names of metrics; none = those by default.
        options: options of the metrics.
    """

    config: str
    overrides: Sequence[str] = ()
    stage: str | None = None
    model: str | None = None
    checkpoint: str | None = None
    ema_length: float | None = None
    split: str = "val"
    train_every: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    further: Mapping[str, Any] = field(default_factory=dict)
    compiled: Mapping[str, Any] = field(default_factory=dict)
    features: Sequence[str] = ()
    metrics: Sequence[str] = ()
    options: Options = field(default_factory=Options)

    @property
    def suffix(self) -> str:
        """End of the names of files: what is evaluated other than a run as it is, such as ``-steps=8``; empty for nothing."""
        given = {
            "model": self.model,
            "checkpoint": self.checkpoint,
            "ema_length": self.ema_length,
            **{_SHORT.get(name, name): each for name, each in {**self.settings, **self.further}.items()},
            "compile": self.compiled or None,
            "features": self.features or None,
        }
        plain = Options(batch_size=self.options.batch_size)
        given |= {name: each for name, each in vars(self.options).items() if each != getattr(plain, name)}
        return "".join(f"-{name}={_in_a_name(each)}" for name, each in given.items() if each is not None)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Request:
        """Return the request of a file of receipts.

        Raises:
            DataError: it was written by another version.
        """
        try:
            options: dict[str, Any] = {
                name: tuple(each) if isinstance(each, list) else each for name, each in values["options"].items()
            }
            return cls(**{**values, "options": Options(**options)})
        except (KeyError, TypeError) as error:
            raise DataError(f"the receipts have a request of another version ({error}); evaluate again.") from None


_SHORT = {"num_inference_steps": "steps", "guidance_scale": "guidance"}
"""Names of settings as those of the options of the command."""


def _in_a_name(value: Any) -> str:
    """Return a value as a part of the name of a file: a word or a number, else a hash, of a path after its last part."""
    text = str(value)
    if isinstance(value, str | int | float) and re.fullmatch(r"[\w.+-]{1,40}", text):
        return text
    digest = hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()[:8]
    last = re.sub(r"[^\w.+-]", "", Path(value).name)[:40] if isinstance(value, str) else ""
    return f"{last}.{digest}" if last else digest


def open_subject(request: Request, say: Callable[[str], object] = warn) -> Subject:
    """Open the networks and the data of an evaluation; ``say`` is called with sentences on what is left out.

    Raises:
        LdmError: the config is invalid, or networks, data or feature networks are missing.
    """
    if request.split not in HELD_OUT:
        raise DataError(unknown("split", request.split, HELD_OUT))
    experiment = load_config(request.config, list(request.overrides))
    sources: Mapping[str, Source] = (
        {MODEL: request.model} if request.model else sources_of(experiment, request.checkpoint, request.stage, say)
    )
    found = {
        stage: read(source, checkpoint=request.checkpoint if stage == MODEL else None)
        for stage, source in sources.items()
    }
    data = experiment.data.without_cache()  # images are read one after the other
    sets = {  # samples are compared with the images of all splits that there are
        name: data.open(name) for name in ("train", *HELD_OUT) if name == request.split or data.has(name)
    }
    if request.options.reference not in (None, *sets):
        raise DataError(unknown("reference split", request.options.reference, sets))
    parts = networks(found)
    subject = Subject(
        folder=Path() if request.model else experiment.folder,
        experiment=experiment,
        sets=sets,
        split=request.split,
        train_every=request.train_every,
        settings=request.settings,
        further=request.further,
        compiled=dict(request.compiled),
        networks=feature_networks(request.features, experiment, parts["clip"]),
        own_weights=request.model is None,
        options=request.options,
        **parts,
    )
    if subject.pipe is not None:
        subject.given_settings()  # before anything is computed
    if request.ema_length is not None:
        subject = with_average(request, subject, request.ema_length)
    if request.compiled and subject.pipe:
        subject.pipe.compile(**request.compiled)
    return subject


def with_average(request: Request, subject: Subject, length: float) -> Subject:
    """Return the subject with averaged weights of another length, of a run that was trained with ``train.ema_snapshots``.

    Raises:
        CheckpointError: there are no snapshots, or none for this length.
    """
    source = request.model or sources_of(subject.experiment, request.checkpoint, MODEL_STAGE)[MODEL_STAGE]
    with TemporaryDirectory() as folder:
        target = Path(folder) / "averaged.safetensors"
        write_model(find(source, checkpoint=request.checkpoint if source is request.model else None), length, target)
        parts = networks({MODEL: read(target)})
    return replace(
        subject, pipe=parts["pipe"], first_stage=parts["first_stage"], _made={}, _reconstructed={}, _weights={}
    )


def feature_networks(given: Sequence[str], experiment: Experiment, clip: Any) -> list[FeatureNetwork]:
    """Open feature networks; ``own`` without a source is the CLIP of the run, and what is opened if none are given.

    Raises:
        CheckpointError: a network that was given is unknown, or not on this machine.
    """
    if experiment.data.image_shape[0] != 3:
        if given:
            raise CheckpointError(
                "feature networks need images with 3 channels, which the data does not have; give no --features."
            )
        return []
    device = default_device()
    result = result_file(experiment, "clip") if experiment.clip is not None else None
    opened = []
    for name in given or ("own",):
        if name == "own" and clip is not None:
            opened.append(clip_network(name, *clip))
        elif name == "own" and result is not None and result.is_file():
            opened.append(open_network(f"own={result}", device))
        elif given:
            opened.append(open_network(name, device))
    names = [each.name for each in opened]
    if len({*names}) < len(names):
        raise CheckpointError(f"the feature networks are {', '.join(names)}; give each name once.")
    return opened


def sources_of(
    experiment: Experiment, checkpoint: str | None, only: str | None = None, say: Callable[[str], object] = warn
) -> dict[str, Source]:
    """Return what each stage of an experiment has to evaluate, by stage: a checkpoint of that name, or its result.

    Args:
        experiment: the experiment.
        checkpoint: name of the checkpoint; None for the results.
        only: the one stage to evaluate; None for all.
        say: called with a sentence for each stage that is left out.

    Raises:
        CheckpointError: there is none.
    """
    sources: dict[str, Source] = {}
    named = False  # whether a stage has a checkpoint of that name
    for stage in (stage for stage in TASKS if getattr(experiment, stage) is not None and only in (None, stage)):
        result = result_file(experiment, stage)
        found = None if checkpoint is None else checkpoint_in(experiment.folder / stage, checkpoint)
        named |= found is not None
        given = getattr(getattr(experiment, stage), "checkpoint", None)
        source = given or found or (result if result.is_file() else None)
        if source is not None:
            sources[stage] = source
        elif stage in experiment.stages:
            wanted = "" if checkpoint is None else f"checkpoint {checkpoint!r} of it and no "
            say(f"stage {stage} is left out: there is no {wanted}{result}")
    if not any(stage in sources for stage in experiment.stages):
        raise CheckpointError(
            f"{experiment.folder} holds no result of a stage; train one, or give --checkpoint best or last."
        )
    if checkpoint is not None and not named:
        raise CheckpointError(
            f"no stage of {experiment.folder} has a checkpoint {checkpoint!r}; give best, last or a step."
        )
    return sources


def networks(found: Mapping[str, Checkpoint]) -> dict[str, Any]:
    """Return the fields of :class:`Subject` that are networks, and its notes on the checkpoints that they are from.

    The first stage is that of the complete model, if there is one.

    Args:
        found: checkpoints by the stage that they are the result of, or :data:`MODEL`. One that holds more than its stage trains,
            such as a complete model in place of a VAE, gives the network of the stage alone.
    """
    used: dict[str, Checkpoint] = {}
    for stage, each in found.items():
        if stage in (MODEL, MODEL_STAGE) and not each.missing():
            used["pipe"] = each
        elif stage in (MODEL, "vae") and "first_stage" in each.parts:
            used["first_stage"] = each
        elif stage in (MODEL, "clip") and each.parts.keys() >= {*CLIP_COMPONENTS, OTHERS}:
            used["clip"] = each
    if "pipe" in used:
        used.pop("first_stage", None)
    device = default_device()
    pipe, first_stage, clip = None, None, None
    if "pipe" in used:
        pipe = Pipeline(used["pipe"].build(default_dtype(device))).to(device, default_dtype(device))
        first_stage = pipe.model.first_stage
    if "first_stage" in used:
        part = used["first_stage"].parts["first_stage"]
        first_stage = build_on_meta(part.config.build, part.state, used["first_stage"].source)
        load_strictly(first_stage, part.state, used["first_stage"].source, torch.float32)
        first_stage.to(device).eval().requires_grad_(False)
    if "clip" in used:
        network, tokenizer = clip_from(used["clip"])
        clip = (network.to(device), tokenizer) if tokenizer is not None else None
    notes = [note for each in used.values() if (note := training_note(each.provenance))]
    return {"pipe": pipe, "first_stage": first_stage, "clip": clip, "notes": notes}
