"""``plan``: figures of the tiny recipe by hand and its real batches, and the formulas of docs/results/scaling.md in small numbers."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
from tiny_backbone import tiny_args, tiny_data

import gatera_lightning.cli.commands.estimate
import gatera_lightning.training.model_loading
from gatera_lightning import ConfigError
from gatera_lightning.cli.commands.estimate import layout_of
from gatera_lightning.cli.main import main
from gatera_lightning.cost_model import device_memory
from gatera_lightning.cost_model.device_memory import Layout
from gatera_lightning.cost_model.step_costs import StepCosts
from gatera_lightning.datamodules.batch import IGNORE_INDEX

FSDP = ["--config", "overlays/fsdp.yaml"]
# The tiny Llama: hidden 32, k and v 16 wide, feed-forward 48, 400 entries; q, o; k, v; gate, up, down; two norms.
LAYER = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32
ROOT = 2 * 400 * 32 + 32
FROZEN = 2 * LAYER + ROOT
# Rank 4 on q, k, v, up, down: B and A, then a weight and a bias of the gate.
TRAINABLE = 2 * (4 * (64 + 48 + 48 + 80 + 80) + (32 + 32 + 32 + 32 + 48) + 5)
COSTS = StepCosts(activations=400, logits=50, peak=700, forward_flops=2, backward_flops=5)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Every test runs in an empty folder of its own, loading weights is an error, and a GiB is a byte: the model is tiny."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        gatera_lightning.training.model_loading, "load_backbone", lambda _: pytest.fail("weights were loaded")
    )
    monkeypatch.setattr(gatera_lightning.cli.commands.estimate, "GIB", 1)
    monkeypatch.setattr(device_memory, "GIB", 1)
    return tmp_path


@pytest.fixture
def show(tiny_backbone, capsys):
    """``show(*flags)``: what ``plan`` prints for the tiny recipe."""

    def printed(*flags, backbone=tiny_backbone):
        assert main(["plan", "--config", "quickstart.yaml", *tiny_args(backbone), *flags]) == 0
        return capsys.readouterr().out

    return printed


@pytest.fixture
def refused(tiny_backbone, capsys):
    """``refused(*flags)``: the problems that ``plan`` reports, one a line."""

    def problems(*flags):
        assert main(["plan", "--config", "quickstart.yaml", *tiny_args(tiny_backbone), *flags]) == 2
        out, error = capsys.readouterr()
        assert out == ""
        return [line.removeprefix("  - ") for line in error.splitlines() if line.startswith("  - ")]

    return problems


def memory(printed):
    """The parts and the peak, as they are printed."""
    return {
        name: float(size)
        for name, size in re.findall(r"^    (\w+) +(\d+\.\d\d)", printed, flags=re.MULTILINE)
    }


def figure(printed, name):
    """What stands behind the name of a figure."""
    return re.search(rf"^  {name} +(.*)$", printed, flags=re.MULTILINE)[1]


# --- what is printed ---


def test_parameters_and_parts_by_hand(show):
    printed = show()
    assert printed.splitlines()[1] == "  devices        1 rank"
    assert (FROZEN, TRAINABLE) == (41_120, 2_922)
    assert figure(printed, "parameters") == "41,120 frozen in float32, 2,922 trainable in float32 (7.11%)"
    parts = memory(printed)
    assert [parts[name] for name in ("weights", "adapter", "gradients", "moments")] == [
        *(4 * FROZEN, 4 * TRAINABLE, 4 * TRAINABLE, 8 * TRAINABLE)
    ]
    rest = parts["peak"] - parts["weights"] - parts["adapter"] - parts["moments"]
    assert (
        rest >= parts["activations"] + parts["logits"] > parts["logits"] > 0
    )  # gradients come as activations go
    assert rest <= 2 * (parts["activations"] + parts["logits"] + parts["gradients"])
    assert figure(printed, "communication") == "none"


def test_four_shards_by_hand(show):
    printed = show(*FSDP, "--trainer.devices", "4")
    assert printed.splitlines()[1] == "  devices        4 ranks, 4 shards (FSDP2)"
    parts = memory(printed)
    assert parts["weights"] == 4 * (FROZEN // 4 + ROOT + 2 * LAYER)
    assert [parts[name] for name in ("adapter", "gradients", "moments")] == [
        TRAINABLE,
        TRAINABLE,
        2 * TRAINABLE,
    ]
    fetched, reduced = 4 * (2 * 2 * LAYER + ROOT + 2 * TRAINABLE) * 3 // 4, 4 * TRAINABLE * 3 // 4
    assert (
        figure(printed, "communication") == f"all-gather {fetched:.2f} GiB, reduce-scatter {reduced:.2f} GiB"
    )
    twice = show(*FSDP, "--trainer.devices", "4", "--trainer.accumulate_grad_batches", "2")
    assert (
        figure(twice, "communication")
        == f"all-gather {2 * fetched:.2f} GiB, reduce-scatter {2 * reduced:.2f} GiB"
    )


def test_what_generating_adds_by_hand(show):
    """HiRA's W0 ⊙ BA of q, k, v, up, down; LoRA's factors are as good as a product of them, but for the merged weight."""
    adapted = 4 * 2 * (32 * 32 + 2 * 32 * 16 + 2 * 32 * 48)
    exact, fast = ["--model.decoding.beams", "1"], ["--model.decoding.skip_below", "0.1"]
    lora = ["--model.adapter.update", "lora", "--model.adapter.gate", "none"]
    for flags in (exact, fast, [*lora, *fast]):
        assert figure(show(*flags), "generating").startswith(f"{adapted:.2f} GiB more"), flags
    for flags in ([*lora, *exact], ["--model.decoding.prepared", "false"], [*FSDP, "--trainer.devices", "4"]):
        assert "generating" not in show(*flags)


def test_trainable_parameters_in_double_precision_are_as_many(show):
    printed = show("--model.adapter.adapter_dtype", "float64")
    assert figure(printed, "parameters") == "41,120 frozen in float32, 2,922 trainable in float64 (7.11%)"
    assert memory(printed)["adapter"] == 8 * TRAINABLE


def test_operations_of_a_step_are_those_of_all_its_micro_batches(show, monkeypatch):
    costs = StepCosts(activations=1, logits=1, peak=2, forward_flops=2 * 10**12, backward_flops=4 * 10**12)
    monkeypatch.setattr(gatera_lightning.cli.commands.estimate, "step_costs", lambda *_, **__: costs)
    printed = show("--trainer.accumulate_grad_batches", "2")
    rows, tokens = map(int, re.match(r"(\d+) rows of (\d+) tokens", figure(printed, "micro-batch")).groups())
    assert figure(printed, "compute") == (
        f"{6000 / (rows * tokens):.2f} GFLOP a token (forward {2000 / (rows * tokens):.2f}), 12.00 TFLOP a step and device"
    )


def test_operations_that_gates_may_leave_out_are_said_to_be_counted(show):
    said = "with every gate undecided; what skip_below and merge_above leave out depends on the gates"
    assert said not in show()
    printed = show("--model.adapter.gate.skip_below", "0.1")
    assert said in printed
    assert figure(printed, "compute") == figure(show(), "compute")


def test_recomputed_layers_are_computed_again(show, monkeypatch):
    seen = []
    monkeypatch.setattr(
        gatera_lightning.cli.commands.estimate,
        "step_costs",
        lambda *_, recomputed: seen.append(recomputed) or COSTS,
    )
    show()
    show("--model.backbone.gradient_checkpointing", "true")
    assert seen == [False, True]


def test_processes_that_only_the_training_machine_can_count_are_said_to_be_assumed(show):
    assert (
        show("--trainer.devices", "auto").splitlines()[1]
        == "  devices        1 rank (assumed: trainer.devices is auto)"
    )


@pytest.mark.parametrize("broken", [True, False], ids=["damaged", "missing"])
def test_weights_are_not_read(broken, show, tiny_backbone, elsewhere):
    shutil.copytree(tiny_backbone, elsewhere / "light", ignore=shutil.ignore_patterns("*.safetensors"))
    if broken:
        (elsewhere / "light" / "model.safetensors").write_bytes(b"no weights")
    light, whole = show(backbone=elsewhere / "light"), show()
    assert light.splitlines()[1:] == whole.splitlines()[1:]


# --- does it fit? ---


def test_what_fits_and_what_does_not(show):
    printed = show()
    peak = memory(printed)["peak"]
    assert f"    peak         {peak:.2f}    (--memory GiB says whether it fits)\n" in printed
    assert f"{peak:.2f}    of {peak}: fits\n" in show("--memory", str(peak))
    assert (
        f"{peak:.2f}    of {peak - 3}: DOES NOT FIT, by 3.0 GiB; most of it is activations: "
        "model.backbone.gradient_checkpointing: true if it is not, or more trainer.accumulate_grad_batches\n"
    ) in show("--memory", str(peak - 3))


# --- the micro-batch ---


@pytest.mark.parametrize("train_on", ["response", "all"])
@pytest.mark.parametrize(
    "data",
    [{}, {"packing": True, "max_length": 90}, {"group_by_length": False}, {"token_budget": 300}],
    ids=str,
)
def test_the_micro_batch_is_the_largest_that_fit_would_see(data, train_on, show, tiny_backbone):
    given = {
        "train_on": train_on,
        "batch_size": 14,
        **data,
    }  # 14 rows over 2 × 2: micro-batches of four and of three
    flags = [
        part
        for name, value in given.items()
        for part in (f"--data.init_args.{name}", json.dumps(value).strip('"'))
    ]
    printed = show("--trainer.devices", "2", "--trainer.accumulate_grad_batches", "2", *flags)
    batches = []
    for rank in (0, 1):
        real = tiny_data(tiny_backbone, validation=["everyday[:16]"], **({"group_by_length": True} | given))
        real.trainer = SimpleNamespace(
            world_size=2,
            global_rank=rank,
            is_global_zero=False,
            accumulate_grad_batches=2,
            limit_train_batches=1.0,
        )
        real.setup("fit")
        batches += list(real.train_dataloader())
    largest = max(batch["input_ids"].numel() for batch in batches)
    shapes = {
        (*batch["input_ids"].shape, int((batch["labels"] != IGNORE_INDEX).sum()))
        for batch in batches
        if batch["input_ids"].numel() == largest
    }
    assert len(batches) > 4
    found = re.fullmatch(
        r"(\d+) rows of (\d+) tokens, (\d+) with loss \(the largest of the plan\)",
        figure(printed, "micro-batch"),
    )
    assert tuple(map(int, found.groups())) in shapes


def test_without_the_rows_the_settings_decide(show, refused, caplog):
    away = ["--data.init_args.train", '["nobody/nothing"]', "--data.init_args.max_length", "200"]
    source = "(no rows to be had here: all of max_length, half of it with loss)"
    assert figure(show(*away), "micro-batch") == f"16 rows of 200 tokens, 1,600 with loss {source}"
    assert "planned without the rows, which cannot be read" in caplog.text
    assert "nobody/nothing" in caplog.text
    cut = [
        "--trainer.devices",
        "2",
        "--trainer.accumulate_grad_batches",
        "3",
        "--data.init_args.train_on",
        "all",
    ]
    assert figure(show(*away, *cut), "micro-batch").startswith("3 rows of 200 tokens, 600 with loss")
    (said,) = refused(*away, "--trainer.devices", "32")
    assert said.startswith(
        "data.batch_size: 16 examples per step cannot fill accumulate_grad_batches 1 × 32 ranks; accepted:"
    )


# --- problems ---


@pytest.mark.parametrize("size", ["0", "-1", "nan"])
def test_a_memory_that_is_none_is_refused(size, refused):
    assert refused("--memory", size) == [f"--memory: {float(size)}; accepted: GiB of one device, above 0"]


def test_what_fit_would_refuse_is_refused_all_at_once(refused):
    own = ["--model.adapter.rank", "0", "--data.init_args.batch_size", "0", "--trainer.precision", "16-mixed"]
    own += ["--trainer.strategy", "fsdp", "--throughput.every_n_steps", "-1"]
    assert [said.partition(":")[0] for said in refused(*own)] == [
        *(
            "throughput.every_n_steps",
            "model.adapter.rank",
            "data.batch_size",
            "trainer.precision",
            "trainer.strategy",
        )
    ]


def test_what_the_planned_steps_refuse_is_refused(refused):
    (said,) = refused("--trainer.devices", "32")
    assert said.startswith(
        "data.batch_size: 16 examples per step cannot fill accumulate_grad_batches 1 × 32 ranks; accepted:"
    )
    (said,) = refused("--trainer.devices", "8", "--data.init_args.train", '["everyday[:5]"]')
    assert said.startswith("data.train: 5 examples cannot fill 8 micro-batches")


def test_modules_that_the_model_does_not_have_are_refused(refused):
    (said,) = refused("--model.adapter.target_modules", "[nothing]")
    assert "'nothing'" in said


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        (
            {"replicate_size": 3},
            "trainer.strategy.replicate_size: 3 does not divide the 8 processes (nodes × devices)",
        ),
        (
            {"replicate_size": 2, "shard_size": 2},
            "trainer.strategy: replicate_size 2 × shard_size 2 is 4, and there are 8 processes (nodes × devices)",
        ),
        ({"replicate_size": 0}, "trainer.strategy.replicate_size: 0; accepted: an integer of at least 1"),
    ],
)
def test_a_mesh_that_is_not_of_the_processes_is_refused_as_by_fit(sizes, said, refused):
    flags = [
        part for name, size in sizes.items() for part in (f"--trainer.strategy.init_args.{name}", str(size))
    ]
    (found,) = refused(*FSDP, "--trainer.devices", "4", "--trainer.num_nodes", "2", *flags)
    assert found.startswith(said)


# --- formulas ---


def sharding(**sizes):
    return {"class_path": "gatera_lightning.distributed.sharding.AdapterShardingStrategy", "init_args": sizes}


@pytest.mark.parametrize(
    ("strategy", "layout"),
    [
        ("auto", Layout(8, 1)),
        ("ddp", Layout(8, 1)),
        ({"class_path": "lightning.pytorch.strategies.DDPStrategy"}, Layout(8, 1)),
        (sharding(), Layout(1, 8)),
        (sharding(shard_size=8, cpu_offload=True), Layout(1, 8, True)),
        (sharding(shard_size="auto", replicate_size=2), Layout(2, 4)),
        (sharding(shard_size=2, replicate_size=4), Layout(4, 2)),
    ],
)
def test_layout_of_reads_strategy(strategy, layout):
    assert layout_of(strategy, 8) == layout


def test_layout_of_one_rank_shards_nothing():
    assert layout_of(sharding(), 1) == Layout(1, 1)


def test_a_layout_of_another_number_of_processes_is_refused():
    with pytest.raises(
        ConfigError,
        match=r"^trainer.strategy: replicate_size 2 × shard_size 3 is 6, and there are 8 processes",
    ):
        layout_of(sharding(shard_size=3, replicate_size=2), 8)
