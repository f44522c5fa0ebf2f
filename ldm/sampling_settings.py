"""SamplingSettings: every setting of one sampling, with its default, its help sentence and its check.

:class:`ldm.pipeline.Pipeline` takes them as keyword arguments, ``tools/sample.py`` makes its options of them, and each
image's record names those that were set. To add a setting, add a field here and use it. The module imports torch only when
a record is made, so that a command can print its help without it.
"""

from __future__ import annotations

import functools
import inspect
import sys
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields, is_dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from ldm.checks import number, number_or_numbers, numbers, plain, shown, whole_number
from ldm.errors import SamplingError, unknown
from ldm.paths import expanded
from ldm.prompts import LONG_PROMPTS, SYNTAXES, Prompt, PromptOptions

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ldm.control_images import ControlImage
    from ldm.diffusion import Guidance
    from ldm.model import SamplingConfig
    from ldm.sampling_loop import Edit, SamplingStep

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
DECODERS = ("full", "tiny")

Check = Callable[[str, Any], Any]
"""Name and value of a setting to the normalized value; raises a SamplingError if the value is not valid."""


def _one_of(known: Collection[str]) -> Check:
    def check(name: str, value: Any) -> Any:
        if not isinstance(value, str) or value not in known:
            raise SamplingError(unknown(name, value, known))
        return str(value)

    return check


def _sampler(name: str, value: Any) -> Any:
    from ldm.diffusion import SAMPLERS

    return _one_of(SAMPLERS)(name, value)


def _spacing(name: str, value: Any) -> Any:
    from ldm.diffusion import SPACINGS

    return _one_of(SPACINGS)(name, value)


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise SamplingError(f"{name} is {shown(value)}; give a dict with a value for each name.")
    return value


def _options(name: str, value: Any) -> Mapping[str, Any]:
    return {key: item if isinstance(item, str) else number(key, item) for key, item in _mapping(name, value).items()}


def _guidance(name: str, value: Any) -> Any:
    from ldm.diffusion import Guidance

    if not isinstance(value, Guidance):
        raise SamplingError(f"{name} is {shown(value)}; give an ldm.diffusion.Guidance.")
    return _with_numbers(name, value)


def _with_numbers(name: str, record: Any) -> Any:
    """A dataclass of numbers, tuples of numbers and such dataclasses, normalized."""
    values = {entry.name: getattr(record, entry.name) for entry in fields(record)}
    for key, value in values.items():
        if is_dataclass(value):
            values[key] = _with_numbers(f"{name}.{key}", value)
        elif value is not None:
            checked = number_or_numbers(f"{name}.{key}", value)
            values[key] = tuple(checked) if isinstance(value, tuple) and isinstance(checked, list) else checked
    return replace(record, **values)


def _latents(name: str, value: Any) -> Tensor:
    from ldm.image_arguments import as_tensor

    tensor = as_tensor(name, value)
    if not tensor.float().isfinite().all():
        raise SamplingError(f"{name} holds NaN or infinite values; give finite ones, normally of unit variance.")
    return tensor


def _generator(name: str, value: Any) -> int | list[int]:
    """Return the seed that a generator stands for: the one that it was set to, or a number drawn from a used one."""
    if isinstance(value, list | tuple):
        return [_seed_of(name, each) for each in value]
    return _seed_of(name, value)


def _seed_of(name: str, generator: Any) -> int:
    import torch

    if not isinstance(generator, torch.Generator):
        raise SamplingError(f"{name} is {generator!r}; give a torch.Generator, or a list with one for each image.")
    seed, unused = generator.initial_seed(), torch.Generator(generator.device)
    is_unused = torch.equal(generator.get_state(), unused.manual_seed(seed).get_state())
    drawn = int(torch.randint(2**32, (), generator=generator, dtype=torch.int64, device=generator.device))
    return seed if is_unused and 0 <= seed < 2**62 else drawn


def _flag(name: str, value: Any) -> bool:
    given = plain(value)
    if not isinstance(given, bool):
        raise SamplingError(f"{name} is {shown(given)}; give True or False.")
    return given


def _edit(name: str, value: Any) -> Any:
    from ldm.sampling_loop import Edit

    if not isinstance(value, Edit):
        raise SamplingError(f"{name} is {value!r}; give an ldm.sampling_loop.Edit, or call a function of ldm.editing.")
    return value


def _controlnets(name: str, value: Any) -> Any:
    from ldm.control_images import control_images

    return control_images(value)


def _folder(name: str, value: Any) -> Path:
    try:
        folder = Path(expanded(value))
    except TypeError:
        raise SamplingError(f"{name} is {value!r}; give a path.") from None
    if not folder.is_dir():
        raise SamplingError(f"{name} is {str(value)!r}, which is not a folder; name one that exists.")
    return folder


def _callable(name: str, value: Any) -> Any:
    if not callable(value):
        raise SamplingError(f"{name} is {value!r}; give a function of one step.")
    return value


def _setting(
    default: Any, help: str, check: Check | None = None, flags: Sequence[str] | None = None, recorded: bool = False
) -> Any:
    """Declare a setting.

    Args:
        default: its default; None usually means that the model decides.
        help: the sentence that describes it, in Python and on the command line.
        check: normalizes any other value than None.
        flags: names of its command-line option; default: that of the field; empty for no option.
        recorded: whether the record of an image names it, if it is not at its default. Its value must be valid JSON.
    """
    return field(default=default, metadata={"help": help, "check": check, "flags": flags, "recorded": recorded})


@dataclass(frozen=True)
class SamplingSettings:
    """All settings of one sampling, checked and normalized; numbers and lists may be NumPy's or torch's.

    Raises:
        SamplingError: a value is not valid for any model.
    """

    prompt: Prompt | Sequence[Prompt] | None = _setting(
        None, "One or several prompts, for models of text: strings, or objects of ldm.prompts.", flags=()
    )
    negative_prompt: Prompt | Sequence[Prompt] | None = _setting(
        None,
        "What the images should not show: one prompt for all, or one for each prompt; default: the empty prompt. "
        "Without effect at a guidance scale of 1.",
        flags=("--negative",),
    )
    _: KW_ONLY
    prompt_syntax: str = _setting(
        PromptOptions.prompt_syntax,
        "How prompts are parsed: plain, or weighted for (word:1.3), [word], [cat:dog:0.4], [cat|dog], BREAK, AND and "
        "<lora:name:0.8>.",
        _one_of(SYNTAXES),
        recorded=True,
    )
    long_prompts: str = _setting(
        PromptOptions.long_prompts,
        "Prompts longer than the text encoder's context are encoded in chunks, or cut.",
        _one_of(LONG_PROMPTS),
        recorded=True,
    )
    clip_skip: int | None = _setting(
        None,
        "Number of last layers of the text encoder that the context of prompts leaves out, as in diffusers.",
        lambda name, value: whole_number(name, value, 0),
        recorded=True,
    )
    lora_folder: str | PathLike[str] | None = _setting(
        None, "Folder of the LoRA files that <lora:name:0.8> in prompts names; default: the pipeline's.", _folder
    )
    label: Sequence[int] | int | None = _setting(
        None, "One or several classes, for class-conditional models.", lambda name, value: plain(value)
    )
    condition: Mapping[str, Sequence[Any]] | None = _setting(
        None, "Further conditions of the model by name, an entry for each prompt or one for all.", _mapping, flags=()
    )
    sampler: str | None = _setting(
        None, "Solver, a name of ldm.diffusion.SAMPLERS; default: the model's.", _sampler, recorded=True
    )
    num_inference_steps: int | None = _setting(
        None, "Number of sampling steps; default: the model's.", whole_number, ("--steps",), recorded=True
    )
    height: int | None = _setting(
        None,
        "Height in pixels, divisible by the first stage's factor; default: that of the training images.",
        whole_number,
        recorded=True,
    )
    width: int | None = _setting(None, "Width in pixels, likewise.", whole_number, recorded=True)
    guidance_scale: float | Sequence[float] | None = _setting(
        None,
        "Scale of classifier-free guidance, one for all or one for each prompt; 1 = none, at half the cost; "
        "default: the model's.",
        number_or_numbers,
        ("--guidance",),
    )
    guidance: Guidance | None = _setting(
        None, "Further settings of guidance, an ldm.diffusion.Guidance.", _guidance, flags=()
    )
    sampler_options: Mapping[str, Any] | None = _setting(
        None, "Further parameters of the solver by name, such as {'order': 3}.", _options, flags=()
    )
    eta: float | None = _setting(
        None,
        "Share of fresh noise in each step, 0 to 1, of solvers that take one; default: the solver's.",
        number,
    )
    spacing: str | None = _setting(
        None,
        "Spacing of the noise levels, such as trailing or karras, a name of ldm.diffusion.SPACINGS; default: the model's.",
        _spacing,
        recorded=True,
    )
    shift: float | None = _setting(
        None,
        "Factor on the noise levels, for models with a flow schedule; default: the model's.",
        number,
        recorded=True,
    )
    timesteps: Sequence[float] | Tensor | None = _setting(
        None, "Falling timesteps to use instead of a number of steps: 999,500,100.", numbers, recorded=True
    )
    sigmas: Sequence[float] | Tensor | None = _setting(
        None, "Falling noise levels to use instead of a number of steps: 14.6,5,2,0.5.", numbers, recorded=True
    )
    seed: int | Sequence[int] | None = _setting(
        None,
        "Seed of the first image, the next have the next; or a list with one for each image; default: random, "
        "and reported with the images.",
        lambda name, value: plain(value),
    )
    generator: torch.Generator | Sequence[torch.Generator] | None = _setting(
        None,
        "A torch.Generator in place of the seed, or a list with one for each image; it stands for the seed that it was set "
        "to, or once it has been used for a seed drawn from it, which is the one that the images name.",
        _generator,
        flags=(),
    )
    latents: Tensor | None = _setting(
        None, "Unit noise to start from, [n c h/f w/f], instead of the noise that the seeds give.", _latents, flags=()
    )
    num_images_per_prompt: int = _setting(1, "Number of images for each prompt or label.", whole_number, ("--n", "-n"))
    batch_size: int | None = _setting(
        None,
        "Largest number of images to compute at once; default: all.",
        lambda name, value: whole_number(name, value, most=sys.maxsize),
    )
    output_type: str = _setting(
        "pil",
        "pil; np for an array [n h w c] or pt for a tensor [n c h w], fp32 in [0, 1]; or latent for the normalized "
        "latents [n c h/f w/f] in fp32.",
        _one_of(OUTPUT_TYPES),
        flags=(),
    )
    decoder: str = _setting(
        "full",
        "full for the decoder of the first stage, or tiny for the tiny decoder of the model, which is faster and less exact.",
        _one_of(DECODERS),
        recorded=True,
    )
    cache_interval: int = _setting(
        1,
        "Number of evaluations of the outermost blocks of the U-Net for one of all blocks, whose deep features the others "
        "reuse; 1 = all blocks each time.",
        whole_number,
        recorded=True,
    )
    token_merging: float = _setting(
        0.0,
        "Share of the positions, 0 to 0.75, that are merged with similar ones in the largest self-attentions of the U-Net.",
        lambda name, value: number(name, value, 0, 0.75),
        recorded=True,
    )
    controlnets: Sequence[ControlImage] | ControlImage | None = _setting(
        None,
        "Images that control the sampling by ControlNets that are loaded, one or several ldm.control_images.ControlImage; "
        "their effects add up.",
        _controlnets,
        flags=(),
    )
    callback: Callable[[SamplingStep], object] | None = _setting(
        None,
        "Called with each ldm.sampling_loop.SamplingStep; an exception in it ends the sampling.",
        _callable,
        flags=(),
    )
    progress: bool = _setting(True, "Show a progress bar on stderr.", _flag, flags=())
    edit: Edit | None = _setting(
        None, "Turns the sampling into an editing of images; see ldm.editing.", _edit, flags=()
    )

    def __post_init__(self) -> None:
        for entry in fields(self):
            check, value = entry.metadata["check"], getattr(self, entry.name)
            if check is not None and (value is not None or entry.default is not None):
                object.__setattr__(self, entry.name, check(entry.name, value))
        if self.generator is not None:
            if self.seed is not None:
                raise SamplingError("give either a seed or a generator, not both.")
            object.__setattr__(self, "seed", self.generator)
            object.__setattr__(self, "generator", None)

    @classmethod
    def of(cls, *args: Any, **settings: Any) -> SamplingSettings:
        """Create the record from keyword arguments of any origin.

        Raises:
            SamplingError: a name that is not a setting, or an invalid value.
        """
        names = [entry.name for entry in fields(cls)]
        for name in settings:
            if name not in names:
                raise SamplingError(unknown("setting", name, names))
        return cls(*args, **settings)

    @property
    def prompt_options(self) -> PromptOptions:
        return PromptOptions(self.prompt_syntax, self.long_prompts, self.clip_skip)

    def resolved(self, defaults: SamplingConfig) -> SamplingSettings:
        """Fill in the solver, its options and the guidance, with the model's defaults where nothing is given.

        ``eta`` becomes one of ``sampler_options``, and ``guidance_scale`` the scale of ``guidance``.

        Raises:
            SamplingError: two scales, or an option or guidance that the solver does not take.
        """
        from ldm.diffusion import Guidance

        sampler, guidance = self.sampler or defaults.sampler, self.guidance or Guidance()
        options = {**(self.sampler_options or {}), **({} if self.eta is None else {"eta": self.eta})}
        if self.guidance_scale is not None and guidance.scale is not None:
            raise SamplingError("give either guidance_scale or a guidance with a scale of its own, not both.")
        scales = (self.guidance_scale, guidance.scale, defaults.guidance_scale)
        guidance = replace(guidance, scale=next(scale for scale in scales if scale is not None))
        _check_solver(sampler, options, guidance)
        return replace(self, sampler=sampler, sampler_options=options, eta=None, guidance=guidance, guidance_scale=None)

    def record(self) -> dict[str, Any]:
        """The recorded settings that are not at their defaults, as values of JSON."""
        values = {entry: getattr(self, entry.name) for entry in fields(self) if entry.metadata["recorded"]}
        return {entry.name: value for entry, value in values.items() if value != entry.default}


def _check_solver(sampler: str, options: Mapping[str, Any], guidance: Guidance) -> None:
    from ldm.diffusion import OPTIONS, SPECS

    for name in options:
        if name not in SPECS[sampler].options:
            takers = ", ".join(taker for taker, spec in SPECS.items() if name in spec.options)
            instead = f", or choose one of {takers}" if takers else ""
            raise SamplingError(f"the sampler {sampler} takes no {name}; leave it out{instead}.")
        is_valid, requirement = OPTIONS[name]
        if not is_valid(options[name]):
            raise SamplingError(f"{name} is {options[name]!r}; it must be {requirement}.")
    if SPECS[sampler].adaptive and guidance.projection is not None and guidance.projection.momentum:
        raise SamplingError(
            f"the sampler {sampler} repeats steps, which momentum would count twice; set momentum to 0."
        )


P = ParamSpec("P")
S = TypeVar("S")
R = TypeVar("R")


def takes_settings(
    record: Callable[P, SamplingSettings],
) -> Callable[[Callable[[S, SamplingSettings], R]], Callable[Concatenate[S, P], R]]:
    """Decorate a method that takes a record of settings, so that callers give its fields as arguments.

    Type checkers, ``inspect.signature`` and ``help`` see the arguments, each with its default and help sentence.
    """

    def decorate(method: Callable[[S, SamplingSettings], R]) -> Callable[Concatenate[S, P], R]:
        @functools.wraps(method)
        def call(self: S, /, *args: P.args, **settings: P.kwargs) -> R:
            return method(self, SamplingSettings.of(*args, **settings))

        own = next(iter(inspect.signature(method).parameters.values()))
        parameters = [own, *inspect.signature(SamplingSettings).parameters.values()]
        call.__signature__ = inspect.signature(method).replace(parameters=parameters)  # type: ignore[attr-defined]
        call.__doc__ = f"{inspect.cleandoc(method.__doc__ or '')}\n\nArgs:\n{_described()}"
        return call

    return decorate


def _described() -> str:
    """The settings as the section Args of a docstring."""
    described = (f"{entry.name}: {entry.metadata['help']}" for entry in fields(SamplingSettings))
    wrapper = textwrap.TextWrapper(112, initial_indent="    ", subsequent_indent="        ", break_on_hyphens=False)
    return "\n".join(map(wrapper.fill, described))
