"""Set-up work done once, so that the first chat opens fast: the language model's weights, the pack, its vectors."""

import logging

from pegs.quiet import quiet_libraries


def main() -> None:
    """Fill the cache; every part is skipped if it is there already."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    quiet_libraries()
    from pegs.assemble import load_pipeline
    from pegs.places import DEFAULT_MODEL

    if (DEFAULT_MODEL / "config.json").is_file():
        load_pipeline()


if __name__ == "__main__":
    main()
