"""Messages for tests of conversations."""


def chat(*texts, system=None):
    """Messages that alternate between user and assistant, after a system message if there is one."""
    messages = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]
    return [{"role": "system", "content": system}, *messages] if system else messages
