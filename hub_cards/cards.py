"""Cards: a Jinja template filled with a run's own numbers."""

from importlib import resources

from jinja2 import Environment, StrictUndefined


def render_card(name: str, **values: object) -> str:
    """
    Fill a card's template.

    Args:
        name (`str`): Template of this folder without `.md.jinja`, e.g. `model_card`.
        **values: What the template asks for.

    Returns:
        `str`: Markdown with a YAML front matter.

    Raises:
        jinja2.UndefinedError: If a value is missing.

    """
    source = resources.files("hub_cards").joinpath(f"{name}.md.jinja").read_text("utf-8")
    environment = Environment(
        undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source).render(**values)
