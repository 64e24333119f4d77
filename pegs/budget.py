"""What an endpoint's answers may cost, as command lines say it."""

import math

from agent_generation.engine import Prices
from pegs.errors import InputError


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
