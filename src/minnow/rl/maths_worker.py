"""The process that compares mathematical expressions: a line of JSON in, a word out; it ends itself when one takes too
long.

Started by `maths.py` with nothing of minnow imported. sympy can be sent into computations without end by a few
characters, some of them inside one instruction that no signal interrupts: only the end of a process bounds them.
"""

import faulthandler
import json
import logging
import os
import sys

MEGABYTES = 2048
"""Address space; a power of a power would otherwise take the machine's."""


def main() -> None:
    """Say `ready`, then answer every line {"answer", "reference", "seconds"}: equal, different or unreadable."""
    _limit_memory()
    logging.disable()
    from math_verify import parse, verify

    print("ready", flush=True)
    with open(os.devnull, "w") as nowhere:
        for line in sys.stdin:
            asked = json.loads(line)
            # A watchdog in C that needs no turn of the interpreter: after so many seconds the process is gone.
            faulthandler.dump_traceback_later(asked["seconds"], exit=True, file=nowhere)
            first, second = _readings(asked["reference"])
            gold = parse(first, parsing_timeout=None) or parse(second, parsing_timeout=None)
            answer = parse(asked["answer"], parsing_timeout=None) if gold else []
            equal = bool(gold) and verify(gold, answer, timeout_seconds=None)
            faulthandler.cancel_dump_traceback_later()
            print(("equal" if equal else "different") if gold else "unreadable", flush=True)


def _readings(reference: str) -> tuple[str, str]:
    """As it stands and as LaTeX between dollars, the likelier first: without dollars, math-verify finds a 2 in
    2\\sqrt{2}."""
    is_bare_latex = any(sign in reference for sign in "\\^_{") and not any(
        border in reference for border in ("$", "\\boxed", "\\(", "\\[")
    )
    between = f"${reference}$"
    return (between, reference) if is_bare_latex else (reference, between)


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_AS, (MEGABYTES << 20, MEGABYTES << 20))


if __name__ == "__main__":
    main()
