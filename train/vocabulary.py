"""A vocabulary without the tokens that a task's texts never use: fewer rows of embedding and head, and these texts cut as before.

The tokens of a byte-pair encoding are closed under its merges here, and the best path of a Unigram model stays the best where only others
go: so a text whose tokens all stay is cut as it was. Any other text is cut into smaller pieces.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data.prompts import TextFormat
from train.tokenization import load_tokenizer, save_tokenizer

_FILE, _SETTINGS = "tokenizer.json", "tokenizer_config.json"
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
"""Of a model's configuration; some name a token that the tokenizer lacks."""


def trim(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, form: TextFormat, used: Iterable[int], at_least: int = 0
) -> tuple[PreTrainedTokenizerBase, TextFormat, dict[int, int]]:
    """Takes tokens out of a model, in place, and of its tokenizer, of which a new one is made.

    Args:
        model: decoder-only or encoder-decoder; embedding and head lose rows, whatever else it has stays.
        tokenizer: the model's; a byte-pair encoding or a Unigram model with a tokenizer.json.
        form: how the model is called.
        used: ids of the tokens that must stay; what they are merged from, single characters and bytes, and special tokens stay, too.
        at_least: where fewer would stay, the lowest ids are added: a byte-pair encoding's most frequent tokens.

    Returns:
        The tokenizer, the format, and the new ids by the old ones.

    Raises:
        ValueError: if the tokenizer is of another kind.
    """
    named = {key: value for key in _IDS if isinstance(value := getattr(model.config, key, None), int)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_tokenizer(tokenizer, folder)
        described = json.loads((folder / _FILE).read_text(encoding="utf-8")) if (folder / _FILE).is_file() else {}
        kept = kept_ids(described, {*used, form.eos_id, form.pad_id, *form.prefix_ids, *named.values()}, at_least)
        new = {old: place for place, old in enumerate(kept)}
        (folder / _FILE).write_text(json.dumps(without_others(described, new), ensure_ascii=False), encoding="utf-8")
        settings = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
        (folder / _SETTINGS).write_text(json.dumps(_settings(settings, new)), encoding="utf-8")
        smaller = load_tokenizer(str(folder), texts=None, folder=None, key="the trimmed tokenizer")
    keep_rows(model, kept)
    for key, value in named.items():
        setattr(model.config, key, new.get(value))
    prefix = tuple(new[token] for token in form.prefix_ids)
    return smaller, replace(form, eos_id=new[form.eos_id], pad_id=new[form.pad_id], prefix_ids=prefix), new


def kept_ids(described: Mapping[str, Any], used: Iterable[int], at_least: int = 0) -> list[int]:
    """Ids that must stay where `used` do, the least first.

    Args:
        described: a tokenizer.json.
        used: ids of tokens; those that the tokenizer lacks do not count.
        at_least: how many are to stay, where there are so many.

    Raises:
        ValueError: if the tokenizer is neither a byte-pair encoding nor a Unigram model.
    """
    by_id = {index: token for token, index in _vocabulary(described)}
    parts = _parts(described["model"])
    special = {token["id"] for token in described["added_tokens"]}
    plain = {index for index, token in by_id.items() if token not in parts and (len(token) == 1 or _is_byte(token) or parts)}
    ids = {token: index for index, token in by_id.items()}
    kept, used = special | plain, by_id.keys() & set(used)
    for index in (*sorted(used), *sorted(by_id)):
        if index not in kept and (index in used or len(kept) < at_least):
            kept |= _with_parts(by_id[index], parts, ids)
    return sorted(kept)


def without_others(described: Mapping[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """A tokenizer.json that has the tokens of `new` alone, under their new ids."""
    model = described["model"]
    kept = {token: new[index] for token, index in _vocabulary(described, own=True) if index in new}
    changed: dict[str, Any]
    if model["type"] == "BPE":
        merges = [merge for merge in model["merges"] if all(part in kept for part in (*_pair(merge), "".join(_pair(merge))))]
        changed = {"vocab": kept, "merges": merges}
    else:
        unknown = model["unk_id"]
        changed = {
            "vocab": [entry for index, entry in enumerate(model["vocab"]) if index in new],
            "unk_id": None if unknown is None else new[unknown],
        }
    return {
        **described,
        "model": {**model, **changed},
        "added_tokens": [{**token, "id": new[token["id"]]} for token in described["added_tokens"]],
        "post_processor": _renumbered(described.get("post_processor"), new),
        "padding": None,
        "truncation": None,
    }


@torch.no_grad()
def keep_rows(model: PreTrainedModel, kept: Sequence[int]) -> None:
    """Leaves these rows of embedding and head, in this order; tied ones stay tied."""
    rows = torch.tensor(kept)

    def smaller(weight: Tensor) -> nn.Parameter:
        return nn.Parameter(weight[rows.to(weight.device)].clone(), requires_grad=weight.requires_grad)

    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, nn.Embedding)
    assert isinstance(head, nn.Linear)
    is_tied = head.weight is embedding.weight
    embedding.weight = smaller(embedding.weight)
    embedding.num_embeddings, embedding.padding_idx = len(kept), None
    head.weight = embedding.weight if is_tied else smaller(head.weight)
    head.out_features = len(kept)
    if head.bias is not None:
        head.bias = smaller(head.bias)
    model.config.get_text_config().vocab_size = len(kept)
    model.set_input_embeddings(embedding)  # of an encoder-decoder both stacks


def _vocabulary(described: Mapping[str, Any], *, own: bool = False) -> Iterator[tuple[str, int]]:
    """Tokens and ids; of the model's `own` without those added beside it."""
    model = described.get("model", {})
    kind = model.get("type", "none")
    if kind not in ("BPE", "Unigram") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise ValueError(
            f"deploy.vocabulary takes tokens out of byte-pair encodings and Unigram models, but the student's tokenizer is of type {kind}: "
            "remove deploy.vocabulary"
        )
    vocabulary = model["vocab"]
    if kind == "BPE":
        yield from vocabulary.items()
    else:
        yield from ((entry[0], index) for index, entry in enumerate(vocabulary))
    if not own:
        yield from ((token["content"], token["id"]) for token in described["added_tokens"])


def _parts(model: Mapping[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """Of a byte-pair encoding, the pairs that each token is merged from."""
    parts: dict[str, list[tuple[str, str]]] = {}
    for merge in model.get("merges", ()):
        parts.setdefault("".join(_pair(merge)), []).append(_pair(merge))
    return parts


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def _with_parts(token: str, parts: Mapping[str, list[tuple[str, str]]], ids: Mapping[str, int]) -> set[int]:
    """Ids of a token and of all that it may be merged from."""
    found: set[int] = set()
    left = [token]
    while left:
        one = left.pop()
        if ids[one] not in found:
            found.add(ids[one])
            left += (part for pair in parts.get(one, ()) for part in pair)
    return found


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x")


def _renumbered(processor: Any, new: Mapping[int, int]) -> Any:
    """A post-processor with the new ids of what it adds."""
    if processor is None:
        return None
    changed = dict(processor)
    if "processors" in changed:
        changed["processors"] = [_renumbered(one, new) for one in changed["processors"]]
    if changed["type"] == "TemplateProcessing":
        special = changed["special_tokens"]
        changed["special_tokens"] = {name: {**one, "ids": [new[index] for index in one["ids"]]} for name, one in special.items()}
    for name in ("sep", "cls"):  # RobertaProcessing, BertProcessing
        if name in changed:
            changed[name] = [changed[name][0], new[changed[name][1]]]
    return changed


def _settings(settings: Mapping[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """tokenizer_config.json: tokens by name stay, ids are found anew."""
    left = {key: value for key, value in settings.items() if not key.endswith("_token_id")}
    if "added_tokens_decoder" in left:
        left["added_tokens_decoder"] = {str(new[int(index)]): token for index, token in left["added_tokens_decoder"].items()}
    return left
