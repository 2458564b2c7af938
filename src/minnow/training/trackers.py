"""The trackers, a class each. Their packages are imported when a run asks for them, and nothing else needs them.

Where no key is configured nothing leaves the machine. W&B and SwanLab then write files for a later upload, and have no
notion of continuing those: what a run wrote before is written anew from its logs, so that one upload has all of it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping

import yaml

from minnow.training.tracking import TrackedRun, Tracker

PROJECT = "minnow"
"""The name under which runs are gathered, unless the tracker's own environment variable says another."""


class TensorBoard:
    """Event files in RUN/tensorboard, written anew at each start: TensorBoard cannot take back what it has read."""

    num_known = 0

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = run.folder / "tensorboard"
        self.where = f"tensorboard --logdir {folder}"
        shutil.rmtree(folder, ignore_errors=True)
        # purge_step 0: a TensorBoard that is open drops what it has seen of the files before.
        self.writer = SummaryWriter(folder, purge_step=0, flush_secs=10)
        self.writer.add_text("config", f"```\n{yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)}```", 0)

    def log(self, line: int, step: int, figures: Mapping[str, float]) -> None:
        """Add a scalar for each figure."""
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def finish(self, exit_code: int) -> None:
        """Close the file."""
        self.writer.close()


class WandB:
    """Weights & Biases: online with a key, else in RUN/wandb for `wandb sync`. WANDB_MODE and its kin are obeyed."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        has_key = wandb.login(prompt=False, verify=False)
        mode = os.environ.get("WANDB_MODE") or ("online" if has_key else "offline")
        is_online = mode == "online"
        if not is_online:
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # it sends telemetry offline, too
        if mode == "offline":
            for written_before in run.folder.glob(f"wandb/offline-run-*-{run.id}"):
                shutil.rmtree(written_before)
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=run.id,
            name=run.name,
            config=run.config,
            dir=run.folder,
            mode=mode,  # type: ignore[arg-type]
            resume="allow" if is_online else None,
            settings=wandb.Settings(silent=True, console="off"),
        )
        # W&B's own step only rises; it is the line's number, and the charts are drawn over the updates.
        self.run.define_metric("step", hidden=True)
        self.run.define_metric("*", step_metric="step")
        self.num_known = self.run.step
        folder = os.path.dirname(self.run.dir)
        self.where = (self.run.url or "") if is_online else f"offline; `wandb sync {folder}` uploads it"

    def log(self, line: int, step: int, figures: Mapping[str, float]) -> None:
        """Add a row."""
        self.run.log({"step": step, **figures}, step=line, commit=True)

    def finish(self, exit_code: int) -> None:
        """Mark the run as finished or failed, and wait for the upload."""
        self.run.finish(exit_code=exit_code)


class SwanLab:
    """SwanLab: online with a key, else in RUN/swanlab for `swanlab sync`. SWANLAB_MODE and its kin are obeyed.

    It takes a step of a figure once and ignores it the second time.
    """

    num_known = 0

    def __init__(self, run: TrackedRun) -> None:
        import swanlab

        settings = swanlab.Settings()
        mode = "offline" if settings.mode == "online" and not settings.api_key else settings.mode
        folder = run.folder / "swanlab"
        if mode not in ("online", "disabled"):
            shutil.rmtree(folder, ignore_errors=True)
        with _quiet():
            self.run = swanlab.init(
                project=settings.project.name or PROJECT,
                name=run.name,
                id=run.id,
                resume="allow",
                mode=mode,
                log_dir=str(folder),
                config=run.config,
                settings=swanlab.Settings(terminal={"proxy_type": "none"}),
            )
        self.where = self.run.url if mode == "online" else f"{mode}; `swanlab sync {self.run.dir}` uploads it"

    def log(self, line: int, step: int, figures: Mapping[str, float]) -> None:
        """Add a point to each figure."""
        self.run.log(dict(figures), step=step)

    def finish(self, exit_code: int) -> None:
        """Mark the run as finished, stopped by a signal or failed, and wait for the upload."""
        state = "success" if exit_code == 0 else "aborted" if exit_code > 128 else "crashed"
        with _quiet():
            self.run.finish(state=state, error=f"exit code {exit_code}" if state == "crashed" else None)


class Trackio:
    """trackio: in its database on this machine, or where TRACKIO_SPACE_ID or TRACKIO_SERVER_URL say."""

    def __init__(self, run: TrackedRun) -> None:
        import trackio

        self.trackio = trackio
        name = f"{run.name}-{run.id}"  # a run is known by its name
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        with _quiet():
            self.run = trackio.init(project=project, name=name, resume="allow", config=run.config, embed=False)
        is_local = not (os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL"))
        if is_local:
            self.num_known = trackio.SQLiteStorage.get_log_count(project, name, run_id=self.run.id)
        else:  # it cannot be asked: what the logs hold counts as told
            self.num_known = run.num_lines
        self.where = f"trackio show --project {project}"

    def log(self, line: int, step: int, figures: Mapping[str, float]) -> None:
        """Add a row."""
        self.run.log(dict(figures), step=step)

    def finish(self, exit_code: int) -> None:
        """Wait until everything is written."""
        with _quiet():
            self.trackio.finish()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drop greetings: stdout belongs to what a command answers."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


TRACKERS: dict[str, Callable[[TrackedRun], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "swanlab": SwanLab,
    "trackio": Trackio,
}
