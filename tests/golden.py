"""Did a change of the code's shape change what it computes? Small runs of every preset, compared
number by number.

    python tests/golden.py record FOLDER [--checkout PATH] [--only NAME ...]     (about 6 minutes)
    python tests/golden.py compare FOLDER FOLDER [--renamed OLD=NEW ...]

`record` runs each command of `RUNS` in the checkout (this one when left out), on one thread, and
writes what its files hold to FOLDER/NAME.json: all rows of .jsonl and .json files, each array of
.npz files and each tensor of .pt and .safetensors files by the hash of its bytes. `compare` lists
every difference, and exits 1 if there is one. Seconds, paths and versions are left out. --renamed:
a key or field that has another name in the second folder. Not part of the test suite: for before
and after a change that should change nothing."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
GAME = "game --iterations 3 --steps 6 --pairs 256 --num-prompts 2"
TEXT = "text --sft-steps 30 --iterations 2 --prompts 8 --survey 4"
LLM = (
    "llm --model {model} --prompts {prompts} --max-new-tokens 8 --samples 3 --held-out 3 "
    "--judged 2 --iterations 2 --batch-size 8 --lr 0.003 --margin 0.02"
)
RUNS = {
    "game-1": GAME,
    "game-3-option-2": f"{GAME} --algorithm 3 --option II --tau 0.1 --eta 0.5",
    "game-3-moving-reference": f"{GAME} --algorithm 3 --move-reference-every 2",
    "text-2-then-3": TEXT,
    "text-4-option-2": f"{TEXT} --algorithm 4 --option II",
    "ablations": "ablations --sft-steps 30 --iterations 2 --tuning-iterations 1 --tuning-seeds 1 "
    "--seeds 2 --prompts 6 --survey 4 --eta 4 --jobs 2",
    "llm-2": f"{LLM} --dtype float32",
    "llm-4": f"{LLM} --dtype float32 --algorithm 4 --tau 0.02",
    "llm-3": f"{LLM} --dtype float32 --algorithm 3 --tau 0.02",
    "llm-bfloat16": f"{LLM} --dtype bfloat16",
    "llm-low-rank": f"{LLM} --dtype bfloat16 --low-rank 4 --checkpointing",
    "llm-two-processes": f"{LLM} --dtype float32",
    "llm-two-processes-fsdp": f"{LLM} --dtype float32 --fsdp",
}
THREADS = {"llm-two-processes": 2, "llm-two-processes-fsdp": 2}
REPLAY = """
import json
import math
from recordings.record import comparisons
{imports}
columns = [[item[name] for item in comparisons()] for name in ("prompt", "a", "b")]
endpoint = Endpoint({model!r}, cache={cache!r}, live=False, max_failed=1.0)
for form in ("pairwise", "scored"):
    answers = OpenAIJudge(endpoint, form).prefer(*columns).tolist()
    print(json.dumps([None if math.isnan(p) else p for p in answers]))
"""
LEFT_OUT = {"seconds", "out", "model", "prompts_file"}


def tiny_model(folder: Path) -> None:
    """A random chat model of two layers, made by other libraries than ours, and prompts for it."""
    import tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    things = "rain snow wind fire sea star cloud storm moon river hill ice fog dew hail".split()
    prompts = [f"What is {thing}?" for thing in things]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|start|>", "<|end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(prompts * 3, trainer)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            initializer_range=0.2,
        )
    ).save_pretrained(folder / "model")
    tokenizer.save(str(folder / "model" / "tokenizer.json"))
    template = (
        "{% for message in messages %}<|start|>{{ message['role'] }}\n"
        "{{ message['content'] }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
    )
    config = {"eos_token": "<|end|>", "chat_template": template}
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps(config))
    lines = [json.dumps({"prompt": x}) + "\n" for x in prompts]
    (folder / "prompts.jsonl").write_text("".join(lines))


def record(folder: Path, checkout: Path, only: list[str]) -> None:
    """Run every command of `RUNS`, and the judge on the recorded replies; write what each made."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model").exists():
        tiny_model(folder)
    for name, command in RUNS.items():
        if only and name not in only:
            continue
        out = folder / "runs" / name
        words = command.format(model="model", prompts="prompts.jsonl").split()
        processes = THREADS.get(name, 1)
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        program = [sys.executable, *(launch if processes > 1 else []), str(checkout / "train.py")]
        more = ["--threads", str(processes), "--out", str(out)]
        print(name, flush=True)
        of_checkout(checkout, [*program, *words, *more], folder)
        digest = of_checkout(checkout, [sys.executable, __file__, "digest", str(out)], folder)
        (folder / f"{name}.json").write_text(digest)
    if not only or "replay" in only:
        (folder / "replay.json").write_text(json.dumps(replayed(checkout), indent=0))


def of_checkout(checkout: Path, command: list[str], folder: Path) -> str:
    """What a command of the checkout prints, run in the folder, on one thread. CalledProcessError
    if it fails."""
    paths = {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=folder, env=os.environ | paths, text=True, stdout=subprocess.PIPE, check=True
    )
    return done.stdout


def replayed(checkout: Path) -> list[Any]:
    """The judge's answers to the recorded comparisons, in both forms."""
    imports = "from judge import Endpoint, OpenAIJudge"
    if (checkout / "judge").is_dir():
        imports = "from judge.endpoint import Endpoint\nfrom oracle import OpenAIJudge"
    cache = str(checkout / "recordings" / "smollm2-135m-instruct.sqlite")
    code = REPLAY.format(imports=imports, model="smollm2-135m-instruct", cache=cache)
    lines = of_checkout(checkout, [sys.executable, "-c", code], checkout).splitlines()
    return [json.loads(line) for line in lines]


def digest(out: Path) -> dict[str, Any]:
    """What the files of a run hold, by file and place."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        name = str(path.relative_to(out))
        if path.suffix == ".jsonl":
            content: Any = [json.loads(line) for line in path.read_text().split("\n") if line]
        elif path.suffix == ".json":
            content = json.loads(path.read_text())
        elif path.suffix == ".npz":
            with np.load(path) as arrays:
                content = {array: torch.from_numpy(arrays[array]) for array in arrays.files}
        elif path.suffix == ".pt":
            content = load(path)
        elif path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            content = path.read_text() if path.suffix == ".csv" else "there"
        found |= dict(flat(content, name))
    return found


def load(path: Path) -> Any:
    """A checkpoint, with whichever classes of the checkout it names."""
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    classes = [
        getattr(importlib.import_module(n.rpartition(".")[0]), n.rpartition(".")[2]) for n in names
    ]
    with torch.serialization.safe_globals(classes):
        return torch.load(path, weights_only=True, map_location="cpu")


def flat(content: Any, place: str) -> Iterator[tuple[str, Any]]:
    """(place, plain value) of everything inside; of a tensor its dtype, shape, norm and hash."""
    if dataclasses.is_dataclass(content):
        content = {
            field.name: getattr(content, field.name) for field in dataclasses.fields(content)
        }
    if isinstance(content, dict):
        for key, value in content.items():
            if key not in LEFT_OUT:
                yield from flat(value, f"{place}/{key}")
    elif isinstance(content, list | tuple):
        yield f"{place}/length", len(content)
        for number, value in enumerate(content):
            yield from flat(value, f"{place}/{number}")
    elif isinstance(content, torch.Tensor):
        tensor = content.detach().cpu().contiguous()
        bytes_ = tensor.flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        norm = float(tensor.double().nan_to_num().norm()) if not tensor.is_complex() else 0.0
        yield (
            place,
            [str(tensor.dtype), list(tensor.shape), norm, hashlib.sha256(bytes_).hexdigest()[:16]],
        )
    elif isinstance(content, str) and hasattr(content, "tokens"):
        yield place, [str(content), list(content.tokens)]
    else:
        yield place, content


def compare(first: Path, second: Path, renamed: dict[str, str]) -> int:
    """List the differences between two recordings; how many there are."""
    total = 0
    for path in sorted(first.glob("*.json")):
        before, after = (json.loads((folder / path.name).read_text()) for folder in (first, second))
        if isinstance(before, dict):
            before = {
                "/".join(renamed.get(part, part) for part in place.split("/")): value
                for place, value in before.items()
            }
        else:
            before, after = ({str(i): v for i, v in enumerate(items)} for items in (before, after))
        different = [
            p
            for p in sorted(before.keys() | after.keys())
            if before.get(p, "-") != after.get(p, "-")
        ]
        print(f"{path.stem}: {len(before)} values, {len(different)} different")
        for place in different[:40]:
            print(
                f"    {place}: {before.get(place, '(none)')} -> {after.get(place, '(none)')}"[:300]
            )
        total += len(different)
    return total


def main() -> int:
    """Record, compare or, for `record` itself, digest."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("record", "compare", "digest"))
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--checkout", type=Path, default=ROOT)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--renamed", nargs="*", default=[])
    options = parser.parse_args()
    if options.what == "record":
        record(options.folders[0].resolve(), options.checkout.resolve(), options.only)
    elif options.what == "digest":
        json.dump(digest(options.folders[0]), sys.stdout, indent=0)
    else:
        renamed = dict(pair.split("=") for pair in options.renamed)
        return int(compare(*options.folders, renamed) > 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
