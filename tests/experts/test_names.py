"""The grammar of names: experts, mixtures, and what neither is."""

import pytest

from t2kernels.experts.names import (
    AUTO,
    BASE,
    MIX,
    check_name,
    flat_names,
    key_of,
    parse_mixture,
    shape_of,
    write_mixture,
)


@pytest.mark.parametrize("name", ["math", "a", "A-1_b.c", "9", "x" * 64, "mix", "classify", "auto2"])
def test_names_that_an_expert_may_have(name):
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", BASE, AUTO, "mix:a=1", "a=1", "a,b", "../x", "a/b", ".x", "-x", "x" * 65, "ü", "a b", "a\n", "\0", 7, None],
)
def test_names_that_no_expert_may_have(name):
    with pytest.raises(ValueError, match="an expert cannot be called"):
        check_name(name)


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("mix:math=0.5,code=.25", {"math": 0.5, "code": 0.25}),
        ("math=0.5,code=.25", {"math": 0.5, "code": 0.25}),
        ("mix: a = 1 , b=-2e-1", {"a": 1.0, "b": -0.2}),
        ("mix:x=y=1", {"x=y": 1.0}),
        ("mix:experts/math=1", {"experts/math": 1.0}),
        ("mix:a=0", {"a": 0.0}),
        ("mix:a=-1000,b=1000", {"a": -1000.0, "b": 1000.0}),
    ],
)
def test_mixtures_in_text(text, wanted):
    assert parse_mixture(text) == wanted


@pytest.mark.parametrize(
    "text",
    [
        *("", "mix:", "mix:math", "mix:math=", "mix:=1", "mix: =1", "mix:math=x,code=1", "mix:math=1,", "mix:,math=1"),
        *("mix:math=nan", "mix:math=inf", "mix:math=-inf", "mix:math=1001", "mix:math=1e9", "mix:mix:a=1,mix:a=2,a"),
        *("mix:math=.5,math=.5", "mix: a=1, a=1"),
    ],
)
def test_texts_that_are_no_mixture(text):
    with pytest.raises(ValueError, match="is not a mixture: wanted mix:NAME=WEIGHT"):
        parse_mixture(text)


def test_a_mixture_is_written_as_it_is_read():
    weights = {"math": 0.7, "code": -0.25, "z": 1e-7, "reason": 1000.0}
    text = write_mixture(weights)
    assert text == "mix:code=-0.25,math=0.7,reason=1000,z=1e-07"
    assert text.startswith(MIX)
    assert parse_mixture(text) == weights
    assert write_mixture(parse_mixture("mix:b=1,a=2")) == write_mixture({"a": 2, "b": 1})


def test_keys():
    assert key_of(None) is None
    assert key_of("math") == "math"
    assert key_of({"b": 1, "a": 0.5, "c": 0}) == (("a", 0.5), ("b", 1.0))
    assert key_of({"a": 0.0}) is key_of({}) is None  # 1 + 0 (z - 1): the base model
    for bad in (7, ["a"], 0.5):
        with pytest.raises(TypeError, match="mixture"):
            key_of(bad)
    for weight in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite"):
            key_of({"a": weight})


@pytest.mark.parametrize(
    "names, flat, shape",
    [
        (None, [None], ()),
        ("a", ["a"], ()),
        ({"a": 1.0}, [{"a": 1.0}], ()),
        (["a", None, {"b": 2.0}], ["a", None, {"b": 2.0}], (3,)),
        ([["a", "b"], [None, "a"]], ["a", "b", None, "a"], (2, 2)),
        ([], [], (0,)),
    ],
)
def test_batches_of_names(names, flat, shape):
    assert list(flat_names(names)) == flat
    assert shape_of(names) == shape


def test_batches_that_are_none():
    with pytest.raises(TypeError, match="names no experts"):
        list(flat_names([["a", 3]]))
    with pytest.raises(ValueError, match="same length"):
        shape_of([["a"], ["a", "b"]])
