"""An OpenAI-compatible server over one engine; needs the extra `serve`."""

try:
    from halfbyte.serve.server import ServeConfig, serve
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] not in ("fastapi", "prometheus_client", "uvicorn"):
        raise
    raise ImportError(
        f"the server needs {error.name}. hint: pip install 'halfbyte[serve]'"
    ) from error

__all__ = ["ServeConfig", "serve"]
