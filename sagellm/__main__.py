"""``python -m sagellm`` is ``sagellm``."""

from sagellm.cli import main

main()
