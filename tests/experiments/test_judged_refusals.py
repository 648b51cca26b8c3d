"""What a judged run refuses, and that the key is in no file."""

import re

import pytest

import train
from helpers.judged_runs import KEY, SHORT, TINY, dry, judged
from helpers.runs import everything_in, refused

# --- What is refused ---

pytestmark = pytest.mark.usefixtures("judges_key")


SCORED = "rule scored, judgments scores, Algorithm 2 or 4 and a language model of judge-form scored"

CASES = [
    ("--oracle gpt-4", "oracle is 'gpt-4'; expected synthetic, openai:MODEL or replay:CACHE"),
    ("--oracle replay:", "oracle is 'replay:'"),
    ("--oracle openai:", "oracle is 'openai:'; the model's name is missing: expected openai:MODEL"),
    ("--oracle openai", "the model's name is missing, and OpenAI has many; name one, openai:MODEL"),
    ("--teacher openai:", "teacher is 'openai:'; the model's name is missing"),
    ("--oracle replay:nothing.sqlite", "nothing.sqlite cannot be used as a cache"),
    ("--teacher human", "teacher is 'human'"),
    ("--judge-url URL --judge-prices 10", "prices are '10'; expected dollars per million tokens"),
    ("--judge-url URL --judge-prices=-1,2", "prices are -1.0 and 2.0"),
    ("--judge-url URL --judge-prices nan,2", "prices are nan and 2.0"),
    ("--judge-url URL --max-failed 2", "max_failed is 2.0; expected 0 to 1"),
    ("--judge-url URL --max-failed nan", "max_failed is nan"),
    ("--judge-url URL --judge-concurrency 0", "judge_concurrency is 0"),
    ("--judge-url URL --judge-timeout 0", "judge_timeout is 0"),
    ("--judge-url URL --judge-form verbose", "invalid choice: 'verbose'"),
    ("--judge-url URL --judged 0", "judged is 0"),
    ("--judge-url URL --max-usd=-1", "max_usd is -1.0"),
    ("--judge-url URL --max-usd nan", "max_usd is nan"),
    (
        "--judge-url URL --max-usd 5",
        "the price of 'local-judge' is not known; give prices too (--judge-prices 2.5,10",
    ),
    (
        "--judge-url URL --judge-prices 1,1 --max-usd 5 --teacher openai:other",
        "give prices too (--teacher-prices 2.5,10",
    ),
    ("--judge-url ftp://localhost/v1", "must be like http://localhost:8000/v1"),
    ("--judge-url http://me:secret@localhost/v1", "with no key in it"),
    ("--judge-url http://localhost/v1?key=secret", "with no key in it"),
    ("--oracle synthetic --judge-model m", "judge-model belongs to a language model"),
    ("--oracle synthetic --judge-url URL", "judge-url belongs to a language model"),
    ("--oracle replay:CACHE --judge-url URL", "judge-url belongs to a language model"),
    ("--oracle replay:CACHE --max-usd 1", "max-usd belongs to a language model"),
    ("--oracle openai:gpt-4o --judge-model gpt-4", "leave one of them out"),
    ("--max-usd 5", "max-usd belongs to a language model"),
    ("--judge-url URL --rule scored", SCORED),
    ("--judge-url URL --judgments scores", SCORED),
    ("--rule scored --judgments scores", SCORED),
    ("--judge-url URL --rule scored --judgments scores --judge-form pairwise", SCORED),
    ("--judge-url URL --rule scored --judgments scores --algorithm 3", SCORED),
]


@pytest.mark.parametrize(("arguments", "message"), CASES)
def test_bad_options_of_a_judge_are_one_line_exit_code_2_and_nothing_written(
    server, arguments, message, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    server.control()
    line = refused(capsys, *TINY, *arguments.replace("URL", server.url).split(), "--out", "run")
    assert message in line
    assert "secret" not in line
    assert list(tmp_path.iterdir()) == []
    assert server.stats()["requests"] == 0


def test_a_limit_can_be_set_on_a_teacher_alone(capsys, tmp_path):
    assert "stops below $3" in dry(
        capsys,
        *TINY,
        *("--teacher", "openai:gpt-4o", "--teacher-prices", "2.5,10", "--max-usd", 3),
        *("--out", tmp_path / "run"),
    )


def test_the_judges_price_is_the_teachers_if_they_are_the_same_model_named_or_not(
    server, capsys, tmp_path
):
    for teacher in ("openai:local-judge", "openai"):
        said = dry(
            capsys, *judged(server, "--teacher", teacher, "--max-usd", 5, "--out", tmp_path / "run")
        )
        assert said.count("($10 and $30 a million tokens)") == 2


@pytest.mark.parametrize(
    ("key", "message"),
    [(None, "OPENAI_API_KEY is not set"), ("sk two", "OPENAI_API_KEY holds a space")],
)
def test_without_a_key_or_with_one_that_cannot_be_one_nothing_is_written(
    key, message, capsys, tmp_path, monkeypatch
):
    monkeypatch.setenv("OPENAI_API_KEY", key) if key else monkeypatch.delenv("OPENAI_API_KEY")
    line = refused(capsys, *TINY, "--oracle", "openai:gpt-4-turbo", "--out", tmp_path / "run")
    assert message in line
    assert "two" not in line
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_something_else_is_left_alone(server, capsys, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert "choose another --out" in refused(capsys, *judged(server, "--out", tmp_path))
    assert everything_in(tmp_path) == {str(tmp_path / "notes.txt"): b"mine"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("status", "parts"),
    [
        ([401, "Incorrect key", "invalid_api_key", ""], ("Incorrect key", "check OPENAI_API_KEY")),
        (
            [404, "No such model", "model_not_found", ""],
            ("No such model", "check the model's name and the URL"),
        ),
        (
            [302, "Moved", None, "location: ROOT/elsewhere\r\n"],
            ("redirects to ROOT/elsewhere (", "give its URL"),
        ),
        (
            [307, "Moved", None, "location: ROOT/elsewhere\r\n"],
            ("redirects to ROOT/elsewhere (", "give its URL"),
        ),
    ],
)
def test_a_refusal_of_the_server_is_one_line_and_the_run_goes_on_later(
    server, status, parts, capsys, tmp_path
):
    """A refusal of the server is one line and exit code 2 and the run goes on when it is mended."""
    server.control(status=[*status[:3], status[3].replace("ROOT", server.root)])
    arguments = judged(server, "--out", tmp_path / "run", preset=SHORT)
    line = refused(capsys, *arguments)
    assert f"local-judge at {server.url}" in line
    assert f"HTTP {status[0]}" in line
    assert all(part.replace("ROOT", server.root) in line for part in parts)
    assert server.stats()["strays"] == 0
    server.control()
    assert train.main([*arguments, "--resume"]) == 0


# --- The key ---

KEYED = {  # how the server behaves, further arguments, the exit code
    "a good run": ({}, "", 0),
    "a teacher": ({}, "--teacher openai:local-judge", 0),
    "a wrong key": ({"status": [401, "Incorrect key", "invalid_api_key", ""]}, "", 2),
    "too many faults": ({"faults": ["not-json"], "mode": "always"}, "", 1),
    "as JSON may escape it": ({"spelling": "solidus"}, "--teacher openai:local-judge", 0),
    "a wrong key, escaped": (
        {"spelling": "unicode", "status": [401, "Incorrect key", "invalid_api_key", ""]},
        "",
        2,
    ),
    "faults, escaped": (
        {"spelling": "unicode", "faults": ["two-answers"], "mode": "always"},
        "",
        1,
    ),
    "its model": ({"models": [200, '{"data": [{"id": "KEY"}]}', ""]}, "", 2),
    "its models": ({"models": [200, '{"data": [{"id": "a"}, {"id": "of KEY"}]}', ""]}, "", 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KEYED)
def test_the_key_is_in_no_file_and_in_nothing_said_even_if_the_server_repeats_it(
    server, name, capsys, tmp_path
):
    behaviour, more, code = KEYED[name]
    server.control(echo=True, **behaviour)
    assert (
        train.main(judged(server, *more.split(), "--out", tmp_path / "run", preset=SHORT)) == code
    )
    said = capsys.readouterr()
    assert KEY not in unescaped(said.out + said.err)
    files = everything_in(tmp_path)
    assert bool(files) == ("models" not in behaviour)
    assert [
        path for path, content in files.items() if KEY in unescaped(content.decode("latin-1"))
    ] == []


def unescaped(text):
    """A text without the escapes of JSON within JSON, however deep."""
    return re.sub(r"\\+u00([0-9a-fA-F]{2})", lambda found: chr(int(found[1], 16)), text).replace(
        "\\", ""
    )
