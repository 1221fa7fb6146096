"""Text from files for a model card, escaped so that Markdown and HTML show it literally."""

import re
import string

from sapiens_accel.errors import escape

# Words joined by single characters without a meaning in Markdown: nearly every name. They need no escape.
PLAIN = re.compile(r"[^\W_]+([ _./-][^\W_]+)*")
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)


def literal(text: object) -> str:
    """Escape text to one line that Markdown, HTML and tables show literally. Not for use within backticks.

    CommonMark: a backslash before any ASCII punctuation makes it literal; GitHub's tables accept it before a bar.
    """
    shown = escape(str(text), keep="")
    if PLAIN.fullmatch(shown):
        return shown
    return re.sub(f"[{re.escape(string.punctuation)}]", r"\\\g<0>", shown)


def repository_link(name: str) -> str:
    """A link to a repository on the Hub; the escaped text alone if it cannot be the name of a repository."""
    return f"[{name}](https://huggingface.co/{name})" if REPOSITORY.fullmatch(name) else literal(name)
