"""``serve --draft``: the answers of ``serve``, and a note for requests that drafts do not support."""

import json
import logging
import re

import pytest
from draft_folders import draft_folder
from gate_reports import save_random_adapter
from terminal_models import talkative_backbone

from gatera_lightning import BackboneConfig
from gatera_lightning.backbone.loading import load_backbone
from gatera_lightning.cli.main import main

pytest.importorskip("fastapi", reason="needs the extra serve: pip install 'gatera-lightning[serve]'")
testclient = pytest.importorskip("starlette.testclient")

CHAT = {"messages": [{"role": "user", "content": "What do bees make?"}], "max_tokens": 20}
COMPLETION = {"prompt": "Tom has 3 boxes.\nHow many", "max_tokens": 20}


@pytest.fixture(scope="module")
def folders(tiny_backbone, tmp_path_factory):
    """A backbone, an adapter with token gates, a draft adapter, and one for another model."""
    root = tmp_path_factory.mktemp("drafts")
    backbone = talkative_backbone(tiny_backbone, root / "backbone")
    save_random_adapter(root / "adapter", backbone)
    for name, source in (("draft", backbone), ("foreign", tiny_backbone)):
        model = load_backbone(BackboneConfig(id=str(source), dtype="float32"), "cpu")
        draft_folder(model, root / name, size=1e-3)
    return root


@pytest.fixture(scope="module")
def client_for(folders):
    """``client_for(*flags)``: a client of the application that ``serve`` runs with these flags."""

    def build(*flags):
        with pytest.MonkeyPatch.context() as patch:
            from gatera_lightning.generation import server

            served = []
            patch.setattr(server, "serve_forever", lambda model, _: served.append(model))
            own = ["--port", "0", "--template", "chat", "--dtype", "float32"]
            assert main(["serve", str(folders / "adapter"), *own, *flags]) == 0
        return testclient.TestClient(server.build_app(served[0]), raise_server_exceptions=False)

    return build


@pytest.fixture(scope="module")
def plain(client_for):
    with client_for() as client:
        yield client


@pytest.fixture(scope="module")
def drafting(client_for, folders):
    with pytest.MonkeyPatch.context() as patch:
        # Measured times never decide, and few passes come before the first drafts.
        patch.setattr("gatera_lightning.generation.drafting.payoff._SAMPLES", 10**9)
        patch.setattr("gatera_lightning.generation.drafting.payoff._PLAIN", 1)
        with client_for("--draft", str(folders / "draft"), "--draft_block", "3") as client:
            yield client


@pytest.fixture
def log_of(caplog):
    """``log_of()``: what this package has logged since the last call."""
    caplog.set_level(logging.INFO, logger="gatera_lightning")

    def read():
        lines = [record.getMessage() for record in caplog.records if record.name.startswith("gatera_")]
        caplog.clear()
        return lines

    return read


def answer(client, body):
    """The status, and what an answer says: texts, how they end, and tokens."""
    found = client.post("/v1/completions" if "prompt" in body else "/v1/chat/completions", json=body)
    if not body.get("stream"):
        content = found.json()
        return found.status_code, content.get("choices"), content.get("usage"), content.get("error")
    chunks = [json.loads(line.removeprefix("data: ")) for line in found.text.splitlines() if line]
    return found.status_code, [[chunk["choices"], chunk.get("usage")] for chunk in chunks]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("body", [CHAT, COMPLETION], ids=["chat", "completion"])
@pytest.mark.parametrize("end", ["limit", "stop", "one_token"])
def test_answer_is_the_one_without_drafts(plain, drafting, log_of, body, stream, end):
    _, choices, whole, _ = answer(plain, body)
    text = choices[0]["text"] if "prompt" in body else choices[0]["message"]["content"]
    # Which text the tiny model writes depends on the processor.
    letter = next(char for char in text if char.isascii() and char.isalpha())
    more = {"limit": {}, "stop": {"stop": letter}, "one_token": {"max_tokens": 1}}[end]
    request = body | more | {"stream": stream}
    assert answer(drafting, request) == (expected := answer(plain, request))
    assert expected[0] == 200
    (line,) = log_of()
    assert line.startswith("so far ")
    assert "tokens a forward pass" in line
    if end == "stop" and not stream:
        assert expected[2]["completion_tokens"] < whole["completion_tokens"]


def test_drafts_are_used(drafting, log_of):
    answer(drafting, COMPLETION)
    assert re.search(r"accepted drafts by depth: \d+%, \d+%$", log_of()[-1])


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"temperature": 1.5, "seed": 3}, "seed"),
        ({"logit_bias": {"70": 5.0}}, "logit_bias"),
    ],
)
def test_what_drafts_do_not_support_is_decoded_without_them(client_for, plain, folders, log_of, more, field):
    request = CHAT | more
    with client_for("--draft", str(folders / "draft")) as client:
        log_of()
        found = [answer(client, request) for _ in range(2)]
    expected = answer(plain, request)
    assert found == [expected, expected]
    assert expected[0] == 200
    assert log_of() == [f"{field}: not supported with drafts; requests with it are decoded without them"]


def test_seed_without_temperature_keeps_drafts(plain, drafting, log_of):
    assert answer(drafting, CHAT | {"seed": 3}) == answer(plain, CHAT | {"seed": 3})
    assert "so far" in log_of()[0]


def test_sampling_takes_drafts(drafting, log_of):
    status, choices, usage, _ = answer(drafting, CHAT | {"temperature": 0.9, "top_p": 0.9})
    assert (status, usage["completion_tokens"], choices[0]["finish_reason"]) == (200, 20, "length")
    assert "so far" in log_of()[0]


@pytest.mark.parametrize("stream", [False, True])
def test_prompt_that_fills_the_context_is_refused(drafting, stream):
    body = COMPLETION | {"prompt": "word " * 3000, "stream": stream}
    found = drafting.post("/v1/completions", json=body)
    assert found.status_code == 400
    assert "accepted by this model: less than" in found.text


def test_end_of_drafts_is_logged_once(client_for, folders, log_of, monkeypatch):
    verdict = "drafts turned off: a forward pass with drafts gave 1.00 tokens"
    with client_for("--draft", str(folders / "draft")) as client:
        log_of()
        monkeypatch.setattr("gatera_lightning.generation.drafting.Drafter.turned_off", [verdict])
        assert [answer(client, CHAT)[0] for _ in range(2)] == [200, 200]
    assert log_of() == [verdict]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--draft_block", "3"], "--draft_block: 3, without drafts; accepted with --draft"),
        (["--draft", "draft", "--draft_block", "1"], "--draft_block: 1; accepted: an integer of at least 2"),
        (["--draft", "adapter"], "update 'hira' with gate 'token' cannot draft; accepted: update 'lora'"),
        (["--draft", "backbone"], "--draft: "),
    ],
)
def test_flags_are_refused_before_weights_load(folders, capsys, monkeypatch, flags, message):
    monkeypatch.setattr("gatera_lightning.cli.commands.serve.load_backbone", None)
    monkeypatch.chdir(folders)
    assert main(["serve", "adapter", "--port", "0", *flags]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_draft_adapter_of_another_model_is_refused(folders, capsys):
    assert main(["serve", str(folders / "adapter"), "--port", "0", "--draft", str(folders / "foreign")]) == 2
    out, error = capsys.readouterr()
    assert "foreign: was trained on another backbone" in " ".join(error.split())
    assert out == ""
