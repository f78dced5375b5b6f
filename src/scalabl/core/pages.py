"""What the program's pages have in common: one style sheet, light and dark, in print as well."""

from importlib.resources import files


def page_style() -> str:
    """The style sheet in front of a page's own rules: its colours by name, its letters, texts shaded by their doubt."""
    return files("scalabl.core").joinpath("pages.css").read_text(encoding="utf-8")
