"""Entry point of `python -m lskip`."""

import sys

if __name__ == "__main__":
    if not sys.flags.safe_path:
        # Python puts the working directory first, where a yaml.py would be imported instead of PyYAML.
        del sys.path[0]

    from lskip.cli import main

    sys.exit(main())
