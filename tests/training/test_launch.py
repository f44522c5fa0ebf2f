"""Devices, machines and strategy of a training, and the scripts of docs/scaling.md, run at size two."""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.strategies import DDPStrategy

from ldm.errors import TrainingError
from ldm.training.config import TrainerConfig
from ldm.training.launch import devices_and_nodes, strategy_of
from ldm.training.sharding import FSDP2
from tests.experiments import write_experiment

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "docs" / "scripts"
TORCHRUN = {"TORCHELASTIC_RUN_ID": "1", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8"}
SLURM = {"SLURM_JOB_NAME": "ldm", "SLURM_NTASKS": "6", "SLURM_NTASKS_PER_NODE": "3", "SLURM_NNODES": "2"}


@pytest.mark.parametrize(
    ("variables", "config", "expected"),
    [
        ({}, {}, ("auto", 1)),
        ({}, {"devices": 2, "num_nodes": 3}, (2, 3)),
        (TORCHRUN, {}, (4, 2)),
        (TORCHRUN, {"devices": 4}, (4, 2)),
        (SLURM, {}, (3, 2)),
        (SLURM | {"SLURM_JOB_NAME": "interactive"}, {}, ("auto", 1)),
    ],
)
def test_devices_are_those_of_the_launcher(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], config: dict[str, int], expected: tuple[int | str, int]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert devices_and_nodes(TrainerConfig(**config)) == expected  # type: ignore[arg-type]


def test_other_devices_than_those_of_the_launcher_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    expected = r"trainer\.devices is 2, but torchrun has started 4 processes on this machine; set it to auto"
    with pytest.raises(TrainingError, match=expected):
        devices_and_nodes(TrainerConfig(devices=2))
    with pytest.raises(TrainingError, match=r"trainer\.num_nodes is 1, but torchrun has started 2 machines"):
        devices_and_nodes(TrainerConfig(num_nodes=1))


def test_a_strategy_is_found_by_its_name() -> None:
    assert strategy_of(TrainerConfig(accelerator="cpu"), False) == "auto"
    several = strategy_of(TrainerConfig(accelerator="cpu", devices=2), True)
    assert isinstance(several, DDPStrategy)
    assert several._ddp_kwargs == {"find_unused_parameters": True}
    assert isinstance(strategy_of(TrainerConfig(strategy="fsdp2"), False), FSDP2)
    assert strategy_of(TrainerConfig(strategy="ddp_spawn"), False) == "ddp_spawn"
    with pytest.raises(TrainingError, match=r"trainer\.strategy: unknown strategy 'fsdp3'; did you mean 'fsdp2'\?"):
        strategy_of(TrainerConfig(strategy="fsdp3"), False)


def test_scripts_are_well_formed() -> None:
    for script in (SCRIPTS / "torchrun.sh", SCRIPTS / "slurm.sbatch"):
        subprocess.run(["bash", "-n", script], check=True)
    lines = (SCRIPTS / "slurm.sbatch").read_text().splitlines()
    options = [re.fullmatch(r"#SBATCH --([a-z-]+)(=\S+)?", line) for line in lines if line.startswith("#SBATCH")]
    assert len(options) == 10
    assert all(options)
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(
        i < first_command for i, line in enumerate(lines) if line.startswith("#SBATCH")
    )  # SLURM reads no later ones
    task = yaml.safe_load((SCRIPTS / "skypilot.yaml").read_text())
    assert task.keys() == {"name", "num_nodes", "resources", "workdir", "envs", "file_mounts", "setup", "run"}
    assert task["resources"].keys() == {"accelerators", "use_spot", "job_recovery"}
    assert task["resources"]["job_recovery"] == {"strategy": "EAGER_NEXT_REGION", "recover_on_exit_codes": [75]}
    for part in ("setup", "run"):
        subprocess.run(["bash", "-n"], input=task[part], text=True, check=True)


def environment(**variables: object) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MASTER_"))}
    port = 20000 + os.getpid() % 20000
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # of python and torchrun
    return (
        inherited
        | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MASTER_PORT": str(port), "PATH": path}
        | {name: str(value) for name, value in variables.items()}
    )


def rows(run: Path, stage: str = "clip") -> list[str]:
    with (run / stage / "metrics.csv").open(newline="") as file:
        return [row["step"] for row in csv.DictReader(file) if row["train/loss"]]


def arguments(config: Path, *overrides: str) -> list[str]:
    common = ["clip.train.batch_size=2", "trainer.devices=auto", *overrides]
    return ["--stage", "clip", "--config", str(config), *common]


@pytest.mark.slow
def test_torchrun_trains_on_two_processes(tmp_path: Path) -> None:
    config = write_experiment(tmp_path)
    done = subprocess.run(
        ["bash", SCRIPTS / "torchrun.sh", *arguments(config, "clip.train.max_steps=2")],
        cwd=ROOT, env=environment(PROCESSES=2), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("stage clip is finished") == 1
    assert rows(tmp_path / "run") == ["1", "2"]


SRUN = """#!/usr/bin/env bash
# Starts two tasks on one machine as SLURM does, forwards its signals to them, and exits with the highest of their codes.
shift  # --kill-on-bad-exit
export SLURM_NTASKS=2 SLURM_NTASKS_PER_NODE=2 SLURM_NNODES=1 SLURM_NODEID=0 SLURM_NODELIST=127.0.0.1 SLURM_STEP_ID=0
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & tasks="$tasks $!"
done
trap 'kill -USR1 $tasks' USR1
highest=0
for task in $tasks; do
    while kill -0 "$task" 2> /dev/null; do wait "$task"; code=$?; done
    [ "$code" -gt "$highest" ] && highest=$code
done
exit "$highest"
"""


@pytest.mark.slow
def test_a_slurm_job_is_requeued_and_resumes(tmp_path: Path) -> None:
    """USR1 ends it with code 75 after a checkpoint, and the script asks for a requeue; run again, it ends."""
    config, bin_folder = write_experiment(tmp_path), tmp_path / "bin"
    bin_folder.mkdir()
    for name, text in {"srun": SRUN, "scontrol": f'#!/bin/sh\necho "$@" > {tmp_path}/requeued\n'}.items():
        (bin_folder / name).write_text(text)
        (bin_folder / name).chmod(0o755)
    variables = environment(PATH=f"{bin_folder}:{environment()['PATH']}", SLURM_JOB_ID=4711, SLURM_JOB_NAME="ldm")
    command = ["bash", str(SCRIPTS / "slurm.sbatch"), *arguments(config)]

    started = subprocess.Popen([*command, "clip.train.max_steps=5000", "clip.train.validate_every=5000"],
        cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)  # fmt: skip
    while not (tmp_path / "run" / "clip" / "last.ckpt").exists() and started.poll() is None:
        time.sleep(0.1)
    srun = int(subprocess.run(["pgrep", "-P", str(started.pid)], capture_output=True, text=True, check=True).stdout)
    os.kill(srun, signal.SIGUSR1)  # as SLURM signals the steps of a job
    _, err = started.communicate()
    assert started.returncode == 75, err
    assert "was stopped by SIGUSR1 after step" in err
    assert (tmp_path / "requeued").read_text() == "requeue 4711\n"

    stopped = int(rows(tmp_path / "run")[-1])
    end = [f"clip.train.max_steps={stopped + 1}", "clip.train.validate_every=5000"]
    done = subprocess.run([*command, *end], cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert rows(tmp_path / "run") == [str(step) for step in range(1, stopped + 2)]


@pytest.mark.slow
def test_the_skypilot_task_trains_on_two_machines(tmp_path: Path) -> None:
    """Its commands run twice, with the variables that SkyPilot sets on each of two machines with one device."""
    config = write_experiment(tmp_path)
    task = yaml.safe_load((SCRIPTS / "skypilot.yaml").read_text())
    run = (
        task["run"].replace("--stage all", "--stage clip").rstrip()
        + " clip.train.batch_size=2 clip.train.max_steps=2\n"
    )
    machines = [
        subprocess.Popen(
            ["bash", "-c", run],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=environment(
                CONFIG=config, RUN=tmp_path / "run", SKYPILOT_NODE_IPS="127.0.0.1\n127.0.0.2", SKYPILOT_NODE_RANK=node,
                SKYPILOT_NUM_NODES=2, SKYPILOT_NUM_GPUS_PER_NODE=1,
            ),
        )
        for node in range(2)
    ]  # fmt: skip
    outputs = [machine.communicate() for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], outputs
    assert [out.count("stage clip is finished") for out, _ in outputs] == [1, 0]
    assert rows(tmp_path / "run") == ["1", "2"]
