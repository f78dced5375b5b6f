"""The routes of a server."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from scalabl.core.errors import UserError
from scalabl.serving.server.adapters import ServedAdapter
from scalabl.serving.server.classify import Classify, rows_asked
from scalabl.serving.server.completions import ChatForm, ChatRequest, CompletionRequest, TextForm, event, usage
from scalabl.serving.server.limits import Guard, Limits, error_body
from scalabl.serving.server.metrics import Metrics
from scalabl.serving.server.page import page
from scalabl.serving.server.texts import Piece, PromptReader, TextAsked, Write
from scalabl.serving.server.worker import Busy, Closing, Job, ModelFailed, ModelWorker

log = logging.getLogger(__name__)
Fields = dict[str, Any]


class ClassifyRequest(BaseModel):
    """What `POST /v1/classify` reads: a text or a row, or a list of them; the adapter may be left out where one alone
    gives labels."""

    model_config = ConfigDict(extra="forbid")
    input: str | Fields | list[str | Fields]
    model: str | None = None


class Unknown(Exception):
    """A request names an adapter that the server does not have, or has for other things."""


class Slow(Exception):
    """An answer did not come in time."""


class Server:
    """The adapters behind their routes; `app` is what an ASGI server runs.

    Args:
        adapters: by name.
        limits: of requests.
        batch_size: texts that share a batch; of rows it is that of each predictor.
        most_waiting: rows that may wait.
    """

    def __init__(
        self,
        adapters: Mapping[str, ServedAdapter],
        limits: Limits,
        *,
        batch_size: int = 16,
        most_waiting: int = 1024,
    ) -> None:
        self.adapters = adapters
        self.limits = limits
        self.begun = int(time.time())
        self.metrics = Metrics()
        self.worker = ModelWorker(self.metrics, most_waiting=most_waiting)
        self.classify = Classify(self.metrics)
        self.write = Write(self.metrics, batch_size)
        self.readers = {
            name: PromptReader(each, limits.prompt) for name, each in adapters.items() if each.draws is not None
        }
        self.app = self._app()

    def _app(self) -> Guard:
        app = FastAPI(title="scalabl", docs_url=None, redoc_url=None, lifespan=self._until_the_end)
        shown = page()
        app.get("/", include_in_schema=False)(lambda: shown)
        app.get("/healthz")(self.healthz)
        app.get("/metrics")(self.metrics_page)
        app.get("/v1/models")(self.models)
        app.post("/v1/classify")(self.classified)
        app.post("/v1/chat/completions")(self.chat)
        app.post("/v1/completions")(self.completed)
        for error, answer in _ERRORS.items():
            app.add_exception_handler(error, answer)
        return Guard(app, self.limits, self.metrics)

    @asynccontextmanager
    async def _until_the_end(self, app: FastAPI) -> AsyncIterator[None]:
        yield
        self.worker.close(timeout=10)

    async def healthz(self) -> Response:
        """Whether the server takes requests."""
        if self.worker.is_alive:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "ending"}, 503)

    async def metrics_page(self) -> Response:
        """What Prometheus reads."""
        return Response(self.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self) -> Response:
        """The adapters, each with what it can be asked."""
        own = {"object": "model", "created": self.begun, "owned_by": "scalabl"}
        data = [{"id": name, **own, "scalabl": each.facts()} for name, each in self.adapters.items()]
        return JSONResponse({"object": "list", "data": data})

    async def classified(self, asked: ClassifyRequest, request: Request) -> Response:
        """For each row its label, or null and why, with its probabilities and how sure they are."""
        adapter = self._that_classifies(asked.model)
        given = asked.input if isinstance(asked.input, list) else [asked.input]
        if not 0 < len(given) <= self.limits.rows:
            raise UserError(f"input has {len(given):,} rows; it must have 1 to {self.limits.rows:,}.")
        job = self.classify.job(adapter, rows_asked(adapter, given))
        answers = await self.answered(job, request)
        return JSONResponse({"object": "list", "model": adapter.name, "data": answers})

    def _that_classifies(self, name: str | None) -> ServedAdapter:
        having = [each for each in self.adapters.values() if each.predictor is not None]
        if name is None and len(having) == 1:
            return having[0]
        if name is None:
            raise Unknown(f"model is left out, and {len(having)} adapters give labels; name one of them.")
        adapter = self.adapter(name)
        if adapter.predictor is None:
            raise Unknown(f"{name} gives no labels; it writes texts.")
        return adapter

    def adapter(self, name: str) -> ServedAdapter:
        """The adapter of a name.

        Raises:
            Unknown: there is none.
        """
        if name not in self.adapters:
            raise Unknown(f"There is no model of this name; GET /v1/models names them: {', '.join(self.adapters)}.")
        return self.adapters[name]

    async def chat(self, asked: ChatRequest, request: Request) -> Response:
        """OpenAI's chat completion, by the average over particles."""
        return await self._texts(asked, ChatForm(asked.model, bool(asked.logprobs)), request)

    async def completed(self, asked: CompletionRequest, request: Request) -> Response:
        """OpenAI's text completion, likewise."""
        return await self._texts(asked, TextForm(asked.model, asked.logprobs is not None), request)

    async def _texts(self, asked: ChatRequest | CompletionRequest, form: ChatForm, request: Request) -> Response:
        adapter = self.adapter(asked.model)
        if adapter.name not in self.readers:
            raise Unknown(f"{adapter.name} writes no texts; it gives labels.")
        if asked.number > self.limits.rows:
            raise UserError(f"{asked.number:,} texts are asked for; it must be 1 to {self.limits.rows:,}.")
        # prompts take time to read, in which others are answered
        texts = await run_in_threadpool(asked.asked, self.readers[adapter.name], self.limits.tokens)
        if asked.stream:
            counts = asked.stream_options is not None and asked.stream_options.include_usage
            return await self._streamed(adapter, texts, form, counts)
        written = await self.answered(self.write.job(adapter, texts), request)
        return JSONResponse(form.whole(written, usage(texts, written)))

    async def _streamed(self, adapter: ServedAdapter, texts: list[TextAsked], form: ChatForm, counts: bool) -> Response:
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Piece] | None]()

        def put(piece: tuple[int, Piece] | None) -> None:
            with suppress(RuntimeError):  # the server has ended
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        job = self.write.job(adapter, texts, lambda i, piece: put((i, piece)))
        self.worker.submit(job).add_done_callback(lambda _: put(None))

        async def next_piece() -> tuple[int, Piece] | None:
            try:
                return await asyncio.wait_for(pieces.get(), self.limits.seconds)
            except TimeoutError:
                raise Slow from None

        async def chunks(piece: tuple[int, Piece] | None) -> AsyncIterator[str]:
            try:
                for i in range(len(texts)):
                    if (begun := form.first(i)) is not None:
                        yield event(begun)
                while piece is not None:
                    yield event(form.next(*piece))
                    piece = await next_piece()
                written = job.answer.result()
                for i, text in enumerate(written):
                    yield event(form.last(i, text))
                if counts:
                    yield event(form.counted(usage(texts, written)))
                yield event("[DONE]")
            except (Slow, ModelFailed):  # behind a status that was sent
                yield event(error_body(500, "The text could not be written to its end."))
            finally:
                job.give_up()

        try:
            first = await next_piece()
        except BaseException:
            job.give_up()
            raise
        if first is None:
            job.answer.result()  # what went wrong before the first token
        return StreamingResponse(chunks(first), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    async def answered(self, job: Job, request: Request) -> Any:
        """A job's result, waited for as long as the client does, and no longer than the limit.

        Raises:
            Slow: it did not come in time.
            UserError, Busy, Closing, ModelFailed: as the worker has it.
        """
        result = asyncio.wrap_future(self.worker.submit(job))
        left = asyncio.ensure_future(_left(request))
        try:
            await asyncio.wait({result, left}, timeout=self.limits.seconds, return_when=asyncio.FIRST_COMPLETED)
            if result.done():
                return result.result()
            raise Slow
        finally:
            job.give_up()
            left.cancel()
            with suppress(asyncio.CancelledError):
                await left


async def _left(request: Request) -> None:
    """Wait until the client is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _refusal(status: int, sentence: str, code: str | None = None, **headers: str) -> Response:
    return JSONResponse(error_body(status, sentence, code), status, headers=headers)


async def _invalid(_: Request, error: Any) -> Response:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part not in ("body", "str"))
    return _refusal(400, f"{f'{where}: ' if where else ''}{first['msg']}.")


async def _wrong(_: Request, error: Any) -> Response:
    return _refusal(400, str(error))


async def _unknown(_: Request, error: Any) -> Response:
    return _refusal(404, str(error), "model_not_found")


async def _busy(_: Request, error: Any) -> Response:
    seconds = str(error.retry_after)
    return _refusal(429, f"Too many rows wait; ask again in {seconds} s.", **{"Retry-After": seconds})


async def _closing(_: Request, error: Any) -> Response:
    return _refusal(503, "The server is ending and takes nothing more; ask it when it is back.")


async def _slow(_: Request, error: Any) -> Response:
    return _refusal(503, "The answer did not come in time; ask again.", **{"Retry-After": "5"})


async def _failed(_: Request, error: Any) -> Response:
    return _refusal(500, "The server failed at this request; its log says why.")


async def _http(_: Request, error: Any) -> Response:
    words = {404: "There is no such path.", 405: "This path is asked by another method."}
    return _refusal(error.status_code, words.get(error.status_code, "The request cannot be read."))


_ERRORS: dict[Any, Any] = {
    RequestValidationError: _invalid, UserError: _wrong, Unknown: _unknown, Busy: _busy, Closing: _closing,
    Slow: _slow, ModelFailed: _failed, HTTPException: _http, Exception: _failed,
}  # fmt: skip
