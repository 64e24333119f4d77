"""The agents' prompts: one Jinja template a question and language."""

from functools import lru_cache

from jinja2 import Environment, PackageLoader, StrictUndefined, TemplateNotFound


VERSION = "2"  # goes up whenever a template changes; sessions say which one they were written with
LANGUAGES = ("en", "zh")


@lru_cache(maxsize=1)
def environment() -> Environment:
    """The templates; a missing value is an error."""
    return Environment(
        loader=PackageLoader("agent_generation", "prompts"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )


def render(prompt: str, language: str = "en", /, **values: object) -> str:
    """
    A prompt.

    Args:
        prompt (`str`): Which one, `filter_1` for example.
        language (`str`, *optional*, defaults to `"en"`): `en` or `zh`.
        values: What the template shows. It is data: no template syntax in it is read.

    Returns:
        `str`.

    Raises:
        ValueError: If there is no such prompt in that language.

    """
    try:
        return environment().get_template(f"{language}/{prompt}.jinja").render(**values).strip()
    except TemplateNotFound as error:
        raise ValueError(f"no prompt {prompt!r} in language {language!r}") from error


def ask(prompt: str, language: str = "en", /, **values: object) -> dict:
    """A prompt as a user's chat message."""
    return {"role": "user", "content": render(prompt, language, **values)}
