"""Decode steps as CUDA graphs: recorded once a shape, then launched at once, without Python in between."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from minnow.engine.runner import Decoder

Replay = Callable[[], None]
Capture = Callable[[Callable[[], Tensor]], tuple[Replay, Tensor]]
"""Records a function of no arguments: how to run it again, and where its result will stand."""

_one_at_a_time = threading.Lock()  # several served models have a thread each, and CUDA takes one capture a process


class CudaGraphs:
    """Records functions as CUDA graphs, all in one pool of memory: they never run at the same time.

    What a graph computes on the way may be overwritten by the next one; its result stands until it is replayed.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None  # what torch calls a pool handle

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        """Raises RuntimeError for a function that waits for the device, before anything is recorded."""
        with _one_at_a_time:
            self._stream = self._stream or torch.cuda.Stream()
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                function()  # what is made on first use is made before the recording
                with NoWaiting():  # an error while recording would leave torch's random generator half recorded
                    function()
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # thread_local: what other threads do (another model's, NCCL's watchdog) does not spoil the recording.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                result = function()
            self._pool = graph.pool()
        return graph.replay, result


class NoWaiting(TorchDispatchMode):
    """Makes every operation raise RuntimeError that has the host wait for the device.

    Those of this thread: torch's own debug mode is the whole process's, where other models' threads read their tokens.
    """

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let compiled steps be run as they are; torch would else run no compiled code meanwhile, in any thread."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation or refuse it."""
        if _waits(func, args):
            raise RuntimeError(f"{func} synchronizes with the device")
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and result.device.type != args[0].device.type:
            raise RuntimeError(f"{func} synchronizes with the device")
        return result


def _waits(func: Any, args: Any) -> bool:
    aten = torch.ops.aten
    if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    if func is aten.copy_.default:
        return bool(args[0].device.type != args[1].device.type)
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags


class Recordings:
    """Recorded steps of one model by their shape. Each reads the weights where they lay: dropped where they moved."""

    def __init__(self, capture: Capture | None):
        self._capture = capture
        self._recorded: dict[Hashable, tuple[Replay, Tensor]] = {}
        self._weights: tuple[int, ...] = ()
        self._recorded_for: tuple[int, ...] = ()

    @property
    def possible(self) -> bool:
        """Whether steps can be recorded: until one could not."""
        return self._capture is not None

    def forget(self) -> None:
        """The weights changed; if they lie where they lay, recorded steps still hold."""
        self._weights = ()

    def clear(self) -> None:
        """Drop all recorded steps."""
        self._recorded.clear()

    def run(self, model: Decoder, shape: Hashable, step: Callable[[], Tensor]) -> Tensor:
        """What `step` computes, replayed if a step of this shape has been recorded. Good until the next call."""
        self._drop_if_weights_moved(model)
        if shape not in self._recorded and self._capture is not None:
            try:
                self._recorded[shape] = self._capture(step)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # a layer that looks at its data, such as one with routed experts
                warnings.warn(f"decode steps are not recorded as CUDA graphs: {error}", stacklevel=2)
                self._capture = None
        if self._capture is None:
            return step()
        replay, result = self._recorded[shape]
        replay()
        return result

    def _drop_if_weights_moved(self, model: Decoder) -> None:
        if not self._weights:
            assert isinstance(model, torch.nn.Module)
            weights = tuple(tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers()))
            if weights != self._recorded_for:
                self._recorded.clear()
            self._weights = self._recorded_for = weights


def padded_rows(rows: int) -> int:
    """Rows that a recorded step has for so many: 1, 2, 4, 8, then multiples of 16."""
    return 1 << (rows - 1).bit_length() if rows <= 8 else -(-rows // 16) * 16
