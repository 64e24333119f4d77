"""Progress bars and warnings of the libraries, off: a command's output is its own."""

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Silence loading bars, and warnings that a user can do nothing about. Call before transformers or diffusers is imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)  # what it cannot load it says twice
    warnings.filterwarnings("ignore", message="enable_nested_tensor is True")
    warnings.filterwarnings("ignore", category=FutureWarning)
