"""Numbers as a reader wants them: few digits, a real minus sign, thousands set apart."""

LARGEST = 1e100  # no measurement is beyond it; sums, axes and percentages of what is would overflow
MOST_DIGITS = 1e15  # from here on a fixed notation would show digits that a float does not have


def is_usable(value: object) -> bool:
    """True for a finite number of a size that can be summed and drawn; NaN, infinities and truth values are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST


def number(value: float, digits: int = 3) -> str:
    """`value` with about `digits` significant digits; whole numbers whole: 0.0123, 1.23, 123, 12,345."""
    if abs(value) >= MOST_DIGITS:
        text = f"{value:.{digits - 1}e}"
    elif value == int(value):
        text = f"{int(value):,}"
    elif abs(value) >= 10**digits:
        text = f"{value:,.0f}"
    elif abs(value) >= 10 ** (digits - 1):
        text = f"{value:.{1}f}"
    else:
        text = f"{value:#.{digits}g}"
    return with_minus(text)


def decimal(value: float, places: int = 2) -> str:
    """`value` with a fixed number of decimals, for numbers that stand in one column."""
    return with_minus(fixed(value, places, ""))


def signed(value: float, places: int = 2) -> str:
    """A change, with its sign."""
    return with_minus(fixed(value, places, "+"))


def fixed(value: float, places: int, sign: str) -> str:
    return f"{value:{sign}.{places}e}" if abs(value) >= MOST_DIGITS else f"{value:{sign},.{places}f}"


def percent(share: float, places: int = 1) -> str:
    """A share of 1 as per cent, unit included, on one line."""
    return with_minus(f"{100 * share:.{places}f}\N{NO-BREAK SPACE}%")


def with_minus(text: str) -> str:
    """A minus sign for the hyphen, and none before a zero."""
    if text.startswith("-") and not text.strip("-0.,%\N{NO-BREAK SPACE}"):
        text = text[1:]
    return text.replace("-", "\N{MINUS SIGN}")
