"""Quantities: exact values in, one kind of error out."""

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringsim.units import DIMENSIONS, UnitError, format_rate, format_size, format_time, parse, parse_tokens, shown

REPEATABLE = settings(max_examples=500, deadline=None, derandomize=True)
SI = {"": 0, "k": 3, "K": 3, "M": 6, "G": 9, "T": 12, "P": 15}
BYTES = {f"{p}B": Fraction(10) ** e for p, e in SI.items()} | {f"{p}iB": Fraction(1024) ** (i + 1) for i, p in enumerate("KMGT")}
UNITS = {
    "time": {
        "s": Fraction(1),
        "ms": Fraction(1, 10**3),
        "us": Fraction(1, 10**6),
        "µs": Fraction(1, 10**6),
        "ns": Fraction(1, 10**9),
    },
    "size": BYTES,
    "bandwidth": {f"{u}/s": f for u, f in BYTES.items()} | {f"{p}bit/s": Fraction(10) ** e / 8 for p, e in SI.items()},
    "rate": {f"{p}FLOP/s": Fraction(10) ** e for p, e in SI.items()},
}


@pytest.mark.parametrize(
    ("text", "dimension", "value"),
    [
        ("8 us", "time", 8e-6),
        ("7µs", "time", 7e-6),
        ("+2 ms", "time", 2e-3),
        ("  3 ns\n", "time", 3e-9),
        (".5 s", "time", 0.5),
        ("5. s", "time", 5.0),
        ("0 s", "time", 0.0),
        ("0.1 us", "time", 1e-7),
        ("80 GB", "size", 80e9),
        ("16KiB", "size", 16384.0),
        ("1.5 MiB", "size", 1572864.0),
        ("2 TiB", "size", 2.0**41),
        ("1 kB", "size", 1000.0),
        ("1 KB", "size", 1000.0),
        ("450 GB/s", "bandwidth", 450e9),
        ("400 Gbit/s", "bandwidth", 50e9),
        ("1 bit/s", "bandwidth", 0.125),
        ("1 GiB/s", "bandwidth", 2.0**30),
        ("25e9 B/s", "bandwidth", 25e9),
        ("989 TFLOP/s", "rate", 989e12),
        ("1.25E-3 PFLOP/s", "rate", 1.25e12),
    ],
)
def test_a_quantity_is_read_exactly(text, dimension, value):
    assert parse(text, dimension) == value


def test_every_unit_has_its_si_value():
    assert {dimension: set(units) for dimension, units in DIMENSIONS.items()} == {d: set(units) for d, units in UNITS.items()}
    for dimension, units in UNITS.items():
        for unit, factor in units.items():
            assert parse(f"3 {unit}", dimension) == float(3 * factor), unit


@REPEATABLE
@given(st.sampled_from([(d, u) for d, units in UNITS.items() for u in units]), st.integers(0, 10**14), st.integers(-30, 30))
def test_the_value_is_correctly_rounded(unit, mantissa, exponent):
    dimension, name = unit
    exact = Fraction(mantissa) * Fraction(10) ** exponent * UNITS[dimension][name]
    assert parse(f"{mantissa}e{exponent} {name}", dimension) == float(exact)


def test_a_quantity_of_many_digits_is_correctly_rounded_too():
    # just above the middle between two doubles
    assert parse("9007199254740993.0000000000000000000000001 B", "size") == 9007199254740994.0


@pytest.mark.parametrize(
    ("text", "dimension", "message"),
    [
        (5, "time", "5 is a bare number: write a time with its unit, e.g. 8 us"),
        (2.5, "size", "2.5 is a bare number: write a size with its unit, e.g. 80 GB"),
        (math.nan, "time", "nan is a bare number: write a time with its unit, e.g. 8 us"),
        ("5", "bandwidth", "'5' has no unit: write a bandwidth such as 450 GB/s or 400 Gbit/s"),
        ("1e5", "rate", "'1e5' has no unit: write a rate such as 989 TFLOP/s"),
        ("fast", "rate", "'fast' is no quantity: write a rate with its unit, e.g. 989 TFLOP/s"),
        ("", "time", "'' is no quantity: write a time with its unit, e.g. 8 us"),
        ("nan s", "time", "'nan s' is no quantity: write a time with its unit, e.g. 8 us"),
        ("inf GB", "size", "'inf GB' is no quantity: write a size with its unit, e.g. 80 GB"),
        (True, "time", "True is no quantity: write a time with its unit, e.g. 8 us"),
        (None, "size", "None is no quantity: write a size with its unit, e.g. 80 GB"),
        (["8 us"], "time", "['8 us'] is no quantity: write a time with its unit, e.g. 8 us"),
        ("8 GB", "time", "'8 GB': 'GB' is no unit of time; allowed: s, ms, us, µs, ns"),
        ("8 min", "time", "'8 min': 'min' is no unit of time; allowed: s, ms, us, µs, ns"),
        ("-1 s", "time", "'-1 s' is out of range: a time is finite and not negative"),
        ("-1e-300 GB", "size", "'-1e-300 GB' is out of range: a size is finite and not negative"),
        ("1e400 s", "time", "'1e400 s' is out of range: a time is finite and not negative"),
        ("1e999999 kB", "size", "'1e999999 kB' is out of range: a size is finite and not negative"),
        ("1e99999999999999999999 s", "time", "'1e99999999999999999999 s' is out of range: a time is finite and not negative"),
    ],
)
def test_what_is_no_quantity_is_refused(text, dimension, message):
    with pytest.raises(UnitError) as caught:
        parse(text, dimension)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "dimension"),
    [
        ("8 us", "size"),
        ("8 GB/s", "size"),
        ("8 GB", "bandwidth"),
        ("8 gb", "size"),
        ("8 MS", "time"),
        ("1 TFLOPS", "rate"),
        ("8 GiB", "rate"),
    ],
)
def test_a_unit_of_another_dimension_is_refused_with_the_allowed_ones(text, dimension):
    unit = text.split()[1]
    with pytest.raises(UnitError) as caught:
        parse(text, dimension)
    assert str(caught.value) == f"{text!r}: {unit!r} is no unit of {dimension}; allowed: {', '.join(DIMENSIONS[dimension])}"


EXPONENTS = st.integers(-40, 40) | st.integers(-(10**25), 10**25)
MANTISSAS = st.integers(-(10**35), 10**35).map(str) | st.text("0123456789.+-٣", max_size=30)
NUMBERS = st.builds("{}{}".format, MANTISSAS, st.just("") | EXPONENTS.map("e{}".format))
ENDINGS = st.sampled_from(["", "s", " GB", "B/s", " FLOP/s", "K", "x"]) | st.text(max_size=4)
TEXTS = st.text(max_size=20) | st.builds(str.__add__, NUMBERS, ENDINGS)


@REPEATABLE
@given(TEXTS, st.sampled_from(sorted(UNITS)))
def test_any_text_is_a_finite_quantity_or_a_unit_error(text, dimension):
    try:
        value = parse(text, dimension)
    except UnitError as error:
        assert shown(text) in str(error)
    else:
        assert 0 <= value < math.inf


OBJECTS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.binary()
    | st.lists(st.text())
    | st.dictionaries(st.text(), st.text())
)


@REPEATABLE
@given(OBJECTS, st.sampled_from(sorted(UNITS)))
def test_any_other_object_is_a_unit_error(value, dimension):
    with pytest.raises(UnitError):
        parse(value, dimension)


def test_an_integer_too_long_to_print_is_a_unit_error():
    with pytest.raises(UnitError):
        parse(10**5000, "time")


@pytest.mark.parametrize(
    ("text", "count"),
    [("6", 6), ("0", 0), (" 7 ", 7), ("8K", 8192), ("1 M", 2**20), ("2G", 2**31), ("1.5K", 1536), ("0.5M", 2**19), ("3.0", 3)],
)
def test_a_count_of_tokens_is_read_in_powers_of_two(text, count):
    assert parse_tokens(text) == count
    assert type(parse_tokens(text)) is int


def test_a_long_count_of_tokens_keeps_every_digit_or_is_refused():
    assert parse_tokens(str(2**63 - 1)) == 2**63 - 1
    for text in (str(2**63), "9" * 30, "9000000000G"):
        with pytest.raises(UnitError, match=f"^'{text}' is more than 9223372036854775807 tokens$"):
            parse_tokens(text)
    with pytest.raises(UnitError, match="is no count of tokens"):
        parse_tokens("1" * 4000)


def test_a_count_of_tokens_too_long_to_print_is_a_unit_error():
    with pytest.raises(UnitError):
        parse_tokens("1" * 5000)


@pytest.mark.parametrize("text", ["", "K", "8k", "-1", "+1", "1e3", "8 KB", "8KK", "nan", "1.", ".5", "1,000", "0x10"])
def test_what_is_no_count_of_tokens_is_refused(text):
    with pytest.raises(UnitError) as caught:
        parse_tokens(text)
    assert str(caught.value) == f"{text!r} is no count of tokens: write e.g. 6, 8K (= 8192) or 1M (= 1048576)"


@pytest.mark.parametrize(("text", "value"), [("1.5", "1.5"), ("0.1K", "102.4"), ("1." + "0" * 30 + "1", "1.0")])
def test_a_fraction_of_a_token_is_refused(text, value):
    with pytest.raises(UnitError) as caught:
        parse_tokens(text)
    assert str(caught.value) == f"{text!r} is not a whole number of tokens ({value})"


@REPEATABLE
@given(TEXTS)
def test_any_text_is_a_count_of_tokens_or_a_unit_error(text):
    try:
        assert parse_tokens(text) >= 0
    except UnitError as error:
        assert shown(text) in str(error)


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (format_time, 1.0, "1 s"),
        (format_time, 1.2341e-3, "1.234 ms"),
        (format_time, 9.99e-4, "999 us"),
        (format_time, 2e-9, "2 ns"),
        (format_time, 5e-12, "0.005 ns"),
        (format_time, 0.0, "0 ns"),
        (format_time, -2e-3, "-2 ms"),
        (format_size, 16.777216e6, "16.78 MB"),
        (format_size, 999, "999 B"),
        (format_size, 1000, "1 kB"),
        (format_size, 0, "0 B"),
        (format_size, 2e12, "2 TB"),
        (format_rate, 133.52e9, "133.5 GFLOP/s"),
        (format_rate, 2e15, "2 PFLOP/s"),
        (format_rate, 3.0, "3 FLOP/s"),
        (format_rate, 0.0, "0 FLOP/s"),
    ],
)
def test_a_quantity_is_written_with_four_digits(function, value, text):
    assert function(value) == text


def test_a_rate_is_written_in_the_unit_asked_for():
    assert format_rate(4.5e11, "B/s") == "450 GB/s"


@REPEATABLE
@given(st.floats(1e-13, 1e19))
def test_what_is_written_can_be_read_again(value):
    for text, dimension in (
        (format_time(value), "time"),
        (format_size(value), "size"),
        (format_rate(value), "rate"),
        (format_rate(value, "B/s"), "bandwidth"),
    ):
        assert parse(text, dimension) == pytest.approx(value, rel=5.1e-4)
