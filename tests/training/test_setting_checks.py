"""All problems of the module's settings at once."""

import pytest

from gatera_lightning import AdapterConfig, BackboneConfig, ConfigError, GateRAModule, OptimizerConfig
from gatera_lightning.adapters.gates import TokenGateConfig
from gatera_lightning.generation.decoding import DecodingConfig
from gatera_lightning.objectives.next_token import NextToken
from gatera_lightning.objectives.training_loss import objectives_for
from gatera_lightning.training import module as module_file
from gatera_lightning.training.setting_checks import check_adapter_parameters, module_problems


def test_problems_of_all_sections_are_collected():
    module = GateRAModule(
        backbone=BackboneConfig(id="./nowhere"),
        adapter=AdapterConfig(rank=0, gate=TokenGateConfig(entropy_weight=-1.0)),
        optimizer=OptimizerConfig(lr=-1.0, schedule="cubic"),
        decoding=DecodingConfig(beams=0),
        warm_start="./nowhere",
    )
    found = [problem.partition(": ")[0] for problem in module.problems()]
    assert found == [
        "model.backbone.id",
        "model.adapter.rank",
        "model.adapter.gate.entropy_weight",
        "model.optimizer.schedule",
        "model.optimizer.lr",
        "model.decoding.beams",
        "model.warm_start",
    ]
    with pytest.raises(ConfigError):
        module.configure_model()


def problems(tiny_backbone, **settings):
    backbone = BackboneConfig(id=str(tiny_backbone), compile=settings.pop("compile", False))
    adapter = AdapterConfig(**settings.pop("adapter", {}))
    return module_problems(
        backbone,
        adapter,
        OptimizerConfig(),
        DecodingConfig(),
        settings.pop("warm_start", None),
        objectives_for(adapter),
    )


def test_compilation_with_gate_thresholds_is_rejected(tiny_backbone):
    gate = {"gate": TokenGateConfig(skip_below=0.1)}
    assert problems(tiny_backbone, adapter=gate) == problems(tiny_backbone, compile=True) == []
    (problem,) = problems(tiny_backbone, adapter=gate, compile=True)
    assert problem.startswith(
        "model.backbone.compile: true, with adapter.gate.skip_below 0.1 and merge_above 1.0"
    )
    assert problem.endswith("accepted: false, or 0 and 1")


def test_warm_start_from_other_method_is_rejected(tiny_backbone, build, tmp_path):
    from gatera_lightning import save_adapter

    folder = str(save_adapter(build().model, tmp_path / "adapter"))
    assert problems(tiny_backbone, warm_start=folder, adapter={"rank": 4}) == []
    found = problems(
        tiny_backbone, warm_start=folder, adapter={"update": "lora", "gate": "none", "alpha": 8.0}
    )
    assert found == [
        f"model.warm_start: {folder} has update hira, but model.adapter.update is lora",
        f"model.warm_start: {folder} has gate token, but model.adapter.gate is none",
        f"model.warm_start: {folder} has rank 4, but model.adapter.rank is 32",
        f"model.warm_start: {folder} has scale 1.0, but model.adapter.scale is 0.25",
    ]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda model: model.requires_grad_(False), "frozen"),
        (lambda model: model.bfloat16(), "torch.bfloat16"),
        (lambda model: model.bfloat16().requires_grad_(False), "frozen"),
    ],
    ids=["frozen", "cast", "both"],
)
def test_changed_adapter_parameter_is_rejected(build, change, found):
    module = build()
    check_adapter_parameters(module.model, module.adapter)
    change(module.model)
    with pytest.raises(RuntimeError, match=rf"should be trainable in torch\.float32, but is {found}$"):
        check_adapter_parameters(module.model, module.adapter)


class MaskedTokens(NextToken):
    """Gives masks, as an objective of drafting does."""

    gives_position_mask = True


def test_position_gate_needs_an_objective_that_gives_its_mask(tiny_backbone, monkeypatch):
    (problem,) = problems(tiny_backbone, adapter={"gate": "position"})
    assert problem.startswith("model.adapter.gate: a 'position' gate takes a mask of the tokens")
    assert "no objective gives one (NextToken, GateEntropy)" in problem
    settings = {
        "backbone": BackboneConfig(id=str(tiny_backbone)),
        "adapter": AdapterConfig(gate="position", rank=2),
        "optimizer": OptimizerConfig(),
    }
    module = GateRAModule(**settings)
    monkeypatch.setattr(
        module_file, "load_adapted_model", lambda *_, **__: pytest.fail("weights were loaded")
    )
    with pytest.raises(ConfigError, match="a 'position' gate takes a mask"):
        module.configure_model()
    assert GateRAModule(**settings, objectives=[MaskedTokens()]).problems() == []
