from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import save_file

from tests.tiny import LORA_LAYERS, tiny_lora


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Files for the tiny model: overlapping, but not of the same layers."""
    files, layers = [], list(LORA_LAYERS.items())
    for index, some in enumerate((layers[:4], layers[1:], layers[2:3])):
        files.append(tmp_path_factory.mktemp("loras") / f"{index}.safetensors")
        save_file(tiny_lora(index, dict(some)), files[-1])
    return files
