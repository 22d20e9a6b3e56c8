"""Chat templates: rendered messages, and what is found out about a template."""

import re

import pytest
from transformers import AutoTokenizer

from gatera_lightning.datamodules.prompts.chat_template import (
    answer_suffix,
    end_of_turn,
    render_chat,
    render_response,
    supports_system_message,
)
from gatera_lightning.datamodules.tokenization.control_tokens import unescape

WHERE = [{"role": "user", "content": "Where?"}]


def test_render_chat_opens_the_turn_of_the_assistant(chat_tokenizers):
    expected = "<bos><start_of_turn>user\nWhere?<end_of_turn>\n<start_of_turn>model\n"
    assert render_chat(chat_tokenizers["gemma"], WHERE) == (expected, "")


def test_render_chat_keeps_the_order_of_messages(chat_tokenizers):
    messages = [*WHERE, {"role": "assistant", "content": "Here."}, {"role": "user", "content": "Why?"}]
    expected = "<bos>[INST] Where? [/INST] Here. <eos><bos>[INST] Why? [/INST]"
    assert render_chat(chat_tokenizers["llama2"], messages) == (expected, " ")


def test_separator_is_found_if_messages_contain_the_placeholder(chat_tokenizers):
    said = [{"role": role, "content": "the answer"} for role in ("user", "assistant")]
    assert render_chat(chat_tokenizers["llama2"], [*said, *WHERE])[1] == " "
    assert render_chat(chat_tokenizers["gemma"], [*said, *WHERE])[1] == ""


def test_render_chat_reports_rejected_messages(with_chat_template):
    tokenizer = with_chat_template("{{ raise_exception('roles must alternate') }}")
    message = r"^the tokenizer's chat template rejects these messages: roles must alternate$"
    with pytest.raises(ValueError, match=message):
        render_chat(tokenizer, WHERE)


@pytest.mark.parametrize("kind", [None, "bos"])
def test_render_chat_needs_a_chat_template(kind, tokenizers_by_kind):
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        render_chat(kind and tokenizers_by_kind[kind], WHERE)


def test_supports_system_message(chat_tokenizers, tokenizer_without_system_message):
    assert all(supports_system_message(tokenizer) for tokenizer in chat_tokenizers.values())
    assert not supports_system_message(tokenizer_without_system_message)


@pytest.mark.parametrize(
    ("kind", "token", "suffix"),
    [
        ("gemma", "<end_of_turn>", "<end_of_turn>"),
        ("llama3", "<eot>", "<eot>"),
        ("turn_ends_in_eos", "<eos>", ""),
        ("turns_without_names", "<eos>", ""),
        ("llama2", "<eos>", ""),
        ("turn_ends_in_text", "", ""),
    ],
)
def test_end_of_turn_and_answer_suffix(kind, token, suffix, chat_tokenizers):
    assert end_of_turn(chat_tokenizers[kind]) == token
    assert answer_suffix(chat_tokenizers[kind]) == suffix


def test_answer_suffix_of_extra_special_token(chat_tokenizers, tmp_path):
    """SmolLM2, Qwen and Gemma 2 list their end-of-turn token among the extra special tokens."""
    chat_tokenizers["gemma"].save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, extra_special_tokens=["<end_of_turn>"])
    assert "<end_of_turn>" in tokenizer.all_special_tokens
    assert answer_suffix(tokenizer) == "<end_of_turn>"


# --- what a template writes, compared with the messages ---

HEADERS = "{% for m in messages %}<im_start>{{ m.role }}\n{{ m.content }}<eos>\n{% endfor %}"
CHANNEL = (
    "{% for m in messages %}<im_start>{{ m.role }}{% if m.role == 'assistant' %}|final{% endif %}|"
    "{{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}<im_start>assistant{% endif %}"
)
NAMED = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
PARTS = (
    "{% for m in messages %}<im_start>{{ m.role }}\n{% for p in m['content'] %}"
    "{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<im_start>assistant\n{% endif %}"
)
ONLY_LISTS = (
    "{% for m in messages %}[{% if m['content'] is string %}{{ raise_exception('no') }}{% endif %}"
    "{{ m['content'][0]['text'] }}]{% endfor %}"
)
ENDS = HEADERS.replace("{% endfor %}", "{% if loop.last %}<bos>{% endif %}{% endfor %}")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (HEADERS, ("<im_start>user\nWhere?<eos>\n<im_start>assistant\n", "")),
        (CHANNEL, ("<im_start>user|Where?<eos><im_start>assistant|final|", "")),
        (NAMED, ("user: Where?\nassistant:", " ")),  # the space is a part of the answer's first token
        (PARTS, ("<im_start>user\nWhere?<eos>\n<im_start>assistant\n", "")),
        (ONLY_LISTS, ("[Where?][", "")),
        (ENDS, ("<im_start>user\nWhere?<eos>\n<im_start>assistant\n", "")),
    ],
    ids=["no generation prompt", "incomplete one", "in words", "parts", "lists only", "another end"],
)
def test_opening_of_the_assistant_is_found(template, expected, with_chat_template):
    assert render_chat(with_chat_template(template, "turn_ends_in_eos"), WHERE) == expected


TALK = [
    {"role": "user", "content": "Where?"},
    {"role": "assistant", "content": "Here."},
    {"role": "user", "content": "Why?"},
]
NOT_ONCE = {
    "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}|{% endif %}{% endfor %}": (
        r"does not write the text of message 2 \(assistant\) of 3"
    ),
    "{% for m in messages %}{{ m.content }}|{{ m.content }}{% endfor %}": (
        r"writes 2 times the text of message 1 \(user\) of 3"
    ),
    "{{ messages[-1].content }}": r"does not write the text of message 1 \(user\) of 3",
    "{% for m in messages | reverse %}{{ m.content }}|{% endfor %}": "writes messages in another order",
    "{% for m in messages %}{{ m.content[:9] }}|{% endfor %}": "does not write the text of message 1",
    "hello": r"does not write the text of message 1 \(user\) of 3",
    "{% for m in messages %}{{ m.content | replace('?', '.') }}|{% endfor %}": (
        r"changes the text of message 1 \(user\), 'Where\?'; accepted: a template that writes texts as"
    ),
    "{% for m in messages %}{{ m.content | upper }}|{% endfor %}": "does not write the text of message 1",
    "{% for m in messages %}{% if add_generation_prompt %}{{ m.content }}|{% endif %}{% endfor %}": None,
}


@pytest.mark.parametrize("template", NOT_ONCE)
def test_every_message_must_stand_in_the_rendering_once_in_order(template, with_chat_template):
    tokenizer, error = with_chat_template(template), NOT_ONCE[template]
    if error is None:  # what is rendered without a generation prompt is no prompt
        assert render_chat(tokenizer, TALK).text == "Where?|Here.|Why?|"
        return
    with pytest.raises(ValueError, match=f"^the tokenizer's chat template {error}"):
        render_chat(tokenizer, TALK)


def test_system_message_may_stand_in_the_last_turn(with_chat_template):
    """As in templates of Mistral."""
    tokenizer = with_chat_template(
        "{% for m in messages if m.role != 'system' %}{% if loop.last and m.role == 'user' %}"
        "{{ messages[0].content }}\n{% endif %}{{ m.content }}|{% endfor %}"
    )
    messages = [{"role": "system", "content": "Be kind."}, *TALK]
    assert render_chat(tokenizer, messages).text == "Where?|Here.|Be kind.\nWhy?|"


def test_texts_that_repeat_each_other_are_found(chat_tokenizers):
    messages = [{"role": role, "content": "user"} for role in ("user", "assistant", "user")]
    assert render_chat(chat_tokenizers["gemma"], messages).text.count("user") == 5


# --- thoughts ---

OPENS = (
    "{% for m in messages %}<im_start>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{{ m.content.split('</think>')[-1].lstrip() }}{% else %}{{ m.content }}{% endif %}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<im_start>assistant\nGENERATION{% endif %}"
)
OPENS_THINK = OPENS.replace("GENERATION", "<think>\n")
WRITES = (  # as in Qwen 3
    "{% for m in messages %}<im_start>{{ m.role }}\n{% if m.reasoning_content is defined %}<think>\n"
    "{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<im_start>assistant\n{% endif %}"
)
THINK = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nHere."}
REASON = {"role": "assistant", "content": "Here.", "reasoning_content": "Hm."}
PLAIN = {"role": "assistant", "content": "Here."}


@pytest.mark.parametrize("response", [THINK, REASON, PLAIN], ids=["content", "reasoning_content", "none"])
@pytest.mark.parametrize("generation", ["<think>\n", "<think>", " <think>\n\n"])
def test_thought_that_the_prompt_opens_is_closed_once(generation, response, with_chat_template):
    tokenizer = with_chat_template(OPENS.replace("GENERATION", generation), "turn_ends_in_eos")
    prompt, answer = render_response(tokenizer, WHERE, response)
    assert prompt == f"<im_start>user\nWhere?<eos>\n<im_start>assistant\n{generation}"
    text = prompt + answer
    assert text.count("<think>") == text.count("</think>") == 1
    thought = "" if response is PLAIN else "Hm."
    assert re.fullmatch(rf"<think>\s*{thought}\n</think>\n\nHere\.", text[text.index("<think>") :])


def test_thought_that_the_template_writes(with_chat_template):
    tokenizer = with_chat_template(WRITES, "turn_ends_in_eos")
    learned = [render_response(tokenizer, WHERE, response)[1] for response in (THINK, REASON, PLAIN)]
    assert learned == [THINK["content"], THINK["content"], "Here."]


def test_answer_may_do_without_the_empty_thought_of_a_template(with_chat_template):
    """As in Qwen 3: neither its generation prompt nor its users' answers have a thought."""
    tokenizer = with_chat_template(
        "{% for m in messages %}<im_start>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n\n</think>\n\n"
        "{% endif %}{{ m.content }}<eos>\n{% endfor %}"
        "{% if add_generation_prompt %}<im_start>assistant\n{% endif %}"
    )
    assert render_response(tokenizer, WHERE, PLAIN)[1] == "Here."


@pytest.mark.parametrize(
    ("template", "response", "error"),
    [
        (
            OPENS_THINK,
            PLAIN | {"content": "<think>Hm. Here."},
            "opens a thought with <think> that it does not close",
        ),
        (
            OPENS_THINK,
            PLAIN | {"content": "<think>a<think>b</think>"},
            "opens a thought with <think> that it",
        ),
        (
            WRITES,
            THINK | {"reasoning_content": "Hm."},
            "has reasoning_content and also <think> in its content",
        ),
        *(
            (
                OPENS.replace("GENERATION", opener),
                PLAIN,
                f"opens a response with '{re.escape(opener)}', which",
            )
            for opener in ("<reasoning>", "[THINK]", "<|begin_of_thought|>", "Sure!")
        ),
        (HEADERS, REASON, "does not write reasoning_content; accepted: messages without it"),
        (
            OPENS.replace("GENERATION", "<think>\n\n</think>\n\n"),
            THINK,
            "the response has a thought, but the tokenizer's chat template closes the thought before it",
        ),
    ],
)
def test_other_thoughts_are_rejected(template, response, error, with_chat_template):
    with pytest.raises(ValueError, match=error):
        render_response(with_chat_template(template, "turn_ends_in_eos"), WHERE, response)


# --- tools ---

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALLS = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo<eos>"}}}]
WITH_TOOLS = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}<im_start>{{ m.role }}\n"
    "{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}"
    "<eos>\n{% endfor %}{% if add_generation_prompt %}<im_start>assistant\n{% endif %}"
)


def test_tools_and_their_calls_are_written_by_the_template(with_chat_template):
    tokenizer = with_chat_template(WITH_TOOLS, "turn_ends_in_eos")
    call = {"role": "assistant", "content": "Look:", "tool_calls": CALLS}
    written = '<call>{"name": "weather", "arguments": {"city": "Oslo<eos>"}}</call>'
    prompt, answer = render_response(tokenizer, WHERE, call, [TOOL])
    assert '"name": "weather"' in prompt
    assert unescape(answer) == f"Look:{written}"
    assert "<eos>" not in answer  # a control token in the arguments is escaped
    history = [*WHERE, call, {"role": "tool", "content": "21 C"}]
    text = unescape(render_chat(tokenizer, history, [TOOL]).text)
    assert text.endswith(f"Look:{written}<eos>\n<im_start>tool\n21 C<eos>\n<im_start>assistant\n")


TEXT_ARGUMENTS = (  # as in DeepSeek's template
    "{% for m in messages %}<im_start>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name + ':' + c.function.arguments }}{% endfor %}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<im_start>assistant\n{% endif %}"
)


def test_template_may_want_arguments_as_text(with_chat_template):
    tokenizer = with_chat_template(TEXT_ARGUMENTS, "turn_ends_in_eos")
    calls = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Tromsø"}}}]
    call = {"role": "assistant", "content": "", "tool_calls": calls}
    assert render_response(tokenizer, WHERE, call)[1] == 'weather:{"city": "Tromsø"}'


@pytest.mark.parametrize(
    ("template", "history", "response", "tools", "error"),
    [
        (HEADERS, WHERE, PLAIN, [TOOL], "does not write tools; accepted: rows without tools"),
        (
            HEADERS,
            WHERE,
            PLAIN | {"tool_calls": CALLS},
            [],
            "does not write the tool_calls of message 2",
        ),
        (
            HEADERS,
            [*WHERE, PLAIN | {"tool_calls": CALLS}, {"role": "tool", "content": "21 C"}],
            PLAIN,
            [],
            "does not write the tool_calls of message 2",
        ),
        (
            "{% for m in messages if m.role != 'tool' %}{{ m.content }}|{% endfor %}",
            [*WHERE, PLAIN, {"role": "tool", "content": "21 C"}],
            PLAIN,
            [],
            r"does not write the text of message 3 \(tool\) of 3",
        ),
    ],
)
def test_tools_that_a_template_ignores_are_rejected(
    template, history, response, tools, error, with_chat_template
):
    with pytest.raises(ValueError, match=f"the tokenizer's chat template {error}"):
        render_response(with_chat_template(template, "turn_ends_in_eos"), history, response, tools)


CALLED = [
    {"role": "user", "content": "What is the weather function?"},
    {"role": "assistant", "content": "", "tool_calls": CALLS * 2},
    {"role": "tool", "content": "21 C weather Oslo"},
    {"role": "tool", "content": "21 C weather Oslo"},
]
MESSAGE = "{% for m in messages %}<im_start>{{ m.role }}\n{{ m.content }}"
END = "<eos>\n{% endfor %}{% if add_generation_prompt %}<im_start>assistant\n{% endif %}"


@pytest.mark.parametrize(
    ("calls", "error"),
    [
        ("", "does not write the tool_calls of message 2"),
        ("{{ (m.tool_calls or [{}])[0] | tojson }}", "does not write the tool_calls of message 2"),
        (
            "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}",
            "does not write the tool_calls",
        ),
        (
            "{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}",
            "does not write the tool_calls of message 2",
        ),
        (
            "{% for c in m.tool_calls or [] %}{{ c.function.arguments.keys() }}{% endfor %}",
            "does not write the",
        ),
        ("{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}", None),
    ],
    ids=["none", "first call", "names", "arguments", "keys", "all"],
)
@pytest.mark.parametrize("history", [CALLED, CALLED[:3]], ids=["two results", "one result"])
def test_calls_whose_names_stand_elsewhere_must_be_written_too(calls, error, history, with_chat_template):
    tokenizer = with_chat_template(MESSAGE + calls + END, "turn_ends_in_eos")
    if error is None:
        assert render_chat(tokenizer, history).text.count("Oslo") == len(history)
        return
    with pytest.raises(ValueError, match=error):
        render_chat(tokenizer, history)


@pytest.mark.parametrize(
    ("tools", "is_written"),
    [
        ("{{ tools | tojson }}", True),
        ("{{ tools[0] | tojson }}", False),
        ("{% for t in tools or [] %}{{ t.function.name }}{% endfor %}", False),
        ("{% for t in tools or [] %}{{ t.function.description }}{% endfor %}", False),
        ("", False),
    ],
)
def test_whole_tools_must_be_written(tools, is_written, with_chat_template):
    tokenizer = with_chat_template("{% if tools %}" + tools + "{% endif %}" + MESSAGE + END)
    question = [{"role": "user", "content": "weather"}]
    if is_written:
        assert "object" in render_chat(tokenizer, question, [TOOL]).text
        return
    with pytest.raises(ValueError, match="does not write tools"):
        render_chat(tokenizer, question, [TOOL])


def test_roles_of_conversations_with_tools_are_checked(with_chat_template):
    calls = "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
    tokenizer = with_chat_template(f"{{{{ messages[0].content }}}}{MESSAGE}{calls}{END}")
    with pytest.raises(ValueError, match=r"writes 2 times the text of message 1 \(user\) of 4"):
        render_chat(tokenizer, CALLED)


def test_names_of_messages_must_be_written(with_chat_template):
    named = [WHERE[0] | {"name": "Ada"}]
    with pytest.raises(ValueError, match="does not write the name of message 1; accepted: messages without"):
        render_chat(with_chat_template(MESSAGE + END), named)
    tokenizer = with_chat_template(MESSAGE.replace("m.role", "m.name") + END)
    assert render_chat(tokenizer, named).text.startswith("<im_start>Ada\nWhere?")


DROPS = OPENS.replace("GENERATION", "")  # what stands before </think> in earlier messages


@pytest.mark.parametrize(
    ("content", "is_dropped"),
    [
        ("<think>\nHm.\n</think>\n\nHere.", True),
        ("Hm.\n</think>\n\nHere.", None),
        ("One writes <think> and </think>.", None),
        ("<think>a</think> then </think> b", None),
        ("Here.", False),
    ],
)
def test_only_thoughts_of_earlier_messages_may_be_dropped(content, is_dropped, with_chat_template):
    tokenizer = with_chat_template(DROPS, "turn_ends_in_eos")
    history = [*WHERE, {"role": "assistant", "content": content}, *WHERE]
    if is_dropped is None:
        with pytest.raises(ValueError, match=r"changes the text of message 2 \(assistant\)"):
            render_chat(tokenizer, history)
    else:
        assert ("Hm." not in render_chat(tokenizer, history).text) is (is_dropped or content == "Here.")


def test_dropped_reasoning_is_reported_once(with_chat_template, caplog):
    tokenizer = with_chat_template(DROPS, "turn_ends_in_eos")
    for _ in range(2):
        render_chat(tokenizer, [*WHERE, REASON, *WHERE])
    assert (
        caplog.text.count("leaves out the reasoning_content of earlier messages, such as message 2 of 3") == 1
    )


def test_response_may_continue_the_thought_of_the_prompt(with_chat_template):
    """As in the data of DeepSeek R1, whose prompt opens the thought."""
    content = "Hm.\n</think>\n\nHere."
    response = {"role": "assistant", "content": content}
    tokenizer = with_chat_template(OPENS_THINK, "turn_ends_in_eos")
    assert render_response(tokenizer, WHERE, response)[1] == content
    text = render_chat(tokenizer, [*WHERE, response, *WHERE]).text
    assert "Hm." not in text
    for template in (HEADERS, DROPS):
        with pytest.raises(ValueError, match="ends a thought with </think> that neither it nor the chat"):
            render_response(with_chat_template(template, "turn_ends_in_eos"), WHERE, response)


TRIMS = (
    "{% for m in messages %}<im_start>{{ m.role }}\n{% if m.reasoning_content is defined %}<think>\n"
    "{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content | trim }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<im_start>assistant\n{% endif %}"
)


@pytest.mark.parametrize("content", ["Here.", "  Here.\n", "\n\tHere.  ", "Here. Here.\n\n"])
@pytest.mark.parametrize("reasoning", [None, "Here."])
@pytest.mark.parametrize("calls", [None, CALLS])
def test_response_with_thought_or_calls_keeps_its_white_space(content, reasoning, calls, with_chat_template):
    response = {"role": "assistant", "content": content}
    response |= {"reasoning_content": reasoning} if reasoning else {}
    response |= {"tool_calls": calls} if calls else {}
    written = unescape(render_response(with_chat_template(TRIMS, "turn_ends_in_eos"), WHERE, response)[1])
    thought = f"<think>\n{reasoning}\n</think>\n\n" if reasoning else ""
    call = '<call>{"name": "weather", "arguments": {"city": "Oslo<eos>"}}</call>' if calls else ""
    assert written == f"{thought}{content}{call}"


def test_assistant_may_speak_first_without_the_empty_thought_of_the_template(with_chat_template):
    """As in Qwen 3, whose template refuses to render no messages at all."""
    tokenizer = with_chat_template(
        "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
        "{% for m in messages %}<im_start>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n\n</think>\n\n"
        "{% endif %}{{ m.content }}<eos>\n{% endfor %}"
        "{% if add_generation_prompt %}<im_start>assistant\n{% endif %}"
    )
    assert render_chat(tokenizer, []) == ("<im_start>assistant\n", "")
