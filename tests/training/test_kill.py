"""SIGKILL at random moments, while a checkpoint is written too: what is left must continue to the same end."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minnow.training.checkpoint import list_checkpoints
from minnow.training.metrics_log import MetricsLog

from .helpers import make_trainer
from .test_trainer import VOLATILE

ROOT = Path(__file__).parents[2]

PROGRAM = """
import sys
import time
from pathlib import Path
import torch
from minnow.training import checkpoint_writer
torch.set_num_threads(1)
describe_files = checkpoint_writer.describe_files
def slowly(files):
    time.sleep(float(sys.argv[3]))
    return describe_files(files)
checkpoint_writer.describe_files = slowly
from tests.training.helpers import make_trainer
trainer = make_trainer(Path(sys.argv[1]), steps=int(sys.argv[2]), validate_every=20, save_every=7)
trainer.resume()
print("ready", flush=True)
trainer.fit()
"""


@pytest.mark.parametrize(
    ("wanted", "steps"), [(3, 150), pytest.param(50, 1500, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
)
def test_sigkill_at_random_moments_changes_nothing(tmp_path: Path, wanted: int, steps: int) -> None:
    """Every second kill is aimed at a checkpoint that is being written, the others come when they come.

    The three of the quick test meet a slow disk: at least the aimed ones fall into the writing.
    """
    pause, least = (0.1, 2) if wanted < 10 else (0.0, wanted // 4)
    rng = random.Random(5)
    kills = torn = 0
    checkpoints = tmp_path / "killed" / "checkpoints"
    while True:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tmp_path / "killed"), str(steps), str(pause)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"},
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        if kills < wanted:
            if kills % 2:
                time.sleep(rng.uniform(0.05, 0.6 if wanted < 10 else 0.3))
            else:
                while process.poll() is None and not is_writing(checkpoints):
                    time.sleep(0.001)
                time.sleep(rng.uniform(0, 0.02))
            process.send_signal(signal.SIGKILL)
        process.wait()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
        kills += 1
        torn += is_writing(checkpoints)
    assert kills == wanted, "the run ended before it had been killed so often: make it longer"
    assert torn >= least, f"only {torn} of {kills} kills fell into the writing of a checkpoint"
    uninterrupted = make_trainer(tmp_path / "straight", steps=steps, validate_every=20, save_every=7)
    uninterrupted.fit()
    last = f"checkpoints/step-{steps:08d}"
    left, right = (load_file(next((tmp_path / run / last).glob("shard-*"))) for run in ("killed", "straight"))
    assert left.keys() == right.keys()
    for key, tensor in left.items():
        assert torch.equal(tensor, right[key]), key
    histories = [
        [{k: v for k, v in r.items() if k not in VOLATILE} for r in MetricsLog(tmp_path / run / "metrics.jsonl").read()]
        for run in ("killed", "straight")
    ]
    assert histories[0] == histories[1]


def is_writing(checkpoints: Path) -> bool:
    """Whether the newest folder is no whole checkpoint: it is being written, or a kill has left it so."""
    whole = [checkpoint.folder.name for checkpoint in list_checkpoints(checkpoints)]
    return any(folder.name > max(whole, default="") for folder in checkpoints.glob("step-*"))
