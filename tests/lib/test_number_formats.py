import pytest

from stages.lib.number_formats import decimal, number, percent, signed


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
