"""Learning rates against values computed by hand, parameter groups, and gradient norms."""

import copy
import itertools
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import adam

from gatera_lightning import AdapterConfig, OptimizerConfig, adapter_parameters, inject_adapters
from gatera_lightning.adapters.gates import TokenGateConfig
from gatera_lightning.training.optimizer import build_optimizer, lr_factor, squared_gradient_norms

METHODS = list(itertools.product(("lora", "dora", "hira"), ("none", "static", "token")))

# Warm-up of 4 of 12 steps: fifths while the rate rises, then eighths while it falls.
BY_HAND = {
    "constant": {0: 1 / 5, 1: 2 / 5, 3: 4 / 5, 4: 1, 5: 1, 11: 1, 12: 1, 99: 1},
    "linear": {0: 1 / 5, 1: 2 / 5, 3: 4 / 5, 4: 1, 5: 7 / 8, 8: 1 / 2, 11: 1 / 8, 12: 0, 99: 0},
    "cosine": {
        0: 1 / 5,
        1: 2 / 5,
        3: 4 / 5,
        4: 1,
        6: (1 + math.sqrt(0.5)) / 2,
        8: 1 / 2,
        10: (1 - math.sqrt(0.5)) / 2,
        12: 0,
        99: 0,
    },
}


@pytest.mark.parametrize("schedule", BY_HAND)
def test_lr_factor_matches_manual_values(schedule):
    factor = lr_factor(schedule, 4, lambda: 12)
    assert {step: factor(step) for step in BY_HAND[schedule]} == pytest.approx(BY_HAND[schedule], abs=1e-15)


@pytest.mark.parametrize("schedule", BY_HAND)
def test_lr_factor_without_warmup_starts_at_peak(schedule):
    assert lr_factor(schedule, 0, lambda: 10)(0) == 1


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("total", [1, 4, math.inf])
def test_lr_factor_stays_between_0_and_1(schedule, total):
    factor = lr_factor(schedule, 4, lambda: total)
    assert all(0 <= factor(step) <= 1 for step in range(50))


def test_lr_factor_of_endless_run_does_not_decay():
    assert lr_factor("linear", 2, lambda: math.inf)(10**6) == 1


@pytest.mark.parametrize("schedule", BY_HAND)
def test_lr_factor_asks_total_steps_after_warmup_only(schedule):
    """Lightning's Trainer would build the training loader too early to restore its position."""

    def asked():
        raise AssertionError("asked too early")

    factor = lr_factor(schedule, 2, asked)
    assert [factor(step) for step in range(3)] == pytest.approx([1 / 3, 2 / 3, 1])


def adapted(tiny_llama, update="hira", gate="token"):
    model = tiny_llama()
    inject_adapters(model, AdapterConfig(update=update, gate=gate, rank=4))
    return model


@pytest.mark.parametrize(("update", "gate"), METHODS)
def test_every_adapter_parameter_is_in_one_group(tiny_llama, update, gate):
    model = adapted(tiny_llama, update, gate)
    optimizer, _ = build_optimizer(OptimizerConfig(), model, lambda: 10)
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    gates = {
        id(p) for layer in model.modules() if getattr(layer, "gate", None) for p in layer.gate.parameters()
    }
    assert [g["name"] for g in optimizer.param_groups] == (
        ["update"] if gate == "none" else ["update", "gate"]
    )
    for group in optimizer.param_groups:
        assert all((id(p) in gates) == (group["name"] == "gate") for p in group["params"])


def test_gate_learning_rate_is_multiple_at_every_step(tiny_llama):
    config = OptimizerConfig(lr=1e-2, weight_decay=0.1, schedule="linear", warmup_steps=1)
    model = adapted(tiny_llama, gate=TokenGateConfig(lr_multiplier=0.25))
    optimizer, scheduler = build_optimizer(config, model, lambda: 3)
    rates = []
    for _ in range(4):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    assert rates == [pytest.approx([1e-2 * f, 2.5e-3 * f]) for f in (1 / 2, 1, 1 / 2, 0)]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1]


def test_gate_multiplier_0_freezes_gates_only(tiny_llama):
    model = adapted(tiny_llama, gate=TokenGateConfig(lr_multiplier=0.0))
    parameters = adapter_parameters(model)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer, _ = build_optimizer(OptimizerConfig(warmup_steps=0), model, lambda: 3)
    for p in parameters.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for name, p in parameters.items():
        assert torch.equal(p, before[name]) == (".gate." in name)


def test_layer_named_gate_is_not_a_gate():
    model = nn.ModuleDict({"router": nn.ModuleDict({"gate": nn.Linear(8, 8)})})
    inject_adapters(model, AdapterConfig(update="lora", gate="none", rank=2, target_modules=["gate"]))
    optimizer, _ = build_optimizer(OptimizerConfig(), model, lambda: 10)
    assert [(group["name"], len(group["params"])) for group in optimizer.param_groups] == [("update", 2)]


def test_valid_settings_have_no_problems():
    assert OptimizerConfig().problems() == []
    assert OptimizerConfig(warmup_steps=0, schedule="cosine").problems() == []


@pytest.mark.parametrize(
    ("setting", "accepted"),
    [
        ({"lr": 0.0}, "a number above 0"),
        ({"lr": -1e-3}, "a number above 0"),
        ({"lr": math.nan}, "a finite number"),
        ({"weight_decay": -0.1}, "at least 0"),
        ({"weight_decay": math.nan}, "a finite number"),
        ({"warmup_steps": -1}, "at least 0"),
        ({"schedule": "triangular"}, "linear, cosine, constant"),
    ],
)
def test_problem_names_setting_value_and_accepted_values(setting, accepted):
    ((name, value),) = setting.items()
    (problem,) = OptimizerConfig(**setting).problems()
    assert problem.startswith(f"optimizer.{name}: ")
    assert str(value) in problem
    assert accepted in problem


def test_all_problems_are_reported():
    settings = {"lr": -1, "schedule": "no", "weight_decay": -1, "warmup_steps": -1, "max_skipped_steps": -1}
    assert len(OptimizerConfig(**settings).problems()) == 5


def test_deprecated_gate_multiplier_is_used_by_a_plain_loop(tiny_llama):
    with pytest.warns(DeprecationWarning, match=r"use adapter\.gate\.lr_multiplier"):
        config = OptimizerConfig(lr=1e-2, gate_lr_multiplier=0.5, warmup_steps=0)
    optimizer, _ = build_optimizer(config, adapted(tiny_llama), lambda: 3)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-2, 5e-3])


def test_gradient_norm_of_group_without_gradients_is_0(tiny_llama):
    model = adapted(tiny_llama)
    optimizer, _ = build_optimizer(OptimizerConfig(), model, lambda: 10)
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    update, gate = squared_gradient_norms(optimizer, 1).tolist()
    assert update == pytest.approx(sum(p.numel() for p in optimizer.param_groups[0]["params"]))
    assert gate == 0


@pytest.mark.parametrize("ranks", [1, 4])
def test_gradient_norms_add_up_over_ranks(tiny_llama, ranks):
    """Every rank of DDP has full gradients, so each contributes its part of their square."""
    model = tiny_llama()
    inject_adapters(model, AdapterConfig(rank=4))
    optimizer, _ = build_optimizer(OptimizerConfig(), model, lambda: 10)
    torch.manual_seed(0)
    vectors = {"update": [], "gate": []}
    for name, parameter in adapter_parameters(model).items():
        parameter.grad = torch.randn_like(parameter)
        vectors["gate" if ".gate." in name else "update"].append(parameter.grad.flatten())
    expected = [float(torch.cat(vectors[group["name"]]).norm() ** 2) for group in optimizer.param_groups]
    assert expected[0] > 2 * expected[1] > 0
    found = squared_gradient_norms(optimizer, ranks)
    assert (ranks * found).tolist() == pytest.approx(expected, rel=1e-6)


@pytest.fixture
def mesh():
    """A mesh of this process only."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_sharded_parameters_use_foreach_outside_checkpoints(tiny_llama, mesh, monkeypatch):
    unsharded = adapted(tiny_llama)
    sharded = fully_shard(copy.deepcopy(unsharded), mesh=mesh)
    together, of_many = [], adam._multi_tensor_adam

    def counted(parameters, *args, **kwargs):
        together.append(len(parameters))
        of_many(parameters, *args, **kwargs)

    monkeypatch.setattr(adam, "_multi_tensor_adam", counted)
    optimizers = [
        build_optimizer(OptimizerConfig(lr=0.1), model, lambda: 10)[0] for model in (unsharded, sharded)
    ]
    for _ in range(2):
        for model, optimizer in zip((unsharded, sharded), optimizers, strict=True):
            model(input_ids=torch.arange(6)[None], labels=torch.arange(6)[None]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        for one, other in zip(
            adapter_parameters(unsharded).values(), adapter_parameters(sharded).values(), strict=True
        ):
            assert torch.equal(one, other.full_tensor())
    groups = [optimizer.state_dict()["param_groups"] for optimizer in optimizers]
    assert groups[0] == groups[1]
    assert together == [len(group["params"]) for group in groups[1]] * 2


def test_thresholds_stay_at_least_0_and_do_not_decay(tiny_llama):
    """A step against the gradient is larger than τ, and rises from 0 at once when the gradient turns."""
    model = tiny_llama()
    inject_adapters(model, AdapterConfig(update="lora", gate="threshold", rank=2))
    optimizer, _ = build_optimizer(
        OptimizerConfig(lr=1e-2, weight_decay=0.5, warmup_steps=0, schedule="constant"), model, lambda: 10
    )
    thresholds = [p for name, p in adapter_parameters(model).items() if name.endswith("gate.threshold")]
    with torch.no_grad():
        for threshold in thresholds:
            threshold.fill_(5e-4)  # half of a step of lr · lr_multiplier
    for slope, expected in ((0.0, 5e-4), (1.0, 0.0), (1.0, 0.0)):
        for threshold in thresholds:
            threshold.grad = torch.full_like(threshold, slope)
        optimizer.step()
        assert [float(threshold.detach()) for threshold in thresholds] == pytest.approx([expected] * 10)
    for threshold in thresholds:
        threshold.grad = torch.full_like(threshold, -100.0)
    optimizer.step()
    assert all(threshold > 0 for threshold in thresholds)


def test_other_gates_decay(tiny_llama):
    model = tiny_llama()
    inject_adapters(model, AdapterConfig(gate="token", rank=2))
    optimizer, _ = build_optimizer(OptimizerConfig(weight_decay=0.5), model, lambda: 10)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.5]
