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


@pytest.fixture(scope='session', params=SCHEMES)
def server(request):
    """A proxy before a server with an empty bucket, for each scheme; libraries in this process find it."""
    scheme = request.param
    if why := why_not(scheme):
        pytest.skip(why)
    with serving(scheme) as proxy:
        proxy.scheme = scheme
        yield proxy


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
