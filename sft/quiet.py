"""Silence the libraries' own bars and notices; ours say what matters, once."""

from __future__ import annotations

import logging
import warnings


def quiet_libraries() -> None:
    """Turn off progress bars and warnings meant for programmers, in this process."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft)\.")
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").addFilter(_tells_news)

    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def _tells_news(record: logging.LogRecord) -> bool:
    """Drop what DeepSpeed says wherever it is installed and there is no GPU, used or not."""
    return not record.getMessage().startswith("Setting accelerator to CPU")
