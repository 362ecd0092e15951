"""Texts that YAML reads in ways that are easily forgotten."""

from tests.fuzz.case import Expected

ODD_SCALARS = (
    *(
        "!!int abc",
        "!!float abc",
        "!!bool maybe",
        "!!timestamp 2020-13-45",
        "2020-02-31",
        "2020-02-30T25:61:00",
        "!!null x",
    ),
    *("!!python/object/apply:os.system ['touch pwned']", "!!binary '*'", "!!set {a, b}", "!!omap [a]", "!unknown 5"),
    *("*nowhere", "&a [*a]", "<<", ".nan", ".inf", "-.inf", "0x10", "0o17", "0b1", "1_000", "1:30", "1e5", "1.", "+1"),
    *("yes", "~", "'5'", '"\\x00"', '"\\ud800"', "99999999999999999999", "9" * 401, "9" * 5000, f"{'9' * 401}.5"),
    *("[" * 3000 + "]" * 3000, '{"a": ' * 3000 + "1" + "}" * 3000, "[[[[]]]]", "{? [a] : b}"),
)
BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]\n" for n in range(12))
# What it is, the text (@all@ stands for the sound settings, without their braces), what must come of it.
ODD_TEXTS: tuple[tuple[str, str, Expected], ...] = (
    ("nothing wrong", "{@all@}", "accepted"),
    ("a number as top-level key", "{@all@, 5: x}", "refused"),
    ("null as top-level key", "{@all@, null: x}", "refused"),
    ("true as top-level key", "{@all@, true: x}", "refused"),
    ("a date as top-level key", "{@all@, 2020-01-01: x}", "refused"),
    ("a list as top-level key", "{@all@, [a, b]: x}", "refused"),
    ("an empty text as top-level key", "{@all@, '': x}", "refused"),
    ("a newline in a top-level key", '{@all@, "a\\nerror: b": x}', "refused"),
    ("an unknown section", "{@all@, train_kto: {}}", "refused"),
    ("a section twice", "{@all@, seed: 5}", "refused"),
    ("a number as key of a section", "{@all@, train_sft: {5: x}}", "refused"),
    ("an impossible date", "{@all@, x: 2020-02-31}", "refused"),
    ("3,000 nested lists", "{@all@, x: " + "[" * 3000 + "]" * 3000 + "}", "refused"),
    ("3,000 nested lists that do not end", "{@all@, x: " + "[" * 3000, "refused"),
    ("an integer of 5,000 digits", "{@all@, x: " + "9" * 5000 + "}", "refused"),
    ("a tag that builds an object", "{@all@, x: !!python/object/apply:os.system ['touch pwned']}", "refused"),
    ("an anchor that holds itself", "{@all@, x: &a [*a]}", "refused"),
    ("many aliases of aliases", BOMB, "refused"),
    ("an alias to nothing", "{@all@, x: *nowhere}", "refused"),
    ("two documents", "{@all@}\n---\n{}", "refused"),
    ("a list", "- a\n- b\n", "refused"),
    ("a text", "hello\n", "refused"),
    ("null", "null\n", "refused"),
    ("a tab as indentation", "seed:\n\t5\n", "refused"),
    ("a control character", "seed: \x07\n", "refused"),
    ("a byte order mark", "\ufeff{@all@}", "either"),
    ("a directive of YAML 1.1", "%YAML 1.1\n---\n{@all@}", "either"),
    ("an unknown directive", "%FOO bar\n---\n{@all@}", "either"),
    ("a merge key", "{@all@, <<: {a: 1}}", "refused"),
    ("half of it", "{@all@"[:200], "refused"),
)
