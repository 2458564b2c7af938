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

from minnow.training.run_folder import MetricsLog

from .helpers import make_trainer
from .test_trainer import VOLATILE

STEPS = 150
ROOT = Path(__file__).parents[2]

PROGRAM = f"""
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.training.helpers import make_trainer
trainer = make_trainer(Path(sys.argv[1]), steps={STEPS}, validate_every=20, save_every=7)
trainer.resume()
print("ready", flush=True)
trainer.fit()
"""


@pytest.mark.parametrize("wanted", [3, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_sigkill_at_random_moments_changes_nothing(tmp_path: Path, wanted: int) -> None:
    rng = random.Random(5)
    kills = 0
    while True:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tmp_path / "killed")],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"},
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        if kills < wanted:
            time.sleep(rng.uniform(0.05, 0.6 if wanted < 10 else 0.3))
            process.send_signal(signal.SIGKILL)
        process.wait()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
        kills += 1
    uninterrupted = make_trainer(tmp_path / "straight", steps=STEPS, validate_every=20, save_every=7)
    uninterrupted.fit()
    last = f"checkpoints/step-{STEPS:08d}"
    left, right = (load_file(next((tmp_path / run / last).glob("shard-*"))) for run in ("killed", "straight"))
    assert left.keys() == right.keys()
    for key, tensor in left.items():
        assert torch.equal(tensor, right[key]), key
    histories = [
        [{k: v for k, v in r.items() if k not in VOLATILE} for r in MetricsLog(tmp_path / run / "metrics.jsonl").read()]
        for run in ("killed", "straight")
    ]
    assert histories[0] == histories[1]
    assert kills > 0, "the run ended before it could be killed: make it longer"
