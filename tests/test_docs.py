from __future__ import annotations

import ast
import contextlib
import doctest
import importlib
import io
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import save_file

from ldm.cli.config_reference import anchor, reference
from ldm.clip.model import CLIPConfig
from ldm.config import from_dict
from ldm.formats import save
from ldm.formats.clip import save_clip
from ldm.pipeline import Pipeline
from ldm.training.experiment import load_config
from tests.tiny import TOKENIZER, tiny_controlnet, tiny_lora, tiny_model

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
TOUR = ROOT / "docs" / "your-own-pictures.md"


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    """The contents of the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def indented(page: Path, start: str) -> list[str]:
    """The lines of indented blocks, such as commands, that start with ``start``."""
    lines = (line for line in page.read_text().splitlines() if line.startswith("    "))
    return [line.strip() for line in lines if line.strip().startswith(start)]


def parsed(line: str) -> tuple[str, dict[str, Any]]:
    """Name of the command and the values of its parameters, as the command itself parses the line."""
    _, tool, *arguments = shlex.split(line, comments=True)
    name = Path(tool).stem
    assert (ROOT / tool).is_file()
    command: Any = typer.main.get_command(importlib.import_module(f"ldm.cli.{name}").app)
    if hasattr(command, "commands"):
        command = command.commands[arguments.pop(0) if arguments[0] in command.commands else "run"]
    return name, command.make_context(name, arguments).params


COMMANDS = [(name_of(page), line) for page in PAGES for line in indented(page, "python tools/")]


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder `configs/` with the file that the reader of the tour writes into it."""
    folder = tmp_path_factory.mktemp("configs")
    for path in ROOT.glob("configs/*.yaml"):
        (folder / path.name).write_text(path.read_text())
    (folder / "mine.yaml").write_text(blocks(TOUR, "yaml")[0])
    return folder


def test_the_config_of_the_tour_is_one_that_does_not_come_along() -> None:
    assert not (ROOT / "configs" / "mine.yaml").exists()
    assert "configs/mine.yaml" in TOUR.read_text()


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_a_quoted_command_is_one(page: str, line: str, configs: Path) -> None:
    """The command parses it, the config that it names is there, and its overrides fit that config."""
    name, parameters = parsed(line)
    if parameters.get("config") is None:
        return
    path = Path(parameters["config"])
    path = configs / path.name if path.name == "mine.yaml" else ROOT / path
    experiment = load_config(path, parameters["overrides"] or [])
    if name == "train":
        assert parameters["stage"] in ("all", *experiment.stages)


def test_quoted_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    quoted = {line.split()[1] for page in PAGES for line in indented(page, "make ")}
    assert quoted
    assert quoted <= targets


def test_the_reference_of_the_config_is_that_of_the_code() -> None:
    stale = "docs/config.md is not what the code says; run python tools/config_reference.py > docs/config.md"
    assert (ROOT / "docs" / "config.md").read_text() == reference(), stale


def quoted_code() -> list[tuple[str, str, list[str]]]:
    """Page, file and lines of each Python block whose first line names the file that it quotes."""
    quotes = []
    for page in PAGES:
        for block in blocks(page, "python"):
            first, *lines = block.strip().splitlines()
            if match := re.fullmatch(r"# (ldm/\S+\.py)", first):
                quotes.append((name_of(page), match[1], [line.strip() for line in lines if line.strip()]))
    return quotes


@pytest.mark.parametrize(("page", "file", "lines"), quoted_code())
def test_quoted_lines_of_code_are_in_their_file(page: str, file: str, lines: list[str]) -> None:
    there = {line.strip() for line in (ROOT / file).read_text().splitlines()}
    assert lines
    assert not [line for line in lines if line not in there]


def test_every_solver_and_kind_of_the_equations_is_explained() -> None:
    from ldm.diffusion import SAMPLERS, Parametrization, Schedule

    text = (ROOT / "docs" / "equations.md").read_text()
    assert not [name for name in (*SAMPLERS, *Schedule.kinds, *Parametrization.kinds) if f"`{name}`" not in text]


def test_the_tables_of_sampling_are_those_of_the_code() -> None:
    """A row for each solver, spacing and kind of guidance, with what the code says of it, and an image that is there."""
    from ldm.cli.sampling_gallery import GUIDANCE
    from ldm.diffusion import SPACINGS, SPECS

    page = ROOT / "docs" / "sampling.md"
    text = page.read_text()
    rows = re.findall(r"^\| `?(\w+)`? \| (.*)!\[\]\((\S+)\) \|$", text, re.MULTILINE)
    assert sorted(name for name, _, _ in rows) == sorted([*SPECS, *SPACINGS, *GUIDANCE])
    assert all((page.parent / picture).is_file() for _, _, picture in rows)
    for name, facts, _ in rows[: len(SPECS)]:
        spec = SPECS[name]
        assert facts.startswith(f"{spec.order} | {spec.evaluations} | {spec.noise} |"), name


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "pycon")], ids=name_of)
def test_sessions_print_what_the_page_says(page: Path) -> None:
    runner = doctest.DocTestRunner()
    for block in blocks(page, "pycon"):
        told = io.StringIO()
        result = runner.run(doctest.DocTestParser().get_doctest(block, {}, page.name, name_of(page), 0), out=told.write)
        assert result.attempted
        assert not result.failed, told.getvalue()


def write_clip(name: str) -> None:
    text = {"vocab_size": 300, "context_length": 12, "width": 16, "layers": 1, "heads": 2}
    image = {"kind": "vit", "image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "heads": 2}
    clip = from_dict(CLIPConfig, {"text": text, "image": image, "embed_dim": 16}).build()
    save_clip(clip, TOKENIZER, name, "transformers")


THERE: dict[Any, Callable[[str], object]] = {
    "toy.safetensors": lambda path: save_file({"<toy>": torch.ones(2, 16)}, path),
    "runs/emoji_64": lambda name: save(tiny_model(), name),
    "sd15.safetensors": lambda name: save(tiny_model(), name, "ldm"),
    "vae-ft-mse.safetensors": lambda name: save(tiny_model(seed=1), name, "ldm"),
    "folders/sdxl": lambda name: save(tiny_model(), name, "diffusers"),
    "emoji-diffusers": lambda name: save(tiny_model(), name, "diffusers"),
    "clip-vit-large-patch14": write_clip,
    "controlnets/edges": lambda name: tiny_controlnet(Path(name)),
    "edges.png": lambda name: Image.new("RGB", (32, 32), "grey").save(name),
}
"""What the pages read, by the name that they give it; other files of weights are LoRAs."""


@pytest.mark.parametrize(
    ("page", "block"),
    [(name_of(page), block) for page in PAGES for block in blocks(page, "python") if not block.startswith("# ldm/")],
)
def test_examples_run_on_a_model(page: str, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder where `runs/mine` is a run that is finished, and what else it reads is there as well."""
    monkeypatch.chdir(tmp_path)
    Pipeline(tiny_model()).save_pretrained("runs/mine")
    written = {node.value for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Constant)}
    for name in written:
        if name in THERE:
            THERE[name](name)
        elif isinstance(name, str) and name.endswith(".safetensors"):
            save_file(tiny_lora(), name)
    with contextlib.redirect_stdout(io.StringIO()), torch.random.fork_rng():
        exec(compile(block, page, "exec"), {})
    pictures = {name for name in written if isinstance(name, str) and name.endswith(".png")}
    assert not [name for name in pictures if not Path(name).is_file()]


def test_links_to_headings_lead_to_one() -> None:
    headings = {
        page.resolve(): {anchor(title) for title in re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)}
        for page in PAGES
    }
    links = [
        (page, target, fragment)
        for page in PAGES
        for target, fragment in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", page.read_text())
        if "://" not in target
    ]
    assert links
    broken = [
        f"{name_of(page)} -> {target}#{fragment}"
        for page, target, fragment in links
        if fragment not in headings[(page.parent / target).resolve() if target else page.resolve()]
    ]
    assert not broken, "\n".join(broken)
