"""Sizes as people write and read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pymerge.common.units import count_of, format_bytes, format_flops, parse_bytes
from pymerge.errors import ArgumentError


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (7, 7),
        ("7", 7),
        ("7B", 7),
        ("5kb", 5_000),
        ("5KiB", 5_120),
        ("500MB", 500_000_000),
        (" 8 GiB ", 8 * 2**30),
        ("1.5TiB", 3 * 2**39),
        ("0.25KiB", 256),
        ("5000000000", 5_000_000_000),
    ],
)
def test_sizes_that_are_understood(text: str | int, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    "text",
    ["", "GiB", "8 gigabytes", "8 GiB 2", "-1", "1e9", "0", "0GiB", "0.5", "0.0001KB", "٣", "1,5GB", 0, -3],
)
def test_sizes_that_are_none(text: str | int) -> None:
    with pytest.raises(ArgumentError, match=r"size .*(write for example|give a number of bytes such as) "):
        parse_bytes(text)


def test_a_size_with_too_many_digits_is_none() -> None:
    with pytest.raises(ArgumentError, match="size '9999"):
        parse_bytes("9" * 400)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0B"),
        (1023, "1023B"),
        (1024, "1.00KiB"),
        (1280, "1.25KiB"),
        (3 * 2**19, "1.50MiB"),
        (2**30, "1.00GiB"),
        (5 * 2**50, "5120.00TiB"),
    ],
)
def test_bytes_are_shown_in_binary_units(count: int, text: str) -> None:
    assert format_bytes(count) == text


def test_rounding_up_never_promises_less() -> None:
    assert format_bytes(1025) == "1.00KiB"
    assert format_bytes(1025, round_up=True) == "1.01KiB"
    assert format_bytes(1280, round_up=True) == "1.25KiB"


@given(st.integers(1, 2**45))
def test_a_rounded_up_size_read_again_is_enough_and_close(count: int) -> None:
    again = parse_bytes(format_bytes(count, round_up=True))
    assert count <= again <= count * 1.01 + 1


@given(st.integers(1, 2**45))
def test_a_shown_size_is_within_half_a_unit_of_its_last_digit(count: int) -> None:
    shown = format_bytes(count)
    unit = parse_bytes("1" + shown.lstrip("0123456789."))
    assert abs(float(shown.removesuffix(shown.lstrip("0123456789."))) - count / unit) <= 0.0050001


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 FLOP"),
        (999, "999 FLOP"),
        (1000, "1 KFLOP"),
        (1234, "1.23 KFLOP"),
        (2_500_000_000_000, "2.5 TFLOP"),
        (7 * 10**15, "7 PFLOP"),
    ],
)
def test_flops_are_shown_in_decimal_units(count: int, text: str) -> None:
    assert format_flops(count) == text


@pytest.mark.parametrize(("number", "text"), [(0, "0 files"), (1, "1 file"), (2, "2 files"), (2000, "2,000 files")])
def test_things_are_counted(number: int, text: str) -> None:
    assert count_of(number, "file") == text
