"""Dialogues in ParlAI's text format for tests."""


def parlai_text(*dialogues):
    """The text of ``(persona, [(partner, reply), …], distractors)`` for each dialogue."""
    lines = []
    for persona, turns, distractors in dialogues:
        texts = [f"your persona: {sentence}" for sentence in persona]
        texts += [f"{partner}\t{reply}\t\t{'|'.join([*distractors, reply])}" for partner, reply in turns]
        lines += [f"{number} {text}" for number, text in enumerate(texts, 1)]
    return "\n".join(lines) + "\n"
