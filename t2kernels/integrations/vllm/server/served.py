"""`ServedExperts`: the experts of a running server by name. Expert files, LoRA adapters, mixtures, and "auto".

Each of them becomes an entry in vLLM's own list of adapters, so the server treats it as an adapter everywhere. An entry
is never changed: replacing an expert makes a new entry with a new id, and running requests finish with the entry that
they began with.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import OrderedDict
from collections.abc import Awaitable, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any

from t2kernels import InputError, MissingFileError
from t2kernels.adapt.question import Question, asked_of
from t2kernels.experts.exchange.peft_files import is_adapter
from t2kernels.experts.expert import Expert, ExpertError
from t2kernels.experts.names import AUTO, MIX, parse_mixture, write_mixture
from t2kernels.integrations.vllm import requests
from t2kernels.integrations.vllm.engine.check import check_request
from t2kernels.integrations.vllm.rollouts.memory import MEMORY
from t2kernels.rollout.chat import encode, has_template, user_message
from t2kernels.rollout.labels import encode_labels, split_labels

from .spool import Spool

DEAD_AFTER = 1.0
"""Seconds between two checks that the engine is alive, while a call to it runs."""
MIXTURES = 256
"""Entries of mixtures that are kept. Clients can ask for any number of them."""


class Refused(Exception):
    """A request that is refused. status, message: of the answer to the client."""

    def __init__(self, status: HTTPStatus, message: str):
        super().__init__(message)
        self.status = status


def last_text(chat: Any) -> str:
    """What the last message of a chat says. Raises Refused for what is no chat, or has no text there."""
    content = chat[-1].get("content") if isinstance(chat, list) and chat and isinstance(chat[-1], Mapping) else None
    if isinstance(content, list):
        content = "\n".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    if not isinstance(content, str) or not content:
        raise Refused(
            HTTPStatus.BAD_REQUEST, 'model "auto" chooses by one prompt in text, or by a chat that ends in text'
        )
    return content


class ServedExperts:
    """engine: vLLM's engine client; models: the server's `OpenAIServingModels`; config: `VllmConfig`
    roots: directories that expert files may lie in; tiny: True for the built-in model
    """

    engine: Any
    models: Any
    config: Any
    roots: list[Path]
    spool: Spool
    tiny: bool

    def __init__(self, engine: Any, models: Any, config: Any, roots: Sequence[Path], tiny: bool = False):
        self.engine, self.models, self.config, self.tiny = engine, models, config, tiny
        self.roots = [Path(r).expanduser().resolve() for r in roots]
        self.spool = Spool()
        self._mixtures: OrderedDict[str, str] = OrderedDict()  # name -> its address, least recently used first
        self._lock = asyncio.Lock()

    # --- files

    async def load(self, name: str, path: str, replace: bool = False) -> None:
        """Serve the expert in a file under a name; with `replace` also if the name is in use.

        Raises Refused, and then nothing has changed.
        """
        if not name or name == AUTO or name.startswith(MIX) or self.models.is_base_model(name):
            raise Refused(
                HTTPStatus.BAD_REQUEST,
                f"an expert cannot be called {name!r}: the name is reserved, or the base model's",
            )
        async with self._lock:
            if name in self.models.lora_requests and not replace:
                raise Refused(
                    HTTPStatus.BAD_REQUEST, f"expert {name!r} is being served already; pass load_inplace to replace it"
                )
            await self._serve(name, await asyncio.to_thread(self._address, path))

    async def serve(self, name: str, where: str) -> None:
        """Serve the expert at an address that the engine can read, also under a name that is in use. Raises Refused."""
        if name == AUTO or self.models.is_base_model(name):
            raise Refused(HTTPStatus.BAD_REQUEST, f"an expert cannot be called {name!r}: the name is reserved")
        async with self._lock:
            await self._serve(name, where)

    async def call(self, method: str, *args: Any) -> list[Any]:
        """Call a method of every worker. Raises Refused if the engine has died."""
        return await self._answered(self.engine.collective_rpc(method, args=args))

    def used(self) -> set[str]:
        """The addresses that are served, and those of requests that wait or run."""
        asked = (state.lora_request for state in list(self.engine.output_processor.request_states.values()))
        return {r.lora_path for r in (*self.models.lora_requests.values(), *asked) if r is not None}

    async def unload(self, name: str) -> None:
        """Stop serving an expert; running requests finish with it. Raises Refused."""
        async with self._lock:
            if self.models.lora_requests.pop(name, None) is None:
                raise Refused(HTTPStatus.NOT_FOUND, f"no expert {name!r} is being served")
            self._mixtures.pop(name, None)

    def _address(self, path: str) -> str:
        """The address of a copy of an expert's file. Raises Refused."""
        try:
            return self.spool.take(self._allowed(path), {r.lora_path for r in self.models.lora_requests.values()})
        except (ExpertError, InputError, MissingFileError) as e:  # a folder without its weights is not a full disk
            raise Refused(HTTPStatus.BAD_REQUEST, str(e)) from None
        except OSError as e:
            raise Refused(HTTPStatus.INSUFFICIENT_STORAGE, f"{path} could not be copied: {e}") from None

    def _allowed(self, path: str) -> Path:
        """The file at a path that a client gave. Raises Refused if it does not exist or lies outside the roots."""
        try:
            file = requests.place_of(path)
        except ExpertError as e:
            raise Refused(HTTPStatus.NOT_FOUND, str(e)) from None
        if not any(file.is_relative_to(root) for root in self.roots):
            raise Refused(HTTPStatus.FORBIDDEN, f"{path} is not under a directory that experts are served from")
        return file

    async def _serve(self, name: str, where: str) -> None:
        """Check the expert at an address, give it to the engine, and make its entry. Raises Refused."""
        from vllm.exceptions import LoRAAdapterNotFoundError, VLLMValidationError
        from vllm.lora.request import LoRARequest

        request = LoRARequest(name, self.models.lora_id_counter.inc(1), where)
        try:
            await asyncio.to_thread(check_request, self.config, request)
        except LoRAAdapterNotFoundError as e:
            raise Refused(HTTPStatus.NOT_FOUND, str(e)) from None
        except VLLMValidationError as e:
            raise Refused(HTTPStatus.BAD_REQUEST, str(e)) from None
        await self._answered(self.engine.add_lora(request))
        self.models.lora_requests[name] = request

    async def _answered(self, asked: Awaitable[Any]) -> Any:
        """Await a call to the engine. Raises Refused if the engine has died.

        When its engine dies, vLLM 0.32 fails requests but leaves other calls waiting for ever: so look at the engine.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        task = asyncio.ensure_future(asked)
        try:
            while not task.done() and not self.engine.errored:
                await asyncio.wait([task], timeout=DEAD_AFTER)
            if task.done():
                return task.result()
        except EngineDeadError:
            pass
        except Exception:
            # A dying worker fails its call a moment before the engine is marked as dead.
            await asyncio.sleep(DEAD_AFTER)
            if not self.engine.errored:
                raise
        finally:
            task.cancel()
        raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, "the engine has died; the server ends, start it again")

    # --- mixtures and "auto"

    async def resolve(self, model: str, prompt: Any = None) -> str:
        """The entry that answers a request for `model`: a mixture gets one, "auto" chooses one by the prompt.

        Raises Refused.
        """
        if model.startswith(MIX):
            return await self._mix(model)
        return await self.choose(prompt) if model == AUTO else model

    async def _mix(self, asked: str) -> str:
        try:
            weights = parse_mixture(asked)
        except ValueError as e:
            raise Refused(HTTPStatus.BAD_REQUEST, f"model {e}") from None
        name = write_mixture(weights)
        async with self._lock:
            missing = [n for n in weights if n not in self.models.lora_requests or n.startswith(MIX)]
            if missing:
                raise Refused(HTTPStatus.NOT_FOUND, f"model {asked!r}: no expert {missing[0]!r} is being served")
            parts = sorted((self.models.lora_requests[n].lora_path, w) for n, w in weights.items())
            where = requests.mixture(parts)
            if self._mixtures.get(name) != where:  # new, or an expert in it was replaced
                await self._serve(name, where)
            self._mixtures[name] = where
            self._mixtures.move_to_end(name)
            while len(self._mixtures) > MIXTURES:
                self.models.lora_requests.pop(self._mixtures.popitem(last=False)[0], None)
        return name

    async def choose(self, prompt: Any) -> str:
        """The expert of the label that is likeliest after the question (arXiv 2501.06252, section 3.2), or the base
        model's name.

        prompt: text, or a chat. An expert whose file holds a question answers it; else one that is called "classify";
            else the base model
        """
        if not isinstance(prompt, str):
            prompt = user_message(last_text(prompt))
        base = self.models.base_model_paths[0].name
        judge, question = self.question()
        labels = list(question.labels)
        scores = await self.log_likelihoods(question.ask(prompt), labels, judge)
        chosen = question.labels[labels[max(range(len(labels)), key=scores.__getitem__)]]
        return chosen if chosen in self.models.lora_requests else base

    def question(self) -> tuple[str | None, Question]:
        """(who is asked, None: the base model; the question). Raises Refused if there is nothing to choose from."""
        manifests = {
            name: self._manifest(name)
            for name, request in self.models.lora_requests.items()
            if name not in self._mixtures and not request.lora_path.startswith(MEMORY)
        }
        try:
            return asked_of(manifests, self.engine.get_tokenizer(), self.tiny)
        except ValueError as e:
            raise Refused(HTTPStatus.BAD_REQUEST, f'model "auto" cannot choose: {e}') from None

    def _manifest(self, name: str) -> dict:
        (file,) = requests.files(self.models.lora_requests[name].lora_path)
        return {} if is_adapter(file) else Expert.load(Path(file)).manifest

    async def log_likelihoods(self, asked: Any, labels: Sequence[str], judge: str | None) -> list[float]:
        """log p(label | asked) of each label by requests to the engine; 0 and -inf where one token decides, and only
        the best is needed."""
        tokenizer = self.engine.get_tokenizer()
        if not isinstance(asked, str) and not has_template(tokenizer):
            asked = asked[-1]["content"]  # the server was given a template of its own, or has none: asked as text
        common, rest = split_labels(encode_labels(tokenizer, labels))
        prompt = encode(tokenizer, [asked])[0] + common
        if all(len(r) == 1 for r in rest):
            out = await self._ask(prompt, judge, allowed_token_ids=sorted({r[0] for r in rest}))
            return [0.0 if r[0] == out.outputs[0].token_ids[0] else float("-inf") for r in rest]
        outs = await asyncio.gather(*[self._ask(prompt + r, judge, prompt_logprobs=0) for r in rest])
        return [
            sum(places[t].logprob for places, t in zip(out.prompt_logprobs[-len(r) :], r, strict=True))
            for out, r in zip(outs, rest, strict=True)
        ]

    async def _ask(self, tokens: list[int], judge: str | None, **settings: Any) -> Any:
        from vllm import SamplingParams

        request = None if judge is None else self.models.lora_requests[judge]
        sampling = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, **settings)
        name = f"auto-{uuid.uuid4().hex}"

        async def outputs() -> list:
            return [
                out
                async for out in self.engine.generate(
                    {"prompt_token_ids": tokens}, sampling, name, lora_request=request
                )
            ]

        try:
            return (await self._answered(outputs()))[-1]
        except ValueError as e:  # too long for the model, with the question around it
            raise Refused(HTTPStatus.BAD_REQUEST, f'model "auto" could not ask about this prompt: {e}') from None
