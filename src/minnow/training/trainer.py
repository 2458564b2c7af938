"""The one training loop. A stage supplies a model, batches and an objective; everything else happens here."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

import torch
from torch import Tensor

from minnow.config import UserError
from minnow.data.batches import Share
from minnow.model.slices import whole
from minnow.model.transformer import CausalLM
from minnow.optim import ScheduleConfig, learning_rate_factor, set_learning_rates
from minnow.training.balance import ExpertBalance
from minnow.training.checkpoint import delete_after, list_checkpoints, newest_valid
from minnow.training.checkpoint_writer import CheckpointWriter
from minnow.training.config import TrainingConfig
from minnow.training.distribution import (
    from_first,
    is_first,
    largest_over_ranks,
    mark_start,
    rank,
    started_again,
    sum_over_ranks,
    world_size,
)
from minnow.training.hardware import synchronize
from minnow.training.loss_scale import LossScale
from minnow.training.metrics_log import METRICS, ROLLOUTS, MetricsLog
from minnow.training.non_finite import NonFiniteLossError
from minnow.training.objective import (
    BatchSource,
    BatchT,
    Bounded,
    Doubting,
    Growing,
    LooksAhead,
    Objective,
    ObjectiveOutput,
    PackedBatches,
    SourceStopsError,
    Stateful,
    totals,
)
from minnow.training.observer import Observer
from minnow.training.parallel import sync_gradients
from minnow.training.signals import Interrupted, StopRequest, stop_requests
from minnow.training.speed import Speedometer, batch_flops, is_frozen
from minnow.training.validation import Evaluation

WAIT_SECONDS = 1.0
"""Between two looks for data that is being written."""


@dataclass
class LoopState:
    """What the loop itself must remember between steps; saved in every checkpoint."""

    step: int = 0
    tokens: int = 0
    best_loss: float = math.inf
    best_step: int | None = None
    validations_without_progress: int = 0


class Trainer(Generic[BatchT]):
    """Owns accumulation, precision, clipping, schedule, checkpoints, validation, logging and stopping.

    With several processes, each runs one of these: they share out the batches and take every decision together.

    model: on its device and over the processes, `compute_dtype` and compilation already chosen by the stage.
    validation: held-out figures, `validation_loss` among them: the best model has the least of it; None without data.
    evaluations: further functions of the model, called at each validation; their figures go into its metrics line.
    """

    def __init__(
        self,
        config: TrainingConfig,
        *,
        folder: Path,
        title: str,
        model: CausalLM,
        optimizers: Sequence[torch.optim.Optimizer],
        schedule: ScheduleConfig,
        objective: Objective[BatchT],
        source: BatchSource[BatchT],
        total_steps: int,
        validation: Evaluation | None = None,
        evaluations: Sequence[Evaluation] = (),
    ) -> None:
        self.config, self.folder, self.title = config, folder, title
        self.model, self.optimizers, self.schedule = model, list(optimizers), schedule
        self.objective, self.source, self.total_steps = objective, source, total_steps
        self.validation, self.evaluations = validation, list(evaluations)
        self.device = next(model.parameters()).device
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.loss_scale = LossScale(model.compute_dtype)
        # Beside a frozen model the routers, and so the loads, stay what they are.
        balanced = model.config.experts is not None and not is_frozen(model)
        self.balance = ExpertBalance(model, config.balance, config.seed) if balanced else None
        self.state = LoopState()
        self.share = Share(rank(), world_size())
        if is_first():
            folder.mkdir(parents=True, exist_ok=True)
        self.metrics = MetricsLog(folder / METRICS)
        self.checkpoints = folder / "checkpoints"
        self.writer = CheckpointWriter(self.checkpoints, keep_last=config.keep_last)
        self._ahead: tuple[int, Sequence[BatchT]] | None = None
        """The next step's number and micro-batches."""
        self.passed_over: list[str] = []
        """Checkpoints that `resume` could not use, and why."""

    def resume(self) -> bool:
        """Continue from the newest whole checkpoint, if there is one: bit for bit as if the run had not been stopped.

        On another number of processes the same global batches follow; sums then differ by rounding, as they do on a
        GPU, whose kernels add in no fixed order. UserError where there are checkpoints and none of them is whole.
        """
        mark = self.folder / "resumed.id"
        wanted = None if self.config.resume == "auto" or started_again(mark) else self.config.resume
        chosen, self.passed_over = newest_valid(self.checkpoints, wanted)
        if chosen is None and list_checkpoints(self.checkpoints):
            # They were whole once: a disk that is not all there must not cost the run.
            raise UserError(
                f"{self.checkpoints}: no checkpoint is whole any more ({'; '.join(self.passed_over)}): restore one, or "
                "start anew with --overwrite"
            )
        if is_first():
            delete_after(self.checkpoints, chosen.step if chosen else -1)
        if wanted is not None:
            mark_start(mark)
        if chosen is None:
            if is_first():
                for log in (METRICS, ROLLOUTS):  # of a run that left no checkpoint
                    (self.folder / log).unlink(missing_ok=True)
            return False
        saved = chosen.load(self.model, self.optimizers)
        self.state = LoopState(**saved["loop"])
        self.loss_scale.load_state_dict(saved["loss_scale"])
        if self.balance is not None:
            self.balance.load_state_dict(saved["balance"])
        if isinstance(self.source, Stateful):
            self.source.load_state_dict(chosen.source_state())
        if is_first():
            self.metrics.rewind(self.state.step)
        return True

    def fit(self) -> None:
        """Train to `total_steps`. Raises Interrupted after SIGTERM or SIGINT, NonFiniteLossError on NaN or infinity."""
        self.model.train()
        speed = Speedometer.measure(self.device, self.model.compute_dtype)
        observer = Observer(
            self.config,
            self.folder,
            self.metrics,
            title=self.title,
            device=self.device,
            done=self.state.step,
            total=self.total_steps,
        )
        # Signals are ours from inside the observer on: a tracker may have taken Ctrl-C for itself when it was opened.
        with observer:
            try:
                with stop_requests() as request:
                    self._loop(request, observer, speed)
            finally:
                self.writer.wait()

    def _loop(self, request: StopRequest, observer: Observer, speed: Speedometer) -> None:
        if not self.state.step and self.config.validate_every and self.evaluations:
            self._report(observer, self._evaluated({"step": 0}))  # the start, which later figures are measured against
        if self.state.step and self._validation_due() and not self._validate(observer):
            return
        while self.state.step < self.total_steps:
            self._await_data(request, observer)
            try:
                record = self._timed_step(speed)
            except SourceStopsError:
                self._save_unless_saved()
                raise
            observer.after_step(record)
            if self._validation_due():
                self._save()
                self._obey(request)
                if not self._validate(observer):
                    return
            elif self.config.save_every and self.state.step % self.config.save_every == 0:
                self._save()
            observer.alive()
            self._obey(request)

    def _await_data(self, request: StopRequest, observer: Observer) -> None:
        """Wait until the next step's rows are written, if they are being written; a signal still stops the run."""
        said = None
        while isinstance(self.source, Growing):
            lacking = from_first(self.source.lacking(self.state.step) if is_first() else None)
            if lacking is None:
                return
            if lacking != said:
                observer.say(said := lacking)
            observer.alive()
            self._obey(request)
            time.sleep(WAIT_SECONDS)

    def load_best(self) -> None:
        """Go back to the checkpoint with the best validation loss."""
        best, _ = newest_valid(self.checkpoints, self.state.best_step)
        assert best is not None  # newest_valid says what is wrong with one that is asked for
        best.load(self.model, self.optimizers)

    def load_before(self, step: int) -> int | None:
        """Go back to the weights of the newest checkpoint of fewer than `step` updates; its step, None without one."""
        for checkpoint in reversed(list_checkpoints(self.checkpoints)):
            if checkpoint.step < step and checkpoint.problem() is None:
                checkpoint.load(self.model, self.optimizers)
                return checkpoint.step
        return None

    def train_step(self) -> dict[str, float]:
        """One update. The loss is the sum over the global batch divided by its count, however it is cut up.

        mean = sum_m loss_sum_m / sum_m count_m over the micro-batches m of all processes, so each backward pass starts
        from loss_sum_m / count with the count of the *whole* batch; dividing by micro-batch counts and averaging would
        weight tokens unequally. UserError for a batch in which nothing is supervised, NonFiniteLossError as `fit`.
        """
        batches = self._batches()
        count, rows, tokens, flops = sum_over_ranks(
            [
                sum(self.objective.count(batch) for batch in batches),
                sum(len(batch.tokens_BT) for batch in batches),
                sum(batch.num_real_tokens for batch in batches),
                sum(batch_flops(self.model, batch) for batch in batches),
            ]
        )
        if count == 0:
            raise UserError(f"step {self.state.step}: nothing in the batch is supervised; check the data's loss mask")
        if isinstance(self.objective, LooksAhead):
            self.objective.look_ahead(self.model, batches)
        first_row = 0 if self.balance is None else self.share.first_row(int(rows))
        if self.balance is not None and self.balance.measures_first:
            self.balance.measure(batches, self.state.step, first_row)
        outputs = []
        for index, batch in enumerate(batches):
            sync_gradients(self.model, last=index == len(batches) - 1)
            output, balance_sum = self._forward(batch.to(self.device), first_row)
            loss = output.loss_sum * (self.loss_scale.scale / count)
            if balance_sum is not None:
                loss = loss + balance_sum * (self.loss_scale.scale / tokens)
            loss.backward()
            outputs.append(output)
            first_row += len(batch.tokens_BT)
        # Begun before the loss is read, which waits for the device.
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        self._read_ahead()
        figures = {name: value / count for name, value in totals(outputs).items()}
        figures["flops"] = flops
        if not math.isfinite(figures["loss"]):
            raise NonFiniteLossError.of("loss", figures["loss"], self.state.step, batches)
        figures["grad_norm"] = self._clip_gradients(grads, norm)
        finite = math.isfinite(figures["grad_norm"])
        if not finite and not self.loss_scale.helps:
            raise NonFiniteLossError.of("gradient norm", figures["grad_norm"], self.state.step, batches)
        factor = learning_rate_factor(self.schedule, self.state.step, self.total_steps)
        set_learning_rates(self.optimizers, factor)
        # Where nothing is to be learnt (answers that all earn the same) no step is taken: decay and momentum would move
        # the weights all the same (bug B9).
        step = finite and figures["grad_norm"] > 0
        if isinstance(self.objective, Bounded) and self.objective.leaves_out(figures):
            step = False
        for optimizer in self.optimizers:
            if step:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.loss_scale.update(overflow=not finite)
        if self.balance is not None:
            figures |= self.balance.update(apply=step)
        figures["lr"] = self.optimizers[0].param_groups[0]["lr"]
        self.state.step += 1
        self.state.tokens += int(tokens)
        return figures

    def _batches(self) -> Sequence[BatchT]:
        step, batches = self._ahead or (None, [])
        self._ahead = None
        return batches if step == self.state.step else self.source.micro_batches(self.state.step, self.share)

    def _read_ahead(self) -> None:
        """Read the next step's rows while the device is at work, where they need neither this step nor waiting for."""
        step = self.state.step + 1
        if isinstance(self.source, PackedBatches) and not isinstance(self.source, Growing) and step < self.total_steps:
            self._ahead = step, self.source.micro_batches(step, self.share)

    def _forward(self, batch: BatchT, first_row: int) -> tuple[ObjectiveOutput, Tensor | None]:
        """The objective on one micro-batch; of a mixture of experts also the sum of its balance losses."""
        if self.balance is None:
            return self.objective(self.model, batch), None
        with self.balance.watch(batch, step=self.state.step, first_row=first_row) as routing:
            output = self.objective(self.model, batch)
        return output, self.balance.loss_sum(routing, batch)

    def _clip_gradients(self, grads: list[Tensor], scaled_norm: Tensor) -> float:
        """Undo the loss scale and clip to `clip_norm`; return the norm before clipping."""
        norm = float(whole(scaled_norm)) / self.loss_scale.scale
        too_long = self.config.clip_norm / (norm + 1e-6) if self.config.clip_norm else 1.0
        coefficient = min(1.0, too_long) / self.loss_scale.scale
        if math.isfinite(norm) and coefficient != 1.0:
            torch._foreach_mul_(grads, coefficient)
        return norm

    def _timed_step(self, speed: Speedometer) -> dict[str, Any]:
        """`train_step` with the figures of the machine beside those of the model."""
        tokens_before, start = self.state.tokens, time.perf_counter()
        figures = self.train_step()
        synchronize(self.device)
        of_machine = speed.figures(
            seconds=time.perf_counter() - start,
            tokens=self.state.tokens - tokens_before,
            flops=figures.pop("flops"),
            steps_left=self.total_steps - self.state.step,
        )
        return {"step": self.state.step, **figures, "tokens": self.state.tokens, **of_machine}

    def _validation_due(self) -> bool:
        at_end = self.state.step == self.total_steps
        every = self.config.validate_every
        return at_end or (every > 0 and self.state.step % every == 0)

    def _validate(self, observer: Observer) -> bool:
        """Score held-out data, log it, remember the best. Returns False when patience has run out."""
        record: dict[str, Any] = {"step": self.state.step}
        patient = True
        if self.validation is not None:
            record |= self.validation(self.model)
            if record["validation_loss"] < self.state.best_loss:
                self.state.best_loss, self.state.best_step = record["validation_loss"], self.state.step
                self.state.validations_without_progress = 0
            else:
                self.state.validations_without_progress += 1
            patience = self.config.patience
            patient = not patience or self.state.validations_without_progress < patience
        self._report(observer, self._evaluated(record))
        self.writer.prune(self._worth_keeping())
        if not patient:
            observer.say(f"stopped early: no better validation loss since step {self.state.best_step}")
        return patient

    def _evaluated(self, record: dict[str, Any]) -> dict[str, Any]:
        for evaluation in self.evaluations:
            record |= evaluation(self.model)
        self.model.train()
        return record

    def _report(self, observer: Observer, record: dict[str, Any]) -> None:
        if len(record) > 1:
            observer.log(record)
            shown = "  ".join(f"{k} {v:.4f}" for k, v in record.items() if k != "step")
            observer.say(f"step {self.state.step}: {shown}")

    def _save(self) -> None:
        state = {"loop": vars(self.state).copy(), "loss_scale": self.loss_scale.state_dict()}
        if self.balance is not None:
            state["balance"] = self.balance.state_dict()
        source = self.source.state_dict() if isinstance(self.source, Stateful) else None
        kept = self._worth_keeping()
        self.writer.save(self.state.step, self.model, self.optimizers, state, source=source, best_step=kept)

    def _save_unless_saved(self) -> None:
        if self.writer.newest_step() != self.state.step:
            self._save()
            self.writer.wait()

    def _worth_keeping(self) -> int | None:
        """The step of the checkpoint that is kept beside the last ones: the best, or the newest from before doubts."""
        since = self.source.doubted_since if isinstance(self.source, Doubting) else None
        if since is None:
            return self.state.best_step
        self.writer.wait()
        return max((c.step for c in list_checkpoints(self.checkpoints) if c.step < since), default=None)

    def _obey(self, request: StopRequest) -> None:
        # A signal reaches the processes at different moments; they stop after the same step.
        number = int(largest_over_ranks(request.signal_number or 0))
        if not number:
            return
        self._save_unless_saved()
        raise Interrupted(
            number,
            f"stopped at step {self.state.step}; run the same command again to continue from there",
        )
