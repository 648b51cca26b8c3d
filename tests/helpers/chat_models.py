"""Tiny chat models made here, and runs of the preset `llm` with them."""

import json

import tokenizers
import torch

import train
from chat.checkpoints import read_transformer, write_transformer
from chat.policy import ChatPolicy
from chat.template import Chat
from experiments.training import CLASSES_KEPT
from model import Config, Transformer

PROMPTS = [
    f"What is {what}?"
    for what in "rain snow wind fire sea star cloud storm moon river hill ice fog dew hail".split()
]

TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)

SHORT = (
    "--max-new-tokens 8 --samples 3 --held-out 3 --judged 2 --iterations 2 --batch-size 8 "
    "--lr 0.003 --threads 1 --margin 0.02"
)


def make_model(folder, seed=0, template=TEMPLATE, **more):
    """A Hugging Face directory with a tiny random model, a tokenizer of its own and a chat
    template."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    bytes_of_text = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = ["<|start|>", "<|end|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=bytes_of_text
    )
    tokenizer.train_from_iterator(PROMPTS * 3, trainer)
    torch.manual_seed(seed)
    size = tokenizer.get_vocab_size()
    shape = {
        "layers": 2,
        "width": 32,
        "heads": 2,
        "kv_heads": 1,
        "hidden": 64,
        "tied": True,
        "context": 256,
    }
    write_transformer(Transformer(Config(size, **shape | more)), folder)
    Chat(tokenizer, template, {"eos_token": "<|end|>"}, tokenizer.token_to_id("<|end|>")).save(
        folder
    )
    return folder


def policy_of(directory, dtype=torch.float32, **more):
    return ChatPolicy(
        read_transformer(directory, dtype), Chat.from_pretrained(directory), 10, **more
    )


def write_prompts(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def words(directory, prompts_file, out, *more):
    """The command line of a short run."""
    paths = {"--model": directory, "--prompts": prompts_file, "--out": out}
    return ["llm", *(str(word) for pair in paths.items() for word in pair), *SHORT.split(), *more]


def run(directory, prompts_file, out, *more):
    return train.main(words(directory, prompts_file, out, *more))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def state(out):
    with torch.serialization.safe_globals(list(CLASSES_KEPT)):
        return torch.load(out / "checkpoint/state.pt", weights_only=True)
