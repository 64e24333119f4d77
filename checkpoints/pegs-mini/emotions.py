"""An emotion slider on prompt embeddings: what an emotion's name does to the states of a caption "X, emotion", measured once."""

from collections.abc import Callable, Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config


PLACES = 4  # of a caption's states: the thing itself, the comma, the emotion's name, the end mark
TAIL = PLACES - 1


class EmotionStates(ModelMixin, ConfigMixin):
    """
    Mean states of captions "X, emotion" at four places (the thing, the comma, the emotion, the end mark) for each emotion.

    Captions end at different positions, so the places count from the end. A caption's emotion is changed by the difference of two emotions' means.

    Args:
        emotions (`list[str]`): Names, `"neutral"` among them.
        dim (`int`): Size D of a state.

    """

    config_name = "config.json"

    @register_to_config
    def __init__(self, emotions: list[str], dim: int) -> None:
        super().__init__()
        self.means = torch.nn.Parameter(torch.zeros(len(emotions), PLACES, dim), requires_grad=False)

    @classmethod
    def measure(
        cls, encode: Callable[[list[str]], torch.Tensor], things: Sequence[str], emotions: Sequence[str]
    ) -> "EmotionStates":
        """
        Measure what each emotion's name does to captions.

        Args:
            encode (`Callable`): From captions to states `(B, L, D)` that are zero after a caption's end.
            things (`Sequence[str]`): What captions are about, without an emotion, e.g. `"grinning face"`; some dozens are enough.
            emotions (`Sequence[str]`): Names, `"neutral"` among them.

        Returns:
            [`EmotionStates`].

        """
        means = [_mean_places(encode([f"{thing}, {emotion}" for thing in things])) for emotion in emotions]
        states = cls(list(emotions), means[0].shape[-1])
        states.means.data.copy_(torch.stack(means))
        return states

    def index(self, emotion: str) -> int:
        """
        Number of an emotion.

        Raises:
            ValueError: If there is none of this name.

        """
        if emotion not in self.config.emotions:
            raise ValueError(f"`emotion` must be one of {', '.join(self.config.emotions)}, got {emotion!r}.")
        return list(self.config.emotions).index(emotion)

    def recognise(self, prompt_embeds: torch.Tensor) -> list[str]:
        """The emotion that each of `prompt_embeds` `(B, L, D)` names: the one whose mean is nearest to the state in its place."""
        places = torch.stack(
            [states[end - 2] for states, end in zip(prompt_embeds, _ends(prompt_embeds), strict=True)]
        )
        nearest = torch.cdist(places.float(), self.means[:, 2].to(places.device).float()).argmin(dim=1)
        return [self.config.emotions[i] for i in nearest.tolist()]

    def shift(self, prompt_embeds: torch.Tensor, emotion: str, scale: float) -> torch.Tensor:
        """
        Give captions another emotion, or more or less of their own.

        Args:
            prompt_embeds (`torch.Tensor` of shape `(B, L, D)`): States of captions "X, some emotion", as of PEGS' mapper.
            emotion (`str`): The emotion wanted.
            scale (`float`): 0 makes the captions neutral, 1 names the emotion, more than 1 exaggerates it.

        Returns:
            `torch.Tensor` of shape `(B, L, D)`.

        Raises:
            ValueError: If the emotion is unknown.

        """
        from_neutral = (self.means - self.means[self.index("neutral")]).to(prompt_embeds)
        wanted = scale * from_neutral[self.index(emotion)]
        shifted = prompt_embeds.clone()
        for row, (own, end) in enumerate(zip(self.recognise(prompt_embeds), _ends(prompt_embeds), strict=True)):
            change = wanted - from_neutral[self.index(own)]
            shifted[row, : end - TAIL] += change[0]
            shifted[row, end - TAIL : end] += change[1:]
        return shifted


def _ends(states: torch.Tensor) -> list[int]:
    """Number of states of each caption `(B, L, D)`; after its end they are zero, or near it where a mapper made them."""
    norms = states.float().norm(dim=-1)
    counts = (norms > 0.4 * norms.amax(dim=-1, keepdim=True)).sum(dim=-1)
    return [max(count, PLACES) for count in counts.tolist()]


def _mean_places(states: torch.Tensor) -> torch.Tensor:
    """Means `(4, D)` at the four places of captions `(B, L, D)`."""
    ends = _ends(states)
    thing = torch.cat([caption[: end - TAIL] for caption, end in zip(states, ends, strict=True)]).mean(dim=0)
    tail = torch.stack([caption[end - TAIL : end] for caption, end in zip(states, ends, strict=True)]).mean(dim=0)
    return torch.cat([thing.unsqueeze(0), tail])


__all__ = ["EmotionStates"]
