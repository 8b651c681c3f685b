"""Random JSON schemas in what the grammar keeps."""

import json

WORDS = ["name", "age", "café", 'quo"te', "back\\slash", "a b", "x", "sub", "π", "new\nline", "", "a/b", "a~b"]
PATTERNS = [
    "^[a-z]{2,4}$",
    "[0-9]+",
    "^(yes|no)$",
    "^a.b$",
    "^.{3,9}$",
    "^\\d{3}-\\d{2}$",
    "^[^a-y]{1,3}$",
    "^\\w+\\s\\D?$",
    "^[^a]{1,120}$",
]
FORMATS = ["date", "time", "date-time", "email", "ipv4", "uuid", "uri", "no-such-format"]


class Maker:
    def __init__(self, random):
        self.random = random
        self.names = [f"D{i}" for i in range(random.choice([0, 0, 1, 3]))]

    def root(self):
        schema = self.schema(3)
        while "type" not in schema and "$ref" in schema:
            schema = self.schema(3)
        if self.names:
            schema["$defs"] = {name: self.schema(2) for name in self.names}
        return schema

    def value(self, depth=1):
        kinds = [None, True, False, 0, -7, 123456789, 0.5, -1e-3, "", "text", 'π"\\\n', "\U0001f600"]
        if depth and self.random.random() < 0.3:
            if self.random.random() < 0.5:
                return [self.value(depth - 1) for _ in range(self.random.randrange(3))]
            return {self.random.choice(WORDS): self.value(depth - 1) for _ in range(self.random.randrange(3))}
        return self.random.choice(kinds)

    def schema(self, depth):
        r = self.random
        if self.names and r.random() < 0.15:
            return {"$ref": "#/$defs/" + r.choice(self.names)}
        kinds = ["integer", "number", "string", "boolean", "null", "const", "enum", "any", "types"]
        if depth:
            kinds += ["object"] * 5 + ["array"] * 3 + ["anyOf", "oneOf", "allOf"]
        kind = r.choice(kinds)
        made = getattr(self, "make_" + kind)(depth)
        if r.random() < 0.2:
            made.update(title="Title", description='of "it"', default=None, **{"x-unknown": {"not": {}}})
        return made

    def bounds(self, low, high, number):
        r, made = self.random, {}
        if r.random() < 0.4:
            made[r.choice(["minimum", "exclusiveMinimum"])] = number(low)
        if r.random() < 0.4:
            made[r.choice(["maximum", "exclusiveMaximum"])] = number(high)
        return made

    def make_integer(self, depth):
        r = self.random
        if r.random() < 0.15:
            return {"type": "integer", "multipleOf": r.randrange(1, 60)}
        low = r.randrange(-2000, 2000)
        number = lambda x: x
        return {"type": "integer", **self.bounds(low, low + r.choice([2, 5, 1000, 10**9]), number)}

    def make_number(self, depth):
        r = self.random
        low = r.choice([r.uniform(-5, 5), r.uniform(-1e5, 1e5), float(r.randrange(-50, 50))])
        number = lambda x: r.choice([x, round(x, 2), round(x)])
        return {"type": "number", **self.bounds(low, low + r.choice([3.0, 17.25, 1e6]), number)}

    def make_string(self, depth):
        r, made = self.random, {"type": "string"}
        kind = r.random()
        if kind < 0.2:
            made["pattern"] = r.choice(PATTERNS)
        elif kind < 0.4:
            made["format"] = r.choice(FORMATS)
        elif kind < 0.7:
            least = r.randrange(6)
            if r.random() < 0.7:
                made["minLength"] = least
            if r.random() < 0.7:
                made["maxLength"] = least + r.choice([0, 1, 5, 200])
        return made

    def make_boolean(self, depth):
        return {"type": "boolean"}

    def make_null(self, depth):
        return {"type": "null"}

    def make_any(self, depth):
        return {}

    def make_const(self, depth):
        return {"const": self.value()}

    def make_enum(self, depth):
        return {"enum": [self.value() for _ in range(self.random.randrange(1, 5))]}

    def make_types(self, depth):
        made = {"type": self.random.sample(["null", "boolean", "integer", "string"], self.random.randrange(1, 4))}
        if self.random.random() < 0.5:
            made["minLength"] = 2
        return made

    def make_array(self, depth):
        r, made = self.random, {"type": "array"}
        if r.random() < 0.3:
            made["prefixItems"] = [self.schema(depth - 1) for _ in range(r.randrange(1, 4))]
            if r.random() < 0.6:
                made["items"] = r.choice([False, self.schema(depth - 1)])
        elif r.random() < 0.9:
            made["items"] = self.schema(depth - 1)
        least = r.randrange(4)
        if r.random() < 0.4:
            made["minItems"] = least
        if r.random() < 0.4:
            made["maxItems"] = least + r.randrange(4)
        return made

    def make_object(self, depth):
        r, made = self.random, {"type": "object"}
        names = r.sample(WORDS, r.randrange(5))
        if names or r.random() < 0.5:
            made["properties"] = {name: self.schema(depth - 1) for name in names}
            made["required"] = [name for name in names if r.random() < 0.6]
        if r.random() < 0.3:
            made["additionalProperties"] = r.choice([True, False, self.schema(depth - 1)])
        if r.random() < 0.1:
            made["minProperties"] = r.randrange(3)
        if r.random() < 0.1:
            made["maxProperties"] = len(made.get("required", [])) + r.randrange(3)
        return made

    def make_anyOf(self, depth):
        return {"anyOf": [self.schema(depth - 1) for _ in range(self.random.randrange(1, 4))]}

    def make_allOf(self, depth):
        return {"allOf": [self.schema(depth - 1)]}

    def make_oneOf(self, depth):
        if self.random.random() < 0.3:
            return {"oneOf": [{"type": "string"}, {"type": "null"}, self.make_number(depth)]}
        tag = self.random.choice(WORDS)
        options = []
        for i in range(self.random.randrange(1, 4)):
            option = self.make_object(depth)
            option.setdefault("properties", {})[tag] = {"const": f"kind {i}"}
            option["required"] = [*dict.fromkeys([*option.get("required", []), tag])]
            option.pop("maxProperties", None)
            options.append(option)
        return {"oneOf": options}


def random_schema(random):
    """One that can be written as JSON; not always one that some value fulfils."""
    return json.loads(json.dumps(Maker(random).root()))
