"""Which privacy mechanisms go with compression, and in which order: docs/federated.md gives the reasons at length.

Knows mechanisms by the names of Flower's mods, and loads none of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fstq_infer.errors import OptionError, PrivacyOrderError

CLIPPING_NORM = "clipping_norm"  # in a request: the server adds noise for a bound that clients keep
CLIPPING = ("fixedclipping_mod", "adaptiveclipping_mod")
SECURE_SUMS = ("secagg_mod", "secaggplus_mod")
LOCAL_NOISE = ("LocalDpMod",)
OURS = ("FstqMod", "fstq_mod")
FIRST = "DownlinkMod"
ROBUST = ("FedMedian", "FedTrimmedAvg", "Krum", "MultiKrum", "Bulyan")  # and what derives from them


def check_mods(mods: Sequence[Any], preset: str = "fstq", fisher: bool = False) -> list[Any]:
    """The mods as a list, if what they promise holds together. The first of them is the last to see a reply.

    preset: of fstq_mod. fisher: whether the app returns its parameter Fisher. Raises PrivacyOrderError with the reason,
    and OptionError for a DownlinkMod that is not the first.
    """
    names = [getattr(mod, "__name__", type(mod).__name__) for mod in mods]
    places = [index for index, name in enumerate(names) if name in OURS]
    if FIRST in names[1:]:
        raise OptionError(f"{FIRST} is not the first mod, so those before it would see messages in place of weights.")
    if not places:
        return list(mods)
    if len(places) > 1:
        raise PrivacyOrderError("fstq_mod occurs twice, expected once: a message cannot be compressed again.")
    for index, name in enumerate(names):
        if name in SECURE_SUMS:
            raise PrivacyOrderError(masked(name))
        if name in CLIPPING + LOCAL_NOISE and index < places[0]:
            raise PrivacyOrderError(
                f"{name} comes before fstq_mod, so it would see the compressed bytes in place of weights. Put fstq_mod "
                f"first."
            )
        if name in CLIPPING:
            check_clipping(preset)
            if fisher:
                raise PrivacyOrderError(
                    f"{name} accepts one array record, but the app returns its Fisher beside its weights, so every "
                    f"reply would be an error. Return no 'fstq-fisher' record."
                )
        if name in LOCAL_NOISE and fisher:
            raise PrivacyOrderError(
                f"{name} makes the weights private, but the Fisher that chooses coordinates comes from raw gradients: "
                f"which coordinates are sent would tell of them. Return no 'fstq-fisher' record."
            )
    return list(mods)


def masked(name: str) -> str:
    """Why secure sums do not go with compression."""
    return (
        f"{name} adds masked vectors coordinate by coordinate, but compressed messages keep other coordinates for each "
        f"client, so their sum means nothing. Leave out one of the two."
    )


def check_clipping(preset: str) -> None:
    """Raises PrivacyOrderError unless messages of this preset keep the norm that a client has clipped to."""
    if preset != "lossless":
        raise PrivacyOrderError(
            f"the server adds noise for updates that clients clip, but preset {preset!a} changes an update after "
            f"clipping (error feedback adds what was not sent before, and codes round), so its norm is no longer "
            f"bounded. Clip on the server, FstqStrategy(DifferentialPrivacyServerSideFixedClipping(...)), or use "
            f"preset 'lossless'."
        )


def mosaic_reason(strategy: type) -> str | None:
    """Why mosaic messages do not go with a strategy; None where they do."""
    if not any(cls.__name__ in ROBUST for cls in strategy.__mro__):
        return None
    return (
        f"{strategy.__name__} withstands clients that lie by comparing replies, but mosaic messages are completed from "
        f"each other by a mean, so one liar would set values of others. Use another preset, or FedAvg."
    )
