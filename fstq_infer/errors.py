"""The errors a user can meet: one shallow tree under :class:`FstqError`.

Every message says what was found, what was expected and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FstqError(ValueError):
    """Base of every error raised on purpose by this toolkit."""


class MissingExtraError(FstqError):
    """An optional part is not installed; the message holds the exact install command."""

    def __init__(self, needed_for: str, module: str, extra: str) -> None:
        super().__init__(
            f"{needed_for} needs the Python module '{module}', which is not installed. "
            f"Install it with: pip install 'fstq-infer[{extra}]'"
        )


class BundleError(FstqError):
    """A bundle cannot be read or written; subclasses say why."""


class BundleNotFoundError(BundleError):
    """The path holds no bundle."""


class ManifestError(BundleError):
    """manifest.json is missing a field, has a wrong type or is no JSON."""


class BundleVersionError(BundleError):
    """The bundle was written in another format version."""


class BundlePathError(BundleError):
    """A file name in the manifest leaves the bundle, is a link or is not allowed."""


class BundleSizeError(BundleError):
    """A file is larger than allowed, or not as large as the manifest says."""


class BundleChecksumError(BundleError):
    """A file's content does not match its checksum."""


class BundleExistsError(BundleError):
    """The output path exists already."""


class CalibrationDataError(FstqError):
    """A calibration file has a bad line; the message names file and line."""


class UnsupportedModelError(FstqError):
    """The model's architecture, or a part of it, is not supported; the message names it."""


class ExportError(FstqError):
    """An export cannot go on."""


class VerificationError(ExportError):
    """The exported graph does not compute what the reference does; the message says from which layer on."""


class EngineError(FstqError):
    """An engine cannot be built, loaded or run."""


class EngineMismatchError(EngineError):
    """An engine was built for another bundle, backend or device; the message holds the rebuild command."""


class ParityError(EngineError):
    """A built engine does not compute what its bundle does."""


class AdapterError(FstqError):
    """An adapter cannot be used; subclasses say why."""


class AdapterFormatError(AdapterError):
    """An adapter's files are absent, damaged or larger than allowed."""


class AdapterKindError(AdapterError):
    """An adapter is of a kind, or has an option, that is not supported; the message names it."""


class AdapterMismatchError(AdapterError):
    """An adapter does not fit the model or the bundle."""


class AdapterNameError(AdapterError):
    """A bundle has no adapter of that name, or has one already, or it is no name."""


class PromptError(FstqError):
    """A prompt is empty, too long or otherwise unusable."""


class OptionError(FstqError):
    """An option's name or value is not accepted."""


class ConfigError(OptionError):
    """A configuration has an unknown key or a bad value; the message names file and key."""


class DataError(FstqError):
    """A data set cannot be read or divided among clients; the message names file and row."""


class DeltaError(FstqError):
    """A delta to be compressed does not fit its manifest, or is not finite; the message names the tensor."""


class MessageError(FstqError):
    """A federated message cannot be read (docs/wire-format.md); one subclass for each kind of damage."""


class MessageTruncatedError(MessageError):
    """The message ends before its last part does."""


class MessageTrailingError(MessageError):
    """Bytes follow the end of the message."""


class MessageFormatError(MessageError):
    """The bytes are no message of this format."""


class MessageVersionError(MessageError):
    """The message was written in another version, or needs a feature that this reader lacks."""


class MessageSizeError(MessageError):
    """A declared size is above what the manifest allows."""


class MessageChecksumError(MessageError):
    """The content does not match its checksum."""


class MessageModelError(MessageError):
    """The message was made for another base model."""


class MessageManifestError(MessageError):
    """The message was made for another list of tensors."""


class MessageRoundError(MessageError):
    """The message belongs to another round."""


class MessageCodecError(MessageError):
    """A code is unknown, or is not among those that the header announces."""


class MessageCountError(MessageError):
    """A tensor has more coordinates than it can have, or its count contradicts its code."""


class MessageScaleError(MessageError):
    """A scale is not finite, not positive or too large for its table."""


class MessageTableError(MessageError):
    """A table of magnitudes or of frequencies is not well-formed."""


class MessageSupportError(MessageError):
    """The coded positions do not lie in their tensor, or are not as many as declared."""


class MessagePaddingError(MessageError):
    """A padding bit is set."""


class MessageEntropyError(MessageError):
    """The entropy-coded words do not hold the declared symbols."""


class MessageValueError(MessageError):
    """A raw value is NaN or infinite."""


class ReplyError(FstqError):
    """A client's reply holds no message, was not asked for, or has metrics that cannot be averaged."""


class StateError(FstqError):
    """Saved state of a client or of a server cannot be read or written."""


class PrivacyOrderError(FstqError):
    """Compression is combined with a privacy mechanism in a way that breaks its guarantee; the message says why."""


def suggestion(name: str, known: Iterable[str], there_are: str = "expected one of") -> str:
    """What was probably meant by an unknown name, or what there is (its first twelve)."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!a}?" if close else f"{there_are} {', '.join(names[:12])}"
