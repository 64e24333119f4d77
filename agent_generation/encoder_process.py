"""A sentence encoder beside the event loop, not in it."""

import multiprocessing
import signal
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from dataset_builders.stickers.encoder import TextEncoder


class EncoderProcess:
    """
    A [`TextEncoder`] with one thread in a process of its own: it computes while this one is busy with Python, and ends with it, however that ends. A script that
    makes one needs its `if __name__ == "__main__":`, since the process imports it.

    Args:
        name (`str`): A sentence-transformers model, as for [`TextEncoder`].
        **options: More arguments of [`TextEncoder`].

    """

    def __init__(self, name: str, **options: Any) -> None:
        self.name = name
        # a fork would hold both ends of the pipe, and never hear that one was closed
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=answer, args=(other, name, options), daemon=True)
        self.process.start()
        other.close()

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """
        Vectors of texts; one caller at a time.

        Returns:
            `np.ndarray` of shape `(len(texts), d)`, float32, unit norm.

        Raises:
            RuntimeError: If the process has ended, or failed; it says why.

        """
        try:
            self.pipe.send(list(texts))
            found = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(1)
            raise RuntimeError(f"the process that embeds texts has ended ({self.process.exitcode})") from None
        except BaseException:
            self.pipe.close()  # the answer still comes, and must not be taken for the next one's
            raise
        if isinstance(found, str):
            raise RuntimeError(found)
        return found

    def close(self) -> None:
        """End the process."""
        self.pipe.close()
        self.process.join()


def answer(pipe: Connection, name: str, options: dict[str, Any]) -> None:
    """Embed what comes through a pipe, until nobody is at its other end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent; when that ends, so does this
    import torch  # seconds

    torch.set_num_threads(1)
    encode = TextEncoder(name, **options)
    while True:
        try:
            texts = pipe.recv()
            try:
                found: np.ndarray | str = encode(texts)
            except Exception as error:
                found = f"{type(error).__name__}: {error}"
            pipe.send(found)
        except (EOFError, OSError):
            return
