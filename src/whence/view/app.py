"""What the viewer answers: pure functions of a request on runs that were opened once, and a guard before them.

    /TOKEN/                              the page; everything lies below the token, which nobody can guess
    /TOKEN/static/NAME                   its style and scripts
    /TOKEN/api/runs                      what is there
    /TOKEN/api/RUN/list/SIDE?...         images, searched, filtered and sorted
    /TOKEN/api/RUN/query/J, image/I, group/COLUMN/CODE, agreement/J, row/J/METHOD ...
    /TOKEN/picture/RUN/SIDE/ROW, thumb/RUN/SIDE/ROW

Refused before anything is looked up: another host in the header than this machine by its own names (403: a name that was
pointed here, DNS rebinding), another method than GET and HEAD (405), another token (404: nothing is there). Nothing is
written, and no file is named by a request: pictures are asked for by their numbers.
"""

from __future__ import annotations

import hmac
import json
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from whence.plain import WhenceError
from whence.view import agreement, listing, reading
from whence.view.bounded import Bounded
from whence.view.pictures import Hidden
from whence.view.run import Run
from whence.view.similar import Similarity

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
LOCAL = ("127.0.0.1", "localhost", "[::1]")
LONGEST = 2000  # bytes of a path
AT_ONCE = 400  # images that are told of in one answer
Scope = dict[str, Any]
Send = Callable[[Mapping[str, Any]], Awaitable[None]]


@dataclass(frozen=True, eq=False)
class Viewer:
    """The runs that are looked at.

    Args:
        runs: opened.
        kept: answers that were computed once.
    """

    runs: Sequence[Run]
    kept: Bounded = field(default_factory=lambda: Bounded(32 * 2**20))
    similar: list[Similarity] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.similar.extend(Similarity(run.train.side.pictures, run.queries.side.pictures) for run in self.runs)


class Guard:
    """Lets through what comes from this machine, by its own name, with the token, and only reads.

    Args:
        app: behind it.
        token: of the address.
    """

    def __init__(self, app: Any, token: str) -> None:
        self.app, self.token = app, token.encode()

    async def __call__(self, scope: Scope, receive: Any, send: Send) -> None:
        if scope["type"] != "http":
            return
        status, path = self._judged(scope)
        if status:
            refusal = PlainTextResponse(STATUS[status], status, headers=self._more(status))
            await refusal(scope, receive, _safe(send))
            return
        inside = {**scope, "path": path, "raw_path": path.encode()}
        await self.app(inside, receive, _safe(send))

    def _judged(self, scope: Scope) -> tuple[int, str]:
        """The status of a refusal, 0 for none, and the path below the token."""
        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        if len(hosts) != 1 or not is_local(hosts[0]):
            return 403, ""
        if scope["method"] not in ("GET", "HEAD"):
            return 405, ""
        # As it was sent: what is escaped in it is no slash, and names nothing here.
        raw = (scope.get("raw_path") or scope["path"].encode("utf-8", "replace")).partition(b"?")[0]
        first, slash, rest = raw[1:].partition(b"/")
        if raw[1:2] == b"/" or len(raw) > LONGEST or not hmac.compare_digest(first, self.token):
            return 404, ""
        if not slash:
            return 307, ""
        known = rest.isascii() and not any(mark in rest for mark in (b"%", b"\\", b"..", b"//"))
        return (0, "/" + rest.decode("ascii")) if known else (404, "")

    def _more(self, status: int) -> dict[str, str]:
        """Headers of a refusal."""
        return {405: {"allow": "GET, HEAD"}, 307: {"location": f"/{self.token.decode()}/"}}.get(status, {})


STATUS = {307: "with a slash at its end", 403: "not from here", 404: "nothing is here", 405: "this is only read"}


def is_local(host: str) -> bool:
    """Whether a Host header names this machine by one of its own names, with any port."""
    name, sign, port = host.rpartition(":")
    if not sign or host.endswith("]"):
        name, port = host, "0"
    return name.lower() in LOCAL and port.isascii() and port.isdigit()


def _safe(send: Send) -> Send:
    """Adds to every answer what keeps a browser from doing more with it than to show it."""

    async def safer(message: Mapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            more = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            message = {**message, "headers": [*message.get("headers", []), *more]}
        await send(message)

    return safer


def viewer_app(runs: Sequence[Run], token: str) -> Guard:
    """The application.

    Args:
        runs: that are looked at.
        token: of the address.
    """
    viewer = Viewer(runs)
    static = _static()
    api = {
        "/api/runs": runs_told,
        "/api/{run:int}/list/{side}": list_told,
        "/api/{run:int}/rows/{side}": rows_told,
        "/api/{run:int}/some/{side}": some_told,
        "/api/{run:int}/exact": exact_told,
        "/api/{run:int}/detail/{side}/{row:int}": detail_told,
        "/api/{run:int}/query/{row:int}": query_told,
        "/api/{run:int}/agreement/{row:int}": agreement_told,
        "/api/{run:int}/image/{row:int}": image_told,
        "/api/{run:int}/group/{column:int}/{code:int}": group_told,
    }
    routes = [
        Route("/", partial(_file, static), methods=["GET"]),
        Route("/static/{name}", partial(_file, static), methods=["GET"]),
        *(Route(path, partial(_told, viewer, tell), methods=["GET"]) for path, tell in api.items()),
        Route("/api/{run:int}/row/{row:int}/{method:int}", partial(_spread, viewer), methods=["GET"]),
        Route("/api/{run:int}/similar/{row:int}", partial(_similar, viewer), methods=["GET"]),
        Route("/api/{run:int}/codes/{column:int}", partial(_codes, viewer), methods=["GET"]),
        Route("/{size:str}/{run:int}/{side}/{row:int}", partial(_picture, viewer), methods=["GET"]),
    ]
    app = Starlette(routes=routes, exception_handlers={WhenceError: _refused})
    app.router.redirect_slashes = False
    return Guard(app, token)


def _refused(request: Request, error: Exception) -> Response:
    """What is asked for is not there: in words, as text."""
    return PlainTextResponse(str(error).encode("utf-8", "replace"), 404)


def _static() -> dict[str, bytes]:
    """The files of the page, all of which are in memory: no request reads one."""
    folder = files("whence.view") / "static"
    return {one.name: one.read_bytes() for one in folder.iterdir() if "." + one.name.rpartition(".")[2] in KINDS}


def _file(static: Mapping[str, bytes], request: Request) -> Response:
    name = request.path_params.get("name", "index.html")
    if name not in static:
        raise HTTPException(404, "nothing is here")
    kind = KINDS["." + name.rpartition(".")[2]]
    return Response(static[name], media_type=kind, headers={"cache-control": "no-cache"})


def _run(viewer: Viewer, request: Request) -> Run:
    number = request.path_params["run"]
    if number >= len(viewer.runs):
        raise HTTPException(404, "no such run")
    return viewer.runs[number]


def _side(request: Request) -> str:
    side = request.path_params["side"]
    if side not in listing.SIDES:
        raise HTTPException(404, "nothing is here")
    return str(side)


def _row(run: Run, side: str, request: Request) -> int:
    row = int(request.path_params["row"])
    if row >= len(listing.shelf_of(run, side)):
        raise HTTPException(404, "no such image")
    return row


def _number(request: Request, name: str, default: int, most: int) -> int:
    text = request.query_params.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise HTTPException(404, f"{name} is a whole number")
    return min(int(text), most)


def _rows(run: Run, side: str, request: Request) -> list[int]:
    """Rows that are named in the request, as 1,2,3."""
    texts = [text for text in request.query_params.get("rows", "").split(",") if text]
    count = len(listing.shelf_of(run, side))
    rows = [int(text) for text in texts if text.isascii() and text.isdigit() and len(text) < 10]
    if len(rows) != len(texts) or len(rows) > AT_ONCE or any(row >= count for row in rows):
        raise HTTPException(404, f"rows are up to {AT_ONCE} numbers below {count}")
    return rows


def _asked(run: Run, side: str, request: Request) -> listing.Asked:
    """words, sort, and the code of a value for each column, as c0=12."""
    shelf = listing.shelf_of(run, side)
    where = {
        facet.column: _number(request, f"c{number}", 0, 10**9)
        for number, facet in enumerate(shelf.facets)
        if f"c{number}" in request.query_params
    }
    return listing.Asked(request.query_params.get("words", ""), where, request.query_params.get("sort", ""))


def _told(viewer: Viewer, tell: Callable[[Viewer, Request], object], request: Request) -> Response:
    """An answer as JSON, computed once. Synchronous: Starlette runs it beside the others."""
    key = (request.url.path, request.url.query)
    content = viewer.kept.get(key, lambda: json_of(tell(viewer, request)))
    return Response(content, media_type="application/json", headers={"cache-control": "no-store"})


def json_of(value: object) -> bytes:
    """As JSON, numbers that are none as null; half letters, which no page can hold, as a question mark."""
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, default=str).encode("utf-8", "replace")


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _finite(one) for name, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value


# ------------------------------------------------------------------------------------------------------------ answers


def runs_told(viewer: Viewer, request: Request) -> object:
    """What is there: the runs, their methods and columns."""
    return [
        {
            "title": listing.cut(run.title),
            "root": listing.cut(str(run.root)),
            "facts": [[listing.cut(name), listing.cut(text, listing.LONG)] for name, text in run.facts.items()],
            "told": [listing.cut(line, 600) for line in run.told],
            "methods": [_cut(reading.method_told(scored, len(run.train))) for scored in run.methods.values()],
            "model": listing.cut(run.model, listing.LONG),
            **{
                side: {
                    "count": len(shelf := listing.shelf_of(run, side)),
                    "facets": listing.facets_told(shelf),
                    "caption": listing.cut(shelf.caption),
                    "pictures": shelf.side.pictures is not None,
                    "folder": listing.cut(shelf.side.folder, listing.LONG),
                    "moved": shelf.side.moved and shelf.side.pictures is None,
                }
                for side in listing.SIDES
            },
            "who": run.who,
            "similar": similar.why_not,
        }
        for run, similar in zip(viewer.runs, viewer.similar, strict=True)
    ]


def _cut(told: Mapping[str, object]) -> dict[str, object]:
    return {name: listing.cut(text, listing.LONG) if isinstance(text, str) else text for name, text in told.items()}


def list_told(viewer: Viewer, request: Request) -> object:
    """A page of images."""
    run, side = _run(viewer, request), _side(request)
    found = listing.matching(run, side, _asked(run, side, request))
    start, limit = _number(request, "start", 0, 10**9), _number(request, "limit", 100, AT_ONCE)
    return {"count": len(found), "items": listing.listed(run, side, found[start : start + limit].tolist())}


def rows_told(viewer: Viewer, request: Request) -> object:
    """The rows of all images that are looked for."""
    run, side = _run(viewer, request), _side(request)
    return listing.matching(run, side, _asked(run, side, request)).tolist()


def some_told(viewer: Viewer, request: Request) -> object:
    """Images by their rows."""
    run, side = _run(viewer, request), _side(request)
    return listing.listed(run, side, _rows(run, side, request))


def exact_told(viewer: Viewer, request: Request) -> object:
    """Training images for a file."""
    run = _run(viewer, request)
    query = _number(request, "query", 0, 10**9) if "query" in request.query_params else None
    if query is not None and query >= len(run.queries):
        raise HTTPException(404, "no such query")
    return listing.exact(run, _rows(run, "train", request), query)


def detail_told(viewer: Viewer, request: Request) -> object:
    """Everything about one image but its scores."""
    run, side = _run(viewer, request), _side(request)
    return listing.detail(run, side, _row(run, side, request))


def query_told(viewer: Viewer, request: Request) -> object:
    """A query: what the methods say of it, and the training images that they name."""
    run = _run(viewer, request)
    row = _row(run, "queries", request)
    methods = reading.query_told(run, row, _number(request, "k", 12, 100))
    named = sorted({entry["row"] for told in methods for end in ("top", "low") for entry in told[end]})  # type: ignore[attr-defined]
    images = {one["row"]: {**one, "same": _same(run, row, one["row"])} for one in listing.listed(run, "train", named)}  # type: ignore[arg-type]
    return {"query": listing.detail(run, "queries", row), "methods": methods, "images": images}


def _same(run: Run, query: int, image: int) -> bool:
    """Whether a training image is the query itself."""
    queries, train = run.queries.side.pictures, run.train.side.pictures
    return queries is not None and train is not None and queries.digests[query] == train.digests[image]


def agreement_told(viewer: Viewer, request: Request) -> object:
    """How alike the methods see a query."""
    run = _run(viewer, request)
    return agreement.agreement_told(run, _row(run, "queries", request))


def image_told(viewer: Viewer, request: Request) -> object:
    """A training image, and every query it had a part in."""
    run = _run(viewer, request)
    row = _row(run, "train", request)
    return {"image": listing.detail(run, "train", row), "methods": reading.image_told(run, row)}


def group_told(viewer: Viewer, request: Request) -> object:
    """A creator, a class: how many images, and what they did together."""
    run = _run(viewer, request)
    column, code = request.path_params["column"], request.path_params["code"]
    if column >= len(run.train.facets) or code >= len(run.train.facets[column].names):
        raise HTTPException(404, "no such group")
    facet = run.train.facets[column]
    about = {
        "column": listing.cut(facet.column),
        "name": listing.cut(facet.names[code]),
        "images": int(facet.counts[code]),
    }
    return {**about, "methods": reading.group_told(run, facet, code)}


def _spread(viewer: Viewer, request: Request) -> Response:
    """The scores of a query by a method for all training images, as 32-bit numbers."""
    run = _run(viewer, request)
    row, number = _row(run, "queries", request), request.path_params["method"]
    if number >= len(run.methods):
        raise HTTPException(404, "no such method")
    found = reading.spread(list(run.methods.values())[number], row, len(run.train))
    return Response(found.tobytes(), media_type="application/octet-stream", headers={"cache-control": "no-store"})


def _similar(viewer: Viewer, request: Request) -> Response:
    run = _run(viewer, request)
    found = viewer.similar[request.path_params["run"]].of(_row(run, "queries", request))
    return Response(found.tobytes(), media_type="application/octet-stream", headers={"cache-control": "no-store"})


def _codes(viewer: Viewer, request: Request) -> Response:
    """The value of each training image in a column, as 32-bit numbers."""
    run, column = _run(viewer, request), request.path_params["column"]
    if column >= len(run.train.facets):
        raise HTTPException(404, "no such column")
    found = run.train.facets[column].codes.astype("<i4")
    return Response(found.tobytes(), media_type="application/octet-stream", headers={"cache-control": "no-store"})


def _picture(viewer: Viewer, request: Request) -> Response:
    """A picture, drawn anew from its pixels."""
    run, side, size = _run(viewer, request), _side(request), request.path_params["size"]
    row = _row(run, side, request)
    pictures = listing.shelf_of(run, side).side.pictures
    if pictures is None or size not in ("thumb", "picture"):
        raise HTTPException(404, "there is no picture")
    try:
        content = pictures.shown(row, size)
    except Hidden as why:
        raise HTTPException(404, str(why)) from None
    kind = "image/png" if content.startswith(b"\x89PNG") else "image/jpeg"
    return Response(content, media_type=kind, headers={"cache-control": "private, max-age=3600"})
