"""lskip: LayerSkip for decoder language models (arXiv 2404.16710)."""

from pathlib import Path

# A wheel ships callbacks/ and configs/ inside this package; in a checkout they sit beside it.
if not (Path(__file__).parent / "callbacks").is_dir():
    __path__.append(str(Path(__file__).parent.parent))
