"""Matching module names agrees with ``re.fullmatch``, and no expression hangs."""

import re
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gatera_lightning import AdapterConfig
from gatera_lightning.adapters.name_patterns import matches, pattern_problem

NAMES = [
    "",
    "q_proj",
    "lm_head",
    "model.layers.0.self_attn.q_proj",
    "model.layers.17.mlp.down_proj",
    "model.vision_tower.layers.3.self_attn.V_PROJ",
    "transformer.h.11.attn.c_attn",
    "line\nbreak",
    "ends\n",
    "Größe.ß",
]
PATTERNS = [
    r".*",
    r".*\.q_proj",
    r".*(q|v)_proj",
    r"model\.layers\.\d+\.mlp\.(up|down)_proj",
    r"model\.layers\.(1[0-9]|[0-9])\..*",
    r"^(?!.*vision).*q_proj$",
    r"(?=.*self_attn).*_proj",
    r".*(?<=self_attn)\.q_proj",
    r".*(?<!mlp)\.\w+",
    r"(?i).*v_proj",
    r".*(?i:V_proj)",
    r"[^.]+(\.[^.]+){3,6}",
    r"\w+\b.*",
    r"(\w|\.){5,10}?",
    r".*?\.h\.\d{1,2}\.[a-z_.]+",
    r"(a|b|q_)(proj)?",
    r"\A.*\Z",
    r"ends$",
    r".*\s.*",
    r"(?s).*",
    r"[\w.]*[^\W\d]",
    r"\S+\D",
    r"(?m)line$.^break",
    r"(|x)*q_proj",
    r"x{0}q_proj",
    r"\Bq.*|q\B.*",
    r"(?:)",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_matches_what_re_matches(pattern):
    assert pattern_problem(pattern) is None
    for name in NAMES:
        assert matches(pattern, name) == (re.fullmatch(pattern, name) is not None), name


_ATOMS = st.sampled_from(
    ["a", "b", ".", "[ab]", "[^a]", r"\w", r"\d", "^", "$", r"\b", "(?=a)", "(?!b)", "(?<=a)"]
)
_EXPRESSIONS = st.recursive(
    _ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: f"({'|'.join(parts)})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,2}", "*?", "+?"])).map(
            lambda pair: f"(?:{pair[0]}){pair[1]}"
        ),
    ),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(_EXPRESSIONS, st.text("ab1.\n", max_size=5))
def test_random_expressions_match_what_re_matches(pattern, name):
    assert matches(pattern, name) == (re.fullmatch(pattern, name) is not None)


@pytest.mark.parametrize(
    "pattern",
    [
        r"(.*)*(.*)*X$",
        r"(a|a)*X",
        r"(\w+\.?)+X",
        r"(\w|\.)*(\w|\.)*(\w|\.)*(\w|\.)*(\w|\.)*(\w|\.)*X",
        r"(?:.*.*.*.*.*.*.*.*.*.*)+X",
        r"((.+)+)+X",
        r"(?=(.*)*X).*",
        r"(?!(.+)+X)(.+)+X",
        r"(.{1,30}){1,30}(.{1,30}){1,30}X",
        r"(.|..|...)+X",
        r"((((((((.*)*)*)*)*)*)*)*)*X",
        r"(.{0,65000}){0,65000}X",
        r"(()*)*X",
    ],
)
def test_expression_that_would_hang_re_ends(pattern):
    """With ``re``, most of these take longer than a life on this name."""
    assert AdapterConfig(target_modules=[pattern]).problems() == []
    assert not matches(pattern, "model.layers.17.self_attn.some_long_projection_name" * 2)


@pytest.fixture
def default_recursion_limit():
    """Python's own limit: Hypothesis raises it, and it then holds for the tests that follow."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)
    yield
    sys.setrecursionlimit(before)


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        (r"(a)\1", "a back-reference"),
        (r"(?P<x>a)(?P=x)", "a back-reference"),
        (r"(a)?(?(1)b|c)", "a condition on a group"),
        (r"(?>a*)b", "an atomic group"),
        (r"a*+b", "a possessive quantifier"),
        ("(", "is not a regular expression"),
        (r"(?<=a*)b", "is not a regular expression"),
        ("(" * 490 + ")" * 490, "nested too deeply"),
        ("(" * 501 + ")" * 500, "at most 1,000 are accepted"),
    ],
    ids=lambda value: f"{value[:20]}-{len(value)}",
)
def test_unsupported_expression_is_named(pattern, named, default_recursion_limit):
    (problem,) = AdapterConfig(target_modules=[pattern]).problems()
    assert problem.startswith("adapter.target_modules: ")
    assert named in problem
