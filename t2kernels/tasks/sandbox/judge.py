"""The process that runs the tests. The program is in another process; a name of the program stands for it here.

To call such a name sends the arguments to the program and returns its reply.
"""

import builtins
import os
import signal
from collections.abc import Iterator
from typing import Any

import wire


class Wrong(Exception):
    """The program raised, died or sent a reply that makes no sense."""


class Line:
    """The connection to the player: one question at a time."""

    def __init__(self, requests: int, replies: int) -> None:
        self.requests: int = requests
        self.replies: int = replies

    def ask(self, what: str, *args: Any) -> Any:
        """Send a question and return the reply. Raises Wrong, or the built-in exception that the program raised."""
        try:
            wire.send(self.requests, [what, *(wire.encode(a, _number) for a in args)])
            reply = wire.receive(self.replies)
            if isinstance(reply, dict) and "error" in reply:
                name, text = map(str, reply["error"])
            else:
                return wire.decode(reply["ok"], lambda number: Remote(self, int(number)))
        except wire.Broken as e:
            raise Wrong(f"the answer's process ended ({e})") from None
        except (ValueError, TypeError, KeyError, RecursionError, MemoryError, ArithmeticError) as e:
            raise Wrong(f"{type(e).__name__}: {e}") from None
        kind = getattr(builtins, name, None)
        if isinstance(kind, type) and issubclass(kind, Exception) and kind is not AssertionError:
            try:
                raised = kind(text)
            except Exception:
                raised = Wrong(f"{name}: {text}")
            raise raised
        raise Wrong(f"{name}: {text}")


class Remote:
    """An object of the program. It equals only itself: the program never decides whether a value is right."""

    __slots__ = ("_line", "_number")

    def __init__(self, line: Line, number: int) -> None:
        object.__setattr__(self, "_line", line)
        object.__setattr__(self, "_number", number)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._line.ask("call", self, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._line.ask("get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._line.ask("set", self, name, value)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._of("list", list))

    def __next__(self) -> Any:
        return self._line.ask("next", self)

    def __getitem__(self, key: Any) -> Any:
        return self._line.ask("item", self, key)

    def __len__(self) -> int:
        return self._of("len", int)

    def __bool__(self) -> bool:
        return self._of("bool", bool)

    def __str__(self) -> str:
        return self._of("str", str)

    def __int__(self) -> int:
        return self._of("int", int)

    def __float__(self) -> float:
        return self._of("float", float)

    def _of(self, what: str, kind: type) -> Any:
        value = self._line.ask(what, self)
        if type(value) is not kind:
            raise Wrong(f"{what} of an object is a {type(value).__name__}")
        return value


def _number(value: Any) -> int:
    if isinstance(value, Remote):
        return value._number
    raise TypeError(f"a {type(value).__name__} cannot be handed to the answer")


def judge(tests: dict[str, Any], line: Line) -> dict[str, Any]:
    """Run the tests. Only a program that reaches their end has passed.

    tests: `names`, the names of the program that they use; `setup` and `tests`, both source.
    Returns {"verdict": "passed", "wrong" or "error", "detail": the reason}.
    """
    names: dict[str, Any] = {"__name__": "tests"}
    try:
        line.ask("load")
        answer = {name: line.ask("name", name) for name in tests["names"]}
        names |= answer  # the setup may use them, and may define stubs of the same names
        exec(compile(tests["setup"], "setup.py", "exec"), names)
        names |= answer
        exec(compile(tests["tests"], "tests.py", "exec"), names)
    except AssertionError as e:
        return {"verdict": "wrong", "detail": f"a test failed {e}".strip()[:500]}
    except BaseException as e:
        text = str(e) if isinstance(e, Wrong) else f"{type(e).__name__}: {e}"
        return {"verdict": "error", "detail": text[:500]}
    return {"verdict": "passed", "detail": ""}


def how_it_ended(pid: int) -> str:
    """How the player ended, in words; "" if it still runs."""
    done, status = os.waitpid(pid, os.WNOHANG)
    if not done:
        return ""
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        return {"SIGKILL": "killed: out of CPU time or memory", "SIGXCPU": "killed: out of CPU time"}.get(
            name, f"killed by {name}"
        )
    return f"exited with {os.WEXITSTATUS(status)}"
