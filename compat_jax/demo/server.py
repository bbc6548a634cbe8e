"""The page as an ASGI application: what it answers, what it refuses; nothing it is sent is kept."""

import asyncio
import dataclasses
import importlib.resources
import io
import os
import re
import secrets
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import numpy as np
from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from compat_jax.data.pictures import BadPictures, decode
from compat_jax.demo.showcase import Answer, Showcase
from compat_jax.errors import UserError
from compat_jax.fields import Rule, check_fields
from compat_jax.gallery.originals import content_of
from compat_jax.report.style import COLOURS

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_THUMBNAIL = 192  # pixels of the long side
_NAME = 60  # letters of a file's name that an error repeats
_BYTES = "application/octet-stream"  # other sites must ask before they may send it, and none may
_NUMBER = re.compile("[0-9]{1,9}")  # Python reads no number of thousands of digits
_FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_KEPT, _NOT_KEPT = {"Cache-Control": "private, max-age=3600"}, {"Cache-Control": "no-store"}
_SENTENCES = {  # for what the framework says in two words
    "Not Found": "There is no such page here.",
    "Method Not Allowed": "This address cannot be asked in this way.",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds on a picture that is sent.

    Attributes:
      size: bytes of its file.
      pixels: of the decoded picture, which takes three bytes each.
    """

    size: Annotated[int, Rule("bytes of a picture's file", low=1, high=2**30)] = 20 * 10**6
    pixels: Annotated[int, Rule("pixels of a picture", low=1, high=10**9)] = 50 * 10**6

    def __post_init__(self):
        check_fields(self)


DEFAULT_LIMITS = Limits()


def application(
    shown: Showcase,
    *,
    title: str = "An old gallery, a new model",
    hosts: Sequence[str] = ("127.0.0.1", "localhost"),
    limits: Limits = DEFAULT_LIMITS,
) -> Starlette:
    """Make the application of a page, to run with any ASGI server.

    A picture is read into memory, embedded, and forgotten. Requests that name another host are
    refused: another site could else have its name lead here and read the gallery.

    Args:
      shown: the gallery.
      title: of the page.
      hosts: names and addresses by which the page may be asked for, without a port; "*" for all.
      limits: of pictures that are sent.
    """
    pages = _Pages(shown, title, limits)
    routes = [Route(path, pages.file) for path in _FILES]
    routes += [
        Route("/about", pages.about),
        Route("/rows/{number}.png", pages.row),
        Route("/picks/{number}.png", pages.pick),
        Route("/picks/{number}/answers", pages.pick_answers),
        Route("/answers", pages.answers, methods=["POST"]),
    ]
    trusted = Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
    refusals: dict[Any, Any] = {HTTPException: _refused, UserError: _refused}
    return Starlette(routes=routes, middleware=[trusted], exception_handlers=refusals)


class _Pages:
    """The answer to each path."""

    def __init__(self, shown: Showcase, title: str, limits: Limits):
        self.shown, self.limits = shown, limits
        folder = importlib.resources.files(__package__) / "page"
        self._files = {path: (folder / name).read_bytes() for path, (name, _) in _FILES.items()}
        # Pictures have other addresses at every start: a browser keeps those of the gallery before.
        self._about = {"title": title, "start": secrets.token_hex(8), **_about(shown, limits)}
        self._turn = asyncio.Lock()  # one picture at a time takes the memory of one
        self._drawing = asyncio.Semaphore(os.cpu_count() or 1)  # photos are large when decoded

    async def file(self, request: Request) -> Response:
        """Send a part of the page itself."""
        path = request.url.path
        headers = _HEADERS | _NOT_KEPT
        return Response(self._files[path], media_type=_FILES[path][1], headers=headers)

    async def about(self, request: Request) -> Response:
        """Say what is shown."""
        return JSONResponse(self._about, headers=_HEADERS | _NOT_KEPT)

    async def row(self, request: Request) -> Response:
        """Send the picture of a row."""
        number = _below(request, len(self.shown.rows))
        return await self._thumbnail(lambda: self.shown.picture(number))

    async def pick(self, request: Request) -> Response:
        """Send a picture to ask with."""
        number = _below(request, len(self.shown.picks))
        return await self._thumbnail(lambda: self.shown.picks[number].picture)

    async def pick_answers(self, request: Request) -> Response:
        """Ask with one of the pictures that are there."""
        pick = self.shown.picks[_below(request, len(self.shown.picks))]
        return await self._ask(lambda: self.shown.ask(pick.picture), pick.label)

    async def answers(self, request: Request) -> Response:
        """Ask with a picture that is sent: the bytes of its file, no form."""
        if request.headers.get("content-type", "").partition(";")[0].strip() != _BYTES:
            raise HTTPException(415, f"Send the bytes of a picture as {_BYTES}.")
        content = await _body(request, self.limits.size)
        if not content:
            raise HTTPException(400, "That file is empty. Choose a picture.")
        given = request.query_params.get("name", "")
        name = "".join(filter(str.isprintable, given))[:_NAME] or "The picture"

        def ask():
            pixels = decode(content, name, pixels=self.limits.pixels, formats=FORMATS)
            return self.shown.ask(pixels, content_of(content))

        return await self._ask(ask, None)

    async def _ask(self, ask: Callable[[], list[Answer]], label: str | None) -> Response:
        async with self._turn:
            found = await run_in_threadpool(ask)
        named = np.unique(np.concatenate([one.rows.ravel() for one in found]))
        content = {
            "label": label,
            "answers": [_described(one) for one in found],
            "rows": {int(row): self._row(int(row)) for row in named if row >= 0},
        }
        return JSONResponse(content, headers=_HEADERS | _NOT_KEPT)

    async def _thumbnail(self, find: Callable[[], Any]) -> Response:
        def draw():
            with Image.fromarray(decode(find())) as image:
                image.thumbnail((_THUMBNAIL, _THUMBNAIL))
                buffer = io.BytesIO()
                image.save(buffer, "PNG")
            return buffer.getvalue()

        try:
            async with self._drawing:
                content = await run_in_threadpool(draw)
        except (BadPictures, OSError) as error:
            raise HTTPException(404, "This picture is not there any more.") from error
        return Response(content, media_type="image/png", headers=_HEADERS | _KEPT)

    def _row(self, row: int) -> dict[str, Any]:
        rows = self.shown.rows
        own = int(rows.versions[row])
        return {"key": rows.keys[row], "label": self.shown.label(row), "version": own}


def _about(shown: Showcase, limits: Limits) -> dict[str, Any]:
    """Return what the page needs to know before anybody asks."""
    before = sorted({shown.old, *shown.rows.versions.tolist()})
    quality = shown.quality
    return {
        "chain": str(shown.gallery.chain.path),
        "old": shown.old,
        "new": shown.new,
        "asking": list(shown.asking),
        "colours": {
            number: COLOURS[place % len(COLOURS)]
            for place, number in enumerate([*before, shown.new])
        },
        "rows": len(shown.rows),
        "total": shown.total,
        "left_out": shown.left_out,
        "cuts": shown.cuts,
        "renewed": shown.renewed,
        "picks": [pick.label for pick in shown.picks],
        "size": limits.size,
        "formats": list(FORMATS),
        "quality": quality
        and {
            "queries": quality.queries,
            "old": quality.old.round(4).tolist(),
            "new": quality.new.round(4).tolist(),
        },
    }


def _described(answer: Answer) -> dict[str, Any]:
    """A version's answers as JSON: [row, score] of each, for each share."""
    shares = [
        [[int(row), round(float(score), 4)] for row, score in zip(*one, strict=True) if row >= 0]
        for one in zip(answer.rows, answer.scores, strict=True)
    ]
    return {
        "version": answer.version,
        "shares": shares,
        "embed_ms": round(1000 * answer.embed_seconds, 2),
        "search_ms": round(1000 * answer.search_seconds, 2),
    }


def _below(request: Request, count: int) -> int:
    """Return the number in an address."""
    text = request.path_params["number"]
    if not _NUMBER.fullmatch(text):
        raise HTTPException(404)
    if (number := int(text)) >= count:
        raise HTTPException(404, "There is no picture of this number.")
    return number


async def _body(request: Request, most: int) -> bytes:
    """Read a body into memory, no more of it than is allowed."""
    refusal = HTTPException(
        413, f"That file has more than {most / 10**6:g} MB. Choose a smaller one."
    )
    announced = request.headers.get("content-length", "0")
    if announced.isdigit() and int(announced) > most:
        raise refusal
    content = bytearray()
    try:
        async for part in request.stream():
            content += part
            if len(content) > most:
                raise refusal
    except ClientDisconnect as error:  # nobody is there to read the answer
        raise HTTPException(400, "The file did not arrive whole.") from error
    return bytes(content)


async def _refused(_: Request, error: Exception) -> Response:
    """Say in a sentence why a request was refused."""
    status, text, more = 422, str(error), {}
    if isinstance(error, BadPictures):
        status, text = 415, f"{text}. Formats: {', '.join(FORMATS)}."
    if isinstance(error, HTTPException):
        status, more = error.status_code, dict(error.headers or {})
        text = _SENTENCES.get(error.detail, error.detail)
    return JSONResponse({"error": text}, status, {**more, **_HEADERS, **_NOT_KEPT})
