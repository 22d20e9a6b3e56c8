"""``estimate``: what it prints for the tiny recipe, compared with manual sums and real batches."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
from tiny_backbone import tiny_args, tiny_data

from gatera_lightning.cli.commands import estimate as estimate_command
from gatera_lightning.cli.commands.estimate import describe_fit, layout_of
from gatera_lightning.cli.main import main
from gatera_lightning.cost_model import device_memory
from gatera_lightning.cost_model.device_memory import Layout, Memory
from gatera_lightning.cost_model.step_costs import StepCosts
from gatera_lightning.datamodules.batch import IGNORE_INDEX
from gatera_lightning.errors import ConfigError

FSDP = ["--config", "overlays/fsdp.yaml"]
# The tiny Llama: hidden 32, k and v 16, feed-forward 48, vocabulary 400: q, o; k, v; gate, up, down; two
# norms.
LAYER = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32
ROOT = 2 * 400 * 32 + 32
FROZEN = 2 * LAYER + ROOT
# Rank 4 on q, k, v, up, down: B and A, then a weight and a bias of the gate.
TRAINABLE = 2 * (4 * (64 + 48 + 48 + 80 + 80) + (32 + 32 + 32 + 32 + 48) + 5)

TOO_FEW_EXAMPLES = (
    "data.batch_size: 16 examples per step cannot fill accumulate_grad_batches 1 × 32 ranks; accepted:"
)


@pytest.fixture(autouse=True)
def bytes_as_gib(monkeypatch, no_weights):
    """Make a GiB one byte, because the model is tiny."""
    monkeypatch.setattr(estimate_command, "GIB", 1)
    monkeypatch.setattr(device_memory, "GIB", 1)


@pytest.fixture
def show(tiny_backbone, capsys):
    """``show(*flags)``: what ``estimate`` prints for the tiny recipe."""

    def printed(*flags, backbone=tiny_backbone):
        assert main(["estimate", "--config", "quickstart.yaml", *tiny_args(backbone), *flags]) == 0
        return capsys.readouterr().out

    return printed


@pytest.fixture
def reject(recipe, problems):
    """``reject(*flags)``: the problems that ``estimate`` reports."""
    return lambda *flags: problems("estimate", *recipe, *flags)


def memory(printed):
    """The parts and the peak."""
    return {
        name: float(size)
        for name, size in re.findall(r"^    (\w+) +(\d+\.\d\d)", printed, flags=re.MULTILINE)
    }


def value(printed, label):
    """What follows a label."""
    return re.search(rf"^  {label} +(.*)$", printed, flags=re.MULTILINE)[1]


def settings(**values):
    """Flags of the data module."""
    return [
        arg
        for name, setting in values.items()
        for arg in (f"--data.init_args.{name}", json.dumps(setting).strip('"'))
    ]


# --- printed values ---


def test_estimate_matches_manual_sums(show):
    printed = show()
    assert printed.splitlines()[0].endswith(", hira × token, rank 4")
    assert value(printed, "devices") == "1 rank"
    assert (FROZEN, TRAINABLE) == (41_120, 2_922)
    assert value(printed, "parameters") == "41,120 frozen in float32, 2,922 trainable in float32 (7.11%)"
    parts = memory(printed)
    assert [parts[name] for name in ("weights", "adapter", "gradients", "moments")] == [
        *(4 * FROZEN, 4 * TRAINABLE, 4 * TRAINABLE, 8 * TRAINABLE)
    ]
    rest = parts["peak"] - parts["weights"] - parts["adapter"] - parts["moments"]
    # Gradients grow while activations are freed.
    assert rest >= parts["activations"] + parts["logits"] > parts["logits"] > 0
    assert rest <= 2 * (parts["activations"] + parts["logits"] + parts["gradients"])
    assert value(printed, "communication") == "none"


def test_estimate_of_four_shards_matches_manual_sums(show):
    printed = show(*FSDP, "--trainer.devices", "4")
    assert value(printed, "devices") == "4 ranks, 4 shards (FSDP2)"
    parts = memory(printed)
    assert parts["weights"] == 4 * (FROZEN // 4 + ROOT + 2 * LAYER)
    adapter = [parts[name] for name in ("adapter", "gradients", "moments")]
    assert adapter == [TRAINABLE, TRAINABLE, 2 * TRAINABLE]
    gathered, reduced = 4 * (2 * 2 * LAYER + ROOT + 2 * TRAINABLE) * 3 // 4, 4 * TRAINABLE * 3 // 4
    for accumulate in (1, 2):
        flags = ["--trainer.devices", "4", "--trainer.accumulate_grad_batches", str(accumulate)]
        assert value(show(*FSDP, *flags), "communication") == (
            f"all-gather {accumulate * gathered:.2f} GiB, reduce-scatter {accumulate * reduced:.2f} GiB"
        )


def test_estimate_adds_prepared_weights_of_generation(show):
    """HiRA caches W0 ⊙ BA of q, k, v, up and down; LoRA needs only the merged weight of saturated gates."""
    adapted = 4 * 2 * (32 * 32 + 2 * 32 * 16 + 2 * 32 * 48)
    exact, fast = ["--model.decoding.beams", "1"], ["--model.decoding.skip_below", "0.1"]
    lora = ["--model.adapter.update", "lora", "--model.adapter.gate", "none"]
    for flags in (exact, fast, [*lora, *fast]):
        assert value(show(*flags), "generation").startswith(f"{adapted:.2f} GiB more"), flags
    for flags in ([*lora, *exact], ["--model.decoding.prepared", "false"], [*FSDP, "--trainer.devices", "4"]):
        assert "generation" not in show(*flags)


def test_estimate_counts_adapter_in_its_own_dtype(show):
    printed = show("--model.adapter.adapter_dtype", "float64")
    assert value(printed, "parameters") == "41,120 frozen in float32, 2,922 trainable in float64 (7.11%)"
    assert memory(printed)["adapter"] == 8 * TRAINABLE


def test_flops_of_step_include_all_micro_batches(show, monkeypatch):
    costs = StepCosts(activations=1, logits=1, peak=2, forward_flops=2 * 10**12, backward_flops=4 * 10**12)
    monkeypatch.setattr(estimate_command, "step_costs", lambda *_, **__: costs)
    printed = show("--trainer.accumulate_grad_batches", "2")
    rows, length = map(int, re.match(r"(\d+) rows of (\d+) tokens", value(printed, "micro-batch")).groups())
    assert value(printed, "compute") == (
        f"{6000 / (rows * length):.2f} GFLOP per token (forward {2000 / (rows * length):.2f}), "
        "12.00 TFLOP per step and device"
    )


def test_flops_with_thresholds_are_an_upper_bound(show):
    remark = "if no gate is saturated; what skip_below and merge_above save depends on the gates"
    assert remark not in show()
    printed = show("--model.adapter.gate.skip_below", "0.1")
    assert remark in printed
    assert value(printed, "compute") == value(show(), "compute")


def test_gradient_checkpointing_reaches_the_cost_model(show, monkeypatch):
    costs, seen = StepCosts(activations=400, logits=50, peak=700, forward_flops=2, backward_flops=5), []
    monkeypatch.setattr(
        estimate_command, "step_costs", lambda *_, recomputed, **__: seen.append(recomputed) or costs
    )
    show()
    show("--model.backbone.gradient_checkpointing", "true")
    assert seen == [False, True]


def test_unknown_number_of_ranks_is_assumed(show):
    printed = show("--trainer.devices", "auto")
    assert value(printed, "devices") == "1 rank (assumed: trainer.devices is auto)"


@pytest.mark.parametrize("corrupt", [True, False], ids=["corrupt", "missing"])
def test_estimate_reads_no_weights(corrupt, show, tiny_backbone, working_folder):
    folder = working_folder / "light"
    shutil.copytree(tiny_backbone, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    if corrupt:
        (folder / "model.safetensors").write_bytes(b"no weights")
    assert show(backbone=folder).splitlines()[1:] == show().splitlines()[1:]


def test_memory_flag_asks_whether_it_fits(show):
    printed = show()
    peak = memory(printed)["peak"]
    assert f"    peak         {peak:.2f}    (--memory GiB says whether it fits)\n" in printed
    assert f"{peak:.2f}    of {peak}: fits\n" in show("--memory", str(peak))
    assert (
        f"{peak:.2f}    of {peak - 3}: DOES NOT FIT, by 3.0 GiB; most of it is activations: "
        "model.backbone.gradient_checkpointing: true"
    ) in show("--memory", str(peak - 3))


# --- the micro-batch ---


@pytest.mark.parametrize("train_on", ["response", "all"])
@pytest.mark.parametrize(
    "data",
    [{}, {"packing": True, "max_length": 90}, {"group_by_length": False}, {"token_budget": 300}],
    ids=str,
)
def test_micro_batch_is_the_largest_of_the_run(data, train_on, show, tiny_backbone):
    # 14 examples over 2 ranks × 2: micro-batches of four and of three examples.
    given = {"train_on": train_on, "batch_size": 14, **data}
    flags = ["--trainer.devices", "2", "--trainer.accumulate_grad_batches", "2", *settings(**given)]
    printed = show(*flags)
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
        r"(\d+) rows of (\d+) tokens, (\d+) supervised \(the largest of the batch schedule\)",
        value(printed, "micro-batch"),
    )
    assert tuple(map(int, found.groups())) in shapes


def test_micro_batch_is_estimated_without_data(show, reject, caplog):
    away = settings(train=["nobody/nothing"], max_length=200)
    source = "(without data: every row of max_length, half of the tokens supervised)"
    assert value(show(*away), "micro-batch") == f"16 rows of 200 tokens, 1,600 supervised {source}"
    assert "the data cannot be read" in caplog.text
    assert "nobody/nothing" in caplog.text
    ranks = ["--trainer.devices", "2", "--trainer.accumulate_grad_batches", "3"]
    printed = show(*away, *ranks, *settings(train_on="all"))
    assert value(printed, "micro-batch").startswith("3 rows of 200 tokens, 600 supervised (without data: ")
    assert reject(*away, "--trainer.devices", "32")[0].startswith(TOO_FEW_EXAMPLES)


# --- problems ---


@pytest.mark.parametrize("size", ["0", "-1", "nan"])
def test_memory_has_to_be_positive(size, reject):
    assert reject("--memory", size) == [f"--memory: {float(size)}; accepted: GiB of one device, above 0"]


def test_problems_of_fit_are_reported_at_once(reject):
    flags = ["--model.adapter.rank", "0", "--trainer.precision", "16-mixed", *settings(batch_size=0)]
    flags += ["--trainer.strategy", "fsdp", "--throughput.every_n_steps", "-1"]
    assert [problem.partition(":")[0] for problem in reject(*flags)] == [
        *("throughput.every_n_steps", "model.adapter.rank", "data.batch_size"),
        *("trainer.precision", "trainer.strategy"),
    ]


def test_problems_of_the_batch_schedule_are_reported(reject):
    (problem,) = reject("--trainer.devices", "32")
    assert problem.startswith(TOO_FEW_EXAMPLES)
    (problem,) = reject("--trainer.devices", "8", *settings(train=["everyday[:5]"]))
    assert problem.startswith("data.train: 5 examples cannot fill 8 micro-batches")


def test_estimate_counts_the_rank_of_each_module(show, tmp_path):
    config = tmp_path / "targets.yaml"
    config.write_text(
        "model: {adapter: {target_modules: all-linear, exclude_modules: [o_proj], layers: [-1], "
        "rank_pattern: {q_proj: 8, '.*mlp.*': 2}}}"
    )
    printed = show("--config", str(config))
    assert printed.splitlines()[0].endswith(", hira × token, ranks 2, 4, 8")
    # q; k, v; gate, up, down; then a weight and a bias of the gate.
    trainable = 8 * 64 + 2 * 4 * 48 + 3 * 2 * 80 + (5 * 32 + 48) + 6
    assert f" {trainable:,} trainable in float32" in value(printed, "parameters")


def test_flags_name_targets_and_ranks(show):
    flags = ["--model.adapter.target_modules", "all-linear", "--model.adapter.exclude_modules", "[o_proj]"]
    flags += ["--model.adapter.layers=[-1]", "--model.adapter.rank_pattern", '{"q_proj": 8}']
    assert ", ranks 4, 8" in show(*flags)
    assert ", ranks 4, 8" in show("--model.adapter.target_modules+=o_proj", *flags[-2:])


def test_missing_target_modules_are_reported(reject):
    (problem,) = reject("--model.adapter.target_modules", "[nothing]")
    assert "'nothing'" in problem


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"replicate_size": 3}, "trainer.strategy.replicate_size: 3 does not divide the 8 "),
        ({"replicate_size": 2, "shard_size": 2}, "trainer.strategy: replicate_size 2 × shard_size 2 is 4, "),
        ({"replicate_size": 0}, "trainer.strategy.replicate_size: 0; accepted: an integer of at least 1"),
    ],
)
def test_mesh_has_to_fit_the_ranks(sizes, message, reject):
    flags = [
        arg for name, size in sizes.items() for arg in (f"--trainer.strategy.init_args.{name}", str(size))
    ]
    (problem,) = reject(*FSDP, "--trainer.devices", "4", "--trainer.num_nodes", "2", *flags)
    assert problem.startswith(message)


# --- layouts ---


def sharding(module="distributed.sharding", **sizes):
    return {"class_path": f"gatera_lightning.{module}.AdapterShardingStrategy", "init_args": sizes}


@pytest.mark.parametrize(
    ("strategy", "layout"),
    [
        ("auto", Layout(8, 1)),
        ("ddp", Layout(8, 1)),
        ({"class_path": "lightning.pytorch.strategies.DDPStrategy"}, Layout(8, 1)),
        (sharding(), Layout(1, 8)),
        (sharding("parallel"), Layout(1, 8)),  # the module of version 0.1
        (sharding(shard_size=8, cpu_offload=True), Layout(1, 8, offload=True)),
        (sharding(shard_size="auto", replicate_size=2), Layout(2, 4)),
        (sharding(shard_size=2, replicate_size=4), Layout(4, 2)),
    ],
)
def test_layout_of_reads_strategy(strategy, layout):
    assert layout_of(strategy, 8) == layout


def test_layout_of_one_rank_shards_nothing():
    assert layout_of(sharding(), 1) == Layout(1, 1)


def test_layout_of_rejects_sizes_that_do_not_fit():
    with pytest.raises(ConfigError, match=r"^trainer.strategy: replicate_size 2 × shard_size 3 is 6, "):
        layout_of(sharding(shard_size=3, replicate_size=2), 8)


@pytest.mark.parametrize(
    ("largest", "advice"),
    [
        ("weights", "shard them (overlays/fsdp.yaml), over more devices, or with cpu_offload"),
        (
            "activations",
            "model.backbone.gradient_checkpointing: true if it is not, or more "
            "trainer.accumulate_grad_batches",
        ),
        ("logits", "more trainer.accumulate_grad_batches"),
        ("moments", "a smaller model.adapter.rank"),
        ("gradients", "a smaller model.adapter.rank"),
    ],
)
def test_fit_advises_on_largest_part(largest, advice, monkeypatch):
    monkeypatch.setattr(estimate_command, "GIB", 1)
    parts = dict.fromkeys(("weights", "adapter", "gradients", "moments", "activations", "logits"), 1)
    memory = Memory(parts | {largest: 2}, 7)
    expected = f"    of 5.5: DOES NOT FIT, by 1.5 GiB; most of it is {largest}: {advice}"
    assert describe_fit(memory, 5.5) == expected
    assert describe_fit(memory, 7) == "    of 7.0: fits"
