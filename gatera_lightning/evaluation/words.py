"""The words of a text in any script, for metrics whose own rules know only ASCII."""

import re
import string
import unicodedata

_ARTICLES = {"a", "an", "the"}

# Scripts that do not separate words by spaces: Thai, Lao, Myanmar, Khmer, Tai Le, New Tai Lue, Lanna,
# Balinese, Javanese, Tai Viet, Kana, Bopomofo, Yi and Han, with their extensions. Hangul, Tibetan and
# Ethiopic separate words or syllables.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\u1b00-\u1b7f\u2e80-\u2fdf\u3005-\u3007"
    "\u3021-\u3029\u3031-\u303c\u3040-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\ua000-\ua4cf"
    "\ua9e0-\ua9ff\ua980-\ua9df\uaa60-\uaadf\uf900-\ufaff\uff66-\uff9f"
    "\U00016fe0-\U00018dff\U0001aff0-\U0001b2ff\U0001f200-\U0001f2ff\U00020000-\U0003ffff]"
)
# Punctuation of Latin texts beyond ASCII, such as dashes, curly quotes and guillemets.
_LATIN_PUNCTUATION = re.compile("[\u0080-\u00ff\u2000-\u206f\u2e00-\u2e7f]")
# Characters that separate words without being white space: of Tibetan, of Ethiopic, and of no width.
_SEPARATORS = str.maketrans(dict.fromkeys("\u0f0b\u0f0c\u1361\u200b", " "))


def words(text: str) -> list[str]:
    """Split a text into lower-case words: runs of letters, digits and combining marks, as Unicode has them.

    For ASCII texts these are the words of the package rouge-score. In scripts without spaces between words,
    such as Chinese, Japanese and Thai, every character is a word, with its combining marks. Everything else
    separates words, punctuation and emoji included, so a text of these alone has no words.

    >>> words("It's Привет, мир: 你好!")
    ['it', 's', 'привет', 'мир', '你', '好']
    """
    found: list[str] = []
    word = ""
    for character in spaced(unicodedata.normalize("NFC", text.lower())) + " ":
        category = unicodedata.category(character)
        if category == "Cf":  # joiners and soft hyphens within a word
            continue
        if category[0] in "LN" or (category[0] == "M" and word):
            word += character
        elif word:
            found.append(word)
            word = ""
    return found


def normalized_tokens(text: str) -> list[str]:
    """Split a text into lower-case words without punctuation and articles, as ParlAI's ``normalize_answer``.

    ParlAI's rule holds for Latin texts: ASCII punctuation and white space separate words. Beyond it, the
    punctuation of other scripts separates words too, and characters of scripts without spaces are words.

    >>> normalized_tokens("I have a dog; it's THE best! 你好。")
    ['i', 'have', 'dog', 'it', 's', 'best', '你', '好']
    """
    text = spaced(unicodedata.normalize("NFC", text.lower()))
    text = "".join(" " if _is_punctuation(character) else character for character in text)
    return [token for token in text.split() if token not in _ARTICLES]


def spaced(text: str) -> str:
    """Put spaces around the characters of scripts without spaces, so that any tokenizer takes them for words.

    Characters that separate words in Tibetan and Ethiopic become spaces.

    >>> spaced("世界 world"), spaced("word")
    (' 世  界  world', 'word')
    """
    text = text.translate(_SEPARATORS)
    if not _UNSPACED.search(text):
        return text
    parts: list[str] = []
    within = False  # whether the last parts are such a character and its spaces
    for character in text:
        category = unicodedata.category(character)
        if within and (category[0] == "M" or category == "Cf"):
            parts.insert(-1, character)
            continue
        within = category[0] in "LN" and category != "Nd" and _UNSPACED.match(character) is not None
        parts += [" ", character, " "] if within else [character]
    return "".join(parts)


def _is_punctuation(character: str) -> bool:
    """Whether a character separates words in ParlAI, or is punctuation of a script that ParlAI ignores."""
    if character in string.punctuation:
        return True
    return unicodedata.category(character)[0] == "P" and not _LATIN_PUNCTUATION.match(character)
