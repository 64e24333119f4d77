"""What the model has read of conversations, kept for their next turn."""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

from modeling_pegs import PegsCache, PegsModel


MISSING: Any = object()
MOST_CACHES = 8  # about 25 MB each at the mini scale


class ConversationCaches:
    """
    Caches of the last few conversations; what is read of one is never used for two replies at once.

    Args:
        model ([`PegsModel`]): Whose they are.

    """

    def __init__(self, model: PegsModel) -> None:
        self.model = model
        self._caches: OrderedDict[Hashable, PegsCache | None] = OrderedDict()

    def take(self, key: Hashable) -> PegsCache | None:
        """The cache that was kept under `key`, which is not there any more, or a new one; `None` where the model keeps none."""
        cache = self._caches.pop(key, MISSING)
        return self.model.new_cache() if cache is MISSING else cache

    def keep(self, key: Hashable, cache: PegsCache | None) -> None:
        """Keep a cache for the conversation's next turn."""
        self._caches[key] = cache
        while len(self._caches) > MOST_CACHES:
            self._caches.popitem(last=False)

    def forget(self, key: Hashable) -> None:
        """Drop what was read of a conversation."""
        self._caches.pop(key, None)
