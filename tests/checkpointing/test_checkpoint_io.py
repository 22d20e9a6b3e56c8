"""Checkpoints on disk: damage of any kind is noticed, and no failed or killed write takes the one before away."""

import contextlib
import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import zipfile
from pathlib import Path

import lightning as L
import pytest
import torch
from sharded_checkpoints import write_in_shards
from tiny_backbone import tiny_args, tiny_data, tiny_module, tiny_trainer

from gatera_lightning.callbacks.adapter_checkpoint import AdapterCheckpoint
from gatera_lightning.checkpointing.checkpoint_io import (
    WholeCheckpointIO,
    damage,
    hold,
    keep_previous,
    newest_sound_checkpoint,
    read_sharded,
    replace_folder,
    write_sharded,
)
from gatera_lightning.cli.main import main
from gatera_lightning.errors import CheckpointError

TENSORS = {"model.a": torch.arange(1024.0).reshape(32, 32).sin(), "model.b": torch.arange(64.0).cos()}
CONTENT = {"state_dict": TENSORS, "global_step": 7, "loops": {"seen": [3, 4]}, "name": "a checkpoint"}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("file") / "last.ckpt"
    torch.save(CONTENT, path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_in_shards(CONTENT, tmp_path_factory.mktemp("folder") / "last.ckpt")


@pytest.fixture
def copied(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "last.ckpt"))


def is_content(found):
    same = all(torch.equal(found["state_dict"][name], tensor) for name, tensor in TENSORS.items())
    return same and {**found, "state_dict": None} == {**CONTENT, "state_dict": None}


def flipped(content, position, bit):
    changed = bytearray(content)
    changed[position] ^= 1 << bit
    return bytes(changed)


def tensor_bytes(path):
    """The positions of every byte of a tensor in a file of torch.save."""
    content = path.read_bytes()
    return {
        position
        for tensor in TENSORS.values()
        for start in [content.index(tensor.numpy().tobytes())]
        for position in range(start, start + tensor.nbytes)
    }


def entries(path):
    """Where each entry of the directory at the end of a zip file begins."""
    content, found = path.read_bytes(), []
    while (position := content.find(b"PK\x01\x02", found[-1] + 1 if found else 0)) >= 0:
        found.append(position)
    return found


# --- damage ---


def test_what_was_written_is_sound(file, folder):
    assert damage(file) == ""
    assert damage(folder) == ""
    assert is_content(torch.load(file, weights_only=True))
    assert is_content(read_sharded(folder, weights_only=True))
    assert is_content(WholeCheckpointIO().load_checkpoint(file))
    assert is_content(WholeCheckpointIO().load_checkpoint(folder))


def test_what_is_not_there_is_damaged(tmp_path):
    assert damage(tmp_path / "last.ckpt") == "there is no such file"


def test_a_truncated_file_is_damaged_at_every_length(file, tmp_path):
    content = file.read_bytes()
    path = tmp_path / "short.ckpt"
    size = len(content)
    for length in (0, 1, 2, size // 2, size - 100, size - 22, size - 2, size - 1, *range(3, size, 97)):
        path.write_bytes(content[:length])
        assert damage(path), length
    path.write_bytes(b"")
    assert damage(path) == "it is empty"


def test_a_flipped_bit_of_a_file_is_damage_or_changes_nothing(file, tmp_path):
    """Sound at most where it is padding; every byte of the directory at the end, and every seventh of the others."""
    content, inside = file.read_bytes(), tensor_bytes(file)
    assert len(inside) == 4 * 1088
    path, unnoticed = tmp_path / "flipped.ckpt", 0
    for position in (*range(0, entries(file)[0], 7), *range(entries(file)[0], len(content))):
        path.write_bytes(flipped(content, position, position % 8))
        if not damage(path):
            assert position not in inside
            assert is_content(torch.load(path, weights_only=True)), position
            unnoticed += 1
    assert 0 < unnoticed < len(content) // 10


@pytest.mark.parametrize("number", range(8))
def test_a_record_that_pytorch_would_not_read_is_damage(file, tmp_path, number):
    """With this bit it takes a record for a folder, reads nothing, and gives a tensor of whatever memory holds."""
    assert len(entries(file)) == 8
    path = tmp_path / "flipped.ckpt"
    path.write_bytes(flipped(file.read_bytes(), entries(file)[number] + 38, 4))
    with zipfile.ZipFile(path) as records:
        name = records.namelist()[number]
    assert damage(path) == f"it is damaged (record {name} is not what was written)"


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("torch.distributed.checkpoint.metadata", "os.system"),
        ("torch", "load"),
        ("builtins", "eval"),
    ],
)
def test_metadata_that_would_run_a_program_is_refused(copied, tmp_path, module, name):
    """Its digest fits: whoever forges the one forges the other. Pickle follows dots into what a module imports."""
    forged = (
        b"\x80\x04"
        + b"".join(b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, name))
        + b"\x93"
    )
    command = f"touch {tmp_path / 'ran'}"
    forged += b"\x8c" + bytes([len(command)]) + command.encode() + b"\x85R."  # (command,), call it
    (copied / ".metadata").write_bytes(forged)
    digests = json.loads((copied / "files.json").read_text())
    digests[".metadata"] = hashlib.sha256(forged).hexdigest()
    (copied / "files.json").write_text(json.dumps(digests))
    with pytest.raises(
        CheckpointError,
        match=rf"not to be trusted \(\.metadata: {re.escape(module)}\.{re.escape(name)} has no",
    ):
        WholeCheckpointIO().load_checkpoint(copied, weights_only=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "rest.pt", "files.json"])
def test_a_damaged_file_of_a_sharded_checkpoint(copied, name):
    content = (copied / name).read_bytes()
    size = len(content)
    for length in (0, 1, size // 2, size - 2):
        (copied / name).write_bytes(content[:length])
        assert f"({name}" in damage(copied), length
    for position in range(0, size, max(1, size // 200)):
        (copied / name).write_bytes(flipped(content, position, position % 8))
        found = damage(copied)
        if name != "files.json":
            assert found == f"it is damaged ({name} is not what was written)"
        assert found or is_content(read_sharded(copied, weights_only=True)), position
    (copied / name).unlink()
    assert f"({name}" in damage(copied)
    (copied / name).write_bytes(content)
    assert damage(copied) == ""


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "rest.pt"])
def test_a_list_of_files_that_lacks_one(copied, name):
    digests = json.loads((copied / "files.json").read_text())
    del digests[name]
    (copied / "files.json").write_text(json.dumps(digests))
    assert damage(copied) == f"it is damaged (files.json does not list {name})"


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"rest.pt": 3}', "\udcff"])
def test_a_list_of_files_that_is_none(copied, text):
    (copied / "files.json").write_text(text, errors="surrogateescape")
    assert "files.json" in damage(copied)


def test_loading_what_is_damaged_is_an_error_that_names_it(copied, file, tmp_path):
    path = tmp_path / "flipped.ckpt"
    path.write_bytes(flipped(file.read_bytes(), min(tensor_bytes(file)), 0))
    with pytest.raises(
        CheckpointError, match=r"flipped\.ckpt: it is damaged \(record last/data/0 is not what was written\)"
    ):
        WholeCheckpointIO().load_checkpoint(path)
    (copied / "rest.pt").unlink()
    with pytest.raises(CheckpointError, match=r"last\.ckpt: it is damaged \(rest\.pt is missing\)"):
        WholeCheckpointIO().load_checkpoint(copied)


# --- the newest that is sound ---


def saved(path, step):
    torch.save({"global_step": step, "state_dict": TENSORS}, path)
    return path


def test_the_one_that_has_come_furthest(tmp_path):
    saved(tmp_path / "last-1.ckpt", 8)
    saved(tmp_path / "last.ckpt", 4)
    furthest = saved(tmp_path / "best-step=10.ckpt", 10)
    assert newest_sound_checkpoint(tmp_path) == furthest


@pytest.mark.parametrize("other", ["best-step=6.ckpt", "z.ckpt"])
def test_last_among_equals(tmp_path, other):
    saved(tmp_path / other, 6)
    saved(tmp_path / "last.ckpt", 6)
    assert newest_sound_checkpoint(tmp_path) == tmp_path / "last.ckpt"


def test_files_and_folders_alike(folder, tmp_path):
    saved(tmp_path / "last-1.ckpt", 6)
    shutil.copytree(folder, tmp_path / "last.ckpt")  # of step 7
    assert newest_sound_checkpoint(tmp_path) == tmp_path / "last.ckpt"
    saved(tmp_path / "best-step=9.ckpt", 9)
    assert newest_sound_checkpoint(tmp_path) == tmp_path / "best-step=9.ckpt"


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    path.write_bytes(flipped(path.read_bytes(), min(tensor_bytes(path)), 5))


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (cut, "it is damaged (File is not a zip file)"),
        (flip, "it is damaged (record last/data/0 is not what was written)"),
        (empty, "it is empty"),
        (
            lambda path: torch.save([1, 2], path),
            "it cannot be read (list indices must be integers or slices, not str)",
        ),
        (lambda path: path.write_text("no checkpoint"), "it is damaged (File is not a zip file)"),
    ],
    ids=["cut", "flipped", "empty", "foreign", "text"],
)
def test_a_damaged_newest_is_named_and_the_one_before_taken(tmp_path, caplog, harm, said):
    saved(tmp_path / "best-step=2.ckpt", 2)
    before = saved(tmp_path / "last-1.ckpt", 4)
    harm(saved(tmp_path / "last.ckpt", 6))
    with caplog.at_level("INFO"):
        assert newest_sound_checkpoint(tmp_path) == before
    assert [record.getMessage() for record in caplog.records] == [
        f"skipping the checkpoint {tmp_path / 'last.ckpt'}: {said}",
        f"continuing from {before}, at optimizer step 4",
    ]


def test_a_deleted_newest_is_no_news(tmp_path, caplog):
    before = saved(tmp_path / "last-1.ckpt", 4)
    saved(tmp_path / "last.ckpt", 6).unlink()
    assert newest_sound_checkpoint(tmp_path) == before
    assert "skipping" not in caplog.text


def test_a_damaged_sharded_newest(copied, caplog):
    before = saved(copied.parent / "last-1.ckpt", 6)
    (copied / "__0_0.distcp").unlink()
    assert newest_sound_checkpoint(copied.parent) == before
    assert f"skipping the checkpoint {copied}: it is damaged (__0_0.distcp is missing)" in caplog.text


def test_every_one_damaged_is_an_error_that_names_them(tmp_path):
    empty(tmp_path / "last.ckpt")
    cut(saved(tmp_path / "last-1.ckpt", 4))
    with pytest.raises(CheckpointError, match=r": every checkpoint is damaged: last-1\.ckpt, last\.ckpt$"):
        newest_sound_checkpoint(tmp_path)


def test_what_a_killed_process_left_is_no_checkpoint(tmp_path):
    assert newest_sound_checkpoint(tmp_path) is None
    for name in ("last.ckpt.draft", "last.ckpt.draft-old", "last", "notes.txt"):
        saved(tmp_path / name, 100)
    (tmp_path / "last-1.ckpt.draft").mkdir()
    assert newest_sound_checkpoint(tmp_path) is None
    assert newest_sound_checkpoint(tmp_path / "nowhere") is None
    last = saved(tmp_path / "last.ckpt", 3)
    assert newest_sound_checkpoint(tmp_path) == last


# --- writing ---


def write(root, step, keep, sharded):
    """A checkpoint as AdapterCheckpoint writes it, a sharded one without its shards."""
    path = root / "last.ckpt"
    held = hold(path)
    if not sharded:
        io = WholeCheckpointIO()
        io.save_checkpoint({"global_step": step}, path)
        assert io.failure is None
    else:
        draft = root / "last.ckpt.draft"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        write_sharded({"global_step": step}, draft, rank=0)
        replace_folder(draft, path)
    if held is not None:
        keep_previous(held, path, keep)


def steps(root):
    """The optimizer step of everything in a folder but drafts."""
    found = {}
    for path in root.iterdir():
        if ".draft" in path.name:
            continue
        assert damage(path) == ""
        found[path.name] = torch.load(path / "rest.pt" if path.is_dir() else path, weights_only=True)[
            "global_step"
        ]
    return found


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_the_last_ones_are_kept_by_number(tmp_path, sharded):
    for step in (1, 2, 3, 4):
        write(tmp_path, step, 3, sharded)
    assert steps(tmp_path) == {"last.ckpt": 4, "last-1.ckpt": 3, "last-2.ckpt": 2}


@pytest.mark.parametrize(
    "order", [(False, True), (True, False)], ids=["whole, then sharded", "sharded, then whole"]
)
def test_one_kind_takes_the_place_of_the_other(tmp_path, order):
    for step, sharded in enumerate((order[0], order[0], order[1], order[1], order[1])):
        write(tmp_path, step, 2, sharded)
        assert steps(tmp_path) == ({"last.ckpt": step, "last-1.ckpt": step - 1} if step else {"last.ckpt": 0})
        assert (tmp_path / "last.ckpt").is_dir() == sharded


@pytest.mark.parametrize(("sharded", "keep"), [(False, 1), (False, 2), (False, 3), (True, 2), (True, 3)])
def test_killed_before_any_change_of_a_name_there_is_a_newest(tmp_path, monkeypatch, sharded, keep):
    root = tmp_path / "run"
    root.mkdir()
    for step in (1, 2, 3):
        write(root, step, keep, sharded)
    moments = []

    def watch(change):
        def watched(*args, **kwargs):
            moments.append(
                shutil.copytree(root, tmp_path / f"moment-{len(moments)}")
            )  # what a kill would leave
            return change(*args, **kwargs)

        return watched

    with monkeypatch.context() as patch:
        for name in ("replace", "link", "unlink", "rmdir"):
            patch.setattr(os, name, watch(getattr(os, name)))
        write(root, 4, keep, sharded)
    assert len(moments) >= (1 if keep == 1 else 2 * keep - 1)
    for moment in moments:
        newest = newest_sound_checkpoint(moment)
        step = torch.load(newest / "rest.pt" if sharded else newest, weights_only=True)["global_step"]
        assert step in (3, 4)
        write(moment, 5, keep, sharded)  # a run that goes on is not in the way of what was left
        assert newest_sound_checkpoint(moment) == moment / "last.ckpt"
        assert steps(moment)["last.ckpt"] == 5


def test_of_a_single_sharded_one_the_old_is_held_until_the_new_is_there(tmp_path, monkeypatch):
    """Folders cannot change places at once: between two renames the old one is there only under the name of the held one."""
    for step in (1, 2):
        write(tmp_path, step, 1, sharded=True)

    def killed(draft, path):
        if Path(draft).name == "last.ckpt.draft":
            raise KeyboardInterrupt
        replace(draft, path)

    replace = os.replace
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, 3, 1, sharded=True)
    assert steps(tmp_path) == {"last-held.ckpt": 2}
    assert newest_sound_checkpoint(tmp_path) == tmp_path / "last-held.ckpt"


def test_without_hard_links_files_are_copied(tmp_path, monkeypatch):
    def refused(*args, **kwargs):
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refused)
    for step in (1, 2):
        write(tmp_path, step, 2, sharded=False)
    assert steps(tmp_path) == {"last.ckpt": 2, "last-1.ckpt": 1}


# --- a full disk ---


@contextlib.contextmanager
def disk(folder, kilobytes):
    """A disk of that size at ``folder``; needs root."""
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.which("mount") is None or os.geteuid():
        pytest.skip("only root can mount a disk to fill")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"cannot mount a disk to fill: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextlib.contextmanager
def largest_file(size):
    """No file of this process can be larger, as where a quota ends."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def assert_refused(root, large, reason):
    io, path = WholeCheckpointIO(), root / "last.ckpt"
    io.save_checkpoint(CONTENT, path)
    assert io.failure is None
    before = path.read_bytes()
    with large() as more:
        io.save_checkpoint(CONTENT | {"more": more}, path)
    assert io.failure.startswith(f"cannot write the checkpoint {path} (")
    assert io.failure.endswith("); what stood there before is untouched")
    assert reason in io.failure
    assert path.read_bytes() == before
    assert [found.name for found in root.iterdir()] == ["last.ckpt"]
    io.save_checkpoint({"global_step": 8}, path)
    assert io.failure is None
    assert torch.load(path, weights_only=True) == {"global_step": 8}


def test_a_full_disk_leaves_the_old_checkpoint_as_it_was(tmp_path):
    with disk(tmp_path / "disk", 64) as root:
        assert_refused(root, lambda: contextlib.nullcontext(torch.ones(20_000)), "No space left on device")


def test_a_file_too_large_leaves_the_old_checkpoint_as_it_was(tmp_path):
    @contextlib.contextmanager
    def large():
        with largest_file(20_000):
            yield torch.ones(20_000)

    assert_refused(tmp_path, large, "File too large")


class Quota(L.Callback):
    """From the third step on, no file can be as large as a checkpoint."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 2:
            self.before = (Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt").read_bytes()
            resource.setrlimit(
                resource.RLIMIT_FSIZE, (len(self.before) // 2, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
            )


def test_a_checkpoint_that_cannot_be_written_ends_a_run(tiny_backbone, tmp_path):
    quota = Quota()
    trainer = tiny_trainer(tmp_path, quota, AdapterCheckpoint(monitor=None, every_n_steps=1))
    with (
        largest_file(10_000_000),
        pytest.raises(
            CheckpointError, match=r"cannot write the checkpoint .*/checkpoints/last\.ckpt \(.*File too large"
        ),
    ):
        trainer.fit(tiny_module(tiny_backbone), datamodule=tiny_data(tiny_backbone))
    assert trainer.global_step == 3
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert last.read_bytes() == quota.before
    assert torch.load(last, weights_only=True)["global_step"] == 2
    assert newest_sound_checkpoint(last.parent) == last
    assert not list(last.parent.glob("*.draft*"))


def test_a_full_disk_ends_a_run_with_one_line(tiny_backbone, tmp_path, monkeypatch, capsys):
    """The disk has room for one checkpoint, and for half of the next."""
    monkeypatch.chdir(tmp_path)
    args = [
        "fit",
        "--config",
        "quickstart.yaml",
        *tiny_args(tiny_backbone),
        "--checkpoint.every_n_steps",
        "1",
    ]
    args += ["--trainer.val_check_interval", "1.0"]
    assert main([*args, "--trainer.logger.init_args.version", "roomy", "--trainer.max_steps", "1"]) == 0
    written = sum(
        path.stat().st_size for path in Path("runs/quickstart/roomy/checkpoints").rglob("*") if path.is_file()
    )
    size = Path("runs/quickstart/roomy/checkpoints/last.ckpt").stat().st_size
    capsys.readouterr()
    with disk(tmp_path / "runs/quickstart/full/checkpoints", (written + size // 2) // 1024) as folder:
        assert main([*args, "--trainer.logger.init_args.version", "full"]) == 1
        error = capsys.readouterr().err
        assert "python -m gatera_lightning: cannot write the checkpoint" in error
        assert str(Path("full/checkpoints/last.ckpt")) in error
        assert "No space left on device" in error
        assert "Traceback" not in error
        assert newest_sound_checkpoint(folder) == folder / "last.ckpt"
        assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 1
        assert not list(folder.glob("*.draft*"))
