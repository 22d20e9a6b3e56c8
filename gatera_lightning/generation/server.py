"""An HTTP server with OpenAI's endpoints for one adapted model, made of parts of ``transformers serve``."""

import asyncio
import logging
import math
import socket
import uuid
from collections.abc import Callable, Coroutine
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from jinja2 import TemplateError
from starlette.responses import Response

from gatera_lightning.errors import ConfigError
from gatera_lightning.generation.served_model import (
    ChatRequests,
    CompletionRequests,
    OneModelGeneration,
    ServedModel,
)

log = logging.getLogger(__name__)

_ROLES = ("system", "developer", "user", "assistant", "tool")

_SECONDS_TO_FINISH = 3
"""How long requests may take to finish after a signal."""

_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    **{name: (None, False) for name in ("logprobs", "audio", "functions", "function_call", "prediction")},
    **{name: (None,) for name in ("modalities", "reasoning_effort", "tool_choice", "web_search_options")},
    **{name: (None, 0) for name in ("top_logprobs", "presence_penalty")},
    **{name: (None, "", {}) for name in ("response_format", "generation_config", "suffix")},
    **{name: (None, 1) for name in ("n", "best_of")},
    "echo": (None, False),
}
"""Fields that Transformers ignores, or that bypass our settings -> values that mean nothing else."""


def listening_socket(host: str, port: int) -> socket.socket:
    """Reserve an address, before anything expensive is loaded.

    Args:
        host: Name or address of an interface of this machine.
        port: A port; 0 takes a free one.

    Raises:
        ConfigError: The address cannot be used.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError):
        raise ConfigError(
            f"--host: {host!r} is unknown; accepted: an address of this machine, such as 127.0.0.1"
        ) from None
    found = socket.socket(family, kind, protocol)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind(address)
        found.listen(128)  # two programs could both bind, but only one can listen
    except OSError as error:
        found.close()
        raise ConfigError(
            f"--port: {port} on {host} cannot be used ({error.strerror}); accepted: a free port, or 0 for any"
        ) from None
    return found


def serve_forever(model: ServedModel, listening: socket.socket) -> None:
    """Answer requests until a signal arrives, whose handler then runs.

    Args:
        model: The model.
        listening: What :func:`listening_socket` returned.
    """
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # errors of requests are logged below
    logging.getLogger("transformers").setLevel(logging.ERROR)  # a warning per request
    config = uvicorn.Config(
        build_app(model),
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=_SECONDS_TO_FINISH,
    )
    uvicorn.Server(config).run(sockets=[listening])


def build_app(model: ServedModel) -> FastAPI:
    """Build the application: chat completions, completions, the list of models, and a health check.

    Args:
        model: The model.
    """
    generation = OneModelGeneration(model.generator)
    chat, completion = ChatRequests(model, generation), CompletionRequests(model, generation)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: dict[str, Any]) -> Response:
        _check(body, _messages_problem)
        return await _while_connected(request, chat.handle_request(body, f"chatcmpl-{uuid.uuid4().hex}"))

    @app.post("/v1/completions")
    async def completions(request: Request, body: dict[str, Any]) -> Response:
        _check(body, _prompt_problem)
        return await _while_connected(request, completion.handle_request(body, f"cmpl-{uuid.uuid4().hex}"))

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": model.get_gen_models()})

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    async def refuse(_: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 400
        return _error(status, error.detail if isinstance(error, HTTPException) else _one_line(error))

    async def fail(_: Request, error: Exception) -> Response:
        log.error("a request failed: %s", _one_line(error))
        return _error(500, _one_line(error))

    # What a request of another form raises in Transformers' handlers, the template and the decoding.
    for kind in (HTTPException, RequestValidationError, KeyError, TypeError, ValueError, TemplateError):
        app.add_exception_handler(kind, refuse)
    app.add_exception_handler(AttributeError, refuse)
    app.add_exception_handler(Exception, fail)
    return app


async def _while_connected(request: Request, answer: Coroutine[Any, Any, Response]) -> Response:
    """Return an answer, or cancel it as soon as the client disconnects.

    A streamed answer that has begun is cancelled by Starlette.
    """
    answering = asyncio.ensure_future(answer)
    waiting = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((answering, waiting), return_when=asyncio.FIRST_COMPLETED)
        return await answering if answering.done() else Response(status_code=499)  # nobody reads it
    finally:
        answering.cancel()
        waiting.cancel()


async def _disconnected(request: Request) -> None:
    """Return once the client has disconnected; the body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _check(body: dict[str, Any], problem: Callable[[dict[str, Any]], str]) -> None:
    """Raise HTTPException if a request cannot be answered as it says."""
    if found := problem(body) or _number_problem(body):
        raise HTTPException(400, found)
    for name, accepted in _WITHOUT_EFFECT.items():
        if name in body and body[name] not in accepted:
            raise HTTPException(400, f"{name}: {body[name]!r:.60} is not supported; leave it out")


def _messages_problem(body: dict[str, Any]) -> str:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        return "messages: accepted: a list of at least one message"
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            return f"messages[{number}].role: accepted: {', '.join(_ROLES)}"
        content = message.get("content")
        if not isinstance(content, str | list) and not (content is None and message.get("tool_calls")):
            return f"messages[{number}].content: accepted: a text, or a list of texts"
        for part in content if isinstance(content, list) else ():
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part["text"], str):
                return f"messages[{number}].content: accepted: parts of the type text"
    if not isinstance(body.get("tools"), list | None):
        return "tools: accepted: a list"
    return ""


def _prompt_problem(body: dict[str, Any]) -> str:
    prompt = body.get("prompt")
    return "" if isinstance(prompt, str) and prompt else "prompt: accepted: a text"


def _number_problem(body: dict[str, Any]) -> str:
    checks: dict[str, tuple[Callable[[Any], bool], str]] = {
        "temperature": (lambda value: _is_number(value) and value >= 0, "a number of at least 0"),
        "top_p": (lambda value: _is_number(value) and 0 < value <= 1, "a probability above 0, up to 1"),
        "frequency_penalty": (lambda value: _is_number(value) and -1 < value <= 2, "a number up to 2"),
        "seed": (lambda value: _is_integer(value) and 0 <= value < 2**63, "an integer of at least 0"),
        "stream": (lambda value: isinstance(value, bool), "true, false"),
        "stop": (_is_stop, "a text, or a list of texts"),
    }
    length: tuple[Callable[[Any], bool], str] = (
        lambda value: _is_integer(value) and value >= 1,
        "an integer of at least 1",
    )
    checks |= dict.fromkeys(("max_tokens", "max_completion_tokens"), length)
    for name, (valid, accepted) in checks.items():
        if body.get(name) is not None and not valid(body[name]):
            return f"{name}: {body[name]!r:.60}; accepted: {accepted}"
    return ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_stop(value: Any) -> bool:
    texts = value if isinstance(value, list) else [value]
    return bool(texts) and all(isinstance(text, str) and text for text in texts)


def _error(status: int, message: Any) -> Response:
    """An error as OpenAI's clients read it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": str(message), "type": kind}}, status_code=status)


def _one_line(error: Exception) -> str:
    if isinstance(error, RequestValidationError):
        return "the body is no JSON object"
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
