"""Which licences let content be published, and what the Hub calls them."""

from collections.abc import Mapping

from dataset_builders.stickers.export import FREE, LicenceError


HUB_LICENCES = ("cc0-1.0", "cc-by-4.0", "cc-by-3.0", "cc-by-sa-4.0", "cc-by-sa-3.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "mit", "apache-2.0", "unlicense", "pddl", "bsd-2-clause", "bsd-3-clause", "isc", "ofl-1.1", "gpl-2.0", "gpl-3.0", "lgpl-2.1", "lgpl-3.0")  # fmt: skip


def hub_licence(licence: str) -> str:
    """The Hub's name of a licence, `other` if it has none."""
    name = licence.lower().replace(" ", "-")
    return name if name in HUB_LICENCES else "other"


def licence_fields(licences: Mapping[str, str]) -> dict[str, str]:
    """A card's `license`, and `license_name` where the Hub has no name for it or there are several."""
    names = sorted(set(licences.values()))
    found = hub_licence(names[0]) if len(names) == 1 else "other"
    return {"license": found} | ({"license_name": "; ".join(names)} if found == "other" else {})


def require_free(licences: Mapping[str, str], have_rights: bool) -> None:
    """
    Stop unless every licence is a known free one.

    Args:
        licences (`Mapping[str, str]`): Licence of each thing that is covered.
        have_rights (`bool`): Go on although a licence does not say that one may publish.

    Raises:
        LicenceError: Naming the licence and what it covers.

    """
    for what, licence in licences.items():
        if not have_rights and not FREE.match(licence.strip().replace(" ", "-")):
            raise LicenceError(f"the licence of {what} is {licence!r}, which does not say that it may be published")
