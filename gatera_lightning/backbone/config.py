"""Settings of the frozen model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from gatera_lightning.adapters.position_mask import missing_mask_problem
from gatera_lightning.adapters.serialization import read_adapter_config
from gatera_lightning.backbone.quantization import quantization_problem
from gatera_lightning.backbone.source import source_problems
from gatera_lightning.errors import AdapterFileError, type_problems

Dtype = Literal["auto", "bfloat16", "float32", "float64"]
Attention = Literal["sdpa", "eager", "flash_attention_2"]
Quantization = Literal["none", "nf4", "nf4_double", "int8", "torchao_int8", "quanto_int8", "quanto_int4"]


@dataclass
class BackboneConfig:
    """The frozen model, and how it is loaded and run."""

    id: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """Hub id, local folder, .gguf file, or package:NAME for a GGUF file inside a Python package."""

    revision: str | None = None
    """Branch, tag or commit on the hub."""

    dtype: Dtype = "auto"
    """Dtype of the frozen weights and of the large matmuls. auto is bfloat16 if the processor multiplies it
    natively, else float32, because emulated bfloat16 is ten times slower. float16 is not accepted, because it
    overflows without a loss scaler."""

    attn_implementation: Attention = "sdpa"
    """Attention kernel, under its name in Transformers."""

    gradient_checkpointing: bool = False
    """Recompute each decoder layer in the backward pass: less memory, about a third more time."""

    compile: bool = False
    """Train with ``torch.compile``, one decoder layer at a time; evaluation and decoding are not compiled.
    The first steps take a minute longer. On a CPU this needs a C++ compiler."""

    quantization: Quantization = "none"
    """Store the weights of all linear layers except the output head in fewer bits, and compute with them in
    dtype: nf4 (4.5 bits per weight), nf4_double (4.13), int8 (8), torchao_int8, quanto_int8, quanto_int4. nf4
    needs pip install 'gatera-lightning[quantized]', torchao_int8 [torchao], quanto_int8 and quanto_int4
    [quanto].
    Weights that are stored quantized are recognized and need no setting."""

    trust_remote_code: bool = False
    """Run model code that comes with the weights. Only for publishers you trust."""

    adapter: str | None = None
    """Folder of a trained adapter that is part of the frozen model, for training a draft adapter over it."""

    def problems(self) -> list[str]:
        """Return every problem with these settings; reads no weights and does not ask the hub.

        Returns:
            Messages that name the setting, its value and what is accepted; empty if there is no problem.
        """
        found = type_problems("backbone", self)
        problems = [*found.values(), *([] if "id" in found else source_problems(self.id))]
        if "adapter" not in found and self.adapter is not None:
            problems += _adapter_problems(self.adapter)
        if "quantization" in found or self.quantization == "none":
            return problems
        if problem := quantization_problem(self.quantization):
            problems.append(problem)
        if self.compile:
            problems.append(
                f"backbone.quantization: {self.quantization!r}, with backbone.compile: true, which would "
                "keep the dense weights from forward to backward; accepted: compile false, or "
                "quantization none"
            )
        return problems


def _adapter_problems(folder: str) -> list[str]:
    try:
        config, _ = read_adapter_config(folder)
    except AdapterFileError as error:
        return [f"backbone.adapter: {error}; accepted: the folder of a trained adapter, or null"]
    problem = missing_mask_problem(config)
    return [] if problem is None else [f"backbone.adapter: {folder}: {problem}, or null"]


def stored_backbone(
    origin: Mapping[str, Any], dtype: Dtype, quantization: Quantization | None = None
) -> BackboneConfig:
    """Return the settings that load the backbone of an adapter folder.

    Eager attention is kept, because some architectures have no other. Another kernel is not: it may not exist
    on this machine. Model code is never trusted because a file says so.

    Args:
        origin: The folder's description of its backbone: ``id``, ``revision`` and ``attn_implementation``.
        dtype: Dtype of the frozen weights.
        quantization: How they are stored; None: as when the adapter was trained.
    """
    attention: Attention = "eager" if origin.get("attn_implementation") == "eager" else "sdpa"
    trained_over: Quantization = origin.get("quantization") or "none"
    return BackboneConfig(
        id=origin["id"] or "",
        revision=origin["revision"],
        dtype=dtype,
        attn_implementation=attention,
        quantization=trained_over if quantization is None else quantization,
    )
