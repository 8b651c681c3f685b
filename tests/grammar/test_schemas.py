"""Answers drawn at random under random schemas, by Python's jsonschema; schemas that cannot be kept; hostile ones."""

import json
import os
import random
import subprocess

import jsonschema
import pytest
from patience import SLOWER
from random_schemas import random_schema
from wide_vocabulary import write_tokenizer


class Tool:
    """schema_tool: schema, answers, seed -> its reply."""

    def __init__(self, build_folder, tokenizer):
        path = build_folder / "tests" / "grammar" / "schema_tool"
        if not path.is_file():
            pytest.skip("built without xgrammar")
        self.process = subprocess.Popen([path, tokenizer], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, schema, answers=8, seed=1, texts=()):
        asked = {"schema": schema, "answers": answers, "seed": seed, "texts": texts}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"schema_tool ended with {self.process.wait()} on {json.dumps(schema)}"
        return json.loads(line)

    def end(self):
        self.process.stdin.close()
        assert self.process.wait(60) == 0


@pytest.fixture(scope="module")
def ask(build_folder, tiny_qwen3):
    tool = Tool(build_folder, os.environ.get("SPOT_TEST_TOKENIZER", tiny_qwen3))
    yield tool
    tool.end()


@pytest.fixture(scope="module")
def ask_wide(build_folder, tmp_path_factory):
    """Over 150,000 tokens, as many as Qwen's."""
    folder = tmp_path_factory.mktemp("wide")
    write_tokenizer(folder)
    tool = Tool(build_folder, os.environ.get("SPOT_TEST_TOKENIZER", folder))
    yield tool
    tool.end()


def test_every_answer_is_valid(ask, seed):
    generator = random.Random(seed)
    drawn = kept = 0
    for _ in range(int(os.environ.get("SPOT_SCHEMAS", 150))):
        schema = random_schema(generator)
        jsonschema.Draft202012Validator.check_schema(schema)
        reply = ask(schema, 8, generator.randrange(2**32))
        if "error" in reply:
            assert "may follow" not in reply["error"] and "alike" not in reply["error"], (reply, schema)
            continue
        kept += 1
        for text in reply["answers"]:
            drawn += 1
            try:
                jsonschema.validate(json.loads(text), schema, jsonschema.Draft202012Validator)
            except (ValueError, jsonschema.ValidationError) as error:
                pytest.fail(f"{error}\nanswer: {text}\nschema: {json.dumps(schema)}")
    assert kept > 50 and drawn > 5 * kept, (kept, drawn)


REFUSED = [
    ({"not": {"type": "null"}}, "not"),
    ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    ({"type": "array", "contains": {}}, "contains"),
    ({"type": "object", "patternProperties": {"^a": {}}}, "patternProperties"),
    ({"if": {"type": "null"}, "then": {}}, "if"),
    ({"type": "string", "minLength": 3, "pattern": "a*"}, "pattern"),
    ({"type": "string", "pattern": "(?=a)b"}, "ookahead"),
    ({"type": "string", "pattern": "("}, "compiled"),
    ({"type": "string", "pattern": 'say "no"'}, "quotes"),
    ({"type": "string", "pattern": "é+"}, "ASCII"),
    ({"type": "string", "pattern": "a\\n"}, "pattern"),
    ({"type": "string", "pattern": "a{2,9}{9}b{4}(c{99}){2}"}, "counts"),
    ({"type": "string", "pattern": 'say \\"no\\"'}, "quotes"),
    ({"type": "number", "multipleOf": 0.1}, "multipleOf"),
    ({"type": "integer", "multipleOf": 7, "minimum": 3}, "multipleOf"),
    ({"type": "strnig"}, "type"),
    ({"minLength": 3}, "type"),
    ({"type": "object", "minProperties": 2}, "minProperties"),
    ({"type": "object", "required": ["a"], "minProperties": 2}, "minProperties"),
    ({"type": "integer", "minimum": 5, "maximum": 4}, "compiled"),
    ({"type": "object", "properties": {"a": {"type": "string", "enum": ["a", 1]}}}, "/properties/a"),
    ({"allOf": [{"type": "object"}, {"required": ["a"]}]}, "allOf"),
    ({"anyOf": [{"type": "string"}], "minLength": 3}, "minLength"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
    ({"$ref": "https://example.com/schema"}, "$ref"),
    ({"$ref": "#/$defs/missing"}, "missing"),
    ({"$ref": "#"}, "deeper"),
    ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "itself"),
    ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, "itself"),
    ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "deeper"),
    ({"type": "object", "properties": {}, "required": ["a"], "additionalProperties": False}, "'a'"),
    ({"$defs": {"a": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"}, "deeper"),
    (False, "false"),
    ({"type": "string", "minLength": -1}, "minLength"),
    ({"type": "array", "items": [{}]}, "items"),
]


@pytest.mark.parametrize("schema, word", REFUSED)
def test_what_cannot_be_kept_is_named(ask, schema, word):
    reply = ask(schema)
    assert word in reply.get("error", ""), reply


@pytest.mark.parametrize("schema", [True, {"type": "string"}, {"additionalProperties": True}])
def test_surrogates_come_in_pairs(ask, schema):
    """Alone they are no character, and strict parsers refuse them."""
    right = [r"\ud83d\ude00", r"\uD7FF", r"\ue000x", r"\u00e9\n", "\U0001f600", r"a\uDBFF\uDFFFb", "plain"]
    wrong = [r"\ud83d", r"\ude00", r"\uD83Dx", r"\ud83d\u0041", r"\ud83d\ud83d", r"\uDfff\uD800", r"\ud83d\n"]
    shape = '{{"{}": 1}}' if isinstance(schema, dict) and "type" not in schema else '"{}"'
    reply = ask(schema, 0, texts=[shape.format(text) for text in right + wrong])
    assert reply["may_be"] == [True] * len(right) + [False] * len(wrong), reply


def test_properties_come_in_the_order_of_the_schema(ask, seed):
    names = ["zebra", "apple", "m", "last", "a0"]
    schema = {"type": "object", "properties": {n: {"type": "boolean"} for n in names}, "required": names}
    for text in ask(schema, 10, seed)["answers"]:
        assert list(json.loads(text)) == names


def test_recursion_that_can_end(ask, seed):
    node = {"type": "object", "properties": {"value": {"type": "integer"}, "next": {"$ref": "#/$defs/node"}}}
    schema = {"$defs": {"node": {**node, "required": ["value"]}}, "$ref": "#/$defs/node"}
    answers = ask(schema, 30, seed)["answers"]
    for text in answers:
        jsonschema.validate(json.loads(text), schema)
    assert any("next" in json.loads(text) for text in answers)


def nested(depth):
    schema = {"type": "integer"}
    for i in range(depth):
        schema = {"type": "object", "properties": {f"p{i}": schema}, "required": [f"p{i}"]}
    return schema


def nested_lists(depth):
    schema = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema, "minItems": 2, "maxItems": 90_000}
    return schema


WORDS = [f"word {i} of many" for i in range(2000)]


def tuple_of(schemas):
    return {"type": "array", "prefixItems": list(schemas)}


def pattern(text):
    return {"type": "string", "pattern": text}


def any_of(schemas):
    return {"anyOf": list(schemas)}


def optional(count, **more):
    return {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(count)}, **more}


# Schemas that are made to take time or memory. Each is refused, or compiled within SECONDS of processor time.
HOSTILE = {
    "short values": {"enum": [f"w{i}" for i in range(1500)]},
    "long pattern": {"type": "string", "pattern": "." * 128},
    "values": {"enum": WORDS},
    "more values than allowed": {"enum": [*WORDS, "one"]},
    "long values": {"enum": ["x" * 2000 + str(i) for i in range(30)]},
    "properties": {"type": "object", "properties": {f"property {i}": {"type": "string"} for i in range(128)}},
    "more properties than allowed": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(129)}},
    "required properties": {
        "type": "object", "properties": {f"p{i}": {"type": "number"} for i in range(399)}, "required": [f"p{i}" for i in range(399)],
    },
    "alternatives": {"anyOf": [{"type": "object", "properties": {f"k{i}": {"type": "string", "minLength": i}}} for i in range(400)]},
    "deep": nested(60),
    "repeats": {"type": "string", "minLength": 99_999, "maxLength": 100_000},
    "too many repeats": {"type": "string", "maxLength": 10**9},
    "items": {"type": "array", "items": {"type": "array", "items": {"type": "integer"}, "maxItems": 90_000}, "minItems": 90_000},
    "pattern": {"type": "string", "pattern": "((((a{1,99}){1,99}){1,99}){1,99}){1,99}"},
    "pattern of alternatives": {"type": "string", "pattern": "(a|aa|aaa|b.*c|.{40}){60}"},
    "pattern of classes": {"type": "string", "pattern": "[^a]{1,5000}[^b]{1,5000}[^c]{1,5000}"},
    "patterns": {"type": "array", "prefixItems": [{"type": "string", "pattern": f"(.*{c}.{{30}})+"} for c in "abcd"]},
    "more patterns than allowed": {"type": "array", "prefixItems": [{"type": "string", "pattern": f"{c}.{{31}}"} for c in "abcde"]},
    "references": {
        "$defs": {f"d{i}": {"type": "array", "items": {"anyOf": [{"$ref": f"#/$defs/d{j}"} for j in range(15)] + [{"type": "null"}]}}
                  for i in range(15)},
        "$ref": "#/$defs/d0",
    },
    "ranges": {"type": "array", "prefixItems": [{"type": "integer", "minimum": 10**i + 1, "maximum": 9 * 10**17 + i} for i in range(17)]},
    "open strings": pattern("(.*){60}"),
    "many ways": pattern("([^a]*[^b]*){30}"),
    "alternatives of a pattern": pattern("(.|..|...|....){9}"),
    "e-mail addresses": tuple_of({"type": "string", "format": "email"} for _ in range(390)),
    "addresses": tuple_of({"type": "string", "format": "ipv6"} for _ in range(390)),
    "links": tuple_of({"type": "string", "format": "uri"} for _ in range(390)),
    "lengths": tuple_of({"type": "string", "minLength": i, "maxLength": i + 1} for i in range(1, 30)),
    "long lengths": tuple_of({"type": "string", "minLength": 99_000 + i, "maxLength": 99_990 + i} for i in range(4)),
    "multiples": tuple_of({"type": "integer", "multipleOf": m} for m in range(2, 390)),
    "open and optional": tuple_of(optional(128, additionalProperties={"type": "string"}) for _ in range(3)),
    "counted and optional": optional(128, minProperties=60, maxProperties=90),
    "long name": {"type": "object", "properties": {"x" * 100_000: {}}, "required": ["x" * 100_000]},
    "longer name": {"type": "object", "properties": {"x" * 1_000_000: {}}},
    "names that are required": {"type": "object", "required": [f"{i}" for i in range(25_000)]},
    "the same type often": {"type": ["object"] * 20_000, "required": [f"{i}" for i in range(300)]},
    "lists that begin alike": any_of({"type": "array", "items": {"type": "string"}} for _ in range(190)),
    "objects that begin alike": any_of({"type": "object", "additionalProperties": {}} for _ in range(190)),
    "counts within counts": {"type": "array", "items": nested_lists(40), "minItems": 90_000},
}  # fmt: skip
SECONDS = 10 * SLOWER  # twice what a busy core took


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_schemas_are_refused_or_bounded(ask_wide, name):
    reply = ask_wide(HOSTILE[name], 1)
    print({key: value for key, value in reply.items() if key != "answers"})
    if "error" in reply:
        assert len(reply["error"].split(": behind")[0]) < 400 and "\n" not in reply["error"].split(": behind")[0]
    else:
        assert reply["seconds"] < SECONDS and reply["slowest"] < SECONDS / 10, reply


def test_too_much_work_is_refused_and_remembered(ask_wide):
    first, second = (ask_wide(HOSTILE["open strings"]) for _ in range(2))
    assert "too much work" in first["error"] and second["error"] == first["error"]
    assert first["seconds"] < 2 * SECONDS and second["seconds"] < 0.1 * SECONDS, (first, second)
