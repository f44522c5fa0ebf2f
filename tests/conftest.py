from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

# Before any test file imports huggingface_hub: the suite reads nothing from the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# The tests compare with the CPU, often to the bit; those of test_cuda.py run by make test-gpu.
if "LDM_TEST_GPU" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# The processes of pytest-xdist share the cores; the commands that tests start inherit their share.
cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
threads = max(1, cores // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
os.environ["OMP_NUM_THREADS"] = str(threads)
torch.set_num_threads(threads)

settings.register_profile("suite", derandomize=True, deadline=None, max_examples=30, print_blob=True)
settings.load_profile("suite")


# Two scopes, so that neither the weights of a module's fixtures nor the draws of a test depend on what ran
# before them.
@pytest.fixture(autouse=True, scope="module")
def _seed_of_the_module() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _seed_of_the_test() -> None:
    torch.manual_seed(1)
