"""`python -m minnow`, the same as `minnow`."""

from minnow.cli import main

raise SystemExit(main())
