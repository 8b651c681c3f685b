"""Random small templates out of a grammar, over variables of every type."""

VARIABLES = {
    "text": "Hello  World",
    "lines": " one\n\ttwo\r\nthree \x1c\u2028 four ",
    "unicode": "Straße ΣΑΣ ǆ İ ﬁ 日本語 é 😀",
    "empty": "",
    "number": 7,
    "negative": -3,
    "big": 9007199254740993,
    "real": 2.5,
    "small": -1.5e-7,
    "large": 1.25e17,
    "yes": True,
    "no": False,
    "nothing": None,
    "items": [3, 1, 2, 1],
    "words": ["b", "A", "c", "a", "ß", ""],
    "mixed": [None, True, 1, 1.0, "1", [], {}, 'it\'s "quoted"\n\\'],
    "rows": [{"name": "x", "n": 2, "sub": {"k": [1, 2]}}, {"name": "Y", "n": 1}, {"n": 3, "name": None}],
    "table": {"b": 1, "A": "two", "c": [1, {"d": None}], "items": 5, "": 0.1},
    "vacant": {},
}
NAMES = [*VARIABLES, "missing", "x", "ns"]
TEXTS = ["''", "'a'", "'Hello'", "' x '", "'l'", "'\\n'", "'ß'", "'%s'", "'{}'", "'name'", "'n'", "'sub.k.0'", "', '"]
NUMBERS = ["0", "1", "2", "-1", "3", "10", "0.5", "1e3", "100", "0x1f", "1_000"]
FILTERS = [
    "upper", "lower", "title", "capitalize", "trim", "length", "count", "list", "first", "last", "join", "join(', ')",
    "join(number)", "string", "int", "float", "abs", "round", "round(1)", "round(2, 'floor')", "round(method='ceil')",
    "reverse", "reverse|list", "sort", "sort(reverse=true)", "sort(case_sensitive=true)", "sort(attribute='n')",
    "sort(attribute='n,name')", "unique|list", "unique(true)|list", "default('d')", "default('d', true)", "d(boolean=true)",
    "tojson", "tojson(indent=2)", "tojson(separators=(',', ':'))", "tojson(sort_keys=true)", "tojson(ensure_ascii=true)",
    "tojson(indent='\\t')", "dictsort", "dictsort(true)", "dictsort(by='value')", "dictsort(reverse=true)", "items|list",
    "map('upper')|list", "map(attribute='name')|list", "map(attribute='n', default=9)|list", "map('default', 'z')|list",
    "map(attribute='sub.k')|list", "select|list", "reject|list", "select('string')|list", "reject('none')|list",
    "selectattr('name')|list", "selectattr('n', 'gt', 1)|list", "rejectattr('name', 'none')|list", "select('in', items)|list",
    "batch(2)|list", "batch(2, 'f')|list", "slice(2)|list", "slice(3, 'f')|list", "min", "max", "sum", "sum(attribute='n')",
    "max(attribute='n')", "replace('l', 'L')", "replace('', '-')", "replace('a', 'b', 1)", "indent", "indent(2, true)",
    "indent('> ', blank=true)", "center(20)", "center(5)", "truncate(7)", "truncate(6, true, '', 0)", "wordcount",
    "e", "safe", "safe|upper", "escape|length", "forceescape", "urlencode", "format(1, 2)", "format('x')", "attr('upper')",
    "map('int')|sum", "selectattr('sub', 'defined')|map(attribute='sub')|list", "items", "map('nofilter')|list",
]  # fmt: skip
TESTS = [
    "defined", "undefined", "none", "string", "mapping", "sequence", "iterable", "number", "integer", "float", "boolean",
    "true", "false", "odd", "even", "divisibleby 2", "divisibleby(3)", "lower", "upper", "callable", "in items", "in text",
    "in table", "eq 1", "equalto('a')", "ne none", "gt 1", "ge(2)", "lt 'b'", "le 2.5", "escaped", "sameas none",
    "sameas true", "filter", "test",
]  # fmt: skip
METHODS = [
    "upper()", "lower()", "strip()", "strip('H d')", "lstrip()", "rstrip('\\n ')", "split()", "split('l')", "split(' ', 1)",
    "split(maxsplit=1)", "rsplit('l', 1)", "rsplit(none, 1)", "splitlines()", "splitlines(true)", "startswith('H')",
    "endswith(('d', ' '))", "startswith('e', 1)", "find('l')", "rfind('l')", "find('o', 5, 20)", "index('H')", "count('l')",
    "count('')", "replace('l', '')", "replace('', '.', 2)", "join(words)", "join('xy')", "partition(' ')", "rpartition('l')",
    "title()", "capitalize()", "swapcase()", "isupper()", "islower()", "isdigit()", "isalpha()", "isspace()", "istitle()",
    "isascii()", "removeprefix('He')", "removesuffix('d')", "zfill(15)", "ljust(15, '*')", "rjust(15)", "center(14)",
    "expandtabs()", "format(1)", "format(number, x=real)", "items()", "keys()|list", "values()|list", "get('b')",
    "get('zz', 4)", "get('b').c", "items()|list", "copy()", "index(1)", "count(1)", "append(1)", "pop('b')", "update({})",
    "nomethod()", "items", "keys()|length", "isalnum()", "isdecimal()", "isidentifier()",
]  # fmt: skip
FORMATS = [
    "%s",
    "%d",
    "%5d|",
    "%-5d|",
    "%05d",
    "%+d",
    "%x",
    "%.2f",
    "%8.3f|",
    "%e",
    "%g",
    "%r",
    "%5s|",
    "%-8s|",
    "%%",
    "%.2s",
]
BRACES = [
    "{}",
    "{0}",
    "{:>8}|",
    "{:<8}|",
    "{:^9}|",
    "{:*^9}|",
    "{:05d}",
    "{:,}",
    "{:.2f}",
    "{:+.1e}",
    "{!r}",
    "{:x}",
    "{:.1%}",
    "{{}}",
    "{:#x}",
]


def expression(rng, depth=0):
    kind = rng.randrange(4 if depth > 3 else 20)
    deeper = lambda: expression(rng, depth + 1)  # noqa: E731
    if kind <= 1:
        return rng.choice(NAMES)
    if kind == 2:
        return rng.choice(TEXTS)
    if kind == 3:
        return rng.choice(NUMBERS)
    if kind <= 6:
        return f"({deeper()})|{rng.choice(FILTERS)}" if rng.random() < 0.7 else f"{deeper()} | {rng.choice(FILTERS)}"
    if kind <= 8:
        return f"({deeper()}).{rng.choice(METHODS)}"
    if kind == 9:
        return f"{deeper()} {rng.choice(['+', '-', '*', '/', '//', '%', '~', '**'])} {deeper()}"
    if kind == 10:
        return f"{deeper()} {rng.choice(['==', '!=', '<', '<=', '>', '>=', 'in', 'not in'])} {deeper()}"
    if kind == 11:
        return f"1 < {deeper()} <= {deeper()}"
    if kind == 12:
        return f"{deeper()} {rng.choice(['and', 'or'])} {rng.choice(['', 'not '])}{deeper()}"
    if kind == 13:
        return f"({deeper()}) is {rng.choice(['', 'not '])}{rng.choice(TESTS)}"
    if kind == 14:
        return f"({deeper()} if {deeper()}{rng.choice(['', ' else ' + deeper()])})"
    if kind == 15:
        bounds = [rng.choice(["", "0", "1", "-1", "2", "-2", "5", "-9", "none"]) for _ in range(rng.choice([2, 2, 3]))]
        return f"({deeper()})[{':'.join(bounds)}]"
    if kind == 16:
        return f"({deeper()})[{rng.choice(['0', '-1', '1', '9', deeper()])}]"
    if kind == 17:
        return rng.choice(
            ["[{}, {}]", "({}, {})", "({},)", "{{'k': {}, 1: {}}}", "dict(a={}, b={})", "range({})", "-{}", "[{}] * 2"]
        ).format(deeper(), deeper())
    if kind == 18:
        if rng.random() < 0.5:
            return f"'{rng.choice(FORMATS)}' % ({deeper()})"
        return f"'{rng.choice(BRACES)}'.format({deeper()})"
    return f"({deeper()}).{rng.choice(['name', 'b', 'sub', 'n', 'items', 'c.d', 'zz', '0', 'sub.k'])}"


ROBUST = [
    "x",
    "y",
    "k",
    "ns.v",
    "text",
    "number",
    "real",
    "items",
    "words|join",
    "rows|length",
    "text|upper",
    "missing",
    "nothing",
    "x|string",
    "x is defined",
    "number > 3",
    "yes",
    "not no",
    "text ~ number",
    "[1, 'a']",
    "table.b",
    "items[1:]",
    "text[::-1]",
    "(x, y)",
    "'é'",
    "x or y",
    "y if yes else x",
]


def robust(rng):
    """An expression that seldom raises, or now and then any."""
    return expression(rng, 3) if rng.random() < 0.08 else rng.choice(ROBUST)


def space(rng):
    return rng.choice(
        ["", "", "", "\n", " ", "  \n", "\n  ", "\n\n", "text ", " \t", "x\n    ", "{# note #}", "{#- n -#}\n"]
    )


def tag(rng, body):
    return "{%" + rng.choice(["", "", "-", "+"]) + f" {body} " + rng.choice(["", "", "-", "+"]) + "%}"


def output(rng, body):
    return "{{" + rng.choice(["", "", "-"]) + f" {body} " + rng.choice(["", "", "-"]) + "}}"


LOOP = [
    "loop.index", "loop.index0", "loop.first", "loop.last", "loop.length", "loop.revindex", "loop.revindex0", "loop.depth",
    "loop.previtem", "loop.nextitem", "loop.cycle('a', 'b')", "loop.changed(x)", "loop.previtem is defined", "loop",
]  # fmt: skip


def block(rng, depth=0):
    parts = []
    for _ in range(rng.randint(1, 2)):
        parts += [space(rng), statement(rng, depth), space(rng)]
    return "".join(parts)


def statement(rng, depth):
    kind = rng.randrange(5 if depth > 2 else 18)
    t, inner = lambda body: tag(rng, body), lambda: block(rng, depth + 1)
    if kind <= 2:
        return output(rng, robust(rng))
    if kind == 3:
        return output(rng, rng.choice(["x", "y", "loop.index", "ns.v", "text", "number"]))
    if kind == 4:
        return t(
            f"set {rng.choice(['x', 'y', 'text', 'number', 'x, y', 'ns.v', 'ns.w'])} = {rng.choice([robust(rng), '(1, 2)'])}"
        )
    if kind <= 6:
        chain = t(f"elif {robust(rng)}") + inner() if rng.random() < 0.4 else ""
        other = t("else") + inner() if rng.random() < 0.5 else ""
        return t(f"if {robust(rng)}") + inner() + chain + other + t("endif")
    if kind <= 9:
        source = rng.choice(
            [
                "items",
                "words",
                "rows",
                "table",
                "text",
                "missing",
                "range(3)",
                "rows|map(attribute='n')",
                "table.items()",
                robust(rng),
            ]
        )
        target = "k, v" if "table.items" in source or rng.random() < 0.05 else "x"
        test = f" if {robust(rng)}" if rng.random() < 0.3 else ""
        jump = (
            t(f"if {rng.choice(['loop.index', 'x', 'k'])} == {rng.choice(['1', '2', robust(rng)])}")
            + t(rng.choice(["break", "continue"]))
            + t("endif")
            if rng.random() < 0.3
            else ""
        )
        shown = output(rng, rng.choice(LOOP)) if rng.random() < 0.6 else ""
        other = t("else") + inner() if rng.random() < 0.3 else ""
        return t(f"for {target} in {source}{test}") + shown + jump + inner() + other + t("endfor")
    if kind == 10:
        signature = rng.choice(["()", "(a)", "(a, b=2)", "(a='d', b=a)", "(x)"])
        call = rng.choice(
            ["m()", "m(1)", "m(1, 2)", "m(b=3)", "m(1, 2, 3)", "m(a=text)", "m(*items)", "m(**table)", "m"]
        )
        names = rng.choice(
            ["", "{{ a }}{{ b }}", "{{ varargs }}{{ kwargs }}", "{{ a }}{{ x }}", "{{ caller is defined }}"]
        )
        return t(f"macro m{signature}") + names + inner() + t("endmacro") + output(rng, call)
    if kind == 11:
        return (
            t(f"set {rng.choice(['x', 'y', 'ns.v'])}{rng.choice(['', ' | upper', ' | trim | length'])}")
            + inner()
            + t("endset")
        )
    if kind == 12:
        return (
            t(f"filter {rng.choice(['upper', 'trim', 'replace(text, x)', 'indent(2)', 'lower', 'title'])}")
            + inner()
            + t("endfilter")
        )
    if kind == 13:
        return t(f"with x = {robust(rng)}, z = x") + inner() + "{{ z }}" + t("endwith")
    if kind == 14:
        body = rng.choice(["{{ caller() }}", "[{{ caller(1) }}]", "{{ caller(x, 2) }}{{ caller() }}", ""])
        return (
            t("macro w(p)")
            + "<{{ p }}>"
            + body
            + t("endmacro")
            + t(f"call{rng.choice(['', '(q)', '(q, r=3)'])} w({robust(rng)})")
            + "{{ q }}"
            + inner()
            + t("endcall")
        )
    if kind == 15:
        return t("generation") + inner() + t("endgeneration")
    if kind == 16:
        return t("raw") + "{{ raw }}{% if %}\n " + t("endraw")
    return (
        t("set ns = namespace(v=1, w=text)")
        + t(f"for x in {rng.choice(['items', 'words'])}")
        + t("set ns.v = ns.v ~ x")
        + t("endfor")
        + "{{ ns.v }}{{ ns.zz }}"
    )


RECURSIVE = "{% for r in [[1, [2, []]], [], [[3]]] recursive %}<{{ loop.depth }}{{ r if r is number }}{{ loop(r) if r is iterable }}>{% endfor %}"


def template(rng):
    body = RECURSIVE if rng.random() < 0.02 else block(rng)
    return "{% set ns = namespace(v=0) %}" * (rng.random() < 0.7) + body
