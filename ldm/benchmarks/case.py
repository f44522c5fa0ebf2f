"""Interface of a benchmark case, and the registry of cases."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ldm.errors import LdmError, missing_extra, unknown

if TYPE_CHECKING:
    from ldm.benchmarks.peaks import Peaks
    from ldm.benchmarks.result import Result

SIDES = ("ours", "theirs")

GENERATOR_SEED = 0
"""Seed of weights and inputs."""


@dataclass(frozen=True)
class Setup:
    """Everything that the cases of a run have in common.

    Attributes:
        device, dtype: where and in which precision both sides compute.
        small: tiny networks and inputs of the same structure, to test a case in seconds.
        rounds: number of times that each side is measured, in turn.
        batch_size: replaces the case's own.
        steps: sampling steps of the cases that generate images; None = the case's own number.
        folder: folder for files that are made once.
        compile: backend of ``Pipeline.compile`` for our side; None = eager.
        compile_peer: True to compile the networks of the other side with ``torch.compile``.
        memory: whether the peak memory of both sides is measured too.
        options: further values, by the names of the cases' command-line options.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    small: bool = False
    rounds: int = 5
    batch_size: int | None = None
    steps: int | None = None
    folder: Path = Path("runs/bench")
    compile: str | None = None
    compile_peer: bool = False
    memory: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    def generator(self, seed: int = GENERATOR_SEED) -> torch.Generator:
        """Return a new generator on the CPU."""
        return torch.Generator().manual_seed(seed)

    def randn(self, *shape: int, seed: int = GENERATOR_SEED) -> Tensor:
        """Return normal values ``shape`` on the device and in the dtype, the same for both sides; images are channels_last."""
        x = torch.randn(shape, generator=self.generator(seed)).to(self.device, self.dtype)
        return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


class Work(NamedTuple):
    """One side of a comparison, ready to run.

    Attributes:
        run: computes once; a returned tensor is compared with that of the other side.
        network: module whose parameters are counted; None if there is none.
        parts: parts of the work that are also measured by themselves, by title.
        task: what the other side needs to do the same work.
        compiled: whether its operations cannot be counted, since they are compiled in any run.
    """

    run: Callable[[], Tensor | None]
    network: Any = None
    parts: Mapping[str, Callable[[], Tensor | None]] = MappingProxyType({})
    task: Any = None
    compiled: bool = False


class Case(ABC):
    """A comparison of ldm with another library.

    Attributes:
        name: name on the command line; cases of one family share the part before the first hyphen.
        title: the work, in words.
        peer: name of the other side.
    """

    name: str
    title: str
    peer: str

    @abstractmethod
    def measure(self, setup: Setup, peaks: Peaks | None) -> Result:
        """Measure both sides.

        Args:
            setup: of the run.
            peaks: peak throughput of the machine; None = not measured.

        Raises:
            LdmError: a package is missing, or the machine is too small for the case.
        """


CASES: dict[str, Case] = {}
"""Registered cases by name."""


def register(case: Case) -> None:
    """Register a case."""
    assert case.name not in CASES, f"the case {case.name} is registered twice"
    CASES[case.name] = case


def all_cases() -> dict[str, Case]:
    """Return all cases by name, sorted."""
    from ldm.benchmarks import cases

    assert cases is not None  # importing the package registers them
    return dict(sorted(CASES.items()))


def selected(names: Iterable[str]) -> list[Case]:
    """Return the cases of these names, each once; the name of a family selects all of its cases, ``all`` every case.

    Raises:
        LdmError: a name is unknown.
    """
    cases = all_cases()

    def of(name: str) -> Iterator[str]:
        matching = [each for each in cases if name in (each, "all") or each.startswith(f"{name}-")]
        if not matching:
            raise LdmError(unknown("case", name, ["all", *cases]))
        yield from matching

    return [cases[each] for each in dict.fromkeys(found for name in names for found in of(name.replace("_", "-")))]


SEPARATE = {"optimum": "optimum-intel"}
"""Distributions that no extra installs, since they require older versions of its other packages, by the package to import."""


def peer_package(name: str) -> ModuleType:
    """Import a package of the other side.

    Raises:
        LdmError: it is not installed, or does not work with the installed versions of others.
    """
    package = name.split(".", maxsplit=1)[0]
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if (error.name or "").split(".")[0] != package:
            raise LdmError(f"the package {name} cannot be imported ({error}); install a version that fits.") from None
        if package in SEPARATE:
            raise LdmError(
                f"this case needs {SEPARATE[package]}, which requires an older transformers than the extra dev installs; install "
                f"both ldm and {SEPARATE[package]} in another environment, and run the case there."
            ) from None
        raise missing_extra(package, "this case", "dev") from None
