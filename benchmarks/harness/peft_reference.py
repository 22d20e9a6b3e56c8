"""The reference of quantized training: PEFT's LoRA over bitsandbytes' own layers, in a plain loop."""

import tempfile
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from gatera_lightning import AdapterConfig, BackboneConfig
from gatera_lightning.adapters.lookup import adapted_linears
from gatera_lightning.adapters.packed_weight import PackedWeight, dense
from gatera_lightning.backbone.loading import load_backbone
from gatera_lightning.datamodules import CommonsenseDataModule
from gatera_lightning.datamodules.batch import IGNORE_INDEX, Batch


def reference_model(backbone: str, config: AdapterConfig, *, nf4: bool, keep_dense: list[str]) -> nn.Module:
    """Load a backbone in float32 and put PEFT's LoRA on it.

    Args:
        backbone: The backbone's id.
        config: Rank and layers of the adapter.
        nf4: Whether the linear layers are bitsandbytes' ``Linear4bit``; they compute in float32.
        keep_dense: Last segments of the names of linear layers that stay in float32.
    """
    from peft import LoraConfig, get_peft_model

    model: Any = load_backbone(BackboneConfig(id=backbone, dtype="float32"))
    if nf4:
        storage = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=["lm_head", *keep_dense],
        )
        with tempfile.TemporaryDirectory() as folder:  # the backbone may be a GGUF file
            model.save_pretrained(folder)
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, quantization_config=storage
            )
        model.config.use_cache = False
    return get_peft_model(
        model, LoraConfig(r=config.rank, lora_alpha=config.rank, target_modules=list(config.target_modules))
    )


def copy_start(adapted: nn.Module, reference: nn.Module) -> float:
    """Start the reference's LoRA with the values of an adapted model's LoRA.

    Returns:
        The largest difference between the frozen weights of the two, dequantized, over the layers that both
        store alike.
    """
    largest = 0.0
    for name, layer in adapted_linears(adapted).items():
        other: Any = reference.get_submodule(f"base_model.model.{name}")
        a, b = layer.update.factors()
        with torch.no_grad():
            other.lora_A["default"].weight.copy_(a)
            other.lora_B["default"].weight.copy_(b)
        own = layer.base.weight.detach()
        if isinstance(own, PackedWeight) == hasattr(other.base_layer.weight, "quant_state"):
            largest = max(largest, float((_weight(other.base_layer) - dense(own)).abs().max()))
    return largest


def _weight(layer: Any) -> Tensor:
    """Return the weight of a dense linear layer or of a ``Linear4bit`` in float32."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return layer.weight.detach()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, state).float()


def fit_and_evaluate_reference(
    reference: nn.Module, data: CommonsenseDataModule, *, steps: int, lr: float, warmup_steps: int
) -> tuple[list[float], float]:
    """Train with AdamW, linear decay and clipping at 1, then evaluate.

    Args:
        reference: A model whose parameters that require a gradient are trained.
        data: The data module, connected to a tokenizer.
        steps: Optimizer steps, without accumulation.
        lr: Peak learning rate.
        warmup_steps: Steps before it is reached.

    Returns:
        The training loss of each step, and the cross-entropy of the correct answers of the test split.
    """
    data.setup("fit")
    data.setup("test")
    trained = [parameter for parameter in reference.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    losses: list[float] = []
    reference.train()
    for step, batch in zip(range(steps), _epochs(data), strict=False):
        rising = step < warmup_steps
        factor = (
            (step + 1) / (warmup_steps + 1) if rising else 1 - (step - warmup_steps) / (steps - warmup_steps)
        )
        optimizer.param_groups[0]["lr"] = lr * factor
        loss = _summed_loss(reference, batch, torch.ones_like(batch["gold_ids"], dtype=torch.bool))
        loss = loss / batch["step_supervised_tokens"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, _evaluate(reference, data)


def _epochs(data: CommonsenseDataModule) -> Iterator[Batch]:
    while True:
        yield from data.train_dataloader()


@torch.no_grad()
def _evaluate(model: nn.Module, data: CommonsenseDataModule) -> float:
    model.eval()
    total, tokens = 0.0, 0
    (loader,) = data.test_dataloader()
    for batch in loader:
        correct = batch["answer_ids"] == batch["gold_ids"]
        total += float(_summed_loss(model, batch, correct))
        tokens += int((batch["labels"][correct][:, 1:] != IGNORE_INDEX).sum())
    return total / tokens


def _summed_loss(model: nn.Module, batch: Batch, rows: Tensor) -> Tensor:
    """Return the summed cross-entropy of some of a batch's sequences, from the logits of all their tokens."""
    labels = batch["labels"][rows][:, 1:]
    output = model(input_ids=batch["input_ids"][rows], attention_mask=batch["attention_mask"][rows])
    logits = output.logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
