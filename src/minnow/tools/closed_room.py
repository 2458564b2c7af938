"""The program that runs a model's code: it locks itself in, then runs what comes on standard input.

Started by `sandbox.py` in a process and namespaces of its own, with nothing of minnow imported. First the world goes:
its root becomes an empty folder, in which nothing but Python's own library is seen, read-only. Landlock alone would
not do: it lets the owner of a file change its mode and its times, and anybody talk to the sockets that lie beside
files (a desktop's D-Bus, Docker's), which a network namespace does not part either. Then it gives up every access to
files but reading that library (Landlock, Linux 5.13; `landlock(7)`), and cannot take it back. There is no file to
write: each could be small, and all together the disk.
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
BIND, RECURSIVE = 1 << 12, 1 << 14  # mount(2)
MOUNT_SETATTR, WHOLE_TREE, READ_ONLY = 442, 0x8000, 1  # mount_setattr(2), Linux 5.12
CAPABILITIES_VERSION = 0x20080522  # capset(2)

LIBC = ctypes.CDLL(None, use_errno=True)


def leave_the_world(room: str, readable: list[str]) -> None:
    """Make the folder `room` the root, with nothing in it but these folders, and drop the rights that this takes.

    Raises OSError where the kernel does not allow it.
    """

    def call(name: str, *arguments: object) -> None:
        if getattr(LIBC, name)(*arguments) != 0:
            raise OSError(ctypes.get_errno(), f"{name} was refused")

    call("mount", b"room", os.fsencode(room), b"tmpfs", ctypes.c_ulong(0), None)
    for path in filter(os.path.isdir, readable):
        os.makedirs(room + path, exist_ok=True)
        call("mount", os.fsencode(path), os.fsencode(room + path), None, ctypes.c_ulong(BIND | RECURSIVE), None)
    read_only = struct.pack("=4Q", READ_ONLY, 0, 0, 0)
    call("syscall", MOUNT_SETATTR, -1, os.fsencode(room), WHOLE_TREE, read_only, ctypes.c_size_t(len(read_only)))
    os.chroot(room)
    os.chdir("/")
    call("capset", struct.pack("=2I", CAPABILITIES_VERSION, 0), bytes(24))  # or it could leave the folder again


def lock_files(readable: list[str]) -> None:
    """Deny every path but these, and all writing, for ever. Raises OSError where the kernel has no Landlock."""

    def call(number: int, *arguments: object) -> int:
        result: int = LIBC.syscall(number, *arguments)
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
    if LIBC.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0) != 0:
        raise OSError("no_new_privs was refused")
    call(RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def main() -> None:
    """Lock the room, then run the code of standard input as a program of its own.

    Arguments: CPU seconds, megabytes, an empty folder to be the room.
    """
    os.setsid()  # a signal to one's own process group reaches those of it outside the namespace: the training run
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
    readable = [os.path.dirname(os.__file__), "/usr/lib", "/lib", "/lib64"]
    leave_the_world(sys.argv[3], readable)
    lock_files(readable)
    exec(compile(code, "<program>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    main()
