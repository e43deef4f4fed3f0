"""How a teacher is asked: its tokenizer and prompts, without its weights; and the hashes by which a store knows it again.

python -m train.teacher.opening < REQUEST.json      prints the origin that the store of a teacher should have
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from data.prompts import TextFormat
from data.store_check import Origin
from data.teacher_prompts import TeacherPrompt, teacher_prompt
from train.artifacts import Family
from train.config import TeacherConfig
from train.models import family_of, skeleton
from train.places import locate
from train.teacher.prompter import Prompter
from train.tokenization import load_tokenizer, text_format


@dataclass(frozen=True, slots=True)
class Local:
    """What a teacher that runs here is asked with."""

    tokenizer: PreTrainedTokenizerBase
    form: TextFormat
    prompter: Prompter
    origin: Origin


@dataclass(frozen=True, slots=True)
class Served:
    """What a teacher behind a server is asked with."""

    prompt: TeacherPrompt
    tokenizer: PreTrainedTokenizerBase | None
    """Of the server's model, where soft labels are stored by its ids."""
    origin: Origin


@dataclass(frozen=True, slots=True)
class Recorded:
    """A teacher that has answered already."""

    origin: Origin


def open_prompts(config: TeacherConfig, tuned: Path | None) -> Local | Served | Recorded:
    """The prompts of a teacher, and the origin of what it writes.

    Args:
        config: the teacher.
        tuned: the folder of the tuned checkpoint, or None.

    Raises:
        ValueError: if the model, its tokenizer or the file of examples is not what the configuration says.
        RuntimeError: if a package is missing, files are broken or a download failed.
    """
    if config.source == "recorded":
        return Recorded(Origin("recorded", "", _hash(config.label, config.rationale)))
    if config.source == "endpoint":
        return _served(config)
    if tuned is not None:
        tokenizer, form = load_tokenizer(str(tuned / "model"), texts=None, folder=None), TextFormat.load(tuned / "model")
        prompter, name = Prompter(tokenizer, form, None), tuned.name
    else:
        assert isinstance(config.model, str), "the configuration refuses a teacher from scratch that is not tuned"
        tokenizer = load_tokenizer(config.model, texts=None, folder=None, key="teacher.model")
        shape = skeleton(config.model, "teacher.model")
        form = _form(config, tokenizer, family_of(shape))
        prompter = Prompter(tokenizer, form, teacher_prompt(config.rationales), chat=config.rationales.chat)
        name = _named(config.model, getattr(shape.config, "_commit_hash", None))
    return Local(tokenizer, form, prompter, Origin(name, tokenizer_hash(tokenizer), prompter.fingerprint))


def _form(config: TeacherConfig, tokenizer: PreTrainedTokenizerBase, family: Family) -> TextFormat:
    return text_format(
        tokenizer,
        family,
        max_input_tokens=config.rationales.max_input_tokens,
        max_label_tokens=config.rationales.max_new_tokens,
        max_rationale_tokens=config.rationales.max_new_tokens,
    )


def _served(config: TeacherConfig) -> Served:
    server = config.endpoint
    assert server is not None, "the configuration refuses source: endpoint without one"
    prompt = teacher_prompt(config.rationales)
    tokenizer = None
    if server.tokenizer is not None:
        tokenizer = load_tokenizer(server.tokenizer, texts=None, folder=None, key="teacher.endpoint.tokenizer")
    template = _hash(server.api, prompt.text("{input}", "{hint}"), prompt.messages("{input}", "{hint}"))
    return Served(prompt, tokenizer, Origin(f"{config.model} at {server.url}", tokenizer_hash(tokenizer) if tokenizer else "", template))


def _named(model: str, commit: str | None) -> str:
    """A model's name with what tells its revision: the hub's commit, or the names and sizes of the files."""
    place = locate(model, "teacher.model")
    if place.on_hub:
        return f"{model}@{commit}"
    folder = Path(place.name)
    files = [folder / place.gguf_file] if place.gguf_file else sorted(path for path in folder.rglob("*") if path.is_file())
    return f"{model}@{_hash([(path.relative_to(folder).as_posix(), path.stat().st_size) for path in files])[:12]}"


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over what decides the ids of a text, and the special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {"vocab": tokenizer.get_vocab()}
    # Set by whoever used it last, and undone in every call of ours.
    passing = ("truncation", "padding")
    specials = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return _hash({key: value for key, value in rules.items() if key not in passing}, specials)


def _hash(*values: object) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def main() -> int:
    """Prints the origin, as JSON, for {"teacher": ..., "tuned": FOLDER or null} on standard input; what a user can mend in one line."""
    request = json.load(sys.stdin)
    try:
        tuned = Path(request["tuned"]) if request["tuned"] else None
        print(json.dumps(asdict(open_prompts(TeacherConfig.model_validate(request["teacher"]), tuned).origin)))
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
