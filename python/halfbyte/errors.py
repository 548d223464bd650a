"""Exceptions of halfbyte: each names the thing, what was expected, what came, and a hint."""


class HalfbyteError(Exception):
    """Base of every error that halfbyte itself raises."""


class CheckpointError(HalfbyteError, ValueError):
    """A model folder, tensor or adapter that cannot be read or written as asked."""


class UnsupportedModelError(HalfbyteError, ValueError):
    """A config that asks for something the decoder does not implement."""


class DataError(HalfbyteError, ValueError):
    """Training data that cannot be used."""


class ContextLengthError(HalfbyteError, ValueError):
    """A sequence longer than the model or its cache can hold."""


class SchemaError(HalfbyteError, ValueError):
    """A JSON schema that is none, or that asks for more than a grammar can say."""


class QueueFullError(HalfbyteError):
    """More requests than an engine lets wait."""


class AdapterNotFoundError(HalfbyteError, ValueError):
    """A request for an adapter that is not loaded."""
