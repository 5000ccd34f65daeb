"""What a process of the server has when it begins to serve, and keeps."""

import gc


def keep_for_good() -> None:
    """Leave all that there is by now out of every later search for cycles.

    With torch that is a million objects, and a search through them takes as long as many steps.
    """
    gc.collect()
    gc.freeze()
