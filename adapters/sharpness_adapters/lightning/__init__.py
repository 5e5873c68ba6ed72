"""Lightning: measuring, batch-size schedules and sharpness-aware steps as callbacks of an unchanged Trainer.

For ``lightning.pytorch``; the older package ``pytorch_lightning`` has other classes, and its Trainer is refused by name.
"""

from ..lightning_auto import auto_callbacks, auto_fabric_callbacks
from ..lightning_step import training_step_loss
from ..lightning_versions import check_lightning

check_lightning(
    "lightning.pytorch", "sharpness_adapters.lightning (which is for the package lightning, not pytorch_lightning)"
)

from .measuring import SharpnessCallback  # noqa: E402
from .sam import SAMCallback  # noqa: E402
from .sizes import BatchSizeCallback, SharedBatchSampler  # noqa: E402
from .steps import total_steps  # noqa: E402

__all__ = [
    "BatchSizeCallback",
    "SAMCallback",
    "SharedBatchSampler",
    "SharpnessCallback",
    "auto_callbacks",
    "auto_fabric_callbacks",
    "total_steps",
    "training_step_loss",
]
