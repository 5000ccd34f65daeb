"""Makes the executor that an instance's settings ask for. Loads torch only for those that need it."""

from backends.executor_settings import ExecutorSettings
from backends.null.executor import NullExecutor
from sagellm.core.step_executor import StepExecutor

NULL_BACKEND = "none"


def make_executor(settings: ExecutorSettings) -> StepExecutor:
    """The executor of one instance, not started.

    Loading the model and taking memory happen in its `start`, which raises `ExecutorError` or
    `backends.errors.BackendError` where the model does not fit the device or the device is not there.
    """
    if settings.backend == NULL_BACKEND:
        return NullExecutor(settings)
    from backends.model_runner.torch_executor import TorchStepExecutor

    return TorchStepExecutor(settings)
