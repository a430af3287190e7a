"""A hook of MkDocs for the reference site (`make docs`): the pages that are not in docs/, and the links between all.

README.md, CONTRIBUTING.md and CHANGELOG.md become pages, and every package that users import gets one of its
docstrings. A link to a file of the repository that is on no page becomes its text.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}

# The public names of each package, by the module that defines them ("" is the package).
API = {
    "charlm": {"_train": "train", "_load": "load", "patching": "patch_model patch_torch", "_errors": "UserError"}
    | {"_synchronize": "synchronize", "_info": "build_info"},
    "charlm.functional": {
        **dict.fromkeys(("cross_entropy", "linear_cross_entropy", "embedding", "embedding_linear")),
        **dict.fromkeys(("entropy", "surprisal", "kl_div", "kl_divergence")),
        "outputs": "CrossEntropyOutput EmbeddingLinearOutput",
    },
    "charlm.nn": {"": "CrossEntropyLoss LinearCrossEntropyLoss Embedding EmbeddingLinear KLDivLoss"},
    "charlm.information": {
        "": "entropy cross_entropy kl_divergence js_divergence mutual_information perplexity conditional_entropies "
        "conditional_entropy"
    },
    "charlm.ngrams": {"": "count_ngrams count_spectra as_tokens NgramLevel Spectrum"},
    "charlm.distributed": {"vocab_parallel": "vocab_parallel_cross_entropy vocab_parallel_linear_cross_entropy"},
    "charlm.lm": {
        "data": "build_corpus read_corpus",
        "corpus": "Corpus",
        "vocabulary": "Vocabulary",
        "config": "Config",
        "models": "build_model LanguageModel MLP WaveNet GPT NGram",
        "examples": "Examples Sequences",
        "optimizer": "build_optimizer learning_rate_at",
        "train": "Trainer",
        "run": "Run History",
        "evaluate": "predictions evaluate_on surprisals baselines Evaluation",
        "sample": "SamplingOptions",
        "checkpoint": "Checkpoint",
        "character_model": "CharacterModel",
    },
    "charlm.reference": {},  # the signatures and docstrings are those of charlm.functional
}


def names(package: str) -> list[str]:
    """The full name of each; a module without names defines the function of its own name."""
    modules = API[package].items()
    return [".".join(filter(None, (package, module, n))) for module, ns in modules for n in (ns or module).split()]


def reference(package: str) -> str:
    """The page of a package, in Markdown for mkdocstrings."""
    whole = f"::: {package}\n    options: {{members: false, show_root_heading: false, show_root_toc_entry: false}}\n"
    return "\n".join([f"# {package}\n", whole, *(f"::: {name}\n" for name in names(package))])


def on_files(files: Files, config: MkDocsConfig) -> Files:
    from mkdocs.structure.files import File

    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for package in API:
        files.append(File.generated(config, f"reference/{package}.md", content=reference(package)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    uri = page.file.src_uri
    source = next((ROOT / source for source, page in PAGES.items() if page == uri), ROOT / "docs" / uri)

    def link(found: re.Match[str]) -> str:
        text, target, anchor = found.groups()
        path = os.path.relpath(source.parent / target, ROOT)
        if not target or not (ROOT / path).exists():  # of the same page, of another host, or code such as a[0](b)
            return found[0]
        on_site = PAGES.get(path, path.removeprefix("docs/"))
        if on_site not in files.src_uris:
            return text
        return f"[{text}]({os.path.relpath(on_site, os.path.dirname(uri) or '.')}{anchor or ''})"

    markdown = markdown.replace("```python matplotlib\n", "```python\n")  # a word of the tests
    return re.sub(r"\[([^\]]*)\]\(([^)#\s]*)(#[^)]*)?\)", link, markdown)
