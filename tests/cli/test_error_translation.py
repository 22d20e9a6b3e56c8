"""Exceptions of every layer become one sentence that says what failed and what to do."""

import errno
import os
import runpy

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from safetensors import SafetensorError

from gatera_lightning.cli.error_translation import one_line, translate, without_internals
from gatera_lightning.errors import ConfigError


def os_error(number, *names):
    return OSError(number, os.strerror(number), *names)


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (os_error(errno.ENOSPC, "last.ckpt"), ["'last.ckpt': no space left on device; free some space"]),
        (os_error(errno.EROFS, "runs"), ["'runs': read-only file system; choose a folder"]),
        (os_error(errno.EACCES, "rows.json"), ["'rows.json': permission denied; check the permissions"]),
        (os_error(errno.EMFILE), ["too many open files; raise the limit on open files (ulimit -n)"]),
        (os_error(errno.EDQUOT, "a"), ["quota"]),
        (os_error(errno.ENOENT, "a", None, "b"), ["'a' -> 'b': no such file"]),
        (OSError("cannot find tokenizer.json"), ["cannot find tokenizer.json; check the path"]),
        (MemoryError(), ["out of memory; use a smaller data.init_args.batch_size"]),
        (RuntimeError("CUDA out of memory. Tried to allocate"), ["out of memory: CUDA", "batch_size"]),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), ["out of memory: Default"]),
        (
            RuntimeError("[/x/gloo/pair.cc:534] Connection closed by peer. This is typically caused by"),
            ["lost the connection to another rank (Connection closed by peer); the message of that rank"],
        ),
        (LocalEntryNotFoundError("no such entry"), ["no such entry; check the name, the network"]),
        (ConnectionResetError(104, "reset"), ["network: ", "HF_HUB_OFFLINE=1"]),
        (SafetensorError("header too small"), ["a .safetensors file is damaged: header too small"]),
        (MisconfigurationException("No `val_dataloader`"), ["No `val_dataloader`; change the setting"]),
        (ModuleNotFoundError("No module named 'wandb'", name="wandb"), ["install wandb"]),
        (RecursionError("maximum recursion depth exceeded"), ["nested too deep"]),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), ["is not UTF-8", "convert it"]),
        (KeyError("gold"), ["KeyError: 'gold'; run it again with --traceback"]),
        (AssertionError(), ["AssertionError; run it again"]),
        (ZeroDivisionError("division by zero"), ["ZeroDivisionError: division by zero"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_run_time_fault_is_one_sentence(error, parts):
    found = translate(error, "test")
    assert found.code == 1
    (line,) = found.lines
    assert line.startswith("test failed: ")
    for part in parts:
        assert part in line


def test_activity_is_that_of_the_innermost_layer(tmp_path):
    """A stand-in for a module of this package raises; what called it is not named."""
    (tmp_path / "raising.py").write_text("{}['x']")
    for module, activity in (
        ("gatera_lightning.datamodules.sources.files", "reading the data"),
        ("gatera_lightning.adapters.serialization", "reading or writing an adapter folder"),
        ("gatera_lightning.adapters.gates", "adapting the model"),
        ("gatera_lightning.cli.commands.gates", None),
        ("lightning.pytorch", None),
    ):
        with pytest.raises(KeyError) as caught:
            runpy.run_path(str(tmp_path / "raising.py"), run_name=module)
        (line,) = translate(caught.value, "fit").lines
        assert line.startswith(f"fit failed while {activity}: " if activity else "fit failed: ")


def test_traceback_of_another_process_is_cut():
    text = 'Caught KeyError in a worker.\nOriginal Traceback (most recent call last):\n  File "x"'
    assert (
        one_line(RuntimeError(text + "\nTraceback (most recent call last):\nKeyError: 'gold'"))
        == "KeyError: 'gold'"
    )
    assert len(one_line(ValueError("word " * 1000))) <= 401
    assert one_line(ValueError("two\n  lines.")) == "two lines"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Namespace(a=None, b=Namespace(c=True))", "{a: null, b: {c: true}}"),
        ("NestedArg(key='bias', val='3')", "{bias: '3'}"),
        ("Namespace(class_path='a.B', init_args=Namespace(c='d(e'), f", "{class_path"),
        (
            "got <torch.nn.modules.linear.Linear object at 0x7f3a2b4c5d60>",
            "got torch.nn.modules.linear.Linear",
        ),
        ("<function make at 0x7f3a>, <class 'int'>", "make, int"),
        ("<bound method A.b of <c.D object at 0x7f>>", "A.b"),
        ("a <b> and <|im_end|>, f(x=None)", "a <b> and <|im_end|>, f(x=None)"),
    ],
    ids=range(7),
)
def test_internals_are_written_as_in_a_config(text, expected):
    found = without_internals(text)
    if text.count("(") == text.count(")"):
        assert found == expected
    assert "Namespace" not in found
    (line,) = translate(ValueError(text), "fit").lines
    assert "Namespace(" not in line
    assert " at 0x" not in line
    assert " at 0x" not in translate(ConfigError(text), "fit").lines[1]
