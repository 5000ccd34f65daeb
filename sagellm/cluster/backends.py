"""Which backend runs the device that a profile describes."""

from pathlib import Path

import backends


def backend_of_profile(profile: str) -> str:
    """The backend's name: the vendor's folder that the profile is in.

    ``profile`` is ``<device>/<engine>`` or the path of a ``.json`` file in ``<backend>/profiles/``; a file
    elsewhere says nothing of its backend.

    Raises:
        ValueError: no backend has such a profile.
    """
    folder = Path(backends.__file__).parent
    if profile.endswith(".json"):
        path = Path(profile).resolve()
        if path.parent.name == "profiles" and (folder / path.parent.parent.name).is_dir():
            return path.parent.parent.name
        raise ValueError(
            f"profile: {profile} is in no backend's folder, so it does not say what the instance runs on; "
            "name a profile such as cpu/spec or h200/spec to serve"
        )
    found = sorted(folder.glob(f"*/profiles/{profile.replace('/', '_', 1)}.json"))
    if not found:
        raise ValueError(f"profile: {profile!r} is in no backend's folder; name one such as cpu/spec or h200/spec")
    return found[0].parent.parent.name
