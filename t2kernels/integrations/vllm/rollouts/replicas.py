"""`ReplicaEngine`: running servers of `t2 serve --engine vllm` that draw for a trainer. It needs no vLLM here.

Each replica is told of every policy and answers with the digest of what it took; prompts are spread over them.
"""

from __future__ import annotations

import http.client
import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

from torch import Tensor

from t2kernels import InputError, StateError
from t2kernels.experts.expert import Expert
from t2kernels.rollout.engines import Draw, RolloutEngine
from t2kernels.rollout.generation import Rollout, Sampler

from . import memory
from .unpadded import tokens_of, whole_names

TIMEOUT = 600.0
"""Seconds for one answer. A prompt may wait for all others."""
KEY = "VLLM_API_KEY"
"""The environment variable with the key of the servers, the one that vLLM reads as well."""
UPLOAD = "/v1/upload_lora_adapter"
PROCESSED = "processed_logprobs"
EACH = 64
"""Requests at a time to one replica."""
Item = TypeVar("Item")
Out = TypeVar("Out")


class ReplicaEngine(RolloutEngine):
    """urls: of the servers, comma-separated; sampler: the trainer's; timeout: seconds for one answer

    Raises InputError for an address that is none.
    """

    def __init__(self, urls: str, sampler: Sampler, timeout: float = TIMEOUT) -> None:
        self.urls: list[str] = [url.strip().rstrip("/") for url in urls.split(",") if url.strip()]
        for url in self.urls:
            if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
                raise InputError(f"{url!r} is no server's address; wanted http://HOST:PORT")
        self.sampler: Sampler = sampler
        self.timeout: float = timeout
        self._seen: set[str] = set()
        self._raw: list[str] = []  # replicas whose log-probabilities are those before the temperature
        self._seeded: set[str] = set()  # replicas that take seeds
        self._base: dict[str, str] = {}  # url -> its name of the base model
        self._threads = ThreadPoolExecutor(EACH * len(self.urls), "replica")

    def publish(self, policy: str, expert: Expert) -> int:
        """As `RolloutEngine.publish`, to all replicas at a time."""
        data, wanted = memory.pack(expert, whole=whole_names(policy, self._seen)), expert.digest()

        def send(url: str) -> None:
            answer = self._ask(url, f"{UPLOAD}?lora_name={quote(policy)}", data, {"x-digest": wanted}, policy)
            if answer.get("digest") != wanted:
                raise StateError(
                    f"replica {url} took {policy!r} with digest {answer.get('digest')}, not {wanted}: its requests "
                    "would be answered by another policy"
                )
            if answer.get("logprobs_mode") != PROCESSED and url not in self._raw:
                self._raw.append(url)
            if answer.get("takes_seeds"):
                self._seeded.add(url)

        self._all(send, self.urls)
        return len(data) * len(self.urls)

    def draw(self, ids: Tensor, mask: Tensor, policies: Sequence[str | None], how: Draw) -> Rollout:
        """As `RolloutEngine.draw`. Row i goes to replica i modulo their number.

        Raises StateError that names the replica: it does not answer, refuses, or would give other log-probabilities.
        """
        if self._raw and how.temperature not in (0, 1):
            raise StateError(
                f"replica {self._raw[0]} gives log-probabilities before the temperature, and temperature="
                f"{how.temperature}: start it with --logprobs-mode {PROCESSED}"
            )
        prompts, n, greedy = tokens_of(ids, mask), how.samples, how.temperature == 0

        def ask(i: int) -> list[dict[str, Any]]:
            url = self.urls[i % len(self.urls)]
            seed = None if greedy or url not in self._seeded else how.seed + i * n
            body = {
                "model": policies[i] or self._base_of(url), "prompt": prompts[i], "n": 1 if greedy else n,
                "max_tokens": self.sampler.max_new_tokens, "temperature": how.temperature, "top_p": 1.0, "top_k": 0,
                "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
                "logprobs": 0, "return_token_ids": True, "ignore_eos": True, "skip_special_tokens": False,
                "stop_token_ids": list(self.sampler.ends), "seed": seed,
            }  # fmt: skip
            what = policies[i] or "the base model"
            answer = self._ask(url, "/v1/completions", json.dumps(body).encode(), {}, what)
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            for choice in choices:
                if not choice.get("token_ids"):
                    raise StateError(f"replica {url} answered {what!r} without token ids: it is no server of vLLM 0.32")
            return choices * (n if greedy else 1)

        found = [choice for choices in self._all(ask, range(len(prompts))) for choice in choices]
        return Rollout.of(
            [tokens for tokens in prompts for _ in range(n)],
            [choice["token_ids"] for choice in found],
            self.sampler.pad,
            ids.device,
            [choice["logprobs"]["token_logprobs"] for choice in found],
        )

    def drop(self, policies: Sequence[str]) -> None:
        """As `RolloutEngine.drop`."""
        pairs = [(url, policy) for url in self.urls for policy in policies]
        self._all(
            lambda pair: self._ask(
                pair[0], "/v1/unload_lora_adapter", json.dumps({"lora_name": pair[1]}).encode(), {}, pair[1]
            ),
            pairs,
        )

    def close(self) -> None:
        """End the threads. The servers go on."""
        self._threads.shutdown(cancel_futures=True)

    def _all(self, do: Callable[[Item], Out], items: Iterable[Item]) -> list[Out]:
        """What `do` gives for each item, at a time. Raises the first error, when all have ended."""
        waiting = [self._threads.submit(do, item) for item in items]
        return [one.result() for one in waiting]

    def _base_of(self, url: str) -> str:
        if url not in self._base:
            self._base[url] = self._ask(url, "/v1/models", None, {}, "its models")["data"][0]["id"]
        return self._base[url]

    def _ask(self, url: str, path: str, body: bytes | None, headers: dict[str, str], what: str) -> dict[str, Any]:
        """The answer of one replica as JSON. what: for the message. Raises StateError with the replica's address."""
        parts = urlsplit(url)
        connect = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        kind = "application/octet-stream" if "x-digest" in headers else "application/json"
        headers = {"Content-Type": kind, **headers}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        connection = connect(parts.hostname or "", parts.port, timeout=self.timeout)
        try:
            connection.request("GET" if body is None else "POST", parts.path + path, body, headers)
            answer = connection.getresponse()
            status, text = answer.status, answer.read()
        except (OSError, http.client.HTTPException) as e:
            raise StateError(f"replica {url} does not answer about {what!r} ({e!r}): is its server running?") from None
        finally:
            connection.close()
        if status != 200:
            raise StateError(f"replica {url} refused {what!r}: HTTP {status}, {text[:300].decode(errors='replace')}")
        try:
            return dict(json.loads(text))
        except ValueError:
            raise StateError(f"replica {url} answered {what!r} with {text[:80]!r}; wanted JSON") from None
