"""One run: train an adapter, measure it, and return the ledger's line."""

import copy
import hashlib
import math
import subprocess
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.harness.fitting import SMOLLM2
from benchmarks.harness.machine import DEVICE, describe_machine, peak_memory, reset_peak_memory, synchronize
from benchmarks.quality.controls import controls_registered, shuffle_without_padding
from benchmarks.quality.evaluation import RowLosses, gate_statistics, on_device, row_losses
from benchmarks.quality.families import MEASURED, Family, FamilyRows, Rows, load_rows
from benchmarks.quality.ledger import Line
from benchmarks.quality.methods import METHODS
from benchmarks.quality.plan import Run
from gatera_lightning import (
    BackboneConfig,
    OptimizerConfig,
    adapter_parameters,
    inject_adapters,
    training_loss,
)
from gatera_lightning.backbone.config import Dtype
from gatera_lightning.backbone.loading import load_backbone, load_tokenizer
from gatera_lightning.training.optimizer import build_optimizer

BACKBONE = BackboneConfig(id=SMOLLM2, dtype="float32")
"""Of the untrained model, and of most methods."""

CLIPPING = 1.0

WARMUP_SHARE = 0.1
"""Share of the steps over which the learning rate rises."""

CHECKPOINTS = (0.25, 0.5, 1.0)
"""Shares of the steps after which losses are measured for the trajectory."""

_DIVERGED: Line = {"test": None, "retention": None, "trajectory": [], "gates": None}
"""What a tested run measures whose training diverged."""


def execute(run: Run) -> Line:
    """Train and measure; the same run gives the same line up to rounding and costs."""
    started = time.process_time()
    family = MEASURED[run.family]
    with controls_registered():
        measured: Line = _untrained(family) if run.stage == "untrained" else _trained(run, family)
    measured["cost"] = {"cpu_seconds": round(time.process_time() - started, 1)} | measured.pop("cost", {})
    identity = {
        "family": run.family,
        "stage": run.stage,
        "method": run.method,
        "lr": run.lr,
        "seed": run.seed,
    }
    return identity | measured | {"rows": rows_digest(run.family), "environment": environment()}


def _untrained(family: Family) -> Line:
    model, rows = _backbone(BACKBONE.dtype).eval(), _rows(family.name)
    line: Line = {
        "retention": _to_plain(_remembered(model, rows.test.first(family.retention_rows)), with_tokens=True)
    }
    if family.is_trained_on:
        test = row_losses(model, rows.test, candidates=family.has_candidates)
        line["test"] = _to_plain(test, with_tokens=True)
        line["validation"] = round(row_losses(model, rows.validation).per_token, 5)
    return line


def _trained(run: Run, family: Family) -> Line:
    assert run.lr is not None
    method, rows = METHODS[run.method], _rows(family.name)
    torch.manual_seed(run.seed)  # for gates that draw
    model = _fresh_backbone(method.dtype)
    inject_adapters(model, method.adapter(), torch.Generator().manual_seed(run.seed))
    shuffle_without_padding(model)
    config = OptimizerConfig(lr=run.lr, warmup_steps=round(WARMUP_SHARE * method.steps))
    optimizer, scheduler = build_optimizer(config, model, lambda: method.steps)
    parameters = list(adapter_parameters(model).values())
    marks = {round(share * method.steps) for share in CHECKPOINTS[:-1]} if run.stage == "seeds" else set()
    trajectory: list[Line] = []
    losses: list[float] = []
    seconds = 0.0
    reset_peak_memory()
    peak = 0
    for step, batch in enumerate(rows.batches(method.steps, family.batch_size, run.seed), 1):
        model.train()
        started = time.process_time()
        loss = training_loss(model, on_device(batch))
        if not math.isfinite(loss.item()):
            break
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIPPING)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        synchronize()
        seconds += time.process_time() - started
        losses.append(loss.item())
        peak = max(peak, peak_memory())
        if step in marks:
            state = torch.get_rng_state()
            trajectory.append(_probed(model, family, step))
            torch.set_rng_state(state)
            reset_peak_memory()
    diverged = len(losses) < method.steps
    line: Line = {
        "config": method.config() | {"batch_size": family.batch_size, "train_rows": len(rows.train.indices)},
        "train_loss": None if diverged else round(sum(losses[-8:]) / 8, 4),
        "cost": {
            "cpu_seconds_per_step": round(seconds / max(1, len(losses)), 3),
            "peak_bytes": peak,
            "adapter_bytes": sum(parameter.nbytes for parameter in parameters),
            "trained_parameters": sum(parameter.numel() for parameter in parameters),
        },
    }
    model.eval()
    if run.stage == "rates":
        validation = math.inf if diverged else row_losses(model, rows.validation).per_token
        return line | {"validation": round(validation, 5) if math.isfinite(validation) else None}
    tested = None if diverged else _tested(model, family, trajectory, method.steps)
    return line | (_DIVERGED if tested is None else tested)


def _tested(model: PreTrainedModel, family: Family, trajectory: list[Line], steps: int) -> Line | None:
    """Measure test rows, rows not trained on, and gates; None if a test loss is not finite."""
    rows = _rows(family.name).test
    test = row_losses(model, rows, candidates=family.has_candidates)
    if not math.isfinite(sum(test.sums)):
        return None
    retention = {
        other.name: _remembered(model, _rows(other.name).test.first(other.retention_rows))
        for other in MEASURED.values()
        if other != family
    }
    probes = {other: found.first(MEASURED[other].probe_rows) for other, found in retention.items()}
    end = _trajectory_point(steps, test.first(family.probe_rows), probes)
    return {
        "test": _to_plain(test),
        "retention": {name: _to_plain(found) for name, found in retention.items()},
        "trajectory": [*trajectory, end],
        "gates": gate_statistics(model, rows.first(family.probe_rows)),
    }


def _probed(model: PreTrainedModel, family: Family, step: int) -> Line:
    """Measure the first test rows of the family, and of what is not trained on."""
    model.eval()
    heldout = row_losses(model, _rows(family.name).test.first(family.probe_rows))
    others = {
        other.name: _remembered(model, _rows(other.name).test.first(other.probe_rows))
        for other in MEASURED.values()
        if other != family
    }
    return _trajectory_point(step, heldout, others)


def _remembered(model: PreTrainedModel, rows: Rows) -> RowLosses:
    """Measure the loss on rows that are not trained on, without the end of the answer."""
    return row_losses(model, rows, with_end=False)


def _trajectory_point(step: int, heldout: RowLosses, others: dict[str, RowLosses]) -> Line:
    retention = {name: round(losses.per_token, 5) for name, losses in others.items()}
    return {"step": step, "heldout": round(heldout.per_token, 5), "retention": retention}


def _to_plain(losses: RowLosses, *, with_tokens: bool = False) -> Line:
    """Return losses for JSON; tokens are the same for all models, and stand in the untrained one's line."""
    plain: Line = {"sums": losses.sums}
    if with_tokens:
        plain["tokens"] = losses.tokens
    if losses.correct:
        plain["correct"] = losses.correct
    return plain


@cache
def _backbone(dtype: Dtype) -> PreTrainedModel:
    return load_backbone(replace(BACKBONE, dtype=dtype), DEVICE)


def _fresh_backbone(dtype: Dtype) -> PreTrainedModel:
    """Return a copy of the backbone that shares its weights, which no run changes."""
    backbone = _backbone(dtype)
    return copy.deepcopy(backbone, {id(weight): weight for weight in backbone.parameters()})


@cache
def _rows(family: str) -> FamilyRows:
    return load_rows(MEASURED[family], load_tokenizer(BACKBONE))


@cache
def rows_digest(family: str) -> str:
    """Return eight hex digits of the questions that a family's runs read, and of their order."""
    rows = _rows(family)
    splits = (rows.train, rows.validation, rows.test)
    keys = [key for split in splits for key in split.question_keys()]
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()[:8]


@cache
def environment() -> dict[str, Any]:
    """Return the commit of this source, the machine and the version of PyTorch."""
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    return {
        "commit": (commit.stdout.strip() or "unknown") + ("+changes" if changed.stdout.strip() else ""),
        "machine": describe_machine(),
    }
