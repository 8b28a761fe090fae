"""A bucket over HTTP: the calls of Google Cloud Storage that tensorstore and ArrayRecord make, on
`MemoryBucket`.

Orbax has its arrays written by tensorstore, which does not know Python's file systems; it asks the
address in TENSORSTORE_GCS_HTTP_URL. ArrayRecord's reader asks that in
CLOUD_STORAGE_EMULATOR_ENDPOINT. So one bucket in memory holds checkpoints and prepared data, too.
"""

import contextlib
import functools
import http.server
import json
import re
import threading
import zlib
from urllib import parse

import memory_bucket
from etils import epath
from memory_bucket import MemoryBucket


class _Handler(http.server.BaseHTTPRequestHandler):
    """storage/v1 of objects: read (also ranges), stat, list, write in one request, delete."""

    protocol_version = "HTTP/1.1"

    def setup(self):
        super().setup()
        self.files = MemoryBucket()

    def handle(self):
        with contextlib.suppress(ConnectionResetError):  # ArrayRecord hangs up
            super().handle()

    def do_GET(self):
        bucket, name, query = self._asked()
        if not name:
            return self._list(bucket, query)
        content = self._content(bucket, name)
        if content is None:
            return self._answer(404, b"{}")
        if str(_generation(content)) == query.get("ifGenerationNotMatch"):
            return self._answer(304)
        if query.get("alt") != "media":
            return self._answer(200, _metadata(name, content))
        headers = {"x-goog-generation": str(_generation(content))}
        if found := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            total = len(content)
            if found[1]:
                start, end = int(found[1]), int(found[2] or total) + 1
            else:  # the last bytes
                start, end = max(total - int(found[2]), 0), total
            content = content[start:end]
            headers["Content-Range"] = f"bytes {start}-{start + len(content) - 1}/{total}"
            return self._answer(206, content, headers)
        self._answer(200, content, headers)

    def do_POST(self):
        bucket, _, query = self._asked()
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if self._changed(bucket, query["name"], query):
            return self._answer(412)
        self.files.pipe_file(f"/{bucket}/{query['name']}", content)
        self._answer(200, _metadata(query["name"], content))

    def do_DELETE(self):
        bucket, name, query = self._asked()
        if self._content(bucket, name) is None:
            return self._answer(404)
        if self._changed(bucket, name, query):
            return self._answer(412)
        self.files.rm_file(f"/{bucket}/{name}")
        self._answer(204)

    def _asked(self):
        url = parse.urlsplit(self.path)
        self.server.asked.append(f"{self.command} {self.path}")
        found = re.fullmatch(r"(?:/upload)?/storage/v1/b/([^/]+)/o(?:/(.+))?", url.path)
        name = parse.unquote(found[2]) if found[2] else ""
        return found[1], name, dict(parse.parse_qsl(url.query))

    def _content(self, bucket, name):
        file = MemoryBucket.store.get(f"/{bucket}/{name}")
        return None if file is None else file.getvalue()

    def _changed(self, bucket, name, query):
        """Whether the object is not the one that the caller has seen; 0 is none."""
        content = self._content(bucket, name)
        now = "0" if content is None else str(_generation(content))
        return query.get("ifGenerationMatch", now) != now

    def _list(self, bucket, query):
        head = f"/{bucket}/"
        names = sorted(key.removeprefix(head) for key in list(MemoryBucket.store)
                       if key.startswith(head))  # fmt: skip
        low, high = query.get("startOffset", ""), query.get("endOffset", "\U0010ffff")
        names = [n for n in names if low <= n < high and n.startswith(query.get("prefix", ""))]
        items = [json.loads(_metadata(name, self._content(bucket, name))) for name in names]
        self._answer(200, json.dumps({"items": items}).encode())

    def _answer(self, status, content=b"", headers=()):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


def _generation(content):
    return zlib.crc32(content) + 1


def _metadata(name, content):
    return json.dumps({"name": name, "size": str(len(content)),
                       "generation": str(_generation(content)), "metageneration": "1",
                       "timeCreated": "2026-01-01T00:00:00Z", "updated": "2026-01-01T00:00:00Z",
                       "kind": "storage#object"}).encode()  # fmt: skip


@functools.cache
def _server():
    """One for all tests of a process: tensorstore may remember the address."""
    server = http.server.ThreadingHTTPServer(("localhost", 0), _Handler)
    server.daemon_threads, server.asked = True, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def install(monkeypatch):
    """For one test, gs:// is an empty bucket in memory, for Python, tensorstore and ArrayRecord.

    Returns the list of requests, which grows.
    """
    memory_bucket.install(monkeypatch)
    server = _server()
    server.asked.clear()
    for reader in ("TENSORSTORE_GCS_HTTP_URL", "CLOUD_STORAGE_EMULATOR_ENDPOINT"):
        monkeypatch.setenv(reader, f"http://localhost:{server.server_port}")
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
    return server.asked


def put(folder, there):
    """Copies a local folder to gs://."""
    for file in (path for path in folder.rglob("*") if path.is_file()):
        (epath.Path(there) / file.relative_to(folder).as_posix()).write_bytes(file.read_bytes())
