"""Knobs of teacher, student, deploy and evaluate. Imports no torch."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from data.config import RationalesConfig, Section, SoftLabelsConfig

Arm = Literal["labels_only", "step_by_step", "soft_labels", "step_by_step_soft", "single_task"]
DivergenceKind = Literal["forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl"]
DeployTarget = Literal[
    "ctranslate2-float32",
    "ctranslate2-float16",
    "ctranslate2-int8",
    "ctranslate2-int8_float16",
    "gguf-f16",
    "gguf-q8_0",
    "gguf-q5_1",
    "gguf-q5_0",
    "gguf-q4_0",
    "gguf-tq2_0",
    "gguf-tq1_0",
    "gguf-q1_0",
    "gguf-q6_k",
    "gguf-q4_k_m",
    "gguf-q3_k_m",
    "gguf-q2_k",
    "onnx-float32",
    "onnx-int8",
    "onnx-int4",
    "compressed-tensors-bf16",
    "compressed-tensors-w8a8",
    "compressed-tensors-fp8",
    "compressed-tensors-w8a16",
    "compressed-tensors-w4a16",
    "compressed-tensors-w3a16",
    "compressed-tensors-w2a16",
]
Sharding = Literal["auto", "replica", "tensor", "zero3"]
MAX_SERVER_LOG_PROBS = 20
"""Most log-probabilities a token that servers of OpenAI's API give."""


class ScratchModel(Section):
    """A model with random weights, and a tokenizer trained on the task's texts (or one that exists)."""

    from_scratch: Literal["t5", "llama"] = Field(description="Architecture: t5 (encoder-decoder) or llama (decoder-only).")
    d_model: int = Field(128, ge=8, description="Width of the residual stream.")
    layers: int = Field(2, ge=1, description="Layers (for t5: of the encoder and of the decoder, each).")
    heads: int = Field(4, ge=1, description="Attention heads; must divide d_model.")
    d_ff: int | None = Field(None, ge=8, description="Neurons of a feed-forward layer; 4 x d_model where left out.")
    feed_forward: Literal["gated-gelu", "relu"] = Field(
        "gated-gelu", description="Feed-forward layers of t5: gated as in v1.1 (three matrices), or relu as in the first (two)."
    )
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="Dropout rate in training (t5 only).")
    vocabulary: int | None = Field(
        None, ge=300, description="Size of the byte-level BPE vocabulary trained on the task's training texts; 512 where left out."
    )
    tokenizer: str | None = Field(
        None, description="Hub id, folder or package:NAME/FILE of an existing tokenizer, in place of a trained one."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.d_model % self.heads:
            raise ValueError(f"heads is {self.heads}, which does not divide d_model ({self.d_model}): choose a divisor")
        for key in ("dropout", "feed_forward"):
            if self.from_scratch == "llama" and key in self.model_fields_set:
                raise ValueError(f"{key} has no effect on llama: remove it")
        if self.tokenizer is not None and "vocabulary" in self.model_fields_set:
            raise ValueError("vocabulary has no effect where tokenizer is given: remove one of them")
        return self


class CutModel(Section):
    """A student made of some layers, neurons and heads of its teacher, with the teacher's tokenizer."""

    cut_from: Literal["teacher"] = Field(description="The model the layers come from.")
    layers: int | list[int] | None = Field(
        None,
        description="A number: that many layers, the first and those that turn their input most; a list: these layers (0 is the first). "
        "For t5: of each stack. All where left out.",
    )
    neurons: int | None = Field(
        None,
        ge=1,
        description="Neurons to keep of each feed-forward layer, those that add most to the residual stream; all where left out.",
    )
    heads: int | None = Field(
        None,
        ge=1,
        description="Query heads to keep of each attention layer, those that add most to the residual stream; groups that share keys and "
        "values go whole. All where left out.",
    )

    @model_validator(mode="after")
    def _cuts_something(self) -> Self:
        if self.layers is None and self.neurons is None and self.heads is None:
            raise ValueError("cut_from cuts nothing: give layers, neurons or heads, or name the teacher's model")
        return self


def _model_kind(value: Any) -> str | None:
    if isinstance(value, str):
        return "name"
    keys = value if isinstance(value, dict) else getattr(type(value), "model_fields", {})
    return "cut" if "cut_from" in keys else "scratch" if "from_scratch" in keys else None


ModelSource = Annotated[
    Annotated[str, Tag("name")] | Annotated[ScratchModel, Tag("scratch")] | Annotated[CutModel, Tag("cut")],
    Discriminator(
        _model_kind,
        custom_error_type="model",
        custom_error_message=(
            "input should be a hub id, a folder, a .gguf file, package:NAME/FILE, "
            "{from_scratch: t5 or llama, ...} or {cut_from: teacher, layers: N}"
        ),
    ),
]


class LoraConfig(Section):
    """Low-rank adapters beside frozen weights."""

    rank: int = Field(16, ge=1, description="Rank of each adapter.")
    alpha: float = Field(32.0, gt=0.0, description="Adapters count alpha / rank times.")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="Dropout rate in front of the adapters.")
    modules: list[str] | None = Field(
        None, min_length=1, description="Names of the linear layers to adapt, such as q_proj; all but the head where left out."
    )


class TrainingConfig(Section):
    """Knobs of the one training loop; the teacher's tuning and the student share it."""

    epochs: float = Field(10.0, gt=0.0, description="Passes over the training rows.")
    batch_size: int = Field(
        64, ge=1, description="Examples an optimizer step, over all processes; each gives up to two sequences (label, rationale)."
    )
    micro_batch_tokens: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="Most tokens a process takes in one forward (a longer sequence goes alone); auto: 16384.",
        json_schema_extra={"hashed": False},
    )
    learning_rate: float = Field(5e-4, gt=0.0, description="Peak learning rate of AdamW.")
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="Learning rate after the warm-up.")
    warmup: float = Field(0.05, ge=0.0, lt=1.0, description="Share of the steps over which the learning rate rises from 0.")
    weight_decay: float = Field(0.0, ge=0.0, description="Decoupled weight decay of AdamW.")
    clip_norm: float = Field(1.0, gt=0.0, description="Largest norm of the gradient.")
    zero_stage: Literal["auto", 0, 1, 2, 3] = Field(
        "auto",
        description="DeepSpeed ZeRO stage: what is sharded over the processes (0: nothing); auto: 0 in one process, 1 in several.",
        json_schema_extra={"hashed": False},
    )
    offload_optimizer: bool = Field(
        False, description="Keep the optimizer's states in the host's memory (ZeRO 1 to 3).", json_schema_extra={"hashed": False}
    )
    activation_checkpointing: bool = Field(
        False,
        description="Compute each layer's activations again in the backward pass instead of keeping them.",
        json_schema_extra={"hashed": False},
    )
    compile: Literal["auto", "off", "layers", "graphs"] = Field(
        "auto",
        description="layers: torch.compile of the layers; graphs: CUDA graphs of whole passes besides, for a decoder-only model under "
        "zero_stage 0; auto: graphs, else layers, on a GPU without ZeRO-3, from 300 steps on.",
        json_schema_extra={"hashed": False},
    )
    lora: LoraConfig | None = Field(None, description="Train low-rank adapters in place of the weights; they are merged on export.")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="Arithmetic of the model; auto: bf16 on a GPU, fp32 on a CPU.")
    max_input_tokens: int = Field(512, ge=8, description="Longer inputs are cut on the left, counted in the report.")
    max_label_tokens: int = Field(32, ge=2, description="Longer labels are cut; also the most tokens an answer may take.")
    max_rationale_tokens: int = Field(256, ge=2, description="Longer rationales are cut.")
    validate_every: int | None = Field(None, ge=1, description="Steps between two validations; an epoch where left out.")
    patience: int | None = Field(
        None, ge=1, description="Stop after this many validations in a row without a better one; never where left out."
    )
    save_every: int | None = Field(
        None, ge=1, description="Steps between two resumable checkpoints; an epoch where left out.", json_schema_extra={"hashed": False}
    )
    log_every: int = Field(
        10,
        ge=1,
        description="Steps whose numbers stay on the GPU before they are written together (under ZeRO 1 to 3 each is written at once).",
        json_schema_extra={"hashed": False},
    )

    def computes_in_bf16(self, device_type: str) -> bool:
        """Whether forward and backward run in bf16 on a device of this type (`torch.device.type`)."""
        return self.precision == "bf16" or (self.precision == "auto" and device_type == "cuda")

    @model_validator(mode="after")
    def _offload_has_something_to_offload(self) -> Self:
        if self.offload_optimizer and self.zero_stage in ("auto", 0):
            raise ValueError(
                f"offload_optimizer has no effect with zero_stage: {self.zero_stage}: set zero_stage to 1, 2 or 3, or remove it"
            )
        return self


class LossConfig(Section):
    """total = label x CE_label + rationale x CE_rationale + soft x KL_soft, each a mean over its own target tokens."""

    label: float = Field(0.5, ge=0.0, description="Weight of the label's cross-entropy.")
    rationale: float = Field(0.5, ge=0.0, description="Weight of the rationale's cross-entropy.")
    soft: float = Field(0.0, ge=0.0, description="Weight of the divergence from the teacher's soft labels.")
    teacher: Literal["records", "live"] = Field(
        "records",
        description="Where soft labels come from: the teacher's records, or the teacher itself, run beside the student on every target "
        "token.",
    )
    divergence: DivergenceKind = Field(
        "forward_kl",
        description="Divergence between teacher p and student q at a soft label: forward_kl KL(p|q); reverse_kl KL(q|p); jsd, the "
        "generalised Jensen-Shannon divergence (`beta`); skew_forward_kl KL(p | skew p + (1-skew) q); skew_reverse_kl "
        "KL(q | skew q + (1-skew) p).",
    )
    temperature: float | None = Field(
        None,
        gt=0.0,
        description="Divides the logits of both sides of a live teacher's divergence, whose value is multiplied by its square; 1 where "
        "left out. Stored soft labels have the temperature they were stored at.",
    )
    beta: float | None = Field(
        None, gt=0.0, lt=1.0, description="Of jsd: beta KL(p|m) + (1-beta) KL(q|m) with m = beta p + (1-beta) q; 0.5 where left out."
    )
    skew: float | None = Field(None, gt=0.0, lt=1.0, description="Of the skew divergences; 0.1 where left out.")

    @property
    def arm(self) -> Arm:
        """What a student with these weights is called on the ladder."""
        if self.rationale:
            return "step_by_step_soft" if self.soft else "step_by_step"
        return "soft_labels" if self.soft else "labels_only"

    @model_validator(mode="after")
    def _no_idle_knobs(self) -> Self:
        if self.label + self.rationale + self.soft == 0:
            raise ValueError("label, rationale and soft are all 0: give at least one a weight")
        for key in ("teacher", "divergence", "temperature", "beta", "skew"):
            if self.soft == 0 and key in self.model_fields_set:
                raise ValueError(f"{key} has no effect while soft is 0: give soft a weight, or remove {key}")
        if self.beta is not None and self.divergence != "jsd":
            raise ValueError(f"beta has no effect on {self.divergence}: remove it, or set divergence to jsd")
        if self.skew is not None and not self.divergence.startswith("skew"):
            raise ValueError(f"skew has no effect on {self.divergence}: remove it, or set divergence to skew_forward_kl or skew_reverse_kl")
        if self.temperature is not None and self.teacher == "records":
            raise ValueError(
                "temperature cannot change stored soft labels, which keep that of teacher.soft_labels.temperature: remove it, "
                "or set teacher: live"
            )
        return self


class EndpointConfig(Section):
    """An OpenAI-compatible server that teaches."""

    url: str = Field(description="Base address, up to and with /v1: http://localhost:8000/v1, https://api.openai.com/v1.")
    api: Literal["chat", "completions"] = Field(
        "chat", description="chat: /chat/completions, the prompt as messages; completions: /completions, the prompt as plain text."
    )
    key_variable: str = Field(
        "OPENAI_API_KEY",
        description="Environment variable that holds the key; none is sent where it is not set.",
        json_schema_extra={"hashed": False},
    )
    concurrency: int = Field(16, ge=1, le=1024, description="Requests under way at once.", json_schema_extra={"hashed": False})
    timeout_seconds: float = Field(120.0, gt=0.0, description="Longest wait for one answer.", json_schema_extra={"hashed": False})
    retries: int = Field(
        8, ge=0, description="Tries after the first, with growing pauses, before the run stops.", json_schema_extra={"hashed": False}
    )
    tokenizer: str | None = Field(
        None,
        description="Tokenizer of the server's model (hub id, folder or package:NAME/FILE), by whose ids soft labels (top_k) are stored.",
    )

    @field_validator("url")
    @classmethod
    def _plain_address(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            raise ValueError("is no address: write it as http://localhost:8000/v1 or https://api.openai.com/v1") from None
        # Not repeated in the message: it may hold a password.
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError(
                "holds a user, a password, a query or a fragment: give the bare address, and the key in the variable named by key_variable"
            )
        if not usable:
            raise ValueError(f"is {url!r}: write it as http://localhost:8000/v1 or https://api.openai.com/v1")
        if parts.path.rstrip("/").endswith("/completions"):
            raise ValueError(f"is {url!r}: end it before /chat/completions or /completions, which `api` chooses")
        return url

    @field_validator("key_variable")
    @classmethod
    def _name_of_a_variable(cls, name: str) -> str:
        # Not repeated in the message: who misreads the key's meaning puts the secret here.
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError("is not the name of an environment variable: export the key under a name, and write that name here")
        return name


class TeacherConfig(Section):
    """Who teaches: a model that writes now, or records that somebody already has."""

    source: Literal["deepspeed", "vllm", "endpoint", "recorded"] = Field(
        description="deepspeed: a live model; vllm: the same in vLLM's offline engine; endpoint: a server that speaks OpenAI's API; "
        "recorded: the rows already hold what a teacher wrote."
    )
    model: ModelSource | None = Field(
        None,
        description="The live teacher: hub id, folder, .gguf file, package:NAME/FILE, or {from_scratch: ...}; "
        "for endpoint the server's name of it.",
    )
    endpoint: EndpointConfig | None = Field(None, description="The server of source: endpoint.")
    label: str | None = Field(None, description="Template over a row's fields for the recorded teacher's label.")
    rationale: str | None = Field(None, description="Template over a row's fields for the recorded teacher's rationale.")
    sharding: Sharding = Field(
        "auto", description="How the live teacher lies on the devices; auto: the plan decides.", json_schema_extra={"hashed": False}
    )
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="Prompts a process generates at once; auto: what the GPU's free memory holds (256 at most), 32 on a CPU.",
        json_schema_extra={"hashed": False},
    )
    tune: TrainingConfig | None = Field(None, description="Tune the live teacher on the task's gold solutions before it writes.")
    rationales: RationalesConfig = Field(default_factory=RationalesConfig, description="What is asked of the teacher and what is kept.")
    soft_labels: SoftLabelsConfig | None = Field(None, description="Store the live teacher's distribution at each target token.")

    @model_validator(mode="after")
    def _no_idle_knobs(self) -> Self:
        for key in _IDLE[self.source]:
            if key in self.model_fields_set and getattr(self, key) is not None:
                raise ValueError(f"{key} has no effect with source: {self.source}; remove it")
        idle = sorted(_IDLE_RATIONALES.get(self.source, frozenset()) & self.rationales.model_fields_set)
        if idle:
            raise ValueError(f"rationales.{idle[0]} has no effect with source: {self.source}; remove it")
        if self.source == "recorded":
            if self.label is None or self.rationale is None:
                raise ValueError("source is recorded but label or rationale is missing: give both as templates over a row's fields")
            return self
        self._check_model()
        self._check_tuning()
        aligned = self.soft_labels is not None and self.soft_labels.format == "top_k"
        if self.endpoint is not None and self.endpoint.tokenizer is not None and not aligned:
            raise ValueError("endpoint.tokenizer has no effect unless soft_labels.format is top_k: remove it")
        if self.soft_labels is not None:
            self._check_soft_labels(self.soft_labels)
        return self

    def _check_model(self) -> None:
        """A live teacher has a model, of a kind that its source can run."""
        if self.model is None:
            give = {
                "deepspeed": "give a hub id, a folder, a .gguf file or {from_scratch: ...}",
                "vllm": "give a hub id or a folder",
                "endpoint": "give the name that the server knows it by",
            }
            raise ValueError(f"source is {self.source} but model is missing: {give[self.source]}")
        if isinstance(self.model, CutModel):
            raise ValueError("model is {cut_from: teacher}, but a teacher cannot be cut from itself: name a model")
        if isinstance(self.model, ScratchModel) and self.source != "deepspeed":
            raise ValueError(
                f"model is from scratch, which only source: deepspeed can make and tune; with source: {self.source} name a model"
            )
        if self.source == "vllm" and str(self.model).endswith(".gguf"):
            raise ValueError(
                f"model is {self.model!r}, a .gguf file, but vllm reads hub ids and folders: name one, or set source to deepspeed"
            )
        if self.source == "endpoint" and self.endpoint is None:
            raise ValueError("source is endpoint but endpoint is missing: add endpoint: {url: http://localhost:8000/v1}")

    def _check_tuning(self) -> None:
        """A model from scratch is tuned, and a tuned one is not asked as another model would be."""
        if isinstance(self.model, ScratchModel) and self.tune is None:
            raise ValueError(
                "model has random weights and tune is missing: a teacher from scratch must be tuned on the task's gold solutions"
            )
        if self.tune is None:
            return
        if "max_input_tokens" in self.rationales.model_fields_set:
            raise ValueError("rationales.max_input_tokens has no effect on a tuned teacher: set tune.max_input_tokens, and remove it")
        for key in ("examples", "chat"):
            if key in self.rationales.model_fields_set and getattr(self.rationales, key) is not None:
                raise ValueError(
                    f"rationales.{key} has no effect on a tuned teacher, which learnt the form of its answer: remove one of them"
                )

    def _check_soft_labels(self, soft: SoftLabelsConfig) -> None:
        """Which formats a source can give: all but `answers` need the model's own probabilities."""
        if soft.format == "answers" and self.rationales.samples == 1:
            raise ValueError("soft_labels.format is answers, how often each answer was drawn, but rationales.samples is 1: draw several")
        if self.source == "deepspeed" or soft.format == "answers":
            return
        if self.endpoint is None or soft.format != "top_k":
            formats = "answers or top_k" if self.source == "endpoint" else "answers"
            raise ValueError(
                f"soft_labels.format is {soft.format}, which needs the model itself: with source: {self.source} use {formats}, "
                "or set source to deepspeed"
            )
        if soft.k > MAX_SERVER_LOG_PROBS:
            raise ValueError(
                f"soft_labels.k is {soft.k}, but a server gives {MAX_SERVER_LOG_PROBS} log-probabilities a token at most: lower k"
            )
        if self.endpoint.tokenizer is None:
            raise ValueError("soft_labels.format is top_k but endpoint.tokenizer is missing: name the tokenizer of the server's model")


_IDLE: dict[str, tuple[str, ...]] = {
    "recorded": ("model", "endpoint", "sharding", "batch_size", "tune", "soft_labels"),
    "deepspeed": ("endpoint", "label", "rationale"),
    "vllm": ("endpoint", "label", "rationale", "sharding", "batch_size", "tune"),
    "endpoint": ("label", "rationale", "sharding", "batch_size", "tune"),
}
"""Keys of a teacher that do nothing with a source."""
_IDLE_RATIONALES: dict[str, frozenset[str]] = {
    "recorded": frozenset(RationalesConfig.model_fields) - {"keep", "drop_rows"},
    "endpoint": frozenset({"chat", "max_input_tokens"}),  # `endpoint.api` chooses the form; without a tokenizer nothing is cut
}
"""Keys of `rationales` that do nothing with a source."""


PruneMethod = Literal["magnitude", "wanda", "neuron", "neuron_taylor", "neuron_activity", "head", "layer"]
_OF_WEIGHTS: tuple[PruneMethod, ...] = ("magnitude", "wanda")
_OF_NEURONS: tuple[PruneMethod, ...] = ("neuron", "neuron_taylor", "neuron_activity")


class PruneConfig(Section):
    """What to take out of a model: single weights, which become 0, or neurons, heads and layers, which go for good."""

    method: PruneMethod = Field(
        "neuron",
        description="magnitude: weights nearest to 0. wanda: the same times the size of their inputs, alike in each row. neuron: of the "
        "feed-forward layers, by the norm of their weights; neuron_taylor by |gradient x weight|; neuron_activity by what they add on the "
        "task's inputs. head: attention heads, whole groups that share keys and values. layer: those that turn their input least.",
    )
    fraction: float | None = Field(None, ge=0.0, lt=1.0, description="Share to take out; of layers and heads the nearest whole number.")
    pattern: str | None = Field(
        None, description="n:m, such as 2:4, in place of fraction: of every m weights in a row n stay (magnitude and wanda)."
    )
    scope: Literal["matrix", "global"] = Field(
        "matrix", description="magnitude: the fraction of each matrix, or of all together, so that some lose more."
    )
    exclude: list[str] = Field(
        default_factory=list,
        description="magnitude and wanda: matrices to leave alone, by name with * for anything, such as *.layers.0.* or *.down_proj. "
        "Embeddings, the head and norms are never touched.",
    )
    round_to: int = Field(1, ge=1, description="Neurons: keep a multiple of so many, which kernels like (64, 128).")

    @property
    def n_of_m(self) -> tuple[int, int] | None:
        """The pattern as numbers."""
        if self.pattern is None:
            return None
        n, _, m = self.pattern.partition(":")
        return int(n), int(m)

    @property
    def makes_zeros(self) -> bool:
        """Weights become 0 and stay where they are; else the model gets smaller."""
        return self.method in _OF_WEIGHTS

    @model_validator(mode="after")
    def _says_how_much(self) -> Self:
        if (self.fraction is None) == (self.pattern is None):
            both = "both fraction and pattern say" if self.fraction is not None else "neither fraction nor pattern says"
            raise ValueError(f"{both} how much to take out: give one of them")
        if self.pattern is not None:
            found = re.fullmatch(r"(\d+):(\d+)", self.pattern)
            if found is None or not 1 <= int(found[1]) < int(found[2]):
                raise ValueError(f"pattern is {self.pattern!r}: write n:m with n below m, such as 2:4")
        return self

    @model_validator(mode="after")
    def _has_an_effect(self) -> Self:
        needed = {
            "pattern": _OF_WEIGHTS,
            "exclude": _OF_WEIGHTS,
            "scope": ("magnitude",),
            "round_to": _OF_NEURONS,
        }
        for key, methods in needed.items():
            if key in self.model_fields_set and getattr(self, key) is not None and self.method not in methods:
                raise ValueError(f"{key} has no effect with method: {self.method}, only with {', '.join(methods)}: remove it")
        if self.pattern is not None and "scope" in self.model_fields_set:
            raise ValueError("scope has no effect with a pattern, which every group of weights has: remove it")
        return self


class StudentPruneConfig(PruneConfig):
    """The trained student pruned, and how it recovers."""

    schedule: Literal["one_shot", "cubic"] = Field(
        "one_shot",
        description="one_shot: all at once, before the recovery. cubic: more and more of the fraction while it recovers, most of it early "
        "(magnitude, wanda and neuron).",
    )
    until: float = Field(0.5, gt=0.0, le=1.0, description="cubic: share of the recovery's steps after which the whole fraction is out.")
    every: int = Field(20, ge=1, description="cubic: steps from one pruning to the next.")
    epochs: float = Field(1.0, ge=0.0, description="Passes over the training rows to recover in; 0 prunes and leaves it at that.")
    learning_rate: float | None = Field(None, gt=0.0, description="Peak of the recovery; the student's own where left out.")
    loss: LossConfig | None = Field(
        None,
        description="Weights of the recovery's loss; the student's own where left out. teacher: live means here the student as it was "
        "before it was pruned, whatever the source of the teacher is.",
    )

    @model_validator(mode="after")
    def _schedule_fits(self) -> Self:
        gradual = self.schedule == "cubic"
        if gradual and self.method not in ("magnitude", "wanda", "neuron"):
            raise ValueError(f"schedule is cubic, but method: {self.method} scores once, before the recovery: set schedule to one_shot")
        if gradual and self.pattern is not None:
            raise ValueError("schedule is cubic, but a pattern is in every group of weights or in none: set schedule to one_shot")
        if gradual and not self.epochs:
            raise ValueError("schedule is cubic, but epochs is 0, so that there are no steps to prune in: give epochs, or use one_shot")
        for key in ("until", "every"):
            if not gradual and key in self.model_fields_set:
                raise ValueError(f"{key} has no effect with schedule: one_shot: remove it, or set schedule to cubic")
        for key in ("learning_rate", "loss"):
            if not self.epochs and getattr(self, key) is not None:
                raise ValueError(f"{key} has no effect while epochs is 0, which leaves nothing to learn: remove it, or give epochs")
        return self


class StudentConfig(TrainingConfig):
    """The small model and how it learns."""

    model: ModelSource = Field(
        description="Hub id, folder, .gguf file, package:NAME/FILE, {from_scratch: ...} or {cut_from: teacher, layers: N}."
    )
    loss: LossConfig = Field(default_factory=LossConfig, description="Weights of the loss.")
    targets: Literal["gold", "teacher"] = Field("gold", description="Labels to learn: the data's own, or the teacher's.")
    single_task: bool = Field(
        False,
        description="One target, the rationale and then the label, in place of two tasks; the model then writes its rationale before each "
        "answer. Needs loss: {label: 1, rationale: 0}.",
    )
    seed: int | None = Field(
        None, ge=0, lt=2**31, description="Of the student's initial weights, order and dropout alone; the run's seed where left out."
    )
    data_fraction: float = Field(
        1.0, gt=0.0, le=1.0, description="Share of the training rows to learn; a smaller share is part of every larger one."
    )
    baselines: list[Literal["labels_only", "step_by_step"]] = Field(
        default_factory=list, description="Arms to train beside the student, the same but for the loss; each is a rung of the ladder."
    )

    prune: StudentPruneConfig | None = Field(
        None, description="Prune the trained student, and let it recover: a rung of its own, of which the files to ship are made."
    )

    @property
    def arm(self) -> Arm:
        """What the student is called on the ladder."""
        return "single_task" if self.single_task else self.loss.arm

    @property
    def arms(self) -> dict[Arm, LossConfig]:
        """The loss of every arm in the order of the ladder; the student itself is the last."""
        losses = {"labels_only": LossConfig(label=1.0, rationale=0.0), "step_by_step": LossConfig(label=0.5, rationale=0.5)}
        return {**{name: losses[name] for name in self.baselines}, self.arm: self.loss}

    def of_arm(self, arm: Arm) -> Self:
        """The student as one of its `arms` is trained: with that arm's loss, and two tasks unless the arm is single_task."""
        return self.model_copy(update={"loss": self.arms[arm], "single_task": arm == "single_task", "baselines": [], "prune": None})

    @model_validator(mode="after")
    def _one_task_has_one_loss(self) -> Self:
        if not self.single_task:
            return self
        for key in ("rationale", "soft"):
            if getattr(self.loss, key):
                raise ValueError(
                    f"single_task learns rationale and label as one target, whose loss is loss.label, but loss.{key} is "
                    f"{getattr(self.loss, key):g}, not 0: set loss to {{label: 1, rationale: 0}}, or single_task to false"
                )
        return self

    @model_validator(mode="after")
    def _pruning_fits(self) -> Self:
        if self.prune is not None and self.prune.makes_zeros and self.lora is not None:
            raise ValueError(
                f"prune.method is {self.prune.method}, but lora adds to every weight what its adapters learn, also to those that are 0: "
                "remove lora, or prune neurons, heads or layers"
            )
        if self.prune is not None and self.prune.schedule == "cubic" and self.lora is not None:
            raise ValueError(
                "prune.schedule is cubic, but with lora the weights that it would prune step by step are frozen: remove lora, or set "
                "schedule to one_shot"
            )
        return self

    @model_validator(mode="after")
    def _baselines_differ(self) -> Self:
        if self.arm in self.baselines:
            raise ValueError(f"baselines holds {self.arm}, which is what this student's loss already is: remove it, or change loss")
        if len(set(self.baselines)) < len(self.baselines):
            raise ValueError("baselines names an arm twice: remove one")
        return self


def _int8() -> list[DeployTarget]:
    return ["ctranslate2-int8"]


class RecoverConfig(Section):
    """The student trained once more for each target of few bits, with its matrices rounded as that file stores them."""

    epochs: float = Field(1.0, gt=0.0, description="Passes over the training rows.")
    learning_rate: float | None = Field(None, gt=0.0, description="Peak learning rate; the student's own where left out.")
    loss: LossConfig | None = Field(
        None,
        description="Weights of the loss; where left out the student's own, with soft: 1 and teacher: live. teacher: live means here the "
        "student as it was before it was rounded, whatever the source of the teacher is.",
    )


class DeployConfig(Section):
    """The files to ship."""

    targets: list[DeployTarget] = Field(
        default_factory=_int8,
        min_length=1,
        description="Artifacts to make of the student; each is a rung of the ladder.",
    )
    recover: RecoverConfig | None = Field(
        None,
        description="Train the weights of each target of 4 bits or fewer, but K-quants, with the rounding in the loop: the file made of "
        "them, TARGET-recovered, is a rung beside the one that is only rounded.",
    )
    vocabulary: Literal["whole", "task"] | Annotated[int, Field(ge=256)] = Field(
        "whole",
        description="Tokens that the files know; embedding and head have a row for each. whole: all. task: those of the training rows, "
        "what these are merged from, single characters and bytes, and special tokens; other words are cut into smaller pieces. A number: "
        "the same and the tokenizer's first others, which are its most frequent, until there are so many.",
    )
    license: str | None = Field(None, description="SPDX id of the licence of what you ship, for its model card: apache-2.0, mit, ...")


class EvaluateConfig(Section):
    """How a rung is measured on the test split."""

    batch_size: int = Field(
        32, ge=1, description="Examples answered at once when the test split is scored.", json_schema_extra={"hashed": False}
    )
    timed_examples: int = Field(128, ge=1, description="Most examples answered to measure examples/s, at batch 1 and at batch 32 each.")


class TrackingConfig(Section):
    """Where the numbers go besides the JSON lines that are always written."""

    wandb: Literal["auto", "online", "offline", "disabled"] = Field(
        "auto",
        description="auto: online where you are logged in, else offline (`wandb sync` brings it in later).",
        json_schema_extra={"hashed": False},
    )
    project: str = Field("stepdown", description="W&B project.", json_schema_extra={"hashed": False})
    entity: str | None = Field(None, description="W&B team or user; your default where left out.", json_schema_extra={"hashed": False})
