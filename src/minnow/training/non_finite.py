"""What is said when a loss or a gradient is NaN or infinite."""

from __future__ import annotations

from collections.abc import Sequence

from minnow.config import UserError
from minnow.data.batches import Batch
from minnow.training.distribution import gather


class NonFiniteLossError(UserError):
    """Loss or gradient is NaN or infinite; the weights are those before the step. Names the step and the documents."""

    @classmethod
    def of(cls, what: str, value: float, step: int, batches: Sequence[Batch]) -> NonFiniteLossError:
        """`what` is `value` in the update after `step`. All processes call it: each knows its `batches` only."""
        here = {document for batch in batches for row in batch.document_ids for document in row}
        documents = sorted(set().union(*gather(here)))
        shown = ", ".join(map(str, documents[:20])) + (" ..." if len(documents) > 20 else "")
        return cls(
            f"step {step}: {what} is {value}; the weights were left as they were before this step. "
            f"Its batch holds {len(documents)} documents (numbers in the training shards): {shown}. "
            "Look at them with `minnow data inspect`, or lower the learning rate"
        )
