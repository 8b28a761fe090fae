"""An OpenAI-compatible chat endpoint on this machine."""

import contextlib
import http.server
import json
import threading


@contextlib.contextmanager
def serving():
    """A server that listens until the block ends."""
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class Server(http.server.ThreadingHTTPServer):
    """Answers with the scripted replies (status, headers, body) in turn, then with what
    `answer` makes of the text; keeps (path, headers, body) of all requests."""

    daemon_threads = True

    def __init__(self):
        self.script, self.requests, self.lock = [], [], threading.Lock()
        self.answer = lambda text: "fine"
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


def reply(text="fine", prompt=10, completion=5, reason="stop"):
    return json.dumps({
        "choices": [{"message": {"content": text}, "finish_reason": reason}],
        "usage": {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": 0}})


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append((self.path, dict(self.headers), body))
            script = self.server.script
            asked = body["messages"][0]["content"][-1]["text"]
            status, headers, text = (
                script.pop(0) if script else (200, {}, reply(self.server.answer(asked))))
        if status is None:  # hangs up
            self.close_connection = True
            return
        data = text.encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass
