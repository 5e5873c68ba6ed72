"""Hugging Face: Trainer's callbacks for measuring, SAM and batch-size schedules; batch sizes of Accelerate's loaders.

The callbacks need what Trainer does not tell callbacks, so they are attached to it::

    SharpnessCallback(["epsilon_box"], every="1ep").attach(trainer)
    trainer.train()
"""

from importlib import metadata

from sharpness_plugins.errors import missing_dependency

_module = missing_dependency("transformers.trainer_callback", extra="huggingface", purpose="sharpness_adapters.huggingface")
if not hasattr(_module, "ExportableState") or not hasattr(_module.TrainerCallback, "on_pre_optimizer_step"):
    raise ImportError(
        f"sharpness_adapters.huggingface needs transformers>=4.46, and {metadata.version('transformers')} is installed. "
        'Install it with: pip install -U "sharpness-plugins[huggingface]"'
    )

from .loaders import set_batch_size  # noqa: E402
from .measuring import SharpnessCallback  # noqa: E402
from .phases import train_in_phases  # noqa: E402
from .sam import SAMCallback  # noqa: E402
from .sizes import BatchSizeCallback  # noqa: E402

__all__ = ["BatchSizeCallback", "SAMCallback", "SharpnessCallback", "set_batch_size", "train_in_phases"]
