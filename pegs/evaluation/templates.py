"""The evaluation's Jinja templates: the judge's prompts as plain text, pages and reports as escaped HTML."""

from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined


@cache
def environment(folder: str, autoescape: bool) -> Environment:
    """The templates of a folder beside this file; a missing value is an error."""
    return Environment(
        loader=PackageLoader("pegs.evaluation", folder),
        undefined=StrictUndefined,
        autoescape=autoescape,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render_prompt(name: str, language: str, **values: object) -> str:
    """A prompt of the judge in a language (`en` or `zh`); values are data, no template syntax in them is read."""
    return environment("prompts", False).get_template(f"{language}/{name}.jinja").render(**values).strip()


def render_page(name: str, **values: object) -> str:
    """An HTML page; every value is escaped."""
    return environment("templates", True).get_template(f"{name}.html.jinja").render(**values)
