"""`python -m lskip`."""

import sys

if __name__ == "__main__":
    if not sys.flags.safe_path:
        # Python puts the working directory in front: a yaml.py there would stand in for PyYAML.
        del sys.path[0]

    from lskip.cli import main

    sys.exit(main())
