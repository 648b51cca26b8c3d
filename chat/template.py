"""How a chat model is spoken to: its tokenizer and chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from chat.formats import BadCheckpoint, checkpoint_path, one_line
from chat.gguf import gguf_chat
from chat.hugging_face import directory_chat

PLAIN = "{% for message in messages %}{{ message.content }}\n\n{% endfor %}"
BEGIN = "{{ bos_token }}"  # before PLAIN where the tokenizer puts this token before any text


class Chat:
    """How a model is spoken to: by its own vocabulary and chat template.

    tokenizer: a tokenizers.Tokenizer. end: the token that ends an answer."""

    def __init__(self, tokenizer: Any, template: str, specials: dict[str, str], end: int):
        from jinja2.exceptions import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(reason: str) -> None:
            raise TemplateError(reason)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = refuse
        # no date: a prompt's tokens do not depend on the day
        environment.globals["strftime_now"] = lambda form: ""
        self.tokenizer, self.specials, self.end = tokenizer, specials, end
        self.source = template
        self.special_tokens = {
            i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special
        }
        try:
            self.template = environment.from_string(self.source)
        except Exception as error:  # also what Python says of the code that jinja2 makes of it
            raise BadCheckpoint(f"the chat template cannot be read ({one_line(error)})") from error

    @classmethod
    def from_pretrained(cls, path: str | Path, plain: bool = False) -> Chat:
        """The chat of a model's directory or GGUF file.

        plain: the prompt and an empty line in place of the model's template. BadCheckpoint if no
        tokenizer can be read, there is no end token, or there is no template and plain is not
        asked for."""
        path = checkpoint_path(path)
        tokenizer, template, specials = (directory_chat if path.is_dir() else gguf_chat)(path)
        end = tokenizer.token_to_id(specials.get("eos_token", ""))
        if end is None:
            raise BadCheckpoint(f"{path} names no end token that its vocabulary has (eos_token)")
        if plain:
            begin = tokenizer.token_to_id(specials.get("bos_token", ""))
            begins = begin is not None and tokenizer.encode("").ids[:1] == [begin]
            template = BEGIN + PLAIN if begins else PLAIN
        elif not template:
            raise BadCheckpoint(
                f"{path} has no chat template; give --chat-format plain (plain=True) to ask it by "
                "the prompt and an empty line"
            )
        return cls(tokenizer, template, specials, end)

    def prompt(self, text: str, system: str | None = None) -> list[int]:
        """The tokens that the model reads before it answers.

        What the text itself spells is text, even if it looks like a special token."""
        frame = [self.special(part) for part in self.render("\0", system).split("\0")]
        if len(frame) == 1:
            raise BadCheckpoint("the chat template leaves the user's message out")
        tokens = self.special(self.render(text, system))
        expected = [i for part in frame for i in part if i in self.special_tokens]
        if [i for i in tokens if i in self.special_tokens] == expected:
            return tokens
        # The text, or what a normalizer makes of it, spells special tokens.
        words = self.encode(text)
        return frame[0] + [token for part in frame[1:] for token in words + part]

    def render(self, text: str, system: str | None) -> str:
        """The prompt as the template writes it. BadCheckpoint if it fails, on purpose or not."""
        messages = [{"role": "user", "content": text}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        try:
            return self.template.render(
                messages=messages,
                add_generation_prompt=True,
                tools=None,
                documents=None,
                **self.specials,
            )
        except Exception as error:  # a template can raise whatever Python can
            raise BadCheckpoint(f"the chat template fails ({one_line(error)})") from error

    def special(self, text: str) -> list[int]:
        """Tokens of a piece of the template, in which special tokens are special. BadCheckpoint if
        the vocabulary has none for it."""
        try:
            return self.tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the library raises nothing more precise
            raise BadCheckpoint(
                f"the tokenizer has no tokens for {text[:60]!r} ({one_line(error)}); expected a "
                "vocabulary with an unknown token or with all bytes"
            ) from error

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, none of them special."""
        self.tokenizer.encode_special_tokens = True
        try:
            return self.special(text)
        finally:
            self.tokenizer.encode_special_tokens = False

    def save(self, path: str | Path) -> None:
        """Write the tokenizer and its template as transformers and vLLM load them.

        tokenizer.json, tokenizer_config.json, and generation_config.json, by which answers end."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(str(path / "tokenizer.json"))
        config = {
            **self.specials,
            "chat_template": self.source,
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
        for name, content in (
            ("generation_config.json", {"eos_token_id": self.end}),
            ("tokenizer_config.json", config),
        ):
            (path / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        (path / "chat_template.jinja").unlink(missing_ok=True)  # an older one would go first

    def decode(self, tokens: list[int]) -> str:
        """The text of tokens, special ones left out; bytes that are no UTF-8 become U+FFFD."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True)
