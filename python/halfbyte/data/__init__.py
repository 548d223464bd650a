"""Training data: files, row formats, token ids with a loss mask, and the order of rows."""

from halfbyte.data.encode import (
    IGNORED,
    DataReport,
    EncodedRow,
    Encoder,
    check_report,
    collate,
    data_fingerprint,
    encode_rows,
)
from halfbyte.data.files import Malformed, read_rows
from halfbyte.data.formats import FORMATS, check_format, detect_format
from halfbyte.data.order import Batches, grouped_by_length, split_rows

__all__ = [
    "FORMATS",
    "IGNORED",
    "Batches",
    "DataReport",
    "EncodedRow",
    "Encoder",
    "Malformed",
    "check_format",
    "check_report",
    "collate",
    "data_fingerprint",
    "detect_format",
    "encode_rows",
    "grouped_by_length",
    "read_rows",
    "split_rows",
]
