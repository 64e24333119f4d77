"""A writer that is no model: answers of the right form and usual length, made of random words. For estimates before a run, and for load tests."""

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from agent_generation.engine import seed_of
from agent_generation.llm import Reply, Request, schema_of


SYLLABLES = (
    "ba",
    "do",
    "fi",
    "ga",
    "hu",
    "ke",
    "lo",
    "mi",
    "na",
    "po",
    "ri",
    "su",
    "ta",
    "vo",
    "we",
    "yu",
    "zen",
    "kor",
)
AGREEABLE: Mapping[str, Any] = {"consistent": "yes", "ended": "no"}


def count_tokens(text: str) -> int:
    """About how many tokens a text has: four ASCII characters make one, any other character is one."""
    plain = len(text.encode("ascii", "ignore"))
    return -(-plain // 4) + len(text) - plain


@dataclass(frozen=True)
class DryLLM:
    """
    Answers at once, the same to the same request and seed.

    Args:
        fixed (`Mapping[str, Any]`, *optional*): Answers to fields by name, instead of random ones.

    """

    fixed: Mapping[str, Any] = field(default_factory=lambda: AGREEABLE)

    def most_tokens(self, role: str) -> int:
        """Longest answer to a role, in tokens."""
        return 200

    async def close(self) -> None:
        """Nothing to let go of."""

    async def ask(self, request: Request, seed: int) -> Reply:
        """Answer one request; see [`LLM`]."""
        rng = random.Random(seed_of(f"{request.digest}/{seed}"))
        if request.answer is None:
            text = words(rng, 18)
        else:
            schema = schema_of(request.answer)
            text = json.dumps(self._fill(schema, schema.get("$defs", {}), rng))
        asked = sum(count_tokens(str(message["content"])) + 4 for message in request.messages)
        return Reply(text, "dry", asked, count_tokens(text))

    def _fill(self, schema: dict, definitions: dict, rng: random.Random, name: str = "") -> Any:
        if name in self.fixed:
            return self.fixed[name]
        if "$ref" in schema:
            return self._fill(definitions[schema["$ref"].rsplit("/", 1)[-1]], definitions, rng, name)
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return rng.choice(schema["enum"])
        if schema["type"] == "object":
            return {key: self._fill(value, definitions, rng, key) for key, value in schema["properties"].items()}
        if schema["type"] == "array":
            count = schema.get("minItems", 1)
            return [self._fill(schema["items"], definitions, rng) for _ in range(count)]
        return words(rng, 40 if schema.get("maxLength", 0) > 500 else 10)


def words(rng: random.Random, count: int) -> str:
    """A line of made-up words."""
    return " ".join("".join(rng.choices(SYLLABLES, k=rng.randint(1, 3))) for _ in range(count)).capitalize() + "."
