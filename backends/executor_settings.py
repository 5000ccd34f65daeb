"""What is needed to make the executor of one instance, in a form that travels to its process."""

import msgspec

from sagellm.core.config import InstanceConfig


class ExecutorSettings(msgspec.Struct, frozen=True):
    """One instance's model and devices."""

    instance: InstanceConfig
    model: str  # a folder with weights, a config.json, a Hub id or a known model's name
    backend: str  # cpu, cuda, ...; "none" costs nothing and gives made-up tokens
    device_indexes: tuple[int, ...] = (0,)
    load_format: str = "auto"  # safetensors | dummy | auto: dummy for sagellm's own models, safetensors for others
    dtype: str = "auto"  # bfloat16 | float16 | float32 | auto: the configuration's
    seed: int = 0  # of dummy weights
    max_model_len: int = 0  # 0: the configuration's
    num_threads: int = 0  # of the CPU backend; 0: as torch likes
