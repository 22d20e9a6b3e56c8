"""A GGUF file is parsed once, anew when it has changed, and the gguf package is as before afterwards."""

import os

import pytest

from gatera_lightning.backbone.gguf import _parsed, read_once

gguf = pytest.importorskip("gguf")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    _parsed.cache_clear()
    yield path
    _parsed.cache_clear()


def test_a_file_is_parsed_once_until_it_changes(file):
    own = gguf.GGUFReader
    with read_once(keep=True):
        first = gguf.GGUFReader(file)
        assert isinstance(first, own)
        assert first.fields["llama.block_count"].parts[-1].tolist() == [3]
        assert gguf.GGUFReader(file) is first
    with read_once(keep=True):
        assert gguf.GGUFReader(file) is first
        os.utime(file, ns=(1, 1))
        assert gguf.GGUFReader(file) is not first
    assert gguf.GGUFReader is own


def test_nothing_is_kept_when_no_more_will_be_asked(file):
    with read_once(keep=False):
        first = gguf.GGUFReader(file)
        assert gguf.GGUFReader(file) is first
    with read_once(keep=False):
        assert gguf.GGUFReader(file) is not first


def test_names_of_tensors_are_mapped_once(file):
    own = gguf.get_tensor_name_map
    with read_once(keep=False):
        first = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)
        assert gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3) is first
        assert gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2) is not first
    assert gguf.get_tensor_name_map is own


def test_the_package_is_as_before_after_an_error(file):
    own = gguf.GGUFReader
    with pytest.raises(RuntimeError, match="inside"), read_once(keep=True):
        raise RuntimeError("inside")
    assert gguf.GGUFReader is own
