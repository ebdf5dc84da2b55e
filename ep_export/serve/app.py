"""The application: routes, who may use them, and what is said when something goes wrong."""

from __future__ import annotations

import hmac
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from ep_export.errors import UserError
from ep_export.serve.answers import model_card
from ep_export.serve.api_error import ApiError, as_api_error
from ep_export.serve.chat import ChatCompletions
from ep_export.serve.metrics import Metrics

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from ep_export.bundle import Manifest
    from ep_export.serve.limits import Limits
    from ep_export.serving import Engine

__all__ = ["create_app"]

_PAGE = Path(__file__).parent / "page"
_PAGE_FILES = {
    "/": "index.html",
    "/page.css": "page.css",
    "/page.js": "page.js",
    "/icon.svg": "icon.svg",
}
_KEYED = ("/v1/", "/metrics")
_COUNTED = frozenset({"/v1/chat/completions", "/v1/models", "/healthz", "/metrics", "/"})
_HEADERS = {
    # The page is these files and what this server answers; nothing else may run, load or frame it.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def create_app(
    engine: Engine,
    manifest: Manifest,
    *,
    name: str,
    limits: Limits,
    key: str | None = None,
    hosts: Sequence[str] = ("*",),
) -> tuple[Starlette, ChatCompletions]:
    """The application and its endpoint for chats, which a server that ends tells to stop.

    Args:
        engine: Answers.
        manifest: The bundle's.
        name: Of the model.
        limits: Of requests.
        key: What clients must show; None lets everybody in.
        hosts: Names this server may be called by.
    """
    chat = ChatCompletions(engine, manifest, name=name, limits=limits)
    metrics = Metrics(engine)
    card = model_card(name, manifest, created=int(time.time()), pictures=limits.pictures)

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [card]})

    async def model(request: Request) -> Response:
        if request.path_params["name"] != name:
            told = f"there is no model {request.path_params['name']!r}, this server has {name!r}"
            raise ApiError(404, told, param="model", code="model_not_found")
        return JSONResponse(card)

    async def health(_: Request) -> Response:
        stats = engine.stats()
        if engine.closed:
            raise ApiError(503, "the engine has stopped", code="engine_stopped")
        return JSONResponse({"status": "ok", "waiting": stats.waiting, "slots_in_use": stats.slots_in_use})

    async def scrape(_: Request) -> Response:
        return Response(metrics.text(), media_type=metrics.content_type)

    app = Starlette(
        routes=[
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/healthz", health),
            Route("/metrics", scrape),
            *(Route(path, _page_file(file)) for path, file in _PAGE_FILES.items()),
        ],
        middleware=[
            Middleware(_Outermost, metrics=metrics),
            Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False),
            Middleware(_KeyCheck, key=key),
        ],
        exception_handlers={
            ApiError: _refuse,
            UserError: _refuse,
            HTTPException: _refuse_http,
            Exception: _refuse,  # the server logs it too
        },
    )
    return app, chat


def _page_file(name: str) -> Callable[[Request], Awaitable[Response]]:
    async def page_file(_: Request) -> Response:
        return FileResponse(
            _PAGE / name, headers={"Cache-Control": "no-cache"}
        )  # asked for again, by its ETag

    return page_file


async def _refuse(_: Request, error: Exception) -> Response:
    refused = as_api_error(error)
    return JSONResponse(refused.body, refused.status, headers=refused.headers)


async def _refuse_http(request: Request, error: Exception) -> Response:
    """What starlette refuses by itself: unknown paths and methods."""
    assert isinstance(error, HTTPException)  # noqa: S101 - what it is registered for
    told = f"{request.method} {request.url.path}: {error.detail}"
    refused = ApiError(error.status_code, told, code="no_such_route")
    return JSONResponse(refused.body, refused.status, headers=error.headers)


class _KeyCheck:
    """Lets in who shows the key; the page itself, and whether the server lives, are for everybody."""

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self._app, self._key = app, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._key and scope["path"].startswith(_KEYED):
            kind, _, shown = Headers(scope=scope).get("authorization", "").partition(" ")
            right = hmac.compare_digest(shown.strip().encode(), self._key.encode())
            if kind.lower() != "bearer" or not right:
                refused = ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
                headers = {"WWW-Authenticate": "Bearer"}
                await JSONResponse(refused.body, 401, headers=headers)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class _Outermost:
    """Counts responses and gives every one of them the same protections."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, began = 499, time.perf_counter()  # nginx's number for a client that left

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception:
            status = 500  # starlette answers it, outside of here
            raise
        finally:
            path = scope["path"] if scope["path"] in _COUNTED else "other"
            self._metrics.responses.labels(path, status).inc()
            self._metrics.seconds.labels(path).observe(time.perf_counter() - began)
