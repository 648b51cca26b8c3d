"""Which models a server offers, or a ledger has replies of."""

from __future__ import annotations

import os
from pathlib import Path

from judge.client import hidden, make_client, received, redirection
from judge.ledger import Ledger, Refused, for_terminal
from judge.replies import dig, from_json

PATIENCE = 10.0  # seconds in which a server must say which models it has


def only_model(url: str | None) -> str:
    """The name of the only model that a server offers. Raises Refused if it offers several, or does
    not say within `PATIENCE` seconds."""
    import openai

    if url is None and not os.environ.get("OPENAI_BASE_URL"):
        raise Refused("the model's name is missing, and OpenAI has many; name one, openai:MODEL")
    client = make_client(url)
    where = str(client.base_url).rstrip("/")
    try:
        models = dig(from_json(received(client.get, "/models", PATIENCE)), "data")
    except openai.APIStatusError as error:
        told = f"answers HTTP {error.status_code}; name the model: openai:MODEL"
        if 300 <= error.status_code < 400:
            told = redirection(error, client.api_key)
        raise Refused(f"{where} {told}") from None
    except OSError as error:
        raise Refused(
            f"{where} does not say which models it has ({error}); check the URL, or name the "
            "model: openai:MODEL"
        ) from None
    ids = [dig(model, "id") for model in models] if isinstance(models, list) else []
    names = [str(name) for name in ids if name]
    name = only([hidden(name, client.api_key) for name in names], where)
    if name not in names:
        raise Refused(
            f"{where} calls its model {name!r}, after the key; name the model: openai:MODEL"
        )
    return name


def recorded_models(cache: str | Path, kind: str) -> list[str]:
    """The models whose replies to a "judge" or a "teacher" are in a ledger. Raises Refused if it
    cannot be read."""
    return Ledger(cache, read_only=True).models(kind == "teacher")


def only(names: list[str], where: str, how: str = "name one: openai:MODEL") -> str:
    """The only one of the names. Raises Refused, which says what to do (`how`), if there are none
    or several."""
    if len(names) != 1:
        told = ", ".join(for_terminal(name)[:100] for name in names[:5])
        raise Refused(f"{where} has {len(names)} models{': ' * bool(names)}{told}; {how}")
    return names[0]
