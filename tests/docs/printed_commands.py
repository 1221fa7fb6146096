"""Every command that the project prints: in documents, comments, docstrings, help and messages.

Conventions that make a printed command something a test can run:

- Markdown: a command stands in a ```bash block, one a line (a backslash continues it), or in `inline code`. A synopsis
  with optional parts is in a table or a ```text block.
- Python and YAML: a command begins a line, or stands in backticks, or ends its message. In a synopsis, [optional] parts
  are left out and A|B stands for A.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = (
    r"(?:accelerate launch|torchrun (?=-)|tensorboard --|mkdocs |pytest(?= |$)|bash \.ci/run|pip install|"
    r"sapiens-accel (?=[a-z])|python (?:-m sapiens_accel|train\.py|eval\.py|benchmarks/|docs/))"
)
# Where a command in the middle of a sentence ends.
END = re.compile(r"`|\n|;|\)|, |: |  | - |$")


@dataclass(frozen=True)
class Printed:
    """A command as it is printed, and where."""

    file: str
    line: int
    text: str

    @property
    def name(self) -> str:
        return f"{self.file}:{self.line}"


def collect() -> list[Printed]:
    """All of them, in the order of files and lines."""
    documents = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
    documents += sorted((REPOSITORY / "sapiens_accel").rglob("*.md*")) + sorted(
        REPOSITORY.rglob("sapiens_accel/**/*.j2")
    )
    commented = [
        path
        for pattern in ("sapiens_accel/recipes/*.yaml", "accelerate_configs/*.yaml")
        for path in sorted(REPOSITORY.glob(pattern))
    ]
    python = [REPOSITORY / "train.py", REPOSITORY / "eval.py"]
    python += [
        path
        for folder in ("sapiens_accel", "benchmarks", "docs")
        for path in sorted((REPOSITORY / folder).rglob("*.py"))
    ]
    return [
        *(command for path in documents for command in of_markdown(path)),
        *(command for path in commented for command in of_comments(path)),
        *(command for path in python for command in of_python(path)),
    ]


def of_markdown(path: Path) -> Iterator[Printed]:
    """The lines of ```bash blocks, and inline code that begins with a program of ours."""
    language, lines = None, path.read_text().splitlines()
    number = 0
    while number < len(lines):
        line, first = lines[number], number + 1
        number += 1
        if line.lstrip().startswith("```"):
            language = None if language is not None else line.strip().strip("`")
        elif language == "bash":
            while line.endswith("\\"):
                line, number = line[:-1].rstrip() + " " + lines[number].strip(), number + 1
            if text := re.sub(r"\s+#\s.*", "", line).strip():
                yield Printed(_relative(path), first, text)
        elif language is None:
            for code in re.findall(rf"`({PROGRAM}[^`]*)`", line):
                yield Printed(_relative(path), first, code.strip())


def of_comments(path: Path) -> Iterator[Printed]:
    """YAML comments that begin with a program."""
    text = re.sub(r"\\\n#\s*", "", path.read_text())
    for match in re.finditer(rf"^#\s+({PROGRAM}.*)$", text, re.MULTILINE):
        line = (
            path.read_text().splitlines().index(next(x for x in path.read_text().splitlines() if match[1][:40] in x))
            + 1
        )
        yield Printed(_relative(path), line, match[1].strip())


def of_python(path: Path) -> Iterator[Printed]:
    """Commands in string literals; what an f-string fills in is {}."""
    tree = ast.parse(path.read_text())
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    # The name that a parser prints in its usage is no command; nor is what code looks for in other text.
    inside |= {
        id(word.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        for word in node.keywords
        if word.arg == "prog"
    }
    for node in ast.walk(tree):
        if id(node) in inside:
            continue
        if isinstance(node, ast.JoinedStr):
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
        else:
            continue
        for offset, command in _of_text(text):
            yield Printed(_relative(path), node.lineno + text[:offset].count("\n"), command)


def _of_text(text: str) -> Iterator[tuple[int, str]]:
    joined = re.sub(r"\\\n\s*", " ", text)
    # A synopsis may go on in lines that are indented and begin with an option.
    joined = re.sub(r"\n\s+(?=\[?--)", " ", joined)
    for match in re.finditer(rf"(?<![\w/-]){PROGRAM}", joined):
        rest = joined[match.start() :]
        command = rest[: END.search(_masked(rest)).start()].strip().rstrip(".,")  # type: ignore[union-attr]
        yield min(match.start(), len(text)), without_options(command)


def _masked(text: str) -> str:
    """The same length, with [optional parts] that hide what would end the command."""
    return re.sub(r"\[[^\[\]]*\]", lambda match: "_" * len(match[0]), text)


def without_options(synopsis: str) -> str:
    """The shortest form of a synopsis: no [optional parts], the first of A|B."""
    plain = synopsis
    while True:
        shorter = re.sub(r"(?:(?<=\s)|^)\[(?!\d)[^\[\]]*\]", "", plain)
        if shorter == plain:
            break
        plain = shorter
    words = [re.sub(r"^([\w./-]+)(\|[\w./-]+)+$", r"\1", word) for word in plain.split(" ") if word]
    return " ".join(words)


def _relative(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


if __name__ == "__main__":
    for command in collect():
        print(f"{command.name}: {command.text}")
