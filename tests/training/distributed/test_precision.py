"""The formats that several processes send weights in."""

from __future__ import annotations

from .processes import run_processes


def test_slices_are_gathered_in_the_compute_dtype_but_for_routers() -> None:
    """A router is read in fp32: in slices it was rounded to bf16 first, and chose other experts than on one process."""
    run_processes("tests.training.distributed.precision", "fsdp", world_size=2)
