"""YAML that is refused before anything is built from it."""

import pytest

from gatera_lightning.cli.error_translation import ParseError
from gatera_lightning.cli.yaml_checks import check_document

LAUGHS = "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: the key 'a' is given twice, first in line 1"),
        ("m:\n  x:\n    r: 1\n    r: 1\n", "line 4: the key 'r' is given twice, first in line 3"),
        ("m: {r: 1, r: 2}", "line 1: the key 'r' is given twice"),
        ("m: [{r: 1}, {r: 1, 'r': 2}]", "line 1: the key 'r' is given twice"),
        ("x: &x {r: 1}\ny:\n  <<: *x\n  <<: *x\n", "line 4: the key '<<' is given twice, first in line 3"),
        ("a: &a [*a]", "line 1: the alias *a stands inside of what it refers to"),
        ("a: &a {b: {c: *a}}", "the alias *a stands inside"),
        (LAUGHS, "more than 100,000 values, counting those of aliases"),
        ("[" * 100_000, "nested deeper than 50 levels"),
        ("{a: " * 100_000, "nested deeper than 50 levels"),
        ("- " * 100_000 + "a: 1", "nested deeper than 50 levels"),
        ("a: !!python/object/apply:os.system [ls]", "line 1: the tag 'tag:yaml.org,2002:python/object"),
        ("a:\n  b: !mine 3", "line 2: the tag '!mine' is not accepted"),
        ("a: 1\n---\nb: 2\n", "line 2: a second document starts here"),
        ("? [a, b]\n: 1", "line 1: a list, a mapping or an alias is no key"),
        ("a:\n\tb: 1\n", "line 2: this is no YAML"),
        ("a: [1, 2", "this is no YAML"),
        ("a: \x00", "this is no YAML"),
        ("a: *nothing", "line 1: the alias *nothing refers to nothing"),
    ],
    ids=range(19),
)
def test_document_is_refused_with_its_line(text, message):
    with pytest.raises(ParseError) as caught:
        check_document(text, "mine.yaml")
    assert str(caught.value).startswith("mine.yaml, line ")
    assert message in str(caught.value)


def test_tabs_have_a_hint():
    with pytest.raises(ParseError, match="indent with spaces instead of tabs"):
        check_document("a:\n\tb: 1\n", "mine.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "token",
        "a: 1\nb: {a: 1}\nc: [{a: 1}, {a: 1}]\n",
        "x: &x {r: 1, s: 2}\ny:\n  <<: *x\n  r: 3\n",
        "x: &x {r: 1}\ny: {<<: [*x, *x]}\n",
        "a: &a 1\nb: *a\nc: *a\n",
        "a: !!float 3\n",
        "---\na: 1\n",
        "everyday[:48]",
    ],
    ids=range(9),
)
def test_plain_document_passes(text):
    check_document(text, "mine.yaml")


def test_value_of_a_flag_has_no_syntax_error_of_its_own():
    """jsonargparse reads any text as a value first; only what it would silently change is refused."""
    check_document("a: [", "")
    with pytest.raises(ParseError, match=r"^line 1 of a value: the key 'a' is given twice"):
        check_document("{a: 1, a: 2}", "")
