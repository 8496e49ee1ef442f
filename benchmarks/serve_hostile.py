"""Does `t2 serve` answer others rightly, and at once, while somebody attacks it?

    python benchmarks/serve_hostile.py                                          the built-in model
    python benchmarks/serve_hostile.py FOLDER --experts experts -- --factors factors --rank 32 --form delta

First every good request is answered alone, then a hundred of them together, which says how long /health takes on this
machine. Then 500 good ones and 200 hostile ones are sent together, while a third process asks /health. Where other work
takes the machine's time, /health says little; `loop_cpu_ms` is the CPU time that the server's event loop took for one
step, in which it answers nobody else.

A good answer that differs from the one alone, a hostile request that is answered 500 (but for an expert that overflows,
whose own requests are), and one that gets no answer, are faults, and there is no time then. Of a model in bf16 the
answers differ by rounding, so it is served in fp32. The row goes to benchmarks/results/serve_hostile.jsonl. After `--`
come options of `t2 serve`.
"""

from __future__ import annotations

import argparse
import asyncio
import atexit
import http.client
import json
import multiprocessing
import os
import random
import runpy
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, NamedTuple

from measure import RESULTS, WrongResult, append, machine, show
from rich.table import Table

from t2kernels import Expert, tiny

TEXT, CHAT, UPLOAD = "/v1/completions", "/v1/chat/completions", "/v1/experts?name=stranger&replace=true"
JSON: dict[str, str] = {"Content-Type": "application/json"}
FILE: dict[str, str] = {"Content-Type": "application/octet-stream"}
TIMES: tuple[str, ...] = ("health_ms", "health_without_attacks_ms", "loop_cpu_ms")
PROMPTS: tuple[str, ...] = ("47+38+59?", "12+30?", "rsx(gcaf)?", "The capital of France is")
SERVE: str = "--as-server"
"""First argument of the process that is the server."""
QUIET: str = "quiet"
"""Status of a connection from which no answer is expected."""


class Attack(NamedTuple):
    """One hostile request. body: bytes; cut: whether the client hangs up before the answer"""

    kind: str
    path: str
    body: bytes
    headers: dict[str, str]
    cut: bool = False


def attacks(expert: bytes, huge: bytes, seed: int = 0) -> Iterator[Attack]:
    """Hostile requests without an end, each kind again and again in another order.

    expert: the file of an expert; huge: of one that overflows
    """
    r = random.Random(seed)

    def text(**fields: Any) -> bytes:
        return json.dumps({"model": "base", "prompt": "1+1?", "max_tokens": 4, **fields}).encode()

    def raw(rest: str) -> bytes:
        return f'{{"model": "base", "max_tokens": 4, {rest}}}'.encode()

    def word(size: int) -> str:
        return "".join(r.choice("abcdefghij") for _ in range(size))

    def kinds() -> Iterator[Attack]:
        many = 1_000_000
        yield Attack("empty lists", TEXT, raw('"prompt": [' + "[]," * many + "[]]"), JSON)
        yield Attack("token ids", TEXT, raw('"prompt": [' + "7," * many + "7]"), JSON)
        yield Attack("token ids that just pass", TEXT, raw('"prompt": [' + "7," * 490_000 + "7]"), JSON)
        yield Attack("token of no vocabulary", TEXT, text(prompt=[10**30, -1]), JSON)
        yield Attack("unknown fields", TEXT, raw(",".join(f'"k{i}": 1' for i in range(90_000))), JSON)
        yield Attack("lists in lists", TEXT, b"[" * r.randrange(1000, 90_000), JSON)
        yield Attack("half a character", TEXT, raw(r'"prompt": "a\ud800"'), JSON)
        yield Attack("long prompt", TEXT, text(prompt="1" * 3_900_000), JSON)
        yield Attack("many prompts", TEXT, text(prompt=["1" * 30_000] * 128), JSON)
        yield Attack("long stop text", TEXT, text(stop="x" * r.randrange(1000, 300_000)), JSON)
        yield Attack("stop texts", TEXT, text(stop=[word(1000) for _ in range(16)], max_tokens=40), JSON)
        yield Attack("biases", TEXT, text(logit_bias={str(i): 1 for i in range(50_000)}), JSON)
        yield Attack("long name", TEXT, text(model=word(1_000_000)), JSON)
        yield Attack("long mixture", TEXT, text(model="mix:" + ",".join(f"{word(5)}=1" for _ in range(2000))), JSON)
        yield Attack("regular expression", TEXT, text(guided_regex="((a{0,900}){0,900}){0,900}b"), JSON)
        yield Attack("long grammar", TEXT, text(guided_grammar="start: " + " | ".join(['"ab"'] * 9000)), JSON)
        yield Attack("choices", TEXT, text(guided_choice=[word(12) for _ in range(1024)], max_tokens=12), JSON)
        deep = '{"type": "array", "items": ' * 400 + "{}" + "}" * 400
        yield Attack("deep schema", TEXT, text(guided_json=deep), JSON)
        yield Attack("no number", TEXT, raw('"prompt": "1", "temperature": NaN'), JSON)
        yield Attack("large numbers", TEXT, text(seed=10**300, top_k=10**30, min_tokens=10**30, temperature=1), JSON)
        yield Attack("64 texts with log-probabilities", TEXT, text(n=64, logprobs=20, max_tokens=12), JSON)
        messages = [{"role": "user", "content": "a"}] * 30_000
        yield Attack("messages", CHAT, json.dumps({"model": "base", "messages": messages}).encode(), JSON)
        yield Attack("messages of nothing", CHAT, raw('"messages": [' + "{}," * 90_000 + "{}]"), JSON)
        yield Attack("tokens to text", "/detokenize", raw('"tokens": [' + "7," * 490_000 + "7]"), JSON)
        yield Attack("no expert", UPLOAD, os.urandom(100_000), FILE)
        yield Attack("half an expert", UPLOAD, expert[: len(expert) // 2], FILE)
        yield Attack("an expert that overflows", UPLOAD.replace("stranger", "huge"), huge, FILE)
        yield Attack("asks the one that overflows", TEXT, text(model="huge", max_tokens=40), JSON)
        yield Attack("a way out", "/v1/experts", json.dumps({"name": "x", "file": "../../etc/passwd"}).encode(), JSON)
        page = {"Origin": "http://evil.example", "Content-Type": "text/plain"}
        yield Attack("page of another site", UPLOAD, expert, page)
        yield Attack("hangs up", TEXT, text(max_tokens=60, stream=True), JSON, cut=True)
        yield Attack("sends half", TEXT, text()[:-5], {**JSON, "Content-Length": "1000000"}, cut=True)

    while True:
        some = list(kinds())
        r.shuffle(some)
        yield from some


def send(port: int, path: str, body: bytes, headers: dict[str, str], cut: bool = False) -> tuple[int | str, bytes]:
    """(status, body) of an answer; QUIET for a client that hangs up."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    try:
        connection.putrequest("POST", path)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            connection.putheader(name, value)
        connection.endheaders(body)
        if cut:
            time.sleep(0.05)
            return QUIET, b""
        answer = connection.getresponse()
        return answer.status, answer.read()
    except OSError as error:
        return type(error).__name__, b""
    finally:
        connection.close()


def fault(attack: Attack, status: int | str) -> bool:
    """Whether a hostile request was answered as it must not be."""
    own = attack.kind.startswith("asks the one")
    return not (status == QUIET or (isinstance(status, int) and (status < 500 or own)))


def attack_all(port: int, asked: Sequence[Attack], clients: int, results: Any = None) -> list[tuple[str, int | str]]:
    """(kind, status) of each of the hostile requests, sent by several clients."""
    with ThreadPoolExecutor(clients) as pool:
        found = [status for status, _ in pool.map(lambda a: send(port, *a[1:]), asked)]
    out = [(a.kind + (" (fault)" if fault(a, s) else ""), s) for a, s in zip(asked, found, strict=True)]
    if results is not None:
        results.put(out)
    return out


def good(port: int, model: str, prompt: str, tokens: int) -> str | None:
    """The text of a good request; None if it was not answered."""
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    status, answer = send(port, TEXT, json.dumps(body).encode(), JSON)
    return json.loads(answer)["choices"][0]["text"] if status == 200 else None


def watch(port: int, begun: Event, over: Event, results: Any) -> None:
    """Ask /health until it is over, and twice at least. Puts the seconds of each answer."""
    begun.set()
    seconds = []
    while not over.is_set() or len(seconds) < 2:
        start = time.perf_counter()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        connection.request("GET", "/health")
        connection.getresponse().read()
        connection.close()
        seconds.append(time.perf_counter() - start)
        time.sleep(0.01)
    results.put(seconds)


def together(
    port: int, jobs: Sequence[tuple], hostile: Sequence[Attack], clients: int, attackers: int
) -> tuple[list[str | None], list[tuple[str, int | str]], list[float]]:
    """(texts of the good requests, what `attack_all` gives, seconds of each answer of /health)"""
    spawn = multiprocessing.get_context("spawn")
    begun, over, seconds, told = spawn.Event(), spawn.Event(), spawn.Queue(), spawn.Queue()
    others = [spawn.Process(target=watch, args=(port, begun, over, seconds))]
    others += [spawn.Process(target=attack_all, args=(port, hostile, attackers, told))] if hostile else []
    for process in others:
        process.start()
    begun.wait(60)
    with ThreadPoolExecutor(clients) as pool:
        found = list(pool.map(lambda job: good(port, *job), jobs))
    answered = told.get() if hostile else []
    over.set()
    health = seconds.get()
    for process in others:
        process.join()
    return found, answered, health


def run(
    port: int, count: int, hostile: Sequence[Attack], tokens: int = 12, clients: int = 16, attackers: int = 4
) -> dict:
    """One run against a server. Raises WrongResult."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request("GET", "/v1/models")
    names = [m["id"] for m in json.loads(connection.getresponse().read())["data"]]
    connection.close()
    names = [n for n in names if n not in ("auto", "classify")][:5]
    names += [f"mix:{names[1]}=0.5,{names[2]}=0.5"] if len(names) > 2 else []
    jobs = [(names[i % len(names)], PROMPTS[i // len(names) % len(PROMPTS)], tokens) for i in range(count)]
    wanted = {job: good(port, *job) for job in dict.fromkeys(jobs)}
    peaceful = together(port, jobs[:100], [], clients, attackers)[2]
    began, start = time.time(), time.perf_counter()
    found, answered, health = together(port, jobs, hostile, clients, attackers)
    took = time.perf_counter() - start
    wrong = sum(text is None or text != wanted[job] for job, text in zip(jobs, found, strict=True))
    faults = Counter(f"{kind}: {status}" for kind, status in answered if kind.endswith("(fault)"))
    if wrong or faults or None in wanted.values():
        raise WrongResult(f"{wrong} of {count} good answers are wrong or missing; faults: {dict(faults)}")
    return {
        "good": count,
        "hostile": len(hostile),
        "wrong": wrong,
        "kinds": len({kind for kind, _ in answered}),
        "statuses": dict(Counter(str(status) for _, status in answered)),
        "began": round(began),
        "seconds": round(took, 1),
        "health_asked": len(health),
        "health_ms": _spread(health),
        "health_without_attacks_ms": _spread(peaceful),
    }


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    hundredths = statistics.quantiles(seconds, n=100, method="inclusive")
    found = {"median": hundredths[49], "p99": hundredths[98], "longest": max(seconds)}
    return {name: round(1000 * s, 1) for name, s in found.items()}


def overflowing(file: Path, into: Path) -> bytes:
    """The file of an expert whose numbers are finite and whose outputs are not."""
    expert = Expert.load(file)
    z = {n: z.new_full(z.shape, 1e19) for n, z in expert.z.items()}
    return Expert(z, expert.manifest, expert.sketch).save(into / "huge").read_bytes()


def main(arguments: Sequence[str] | None = None) -> dict:
    """Start a server, attack it, print and append the row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tiny")
    parser.add_argument("--experts", type=Path, help="folder of experts; the server works on a copy")
    parser.add_argument("--good", type=int, default=500)
    parser.add_argument("--hostile", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=12, help="of a good answer")
    parser.add_argument("--out", type=Path, default=RESULTS / "serve_hostile.jsonl")
    given = list(sys.argv[1:] if arguments is None else arguments)
    cut = given.index("--") if "--" in given else len(given)
    a, options = parser.parse_args(given[:cut]), given[cut + 1 :]
    with socket.socket() as free, tempfile.TemporaryDirectory() as scratch:
        free.bind(("127.0.0.1", 0))
        port, home = free.getsockname()[1], Path(scratch, "experts")
        home.mkdir()
        free.close()
        for file in sorted(a.experts.glob("*.safetensors")) if a.experts else tiny.experts().values():
            shutil.copy(file, home)
        some = sorted(home.iterdir())[0]
        hostile = attacks(some.read_bytes(), overflowing(some, Path(scratch)))
        asked = [next(hostile) for _ in range(a.hostile)]
        command = [sys.executable, __file__, SERVE, str(Path(scratch, "loop")), a.model, "--engine", "transformers"]
        command += ["--dtype", "float32", "--experts", str(home), "--port", str(port), *options]
        with open(Path(scratch, "log"), "wb") as log:
            server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            while _closed(port):
                if server.poll() is not None:
                    raise SystemExit(Path(scratch, "log").read_text())
                time.sleep(0.2)
            row = {"model": Path(a.model).name, **run(port, a.good, asked, a.tokens)}
        finally:
            server.terminate()
            server.wait()
        steps = json.loads(Path(scratch, "loop").read_text())
        row |= {"loop_cpu_ms": _spread([took for at, took in steps if at > row["began"]]), **machine()}
    append(a.out, row)
    show(table([row]))
    return row


def serve(report: Path, arguments: Sequence[str]) -> None:
    """`t2 serve` that notes how long each step of its event loop computed, in seconds of its thread's CPU time."""
    seconds: list[tuple[float, float]] = []
    step = asyncio.events.Handle._run

    def timed(handle: asyncio.events.Handle) -> None:
        start = time.thread_time()
        step(handle)
        seconds.append((time.time(), time.thread_time() - start))

    asyncio.events.Handle._run = timed
    atexit.register(lambda: report.write_text(json.dumps(seconds)))
    sys.argv = ["t2", "serve", *arguments]
    runpy.run_module("t2kernels", run_name="__main__")


def _closed(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) != 0


def table(rows: Sequence[dict]) -> Table:
    """What was found, a line a run."""
    shown = Table(
        "model",
        "good",
        "wrong",
        "hostile",
        "seconds",
        "/health: median, 99th, longest, ms",
        "without attacks",
        "CPU, a step",
    )
    for row in rows:
        health = [", ".join(map(str, row[k].values())) for k in TIMES if k in row]
        shown.add_row(row["model"], *(str(row[k]) for k in ("good", "wrong", "hostile", "seconds")), *health)
    return shown


if __name__ == "__main__":
    serve(Path(sys.argv[2]), sys.argv[3:]) if sys.argv[1:2] == [SERVE] else main()
