"""Cards: a Jinja template filled with a run's own numbers."""

import hashlib
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dataset_builders.cards import somebodys_card


MARK = "\n# made by pegs; rewritten as long as nobody changes it: "


class CardError(ValueError):
    """A file that somebody wrote, where a card or a Space is to be made."""


def check_card(folder: Path) -> None:
    """
    Stop if somebody wrote a folder's card.

    Raises:
        CardError: Naming it.

    """
    if somebodys_card(folder) is not None:
        raise CardError(f"{folder / 'README.md'}: somebody wrote this card; move it away to have one made.")


def sign_code(text: str) -> str:
    """Code with its own digest in a comment at the end; see [`sign_card`]."""
    text = text.rstrip()
    return f"{text}{MARK}{hashlib.sha256(text.encode()).hexdigest()}\n"


def check_code(file: Path) -> None:
    """
    Stop if somebody wrote a file of code, or changed it.

    Raises:
        CardError: Naming it.

    """
    if file.is_file() and (text := file.read_text("utf-8")) != sign_code(text.rpartition(MARK)[0]):
        raise CardError(f"{file}: somebody wrote this file; move it away to have one made.")


def render_card(name: str, /, **values: object) -> str:
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
    return render(f"{name}.md.jinja", **values)


def render(template: str, /, **values: object) -> str:
    """Fill a template of this folder; raises like [`render_card`]."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def size_category(count: int) -> str:
    """The Hub's word for how many rows a dataset has."""
    bounds = ((1e3, "n<1K"), (1e4, "1K<n<10K"), (1e5, "10K<n<100K"), (1e6, "100K<n<1M"), (float("inf"), "1M<n<10M"))
    return next(name for most, name in bounds if count < most)
