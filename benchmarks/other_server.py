"""Another program's server on a free port, for as long as a block runs."""

from __future__ import annotations

import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


@contextmanager
def answering(words: Sequence[str], env: dict[str, str] | None = None) -> Iterator[str]:
    """The address at which the command `words` answers, given a --port; RuntimeError with its log where it ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([*words, "--port", str(port)], env=env, stdout=log, stderr=subprocess.STDOUT)
        try:
            while True:
                time.sleep(0.2)
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                    break
                except OSError:
                    if process.poll() is not None:
                        log.seek(0)
                        raise RuntimeError(f"{words[0]} failed:\n{log.read()[-4000:]}") from None
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait()
