"""Every file to ship of SmolLM2-135M tuned on CommonsenseQA, in the runtime that serves it: what it still gets right, and what it takes.

python -m tests.bench.deploy_quality --model TUNED --data DIR --out DIR [--recovered DIR] [--targets gguf-q4_0,onnx-int8] [--kl-items 100]
        [--vocabulary task]
python -m tests.bench.deploy_quality --out DIR --show       the table of what is there

TUNED is OUT/tuned/rounded of pruning_quality.py, DIR holds what that one reads; RECOVERED/TARGET is a folder that few_bits.py left (OUT of
that one, its learning rate cut from the name). Files are made and verified as the stage `deploy` does, and answered as the stage
`evaluate` does, on --threads of the CPU (1); where there is a GPU, what transformers serves is answered there, in fp32. The divergence is
that of the probabilities of the five choices, the fp32 model's from the file's. Every row is a folder of OUT: the same command goes on
where it was stopped, and several share the work.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from data.prompts import FORMAT_FILE
from tests.bench.few_bits import source_of
from tests.bench.pruning_quality import Data, claimed, loaded
from train.artifacts import DeployedModel, EvalResult
from train.deploy.stage import NUM_PROBES, NUM_SAMPLES, deploy
from train.deploy.targets import RECOVERED, TARGETS, Sample
from train.evaluate import ANSWERS, EvalRequest, command
from train.models import encoder, load_folder, save_model
from train.runtimes import Device, Runtime, RuntimeKind, TransformersRuntime, open_runtime
from train.significance import mcnemar
from train.vocabulary import trim

_WHOLE = "transformers-fp32"
_KL = "choices.json"


def rows_of(options: argparse.Namespace) -> list[str]:
    names = [name for name, target in TARGETS.items() if "decoder_only" in target.families]
    if options.targets:
        names = options.targets.split(",")
    recovered = [f"{name}{RECOVERED}" for name in names if options.recovered and (options.recovered / name / "model").is_dir()]
    return [_WHOLE, *names, *recovered]


def made(name: str, options: argparse.Namespace, data: Data) -> tuple[RuntimeKind, Path]:
    """The file of a row."""
    if name == _WHOLE:
        return "transformers", options.model
    target, folder = TARGETS[name.removesuffix(RECOVERED)], options.out / name
    if not (folder / "artifact.json").is_file():
        if name.endswith(RECOVERED):
            source = options.recovered / target.name / "model"
        else:
            source = folder / "source"
            model, tokenizer, form = load_folder(options.source, dtype=torch.float32)
            save_model(source_of(target, model), tokenizer, form, source)
        samples: list[Sample] = [(s.input_ids, s.target_ids) for row in data.rows for s in row.sequences][:NUM_SAMPLES]
        deploy(target, source, folder, samples, samples[:NUM_PROBES], TransformersRuntime(source, device="cpu"))
    return target.runtime, folder / "model"


def place_of(kind: RuntimeKind) -> Device:
    return "auto" if kind in ("transformers", "compressed_tensors") else "cpu"


def evaluated(name: str, kind: RuntimeKind, model: Path, options: argparse.Namespace, data: Data) -> None:
    folder = options.out / name
    request = EvalRequest(
        rung=name,
        runtime=kind,
        model_folder=str(model),
        records_folder=None,
        task_folder=str(options.out / "task"),
        metric="choice",
        part=data.form.part,
        max_new_tokens=data.form.max_answer_tokens,
        batch_size=32,
        timed_examples=64,
        out_folder=str(folder / "evaluate"),
        device=place_of(kind),
        threads=options.threads,
    )
    request.write(folder / "request.json")
    subprocess.run(command(folder / "request.json"), check=True)


def choice_probabilities(runtime: Runtime, options: argparse.Namespace, data: Data) -> list[list[float]]:
    """[items, choices]: how likely each choice is, among them."""
    found = []
    for item in data.test[: options.kl_items]:
        prompt = runtime.format.prompt_ids(data.form.part, item.input, runtime.encode)[0]
        assert item.choices is not None
        scores = [sum(runtime.log_probs(prompt, data.form.label_ids(choice, runtime.encode)[0])) for choice in item.choices]
        likely = np.exp(np.array(scores) - max(scores))
        found.append([float(value) for value in likely / likely.sum()])
    return found


def divergence(options: argparse.Namespace, name: str) -> float | None:
    """Mean over items of KL(fp32 || file), in nats."""
    paths = options.out / _WHOLE / _KL, options.out / name / _KL
    if not all(path.is_file() for path in paths):
        return None
    p, q = (np.clip(np.array(json.loads(path.read_text())), 1e-12, None) for path in paths)
    return float((p * np.log(p / q)).sum(1).mean())


def show(options: argparse.Namespace) -> None:
    table = Table("file", "MB", "bits a weight", "a parameter", "right", "95 %", "against fp32 (p)", "changed", "KL", "load s", "items/s")
    whole = lines_of(options.out / _WHOLE)
    rows = [_WHOLE, *(f"{name}{end}" for name in TARGETS for end in ("", RECOVERED))]
    for name in rows:
        folder = options.out / name
        if not (folder / "evaluate" / "artifact.json").is_file():
            continue
        result = EvalResult.read(folder / "evaluate")
        lines = lines_of(folder)
        right, before = ([line["correct"] is True for line in of] for of in (lines, whole))
        test = mcnemar(before, right)
        changed = sum(a["parsed"] != b["parsed"] for a, b in zip(lines, whole, strict=True)) / len(lines)
        share, n = result.num_correct / result.num_items, result.num_items
        half = 1.96 * math.sqrt(share * (1 - share) / n)
        bits = ("", "")
        if name != _WHOLE:
            artifact = DeployedModel.read(folder)
            bits = tuple(f"{value:.2f}" if value else "" for value in (artifact.bits_a_weight, artifact.bits_a_parameter))
        kl = divergence(options, name)
        assert result.weight_bytes is not None
        table.add_row(
            name,
            f"{result.weight_bytes / 1e6:.1f}",
            *bits,
            f"{share:.1%}",
            f"± {100 * half:.1f}",
            f"{100 * (sum(right) - sum(before)) / n:+.1f} ({test.p_value:.3f})",
            f"{changed:.1%}",
            f"{kl:.4f}" if kl is not None else "",
            f"{result.load_seconds:.1f}",
            f"{(result.examples_per_second or {}).get('1', 0):.1f}",
        )
    Console(width=150).print(table)


def lines_of(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "evaluate" / ANSWERS).read_text().splitlines()]


def trimmed(options: argparse.Namespace) -> Path:
    """The tuned model without the tokens that no training row uses, or with so many."""
    folder: Path = options.out / "trimmed"
    with claimed(folder / "model" / FORMAT_FILE, wait=True) as mine:
        if mine:
            _, data = loaded(options, str(options.model))
            model, tokenizer, form = load_folder(options.model, dtype=torch.float32)
            used = {token for row in data.rows for s in row.sequences for token in (*s.input_ids, *s.target_ids)}
            least = 0 if options.vocabulary == "task" else int(options.vocabulary)
            smaller, smaller_form, new = trim(model, tokenizer, form, used, least)
            before, after = encoder(tokenizer), encoder(smaller)
            texts = [form.prompt(form.part, item.input) for item in data.test]
            alike = sum([new.get(token) for token in before(text)] == after(text) for text in texts)
            print(f"{len(new):,} tokens of {len(tokenizer):,}; {alike:,} of {len(texts):,} test texts are cut as before", flush=True)
            save_model(model, smaller, smaller_form, folder / "model")
    return folder / "model"


def work(options: argparse.Namespace) -> None:
    options.source = options.model if options.vocabulary is None else trimmed(options)
    _, data = loaded(options, str(options.source))
    assert (options.model / FORMAT_FILE).is_file()
    for name in rows_of(options):
        with claimed(options.out / name / _KL) as mine:
            if not mine:
                continue
            try:
                kind, model = made(name, options, data)
            except (ValueError, RuntimeError) as error:
                print(f"{name}: {error}", file=sys.stderr, flush=True)
                continue
            if not (options.out / name / "evaluate" / "artifact.json").is_file():
                evaluated(name, kind, model, options, data)
            found = choice_probabilities(open_runtime(kind, model, device=place_of(kind), threads=options.threads), options, data)
            (options.out / name / _KL).write_text(json.dumps(found))
            print(f"{name}: done", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--recovered", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--targets", help="with commas between; all where left out")
    parser.add_argument("--kl-items", type=int, default=100)
    parser.add_argument("--vocabulary", help="as deploy.vocabulary")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--show", action="store_true")
    parser.set_defaults(tiny=False)
    options = parser.parse_args()
    if not options.show:
        torch.set_num_threads(options.threads)
        work(options)
    show(options)


if __name__ == "__main__":
    main()
