from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = sorted(ROOT.glob("ldm/**/*.py"))

# A part imports from the rows above its own; parts of one row do not know each other. `ldm` stands for the
# package's own __init__.py, whose version all may read.
ROWS = [
    {"discovery", "errors"},
    {"checks"},
    {"prompt_syntax"},
    {"paths", "processes", "yaml_text"},
    {"image_files", "image_metadata"},
    {"devices", "config", "image_io", "prompts"},
    {"image_arguments", "image_marks", "load_options"},
    {"nn"},
    {"diffusion"},
    {"modalities"},
    {"vae", "clip", "denoiser"},
    {"conditioning"},
    {"model"},
    {"formats", "acceleration"},
    {"image_output", "control_images"},
    {"controlnet_loader", "inputs", "lora_loader", "prompt_loras", "sampling_loop", "textual_inversion_loader"},
    {"sampling_settings"},
    {"shortcuts"},
    {"pipeline"},
    {"data", "editing", "animation"},
    {"training"},
    {"diagnosis", "report"},
    {"evaluation"},
    {"forecast", "ablation", "serving"},
    {"ldm"},
    {"benchmarks"},
    {"cli"},
]
ROW = {part: row for row, parts in enumerate(ROWS) for part in parts}
LIGHTNING = {"lightning", "lightning_fabric", "pytorch_lightning"}


def name_of(path: Path) -> str:
    """`ldm.vae.model` of ldm/vae/model.py, `ldm.vae` of ldm/vae/__init__.py."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path) for path in SOURCES}


def part_of(module: str) -> str:
    return [*module.split("."), "ldm"][1]


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of all that a file imports, at its top or inside of a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            for name in (f"{node.module}.{alias.name}" for alias in node.names):
                if name != "ldm.__version__":
                    yield node.lineno, name if name in MODULES else node.module


def test_imports_go_one_way() -> None:
    wrong = []
    for path in SOURCES:
        part = part_of(name_of(path))
        assert part in ROW, f"{path.relative_to(ROOT)} belongs to no row of the layout"
        for line, name in imports_of(path):
            if name.split(".")[0] == "ldm" and part_of(name) != part and ROW[part_of(name)] >= ROW[part]:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_the_mathematics_imports_torch_alone() -> None:
    allowed = set(sys.stdlib_module_names) | {
        "torch",
        "ldm",
        "torchsde",
    }  # torchsde: an extra, imported where it is used
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in SOURCES
        if part_of(name_of(path)) == "diffusion"
        for _, name in imports_of(path)
        if name.split(".")[0] not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_lightning_is_imported_by_the_engine_only() -> None:
    engine = {name_of(path) for path in ROOT.glob("ldm/training/callbacks/*.py")} | {
        "ldm.training.bad_samples",
        "ldm.training.checkpoint_io",
        "ldm.training.engine",
        "ldm.training.fit",
        "ldm.training.launch",
        "ldm.training.sharding",
    }
    wrong = []
    for path in SOURCES:
        name = name_of(path)
        if name not in engine and name != "ldm.data.datamodule":
            imported = {imported.split(".")[0] for _, imported in imports_of(path)}
            wrong += [f"{path.relative_to(ROOT)} imports {package}" for package in imported & LIGHTNING]
    assert not wrong, "\n".join(wrong)


def test_the_pipeline_imports_no_training_package() -> None:
    heavy = LIGHTNING | {
        "open_clip",
        "timm",
        "torchvision",
        "transformers",
        "tensorboard",
        "webdataset",
        "pyarrow",
        "s3fs",
    }
    script = "import sys; from ldm import Pipeline; print(*{name.split('.')[0] for name in sys.modules})"
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    loaded = heavy & set(run.stdout.split())
    assert not loaded


def test_a_native_model_is_loaded_without_the_foreign_formats() -> None:
    script = "import sys; from ldm import Pipeline; Pipeline.from_pretrained(); print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    foreign = {"kinds", "clip", "single_file", "diffusers_folder", "hub", "lora"}
    assert not {f"ldm.formats.{name}" for name in foreign} & set(run.stdout.split())


def test_no_file_outgrows_its_idea() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in SOURCES}
    assert not {name: lines for name, lines in lengths.items() if lines > 450}


def tree_of_contributing() -> dict[str, str]:
    """Path to description, from the block of CONTRIBUTING.md that starts with the line of `ldm/`."""
    block = re.search(r"^```\w*\n(ldm/.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL | re.MULTILINE)
    assert block is not None
    tree: dict[str, str] = {}
    folders: list[str] = []
    for line in block[1].splitlines():
        name, _, description = line.strip().partition(" ")
        depth = (len(line) - len(line.lstrip())) // 2
        folders[depth:] = [name]
        tree["".join(folders)] = description.strip()
    return tree


def test_the_tree_names_every_file_with_a_line() -> None:
    """A package's `__init__.py` goes by the line of its folder."""
    tree = tree_of_contributing()
    files = {path.relative_to(ROOT) for path in SOURCES}
    expected = {str(path) for path in files if path.name != "__init__.py" or path.parent == Path("ldm")}
    folders = {f"{path.parent}/" for path in files}
    assert (expected | folders) - tree.keys() == set(), "without a line in the tree of CONTRIBUTING.md"
    assert {name for name in tree if not (ROOT / name).exists()} == set(), "in the tree of CONTRIBUTING.md alone"
    assert {name for name, description in tree.items() if not description} == set(), "without a description"


def test_links_between_the_pages_lead_somewhere() -> None:
    links = [
        (page, link)
        for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text())
        if "://" not in link
    ]
    assert links
    broken = [f"{page.relative_to(ROOT)} -> {link}" for page, link in links if not (page.parent / link).exists()]
    assert not broken, "\n".join(broken)
