"""Text from files in a model card: names and numbers as they are, and nothing that Markdown or HTML would act on."""

import re
import string

from sapiens_accel.errors import escape

# Words joined by single marks that mean nothing within a word: nearly every name. They stand as they are.
PLAIN = re.compile(r"[^\W_]+([ _./-][^\W_]+)*")
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)


def literal(text: object) -> str:
    """Text on one line, of which Markdown, HTML and tables show every letter; within backticks the backslashes too.

    CommonMark: a backslash before any ASCII punctuation makes it literal; GitHub's tables take it before a bar.
    """
    shown = escape(str(text), keep="")
    if PLAIN.fullmatch(shown):
        return shown
    return re.sub(f"[{re.escape(string.punctuation)}]", r"\\\g<0>", shown)


def repository_link(name: str) -> str:
    """A link to a repository of the Hub; the text alone if no repository can have that name."""
    return f"[{name}](https://huggingface.co/{name})" if REPOSITORY.fullmatch(name) else literal(name)
