"""What `mkdocs build` needs to know: the figures of benchmarks/results belong to the site, and what lies elsewhere in the
project has no page."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ELSEWHERE = re.compile(r"\[([^\]]*)\]\(\.\./(?!benchmarks/results/)[^)]*\)")


def on_files(files, config):
    """The site holds every figure that a page may link to."""
    for path in sorted(RESULTS.iterdir()):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links to figures lead into the site; of links to sources and scripts the words stay."""
    return ELSEWHERE.sub(r"\1", markdown.replace("](../benchmarks/results/", "](results/"))
