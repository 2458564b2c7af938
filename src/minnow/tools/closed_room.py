"""The program that runs a model's code: it locks itself in, then runs what comes on standard input.

Started by `sandbox.py` in a process and namespaces of its own, with nothing of minnow imported. It gives up
every access to files but reading Python's own library (Landlock, Linux 5.13; `landlock(7)`), and cannot take it back.
There is no file to write: each could be small, and all together the disk.
"""

import ctypes
import os
import resource
import struct
import sys

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # system calls, the same number on every architecture
EXECUTE, READ_FILE, READ_DIR = 1 << 0, 1 << 2, 1 << 3
RIGHTS_OF_VERSION = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # how many of the low bits each version of Landlock knows
NO_NEW_PRIVILEGES = 38


def lock_files(readable: list[str]) -> None:
    """Deny every path but these, and all writing, for ever. Raises OSError where the kernel has no Landlock."""
    libc = ctypes.CDLL(None, use_errno=True)

    def call(number: int, *arguments: object) -> int:
        result: int = libc.syscall(number, *arguments)
        if result < 0:
            raise OSError(ctypes.get_errno(), "Landlock is not to be had")
        return result

    version = call(CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    every = (1 << RIGHTS_OF_VERSION[min(version, 5)]) - 1
    ruleset = call(CREATE_RULESET, struct.pack("=Q", every), ctypes.c_size_t(8), 0)
    for path in readable:
        if os.path.isdir(path):
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            call(ADD_RULE, ruleset, 1, struct.pack("=Qi", EXECUTE | READ_FILE | READ_DIR, place), 0)
            os.close(place)
    if libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0) != 0:
        raise OSError("no_new_privs was refused")
    call(RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def main() -> None:
    """Lock the room, then run the code of standard input as a program of its own. Arguments: CPU seconds, megabytes."""
    # The limits are set here: code between fork and exec in the calling process is not safe beside its other threads.
    seconds, memory = int(sys.argv[1]), int(sys.argv[2]) << 20
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    code = sys.stdin.read()
    # It counts the processes of a user, and this namespace has a user of its own.
    resource.setrlimit(resource.RLIMIT_NPROC, (8, 8))
    lock_files([os.path.dirname(os.__file__), "/usr/lib", "/lib", "/lib64"])
    exec(compile(code, "<program>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    main()
