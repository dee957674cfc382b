"""A server of S3's requests over a folder of this machine: so much of S3 as a store needs, and so many milliseconds later.

    python tests/support/s3.py FOLDER [DELAY_MS]      # prints its port; a bucket is a folder in FOLDER

GET (whole, or a range), HEAD, PUT and DELETE of an object, and lists of a thousand. Nobody is asked who they are. GET /-/requests
says how many requests there were, itself excepted.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from bisect import bisect_left, bisect_right
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape, unescape

DATE = "Thu, 01 Jan 2026 00:00:00 GMT"


class Server(ThreadingHTTPServer):
    """Threads, a connection each."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, folder: Path, delay: float) -> None:
        super().__init__(("127.0.0.1", 0), Requests)
        self.folder, self.delay, self.n_requests, self.n_changes = folder, delay, 0, 0
        self.lock = threading.Lock()


@lru_cache(4)
def keys_of(bucket: Path, n_changes: int) -> list[str]:
    """Every object of a bucket, in order; listed once until something is written."""
    found = []
    for folder, _, names in os.walk(bucket):
        inside = os.path.relpath(folder, bucket)
        found += names if inside == "." else [f"{inside}/{name}" for name in names]
    return sorted(found)


class Requests(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is said."""

    def answer(self, status: int, body: bytes = b"", size: int | None = None, **headers: str) -> None:
        """An answer, with its length; `size`: that of what a HEAD leaves out."""
        self.send_response(status)
        named = {"Content-Length": str(len(body) if size is None else size), "Last-Modified": DATE, "ETag": '"0"'}
        for name, value in (named | {name.replace("_", "-"): value for name, value in headers.items()}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def object(self) -> Path:
        """The file that the request names, after the delay."""
        with self.server.lock:
            self.server.n_requests += 1
            self.server.n_changes += self.command not in ("GET", "HEAD")
        time.sleep(self.server.delay)
        return self.server.folder / unquote(urlsplit(self.path).path).lstrip("/")

    def do_HEAD(self) -> None:
        """Size of an object."""
        path = self.object()
        if path.is_file():
            self.answer(200, size=path.stat().st_size)
        else:
            self.answer(404)

    def do_GET(self) -> None:
        """An object, a range of it, or a list."""
        if self.path == "/-/requests":
            self.answer(200, str(self.server.n_requests).encode())
            return
        path, query = self.object(), parse_qs(urlsplit(self.path).query)
        if "list-type" in query:
            self.answer(200, self.listed(query), Content_Type="application/xml")
        elif not path.is_file():
            self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        else:
            size = path.stat().st_size
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            first, last = (int(asked[1]), min(int(asked[2] or size), size - 1)) if asked else (0, size - 1)
            with open(path, "rb") as file:
                file.seek(first)
                body = file.read(last + 1 - first)
            if asked:
                self.answer(206, body, Content_Range=f"bytes {first}-{last}/{size}")
            else:
                self.answer(200, body)

    def listed(self, query: dict[str, list[str]]) -> bytes:
        """A thousand keys from where the last list ended; with a delimiter those of one folder, and the folders in it."""
        bucket, prefix = urlsplit(self.path).path.strip("/"), query.get("prefix", [""])[0]
        after = query.get("continuation-token", query.get("start-after", [""]))[0]
        keys = keys_of(self.server.folder / bucket, self.server.n_changes)
        keys = keys[bisect_left(keys, prefix) : bisect_left(keys, prefix + "\U0010ffff")]
        folders = list[str]()
        if "delimiter" in query:
            inside = [key.removeprefix(prefix).partition("/") for key in keys]
            folders = sorted({name for name, slash, _ in inside if slash})
            keys = [prefix + name for name, slash, _ in inside if not slash]
        first = bisect_right(keys, after)
        page = keys[first : first + 1001]
        contents = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{(self.server.folder / bucket / key).stat().st_size}</Size>"
            f'<LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>"0"</ETag></Contents>'
            for key in page[:1000]
        )
        contents += "".join(
            f"<CommonPrefixes><Prefix>{escape(prefix + name)}/</Prefix></CommonPrefixes>" for name in folders
        )
        more = f"<NextContinuationToken>{escape(page[999])}</NextContinuationToken>" if len(page) > 1000 else ""
        return (
            f"<ListBucketResult><Name>{bucket}</Name><IsTruncated>{str(bool(more)).lower()}</IsTruncated>"
            f"{contents}{more}</ListBucketResult>"
        ).encode()

    def do_PUT(self) -> None:
        """An object, whole."""
        path, body = self.object(), self.rfile.read(int(self.headers["Content-Length"]))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
        self.answer(200)

    def do_POST(self) -> None:
        """Take objects away, as many as the request lists."""
        bucket, body = self.object(), self.rfile.read(int(self.headers["Content-Length"])).decode()
        keys = re.findall("<Key>(.*?)</Key>", body)
        for key in keys:
            (bucket / unescape(key)).unlink(missing_ok=True)
        gone = "".join(f"<Deleted><Key>{key}</Key></Deleted>" for key in keys)
        self.answer(200, f"<DeleteResult>{gone}</DeleteResult>".encode(), Content_Type="application/xml")

    def do_DELETE(self) -> None:
        """Take an object away."""
        self.object().unlink(missing_ok=True)
        self.answer(204)


if __name__ == "__main__":
    server = Server(Path(sys.argv[1]), float(sys.argv[2]) / 1e3 if len(sys.argv) > 2 else 0.0)
    print(server.server_address[1], flush=True)
    server.serve_forever()
