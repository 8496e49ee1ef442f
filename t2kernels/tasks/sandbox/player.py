"""The process that runs the program and answers the judge's questions about the names that it defines.

The program may overwrite everything here, and nothing here decides anything.
"""

import builtins
import contextlib
import operator
import sys
import types
from typing import Any

import wire


def play(program: str, requests: int, replies: int) -> None:
    """Load the program, then answer requests until the judge closes its end."""
    objects: list[Any] = []

    def keep(value: Any) -> int:
        objects.append(value)
        return len(objects) - 1

    module = types.ModuleType("answer")
    sys.modules["answer"] = module  # dataclasses and pickle look their module up

    def do(message: Any) -> Any:
        what, *args = message
        if what == "load":
            exec(compile(program, "answer.py", "exec"), vars(module))
            return None
        target, *args = [wire.decode(a, objects.__getitem__) for a in args]
        match what:
            case "name":
                return vars(module)[target]
            case "call":
                return target(*args[0], **args[1])
            case "get":
                return getattr(target, args[0])
            case "set":
                return setattr(target, args[0], args[1])
            case "list":
                return list(target)
            case "item":
                return operator.getitem(target, args[0])
            case "str" | "int" | "float" | "bool" | "len" | "next":
                return getattr(builtins, what)(target)
        raise ValueError(what)

    while True:
        message = wire.receive(requests)
        try:
            reply = {"ok": wire.encode(do(message), keep)}
        except Exception as e:  # SystemExit and the like end the process, as they would a program
            reply = {"error": [type(e).__name__, str(e)[:500]]}
        with contextlib.suppress(Exception):
            sys.stdout.flush()  # what was printed is shown to the caller, and the end of this process is a kill
        wire.send(replies, reply)
