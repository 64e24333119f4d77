"""The sentence encoder that a command names."""

from dataset_builders.stickers.encoder import TextEncoder
from pegs.errors import InputError


def load_encoder(name: str) -> TextEncoder:
    """
    The sentence encoder, loaded.

    Raises:
        InputError: If there is none of that name.

    """
    encoder = TextEncoder(name)
    try:
        _ = encoder.model
    except (OSError, ValueError) as error:
        raise InputError(f"--encoder {name}: {str(error).splitlines()[0]}") from error
    return encoder
