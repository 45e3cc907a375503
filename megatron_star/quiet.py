"""What dependencies say at import or construction, and a user of a program can do nothing about."""

import logging
import warnings

_MESSAGES = (
    "Apex is not installed",
    "Transformer Engine and Apex are not installed",
    "absl.logging is not installed",
    "full scope is deprecated",
    "Only transformer-engine>=1.7.0 supports MoE experts",
)
_LOGGERS = ("torch.utils.cpp_extension", "megatron.core.models.gpt.gpt_model")


def without_notes_of_dependencies() -> None:
    """Silence notes on optional packages that nothing here needs, and on a model class to be replaced.

    For this whole process, so programs call it, before they import Megatron; a library must not.
    """
    for message in _MESSAGES:
        warnings.filterwarnings("ignore", message=message)
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
