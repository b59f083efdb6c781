"""One server for the tests of a file, and a visitor of it."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def server():
    from tests.app.web import Puppet, serving  # needs the serve extra

    with serving(Puppet()) as server:
        yield server


@pytest.fixture
def client(server):
    from tests.app.web import Client

    client = Client(server.url)
    client.hello()
    return client
