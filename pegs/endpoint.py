"""The endpoint that answers, and what its answers may cost, as command lines say it."""

import json
import math
from dataclasses import dataclass, field
from typing import Any

from agent_generation.engine import Prices
from pegs.errors import InputError


@dataclass(frozen=True)
class Endpoint:
    """
    An OpenAI-compatible endpoint, and within what bounds it is asked.

    Args:
        url (`str`): Address up to and with `/v1`.
        model (`str`): Name of its model.
        concurrency (`int`): Requests in flight at once.
        budget_usd (`float`, *optional*): Hard cap.
        prices ([`Prices`]): For the cost.
        language (`str`): Of the prompts, `"en"` or `"zh"`.
        extra_body (`dict[str, Any]`): Fields for the body of every request.

    """

    url: str
    model: str
    concurrency: int
    budget_usd: float | None
    prices: Prices
    language: str
    extra_body: dict[str, Any] = field(default_factory=dict)


def check_budget(prices: Prices, budget_usd: float | None) -> None:
    """
    Check a cap and the prices that it is counted by.

    Raises:
        InputError: If one is no amount of money, or a cap has no prices.

    """
    named = {"--price-in": prices.prompt, "--price-out": prices.completion, "--budget-usd": budget_usd or 0.0}
    for name, usd in named.items():
        if not 0 <= usd < math.inf:
            raise InputError(f"{name} {usd}: expected US dollars, from 0.")
    if budget_usd is not None and not (prices.prompt and prices.completion):
        raise InputError("--budget-usd needs --price-in and --price-out to count by.")


def parse_extra_body(text: str) -> dict[str, Any]:
    """
    Fields for the body of every request, as a JSON object.

    Raises:
        InputError: If it is none.

    """
    try:
        fields = json.loads(text or "{}")
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"--extra-body: not JSON ({error}).") from None
    if not isinstance(fields, dict):
        raise InputError("--extra-body: expected a JSON object.")
    return fields
