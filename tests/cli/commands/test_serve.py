"""``serve``: OpenAI's client streams what ``generate`` prints; bad requests and bad folders are answered."""

import concurrent.futures
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from evaluations import perturbed_module
from gate_reports import save_random_adapter
from terminal_models import escape
from transformers import AutoTokenizer

from gatera_lightning import save_adapter
from gatera_lightning.cli.main import main

openai = pytest.importorskip("openai", reason="needs the extra serve: pip install 'gatera-lightning[serve]'")
pytest.importorskip("fastapi", reason="needs the extra serve: pip install 'gatera-lightning[serve]'")

PROMPTS = [f"{ask} {thing}?" for ask in ("What is", "Who has") for thing in "abcdefghi"]
PROMPTS += ["Tom has 3 boxes.\nHow many\n\nare left", "Say <|eos|> and é 你好"]
TOKENS = 24


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """``start(folder, *flags)``: a server on a free port, and its URL; ended after the tests of this file."""
    programs = []

    def run(folder, *flags):
        program = subprocess.Popen(
            [
                *(sys.executable, "-m", "gatera_lightning", "serve", str(folder), "--port", "0"),
                *("--dtype", "float32", *flags),
            ],
            cwd=tmp_path_factory.mktemp("serve"),
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        programs.append(program)
        line = program.stdout.readline()
        found = re.search(r"http://\S+/v1$", line.strip())
        assert found, line + program.stderr.read()
        return program, found[0]

    yield run
    for program in programs:
        program.kill()
        program.communicate()


@pytest.fixture(scope="module")
def url(start, adapter):
    return start(adapter, "--template", "chat")[1]


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0)


def streamed(client, prompt, tokens=TOKENS):
    """The text of a streamed chat completion, from its pieces."""
    chunks = list(
        client.chat.completions.create(
            model="gatera",
            messages=[{"role": "user", "content": prompt}],
            max_tokens=tokens,
            temperature=0,
            stream=True,
        )
    )
    pieces = [chunk.choices[0].delta.content for chunk in chunks]
    assert sum(piece is not None for piece in pieces) > 1
    return "".join(piece or "" for piece in pieces)


def generated(capsys, adapter, prompt, template, tokens=TOKENS):
    args = ["--adapter", adapter, "--prompt", prompt, "--max_new_tokens", str(tokens), "--dtype", "float32"]
    assert main(["generate", *args, "--template", template]) == 0
    return capsys.readouterr().out.removesuffix("\n")


@pytest.mark.slow
def test_streamed_text_of_20_prompts_equals_generate(client, adapter, capsys):
    assert len(PROMPTS) == 20
    expected = [generated(capsys, adapter, prompt, "chat") for prompt in PROMPTS]
    assert [escape(streamed(client, prompt)) for prompt in PROMPTS] == expected
    assert len(set(expected)) == 20


@pytest.mark.slow
@pytest.mark.parametrize("template", ["plain", "alpaca"])
def test_other_templates_equal_generate(start, adapter, capsys, template):
    program, url = start(adapter, "--template", template)
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    for prompt in PROMPTS[-2:]:
        assert escape(streamed(client, prompt)) == generated(capsys, adapter, prompt, template)
    program.kill()


def test_completion_equals_generate_without_template(client, adapter, capsys):
    found = client.completions.create(model="gatera", prompt=PROMPTS[0], max_tokens=TOKENS, temperature=0)
    assert escape(found.choices[0].text) == generated(capsys, adapter, PROMPTS[0], "none")
    assert found.usage.completion_tokens == TOKENS
    assert found.choices[0].finish_reason == "length"


def test_conversation_equals_its_template(client, reference, talkative):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "Because."},
        {"role": "user", "content": [{"type": "text", "text": "Is it?"}]},
    ]
    found = client.chat.completions.create(model="gatera", messages=messages, max_tokens=TOKENS)
    messages[-1]["content"] = "Is it?"
    tokenizer = AutoTokenizer.from_pretrained(talkative)
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert found.choices[0].message.content == reference.text(prompt, TOKENS)


def test_two_clients_at_once(url, adapter, capsys):
    clients = [openai.OpenAI(base_url=url, api_key="none", max_retries=0) for _ in range(2)]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        found = list(pool.map(streamed, clients * 3, PROMPTS[:6]))
    assert [escape(text) for text in found] == [generated(capsys, adapter, p, "chat") for p in PROMPTS[:6]]


def partial_request(url, path, body):
    """Send a request; return the socket, from which nothing has been read."""
    host, port = re.search(r"http://(.+):(\d+)/v1", url).groups()
    content = json.dumps(body).encode()
    head = f"POST /v1/{path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)  # the server's writes soon wait
    connection.connect((host, int(port)))
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


LONG = {"messages": [{"role": "user", "content": "Why?"}], "max_tokens": 100_000}


@pytest.fixture
def slow_server(start, talkative, tmp_path):
    """A server whose model takes minutes for an answer that uses up its context."""
    backbone = shutil.copytree(talkative, tmp_path / "backbone")
    config = json.loads((backbone / "config.json").read_text()) | {"max_position_embeddings": 1_000_000}
    (backbone / "config.json").write_text(json.dumps(config))
    save_random_adapter(tmp_path / "adapter", backbone)
    program, url = start(tmp_path / "adapter", "--template", "chat")
    yield program, url
    program.kill()


@pytest.mark.slow
@pytest.mark.parametrize("stream", [True, False])
def test_other_endpoints_answer_while_a_slow_client_is_served(slow_server, stream):
    _, url = slow_server
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=20)
    with partial_request(url, "chat/completions", LONG | {"stream": stream}) as slow:
        slow.settimeout(60)
        if stream:
            assert slow.recv(12).startswith(b"HTTP/1.1 200")
        for _ in range(5):
            assert [model.id for model in client.models.list()] == ["gatera"]
            with urllib.request.urlopen(url.removesuffix("/v1") + "/health", timeout=20) as answer:
                assert answer.status == 200
        slow.setblocking(False)
        if not stream:
            with pytest.raises(BlockingIOError):  # it is still being served
                slow.recv(1)


@pytest.mark.slow
@pytest.mark.parametrize("path", ["chat/completions", "completions"])
@pytest.mark.parametrize("stream", [True, False])
def test_generation_ends_when_its_client_has_gone(slow_server, path, stream):
    program, url = slow_server
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)
    body = (LONG if "chat" in path else {"prompt": "Why?", "max_tokens": 100_000}) | {"stream": stream}
    waiting = partial_request(url, path, body)  # served first
    queued = partial_request(url, path, body)
    client.models.list()
    waiting.close()
    queued.close()
    # Either of the two would take minutes.
    assert client.completions.create(model="gatera", prompt="a", max_tokens=2).choices[0].text
    program.terminate()
    _, errors = program.communicate(timeout=30)
    assert "Exception" not in errors, errors


def test_temperature_samples(client):
    def sample(seed):
        messages = [{"role": "user", "content": "Why?"}]
        found = client.chat.completions.create(
            model="gatera", messages=messages, max_tokens=TOKENS, temperature=2, seed=seed
        )
        return found.choices[0].message.content

    assert sample(1) == sample(1) != sample(2)


def test_stop_ends_the_text(client, adapter, capsys):
    text = generated(capsys, adapter, PROMPTS[0], "chat")
    messages = [{"role": "user", "content": PROMPTS[0]}]
    # No part of an escaped character, whose digits go up to f.
    stop = re.search(r"(?<=..)(?<!\\)[g-z ]{2}", text)[0]
    found = client.chat.completions.create(model="gatera", messages=messages, max_tokens=TOKENS, stop=stop)
    answer = escape(found.choices[0].message.content)
    assert text.startswith(answer)
    assert stop in answer
    assert len(answer) < len(text)


def test_only_this_model_is_listed(client):
    assert [model.id for model in client.models.list()] == ["gatera"]


USER = [{"role": "user", "content": "Why?"}]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", b"hello"),
        ("chat/completions", b"[]"),
        ("chat/completions", b""),
        ("chat/completions", {}),
        ("chat/completions", {"messages": []}),
        ("chat/completions", {"messages": "hello"}),
        ("chat/completions", {"messages": ["hello"]}),
        ("chat/completions", {"messages": [{"role": "user"}]}),
        ("chat/completions", {"messages": [{"content": "a"}]}),
        ("chat/completions", {"messages": [{"role": "usr", "content": "a"}]}),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "text"}]}]}),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
        ("chat/completions", {"messages": USER, "model": "gpt-4"}),
        ("chat/completions", {"messages": USER, "model": 3}),
        ("chat/completions", {"messages": USER, "max_tokens": 0}),
        ("chat/completions", {"messages": USER, "max_tokens": "many"}),
        ("chat/completions", {"messages": USER, "temperature": -1}),
        ("chat/completions", {"messages": USER, "temperature": "hot", "stream": True}),
        ("chat/completions", {"messages": USER, "top_p": 2}),
        ("chat/completions", {"messages": USER, "seed": 1.5}),
        ("chat/completions", {"messages": USER, "n": 2}),
        ("chat/completions", {"messages": USER, "logprobs": True}),
        ("chat/completions", {"messages": USER, "stop": 3}),
        ("chat/completions", {"messages": USER, "stop": []}),
        ("chat/completions", {"messages": USER, "stream": "yes"}),
        ("chat/completions", {"messages": USER, "tools": "x"}),
        ("chat/completions", {"messages": USER, "logit_bias": 3}),
        ("chat/completions", {"messages": USER, "chat_template_kwargs": 3}),
        ("chat/completions", {"messages": USER, "generation_config": "{"}),
        ("chat/completions", {"messages": USER, "max_tokenz": 3}),
        ("chat/completions", {"messages": [{"role": "user", "content": "word " * 3000}]}),
        ("chat/completions", {"messages": [{"role": "user", "content": "word " * 3000}], "stream": True}),
        ("completions", {}),
        ("completions", {"prompt": ["a", "b"]}),
        ("completions", {"prompt": ""}),
        ("completions", {"prompt": "a", "model": "other"}),
        ("completions", {"prompt": "a", "max_tokens": -1}),
        ("completions", {"prompt": "a", "echo": True}),
        ("responses", {"input": "a"}),
        ("audio/transcriptions", {}),
        ("../load_model", {"model": "other"}),
        ("../reset", {}),
    ],
)
def test_bad_request_is_answered(client, url, path, body):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(
        f"{url}/{path}", data=content, headers={"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request, timeout=60)
    answer = error.value.read().decode()
    print(error.value.code, answer)
    assert 400 <= error.value.code < 500, answer
    assert json.loads(answer)
    assert client.models.list()  # it still answers


# --- the process ---


def test_other_machines_cannot_reach_it_by_default(url):
    port = int(re.search(r":(\d+)/", url)[1])
    assert url.startswith("http://127.0.0.1:")
    listening = [
        line.split()[1]
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
        if line.split()[3] == "0A" and int(line.split()[1].split(":")[1], 16) == port
    ]
    assert listening == [f"0100007F:{port:04X}"]


def test_port_in_use_is_refused_before_the_model_loads(adapter, capsys, monkeypatch):
    monkeypatch.setattr("gatera_lightning.cli.commands.serve.load_backbone", None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["serve", adapter, "--port", port]) == 2
    error = capsys.readouterr().err
    assert "--port" in error
    assert port in error
    assert "in use" in error
    assert error.count("\n") == 2


@pytest.mark.slow
@pytest.mark.parametrize("during", ["waiting", "streaming"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_it_with_one_line(start, adapter, number, during):
    program, url = start(adapter, "--template", "chat")
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    client.models.list()
    if during == "streaming":
        messages = [{"role": "user", "content": "Why?"}]
        stream = client.chat.completions.create(model="gatera", messages=messages, stream=True)
        next(iter(stream))
    program.send_signal(number)
    begun = time.monotonic()
    _, errors = program.communicate(timeout=30)
    seconds = time.monotonic() - begun
    print(f"{number.name} while {during}: exit {program.returncode}, {seconds:.1f} s later")
    assert program.returncode == 128 + number
    own = [line for line in errors.splitlines() if line.startswith("python -m gatera_lightning: ")]
    assert own == errors.splitlines()[-1:], errors  # libraries may have warned before
    assert number.name in own[0]
    assert "Traceback" not in errors


def bad_folder(kind, adapter, folder, tiny_backbone):
    """A copy of the adapter folder with one fault."""
    if kind == "missing":
        return folder
    shutil.copytree(adapter, folder)
    weights, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    if kind == "half written":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "no weights":
        weights.unlink()
    elif kind == "no settings":
        settings.unlink()
    elif kind == "another base model":
        record = json.loads(settings.read_text())
        shutil.rmtree(folder)
        save_adapter(
            perturbed_module(tiny_backbone).model, folder, backbone=record["base_model_name_or_path"]
        )
    return folder


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("missing", "adapter"),
        ("half written", "adapter_model.safetensors"),
        ("no weights", "adapter_model.safetensors"),
        ("no settings", "adapter_config.json"),
        ("another base model", "another backbone"),
    ],
)
def test_bad_folder_is_one_error(adapter, tiny_backbone, tmp_path, capsys, kind, named):
    folder = bad_folder(kind, adapter, tmp_path / "adapter", tiny_backbone)
    assert main(["serve", str(folder), "--port", "0", "--template", "plain"]) == 2
    out, error = capsys.readouterr()
    assert named in error
    assert error.count("\n") == 1, error
    assert "serving" not in out


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--port", "70000"), "--port"),
        (("--port", "x"), "--port"),
        (("--host", "no.such.host.invalid"), "--host"),
        (("--host", "192.0.2.1"), "--port"),
        (("--name", ""), "--name"),
        (("--dtype", "flaot32"), "--dtype"),
        (("--tempalte", "chat"), "--tempalte"),
    ],
)
def test_bad_flag_is_one_error(adapter, capsys, monkeypatch, flags, named):
    monkeypatch.setattr("gatera_lightning.cli.commands.serve.load_backbone", None)
    assert main(["serve", adapter, *flags]) == 2
    assert named in capsys.readouterr().err


def test_missing_extra_is_named(adapter, capsys, monkeypatch):
    find = __import__("importlib.util").util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *args: None if name == "fastapi" else find(name, *args)
    )
    assert main(["serve", adapter]) == 2
    assert "pip install 'gatera-lightning[serve]'" in capsys.readouterr().err
