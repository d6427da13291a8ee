"""An S3 server for tests, moto's, with trouble on the way to it that a test can choose.

`serving()` runs this file as a process of its own. `POST /trouble` sets what goes wrong from then on, and
`GET /trouble` tells how often each kind has happened.
"""

import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from contextlib import contextmanager
from unittest.mock import patch

import fsspec

KEY, SECRET = "AKIATESTTESTTESTTEST", "secret/of+the+tests/that+nobody+may+read"
KINDS = ("error", "slow_down", "refused", "lost", "cut")
# What is answered instead of doing what was asked.
ANSWERS = {
    "error": ("500 Internal Server Error", "InternalError"),
    "slow_down": ("503 Service Unavailable", "ServiceUnavailable"),
    "denied": ("403 Forbidden", "AccessDenied"),
}


class Trouble:
    """WSGI middleware that delays every request and spoils some of them, drawn with a seed.

    error, slow_down, denied: 500, 503 or 403 instead of doing it. refused: the connection drops instead.
    lost: it is done, and the connection drops before the answer. cut: it is done, and half of the answer
    arrives.
    """

    def __init__(self, app):
        self.app, self.lock = app, threading.Lock()
        self.set()

    def set(self, rate=0.0, latency=0.0, seed=0, kinds=KINDS, only=""):
        """Spoil a share `rate` of the requests whose method and path contain `only`; `latency` in seconds."""
        self.rate, self.latency, self.kinds, self.only = rate, latency, kinds, only
        self.random, self.counts = random.Random(seed), Counter()

    def __call__(self, environ, start_response):
        if environ["PATH_INFO"] == "/trouble":
            return self.control(environ, start_response)
        with self.lock:
            spoiled = self.only in f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}"
            spoiled = spoiled and self.random.random() < self.rate
            kind = self.random.choice(self.kinds) if spoiled else "none"
            self.counts[kind] += 1
        time.sleep(self.latency)
        if kind in ANSWERS:
            status, code = ANSWERS[kind]
            answer = f"<Error><Code>{code}</Code><Message>by request of a test</Message></Error>".encode()
            start_response(status, [("Content-Length", str(len(answer)))])
            return [answer]
        if kind == "refused":
            return self.drop(environ)
        if kind == "none":
            return self.app(environ, start_response)
        head = []
        body = b"".join(self.app(environ, lambda *parts: head.extend(parts)))
        if kind == "lost" or len(body) < 2:
            return self.drop(environ)
        start_response(*head)
        return self.half(environ, body)

    def half(self, environ, body):
        yield body[: len(body) // 2]
        self.drop(environ)

    @staticmethod
    def drop(environ):
        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        return []

    def control(self, environ, start_response):
        if environ["REQUEST_METHOD"] == "POST":
            self.set(**json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))))
        start_response("200 OK", [("Content-Type", "application/json")])
        return [json.dumps(self.counts).encode()]


class Server:
    """A running server: its address, and what goes wrong on the way to it."""

    def __init__(self, address):
        self.address = address

    def trouble(self, **settings):
        """Set what goes wrong from now on: nothing, or what `Trouble.set` takes."""
        self._ask(json.dumps(settings).encode())

    def counts(self):
        """How many requests each kind of trouble has met since it was set; `none`: those that met none."""
        return Counter(self._ask(None))

    def _ask(self, data):
        with urllib.request.urlopen(f"{self.address}/trouble", data, timeout=20) as answer:
            return json.loads(answer.read())


@contextmanager
def serving():
    """Run a server in a process of its own, on a free port, until the end of the block."""
    process = subprocess.Popen(
        [sys.executable, __file__], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        port = process.stdout.readline().strip()
        assert port, "the S3 server did not start"
        yield Server(f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        process.wait(20)
        process.stdout.close()


@contextmanager
def connected():
    """Run a server with the bucket `bucket`, which clients of this process find in their environment."""
    with serving() as server, patch.dict(os.environ, environment(server)):
        os.environ.pop("AWS_PROFILE", None)
        fsspec.filesystem("s3", use_listings_cache=False).mkdir("bucket")
        yield server
        fsspec.get_filesystem_class("s3").clear_instance_cache()


def environment(server):
    """What the client of the server finds in its environment."""
    return {
        "AWS_ENDPOINT_URL": server.address,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": "/nowhere",
        "AWS_SHARED_CREDENTIALS_FILE": "/nowhere",
    }


if __name__ == "__main__":
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    wsgi = make_server(
        "127.0.0.1", 0, Trouble(DomainDispatcherApplication(create_backend_app)), threaded=True
    )
    print(wsgi.server_port, flush=True)
    wsgi.serve_forever()
