"""Tokenizers with other chat templates."""

import pytest

_EOS_AFTER_EVERY_MESSAGE = (
    "{% for m in messages %}{% if m.role == 'system' %}SYSTEM"
    "{% else %}{{ m.content }}<eos>{% endif %}{% endfor %}"
)


@pytest.fixture(params=["ignored", "rejected"])
def tokenizer_without_system_message(request, with_chat_template):
    """A tokenizer whose chat template ignores or rejects system messages, and ends the others in EOS."""
    system = "{{ raise_exception('no system') }}" if request.param == "rejected" else ""
    return with_chat_template(_EOS_AFTER_EVERY_MESSAGE.replace("SYSTEM", system))
