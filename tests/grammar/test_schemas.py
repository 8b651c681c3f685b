"""Answers drawn at random under random schemas, by Python's jsonschema; schemas that cannot be kept; hostile ones."""

import json
import os
import random
import subprocess

import jsonschema
import pytest

from random_schemas import random_schema


@pytest.fixture(scope="module")
def ask(build_folder, tiny_qwen3):
    """schema, answers, seed -> schema_tool's reply."""
    tool = build_folder / "tests" / "grammar" / "schema_tool"
    if not tool.is_file():
        pytest.skip("built without xgrammar")
    model = os.environ.get("SPOT_TEST_TOKENIZER", tiny_qwen3)
    process = subprocess.Popen([tool, model], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def one(schema, answers=8, seed=1):
        process.stdin.write(json.dumps({"schema": schema, "answers": answers, "seed": seed}) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        assert line, f"schema_tool ended with {process.wait()} on {json.dumps(schema)}"
        return json.loads(line)

    yield one
    process.stdin.close()
    assert process.wait(60) == 0


def test_every_answer_is_valid(ask, seed):
    generator = random.Random(seed)
    drawn = kept = 0
    for _ in range(int(os.environ.get("SPOT_SCHEMAS", 150))):
        schema = random_schema(generator)
        jsonschema.Draft202012Validator.check_schema(schema)
        reply = ask(schema, 8, generator.randrange(2**32))
        if "error" in reply:
            assert "no token may follow" not in reply["error"], (reply, schema)
            continue
        kept += 1
        for text in reply["answers"]:
            drawn += 1
            try:
                jsonschema.validate(json.loads(text), schema, jsonschema.Draft202012Validator)
            except (ValueError, jsonschema.ValidationError) as error:
                pytest.fail(f"{error}\nanswer: {text}\nschema: {json.dumps(schema)}")
    assert kept > 50 and drawn > 5 * kept, (kept, drawn)
