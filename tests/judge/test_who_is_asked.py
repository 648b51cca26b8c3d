"""Which model at which address is asked, with which key; and what makes two questions one."""

import json
import math
import random
import socket
import threading

import openai
import pytest

import judge.models
from helpers.endpoints import SECRET, golds, refused
from judge.endpoint import Endpoint
from judge.ledger import Refused
from judge.models import only_model
from judge.questions import Question, pairwise_question, teacher_question
from judge.replies import NO_ANSWER

# --- Who is asked ---


@pytest.mark.parametrize(
    "url",
    [
        "http://user:hunter2@localhost/v1",
        "http://hunter2@localhost/v1",
        "http://localhost/v1?key=hunter2",
        "http://localhost/v1#hunter2",
        "ftp://localhost/hunter2",
        "localhost:8000/hunter2",
        "file:///hunter2",
        "http://[::1/hunter2",
        "http://localhost:abc/hunter2",
        "http://localhost:99999/hunter2",
        "http:///hunter2",
    ],
)
@pytest.mark.parametrize("given", ["url", "OPENAI_BASE_URL"])
def test_a_url_that_is_none_or_holds_a_key_is_refused_and_not_repeated(
    url, given, tmp_path, monkeypatch
):
    if given == "OPENAI_BASE_URL":
        monkeypatch.setenv(given, url)
        monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    with refused() as error:
        Endpoint("judge", url if given == "url" else None, tmp_path / "cache.sqlite")
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize(
    "key", ["sk-hunter2\n", "sk-hunter2\r\nX: y", "sk hunter2", "sk-hunter2\u200b", "“hunter2”"]
)
def test_a_key_that_cannot_be_one_is_refused_and_not_repeated(key, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with refused(Refused) as error:
        Endpoint("judge", "http://localhost/v1", tmp_path / "cache.sqlite")
    assert "OPENAI_API_KEY" in str(error.value)
    assert "hunter2" not in str(error.value)


def test_openai_is_not_asked_without_a_key_and_ones_own_server_is(server, asking, tmp_path):
    with refused() as error:
        Endpoint("gpt-4o", cache=tmp_path / "cache.sqlite")
    assert "OPENAI_API_KEY" in str(error.value)
    with refused():
        Endpoint("judge", "", tmp_path / "cache.sqlite")
    assert asking(client=None, url=server.url).ask(golds(1)[0]) == golds(1)[1]


def test_a_client_for_azure_may_be_handed_over(server, asking):
    """It puts the model into the path, and the key into a header of its own."""
    client = openai.AzureOpenAI(
        api_key=SECRET, azure_endpoint=server.root, api_version="2024-10-21"
    )
    assert asking(client=client).ask(golds(3)[0]) == golds(3)[1]
    assert (
        server.stats()["last_path"]
        == "/openai/deployments/judge/chat/completions?api-version=2024-10-21"
    )


def test_the_only_model_of_a_server_need_not_be_named(server):
    assert only_model(server.url) == "local-judge"


class Scripted:
    """A server that gives the same reply to every request."""

    def __init__(self, body):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/v1"
        head = (
            "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\n"
            f"content-length: {len(body)}\r\n\r\n"
        )
        threading.Thread(target=self.serve, args=(head.encode() + body,), daemon=True).start()

    def serve(self, reply):
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(1 << 16)
                connection.sendall(reply)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.listener.close()


@pytest.mark.parametrize(
    "body",
    [
        '{"data": []}',
        '{"data": [{"id": "a"}, {"id": "b"}]}',
        "{}",
        "[]",
        "<html>",
        '{"data": 1}',
        '{"data": [{}]}',
        '{"data": [null]}',
        "",
    ],
)
def test_a_server_with_no_model_or_several_or_that_does_not_say_is_refused(body):
    with Scripted(body.encode()) as other, refused():
        only_model(other.url)


def test_a_server_that_is_not_there_is_named_at_once():
    with refused() as error:
        only_model("http://127.0.0.1:1/v1")
    assert "http://127.0.0.1:1/v1" in str(error.value)


def test_a_server_that_does_not_say_which_models_it_has_is_asked_once(server, monkeypatch):
    monkeypatch.setattr(judge.models, "PATIENCE", 0.5, raising=False)
    server.control(models=None)
    with refused() as error:
        only_model(server.url)
    assert "name the model" in str(error.value)
    assert server.stats()["listings"] == 1


def test_a_server_that_fails_to_list_its_models_is_asked_once(server):
    server.control(models=[503, "", ""])
    with refused() as error:
        only_model(server.url)
    assert "HTTP 503; name the model" in str(error.value)
    assert server.stats()["listings"] == 1


def test_openai_is_not_asked_for_its_only_model(no_network):
    """It has many, and no key is needed to say so."""
    with refused() as error:
        only_model(None)
    assert "model's name is missing" in str(error.value)


UGLY = ["\x1b[2Jx", "two\nlines", "\ud800", "x\u202ey"]


@pytest.mark.parametrize("name", UGLY, ids=ascii)
def test_a_models_name_that_cannot_be_shown_is_refused_and_shown_without_it(name, server, tmp_path):
    server.control(models=[200, json.dumps({"data": [{"id": name}]}), ""])
    with refused():
        Endpoint(only_model(server.url), server.url, tmp_path / "cache.sqlite")
    server.control(models=[200, json.dumps({"data": [{"id": name}, {"id": "other"}]}), ""])
    with refused() as error:
        only_model(server.url)
    assert "2 models" in str(error.value)
    with refused():
        Endpoint(name, live=False, cache=tmp_path / "cache.sqlite")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("others", ["", ', {"id": "other"}'], ids=["alone", "beside another"])
@pytest.mark.parametrize("name", ["KEY", "models/KEY-1"])
def test_a_model_that_is_named_after_the_key_is_refused_without_it(
    name, others, server, tmp_path, monkeypatch
):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    server.control(models=[200, f'{{"data": [{{"id": "{name}"}}{others}]}}', ""])
    with refused() as error:
        only_model(server.url)
    assert SECRET not in str(error.value)
    assert "[key]" in str(error.value)
    with refused() as error:
        Endpoint(name.replace("KEY", SECRET), server.url, tmp_path / "cache.sqlite")
    assert SECRET not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_word_that_stands_for_a_key_where_none_is_needed_is_not_hidden(
    server, asking, monkeypatch
):
    """A server of one's own is often given the key "none", "EMPTY" or "x"."""
    monkeypatch.setenv("OPENAI_API_KEY", "Gold")
    server.control(models=[200, '{"data": [{"id": "Gold-7b"}]}', ""])
    questions = [teacher_question("Gold?", 16, 0)]
    assert asking(model=only_model(server.url), client=None, url=server.url).ask(questions) == [
        "A gold answer to Gold?"
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {"attempts": 0},
        {"concurrency": 0},
        {"timeout": 0},
        {"timeout": math.inf},
        {"backoff": -1},
        {"max_failed": -0.1},
        {"max_failed": math.nan},
        {"max_usd": -1},
        {"max_usd": math.nan},
        {"temperature": -1},
        {"temperature": math.nan},
    ],
)
def test_numbers_that_make_no_sense_are_named(settings, asking):
    with pytest.raises(ValueError, match=next(iter(settings))):
        asking(**settings)


# --- Questions and their keys ---


def test_a_question_is_asked_once_and_answers_keep_their_places(server, asking):
    """A question is asked once however often it is put and answers keep their places."""
    questions, answers = golds(10)
    order = random.Random(0).choices(range(10), k=100)
    assert asking().ask([questions[i] for i in order]) == [answers[i] for i in order]
    assert server.stats()["requests"] == len(set(order))
    assert asking().ask([]) == []


def test_whatever_changes_the_answer_changes_the_key_and_nothing_else_does(asking):
    here, question = asking(), teacher_question("Why?", 16, 0)
    others = [
        teacher_question("Why? ", 16, 0),
        teacher_question("Why?", 17, 0),
        teacher_question("Why?", 16, 1),
        pairwise_question("Why?", "a", "b", 9),
        pairwise_question("Why?", "b", "a", 9),
    ]
    keys = [
        asking(model="other").key(question),
        asking(temperature=0.1).key(question),
        *map(here.key, others),
    ]
    assert len({here.key(question), *keys}) == 8
    same = Question(
        question.version, question.messages, 16, lambda choice: NO_ANSWER, {"logprobs": True}
    )
    assert (
        here.key(question)
        == here.key(same)
        == asking(client=None, url="http://elsewhere/v1").key(question)
    )


# --- Plans ---


@pytest.fixture
def no_network(monkeypatch):
    """The test fails at any attempt to connect or to look up a name."""

    class NoNetwork(BaseException):
        pass

    def refuse(*_, **__):
        raise NoNetwork

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
