"""Soft labels from the log-probabilities that a server sends along, where its tokens are the very ones that a student learns."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerBase

from data.prompts import ANSWER_MARK, Encode, TextFormat
from data.soft_labels import TopK
from train.teacher.writing import ServerToken

_TOKEN_ID = re.compile(r"token_id:(\d+)")
_MOST_MASS = 1.001
"""Probabilities may add up to 1 and the server's rounding; more is no distribution."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What the tokens of a server are looked up in."""

    size: int
    """Ids from here on are padding rows of the model's head, which no tokenizer knows."""
    ids: Mapping[bytes, int]
    """The id of each token by its bytes, for servers that send no ids; empty where a token's bytes depend on its place (SentencePiece)."""
    texts: Mapping[int, bytes]
    """The inverse."""


def vocabulary_of(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """The tokens of a tokenizer by their bytes; of other kinds than byte-level BPE (GPT-2's, Llama 3's, Qwen's) the size alone."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not isinstance(backend.decoder, ByteLevel):
        return Vocabulary(len(tokenizer), {}, {})
    special = {index: token.content.encode() for index, token in tokenizer.added_tokens_decoder.items()}
    plain = {i: bytes(_BYTES[c] for c in t) for t, i in tokenizer.get_vocab().items() if i not in special and _BYTES.keys() >= set(t)}
    texts = plain | special
    return Vocabulary(len(tokenizer), {text: index for index, text in texts.items()}, texts)


def _byte_level_alphabet() -> dict[str, int]:
    # Source: GPT-2's bytes_to_unicode: printable characters stand for themselves, the other bytes follow from 256 on in their order.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTES = _byte_level_alphabet()


def read_tokens(log_probs: Any, vocabulary: Vocabulary) -> tuple[ServerToken, ...]:
    """The `logprobs` of a choice, in the form of /chat/completions or the older one of /completions (llama.cpp sends the first for both).

    Ids are taken where a server sends them: `id` (llama.cpp), or `token_id:N` as the text (`vllm serve --return-tokens-as-token-ids`).

    Returns:
        One for each token; none where there are no log-probabilities.

    Raises:
        ValueError: if they are of neither form.
    """
    if log_probs is None:
        return ()
    try:
        if log_probs.get("content") is not None:
            return tuple(_token(entry, entry["top_logprobs"], vocabulary) for entry in log_probs["content"])
        rows = zip(log_probs["tokens"], log_probs["token_logprobs"], log_probs["top_logprobs"], strict=True)
        return tuple(
            _token({"token": token, "logprob": value}, [{"token": t, "logprob": v} for t, v in (top or {}).items()], vocabulary)
            for token, value, top in rows
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"log-probabilities of no known form ({type(error).__name__}: {error}): {json.dumps(log_probs)[:200]}") from error


def _token(entry: Mapping[str, Any], top: Sequence[Mapping[str, Any]], vocabulary: Vocabulary) -> ServerToken:
    text, index = _identity(entry, vocabulary)
    known = {i: float(e["logprob"]) for e in top if (i := _identity(e, vocabulary)[1]) is not None and i < vocabulary.size}
    return ServerToken(text, index, float(entry["logprob"]), tuple(sorted(known.items(), key=lambda pair: -pair[1])))


def _identity(entry: Mapping[str, Any], vocabulary: Vocabulary) -> tuple[bytes, int | None]:
    match = _TOKEN_ID.fullmatch(str(entry["token"]))
    if match is not None:  # before the bytes, which vLLM then makes of these words
        return vocabulary.texts.get(int(match[1]), b""), int(match[1])
    text = bytes(entry["bytes"]) if entry.get("bytes") is not None else str(entry["token"]).encode()
    index = entry.get("id", vocabulary.ids.get(text))
    return text, index if isinstance(index, int) else None


def align(tokens: Sequence[ServerToken], text: str, encode: Encode, k: int, *, start: int = 0, end_id: int | None = None) -> TopK | None:
    """The soft labels of a part of what a server wrote, if its tokens there are those of the part tokenized by itself.

    Args:
        tokens: all that the server generated.
        text: the part as a student learns it (`TextFormat.target`).
        encode: of the tokenizer whose ids are stored.
        k: probabilities a token.
        start: bytes of the generated text that come before the part.
        end_id: end of sequence; its soft label follows where the server generated that token right after the part.

    Returns:
        None where the text is not there, tokenizes otherwise, or a token lacks k probabilities.
    """
    ids = encode(text)
    at = b"".join(token.text for token in tokens).find(text.encode(), start)
    starts = accumulate((len(token.text) for token in tokens), initial=0)
    first = next((n for n, (token, begin) in enumerate(zip(tokens, starts, strict=False)) if token.text and begin == at), None)
    if not ids or first is None or [token.id for token in tokens[first : first + len(ids)]] != ids:
        return None
    end = first + len(ids)
    part = tokens[first : end + 1] if end_id is not None and end < len(tokens) and tokens[end].id == end_id else tokens[first:end]
    return _top_k(part, k) if all(_whole(token, k) for token in part) else None


def _whole(token: ServerToken, k: int) -> bool:
    mass = sum(math.exp(log_prob) for _, log_prob in token.top[:k])
    return len(token.top) >= k and mass <= _MOST_MASS and math.isfinite(token.log_prob)


def _top_k(part: Sequence[ServerToken], k: int) -> TopK:
    ids = np.array([[index for index, _ in token.top[:k]] for token in part], np.int32)
    log_probs = np.array([[log_prob for _, log_prob in token.top[:k]] for token in part], np.float32)
    return TopK(ids, log_probs, np.array([token.log_prob for token in part], np.float32))


def soft_labels(
    tokens: Sequence[ServerToken], rationale: str, label: str | None, form: TextFormat, encode: Encode, k: int
) -> tuple[TopK | None, TopK | None]:
    """The soft labels of a rationale and of the label after `Answer:`, each None where it cannot be aligned.

    Args:
        tokens: all that the server generated (`Written.tokens`).
        rationale: as it was parsed.
        label: as the teacher wrote it, where that is the gold label to the letter (a student has no use for others); else None.
        form: of the tokenizer whose ids are stored: what a target opens with, and the end of sequence.
        encode: of that tokenizer.
        k: probabilities a token.
    """
    head = align(tokens, form.target(rationale), encode, k) if rationale else None
    if label is None:
        return head, None
    text = b"".join(token.text for token in tokens)
    answer = f"{ANSWER_MARK}{form.target(label)}".encode()
    found = re.search(re.escape(answer) + rb"(?![0-9A-Za-z])", text)
    if found is None:
        return head, None
    return head, align(tokens, form.target(label), encode, k, start=found.start() + len(ANSWER_MARK), end_id=form.eos_id)
