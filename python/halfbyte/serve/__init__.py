"""An OpenAI-compatible server over one engine; needs the extra `serve`."""

from halfbyte.serve.server import ServeConfig, serve

__all__ = ["ServeConfig", "serve"]
