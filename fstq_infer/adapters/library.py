"""Adapters by name, loaded when they are first asked for. Knows the bundle that holds them, no engine."""

from __future__ import annotations

from fstq_infer.adapters import store
from fstq_infer.adapters.store import Adapter
from fstq_infer.bundle import Bundle
from fstq_infer.errors import AdapterFormatError, OptionError


class Library:
    """The adapters of one bundle. One that was added since the bundle was opened is found, too."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._loaded: dict[str, tuple[str, Adapter]] = {}  # name -> (checksum, adapter)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all adapters, sorted."""
        return tuple(sorted(self._bundle.manifest.adapters))

    def get(self, name: str | None) -> Adapter | None:
        """The adapter of that name; None for None. Raises AdapterError subclasses, OptionError for what is no name."""
        if name is None:
            return None
        if not isinstance(name, str):
            raise OptionError(f"adapter={name!r} is not accepted; expected an adapter's name, or None for none")
        if name not in self._bundle.manifest.adapters:
            self._open_again()
        try:
            return self._load(name)
        except AdapterFormatError:  # of an adapter that was replaced, perhaps
            if not self._open_again():
                raise
            return self._load(name)

    def _load(self, name: str) -> Adapter:
        info = store.require(self._bundle, name)
        if name not in self._loaded or self._loaded[name][0] != info.sha256:
            self._loaded[name] = (info.sha256, store.load(self._bundle, name))
        return self._loaded[name][1]

    def _open_again(self) -> bool:
        """Whether the manifest has changed, for the same model."""
        before, now = self._bundle, Bundle.open(self._bundle.path, checksums=False)
        if now.model_sha256 == before.model_sha256:
            self._bundle = now
        return self._bundle.manifest_sha256 != before.manifest_sha256
