"""Load a frozen causal language model and its tokenizer."""

import importlib.util
import logging
import platform
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gatera_lightning.adapters.frozen_adapter import load_frozen_adapter
from gatera_lightning.adapters.storages import STORAGES
from gatera_lightning.backbone.config import BackboneConfig
from gatera_lightning.backbone.gguf import parse_once, restore_digit_split
from gatera_lightning.backbone.quantization import (
    check_stored_quantization,
    quantize_linear_layers,
    read_quantized_layers,
)
from gatera_lightning.backbone.source import expand_path, gguf_file
from gatera_lightning.errors import ConfigError

log = logging.getLogger(__name__)


def load_backbone(config: BackboneConfig, device_type: str = "cpu") -> PreTrainedModel:
    """Load the model into CPU memory, ready for training; its parameters are not frozen yet.

    An adapter that ``config`` makes a part of it is loaded and frozen.

    Args:
        config: The backbone's settings.
        device_type: Where the model will run (cpu, cuda, …), which decides what the dtype ``auto`` is.

    Raises:
        ConfigError: The settings have problems, or the model cannot be found or loaded.
        AdapterFileError: The adapter that is part of it does not fit.
    """
    if gguf_file(config.id) is None:
        load_config(config)  # which refuses architectures before weights are read
    if config.quantization != "none":
        STORAGES[config.quantization].check_backend(device_type)
    model: PreTrainedModel
    model, found = _from_pretrained(
        AutoModelForCausalLM,
        config,
        dtype=native_dtype(device_type) if config.dtype == "auto" else getattr(torch, config.dtype),
        attn_implementation=config.attn_implementation,
        output_loading_info=True,
    )
    if missing := sorted(found["missing_keys"]):
        raise ConfigError(
            f"backbone.id: the weights of {config.id!r} lack {len(missing)} tensors of "
            f"{type(model).__name__} ({missing[0]}, …), which would be random; accepted: the complete "
            "weights of a causal language model"
        )
    if not read_quantized_layers(model) and config.quantization != "none":
        quantize_linear_layers(model, config.quantization)
    if config.adapter is not None:
        load_frozen_adapter(model, config.adapter)
    prepare_for_training(model, config)
    return model


def prepare_for_training(model: PreTrainedModel, config: BackboneConfig) -> None:
    """Turn the cache of keys and values off, and gradient checkpointing on if it is configured, in place."""
    model.config.use_cache = False
    # A multimodal model has a separate config for text.
    model.config.get_text_config(decoder=True).use_cache = False
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def default_device() -> torch.device:
    """Return the accelerator if this machine has one, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def native_dtype(device_type: str) -> torch.dtype:
    """Return bfloat16 if PyTorch knows that this type of processor multiplies it natively, else float32."""
    if device_type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device_type == "cpu" and platform.machine() in ("arm64", "aarch64"):
        native = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    elif device_type == "cpu":  # mkldnn's answer is about AVX512, which emulates bf16 matmuls
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        native = False
    return torch.bfloat16 if native else torch.float32


def load_skeleton(config: BackboneConfig) -> PreTrainedModel | None:
    """Build the model's modules without weights, to check settings against them.

    Args:
        config: The backbone's settings.

    Returns:
        The model on the meta device; None for a GGUF file, whose architecture is only known once it is
        parsed.

    Raises:
        ConfigError: As in :func:`load_backbone`.
    """
    if gguf_file(config.id) is not None:
        return None
    hf_config = load_config(config)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                hf_config,
                trust_remote_code=config.trust_remote_code,
                # A missing package for another kernel is found when weights load.
                attn_implementation="sdpa" if config.attn_implementation == "sdpa" else "eager",
            )
    except ValueError as error:
        raise _load_error(config, error) from error


def load_config(config: BackboneConfig) -> Any:
    """Load the Hugging Face config, which describes the architecture and its sizes.

    Raises:
        ConfigError: As in :func:`load_backbone`.
    """
    hf_config = _from_pretrained(AutoConfig, config)
    if getattr(hf_config, "is_encoder_decoder", False):
        raise ConfigError(
            f"backbone.id: {config.id!r} is an encoder-decoder model ({hf_config.model_type}); accepted: a "
            "causal language model, which continues a text"
        )
    check_stored_quantization(hf_config, config.id, config.quantization, compiles=config.compile)
    return hf_config


def context_length(hf_config: Any) -> int | None:
    """Return the maximum number of tokens in a sequence; None if the Hugging Face config has no limit."""
    return getattr(hf_config.get_text_config(decoder=True), "max_position_embeddings", None)


def load_tokenizer(config: BackboneConfig) -> PreTrainedTokenizerBase:
    """Load the backbone's tokenizer, and set a pad token if it has none.

    The pad token then is EOS, and the log says so. This is harmless, because labels and attention are masked
    by length and never by token.

    Raises:
        ConfigError: As in :func:`load_backbone`, the tokenizer has no EOS token, or the model has no
            embedding for some of its tokens.
    """
    tokenizer: PreTrainedTokenizerBase = _from_pretrained(AutoTokenizer, config)
    if gguf_file(config.id) is not None:
        restore_digit_split(tokenizer)
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"backbone.id: the tokenizer of {config.id!r} has no EOS token, which ends every answer"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
        log.warning("the tokenizer has no pad token; padding with EOS (%s)", tokenizer.eos_token)
    if gguf_file(config.id) is None:  # a GGUF file has one vocabulary
        embedded = getattr(load_config(config).get_text_config(decoder=True), "vocab_size", None)
        token, highest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
        if embedded is not None and highest >= embedded:
            raise ConfigError(
                f"backbone.id: the tokenizer of {config.id!r} has the token {token!r} with id {highest:,}, "
                f"but the vocabulary of the model has {embedded:,} entries; accepted: a tokenizer that fits"
            )
    return tokenizer


def _from_pretrained(auto_class: Any, config: BackboneConfig, **options: Any) -> Any:
    """Call ``auto_class.from_pretrained`` and turn its errors into ConfigError."""
    problems = config.problems()
    if problems:
        raise ConfigError(problems)
    file = gguf_file(config.id)
    if file is not None:
        return _from_gguf(auto_class, file, **options)
    source = expand_path(config.id)
    options |= {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    try:
        return auto_class.from_pretrained(source, **options)
    except ImportError as error:
        reason = _one_line(error)
        flash = "flash" in config.attn_implementation and "flash" in reason.lower()
        if auto_class is AutoModelForCausalLM and flash:
            raise ConfigError(
                f"backbone.attn_implementation: {config.attn_implementation!r} cannot be used here: {reason}"
            ) from error
        raise ConfigError(
            f"backbone.id: loading {source!r} needs a package that is missing: {reason}"
        ) from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ConfigError(
            f"backbone.id: the weights of {source!r} do not have the shapes that its config.json says; "
            "accepted: weights and config.json of one model"
        ) from error
    except SafetensorError as error:
        raise ConfigError(
            f"backbone.id: the weights of {source!r} are corrupt ({error}); accepted: complete files"
        ) from error
    except ValueError as error:
        raise _load_error(config, error) from error
    except (OSError, ConnectionError) as error:
        if Path(source).is_dir():
            raise ConfigError(f"backbone.id: cannot load the folder {source!r}: {error}") from error
        raise ConfigError(
            f"backbone.id: cannot fetch {source!r} from the hub "
            f"({type(error).__name__}: {_one_line(error)}). Without network, give a local folder "
            "(config.json, weights, tokenizer) or a .gguf file."
        ) from error


def _load_error(config: BackboneConfig, error: ValueError) -> ConfigError:
    """Return what is wrong with a model that Transformers refuses to load."""
    reason, source = _one_line(error), expand_path(config.id)
    if 'attn_implementation="eager"' in reason:
        return ConfigError(
            f"backbone.attn_implementation: {config.attn_implementation!r}, which the architecture of "
            f"{source!r} does not have ({reason.partition('. ')[0]}); accepted: eager "
            "(--model.backbone.attn_implementation eager)"
        )
    return ConfigError(f"backbone.id: cannot load {source!r}: {reason[:300]}")


def _from_gguf(auto_class: Any, file: Path, **options: Any) -> Any:
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(f"backbone.id: reading {file.name} needs a package: pip install gguf")
    is_model = auto_class is AutoModelForCausalLM
    if is_model:
        from transformers import GgufConfig

        options["quantization_config"] = GgufConfig(dequantize=True)
    try:
        with parse_once(keep=not is_model):  # the model is loaded last
            return auto_class.from_pretrained(file.parent, gguf_file=file.name, **options)
    except _GGUF_ERRORS as error:
        if isinstance(error, RuntimeError) and "ignore_mismatched_sizes" not in str(error):
            raise  # no memory, for instance
        raise ConfigError(
            f"backbone.id: {str(file)!r} is corrupt, cut short, or of an architecture that Transformers does "
            f"not read from GGUF ({type(error).__name__}: {_one_line(error)[:200]}); accepted: a complete "
            ".gguf file"
        ) from error


_GGUF_ERRORS = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    OSError,
    OverflowError,
    RuntimeError,
    struct.error,
)
"""What reading a GGUF file of any content raises."""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
