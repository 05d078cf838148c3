"""lskip: LayerSkip for decoder language models (arXiv 2404.16710)."""

import os
import sys
from importlib.machinery import PathFinder

__version__ = "0.1.0"


class _BesideThePackage:
    """Import finder of lskip.callbacks and lskip.configs in a checkout, where they lie beside this folder."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        return PathFinder.find_spec(name, [os.path.dirname(__path__[0])]) if name in _OUTSIDE else None


_OUTSIDE = ("lskip.callbacks", "lskip.configs")
if not os.path.isdir(f"{__path__[0]}/callbacks"):  # a wheel contains them
    sys.meta_path.insert(0, _BesideThePackage)
