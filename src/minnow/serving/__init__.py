"""An OpenAI-compatible server over the engine."""

from minnow.serving.app import create_app
from minnow.serving.config import ServingConfig
from minnow.serving.models import ServedModel

__all__ = ["ServedModel", "ServingConfig", "create_app"]
