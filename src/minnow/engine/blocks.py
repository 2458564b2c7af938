"""Which block of the KV cache belongs to whom, and which content it holds: numbers only, no tensors."""

from __future__ import annotations

import hashlib
from collections import OrderedDict


def block_key(parent: bytes, content: bytes) -> bytes:
    """What a full block is found by: a digest of what stands in it (`Sequence.content`) and of all before it.

    A cryptographic digest and no quick hash: a prompt made to collide would be answered from another's cache.
    `parent` is the key of the block before, b"" for the first one (an adapter's name belongs there, whose keys
    and values differ).
    """
    return hashlib.blake2b(parent + content, digest_size=16).digest()


class BlockManager:
    """Hands out blocks, counts their owners, and remembers the content of those that nobody owns.

    A block is free (its content forgotten), owned by one sequence or shared by several, or kept: owned by
    nobody, but still found by its content until the room is needed; the longest unused one goes first.
    """

    def __init__(self, num_blocks: int, block_size: int):
        self.num_blocks = num_blocks
        self.block_size = block_size
        """Tokens in a block."""
        self._owners = [0] * num_blocks
        # A stack: the block given back last is the one most likely in the processor's cache.
        self._free = list(reversed(range(num_blocks)))
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can give."""
        return len(self._free) + len(self._kept)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-tokens // self.block_size)

    def is_shared(self, block: int) -> bool:
        """Whether more than one sequence owns it: nobody may write to it then."""
        return self._owners[block] > 1

    def allocate(self) -> int:
        """A block with one owner and no content. Only where `num_available` is not 0."""
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._kept.popitem(last=False)
            del self._block_of[self._key_of.pop(block)]
        self._owners[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more owner, for a block that has owners or is kept."""
        self._kept.pop(block, None)
        self._owners[block] += 1

    def release(self, block: int) -> None:
        """One owner less; the last one leaves it kept where its content is known, free otherwise."""
        assert self._owners[block] > 0
        self._owners[block] -= 1
        if self._owners[block] == 0:
            if block in self._key_of:
                self._kept[block] = None
            else:
                self._free.append(block)

    def remember(self, block: int, key: bytes) -> None:
        """A full block has this content from now on. A second block of the same content stays unknown."""
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def find(self, key: bytes) -> int | None:
        """The block of this content, owned or kept."""
        return self._block_of.get(key)

    def forget_contents(self) -> None:
        """No block is found by its content any more (the weights that made it are gone)."""
        self._free.extend(self._kept)
        self._kept.clear()
        self._key_of.clear()
        self._block_of.clear()
