"""What the site takes from elsewhere in the repository, so that nothing is written twice.

Whole files become pages: checkpoints/ with its cards, notebooks (without outputs), CONTRIBUTING.md, CHANGELOG.md. In pages of docs/,

    <!-- readme: HEADING -->     is that section of README.md, without its heading; without HEADING, what comes before the first section
    <!-- help: MODULE -->        is the help of a module's command and of its subcommands
    <!-- docstring: MODULE -->   is a module's docstring, as it is

Relative links are those of the file that a text comes from.
"""

import contextlib
import importlib
import inspect
import json
import logging
import os
import pathlib
import re

import griffe
from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).resolve().parent.parent
log = logging.getLogger("mkdocs.hooks")

PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "checkpoints/README.md": "zoo/index.md", "README.md": "index.md"}
CARDS = sorted(path.parent.name for path in (ROOT / "checkpoints").glob("*/config.json"))
PAGES.update({f"checkpoints/{name}/README.md": f"zoo/{name}/index.md" for name in CARDS})
PAGES.update({f"checkpoints/{name}/curve.png": f"zoo/{name}/curve.png" for name in CARDS})
PAGES.update({f"notebooks/{path.name}": f"notebooks/{path.stem}.md" for path in sorted((ROOT / "notebooks").glob("*.ipynb"))})


def read(path):
    return (ROOT / path).read_text(encoding="utf-8")


def on_config(config):
    for entry in config.nav:
        if "Model zoo" in entry:
            entry["Model zoo"] += [{name: PAGES[f"checkpoints/{name}/README.md"]} for name in CARDS]
    return config


def on_files(files, config):
    for source, uri in PAGES.items():
        if source == "README.md":
            continue
        if uri.endswith(".md"):
            text = notebook(source) if source.endswith(".ipynb") else read(source)
            files.append(File.generated(config, uri, content=relink(text, source, uri)))
        else:
            files.append(File.generated(config, uri, abs_src_path=str(ROOT / source)))
    return files


def relink(text, source, uri):
    """The text of a file of the repository with its relative links as they must be in the page `uri`; plain text where the site lacks the target."""

    def link(match):
        label, target, anchor = match[1], match[2], match[3] or ""
        path = os.path.normpath(os.path.join(os.path.dirname(source), target))
        if path in PAGES or path.startswith("docs/"):
            return f"[{label}]({os.path.relpath(PAGES.get(path, path[5:]), os.path.dirname(uri) or '.')}{anchor})"
        if not (ROOT / path).exists():
            log.warning(f"{source}: links to {target}, which does not exist")
        return label

    return re.sub(r"\[([^\]\[]*)\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)", link, text)


def notebook(path):
    """A notebook's text and code."""
    parts = []
    for cell in json.loads(read(path))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
    parts.append(f"This is `{path}`, without its outputs; `make notebooks` runs all of them.\n")
    return "\n\n".join(parts)


def readme(heading):
    sections = re.split(r"^## (.+)\n", read("README.md"), flags=re.M)
    if not heading:
        return sections[0].partition("\n")[2]
    return sections[sections.index(heading) + 1]


def command_help(module):
    """Help texts, each in a block of code."""
    os.environ["COLUMNS"] = "100"
    with contextlib.suppress(ModuleNotFoundError):
        importlib.import_module("goconv_tf.commands").quiet_tensorflow()
    loaded = importlib.import_module(module)
    if not hasattr(loaded, "make_parser"):
        from absl import flags

        return f"```text\n{inspect.getdoc(loaded)}\n\nflags:\n{flags.FLAGS.module_help(module).rstrip()}\n```"
    parser = loaded.make_parser()
    commands = next(action for action in parser._actions if hasattr(action, "choices") and isinstance(action.choices, dict))
    shown = [f"```text\n{parser.format_help().rstrip()}\n```"]
    for name, sub in commands.choices.items():
        shown.append(f"### {name} {{ #{module.split('.')[-1].strip('_')}-{name} }}\n\n```text\n{sub.format_help().rstrip()}\n```")
    return "\n\n".join(shown)


def on_page_markdown(markdown, page, **_):
    def put(match):
        kind, argument = match[1], match[2].strip()
        if kind == "readme":
            return relink(readme(argument), "README.md", page.file.src_uri)
        if kind == "docstring":
            return f"```text\n{inspect.getdoc(importlib.import_module(argument))}\n```"
        return command_help(argument)

    if not page.file.generated_by:
        markdown = relink(markdown, f"docs/{page.file.src_uri}", page.file.src_uri)
    return re.sub(r"^<!-- (readme|help|docstring):(.*) -->$", put, markdown, flags=re.M)


class RuntimeDocstrings(griffe.Extension):
    """Docstrings of classes that are put together when the module is imported."""

    def on_class_members(self, *, cls, **_):
        if cls.docstring is None and "__doc__" in cls.members:
            text = inspect.getdoc(getattr(importlib.import_module(cls.module.path), cls.name))
            cls.docstring = griffe.Docstring(text, parent=cls)
            del cls.members["__doc__"]
