"""The page at `/`: a prompt, and text as it streams with its patches and entropies. It asks `/v1/completions`."""

from __future__ import annotations

from importlib import resources

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FILES = ("index.html", "page.css", "page.js", "drawing.js", "controls.js")
TYPES = {"html": "text/html; charset=utf-8", "css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8"}
HEADERS = {
    "content-security-policy": "default-src 'self'; script-src 'self'; style-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def routes() -> list[Route]:
    """The routes of the page's files, which are read once."""
    return [_route("/" if name == "index.html" else f"/{name}", name) for name in FILES]


def _route(path: str, name: str) -> Route:
    data = resources.files(__package__).joinpath("page", name).read_bytes()
    headers = {**HEADERS, "content-type": TYPES[name.rsplit(".", 1)[1]]}

    async def send(request: Request) -> Response:
        return Response(data, headers=headers)

    return Route(path, send, methods=["GET"])
