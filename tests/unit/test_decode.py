"""The decoding loop writes what plain `generate` writes: greedy and sampled, whatever the slots, prefixes, refills and moves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from train.config import ScratchModel
from train.engine import InferenceModel, place_for_inference
from train.models import load_model
from train.teacher import decode, generate, trial
from train.teacher import slots as slots_room
from train.teacher.attention import KeyValueCache, OneEach, attend, attending
from train.teacher.decode import LoopWriter, _shared_prefix, token_bytes
from train.teacher.generate import Decoding, PlainWriter, open_writer
from train.teacher.trial import reason_against
from train.teacher.writing import Request, Sampling, Written
from train.tokenization import text_format, train_tokenizer
from train.varlen import UnsupportedAttention
from train.world import World

WORDS = ["one two three", "four five six", "seven eight nine ten"]
SAMPLED = Sampling(temperature=1.5, top_p=0.9)


@dataclass(frozen=True)
class NoPrompts:
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()

    def request(self, *_: Any) -> Request:
        raise AssertionError("the tests make their own requests")


@pytest.fixture(scope="module")
def teacher() -> tuple[InferenceModel, Decoding]:
    tokenizer = train_tokenizer(WORDS, 300)
    model = load_model(ScratchModel(from_scratch="llama", d_model=32, layers=2, heads=4, d_ff=64), tokenizer, seed=3, dtype=torch.float32)
    for name, parameter in model.model.layers.named_parameters():
        if "proj" in name:  # tied and small, random weights would only repeat the last token
            parameter.data *= 12
    form = text_format(tokenizer, "decoder_only", max_input_tokens=64, max_label_tokens=8, max_rationale_tokens=32)
    placed = place_for_inference(model, World(0, 1, torch.device("cpu")), "replica")
    return placed, Decoding(form, tokenizer, (form.eos_id,), len(tokenizer), 20, Sampling(), ())


def requests(num: int, shared: int = 40, seed: int = 0) -> list[Request]:
    generator = torch.Generator().manual_seed(seed)
    opening = torch.randint(5, 290, (shared,), generator=generator).tolist()
    lengths = torch.randint(1, 30, (num,), generator=generator).tolist()
    own = [torch.randint(5, 290, (length,), generator=generator).tolist() for length in lengths]
    # One prompt in ten lacks the opening, as a few-shot prompt that was too long does.
    return [Request(key=100 + n, ids=tuple((opening if n % 10 != 3 else []) + own[n])) for n in range(num)]


def texts(writer: Any, chunks: Sequence[Sequence[Request]]) -> dict[int, list[Written]]:
    return dict(writer.write(enumerate(chunks)))


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("shared", [0, 40])
@pytest.mark.parametrize("slots", [3, 64, 200])
def test_the_loop_writes_what_generate_writes(
    teacher: tuple[InferenceModel, Decoding], monkeypatch: pytest.MonkeyPatch, sampling: Sampling, shared: int, slots: int
) -> None:
    monkeypatch.setattr(slots_room, "_FEWEST_SLOTS", 2)
    monkeypatch.setattr(slots_room, "_PREFILL_TOKENS", 100)
    placed, decoding = teacher
    decoding = replace(decoding, sampling=sampling, stop=("ten",))
    chunks = [requests(40, shared), requests(7, shared, seed=1), requests(23, shared, seed=2)]
    expected = texts(PlainWriter(placed, decoding, NoPrompts(), batch_size=16), chunks)
    found = texts(LoopWriter(placed, decoding, NoPrompts(), batch_size=slots), chunks)
    assert found == expected
    assert len({answer.text for answer in expected[0]}) > 20
    assert min(answer.num_tokens for answers in expected.values() for answer in answers) < 20


def test_out_of_memory_halves_the_slots_and_loses_nothing(
    teacher: tuple[InferenceModel, Decoding], monkeypatch: pytest.MonkeyPatch
) -> None:
    placed, decoding = teacher
    chunks = [requests(40)]
    expected = texts(PlainWriter(placed, decoding, NoPrompts(), batch_size=40), chunks)
    real, sizes = slots_room.Slots.decode, []

    def failing(slots: Any) -> None:
        sizes.append(slots.size)
        if len(sizes) in (2, 4):  # in the middle of rows
            raise torch.OutOfMemoryError
        real(slots)

    monkeypatch.setattr(slots_room.Slots, "decode", failing)
    assert texts(LoopWriter(placed, decoding, NoPrompts(), batch_size=32), chunks) == expected
    assert sizes[0] == 32
    assert sizes[-1] == 8


def test_out_of_memory_with_one_slot_says_what_to_change(teacher: tuple[InferenceModel, Decoding], monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(slots_room.Slots, "decode", failing)
    with pytest.raises(RuntimeError) as caught:
        texts(LoopWriter(*teacher, NoPrompts(), batch_size=2), [requests(4)])
    assert "does not hold 1 request(s)" in str(caught.value)
    assert "teacher.batch_size" in str(caught.value)


def test_work_is_taken_only_when_there_is_room(teacher: tuple[InferenceModel, Decoding]) -> None:
    placed, decoding = teacher
    taken: list[int] = []

    def work() -> Iterator[tuple[int, list[Request]]]:
        for number in range(6):
            taken.append(number)
            yield number, requests(4, seed=number)

    answered = LoopWriter(placed, decoding, NoPrompts(), batch_size=4).write(work())
    first, _ = next(answered)
    assert len(taken) <= 3
    assert sorted([first, *(number for number, _ in answered)]) == list(range(6))
    assert taken == list(range(6))


def test_a_later_longer_prompt_makes_room_anew(teacher: tuple[InferenceModel, Decoding]) -> None:
    placed, decoding = teacher
    chunks = [requests(3, 0), [Request(7, tuple(range(5, 205)))], requests(3, 0, seed=5)]
    expected = texts(PlainWriter(placed, decoding, NoPrompts(), batch_size=3), chunks)
    assert texts(LoopWriter(placed, decoding, NoPrompts(), batch_size=2), chunks) == expected


def test_a_sampled_text_depends_on_its_key_alone(teacher: tuple[InferenceModel, Decoding]) -> None:
    placed, decoding = teacher
    decoding = replace(decoding, sampling=SAMPLED)
    many = requests(12)
    together = texts(LoopWriter(placed, decoding, NoPrompts(), batch_size=12), [many])[0]
    alone = texts(LoopWriter(placed, decoding, NoPrompts(), batch_size=1), [[many[5]]])[0]
    other = texts(LoopWriter(placed, decoding, NoPrompts(), batch_size=1), [[replace(many[5], key=1)]])[0]
    assert alone[0] == together[5]
    assert other[0] != together[5]


def test_the_model_is_checked_before_the_loop_drives_it(teacher: tuple[InferenceModel, Decoding], monkeypatch: pytest.MonkeyPatch) -> None:
    placed, _ = teacher
    assert reason_against(placed) is None
    # A cache that is off by three tokens must be noticed.
    monkeypatch.setattr(trial, "OneEach", lambda lengths, prefixed: OneEach(lengths - 3, prefixed))
    assert "from the model's own forward" in (reason_against(placed) or "")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"sliding_window": 16}, "a window of 16 tokens"), ({"softcap": 30.0}, "softcap"), ({"s_aux": 1}, "s_aux")],
)
def test_what_the_attention_does_not_do_is_refused(options: dict[str, Any], message: str) -> None:
    class Layer(torch.nn.Module):
        layer_idx = 0

    class Model:
        config = type("Config", (), {"_attn_implementation": "sdpa"})()

    row = torch.zeros(1, 2, 1, 8)
    one = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(UnsupportedAttention) as caught, attending(Model(), KeyValueCache(1, 32), OneEach(one, one)):
        attend(Layer(), row, row, row, None, **options)
    assert message in str(caught.value)
    assert Model.config._attn_implementation == "sdpa"


def test_the_shared_prefix_is_what_nearly_all_begin_with() -> None:
    opening = tuple(range(50))
    assert _shared_prefix([(*opening, n) for n in range(100, 120)] + [(1, 2, 3)]) == opening
    assert _shared_prefix([opening, opening]) == opening[:-1]  # a prompt keeps a token of its own
    assert _shared_prefix([(*opening[:20], n) for n in range(100, 120)]) == ()
    assert _shared_prefix([opening]) == ()


def test_bytes_of_a_token_are_those_of_the_cache(teacher: tuple[InferenceModel, Decoding]) -> None:
    assert token_bytes(teacher[0]) == 2 * 2 * 4 * 8 * 4  # keys and values, layers, heads, width, fp32


def test_without_a_gpu_plain_generate_decodes(teacher: tuple[InferenceModel, Decoding]) -> None:
    placed, decoding = teacher
    writer = open_writer(placed, decoding.tokenizer, decoding.form, NoPrompts(), max_new_tokens=4, sampling=Sampling(), batch_size="auto")
    assert isinstance(writer, PlainWriter)
    assert writer.batch_size == 32


def test_the_plain_batch_is_what_the_memory_holds(teacher: tuple[InferenceModel, Decoding], monkeypatch: pytest.MonkeyPatch) -> None:
    placed, decoding = teacher
    on_gpu = replace(placed, world=World(0, 1, torch.device("cuda")))
    longest = decoding.form.max_input_tokens + decoding.max_new_tokens
    monkeypatch.setattr(decode, "free_bytes", lambda _: 2 * 10 * longest * token_bytes(placed))
    assert generate._plain_batch(on_gpu, decoding) == 10
    monkeypatch.setattr(decode, "free_bytes", lambda _: 1)
    assert generate._plain_batch(on_gpu, decoding) == 1
    monkeypatch.setattr(decode, "free_bytes", lambda _: 1 << 50)
    assert generate._plain_batch(on_gpu, decoding) == 256
