"""A tokenizer from wherever its model is, or trained on the task's texts; text to ids and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from data.prompts import TextFormat
from train.artifacts import Family
from train.config import CutModel, ModelSource, ScratchModel
from train.places import Place, locate
from train.sources import quiet, reading

_VOCABULARY = 512
_PAD, _EOS = "<pad>", "</s>"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt")


def tokenizer_source(source: ModelSource, teacher: str | Path | None) -> str | ScratchModel:
    """Where a model's tokenizer comes from: the place of the model itself, or the teacher's for a cut student.

    Args:
        source: the model as the configuration names it.
        teacher: the teacher's folder (or its name); read for a cut student only.
    """
    if isinstance(source, CutModel):
        assert teacher is not None, "a cut student needs its teacher"
        return str(teacher)
    return source


def load_tokenizer(
    source: ModelSource, *, texts: Iterable[str] | None, folder: str | Path | None, key: str = "student.model"
) -> PreTrainedTokenizerBase:
    """A model's tokenizer; for a model from scratch that names none, one trained on `texts`.

    Args:
        source: the model as the configuration names it.
        texts: what a tokenizer is trained on; read only where one is.
        folder: the teacher's folder (or its name); read for a cut student only.
        key: the configuration key of the model, for messages.

    Raises:
        ValueError: if there is no such place, or no tokenizer in it.
        RuntimeError: if a package is missing, files are broken or a download failed.
    """
    place = tokenizer_source(source, folder)
    if isinstance(place, str):
        return _existing(place, "teacher.model" if isinstance(source, CutModel) else key)
    if place.tokenizer is not None:
        return _existing(place.tokenizer, f"{key}.tokenizer")
    assert texts is not None, "a model from scratch needs texts to train its tokenizer on"
    return train_tokenizer(texts, place.vocabulary or _VOCABULARY)


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE: any text round-trips exactly, digits stand one by one, <pad> is 0 and </s> is 1.

    Args:
        texts: the training texts; the same texts give the same tokenizer.
        vocabulary: most tokens to have; few texts give fewer.
    """
    tokenizer = Tokenizer(models.BPE())
    # A number is read and written digit by digit, and a word or a digit takes the space before it along: small models learn arithmetic
    # and copying sooner so, and sequences are a tenth shorter than with a space token before each digit.
    pieces = pre_tokenizers.Split(Regex(r" ?\d| ?\p{L}+| ?[^\s\p{L}\d]|\s+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[_PAD, _EOS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=_PAD, eos_token=_EOS, clean_up_tokenization_spaces=False)


def _existing(source: str, key: str) -> PreTrainedTokenizerBase:
    place = locate(source, key)
    if not place.on_hub and place.gguf_file is None and not any((Path(place.name) / file).is_file() for file in _TOKENIZER_FILES):
        raise ValueError(f"{key} is {source!r}, a folder without a tokenizer: it needs one of {', '.join(_TOKENIZER_FILES)}")
    with reading(key, source, place):
        # The clean-up would drop spaces before punctuation: what was encoded must come back.
        tokenizer = AutoTokenizer.from_pretrained(place.name, clean_up_tokenization_spaces=False, **place.arguments)
        if place.gguf_file is not None:
            _name_special_tokens(tokenizer, place)
    return tokenizer


def _name_special_tokens(tokenizer: PreTrainedTokenizerBase, place: Place) -> None:
    # transformers 5.17 swaps begin and end of sequence when it converts a GGUF tokenizer (its GGUFGPTConverter); the file's own ids,
    # which its configuration reads rightly, are taken. Delete when the converter does the same.
    config = AutoConfig.from_pretrained(place.name, **place.arguments)
    for name in ("bos_token", "eos_token", "pad_token"):
        token_id = getattr(config, f"{name}_id", None)
        if isinstance(token_id, int) and token_id >= 0:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(token_id))


def encoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], list[int]]:
    """Text to token ids: none is added, and a text that spells a special token (`</s>`) gives ordinary tokens."""

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        return ids

    return encode


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of token ids, without special tokens and outer white space."""
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text.strip()


def text_format(
    tokenizer: PreTrainedTokenizerBase,
    family: Family,
    *,
    max_input_tokens: int,
    max_label_tokens: int,
    max_rationale_tokens: int,
) -> TextFormat:
    """How a model with this tokenizer is called.

    The padding id falls back to the end-of-sequence id: masks go by length, never by id. A decoder-only model's sequences open with
    what its tokenizer puts before every text (a beginning-of-sequence token, or nothing).

    Raises:
        ValueError: if the tokenizer has no end-of-sequence token.
    """
    eos_id = tokenizer.eos_token_id
    if eos_id is None:
        raise ValueError(
            "the tokenizer has no end-of-sequence token, and a model without one never stops: set eos_token in tokenizer_config.json"
        )
    return TextFormat(
        family=family,
        eos_id=eos_id,
        pad_id=pad_id(tokenizer),
        max_input_tokens=max_input_tokens,
        max_label_tokens=max_label_tokens,
        max_rationale_tokens=max_rationale_tokens,
        prefix_ids=_prefix_ids(tokenizer) if family == "decoder_only" else (),
    )


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding id, or the end-of-sequence id of a tokenizer that has no padding."""
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    assert isinstance(found, int), "text_format has refused a tokenizer without an end-of-sequence token"
    return found


def _prefix_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    # Read off a text and not off the empty one: where begin and end of sequence are one token, that would not tell which it is.
    full: list[int] = tokenizer("a")["input_ids"]
    plain = encoder(tokenizer)("a")
    starts = [start for start in range(len(full) - len(plain) + 1) if full[start : start + len(plain)] == plain]
    return tuple(full[: starts[0]]) if starts else ()


def check_same_vocabulary(student_tokenizer: PreTrainedTokenizerBase, teacher_tokenizer: PreTrainedTokenizerBase) -> None:
    """Soft labels are probabilities of token ids: both models must mean the same token by each id.

    Raises:
        ValueError: if the maps from token to id differ; equal sizes do not help.
    """
    student, teacher = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    differing = sorted(token for token in student.keys() | teacher.keys() if student.get(token) != teacher.get(token))
    if differing:
        token = differing[0]
        raise ValueError(
            f"student.loss.soft needs one vocabulary, but {len(differing)} tokens differ between student ({len(student)} tokens) and "
            f"teacher ({len(teacher)}), for example {token!r} (id {student.get(token)} and {teacher.get(token)}). "
            "Cut the student from its teacher (model: {cut_from: teacher, ...}, with fewer layers, neurons or heads), choose one of the "
            "teacher's family, or set soft: 0"
        )


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes the tokenizer's files into a model's folder."""
    with quiet():
        tokenizer.save_pretrained(folder)
