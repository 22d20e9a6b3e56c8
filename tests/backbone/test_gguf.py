"""A GGUF file is parsed once until it changes, and the gguf package is restored afterwards."""

import os

import pytest

from gatera_lightning.backbone.gguf import _parse, parse_once

gguf = pytest.importorskip("gguf")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    _parse.cache_clear()
    yield path
    _parse.cache_clear()


def test_parse_once_parses_again_only_if_the_file_changed(file):
    own = gguf.GGUFReader
    with parse_once(keep=True):
        first = gguf.GGUFReader(file)
        assert isinstance(first, own)
        assert first.fields["llama.block_count"].parts[-1].tolist() == [3]
        assert gguf.GGUFReader(file) is first
    with parse_once(keep=True):
        assert gguf.GGUFReader(file) is first
        os.utime(file, ns=(1, 1))
        assert gguf.GGUFReader(file) is not first
    assert gguf.GGUFReader is own


def test_parse_once_frees_the_file_without_keep(file):
    with parse_once(keep=False):
        first = gguf.GGUFReader(file)
        assert gguf.GGUFReader(file) is first
    with parse_once(keep=False):
        assert gguf.GGUFReader(file) is not first


def test_parse_once_maps_tensor_names_once(file):
    own = gguf.get_tensor_name_map
    with parse_once(keep=False):
        first = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)
        assert gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3) is first
        assert gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2) is not first
    assert gguf.get_tensor_name_map is own


def test_parse_once_restores_the_package_after_an_error(file):
    own = gguf.GGUFReader
    with pytest.raises(RuntimeError, match="inside"), parse_once(keep=True):
        raise RuntimeError("inside")
    assert gguf.GGUFReader is own
