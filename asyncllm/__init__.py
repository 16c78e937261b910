"""asyncllm: a server for large language models, one event loop per GPU."""

__version__ = "0.1.0"
