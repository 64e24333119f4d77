"""A Space that chats with a published model."""

from pathlib import Path

from huggingface_hub import SpaceCardData

from dataset_builders.cards import sign_card
from hub_cards.cards import CardError, check_card, check_code, render, render_card, sign_code


PYTHON, SDK = "3.11", "6.20.0"
REQUIREMENTS = "stickerconv[chat] @ git+https://github.com/stickerconv/stickerconv\n"


def write_space(folder: Path, model: str, stickers: str = "openmoji", variant: str = "ret") -> None:
    """
    Write a Space's files: `app.py`, `requirements.txt` and its card.

    Args:
        folder (`Path`): Where; made if needed.
        model (`str`): Hub id of the model that it chats with.
        stickers (`str`, *optional*, defaults to `"openmoji"`): Name or Hub id of the pack.
        variant (`str`, *optional*, defaults to `"ret"`): Which variant is chosen at first.

    Raises:
        CardError: If somebody wrote a file that is there, or no folder can be.

    """
    values = {"model": model, "stickers": stickers, "variant": variant}
    code = {"app.py": render("space_app.py.jinja", **values), "requirements.txt": REQUIREMENTS}
    check_card(folder)
    for name in code:
        check_code(folder / name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CardError(f"{folder}: {error.strerror}; expected a folder to write.") from None
    title = f"Chat with {model.rpartition('/')[2]}"
    data = SpaceCardData(
        title=title,
        sdk="gradio",
        sdk_version=SDK,
        python_version=PYTHON,  # the Hub's default is older than this package wants
        app_file="app.py",
        license="apache-2.0",
        models=[model],
        tags=["pegs", "stickers"],
    )
    for name, text in code.items():
        (folder / name).write_text(sign_code(text), "utf-8")
    card = render_card("space_card", front_matter=data.to_yaml(), title=title, **values)
    (folder / "README.md").write_text(sign_card(card), "utf-8")
