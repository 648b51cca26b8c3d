"""A server that answers as a language model would, and endpoints on it."""

from functools import partial

import openai
import pytest

from helpers.endpoints import PRICE
from helpers.server import serving
from judge.endpoint import Endpoint


@pytest.fixture(scope="session")
def running():
    with serving() as server:
        yield server


@pytest.fixture
def server(running):
    running.control()
    return running


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="session")
def client(running):
    """A client of the openai library, shared because it takes long to make."""
    return openai.OpenAI(api_key="none", base_url=running.url)


@pytest.fixture
def endpoint(server, client, tmp_path):
    """Makes endpoints on the server."""
    common = {"model": "judge", "client": client, "cache": tmp_path / "cache.sqlite"}
    return partial(Endpoint, **common, price=PRICE, timeout=20.0)


@pytest.fixture
def asking(endpoint):
    """An endpoint on the server, patient with it but not slow."""
    return partial(endpoint, backoff=0.02, attempts=12)


@pytest.fixture
def forgiving(endpoint):
    """An endpoint on the server, whatever share of its judgments fails."""
    return partial(endpoint, backoff=0.01, max_failed=1)
