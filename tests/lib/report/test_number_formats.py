import pytest

from stages.lib.report.number_formats import LARGEST, decimal, is_usable, number, percent, signed


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (-0.0, "0"),
        (250, "250"),
        (412345, "412,345"),
        (-3.0, "−3"),
        (1.2345, "1.23"),
        (-0.012345, "−0.0123"),
        (123.456, "123.5"),
        (12345.6, "12,346"),
        (2e-5, "2.00e−05"),
        (1e100, "1.00e+100"),
        (10**20, "1.00e+20"),
    ],
)
def test_number(value, text):
    assert number(value) == text


def test_fixed_decimals_signs_and_shares():
    assert decimal(1234.5678) == "1,234.57"
    assert decimal(-0.001) == "0.00"
    assert signed(0.4251) == "+0.43"
    assert signed(-0.2) == "−0.20"
    assert percent(0.7125) == "71.2\N{NO-BREAK SPACE}%"
    assert percent(-0.00001) == "0.0\N{NO-BREAK SPACE}%"


def test_numbers_too_large_for_their_digits_are_written_with_a_power_of_ten():
    assert decimal(-1e100) == "−1.00e+100"
    assert signed(2.5e99, 1) == "+2.5e+99"
    assert decimal(999_999_999_999.25) == "999,999,999,999.25"


@pytest.mark.parametrize("value", [0, -3, 0.5, 10**99, LARGEST, -LARGEST])
def test_a_usable_number(value):
    assert is_usable(value)


@pytest.mark.parametrize("value", [True, None, "1", [1], float("nan"), float("inf"), -float("inf"), 1e101, 10**401])
def test_no_usable_number(value):
    assert not is_usable(value)
