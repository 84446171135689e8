import contextlib
import os
import uuid

import pytest

from bqat_jax.storage import place, set_patience
from tests.storage.servers import BUCKET, SCHEMES, environment, serving, why_not


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        marker = item.get_closest_marker('slow_on')
        if marker and item.callspec.params['server'] in marker.args:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope='session')
def servers():
    """Returns the server of a scheme, started once: libraries keep their first connection for the whole process."""
    started = {}
    with contextlib.ExitStack() as stack:

        def of(scheme):
            if scheme not in started:
                started[scheme] = stack.enter_context(serving(scheme))
                started[scheme].scheme = scheme
            return started[scheme]

        yield of


@pytest.fixture(scope='module', params=SCHEMES)
def server(request, servers):
    """A proxy before a server with an empty bucket, for each scheme; libraries in this process find it."""
    if why := why_not(request.param):
        pytest.skip(why)
    return servers(request.param)


@pytest.fixture
def bucket(server, monkeypatch, request):
    """A folder in the bucket for one test; requests are repeated for two seconds."""
    for name in [name for name in os.environ if name.startswith(('AWS_', 'GOOGLE_', 'STORAGE_EMULATOR'))]:
        monkeypatch.delenv(name)
    for name, value in environment(server.scheme, server.url).items():
        monkeypatch.setenv(name, value)
    set_patience(2.0)
    server.fault = None
    server.requests.clear()
    yield place(f'{server.scheme}://{BUCKET}/{request.node.name.partition("[")[0]}-{uuid.uuid4().hex[:6]}', '--workdir')
    server.fault = None
    set_patience(600.0)
