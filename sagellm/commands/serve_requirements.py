"""What `sagellm serve` needs that the core does not: looked for before anything of it is imported."""

import importlib.util

from sagellm.commands.user_error import UserError

NO_BACKEND = "none"
_OF_THE_SERVER = ("zmq", "jinja2", "tokenizers", "prometheus_client")
_OF_MODELS = ("torch", "safetensors")


def check_installed(backend: str | None) -> None:
    """Raises `UserError` that names the first package that is missing."""
    needed = _OF_THE_SERVER if backend == NO_BACKEND else (*_OF_THE_SERVER, *_OF_MODELS)
    for module in needed:
        if importlib.util.find_spec(module) is None:
            raise UserError(f"serving needs {module}, which is not installed; run: pip install 'sagellm[serve]'")
